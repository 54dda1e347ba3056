// How threads read a packed weight; shared by few.cu, many.cu and hopper.cu. They multiply on tensor cores
// (mma.m16n8k16, wgmma) with W as the left operand, so a step of mma multiplies 16 rows of W by 8 rows of x.
//
// Thread t of a group of four holds words 4t ... 4t + 3 of a row's tile, 16 bytes, and reads x at the columns of these
// words (see layout.py). A sum may take its terms in any order. So the pairs of columns of the words are used as
// positions 2t, 2t + 1 and 2t + 8, 2t + 9 of a step, with two steps for each 32 columns.
// Codes are converted to numbers two at a time: the bits of a code become the mantissa below the exponent of 128
// (bfloat16) or 1024 (float16); then this base and the zero point are subtracted. For few rows in bfloat16 both are
// subtracted from the sum of a group instead (FOLD), which saves a third of the instructions. In float16 that would lose
// digits, because 1024 is large and tensor cores truncate sums, so they are subtracted from each code.
// FP4 and FP8 numbers are small floats: their bits, moved to the top of the mantissa and the bottom of the exponent, are
// the number times a power of two, also if it has no implicit one. In float16 that power is left to the scale of a group.
// In bfloat16 it is so small that sums would vanish, so each pair is multiplied by it.
// Sums of a group are scaled in float32. NVFP4's levels are multiplied by the scale of their group instead (FACTORED): the
// product of 2 and 4 bits of mantissa is exact. The factor of the row is applied to the sum of the row.
// The caller defines: BITS LOW GROUP BLOCK SCALE OFFSET ZERO_POINT LEVEL FACTOR DIVISOR SHARED SUB K ROW_WORDS GROUPS
// BLOCKS SIGNED BFLOAT WARPS MT NT RESIDENT MANY EXPERTS NATURAL.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

#define LANES (32 / LOW)
#define WORDS 16  // per tile
#define TILE (WORDS * LANES)
#define TILES (ROW_WORDS / WORDS)
#define SUBS (TILE / SUB)
#define BESIDE (GROUP < TILE && TILE % GROUP == 0 ? TILE / GROUP : 1)  // groups of a tile, stored side by side
#define TABLE (LEVEL == 1)
#define E2M1 (LEVEL == 2)
#define E4M3 (LEVEL == 3)
#define FACTORED (SCALE == 5)
#define ACROSS ((GROUPS + BESIDE - 1) / BESIDE)
#define HIGH (BITS - LOW)
#define MINIMUM (OFFSET >= 2)
#define FLOATS (SCALE == 3 || (SCALE == 0 && DIVISOR > 1))  // scales are stored as float32
#define SCALE_BYTES (FLOATS ? 4 : SCALE == 0 ? 2 : 1)
#define SCALES (SCALE_BYTES * (FACTORED ? BESIDE : SUBS))  // bytes of the scales of a row's tile
#define OFFSET_BYTES (OFFSET == 2 ? 2 : 1)
#define PACKED (MANY && LOW < 8 && SUB >= 32 && !MINIMUM && !FACTORED)
#define FOLD (LOW < 8 && !LEVEL && (MANY ? !PACKED : BFLOAT))
#define SUMS (MINIMUM || FOLD)  // whether the sums of x are needed

#if BFLOAT
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#define EXPONENT 0x43004300u
#define ONES 0x3F803F80u
#define BASE 128.0f
#define UP (E2M1 ? 0x7E807E80u : 0x7B807B80u)  // 2^126 or 2^120, twice: by which the bits of FP4 and FP8 are multiplied
#else
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#define EXPONENT 0x64006400u
#define ONES 0x3C003C00u
#define BASE 1024.0f
#define UP 0x74007400u  // 2^14, twice
#endif
#define REST (BFLOAT || PACKED || FACTORED ? 1.0f : E2M1 ? 16384.0f : E4M3 ? 256.0f : 1.0f)  // of that, left to the scale

struct alignas(16) Four { u32 v[4]; };
struct alignas(8) Two { u32 v[2]; };
template <int BYTES> struct Side { u32 v[(BYTES + 3) / 4]; };  // values that are stored side by side

struct Weight {
  const u32* words;
  const void *high, *a0, *a1;
  const float *a2, *a3;
  const void *b0, *b1;
  const float* table;
  int last;  // index of the last row
};
struct Row { int lot, in; };  // rows are stored in lots of sixteen: the lot, and the row within it

