// The topk codec: of each block the K largest magnitudes, as their mean and their places. The bits are those of
// psq/kernels/reference_topk.py.
//
// Finding them costs one pass and a little. The pass for the largest magnitude keeps a maximum of each of some disjoint
// parts of the block, 4 K of them: at least K values are no smaller than the K-th largest of these maxima, and few more are.
// The pass that leaves the residual marks them; among them the K largest are found. A bound that suited the block before is
// tried first. Blocks of zeros and of few values, which gradients of embeddings have, take no longer.

namespace {

constexpr size_t kLargestBlock = 8192, kMostKept = 128;
constexpr size_t kMostMaxima = 4 * kMostKept, kMostEntryBytes = kMostKept * 14 / 8;
constexpr size_t kTopkAhead = 2048;       // values from the row at hand to what is fetched
constexpr int32_t kHuge = 0x7b800000;     // 2^120: from here on the sum of kMostKept values may not be finite
constexpr int32_t kLower = 0x00080000;    // from a K-th largest value to the bound that is tried in the next block
constexpr size_t kFew = 64;               // so many are compared with each other
constexpr int32_t kCoarse = 0x00020000;   // how near a bound comes to the best one: 1/64 of it

struct TopkShape {
  size_t block, keep, entry_bytes;
  int entry_bits;
};

PSQ_INLINE TopkShape topk_shape(const PsqFormat& format) {
  const size_t keep = size_t(1) << format.parameter;
  return {format.block, keep, (keep * size_t(format.bits) + 7) / 8, format.bits};
}

// A bit for each lane where the mask is set, lane 0 lowest.
#if PSQ_VECTOR_BYTES == 64
PSQ_INLINE uint32_t lane_bits(NativeMask mask) { return mask; }
#elif PSQ_VECTOR_BYTES == 32
PSQ_INLINE uint32_t lane_bits(NativeMask mask) { return uint32_t(_mm256_movemask_ps((NativeF)mask)); }
#elif defined(__x86_64__)
PSQ_INLINE uint32_t lane_bits(NativeMask mask) { return uint32_t(_mm_movemask_ps((NativeF)mask)); }
#else
PSQ_INLINE uint32_t lane_bits(NativeMask mask) {
  return (mask[0] & 1) | (mask[1] & 2) | (mask[2] & 4) | (mask[3] & 8);
}
#endif
template <class T>
PSQ_INLINE uint32_t lane_bits(Pair<T> mask) {
  return lane_bits(mask.lo) | (lane_bits(mask.hi) << (sizeof(T) / 4));
}

// How many of the numbers, a multiple of 16, are at least `bound` (which is above 0).
PSQ_INLINE size_t count_from(const int32_t* numbers, size_t count, int32_t bound) {
  const I below = splat(bound - 1);
  size_t total = 0;
  for (size_t i = 0; i < count; i += 16)
    total += size_t(__builtin_popcount(lane_bits(less(below, as_i(load_words((const uint8_t*)(numbers + i)))))));
  return total;
}

// A bound >= `low` that at least `keep` numbers reach: the largest there is, or less, by fewer than `coarse`. At least
// `keep` numbers reach `low`, none goes beyond `high`.
PSQ_INLINE int32_t bisect(const int32_t* numbers, size_t count, size_t keep, int32_t low, int32_t high, int32_t coarse) {
  uint32_t least = uint32_t(low), beyond = uint32_t(high) + 1;
  while (beyond - least > uint32_t(coarse)) {
    const uint32_t middle = least + (beyond - least) / 2;
    const size_t reached = count_from(numbers, count, int32_t(middle));
    if (reached >= keep) least = middle;
    if (reached < keep) beyond = middle;
    if (reached == keep) break;
  }
  return int32_t(least);
}

// ---- the K largest ---------------------------------------------------------------------------------------------

// What remembers what was not said: nothing, or floats.
struct Nothing {};
PSQ_INLINE F sum_with_residual(const float* values, const Nothing*) { return load(values); }
template <class R>
PSQ_INLINE F sum_with_residual(const float* values, const R* residual) {
  return load(values) + load(residual);
}
PSQ_INLINE void leave(Nothing*, F) {}
PSQ_INLINE void leave(float* residual, F rest) { store(residual, rest); }
PSQ_INLINE void leave_one(Nothing*, float) {}
PSQ_INLINE void leave_one(float* residual, float rest) { *residual = rest; }
// Value + residual, of which that may already be there in the residual's place.
PSQ_INLINE float one_with_residual(float value, const Nothing*, bool) { return value; }
PSQ_INLINE float one_with_residual(float value, const float* residual, bool there) {
  return there ? *residual : value + *residual;
}
template <class R>
constexpr bool kRemembers = sizeof(R) > 1;

// Some values of a block, by ascending place.
constexpr uint16_t kNegative = 0x8000;
struct Chosen {
  size_t count;
  uint16_t places[kLargestBlock];  // and kNegative
  int32_t sizes[kLargestBlock + 16];  // as bits

