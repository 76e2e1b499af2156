// A parameter server's step, in pieces that stay in the first cache: every vector is read from memory once.
//
//   scratch = the sum of the payloads, by rank   u = Adam(scratch / n) or scratch / n   x -= u, or scratch = -u
//   encode the answer from x, or from scratch and the residual; a delta is decoded again and added to x
//
// The stages are the kernels of sum.inl, codec.inl and optim.inl, so the bits are theirs. A piece is as many whole blocks of both
// formats as fill kPiece values. While one piece is worked on, the next one's vectors are fetched, each in another
// stage, for memory takes only so many requests at a time: x before the payloads, m and v by Adam, the residual by the
// encoder. (Measured: x in Adam's loop too costs a delta 0.1 to 0.15 of memory's speed; larger pieces cost 0.05.)

namespace {

constexpr size_t kPiece = 1024;
// Of many payloads each piece is a short read somewhere else in memory: longer ones cost less.
constexpr size_t kMany = 12, kPieceOfMany = 8192;

}  // namespace

#include "sum.inl"

namespace {

// The mean message as it is: subtracted from x, or negated into out.
PSQ_INLINE void add_loop(const float* sum, float scale, bool subtract, float* out, float* x, size_t numel) {
  const size_t whole = numel & ~size_t(15);
  for (size_t i = 0; i < whole; i += 16) {
    const F u = load(sum + i) * splat(scale);
    if (subtract)
      store(x + i, load(x + i) - u);
    else
      store(out + i, as_f(as_u(u) ^ splat(kSignBit)));
  }
  for (size_t i = whole; i < numel; ++i) {
    if (subtract)
      x[i] -= sum[i] * scale;
    else
      out[i] = -(sum[i] * scale);
  }
}

// From the sum in scratch: x moves, or scratch becomes the change that x is to make.
PSQ_INLINE void direct(const PsqServerStep& s, size_t from, size_t numel, float* scratch) {
  const float scale = 1.0f / float(s.payload_count);
  const PsqResult result = s.answer == PSQ_DELTA ? PSQ_NEGATE : PSQ_SUBTRACT;
  float* x = s.x + from;
  if (s.adam == nullptr) {
    result == PSQ_SUBTRACT ? add_loop(scratch, scale, true, scratch, x, numel)
                           : add_loop(scratch, scale, false, scratch, x, numel);
    return;
  }
  float* vmax = s.vmax == nullptr ? nullptr : s.vmax + from;
  adam({scratch, s.m + from, s.v + from, vmax, x, scratch, numel, *s.adam, {}, result, scale, kPiece});
}

PSQ_INLINE void reply(const PsqServerStep& s, size_t from, size_t numel, const float* scratch) {
  if (s.answer == PSQ_NO_ANSWER) return;
  const bool delta = s.answer == PSQ_DELTA;
  float* residual = s.residual == nullptr ? nullptr : s.residual + from;
  uint8_t* scales = s.scales + scale_offset(s.downlink, from);
  uint8_t* words = s.words + word_offset(s.downlink, from);
  codec_encode({delta ? scratch : s.x + from, residual, scales, words, numel, s.downlink, s.start + uint32_t(from)});
  if (delta) codec_decode({scales, words, s.x + from, numel, s.downlink, true});
}

void server_step(const PsqServerStep& s) {
  size_t piece = s.payload_count < kMany ? kPiece : kPieceOfMany;
  if (s.uplink.block > piece) piece = s.uplink.block;
  if (s.downlink.block > piece) piece = s.downlink.block;
  const bool one_scale = s.downlink.block == 0 && s.downlink.family != PSQ_BF16 && s.downlink.family != PSQ_FP32;
  const size_t span = one_scale ? s.numel : piece;  // what can be encoded at a time
  for (size_t from = 0; from < s.numel; from += span) {
    const size_t count = at_most(span, s.numel - from);
    for (size_t at = 0; at < count; at += piece) {
      const size_t here = at_most(piece, count - at);
      fetch(s.x + from + at + here, at_most(here, kPiece) * sizeof(float));
      payload_sum(s, from + at, here, s.scratch + at);
      direct(s, from + at, here, s.scratch + at);
    }
    reply(s, from, count, s.scratch);
  }
}

const PsqServerKernels server_kernels = {server_step};

}  // namespace
