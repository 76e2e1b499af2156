// From a block's values, and what remembers the rest of earlier ones, to its scale. Formats: psq/kernels/reference.py.
#include "quantize.inl"

namespace {

constexpr size_t kGroup = 512;   // values in a group: 32 rows of 16 lanes
constexpr size_t kChunk = 8192;  // values summed in float before a double takes over; the largest block

// Values whose blocks are fitted together before any of them is quantized: what follows a block's sum, a square root
// and a division, then holds nobody up. (Measured: more costs 0.1 of memory's speed, for nothing is fetched meanwhile.)
constexpr size_t kSpan = 1024;
constexpr size_t kMostParts = kSpan / 256;

PSQ_INLINE size_t at_most(size_t a, size_t b) { return a < b ? a : b; }
PSQ_INLINE U lanes() {
  static const uint32_t counting[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load_words((const uint8_t*)counting);
}

// What earlier encodings have left unsaid of some values is floats, or there is nothing that remembers.
enum Feedback { kForget, kKeep };

template <Feedback kFeedback>
PSQ_INLINE F compensated(const float* values, const float* residual) {
  return kFeedback == kKeep ? load(values) + load(residual) : load(values);
}
// Where a vector goes on that may not be there.
template <Feedback kFeedback>
PSQ_INLINE float* further(float* residual, size_t count) {
  return kFeedback == kKeep ? residual + count : residual;
}
PSQ_INLINE float* residual_at(float* residual, size_t from) { return residual == nullptr ? nullptr : residual + from; }

// A block's last, short row, the missing lanes 0.
template <Feedback kFeedback>
PSQ_INLINE F short_row(const float* values, const float* residual, size_t numel) {
  float row[16] = {}, rest[16] = {};
  __builtin_memcpy(row, values, numel * sizeof(float));
  if (kFeedback == kKeep) __builtin_memcpy(rest, residual, numel * sizeof(float));
  return compensated<kFeedback>(row, rest);
}

// Multiplies 16 values of a residual; what is then not finite is given up: 0.
PSQ_INLINE F rescaled_row(F row, F factor) {
  const F product = row * factor;
  return as_f(keep(less(as_i(absolute(product)), splat(int32_t(kInfinity))), as_u(product)));
}
PSQ_INLINE void rescale_row(float* residual, F factor) { store(residual, rescaled_row(load(residual), factor)); }
PSQ_INLINE void rescale_row(uint16_t* residual, F factor) {
  put_halves(residual, rounded_to_bf16(rescaled_row(load(residual), factor)));
}
template <class E>
PSQ_INLINE void rescale_rows(E* residual, size_t numel, float factor) {
  const size_t whole = numel & ~size_t(15), bytes = (numel - whole) * sizeof(E);
  for (size_t i = 0; i < whole; i += 16) rescale_row(residual + i, splat(factor));
  if (bytes == 0) return;
  E last[16] = {};
  __builtin_memcpy(last, residual + whole, bytes);
  rescale_row(last, splat(factor));
  __builtin_memcpy(residual + whole, last, bytes);
}

// A part of a residual, which then is in the cache.
PSQ_OUTLINE void rescale_residual(void* residual, bool half, size_t from, size_t numel, float factor) {
  half ? rescale_rows((uint16_t*)residual + from, numel, factor) : rescale_rows((float*)residual + from, numel, factor);
}

// A segment's residual: f32, bf16, or none. A bf16 one is expanded piece by piece, so there is one kind of encoder.
class Memory {
 public:
  PSQ_METHOD Memory(void* residual, bool half) : residual_(residual), half_(half) {}

  // Of at most kChunk values; or null. What is left there is kept by `close`.
  PSQ_METHOD float* open(size_t from, size_t numel) {
    if (!half_) return residual_at((float*)residual_, from);
    expand((const uint16_t*)residual_ + from, expanded_, numel);
    return expanded_;
  }
  PSQ_METHOD void close(size_t from, size_t numel) {
    if (half_) round((uint16_t*)residual_ + from, expanded_, numel);
  }

 private:
  PSQ_OUTLINE void expand(const uint16_t* from, float* to, size_t numel) {
    const size_t whole = numel & ~size_t(15);
    for (size_t i = 0; i < whole; i += 16) {
      __builtin_prefetch(from + i + PSQ_AHEAD, 1);
      store(to + i, load(from + i));
    }
    uint16_t last[16] = {};
    __builtin_memcpy(last, from + whole, (numel - whole) * sizeof last[0]);
    store(to + whole, load(last));
  }
  PSQ_OUTLINE void round(uint16_t* to, const float* from, size_t numel) {
    const size_t whole = numel & ~size_t(15);
    for (size_t i = 0; i < whole; i += 16) round_row(to + i, load(from + i));
    uint16_t last[16];
    __builtin_memcpy(last, to + whole, (numel - whole) * sizeof last[0]);
    round_row(last, load(from + whole));
    __builtin_memcpy(to + whole, last, (numel - whole) * sizeof last[0]);
  }
  // Encoders leave finite values, or what was there: which is not to change where it is not finite.
  PSQ_METHOD static void round_row(uint16_t* to, F rest) {
    const U size = as_u(absolute(rest));
    put_halves(to, select(less(as_i(size), splat(int32_t(kInfinity))), rounded_to_bf16(rest), as_u(rest)));
  }

  void* residual_;
  bool half_;
  float expanded_[kChunk + 16];
};

template <Statistic kStatistic>
PSQ_INLINE F accumulate(F total, F c) {
  if constexpr (kStatistic == kMeanAbs) return total + absolute(c);
  if constexpr (kStatistic == kRootMeanSquare) return total + c * c;
  return as_f(maximum(as_i(total), as_i(absolute(c))));  // by bits: NaN and Inf beat every number
}

// What a chunk, or less, of a block adds to its norm: the sum of |c| or c^2, or max |c|.
template <Statistic kStatistic, Feedback kFeedback>
PSQ_OUTLINE float norm_part(const float* values, const float* residual, size_t numel) {
  const size_t whole = numel & ~size_t(15);
  F sums = splat(0.0f);
  for (size_t i = 0; i < whole; i += 16)
    sums = accumulate<kStatistic>(sums, compensated<kFeedback>(values + i, residual + i));
  if (whole < numel)
    sums = accumulate<kStatistic>(sums, short_row<kFeedback>(values + whole, residual + whole, numel - whole));
  if constexpr (kStatistic == kMaxAbs) return float_of(uint32_t(maximum(as_i(sums))));
  return sum(sums);
}

// The norm of a block from its parts: mean |c|, root mean square, or max |c|. Not finite iff a value, or the sum, is not.
struct Norm {
  double total;
  uint32_t largest;

  PSQ_METHOD void add(float part) {
    total += double(part);
    largest = bits_of(part) > largest ? bits_of(part) : largest;
  }
  PSQ_METHOD float of(Statistic statistic, size_t numel) const {
    if (statistic == kMaxAbs) return float_of(largest);
    const float mean = float(total) / float(numel);
    return statistic == kRootMeanSquare ? __builtin_sqrtf(mean) : mean;
  }
};

// The two sums of a Lloyd-Max block's scale. The scale is the least-squares one of the chosen centroids q:
// <|c|, q> / <q, q>.
struct Products {
  double product, square;

  PSQ_METHOD float scale(const Constants& fitted) const {
    return fitted.scale > 0.0f ? float(product) / float(square) : 0.0f;
  }
};

// What a chunk, or less, adds to them.
template <class Q, Feedback kFeedback>
PSQ_OUTLINE void product_part(const Constants& fitted, const float* values, const float* residual, size_t numel,
                              Products& products) {
  const Q q = made_of<Q>(fitted);
  F product = splat(0.0f), square = splat(0.0f);
  for (size_t i = 0; i < numel; i += 16) {
    const size_t here = at_most(16, numel - i);
    const F size = absolute(here == 16 ? compensated<kFeedback>(values + i, residual + i)
                                       : short_row<kFeedback>(values + i, residual + i, here));
    U top;
    F point = placed_row(q, size, splat(0u), top);
    if (here < 16) point = select(less(as_i(lanes()), splat(int32_t(here))), point, splat(0.0f));
    product = product + size * point;
    square = square + point * point;
  }
  products.product += double(sum(product));
  products.square += double(sum(square));
}

template <class Q>
constexpr bool kIsLloydMax = false;
template <int kWidth>
constexpr bool kIsLloydMax<LloydMax<kWidth>> = true;

}  // namespace
