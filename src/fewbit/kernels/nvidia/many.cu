// y [M, N] = x [M, K] times the transpose of packed W, for tens of rows of x.
//
// A warp takes 16 * MT rows of W, the warps of a block lie one below the other, and x passes through shared memory, a
// tile at a time, STAGES of them on the way: a block reads x once for all its rows. K is split over SPLIT blocks; the
// last of them to finish adds up what all have left in `work`, in their order, so that results do not vary.
// Macros besides those of decode.cuh: SPLIT STAGES.

#define CHUNKS (TILE / 8)  // of 16 bytes in a row of a tile of x
#define STAGE (8 * NT * CHUNKS)

__device__ __forceinline__ int bank(int m, int chunk) {  // rows that lie side by side in other banks
  return m * CHUNKS + (chunk ^ (m & 1) << 2);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT) many(
    const u16* __restrict__ x, u16* __restrict__ y, const u32* __restrict__ words, const void* __restrict__ high,
    const void* __restrict__ a0, const void* __restrict__ a1, const float* __restrict__ a2,
    const float* __restrict__ a3, const void* __restrict__ b0, const void* __restrict__ b1,
    const float* __restrict__ table, int M, int N, float* work, int* done) {
  extern __shared__ float shared[];
  const Weight weight = {words, high, a0, a1, a2, a3, b0, b1, table};
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int top = (blockIdx.x * WARPS + warp) * 16 * MT, x_top = blockIdx.y * 8 * NT;
  const int begin = TILES * blockIdx.z / SPLIT, end = TILES * (blockIdx.z + 1) / SPLIT;
  const unsigned long long policy = evict_first();
  Step next[MT][2];
  const auto ahead = [&](int tile) {
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int r = 0; r < 2; ++r) ask(next[mt][r], weight, tile, min(top + mt * 16 + r * 8 + g, N - 1), t, policy);
  };
  ahead(min(begin, TILES - 1));
  u32* pairs = nullptr;
  float* map = nullptr;
  Four* stages = (Four*)tables(shared, weight, pairs, map);
  const auto bring = [&](int tile) {
    if (tile < end) {
      Four* stage = stages + (tile - begin) % STAGES * STAGE;
#pragma unroll
      for (int i = threadIdx.x; i < STAGE; i += WARPS * 32) {
        const int m = i / CHUNKS, chunk = i % CHUNKS, k = tile * TILE + chunk * 8;
        const bool there = x_top + m < M && (K % TILE == 0 || k < K);
        const u16* from = there ? x + (long)(x_top + m) * K + k : x;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::
            "r"((u32)__cvta_generic_to_shared(stage + bank(m, chunk))), "l"(from), "r"(there ? 16 : 0));
      }
    }
    asm volatile("cp.async.commit_group;");
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) bring(begin + i);
  float acc[MT][NT][4] = {};
#pragma unroll 1
  for (int tile = begin; tile < end; ++tile) {
    asm volatile("cp.async.wait_group %0;" :: "n"(STAGES - 2));
    __syncthreads();
    bring(tile + STAGES - 1);
    const Four* stage = stages + (tile - begin) % STAGES * STAGE;
    Step s[MT][2];
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int r = 0; r < 2; ++r) s[mt][r] = next[mt][r];
    if (tile + 1 < end) ahead(tile + 1);
#pragma unroll
    for (int sub = 0; sub < SUBS; ++sub) {
      if (K % TILE && tile * TILE + sub * SUB >= K) break;
      Grid grids[MT][2];
#pragma unroll
      for (int mt = 0; mt < MT; ++mt)
#pragma unroll
        for (int r = 0; r < 2; ++r)
          grids[mt][r] = grid(s[mt][r], weight, map, tile, min(top + mt * 16 + r * 8 + g, N - 1), sub);
      float part[MT][NT][4] = {};
      float sum[NT][4] = {};
#pragma unroll
      for (int span = sub * SUB / 32; span * 32 < (sub + 1) * SUB; ++span) {
        u32 a[MT][2][4];
        constexpr u32 ones[4] = {ONES, ONES, ONES, ONES};
        const int first = SUB == 16 ? sub % 2 : 0, last = SUB == 16 ? first + 1 : 2;
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
          for (int e = first; e < last; ++e) operand(a[mt][e], s[mt], grids[mt], pairs, span, e);
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
          u32 b[2][2];
#if SUB == 16
          const Two v = *((const Two*)(stage + bank(nt * 8 + g, span * 4 + sub % 2 * 2 + t / 2)) + t % 2);
          b[first][0] = v.v[0], b[first][1] = v.v[1];
#else
          const Four v = stage[bank(nt * 8 + g, span * 4 + t)];
          b[0][0] = v.v[0], b[0][1] = v.v[1], b[1][0] = v.v[2], b[1][1] = v.v[3];
#endif
#pragma unroll
          for (int e = first; e < last; ++e) {
#pragma unroll
            for (int mt = 0; mt < MT; ++mt) mma(part[mt][nt], a[mt][e], b[e]);
            if (MINIMUM) mma(sum[nt], ones, b[e]);
          }
        }
      }
#pragma unroll
      for (int mt = 0; mt < MT; ++mt)
#pragma unroll
        for (int nt = 0; nt < NT; ++nt)
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            acc[mt][nt][c] += grids[mt][c >> 1].scale * part[mt][nt][c];
            if (MINIMUM) acc[mt][nt][c] += grids[mt][c >> 1].least * sum[nt][c];
          }
    }
  }
  const auto at = [&](int mt, int nt, int c) -> long {
    const int n = top + mt * 16 + g + (c >> 1) * 8, m = x_top + nt * 8 + t * 2 + (c & 1);
    return n < N && m < M ? (long)m * N + n : -1;
  };
#define EACH _Pragma("unroll") for (int mt = 0; mt < MT; ++mt) _Pragma("unroll") for (int nt = 0; nt < NT; ++nt) \
    _Pragma("unroll") for (int c = 0; c < 4; ++c) if (const long i = at(mt, nt, c); i >= 0)
#if SPLIT > 1
  __shared__ int before;
  const long whole = (long)M * N;
  EACH work[blockIdx.z * whole + i] = acc[mt][nt][c];
  __threadfence();
  __syncthreads();
  int* count = done + blockIdx.y * gridDim.x + blockIdx.x;
  if (threadIdx.x == 0) before = atomicAdd(count, 1);
  __syncthreads();
  if (before < SPLIT - 1) return;
  __threadfence();
  if (threadIdx.x == 0) *count = 0;
  EACH {
    float sum = 0;
#pragma unroll
    for (int z = 0; z < SPLIT; ++z) sum += __ldcg(work + z * whole + i);
    acc[mt][nt][c] = sum;
  }
#endif
  EACH y[i] = (u16)two(acc[mt][nt][c], 0.0f);
}
