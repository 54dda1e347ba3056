// y [M, N] = x [M, K] times the transpose of packed W, for tens and hundreds of rows of x; on Hopper for up to 32.
//
// A warp takes 16 * MT rows of W and decodes them in registers, scaled and rounded once to the type of x. x passes through
// shared memory, a tile at a time, so a block reads it once for all its rows. On Hopper four warps multiply together and
// the tensor cores read x from shared memory (wgmma.m64nNk16); on other GPUs each warp reads it (ldmatrix,
// mma.m16n8k16).
//
// A piece is the rows of W that a block works on at a time. The tiles of all pieces, one piece after another, are divided
// among the blocks in equal runs, so that no block is idle for any shape. If several blocks share a piece, the last one
// to finish adds up the partial sums that all of them left in `work`. It adds them in block order, so that results are
// reproducible.
//
// 64 rows and int4-g128, 28672 x 8192, on an H200: 77.7 µs, 1.6 TB/s of weights and 387 TFLOP/s, where PyTorch's product
// in bfloat16 takes 114.5 µs (benchmarks/results/2026-11-h200.md).
//
// In shared memory a row of x is stored in pieces of 64 columns (128 bytes), in the order of the words' codes (see
// decode.cuh). Its 16-byte parts are permuted by the row number (part ^ row % 8), as wgmma requires; this also avoids
// bank conflicts.
// One more macro, on Hopper: WGMMA(sums, a, place of x).

#define ROWS (8 * NT)
#define PIECES (TILE / 64)
#define PIECE (ROWS * 128)  // bytes
#define STAGE (PIECES * PIECE)
#define STEPS 2  // steps of 16 columns that are decoded and then multiplied together
#define LOTS (TILE / 16 / STEPS)
#define APART (LOTS / PIECES)  // lots in a piece of x
#define TALL (WARPS * 16 * MT)  // rows of W in a piece
#define SOON (TILES < 4 ? TILES : 4)  // tiles of W that are prefetched into the cache
#define LOADS ((ROWS + WARPS * 4 - 1) / (WARPS * 4))  // loads of a piece of x by each warp
#define LEFT (TALL * ROWS)  // partial sums that a block leaves of a piece

extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT) many(
    const u16* __restrict__ x, u16* __restrict__ y, const u32* __restrict__ words, const void* __restrict__ high,
    const void* __restrict__ a0, const void* __restrict__ a1, const float* __restrict__ a2,
    const float* __restrict__ a3, const void* __restrict__ b0, const void* __restrict__ b1,
    const float* __restrict__ table, int M, int N, float* work, int* done) {
  extern __shared__ float shared[];
  const Weight weight = {words, high, a0, a1, a2, a3, b0, b1, table, N - 1};
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int inside = (warp >> 2) * 64 * MT + (warp & 3) * 16, x_top = blockIdx.y * ROWS;
  const int total = (N + TALL - 1) / TALL * TILES;
  const auto start = [&](int block) { return (int)((long)total * block / (int)gridDim.x); };
  const int begin = start(blockIdx.x), end = start(blockIdx.x + 1);
  const unsigned long long policy = evict_first();
  const auto row = [&](int piece, int mt, int r) {
    return Row{min(piece * (TALL / 16) + inside / 16 + mt * 4, (N - 1) >> 4), r * 8 + g};
  };
  Step next[MT][2];
  const auto ahead = [&](int piece, int tile) {
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int r = 0; r < 2; ++r) ask(next[mt][r], weight, tile, row(piece, mt, r), t, policy);
  };
  const char* soon[MT];  // addresses to prefetch next, SOON tiles ahead
  const auto look = [&](int piece, int tile) {
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) soon[mt] = to_announce(weight, tile, row(piece, mt, 0).lot, lane);
  };
  const auto tell = [&]() {
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) announce(soon[mt], lane), soon[mt] += from_tile_to_tile(lane);
  };
