#include "pool.hpp"

#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace fastshift::cpu {
namespace {

// A thread that has nothing to do looks for work this long before it sleeps: small blocks would else
// spend a good part of their time on waking it.
constexpr std::chrono::microseconds kSpin{40};

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Cores that this process may run on; a limit on its time, as containers have, does not show in it.
int cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  return static_cast<int>(std::thread::hardware_concurrency());
}

// Whether `done` came true within that time.
template <class Done>
bool spin(const Done& done) {
  const auto stop = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (done()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < stop);
  return false;
}

class Pool {
 public:
  void run(int count, int threads, const std::function<void(int)>& task) {
    const std::lock_guard<std::mutex> one_caller(caller_);
    bool wakes = false;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < threads - 1) {
        const int index = static_cast<int>(workers_.size());
        workers_.emplace_back([this, index, seen = round_.load()] { work(index, seen); });
      }
      task_ = &task;
      count_ = count;
      next_.store(0);
      wanted_.store(threads - 1);
      busy_.store(threads - 1);
      ++round_;
      wakes = sleeping_ > 0;
    }
    if (wakes) start_.notify_all();
    take();
    if (spins()) spin([this] { return busy_.load() == 0; });
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_.load() == 0; });
    if (const std::exception_ptr error = std::exchange(error_, nullptr)) {
      std::rethrow_exception(error);
    }
  }

 private:
  void take() {
    try {
      for (int index = next_++; index < count_; index = next_++) (*task_)(index);
    } catch (...) {
      // The caller gets the first; what is left of the work is not begun.
      next_.store(count_);
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }

  void work(int index, long seen) {
    for (bool wanted = true;;) {
      const auto begins = [&] { return round_.load() != seen; };
      if (wanted && spins()) spin(begins);
      {
        std::unique_lock<std::mutex> lock(mutex_);
        ++sleeping_;
        start_.wait(lock, begins);
        --sleeping_;
        seen = round_.load();
        wanted = index < wanted_.load();
        if (!wanted) continue;
      }
      take();
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (--busy_ == 0) done_.notify_one();
      }
    }
  }

  // Where a call's threads have to share cores, one that looks for work keeps another from it.
  bool spins() const { return wanted_.load() < cores_; }

  std::mutex caller_, mutex_;
  std::condition_variable start_, done_;
  std::vector<std::thread> workers_;
  const std::function<void(int)>* task_ = nullptr;
  std::atomic<int> next_{0}, wanted_{0}, busy_{0};
  const int cores_ = cores();
  int count_ = 0, sleeping_ = 0;
  std::atomic<long> round_{0};
  std::exception_ptr error_;
};

// Never destroyed: its threads wait until the process ends, and are not there in a forked child.
// No lock: one that another thread held while this process forked would stay taken.
Pool& pool() {
  struct Owned {
    pid_t owner;
    Pool pool;
  };
  static std::atomic<Owned*> instance{nullptr};
  Owned* found = instance.load();
  const pid_t self = getpid();
  while (!found || found->owner != self) {
    Owned* const made = new Owned{self, {}};
    if (instance.compare_exchange_strong(found, made)) return made->pool;
    delete made;  // of another thread: it has no workers yet
  }
  return found->pool;
}

}  // namespace

void parallel(int count, int threads, const std::function<void(int)>& task) {
  if (threads > count) threads = count;
  if (threads <= 1) {
    for (int index = 0; index < count; ++index) task(index);
  } else {
    pool().run(count, threads, task);
  }
}

}  // namespace fastshift::cpu
