// Groups and words: rows of codes to words and back, each row as soon as it is quantized.
#include "scale.inl"

namespace {

// Rows of a group, or half of one, in order: quantizes them, leaves the rest in the residual. This is the pass that runs
// in L1, and memory must not idle meanwhile: it fetches what comes next.
template <class Q, int kParts, Feedback kFeedback>
struct Rows {
  const Q* parts;  // of each half of a group, or one
  const float* values;
  float* residual;
  U index;
  size_t ahead;
  int row;

  PSQ_METHOD U next() {
    __builtin_prefetch(values + ahead);
    if (kFeedback == kKeep) __builtin_prefetch(residual + PSQ_AHEAD, 1);
    const F c = compensated<kFeedback>(values, residual);
    U top;
    const F d = quantized(parts[kParts == 1 ? 0 : row >> 4], c, index, top);
    if constexpr (kFeedback == kKeep) leave(c, c - d);
    values += 16;
    residual = further<kFeedback>(residual, 16);
    index = index + splat(16u);
    ++row;
    return top;
  }
  PSQ_METHOD void leave(F c, F rest) const {
    if constexpr (Q::kStatistic == kNone)  // values are by themselves: only where one is finite
      rest = select(less(as_i(absolute(c)), splat(int32_t(kInfinity))), rest, load(residual));
    store(residual, rest);
  }
};

// Whether codes lie across words: all but the last of a unit then end within a code.
template <class Q>
constexpr bool kStraddles = 32 % Q::kBits != 0;

// Lane l of word w holds bits [32 w, 32 w + 32) of the stream of the codes of rows 0..31, each least bit first.
// The rows of a group, or (kWords) as many as fill so many words, where a word holds whole codes.
template <class Q, int kWords = Q::kBits, class R>
PSQ_INLINE void pack_group(R& rows, uint8_t* words) {
  if constexpr (kStraddles<Q>) {
    U carried = splat(0u);  // the upper `held` bits of a code that began in the word before
    int held = 0;
    PSQ_ROLLED
    for (int w = 0; w < kWords; ++w) {
      const int codes = (32 - held) / Q::kBits, left = 32 - held - codes * Q::kBits;
      U word = splat(0u);
      PSQ_ROLLED
      for (int i = 0; i < codes; ++i) word = (word >> Q::kBits) | rows.next();
      word = (word >> left) | carried;
      if (w + 1 < kWords) {
        const U straddler = rows.next();
        word = word | (straddler << (Q::kBits - left));
        held = Q::kBits - left;
        carried = straddler >> (32 - held);
      }
      store_words(words + 64 * w, word);
    }
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

enum Reading { kArithmetic, kTable, kSizeTable, kByteTable };
template <class Q>
constexpr Reading kReading = Q::kBits <= 4 && (1 << Q::kBits) <= kTableLanes             ? kTable
                             : kIsSized<Q> && (1 << (Q::kBits - 1)) <= kTableLanes ? kSizeTable
                                                                                   : kArithmetic;

// Of a row at once, too.
template <class Q>
constexpr Reading kRowReading = kByteTables && kIsSized<Q> && Q::kBits > 1 ? kByteTable : kReading<Q>;

template <class Q, Reading = kRowReading<Q>>
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

template <class Q>
struct Reader<Q, kByteTable> {
  ByteTable table;
  PSQ_METHOD void set(const Q& q) { table.set(valued(q, lanes() << (32 - Q::kBits))); }
  PSQ_METHOD F value(U word, int left) const {
    return table.value((word >> (32 - Q::kBits - left)) & splat((1u << Q::kBits) - 1));
  }
};

// Where decoded rows go, in order.
template <class Q, int kParts, bool kAdd>
struct Sink {
  const Reader<Q>* parts;
  float* out;
  size_t ahead;
  int row;

  // The code's highest bit is bit 31 - left of the word.
  PSQ_METHOD void put_next(U word, int left) {
    __builtin_prefetch(out + ahead, 1);
    const F d = parts[kParts == 1 ? 0 : row >> 4].value(word, left);
    store(out, kAdd ? load(out) + d : d);
    out += 16;
    ++row;
  }
};

template <class Q, int kWords = Q::kBits, class S>
PSQ_INLINE void unpack_group(S& sink, const uint8_t* words) {
  if constexpr (kStraddles<Q>) {
    int held = 0;  // bits of the word that belong to a code that began in the one before
    PSQ_ROLLED
    for (int w = 0; w < kWords; ++w) {
      const U word = load_words(words + 64 * w);
      int left = 32 - held - Q::kBits;
      PSQ_ROLLED
      for (; left >= 0; left -= Q::kBits) sink.put_next(word, left);
      if (w + 1 == kWords) break;
      held = -left;
      sink.put_next((load_words(words + 64 * (w + 1)) << (32 - held)) | (word >> held), 0);
    }
  } else {
    PSQ_ROLLED
    for (int w = 0; w < kWords; ++w) {
      const U word = load_words(words + 64 * w);
      PSQ_ROLLED
      for (int i = 1; i <= 32 / Q::kBits; ++i) sink.put_next(word, 32 - Q::kBits * i);
    }
  }
}

}  // namespace
