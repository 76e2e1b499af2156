// Codec kernels over quantize.inl: the bits of psq/kernels/reference.py, at the speed of memory.
//
// Blocks, groups, words, tails and error feedback are written once, for every quantizer. Encoding reads a block twice,
// the second time from L1: once for the scale, once to quantize, pack and leave the residual. Lloyd-Max, whose scale
// needs the codes, packs first and leaves the residual in a third pass. Rolled loops: unrolled ones compile for minutes
// and run slower.
#include "words.inl"

namespace {

// ---- groups ----------------------------------------------------------------------------------------------------

template <class Q>
constexpr size_t kGroupBytes = 64 * Q::kBits;
// Whether half a group fills whole words: then all formats go half by half, else a half may end within a word.
template <class Q>
constexpr bool kCutsInHalves = Q::kBits % 2 == 0;
template <class Q>
constexpr size_t kUnit = kCutsInHalves<Q> ? kGroup / 2 : kGroup;
template <class Q>
constexpr int kUnitWords = kCutsInHalves<Q> ? Q::kBits / 2 : Q::kBits;

PSQ_INLINE void put_scale(uint8_t* scales, size_t at, float scale) { __builtin_memcpy(scales + 4 * at, &scale, 4); }

template <class Q, int kParts, Feedback kFeedback>
PSQ_INLINE void pack_units(const Constants* parts, const float* values, float* residual, size_t numel, uint8_t* words,
                           uint32_t index, size_t ahead, size_t other) {
  Q local[kParts];
  for (size_t from = 0, half = 0; from < numel; from += kUnit<Q>, words += 64 * kUnitWords<Q>, ++half) {
    if (from == 0 || other != 0)
      for (int part = 0; part < kParts; ++part) local[part] = made_of<Q>(parts[(half + size_t(part)) & other]);
    float* e = further<kFeedback>(residual, from);
    Rows<Q, kParts, kFeedback> rows = {local, values + from, e, splat(index + uint32_t(from)) + lanes(), ahead, 0};
    pack_group<Q, kUnitWords<Q>>(rows, words);
  }
}

// Whole groups: codes to words, the rest to the residual. `other`: 1 where the second half of a group has a quantizer of
// its own, else 0.
template <class Q, Feedback kFeedback>
PSQ_OUTLINE void pack_groups(const Constants* parts, const float* values, float* residual, size_t numel,
                             uint8_t* words, uint32_t index, size_t ahead, size_t other) {
  if constexpr (kCutsInHalves<Q>) {
    pack_units<Q, 1, kFeedback>(parts, values, residual, numel, words, index, ahead, other);
  } else {
    other == 0 ? pack_units<Q, 1, kFeedback>(parts, values, residual, numel, words, index, ahead, 0)
               : pack_units<Q, 2, kFeedback>(parts, values, residual, numel, words, index, ahead, 1);
  }
}

template <class Q, int kParts, bool kAdd>
PSQ_INLINE void unpack_units(const Constants* parts, const uint8_t* words, float* out, size_t numel, size_t ahead,
                             size_t other) {
  Reader<Q> local[kParts];
  for (size_t from = 0, half = 0; from < numel; from += kUnit<Q>, words += 64 * kUnitWords<Q>, ++half) {
    if (from == 0 || other != 0)
      for (int part = 0; part < kParts; ++part) local[part].set(made_of<Q>(parts[(half + size_t(part)) & other]));
    Sink<Q, kParts, kAdd> sink = {local, out + from, ahead, 0};
    unpack_group<Q, kUnitWords<Q>>(sink, words);
  }
}

template <class Q, bool kAdd>
PSQ_OUTLINE void unpack_groups(const Constants* parts, const uint8_t* words, float* out, size_t numel, size_t ahead,
                               size_t other) {
  if constexpr (kCutsInHalves<Q>) {
    unpack_units<Q, 1, kAdd>(parts, words, out, numel, ahead, other);
  } else {
    other == 0 ? unpack_units<Q, 1, kAdd>(parts, words, out, numel, ahead, 0)
               : unpack_units<Q, 2, kAdd>(parts, words, out, numel, ahead, 1);
  }
}

// ---- Lloyd-Max: codes come before their scale ------------------------------------------------------------------

// Codes of rows in order, and the two sums of their scale.
template <class Q, Feedback kFeedback>
struct Places {
  Q q;
  const float* values;
  const float* residual;
  size_t ahead;
  F product, square;

