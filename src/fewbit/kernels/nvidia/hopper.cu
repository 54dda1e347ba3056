// y [M, N] = x [M, K] times the transpose of packed W, for about a hundred to 256 rows of x, on Hopper.
//
// As in many.cu, warps decode rows of W in registers and four of them multiply together (wgmma.m64nNk16). But x comes into
// shared memory without registers: one thread asks the tensor memory accelerator (TMA) for stages of 64 columns, several
// ahead, and a barrier in shared memory (mbarrier) counts the bytes of each. So there is room for the sums of 256 rows, W
// is decoded once for all of them, and warps do not wait for each other. The blocks of a cluster multiply different rows
// of W by the same stages; each fetches a part of a stage for all of them, which divides the reads of the L2 cache.
//
// TMA leaves the columns of x in their order, so threads read the words of W that hold these columns (NATURAL, see
// decode.cuh). Rows of x after the last one and columns after K become zeros. Runs of tiles, partial sums and their order
// are those of many.cu, with a cluster in place of a block. A piece is TALL rows of W for each block of the cluster.
//
// 256 rows and int4-g128 on an H200, 28672 x 8192: 640 to 680 TFLOP/s, 0.7 TB/s of weights
// (benchmarks/results/2026-11-h200.md).
// More macros: CLUSTER DEPTH, and WGMMA as in many.cu.

#define ROWS (8 * NT)
#define PIECES (TILE / 64)
#define PIECE (ROWS * 128)  // bytes
#define STEPS 2  // steps of 16 columns that are decoded and then multiplied together
#define LOTS (TILE / 16 / STEPS)
#define APART (LOTS / PIECES)  // lots in a stage of x
#define TALL (WARPS * 16 * MT)  // rows of W in a block's part of a piece
#define SOON (TILES < 4 ? TILES : 4)  // tiles of W that are prefetched into the cache
#define LEFT (TALL * ROWS)  // partial sums that a block leaves of a piece
#define AFTER (DEPTH / 2)  // stages after whose use a stage is fetched again

struct alignas(64) Map { char bytes[128]; };  // a CUtensorMap

// Until the phase of a barrier with this parity is over.
__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
  asm volatile("{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @!p bra again; }"
      :: "r"(barrier), "r"(parity) : "memory");
}
__device__ __forceinline__ void together() {  // all threads of the cluster, or of the block
#if CLUSTER > 1
  asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

extern "C" __global__ void
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
__launch_bounds__(WARPS * 32, RESIDENT) hopper(
    const __grid_constant__ Map x, u16* __restrict__ y, const u32* __restrict__ words, const void* __restrict__ high,
    const void* __restrict__ a0, const void* __restrict__ a1, const float* __restrict__ a2,
    const float* __restrict__ a3, const void* __restrict__ b0, const void* __restrict__ b1,
    const float* __restrict__ table, int M, int N, float* work, int* done) {
  extern __shared__ float shared[];
  __shared__ alignas(8) unsigned long long barriers[2 * DEPTH];
  const Weight weight = {words, high, a0, a1, a2, a3, b0, b1, table, N - 1};
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int rank = blockIdx.x % CLUSTER, cluster = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;
  const int inside = rank * TALL + (warp >> 2) * 64 * MT + (warp & 3) * 16, x_top = blockIdx.y * ROWS;
  const int pieces = (N + TALL * CLUSTER - 1) / (TALL * CLUSTER), total = pieces * TILES;
  const auto start = [&](int block) { return (int)((long)total * block / clusters); };
  const int begin = start(cluster), end = start(cluster + 1);
  const unsigned long long policy = evict_first();
  const auto row = [&](int piece, int mt, int r) {
    return Row{min(piece * (TALL * CLUSTER / 16) + inside / 16 + mt * 4, (N - 1) >> 4), r * 8 + g};
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
  const u32 full = (u32)__cvta_generic_to_shared(barriers), empty = full + DEPTH * 8;
  if (threadIdx.x == 0) {
    for (int i = 0; i < DEPTH; ++i) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(full + i * 8) : "memory");
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(empty + i * 8), "r"(WARPS * CLUSTER) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  u32* pairs = nullptr;
  float* map = nullptr;
  const u32 stages = ((u32)__cvta_generic_to_shared(tables(shared, weight, pairs, map)) + 1023) & ~1023;
  ahead(begin / TILES, begin % TILES);
  together();  // barriers exist before copies arrive at them
  turn();
  const int count = (end - begin) * PIECES;
  // The n-th stage of this block's run, into a slot of shared memory.
  const auto fetch = [&](int n, u32 slot) {
    const int column = (begin % TILES * PIECES + n) % (TILES * PIECES) * 64, top = x_top + rank * (ROWS / CLUSTER);
    const u32 to = stages + slot * PIECE + rank * (PIECE / CLUSTER), barrier = full + slot * 8;
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(PIECE) : "memory");
#if CLUSTER > 1
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%2, %3}], [%4], %5;"
        :: "r"(to), "l"(&x), "r"(column), "r"(top), "r"(barrier), "h"((u16)((1 << CLUSTER) - 1)) : "memory");
