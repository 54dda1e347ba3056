// The C ABI of fewbit's CPU library: everything that Python uses through ctypes.
#pragma once
#include <stdint.h>

#ifdef _WIN32
#define FEWBIT_API __declspec(dllexport)
#else
#define FEWBIT_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

// The layout of a weight's parts. The numbers are part of the ABI.
enum fewbit_kind {
  FEWBIT_AFFINE = 0,  // codes (bit stream by row), scale fp16 [N, G], zero (bit stream by row; absent: symmetric)
  FEWBIT_INT8 = 1,    // codes int8 [N, K], scb float32 [N]; w = q * scb / 127
  FEWBIT_LEVELS = 2,  // codes (two to a byte, high nibble first), scale float32 [N K / group], levels float32 [16]
  FEWBIT_LEVELS_DOUBLE = 3,  // codes, absmax uint8, nested float32, offset float32 [1], map float32 [256], levels
  FEWBIT_FP8 = 4,    // codes e4m3 [N, K], scale float32 [ceil(N / bits), ceil(K / group)]
  FEWBIT_MXFP4 = 5,  // codes (two to a byte, low nibble first), scale e8m0 [N, K / 32]
  FEWBIT_NVFP4 = 6,  // codes as MXFP4, scale e4m3 [N, K / 16], global float32 [N]
  FEWBIT_F16 = 7,    // float16 [N, K], not quantized
  FEWBIT_BF16 = 8,   // bfloat16 [N, K], not quantized
  FEWBIT_Q4_0 = 16,
  FEWBIT_Q4_1,
  FEWBIT_Q5_0,
  FEWBIT_Q5_1,
  FEWBIT_Q8_0,
  FEWBIT_Q2_K,
  FEWBIT_Q3_K,
  FEWBIT_Q4_K,
  FEWBIT_Q5_K,
  FEWBIT_Q6_K,
  FEWBIT_IQ4_NL,
  FEWBIT_IQ4_XS,
  FEWBIT_IQ2_XXS,  // blocks, then the codebook of fewbit/kernels/cpu/kernel.py; so the next six
  FEWBIT_IQ2_XS,
  FEWBIT_IQ2_S,
  FEWBIT_IQ3_XXS,
  FEWBIT_IQ3_S,
  FEWBIT_IQ1_S,
  FEWBIT_IQ1_M,
  FEWBIT_TQ1_0,
  FEWBIT_TQ2_0,
  FEWBIT_Q1_0,
  FEWBIT_Q2_0,
};

// A packed weight [n, k]. `part` points to its parts in the order above; `bytes` has their sizes.
struct fewbit_weight {
  int32_t kind;
  int32_t bits;   // affine: bits per code. FP8: rows that share a scale. NVFP4: 1 if the global scale divides, else 0
  int64_t group;  // columns that share a scale, affine, levels and FP8 only; k if the whole row shares one
  int64_t n, k;
  const void* part[6];
  int64_t bytes[6];
};

// Error codes; 0 means success.
enum fewbit_status { FEWBIT_OK = 0, FEWBIT_UNKNOWN = 1, FEWBIT_SHAPE = 2, FEWBIT_SHORT = 3, FEWBIT_MEMORY = 4 };

// Types of activations. The numbers are part of the ABI.
enum fewbit_type { FEWBIT_FLOAT32 = 0, FEWBIT_BFLOAT16 = 1, FEWBIT_FLOAT16 = 2 };

// A weight w [n, k], FP8 codes [n, k], and one scale for each block of `rows` x `columns`; the last blocks may be smaller.
// `top`: the largest magnitude of each block. `lost`: three sums for each band of `rows` rows.
struct fewbit_fp8 {
  int32_t type;  // of w: float32 or bfloat16
  int64_t n, k, rows, columns;
  const void* w;
  uint8_t* codes;
  const float* scale;
  float* top;
  double* lost;
};

