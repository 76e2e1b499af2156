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

// All vectors f32[numel]. m, v and third are updated, out is written and may be g; no other two may overlap.
struct PsqAdam {
  const float* g;
  float* m;
  float* v;
  float* third;    // adam: vmax, or null; adam_corrected: s
  const float* x;  // weights, or null where l2 and decay are 0
  float* out;
  size_t numel;
  PsqAdamCoefficients coefficients;
  PsqCorrectionCoefficients correction;  // adam_corrected only
};

struct PsqOptimKernels {
  void (*adam)(const PsqAdam&);
  void (*adam_corrected)(const PsqAdam&);
};
