// Defines every op of the one schema table, and tells what this binary is.
#include "cpu/kernels.h"
#include "util/torch.h"

STABLE_TORCH_LIBRARY(saccade, m) {
#define OP(schema) m.def(schema);
#include "_schemas.inc"
#undef OP
}

// JSON, read through ctypes: no Python headers, so one binary serves every Python.
extern "C" __attribute__((visibility("default"))) const char* saccade_build_info() {
  static const std::string text = std::string() +
                                  "{\"cuda_architectures\": \"" SACCADE_CUDA_ARCHS_BUILT
                                  "\", \"cuda\": \"" SACCADE_CUDA_VERSION "\", \"compiler\": \"" __VERSION__
                                  "\", \"minimum_torch\": \"2.10\", \"cpu\": \"" +
                                  saccade::cpu::kernels(saccade::Dtype::kFloat32).name + "\"}";
  return text.c_str();
}
