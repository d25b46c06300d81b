// The gradient of prompt_pool3d on the CPU, from the very sources that nvcc compiles: a shared library for ctypes, and
// a program that ThreadSanitizer can watch.
#include "../../kernels/cuda/prompt_pool3d_bwd.cu"

#include "pool_problem.h"

extern "C" const char* emulated_prompt_pool3d_bwd(const saccade::PromptPoolGradArgs* args) {
  return saccade::prompt_pool3d_bwd_cuda(*args, nullptr);
}

extern "C" int64_t emulated_prompt_pool3d_bwd_workspace(const saccade::PromptPoolGradArgs* args) {
  return saccade::prompt_pool3d_bwd_workspace_cuda(*args);
}

int main() {
  using namespace saccade;
  for (auto memory : emulation::kRowMemory) {
    emulation::PoolProblem problem(memory, /*kernel=*/3, /*stride=*/2);
    auto dy = emulation::values(problem.windows() * memory.width, memory.skew);
    std::vector<uint16_t> dx(problem.x.size());
    std::vector<float> dweights(problem.weights.size());
    PromptPoolGradArgs args;
    args.pool = problem.args;
    args.dy = dy.data() + memory.skew;
    args.dx = dx.data() + memory.skew;
    args.dweights = dweights.data();
    std::vector<float> workspace(prompt_pool3d_bwd_workspace_cuda(args) / 4);
    args.workspace = workspace.data();
    if (const char* error = prompt_pool3d_bwd_cuda(args, nullptr)) return std::puts(error), 2;
  }
  return 0;
}
