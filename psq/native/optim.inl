// Optimizer kernels over vec.inl's 16-lane rows. The operations and their order are those of reference_optim.py.

namespace {

// IEEE square roots; the loop over a register's lanes compiles to one instruction.
PSQ_INLINE NativeF square_root(NativeF row) {
  NativeF root;
  for (size_t lane = 0; lane < PSQ_VECTOR_BYTES / sizeof(float); ++lane) root[lane] = __builtin_sqrtf(row[lane]);
  return root;
}
template <class T>
PSQ_INLINE Pair<T> square_root(Pair<T> row) {
  return {square_root(row.lo), square_root(row.hi)};
}

enum AdamMode { kPlain, kAmsgrad, kCorrected };
enum AdamDecay { kNoDecay, kL2, kDecoupled };

struct AdamRow {
  F g, m, v, third, x;
};

PSQ_INLINE F adam_denominator(AdamRow& row, AdamMode mode, const PsqAdam& a) {
  const PsqAdamCoefficients& c = a.coefficients;
  if (mode == kCorrected) {
    const PsqCorrectionCoefficients& k = a.correction;
    const F vhat = row.v * splat(k.v_scale);
    F squared_mean = vhat;
    if (k.update_s != 0.0f) {
      const F mhat = row.m * splat(k.m_scale);
      const F estimate = (mhat * mhat - splat(k.noise_ratio) * vhat) * splat(k.signal_scale);
      row.third = row.third * splat(c.theta) + splat(c.theta_rest) * estimate;
      squared_mean = minimum(maximum(row.third * splat(k.s_scale), splat(0.0f)), vhat);
    }
    const F second = vhat * splat(k.own_share) + squared_mean * splat(k.mean_share);
    return square_root(second + splat(c.eps_inside)) + splat(c.eps_outside);
  }
  if (mode == kAmsgrad) row.third = maximum(row.third, row.v);
  const F second = mode == kAmsgrad ? row.third : row.v;
  return square_root(second + splat(c.eps_inside)) / splat(c.root) + splat(c.eps_outside);
}

// One step of 16 values: g, m, v, third, x in; m, v, third out; returns u.
PSQ_INLINE F adam_row(AdamRow& row, AdamMode mode, AdamDecay decay, bool from_m, const PsqAdam& a) {
  const PsqAdamCoefficients& c = a.coefficients;
  if (decay == kL2) row.g = row.g + splat(c.l2) * row.x;
  const F base = from_m ? row.m : row.g;
  row.m = base + splat(c.m_weight) * (row.g - row.m);
  row.v = row.v * splat(c.theta) + (splat(c.theta_rest) * row.g) * row.g;
  F denominator = adam_denominator(row, mode, a);
  denominator = select(less_equal(denominator, splat(0.0f)), splat(__builtin_inff()), denominator);
  F u = (splat(c.step_size) * row.m) / denominator;
  if (decay == kDecoupled) u = u + splat(c.decay) * row.x;
  return u;
}

PSQ_INLINE F negative(F row) { return as_f(as_u(row) ^ splat(0x80000000u)); }

// Everything that is decided once for a whole vector: constants in the loops below, where a choice between rows would
// send them through memory.
struct AdamKind {
  AdamMode mode;
  AdamDecay decay;
  PsqResult result;
  bool from_m;
};

PSQ_INLINE void adam_at(size_t i, AdamKind kind, const PsqAdam& a) {
  AdamRow row = {load(a.g + i) * splat(a.g_scale), load(a.m + i), load(a.v + i), F{}, F{}};
  if (kind.mode != kPlain) row.third = load(a.third + i);
  if (kind.decay != kNoDecay || kind.result == PSQ_SUBTRACT) row.x = load(a.x + i);
  const F u = adam_row(row, kind.mode, kind.decay, kind.from_m, a);
  store(a.m + i, row.m);
  store(a.v + i, row.v);
  if (kind.mode != kPlain) store(a.third + i, row.third);
  if (kind.result == PSQ_WRITE) store(a.out + i, u);
  if (kind.result == PSQ_NEGATE) store(a.out + i, negative(u));
  if (kind.result == PSQ_SUBTRACT) store(a.x + i, row.x - u);
}

// For a caller who does other things before it comes to those values.
PSQ_INLINE void adam_fetch(size_t i, AdamKind kind, const PsqAdam& a) {
  __builtin_prefetch(a.m + i, 1);
  __builtin_prefetch(a.v + i, 1);
  if (kind.mode != kPlain) __builtin_prefetch(a.third + i, 1);
}

// The last values, fewer than a row: the same row with zeros behind them, which divide into nothing but zeros.
PSQ_INLINE void adam_tail(size_t start, AdamKind kind, const PsqAdam& a) {
  float g[16] = {}, m[16] = {}, v[16] = {}, third[16] = {}, x[16] = {}, out[16];
  const size_t bytes = (a.numel - start) * sizeof(float);
  PsqAdam tail = {g, m, v, third, x, out, 16, a.coefficients, a.correction, a.result, a.g_scale, 0};
  __builtin_memcpy(g, a.g + start, bytes);
  __builtin_memcpy(m, a.m + start, bytes);
  __builtin_memcpy(v, a.v + start, bytes);
  if (kind.mode != kPlain) __builtin_memcpy(third, a.third + start, bytes);
  if (kind.decay != kNoDecay || kind.result == PSQ_SUBTRACT) __builtin_memcpy(x, a.x + start, bytes);
  adam_at(0, kind, tail);
  __builtin_memcpy(a.m + start, m, bytes);
  __builtin_memcpy(a.v + start, v, bytes);
  if (kind.mode != kPlain) __builtin_memcpy(a.third + start, third, bytes);
  if (kind.result == PSQ_SUBTRACT)
    __builtin_memcpy(a.x + start, x, bytes);
  else
    __builtin_memcpy(a.out + start, out, bytes);
}

PSQ_INLINE void adam_loop(AdamKind kind, const PsqAdam& a) {
  const size_t rows_end = a.numel / 16 * 16;
  for (size_t i = 0; i < rows_end; i += 16) {
    if (kind.result != PSQ_WRITE) adam_fetch(i + a.ahead, kind, a);
    adam_at(i, kind, a);
  }
  if (rows_end < a.numel) adam_tail(rows_end, kind, a);
}

template <AdamMode mode, AdamDecay decay, PsqResult result>
void adam_of(const PsqAdam& arguments) {
  const PsqAdam a = arguments;  // a local copy: the stores below cannot change it
  if (a.coefficients.m_weight > 0.0f)
    adam_loop({mode, decay, result, true}, a);
  else
    adam_loop({mode, decay, result, false}, a);
}

template <AdamMode mode, PsqResult result>
void adam_with_decay(const PsqAdam& a) {
  if (a.x != nullptr && a.coefficients.l2 != 0.0f) return adam_of<mode, kL2, result>(a);
  if (a.x != nullptr && a.coefficients.decay != 0.0f) return adam_of<mode, kDecoupled, result>(a);
  adam_of<mode, kNoDecay, result>(a);
}

template <AdamMode mode>
void adam_with_result(const PsqAdam& a) {
  if (a.result == PSQ_NEGATE) return adam_with_decay<mode, PSQ_NEGATE>(a);
  if (a.result == PSQ_SUBTRACT) return adam_with_decay<mode, PSQ_SUBTRACT>(a);
  adam_with_decay<mode, PSQ_WRITE>(a);
}

void adam(const PsqAdam& a) { a.third == nullptr ? adam_with_result<kPlain>(a) : adam_with_result<kAmsgrad>(a); }
void adam_corrected(const PsqAdam& a) { adam_with_decay<kCorrected, PSQ_WRITE>(a); }

const PsqOptimKernels optim_kernels = {adam, adam_corrected};

}  // namespace
