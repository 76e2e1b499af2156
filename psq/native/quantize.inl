// Quantizers: one row of 16 values to 16 codes and back. Formats: psq/kernels/reference.py.
//
// A quantizer holds one scale's constants as rows. It has
//   kBits, kStatistic        bits of a code; which norm of a block its scale comes from
//   set(norm, parameter)     takes that norm, returns the scale for the wire
//   restore(scale, parameter)  what a decoder needs
//   quantize(c, index, top)  the code in the top kBits of `top`, zeros below; returns the value the decoder will see
//   value(top)               that value from a code in the top kBits, anything below

namespace {

constexpr uint32_t kSignBit = 0x80000000u;
constexpr uint32_t kInfinity = 0x7f800000u;
constexpr uint32_t kNaN = 0x7fc00000u;
constexpr float kTiny = 0x1p-100f;  // a block below this is a zero block: 1 / scale stays finite

enum Statistic { kNone, kMeanAbs, kRootMeanSquare, kMaxAbs };

template <Statistic kNorm>
struct Sign {
  static constexpr int kBits = 1;
  static constexpr Statistic kStatistic = kNorm;
  U scale;

  PSQ_METHOD float set(float norm, int32_t) {
    const float value = norm < kTiny ? 0.0f : norm;
    restore(value, 0);
    return value;
  }
  PSQ_METHOD void restore(float value, int32_t) { scale = splat(bits_of(value)); }
  PSQ_METHOD F quantize(F c, U, U& top) const {
    top = as_u(c) & splat(kSignBit);
    return as_f(top ^ scale);
  }
  PSQ_METHOD F value(U top) const { return as_f((top & splat(kSignBit)) ^ scale); }
};

template <int kWidth>
struct Log {
  static constexpr int kBits = kWidth;
  static constexpr Statistic kStatistic = kMaxAbs;
  F scale, inverse;
  I threshold, bias;

  PSQ_METHOD float set(float largest, int32_t k) {
    const float value = largest < kTiny ? 0.0f : largest;
    const float smallest = value * float_of(uint32_t(127 - (k + 1)) << 23);
    inverse = splat(value > 0.0f ? 1.0f / value : 0.0f);
    threshold = splat(int32_t(value > 0.0f ? bits_of(smallest) : kInfinity));
    restore(value, k);
    return value;
  }
  PSQ_METHOD void restore(float value, int32_t k) {
    scale = splat(value);
    bias = splat(int32_t(126 - k));
  }
  // scale * 2^(level - 1 - k), and 0 for level 0.
  PSQ_METHOD F magnitude(I level, U is_zero) const {
    const U power = as_u((level + bias) << 23);
    return as_f(select(is_zero, splat(0u), power)) * scale;
  }
  PSQ_METHOD F quantize(F c, U, U& top) const {
    const U sign = as_u(c) & splat(kSignBit);
    const U size = as_u(c) ^ sign;
    const U ratio = as_u(as_f(size) * inverse);
    const I nearest = as_i((ratio + splat(0x00400000u)) >> 23) - bias;
    const U is_zero = less(as_i(size), threshold);
    const I level = maximum(nearest, splat(int32_t(1)));
    top = sign | (select(is_zero, splat(0u), as_u(level)) << (32 - kBits));
    return as_f(as_u(magnitude(level, is_zero)) ^ sign);
  }
  PSQ_METHOD F value(U top) const {
    const U sign = top & splat(kSignBit);
    const I level = as_i((top ^ sign) >> (32 - kBits));
    return as_f(as_u(magnitude(level, less(level, splat(int32_t(1))))) ^ sign);
  }
};

template <int kWidth, bool kStochastic>
struct Uniform {
  static constexpr int kBits = kWidth;
  static constexpr Statistic kStatistic = kMaxAbs;
  static constexpr int32_t kLevels = (1 << (kWidth - 1)) - 1;
  F step, inverse;

