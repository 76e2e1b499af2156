// The Python face of the optimizer kernels.
#include "bind.h"

void bind_optim(nb::class_<Level>&) {}
