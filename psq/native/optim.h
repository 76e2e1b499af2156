// Types of the optimizer table. Definitions: psq/kernels/reference_optim.py.
#pragma once

#include <cstddef>
#include <cstdint>

struct PsqOptimKernels {
  int reserved;
};
