// Types of the optimizer table. Definitions: psq/kernels/reference_optim.py.
#pragma once

#include <cstddef>
#include <cstdint>

// The fields, in order, of AdamCoefficients there.
struct PsqAdamCoefficients {
  float m_weight, theta, theta_rest, step_size, root, eps_inside, eps_outside, l2, decay;
};

// The fields, in order, of CorrectionCoefficients there.
struct PsqCorrectionCoefficients {
  float m_scale, v_scale, noise_ratio, signal_scale, update_s, s_scale, own_share, mean_share;
};

// What becomes of the direction u.
enum PsqResult : int32_t {
  PSQ_WRITE,     // out = u
  PSQ_NEGATE,    // out = -u
  PSQ_SUBTRACT,  // x -= u
};

// All vectors f32[numel]. m, v and third are updated, out is written and may be g; no other two may overlap.
struct PsqAdam {
  const float* g;
  float* m;
  float* v;
  float* third;    // adam: vmax, or null; adam_corrected: s
  float* x;        // weights; may be null where l2 and decay are 0, unless the result goes there
  float* out;      // not used by PSQ_SUBTRACT
  size_t numel;
  PsqAdamCoefficients coefficients;
  PsqCorrectionCoefficients correction;  // adam_corrected only, which does not subtract
  PsqResult result;
  float g_scale;  // g is multiplied by it first
  size_t ahead;   // how far on to fetch m, v and third, for callers who come to those values later
};

struct PsqOptimKernels {
  void (*adam)(const PsqAdam&);
  void (*adam_corrected)(const PsqAdam&);
};
