// One instruction set: PSQ_LEVEL (v2, v3, v4, neon) and PSQ_VECTOR_BYTES (its register) are defined by the includer.
#include "common.h"
#include "vec.inl"

#include "codec.inl"
#include "topk.inl"
#include "signs.inl"
#include "optim.inl"
#include "server.inl"
#include "worker.inl"

#define PSQ_CONCAT2(a, b) a##b
#define PSQ_CONCAT(a, b) PSQ_CONCAT2(a, b)
#define PSQ_STRING2(a) #a
#define PSQ_STRING(a) PSQ_STRING2(a)

extern "C" __attribute__((visibility("hidden"))) const PsqKernels PSQ_CONCAT(psq_kernels_, PSQ_LEVEL);
const PsqKernels PSQ_CONCAT(psq_kernels_, PSQ_LEVEL) = {PSQ_STRING(PSQ_LEVEL), codec_kernels, optim_kernels,
                                                        server_kernels, worker_kernels};
