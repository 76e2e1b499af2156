// Codec kernels over quantize.inl: the bits of psq/kernels/reference.py, at the speed of memory.
//
// Blocks, groups, words, tails and error feedback are written once, for every quantizer. Encoding reads a block twice,
// the second time from L1: once for the scale, once to quantize, pack and leave the residual. Lloyd-Max, whose scale
// needs the codes, packs first and leaves the residual in a third pass. Rolled loops: unrolled
// ones compile for minutes and run slower.
#include "quantize.inl"

namespace {

constexpr size_t kGroup = 512;   // values in a group: 32 rows of 16 lanes
constexpr size_t kChunk = 8192;  // values summed in float before a double takes over; the largest block

// Values whose blocks are fitted together before any of them is quantized: what follows a block's sum, a square root
// and a division, then holds nobody up. (Measured: more costs 0.1 of memory's speed, for nothing is fetched meanwhile.)
constexpr size_t kSpan = 1024;
constexpr size_t kMostParts = kSpan / 256;

// How far ahead of the row at hand memory is fetched, in values: 8 KiB. Measured: half of it loses 0.1 to 0.15 of
// memory's speed, and so does twice as much in the encoder; without it decode_add runs at 0.7 to 0.85, not 0.9 to 1.
constexpr size_t kAhead = 2048;

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
      U top;
      F point = placed(q, size, splat(0u), top);
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

// Makes the quantizer of a block and its scale for the wire (Lloyd-Max: what comes before the scale). False: the block
// is not finite, its scale a NaN.
template <class Q, bool kFeedback>
PSQ_INLINE bool fit(Q& q, float& scale, const float* values, const float* residual, size_t numel, int32_t parameter) {
  const float size = norm<Q::kStatistic, kFeedback>(values, residual, numel);
  const bool finite = is_finite(size);
  scale = q.set(finite ? size : 0.0f, parameter);
  if (!finite) scale = float_of(kNaN);
  return finite;
}

// ---- groups and words ------------------------------------------------------------------------------------------

// Quantizes one row, leaves the rest in the residual. This is the pass that runs in L1, and memory must not idle
// meanwhile: it fetches what comes next.
template <class Q, bool kFeedback>
PSQ_INLINE U row_code(const Q& q, const float* values, float* residual, U index) {
  __builtin_prefetch(values + kAhead);
  if (kFeedback) __builtin_prefetch(residual + kAhead, 1);
  const F c = compensated<kFeedback>(values, residual);
  U top;
  const F d = quantized(q, c, index, top);
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

  PSQ_METHOD U next() {
    const U top = row_code<Q, kFeedback>(parts[kParts == 1 ? 0 : row >> 4], values, residual, index);
    values += 16;
    if (kFeedback) residual += 16;
    index = index + splat(16u);
    ++row;
    return top;
  }
};

// Lane l of word w holds bits [32 w, 32 w + 32) of the stream of the codes of rows 0..31, each least bit first.
// The rows of a group, or (kWords) as many as fill so many words, where a word holds whole codes.
template <class Q, int kWords = Q::kBits, class R>
PSQ_INLINE void pack_group(R& rows, uint8_t* words) {
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
    for (int w = 0; w < kWords; ++w) {
      U word = splat(0u);
      PSQ_ROLLED
      for (int i = 0; i < 32 / Q::kBits; ++i) word = (word >> Q::kBits) | rows.next();
      store_words(words + 64 * w, word);
    }
  }
}

// From codes to values: by arithmetic, or, where they fit one register, by looking them up: all the values of a scale,
// or those without a sign.
template <class Q>
constexpr bool kIsSized = kIsLloydMax<Q>;
template <int kWidth>
constexpr bool kIsSized<Log<kWidth>> = true;

enum Reading { kArithmetic, kTable, kSizeTable };
template <class Q>
constexpr Reading kReading = Q::kBits <= 4 && (1 << Q::kBits) <= kTableLanes             ? kTable
                             : kIsSized<Q> && (1 << (Q::kBits - 1)) <= kTableLanes ? kSizeTable
                                                                                   : kArithmetic;

template <class Q, Reading = kReading<Q>>
struct Reader {
  Q quantizer;
  PSQ_METHOD void set(const Q& q) { quantizer = q; }
  PSQ_METHOD F value(U word, int left) const { return valued(quantizer, word << left); }
};
// Entry i is the value of code i's lowest bits: a look-up sees the bits above a code, too.
template <class Q>
struct Reader<Q, kTable> {
  NativeF table;
  PSQ_METHOD void set(const Q& q) { table = first(valued(q, lanes() << (32 - Q::kBits))); }
  PSQ_METHOD F value(U word, int left) const { return look_up(table, as_i(word >> (32 - Q::kBits - left))); }
};
template <class Q>
struct Reader<Q, kSizeTable> {
  NativeF table;
  PSQ_METHOD void set(const Q& q) { table = first(valued(q, (lanes() << (33 - Q::kBits)) >> 1)); }
  PSQ_METHOD F value(U word, int left) const {
    return as_f(as_u(look_up(table, as_i(word >> (32 - Q::kBits - left)))) ^ sign_of(word << left));
  }
};

