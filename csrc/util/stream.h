// The one place that knows how torch hands out its CUDA stream.
#pragma once
#include <cstdint>

#include "torch.h"

// Lives in libtorch_cuda. Declared weak so that the library loads in a torch without CUDA; it resolves only because the
// library is linked with --no-as-needed against the umbrella `libtorch`, Python loading libtorch with RTLD_LOCAL.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace saccade {

inline void* current_cuda_stream(int32_t device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "saccade: a CUDA kernel was called, but this torch has no CUDA stream");
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0, "saccade: torch gave no CUDA stream");
  return stream;
}

}  // namespace saccade
