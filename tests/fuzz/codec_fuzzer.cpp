// libFuzzer target for one family of codecs (PSQ_FUZZ_FAMILY): what a peer may send, on every level at once.
//
// An input is six bytes that choose a format, a size and an operation, and the rest fills the payload, again and again.
// Every buffer has exactly the bytes that the kernels may touch, so AddressSanitizer sees the first one beyond. Levels
// that this processor has must agree with the first of them: every byte of a payload, every bit of a value but for which
// NaN a NaN is. Besides, with the laws that hold on any bytes:
//   decode into -0.0 by adding == decode         the server's sum == decode and add, payload by payload
//   finite scales of at most 2^56 decode to finite values         a topk block says at most k values
//
// Sizes are computed here from proto/README.md, not taken from the code under test.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "common.h"

namespace {

struct Level {
  const PsqKernels* kernels;
  bool here;
};
const Level kLevels[] = {
    {&psq_kernels_v2, true},
    {&psq_kernels_v3, bool(__builtin_cpu_supports("avx2")) && __builtin_cpu_supports("fma")},
    {&psq_kernels_v4, bool(__builtin_cpu_supports("avx512f")) && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")},
};

constexpr uint32_t kBlocks[] = {0, 256, 512, 1024, 2048, 4096, 8192};
constexpr float kMaxScale = 0x1p56f;

[[noreturn]] void fail(const char* law, const PsqFormat& f, size_t numel, const char* level) {
  std::fprintf(stderr, "LAW BROKEN: %s: family %d bits %d parameter %d block %u, %zu values, level %s\n", law, f.family,
               f.bits, f.parameter, f.block, numel, level);
  std::abort();
}

// ---- formats and sizes -------------------------------------------------------------------------------------------

void add_blocks(std::vector<PsqFormat>& to, int32_t family, int32_t bits, int32_t parameter) {
  for (uint32_t block : kBlocks) to.push_back({family, bits, parameter, block});
}

std::vector<PsqFormat> formats_of(int32_t family) {
  std::vector<PsqFormat> all;
  switch (family) {
    case PSQ_SIGN:
      for (int norm = 1; norm <= 2; ++norm) add_blocks(all, family, 1, norm);
      break;
    case PSQ_LOG:
      for (int bits = 2; bits <= 4; ++bits)
        for (int k = 0; k <= (1 << (bits - 1)) - 2; ++k) add_blocks(all, family, bits, k);
      break;
    case PSQ_UNIFORM:
    case PSQ_STOCHASTIC:
      for (int bits = 2; bits <= 8; ++bits) add_blocks(all, family, bits, 0);
      break;
    case PSQ_LLOYD_MAX:
      for (int bits = 1; bits <= 4; ++bits) add_blocks(all, family, bits, 0);
      break;
    case PSQ_TOPK:
      for (int k = 0; k <= 7; ++k)
        for (int at = 1; at <= 6; ++at) all.push_back({family, 8 + at, k, kBlocks[at]});
      break;
    case PSQ_BF16:
      all.push_back({family, 16, 0, 0});
      break;
    case PSQ_FP32:
      all.push_back({family, 32, 0, 0});
      break;
  }
  return all;
}

const std::vector<PsqFormat>& formats() {
  static const std::vector<PsqFormat> all = formats_of(PSQ_FUZZ_FAMILY);
  return all;
}

// What an answer may be written in: a sample of every family.
const std::vector<PsqFormat>& answers() {
  static const std::vector<PsqFormat> all = [] {
    std::vector<PsqFormat> some;
    for (int32_t family = PSQ_SIGN; family <= PSQ_TOPK; ++family) {
      const std::vector<PsqFormat> here = formats_of(family);
      for (size_t i = 0; i < here.size(); i += 5) some.push_back(here[i]);
    }
    return some;
  }();
  return all;
}

size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }

size_t scale_count(const PsqFormat& f, size_t numel) {
  if (f.family == PSQ_BF16 || f.family == PSQ_FP32 || numel == 0) return 0;
  return f.block == 0 ? 1 : ceil_div(numel, f.block);
}

size_t entry_bytes(const PsqFormat& f) { return ceil_div((size_t(1) << f.parameter) * size_t(f.bits), 8); }

// PSQ_FUZZ_SHORT, for the test that a read beyond a payload is found: what the kernels are given lacks so many bytes.
#ifndef PSQ_FUZZ_SHORT
#define PSQ_FUZZ_SHORT 0
#endif

size_t payload_bytes(const PsqFormat& f, size_t numel) {
  if (f.family == PSQ_FP32) return 4 * numel;
  if (f.family == PSQ_TOPK) return scale_count(f, numel) * (4 + entry_bytes(f));
  return 4 * scale_count(f, numel) + ceil_div(numel, 512) * 64 * size_t(f.bits);
}

// ---- inputs ------------------------------------------------------------------------------------------------------

struct Input {
  PsqFormat format, answer;
  size_t numel, skew, payload_count;
  int operation;
  bool third, half;
  const uint8_t* data;
  size_t size;
};

// Mostly about one group of 512, which is where the loops begin and end; now and then several pieces of a server's step.
size_t numel_of(unsigned chosen) {
  if (chosen >= 0xff80) return (chosen & 0x7f) * 160;
  if (chosen >= 0xf000) return chosen % 2200;
  return chosen % 600;
}

// A payload of exactly so many bytes, `skew` bytes off any alignment, that ends where its memory ends.
class Bytes {
 public:
  Bytes(size_t size, size_t skew) : skew_(skew), memory_(size + skew) {}
  Bytes(size_t size, size_t skew, const Input& from, size_t turn) : Bytes(size, skew) {
    if (from.size == 0) return;
    for (size_t done = 0, at = turn % from.size; done < size; at = 0) {
      const size_t count = std::min(size - done, from.size - at);
      std::memcpy(begin() + done, from.data + at, count);
      done += count;
    }
  }
  uint8_t* begin() { return memory_.data() + skew_; }
  const uint8_t* begin() const { return memory_.data() + skew_; }
  size_t size() const { return memory_.size() - skew_; }
  bool operator==(const Bytes& other) const {
    return size() == other.size() && (size() == 0 || std::memcmp(begin(), other.begin(), size()) == 0);
  }

