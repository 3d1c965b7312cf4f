#include "pool.h"

#include <algorithm>
#include <condition_variable>
#include <exception>
#include <list>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace talksplat {
namespace {

// One call of parallel_for. It lives on the caller's stack; `helpers` counts the workers that still look at it.
struct Batch {
  const std::function<void(int)>& task;
  int count, max_helpers;
  int next = 0, helpers = 0;
  std::exception_ptr error{};
  std::condition_variable finished{};
};

// Tasks are whole frames, milliseconds each: one lock for everything is never contended.
class Pool {
 public:
  void run(Batch& batch) {
    std::unique_lock lock(mutex_);
    try {
      while (int(workers_) < batch.max_helpers) start_worker();
    } catch (const std::system_error&) {  // the system has no more threads to give: those that are there do the work
    }
    batches_.push_back(&batch);
    if (batch.max_helpers > 1) wake_.notify_all();
    else wake_.notify_one();
    work(batch, lock);
    batches_.remove(&batch);
    batch.finished.wait(lock, [&] { return batch.helpers == 0; });
    if (batch.error) std::rethrow_exception(batch.error);
  }

 private:
  void start_worker() {  // they live as long as the process
    std::thread([this] {
      std::unique_lock lock(mutex_);
      for (;;) {
        Batch* batch = nullptr;
        wake_.wait(lock, [&] { return (batch = open_batch()) != nullptr; });
        batch->helpers++;
        work(*batch, lock);
        if (--batch->helpers == 0) batch->finished.notify_one();
      }
    }).detach();
    workers_++;
  }

  Batch* open_batch() {
    for (Batch* b : batches_)
      if (b->next < b->count && b->helpers < b->max_helpers) return b;
    return nullptr;
  }

  void work(Batch& batch, std::unique_lock<std::mutex>& lock) {
    while (batch.next < batch.count) {
      const int i = batch.next++;
      lock.unlock();
      std::exception_ptr error;
      try {
        batch.task(i);
      } catch (...) {
        error = std::current_exception();
      }
      lock.lock();
      if (error && !batch.error) batch.error = error, batch.next = batch.count;
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::list<Batch*> batches_;
  size_t workers_ = 0;
};

Pool* pool = nullptr;

Pool& shared_pool() {
  static const bool ready = [] {
    pool = new Pool;  // never destroyed: its detached threads outlive every static
#if defined(__linux__)
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });  // a child has none of its parent's threads
#endif
    return true;
  }();
  (void)ready;
  return *pool;
}

}  // namespace

int usable_cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1, int(std::thread::hardware_concurrency()));
}

void parallel_for(int count, int threads, const std::function<void(int)>& task) {
  const int helpers = std::min(count, threads) - 1;
  if (helpers <= 0) {
    for (int i = 0; i < count; i++) task(i);
    return;
  }
  Batch batch{task, count, helpers};
  shared_pool().run(batch);
}

}  // namespace talksplat
