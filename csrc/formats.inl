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

// ---- integers with a scale (and a zero point) for each group of columns, codes in a bit stream by row ----------------

// How sixteen codes in 2 BITS bytes become bytes. A code is inside a word of 16 bits: `even` (`odd`) are the bytes of the words
// of codes with an even (odd) number, and `even_at` (`odd_at`) where the codes begin in them. The product with `even_by`
// (`odd_by`) has the code in the upper byte.
template <int BITS> struct Straddling {
  alignas(16) uint8_t even[16], odd[16];
  alignas(16) uint16_t even_at[8], odd_at[8], even_by[8], odd_by[8];
  constexpr Straddling() : even(), odd(), even_at(), odd_at(), even_by(), odd_by() {
    for (int i = 0; i < 8; i++) put(i, 2 * i * BITS, (2 * i + 1) * BITS);
  }
  constexpr void put(int i, int a, int b) {
    even[2 * i] = uint8_t(a / 8), even[2 * i + 1] = uint8_t(a / 8 + 1), even_at[i] = uint16_t(a % 8);
    odd[2 * i] = uint8_t(b / 8), odd[2 * i + 1] = uint8_t(b / 8 + 1), odd_at[i] = uint16_t(b % 8);
    even_by[i] = uint16_t(1 << (8 - a % 8)), odd_by[i] = uint16_t(1 << (8 - b % 8));
  }
};

// How 32 codes of three bits in 12 bytes become two vectors. Eight codes have three bytes, and a word has the same code of two
// neighbours of eight. Codes inside of a byte make the first vector: `within` has this byte of both, and `at` where the code
// begins; the product with `by` has it at the top of the byte. The others make the second vector, as above.
constexpr int THREE_BITS[2][4] = {{0, 1, 3, 4}, {2, 5, 6, 7}};
struct Within : Straddling<3> {
  alignas(16) uint8_t within[16];
  alignas(16) uint16_t at[8], by[8];
  constexpr Within() : within(), at(), by() {
    for (int i = 0; i < 8; i++) {
      const int first = 48 * (i / 4), bit = 3 * THREE_BITS[0][i % 4], a = first + 3 * THREE_BITS[1][i % 4];
      within[2 * i] = uint8_t((first + bit) / 8), within[2 * i + 1] = uint8_t((first + bit) / 8 + 3), at[i] = uint16_t(bit % 8);
      by[i] = uint16_t(1 << (5 - bit % 8));
      put(i, a, a + 24);
    }
  }
};

// How codes become bytes where a byte can be any eight bits of its word of 64. `bytes` brings the bytes of eight codes into
// each word, and the codes begin at its bits `at`. With one vector, these are eight codes in a row. With four vectors, a
// lane has 16 codes in a row, and a word has codes of two lanes: the first eight of each for two of the vectors, and the
// last eight of each for the others.
template <int BITS, int VECTORS> struct Fields {
  static constexpr int HALVES = VECTORS == 4 ? 2 : 1, EACH = VECTORS / HALVES;
  alignas(64) uint8_t bytes[HALVES][64], at[VECTORS][64];
  constexpr Fields() : bytes(), at() {
    for (int i = 0; i < 64; i++) {
      for (int half = 0; half < HALVES; half++) {
        const int byte = HALVES == 1 ? i / 8 * BITS + i % 8 : i / 4 * 2 * BITS + half * BITS + i % 4 % BITS;
        bytes[half][i] = uint8_t(byte < 64 ? byte : byte + 128 - VECTORS * 8 * BITS);  // see Vec::bytes
      }
      for (int p = 0; p < VECTORS; p++)
        at[p][i] = uint8_t(HALVES == 1 ? i % 8 * BITS : i / 4 % 2 * 32 + (4 * p + i % 4) % 8 * BITS);
    }
  }
};