// Vectors x [rows, vectors, halves * columns] of a weight, and the codebook [entries, columns] that encodes each half of
// one. With importances h >= 0, the error of entry g at scale s is s² sum h g² - 2 s sum h |x| g, up to a constant.
// `even`: the number of minus signs of a vector is even; where that of x is not, one sign is flipped, the one that
// costs least. Outputs may be null. `least`: the least error at each scale. The others are of the best vectors at the
// first scale: sums of h g² and h x g; and codes, from the lowest signed magnitude up. With `metric`, the codes have a
// small (w - x) metric (w - x)ᵀ, chosen among the vectors that are nearest under its diagonal, which is `h`; there are
// no sums then.
enum { FEWBIT_MOST_ENTRIES = 1024, FEWBIT_MOST_TRIES = 64 };  // entries of all halves of a vector
struct fewbit_vectors {
  int32_t entries;       // a multiple of 64
  int32_t columns, halves, even, magnitudes;
  int32_t tries;         // scales, 1 to 64
  int64_t rows, vectors;
  const float* grid;     // [columns, entries], magnitudes
  const uint8_t* ranks;  // [entries, columns], of these magnitudes
  const float *x, *h;    // h: [rows or 1, vectors, halves * columns]
  int64_t step;          // numbers between the rows of h: 0 if there is one
  const float* s;        // [tries, rows, vectors]
  const float* metric;   // [halves * columns, halves * columns]; null: none
  float* least;          // [tries, rows, vectors]
  float *square, *cross;  // [rows, vectors], both or none; none with `metric`
  uint8_t* codes;        // [rows, vectors, halves * columns]
};

// silu; gelu with tanh; gelu; relu; relu²; x · sigmoid(1.702 x).
enum fewbit_activation {
  FEWBIT_SILU = 0,
  FEWBIT_TANH = 1,
  FEWBIT_ERF = 2,
  FEWBIT_RELU = 3,
  FEWBIT_RELU2 = 4,
  FEWBIT_QUICK = 5,
};

// Which values of a head are rotated together, and by which angle: value i and the one half a head further; neighbours,
// whose angles are beside each other too; neighbours by the angles 0, 1, 2, ...
enum fewbit_pairs { FEWBIT_HALVES = 0, FEWBIT_NEIGHBORS = 1, FEWBIT_IN_ORDER = 2 };

// Rows of one of a block's four products: x wᵀ + bias. Null bias: none. order: the columns of x in w's order; null: as
// they are.
struct fewbit_rows {
  const struct fewbit_weight* w;
  const float* bias;
  const int64_t* order;
};

// Weight [k], bias [k]; null: no bias. centered: a layer norm, (x - mean) / sqrt(var + eps) · weight + bias; else an RMS
// norm, x / sqrt(mean(x²) + eps) · weight + bias.
struct fewbit_norm {
  const float *weight, *bias;
  float eps;
  int32_t centered;
};

// A decoder block: h = x + residual · after_attention(output(attention(before_attention(x)))), then
// y = h + residual · after_mlp(down(activation(gate) · up of before_mlp(h))). A norm without weight is none. Without
// products of gate, up and down, y = h.
struct fewbit_block {
  int32_t type;  // of x, y, keys and values
  int32_t activation, pairs;
  int32_t whole;      // the norms of q and k are over all heads, else over each
  int32_t late;       // q and k are normed after they are rotated
  int32_t mixed;      // columns of q, k, v: by the heads of k, each with its heads of q before it and its v behind it
  int32_t parallel;   // the MLP reads x, as attention does: its input is before_mlp(x)
  int32_t plain;      // the MLP has no gate: down(activation(up))
  int32_t together;   // gate and up are columns of the product of q, k, v, behind these; with `parallel`, of one norm
  int32_t counts[4];  // of `products`: of q, k, v; output; gate, up; down. Gate and up, or all of q, k, v, may be one
  int64_t width, inner, heads, shared, head, rotated;
  float scale, cap, residual;  // of attention's scores; they are cap · tanh(s / cap), 0: no cap
  struct fewbit_norm norm[6];  // before attention, after it, before the MLP, after it, of q, of k
  const float* sinks;          // [heads], scores of no key, for the softmax alone; null: none
  struct fewbit_rows products[4][3];
};

// Where a cache in pages keeps the tokens of many texts. Keys (values) of a slot are [shared, head], and slots are `step`
// numbers apart. New token i is written to slot write[i], and sees slots read[begin[i]] to read[begin[i] + count[i] - 1],
// which include its own. `most` is the largest count. The caller checks that all slots exist.
struct fewbit_pages {
  const int64_t *write, *read, *begin, *count;
  int64_t step, most;
};

