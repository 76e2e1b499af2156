// Quantizers: one register of values to codes and back. Formats: psq/kernels/reference.py.
//
// A row of several registers goes through one after another (`quantized` and its like, below): all at once they would
// not leave the 16 registers of the lower levels room for constants.
//
// A quantizer is one scale's constants, as scalars: the compiler makes rows of them outside its loops. The constants of
// all quantizers are one type, so that what only hands them on is compiled once. A quantizer has
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

struct Constants {
  float scale, inverse;
  int32_t threshold, bias;  // of Log
};
template <class Q>
PSQ_INLINE Q made_of(const Constants& constants) {
  Q quantizer;
  quantizer.scale = constants.scale;  // one by one: a load of all would wait for the stores that made them
  quantizer.inverse = constants.inverse;
  quantizer.threshold = constants.threshold;
  quantizer.bias = constants.bias;
  return quantizer;
}

PSQ_INLINE NativeU sign_of(NativeU bits) { return bits & each(kSignBit); }
template <class T>
PSQ_INLINE Pair<T> sign_of(Pair<T> bits) {
  return {sign_of(bits.lo), sign_of(bits.hi)};
}
template <class T>
PSQ_INLINE auto is_nan(T size) {
  T infinite;
  fill(infinite, int32_t(kInfinity));
  return less(infinite, size);
}
PSQ_INLINE float inverse_of(float scale) { return scale > 0.0f ? 1.0f / scale : 0.0f; }

template <Statistic kNorm>
struct Sign : Constants {
  static constexpr int kBits = 1;
  static constexpr Statistic kStatistic = kNorm;

  PSQ_METHOD float set(float norm, int32_t) { return scale = norm < kTiny ? 0.0f : norm; }
  PSQ_METHOD void restore(float value, int32_t) { scale = value; }
  PSQ_METHOD NativeF quantize(NativeF c, NativeU, NativeU& top) const {
    top = sign_of(as_u(c));
    return value(top);
  }
  PSQ_METHOD NativeF value(NativeU top) const { return as_f(sign_of(top) ^ each(bits_of(scale))); }
};

template <int kWidth>
struct Log : Constants {
  static constexpr int kBits = kWidth;
  static constexpr Statistic kStatistic = kMaxAbs;
  // threshold: bits of the smallest size that is not 0
  // bias: level + bias is the exponent of 2^(level - 1 - k), as a float has it

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
  // Exponents are moved to 128 + level: the level is then their low bits, ready for a code. The scale pays for it with
  // a factor of 2^-8 at most, exact because it is at least kTiny.
  PSQ_METHOD NativeF quantize(NativeF c, NativeU, NativeU& top) const {
    const uint32_t moved = uint32_t(128 - bias) << 23;
    const float moved_scale = scale * float_of(uint32_t(bias - 1) << 23);
    const NativeU sign = sign_of(as_u(c));
    const NativeU size = as_u(c) ^ sign;
    const NativeI ratio = as_i(as_f(size) * each(inverse));
    // Half a mantissa more, and the exponent is that of the nearest power of two, ties upwards.
    const NativeI nearest = maximum(ratio + each(int32_t(moved + 0x00400000u)), each(int32_t(129 << 23)));
    const NativeU power = drop(less(as_i(size), each(threshold)), as_u(nearest) & each(kInfinity));
    top = sign | (power << (9 - kBits));
    return as_f(as_u(as_f(power) * each(moved_scale)) ^ sign);
  }
  PSQ_METHOD NativeF value(NativeU top) const {
    const NativeU sign = sign_of(top);
    const NativeI level = as_i((top ^ sign) >> (32 - kBits));
    const NativeU power = keep(less(each(int32_t(0)), level), as_u((level + each(bias)) << 23));
    return as_f(as_u(as_f(power) * each(scale)) ^ sign);
  }
};