// `P` vectors of codes for each step.
template <int BITS, int VECTORS = 8 % BITS ? 1 : 8 / BITS> struct Affine {
  static constexpr int P = VECTORS, C = 64 * P, STEPS = 1, BYTES = C * BITS / 8;
  static constexpr bool WIDE = BITS == 8, THREE = BITS == 3 && P > 1;
  static constexpr int column(int, int p, int b) {
    return THREE && P == 4 ? b / 4 * 16 + 4 * p + b % 4
           : THREE         ? b / 8 * 16 + b % 2 * 8 + THREE_BITS[p % 2][b % 8 / 2]
                           : P * b + p;
  }
  struct Row {
    const uint8_t *first, *end, *codes, *first_scale, *scale, *first_zero, *zero_end, *zero;
    int64_t bytes, groups, zero_bytes;
    int64_t chunks_a_group;  // the group of a chunk is `in_chunk * chunk >> shift`; if shift is negative, a division is needed
    int shift, in_chunk;
    Lanes lanes;
    mutable int64_t held = -1;  // the first of the 16 groups of `scales` and `offsets`
    mutable Vec::Held scales, offsets;
    explicit Row(const fewbit_weight& w) {
      groups = w.k / w.group;
      bytes = (w.k * BITS + 7) / 8;
      zero_bytes = (groups * BITS + 7) / 8;
      codes = first = (const uint8_t*)w.part[0];
      end = first + w.n * bytes;
      scale = first_scale = (const uint8_t*)w.part[1];
      zero = first_zero = (const uint8_t*)w.part[2];
      zero_end = zero ? zero + w.n * zero_bytes : nullptr;
      const bool whole = w.group % C == 0 || groups == 1;
      chunks_a_group = whole && groups > 1 ? w.group / C : 1;
      const bool power = !(chunks_a_group & (chunks_a_group - 1));
      shift = groups == 1 ? 62 : power ? __builtin_ctzll((unsigned long long)chunks_a_group) : -1;
      in_chunk = whole ? 1 : int(C / w.group);
      lanes = by(4 * P, whole ? 0 : int(w.group));
    }
    void to(int64_t n) {
      codes = first + n * bytes;
      scale = first_scale + n * groups * 2;
      if (first_zero) zero = first_zero + n * zero_bytes;
      held = -1;
    }
  };
  // Of the 16 groups from a multiple of 16 on. Zeros of groups that are not there mean nothing.
  static INLINE F zeros(const Row& r, int64_t from) {
    const uint8_t* p = r.zero + from * BITS / 8;
    uint8_t copy[16] = {};
    ahead_scales(p);
    if (p + BITS + 8 > r.zero_end) {
      memcpy(copy, p, size_t(r.zero_end - p < 2 * BITS ? r.zero_end - p : 2 * BITS));
      p = copy;
    }
    return Vec::from_u64(Vec::spread<BITS>(word64(p)), Vec::spread<BITS>(word64(p + BITS)));
  }
  template <class Fn> static INLINE void decode(const Row& r, int64_t c, Fn&& fn) {
    const uint8_t* p = r.codes + c * BYTES;
    ahead(p);
    const int64_t group = r.shift >= 0 ? c * r.in_chunk >> r.shift : int64_t(uint32_t(c) / uint32_t(r.chunks_a_group));
    U codes[P];
    unpack(p, r.end - p, codes);
    if (BITS == 8 && r.in_chunk == 1) {  // from memory, a fifth faster than by 16 groups
      const F s = Vec::set1(Vec::half(r.scale + 2 * group));
      return fn(0, codes, s, times(s, r.zero ? -float(r.zero[group]) : -128.0f));
    }
    if (const int64_t from = group & ~int64_t(15); from != r.held) {
      const int64_t there = r.groups - from;
      r.held = from;
      ahead_scales(r.scale + 2 * from);
      const F s = Vec::halfs(r.scale + 2 * from, there < 16 ? int(there) : 16);
      r.scales.hold(s);
      r.offsets.hold(r.zero ? Vec::mul(s, times(zeros(r, from), -1)) : times(s, -float(1 << (BITS - 1))));
    }
    const int64_t at = group & 15;
    fn(0, codes, r.scales.lanes(r.lanes.at, at, r.in_chunk / 2), r.offsets.lanes(r.lanes.at, at, r.in_chunk / 2));
  }
  // At the end of a row this may read codes of the next row. They are multiplied by activations of 0.
  static INLINE void unpack(const uint8_t* p, int64_t left, U* codes) {
    if constexpr (8 % BITS == 0) {
      const U q = left < BYTES ? Vec::load_part(p, left) : Vec::load(p);
      fields(q, codes);
    } else {
      constexpr int READ = BYTES < 64 ? 64 : BYTES;
      uint8_t copy[READ];
      if (left < READ) {
        memset(copy, 0, sizeof copy);
        memcpy(copy, p, size_t(left < BYTES ? left : BYTES));
        p = copy;
      }
#ifdef __AVX512VBMI__
      static constexpr Fields<BITS, P> word{};
      for (int half = 0; half < word.HALVES; half++) {
        const U q = Vec::bytes<READ>(p, word.bytes[half]);
        for (int i = half * word.EACH; i < (half + 1) * word.EACH; i++)
          codes[i] = Vec::fields<(1 << BITS) - 1>(q, word.at[i]);
      }
#else
      const U q = Vec::quarters<BYTES / 4>(p);
      if constexpr (THREE) {
        static constexpr Within word{};
        codes[0] = Vec::within(q, word), codes[1] = Vec::straddling<7>(q, word);
      } else {
        static constexpr Straddling<BITS> word{};
        codes[0] = Vec::straddling<(1 << BITS) - 1>(q, word);
      }
#endif
    }
  }
  static INLINE void fields(U q, U* codes) {
    if constexpr (BITS == 8) codes[0] = q;
    else if constexpr (BITS == 4) {
      codes[0] = Vec::field<0, 15>(q), codes[1] = Vec::field<4, 15>(q);
    } else {
      codes[0] = Vec::field<0, 3>(q), codes[1] = Vec::field<2, 3>(q);
      codes[2] = Vec::field<4, 3>(q), codes[3] = Vec::field<6, 3>(q);
    }
  }
};

using Threes = Affine<3, Vec::THREES>;  // lanes of 8 or 16 codes: these must share a scale

struct Int8 {
  static constexpr int P = 1, C = 64, STEPS = 1;
  static constexpr bool WIDE = true;
  static constexpr int column(int, int, int b) { return b; }
  struct Row {
    const uint8_t *first, *end, *codes;
    const float* scales;
    int64_t k;
    float scale = 0;
    explicit Row(const fewbit_weight& w) : first((const uint8_t*)w.part[0]), codes(first), k(w.k) {
      end = first + w.n * k;
      scales = (const float*)w.part[1];
    }
    void to(int64_t n) {
      codes = first + n * k;
      scale = scales[n] * (1.0f / 127.0f);
    }
  };
  template <class Fn> static INLINE void decode(const Row& r, int64_t c, Fn&& fn) {
    const uint8_t* p = r.codes + c * C;
    const int64_t left = r.end - p;
    ahead(p);
    U codes[1] = {Vec::flip(left < C ? Vec::load_part(p, left) : Vec::load(p))};
    const F s = Vec::set1(r.scale);
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
