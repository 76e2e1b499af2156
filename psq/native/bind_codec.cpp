// The Python face of the codec kernels.
#include "bind.h"

void bind_codec(nb::class_<Level>&) {}
