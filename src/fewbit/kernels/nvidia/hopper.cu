// y [M, N] = x [M, K] times the transpose of packed W, for tens to thousands of rows of x, on Hopper.
//
// As in many.cu, warps decode rows of W in registers and four of them multiply together (wgmma.m64nNk16). But x comes into
// shared memory without registers: one more warp asks the tensor memory accelerator (TMA) for stages of 64 columns,
// several ahead, and barriers in shared memory (mbarrier) say which stages have come and which are free again. So there is
// room for the sums of 256 rows, W is decoded once for all of them, and warps do not wait for each other. That warp and the
// three beside it, which do nothing, leave their registers to the others (setmaxnreg). The blocks of a cluster multiply
// different rows of W by the same stages; each fetches a part of a stage for all of them, which divides the reads of the
// L2 cache.
//
// TMA leaves the columns of x in their order, so threads read the words of W that hold these columns (NATURAL, see
// decode.cuh). Rows of x after the last one and columns after K become zeros. Rows g and g + 8 of a step are two adjacent
// rows of W, so a thread writes two adjacent results at once.
//
// A piece is TALL rows of W for each block of the cluster, and ROWS rows of x. The tiles of all pieces, one piece after
// another, are divided among the clusters in equal runs. If several share a piece, the one with its first tile waits for
// the partial sums of the others, which they left in `work`, and adds them in order, so that results are reproducible. It
// does not wait long, as they work on them at the same time or did so at the start of their runs. It waits at the end of
// its own run, and all blocks fit on the GPU at once (see in_cuda.py), so no two wait for each other.
//
// int4-g128 on an H200, 28672 x 8192: 256 rows in 175 µs, 2048 in 1.53 ms (690 and 630 TFLOP/s, at the card's limit of
// 700 W), where PyTorch's product in bfloat16 takes 183 µs and 1.43 ms (benchmarks/results/2026-11-servers-kernels.md).
// More macros: CLUSTER DEPTH, and WGMMA as in many.cu.

static_assert(DEPTH > 1, "a stage of x is free again when the next one has come");

#define ROWS (8 * NT)
#define PIECES (TILE / 64)
#define PIECE (ROWS * 128)  // bytes
#define STEPS 2  // steps of 16 columns that are decoded and then multiplied together
#define LOTS (TILE / 16 / STEPS)
#define APART (LOTS / PIECES)  // lots in a stage of x
#define TALL (WARPS * 16 * MT)  // rows of W in a block's part of a piece
#define SOON (TILES < 4 ? TILES : 4)  // tiles of W that are prefetched into the cache
#define LEFT (TALL * ROWS)  // partial sums that a block leaves of a piece
#define THREADS ((WARPS + 4) * 32)
// Registers of a thread at the start, of one that does not multiply, and of one that does: they share those of the block.
#define EVEN (65536 / RESIDENT / THREADS / 8 * 8)
#define FEW 24
#define ALL_OTHERS ((EVEN * THREADS - FEW * 128) / (WARPS * 32) / 8 * 8)
#define MOST (ALL_OTHERS < 240 ? ALL_OTHERS : 240)

struct alignas(64) Map { char bytes[128]; };  // a CUtensorMap

// Until the phase of a barrier with this parity is over.
__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
  asm volatile("{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @!p bra again; }"
      :: "r"(barrier), "r"(parity) : "memory");
}
__device__ __forceinline__ void among() {  // all threads of the block that multiply
  asm volatile("bar.sync 1, %0;" :: "n"(WARPS * 32) : "memory");
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
__launch_bounds__(THREADS, RESIDENT) hopper(
    const __grid_constant__ Map x, u16* __restrict__ y, const u32* __restrict__ words, const void* __restrict__ high,
    const void* __restrict__ a0, const void* __restrict__ a1, const float* __restrict__ a2,
    const float* __restrict__ a3, const void* __restrict__ b0, const void* __restrict__ b1,
    const float* __restrict__ table, int M, int N, float* work, int* done) {
  extern __shared__ float shared[];
  __shared__ alignas(8) unsigned long long barriers[2 * DEPTH];
  const Weight weight = {words, high, a0, a1, a2, a3, b0, b1, table, N - 1};
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int rank = blockIdx.x % CLUSTER, cluster = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;
  const int inside = rank * TALL + (warp >> 2) * 64 * MT + (warp & 3) * 16;
  const int stack = (N + TALL * CLUSTER - 1) / (TALL * CLUSTER);  // pieces for the same rows of x
  const int total = (M + ROWS - 1) / ROWS * stack * TILES;
  const auto start = [&](int block) { return (int)((long)total * block / clusters); };
  const int begin = start(cluster), end = start(cluster + 1);
  const unsigned long long policy = M > ROWS ? evict_normal() : evict_first();
  const auto after = [&](int level) { return level + 1 == stack ? 0 : level + 1; };
  const auto row = [&](int level, int mt, int r) {
    return Row{min(level * (TALL * CLUSTER / 16) + inside / 16 + mt * 4, (N - 1) >> 4), g * 2 + r};
  };
  Step next[MT][2];
  const auto ahead = [&](int level, int tile) {
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int r = 0; r < 2; ++r) ask(next[mt][r], weight, tile, row(level, mt, r), t, policy);
  };
  const char* soon[MT];  // addresses to prefetch next, SOON tiles ahead
  const auto look = [&](int level, int tile) {
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) soon[mt] = to_announce(weight, tile, row(level, mt, 0).lot, lane);
  };
  const auto tell = [&]() {
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) announce(soon[mt], lane), soon[mt] += from_tile_to_tile(lane);
  };
