// block_pool on the CPU, from the very sources that nvcc compiles: a shared library for ctypes, and a program that
// ThreadSanitizer can watch.
#include "../../kernels/cuda/block_pool.cu"

#include "problem.h"

extern "C" const char* emulated_block_pool(const saccade::BlockPoolArgs* args) {
  return saccade::block_pool_cuda(*args, nullptr);
}

int main() {
  std::vector<uint16_t> x(2 * 40 * 72 + 1, 0x3c00);
  std::vector<float> out(2 * 3 * 72);
  saccade::BlockPoolArgs args;
  args.x_stride[1] = 40 * 72;
  args.x_stride[2] = 72;
  args.batch = 1;
  args.heads = 2;
  args.tokens = 40;
  args.head_dim = 72;
  args.block = 16;
  args.blocks = 3;
  args.dtype = saccade::Dtype::kFloat16;
  args.out = out.data();
  for (int skew = 0; skew < 2; ++skew) {
    args.x = x.data() + skew;
    if (const char* error = saccade::block_pool_cuda(args, nullptr)) return std::puts(error), 2;
  }
  return 0;
}
