// What the entry points share: equal shares for threads, types of activations, reused memory.
#pragma once
#include <stdlib.h>
#include <string.h>

#include "fewbit.h"
#include "threads.h"

namespace {

template <class Task> void share(int64_t count, int64_t least, int threads, Task&& task) {
  int64_t shares = threads < 1 ? 1 : threads;
  if (shares > count / least) shares = count / least > 0 ? count / least : 1;
  struct Context {
    Task& task;
    int64_t count, shares;
  } context{task, count, shares};
  fewbit::in_shares(
      int(shares),
      [](void* data, int i) {
        Context& c = *static_cast<Context*>(data);
        c.task(c.count * i / c.shares, c.count * (i + 1) / c.shares);
      },
      &context);
}

inline bool is_type(int type) { return type == FEWBIT_FLOAT32 || type == FEWBIT_BFLOAT16 || type == FEWBIT_FLOAT16; }
inline int64_t size_of(int type) { return type == FEWBIT_FLOAT32 ? 4 : 2; }

// 64-byte aligned memory that a thread reuses between calls.
struct Memory {
  char* begin = nullptr;
  size_t size = 0;
  ~Memory() { free(begin); }
  char* take(size_t bytes) {
    if (bytes > size) {
      free(begin);
      size = (bytes + 4095) / 4096 * 4096;
      begin = static_cast<char*>(aligned_alloc(64, size));
      if (!begin) size = 0;
    }
    return begin;
  }
};

}  // namespace
