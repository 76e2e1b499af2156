// Types of the server's table. Definition: psq/kernels/reference_server.py.
#pragma once

#include <cstddef>
#include <cstdint>

#include "codec.h"
#include "optim.h"

// A payload's two regions, from a segment's first value on.
struct PsqPayload {
  const uint8_t* scales;
  const uint8_t* words;
};

enum PsqAnswer : int32_t {
  PSQ_NO_ANSWER,  // x moves, nobody is told
  PSQ_WEIGHTS,    // x moves, and is encoded
  PSQ_DELTA,      // x moves by what is encoded
};

// One segment's round. All vectors f32[numel]; no two may overlap.
struct PsqServerStep {
  const PsqPayload* payloads;
  size_t payload_count;  // >= 1, by ascending rank
  PsqFormat uplink;
  const PsqAdamCoefficients* adam;  // null: the mean message is the direction
  float* m;                         // adam only
  float* v;                         // adam only
  float* vmax;                      // AMSGrad, or null
  float* x;
  float* residual;  // of a delta, or null
  PsqAnswer answer;
  PsqFormat downlink;
  uint8_t* scales;  // of the answer
  uint8_t* words;
  uint32_t start;  // of the downlink's random stream
  float* scratch;
  size_t numel;
};

struct PsqServerKernels {
  void (*step)(const PsqServerStep&);
};
