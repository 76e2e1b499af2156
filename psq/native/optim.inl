// Optimizer kernels over vec.inl's 16-lane vectors.

namespace {
const PsqOptimKernels optim_kernels = {0};
}