  PSQ_METHOD size_t place(size_t i) const { return places[i] & (kNegative - 1u); }
  PSQ_METHOD void add(size_t place, float c) {
    places[count] = uint16_t(place | (bits_of(c) >> 31 ? kNegative : 0));
    sizes[count++] = int32_t(bits_of(c) & ~kSignBit);
  }
};

// The maxima of `count` disjoint parts of a whole block; returns the largest.
template <class R>
PSQ_INLINE int32_t part_maxima(const float* values, const R* residual, size_t block, size_t count, int32_t* maxima) {
  const size_t part = block / count * 16;  // values in a row of parts
  I largest = splat(int32_t(0));
  for (size_t from = 0; from < block; from += part, maxima += 16) {
    I most = splat(int32_t(0));
    for (size_t i = from; i < from + part; i += 16)
      most = maximum(most, as_i(absolute(sum_with_residual(values + i, residual + (kRemembers<R> ? i : 0)))));
    store_words((uint8_t*)maxima, as_u(most));
    largest = maximum(largest, most);
  }
  return maximum(largest);
}

// Marks the values from `bound` (above 0) on; leaves the sums of values and residual in the residual where `kStore`.
template <bool kStore, class R>
PSQ_INLINE void mark(const float* values, R* residual, size_t block, int32_t bound, uint64_t* found) {
  const I below = splat(bound - 1);
  for (size_t i = 0; i < block; ++found) {
    uint64_t here = 0;
    for (int row = 0; row < 4; ++row, i += 16) {
      R* e = residual + (kRemembers<R> ? i : 0);
      __builtin_prefetch(values + i + kTopkAhead);
      if (kRemembers<R>) __builtin_prefetch(e + kTopkAhead, 1);
      const F c = sum_with_residual(values + i, e);
      if (kStore) leave(e, c);
      here |= uint64_t(lane_bits(less(below, as_i(absolute(c))))) << (16 * row);
    }
    *found = here;
  }
}

template <class R>
PSQ_INLINE void collect(const float* values, const R* residual, size_t block, const uint64_t* found, bool stored,
                        Chosen& chosen) {
  chosen.count = 0;
  for (size_t from = 0; from < block; from += 64) {
    for (uint64_t left = *found++; left != 0; left &= left - 1) {
      const size_t place = from + size_t(__builtin_ctzll(left));
      chosen.add(place, one_with_residual(values[place], residual + (kRemembers<R> ? place : 0), stored));
    }
  }
}

// The `keep`-th largest of some sizes, zeros behind them; at least `keep` are no smaller than `low`, none is above `high`.
PSQ_INLINE int32_t least_kept(const int32_t* sizes, size_t count, size_t padded, size_t keep, int32_t low, int32_t high) {
  if (count > kFew) return bisect(sizes, padded, keep, low, high, 1);
  int32_t least = high;
  for (size_t i = 0; i < count; ++i) {
    const bool kept = count_from(sizes, padded, sizes[i] + 1) < keep;
    least = kept && sizes[i] < least ? sizes[i] : least;
  }
  return least;
}

// Keeps the `keep` largest of more than so many, the first of those that are equal.
PSQ_INLINE void thin_out(Chosen& chosen, size_t keep, int32_t low, int32_t high) {
  const size_t padded = (chosen.count + 15) & ~size_t(15);
  for (size_t i = chosen.count; i < padded; ++i) chosen.sizes[i] = 0;
  const int32_t least = least_kept(chosen.sizes, chosen.count, padded, keep, low, high);
  size_t equal = keep - count_from(chosen.sizes, padded, least + 1), count = 0;
  for (size_t i = 0; count < keep; ++i) {
    const int32_t size = chosen.sizes[i];
    const bool taken = (size > least) | ((size == least) & (equal > 0));
    equal -= taken & (size == least);
    chosen.places[count] = chosen.places[i];
    chosen.sizes[count] = size;
    count += taken;
  }
  chosen.count = keep;
}

// Where a block has fewer than `keep` values that are not zero, and all of them are chosen: the first zeros, too.
template <class R>
PSQ_INLINE void fill_up(Chosen& chosen, size_t keep, const float* values, const R* residual, bool stored) {
  uint16_t others[kMostKept];
  const size_t other_count = chosen.count;
  for (size_t i = 0; i < other_count; ++i) others[i] = uint16_t(chosen.place(i));
  size_t zeros = keep - other_count, from = 0;
  chosen.count = 0;
  for (size_t place = 0; chosen.count < keep; ++place) {
    const bool other = from < other_count && others[from] == place;
    if (!other && zeros == 0) continue;
    other ? ++from : --zeros;
    chosen.add(place, one_with_residual(values[place], residual + (kRemembers<R> ? place : 0), stored));
  }
}

// ---- blocks ----------------------------------------------------------------------------------------------------

PSQ_INLINE float mean_size(const Chosen& chosen) {
  float total = 0.0f;
  for (size_t i = 0; i < chosen.count; ++i) total += float_of(uint32_t(chosen.sizes[i]));
  return total / float(chosen.count);
}

// Entries as one stream of bits; what is left of `bytes` is 0.
PSQ_INLINE void put_entries(const Chosen& chosen, int entry_bits, uint8_t* entries, size_t bytes) {
  uint8_t stream[kMostEntryBytes + 8] = {};  // each entry is written with zeros behind it
  uint8_t* to = stream;
  uint64_t last = 0;
  int held = 0;
  for (size_t i = 0; i < chosen.count; ++i) {
    const uint64_t sign = chosen.places[i] & kNegative ? 1 : 0;
    last |= (uint64_t(chosen.place(i)) | sign << (entry_bits - 1)) << held;
    __builtin_memcpy(to, &last, 8);
    held += entry_bits;
    to += held >> 3;
    last >>= held & ~7;
    held &= 7;
  }
  __builtin_memcpy(entries, stream, bytes);
}

template <class R>
PSQ_INLINE void leave_chosen(const Chosen& chosen, float scale, R* residual) {
  for (size_t i = 0; kRemembers<R> && i < chosen.count; ++i) {
    const uint32_t sign = chosen.places[i] & kNegative ? kSignBit : 0;
    leave_one(residual + chosen.place(i), float_of(uint32_t(chosen.sizes[i]) | sign) - float_of(bits_of(scale) | sign));
  }
}

// A bound for the next block: somewhat below the least of those that were chosen.
PSQ_INLINE int32_t next_guess(const Chosen& chosen) {
  int32_t least = chosen.sizes[0];
  for (size_t i = 1; i < chosen.count; ++i) least = chosen.sizes[i] < least ? chosen.sizes[i] : least;
  return least > kLower ? least - kLower : 0;
}

// Encodes a whole block, of which `keep` values are said; returns its scale. `guess`: a bound to try first, renewed.
template <class R>
PSQ_OUTLINE float topk_block(const float* values, R* residual, const TopkShape& shape, size_t keep, uint8_t* entries,
                             int32_t& guess) {
  int32_t maxima[kMostMaxima];
  Chosen chosen;
  const size_t parts = at_most(4 * shape.keep < 16 ? 16 : 4 * shape.keep, shape.block);
  const int32_t largest = part_maxima(values, residual, shape.block, parts, maxima);
  __builtin_memset(entries, 0, shape.entry_bytes);
  if (largest >= int32_t(kInfinity)) return float_of(kNaN);
  const size_t reached = guess > 0 ? count_from(maxima, parts, guess) : 0;
  int32_t bound = guess;
  if (reached < keep || reached > 2 * keep) bound = bisect(maxima, parts, keep, 0, largest, kCoarse);
  if (bound == 0) bound = 1;  // zeros come last
  const bool at_once = largest < kHuge;  // what was there is not needed any more
  uint64_t found[kLargestBlock / 64];
  at_once ? mark<true>(values, residual, shape.block, bound, found)
          : mark<false>(values, residual, shape.block, bound, found);
  collect(values, residual, shape.block, found, at_once, chosen);
  if (chosen.count > keep) thin_out(chosen, keep, bound, largest);
  if (chosen.count < keep) fill_up(chosen, keep, values, residual, at_once);
  const float mean = mean_size(chosen);
  if (!is_finite(mean)) return float_of(kNaN);
  for (size_t i = 0; !at_once && kRemembers<R> && i < shape.block; i += 16)
    leave(residual + i, sum_with_residual(values + i, residual + i));
  const float scale = mean < kTiny ? 0.0f : mean;
  put_entries(chosen, shape.entry_bits, entries, shape.entry_bytes);
  leave_chosen(chosen, scale, residual);
  guess = next_guess(chosen);
  return scale;
}

// The last block, with zeros behind its values: places that come last among equals.
template <class R>
PSQ_OUTLINE float topk_short_block(const float* values, R* residual, size_t numel, const TopkShape& shape,
                                   uint8_t* entries) {
  float x[kLargestBlock] = {};
  R e[kRemembers<R> ? kLargestBlock : 1] = {};
  __builtin_memcpy(x, values, numel * sizeof(float));
  if (kRemembers<R>) __builtin_memcpy(e, residual, numel * sizeof(R));
  int32_t guess = 0;
  const float scale = topk_block(x, e, shape, at_most(shape.keep, numel), entries, guess);
  if (kRemembers<R>) __builtin_memcpy(residual, e, numel * sizeof(R));
  return scale;
}

// ---- segments --------------------------------------------------------------------------------------------------

template <class R>
PSQ_OUTLINE void topk_encode_with(const PsqEncode& a) {
  const TopkShape shape = topk_shape(a.format);
  uint8_t* entries = a.words;
  Memory memory(a.residual, a.half);
  int32_t guess = 0;
  for (size_t from = 0, block = 0; from < a.numel; from += shape.block, ++block, entries += shape.entry_bytes) {
    const size_t count = at_most(shape.block, a.numel - from);
    rescale(a, from, count);
    R* e = (R*)memory.open(from, count);
    const float* x = a.values + from;
    const float scale = count < shape.block ? topk_short_block(x, e, count, shape, entries)
                                            : topk_block(x, e, shape, shape.keep, entries, guess);
    put_scale(a.scales, block, scale);
    close_span(a, memory, from, count);
  }
}

PSQ_OUTLINE void topk_encode(const PsqEncode& a) {
  a.residual == nullptr ? topk_encode_with<Nothing>(a) : topk_encode_with<float>(a);
}

// The entries of a block, one after another. Reads no byte beyond them.
struct Entries {
  const uint8_t* from;
  int bits;
  uint64_t stream;
  int held;