__device__ __forceinline__ unsigned long long evict_first() {
  unsigned long long policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ unsigned long long evict_normal() {
  unsigned long long policy;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ Four stream(const u32* p, unsigned long long policy) {
  Four f;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
      : "=r"(f.v[0]), "=r"(f.v[1]), "=r"(f.v[2]), "=r"(f.v[3]) : "l"(p), "l"(policy));
  return f;
}
// One word, cached: other threads read its neighbours.
__device__ __forceinline__ u32 stream_one(const u32* p, unsigned long long policy) {
  u32 v;
  asm volatile("ld.global.nc.L2::cache_hint.u32 %0, [%1], %2;" : "=r"(v) : "l"(p), "l"(policy));
  return v;
}
// If NATURAL, pairs of columns keep their places in a step. How far the i-th word of a thread is from its first.
__device__ __forceinline__ int from_word(int i) { return SUB == 16 ? i % 2 * 8 + i / 2 * 2 : i * 4; }
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
// Two fused multiply-adds on pairs of numbers; each result is rounded once.
__device__ __forceinline__ u32 times(u32 a, u32 b, u32 c = 0x80008000u) {
  u32 d;
#if BFLOAT
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#else
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#endif
  return d;
}
__device__ __forceinline__ float number(u32 word, int byte, float less) {  // a byte as a float, minus `less`
  return __uint_as_float(__byte_perm(word, 0x4B000000u, 0x7440 + byte)) - (8388608.0f + less);
}

// ---- overlapping kernels --------------------------------------------------------------------------------------------

// If this kernel was launched while earlier ones run (see in_cuda.py): waits for all that they write, and then lets the
// next kernel start. Returns 0 in a way that the compiler cannot see: an address to which it is added is not read before.
__device__ __forceinline__ int turn() {
  int zero = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("mov.u32 %0, 0;" : "=r"(zero) :: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
  return zero;
}

// ---- rows of several experts ----------------------------------------------------------------------------------------

#if EXPERTS
// Rows of x are sorted by expert. They are divided into runs of at most COLUMNS rows of one expert. A warp holds where
// the rows of all experts end: lane l has those of experts l * EACH ... l * EACH + EACH - 1.
#define EACH ((EXPERTS + 31) / 32)
#define COLUMNS (8 * NT)

struct Run { int expert, first, last; };  // rows [first, last) of x, at most COLUMNS of which belong to the run

struct Routes {
  int start, ends[EACH], runs;  // of this lane's experts; `runs` of all experts up to this lane's last
  __device__ __forceinline__ static int count(int rows) { return (rows + COLUMNS - 1) / COLUMNS; }
  __device__ __forceinline__ Routes(const int* from, int lane) {
#pragma unroll
    for (int i = 0; i < EACH; ++i) ends[i] = __ldcg(from + min(lane * EACH + i, EXPERTS - 1));
    const int before = __shfl_up_sync(~0u, ends[EACH - 1], 1);
    start = lane ? before : 0;
    runs = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) runs += count(ends[i] - (i ? ends[i - 1] : start));
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(~0u, runs, step);
      if (lane >= step) runs += other;
    }
  }
  __device__ __forceinline__ int total() const { return __shfl_sync(~0u, runs, 31); }
  __device__ __forceinline__ int rows() const { return __shfl_sync(~0u, ends[EACH - 1], 31); }
  __device__ __forceinline__ Run at(int index, int lane) const {  // index < total()
    const int owner = __ffs(__ballot_sync(~0u, runs > index)) - 1;
    int left = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) left += count(ends[i] - (i ? ends[i - 1] : start));
    left = index - (runs - left);
    Run run = {0, 0, 0};
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int first = i ? ends[i - 1] : start, own = count(ends[i] - first);
      if (left >= 0 && left < own) run = {lane * EACH + i, first + left * COLUMNS, ends[i]};
      left -= own;
    }
    return {__shfl_sync(~0u, run.expert, owner), __shfl_sync(~0u, run.first, owner), __shfl_sync(~0u, run.last, owner)};
  }
};
#endif

// ---- loads, one tile ahead ------------------------------------------------------------------------------------------

// The index of piece `at` (of `across` per row) of a row. Rows are stored in lots of sixteen.
__device__ __forceinline__ int place(Row row, int across, int at) { return (row.lot * across + at) * 16 + row.in; }
// The same for scales.
__device__ __forceinline__ int place_of_group(Row row, int at) {
  return SHARED ? row.lot * ACROSS + at : place(row, ACROSS, at);
}

