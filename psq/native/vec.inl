// Rows of 16 lanes: F (float), I (int32), U (uint32), the same on every level.
//
// A row is one 64-byte register, two of 32 bytes or four of 16: a type wider than the register would travel through
// the stack, so wider rows are pairs of pairs, and an operation on a pair is the operation on its halves.

#define PSQ_INLINE static inline __attribute__((always_inline))
#define PSQ_METHOD inline __attribute__((always_inline))
// One copy of a function for all its callers.
#ifdef __clang__
#define PSQ_OUTLINE static __attribute__((noinline))
#else
#define PSQ_OUTLINE static __attribute__((noinline, noclone))
#endif
// Before a loop over rows: the compiler would unroll it whole, for three times the code and no speed.
#ifdef __clang__
#define PSQ_ROLLED _Pragma("clang loop unroll(disable)")
#else
#define PSQ_ROLLED _Pragma("GCC unroll 1")
#endif

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace {

typedef float NativeF __attribute__((vector_size(PSQ_VECTOR_BYTES)));
typedef int32_t NativeI __attribute__((vector_size(PSQ_VECTOR_BYTES)));
typedef uint32_t NativeU __attribute__((vector_size(PSQ_VECTOR_BYTES)));
typedef float LooseF __attribute__((vector_size(PSQ_VECTOR_BYTES), aligned(1), may_alias));
typedef uint32_t LooseU __attribute__((vector_size(PSQ_VECTOR_BYTES), aligned(1), may_alias));
typedef uint16_t NativeH __attribute__((vector_size(PSQ_VECTOR_BYTES / 2)));
typedef uint16_t LooseH __attribute__((vector_size(PSQ_VECTOR_BYTES / 2), aligned(1), may_alias));

template <class T>
struct Pair {
  T lo, hi;
};

#if PSQ_VECTOR_BYTES == 64
typedef NativeF F;
typedef NativeI I;
typedef NativeU U;
#elif PSQ_VECTOR_BYTES == 32
typedef Pair<NativeF> F;
typedef Pair<NativeI> I;
typedef Pair<NativeU> U;
#elif PSQ_VECTOR_BYTES == 16
typedef Pair<Pair<NativeF>> F;
typedef Pair<Pair<NativeI>> I;
typedef Pair<Pair<NativeU>> U;
#else
#error "PSQ_VECTOR_BYTES must be 16, 32 or 64"
#endif

// a + b and the like: the compiler's own on a register, half by half on a pair.
#define PSQ_PAIR_OPERATOR(op)                                \
  template <class T>                                         \
  PSQ_INLINE Pair<T> operator op(Pair<T> a, Pair<T> b) {     \
    return {a.lo op b.lo, a.hi op b.hi};                     \
  }
PSQ_PAIR_OPERATOR(+)
PSQ_PAIR_OPERATOR(-)
PSQ_PAIR_OPERATOR(*)
PSQ_PAIR_OPERATOR(/)
PSQ_PAIR_OPERATOR(&)
PSQ_PAIR_OPERATOR(|)
PSQ_PAIR_OPERATOR(^)

template <class T>
PSQ_INLINE Pair<T> operator<<(Pair<T> a, int count) {
  return {a.lo << count, a.hi << count};
}
template <class T>
PSQ_INLINE Pair<T> operator>>(Pair<T> a, int count) {
  return {a.lo >> count, a.hi >> count};
}

// Bits of one kind of row as another.
PSQ_INLINE NativeI as_i(NativeF a) { return (NativeI)a; }
PSQ_INLINE NativeI as_i(NativeU a) { return (NativeI)a; }
PSQ_INLINE NativeU as_u(NativeF a) { return (NativeU)a; }
PSQ_INLINE NativeU as_u(NativeI a) { return (NativeU)a; }
PSQ_INLINE NativeF as_f(NativeU a) { return (NativeF)a; }
PSQ_INLINE NativeF as_f(NativeI a) { return (NativeF)a; }
// Values: int32 to float (exact below 2^24), float to int32 (towards zero).
PSQ_INLINE NativeF to_f(NativeI a) { return __builtin_convertvector(a, NativeF); }
PSQ_INLINE NativeI to_i(NativeF a) { return __builtin_convertvector(a, NativeI); }

// Comparisons give a NativeMask: a bit of a mask register for each lane, or lanes of all ones or zeros. What follows
// is written in intrinsics where there are some: GCC makes two or three instructions of `a > b ? a : b`, and more of a
// choice by a mask that it has lost sight of.
#if PSQ_VECTOR_BYTES == 64
#define PSQ_X(name) _mm512_##name
typedef __m512i IntRegister;
typedef __mmask16 NativeMask;
PSQ_INLINE NativeMask less(NativeF a, NativeF b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
PSQ_INLINE NativeMask less(NativeI a, NativeI b) { return _mm512_cmplt_epi32_mask((__m512i)a, (__m512i)b); }
PSQ_INLINE NativeMask less_equal(NativeF a, NativeF b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
PSQ_INLINE NativeF select(NativeMask mask, NativeF a, NativeF b) { return _mm512_mask_blend_ps(mask, b, a); }
PSQ_INLINE NativeU select(NativeMask mask, NativeU a, NativeU b) {
  return (NativeU)_mm512_mask_blend_epi32(mask, (__m512i)b, (__m512i)a);
}
PSQ_INLINE NativeU keep(NativeMask mask, NativeU a) { return (NativeU)_mm512_maskz_mov_epi32(mask, (__m512i)a); }
PSQ_INLINE NativeU drop(NativeMask mask, NativeU a) { return keep(NativeMask(~mask), a); }
PSQ_INLINE NativeI count(NativeI a, NativeMask mask) {
  return (NativeI)_mm512_mask_add_epi32((__m512i)a, mask, (__m512i)a, _mm512_set1_epi32(1));
}
#else
typedef NativeU NativeMask;
PSQ_INLINE NativeMask less(NativeF a, NativeF b) { return (NativeMask)(a < b); }
PSQ_INLINE NativeMask less(NativeI a, NativeI b) { return (NativeMask)(a < b); }
PSQ_INLINE NativeMask less_equal(NativeF a, NativeF b) { return (NativeMask)(a <= b); }
PSQ_INLINE NativeU keep(NativeMask mask, NativeU a) { return mask & a; }
PSQ_INLINE NativeU drop(NativeMask mask, NativeU a) { return ~mask & a; }
// One more where the mask is set.
PSQ_INLINE NativeI count(NativeI a, NativeMask mask) { return a - (NativeI)mask; }
#if defined(__x86_64__) && PSQ_VECTOR_BYTES == 32
#define PSQ_X(name) _mm256_##name
typedef __m256i IntRegister;
#elif defined(__x86_64__)
#define PSQ_X(name) _mm_##name
typedef __m128i IntRegister;
#endif
#ifdef PSQ_X
PSQ_INLINE NativeF select(NativeMask mask, NativeF a, NativeF b) { return PSQ_X(blendv_ps)(b, a, (NativeF)mask); }
#else
PSQ_INLINE NativeF select(NativeMask mask, NativeF a, NativeF b) { return mask ? a : b; }
#endif
PSQ_INLINE NativeU select(NativeMask mask, NativeU a, NativeU b) {
  return (NativeU)select(mask, (NativeF)a, (NativeF)b);
}
#endif

// Either of two by the highest bit of a third.
#if defined(PSQ_X) && PSQ_VECTOR_BYTES < 64
PSQ_INLINE NativeF choose(NativeU by, NativeF one, NativeF zero) { return PSQ_X(blendv_ps)(zero, one, (NativeF)by); }
#else
PSQ_INLINE NativeF choose(NativeU by, NativeF one, NativeF zero) {
  return select(less((NativeI)by, NativeI{}), one, zero);
}
#endif

// maximum and minimum of floats: the second operand where the comparison fails, that is, where either is NaN.
#ifdef PSQ_X
PSQ_INLINE NativeI maximum(NativeI a, NativeI b) { return (NativeI)PSQ_X(max_epi32)((IntRegister)a, (IntRegister)b); }
PSQ_INLINE NativeI minimum(NativeI a, NativeI b) { return (NativeI)PSQ_X(min_epi32)((IntRegister)a, (IntRegister)b); }
PSQ_INLINE NativeF maximum(NativeF a, NativeF b) { return PSQ_X(max_ps)(a, b); }
PSQ_INLINE NativeF minimum(NativeF a, NativeF b) { return PSQ_X(min_ps)(a, b); }
#else
PSQ_INLINE NativeI maximum(NativeI a, NativeI b) { return a > b ? a : b; }
PSQ_INLINE NativeI minimum(NativeI a, NativeI b) { return a < b ? a : b; }
PSQ_INLINE NativeF maximum(NativeF a, NativeF b) { return a > b ? a : b; }
PSQ_INLINE NativeF minimum(NativeF a, NativeF b) { return a < b ? a : b; }
#endif

#define PSQ_PAIR_UNARY(name)                          \
  template <class T>                                  \
  PSQ_INLINE auto name(Pair<T> a)->Pair<decltype(name(a.lo))> { \
    return {name(a.lo), name(a.hi)};                  \
  }
#define PSQ_PAIR_BINARY(name)                                                 \
  template <class T, class S>                                                 \
  PSQ_INLINE auto name(Pair<T> a, Pair<S> b)->Pair<decltype(name(a.lo, b.lo))> { \
    return {name(a.lo, b.lo), name(a.hi, b.hi)};                              \
  }
// A row of the 16-byte levels is a pair of pairs: instantiate the inner one first.
PSQ_PAIR_UNARY(as_i)
PSQ_PAIR_UNARY(as_u)
PSQ_PAIR_UNARY(as_f)
PSQ_PAIR_UNARY(to_f)
PSQ_PAIR_UNARY(to_i)
PSQ_PAIR_BINARY(less)
PSQ_PAIR_BINARY(less_equal)
PSQ_PAIR_BINARY(maximum)
PSQ_PAIR_BINARY(minimum)
PSQ_PAIR_BINARY(keep)
PSQ_PAIR_BINARY(drop)
PSQ_PAIR_BINARY(count)

template <class M, class T>
PSQ_INLINE Pair<T> select(Pair<M> mask, Pair<T> a, Pair<T> b) {
  return {select(mask.lo, a.lo, b.lo), select(mask.hi, a.hi, b.hi)};
}

// Sixteen lanes of one value (x - 0 keeps -0.0).
PSQ_INLINE void fill(NativeF& row, float value) { row = value - NativeF{}; }
PSQ_INLINE void fill(NativeI& row, int32_t value) { row = value - NativeI{}; }
PSQ_INLINE void fill(NativeU& row, uint32_t value) { row = value - NativeU{}; }
template <class T, class S>
PSQ_INLINE void fill(Pair<T>& row, S value) {
  fill(row.lo, value);
  row.hi = row.lo;
}
PSQ_INLINE NativeF each(float value) { return value - NativeF{}; }
PSQ_INLINE NativeI each(int32_t value) { return value - NativeI{}; }
PSQ_INLINE NativeU each(uint32_t value) { return value - NativeU{}; }
PSQ_INLINE F splat(float value) {
  F row;
  fill(row, value);
  return row;
}
PSQ_INLINE I splat(int32_t value) {
  I row;
  fill(row, value);
  return row;
}
PSQ_INLINE U splat(uint32_t value) {
  U row;
  fill(row, value);
  return row;
}

// Rows from and to any address.
PSQ_INLINE void get(NativeF& row, const void* from) { row = *(const LooseF*)from; }
PSQ_INLINE void get(NativeU& row, const void* from) { row = *(const LooseU*)from; }
PSQ_INLINE void put(void* to, NativeF row) { *(LooseF*)to = row; }
PSQ_INLINE void put(void* to, NativeU row) { *(LooseU*)to = row; }
template <class T>
PSQ_INLINE void get(Pair<T>& row, const void* from) {
  get(row.lo, from);
  get(row.hi, (const uint8_t*)from + sizeof(T));
}
template <class T>
PSQ_INLINE void put(void* to, Pair<T> row) {
  put(to, row.lo);
  put((uint8_t*)to + sizeof(T), row.hi);
}
PSQ_INLINE F load(const float* from) {
  F row;
  get(row, from);
  return row;
}
PSQ_INLINE U load_words(const uint8_t* from) {
  U row;
  get(row, from);
  return row;
}
PSQ_INLINE void store(float* to, F row) { put(to, row); }

// bf16: the upper halves of a row, the lower ones zero or lost.
#if defined(PSQ_X) && PSQ_VECTOR_BYTES == 64
PSQ_INLINE void get_halves(NativeU& row, const void* from) {
  row = (NativeU)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)) << 16;
}
PSQ_INLINE void put_halves(void* to, NativeU row) {
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)(row >> 16)));
}
#elif defined(PSQ_X) && PSQ_VECTOR_BYTES == 32
PSQ_INLINE void get_halves(NativeU& row, const void* from) {
  row = (NativeU)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)) << 16;
}
PSQ_INLINE void put_halves(void* to, NativeU row) {
  const __m256i upper = (__m256i)(row >> 16);
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
  _mm_storeu_si128((__m128i*)to, halves);
}
#elif defined(PSQ_X)
PSQ_INLINE void get_halves(NativeU& row, const void* from) {
  row = (NativeU)_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64((const __m128i*)from));
}
PSQ_INLINE void put_halves(void* to, NativeU row) {
  const __m128i upper = (__m128i)(row >> 16);
  _mm_storel_epi64((__m128i*)to, _mm_packus_epi32(upper, upper));
}
#else
PSQ_INLINE void get_halves(NativeU& row, const void* from) {
  row = __builtin_convertvector((NativeH) * (const LooseH*)from, NativeU) << 16;
}
PSQ_INLINE void put_halves(void* to, NativeU row) { *(LooseH*)to = __builtin_convertvector(row >> 16, NativeH); }
#endif
template <class T>
PSQ_INLINE void get_halves(Pair<T>& row, const void* from) {
  get_halves(row.lo, from);
  get_halves(row.hi, (const uint8_t*)from + sizeof(T) / 2);
}
template <class T>
PSQ_INLINE void put_halves(void* to, Pair<T> row) {
  put_halves(to, row.lo);
  put_halves((uint8_t*)to + sizeof(T) / 2, row.hi);
}
PSQ_INLINE F load(const uint16_t* from) {
  U row;
  get_halves(row, from);
  return as_f(row);
}
PSQ_INLINE void store_words(uint8_t* to, U row) { put(to, row); }

