// Quantizers: one row of 16 values to 16 codes and back. Formats: psq/kernels/reference.py.
//
// A quantizer holds one scale's constants, as scalars: the compiler makes rows of them outside its loops. It has
//   kBits, kStatistic          bits of a code; which norm of a block its scale comes from
//   set(norm, parameter)       takes that norm, returns the scale for the wire
//   restore(scale, parameter)  what a decoder needs
//   quantize(c, index, top)    the code in the top kBits of `top`, zeros below; returns the value the decoder will see
//   value(top)                 that value from a code in the top kBits, anything below

namespace {

constexpr uint32_t kSignBit = 0x80000000u;
constexpr uint32_t kInfinity = 0x7f800000u;
constexpr uint32_t kNaN = 0x7fc00000u;
constexpr float kTiny = 0x1p-100f;  // a block below this is a zero block: 1 / scale stays finite

enum Statistic { kNone, kMeanAbs, kRootMeanSquare, kMaxAbs };

PSQ_INLINE U sign_of(U bits) { return bits & splat(kSignBit); }
PSQ_INLINE U is_nan(I size) { return less(splat(int32_t(kInfinity)), size); }
PSQ_INLINE float inverse_of(float scale) { return scale > 0.0f ? 1.0f / scale : 0.0f; }

template <Statistic kNorm>
struct Sign {
  static constexpr int kBits = 1;
  static constexpr Statistic kStatistic = kNorm;
  float scale;

  PSQ_METHOD float set(float norm, int32_t) { return scale = norm < kTiny ? 0.0f : norm; }
  PSQ_METHOD void restore(float value, int32_t) { scale = value; }
  PSQ_METHOD F quantize(F c, U, U& top) const {
    top = sign_of(as_u(c));
    return value(top);
  }
  PSQ_METHOD F value(U top) const { return as_f(sign_of(top) ^ splat(bits_of(scale))); }
};

template <int kWidth>
struct Log {
  static constexpr int kBits = kWidth;
  static constexpr Statistic kStatistic = kMaxAbs;
  float scale, inverse;
  int32_t threshold;  // bits of the smallest size that is not 0
  int32_t bias;       // level + bias is the exponent of 2^(level - 1 - k), as a float has it

  PSQ_METHOD float set(float largest, int32_t k) {
    restore(largest < kTiny ? 0.0f : largest, k);
    inverse = inverse_of(scale);
    threshold = int32_t(scale > 0.0f ? bits_of(scale * float_of(uint32_t(126 - k) << 23)) : kInfinity);
    return scale;
  }
  PSQ_METHOD void restore(float value, int32_t k) {
    scale = value;
    bias = 126 - k;
  }
  PSQ_METHOD F quantize(F c, U, U& top) const {
    const U sign = sign_of(as_u(c));
    const U size = as_u(c) ^ sign;
    const U ratio = as_u(as_f(size) * splat(inverse));
    // Half a mantissa more, and the exponent is that of the nearest power of two, ties upwards.
    const U nearest = (ratio + splat(0x00400000u)) & splat(kInfinity);
    const I least = splat((bias + 1) << 23);
    const U power = drop(less(as_i(size), splat(threshold)), as_u(maximum(as_i(nearest), least)));
    const I level = maximum(as_i(power >> 23) - splat(bias), splat(int32_t(0)));
    top = sign | (as_u(level) << (32 - kBits));
    return as_f(as_u(as_f(power) * splat(scale)) ^ sign);
  }
  PSQ_METHOD F value(U top) const {
    const U sign = sign_of(top);
    const I level = as_i((top ^ sign) >> (32 - kBits));
    const U power = keep(less(splat(int32_t(0)), level), as_u((level + splat(bias)) << 23));
    return as_f(as_u(as_f(power) * splat(scale)) ^ sign);
  }
};

template <int kWidth, bool kStochastic>
struct Uniform {
  static constexpr int kBits = kWidth;
  static constexpr Statistic kStatistic = kMaxAbs;
  static constexpr int32_t kLevels = (1 << (kWidth - 1)) - 1;
  float step, inverse;

