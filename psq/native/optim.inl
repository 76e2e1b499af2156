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

// Everything that is decided once for a whole vector: constants in the loops below, where a choice between rows would
// send them through memory.
struct AdamKind {
  AdamMode mode;
  AdamDecay decay;
  bool subtract;
  bool from_m;
};

PSQ_INLINE void adam_at(size_t i, AdamKind kind, const PsqAdam& a) {
  AdamRow row = {load(a.g + i) * splat(a.g_scale), load(a.m + i), load(a.v + i), F{}, F{}};
  if (kind.mode != kPlain) row.third = load(a.third + i);
  if (kind.decay != kNoDecay || kind.subtract) row.x = load(a.x + i);
  const F u = adam_row(row, kind.mode, kind.decay, kind.from_m, a);
  store(a.m + i, row.m);
  store(a.v + i, row.v);
  if (kind.mode != kPlain) store(a.third + i, row.third);
  if (kind.subtract)
    store(a.x + i, row.x - u);
  else
    store(a.out + i, as_f(as_u(u) ^ splat(a.result == PSQ_NEGATE ? 0x80000000u : 0u)));
}

// For a caller who does other things before it comes to those values.
PSQ_INLINE void adam_fetch(size_t i, AdamKind kind, const PsqAdam& a) {
  __builtin_prefetch(a.m + i, 1);
  __builtin_prefetch(a.v + i, 1);
  if (kind.mode != kPlain) __builtin_prefetch(a.third + i, 1);
}

PSQ_INLINE void adam_loop(AdamKind kind, const PsqAdam& a) {
  for (size_t i = 0; i < a.numel; i += 16) {
    adam_fetch(i + a.ahead, kind, a);
    adam_at(i, kind, a);
  }
}

// Whole rows only.
template <AdamMode mode, AdamDecay decay, bool subtract>
void adam_rows(const PsqAdam& arguments) {
  const PsqAdam a = arguments;  // a local copy: the stores below cannot change it
  if (a.coefficients.m_weight > 0.0f)
    adam_loop({mode, decay, subtract, true}, a);
  else
    adam_loop({mode, decay, subtract, false}, a);
}

// All rows, then the last values, fewer than a row, with zeros behind them, which divide into nothing but zeros.
PSQ_OUTLINE void adam_over(const PsqAdam& a, void (*rows)(const PsqAdam&)) {
  PsqAdam part = a;
  part.numel = a.numel / 16 * 16;
  rows(part);
  const size_t at = part.numel, bytes = (a.numel - at) * sizeof(float);
  if (bytes == 0) return;
  float g[16] = {}, m[16] = {}, v[16] = {}, third[16] = {}, x[16] = {}, out[16] = {};
  __builtin_memcpy(g, a.g + at, bytes);
  __builtin_memcpy(m, a.m + at, bytes);
  __builtin_memcpy(v, a.v + at, bytes);
  if (a.third != nullptr) __builtin_memcpy(third, a.third + at, bytes);
  if (a.x != nullptr) __builtin_memcpy(x, a.x + at, bytes);
  rows({g, m, v, third, x, out, 16, a.coefficients, a.correction, a.result, a.g_scale, 0});
  __builtin_memcpy(a.m + at, m, bytes);
  __builtin_memcpy(a.v + at, v, bytes);
  if (a.third != nullptr) __builtin_memcpy(a.third + at, third, bytes);
  if (a.result == PSQ_SUBTRACT)
    __builtin_memcpy(a.x + at, x, bytes);
  else
    __builtin_memcpy(a.out + at, out, bytes);
}

template <AdamMode mode, bool subtract>
void adam_with_decay(const PsqAdam& a) {
  if (a.x != nullptr && a.coefficients.l2 != 0.0f) return adam_over(a, adam_rows<mode, kL2, subtract>);
  if (a.x != nullptr && a.coefficients.decay != 0.0f) return adam_over(a, adam_rows<mode, kDecoupled, subtract>);
  adam_over(a, adam_rows<mode, kNoDecay, subtract>);
}

template <AdamMode mode>
void adam_with_result(const PsqAdam& a) {
  a.result == PSQ_SUBTRACT ? adam_with_decay<mode, true>(a) : adam_with_decay<mode, false>(a);
}

void adam(const PsqAdam& a) { a.third == nullptr ? adam_with_result<kPlain>(a) : adam_with_result<kAmsgrad>(a); }
void adam_corrected(const PsqAdam& a) { adam_with_decay<kCorrected, false>(a); }

const PsqOptimKernels optim_kernels = {adam, adam_corrected};

}  // namespace
