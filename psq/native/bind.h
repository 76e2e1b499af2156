// What the binding files share: checked views of Python buffers, and the class whose methods are one level's kernels.
#pragma once

#include <nanobind/nanobind.h>

#include "common.h"

namespace nb = nanobind;

// Level("v3"): the kernels of one instruction set.
struct Level {
  const PsqKernels* kernels;
};

void bind_codec(nb::class_<Level>& level);
void bind_optim(nb::class_<Level>& level);
void bind_server(nb::class_<Level>& level);
void bind_worker(nb::class_<Level>& level);

// Raises ValueError where the kernels do not know the format.
PsqFormat format_of(int32_t family, int32_t bits, int32_t parameter, uint32_t block);
// Bytes of a segment's payload, and of the scales it begins with.
size_t payload_bytes(const PsqFormat& format, size_t numel);
size_t scale_bytes(const PsqFormat& format, size_t numel);
PsqAdamCoefficients adam_coefficients_of(nb::tuple from);
PsqCorrectionCoefficients correction_coefficients_of(nb::tuple from);

// A C-contiguous 1-D buffer of one type (any alignment), held for as long as the view lives. Create and destroy it
// with the GIL held. Anything else raises TypeError with the argument's name, what it must be and what came.
class View {
 public:
  enum Type { kF32, kU8, kU16 };
  enum Access { kRead, kWrite };

  View(nb::handle object, const char* name, Type type, Access access);
  ~View() { PyBuffer_Release(&buffer_); }
  View(const View&) = delete;
  View& operator=(const View&) = delete;

  // Whether an object is a buffer of 16-bit numbers, as bf16 vectors are.
  static bool is_u16(nb::handle object);

  size_t numel() const { return numel_; }
  // Raises ValueError unless there are exactly `numel` elements; `why` completes the sentence.
  void need(size_t numel, const char* why) const;
  float* f32() const { return static_cast<float*>(buffer_.buf); }
  uint8_t* u8() const { return static_cast<uint8_t*>(buffer_.buf); }  // of any type

 private:
  Py_buffer buffer_;
  const char* name_;
  size_t numel_;
};