  // The step keeps 16 significant bits, rounded up: code * step is exact, so the product has one meaning everywhere.
  PSQ_METHOD float set(float largest, int32_t) {
    uint32_t bits = (bits_of(largest / float(kLevels)) + 0xffu) & ~0xffu;
    if (bits > 0x7f7fff00u) bits = 0x7f7fff00u;
    const float value = largest < kTiny ? 0.0f : float_of(bits);
    inverse = splat(value > 0.0f ? 1.0f / value : 0.0f);
    restore(value, 0);
    return value;
  }
  PSQ_METHOD void restore(float value, int32_t) { step = splat(value); }
  PSQ_METHOD F quantize(F c, U index, U& top) const {
    if constexpr (kStochastic) {
      const I code = draw(c, index);
      top = as_u(code) << (32 - kBits);
      return to_f(code) * step;
    } else {
      // Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits.
      const F shifter = splat(12582912.0f);
      const F rounded = c * inverse + shifter;
      top = as_u(rounded) << (32 - kBits);
      return (rounded - shifter) * step;
    }
  }
  // Rounds |c| / step up with the probability of its fraction, then restores the sign.
  PSQ_METHOD I draw(F c, U index) const {
    U hash = index;
    hash = (hash ^ (hash >> 16)) * splat(0x7feb352du);
    hash = (hash ^ (hash >> 15)) * splat(0x846ca68bu);
    hash = hash ^ (hash >> 16);
    const F size = absolute(c) * inverse;
    const I below = to_i(size);
    const I fraction = to_i((size - to_f(below)) * splat(16777216.0f));
    const I up = as_i(less(as_i(hash >> 8), fraction));
    const I code = minimum(below - up, splat(kLevels));
    const I sign = as_i(c) >> 31;
    return (code ^ sign) - sign;
  }
  PSQ_METHOD F value(U top) const { return to_f(as_i(top) >> (32 - kBits)) * step; }
};

// Centroids of a unit Gaussian by size, and the midpoints between them.
template <int kBits>
struct Centroids;
template <>
struct Centroids<1> {
  static constexpr float kPoints[] = {0.7979f};
};
template <>
struct Centroids<2> {
  static constexpr float kPoints[] = {0.4528f, 1.5104f};
};
template <>
struct Centroids<3> {
  static constexpr float kPoints[] = {0.2451f, 0.7560f, 1.3439f, 2.1519f};
};
template <>
struct Centroids<4> {
  static constexpr float kPoints[] = {0.1284f, 0.3880f, 0.6568f, 0.9423f, 1.2562f, 1.6180f, 2.0690f, 2.7326f};
};

template <int kWidth>
struct LloydMax {
  static constexpr int kBits = kWidth;
  static constexpr Statistic kStatistic = kRootMeanSquare;
  static constexpr int kLevels = 1 << (kWidth - 1);
  typedef Centroids<kWidth> Table;
  F inverse, scale;

  PSQ_METHOD float set(float root_mean_square, int32_t) {
    inverse = splat(root_mean_square < kTiny ? 0.0f : 1.0f / root_mean_square);
    return root_mean_square < kTiny ? 0.0f : root_mean_square;
  }
  PSQ_METHOD void restore(float value, int32_t) { scale = splat(value); }
  PSQ_METHOD F centroid(F size, I& level) const {
    F point = splat(Table::kPoints[0]);
    level = splat(int32_t(0));
    for (int i = 1; i < kLevels; ++i) {
      const U beyond = less_equal(splat((Table::kPoints[i - 1] + Table::kPoints[i]) * 0.5f), size);
      point = select(beyond, splat(Table::kPoints[i]), point);
      level = level - as_i(beyond);
    }
    return point;
  }
  PSQ_METHOD F quantize(F c, U, U& top) const {
    const U sign = as_u(c) & splat(kSignBit);
    I level;
    const F point = centroid(absolute(c) * inverse, level);
    top = sign | (as_u(level) << (32 - kBits));
    return as_f(as_u(point * scale) ^ sign);
  }
  PSQ_METHOD F value(U top) const {
    const U sign = top & splat(kSignBit);
    const I level = as_i((top ^ sign) >> (32 - kBits));
    F point = splat(Table::kPoints[0]);
    for (int i = 1; i < kLevels; ++i)
      point = select(less(level, splat(int32_t(i))), point, splat(Table::kPoints[i]));
    return as_f(as_u(point * scale) ^ sign);
  }
};

// No scale. Rounds to nearest even; a finite value stays finite; a NaN becomes the quiet one.
struct Bf16 {
  static constexpr int kBits = 16;
  static constexpr Statistic kStatistic = kNone;

  PSQ_METHOD void restore(float, int32_t) {}
  PSQ_METHOD F quantize(F c, U, U& top) const {
    const U sign = as_u(c) & splat(kSignBit);
    const U size = as_u(c) ^ sign;
    const U even = (size >> 16) & splat(1u);
    const U rounded = as_u(minimum(as_i(size + splat(0x7fffu) + even), splat(int32_t(0x7f7fffff))));
    const U is_finite = less(as_i(size), splat(int32_t(kInfinity)));
    const U is_number = less(as_i(size), splat(int32_t(kInfinity + 1)));
    const U special = select(is_number, as_u(c), splat(kNaN));
    top = select(is_finite, sign | rounded, special) & splat(0xffff0000u);
    return as_f(top);
  }
  PSQ_METHOD F value(U top) const { return as_f(top & splat(0xffff0000u)); }
};

}  // namespace