  // The step keeps 16 significant bits, rounded up: code * step is exact, so the product has one meaning everywhere. It
  // stays below the point where the largest code's value would be infinite.
  PSQ_METHOD float set(float largest, int32_t) {
    const uint32_t rounded = (bits_of(largest / float(kLevels)) + 0xffu) & ~0xffu;
    const uint32_t most = bits_of(0x1.fffffep127f / float(kLevels)) & ~0xffu;
    step = largest < kTiny ? 0.0f : float_of(rounded < most ? rounded : most);
    inverse = inverse_of(step);
    return step;
  }
  PSQ_METHOD void restore(float value, int32_t) { step = value; }
  PSQ_METHOD F quantize(F c, U index, U& top) const {
    if constexpr (kStochastic) {
      const I code = draw(c, index);
      top = as_u(code) << (32 - kBits);
      return to_f(code) * splat(step);
    } else {
      // Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits.
      const F shifter = splat(12582912.0f);
      const F rounded = c * splat(inverse) + shifter;
      top = as_u(rounded) << (32 - kBits);
      return (rounded - shifter) * splat(step);
    }
  }
  // Rounds |c| / step up with the probability of its fraction, then restores the sign.
  PSQ_METHOD I draw(F c, U index) const {
    U hash = index;
    hash = (hash ^ (hash >> 16)) * splat(0x7feb352du);
    hash = (hash ^ (hash >> 15)) * splat(0x846ca68bu);
    hash = hash ^ (hash >> 16);
    const F size = absolute(c) * splat(inverse);
    const I below = to_i(size);
    const I fraction = to_i((size - to_f(below)) * splat(16777216.0f));
    const I up = as_i(less(as_i(hash >> 8), fraction));
    const I code = minimum(below - up, splat(kLevels));
    const I sign = as_i(c) >> 31;
    return (code ^ sign) - sign;
  }
  PSQ_METHOD F value(U top) const { return to_f(as_i(top) >> (32 - kBits)) * splat(step); }
};

// Centroids of a unit Gaussian, by size.
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
  float inverse, scale;

  // The scale on the wire comes later: see best_scale.
  PSQ_METHOD float set(float root_mean_square, int32_t) {
    scale = root_mean_square < kTiny ? 0.0f : root_mean_square;
    inverse = inverse_of(scale);
    return scale;
  }
  PSQ_METHOD void restore(float value, int32_t) { scale = value; }
  PSQ_METHOD I nearest(F size) const {
    I level = splat(int32_t(0));
    for (int i = 1; i < kLevels; ++i)
      level = level - as_i(less_equal(splat((Table::kPoints[i - 1] + Table::kPoints[i]) * 0.5f), size));
    return level;
  }
  PSQ_METHOD F centroid(I level) const {
    if constexpr (kLevels <= kTableLanes) {
      return lookup(Table::kPoints, kLevels, level);
    } else {
      F point = splat(Table::kPoints[0]);
      for (int i = 1; i < kLevels; ++i)
        point = select(less(splat(int32_t(i - 1)), level), splat(Table::kPoints[i]), point);
      return point;
    }
  }
  PSQ_METHOD F quantize(F c, U, U& top) const {
    const U sign = sign_of(as_u(c));
    const I level = nearest(absolute(c) * splat(inverse));
    top = sign | (as_u(level) << (32 - kBits));
    return as_f(as_u(centroid(level) * splat(scale)) ^ sign);
  }
  PSQ_METHOD F value(U top) const {
    const U sign = sign_of(top);
    return as_f(as_u(centroid(as_i((top ^ sign) >> (32 - kBits))) * splat(scale)) ^ sign);
  }
};

// No scale. Rounds to nearest even; a finite value stays finite; a NaN becomes the quiet one.
struct Bf16 {
  static constexpr int kBits = 16;
  static constexpr Statistic kStatistic = kNone;

  PSQ_METHOD void restore(float, int32_t) {}
  PSQ_METHOD F quantize(F c, U, U& top) const {
    const U sign = sign_of(as_u(c));
    const I size = as_i(as_u(c) ^ sign);
    const I even = (size >> 16) & splat(int32_t(1));
    const I rounded = minimum(size + splat(int32_t(0x7fff)) + even, splat(int32_t(0x7f7fffff)));
    const U finite = less(size, splat(int32_t(kInfinity)));
    const U special = select(is_nan(size), splat(kNaN), sign | splat(kInfinity));
    top = select(finite, sign | as_u(rounded), special) & splat(0xffff0000u);
    return as_f(top);
  }
  PSQ_METHOD F value(U top) const { return as_f(top & splat(0xffff0000u)); }
};

}  // namespace
