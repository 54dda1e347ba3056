// Unpacks the codes of a packed weight to vectors of bytes, with a scale and an offset for each lane.
//
// A row is divided into chunks of C columns, and a chunk into STEPS steps of P vectors of 64 codes. A step yields codes c
// (bytes, 0 to 255) and, for each of the 16 lanes of four bytes that a dot product sums, S and B with w = S c + B. Every
// format has this form. `column` maps the position of a byte to a column of the chunk. Activations are put in this order,
// so weights stay in the order of their file. All columns of a lane belong to one group of 32.

#ifdef FEWBIT_SANITIZE  // with a check at each access, inlined functions would become too long to compile
#define INLINE inline
#define INLINE_LAMBDA
#else
#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))
#endif

namespace {

using U = Vec::U;
using I = Vec::I;
using F = Vec::F;

// Prefetches the bytes 16 KB ahead of p into the L2 cache. With 2 KB, one thread of an EPYC of 2025 reads q4_k at 19 GB/s,
// with 16 KB at 32, and with 64 KB at 27 (`benchmarks/cpu.py`).
INLINE void ahead(const uint8_t* p) { __builtin_prefetch(p + 16384, 0, 2); }
// The same for scales in an array of their own, an eighth of the codes or less.
INLINE void ahead_scales(const uint8_t* p) { __builtin_prefetch(p + 2048, 0, 2); }

struct Lanes {
  int32_t at[16];
};
constexpr Lanes by(int columns, int group, int first = 0) {
  Lanes l{};
  for (int i = 0; i < 16; i++) l.at[i] = first + (group > 0 ? i * columns / group : 0);
  return l;
}
alignas(64) constexpr Lanes QUADS[4] = {by(4, 16, 0), by(4, 16, 4), by(4, 16, 8), by(4, 16, 12)};

INLINE uint32_t word32(const uint8_t* p) { uint32_t x; memcpy(&x, p, 4); return x; }
INLINE uint64_t word64(const uint8_t* p) { uint64_t x; memcpy(&x, p, 8); return x; }
INLINE uint64_t word16(const uint8_t* p) { uint16_t x; memcpy(&x, p, 2); return x; }
INLINE F times(F a, float b) { return Vec::mul(a, Vec::set1(b)); }

// ---- ggml's blocks -------------------------------------------------------------------------------------------------

template <class Block> struct Super {  // a block of 256 columns
  static constexpr int C = 256;
  struct Row {
    const uint8_t *first, *p;
    int64_t bytes;
    explicit Row(const fewbit_weight& w) : first((const uint8_t*)w.part[0]), p(first), bytes(w.k / C * Block::BYTES) {}
    void to(int64_t n) { p = first + n * bytes; }
  };
  template <class Fn> static INLINE void decode(const Row& r, int64_t c, Fn&& fn) {
    const uint8_t* p = r.p + c * Block::BYTES;
    for (int at = 0; at < Block::BYTES; at += 64) ahead(p + at);
    Block::chunk(p, fn);
  }
};

// Sub-scales and minima of q4_k and q5_k: d sc in lanes 0 to 7, -dmin m in lanes 8 to 15.
INLINE F scales_k4(const uint8_t* p) {
  const uint32_t low = 0x3f3f3f3f, nibble = 0x0f0f0f0f, top = 0x03030303;
  uint32_t a = word32(p + 4), b = word32(p + 8), c = word32(p + 12);
  uint64_t sc = (a & low) | uint64_t((c & nibble) | ((a >> 6 & top) << 4)) << 32;
  uint64_t m = (b & low) | uint64_t((c >> 4 & nibble) | ((b >> 6 & top) << 4)) << 32;
  return Vec::mul(Vec::from_u64(sc, m), Vec::split(Vec::half(p), -Vec::half(p + 2)));
}
// Groups 0, 2, 4, 6 (or 1, 3, 5, 7) of 32 columns, each for four lanes: their scales, and their minima.
constexpr Lanes every_second(int first) {
  Lanes l{};
  for (int i = 0; i < 16; i++) l.at[i] = first + i / 4 * 2;
  return l;
}
alignas(64) constexpr Lanes K4[4] = {every_second(0), every_second(1), every_second(8), every_second(9)};

// Byte j of 32 holds column j of two groups, the first in its low nibble. Of four such runs, the first 16 bytes make a
// vector, and the last 16 another. So a lane of both is of one group.
template <bool five> struct Q45K : Super<Q45K<five>> {
  static constexpr int BYTES = five ? 176 : 144, P = 2, STEPS = 2;
  static constexpr bool WIDE = false;
  static constexpr int column(int step, int p, int b) { return 64 * (b / 16) + 32 * step + 16 * p + b % 16; }
  struct Bits {  // the bit of a byte with each group's highest bits
    alignas(64) uint8_t of[2][64];
    constexpr Bits() : of() {
      for (int step = 0; step < 2; step++)
        for (int b = 0; b < 64; b++) of[step][b] = uint8_t(1 << (2 * (b / 16) + step));
    }
  };
  static constexpr Bits BIT{};
  template <class Fn> static INLINE void chunk(const uint8_t* p, Fn& fn) {
    const F t = scales_k4(p);
    const uint8_t* at = p + (five ? 48 : 16);
    const U q[2] = {Vec::join4(at, at + 32, at + 64, at + 96), Vec::join4(at + 16, at + 48, at + 80, at + 112)};
    U low[2] = {Vec::field<0, 15>(q[0]), Vec::field<0, 15>(q[1])}, high[2] = {Vec::field<4, 15>(q[0]), Vec::field<4, 15>(q[1])};
    if constexpr (five)
      for (int i = 0; i < 2; i++) {
        const uint8_t* held = p + 16 + 16 * i;
        const U bits = Vec::join4(held, held, held, held);
        low[i] = Vec::add_where(low[i], bits, BIT.of[0], 16), high[i] = Vec::add_where(high[i], bits, BIT.of[1], 16);
      }
    fn(0, low, Vec::pick(t, K4[0].at), Vec::pick(t, K4[2].at));
    fn(1, high, Vec::pick(t, K4[1].at), Vec::pick(t, K4[3].at));
  }
};

struct Q6K : Super<Q6K> {
  static constexpr int BYTES = 210, P = 1, STEPS = 4;
  static constexpr bool WIDE = false;
  static constexpr int column(int step, int, int b) { return 64 * step + b; }
  template <int t, class Fn> static INLINE void half(const uint8_t* p, F s, F o, Fn& fn) {
    const U q = Vec::load(p + 64 * t), h = Vec::join(p + 128 + 32 * t, p + 128 + 32 * t);
    U lo[1] = {Vec::either(Vec::field<0, 15>(q), Vec::halves<4, 2, 0x30>(h))};
    fn(2 * t, lo, Vec::pick(s, QUADS[2 * t].at), Vec::pick(o, QUADS[2 * t].at));
    U hi[1] = {Vec::either(Vec::field<4, 15>(q), Vec::halves<0, -2, 0x30>(h))};
    fn(2 * t + 1, hi, Vec::pick(s, QUADS[2 * t + 1].at), Vec::pick(o, QUADS[2 * t + 1].at));
  }
  template <class Fn> static INLINE void chunk(const uint8_t* p, Fn& fn) {
    const F s = times(Vec::from_signed(p + 192), Vec::half(p + 208)), o = times(s, -32);
    half<0>(p, s, o, fn);
    half<1>(p, s, o, fn);
  }
};

// Two bits for each of 256 columns. Byte j of 32 holds columns j, 32 + j, 64 + j and 96 + j, and the next 32 bytes the other
// half. A lane takes the same two bits of 16 bytes, so it sums 16 columns of one scale.
struct TwoBitLanes {
  alignas(64) int32_t shift[16], group[16];  // where the lane's two bits are, and which 16 columns it sums
  alignas(64) uint8_t high[64];              // the bit of a byte with the highest bit of the lane's codes, of q3_k
  constexpr TwoBitLanes() : shift(), group(), high() {
    for (int i = 0; i < 16; i++) shift[i] = 2 * (i % 4), group[i] = 8 * (i / 8) + 2 * (i % 4) + i / 4 % 2;
    for (int b = 0; b < 64; b++) high[b] = uint8_t(1 << group[b / 4] / 2);
  }
};
constexpr TwoBitLanes TWO_BITS{};
struct TwoBits {
  static constexpr int P = 4, STEPS = 1;
  static constexpr bool WIDE = false;
  static constexpr int column(int, int p, int b) { return 16 * TWO_BITS.group[b / 4] + 4 * p + b % 4; }
  static INLINE void unpack(const uint8_t* p, U* codes) {
    const U q = Vec::load(p);
    codes[0] = Vec::lifted<0, 3>(q, TWO_BITS.shift), codes[1] = Vec::lifted<1, 3>(q, TWO_BITS.shift);
    codes[2] = Vec::lifted<2, 3>(q, TWO_BITS.shift), codes[3] = Vec::lifted<3, 3>(q, TWO_BITS.shift);
  }
};

template <bool three> struct Q23K : Super<Q23K<three>>, TwoBits {
  static constexpr int BYTES = three ? 110 : 84;
  template <class Fn> static INLINE void chunk(const uint8_t* p, Fn& fn) {
    const uint64_t nibble = 0x0f0f0f0f0f0f0f0full;
    U codes[4];
    unpack(p + (three ? 32 : 16), codes);
    F s, o;
    if (three) {
      const uint32_t top = 0x03030303, x = word32(p + 104);
      uint64_t low = word64(p + 96);
      uint64_t a = (low & nibble) | ((x & top) | uint64_t(x >> 2 & top) << 32) << 4;
      uint64_t b = (low >> 4 & nibble) | ((x >> 4 & top) | uint64_t(x >> 6 & top) << 32) << 4;
      s = Vec::pick(times(Vec::add(Vec::from_u64(a, b), Vec::set1(-32)), Vec::half(p + 108)), TWO_BITS.group);
      o = times(s, -4);
      const U high = Vec::join(p, p);
      codes[0] = Vec::add_where(codes[0], Vec::copied<0>(high), TWO_BITS.high, 4);
      codes[1] = Vec::add_where(codes[1], Vec::copied<1>(high), TWO_BITS.high, 4);
      codes[2] = Vec::add_where(codes[2], Vec::copied<2>(high), TWO_BITS.high, 4);
      codes[3] = Vec::add_where(codes[3], Vec::copied<3>(high), TWO_BITS.high, 4);
    } else {
      uint64_t a = word64(p), b = word64(p + 8);
      s = Vec::pick(times(Vec::from_u64(a & nibble, b & nibble), Vec::half(p + 80)), TWO_BITS.group);
      o = Vec::pick(times(Vec::from_u64(a >> 4 & nibble, b >> 4 & nibble), -Vec::half(p + 82)), TWO_BITS.group);
    }
    fn(0, codes, s, o);
  }
};

// Levels of iq4_nl and iq4_xs, plus 128.
alignas(16) constexpr uint8_t NONLINEAR[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                               129, 141, 153, 166, 181, 197, 217, 241};

struct IQ4XS : Super<IQ4XS> {
  static constexpr int BYTES = 136, P = 2, STEPS = 2;
  static constexpr bool WIDE = true;
  static constexpr int column(int step, int p, int b) { return 32 * (4 * step + b / 16) + b % 16 + 16 * p; }
  template <class Fn> static INLINE void chunk(const uint8_t* p, Fn& fn) {
    const uint64_t sc = Vec::spread<4>(word32(p + 4)) | Vec::spread<2>(word16(p + 2)) << 4;
    const F s = times(Vec::add(Vec::from_u64(sc, 0), Vec::set1(-32)), Vec::half(p)), o = times(s, -128);
    for (int u = 0; u < 2; u++) {
      const U q = Vec::load(p + 8 + 64 * u);
      U codes[2] = {Vec::lookup(Vec::field<0, 15>(q), NONLINEAR), Vec::lookup(Vec::field<4, 15>(q), NONLINEAR)};
      fn(u, codes, Vec::pick(s, QUADS[u].at), Vec::pick(o, QUADS[u].at));
    }
  }
};

// Blocks of `COLUMNS` columns, COUNT at a time. At the end of a row this may also read blocks of the next row, with scale 0. It
// never reads past the last row.
template <class Block, int BYTES, int COUNT, int COLUMNS = 32> struct Small {
  static constexpr int C = COLUMNS * COUNT, STEPS = 1;
  struct Row {
    const uint8_t *first, *end, *p;
    int64_t blocks;
    explicit Row(const fewbit_weight& w) : first((const uint8_t*)w.part[0]), p(first), blocks(w.k / COLUMNS) {
      end = first + w.n * blocks * BYTES;
    }
    void to(int64_t n) { p = first + n * blocks * BYTES; }
  };
  template <class Fn> static INLINE void decode(const Row& r, int64_t c, Fn&& fn) {
    const uint8_t* p = r.p + c * COUNT * BYTES;
    const int64_t left = r.blocks - c * COUNT;
    uint8_t copy[COUNT * BYTES + 16];
    if (p + COUNT * BYTES > r.end) {
      memset(copy, 0, sizeof copy);
      memcpy(copy, p, size_t(r.end - p));
      p = copy;
    }
    ahead(p);
    ahead(p + 64);
    Block::chunk(p, left < COUNT ? int(left) : COUNT, fn);
  }
};

// The float16 at the start of each of four blocks, for the lanes of their 16 bytes of codes; 0 for those that are not there.
template <int BYTES> INLINE uint64_t four(const uint8_t* p) {
  return word16(p) | word16(p + BYTES) << 16 | word16(p + 2 * BYTES) << 32 | word16(p + 3 * BYTES) << 48;
}
template <int BYTES> INLINE F four_halves(const uint8_t* p, int there) {
  return Vec::pick(Vec::halfs_u64(four<BYTES>(p) & ~uint64_t(0) >> 16 * (4 - there)), QUADS[0].at);
}

enum Nibbles { Q40, Q41, Q50, Q51, IQ4 };
constexpr int nibble_bytes(int kind) { return kind == Q40 || kind == IQ4 ? 18 : kind == Q41 ? 20 : kind == Q50 ? 22 : 24; }

template <int KIND> struct Q45 : Small<Q45<KIND>, nibble_bytes(KIND), 4> {
  static constexpr int P = 2, BYTES = nibble_bytes(KIND);
  static constexpr bool WIDE = KIND == IQ4;
  static constexpr int column(int, int p, int b) { return 32 * (b / 16) + b % 16 + 16 * p; }
  template <class Fn> static INLINE void chunk(const uint8_t* p, int there, Fn& fn) {
    constexpr int at = BYTES - 16;
    const U q = Vec::join4(p + at, p + at + BYTES, p + at + 2 * BYTES, p + at + 3 * BYTES);
    U codes[2] = {Vec::field<0, 15>(q), Vec::field<4, 15>(q)};
    if (KIND == IQ4) codes[0] = Vec::lookup(codes[0], NONLINEAR), codes[1] = Vec::lookup(codes[1], NONLINEAR);
    if (KIND == Q50 || KIND == Q51) {
      codes[0] = Vec::add_bits(codes[0], four<BYTES>(p + at - 4), 16);
      codes[1] = Vec::add_bits(codes[1], four<BYTES>(p + at - 2), 16);
    }
    const F s = four_halves<BYTES>(p, there);
    const F o = KIND == Q41 || KIND == Q51 ? four_halves<BYTES>(p + 2, there)
                                           : times(s, KIND == Q40 ? -8.0f : KIND == Q50 ? -16.0f : -128.0f);
    fn(0, codes, s, o);
  }
};

struct Q80 : Small<Q80, 34, 2> {
  static constexpr int P = 1;
  static constexpr bool WIDE = true;
  static constexpr int column(int, int, int b) { return b; }
  template <class Fn> static INLINE void chunk(const uint8_t* p, int there, Fn& fn) {
    U codes[1] = {Vec::flip(Vec::join(p + 2, p + 36))};
    const F s = Vec::split(Vec::half(p), there == 2 ? Vec::half(p + 34) : 0.0f);
    fn(0, codes, s, times(s, -128));
  }
};

// ---- formats of one vector for each step, with two ------------------------------------------------------------------

// Two steps of `Fmt` as one with P = 2: a lane sums eight columns in place of four, so half as many integers become floats.
// Eight columns in a row, from a multiple of 8 on, must have one scale and one offset.
template <class Fmt> struct Pair {
  static constexpr int P = 2, STEPS = Fmt::STEPS > 1 ? Fmt::STEPS / 2 : 1, C = 128 * STEPS;
  static constexpr bool WIDE = Fmt::WIDE;
  static_assert(Fmt::P == 1 && Fmt::C == 64 * Fmt::STEPS);
  static constexpr int column(int step, int p, int b) {  // the order of Vec::evens and Vec::odds
    const int second = b / 8 % 2, at = b / 16 * 16 + b / 4 % 2 * 8 + 4 * p + b % 4;
    return Fmt::STEPS > 1 ? Fmt::column(2 * step + second, 0, at) : 64 * second + Fmt::column(0, 0, at);
  }
  struct Row {
    typename Fmt::Row row;
    int64_t chunks;
    explicit Row(const fewbit_weight& w) : row(w), chunks((w.k + Fmt::C - 1) / Fmt::C) {}
    void to(int64_t n) { row.to(n); }
  };
  template <class Fn> static INLINE void decode(const Row& r, int64_t c, Fn&& fn) {
    U first{};
    F scale = Vec::set1(0), offset = scale;
    const auto half = [&](int step, const U* codes, F s, F o) INLINE_LAMBDA {
      if (step % 2 == 0) {
        first = codes[0], scale = s, offset = o;
        return;
      }
      const U both[2] = {Vec::evens(first, codes[0]), Vec::odds(first, codes[0])};
      fn(step / 2, both, Vec::evens(scale, s), Vec::evens(offset, o));
    };
    if constexpr (Fmt::STEPS > 1) {
      Fmt::decode(r.row, c, half);
    } else {
      Fmt::decode(r.row, 2 * c, [&](int, const U* u, F s, F o) INLINE_LAMBDA { half(0, u, s, o); });
      const auto last = [&](int, const U* u, F s, F o) INLINE_LAMBDA { half(1, u, s, o); };
      if (2 * c + 1 < r.chunks) Fmt::decode(r.row, 2 * c + 1, last);
      else last(0, &first, Vec::set1(0), Vec::set1(0));
    }
  }
};

// ---- FP4 (E2M1) with a scale for 32 columns (E8M0) or 16 columns (E4M3 times a global scale) -------------------------

// Twice the values are integers. Plus 12 they are codes for a dot product: w = scale / 2 * code - 6 scale.
alignas(16) constexpr uint8_t FP4[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

// Scales of a chunk: four of MXFP4, eight of NVFP4. At the end of a row those that are missing are 0.
template <bool nv> struct Fp4 {
  static constexpr int P = 2, C = 128, STEPS = 1, BYTES = 64, GROUPS = nv ? 8 : 4;
  static constexpr bool WIDE = false;
  static constexpr int column(int, int p, int b) { return 2 * b + p; }
  struct Row {
    const uint8_t *first, *end, *codes, *first_scale, *scale;
    const float* global = nullptr;
    int64_t bytes, groups;
    bool divides;
    float unit = 0.5f;
    explicit Row(const fewbit_weight& w) : first((const uint8_t*)w.part[0]), codes(first) {
      bytes = w.k / 2;
      groups = w.k / (nv ? 16 : 32);
      end = first + w.n * bytes;
      scale = first_scale = (const uint8_t*)w.part[1];
      if (nv) global = (const float*)w.part[2];
      divides = w.bits == 1;
    }
    void to(int64_t n) {
      codes = first + n * bytes;
      scale = first_scale + n * groups;
      if (nv) unit = 128.0f * (divides ? 1.0f / global[n] : global[n]);  // E4M3 is read as a 256th
    }
  };
  template <class Fn> static INLINE void decode(const Row& r, int64_t c, Fn&& fn) {
    const uint8_t *p = r.codes + c * BYTES, *at = r.scale + c * GROUPS;
    const int64_t left = r.end - p, there = r.groups - c * GROUPS;
    ahead(p);
    uint64_t held = 0;
    if (there >= GROUPS) held = nv ? word64(at) : word32(at);
    else memcpy(&held, at, size_t(there));
    F s = nv ? Vec::fp8_u64(held) : Vec::e8m0_u32(uint32_t(held));
    alignas(64) static constexpr Lanes LANES = by(8, nv ? 16 : 32);
    s = Vec::pick(times(s, r.unit), LANES.at);
    const U q = left < BYTES ? Vec::load_part(p, left) : Vec::load(p);
    U codes[2] = {Vec::lookup(Vec::field<0, 15>(q), FP4), Vec::lookup(Vec::field<4, 15>(q), FP4)};
    fn(0, codes, s, times(s, -12));
  }
};

}  // namespace
