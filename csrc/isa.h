// What each instruction set offers to dispatch.cpp. Files compiled for one may include nothing with inline code that
// another could end up calling: no standard containers.
#pragma once
#include "fewbit.h"

namespace fewbit {

struct Isa {
  const char* name;
  int64_t (*columns)(const fewbit_weight&);
  // Bytes that `round` writes for one row of activations.
  int64_t (*rounded_bytes)(const fewbit_weight&);
  // x [k] to 8 bits, arranged; `scratch` holds k rounded up to a multiple of 256, and as many floats / 32.
  void (*round)(const fewbit_weight&, const float* x, int8_t* codes, float* scales, char* out);
  // y[i * stride + row] of rows [begin, end) for m rows of rounded activations.
  void (*linear)(const fewbit_weight&, const char* rounded, int64_t m, float* y, int64_t begin, int64_t end);
  void (*decode)(const fewbit_weight&, int64_t begin, int64_t end, float* out);
  void (*arrange)(const fewbit_weight&, const float* x, float* out);
};

extern const Isa isa_scalar;
#if defined(__x86_64__) || defined(_M_X64)
extern const Isa isa_avx2, isa_avxvnni, isa_avx512;
#endif
#if defined(__aarch64__)
extern const Isa isa_neon;
#endif

}  // namespace fewbit
