// Tasks on the threads of XLA's pool, and on the one that asks for them.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

namespace jaxnorm {

// Below this many elements, waking a thread costs more than it saves.
constexpr int64_t kAlone = 1 << 15;

// Runs task(0) to task(n - 1), each once. Several calls may wait on threads of the pool
// themselves, so none waits for what has not begun: the caller takes tasks, too, and
// waits only for those that another thread has taken. A thread that comes late finds no
// task left, and touches nothing but the counters, which it shares.
template <class Pool, class Task>
void parallel(Pool& pool, int64_t n, int64_t elements, const Task& task) {
  const int64_t threads = elements < kAlone ? 1 : std::min<int64_t>(pool.num_threads(), n);
  if (threads <= 1) {
    for (int64_t i = 0; i < n; ++i) task(i);
    return;
  }
  struct Shared {
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable all_done;
    int64_t done = 0;
  };
  auto shared = std::make_shared<Shared>();
  auto work = [shared, n, &task] {
    int64_t mine = 0;
    for (int64_t i; (i = shared->next.fetch_add(1)) < n; ++mine) task(i);
    if (!mine) return;
    std::lock_guard<std::mutex> lock(shared->mutex);
    shared->done += mine;
    if (shared->done == n) shared->all_done.notify_one();
  };
  for (int64_t t = 1; t < threads; ++t) pool.Schedule([work] { work(); });
  work();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->all_done.wait(lock, [&] { return shared->done == n; });
}

// The i-th of n parts of 0..size, as even as they can be.
struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};
inline Range part(int64_t size, int64_t n, int64_t i) {
  return {size * i / n, size * (i + 1) / n};
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace jaxnorm
