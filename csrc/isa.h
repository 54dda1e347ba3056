// The functions of each instruction set, for dispatch.cpp. Files that are compiled for one instruction set must not include
// inline code that the linker could share with another, such as standard containers.
#pragma once
#include "fewbit.h"

namespace fewbit {

// Attention of the heads of one token that share keys and values: see `attend` of `Isa`.
struct Attention {
  const void *keys, *values;  // of the first token; the next one is `step` numbers further
  const int64_t* slots;     // where each token is, in steps [length]; null: one after the other
  int64_t step, length, head, group;
  int type;  // of keys and values: of `fewbit_type`
  float scale, cap;
  const uint8_t* allowed;  // [length], 0 hides a key; null: all are allowed
  const float* added;      // [length], added to the scores; null: nothing
  const float* sinks;      // [group], scores of no key; null: none
};

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
  // Reads n numbers of a type of `fewbit_type`, and writes such numbers, rounded to nearest, ties to even.
  void (*read)(const void* from, int type, int64_t n, float* out);
  void (*write)(const float* x, int type, int64_t n, void* to);
  // out [k] = norm(x). x and out may be the same.
  void (*norm)(const float* x, int64_t k, const fewbit_norm&, float* out);
  // out [n] = activation(a) · b, or activation(a) if b is null; `kind` is of `fewbit_activation`. out may be a.
  void (*gate)(const float* a, const float* b, int64_t n, int kind, float* out);
  // Rotates x [n] in place; `pairs` is of `fewbit_pairs`.
  void (*rotate)(float* x, int64_t n, const float* cosine, const float* sine, int pairs);
  // q and out: [group, head]. Scratch memory: `scores` [group, length].
  void (*attend)(const Attention&, const float* q, float* out, float* scores);
  // What `fewbit_vectors` asks for, of the rows [begin, end).
  void (*vectors)(const fewbit_vectors&, int64_t begin, int64_t end);
};

const Isa& in_use();  // the instruction set that is in use

extern const Isa isa_scalar;
#if defined(__x86_64__) || defined(_M_X64)
extern const Isa isa_avx2, isa_avxvnni, isa_avx512, isa_avx512vbmi;
#endif
#if defined(__aarch64__)
extern const Isa isa_neon, isa_neondot;
#endif

}  // namespace fewbit