template <int kWidth, bool kStochastic>
struct Uniform : Constants {
  static constexpr int kBits = kWidth;
  static constexpr Statistic kStatistic = kMaxAbs;
  static constexpr int32_t kLevels = (1 << (kWidth - 1)) - 1;

  // The scale is the step. It keeps 16 significant bits, rounded up: code * step is exact, so the product has one meaning
  // everywhere. It stays below the point where the largest code's value would be infinite.
  PSQ_METHOD float set(float largest, int32_t) {
    const uint32_t rounded = (bits_of(largest / float(kLevels)) + 0xffu) & ~0xffu;
    const uint32_t most = bits_of(0x1.fffffep127f / float(kLevels)) & ~0xffu;
    scale = largest < kTiny ? 0.0f : float_of(rounded < most ? rounded : most);
    inverse = inverse_of(scale);
    return scale;
  }
  PSQ_METHOD void restore(float value, int32_t) { scale = value; }
  PSQ_METHOD NativeF quantize(NativeF c, NativeU index, NativeU& top) const {
    if constexpr (kStochastic) {
      const NativeI code = draw(c, index);
      top = as_u(code) << (32 - kBits);
      return to_f(code) * each(scale);
    } else {
      // Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits.
      const NativeF shifter = each(12582912.0f);
      const NativeF rounded = c * each(inverse) + shifter;
      top = as_u(rounded) << (32 - kBits);
      return (rounded - shifter) * each(scale);
    }
  }
  // Rounds |c| / step up with the probability of its fraction, then restores the sign.
  PSQ_METHOD NativeI draw(NativeF c, NativeU index) const {
    NativeU hash = index;
    hash = (hash ^ (hash >> 16)) * each(0x7feb352du);
    hash = (hash ^ (hash >> 15)) * each(0x846ca68bu);
    hash = hash ^ (hash >> 16);
    const NativeF size = absolute(c) * each(inverse);
    const NativeI below = to_i(size);
    const NativeI fraction = to_i((size - to_f(below)) * each(16777216.0f));
    const NativeI code = minimum(count(below, less(as_i(hash >> 8), fraction)), each(kLevels));
    const NativeI sign = as_i(c) >> 31;
    return (code ^ sign) - sign;
  }
  PSQ_METHOD NativeF value(NativeU top) const { return to_f(as_i(top) >> (32 - kBits)) * each(scale); }
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

// A size's place among the centroids: its level, in the lowest kBits - 1 bits below multiples of 2^kBits; its point.
struct Place {
  NativeU level;
  NativeF point;
};

template <int kWidth>
struct LloydMax : Constants {
  static constexpr int kBits = kWidth;
  static constexpr Statistic kStatistic = kRootMeanSquare;
  static constexpr int kLevels = 1 << (kWidth - 1);
  static constexpr bool kInTable = kLevels <= kTableLanes;
  typedef Centroids<kWidth> Table;

  // The scale on the wire comes later: see best_scale.
  PSQ_METHOD float set(float root_mean_square, int32_t) {
    scale = root_mean_square < kTiny ? 0.0f : root_mean_square;
    inverse = inverse_of(scale);
    return scale;
  }
  PSQ_METHOD void restore(float value, int32_t) { scale = value; }
  // What lies between centroids i - 1 and i.
  static constexpr float midpoint(int i) { return (Table::kPoints[i - 1] + Table::kPoints[i]) * 0.5f; }

  static constexpr float bound(int i) { return i < kLevels - 1 ? midpoint(i + 1) : __builtin_inff(); }

