// A worker's push, in pieces that stay in the first cache: every vector is read from memory once.
//
//   u = Adam(g) or a blend, to scratch, or g itself      residual *= scale, if that is not 1
//   encode u + residual, or (nothing to say) residual += u
//
// The stages are the kernels of optim.inl and codec.inl, so the bits are theirs. A piece is as many whole blocks as
// fill kPush values. While it works on one, Adam's stage fetches what comes later of g, m and v, the encoder of the
// residual. (Measured: without g being fetched the whole costs 0.1 to 0.15 of memory's speed, and no less than passes.)

namespace {

constexpr size_t kPush = 512;

PSQ_INLINE void absorb_row(const float* u, float* residual) {
  const F c = compensated<kKeep>(u, residual);
  store(residual, select(less(as_i(absolute(c)), splat(int32_t(kInfinity))), c, load(residual)));
}

// residual += u where the sum is finite.
PSQ_OUTLINE void absorb(const float* u, float* residual, size_t numel) {
  const size_t whole = numel & ~size_t(15), bytes = (numel - whole) * sizeof(float);
  for (size_t i = 0; i < whole; i += 16) {
    __builtin_prefetch(residual + i + PSQ_AHEAD, 1);
    absorb_row(u + i, residual + i);
  }
  if (bytes == 0) return;
  float last[16] = {}, kept[16] = {};
  __builtin_memcpy(last, u + whole, bytes);
  __builtin_memcpy(kept, residual + whole, bytes);
  absorb_row(last, kept);
  __builtin_memcpy(residual + whole, kept, bytes);
}

PSQ_OUTLINE void absorb_all(const float* u, void* residual, bool half, float scale, size_t numel, bool clears) {
  Memory memory(residual, half);
  for (size_t from = 0; from < numel; from += kChunk) {
    const size_t count = at_most(kChunk, numel - from);
    if (scale != 1.0f) rescale_residual(residual, half, from, count, scale);
    absorb(u + from, memory.open(from, count), count);
    memory.close(from, count);
    if (clears) clear((float*)u + from, count);
  }
}

template <bool divides>
PSQ_INLINE void blend_row(const PsqBlend& blend, const float* g, const float* before, const float* unit, float* out) {
  F said = load(g);
  if (divides) said = said / load(unit);
  store(out, said * splat(blend.rest) + load(before) * splat(blend.kept));
}

template <bool divides>
PSQ_OUTLINE void blend_rows(const PsqBlend& b, const float* g, const float* before, const float* unit, float* out,
                            size_t numel) {
  const PsqBlend blend = b;  // a local copy: the stores below cannot change it
  const size_t whole = numel & ~size_t(15), bytes = (numel - whole) * sizeof(float);
  for (size_t i = 0; i < whole; i += 16) {
    __builtin_prefetch(g + i + PSQ_AHEAD);
    __builtin_prefetch(before + i + PSQ_AHEAD);
    if (divides) __builtin_prefetch(unit + i + PSQ_AHEAD);
    blend_row<divides>(blend, g + i, before + i, unit + i, out + i);
  }
  if (bytes == 0) return;
  float last[16] = {}, held[16] = {}, units[16], said[16];
  for (float& one : units) one = 1.0f;
  __builtin_memcpy(last, g + whole, bytes);
  __builtin_memcpy(held, before + whole, bytes);
  if (divides) __builtin_memcpy(units, unit + whole, bytes);
  blend_row<divides>(blend, last, held, units, said);
  __builtin_memcpy(out + whole, said, bytes);
}

PSQ_INLINE void worker_blend(const PsqWorkerStep& s, size_t from, size_t numel, float* out) {
  if (s.unit == nullptr)
    blend_rows<false>(*s.blend, s.g + from, s.before + from, nullptr, out, numel);
  else
    blend_rows<true>(*s.blend, s.g + from, s.before + from, s.unit + from, out, numel);
  if (s.clear) clear((float*)s.g + from, numel);
}

PSQ_INLINE void worker_direct(const PsqWorkerStep& s, size_t from, size_t numel, float* out) {
  if (s.blend != nullptr) return worker_blend(s, from, numel, out);
  float* third = s.third == nullptr ? nullptr : s.third + from;
  float* x = s.x == nullptr ? nullptr : (float*)s.x + from;  // not written: PSQ_WRITE
  const PsqCorrectionCoefficients none = {};
  const PsqAdam step = {s.g + from, s.m + from, s.v + from, third, x, out, numel, *s.adam,
                        s.corrected == nullptr ? none : *s.corrected, PSQ_WRITE, 1.0f, PSQ_AHEAD};
  for (size_t i = 0; i < numel; i += 16) __builtin_prefetch(s.g + from + PSQ_AHEAD + i);
  s.corrected == nullptr ? adam(step) : adam_corrected(step);
  if (s.clear) clear((float*)s.g + from, numel);
}

PSQ_INLINE void worker_say(const PsqWorkerStep& s, size_t from, size_t numel, const float* u) {
  uint8_t* residual = (uint8_t*)s.residual;
  if (residual != nullptr) residual += from * (s.half ? sizeof(uint16_t) : sizeof(float));
  const bool direct = s.adam == nullptr && s.blend == nullptr;
  if (s.scales == nullptr) {
    return absorb_all(u, residual, s.half, s.residual_scale, numel, s.clear && direct);
  }
  uint8_t* scales = s.scales + scale_offset(s.format, from);
  uint8_t* words = s.words + word_offset(s.format, from);
  codec_encode({u, residual, scales, words, numel, s.format, s.start + uint32_t(from), s.half,
                direct ? PSQ_AHEAD : 0, s.clear && direct, s.residual_scale});
}

void worker_step(const PsqWorkerStep& s) {
  if (s.adam == nullptr && s.blend == nullptr) return worker_say(s, 0, s.numel, s.g);
  const bool scaled = s.format.family != PSQ_BF16 && s.format.family != PSQ_FP32;
  const size_t piece = s.format.block > kPush ? s.format.block : kPush;
  // What can be said at a time.
  const size_t span = s.scales != nullptr && scaled && s.format.block == 0 ? s.numel : piece;
  for (size_t from = 0; from < s.numel; from += span) {
    const size_t count = at_most(span, s.numel - from);
    for (size_t at = 0; at < count; at += piece)
      worker_direct(s, from + at, at_most(piece, count - at), s.scratch + at);
    worker_say(s, from, count, s.scratch);
  }
}

const PsqWorkerKernels worker_kernels = {worker_step};

}  // namespace