#pragma unroll
  for (int i = 0; i < SOON; ++i) look((begin + i) / TILES, (begin + i) % TILES), tell();
  u32* pairs = nullptr;
  float* map = nullptr;
  const u32 stages = ((u32)__cvta_generic_to_shared(tables(shared, weight, pairs, map)) + 1023) & ~1023;
  x += turn();
  ahead(begin / TILES, begin % TILES);
  // A warp loads 8 rows and 32 columns of x at a time. Each lane reads the four pairs that one thread of a group of four
  // multiplies by its words of a row; they belong to four different 16-byte parts.
#ifdef WGMMA
  const u32 to = stages + (warp / 2 * 8 + lane % 8) * 128 + ((warp % 2 * 4 + lane / 8 ^ lane % 8) << 4);
#else
  const u32 to = stages + (warp / 2 * 8 + g) * 128 + t * 4;
#endif
  const u16* from[LOADS];  // rows after the last one read the last one; their results are not used
#pragma unroll
  for (int i = 0; i < LOADS; ++i)
    from[i] = x + (long)min(x_top + (warp / 2 + i * WARPS / 2) * 8 + g, M - 1) * K + warp % 2 * 32 + t * (SUB == 16 ? 4 : 8);
  const auto read = [&](Four* coming, int tile, int part) {
    const int k = tile * TILE + part * 64, left = K - k - warp % 2 * 32;
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
#if SUB == 16
      const Two low = K % TILE && left < 16 ? Two{} : *(const Two*)(from[i] + k);
      const Two high = K % TILE && left < 32 ? Two{} : *(const Two*)(from[i] + k + 16);
      coming[i] = {low.v[0], low.v[1], high.v[0], high.v[1]};
#else
      coming[i] = K % TILE && left < t * 8 + 8 ? Four{} : *(const Four*)(from[i] + k);
#endif
    }
  };
  const auto write = [&](const Four* coming, u32 stage, int part) {
#pragma unroll
    for (int i = 0; i < LOADS; ++i)
      if (ROWS % (WARPS * 4) == 0 || warp / 2 * 8 + i * WARPS * 4 < ROWS) {
        const u32 there = to + stage + part * PIECE + i * WARPS * 4 * 128;
#ifdef WGMMA
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" :: "r"(there),
            "r"(coming[i].v[0]), "r"(coming[i].v[1]), "r"(coming[i].v[2]), "r"(coming[i].v[3]) : "memory");
#else
#pragma unroll
        for (int j = 0; j < 4; ++j)
          asm volatile("st.shared.u32 [%0], %1;" :: "r"(there + ((warp % 2 * 4 + j ^ g) << 4)), "r"(coming[i].v[j]) : "memory");
#endif
      }
  };
  u32 stage = 0;
  {
    Four coming[PIECES][LOADS];
#pragma unroll
    for (int part = 0; part < PIECES; ++part) read(coming[part], begin % TILES, part);
#pragma unroll
    for (int part = 0; part < PIECES; ++part) write(coming[part], 0, part);
  }
  for (int at = begin; at < end;) {
    const int piece = at / TILES, stop = min(end, (piece + 1) * TILES);
    float acc[MT][NT * 4] = {};
#if FACTORED
    float factor[MT][2];
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int r = 0; r < 2; ++r) factor[mt][r] = factor_of(weight, piece * TALL + inside + mt * 64 + r * 8 + g);
#endif
    const bool whole = stop - at == TILES;