#else
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%2, %3}], [%4];" :: "r"(to), "l"(&x), "r"(column), "r"(top), "r"(barrier) : "memory");
#endif
  };
  if (threadIdx.x == 0)
    for (int n = 0; n < min(count, DEPTH); ++n) fetch(n, n);
  __syncwarp();
  int n = 0;
  u32 slot = 0, phase = 0;  // of the n-th stage
  for (int at = begin; at < end;) {
    const int piece = at / TILES, stop = min(end, (piece + 1) * TILES);
    float acc[MT][NT * 4] = {};
#if FACTORED
    float factor[MT][2];
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int r = 0; r < 2; ++r) factor[mt][r] = factor_of(weight, piece * TALL * CLUSTER + inside + mt * 64 + r * 8 + g);
#endif
    const bool whole = stop - at == TILES;
#pragma unroll 1
    for (int tile = at % TILES; at < stop; ++at, ++tile) {
      Step s[MT][2];
#pragma unroll
      for (int mt = 0; mt < MT; ++mt)
#pragma unroll
        for (int r = 0; r < 2; ++r) s[mt][r] = next[mt][r];
      if (at + 1 < end) ahead(piece + (tile == TILES - 1), tile == TILES - 1 ? 0 : tile + 1);
      if (tile + SOON == TILES) look(piece + 1, 0);
      tell();
      Maker makers[MT][2];
#pragma unroll
      for (int lot = 0; lot < LOTS; ++lot) {
        u32 a[MT][STEPS][4];
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
          const int step = lot * STEPS + i;
#pragma unroll
          for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
            for (int r = 0; r < 2; ++r)
              if (step * 16 % (FACTORED ? 16 : SUB) == 0) makers[mt][r] = maker(grid(s[mt][r], weight, map, tile, row(piece, mt, r), step * 16 / (FACTORED ? 16 : SUB)));
            numbers(a[mt][i], s[mt], makers[mt], pairs, step / 2, step % 2);
          }
        }
        if (lot % APART == 0) wait(full + slot * 8, phase);
        const unsigned long long all = descriptor(stages + slot * PIECE);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
          const int step = lot * STEPS + i;
#pragma unroll
          for (int mt = 0; mt < MT; ++mt) WGMMA(acc[mt], a[mt][i], all + step % 4 * 2);
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (lot % APART == 0 && n > 0 && lane < CLUSTER) {  // done with the stage before this one
          const u32 last = slot ? slot - 1 : DEPTH - 1;
          asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [there]; }"
              :: "r"(empty + last * 8), "r"(lane) : "memory");
        }
        if (lot % APART == 0) {
          if (lane == 0 && warp == n % WARPS && n >= AFTER && n - AFTER + DEPTH < count) {
            const u32 free = slot >= AFTER ? slot - AFTER : slot - AFTER + DEPTH;
            wait(empty + free * 8, slot >= AFTER ? phase : phase ^ 1);
            fetch(n - AFTER + DEPTH, free);
          }
          __syncwarp();
        }
        if (lot % APART == APART - 1) {
          ++n;
          if (++slot == DEPTH) slot = 0, phase ^= 1;
        }
      }
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    bool mine = true;
    if (!whole) {
      const auto lot = [&](int block) {
        return work + ((long)((blockIdx.y * clusters + block) * CLUSTER + rank) * 2 + (piece > start(block) / TILES)) * LEFT + threadIdx.x;
      };
      float* left = lot(cluster);
#pragma unroll
      for (int i = 0; i < MT * NT * 4; ++i) __stcg(left + i * WARPS * 32, acc[i / (NT * 4)][i % (NT * 4)]);
      const auto owner = [&](int at) { return (int)((((long)at + 1) * clusters - 1) / total); };
      const int first = owner(piece * TILES), last = owner(piece * TILES + TILES - 1);
      int* count = done + (blockIdx.y * pieces + piece) * CLUSTER + rank;
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
      if (mine && last - first == 1) {  // a sum of two does not depend on their order
        const float* other = lot(first + last - cluster);
#pragma unroll
        for (int i = 0; i < MT * NT * 4; ++i) acc[i / (NT * 4)][i % (NT * 4)] += __ldcg(other + i * WARPS * 32);
      } else if (mine) {
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
        const int n = piece * TALL * CLUSTER + inside + mt * 64 + g + (i >> 1 & 1) * 8, m = x_top + (i >> 2) * 8 + t * 2 + (i & 1);
#if FACTORED
        acc[mt][i] *= factor[mt][i >> 1 & 1];
#endif
        if (mine && n < N && m < M) y[(long)m * N + n] = (u16)two(acc[mt][i], 0.0f);
      }
  }
  together();  // no block ends while another may still write to it
}
