// y [M, N] = x [M, K] times the transpose of packed W, for few rows of x, on tensor cores (mma.m16n8k16).
//
// A warp takes 16 * MT rows of W and a share of the tiles of K; the sums of warps meet in shared memory at the end.
// W is the left operand. Thread t of a group of four holds words 4t ... 4t + 3 of a row's tile, 16 bytes, and reads x
// where they have their columns (see layout.py). A sum may take its terms in any order, so the words' pairs of columns
// are places 2t, 2t + 1 and 2t + 8, 2t + 9 of a step, two steps for each 32 columns.
// Codes become numbers two at a time: the bits of a code under the exponent of 128 (bfloat16) or 1024 (float16), less
// that and the zero point, exactly. (Taking them off a group's sum instead costs digits: tensor cores cut sums off.)
// Sums of a group are scaled in float32.
// Macros that the caller defines: BITS LOW GROUP BLOCK SCALE OFFSET ZERO_POINT TABLE DIVISOR SUB K ROW_WORDS GROUPS
// BLOCKS STEPS WARPS MT NT DEEP BFLOAT.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef signed char s8;

#define LANES (32 / LOW)
#define TILE (16 * LANES)
#define TILES (ROW_WORDS / 16)
#define SUBS (TILE / SUB)
#define AHEAD (SUBS <= 4)  // whether scales are asked for a step before, as words are: with more, registers run out
#define HIGH (BITS - LOW)
#define MINIMUM (OFFSET >= 2)
#define SUMS MINIMUM

#if BFLOAT
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#define EXPONENT 0x43004300u
#define ONES 0x3F803F80u
#define BASE 128
#else
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#define EXPONENT 0x64006400u
#define ONES 0x3C003C00u
#define BASE 1024
#endif

struct alignas(16) Four { u32 v[4]; };
struct alignas(8) Two { u32 v[2]; };

