// Codec kernels over quantize.inl: the bits of psq/kernels/reference.py, at the speed of memory.
//
// Blocks, groups, words, tails and error feedback are written once, for every quantizer. Encoding reads a block twice,
// the second time from L1: once for the scale, once to quantize, pack and leave the residual. Lloyd-Max, whose scale
// needs the codes, packs first and leaves the residual in a third pass. Rolled loops: unrolled ones compile for minutes
// and run slower.
#include "words.inl"

namespace {

// ---- segments --------------------------------------------------------------------------------------------------

template <class Q>
constexpr size_t kGroupBytes = 64 * Q::kBits;

PSQ_INLINE void put_scale(uint8_t* scales, size_t at, float scale) { __builtin_memcpy(scales + 4 * at, &scale, 4); }

// Out of line, once for each kind: short groups come here too.
template <class Q, int kParts, Feedback kFeedback>
PSQ_OUTLINE void pack_groups(const Q* parts, const float* values, Residual<kFeedback>* residual, size_t numel,
                             uint8_t* words, uint32_t index, size_t ahead) {
  Q local[kParts];
  for (int part = 0; part < kParts; ++part) local[part] = parts[part];
  for (size_t from = 0; from < numel; from += kGroup, words += kGroupBytes<Q>) {
    Residual<kFeedback>* e = kFeedback != kForget ? residual + from : nullptr;
    Rows<Q, kParts, kFeedback> rows = {local, values + from, e, splat(index + uint32_t(from)) + lanes(), ahead, 0};
    pack_group<Q>(rows, words);
  }
}

// A group that is short, or half of which is not finite: through buffers where what is missing or not live is 0, which
// every codec encodes as code 0; only live values get a new residual.
template <class Q, int kParts, Feedback kFeedback>
PSQ_INLINE void pack_careful(const Q* parts, const bool* live, const float* values, Residual<kFeedback>* residual,
                             size_t numel, uint8_t* words, uint32_t index) {
  float x[kGroup] = {};
  Residual<kFeedback> e[kGroup] = {};
  constexpr size_t kPart = kGroup / kParts;
  size_t counts[kParts] = {};
  for (int part = 0; part < kParts; ++part) {
    const size_t from = part * kPart;
    if (!live[part] || from >= numel) continue;
    counts[part] = at_most(kPart, numel - from);
    __builtin_memcpy(x + from, values + from, counts[part] * sizeof(float));
    if (kFeedback != kForget) __builtin_memcpy(e + from, residual + from, counts[part] * sizeof e[0]);
  }
  pack_groups<Q, kParts, kFeedback>(parts, x, e, kGroup, words, index, 0);
  for (int part = 0; kFeedback != kForget && part < kParts; ++part)
    __builtin_memcpy(residual + part * kPart, e + part * kPart, counts[part] * sizeof e[0]);
}

template <class Q, int kParts, Feedback kFeedback>
PSQ_INLINE void pack_span(const Q* parts, const bool* live, const float* values, Residual<kFeedback>* residual,
                          size_t numel, uint8_t* words, uint32_t index, size_t ahead) {
  const size_t whole = live[0] && live[kParts - 1] ? numel / kGroup * kGroup : 0;
  if (whole > 0) pack_groups<Q, kParts, kFeedback>(parts, values, residual, whole, words, index, ahead);
  words += whole / kGroup * kGroupBytes<Q>;
  for (size_t from = whole; from < numel; from += kGroup, words += kGroupBytes<Q>)
    pack_careful<Q, kParts, kFeedback>(parts, live, values + from, kFeedback != kForget ? residual + from : nullptr,
                                       at_most(kGroup, numel - from), words, index + uint32_t(from));
}

// One span of a segment: up to kSpan values, or a block that is larger.
template <Feedback kFeedback>
struct Span {
  const float* values;
  Residual<kFeedback>* residual;  // or null
  uint8_t* words;
  size_t numel, block;
  int32_t parameter;
  uint32_t index;  // of its first value in the random stream
  size_t ahead;    // as PsqEncode's
};

// The quantizers of a span's blocks, their scales for the wire, and which blocks are finite. Returns how many.
template <class Q, Feedback kFeedback>
PSQ_INLINE size_t fit_span(const Span<kFeedback>& a, Q* parts, bool* live, uint8_t* scales) {
  size_t blocks = 0;
  for (size_t at = 0; at < a.numel; at += a.block, ++blocks) {
    float scale;
    const Residual<kFeedback>* e = kFeedback != kForget ? a.residual + at : nullptr;
    const size_t count = at_most(a.block, a.numel - at);
    live[blocks] = fit<Q, kFeedback>(parts[blocks], scale, a.values + at, e, count, a.parameter);
    put_scale(scales, blocks, scale);
  }
  return blocks;
}

// ---- Lloyd-Max: codes come before their scale ------------------------------------------------------------------

// Codes of rows in order, and the two sums of their scale.
template <class Q, Feedback kFeedback>
struct Places {
  Q q;
  const float* values;
  const Residual<kFeedback>* residual;
  size_t ahead;
  F product, square;