#pragma unroll 1
    for (int tile = at % TILES; at < stop; ++at, ++tile) {
#ifdef WGMMA
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // makes the data that `write` wrote visible to the tensor cores
#endif
      Step s[MT][2];
      Four coming[LOADS];
#pragma unroll
      for (int mt = 0; mt < MT; ++mt)
#pragma unroll
        for (int r = 0; r < 2; ++r) s[mt][r] = next[mt][r];
      if (at + 1 < end) ahead(piece + (tile == TILES - 1), tile == TILES - 1 ? 0 : tile + 1);
      if (tile + SOON == TILES) look(piece + 1, 0);
      tell();
      const u32 following = stage == 2 * STAGE ? 0 : stage + STAGE;
#ifdef WGMMA
      const unsigned long long all = descriptor(stages + stage);
#endif
      Maker makers[MT][2];
#pragma unroll
      for (int lot = 0; lot < LOTS; ++lot) {
        u32 a[MT][STEPS][4];
        if (lot % APART == 0 && at + 1 < end) read(coming, tile == TILES - 1 ? 0 : tile + 1, lot / APART);
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
          const int step = lot * STEPS + i;
#pragma unroll
          for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
            for (int r = 0; r < 2; ++r)
              if (step * 16 % SUB == 0) makers[mt][r] = maker(grid(s[mt][r], weight, map, tile, row(piece, mt, r), step * 16 / SUB));
            numbers(a[mt][i], s[mt], makers[mt], pairs, step / 2, step % 2);
          }
        }
        if (lot == 0) __syncthreads();  // x has arrived, and all warps are done with the tile from two tiles ago
#ifdef WGMMA
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
          const int step = lot * STEPS + i;
          const unsigned long long where = all + (step / 4 * PIECE + step % 4 * 32) / 16;
#pragma unroll
          for (int mt = 0; mt < MT; ++mt) WGMMA(acc[mt], a[mt][i], where);
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
#else
#pragma unroll
        for (int i = 0; i < STEPS; i += 2) {
          const int step = lot * STEPS + i;
#pragma unroll
          for (int nt = 0; nt < NT; ++nt) {
            const int m = nt * 8 + lane % 8;
            const u32 from = stages + stage + step / 4 * PIECE + m * 128 + ((step % 4 * 2 + lane / 8 ^ m & 7) << 4);
            u32 b[4];
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(from) : "memory");
#pragma unroll
            for (int mt = 0; mt < MT; ++mt) {
              mma(acc[mt] + nt * 4, a[mt][i], b);
              mma(acc[mt] + nt * 4, a[mt][i + 1], b + 2);
            }
          }
        }
#endif
        if (lot % APART == APART - 1 && at + 1 < end) write(coming, following, lot / APART);
      }
      stage = following;
    }
#ifdef WGMMA
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
    bool mine = true;
    if (!whole) {
      const auto lot = [&](int block) {  // a block shares at most two pieces with others: its first and its last
        return work + ((long)(blockIdx.y * gridDim.x + block) * 2 + (piece > start(block) / TILES)) * LEFT + threadIdx.x;
      };
      float* left = lot(blockIdx.x);
#pragma unroll
      for (int i = 0; i < MT * NT * 4; ++i) __stcg(left + i * WARPS * 32, acc[i / (NT * 4)][i % (NT * 4)]);
      const auto owner = [&](int at) { return (int)((((long)at + 1) * gridDim.x - 1) / total); };
      const int first = owner(piece * TILES), last = owner(piece * TILES + TILES - 1);
      int* count = done + blockIdx.y * (total / TILES) + piece;
      __shared__ int before;
      __syncthreads();
      if (threadIdx.x == 0) {
        __threadfence();
        before = atomicAdd(count, 1);
        __threadfence();
        if (before == last - first) *count = 0;
      }
      __syncthreads();
      mine = before == last - first;
      if (mine) {
#pragma unroll
        for (int i = 0; i < MT * NT * 4; ++i) acc[i / (NT * 4)][i % (NT * 4)] = 0;
        for (int block = first; block <= last; ++block) {
          const float* left = lot(block);
#pragma unroll
          for (int i = 0; i < MT * NT * 4; ++i) acc[i / (NT * 4)][i % (NT * 4)] += __ldcg(left + i * WARPS * 32);
        }
      }
    }
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int i = 0; i < NT * 4; ++i) {
        const int n = piece * TALL + inside + mt * 64 + g + (i >> 1 & 1) * 8, m = x_top + (i >> 2) * 8 + t * 2 + (i & 1);
#if FACTORED
        acc[mt][i] *= factor[mt][i >> 1 & 1];
#endif
        if (mine && n < N && m < M) y[(long)m * N + n] = (u16)two(acc[mt][i], 0.0f);
      }
  }
}
