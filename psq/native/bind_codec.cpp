// The Python face of the codec kernels.
#include <optional>

#include "bind.h"

namespace {

constexpr size_t kGroup = 512;
constexpr const char* kPayloadWhy = "the format's exact size for this many values";

bool is_block(uint32_t block) {
  return block == 0 || (block >= 256 && block <= 8192 && (block & (block - 1)) == 0);
}

bool is_known(const PsqFormat& f) {
  const bool block = is_block(f.block);
  switch (f.family) {
    case PSQ_SIGN:
      return block && f.bits == 1 && (f.parameter == 1 || f.parameter == 2);
    case PSQ_LOG:
      return block && f.bits >= 2 && f.bits <= 4 && f.parameter >= 0 && f.parameter <= (1 << (f.bits - 1)) - 2;
    case PSQ_UNIFORM:
    case PSQ_STOCHASTIC:
      return block && f.parameter == 0 && f.bits >= 2 && f.bits <= 8;
    case PSQ_LLOYD_MAX:
      return block && f.parameter == 0 && f.bits >= 1 && f.bits <= 4;
    case PSQ_TOPK:
      return block && f.block != 0 && (1u << (f.bits - 1)) == f.block && f.parameter >= 0 && f.parameter <= 7;
    case PSQ_BF16:
      return f.bits == 16 && f.parameter == 0 && f.block == 0;
    case PSQ_FP32:
      return f.bits == 32 && f.parameter == 0 && f.block == 0;
    default:
      return false;
  }
}

}  // namespace

PsqFormat format_of(int32_t family, int32_t bits, int32_t parameter, uint32_t block) {
  const PsqFormat format = {family, bits, parameter, block};
  if (!is_known(format)) {
    PyErr_Format(PyExc_ValueError, "no format of family %d with bits %d, parameter %d, block %u", family, bits,
                 parameter, block);
    throw nb::python_error();
  }
  return format;
}

size_t scale_bytes(const PsqFormat& format, size_t numel) {
  if (format.family == PSQ_FP32 || format.family == PSQ_BF16) return 0;
  if (format.block == 0) return numel > 0 ? 4 : 0;
  return 4 * ((numel + format.block - 1) / format.block);
}

size_t payload_bytes(const PsqFormat& format, size_t numel) {
  if (format.family == PSQ_FP32) return 4 * numel;
  if (format.family == PSQ_TOPK) {
    const size_t entries = ((size_t(1) << format.parameter) * size_t(format.bits) + 7) / 8;
    return (numel + format.block - 1) / format.block * (4 + entries);
  }
  return scale_bytes(format, numel) + (numel + kGroup - 1) / kGroup * (kGroup / 8) * size_t(format.bits);
}

