// Runs a CUDA launcher on the tensor's device and stream, and turns its error text into an exception.
#pragma once
#include "stream.h"

namespace saccade {

template <class Launcher, class... Args>
void call_cuda(const Tensor& on, const char* op, Launcher&& launch, const Args&... args) {
  const int32_t device = on.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  const char* error = launch(args..., current_cuda_stream(device));
  STD_TORCH_CHECK(error == nullptr, "saccade: the CUDA launch of ", op, " failed: ", error == nullptr ? "" : error);
}

}  // namespace saccade
