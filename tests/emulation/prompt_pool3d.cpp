// prompt_pool3d on the CPU, from the very sources that nvcc compiles: a shared library for ctypes, and a program that
// ThreadSanitizer can watch.
#include "../../kernels/cuda/prompt_pool3d.cu"

#include "pool_problem.h"

extern "C" const char* emulated_prompt_pool3d(const saccade::PromptPoolArgs* args) {
  return saccade::prompt_pool3d_cuda(*args, nullptr);
}

int main() {
  using namespace saccade;
  for (auto memory : emulation::kRowMemory) {
    for (auto [kernel, stride] : emulation::kWindows) {
      emulation::PoolProblem problem(memory, kernel, stride);
      auto y = emulation::values(problem.windows() * memory.width, memory.skew);
      problem.args.y = y.data() + memory.skew;
      if (const char* error = prompt_pool3d_cuda(problem.args, nullptr)) return std::puts(error), 2;
    }
  }
  return 0;
}
