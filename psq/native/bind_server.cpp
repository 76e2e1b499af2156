// The Python face of the server's step.
#include <algorithm>
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

PsqFormat format_from(nb::tuple from) {
  if (from.size() != 4) refuse("a format has family, bits, parameter and block");
  return format_of(nb::cast<int32_t>(from[0]), nb::cast<int32_t>(from[1]), nb::cast<int32_t>(from[2]),
                   nb::cast<uint32_t>(from[3]));
}

// A vector of the shard's size, or none.
class Vector {
 public:
  Vector(nb::handle object, const char* name, size_t numel) {
    if (object.is_none()) return;
    view_.emplace(object, name, View::kF32, View::kWrite);
    view_->need(numel, kOneEach);
  }
  float* from(size_t value) const { return view_ ? view_->f32() + value : nullptr; }
  explicit operator bool() const { return view_.has_value(); }

 private:
  std::optional<View> view_;
};

struct Segment {
  size_t from, numel;           // values
  size_t received_at, sent_at;  // bytes, where its payloads begin
  uint32_t start;
};

// The segments in order, and behind the last the totals.
std::vector<Segment> segments_of(nb::sequence numels, nb::sequence starts, const PsqFormat& up,
                                 const PsqFormat& down) {
  std::vector<Segment> segments;
  Segment next = {};
  const size_t count = nb::len(numels);
  if (nb::len(starts) != count) refuse("starts must be one for each segment");
  for (size_t i = 0; i < count; ++i) {
    next.numel = nb::cast<size_t>(numels[i]);
    next.start = nb::cast<uint32_t>(starts[i]);
    if (next.numel >> 40 != 0) refuse("a segment cannot have 2^40 values");
    segments.push_back(next);
    next.from += next.numel;
    next.received_at += payload_bytes(up, next.numel);
    next.sent_at += payload_bytes(down, next.numel);
  }
  segments.push_back(next);
  return segments;
}

// The fields of a psq.kernels.ServerStep, checked.
class ServerCall {
 public:
  explicit ServerCall(nb::handle step)
      : up_(format_from(step.attr("uplink"))),
        down_(format_from(step.attr("downlink"))),
        segments_(segments_of(step.attr("segments"), step.attr("starts"), up_, down_)),
        x_(step.attr("x"), "x", total()),
        m_(step.attr("m"), "m", total()),
        v_(step.attr("v"), "v", total()),
        vmax_(step.attr("vmax"), "vmax", total()),
        residual_(step.attr("residual"), "residual", total()),
        scratch_(step.attr("scratch"), "scratch", View::kF32, View::kWrite) {
    const nb::object answer = step.attr("answer"), adam = step.attr("adam");
    if (!answer.is_none()) answer_kind_ = nb::cast<bool>(step.attr("delta")) ? PSQ_DELTA : PSQ_WEIGHTS;
    const Segment& totals = segments_.back();
    if (!x_) refuse("there must be an x");
    for (nb::handle payload : step.attr("payloads")) {
      payloads_.emplace_back(payload, "payload", View::kU8, View::kRead);
      payloads_.back().need(totals.received_at, "the uplink's exact size for these segments");
    }
    if (payloads_.empty()) refuse("there must be at least one payload");
    if (!answer.is_none()) {
      answer_.emplace(answer, "answer", View::kU8, View::kWrite);
      answer_->need(totals.sent_at, "the downlink's exact size for these segments");
    }
    if (residual_ && answer_kind_ != PSQ_DELTA) refuse("only a delta has a residual");
    if (!adam.is_none()) adam_ = adam_coefficients_of(nb::cast<nb::tuple>(adam));
    if (bool(m_) != adam_.has_value() || bool(v_) != bool(m_) || (vmax_ && !m_))
      refuse("adam, m and v go together, and vmax only with them");
    check_scratch();
  }

  void run(const PsqKernels& kernels) const {
    std::vector<PsqPayload> payloads(payloads_.size());
    nb::gil_scoped_release released;
    for (size_t i = 0; i + 1 < segments_.size(); ++i) kernels.server.step(step(segments_[i], payloads));
  }

 private:
  size_t total() const { return segments_.back().from; }

  void check_scratch() const {
    size_t least = 0;
    for (size_t i = 0; i + 1 < segments_.size(); ++i) least = std::max(least, segments_[i].numel);
    if (scratch_.numel() >= least) return;
    PyErr_Format(PyExc_ValueError, "scratch has %zu elements, must have at least %zu", scratch_.numel(), least);
    throw nb::python_error();
  }

  PsqServerStep step(const Segment& at, std::vector<PsqPayload>& payloads) const {
    for (size_t i = 0; i < payloads.size(); ++i) {
      const uint8_t* payload = payloads_[i].u8() + at.received_at;
      payloads[i] = {payload, payload + scale_bytes(up_, at.numel)};
    }
    uint8_t* sent = answer_ ? answer_->u8() + at.sent_at : nullptr;
    PsqServerStep step = {};
    step.payloads = payloads.data();
    step.payload_count = payloads.size();
    step.uplink = up_;
    step.adam = adam_ ? &*adam_ : nullptr;
    step.m = m_.from(at.from);
    step.v = v_.from(at.from);
    step.vmax = vmax_.from(at.from);
    step.x = x_.from(at.from);
    step.residual = residual_.from(at.from);
    step.answer = answer_kind_;
    step.downlink = down_;
    step.scales = sent;
    step.words = sent == nullptr ? nullptr : sent + scale_bytes(down_, at.numel);
    step.start = at.start;
    step.scratch = scratch_.f32();
    step.numel = at.numel;
    return step;
  }

  PsqFormat up_, down_;
  std::vector<Segment> segments_;
  Vector x_, m_, v_, vmax_, residual_;
  View scratch_;
  PsqAnswer answer_kind_ = PSQ_NO_ANSWER;
  std::deque<View> payloads_;
  std::optional<View> answer_;
  std::optional<PsqAdamCoefficients> adam_;
};

void server_step(const Level& self, nb::handle step) { ServerCall(step).run(*self.kernels); }

}  // namespace

void bind_server(nb::class_<Level>& level) {
  level.def("server_step", server_step, nb::arg("step"),
            "A round of one shard: psq.kernels.reference_server.compose.");
}
