// Codec kernels over vec.inl's 16-lane rows.

namespace {
const PsqCodecKernels codec_kernels = {nullptr, nullptr, nullptr, nullptr};
}  // namespace