namespace {

void encode(const Level& level, int32_t family, int32_t bits, int32_t parameter, uint32_t block, nb::handle values,
            nb::handle residual, nb::handle payload, uint32_t start, bool clear) {
  const PsqFormat format = format_of(family, bits, parameter, block);
  const View x(values, "values", View::kF32, clear ? View::kWrite : View::kRead);
  const View out(payload, "payload", View::kU8, View::kWrite);
  std::optional<View> e;
  bool half = false;  // the residual is bf16
  if (!residual.is_none()) {
    half = View::is_u16(residual);
    e.emplace(residual, "residual", half ? View::kU16 : View::kF32, View::kWrite);
    e->need(x.numel(), "one for each of values");
  }
  out.need(payload_bytes(format, x.numel()), kPayloadWhy);
  uint8_t* words = out.u8() + scale_bytes(format, x.numel());
  const PsqEncode call = {x.f32(), e ? e->u8() : nullptr, out.u8(), words,    x.numel(), format,
                          start,   half,                  PSQ_AHEAD, clear};
  nb::gil_scoped_release released;
  level.kernels->codec.encode(call);
}

void decode(const Level& level, int32_t family, int32_t bits, int32_t parameter, uint32_t block, nb::handle payload,
            nb::handle out, bool add) {
  const PsqFormat format = format_of(family, bits, parameter, block);
  const View from(payload, "payload", View::kU8, View::kRead);
  const View to(out, "out", View::kF32, View::kWrite);
  from.need(payload_bytes(format, to.numel()), kPayloadWhy);
  const uint8_t* words = from.u8() + scale_bytes(format, to.numel());
  const PsqDecode call = {from.u8(), words, to.f32(), to.numel(), format, add, PSQ_AHEAD};
  nb::gil_scoped_release released;
  level.kernels->codec.decode(call);
}

void block_norms(const Level& level, nb::handle values, nb::handle residual, uint32_t block, bool largest,
                 nb::handle out) {
  if (!is_block(block)) {
    PyErr_Format(PyExc_ValueError, "there are no blocks of %u values", block);
    throw nb::python_error();
  }
  const View x(values, "values", View::kF32, View::kRead);
  const View to(out, "out", View::kF32, View::kWrite);
  std::optional<View> e;
  bool half = false;
  if (!residual.is_none()) {
    half = View::is_u16(residual);
    e.emplace(residual, "residual", half ? View::kU16 : View::kF32, View::kRead);
    e->need(x.numel(), "one for each of values");
  }
  to.need(scale_bytes({PSQ_SIGN, 1, 2, block}, x.numel()) / 4, "one for each block of values");
  const PsqNorms call = {x.f32(), e ? e->u8() : nullptr, half, x.numel(), block, largest, to.f32()};
  nb::gil_scoped_release released;
  level.kernels->codec.norms(call);
}

bool all_finite(const Level& level, nb::handle values) {
  const View x(values, "values", View::kF32, View::kRead);
  nb::gil_scoped_release released;
  return level.kernels->codec.all_finite_f32(x.u8(), x.numel());
}

bool payload_finite(const Level& level, int32_t family, int32_t bits, int32_t parameter, uint32_t block,
                    nb::handle payload, size_t numel) {
  const PsqFormat format = format_of(family, bits, parameter, block);
  const View from(payload, "payload", View::kU8, View::kRead);
  if (numel >> 40 != 0) {  // its bytes might not fit a size_t
    PyErr_SetString(PyExc_ValueError, "a payload cannot have 2^40 values");
    throw nb::python_error();
  }
  const size_t bytes = payload_bytes(format, numel);
  from.need(bytes, kPayloadWhy);
  nb::gil_scoped_release released;
  if (format.family == PSQ_BF16) return level.kernels->codec.all_finite_bf16(from.u8(), bytes / 2);
  const size_t floats = format.family == PSQ_FP32 ? numel : scale_bytes(format, numel) / 4;
  return level.kernels->codec.all_finite_f32(from.u8(), floats);
}

bool topk_ascends(const Level& level, int32_t family, int32_t bits, int32_t parameter, uint32_t block,
                  nb::handle payload, size_t numel) {
  const PsqFormat format = format_of(family, bits, parameter, block);
  const View from(payload, "payload", View::kU8, View::kRead);
  if (family != PSQ_TOPK || numel >> 40 != 0) {
    PyErr_SetString(PyExc_ValueError, "entries are those of topk, and of fewer than 2^40 values");
    throw nb::python_error();
  }
  from.need(payload_bytes(format, numel), kPayloadWhy);
  const uint8_t* entries = from.u8() + scale_bytes(format, numel);
  nb::gil_scoped_release released;
  return level.kernels->codec.topk_ascends(entries, numel, format);
}

}  // namespace

void bind_codec(nb::class_<Level>& level) {
  level.def("encode", &encode, nb::arg("family"), nb::arg("bits"), nb::arg("parameter"), nb::arg("block"),
            nb::arg("values"), nb::arg("residual").none(), nb::arg("payload"), nb::arg("start"),
            nb::arg("clear") = false);
  level.def("decode", &decode, nb::arg("family"), nb::arg("bits"), nb::arg("parameter"), nb::arg("block"),
            nb::arg("payload"), nb::arg("out"), nb::arg("add"));
  level.def("block_norms", &block_norms, nb::arg("values"), nb::arg("residual").none(), nb::arg("block"),
            nb::arg("largest"), nb::arg("out"));
  level.def("all_finite", &all_finite, nb::arg("values"));
  level.def("payload_finite", &payload_finite, nb::arg("family"), nb::arg("bits"), nb::arg("parameter"),
            nb::arg("block"), nb::arg("payload"), nb::arg("numel"));
  level.def("topk_ascends", &topk_ascends, nb::arg("family"), nb::arg("bits"), nb::arg("parameter"), nb::arg("block"),
            nb::arg("payload"), nb::arg("numel"));
}
