// Calls of `parallel` from all threads of a pool at once, for ThreadSanitizer:
//
//   g++ -std=c++17 -O1 -g -fsanitize=thread -I.. threads.cc -o threads && ./threads
//
// Prints "as alone" if each call finds, bit for bit, what one thread alone finds.

#include <cstdio>
#include <deque>
#include <functional>
#include <thread>

#include "columns.h"

using namespace jaxnorm;

// What XLA's pool offers, on threads of our own.
class Pool {
 public:
  explicit Pool(int threads) {
    for (int t = 0; t < threads; ++t) threads_.emplace_back([this] { run(); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      over_ = true;
    }
    more_.notify_all();
    for (std::thread& t : threads_) t.join();
  }
  int64_t num_threads() const { return threads_.size(); }
  void Schedule(std::function<void()> work) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      queue_.push_back(std::move(work));
    }
    more_.notify_one();
  }

 private:
  void run() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      more_.wait(lock, [this] { return over_ || !queue_.empty(); });
      if (queue_.empty()) return;
      auto work = std::move(queue_.front());
      queue_.pop_front();
      lock.unlock();
      work();
      lock.lock();
    }
  }
  std::mutex mutex_;
  std::condition_variable more_;
  std::deque<std::function<void()>> queue_;
  bool over_ = false;
  std::vector<std::thread> threads_;
};

template <class P>
std::vector<double> moments(P& pool, const View& v, const std::vector<float>& x) {
  const Tasks tasks(v);
  std::vector<double> means(tasks.lengths() * v.sets()), squares(means.size());
  parallel(pool, tasks.count(), v.size(), [&](int64_t i) {
    const Task task = tasks[i];
    const int64_t at = task.index * v.sets() + task.outer * v.kept + task.channels.begin;
    column_moments(v, x.data(), task, true, {&means[at], &squares[at]});
  });
  means.insert(means.end(), squares.begin(), squares.end());
  return means;
}

struct Alone {
  int64_t num_threads() const { return 1; }
  void Schedule(const std::function<void()>&) {}
};

int main() {
  const View v{2, 3000, 37, 1};
  std::vector<float> x(v.size());
  for (size_t i = 0; i < x.size(); ++i) x[i] = float(i * 7919 % 1009) / 100;
  Alone alone;
  const std::vector<double> expected = moments(alone, v, x);
  std::atomic<int> calls{0}, same{0};
  {
    Pool pool(4);
    for (int i = 0; i < 200; ++i)
      pool.Schedule([&] { same += moments(pool, v, x) == expected, ++calls; });
    while (calls < 200) std::this_thread::yield();
  }
  std::puts(same == 200 ? "as alone" : "not as alone");
  return same != 200;
}