  PSQ_METHOD U next() {
    __builtin_prefetch(values + ahead);
    if (kFeedback == kKeep) __builtin_prefetch(residual + PSQ_AHEAD, 1);
    const F c = compensated<kFeedback>(values, residual);
    const U sign = sign_of(as_u(c));
    const F size = as_f(as_u(c) ^ sign);
    U top;
    const F point = placed_row(q, size, sign, top);
    product = product + size * point;
    square = square + point * point;
    values += 16;
    if (kFeedback == kKeep) residual += 16;
    return top;
  }
};

// Writes the words of a whole block, returns the sums of its scale.
template <class Q, Feedback kFeedback>
PSQ_OUTLINE Products place_block(const Constants& fitted, const float* values, const float* residual, size_t numel,
                                 uint8_t* words, size_t ahead) {
  Places<Q, kFeedback> places = {made_of<Q>(fitted), values, residual, ahead, splat(0.0f), splat(0.0f)};
  for (size_t at = 0; at < numel; at += kUnit<Q>, words += 64 * kUnitWords<Q>)
    pack_group<Q, kUnitWords<Q>>(places, words);
  return {double(sum(places.product)), double(sum(places.square))};
}

// What the codes do not say of values + residual.
template <class Q>
struct Unsaid {
  Reader<Q> reader;
  const float* values;
  float* residual;

  PSQ_METHOD void put_next(U word, int left) {
    store(residual, compensated<kKeep>(values, residual) - reader.value(word, left));
    values += 16;
    residual += 16;
  }
};

template <class Q>
PSQ_OUTLINE void leave_unsaid(const Constants& said, const float* values, float* residual, size_t numel,
                              const uint8_t* words) {
  Unsaid<Q> unsaid = {{}, values, residual};
  unsaid.reader.set(made_of<Q>(said));
  for (size_t at = 0; at < numel; at += kUnit<Q>, words += 64 * kUnitWords<Q>)
    unpack_group<Q, kUnitWords<Q>>(unsaid, words);
}

// ---- what a codec is made of -----------------------------------------------------------------------------------

// Encoders, with feedback or without.
struct Encoders {
  float (*norm_part)(const float* values, const float* residual, size_t numel);  // or null
  void (*pack)(const Constants* parts, const float* values, float* residual, size_t numel, uint8_t* words,
               uint32_t index, size_t ahead, size_t other);
  // Of Lloyd-Max, else null.
  void (*product_part)(const Constants& fitted, const float* values, const float* residual, size_t numel,
                       Products& products);
  Products (*place)(const Constants& fitted, const float* values, const float* residual, size_t numel, uint8_t* words,
                    size_t ahead);
};

// What is above this line is compiled for each quantizer, what is below once.
struct Coder {
  size_t bits;
  bool cuts_in_halves;
  Statistic statistic;
  float (*set)(Constants& fitted, float norm, int32_t parameter);
  void (*restore)(Constants& said, float scale, int32_t parameter);
  Encoders forgets, keeps;
  void (*leave)(const Constants& said, const float* values, float* residual, size_t numel,
                const uint8_t* words);  // Lloyd-Max
  void (*unpack[2])(const Constants* parts, const uint8_t* words, float* out, size_t numel, size_t ahead,
                    size_t other);  // the second adds