// |row|, and the bits of a value.
PSQ_INLINE NativeF absolute(NativeF row) { return as_f(as_u(row) & each(0x7fffffffu)); }
template <class T>
PSQ_INLINE Pair<T> absolute(Pair<T> row) {
  return {absolute(row.lo), absolute(row.hi)};
}
PSQ_INLINE uint32_t bits_of(float value) { return __builtin_bit_cast(uint32_t, value); }
PSQ_INLINE float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }
PSQ_INLINE bool is_finite(float value) { return (bits_of(value) & 0x7f800000u) != 0x7f800000u; }

// Entries 0 to `count` of a small table, by lane; for tables of at most kTableLanes entries.
#if PSQ_VECTOR_BYTES >= 32 && !defined(__clang__)  // clang has no shuffle by a variable
constexpr int kTableLanes = PSQ_VECTOR_BYTES / 4;
PSQ_INLINE NativeF first(NativeF row) { return row; }
PSQ_INLINE NativeF first(Pair<NativeF> row) { return row.lo; }
PSQ_INLINE NativeF look_up(NativeF table, NativeI at) { return __builtin_shuffle(table, at); }
PSQ_INLINE Pair<NativeF> look_up(NativeF table, Pair<NativeI> at) {
  return {look_up(table, at.lo), look_up(table, at.hi)};
}
PSQ_INLINE NativeF lookup(const float* entries, int count, NativeI at) {
  NativeF table = {};
  for (int i = 0; i < count; ++i) table[i] = entries[i];
  return look_up(table, at);
}
#else
constexpr int kTableLanes = 0;
PSQ_INLINE NativeF first(F) { return NativeF{}; }
PSQ_INLINE F look_up(NativeF, I) { return splat(0.0f); }
PSQ_INLINE NativeF lookup(const float*, int, NativeI) { return NativeF{}; }
#endif

