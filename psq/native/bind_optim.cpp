// The Python face of the optimizer kernels.
#include <cstring>
#include <optional>

#include "bind.h"

namespace {

// The N floats of a NamedTuple, in order.
template <class T>
T floats_of(nb::tuple from, const char* name) {
  constexpr size_t count = sizeof(T) / sizeof(float);
  if (from.size() != count) {
    PyErr_Format(PyExc_ValueError, "%s has %zu numbers, must have %zu", name, from.size(), count);
    throw nb::python_error();
  }
  float values[count];
  for (size_t i = 0; i < count; ++i) values[i] = nb::cast<float>(from[i]);
  T result;
  std::memcpy(&result, values, sizeof result);
  return result;
}

}  // namespace

PsqAdamCoefficients adam_coefficients_of(nb::tuple from) {
  return floats_of<PsqAdamCoefficients>(from, "coefficients");
}

PsqCorrectionCoefficients correction_coefficients_of(nb::tuple from) {
  return floats_of<PsqCorrectionCoefficients>(from, "correction");
}

namespace {

// Views of all the vectors, checked to be of g's size, for one call of one kernel.
class AdamCall {
 public:
  AdamCall(nb::handle g, nb::handle m, nb::handle v, nb::handle out, nb::handle third, const char* third_name,
           nb::handle x)
      : g_(g, "g", View::kF32, View::kRead),
        m_(m, "m", View::kF32, View::kWrite),
        v_(v, "v", View::kF32, View::kWrite),
        out_(out, "out", View::kF32, View::kWrite) {
    if (!third.is_none()) third_.emplace(third, third_name, View::kF32, View::kWrite);
    if (!x.is_none()) x_.emplace(x, "x", View::kF32, View::kRead);  // no kernel writes it: PSQ_WRITE below
    const char* why = "one for each of g";
    m_.need(g_.numel(), why);
    v_.need(g_.numel(), why);
    out_.need(g_.numel(), why);
    if (third_) third_->need(g_.numel(), why);
    if (x_) x_->need(g_.numel(), why);
  }

  void run(void (*kernel)(const PsqAdam&), const PsqAdamCoefficients& coefficients,
           const PsqCorrectionCoefficients& correction) const {
    const PsqAdam step = {g_.f32(),
                          m_.f32(),
                          v_.f32(),
                          third_ ? third_->f32() : nullptr,
                          x_ ? x_->f32() : nullptr,
                          out_.f32(),
                          g_.numel(),
                          coefficients,
                          correction,
                          PSQ_WRITE,
                          1.0f,
                          0};
    nb::gil_scoped_release released;
    kernel(step);
  }

 private:
  View g_, m_, v_, out_;
  std::optional<View> third_, x_;
};

void adam_update(const Level& self, nb::handle g, nb::handle m, nb::handle v, nb::handle out, nb::tuple coefficients,
                 nb::handle vmax, nb::handle x) {
  AdamCall(g, m, v, out, vmax, "vmax", x)
      .run(self.kernels->optim.adam, adam_coefficients_of(coefficients), {});
}

void adam_update_corrected(const Level& self, nb::handle g, nb::handle m, nb::handle v, nb::handle s, nb::handle out,
                           nb::tuple coefficients, nb::tuple correction, nb::handle x) {
  AdamCall(g, m, v, out, s, "s", x)
      .run(self.kernels->optim.adam_corrected, adam_coefficients_of(coefficients),
           correction_coefficients_of(correction));
}

}  // namespace

void bind_optim(nb::class_<Level>& level) {
  level.def("adam_update", adam_update, nb::arg("g"), nb::arg("m"), nb::arg("v"), nb::arg("out"),
            nb::arg("coefficients"), nb::kw_only(), nb::arg("vmax") = nb::none(), nb::arg("x") = nb::none(),
            "One Adam step's direction: psq.kernels.reference_optim.adam_update.");
  level.def("adam_update_corrected", adam_update_corrected, nb::arg("g"), nb::arg("m"), nb::arg("v"), nb::arg("s"),
            nb::arg("out"), nb::arg("coefficients"), nb::arg("correction"), nb::kw_only(),
            nb::arg("x") = nb::none(),
            "The same with a variance-corrected v: psq.kernels.reference_optim.adam_update_corrected.");
}
