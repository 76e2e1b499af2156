// Types of the worker's table. Definition: psq/kernels/reference_worker.py.
#pragma once

#include <cstddef>
#include <cstdint>

#include "codec.h"
#include "optim.h"

// A direction that moves a vector which all nodes hold: kept before + rest (g / unit).
struct PsqBlend {
  float kept, rest;
};

// One segment's push. All vectors f32[numel], the residual f32 or bf16; no two may overlap.
struct PsqWorkerStep {
  const float* g;                              // of which what is finite becomes 0 where `clear`
  const PsqAdamCoefficients* adam;             // null: the gradient is the direction
  const PsqCorrectionCoefficients* corrected;  // null: not corrected
  const PsqBlend* blend;                       // null: no blend; not with adam
  const float* before;                         // blend only
  const float* unit;                           // blend only; null: g is in units of 1
  float* m;                                    // adam only
  float* v;                                    // adam only
  float* third;                                // as PsqAdam's
  const float* x;                              // weights; may be null where l2 and decay are 0
  void* residual;                              // or null
  bool half;                                   // the residual is bf16
  float residual_scale;                        // what it is multiplied by first
  uint8_t* scales;                             // of the payload; null: the direction goes to the residual
  uint8_t* words;
  PsqFormat format;
  uint32_t start;   // of the random stream
  float* scratch;   // f32[numel] where there is an adam or a blend
  size_t numel;
  bool clear;
};

struct PsqWorkerKernels {
  void (*step)(const PsqWorkerStep&);
};