// Loads values of E bytes, one for each sub-tile of a row's tile.
template <int E> __device__ __forceinline__ void gather(Side<E * SUBS>& out, const void* from, int tile, Row row) {
  constexpr int B = E * SUBS;
  if constexpr (BESIDE == SUBS) {
    const u8* p = (const u8*)from + (long)place_of_group(row, tile * TILE / (GROUP * BESIDE)) * B;
    if constexpr (B == 1) out.v[0] = __ldg(p);
    else if constexpr (B == 2) out.v[0] = __ldg((const u16*)p);
    else if constexpr (B == 4) out.v[0] = __ldg((const u32*)p);
    else if constexpr (B == 8) {
      const uint2 v = __ldg((const uint2*)p);
      out.v[0] = v.x, out.v[1] = v.y;
    } else {
#pragma unroll
      for (int i = 0; i < B / 16; ++i) {
        const uint4 v = __ldg((const uint4*)p + i);
        out.v[4 * i] = v.x, out.v[4 * i + 1] = v.y, out.v[4 * i + 2] = v.z, out.v[4 * i + 3] = v.w;
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < (B + 3) / 4; ++i) out.v[i] = 0;
#pragma unroll
    for (int sub = 0; sub < SUBS; ++sub) {
      const int at = place_of_group(row, min((tile * TILE + sub * SUB) / GROUP, GROUPS - 1));
      const u32 v = E == 4 ? __ldg((const u32*)from + at) : E == 2 ? __ldg((const u16*)from + at) : __ldg((const u8*)from + at);
      out.v[sub * E / 4] |= v << sub * E % 4 * 8;
    }
  }
}

struct Step {  // the data of a row's tile: codes, and the components of scales and offsets
  Four low;
  Two high;
  Side<NATURAL && FACTORED ? 8 : SCALE_BYTES * SUBS> scale;
  Side<OFFSET_BYTES * SUBS> offset;
  u32 d, dmin;
  float nested;
};

__device__ __forceinline__ int nested_at(const Weight& w, Row row, int tile, int sub) {
  return (int)(((long)min(row.lot * 16 + row.in, w.last) * GROUPS + (tile * TILE + sub * SUB) / GROUP) >> 8);
}

__device__ __forceinline__ void ask(Step& s, const Weight& w, int tile, Row row, int t, unsigned long long policy) {
#if NATURAL
  const int at = place(row, TILES, tile) * 16 + (SUB == 16 ? t / 2 * 4 + t % 2 : t);
#else
  const int at = place(row, TILES, tile) * 16 + t * 4;
#endif
#if NATURAL && SUB == 16
#pragma unroll
  for (int i = 0; i < 4; ++i) s.low.v[i] = stream_one(w.words + at + from_word(i), policy);
#else
  s.low = stream(w.words + place(row, TILES, tile) * 16 + t * 4, policy);  // if NATURAL, see exchange()
#endif
#if BITS > LOW && NATURAL
  s.high = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int from = at + from_word(i);
    if (HIGH * LANES == 8) s.high.v[0] |= (u32)__ldg((const u8*)w.high + from) << 8 * i;
    else s.high.v[i / 2] |= (u32)__ldg((const u16*)w.high + from) << 16 * (i % 2);
  }
#elif BITS > LOW
  if (HIGH * LANES == 8) s.high.v[0] = __ldg((const u32*)((const u8*)w.high + at));
  else {
    const uint2 v = __ldg((const uint2*)((const u16*)w.high + at));
    s.high.v[0] = v.x, s.high.v[1] = v.y;
  }
#endif
#if FACTORED
#if NATURAL
  const uint2 scales = __ldg((const uint2*)w.a0 + place(row, TILES, tile));
  s.scale.v[0] = scales.x, s.scale.v[1] = scales.y;
#else
  s.scale.v[0] = __ldg((const u32*)w.a0 + place(row, TILES, tile) * 2 + t / 2);
#endif
#else
  gather<SCALE_BYTES>(s.scale, SCALE == 1 ? w.a1 : w.a0, tile, row);
#endif
  [[maybe_unused]] const int over = place(row, BLOCKS, tile * TILE / BLOCK);
#if SCALE == 1
  s.d = __ldg((const u16*)w.a0 + over);
#elif SCALE == 2
  s.nested = __ldg((const float*)w.a1 + nested_at(w, row, tile, 0));
#endif
#if OFFSET
  gather<OFFSET_BYTES>(s.offset, OFFSET == 3 ? w.b1 : w.b0, tile, row);
#endif
#if OFFSET == 3
  s.dmin = __ldg((const u16*)w.b0 + over);
#endif
}

// If NATURAL: gives each of four threads its own words of what `ask` loaded. Thread t loaded words 4t ... 4t + 3, sixteen
// bytes at once, and its own are words t, t + 4, t + 8 and t + 12.
__device__ __forceinline__ void exchange(Step& s, int t) {
#if SUB != 16
#pragma unroll
  for (int far = 1; far <= 2; ++far)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (!(i & far)) {
        u32 &low = s.low.v[i], &high = s.low.v[i + far];
        const u32 other = __shfl_xor_sync(~0u, t & far ? low : high, far);
        (t & far ? low : high) = other;
      }
#endif
}

