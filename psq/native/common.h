// What the translation units of psq's native module share: plain types and declarations, never code.
//
// Files
//   level_v2.cpp ... level_neon.cpp   one per instruction set: two #defines and #include "level.inl"
//   level.inl     all the .inl files, then the level's one exported symbol: its table of functions
//   vec.inl       16-lane vectors (F, I, U) over the compiler's vector extensions, the same on every level
//   codec.h/.inl  codecs: the table's types, the kernels          bind_codec.cpp  their Python face
//   quantize.inl, scale.inl, words.inl   what codec.inl is made of
//   signs.inl     signs with error feedback, the one quantizer with a loop of its own
//   topk.inl      the one codec that sends places, and where in a payload a part of a segment lies
//   optim.h/.inl  optimizers: the table's types, the kernels      bind_optim.cpp  their Python face
//   server.h/.inl a parameter server's step: those kernels, piece by piece       bind_server.cpp  its Python face
//   sum.inl       the sum of its payloads
//   worker.h/.inl a worker's push: its direction and codec, piece by piece      bind_worker.cpp  its Python face
//   bind.h        checked views of Python buffers, class Level    module.cpp      cpuid, NB_MODULE
//
// Rules, and why
//   - An .inl file lives in an unnamed namespace, every function of it PSQ_INLINE or static: the linker keeps ONE copy
//     of an inline function with linkage, perhaps the AVX-512 one, and an older CPU then dies in it.
//   - No STL, no exceptions, no allocation, no libm call in an .inl (use __builtin_sqrtf, __builtin_memcpy).
//   - Loads and stores are unaligned (vec.inl does that): NumPy promises 16 bytes, a slice or a frame promises 1.
//   - The bits are those of psq/kernels/reference*.py on every level: -ffp-contract=off, no fast-math, sums over 16
//     lanes in the stated order (vec.inl, `sum`), so write arithmetic with one order of operations and keep it.
//   - bind_*.cpp checks every argument before a pointer is touched, then releases the GIL; kernels trust their arguments.
#pragma once

#include <cstddef>
#include <cstdint>

#include "codec.h"
#include "optim.h"
#include "server.h"
#include "worker.h"

struct PsqKernels {
  const char* name;  // "v2", "v3", "v4", "neon"
  PsqCodecKernels codec;
  PsqOptimKernels optim;
  PsqServerKernels server;
  PsqWorkerKernels worker;
};

extern "C" {
#if PSQ_HAS_V2
extern const PsqKernels psq_kernels_v2;
#endif
#if PSQ_HAS_V3
extern const PsqKernels psq_kernels_v3;
#endif
#if PSQ_HAS_V4
extern const PsqKernels psq_kernels_v4;
#endif
#if PSQ_HAS_NEON
extern const PsqKernels psq_kernels_neon;
#endif
}