  PSQ_METHOD Place place(NativeF size) const {
    if constexpr (kLevels == 8 && kInTable) return by_bucket(size);
    const NativeF unit = size * each(inverse);
    if constexpr (kLevels == 8) return by_halving(unit);
    NativeI level = each(int32_t(0));
    for (int i = 1; i < kLevels; ++i) level = count(level, less_equal(each(midpoint(i)), unit));
    return {as_u(level), centroid(as_u(level))};
  }
  // Exponent and two more bits of the float unit / 9.28 + 1/8 number a bucket: 0 below 0.29, 1 below 0.58, 2 below
  // 0.87, 3 below 1.16, 4 below 1.74, 5 below 2.32, 6 below 2.9, then 7. Each has one midpoint, so far from its ends
  // that rounding cannot matter: one look-up and one comparison with it say what seven comparisons would.
  PSQ_METHOD Place by_bucket(NativeF size) const {
    constexpr float kBounds[8] = {bound(0), bound(1), bound(2), bound(3), bound(4), bound(5), bound(6), bound(7)};
    const NativeF unit = size * each(inverse);
    const NativeF spread = size * each(inverse * (1.0f / 9.28f)) + each(0.125f);
    const NativeU bucket = as_u(minimum(spread, each(0x1.fffffep-2f))) >> 21;
    const NativeI level = count(as_i(bucket), less_equal(lookup(kBounds, 8, as_i(bucket)), unit));
    return {as_u(level), centroid(as_u(level))};
  }
  PSQ_METHOD Place by_halving(NativeF unit) const {
    const auto high = less_equal(each(midpoint(4)), unit);
    const auto middle = less_equal(select(high, each(midpoint(6)), each(midpoint(2))), unit);
    const auto low = less_equal(select(middle, select(high, each(midpoint(7)), each(midpoint(3))),
                                       select(high, each(midpoint(5)), each(midpoint(1)))),
                                unit);
    const NativeU level = keep(high, each(4u)) | keep(middle, each(2u)) | keep(low, each(1u));
    return {level, centroid(level)};
  }
  // Of the level in the lowest kBits - 1 bits; what lies above has no say.
  PSQ_METHOD NativeF centroid(NativeU level) const {
    constexpr auto& p = Table::kPoints;
    if constexpr (kLevels == 1) {
      return each(p[0]);
    } else if constexpr (kInTable) {
      constexpr int kRepeats = kTableLanes / kLevels;
      float entries[kLevels * kRepeats];
      for (int i = 0; i < kLevels * kRepeats; ++i) entries[i] = p[i % kLevels];
      return lookup(entries, kLevels * kRepeats, as_i(level));
    } else if constexpr (kLevels == 2) {
      return choose(level << 31, each(p[1]), each(p[0]));
    } else {
      const NativeU low = level << 31, middle = level << 30;
      const NativeF lower = choose(middle, choose(low, each(p[3]), each(p[2])), choose(low, each(p[1]), each(p[0])));
      if constexpr (kLevels == 4) return lower;
      const NativeF upper = choose(middle, choose(low, each(p[kLevels - 1]), each(p[kLevels - 2])),
                             choose(low, each(p[kLevels - 3]), each(p[kLevels - 4])));
      return choose(level << 29, upper, lower);
    }
  }
  // The code from its level, in the top bits, anything below it zero.
  PSQ_METHOD NativeU code(NativeU sign, NativeU level) const {
    const NativeU placed = level << (32 - kBits);
    return sign | placed;
  }
  PSQ_METHOD NativeF quantize(NativeF c, NativeU, NativeU& top) const {
    const NativeU sign = sign_of(as_u(c));
    const Place at = place(absolute(c));
    top = code(sign, at.level);
    return as_f(as_u(at.point * each(scale)) ^ sign);
  }
  PSQ_METHOD NativeF value(NativeU top) const {
    return as_f(as_u(centroid(top >> (32 - kBits)) * each(scale)) ^ sign_of(top));
  }
};

// A row of registers, one by one.
template <class Q>
PSQ_INLINE NativeF quantized(const Q& q, NativeF c, NativeU index, NativeU& top) {
  return q.quantize(c, index, top);
}
template <class Q, class T, class S>
PSQ_INLINE Pair<T> quantized(const Q& q, Pair<T> c, Pair<S> index, Pair<S>& top) {
  const T lo = quantized(q, c.lo, index.lo, top.lo);
  return {lo, quantized(q, c.hi, index.hi, top.hi)};
}
template <class Q>
PSQ_INLINE NativeF valued(const Q& q, NativeU top) {
  return q.value(top);
}
template <class Q, class S>
PSQ_INLINE auto valued(const Q& q, Pair<S> top) -> Pair<decltype(valued(q, top.lo))> {
  return {valued(q, top.lo), valued(q, top.hi)};
}
// The codes of Lloyd-Max, and the centroids.
template <class Q>
PSQ_INLINE NativeF placed(const Q& q, NativeF size, NativeU sign, NativeU& top) {
  const Place at = q.place(size);
  top = q.code(sign, at.level);
  return at.point;
}
template <class Q, class T, class S>
PSQ_INLINE Pair<T> placed(const Q& q, Pair<T> size, Pair<S> sign, Pair<S>& top) {
  const T lo = placed(q, size.lo, sign.lo, top.lo);
  return {lo, placed(q, size.hi, sign.hi, top.hi)};
}

// A row at once by tables of bytes, where a register holds too few entries: as LloydMax::by_bucket.
struct PlaneTable {
  uint8_t bytes[64];
};
template <class Q>
constexpr PlaneTable plane_table(bool bounds) {
  PlaneTable table = {};
  for (int i = 0; i < Q::kLevels; ++i) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, bounds ? Q::bound(i) : Q::Table::kPoints[i]);
    for (int j = 0; j < 4; ++j) table.bytes[16 * j + i] = uint8_t(bits >> 8 * j);
  }
  return table;
}
template <class Q>
PSQ_INLINE F placed_by_bytes(const Q& q, F size, U sign, U& top) {
  static constexpr PlaneTable kBounds = plane_table<Q>(true), kPoints = plane_table<Q>(false);
  ByteTable bounds, points;
  bounds.read(kBounds.bytes);
  points.read(kPoints.bytes);
  const F spread = size * splat(q.inverse * (1.0f / 9.28f)) + splat(0.125f);
  const U bucket = (as_u(minimum(spread, splat(0x1.fffffep-2f))) >> 21) & splat(7u);
  const U level = as_u(count(as_i(bucket), less_equal(bounds.value(bucket), size * splat(q.inverse))));
  top = sign | (level << (32 - Q::kBits));
  return points.value(level);
}
template <class Q>
PSQ_INLINE F placed_row(const Q& q, F size, U sign, U& top) {
  if constexpr (kByteTables && Q::kLevels == 8) return placed_by_bytes(q, size, sign, top);
  return placed(q, size, sign, top);
}