// The data that `ask` will load for sixteen rows, in pieces of 128 bytes: first the words, then, if groups are not longer
// than tiles, one piece of scales and one of offsets. Lane l prefetches the l-th piece into the L2 cache.
#define PIECES_OF_WORDS (16 * WORDS * 4 / 128)
#define ANNOUNCED (PIECES_OF_WORDS + ((BESIDE == SUBS || FACTORED) && GROUP <= TILE ? 1 + (OFFSET != 0) : 0))
__device__ __forceinline__ const char* to_announce(const Weight& w, int tile, int lot, int lane) {
  const long at = (long)place({lot, 0}, TILES, tile);
  if (lane == PIECES_OF_WORDS) return (const char*)(SCALE == 1 ? w.a1 : w.a0) + at * SCALES;
  if (lane > PIECES_OF_WORDS) return (const char*)(OFFSET == 3 ? w.b1 : w.b0) + at * OFFSET_BYTES * SUBS;
  return (const char*)(w.words + at * WORDS) + lane * 128;
}
__device__ __forceinline__ int from_tile_to_tile(int lane) {  // distance in bytes
  return 16 * (lane == PIECES_OF_WORDS ? SCALES : lane > PIECES_OF_WORDS ? OFFSET_BYTES * SUBS : WORDS * 4);
}
__device__ __forceinline__ void announce(const char* p, int lane) {
  if (lane < ANNOUNCED) asm volatile("prefetch.global.L2 [%0];" :: "l"(p));
}

// ---- scales and numbers ---------------------------------------------------------------------------------------------

// w = scale (code - zero) + least; if FOLD, w = scale code + least. If FACTORED, `pair` is the scale of a group, twice.
struct Grid { float scale, least, zero; u32 pair; };

__device__ __forceinline__ Grid grid(const Step& s, const Weight& w, const float* map, int tile, Row row, int sub) {
  Grid g;
  [[maybe_unused]] const u32 a = FACTORED ? 0 : s.scale.v[sub * SCALE_BYTES / 4] >> sub * SCALE_BYTES % 4 * 8;
  [[maybe_unused]] const u32 b = s.offset.v[sub * OFFSET_BYTES / 4] >> sub * OFFSET_BYTES % 4 * 8;
#if FLOATS
  g.scale = __uint_as_float(a);
#elif SCALE == 0
  g.scale = half_of(a);
#elif SCALE == 1
  g.scale = half_of(s.d) * (SIGNED ? number(a ^ 128, 0, 128) : number(a, 0, 0));
#elif SCALE == 4
  g.scale = __uint_as_float(max((a & 255) << 23, 1u << 22));
#elif FACTORED
  // Its bits are again those of a number times a power of two. The products of scale and bits of a level are the weight
  // of the group times 2^-8: float16 needs a scale times 2^6 for that, and bfloat16 times 2^118, in two steps.
  g.scale = 1.0f;
#if NATURAL
  g.pair = __byte_perm(s.scale.v[sub % 2], 0, 0x0404 + sub / 2 * 0x1010);
#else
  g.pair = __byte_perm(s.scale.v[0], 0, 0x0404 + sub * 0x1010);  // byte `sub`, as the upper byte of each half
#endif
#if BFLOAT
  g.pair = times(times(g.pair >> 4, 0x7F007F00u), 0x77007700u);
#else
  g.pair = times(g.pair >> 1, 0x74007400u);
#endif
#else
  const float over = GROUPS % SUBS == 0 && BESIDE == SUBS ? s.nested : __ldg((const float*)w.a1 + nested_at(w, row, tile, sub));
  g.scale = map[a & 255] * over + __ldg(w.a2);
#endif
#if DIVISOR > 1
  g.scale *= (float)FACTOR / DIVISOR;
#endif
#if LEVEL
  g.scale *= REST;
#endif
#if OFFSET == 2
  g.least = half_of(b);
#elif OFFSET == 3
  g.least = -half_of(s.dmin) * number(b, 0, 0);
#endif
#if LOW == 8 && (MANY || BFLOAT)
  constexpr float base = 8388608.0f;  // 8 bits do not fit in the mantissa; these codes are converted through float32
#else
  constexpr float base = BASE;
#endif
#if OFFSET == 1
  g.zero = number(b, 0, -base);
#else
  g.zero = base + ZERO_POINT;
#endif
#if FOLD
  g.least = (MINIMUM ? g.least : 0.0f) - g.scale * g.zero;
#endif
  return g;
}

