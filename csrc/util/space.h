// Scratch memory that vectors load from, its contents not defined.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>

namespace saccade {

// One large block is kept for the next call: the system clears the pages of a new one, which takes longer than to pack
// keys and values into it.
class Space {
 public:
  explicit Space(int64_t floats) {
    const int64_t need = floats + kAlign;
    if (need >= kKeepFrom) block_.reset(kept().exchange(nullptr));
    if (block_ == nullptr || block_->floats < need) {
      block_.reset();
      block_.reset(new Block(need));
    }
  }
  ~Space() {
    if (block_->floats >= kKeepFrom && block_->floats <= kKeepMost) block_.reset(kept().exchange(block_.release()));
  }
  Space(const Space&) = delete;
  Space& operator=(const Space&) = delete;

  // 64-byte aligned
  float* get() const {
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(block_->data.get()) + 63) & ~uintptr_t{63});
  }

 private:
  struct Block {
    explicit Block(int64_t n) : floats(n), data(new float[static_cast<size_t>(n)]) {}
    int64_t floats;
    std::unique_ptr<float[]> data;
  };
  static constexpr int64_t kAlign = 16, kKeepFrom = int64_t{1} << 18, kKeepMost = int64_t{1} << 24;  // 1 to 64 MiB

  static std::atomic<Block*>& kept() {
    static std::atomic<Block*> block{nullptr};
    return block;
  }

  std::unique_ptr<Block> block_;
};

}  // namespace saccade