// The same for tables of 16 entries on the level whose registers hold four: sixteen lanes' bytes are looked up at once.
#if defined(PSQ_X) && PSQ_VECTOR_BYTES == 16
constexpr bool kByteTables = true;
struct ByteTable {
  __m128i planes[4];  // byte i of all entries

  PSQ_METHOD void set(F entries) {
    const __m128i bytes = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m128i a = _mm_shuffle_epi8((__m128i)entries.lo.lo, bytes), b = _mm_shuffle_epi8((__m128i)entries.lo.hi, bytes);
    const __m128i c = _mm_shuffle_epi8((__m128i)entries.hi.lo, bytes), d = _mm_shuffle_epi8((__m128i)entries.hi.hi, bytes);
    const __m128i low_ab = _mm_unpacklo_epi32(a, b), low_cd = _mm_unpacklo_epi32(c, d);
    const __m128i high_ab = _mm_unpackhi_epi32(a, b), high_cd = _mm_unpackhi_epi32(c, d);
    planes[0] = _mm_unpacklo_epi64(low_ab, low_cd);
    planes[1] = _mm_unpackhi_epi64(low_ab, low_cd);
    planes[2] = _mm_unpacklo_epi64(high_ab, high_cd);
    planes[3] = _mm_unpackhi_epi64(high_ab, high_cd);
  }
  // Of byte j of entry i at 16 j + i.
  PSQ_METHOD void read(const uint8_t* bytes) {
    for (int j = 0; j < 4; ++j) planes[j] = _mm_loadu_si128((const __m128i*)(bytes + 16 * j));
  }
  // Entry at[i], each below 16.
  PSQ_METHOD F value(U at) const {
    const __m128i low = _mm_packus_epi32((__m128i)at.lo.lo, (__m128i)at.lo.hi);
    const __m128i index = _mm_packus_epi16(low, _mm_packus_epi32((__m128i)at.hi.lo, (__m128i)at.hi.hi));
    const __m128i a = _mm_shuffle_epi8(planes[0], index), b = _mm_shuffle_epi8(planes[1], index);
    const __m128i c = _mm_shuffle_epi8(planes[2], index), d = _mm_shuffle_epi8(planes[3], index);
    const __m128i low_ab = _mm_unpacklo_epi8(a, b), low_cd = _mm_unpacklo_epi8(c, d);
    const __m128i high_ab = _mm_unpackhi_epi8(a, b), high_cd = _mm_unpackhi_epi8(c, d);
    return {{(NativeF)_mm_unpacklo_epi16(low_ab, low_cd), (NativeF)_mm_unpackhi_epi16(low_ab, low_cd)},
            {(NativeF)_mm_unpacklo_epi16(high_ab, high_cd), (NativeF)_mm_unpackhi_epi16(high_ab, high_cd)}};
  }
};
#else
constexpr bool kByteTables = false;
struct ByteTable {
  PSQ_METHOD void set(F) {}
  PSQ_METHOD void read(const uint8_t*) {}
  PSQ_METHOD F value(U) const { return splat(0.0f); }
};
#endif

// Lanes to one value by halving: lane i takes lane i + 8, then i + 4, i + 2, i + 1. This order is part of the formats.
PSQ_INLINE float sum(F row) {
  float a[16];
  put(a, row);
  for (int i = 0; i < 8; ++i) a[i] += a[i + 8];
  for (int i = 0; i < 4; ++i) a[i] += a[i + 4];
  return (a[0] + a[2]) + (a[1] + a[3]);
}
// By memory and out of line: inlined, GCC would keep the row there all through the loop that makes it.
PSQ_OUTLINE int32_t largest_of(const int32_t* lanes) {
  int32_t best = lanes[0];
  for (int lane = 1; lane < 16; ++lane) best = lanes[lane] > best ? lanes[lane] : best;
  return best;
}
PSQ_INLINE int32_t maximum(I row) {
  int32_t lanes[16];
  put(lanes, as_u(row));
  return largest_of(lanes);
}

}  // namespace
