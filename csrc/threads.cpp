#include "threads.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace fewbit {
namespace {

struct Job {
  void (*task)(void*, int);
  void* context;
  int shares;
  std::atomic<int> next{0};
};

// Each thread takes shares until none is left, because a runtime may start fewer threads than requested.
void take(void* data) {
  Job& job = *static_cast<Job*>(data);
  for (int share; (share = job.next.fetch_add(1)) < job.shares;) job.task(job.context, share);
}

// The library's own threads, used if the process has no OpenMP runtime. They run one job at a time.
class Pool {
 public:
  void run(Job& job) {
    std::unique_lock<std::mutex> busy(one_at_a_time_, std::try_to_lock);
    if (!busy.owns_lock()) return take(&job);  // another thread of the caller is using them
    grow(job.shares - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      wanted_ = job.shares - 1;
      round_++;
    }
    wake_.notify_all();
    take(&job);
    std::unique_lock<std::mutex> lock(mutex_);
    wanted_ = 0;
    done_.wait(lock, [&] { return inside_ == 0; });
    job_ = nullptr;
  }

 private:
  void grow(int count) {
    while (int(threads_.size()) < count) {
      threads_.emplace_back([this] { work(); });
      threads_.back().detach();
    }
  }
  void work() {
    unsigned long seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return round_ != seen && wanted_ > 0; });
      seen = round_;
      wanted_--;
      inside_++;
      Job* job = job_;
      lock.unlock();
      take(job);
      lock.lock();
      if (--inside_ == 0) done_.notify_all();
    }
  }
  std::mutex one_at_a_time_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  Job* job_ = nullptr;
  int wanted_ = 0, inside_ = 0;
  unsigned long round_ = 0;
};

fewbit_parallel parallel_ = nullptr;

}  // namespace

void use_openmp(fewbit_parallel parallel) { parallel_ = parallel; }

void in_shares(int shares, void (*task)(void*, int), void* context) {
  if (shares <= 1) return task(context, 0);
  Job job;
  job.task = task, job.context = context, job.shares = shares;
  if (parallel_) return parallel_(take, &job, unsigned(shares), 0);
  static Pool* pool = new Pool;  // never destroyed: its threads may outlive static objects
  pool->run(job);
}

}  // namespace fewbit
