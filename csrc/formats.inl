// Unpacks the codes of a packed weight to vectors of bytes, with a scale and an offset for each lane.
//
// A row is divided into chunks of C columns, and a chunk into STEPS steps of P vectors of 64 codes. A step yields codes c
// (bytes, 0 to MOST) and, for each of the 16 lanes of four bytes that a dot product sums, S and B with w = S c + B. Every
// format has this form. If B is always -ZERO S, a step yields no B; if B differs, ZERO is 0. SIGNED codes are the signed
// bytes c - 128 of a file. Codes of a lane are multiplied by 2^shift(lane), which S does not take into account. `column` maps
// the position of a byte to a column of the chunk. Activations are put in this order, so weights stay in the order of their
// file. All columns of a lane belong to one group of 32.

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

struct Format {  // what most formats have
  static constexpr bool SIGNED = false;
  static constexpr int shift(int) { return 0; }
};

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

template <class Block> struct Super : Format {  // a block of 256 columns
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

#ifdef __AVX512BW__
// The scales and minima of q4_k and q5_k, eight numbers of six bits each: the bits of a byte from `shift` on, and for the last
// four the two highest bits of another byte. Each is moved to the lowest byte of a lane.
struct SixBits {
  alignas(64) uint8_t low[64], high[64];  // which byte of a block; 128: none, so 0
  alignas(64) int32_t shift[16], mask[16];
  alignas(32) uint8_t halves[32], sign[32];
  constexpr SixBits() : low(), high(), shift(), mask(), halves(), sign() {
    for (int i = 0; i < 64; i++) low[i] = high[i] = 128;
    for (int i = 0; i < 16; i++) {
      const bool minimum = i / 8, last = i % 8 / 4;
      low[4 * i] = uint8_t(4 + (last ? 8 : 4 * minimum) + i % 4);
      if (last) high[4 * i] = uint8_t(4 + 4 * minimum + i % 4);
      shift[i] = minimum && last ? 4 : 0, mask[i] = last ? 15 : 63;
      halves[2 * i] = uint8_t(2 * minimum), halves[2 * i + 1] = uint8_t(2 * minimum + 1);
      sign[2 * i + 1] = uint8_t(128 * minimum);
    }
  }
};
constexpr SixBits SIX_BITS{};
#endif

// Sub-scales and minima of q4_k and q5_k: d sc in lanes 0 to 7, -dmin m in lanes 8 to 15.
INLINE F scales_k4(const uint8_t* p) {
#ifdef __AVX512BW__
  return Vec::six_bits(p, SIX_BITS);
#else
  const uint32_t low = 0x3f3f3f3f, nibble = 0x0f0f0f0f, top = 0x03030303;
  uint32_t a = word32(p + 4), b = word32(p + 8), c = word32(p + 12);
  uint64_t sc = (a & low) | uint64_t((c & nibble) | ((a >> 6 & top) << 4)) << 32;
  uint64_t m = (b & low) | uint64_t((c >> 4 & nibble) | ((b >> 6 & top) << 4)) << 32;
  return Vec::mul(Vec::from_u64(sc, m), Vec::split(Vec::half(p), -Vec::half(p + 2)));
#endif
}

// Byte j of 32 holds column j of two groups, the first in its low nibble. A lane takes the same nibble of 16 bytes, so it sums
// 16 columns of one group.
struct Nibbles16 {
  alignas(64) int32_t shift[16], group[16], minimum[16];
  alignas(64) uint8_t kept[64], high[64];  // the lane's nibble; the bit of a byte with the highest bit of its codes, of q5_k
  static constexpr int piece(int lane) { return lane / 4 + lane % 4 / 2 * 4; }
  constexpr Nibbles16() : shift(), group(), minimum(), kept(), high() {
    for (int i = 0; i < 16; i++) {
      shift[i] = i % 2 * 4, group[i] = piece(i) / 2 * 2 + i % 2, minimum[i] = 8 + group[i];
      for (int b = 0; b < 4; b++) high[4 * i + b] = uint8_t(1 << group[i]), kept[4 * i + b] = uint8_t(15 << shift[i]);
    }
  }
};
constexpr Nibbles16 NIBBLES{};

template <bool five> struct Q45K : Super<Q45K<five>> {
  static constexpr int BYTES = five ? 176 : 144, P = 4, STEPS = 1, MOST = five ? 31 : 15, ZERO = 0;
  static constexpr int column(int, int p, int b) {
    const int lane = b / 4, piece = Nibbles16::piece(lane);
    return 64 * (piece / 2) + 32 * (lane % 2) + 16 * (piece % 2) + 4 * p + b % 4;
  }
  static constexpr int shift(int lane) { return !five && Vec::SHIFTED ? NIBBLES.shift[lane] : 0; }
  template <int p> static INLINE U codes(U a, U b, U high) {
    const U q = Vec::copied<p>(a, b);
    if (shift(1)) return Vec::both(q, Vec::load(NIBBLES.kept));
    const U code = Vec::down<15>(q, NIBBLES.shift);
    return !five ? code : Vec::add_where(code, Vec::copied<p>(high), NIBBLES.high, 16);
  }
  template <class Fn> static INLINE void chunk(const uint8_t* p, Fn& fn) {
    const uint8_t* at = p + (five ? 48 : 16);
    const U a = Vec::load(at), b = Vec::load(at + 64), high = five ? Vec::join(p + 16, p + 16) : U{};
    const U found[4] = {codes<0>(a, b, high), codes<1>(a, b, high), codes<2>(a, b, high), codes<3>(a, b, high)};
    const F t = scales_k4(p);
    fn(0, found, Vec::pick8<0>(t, NIBBLES.group), Vec::pick8<8>(t, NIBBLES.minimum));
  }
};

struct Q6K : Super<Q6K> {
  static constexpr int BYTES = 210, P = 1, STEPS = 4, MOST = 63, ZERO = 32;
  static constexpr int column(int step, int, int b) { return 64 * step + b; }
  template <int t, class Fn> static INLINE void half(const uint8_t* p, F s, Fn& fn) {
    const U q = Vec::load(p + 64 * t), h = Vec::join(p + 128 + 32 * t, p + 128 + 32 * t);
    U lo[1] = {Vec::either(Vec::field<0, 15>(q), Vec::halves<4, 2, 0x30>(h))};
    fn(2 * t, lo, Vec::pick8<8 * t>(s, QUADS[2 * t].at));
    U hi[1] = {Vec::either(Vec::field<4, 15>(q), Vec::halves<0, -2, 0x30>(h))};
    fn(2 * t + 1, hi, Vec::pick8<8 * t>(s, QUADS[2 * t + 1].at));
  }
  template <class Fn> static INLINE void chunk(const uint8_t* p, Fn& fn) {
    const F s = times(Vec::from_signed(p + 192), Vec::half(p + 208));
    half<0>(p, s, fn);
    half<1>(p, s, fn);
  }
};

// Two bits for each of 256 columns. Byte j of 32 holds columns j, 32 + j, 64 + j and 96 + j, and the next 32 bytes the other
// half. A lane takes the same two bits of 16 bytes, so it sums 16 columns of one scale.
struct TwoBitLanes {
  alignas(64) int32_t shift[16], group[16];  // where the lane's two bits are, and which 16 columns it sums
  alignas(64) uint8_t kept[64], high[64];    // these bits; the bit of a byte with the highest bit of the lane's codes, of q3_k
  constexpr TwoBitLanes() : shift(), group(), kept(), high() {
    for (int i = 0; i < 16; i++) shift[i] = 2 * (i % 4), group[i] = 8 * (i / 8) + 2 * (i % 4) + i / 4 % 2;
    for (int b = 0; b < 64; b++) kept[b] = uint8_t(3 << shift[b / 4]), high[b] = uint8_t(1 << group[b / 4] / 2);
  }
};
constexpr TwoBitLanes TWO_BITS{};
template <bool three> struct TwoBits {
  static constexpr int P = 4, STEPS = 1;
  static constexpr bool STAY = !three && Vec::SHIFTED;
  static constexpr int shift(int lane) { return STAY ? TWO_BITS.shift[lane] : 0; }
  static constexpr int column(int, int p, int b) { return 16 * TWO_BITS.group[b / 4] + 4 * p + b % 4; }
  static INLINE U code(U q) { return STAY ? Vec::both(q, Vec::load(TWO_BITS.kept)) : Vec::down<3>(q, TWO_BITS.shift); }
  static INLINE void unpack(U q, U* codes) {
    codes[0] = code(Vec::copied<0>(q)), codes[1] = code(Vec::copied<1>(q));
    codes[2] = code(Vec::copied<2>(q)), codes[3] = code(Vec::copied<3>(q));
  }
};

template <bool three> struct Q23K : Super<Q23K<three>>, TwoBits<three> {
  using TwoBits<three>::shift;
  static constexpr int BYTES = three ? 110 : 84, MOST = three ? 7 : 3, ZERO = three ? 4 : 0;
  template <class Fn> static INLINE void chunk(const uint8_t* p, Fn& fn) {
    const uint64_t nibble = 0x0f0f0f0f0f0f0f0full;
    U codes[4];
    TwoBits<three>::unpack(Vec::load(p + (three ? 32 : 16)), codes);
    if constexpr (three) {
      const uint32_t top = 0x03030303, x = word32(p + 104);
      uint64_t low = word64(p + 96);
      uint64_t a = (low & nibble) | ((x & top) | uint64_t(x >> 2 & top) << 32) << 4;
      uint64_t b = (low >> 4 & nibble) | ((x >> 4 & top) | uint64_t(x >> 6 & top) << 32) << 4;
      const U high = Vec::join(p, p);
      codes[0] = Vec::add_where(codes[0], Vec::copied<0>(high), TWO_BITS.high, 4);
      codes[1] = Vec::add_where(codes[1], Vec::copied<1>(high), TWO_BITS.high, 4);
      codes[2] = Vec::add_where(codes[2], Vec::copied<2>(high), TWO_BITS.high, 4);
      codes[3] = Vec::add_where(codes[3], Vec::copied<3>(high), TWO_BITS.high, 4);
      fn(0, codes, Vec::pick(times(Vec::add(Vec::from_u64(a, b), Vec::set1(-32)), Vec::half(p + 108)), TWO_BITS.group));
    } else {
      uint64_t a = word64(p), b = word64(p + 8);
      const F s = times(Vec::from_u64(a & nibble, b & nibble), Vec::half(p + 80));
      const F o = times(Vec::from_u64(a >> 4 & nibble, b >> 4 & nibble), -Vec::half(p + 82));
      fn(0, codes, Vec::pick(s, TWO_BITS.group), Vec::pick(o, TWO_BITS.group));
    }
  }
};

// Levels of iq4_nl and iq4_xs, plus 128.
alignas(16) constexpr uint8_t NONLINEAR[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                               129, 141, 153, 166, 181, 197, 217, 241};

struct IQ4XS : Super<IQ4XS> {
  static constexpr int BYTES = 136, P = 2, STEPS = 2, MOST = 255, ZERO = 128;
  static constexpr int column(int step, int p, int b) { return 32 * (4 * step + b / 16) + b % 16 + 16 * p; }
  template <class Fn> static INLINE void chunk(const uint8_t* p, Fn& fn) {
    const uint64_t sc = Vec::spread<4>(word32(p + 4)) | Vec::spread<2>(word16(p + 2)) << 4;
    const F s = times(Vec::add(Vec::from_u64(sc, 0), Vec::set1(-32)), Vec::half(p));
    for (int u = 0; u < 2; u++) {
      const U q = Vec::load(p + 8 + 64 * u);
      U codes[2] = {Vec::lookup(Vec::field<0, 15>(q), NONLINEAR), Vec::lookup(Vec::field<4, 15>(q), NONLINEAR)};
      fn(u, codes, Vec::pick8<0>(s, QUADS[u].at));
    }
  }
};

// Blocks of `COLUMNS` columns, COUNT at a time. At the end of a row this may also read blocks of the next row, with scale 0. It
// never reads past the last row.
template <class Block, int BYTES, int COUNT, int COLUMNS = 32> struct Small : Format {
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

struct Fifth {  // where the fifth bits of 16 codes are, in the 32 bits of a block
  alignas(16) uint8_t byte[2][16];
  alignas(64) uint8_t bit[64];
  constexpr Fifth() : byte(), bit() {
    for (int i = 0; i < 16; i++) byte[0][i] = uint8_t(i / 8), byte[1][i] = uint8_t(2 + i / 8);
    for (int i = 0; i < 64; i++) bit[i] = uint8_t(1 << i % 8);
  }
};
constexpr Fifth FIFTH{};

template <int KIND> struct Q45 : Small<Q45<KIND>, nibble_bytes(KIND), 4> {
  static constexpr int P = 2, BYTES = nibble_bytes(KIND), FIVE = KIND == Q50 || KIND == Q51;
  static constexpr int MOST = KIND == IQ4 ? 255 : FIVE ? 31 : 15;
  static constexpr int ZERO = KIND == Q40 ? 8 : KIND == Q50 ? 16 : KIND == IQ4 ? 128 : 0;
  static constexpr int column(int, int p, int b) { return 32 * (b / 16) + b % 16 + 16 * p; }
  template <class Fn> static INLINE void chunk(const uint8_t* p, int there, Fn& fn) {
    constexpr int at = BYTES - 16;
    const U q = Vec::join4(p + at, p + at + BYTES, p + at + 2 * BYTES, p + at + 3 * BYTES);
    U codes[2] = {Vec::field<0, 15>(q), Vec::field<4, 15>(q)};
    if (KIND == IQ4) codes[0] = Vec::lookup(codes[0], NONLINEAR), codes[1] = Vec::lookup(codes[1], NONLINEAR);
    if (FIVE) {
      const uint8_t* high = p + at - 4;
      const U held = Vec::join4(high, high + BYTES, high + 2 * BYTES, high + 3 * BYTES);
      codes[0] = Vec::add_where(codes[0], Vec::shuffle(held, FIFTH.byte[0]), FIFTH.bit, 16);
      codes[1] = Vec::add_where(codes[1], Vec::shuffle(held, FIFTH.byte[1]), FIFTH.bit, 16);
    }
    const F s = four_halves<BYTES>(p, there);
    if constexpr (ZERO) fn(0, codes, s);
    else fn(0, codes, s, four_halves<BYTES>(p + 2, there));
  }
};

struct Q80 : Small<Q80, 34, 2> {
  static constexpr int P = 1, MOST = 255, ZERO = 128;
  static constexpr bool SIGNED = true;
  static constexpr int column(int, int, int b) { return b; }
  template <class Fn> static INLINE void chunk(const uint8_t* p, int there, Fn& fn) {
    U codes[1] = {Vec::join(p + 2, p + 36)};
    fn(0, codes, Vec::split(Vec::half(p), there == 2 ? Vec::half(p + 34) : 0.0f));
  }
};

// ---- formats of one vector for each step, with two ------------------------------------------------------------------

// Two steps of `Fmt` as one with P = 2: a lane sums eight columns in place of four, so half as many integers become floats.
// Eight columns in a row, from a multiple of 8 on, must have one scale and one offset.
template <class Fmt> struct Pair : Format {
  static constexpr int P = 2, STEPS = Fmt::STEPS > 1 ? Fmt::STEPS / 2 : 1, C = 128 * STEPS;
  static constexpr int MOST = Fmt::MOST, ZERO = Fmt::ZERO;
  static constexpr bool SIGNED = Fmt::SIGNED;
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
    const auto half = [&](int step, const U* codes, F s, F o = F{}) INLINE_LAMBDA {
      if (step % 2 == 0) {
        first = codes[0], scale = s, offset = o;
        return;
      }
      const U both[2] = {Vec::evens(first, codes[0]), Vec::odds(first, codes[0])};
      if constexpr (ZERO) fn(step / 2, both, Vec::evens(scale, s));
      else fn(step / 2, both, Vec::evens(scale, s), Vec::evens(offset, o));
    };
    if constexpr (Fmt::STEPS > 1) {
      Fmt::decode(r.row, c, half);
    } else {
      Fmt::decode(r.row, 2 * c, [&](int, const U* u, F s, F o = F{}) INLINE_LAMBDA { half(0, u, s, o); });
      const auto last = [&](int, const U* u, F s, F o = F{}) INLINE_LAMBDA { half(1, u, s, o); };
      if (2 * c + 1 < r.chunks) Fmt::decode(r.row, 2 * c + 1, last);
      else last(0, &first, Vec::set1(0));
    }
  }
};

// ---- FP4 (E2M1) with a scale for 32 columns (E8M0) or 16 columns (E4M3 times a global scale) -------------------------

// Twice the values are integers. Plus 12 they are codes for a dot product: w = scale / 2 * code - 6 scale.
alignas(16) constexpr uint8_t FP4[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

// Scales of a chunk: four of MXFP4, eight of NVFP4. At the end of a row those that are missing are 0.
template <bool nv> struct Fp4 : Format {
  static constexpr int P = 2, C = 128, STEPS = 1, BYTES = 64, GROUPS = nv ? 8 : 4, MOST = 24, ZERO = 12;
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
    fn(0, codes, s);
  }
};

}  // namespace
