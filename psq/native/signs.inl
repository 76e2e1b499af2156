// Signs with error feedback: the quantizer of the thinnest links and the only one that nothing but memory holds up, so
// its blocks have a loop of their own. The bits are those of the driver in codec.inl, which takes what is left: short
// blocks, blocks of half a group, those that are not finite.

namespace {

PSQ_INLINE void keep_rest(float* residual, F rest) { store(residual, rest); }
PSQ_INLINE void keep_rest(uint16_t* residual, F rest) { put_halves(residual, rounded_to_bf16(rest)); }

// How far on to fetch, in values. Measured: what a small block and the quarter of the next need, and no more, is worth
// 0.05 of memory's speed; not where a residual in bf16 leaves more room.
template <class E>
PSQ_INLINE size_t sign_ahead(size_t block) {
  return sizeof(E) == sizeof(float) && block <= 1024 ? 1280 : PSQ_AHEAD;
}

template <class E>
PSQ_INLINE float mean_size(const float* values, const E* residual, size_t numel) {
  F sums = splat(0.0f);
  for (size_t i = 0; i < numel; i += 16) sums = accumulate<kMeanAbs>(sums, load(values + i) + load(residual + i));
  Norm norm = {};
  norm.add(sum(sums));
  return norm.of(kMeanAbs, numel);
}

// Whole groups: signs to words, the rest to the residual.
template <class E>
PSQ_INLINE void pack_signs(const float* values, E* residual, size_t numel, float scale, uint8_t* words, size_t ahead,
                           size_t residual_ahead) {
  Sign<kMeanAbs> quantizer = {};
  quantizer.scale = scale;
  for (size_t from = 0; from < numel; from += kGroup, words += 64) {
    U word = splat(0u);
    PSQ_ROLLED
    for (size_t i = from; i < from + kGroup; i += 16) {
      __builtin_prefetch(values + i + ahead);
      __builtin_prefetch(residual + i + residual_ahead, 1);
      const F c = load(values + i) + load(residual + i);
      U top;
      const F d = quantized(quantizer, c, as_u(c), top);
      keep_rest(residual + i, c - d);
      word = (word >> 1) | top;
    }
    store_words(words, word);
  }
}

// The blocks of whole groups, up to the first that is not finite; residual: floats, or bf16. Returns how many values.
template <class E>
PSQ_OUTLINE size_t encode_signs(const PsqEncode& a) {
  const size_t block = a.format.block, further = sign_ahead<E>(block), ahead = a.ahead == 0 ? 0 : further;
  size_t at = 0;
  for (; at + block <= a.numel; at += block) {
    const float* values = a.values + at;
    E* residual = (E*)a.residual + at;
    rescale(a, at, block);
    const float norm = mean_size(values, residual, block);
    if (!is_finite(norm)) break;
    Sign<kMeanAbs> quantizer = {};
    put_scale(a.scales, at / block, quantizer.set(norm, 0));
    pack_signs(values, residual, block, quantizer.scale, a.words + at / 8, ahead, further);
    if (a.clear) clear((float*)values, block);
  }
  return at;
}

PSQ_INLINE PsqEncode part_from(const PsqEncode& a, size_t from) {
  PsqEncode part = a;
  part.values += from;
  part.numel -= from;
  part.scales += scale_offset(a.format, from);
  part.words += word_offset(a.format, from);
  if (a.residual != nullptr) part.residual = (uint8_t*)a.residual + from * (a.half ? sizeof(uint16_t) : sizeof(float));
  return part;
}

PSQ_OUTLINE void sign_encode(const PsqEncode& a) {
  const bool by_blocks = a.residual != nullptr && a.format.block >= kGroup;
  for (size_t done = 0; done < a.numel;) {
    PsqEncode rest = part_from(a, done);
    if (by_blocks) {
      const size_t count = a.half ? encode_signs<uint16_t>(rest) : encode_signs<float>(rest);
      done += count;
      rest = part_from(rest, count);
      if (rest.numel >= a.format.block) {  // its first block is not finite, which has been found out
        rest.numel = a.format.block;
        rest.residual_scale = 1.0f;
      }
    }
    encode_segment(kCoder<Sign<kMeanAbs>>, rest);
    done += rest.numel;
  }
}

}  // namespace
