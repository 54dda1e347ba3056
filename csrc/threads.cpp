#include "threads.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

namespace fewbit {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::microseconds AWAKE{100};  // for so long a thread without work looks for more before it sleeps
// OpenMP's threads are late if the caller waits for them so long, and longer than it computed. If they are late twice
// within SOON, another program uses their cores, and the library's own threads serve for OWN.
constexpr std::chrono::milliseconds LATE{1}, SOON{100}, OWN{500};

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Looks again and again until `done()`, for AWAKE at most. Returns whether it is done.
template <class Done> bool looked(Done&& done) {
  const auto start = Clock::now();
  do {
    for (int i = 0; i < 32; i++, pause())
      if (done()) return true;
  } while (Clock::now() - start < AWAKE);
  return done();
}

struct Job {
  void (*task)(void*, int);
  void* context;
  int shares;
  std::atomic<int> next{0};
};

// Each thread takes shares until none is left, because a runtime may start fewer threads than requested.
void take(Job& job) {
  for (int share; (share = job.next.fetch_add(1)) < job.shares;) job.task(job.context, share);
}

// The library's own threads, which run one job at a time. A job never waits for a thread that has not begun with it: a
// thread whose core another program uses begins milliseconds later, and until then the others take its shares. On cores
// that are free they are slower than OpenMP's, because torch's operations in between leave OpenMP's threads awake.
class Pool {
 public:
  void run(Job& job) {
    if (busy_.test_and_set(std::memory_order_acquire)) return take(job);  // another thread of the caller uses them
    grow(job.shares - 1);
    job_ = &job;
    const uint64_t round = (state_.load() >> 32) + 1;
    state_.store(round << 32 | uint64_t(job.shares - 1) << 16);
    if (asleep_.load()) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    take(job);
    state_.fetch_and(~uint64_t(WANTED));
    const auto left = [&] { return !(state_.load() & INSIDE); };
    if (!looked(left)) {
      std::unique_lock<std::mutex> lock(mutex_);
      done_.wait(lock, left);
    }
    busy_.clear(std::memory_order_release);
  }

 private:
  // The state: the number of the job, how many more threads may begin with it, and how many have and have not ended.
  static constexpr uint64_t WANTED = 0xffff0000, ONE_WANTED = 0x10000, INSIDE = 0xffff;

  void grow(int count) {
    for (; threads_ < count; threads_++) try {
        std::thread([this] { work(); }).detach();
      } catch (const std::system_error&) {
        return;  // the system gives no more; those that there are take all shares
      }
  }
  bool enter() {
    uint64_t state = state_.load();
    while (state & WANTED)
      if (state_.compare_exchange_weak(state, state - ONE_WANTED + 1)) return true;
    return false;
  }
  void work() {
    for (uint64_t seen = 0;;) {
      const auto other = [&] { return state_.load() >> 32 != seen; };
      if (!looked(other)) {
        std::unique_lock<std::mutex> lock(mutex_);
        asleep_++;
        wake_.wait(lock, other);
        asleep_--;
      }
      seen = state_.load() >> 32;
      if (!enter()) continue;
      take(*job_);
      if (!((state_.fetch_sub(1) - 1) & (WANTED | INSIDE))) {  // the caller may sleep until all have ended
        std::lock_guard<std::mutex> lock(mutex_);
        done_.notify_all();
      }
    }
  }

  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
  std::atomic<uint64_t> state_{0};
  std::atomic<int> asleep_{0};
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  int threads_ = 0;
  Job* job_ = nullptr;
};

fewbit_parallel parallel_ = nullptr;
std::atomic<Clock::rep> late_{0}, own_{0};  // when OpenMP's threads were late last, and until when the own threads serve

struct Shared {
  Job& job;
  std::thread::id caller;
  Clock::time_point ended;  // when the caller had no shares left
};

void take_shared(void* data) {
  Shared& shared = *static_cast<Shared*>(data);
  take(shared.job);
  if (std::this_thread::get_id() == shared.caller) shared.ended = Clock::now();
}

// Runs a job on OpenMP's threads. All of them must begin and end, also one that gets no core for milliseconds.
void by_openmp(Job& job, Clock::time_point start) {
  Shared shared{job, std::this_thread::get_id(), start};
  parallel_(take_shared, &shared, unsigned(job.shares), 0);
  const auto now = Clock::now();
  if (now - shared.ended < LATE || now - shared.ended < shared.ended - start) return;
  const Clock::duration before{late_.exchange(now.time_since_epoch().count())};
  if (now.time_since_epoch() - before < SOON) own_ = (now + OWN).time_since_epoch().count();
}

}  // namespace

void use_openmp(fewbit_parallel parallel) { parallel_ = parallel; }

void in_shares(int shares, void (*task)(void*, int), void* context) {
  if (shares <= 1) return task(context, 0);
  Job job;
  job.task = task, job.context = context, job.shares = shares;
  const auto now = Clock::now();
  if (parallel_ && now.time_since_epoch().count() >= own_) return by_openmp(job, now);
  static Pool* pool = new Pool;  // never destroyed: its threads may outlive static objects
  pool->run(job);
}

}  // namespace fewbit
