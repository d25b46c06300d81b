// Defines every op of the one schema table, and tells what this binary is.
#include "cpu/kernels.h"
#include "util/torch.h"

STABLE_TORCH_LIBRARY(saccade, m) {
#define OP(schema) m.def(schema);
#include "_schemas.inc"
#undef OP
}

namespace {
constexpr int kSchemas = 0
#define OP(schema) +1
#include "_schemas.inc"
#undef OP
    ;
}  // namespace

#define SACCADE_TEXT_(x) #x
#define SACCADE_TEXT(x) SACCADE_TEXT_(x)

// JSON, read through ctypes: no Python headers, so one binary serves every Python.
extern "C" __attribute__((visibility("default"))) const char* saccade_build_info() {
  static const std::string text = std::string("{\"schemas\": \"") + std::to_string(kSchemas) +
                                  "\", \"cuda_architectures\": \"" SACCADE_CUDA_ARCHS_BUILT
                                  "\", \"cuda\": \"" SACCADE_CUDA_VERSION "\", \"compiler\": \"" __VERSION__
                                  "\", \"minimum_torch\": \"2.10\", \"cpu\": \"" +
                                  saccade::cpu::kernels(saccade::Dtype::kFloat32).name + "\"}";
  return text.c_str();
}