// The codes of lanes j and j + LANES / 2 of word i, each as mantissa bits below the exponent of BASE.
__device__ __forceinline__ u32 codes(const Step& s, int i, int j) {
  const u32 w = s.low.v[i];
  constexpr u32 mask = (1u << LOW) - 1;
  // One instruction for mask and exponent. The compiler would use two, one for each constant.
  u32 c;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(c) : "r"(w >> j * LOW), "n"(mask | mask << 16), "r"(EXPONENT));
#if BITS > LOW
  constexpr u32 top = (1u << HIGH) - 1;
  u32 h;
  if (HIGH * LANES == 8) h = (s.high.v[0] >> 8 * i & 15) | (s.high.v[0] >> (8 * i + 4) & 15) << 16;
  else h = __byte_perm(s.high.v[i / 2], 0, i % 2 ? 0x4342 : 0x4140);
  const int up = LOW - j * HIGH;
  c |= (up >= 0 ? h << up : h >> -up) & ((top | top << 16) << LOW);
#endif
  return c;
}

// The bits of `word` that `mask` names, moved left by `by`, twice.
__device__ __forceinline__ u32 moved(u32 word, int by, u32 mask) {
  return (by >= 0 ? word << by : word >> -by) & (mask | mask << 16);
}

// The same two codes as numbers, without the part that is subtracted from a group's sum (FOLD) or left to a factor.
__device__ __forceinline__ u32 pair(const Step& s, int i, int j, float zero) {
#if E2M1 || E4M3
  // A sign, and the bits of exponent and mantissa, whose lowest bit becomes bit `low`.
  const u32 w = s.low.v[i];
  constexpr int low = (BFLOAT ? 7 : 10) - (E2M1 ? 1 : 3);
  constexpr u32 mask = ((1u << (LOW - 1)) - 1) << low;
  const u32 bits = moved(w, low - j * LOW, mask) | moved(w, 16 - LOW - j * LOW, 0x8000);
  return (BFLOAT && !FACTORED) || PACKED ? times(bits, UP) : bits;
#elif LOW == 8 && BFLOAT
  const u32 w = s.low.v[i];
  return two(__uint_as_float(__byte_perm(w, 0x4B000000u, 0x7440 + j)) - zero,
             __uint_as_float(__byte_perm(w, 0x4B000000u, 0x7442 + j)) - zero);
#else
  return FOLD ? codes(s, i, j) : less(codes(s, i, j), two(zero, zero));
#endif
}

// The levels of both codes in byte j of `word`, from the table that tables() writes.
__device__ __forceinline__ u32 looked_up(const u32* pairs, u32 word, int j) {
  const int shift = j * 8 - 7;
  return *(const u32*)((const char*)pairs + (((shift < 0 ? word << -shift : word >> shift) & 0x7F80u) | (threadIdx.x & 31) * 4));
}

// The left operand of step e of 32 columns, from the steps of rows g and g + 8.
__device__ __forceinline__ void operand(u32* a, const Step* s, const Grid* g, const u32* pairs, int span, int e) {
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#if TABLE
      a[half * 2 + r] = looked_up(pairs, s[r].low.v[e * 2 + half], span);
#elif FACTORED
      a[half * 2 + r] = times(pair(s[r], e * 2 + half, span, 0), g[r].pair);
#else
      a[half * 2 + r] = pair(s[r], e * 2 + half, span, g[r].zero);
#endif
    }
}

// Writes the tables to shared memory; returns the address after them.
__device__ __forceinline__ float* tables(float* shared, const Weight& w, u32*& pairs, float*& map) {
  float* left = shared;
#if TABLE
  // Levels of both codes of a byte. Each thread of a warp has its own copy, which avoids bank conflicts.
  pairs = (u32*)left;
  for (int i = threadIdx.x; i < 256 * 32; i += WARPS * 32)
    pairs[i] = two(__ldg(w.table + ((i >> 5) & 15)), __ldg(w.table + (i >> 9)));
  left += 256 * 32;
#endif
#if SCALE == 2
  map = left;
  for (int i = threadIdx.x; i < 256; i += WARPS * 32) map[i] = __ldg(w.a3 + i);
  left += 256;
#endif
#if TABLE || SCALE == 2
  __syncthreads();
#endif
  return left;
}

#if FACTORED
// The factor of a row's sum, and what was left of its powers of two.
__device__ __forceinline__ float factor_of(const Weight& w, int row) {
  return __ldg((const float*)w.a1 + min(row, w.last)) * 256.0f;
}
#endif
