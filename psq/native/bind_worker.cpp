// The Python face of the worker's step.
#include <algorithm>
#include <cmath>
#include <deque>
#include <optional>
#include <vector>

#include "bind.h"

namespace {

constexpr const char* kOneEach = "one for each value";

[[noreturn]] void refuse(const char* why) {
  PyErr_SetString(PyExc_ValueError, why);
  throw nb::python_error();
}

PsqFormat uplink_from(nb::tuple from) {
  if (from.size() != 4) refuse("a format has family, bits, parameter and block");
  return format_of(nb::cast<int32_t>(from[0]), nb::cast<int32_t>(from[1]), nb::cast<int32_t>(from[2]),
                   nb::cast<uint32_t>(from[3]));
}

// The fields of a psq.kernels.WorkerStep, checked.
class WorkerCall {
 public:
  explicit WorkerCall(nb::handle step)
      : format_(uplink_from(nb::cast<nb::tuple>(step.attr("uplink")))), clear_(nb::cast<bool>(step.attr("clear"))),
        residual_scale_(nb::cast<float>(step.attr("residual_scale"))) {
    read_segments(step.attr("gradients"), step.attr("starts"));
    read_state(step);
    const nb::object payload = step.attr("payload"), weights = step.attr("weights");
    if (!payload.is_none()) {
      payload_.emplace(payload, "payload", View::kU8, View::kWrite);
      payload_->need(payload_bytes_, "the format's exact size for these segments");
    } else if (!residual_) {
      refuse("without a payload there must be a residual");
    }
    if (!std::isfinite(residual_scale_) || (residual_scale_ != 1.0f && !residual_))
      refuse("residual_scale must be a finite number, and 1 where there is no residual");
    if (weights.is_none()) return;
    for (nb::handle values : nb::cast<nb::sequence>(weights)) {
      if (weights_.size() < gradients_.size()) {
        weights_.emplace_back(values, "weights", View::kF32, View::kRead);
        weights_.back().need(gradients_[weights_.size() - 1].numel(), kOneEach);
      } else {
        refuse("weights must be one array for each segment");
      }
    }
    if (weights_.size() != gradients_.size()) refuse("weights must be one array for each segment");
  }

  void run(const PsqKernels& kernels) const {
    nb::gil_scoped_release released;
    size_t from = 0, at = 0;
    for (size_t i = 0; i < gradients_.size(); ++i) {
      const size_t numel = gradients_[i].numel();
      kernels.worker.step(step(i, from, at));
      from += numel;
      at += payload_bytes(format_, numel);
    }
  }

 private:
  void read_segments(nb::handle gradients, nb::handle starts) {
    for (nb::handle start : nb::cast<nb::sequence>(starts)) starts_.push_back(nb::cast<uint32_t>(start));
    size_t largest = 0;
    for (nb::handle values : nb::cast<nb::sequence>(gradients)) {
      gradients_.emplace_back(values, "gradients", View::kF32, clear_ ? View::kWrite : View::kRead);
      const size_t numel = gradients_.back().numel();
      numel_ += numel;
      payload_bytes_ += payload_bytes(format_, numel);
      largest = std::max(largest, numel);
    }
    if (starts_.size() != gradients_.size()) refuse("starts must be one for each segment");
    least_scratch_ = largest;
  }

  void read_state(nb::handle step) {
    const nb::object adam = step.attr("adam"), correction = step.attr("correction");
    vector(m_, step, "m");
    vector(v_, step, "v");
    vector(third_, step, "third");
    if (!step.attr("residual").is_none()) {
      const nb::object residual = step.attr("residual");
      half_ = View::is_u16(residual);
      residual_.emplace(residual, "residual", half_ ? View::kU16 : View::kF32, View::kWrite);
      residual_->need(numel_, kOneEach);
    }
    if (!adam.is_none()) adam_ = adam_coefficients_of(nb::cast<nb::tuple>(adam));
    if (!correction.is_none()) correction_ = correction_coefficients_of(nb::cast<nb::tuple>(correction));
    read_blend(step);
    if (m_.has_value() != adam_.has_value() || v_.has_value() != adam_.has_value() ||
        ((third_ || correction_) && !adam_) || (correction_ && !third_))
      refuse("adam, m and v go together, third and correction only with them, and correction only with third");
    if (!adam_ && !blend_) return;
    scratch_.emplace(step.attr("scratch"), "scratch", View::kF32, View::kWrite);
    if (scratch_->numel() >= least_scratch_) return;
    PyErr_Format(PyExc_ValueError, "scratch has %zu elements, must have at least %zu", scratch_->numel(),
                 least_scratch_);
    throw nb::python_error();
  }

  void read_blend(nb::handle step) {
    const nb::object blend = step.attr("blend");
    if (!blend.is_none()) {
      const nb::tuple numbers = nb::cast<nb::tuple>(blend);
      if (numbers.size() != 2) refuse("a blend has kept and rest");
      blend_ = PsqBlend{nb::cast<float>(numbers[0]), nb::cast<float>(numbers[1])};
    }
    vector(before_, step, "before", View::kRead);
    vector(unit_, step, "unit", View::kRead);
    if (before_.has_value() != blend_.has_value() || (unit_ && !blend_) || (blend_ && adam_))
      refuse("blend and before go together, unit only with them, and none of them with adam");
  }

  void vector(std::optional<View>& view, nb::handle step, const char* name, View::Access access = View::kWrite) {
    const nb::object object = step.attr(name);
    if (object.is_none()) return;
    view.emplace(object, name, View::kF32, access);
    view->need(numel_, kOneEach);
  }

  static float* at(const std::optional<View>& view, size_t from) { return view ? view->f32() + from : nullptr; }

  PsqWorkerStep step(size_t index, size_t from, size_t byte) const {
    PsqWorkerStep step = {};
    step.g = gradients_[index].f32();
    step.numel = gradients_[index].numel();
    step.adam = adam_ ? &*adam_ : nullptr;
    step.corrected = correction_ ? &*correction_ : nullptr;
    step.m = at(m_, from);
    step.v = at(v_, from);
    step.third = at(third_, from);
    step.blend = blend_ ? &*blend_ : nullptr;
    step.before = at(before_, from);
    step.unit = at(unit_, from);
    step.x = weights_.empty() ? nullptr : weights_[index].f32();
    step.half = half_;
    step.residual_scale = residual_scale_;
    if (residual_) step.residual = residual_->u8() + from * (half_ ? sizeof(uint16_t) : sizeof(float));
    step.format = format_;
    if (payload_) {
      step.scales = payload_->u8() + byte;
      step.words = step.scales + scale_bytes(format_, step.numel);
    }
    step.start = starts_[index];
    step.scratch = scratch_ ? scratch_->f32() : nullptr;
    step.clear = clear_;
    return step;
  }

  PsqFormat format_;
  bool clear_;
  float residual_scale_;
  std::deque<View> gradients_, weights_;
  std::vector<uint32_t> starts_;
  size_t numel_ = 0, payload_bytes_ = 0, least_scratch_ = 0;
  std::optional<View> m_, v_, third_, before_, unit_, residual_, payload_, scratch_;
  bool half_ = false;
  std::optional<PsqAdamCoefficients> adam_;
  std::optional<PsqCorrectionCoefficients> correction_;
  std::optional<PsqBlend> blend_;
};

void worker_step(const Level& self, nb::handle step) { WorkerCall(step).run(*self.kernels); }

}  // namespace

void bind_worker(nb::class_<Level>& level) {
  level.def("worker_step", worker_step, nb::arg("step"), "A push of one shard: psq.kernels.reference_worker.compose.");
}
