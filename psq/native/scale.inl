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

// What remembers what was not said: nothing, f32, or bf16.
enum Feedback { kForget, kWhole, kHalf };
template <Feedback>
struct ResidualOf {
  typedef float Type;
};
template <>
struct ResidualOf<kHalf> {
  typedef uint16_t Type;
};
template <Feedback kFeedback>
using Residual = typename ResidualOf<kFeedback>::Type;

PSQ_INLINE void leave(float* residual, F rest) { store(residual, rest); }
PSQ_INLINE void leave_half(void* residual, NativeF rest) { put_halves(residual, rounded_to_bf16(rest)); }
template <class T>
PSQ_INLINE void leave_half(void* residual, Pair<T> rest) {
  leave_half(residual, rest.lo);
  leave_half((uint8_t*)residual + sizeof(T) / 2, rest.hi);
}
PSQ_INLINE void leave(uint16_t* residual, F rest) { leave_half(residual, rest); }
// Only where a value is finite.
template <class T>
PSQ_INLINE void leave_where(T* residual, U size, F rest) {
  const U before = as_u(load(residual)), after = sizeof(T) == 2 ? rounded_to_bf16(rest) : as_u(rest);
  const U now = select(less(as_i(size), splat(int32_t(kInfinity))), after, before);
  if constexpr (sizeof(T) == 2)
    put_halves(residual, now);
  else
    store(residual, as_f(now));
}

template <Feedback kFeedback>
PSQ_INLINE F compensated(const float* values, const Residual<kFeedback>* residual) {
  return kFeedback != kForget ? load(values) + load(residual) : load(values);
}

// A block's last, short row, the missing lanes 0.
template <Feedback kFeedback>
PSQ_INLINE F short_row(const float* values, const Residual<kFeedback>* residual, size_t numel) {
  float row[16] = {};
  Residual<kFeedback> rest[16] = {};
  __builtin_memcpy(row, values, numel * sizeof(float));
  if (kFeedback != kForget) __builtin_memcpy(rest, residual, numel * sizeof rest[0]);
  return compensated<kFeedback>(row, rest);
}

template <Statistic kStatistic>
PSQ_INLINE F accumulate(F total, F c) {
  if constexpr (kStatistic == kMeanAbs) return total + absolute(c);
  if constexpr (kStatistic == kRootMeanSquare) return total + c * c;
  return as_f(maximum(as_i(total), as_i(absolute(c))));  // by bits: NaN and Inf beat every number
}

// The norm of a block: mean |c|, root mean square, or max |c|. Not finite iff a value, or the sum, is not.
template <Statistic kStatistic, Feedback kFeedback>
PSQ_OUTLINE float norm(const float* values, const Residual<kFeedback>* residual, size_t numel) {
  double total = 0.0;
  uint32_t largest = 0;
  for (size_t from = 0; from < numel; from += kChunk) {
    const size_t count = at_most(kChunk, numel - from), whole = count & ~size_t(15);
    const float* x = values + from;
    const Residual<kFeedback>* e = residual + (kFeedback != kForget ? from : 0);
    F sums = splat(0.0f);
    for (size_t i = 0; i < whole; i += 16)
      sums = accumulate<kStatistic>(sums, compensated<kFeedback>(x + i, e + (kFeedback != kForget ? i : 0)));
    if (whole < count)
      sums = accumulate<kStatistic>(
          sums, short_row<kFeedback>(x + whole, e + (kFeedback != kForget ? whole : 0), count - whole));
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
template <class Q, Feedback kFeedback>
PSQ_OUTLINE float best_scale(const Q& q, const float* values, const Residual<kFeedback>* residual, size_t numel) {
  double products = 0.0, squares = 0.0;
  for (size_t from = 0; from < numel; from += kChunk) {
    const size_t count = at_most(kChunk, numel - from);
    const float* x = values + from;
    const Residual<kFeedback>* e = residual + (kFeedback != kForget ? from : 0);
    F product = splat(0.0f), square = splat(0.0f);
    for (size_t i = 0; i < count; i += 16) {
      const size_t here = at_most(16, count - i), at = kFeedback != kForget ? i : 0;
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
template <class Q, Feedback kFeedback>
PSQ_INLINE bool fit(Q& q, float& scale, const float* values, const Residual<kFeedback>* residual, size_t numel,
                    int32_t parameter) {
  const float size = norm<Q::kStatistic, kFeedback>(values, residual, numel);
  const bool finite = is_finite(size);
  scale = q.set(finite ? size : 0.0f, parameter);
  if (!finite) scale = float_of(kNaN);
  return finite;
}

}  // namespace
