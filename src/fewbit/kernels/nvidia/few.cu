// y [M, N] = x [M, K] times the transpose of packed W, for a few rows of x.
//
// A block takes 16 * MT rows of W at a time. Its warps share the tiles of K, and add up their sums in shared memory. There
// are as many blocks as the GPU can run at once. Each block requests the first tiles of its next rows before it adds up
// the current sums, so memory is idle only at the start and at the end.
//
// One row and a weight of 28672 x 8192 on an H200: bytes of the weight over the time, in TB/s
// (benchmarks/results/2026-11-h200.md): int4-g128 3.3, nf4-b64 2.9, q4_k 2.3, q6_k 2.7, q8_0 3.6, llm.int8 3.8.
// Experts on an H100: 55 % of the speed of a copy for one token, and 99 % for 64 (2026-11-packed-experts.md).
//
// If EXPERTS, W holds the weights [N, K] of that many experts, N a multiple of 16, and `ends` says where the rows of each
// expert end. What a block takes at a time is then rows of one expert's weight, for a run of its rows of x. The list of
// these items goes through the rows of the weight first. Rows of x after the last end get zeros.

extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT) few(
    const u16* __restrict__ x, u16* __restrict__ y, const u32* __restrict__ words, const void* __restrict__ high,
    const void* __restrict__ a0, const void* __restrict__ a1, const float* __restrict__ a2,
    const float* __restrict__ a3, const void* __restrict__ b0, const void* __restrict__ b1,
    const float* __restrict__ table, int M, int N
#if EXPERTS
    , const int* __restrict__ ends
#endif
    ) {
  extern __shared__ float shared[];
  const int all = EXPERTS ? EXPERTS * N : N;
  Weight weight = {words, high, a0, a1, a2, a3, b0, b1, table, all - 1};
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int rows = 16 * MT, cols = 8 * NT;
  const unsigned long long policy = evict_first();
  const auto row = [&](int top, int mt, int r) {
    const int n = min(top + mt * 16 + r * 8 + g, all - 1);
    return NT == 1 ? Row{min(top / 16 + mt, (all - 1) >> 4), r * 8 + g} : Row{n >> 4, n & 15};  // a cheaper form, to save registers
  };
  Step next[MT][2];
  const auto ahead = [&](int tile, int top) {
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int r = 0; r < 2; ++r) ask(next[mt][r], weight, tile, row(top, mt, r), t, policy);
  };
#if !EXPERTS  // which weights are needed first is not known before `ends` is
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
      announce(to_announce(weight, min(warp + i * WARPS, TILES - 1), row(blockIdx.x * rows, mt, 0).lot, lane), lane);
#endif
  u32* pairs = nullptr;
  float* map = nullptr;
  float* sums = tables(shared, weight, pairs, map);
  const int zero = turn();
  x += zero;
  // An item is rows [top, top + rows) of W, of which those below `bottom` count, and rows [first, last) of x.
  struct Item { int top, bottom, first, last; };
#if EXPERTS
  const Routes routes(ends + zero, lane);
  const int parts = (N + rows - 1) / rows, items = routes.total() * parts;
  const auto item = [&](int i) {
    const Run run = routes.at(i / parts, lane);
    return Item{run.expert * N + i % parts * rows, (run.expert + 1) * N, run.first, run.last};
  };
  Item coming = item(blockIdx.x);
#else
  Item coming = {(int)blockIdx.x * rows, N, (int)blockIdx.y * cols, M};
#endif
  ahead(min(warp, TILES - 1), coming.top);
  const u16* from[NT];  // rows after the last one read the last one; their results are not used
  const auto aim = [&](const Item& item) {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) from[nt] = x + (long)min(item.first + nt * 8 + g, item.last - 1) * K;
  };
  if (!EXPERTS) aim(coming);