  PSQ_METHOD size_t group_bytes() const { return 64 * bits; }
  PSQ_METHOD const Encoders& encoders(const float* residual) const { return residual == nullptr ? forgets : keeps; }
};

template <class Q>
float set_constants(Constants& fitted, float norm, int32_t parameter) {
  Q quantizer = {};
  const float scale = quantizer.set(norm, parameter);
  fitted = quantizer;
  return scale;
}
template <class Q>
void restore_constants(Constants& said, float scale, int32_t parameter) {
  Q quantizer = made_of<Q>(said);
  quantizer.restore(scale, parameter);
  said = quantizer;
}

template <class Q, Feedback kFeedback>
constexpr Encoders encoders_of() {
  Encoders encoders = {nullptr, pack_groups<Q, kFeedback>, nullptr, nullptr};
  if constexpr (Q::kStatistic != kNone) encoders.norm_part = norm_part<Q::kStatistic, kFeedback>;
  if constexpr (kIsLloydMax<Q>) {
    encoders.product_part = product_part<Q, kFeedback>;
    encoders.place = place_block<Q, kFeedback>;
  }
  return encoders;
}

template <class Q, bool kDecodes>
constexpr Coder coder_of() {
  Coder coder = {Q::kBits,
                 kCutsInHalves<Q>,
                 Q::kStatistic,
                 set_constants<Q>,
                 restore_constants<Q>,
                 encoders_of<Q, kForget>(),
                 encoders_of<Q, kKeep>(),
                 nullptr,
                 {}};
  if constexpr (kIsLloydMax<Q>) coder.leave = leave_unsaid<Q>;
  if constexpr (kDecodes) {
    coder.unpack[0] = unpack_groups<Q, false>;
    coder.unpack[1] = unpack_groups<Q, true>;
  }
  return coder;
}
template <class Q, bool kDecodes = true>
constexpr Coder kCoder = coder_of<Q, kDecodes>();

// ---- encoding --------------------------------------------------------------------------------------------------

// One span of a segment: up to kSpan values, or a block, or a chunk of one, that is larger.
struct Span {
  const float* values;
  float* residual;
  uint8_t* words;
  size_t numel, block;
  size_t other;  // as in pack_groups
  int32_t parameter;
  uint32_t index;  // of its first value in the random stream
  size_t ahead;    // as PsqEncode's