// Bits of a finite value rounded to bf16, to nearest even and to a finite one; their lower halves are not zero.
template <class T>
PSQ_INLINE auto rounded_to_bf16(T value) {
  auto most = value, least = value;
  fill(most, 0x1.fep127f);
  fill(least, -0x1.fep127f);
  const auto bits = as_u(minimum(maximum(value, least), most));
  auto one = bits, half = bits;
  fill(one, 1u);
  fill(half, 0x7fffu);
  return bits + half + ((bits >> 16) & one);
}

// No scale. Rounds to nearest even; a finite value stays finite; a NaN becomes the quiet one.
struct Bf16 : Constants {
  static constexpr int kBits = 16;
  static constexpr Statistic kStatistic = kNone;

  PSQ_METHOD float set(float, int32_t) { return 0.0f; }
  PSQ_METHOD void restore(float, int32_t) {}
  PSQ_METHOD NativeF quantize(NativeF c, NativeU, NativeU& top) const {
    const NativeU sign = sign_of(as_u(c));
    const NativeI size = as_i(as_u(c) ^ sign);
    const auto finite = less(size, each(int32_t(kInfinity)));
    const NativeU special = select(is_nan(size), each(kNaN), sign | each(kInfinity));
    top = select(finite, rounded_to_bf16(c), special) & each(0xffff0000u);
    return as_f(top);
  }
  PSQ_METHOD NativeF value(NativeU top) const { return as_f(top & each(0xffff0000u)); }
};

}  // namespace
