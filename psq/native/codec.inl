// Codec kernels over quantize.inl: the bits of psq/kernels/reference.py, at the speed of memory.
//
// Blocks, groups, words, tails and error feedback are written once, for every quantizer. Encoding reads a block twice,
// the second time from L1: once for the scale, once to quantize, pack and leave the residual. Rolled loops: unrolled
// ones compile for minutes and run slower.
#include "quantize.inl"

namespace {

constexpr size_t kGroup = 512;   // values in a group: 32 rows of 16 lanes
constexpr size_t kChunk = 8192;  // values summed in float before a double takes over; the largest block

// How far beyond the next block's same place row_code fetches. Measured: 0 loses 0.05 to 0.1 of memory's speed, because
// the next block's first pass then catches up with what was fetched last; twice the block loses as much.
constexpr size_t kAhead = 256;

PSQ_INLINE size_t at_most(size_t a, size_t b) { return a < b ? a : b; }
PSQ_INLINE U lanes() {
  static const uint32_t counting[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load_words((const uint8_t*)counting);
}

// ---- from values to a scale ------------------------------------------------------------------------------------

template <bool kFeedback>
PSQ_INLINE F compensated(const float* values, const float* residual) {
  return kFeedback ? load(values) + load(residual) : load(values);
}

// A block's last, short row, the missing lanes 0.
template <bool kFeedback>
PSQ_INLINE F short_row(const float* values, const float* residual, size_t numel) {
  float row[16] = {}, rest[16] = {};
  __builtin_memcpy(row, values, numel * sizeof(float));
  if (kFeedback) __builtin_memcpy(rest, residual, numel * sizeof(float));
  return compensated<kFeedback>(row, rest);
}

template <Statistic kStatistic>
PSQ_INLINE F accumulate(F total, F c) {
  if constexpr (kStatistic == kMeanAbs) return total + absolute(c);
  if constexpr (kStatistic == kRootMeanSquare) return total + c * c;
  return as_f(maximum(as_i(total), as_i(absolute(c))));  // by bits: NaN and Inf beat every number
}

// The norm of a block: mean |c|, root mean square, or max |c|. Not finite iff a value, or the sum, is not.
template <Statistic kStatistic, bool kFeedback>
PSQ_OUTLINE float norm(const float* values, const float* residual, size_t numel) {
  double total = 0.0;
  uint32_t largest = 0;
  for (size_t from = 0; from < numel; from += kChunk) {
    const size_t count = at_most(kChunk, numel - from), whole = count & ~size_t(15);
    const float *x = values + from, *e = residual + (kFeedback ? from : 0);
    F sums = splat(0.0f);
    for (size_t i = 0; i < whole; i += 16)
      sums = accumulate<kStatistic>(sums, compensated<kFeedback>(x + i, e + (kFeedback ? i : 0)));
    if (whole < count)
      sums = accumulate<kStatistic>(sums, short_row<kFeedback>(x + whole, e + (kFeedback ? whole : 0), count - whole));
    if constexpr (kStatistic == kMaxAbs) {
      const uint32_t chunk = uint32_t(maximum(as_i(sums)));
      largest = chunk > largest ? chunk : largest;
    } else {
      total += double(sum(sums));
    }
  }
  if constexpr (kStatistic == kMaxAbs) return float_of(largest);
  const float mean = float(total) / float(numel);
  return kStatistic == kRootMeanSquare ? __builtin_sqrtf(mean) : mean;
}

// The least-squares scale of the chosen centroids q: <|c|, q> / <q, q>.
template <class Q, bool kFeedback>
PSQ_OUTLINE float best_scale(const Q& q, const float* values, const float* residual, size_t numel) {
  double products = 0.0, squares = 0.0;
  for (size_t from = 0; from < numel; from += kChunk) {
    const size_t count = at_most(kChunk, numel - from);
    const float *x = values + from, *e = residual + (kFeedback ? from : 0);
    F product = splat(0.0f), square = splat(0.0f);
    for (size_t i = 0; i < count; i += 16) {
      const size_t here = at_most(16, count - i), at = kFeedback ? i : 0;
      const F size = absolute(here == 16 ? compensated<kFeedback>(x + i, e + at)
                                         : short_row<kFeedback>(x + i, e + at, here));
      F point = q.centroid(q.nearest(size * splat(q.inverse)));
      if (here < 16) point = select(less(as_i(lanes()), splat(int32_t(here))), point, splat(0.0f));
      product = product + size * point;
      square = square + point * point;
    }
    products += double(sum(product));
    squares += double(sum(square));
  }
  return float(products) / float(squares);
}

template <class Q>
constexpr bool kIsLloydMax = false;
template <int kWidth>
constexpr bool kIsLloydMax<LloydMax<kWidth>> = true;

// Makes the quantizer of a block and its scale for the wire. False: the block is not finite, its scale a NaN.
template <class Q, bool kFeedback>
PSQ_INLINE bool fit(Q& q, float& scale, const float* values, const float* residual, size_t numel, int32_t parameter) {
  const float size = norm<Q::kStatistic, kFeedback>(values, residual, numel);
  scale = float_of(kNaN);
  if (!is_finite(size)) {
    q.set(0.0f, parameter);
    return false;
  }
  scale = q.set(size, parameter);
  if constexpr (kIsLloydMax<Q>) {
    if (scale > 0.0f) scale = best_scale<Q, kFeedback>(q, values, residual, numel);
    q.restore(scale, parameter);
  }
  return true;
}

// ---- groups and words ------------------------------------------------------------------------------------------

// Quantizes one row, leaves the rest in the residual. This is the pass that runs in L1, and memory must not idle
// meanwhile: it fetches the next block.
template <class Q, bool kFeedback>
PSQ_INLINE U row_code(const Q& q, const float* values, float* residual, U index, size_t ahead) {
  __builtin_prefetch(values + ahead);
  if (kFeedback) __builtin_prefetch(residual + ahead);
  const F c = compensated<kFeedback>(values, residual);
  U top;
  const F d = q.quantize(c, index, top);
  if constexpr (kFeedback) {
    F rest = c - d;
    if constexpr (Q::kStatistic == kNone) {
      const U size = as_u(absolute(c));
      rest = select(less(as_i(size), splat(int32_t(kInfinity))), rest, load(residual));
    }
    store(residual, rest);
  }
  return top;
}

// Rows of one group in order, with the quantizer of each: two where a block is half a group.
template <class Q, int kParts, bool kFeedback>
struct Rows {
  const Q* parts;
  const float* values;
  float* residual;
  U index;
  int row;
  size_t ahead;

  PSQ_METHOD U next() {
    const U top = row_code<Q, kFeedback>(parts[kParts == 1 ? 0 : row >> 4], values, residual, index, ahead);
    values += 16;
    if (kFeedback) residual += 16;
    index = index + splat(16u);
    ++row;
    return top;
  }
};

// Lane l of word w holds bits [32 w, 32 w + 32) of the stream of the codes of rows 0..31, each least bit first.
template <class Q, int kParts, bool kFeedback>
PSQ_INLINE void pack_group(Rows<Q, kParts, kFeedback> rows, uint8_t* words) {
  if constexpr (Q::kBits == 3) {
    U word = splat(0u);
    PSQ_ROLLED
    for (int i = 0; i < 10; ++i) word = (word >> 3) | rows.next();
    U straddler = rows.next();
    store_words(words, (word >> 2) | (straddler << 1));
    word = splat(0u);
    U carried = straddler >> 31;
    PSQ_ROLLED
    for (int i = 0; i < 10; ++i) word = (word >> 3) | rows.next();
    straddler = rows.next();
    store_words(words + 64, (word >> 1) | carried | (straddler << 2));
    word = splat(0u);
    carried = straddler >> 30;
    PSQ_ROLLED
    for (int i = 0; i < 10; ++i) word = (word >> 3) | rows.next();
    store_words(words + 128, word | carried);
  } else {
    PSQ_ROLLED
    for (int w = 0; w < Q::kBits; ++w) {
      U word = splat(0u);
      PSQ_ROLLED
      for (int i = 0; i < 32 / Q::kBits; ++i) word = (word >> Q::kBits) | rows.next();
      store_words(words + 64 * w, word);
    }
  }
}

// From codes to values: by arithmetic, or, where all the values of a scale fit one register, by looking them up.
template <class Q>
constexpr bool kByTable = Q::kBits <= 4 && (1 << Q::kBits) <= kTableLanes;

template <class Q, bool kTable>
struct Reader {
  Q quantizer;
  PSQ_METHOD void set(const Q& q) { quantizer = q; }
  PSQ_METHOD F value(U word, int left) const { return quantizer.value(word << left); }
};
template <class Q>
struct Reader<Q, true> {
  NativeF table;
  // Entry i is the value of code i's lowest bits: a look-up sees the bits above a code, too.
  PSQ_METHOD void set(const Q& q) { table = first(q.value(lanes() << (32 - Q::kBits))); }
  PSQ_METHOD F value(U word, int left) const { return look_up(table, as_i(word >> (32 - Q::kBits - left))); }
};

// Where decoded rows go, in order.
template <class Q, int kParts, bool kAdd>
struct Sink {
  const Reader<Q, kByTable<Q>>* parts;
  float* out;
  int row;

  // The code's highest bit is bit 31 - left of the word.
  PSQ_METHOD void put_next(U word, int left) {
    const F d = parts[kParts == 1 ? 0 : row >> 4].value(word, left);
    store(out, kAdd ? load(out) + d : d);
    out += 16;
    ++row;
  }
};

template <class Q, int kParts, bool kAdd>
PSQ_INLINE void unpack_group(Sink<Q, kParts, kAdd> sink, const uint8_t* words) {
  if constexpr (Q::kBits == 3) {
    const U first = load_words(words), second = load_words(words + 64), third = load_words(words + 128);
    PSQ_ROLLED
    for (int i = 0; i < 10; ++i) sink.put_next(first, 29 - 3 * i);
    sink.put_next((second << 31) | (first >> 1), 0);
    PSQ_ROLLED
    for (int i = 0; i < 10; ++i) sink.put_next(second, 28 - 3 * i);
    sink.put_next((third << 30) | (second >> 2), 0);
    PSQ_ROLLED
    for (int i = 0; i < 10; ++i) sink.put_next(third, 27 - 3 * i);
  } else {
    PSQ_ROLLED
    for (int w = 0; w < Q::kBits; ++w) {
      const U word = load_words(words + 64 * w);
      PSQ_ROLLED
      for (int i = 1; i <= 32 / Q::kBits; ++i) sink.put_next(word, 32 - Q::kBits * i);
    }
  }
}

// ---- segments --------------------------------------------------------------------------------------------------

template <class Q>
constexpr size_t kGroupBytes = 64 * Q::kBits;

PSQ_INLINE void put_scale(uint8_t* scales, size_t at, float scale) { __builtin_memcpy(scales + 4 * at, &scale, 4); }

// Out of line, once for each kind: short groups come here too.
template <class Q, int kParts, bool kFeedback>
PSQ_OUTLINE void pack_groups(const Q* parts, const float* values, float* residual, size_t numel,
                                           uint8_t* words, uint32_t index, size_t ahead) {
  Q local[kParts];
  for (int part = 0; part < kParts; ++part) local[part] = parts[part];
  for (size_t from = 0; from < numel; from += kGroup, words += kGroupBytes<Q>) {
    float* e = kFeedback ? residual + from : nullptr;
    pack_group<Q, kParts, kFeedback>({local, values + from, e, splat(index + uint32_t(from)) + lanes(), 0, ahead},
                                     words);
  }
}

// A group that is short, or half of which is not finite: through buffers where what is missing or not live is 0, which
// every codec encodes as code 0; only live values get a new residual.
template <class Q, int kParts, bool kFeedback>
PSQ_INLINE void pack_careful(const Q* parts, const bool* live, const float* values, float* residual, size_t numel,
                             uint8_t* words, uint32_t index) {
  float x[kGroup] = {}, e[kGroup] = {};
  constexpr size_t kPart = kGroup / kParts;
  size_t bytes[kParts] = {};
  for (int part = 0; part < kParts; ++part) {
    const size_t from = part * kPart;
    if (!live[part] || from >= numel) continue;
    bytes[part] = at_most(kPart, numel - from) * sizeof(float);
    __builtin_memcpy(x + from, values + from, bytes[part]);
    if (kFeedback) __builtin_memcpy(e + from, residual + from, bytes[part]);
  }
  pack_groups<Q, kParts, kFeedback>(parts, x, e, kGroup, words, index, 0);
  for (int part = 0; kFeedback && part < kParts; ++part)
    __builtin_memcpy(residual + part * kPart, e + part * kPart, bytes[part]);
}

template <class Q, int kParts, bool kFeedback>
PSQ_INLINE void pack_span(const Q* parts, const bool* live, const float* values, float* residual, size_t numel,
                          uint8_t* words, uint32_t index, size_t ahead) {
  const size_t whole = live[0] && live[kParts - 1] ? numel / kGroup * kGroup : 0;
  if (whole > 0) pack_groups<Q, kParts, kFeedback>(parts, values, residual, whole, words, index, ahead);
  words += whole / kGroup * kGroupBytes<Q>;
  for (size_t from = whole; from < numel; from += kGroup, words += kGroupBytes<Q>)
    pack_careful<Q, kParts, kFeedback>(parts, live, values + from, kFeedback ? residual + from : nullptr,
                                       at_most(kGroup, numel - from), words, index + uint32_t(from));
}

template <class Q, int kParts, bool kFeedback>
PSQ_OUTLINE void encode_segment(const PsqEncode& a) {
  const size_t block = a.format.block == 0 ? a.numel : a.format.block;
  const size_t span = kParts == 1 ? block : kGroup;
  uint8_t* words = a.words;
  const size_t ahead = (a.format.block == 0 ? 0 : span) + kAhead;
  size_t scales = 0;
  for (size_t from = 0; from < a.numel; from += span) {
    const size_t count = at_most(span, a.numel - from);
    Q parts[kParts] = {};
    bool live[kParts];
    for (int part = 0; part < kParts; ++part) {
      live[part] = true;
      const size_t at = part * block;
      if constexpr (Q::kStatistic != kNone) {
        if (at >= count) {
          parts[part].set(0.0f, a.format.parameter);
          continue;
        }
        float scale;
        live[part] = fit<Q, kFeedback>(parts[part], scale, a.values + from + at,
                                       kFeedback ? a.residual + from + at : nullptr, at_most(block, count - at),
                                       a.format.parameter);
        put_scale(a.scales, scales++, scale);
      }
    }
    pack_span<Q, kParts, kFeedback>(parts, live, a.values + from, kFeedback ? a.residual + from : nullptr, count,
                                    words, a.start + uint32_t(from), ahead);
    words += (count + kGroup - 1) / kGroup * kGroupBytes<Q>;
  }
}

template <class Q, int kParts, bool kAdd>
PSQ_OUTLINE void unpack_groups(const Q* parts, const uint8_t* words, float* out, size_t numel) {
  Reader<Q, kByTable<Q>> local[kParts];
  for (int part = 0; part < kParts; ++part) local[part].set(parts[part]);
  for (size_t from = 0; from < numel; from += kGroup, words += kGroupBytes<Q>)
    unpack_group<Q, kParts, kAdd>({local, out + from, 0}, words);
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
    if (whole > 0) unpack_groups<Q, kParts, kAdd>(parts, words, out, whole);
    words += whole / kGroup * kGroupBytes<Q>;
    if (whole == count) continue;
    float last[kGroup] = {};
    const size_t bytes = (count - whole) * sizeof(float);
    if (kAdd) __builtin_memcpy(last, out + whole, bytes);
    unpack_groups<Q, kParts, kAdd>(parts, words, last, kGroup);
    __builtin_memcpy(out + whole, last, bytes);
    words += kGroupBytes<Q>;
  }
}

template <class Q>
void encode_with(const PsqEncode& a) {
  const bool halves = a.format.block == kGroup / 2;
  if (a.residual == nullptr) return halves ? encode_segment<Q, 2, false>(a) : encode_segment<Q, 1, false>(a);
  return halves ? encode_segment<Q, 2, true>(a) : encode_segment<Q, 1, true>(a);
}

template <class Q>
void decode_with(const PsqDecode& a) {
  const bool halves = a.format.block == kGroup / 2;
  if (a.add) return halves ? decode_segment<Q, 2, true>(a) : decode_segment<Q, 1, true>(a);
  return halves ? decode_segment<Q, 2, false>(a) : decode_segment<Q, 1, false>(a);
}

// ---- fp32: the values themselves, no words, no padding ---------------------------------------------------------

template <bool kFeedback>
PSQ_INLINE void fp32_row(const float* values, float* residual, uint8_t* payload) {
  const F c = compensated<kFeedback>(values, residual);
  const I size = as_i(absolute(c));
  store_words(payload, select(is_nan(size), splat(kNaN), as_u(c)));
  if (kFeedback) store(residual, as_f(drop(less(size, splat(int32_t(kInfinity))), as_u(load(residual)))));
}

template <bool kFeedback>
PSQ_OUTLINE void fp32_encode(const PsqEncode& a) {
  const size_t whole = a.numel & ~size_t(15), rest = (a.numel - whole) * sizeof(float);
  for (size_t i = 0; i < whole; i += 16)
    fp32_row<kFeedback>(a.values + i, kFeedback ? a.residual + i : nullptr, a.words + 4 * i);
  float x[16] = {}, e[16] = {};
  uint8_t last[64];
  __builtin_memcpy(x, a.values + whole, rest);
  if (kFeedback) __builtin_memcpy(e, a.residual + whole, rest);
  fp32_row<kFeedback>(x, e, last);
  __builtin_memcpy(a.words + 4 * whole, last, rest);
  if (kFeedback) __builtin_memcpy(a.residual + whole, e, rest);
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

void codec_encode(const PsqEncode& a) {
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
      return a.residual == nullptr ? fp32_encode<false>(a) : fp32_encode<true>(a);
  }
}

void codec_decode(const PsqDecode& a) {
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
    const float largest = norm<kMaxAbs, false>(x + from, nullptr, at_most(kChunk, numel - from));
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

const PsqCodecKernels codec_kernels = {codec_encode, codec_decode, all_finite_f32, all_finite_bf16};

}  // namespace
