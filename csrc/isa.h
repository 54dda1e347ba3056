// The functions of each instruction set, for dispatch.cpp. Files that are compiled for one instruction set must not include
// inline code that the linker could share with another, such as standard containers.
#pragma once
#include "fewbit.h"

namespace fewbit {

struct Isa {
  const char* name;
  int64_t (*columns)(const fewbit_weight&);
  // Bytes that `round` writes for one row of activations.
  int64_t (*rounded_bytes)(const fewbit_weight&);
  // Rounds x [k] to 8 bits and arranges it. Scratch memory: `codes` has k, rounded up to a multiple of 256, entries;
  // `scales` has a 32nd of that.
  void (*round)(const fewbit_weight&, const float* x, int8_t* codes, float* scales, char* out);
  // Writes y[i * n + row] for W's rows [begin, end) and each row i of m rows of rounded activations.
  void (*linear)(const fewbit_weight&, const char* rounded, int64_t m, float* y, int64_t begin, int64_t end);
  void (*decode)(const fewbit_weight&, int64_t begin, int64_t end, float* out);
  void (*arrange)(const fewbit_weight&, const float* x, float* out);
  // `top` and `codes`, or `lost`, of the bands [begin, end).
  void (*fp8_codes)(const fewbit_fp8&, int64_t begin, int64_t end);
  void (*fp8_lost)(const fewbit_fp8&, int64_t begin, int64_t end);
};

extern const Isa isa_scalar;
#if defined(__x86_64__) || defined(_M_X64)
extern const Isa isa_avx2, isa_avxvnni, isa_avx512;
#endif
#if defined(__aarch64__)
extern const Isa isa_neon, isa_neondot;
#endif

}  // namespace fewbit