#if EXPERTS
  for (int i = blockIdx.x; i < items; i += gridDim.x) {
    const Item now = coming;
    const int top = now.top;
    if (i + gridDim.x < items) coming = item(i + gridDim.x);
    else coming.top = all;  // `ahead` then loads the last rows, as in all other blocks
    aim(now);
#else
  for (int top = coming.top; top < N; top += gridDim.x * rows) {
    const Item now = coming;
    coming.top = top + gridDim.x * rows;  // may be past the end: `ahead` then loads the last rows
#endif
#if EXPERTS && SCALE == 2
    weight.a2 = a2 + top / N;
    for (int j = threadIdx.x; j < 256; j += WARPS * 32) map[j] = __ldg(a3 + top / N * 256 + j);
    __syncthreads();
#endif
    float acc[MT][NT][4] = {};
#if FACTORED
    static_assert(WARPS * 32 % (16 * MT) == 0, "a thread adds up sums of one row");
    const float factor = factor_of(weight, top + threadIdx.x % rows);
#endif
#pragma unroll 1
    for (int tile = warp; tile < TILES; tile += WARPS) {
      Step s[MT][2];
#pragma unroll
      for (int mt = 0; mt < MT; ++mt)
#pragma unroll
        for (int r = 0; r < 2; ++r) s[mt][r] = next[mt][r];
      const bool last = tile + WARPS >= TILES;
      ahead(last ? warp : tile + WARPS, last ? coming.top : top);  // also past the end, to avoid a branch
#pragma unroll
      for (int sub = 0; sub < SUBS; ++sub) {
        if (K % TILE && tile * TILE + sub * SUB >= K) break;
        Grid grids[MT][2];
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
          for (int r = 0; r < 2; ++r)
            grids[mt][r] = grid(s[mt][r], weight, map, tile, row(top, mt, r), sub);
#if FACTORED
        auto& part = acc;
#else
        float part[MT][NT][4] = {};
#endif
        float sum[NT][4] = {};
#pragma unroll
        for (int span = sub * SUB / 32; span * 32 < (sub + 1) * SUB; ++span) {
          u32 b[NT][2][2] = {};
#pragma unroll
          for (int nt = 0; nt < NT; ++nt) {
            const int k = tile * TILE + span * 32 + (SUB == 16 ? sub % 2 * 16 + t * 4 : t * 8);
            if (K % TILE == 0 || k < K) {
#if SUB == 16
              const Two v = *(const Two*)(from[nt] + k);
              b[nt][sub % 2][0] = v.v[0], b[nt][sub % 2][1] = v.v[1];
#else
              const Four v = *(const Four*)(from[nt] + k);
              b[nt][0][0] = v.v[0], b[nt][0][1] = v.v[1], b[nt][1][0] = v.v[2], b[nt][1][1] = v.v[3];
#endif
            }
          }
#pragma unroll
          for (int e = SUB == 16 ? sub % 2 : 0; e < (SUB == 16 ? sub % 2 + 1 : 2); ++e) {
#pragma unroll
            for (int mt = 0; mt < MT; ++mt) {
              u32 a[4];
              operand(a, s[mt], grids[mt], pairs, span, e);
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
#if !FACTORED
              acc[mt][nt][c] += grids[mt][c >> 1].scale * part[mt][nt][c];
#endif
#if SUMS
              acc[mt][nt][c] += grids[mt][c >> 1].least * sum[nt][c];
#endif
            }
      }
    }
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int c = 0; c < 4; ++c)
          sums[(warp * cols + nt * 8 + t * 2 + (c & 1)) * (rows + 1) + mt * 16 + g + (c >> 1) * 8] = acc[mt][nt][c];
    __syncthreads();
    for (int i = threadIdx.x; i < rows * cols; i += WARPS * 32) {
      const int r = i % rows, c = i / rows;
      float sum = 0;
#pragma unroll
      for (int other = 0; other < WARPS; ++other) sum += sums[(other * cols + c) * (rows + 1) + r];
#if FACTORED
      sum *= factor;
#endif
      if (top + r < now.bottom && now.first + c < now.last)
        y[(long)(now.first + c) * N + top + r - (now.bottom - N)] = (u16)two(sum, 0.0f);
    }
    __syncthreads();
  }
#if EXPERTS
  for (long i = (long)routes.rows() * N + blockIdx.x * WARPS * 32 + threadIdx.x; i < (long)M * N; i += gridDim.x * WARPS * 32)
    y[i] = 0;
#endif
}
