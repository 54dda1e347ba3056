// What the entry points share: equal shares for threads, conversion of bfloat16, reused memory.
#pragma once
#include <stdlib.h>
#include <string.h>

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

// bfloat16 is the upper half of float32.
void widen(const uint16_t* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    const uint32_t bits = uint32_t(from[i]) << 16;
    memcpy(to + i, &bits, 4);
  }
}

// Rounds to nearest, ties to even. NaN stays NaN.
void narrowed(const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits;
    memcpy(&bits, from + i, 4);
    const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    to[i] = uint16_t(nan ? bits >> 16 | 0x40 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }
}

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