// Where decoded rows go, in order.
template <class Q, int kParts, bool kAdd>
struct Sink {
  const Reader<Q>* parts;
  float* out;
  int row;

  // The code's highest bit is bit 31 - left of the word.
  PSQ_METHOD void put_next(U word, int left) {
    __builtin_prefetch(out + kAhead, 1);
    const F d = parts[kParts == 1 ? 0 : row >> 4].value(word, left);
    store(out, kAdd ? load(out) + d : d);
    out += 16;
    ++row;
  }
};

template <class Q, int kWords = Q::kBits, class S>
PSQ_INLINE void unpack_group(S& sink, const uint8_t* words) {
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
    for (int w = 0; w < kWords; ++w) {
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
PSQ_OUTLINE void pack_groups(const Q* parts, const float* values, float* residual, size_t numel, uint8_t* words,
                             uint32_t index) {
  Q local[kParts];
  for (int part = 0; part < kParts; ++part) local[part] = parts[part];
  for (size_t from = 0; from < numel; from += kGroup, words += kGroupBytes<Q>) {
    float* e = kFeedback ? residual + from : nullptr;
    Rows<Q, kParts, kFeedback> rows = {local, values + from, e, splat(index + uint32_t(from)) + lanes(), 0};
    pack_group<Q>(rows, words);
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
  pack_groups<Q, kParts, kFeedback>(parts, x, e, kGroup, words, index);
  for (int part = 0; kFeedback && part < kParts; ++part)
    __builtin_memcpy(residual + part * kPart, e + part * kPart, bytes[part]);
}

template <class Q, int kParts, bool kFeedback>
PSQ_INLINE void pack_span(const Q* parts, const bool* live, const float* values, float* residual, size_t numel,
                          uint8_t* words, uint32_t index) {
  const size_t whole = live[0] && live[kParts - 1] ? numel / kGroup * kGroup : 0;
  if (whole > 0) pack_groups<Q, kParts, kFeedback>(parts, values, residual, whole, words, index);
  words += whole / kGroup * kGroupBytes<Q>;
  for (size_t from = whole; from < numel; from += kGroup, words += kGroupBytes<Q>)
    pack_careful<Q, kParts, kFeedback>(parts, live, values + from, kFeedback ? residual + from : nullptr,
                                       at_most(kGroup, numel - from), words, index + uint32_t(from));
}

// One span of a segment: up to kSpan values, or a block that is larger.
struct Span {
  const float* values;
  float* residual;  // or null
  uint8_t* words;
  size_t numel, block;
  int32_t parameter;
  uint32_t index;  // of its first value in the random stream
};

// The quantizers of a span's blocks, their scales for the wire, and which blocks are finite. Returns how many.
template <class Q, bool kFeedback>
PSQ_INLINE size_t fit_span(const Span& a, Q* parts, bool* live, uint8_t* scales) {
  size_t blocks = 0;
  for (size_t at = 0; at < a.numel; at += a.block, ++blocks) {
    float scale;
    const float* e = kFeedback ? a.residual + at : nullptr;
    const size_t count = at_most(a.block, a.numel - at);
    live[blocks] = fit<Q, kFeedback>(parts[blocks], scale, a.values + at, e, count, a.parameter);
    put_scale(scales, blocks, scale);
  }
  return blocks;
}

// ---- Lloyd-Max: codes come before their scale ------------------------------------------------------------------

// Codes of rows in order, and the two sums of their scale.
template <class Q, bool kFeedback>
struct Places {
  Q q;
  const float* values;
  const float* residual;
  F product, square;

  PSQ_METHOD U next() {
    __builtin_prefetch(values + kAhead);
    if (kFeedback) __builtin_prefetch(residual + kAhead, 1);
    const F c = compensated<kFeedback>(values, residual);
    const U sign = sign_of(as_u(c));
    const F size = as_f(as_u(c) ^ sign);
    U top;
    const F point = placed(q, size, sign, top);
    product = product + size * point;
    square = square + point * point;
    values += 16;
    if (kFeedback) residual += 16;
    return top;
  }
};

// What the codes do not say of values + residual.
template <class Q>
struct Rest {
  Reader<Q> reader;
  const float* values;
  float* residual;

  PSQ_METHOD void put_next(U word, int left) {
    store(residual, compensated<true>(values, residual) - reader.value(word, left));
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
template <class Q, int kParts, bool kFeedback>
PSQ_OUTLINE float place_block(const Q& q, const float* values, const float* residual, size_t numel, uint8_t* words) {
  double products = 0.0, squares = 0.0;
  for (size_t from = 0; from < numel; from += kChunk) {
    const size_t count = at_most(kChunk, numel - from);
    Places<Q, kFeedback> places = {q, values + from, residual + (kFeedback ? from : 0), splat(0.0f), splat(0.0f)};
    for (size_t at = 0; at < count; at += kUnit<kParts>, words += 64 * kUnitWords<Q, kParts>)
      pack_group<Q, kUnitWords<Q, kParts>>(places, words);
    products += double(sum(places.product));
    squares += double(sum(places.square));
  }
  return q.scale > 0.0f ? float(products) / float(squares) : 0.0f;
}

template <class Q, int kParts>
PSQ_OUTLINE void leave_rest(const Q& q, const float* values, float* residual, size_t numel, const uint8_t* words) {
  Rest<Q> rest = {{}, values, residual};
  rest.reader.set(q);
  for (size_t at = 0; at < numel; at += kUnit<kParts>, words += 64 * kUnitWords<Q, kParts>)
    unpack_group<Q, kUnitWords<Q, kParts>>(rest, words);
}

// A span whose blocks are whole and finite; their quantizers are fitted.
template <class Q, int kParts, bool kFeedback>
PSQ_INLINE void encode_places(const Span& a, Q* parts, uint8_t* scales) {
  const size_t block_bytes = a.block / 8 * Q::kBits;
  for (size_t from = 0, k = 0; from < a.numel; from += a.block, ++k) {
    const float* e = kFeedback ? a.residual + from : nullptr;
    uint8_t* words = a.words + k * block_bytes;
    const float scale = place_block<Q, kParts, kFeedback>(parts[k], a.values + from, e, a.block, words);
    put_scale(scales, k, scale);
    parts[k].restore(scale, 0);
  }
  if constexpr (kFeedback) {
    for (size_t from = 0, k = 0; from < a.numel; from += a.block, ++k)
      leave_rest<Q, kParts>(parts[k], a.values + from, a.residual + from, a.block, a.words + k * block_bytes);
  }
}

template <class Q, bool kFeedback>
PSQ_INLINE void rescale(const Span& a, Q* parts, const bool* live, uint8_t* scales) {
  for (size_t from = 0, k = 0; from < a.numel; from += a.block, ++k) {
    if (!live[k]) continue;
    float scale = 0.0f;
    if (parts[k].scale > 0.0f)
      scale = best_scale<Q, kFeedback>(parts[k], a.values + from, kFeedback ? a.residual + from : nullptr,
                                       at_most(a.block, a.numel - from));
    put_scale(scales, k, scale);
    parts[k].restore(scale, 0);
  }
}

// ---- segments --------------------------------------------------------------------------------------------------

template <class Q, int kParts, bool kFeedback>
PSQ_INLINE void encode_span(const Span& a, uint8_t*& scales) {
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
    pack_span<Q, kParts, kFeedback>(parts + part, live + part, a.values + from, kFeedback ? a.residual + from : nullptr,
                                    count, words, a.index + uint32_t(from));
    words += (count + kGroup - 1) / kGroup * kGroupBytes<Q>;
  }
}

template <class Q, int kParts, bool kFeedback>
PSQ_OUTLINE void encode_segment(const PsqEncode& a) {
  const size_t block = a.format.block == 0 ? a.numel : a.format.block;
  const size_t span = block > kSpan ? block : kSpan;
  uint8_t *words = a.words, *scales = a.scales;
  for (size_t from = 0; from < a.numel; from += span) {
    const size_t count = at_most(span, a.numel - from);
    encode_span<Q, kParts, kFeedback>({a.values + from, kFeedback ? a.residual + from : nullptr, words, count, block,
                                       a.format.parameter, a.start + uint32_t(from)},
                                      scales);
    words += (count + kGroup - 1) / kGroup * kGroupBytes<Q>;
  }
}

template <class Q, int kParts, bool kAdd>
PSQ_OUTLINE void unpack_groups(const Q* parts, const uint8_t* words, float* out, size_t numel) {
  Reader<Q> local[kParts];
  for (int part = 0; part < kParts; ++part) local[part].set(parts[part]);
  for (size_t from = 0; from < numel; from += kGroup, words += kGroupBytes<Q>) {
    Sink<Q, kParts, kAdd> sink = {local, out + from, 0};
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