__device__ __forceinline__ unsigned long long evict_first() {
  unsigned long long policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ Four stream(const u32* p, unsigned long long policy) {
  Four f;
  asm("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
      : "=r"(f.v[0]), "=r"(f.v[1]), "=r"(f.v[2]), "=r"(f.v[3]) : "l"(p), "l"(policy));
  return f;
}
__device__ __forceinline__ float half_of(u32 bits) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((u16)bits));
  return f;
}
__device__ __forceinline__ u32 two(float low, float high) {
  u32 d;
#if BFLOAT
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
#endif
  return d;
}
__device__ __forceinline__ void mma(float* c, const u32* a, const u32* b) {
  asm(MMA " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ u32 less(u32 a, u32 b) {  // a - b, two at a time
  u32 d;
#if BFLOAT
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(ONES), "r"(b ^ 0x80008000u));
#else
  asm("sub.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#endif
  return d;
}

// The codes of lanes j and j + LANES / 2 of a word as numbers; bfloat16 has no room for 8 bits under an exponent, so
// those are taken less `zero`. `h` has their high bits in its halves.
__device__ __forceinline__ u32 pair(u32 w, u32 h, int j, float zero) {
#if LOW == 8 && BFLOAT
  return two(__uint_as_float(__byte_perm(w, 0x4B000000u, 0x7440 + j)) - zero,
             __uint_as_float(__byte_perm(w, 0x4B000000u, 0x7442 + j)) - zero);
#else
  constexpr u32 mask = (1u << LOW) - 1;
  // One instruction for both: left to itself the compiler takes two, for two constants.
  u32 c;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(c) : "r"(w >> j * LOW), "n"(mask | mask << 16), "r"(EXPONENT));
#if BITS > LOW
  constexpr u32 top = (1u << HIGH) - 1;
  const int up = LOW - j * HIGH;
  c |= (up >= 0 ? h << up : h >> -up) & ((top | top << 16) << LOW);
#endif
  return less(c, two(zero, zero));
#endif
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, SUBS == 1 && WARPS * MT * NT == 32 ? 2 : 1) packed_linear(
    const u16* __restrict__ x, u16* __restrict__ y, const u32* __restrict__ words, const void* __restrict__ high,
    const void* __restrict__ a0, const void* __restrict__ a1, const float* __restrict__ a2,
    const float* __restrict__ a3, const void* __restrict__ b0, const void* __restrict__ b1,
    const float* __restrict__ table, int M, int N) {
  extern __shared__ float shared[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int top = blockIdx.x * 16 * MT, x_top = blockIdx.y * 8 * NT;
#if TABLE
  // Levels of both codes of a byte, a copy for each thread of a warp, so that no two want one bank.
  u32* pairs = (u32*)shared;
  for (int i = threadIdx.x; i < 256 * 32; i += WARPS * 32)
    pairs[i] = two(__ldg(table + ((i >> 5) & 15)), __ldg(table + (i >> 9)));
  __syncthreads();
#endif
  const unsigned long long policy = evict_first();
  float acc[MT][NT][4] = {};
  long row[MT][2];
#pragma unroll
  for (int mt = 0; mt < MT; ++mt)
#pragma unroll
    for (int r = 0; r < 2; ++r) row[mt][r] = min(top + mt * 16 + r * 8 + g, N - 1);

  const auto fetch = [&](int tile, long at_row, u32(*out)[4]) {
#pragma unroll
    for (int sub = 0; sub < SUBS; ++sub) {
      const int column = min(tile * TILE + sub * SUB, K - SUB);
      const long at = (long)(column / GROUP) * N + at_row, over = (long)(column / BLOCK) * N + at_row;
      u32* raw = out[sub];
#if SCALE == 3 || DIVISOR > 1
      raw[0] = __ldg((const u32*)a0 + at);
#elif SCALE == 2
      raw[0] = __ldg((const u8*)a0 + at);
#else
      raw[0] = sub && BLOCK % TILE == 0 ? out[0][0] : __ldg((const u16*)a0 + over);
#endif
#if SCALE == 1
      raw[1] = __ldg((const STEPS*)a1 + at);
#endif
#if OFFSET == 1
      raw[2] = __ldg((const u8*)b0 + at);
#elif MINIMUM
      raw[2] = sub && BLOCK % TILE == 0 ? out[0][2] : __ldg((const u16*)b0 + over);
#endif
#if OFFSET == 3
      raw[3] = __ldg((const u8*)b1 + at);
#endif
    }
  };
  Four next[DEEP][MT][2];
  u32 next_raw[DEEP][MT][2][SUBS][4];  // what s and b of each group are made of
  const auto ask = [&](int first) {
#pragma unroll
    for (int deep = 0; deep < DEEP; ++deep)
#pragma unroll
      for (int mt = 0; mt < MT; ++mt)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int tile = min(first + deep, TILES - 1);
          next[deep][mt][r] = stream(words + row[mt][r] * ROW_WORDS + tile * 16 + t * 4, policy);
          if (AHEAD) fetch(tile, row[mt][r], next_raw[deep][mt][r]);
        }
  };
  if (warp * DEEP < TILES) ask(warp * DEEP);
#pragma unroll 1
  for (int first = warp * DEEP; first < TILES; first += WARPS * DEEP) {
    Four w[DEEP][MT][2];
    u32 raw[DEEP][MT][2][SUBS][4];
#pragma unroll
    for (int deep = 0; deep < DEEP; ++deep)
#pragma unroll
      for (int mt = 0; mt < MT; ++mt)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          w[deep][mt][r] = next[deep][mt][r];
#pragma unroll
          for (int sub = 0; sub < SUBS; ++sub)
#pragma unroll
            for (int i = 0; i < 4; ++i) raw[deep][mt][r][sub][i] = next_raw[deep][mt][r][sub][i];
          if (!AHEAD) fetch(min(first + deep, TILES - 1), row[mt][r], raw[deep][mt][r]);
        }
    if (first + WARPS * DEEP < TILES) ask(first + WARPS * DEEP);
#pragma unroll
    for (int deep = 0; deep < DEEP; ++deep) {
      const int tile = first + deep;
      if (TILES % DEEP && tile >= TILES) break;
#if BITS > LOW
      u32 h[MT][2][4];
#pragma unroll
      for (int mt = 0; mt < MT; ++mt)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const long at = row[mt][r] * ROW_WORDS + tile * 16 + t * 4;
          if (HIGH * LANES == 8) {
            const u32 v = __ldg((const u32*)((const u8*)high + at));
#pragma unroll
            for (int i = 0; i < 4; ++i) h[mt][r][i] = (v >> 8 * i & 15) | (v >> (8 * i + 4) & 15) << 16;
          } else {
            const Two v = *(const Two*)((const u16*)high + at);
#pragma unroll
            for (int i = 0; i < 4; ++i) h[mt][r][i] = __byte_perm(v.v[i / 2], 0, i % 2 ? 0x4342 : 0x4140);
          }
        }
#endif
#pragma unroll
      for (int sub = 0; sub < SUBS; ++sub) {
        const int column = tile * TILE + sub * SUB, group = column / GROUP;
        if (K % TILE && column >= K) break;
        float scale[MT][2], least[MT][2];
        float zero[MT][2];
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const u32* from = raw[deep][mt][r][sub];
#if SCALE == 3
            scale[mt][r] = __uint_as_float(from[0]);
#elif DIVISOR > 1
            scale[mt][r] = __uint_as_float(from[0]) * (1.0f / DIVISOR);
#elif SCALE == 0
            scale[mt][r] = half_of(from[0]);
#elif SCALE == 1
            scale[mt][r] = half_of(from[0]) * (float)(STEPS)from[1];
#else
            scale[mt][r] = __ldg(a3 + from[0]) * __ldg((const float*)a1 + (row[mt][r] * GROUPS + group) / 256) + __ldg(a2);
#endif
            u32 z = ZERO_POINT;
#if OFFSET == 1
            z = from[2];
#elif OFFSET == 2
            least[mt][r] = half_of(from[2]);
#elif OFFSET == 3
            least[mt][r] = -half_of(from[2]) * (float)from[3];
#endif
#if LOW == 8 && BFLOAT && !TABLE
            zero[mt][r] = __uint_as_float(0x4B000000u | z);
#else
            zero[mt][r] = BASE + (float)z;
#endif
          }
        float part[MT][NT][4] = {};
#if SUMS
        float sum[NT][4] = {};
#endif
#pragma unroll
        for (int span = sub * SUB / 32; span * 32 < (sub + 1) * SUB; ++span) {
          u32 b[NT][2][2] = {};
#pragma unroll
          for (int nt = 0; nt < NT; ++nt) {
            const int m = x_top + nt * 8 + g;
            const int k = tile * TILE + span * 32 + (SUB == 16 ? sub % 2 * 16 + t * 4 : t * 8);
            if (m < M && (K % TILE == 0 || k < K)) {
#if SUB == 16
              const Two v = *(const Two*)(x + (long)m * K + k);
              b[nt][sub % 2][0] = v.v[0], b[nt][sub % 2][1] = v.v[1];
#else
              const Four v = *(const Four*)(x + (long)m * K + k);
              b[nt][0][0] = v.v[0], b[nt][0][1] = v.v[1], b[nt][1][0] = v.v[2], b[nt][1][1] = v.v[3];
#endif
            }
          }
#pragma unroll
          for (int e = SUB == 16 ? sub % 2 : 0; e < (SUB == 16 ? sub % 2 + 1 : 2); ++e) {
#pragma unroll
            for (int mt = 0; mt < MT; ++mt) {
              u32 a[4];
#pragma unroll
              for (int r = 0; r < 2; ++r)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                  const u32 word = w[deep][mt][r].v[e * 2 + half];
#if TABLE
                  const int shift = span * 8 - 7;
                  a[half * 2 + r] = *(const u32*)((const char*)pairs +
                      (((shift < 0 ? word << -shift : word >> shift) & 0x7F80u) | lane * 4));
#elif BITS > LOW
                  a[half * 2 + r] = pair(word, h[mt][r][e * 2 + half], span, zero[mt][r]);
#else
                  a[half * 2 + r] = pair(word, 0, span, zero[mt][r]);
#endif
                }
#pragma unroll
              for (int nt = 0; nt < NT; ++nt) mma(part[mt][nt], a, b[nt][e]);
            }
#if SUMS
            const u32 ones[4] = {ONES, ONES, ONES, ONES};
#pragma unroll
            for (int nt = 0; nt < NT; ++nt) mma(sum[nt], ones, b[nt][e]);
#endif
          }
        }
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
          for (int nt = 0; nt < NT; ++nt)
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              acc[mt][nt][c] += scale[mt][c >> 1] * part[mt][nt][c];
#if MINIMUM
              acc[mt][nt][c] += least[mt][c >> 1] * sum[nt][c];
#endif
            }
      }
    }
  }
#if TABLE
  __syncthreads();
#endif
  const int rows = 16 * MT, cols = 8 * NT;
#pragma unroll
  for (int mt = 0; mt < MT; ++mt)
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
#pragma unroll
      for (int c = 0; c < 4; ++c)
        shared[(warp * cols + nt * 8 + t * 2 + (c & 1)) * (rows + 1) + mt * 16 + g + (c >> 1) * 8] = acc[mt][nt][c];
  __syncthreads();
  for (int i = threadIdx.x; i < rows * cols; i += WARPS * 32) {
    const int r = i % rows, c = i / rows;
    float sum = 0;
#pragma unroll
    for (int other = 0; other < WARPS; ++other) sum += shared[(other * cols + c) * (rows + 1) + r];
    if (top + r < N && x_top + c < M) y[(long)(x_top + c) * N + top + r] = (u16)two(sum, 0.0f);
  }
}
