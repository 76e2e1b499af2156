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
  PSQ_TOPK = 8,
};

struct PsqFormat {
  int32_t family;     // PsqFamily
  int32_t bits;       // per value on the wire; topk: of an entry
  int32_t parameter;  // sign: 1 or 2 (norm of the scale); log: k; topk: log2 k; else 0
  uint32_t block;     // values per scale, a power of two in 256..8192; 0: one scale for all
};

// values f32[numel], of which what is finite becomes 0 where `clear`; residual f32[numel] or bf16[numel], updated in place, or null; scales and words, a payload's two
// regions, written.
// A part of a segment that begins at a multiple of its block and of 8,192 is encoded, or decoded, as the segment would:
// its scales lie 4 / block bytes a value further on (block 0: one for all parts), its words bits / 8
// (topk: a block's entries a block).
struct PsqEncode {
  const float* values;
  void* residual;
  uint8_t* scales;
  uint8_t* words;
  size_t numel;
  PsqFormat format;
  uint32_t start;     // stochastic: position in the random stream of the first value
  bool half = false;  // the residual is bf16
  size_t ahead = 0;   // how far on to fetch values; 0 where they are in the cache (the residual is always fetched)
  bool clear = false;
  float residual_scale = 1.0f;  // what the residual is multiplied by first
};

// How large each block of values, or of values + residual, is: its root mean square, or its largest size.
struct PsqNorms {
  const float* values;
  void* residual;  // f32 or bf16, only read; or null
  bool half;
  size_t numel, block;  // block 0: all values
  bool largest;
  float* norms;  // one for each block, written
};

// out f32[numel], written, or added to where `add`.
struct PsqDecode {
  const uint8_t* scales;
  const uint8_t* words;
  float* out;
  size_t numel;
  PsqFormat format;
  bool add;
  size_t ahead = 0;  // how far on to fetch out; 0 where it stays in the cache
};

// The `ahead` of vectors that lie in memory, in values: 8 KiB. Measured: half of it loses 0.1 to 0.15 of memory's speed,
// and so does twice as much in the encoder; without it decode_add runs at 0.7 to 0.85, not 0.9 to 1.
constexpr size_t PSQ_AHEAD = 2048;

struct PsqCodecKernels {
  void (*encode)(const PsqEncode&);
  void (*decode)(const PsqDecode&);
  void (*norms)(const PsqNorms&);
  bool (*all_finite_f32)(const uint8_t* values, size_t numel);
  bool (*all_finite_bf16)(const uint8_t* values, size_t numel);
  bool (*topk_ascends)(const uint8_t* entries, size_t numel, const PsqFormat& format);
};
