// Types of the codec table. Definitions of the formats: psq/kernels/reference.py.
#pragma once

#include <cstddef>
#include <cstdint>

enum PsqFamily : int32_t {
  PSQ_SIGN = 1,
  PSQ_LOG = 2,
  PSQ_UNIFORM = 3,
  PSQ_STOCHASTIC = 4,
  PSQ_LLOYD_MAX = 5,
  PSQ_BF16 = 6,
  PSQ_FP32 = 7,
};

struct PsqFormat {
  int32_t family;     // PsqFamily
  int32_t bits;       // per value on the wire
  int32_t parameter;  // sign: 1 or 2 (norm of the scale); log: k; else 0
  uint32_t block;     // values per scale, a power of two in 256..8192; 0: one scale for all
};

// values f32[numel]; residual f32[numel], updated in place, or null; scales and words, a payload's two regions, written.
// A part of a segment that begins at a multiple of its block and of 8,192 is encoded, or decoded, as the segment would:
// its scales lie 4 / block bytes a value further on (block 0: one for all parts), its words bits / 8.
struct PsqEncode {
  const float* values;
  float* residual;
  uint8_t* scales;
  uint8_t* words;
  size_t numel;
  PsqFormat format;
  uint32_t start;  // stochastic: position in the random stream of the first value
};

// out f32[numel], written, or added to where `add`.
struct PsqDecode {
  const uint8_t* scales;
  const uint8_t* words;
  float* out;
  size_t numel;
  PsqFormat format;
  bool add;
};

struct PsqCodecKernels {
  void (*encode)(const PsqEncode&);
  void (*decode)(const PsqDecode&);
  bool (*all_finite_f32)(const uint8_t* values, size_t numel);
  bool (*all_finite_bf16)(const uint8_t* values, size_t numel);
};