// One call of a block: `batch` texts with `tokens` new tokens each. Keys and values [batch, shared, length, head] have
// `filled` tokens; those of the new ones are written behind them. With `pages`, the new tokens of all texts are one text
// of the batch, without a mask, and `filled` and `length` mean nothing.
struct fewbit_call {
  const void* x;  // [batch, tokens, width]
  void* y;
  int64_t batch, tokens, filled, length;
  const float *cosine, *sine;  // [batch or 1, tokens, rotated]
  int64_t turn;                // numbers between the texts of cosine: 0 if they share it
  void *keys, *values;
  const uint8_t* allowed;  // [batch, tokens, filled + tokens], see `row` and `text`; null: all earlier tokens
  const float* added;      // the same with numbers that are added to the scores
  int64_t text, row;       // numbers between the texts, and between the tokens, of the mask
  const struct fewbit_pages* pages;  // null: keys and values are in order
};

// GNU OpenMP's entry to a parallel region (GOMP_parallel). LLVM's runtime has it too.
typedef void (*fewbit_parallel)(void (*task)(void*), void* data, unsigned threads, unsigned flags);

FEWBIT_API int fewbit_abi(void);
// Name of the instruction set in use: the best that the CPU supports, at most the one that FEWBIT_CPU_ISA names.
FEWBIT_API const char* fewbit_isa(void);
// Use the instruction set of that name from now on (null: the best). FEWBIT_UNKNOWN if the CPU does not support it.
FEWBIT_API int fewbit_force(const char* name);
// Use the threads of the caller's OpenMP runtime; `parallel` is its GOMP_parallel.
FEWBIT_API void fewbit_use_openmp(fewbit_parallel parallel);
// Number of columns of an arranged row, padding included; if negative, -fewbit_status.
FEWBIT_API int64_t fewbit_columns(const struct fewbit_weight* w);
// y [m, n] = x [m, k] Wᵀ, both of type `type`. x is rounded to 8 bits in groups of 32 columns (not for levels and
// floats). The result for a row of x does not depend on the other rows, nor on the number of threads.
FEWBIT_API int fewbit_linear(const struct fewbit_weight* w, const void* x, int64_t m, void* y, int type, int threads);
// The same for many weights of one layout and shape, in one call: rows [begin[e], end[e]) of x times the transpose of
// w[e], for each of `count` weights. These ranges must not overlap; other rows of y are not written. x has m rows.
FEWBIT_API int fewbit_grouped(const struct fewbit_weight* w, int64_t count, const int64_t* begin, const int64_t* end,
                              const void* x, int64_t m, void* y, int type, int threads);
// Rows [begin, end) of W decoded to float32 [end - begin, columns], in the kernel's column order.
FEWBIT_API int fewbit_decode(const struct fewbit_weight* w, int64_t begin, int64_t end, float* out, int threads);
// x [m, k] as [m, columns] in the kernel's column order, padded with zeros. Its product with decoded rows is x Wᵀ.
FEWBIT_API int fewbit_arrange(const struct fewbit_weight* w, const float* x, int64_t m, float* out, int threads);

// Writes `top`, and the `codes` of w divided by top / 448 (at least 2^-126; 1 if all weights of the block are 0).
FEWBIT_API int fewbit_fp8_codes(const struct fewbit_fp8* f, int threads);
// Writes `lost` of each band: the sums of (code * scale - w)² and of w², and the number of groups of columns with codes
// of 0 only and a weight that is not 0. A group has `columns` columns if they divide k; else it is the row.
FEWBIT_API int fewbit_fp8_lost(const struct fewbit_fp8* f, int threads);

// Finds the nearest vectors of a codebook. The result does not depend on the instruction set or the number of threads.
FEWBIT_API int fewbit_nearest_vectors(const struct fewbit_vectors* v, int threads);

// Computes a block. Products round activations as fewbit_linear does; all else is in float32. A text's result does not
// depend on the other texts, nor on the number of threads.
FEWBIT_API int fewbit_decode_block(const struct fewbit_block* block, const struct fewbit_call* call, int threads);

#ifdef __cplusplus
}
#endif