  PSQ_METHOD U next() {
    __builtin_prefetch(values + ahead);
    if (kFeedback != kForget) __builtin_prefetch(residual + PSQ_AHEAD, 1);
    const F c = compensated<kFeedback>(values, residual);
    const U sign = sign_of(as_u(c));
    const F size = as_f(as_u(c) ^ sign);
    U top;
    const F point = placed(q, size, sign, top);
    product = product + size * point;
    square = square + point * point;
    values += 16;
    if (kFeedback != kForget) residual += 16;
    return top;
  }
};

// What the codes do not say of values + residual.
template <class Q, Feedback kFeedback>
struct Rest {
  Reader<Q> reader;
  const float* values;
  Residual<kFeedback>* residual;

  PSQ_METHOD void put_next(U word, int left) {
    leave(residual, compensated<kFeedback>(values, residual) - reader.value(word, left));
    values += 16;
    residual += 16;
  }
};

// Rows that a block of half a group, or else a group, can be cut into.
template <class Q, int kParts>
constexpr int kUnitWords = kParts == 1 ? Q::kBits : Q::kBits / 2;
template <int kParts>
constexpr size_t kUnit = kGroup / kParts;

// Writes a whole block's words, returns its scale.
template <class Q, int kParts, Feedback kFeedback>
PSQ_OUTLINE float place_block(const Q& q, const float* values, const Residual<kFeedback>* residual, size_t numel,
                              uint8_t* words, size_t ahead) {
  double products = 0.0, squares = 0.0;
  for (size_t from = 0; from < numel; from += kChunk) {
    const size_t count = at_most(kChunk, numel - from);
    const Residual<kFeedback>* e = residual + (kFeedback != kForget ? from : 0);
    Places<Q, kFeedback> places = {q, values + from, e, ahead, splat(0.0f), splat(0.0f)};
    for (size_t at = 0; at < count; at += kUnit<kParts>, words += 64 * kUnitWords<Q, kParts>)
      pack_group<Q, kUnitWords<Q, kParts>>(places, words);
    products += double(sum(places.product));
    squares += double(sum(places.square));
  }
  return q.scale > 0.0f ? float(products) / float(squares) : 0.0f;
}

template <class Q, int kParts, Feedback kFeedback>
PSQ_OUTLINE void leave_rest(const Q& q, const float* values, Residual<kFeedback>* residual, size_t numel,
                            const uint8_t* words) {
  Rest<Q, kFeedback> rest = {{}, values, residual};
  rest.reader.set(q);
  for (size_t at = 0; at < numel; at += kUnit<kParts>, words += 64 * kUnitWords<Q, kParts>)
    unpack_group<Q, kUnitWords<Q, kParts>>(rest, words);
}

// A span whose blocks are whole and finite; their quantizers are fitted.
template <class Q, int kParts, Feedback kFeedback>
PSQ_INLINE void encode_places(const Span<kFeedback>& a, Q* parts, uint8_t* scales) {
  const size_t block_bytes = a.block / 8 * Q::kBits;
  for (size_t from = 0, k = 0; from < a.numel; from += a.block, ++k) {
    const Residual<kFeedback>* e = kFeedback != kForget ? a.residual + from : nullptr;
    uint8_t* words = a.words + k * block_bytes;
    const float scale = place_block<Q, kParts, kFeedback>(parts[k], a.values + from, e, a.block, words, a.ahead);
    put_scale(scales, k, scale);
    parts[k].restore(scale, 0);
  }
  if constexpr (kFeedback != kForget) {
    for (size_t from = 0, k = 0; from < a.numel; from += a.block, ++k)
      leave_rest<Q, kParts, kFeedback>(parts[k], a.values + from, a.residual + from, a.block,
                                       a.words + k * block_bytes);
  }
}

template <class Q, Feedback kFeedback>
PSQ_INLINE void rescale(const Span<kFeedback>& a, Q* parts, const bool* live, uint8_t* scales) {
  for (size_t from = 0, k = 0; from < a.numel; from += a.block, ++k) {
    if (!live[k]) continue;
    float scale = 0.0f;
    if (parts[k].scale > 0.0f)
      scale = best_scale<Q, kFeedback>(parts[k], a.values + from, kFeedback != kForget ? a.residual + from : nullptr,
                                       at_most(a.block, a.numel - from));
    put_scale(scales, k, scale);
    parts[k].restore(scale, 0);
  }
}

// ---- segments --------------------------------------------------------------------------------------------------

template <class Q, int kParts, Feedback kFeedback>
PSQ_INLINE void encode_span(const Span<kFeedback>& a, uint8_t*& scales) {
  Q parts[kMostParts + 1] = {};
  bool live[kMostParts + 1];
  if constexpr (Q::kStatistic == kNone) {
    live[0] = true;
  } else {
    const size_t blocks = fit_span<Q, kFeedback>(a, parts, live, scales);
    uint8_t* const here = scales;
    scales += 4 * blocks;
    live[blocks] = true;  // the missing half of a last group
    parts[blocks].set(0.0f, a.parameter);
    if constexpr (kIsLloydMax<Q>) {
      bool whole = a.numel % a.block == 0 && a.numel % kGroup == 0;
      for (size_t k = 0; k < blocks; ++k) whole = whole && live[k];
      if constexpr (kParts == 1 || Q::kBits % 2 == 0)
        if (whole) return encode_places<Q, kParts, kFeedback>(a, parts, here);
      rescale<Q, kFeedback>(a, parts, live, here);
    }
  }
  const size_t unit = kParts == 1 ? a.block : kGroup;
  uint8_t* words = a.words;
  for (size_t from = 0, part = 0; from < a.numel; from += unit, part += kParts) {
    const size_t count = at_most(unit, a.numel - from);
    Residual<kFeedback>* e = kFeedback != kForget ? a.residual + from : nullptr;
    pack_span<Q, kParts, kFeedback>(parts + part, live + part, a.values + from, e, count, words,
                                    a.index + uint32_t(from), a.ahead);
    words += (count + kGroup - 1) / kGroup * kGroupBytes<Q>;
  }
}

template <class Q, int kParts, Feedback kFeedback>
PSQ_OUTLINE void encode_segment(const PsqEncode& a) {
  const size_t block = a.format.block == 0 ? a.numel : a.format.block;
  const size_t span = block > kSpan ? block : kSpan;
  Residual<kFeedback>* residual = (Residual<kFeedback>*)a.residual;
  uint8_t *words = a.words, *scales = a.scales;
  for (size_t from = 0; from < a.numel; from += span) {
    const size_t count = at_most(span, a.numel - from);
    Residual<kFeedback>* e = kFeedback != kForget ? residual + from : nullptr;
    const Span<kFeedback> here = {a.values + from,    e,                        words,  count, block,
                                  a.format.parameter, a.start + uint32_t(from), a.ahead};
    encode_span<Q, kParts, kFeedback>(here, scales);
    words += (count + kGroup - 1) / kGroup * kGroupBytes<Q>;
  }
}

template <class Q, int kParts, bool kAdd>
PSQ_OUTLINE void unpack_groups(const Q* parts, const uint8_t* words, float* out, size_t numel, size_t ahead) {
  Reader<Q> local[kParts];
  for (int part = 0; part < kParts; ++part) local[part].set(parts[part]);
  for (size_t from = 0; from < numel; from += kGroup, words += kGroupBytes<Q>) {
    Sink<Q, kParts, kAdd> sink = {local, out + from, ahead, 0};
    unpack_group<Q>(sink, words);
  }
}

template <class Q, int kParts, bool kAdd>
PSQ_OUTLINE void decode_segment(const PsqDecode& a) {
  const size_t block = a.format.block == 0 ? a.numel : a.format.block;
  const size_t span = kParts == 1 ? block : kGroup;
  const uint8_t *words = a.words, *scales = a.scales;
  for (size_t from = 0; from < a.numel; from += span) {
    const size_t count = at_most(span, a.numel - from);
    Q parts[kParts] = {};
    for (int part = 0; part < kParts; ++part) {
      float scale = 0.0f;
      if (Q::kStatistic != kNone && part * block < count) {
        __builtin_memcpy(&scale, scales, 4);
        scales += 4;
      }
      parts[part].restore(scale, a.format.parameter);
    }
    float* out = a.out + from;
    const size_t whole = count / kGroup * kGroup;
    if (whole > 0) unpack_groups<Q, kParts, kAdd>(parts, words, out, whole, a.ahead);
    words += whole / kGroup * kGroupBytes<Q>;
    if (whole == count) continue;
    float last[kGroup] = {};
    const size_t bytes = (count - whole) * sizeof(float);
    if (kAdd) __builtin_memcpy(last, out + whole, bytes);
    unpack_groups<Q, kParts, kAdd>(parts, words, last, kGroup, 0);
    __builtin_memcpy(out + whole, last, bytes);
    words += kGroupBytes<Q>;
  }
}

template <class Q>
void encode_with(const PsqEncode& a) {
  const bool halves = a.format.block == kGroup / 2;
  if (a.residual == nullptr) return halves ? encode_segment<Q, 2, kForget>(a) : encode_segment<Q, 1, kForget>(a);
  if (a.half) return halves ? encode_segment<Q, 2, kHalf>(a) : encode_segment<Q, 1, kHalf>(a);
  return halves ? encode_segment<Q, 2, kWhole>(a) : encode_segment<Q, 1, kWhole>(a);
}

template <class Q>
void decode_with(const PsqDecode& a) {
  const bool halves = a.format.block == kGroup / 2;
  if (a.add) return halves ? decode_segment<Q, 2, true>(a) : decode_segment<Q, 1, true>(a);
  return halves ? decode_segment<Q, 2, false>(a) : decode_segment<Q, 1, false>(a);
}

// ---- fp32: the values themselves, no words, no padding ---------------------------------------------------------

template <Feedback kFeedback>
PSQ_INLINE void fp32_row(const float* values, Residual<kFeedback>* residual, uint8_t* payload) {
  const F c = compensated<kFeedback>(values, residual);
  const U size = as_u(absolute(c));
  store_words(payload, select(is_nan(as_i(size)), splat(kNaN), as_u(c)));
  if constexpr (kFeedback != kForget) leave_where(residual, size, splat(0.0f));
}

template <Feedback kFeedback>
PSQ_OUTLINE void fp32_encode(const PsqEncode& a) {
  const size_t whole = a.numel & ~size_t(15), rest = a.numel - whole;
  Residual<kFeedback>* residual = (Residual<kFeedback>*)a.residual;
  for (size_t i = 0; i < whole; i += 16)
    fp32_row<kFeedback>(a.values + i, kFeedback != kForget ? residual + i : nullptr, a.words + 4 * i);
  float x[16] = {};
  Residual<kFeedback> e[16] = {};
  uint8_t last[64];
  __builtin_memcpy(x, a.values + whole, rest * sizeof(float));
  if (kFeedback != kForget) __builtin_memcpy(e, residual + whole, rest * sizeof e[0]);
  fp32_row<kFeedback>(x, e, last);
  __builtin_memcpy(a.words + 4 * whole, last, rest * sizeof(float));
  if (kFeedback != kForget) __builtin_memcpy(residual + whole, e, rest * sizeof e[0]);
}

PSQ_OUTLINE void fp32_decode(const PsqDecode& a) {
  if (!a.add) {
    __builtin_memcpy(a.out, a.words, a.numel * sizeof(float));
    return;
  }
  const size_t whole = a.numel & ~size_t(15);
  for (size_t i = 0; i < whole; i += 16) store(a.out + i, load(a.out + i) + as_f(load_words(a.words + 4 * i)));
  for (size_t i = whole; i < a.numel; ++i) {
    float value;
    __builtin_memcpy(&value, a.words + 4 * i, 4);
    a.out[i] += value;
  }
}

// ---- the table -------------------------------------------------------------------------------------------------

#define PSQ_EACH_QUANTIZER(X)                                             \
  X(PSQ_LOG, 2, Log<2>) X(PSQ_LOG, 3, Log<3>) X(PSQ_LOG, 4, Log<4>)       \
  X(PSQ_UNIFORM, 2, Uniform<2 PSQ_COMMA false>)                           \
  X(PSQ_UNIFORM, 3, Uniform<3 PSQ_COMMA false>)                           \
  X(PSQ_UNIFORM, 4, Uniform<4 PSQ_COMMA false>)                           \
  X(PSQ_UNIFORM, 8, Uniform<8 PSQ_COMMA false>)                           \
  X(PSQ_LLOYD_MAX, 1, LloydMax<1>) X(PSQ_LLOYD_MAX, 2, LloydMax<2>)       \
  X(PSQ_LLOYD_MAX, 3, LloydMax<3>) X(PSQ_LLOYD_MAX, 4, LloydMax<4>)       \
  X(PSQ_BF16, 16, Bf16)
#define PSQ_COMMA ,
#define PSQ_KEY(family, bits) ((family) * 256 + (bits))

// topk.inl has these.
PSQ_OUTLINE void topk_encode(const PsqEncode& a);
PSQ_OUTLINE void topk_decode(const PsqDecode& a);
PSQ_OUTLINE bool topk_ascends(const uint8_t* entries, size_t numel, const PsqFormat& format);

void codec_encode(const PsqEncode& a) {
  if (a.format.family == PSQ_TOPK) return topk_encode(a);
  switch (PSQ_KEY(a.format.family, a.format.bits)) {
    case PSQ_KEY(PSQ_SIGN, 1):
      return a.format.parameter == 2 ? encode_with<Sign<kRootMeanSquare>>(a) : encode_with<Sign<kMeanAbs>>(a);
#define X(family, bits, Q)     \
  case PSQ_KEY(family, bits):  \
    return encode_with<Q>(a);
      PSQ_EACH_QUANTIZER(X)
      X(PSQ_STOCHASTIC, 2, Uniform<2 PSQ_COMMA true>)
      X(PSQ_STOCHASTIC, 3, Uniform<3 PSQ_COMMA true>)
      X(PSQ_STOCHASTIC, 4, Uniform<4 PSQ_COMMA true>)
      X(PSQ_STOCHASTIC, 8, Uniform<8 PSQ_COMMA true>)
#undef X
    case PSQ_KEY(PSQ_FP32, 32):
      if (a.residual == nullptr) return fp32_encode<kForget>(a);
      return a.half ? fp32_encode<kHalf>(a) : fp32_encode<kWhole>(a);
  }
}

void codec_decode(const PsqDecode& a) {
  if (a.format.family == PSQ_TOPK) return topk_decode(a);
  PsqDecode b = a;
  if (b.format.family == PSQ_STOCHASTIC) b.format.family = PSQ_UNIFORM;  // the same words and steps
  switch (PSQ_KEY(b.format.family, b.format.bits)) {
    case PSQ_KEY(PSQ_SIGN, 1):
      return decode_with<Sign<kMeanAbs>>(b);
#define X(family, bits, Q)     \
  case PSQ_KEY(family, bits):  \
    return decode_with<Q>(b);
      PSQ_EACH_QUANTIZER(X)
#undef X
    case PSQ_KEY(PSQ_FP32, 32):
      return fp32_decode(b);
  }
}

bool all_finite_f32(const uint8_t* values, size_t numel) {
  const float* x = (const float*)values;
  for (size_t from = 0; from < numel; from += kChunk) {
    const float largest = norm<kMaxAbs, kForget>(x + from, nullptr, at_most(kChunk, numel - from));
    if (!is_finite(largest)) return false;
  }
  return true;
}

bool all_finite_bf16(const uint8_t* values, size_t numel) {
  bool finite = true;
  for (size_t i = 0; i < numel; ++i) {
    uint16_t half;
    __builtin_memcpy(&half, values + 2 * i, 2);
    finite &= (half & 0x7f80u) != 0x7f80u;
  }
  return finite;
}

const PsqCodecKernels codec_kernels = {codec_encode, codec_decode, all_finite_f32, all_finite_bf16, topk_ascends};

}  // namespace
