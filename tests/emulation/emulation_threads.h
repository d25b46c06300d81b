// The threads of an emulated block: std::threads, or with SACCADE_EMULATION_FIBERS fibers that take turns wherever they
// wait for one another; included by cuda_emulation.h.
#pragma once

#ifndef SACCADE_EMULATION_FIBERS
#include <barrier>
#include <thread>

namespace saccade::emulation {

using Barrier = std::barrier<>;

inline void run_threads(int threads, const std::function<void(unsigned)>& body) {
  std::vector<std::thread> workers;
  for (int i = 0; i < threads; ++i) workers.emplace_back(body, i);
  for (auto& worker : workers) worker.join();
}

}  // namespace saccade::emulation

#else
#include <setjmp.h>
#include <ucontext.h>

namespace saccade::emulation {

struct Fiber {
  ucontext_t start;  // where it runs for the first time; later it goes on at `here`
  jmp_buf here;
  std::unique_ptr<char[]> stack;
  bool started = false, done = false;
};
inline std::vector<Fiber> fibers;
inline unsigned current_fiber = 0;
inline jmp_buf all_done;
inline const std::function<void(unsigned)>* fiber_body = nullptr;

// Goes on with the next fiber that is not done; comes back when it is this one's turn, never if it is done.
inline void next_fiber() {
  const unsigned count = static_cast<unsigned>(fibers.size()), me = current_fiber;
  unsigned next = (me + 1) % count;
  while (next != me && fibers[next].done) next = (next + 1) % count;
  if (next == me) {
    if (fibers[me].done) _longjmp(all_done, 1);
    return;
  }
  if (!fibers[me].done && _setjmp(fibers[me].here) != 0) return;
  current_fiber = next;
  threadIdx = dim3(next);
  if (fibers[next].started) _longjmp(fibers[next].here, 1);
  fibers[next].started = true;
  setcontext(&fibers[next].start);
}

inline void start_fiber() {
  (*fiber_body)(current_fiber);
  fibers[current_fiber].done = true;
  next_fiber();
}

class Barrier {
 public:
  explicit Barrier(unsigned count) : count_(count) {}

  void arrive_and_wait() {
    const unsigned round = round_;
    if (++arrived_ == count_) {
      arrived_ = 0;
      ++round_;
      return;
    }
    while (round == round_) next_fiber();
  }

 private:
  unsigned count_, arrived_ = 0, round_ = 0;
};

inline void run_threads(int threads, const std::function<void(unsigned)>& body) {
  constexpr size_t kStack = 256 * 1024;
  fiber_body = &body;
  fibers = std::vector<Fiber>(threads);
  for (Fiber& fiber : fibers) {
    fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, start_fiber, 0);
  }
  current_fiber = 0;
  if (_setjmp(all_done) == 0) {
    fibers[0].started = true;
    setcontext(&fibers[0].start);
  }
  fibers.clear();
}

}  // namespace saccade::emulation
#endif