#pragma unroll
  for (int i = 0; i < SOON; ++i) look((begin + i) / TILES % stack, (begin + i) % TILES), tell();
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
  together();  // barriers exist before copies arrive at them
  turn();
  if (warp >= WARPS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(FEW));
    const int first = begin * PIECES, last = end * PIECES;
    u32 slot = 0, phase = 1;
    for (int stage = first; warp == WARPS && lane == 0 && stage < last; ++stage) {
      const int column = stage % (TILES * PIECES) * 64;
      const int top = stage / (TILES * PIECES) / stack * ROWS + rank * (ROWS / CLUSTER);
      const u32 to = stages + slot * PIECE + rank * (PIECE / CLUSTER), barrier = full + slot * 8;
      if (stage - first >= DEPTH) wait(empty + slot * 8, phase);
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(PIECE) : "memory");
#if CLUSTER > 1
      asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
          " [%0], [%1, {%2, %3}], [%4], %5;"
          :: "r"(to), "l"(&x), "r"(column), "r"(top), "r"(barrier), "h"((u16)((1 << CLUSTER) - 1)) : "memory");
#else
      asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
          " [%0], [%1, {%2, %3}], [%4];" :: "r"(to), "l"(&x), "r"(column), "r"(top), "r"(barrier) : "memory");
#endif
      if (++slot == DEPTH) slot = 0, phase ^= 1;
    }
    __syncwarp();
    together();
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(MOST));
  ahead(begin / TILES % stack, begin % TILES);
  u32 slot = 0, phase = 0;  // of the stage of x that is multiplied
  for (int at = begin; at < end;) {
    const int piece = at / TILES, stop = min(end, (piece + 1) * TILES);
    const int level = piece % stack, n_top = level * TALL * CLUSTER + inside, x_top = piece / stack * ROWS;
    float acc[MT][NT * 4] = {};
#if FACTORED
    float factor[MT][2];
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int r = 0; r < 2; ++r) factor[mt][r] = factor_of(weight, n_top + mt * 64 + g * 2 + r);
#endif
    const bool whole = stop - at == TILES;
#pragma unroll 1
    for (int tile = at % TILES; at < stop; ++at, ++tile) {
      Step s[MT][2];
#pragma unroll
      for (int mt = 0; mt < MT; ++mt)
#pragma unroll
        for (int r = 0; r < 2; ++r) exchange(s[mt][r] = next[mt][r], t);
      if (at + 1 < end) ahead(tile == TILES - 1 ? after(level) : level, tile == TILES - 1 ? 0 : tile + 1);
      if (tile + SOON == TILES) look(after(level), 0);
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
              if (step * 16 % (FACTORED ? 16 : SUB) == 0) makers[mt][r] = maker(grid(s[mt][r], weight, map, tile, row(level, mt, r), step * 16 / (FACTORED ? 16 : SUB)));
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
        if (lot % APART == 0 && (lot > 0 || at > begin) && lane < CLUSTER) {  // done with the stage before this one
          const u32 last = slot ? slot - 1 : DEPTH - 1;
          asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [there]; }"
              :: "r"(empty + last * 8), "r"(lane) : "memory");
        }
        if (lot % APART == APART - 1 && ++slot == DEPTH) slot = 0, phase ^= 1;
      }
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    bool mine = true;
    if (!whole) {
      const auto owner = [&](int at) { return (int)((((long)at + 1) * clusters - 1) / total); };
      const int first = owner(piece * TILES), last = owner(piece * TILES + TILES - 1);
      const auto lot = [&](int block) { return work + (long)(block * CLUSTER + rank) * LEFT + threadIdx.x; };
      int* count = done + first * CLUSTER + rank;
      mine = cluster == first;
      if (!mine) {
#pragma unroll
        for (int i = 0; i < MT * NT * 4; ++i) __stcg(lot(cluster) + i * WARPS * 32, acc[i / (NT * 4)][i % (NT * 4)]);
        among();
        if (threadIdx.x == 0) {
          __threadfence();
          atomicAdd(count, 1);
        }
      } else {
        if (threadIdx.x == 0) {
          while (*(volatile int*)count != last - first) {}
          *count = 0;
          __threadfence();
        }
        among();
        for (int block = first + 1; block <= last; ++block) {
#pragma unroll
          for (int i = 0; i < MT * NT * 4; ++i) acc[i / (NT * 4)][i % (NT * 4)] += __ldcg(lot(block) + i * WARPS * 32);
        }
      }
    }
    if (!mine) continue;
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) {
      const int n = n_top + mt * 64 + g * 2, left = n < N ? M - x_top - t * 2 : 0;
      u16* to = y + (long)(x_top + t * 2) * N + n;
#pragma unroll
      for (int i = 0; i < NT * 2; ++i) {
        float one = acc[mt][i / 2 * 4 + i % 2], other = acc[mt][i / 2 * 4 + i % 2 + 2];
#if FACTORED
        one *= factor[mt][0], other *= factor[mt][1];
#endif
        if (i / 2 * 8 + i % 2 < left) {
          if (N % 2 == 0) *(u32*)to = two(one, other);
          else {
            to[0] = (u16)two(one, 0.0f);
            if (n + 1 < N) to[1] = (u16)two(other, 0.0f);
          }
        }
        to += i % 2 ? 7l * N : N;
      }
    }
  }
  together();  // no block ends while another may still write to it
}
