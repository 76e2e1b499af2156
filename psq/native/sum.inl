// The sum of payloads: a register's lanes of a few rows at a time. Each total stays in a register while one payload after
// another is added to it, in their order, so the bits are those of decoding and adding payload by payload.
//
// Of each payload this needs the words, and for each block what its codes mean: a table in a register where one holds all
// values (or all sizes) of a code, else the quantizer. Tables of scale 1 are made once, and multiplied: that is the
// product that a quantizer makes, sign and all.
//
// Every payload is a stream of its own through memory. A few are read at a time (kCrowd), long pieces of each (server.inl),
// and what comes next is fetched, the scales too: they share a line of the cache with nothing that was read before.
// (Measured at 32 payloads of 4 bits: all at a time cost 2.2 times as much, 8 instead of 4 up to 1.3, no scales 1.2.)

namespace {

constexpr size_t kCrowd = 4;
constexpr int kTogether = 8;  // rows: half of the registers, or a quarter

PSQ_INLINE void fetch(const void* from, size_t bytes) {
  for (size_t at = 0; at < bytes; at += 64) __builtin_prefetch((const uint8_t*)from + at);
}

// ---- what the codes of a block mean ----------------------------------------------------------------------------

// value(word, i): code i of the word, counted from its lowest bit.
template <class Q, Reading = kReading<Q>>
struct Term {
  Q quantizer;
  PSQ_METHOD void set(NativeF, float scale, int32_t parameter) { quantizer.restore(scale, parameter); }
  PSQ_METHOD NativeF value(NativeU word, int i) const { return valued(quantizer, word << (32 - (i + 1) * Q::kBits)); }
};
template <class Q>
struct Term<Q, kTable> {
  NativeF table;
  PSQ_METHOD void set(NativeF unit, float scale, int32_t) { table = unit * each(scale); }
  PSQ_METHOD NativeF value(NativeU word, int i) const { return look_up(table, as_i(word >> (i * Q::kBits))); }
};
template <class Q>
struct Term<Q, kSizeTable> : Term<Q, kTable> {
  PSQ_METHOD NativeF value(NativeU word, int i) const {
    const NativeU sign = (word << (32 - (i + 1) * Q::kBits)) & each(kSignBit);
    return as_f(as_u(Term<Q, kTable>::value(word, i)) ^ sign);
  }
};

// The table of the scale 1.
template <class Q>
PSQ_INLINE NativeF unit_table(int32_t parameter) {
  if constexpr (kReading<Q> == kArithmetic) {
    return NativeF{};
  } else {
    Q q = {};
    q.restore(1.0f, parameter);
    Reader<Q> reader;
    reader.set(q);
    return reader.table;
  }
}

// ---- rows ------------------------------------------------------------------------------------------------------

template <class Q>
struct Crowd {
  const PsqPayload* payloads;
  size_t count;
  bool add;                // to what `out` holds
  const PsqPayload* next;  // what is summed after these, and from which value on
  size_t next_count, next_from;
  int other;  // 1 where the second half of a group has scales of its own, else 0
  Term<Q> terms[2][kCrowd];  // of each half of a group
};

// `word_at`: where in the payloads the rows' word lies, in bytes; `shift`: the bit where the first code begins there.
template <class Q, int kRows, bool kStraddles>
PSQ_INLINE void sum_rows(const Crowd<Q>& crowd, int part, size_t word_at, int shift, float* out) {
  PSQ_ROLLED
  for (int lane = 0; lane < 64; lane += PSQ_VECTOR_BYTES, out += PSQ_VECTOR_BYTES / 4) {
    NativeF totals[kRows];
    for (int i = 0; i < kRows; ++i) {
      totals[i] = each(-0.0f);  // the one number that changes nothing it is added to
      if (crowd.add) get(totals[i], out + 16 * i);
    }
    for (size_t p = 0; p < crowd.count; ++p) {
      const uint8_t* words = crowd.payloads[p].words + word_at + lane;
      const Term<Q>& term = crowd.terms[part][p];
      NativeU word, above;
      get(word, words);
      word = word >> shift;
      if constexpr (kStraddles) {
        get(above, words + 64);
        word = word | (above << (32 - shift));
      }
      for (int i = 0; i < kRows; ++i) totals[i] = totals[i] + term.value(word, i);
    }
    for (int i = 0; i < kRows; ++i) put(out + 16 * i, totals[i]);
  }
}

// The 32 rows of a group, whose second half may have other scales than the first.
template <class Q>
PSQ_OUTLINE void sum_group(const Crowd<Q>& crowd, size_t word_at, float* out) {
  const int other = crowd.other;
  if constexpr (Q::kBits == 3) {
    sum_rows<Q, 5, false>(crowd, 0, word_at, 0, out);
    sum_rows<Q, 5, false>(crowd, 0, word_at, 15, out + 5 * 16);
    sum_rows<Q, 1, true>(crowd, 0, word_at, 30, out + 10 * 16);
    sum_rows<Q, 5, false>(crowd, 0, word_at + 64, 1, out + 11 * 16);
    sum_rows<Q, 5, false>(crowd, other, word_at + 64, 16, out + 16 * 16);
    sum_rows<Q, 1, true>(crowd, other, word_at + 64, 31, out + 21 * 16);
    sum_rows<Q, 5, false>(crowd, other, word_at + 128, 2, out + 22 * 16);
    sum_rows<Q, 5, false>(crowd, other, word_at + 128, 17, out + 27 * 16);
  } else {
    constexpr int kInWord = 32 / Q::kBits, kRows = kInWord < kTogether ? kInWord : kTogether;
    PSQ_ROLLED
    for (int row = 0; row < 32; row += kRows)
      sum_rows<Q, kRows, false>(crowd, other & (row >> 4), word_at + size_t(row / kInWord) * 64,
                                row % kInWord * Q::kBits, out + 16 * row);
  }
}

// ---- segments --------------------------------------------------------------------------------------------------

// Of the group at value `at`; the segment, or what is wanted of it, ends at `end`.
template <class Q>
PSQ_INLINE void set_terms(Crowd<Q>& crowd, NativeF unit, const PsqFormat& format, size_t at, size_t end) {
  for (size_t p = 0; p < crowd.count; ++p) {
    for (int part = 0; part <= crowd.other; ++part) {
      float scale = 0.0f;
      const size_t value = at + part * (kGroup / 2);
      if (Q::kStatistic != kNone && value < end)
        __builtin_memcpy(&scale, crowd.payloads[p].scales + scale_offset(format, value), 4);
      crowd.terms[part][p].set(unit, scale, format.parameter);
    }
  }
}

template <class Q>
PSQ_INLINE void fetch_next(const Crowd<Q>& crowd, const PsqFormat& format, size_t done, size_t numel) {
  const size_t at = crowd.next_from + done;
  const size_t scales = done == 0 && format.block > 0 ? numel / format.block * 4 : 0;
  for (size_t p = 0; p < crowd.next_count; ++p) {
    fetch(crowd.next[p].words + word_offset(format, at), kGroupBytes<Q>);
    fetch(crowd.next[p].scales + scale_offset(format, at), scales);
  }
}

// out = the sum of the crowd's payloads from value `from` to `end` of the segment, or is added to.
template <class Q>
PSQ_OUTLINE void sum_crowd(Crowd<Q>& crowd, const PsqFormat& format, size_t from, size_t end, float* out) {
  const NativeF unit = unit_table<Q>(format.parameter);
  const size_t span = crowd.other == 1 ? kGroup : format.block == 0 ? end - from : format.block;
  for (size_t at = from; at < end; at += kGroup, out += kGroup) {
    if ((at - from) % span == 0) set_terms<Q>(crowd, unit, format, at, end);
    fetch_next(crowd, format, at - from, end - from);
    if (end - at >= kGroup) {
      sum_group<Q>(crowd, word_offset(format, at), out);
      continue;
    }
    float last[kGroup] = {};
    const size_t bytes = (end - at) * sizeof(float);
    if (crowd.add) __builtin_memcpy(last, out, bytes);
    sum_group<Q>(crowd, word_offset(format, at), last);
    __builtin_memcpy(out, last, bytes);
  }
}

template <class Q>
PSQ_OUTLINE void sum_with(const PsqServerStep& s, size_t from, size_t numel, float* out) {
  Crowd<Q> crowd;
  crowd.other = s.uplink.block == kGroup / 2;
  for (size_t first = 0; first < s.payload_count; first += kCrowd) {
    const bool last = first + kCrowd >= s.payload_count;
    const size_t next = last ? 0 : first + kCrowd;
    crowd.payloads = s.payloads + first;
    crowd.count = at_most(kCrowd, s.payload_count - first);
    crowd.add = first > 0;
    crowd.next = s.payloads + next;
    crowd.next_count = at_most(kCrowd, s.payload_count - next);
    crowd.next_from = last ? from + numel : from;
    sum_crowd<Q>(crowd, s.uplink, from, from + numel, out);
  }
}

// Where a format has no words, or its codes lie across them in many ways: payload by payload.
PSQ_INLINE void sum_one_by_one(const PsqServerStep& s, size_t from, size_t numel, float* out) {
  const size_t scale_at = scale_offset(s.uplink, from), word_at = word_offset(s.uplink, from);
  for (size_t p = 0; p < s.payload_count; ++p)
    codec_decode({s.payloads[p].scales + scale_at, s.payloads[p].words + word_at, out, numel, s.uplink, p > 0});
}

// out = the sum of what the payloads say of values [from, from + numel).
PSQ_INLINE void payload_sum(const PsqServerStep& s, size_t from, size_t numel, float* out) {
  const int32_t family = s.uplink.family == PSQ_STOCHASTIC ? int32_t(PSQ_UNIFORM) : s.uplink.family;
  switch (PSQ_KEY(family, s.uplink.bits)) {
    case PSQ_KEY(PSQ_SIGN, 1):
      return sum_with<Sign<kMeanAbs>>(s, from, numel, out);
#define X(family, bits, Q)    \
  case PSQ_KEY(family, bits): \
    return sum_with<Q>(s, from, numel, out);
      PSQ_EACH_QUANTIZER(X)
#undef X
    default:
      return sum_one_by_one(s, from, numel, out);
  }
}

}  // namespace