  PSQ_METHOD uint32_t next() {
    for (; held < bits; held += 8) stream |= uint64_t(*from++) << held;
    const uint32_t entry = uint32_t(stream) & ((1u << bits) - 1);
    stream >>= bits;
    held -= bits;
    return entry;
  }
};

PSQ_OUTLINE void topk_decode(const PsqDecode& a) {
  const TopkShape shape = topk_shape(a.format);
  const uint32_t mask = uint32_t(shape.block) - 1;
  if (!a.add) __builtin_memset(a.out, 0, a.numel * sizeof(float));
  for (size_t from = 0, block = 0; from < a.numel; from += shape.block, ++block) {
    const size_t count = at_most(shape.block, a.numel - from), named = at_most(shape.keep, count);
    uint32_t scale;
    __builtin_memcpy(&scale, a.scales + 4 * block, 4);
    Entries entries = {a.words + block * shape.entry_bytes, shape.entry_bits, 0, 0};
    size_t first = 0;  // place that may be named next
    for (size_t i = 0; i < named; ++i) {
      const uint32_t entry = entries.next(), place = entry & mask;
      if (place < first || place >= count) continue;
      const float value = float_of(scale ^ (entry > mask ? kSignBit : 0));
      float& out = a.out[from + place];
      out = a.add ? out + value : value;
      first = place + 1;
    }
  }
}

// Whether every entry names a value of its block, each above the one before.
PSQ_OUTLINE bool topk_ascends(const uint8_t* words, size_t numel, const PsqFormat& format) {
  const TopkShape shape = topk_shape(format);
  const uint32_t mask = uint32_t(shape.block) - 1;
  for (size_t from = 0; from < numel; from += shape.block, words += shape.entry_bytes) {
    const size_t count = at_most(shape.block, numel - from), named = at_most(shape.keep, count);
    Entries entries = {words, shape.entry_bits, 0, 0};
    size_t first = 0;
    for (size_t i = 0; i < named; ++i) {
      const size_t place = entries.next() & mask;
      if (place < first || place >= count) return false;
      first = place + 1;
    }
  }
  return true;
}

// ---- where things lie ---------------------------------------------------------------------------------------------

// A payload from value `from` of its segment on, a multiple of the block and of 512 (codec.h).
PSQ_INLINE size_t scale_offset(const PsqFormat& format, size_t from) {
  return format.block == 0 ? 0 : from / format.block * 4;
}
PSQ_INLINE size_t word_offset(const PsqFormat& format, size_t from) {
  if (format.family == PSQ_TOPK) return from / format.block * topk_shape(format).entry_bytes;
  return from / 8 * size_t(format.bits);
}

}  // namespace