  PSQ_METHOD Span part(const Coder& coder, size_t from, size_t count) const {
    return {values + from, residual_at(residual, from), words + from / kGroup * coder.group_bytes(), count, block, other,
            parameter, index + uint32_t(from), ahead};
  }
};

// The quantizer of a norm, its scale for the wire (Lloyd-Max: what comes before the scale). False: the block is not
// finite, its scale a NaN.
PSQ_INLINE bool fit(const Coder& coder, Constants& fitted, float& scale, float norm, int32_t parameter) {
  const bool finite = is_finite(norm);
  scale = coder.set(fitted, finite ? norm : 0.0f, parameter);
  if (!finite) scale = float_of(kNaN);
  return finite;
}

// The quantizers of a span's blocks, their scales, and which blocks are finite. Returns how many.
PSQ_INLINE size_t fit_span(const Coder& coder, const Span& a, Constants* parts, bool* live, uint8_t* scales) {
  size_t blocks = 0;
  for (size_t at = 0; at < a.numel; at += a.block, ++blocks) {
    const size_t count = at_most(a.block, a.numel - at);
    Norm norm = {};
    norm.add(coder.encoders(a.residual).norm_part(a.values + at, residual_at(a.residual, at), count));
    float scale;
    live[blocks] = fit(coder, parts[blocks], scale, norm.of(coder.statistic, count), a.parameter);
    put_scale(scales, blocks, scale);
  }
  return blocks;
}

// A group that is short, or half of which is not finite: through buffers where what is missing or not live is 0, which
// every codec encodes as code 0; only live values get a new residual.
PSQ_OUTLINE void pack_careful(const Coder& coder, const Constants* parts, const bool* live, const Span& a) {
  float x[kGroup] = {}, e[kGroup] = {};
  const size_t part = kGroup >> a.other;
  const bool keeps = a.residual != nullptr;
  size_t bytes[2] = {};
  for (size_t i = 0, from = 0; from < a.numel; from += part, ++i) {
    bytes[i] = live[i] ? at_most(part, a.numel - from) * sizeof(float) : 0;
    __builtin_memcpy(x + from, a.values + from, bytes[i]);
    if (keeps) __builtin_memcpy(e + from, a.residual + from, bytes[i]);
  }
  coder.encoders(a.residual).pack(parts, x, keeps ? e : nullptr, kGroup, a.words, a.index, 0, a.other);
  if (!keeps) return;
  __builtin_memcpy(a.residual, e, bytes[0]);
  __builtin_memcpy(a.residual + part, e + part, bytes[1]);
}

// The words of blocks that have their quantizers.
PSQ_INLINE void pack_span(const Coder& coder, const Constants* parts, const bool* live, const Span& a) {
  const size_t unit = a.other ? kGroup : a.block;
  const Encoders& encoders = coder.encoders(a.residual);
  for (size_t from = 0; from < a.numel; from += unit, parts += 1 + a.other, live += 1 + a.other) {
    const size_t end = from + at_most(unit, a.numel - from);
    const size_t whole = live[0] && live[a.other] ? from + (end - from) / kGroup * kGroup : from;
    if (whole > from)
      encoders.pack(parts, a.values + from, residual_at(a.residual, from), whole - from,
                    a.words + from / kGroup * coder.group_bytes(), a.index + uint32_t(from), a.ahead, a.other);
    for (size_t at = whole; at < end; at += kGroup)
      pack_careful(coder, parts, live, a.part(coder, at, at_most(kGroup, end - at)));
  }
}

// Lloyd-Max: a span whose blocks are whole and finite; their quantizers are fitted.
PSQ_INLINE void encode_places(const Coder& coder, const Span& a, Constants* parts, uint8_t* scales) {
  const size_t block_bytes = a.block / 8 * coder.bits;
  for (size_t from = 0, k = 0; from < a.numel; from += a.block, ++k) {
    const Products products = coder.encoders(a.residual).place(
        parts[k], a.values + from, residual_at(a.residual, from), a.block, a.words + k * block_bytes, a.ahead);
    parts[k].scale = products.scale(parts[k]);
    put_scale(scales, k, parts[k].scale);
  }
  for (size_t from = 0, k = 0; a.residual != nullptr && from < a.numel; from += a.block, ++k)
    coder.leave(parts[k], a.values + from, residual_at(a.residual, from), a.block, a.words + k * block_bytes);
}

// Lloyd-Max: scales before codes, where blocks are short or not finite.
PSQ_INLINE void rescale(const Coder& coder, const Span& a, Constants* parts, const bool* live, uint8_t* scales) {
  for (size_t from = 0, k = 0; from < a.numel; from += a.block, ++k) {
    if (!live[k]) continue;
    Products products = {};
    coder.encoders(a.residual).product_part(parts[k], a.values + from, residual_at(a.residual, from), at_most(a.block, a.numel - from), products);
    parts[k].scale = products.scale(parts[k]);
    put_scale(scales, k, parts[k].scale);
  }
}

PSQ_INLINE void encode_span(const Coder& coder, const Span& a, uint8_t* scales) {
  Constants parts[kMostParts + 1] = {};
  bool live[kMostParts + 1] = {true};
  if (coder.statistic != kNone) {
    const size_t blocks = fit_span(coder, a, parts, live, scales);
    live[blocks] = true;  // the missing half of a last group
    coder.set(parts[blocks], 0.0f, a.parameter);
    if (coder.leave != nullptr) {
      bool whole = a.numel % a.block == 0 && a.numel % kGroup == 0 && (a.other == 0 || coder.cuts_in_halves);
      for (size_t k = 0; k < blocks; ++k) whole = whole && live[k];
      if (whole) return encode_places(coder, a, parts, scales);
      rescale(coder, a, parts, live, scales);
    }
  }
  pack_span(coder, parts, live, a);
}

// What is finite becomes 0.
PSQ_OUTLINE void clear(float* values, size_t numel) {
  const size_t whole = numel & ~size_t(15);
  for (size_t i = 0; i < whole; i += 16) {
    const U bits = as_u(load(values + i));
    store(values + i, as_f(drop(less(as_i(as_u(absolute(as_f(bits)))), splat(int32_t(kInfinity))), bits)));
  }
  for (size_t i = whole; i < numel; ++i)
    if (is_finite(values[i])) values[i] = 0.0f;
}

PSQ_INLINE Span span_of(const PsqEncode& a, const Coder& coder, Memory& memory, size_t from, size_t numel) {
  const bool scaled = coder.statistic != kNone && a.format.block != 0;
  return {a.values + from, memory.open(from, numel), a.words + from / kGroup * coder.group_bytes(), numel,
          scaled ? a.format.block : numel, a.format.block == kGroup / 2, a.format.parameter, a.start + uint32_t(from),
          a.ahead};
}

// What comes before a span of a segment, once.
PSQ_INLINE void rescale(const PsqEncode& a, size_t from, size_t numel) {
  if (a.residual_scale != 1.0f) rescale_residual(a.residual, a.half, from, numel, a.residual_scale);
}

// What comes after a span of a segment.
PSQ_INLINE void close_span(const PsqEncode& a, Memory& memory, size_t from, size_t numel) {
  memory.close(from, numel);
  if (a.clear) clear((float*)a.values + from, numel);
}

PSQ_OUTLINE void encode_spans(const Coder& coder, const PsqEncode& a) {
  const size_t block = a.format.block, span = block > kSpan ? block : kSpan;
  Memory memory(a.residual, a.half);
  for (size_t from = 0; from < a.numel; from += span) {
    const size_t count = at_most(span, a.numel - from);
    rescale(a, from, count);
    encode_span(coder, span_of(a, coder, memory, from, count), block > 0 ? a.scales + from / block * 4 : nullptr);
    close_span(a, memory, from, count);
  }
}

// One scale for all: chunk by chunk, each part of the work by itself.
PSQ_OUTLINE void encode_whole(const Coder& coder, const PsqEncode& a) {
  Memory memory(a.residual, a.half);
  Norm norm = {};
  for (size_t from = 0; from < a.numel; from += kChunk) {
    const size_t count = at_most(kChunk, a.numel - from);
    rescale(a, from, count);
    const Span b = span_of(a, coder, memory, from, count);
    norm.add(coder.encoders(b.residual).norm_part(b.values, b.residual, b.numel));
  }
  Constants fitted = {};
  float scale;
  const bool live = fit(coder, fitted, scale, norm.of(coder.statistic, a.numel), a.format.parameter);
  if (coder.leave != nullptr && live) {
    Products products = {};
    for (size_t from = 0; from < a.numel; from += kChunk) {
      const Span b = span_of(a, coder, memory, from, at_most(kChunk, a.numel - from));
      coder.encoders(b.residual).product_part(fitted, b.values, b.residual, b.numel, products);
    }
    scale = fitted.scale = products.scale(fitted);
  }
  put_scale(a.scales, 0, scale);
  for (size_t from = 0; from < a.numel; from += kChunk) {
    const size_t count = at_most(kChunk, a.numel - from);
    pack_span(coder, &fitted, &live, span_of(a, coder, memory, from, count));
    close_span(a, memory, from, count);
  }
}

PSQ_INLINE void encode_segment(const Coder& coder, const PsqEncode& a) {
  if (a.numel == 0) return;
  coder.statistic != kNone && a.format.block == 0 ? encode_whole(coder, a) : encode_spans(coder, a);
}

// ---- decoding --------------------------------------------------------------------------------------------------

PSQ_OUTLINE void decode_segment(const Coder& coder, const PsqDecode& a) {
  const size_t block = a.format.block == 0 ? a.numel : a.format.block, other = a.format.block == kGroup / 2;
  const size_t span = other ? kGroup : block;
  const uint8_t *words = a.words, *scales = a.scales;
  const auto unpack = coder.unpack[a.add];
  for (size_t from = 0; from < a.numel; from += span) {
    const size_t count = at_most(span, a.numel - from);
    Constants parts[2] = {};
    for (size_t part = 0; part <= other; ++part) {
      float scale = 0.0f;
      if (coder.statistic != kNone && part * block < count) {
        __builtin_memcpy(&scale, scales, 4);
        scales += 4;
      }
      coder.restore(parts[part], scale, a.format.parameter);
    }
    float* out = a.out + from;
    const size_t whole = count / kGroup * kGroup;
    if (whole > 0) unpack(parts, words, out, whole, a.ahead, other);
    words += whole / kGroup * coder.group_bytes();
    if (whole == count) continue;
    float last[kGroup] = {};
    const size_t bytes = (count - whole) * sizeof(float);
    if (a.add) __builtin_memcpy(last, out + whole, bytes);
    unpack(parts, words, last, kGroup, 0, other);
    __builtin_memcpy(out + whole, last, bytes);
    words += coder.group_bytes();
  }
}

// ---- fp32: the values themselves, no words, no padding ---------------------------------------------------------

template <Feedback kFeedback>
PSQ_INLINE void fp32_row(const float* values, float* residual, uint8_t* payload) {
  const F c = compensated<kFeedback>(values, residual);
  const U size = as_u(absolute(c));
  store_words(payload, select(is_nan(as_i(size)), splat(kNaN), as_u(c)));
  if constexpr (kFeedback == kKeep)
    store(residual, select(less(as_i(size), splat(int32_t(kInfinity))), splat(0.0f), load(residual)));
}

template <Feedback kFeedback>
PSQ_OUTLINE void fp32_span(const float* values, float* residual, size_t numel, uint8_t* payload) {
  const size_t whole = numel & ~size_t(15), bytes = (numel - whole) * sizeof(float);
  for (size_t i = 0; i < whole; i += 16)
    fp32_row<kFeedback>(values + i, further<kFeedback>(residual, i), payload + 4 * i);
  if (bytes == 0) return;
  float x[16] = {}, e[16] = {};
  uint8_t last[64];
  __builtin_memcpy(x, values + whole, bytes);
  if (kFeedback == kKeep) __builtin_memcpy(e, residual + whole, bytes);
  fp32_row<kFeedback>(x, e, last);
  __builtin_memcpy(payload + 4 * whole, last, bytes);
  if (kFeedback == kKeep) __builtin_memcpy(residual + whole, e, bytes);
}

PSQ_OUTLINE void fp32_encode(const PsqEncode& a) {
  Memory memory(a.residual, a.half);
  for (size_t from = 0; from < a.numel; from += kSpan) {
    const size_t count = at_most(kSpan, a.numel - from);
    rescale(a, from, count);
    float* residual = memory.open(from, count);
    residual == nullptr ? fp32_span<kForget>(a.values + from, residual, count, a.words + 4 * from)
                        : fp32_span<kKeep>(a.values + from, residual, count, a.words + 4 * from);
    close_span(a, memory, from, count);
  }
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

// ---- norms alone -----------------------------------------------------------------------------------------------

PSQ_INLINE float norm_part_of(bool largest, const float* values, const float* residual, size_t numel) {
  if (residual == nullptr)
    return largest ? norm_part<kMaxAbs, kForget>(values, residual, numel)
                   : norm_part<kRootMeanSquare, kForget>(values, residual, numel);
  return largest ? norm_part<kMaxAbs, kKeep>(values, residual, numel)
                 : norm_part<kRootMeanSquare, kKeep>(values, residual, numel);
}

void block_norms(const PsqNorms& a) {
  const size_t block = a.block == 0 ? a.numel : a.block;
  Memory memory(a.residual, a.half);
  float* out = a.norms;
  for (size_t from = 0; from < a.numel; from += block, ++out) {
    const size_t count = at_most(block, a.numel - from);
    Norm norm = {};
    for (size_t at = 0; at < count; at += kChunk) {
      const size_t here = at_most(kChunk, count - at);
      norm.add(norm_part_of(a.largest, a.values + from + at, memory.open(from + at, here), here));
    }
    const float size = norm.of(a.largest ? kMaxAbs : kRootMeanSquare, count);
    *out = is_finite(size) ? size : float_of(kNaN);
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
// For all of them but the server's sum, which has no loop for codes of these widths.
#define PSQ_EACH_WIDE(X)                                                  \
  X(PSQ_UNIFORM, 5, Uniform<5 PSQ_COMMA false>)                           \
  X(PSQ_UNIFORM, 6, Uniform<6 PSQ_COMMA false>)                           \
  X(PSQ_UNIFORM, 7, Uniform<7 PSQ_COMMA false>)
#define PSQ_COMMA ,
#define PSQ_KEY(family, bits) ((family) * 256 + (bits))

// topk.inl and signs.inl have these.
PSQ_OUTLINE void sign_encode(const PsqEncode& a);
PSQ_OUTLINE void topk_encode(const PsqEncode& a);
PSQ_OUTLINE void topk_decode(const PsqDecode& a);
PSQ_OUTLINE bool topk_ascends(const uint8_t* entries, size_t numel, const PsqFormat& format);

void codec_encode(const PsqEncode& a) {
  if (a.format.family == PSQ_TOPK) return topk_encode(a);
  switch (PSQ_KEY(a.format.family, a.format.bits)) {
    case PSQ_KEY(PSQ_SIGN, 1):
      return a.format.parameter == 2 ? encode_segment(kCoder<Sign<kRootMeanSquare>, false>, a) : sign_encode(a);
#define X(family, bits, Q)     \
  case PSQ_KEY(family, bits):  \
    return encode_segment(kCoder<Q>, a);
      PSQ_EACH_QUANTIZER(X)
      PSQ_EACH_WIDE(X)
#undef X
#define X(bits)                      \
  case PSQ_KEY(PSQ_STOCHASTIC, bits): \
    return encode_segment(kCoder<Uniform<bits, true>, false>, a);
      X(2) X(3) X(4) X(5) X(6) X(7) X(8)
#undef X
    case PSQ_KEY(PSQ_FP32, 32):
      return fp32_encode(a);
  }
}

void codec_decode(const PsqDecode& a) {
  if (a.format.family == PSQ_TOPK) return topk_decode(a);
  const int32_t family = a.format.family == PSQ_STOCHASTIC ? int32_t(PSQ_UNIFORM) : a.format.family;  // same words, steps
  switch (PSQ_KEY(family, a.format.bits)) {
    case PSQ_KEY(PSQ_SIGN, 1):
      return decode_segment(kCoder<Sign<kMeanAbs>>, a);
#define X(family, bits, Q)     \
  case PSQ_KEY(family, bits):  \
    return decode_segment(kCoder<Q>, a);
      PSQ_EACH_QUANTIZER(X)
      PSQ_EACH_WIDE(X)
#undef X
    case PSQ_KEY(PSQ_FP32, 32):
      return fp32_decode(a);
  }
}

bool all_finite_f32(const uint8_t* values, size_t numel) {
  const float* x = (const float*)values;
  for (size_t from = 0; from < numel; from += kChunk) {
    const size_t count = at_most(kChunk, numel - from);
    if (!is_finite(norm_part<kMaxAbs, kForget>(x + from, nullptr, count))) return false;
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

const PsqCodecKernels codec_kernels = {codec_encode,   codec_decode,    block_norms,
                                        all_finite_f32, all_finite_bf16, topk_ascends};

}  // namespace