 private:
  size_t skew_;
  std::vector<uint8_t> memory_;
};

using Floats = std::vector<float>;

bool same(const Floats& a, const Floats& b) {
  if (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0) return true;
  for (size_t i = 0; i < a.size(); ++i)
    if (std::memcmp(&a[i], &b[i], 4) != 0 && !(std::isnan(a[i]) && std::isnan(b[i]))) return false;
  return true;
}

// As numbers: a zero is a zero, whatever its sign.
bool equal(const Floats& a, const Floats& b) {
  for (size_t i = 0; i < a.size(); ++i)
    if (a[i] != b[i] && !(std::isnan(a[i]) && std::isnan(b[i]))) return false;
  return true;
}

bool all_finite(const Floats& values) {
  for (float value : values)
    if (!std::isfinite(value)) return false;
  return true;
}

Floats floats_of(const Input& in, size_t turn) {
  const Bytes bytes(in.numel * 4, 0, in, turn);
  Floats values(in.numel);
  if (in.numel > 0) std::memcpy(values.data(), bytes.begin(), bytes.size());
  return values;
}

// ---- operations --------------------------------------------------------------------------------------------------

Floats decoded(const PsqKernels& level, const PsqFormat& f, const Bytes& payload, Floats out, bool add) {
  const uint8_t* words = payload.begin() + 4 * scale_count(f, out.size());
  level.codec.decode({payload.begin(), words, out.data(), out.size(), f, add, PSQ_AHEAD});
  return out;
}

bool passes(const PsqKernels& level, const PsqFormat& f, const Bytes& payload, size_t numel) {
  if (f.family == PSQ_BF16) return level.codec.all_finite_bf16(payload.begin(), payload.size() / 2);
  return level.codec.all_finite_f32(payload.begin(), f.family == PSQ_FP32 ? numel : scale_count(f, numel));
}

bool is_bounded(const PsqFormat& f, const Bytes& payload, size_t numel) {
  for (size_t i = 0; i < scale_count(f, numel); ++i) {
    float scale;
    std::memcpy(&scale, payload.begin() + 4 * i, 4);
    if (!(std::fabs(scale) <= kMaxScale)) return false;
  }
  return true;
}

void check_topk(const PsqKernels& level, const Input& in, const Bytes& payload, const Floats& out, bool ascends) {
  const uint8_t* entries = payload.begin() + 4 * scale_count(in.format, in.numel);
  if (level.codec.topk_ascends(entries, in.numel, in.format) != ascends)
    fail("levels agree whether entries ascend", in.format, in.numel, level.name);
  const size_t keep = size_t(1) << in.format.parameter;
  for (size_t from = 0; from < in.numel; from += in.format.block) {
    size_t said = 0;
    for (size_t i = from; i < std::min(in.numel, from + in.format.block); ++i) said += out[i] != 0.0f;
    if (said > keep) fail("a topk block says at most k values", in.format, in.numel, level.name);
  }
}

void try_decode(const Input& in) {
  const size_t bytes = payload_bytes(in.format, in.numel);
  const Bytes payload(bytes < PSQ_FUZZ_SHORT ? bytes : bytes - PSQ_FUZZ_SHORT, in.skew, in, 0);
  const PsqKernels& first = *kLevels[0].kernels;
  const Floats out = decoded(first, in.format, payload, Floats(in.numel, 7.0f), false);
  const bool finite = passes(first, in.format, payload, in.numel);
  const bool ascends = in.format.family == PSQ_TOPK &&
                       first.codec.topk_ascends(payload.begin() + 4 * scale_count(in.format, in.numel), in.numel, in.format);
  if (finite && is_bounded(in.format, payload, in.numel) && !all_finite(out))
    fail("bounded scales decode to finite values", in.format, in.numel, first.name);
  for (const Level& level : kLevels) {
    if (!level.here) continue;
    const PsqKernels& kernels = *level.kernels;
    if (!same(decoded(kernels, in.format, payload, Floats(in.numel, 7.0f), false), out))
      fail("levels decode alike", in.format, in.numel, kernels.name);
    const Floats added = decoded(kernels, in.format, payload, Floats(in.numel, -0.0f), true);
    if (in.format.family == PSQ_TOPK ? !equal(added, out) : !same(added, out))  // topk leaves what it does not name
      fail("adding to -0 is decoding", in.format, in.numel, kernels.name);
    if (passes(kernels, in.format, payload, in.numel) != finite)
      fail("levels agree what is finite", in.format, in.numel, kernels.name);
    if (in.format.family == PSQ_TOPK) check_topk(kernels, in, payload, out, ascends);
  }
}

struct Encoded {
  Bytes payload;
  Floats residual;
  std::vector<uint16_t> half;
};

Encoded encoded(const PsqKernels& level, const Input& in) {
  Floats values = floats_of(in, 0);
  Encoded e = {Bytes(payload_bytes(in.format, in.numel), in.skew), floats_of(in, 5), std::vector<uint16_t>(in.numel)};
  for (size_t i = 0; i < in.numel; ++i) std::memcpy(&e.half[i], reinterpret_cast<uint8_t*>(&e.residual[i]) + 2, 2);
  void* residual = in.half ? static_cast<void*>(e.half.data()) : e.residual.data();
  level.codec.encode({values.data(), in.third ? residual : nullptr, e.payload.begin(),
                      e.payload.begin() + 4 * scale_count(in.format, in.numel), in.numel, in.format, 17u, in.third && in.half});
  return e;
}

void try_encode(const Input& in) {
  const Encoded first = encoded(*kLevels[0].kernels, in);
  for (const Level& level : kLevels) {
    if (!level.here || &level == kLevels) continue;
    const Encoded here = encoded(*level.kernels, in);
    if (!(here.payload == first.payload)) fail("levels encode alike", in.format, in.numel, level.kernels->name);
    if (!same(here.residual, first.residual) || here.half != first.half)
      fail("levels leave the same residual", in.format, in.numel, level.kernels->name);
  }
}

struct Served {
  Floats x, residual, m, v, vmax;
  Bytes answer;
};

Served served(const PsqKernels& level, const Input& in, std::vector<Bytes>& payloads, PsqAnswer answer, bool adam) {
  const size_t n = in.numel;
  Served s = {Floats(n, 0.0f), Floats(n, 0.25f), Floats(n, 0.0f), Floats(n, 0.0f), Floats(n, 0.0f),
              Bytes(answer == PSQ_NO_ANSWER ? 0 : payload_bytes(in.answer, n), in.skew)};
  std::vector<PsqPayload> regions;
  for (Bytes& payload : payloads)
    regions.push_back({payload.begin(), payload.begin() + 4 * scale_count(in.format, n)});
  const PsqAdamCoefficients coefficients = {0.9f, 0.99f, 0.01f, 0.1f, 1.0f, 0.0f, 1e-6f, 0.0f, 0.0f};
  Floats scratch(n);
  PsqServerStep step = {};
  step.payloads = regions.data();
  step.payload_count = regions.size();
  step.uplink = in.format;
  step.adam = adam ? &coefficients : nullptr;
  step.m = s.m.data();
  step.v = s.v.data();
  step.vmax = in.third ? s.vmax.data() : nullptr;
  step.x = s.x.data();
  step.residual = answer == PSQ_DELTA ? s.residual.data() : nullptr;
  step.answer = answer;
  step.downlink = in.answer;
  step.scales = s.answer.begin();
  step.words = s.answer.begin() + 4 * scale_count(in.answer, n);
  step.start = 23;
  step.scratch = scratch.data();
  step.numel = n;
  level.server.step(step);
  return s;
}

// What the sum of the payloads moves x = 0 to, by decoding one after another.
Floats moved(const PsqKernels& level, const Input& in, const std::vector<Bytes>& payloads) {
  Floats sum(in.numel, -0.0f);
  for (const Bytes& payload : payloads) sum = decoded(level, in.format, payload, sum, true);
  for (float& value : sum) value = 0.0f - value * (1.0f / float(payloads.size()));
  return sum;
}

void try_server(const Input& in, PsqAnswer answer, bool adam) {
  std::vector<Bytes> payloads;
  for (size_t i = 0; i < in.payload_count; ++i)
    payloads.emplace_back(payload_bytes(in.format, in.numel), (in.skew + i) % 8, in, 7 * i);
  const Served first = served(*kLevels[0].kernels, in, payloads, answer, adam);
  if (answer == PSQ_NO_ANSWER && !adam && !same(first.x, moved(*kLevels[0].kernels, in, payloads)))
    fail("the sum is that of decoded payloads", in.format, in.numel, kLevels[0].kernels->name);
  for (const Level& level : kLevels) {
    if (!level.here || &level == kLevels) continue;
    const Served here = served(*level.kernels, in, payloads, answer, adam);
    if (!same(here.x, first.x) || !same(here.residual, first.residual) || !same(here.m, first.m) ||
        !same(here.v, first.v) || !same(here.vmax, first.vmax))
      fail("levels move the weights alike", in.format, in.numel, level.kernels->name);
    if (!(here.answer == first.answer)) fail("levels answer alike", in.format, in.numel, level.kernels->name);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 6) return -1;
  Input in = {};
  in.format = formats()[data[0] % formats().size()];
  in.skew = data[1] & 7;
  in.third = data[1] & 8;
  in.half = data[1] & 16;
  in.operation = data[1] >> 5;
  in.numel = numel_of(data[2] | unsigned(data[3]) << 8);
  in.payload_count = data[4] < 0xf0 ? 1 + data[4] % 5 : 13;  // a server reads four at a time, and 12 in longer pieces
  in.answer = answers()[data[5] % answers().size()];
  in.data = data + 6;
  in.size = size - 6;
  switch (in.operation) {
    case 0:
    case 1:
    case 2:
    case 3:
      try_decode(in);
      break;
    case 4:
      try_encode(in);
      break;
    case 5:
      try_server(in, PSQ_NO_ANSWER, in.half);
      break;
    case 6:
      try_server(in, PSQ_WEIGHTS, in.half);
      break;
    default:
      try_server(in, PSQ_DELTA, in.half);
  }
  return 0;
}
