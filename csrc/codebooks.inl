// ggml's block types with a codebook (IQ), and those with two to four levels, in the form of formats.inl.
//
// A codebook is a table of bytes, which Python gives as part 1. An entry has the codes of eight columns, or of four: for
// the types with signs a magnitude plus ZERO, else the level plus 1. A minus sign turns ZERO + g into ZERO - g.
// Their blocks: fewbit/schemes/ggml/codebook.py and digits.py.

namespace {

INLINE uint64_t odd_numbers(uint64_t bytes) { return bytes << 1 | 0x0101010101010101ull; }  // 2 s + 1 for s below 128

// The signs of eight entries, in bytes of seven bits: the eighth makes the number of minus signs even.
INLINE uint64_t even_signs(uint64_t x) {
  uint64_t parity = x ^ x >> 4;
  parity ^= parity >> 2;
  parity ^= parity >> 1;
  return x | (parity & 0x0101010101010101ull) << 7;
}

// Eight entries of eight columns, by index; eight pairs of entries of four.
template <class Index> INLINE U entries8(const uint8_t* table, Index&& at) {
  const auto e = [&](int i) INLINE_LAMBDA { return word64(table + 8 * size_t(at(i))); };
  return Vec::words(e(0), e(1), e(2), e(3), e(4), e(5), e(6), e(7));
}
template <class Index> INLINE U entries4(const uint8_t* table, Index&& at) {
  const auto e = [&](int i) INLINE_LAMBDA {
    return word32(table + 4 * size_t(at(2 * i))) | uint64_t(word32(table + 4 * size_t(at(2 * i + 1)))) << 32;
  };
  return Vec::words(e(0), e(1), e(2), e(3), e(4), e(5), e(6), e(7));
}

// Eight indices of entries: their low bytes, and `BITS` higher bits of each.
template <int BITS> INLINE void indices8(const uint8_t* low, uint64_t high, uint16_t* out) {
  Vec::zipped(word64(low), Vec::spread<BITS>(high), out);
}

// `Block::step<t>` gives the t-th 64 columns of a block of 256.
template <class Block> struct Codebook : Format {
  static constexpr int P = 1, C = 256, STEPS = 4;
  static constexpr int column(int step, int, int b) { return 64 * step + b; }
  struct Row {
    const uint8_t *first, *p, *table;
    int64_t bytes;
    explicit Row(const fewbit_weight& w) : first((const uint8_t*)w.part[0]), p(first), table((const uint8_t*)w.part[1]) {
      bytes = w.k / C * Block::BYTES;
    }
    void to(int64_t n) { p = first + n * bytes; }
  };
  template <class Fn> static INLINE void decode(const Row& r, int64_t c, Fn&& fn) {
    const uint8_t* p = r.p + c * Block::BYTES;
    for (int at = 0; at < Block::BYTES; at += 64) ahead(p + at);
    Block::chunk(p, r.table, fn);
  }
  // `fn` for 64 columns of magnitudes with signs (a bit each) and a scale for each lane.
  template <int t, class Fn> static INLINE void with_signs(U magnitudes, uint64_t signs, F s, Fn& fn) {
    U codes[1] = {Vec::mirrored(magnitudes, signs, 2 * Block::ZERO)};
    fn(t, codes, s);
  }
};

INLINE F odd_scales(float d, unsigned a, unsigned b) {  // two scales of 32 columns each
  return Vec::split(d * float(2 * a + 1), d * float(2 * b + 1));
}
INLINE F odd_scales(float d, const uint8_t* p) {  // sixteen scales in nibbles
  return times(Vec::from_u64(odd_numbers(Vec::spread<4>(word32(p))), odd_numbers(Vec::spread<4>(word32(p + 4)))), d);
}
// Of the first (second) 32 columns, four times seven bits of signs, below a scale of four.
INLINE uint64_t signs_of(uint32_t a, uint32_t b) {
  return even_signs(Vec::spread<7>((a & 0xfffffff) | uint64_t(b & 0xfffffff) << 28));
}

struct IQ2XXS : Codebook<IQ2XXS> {
  static constexpr int BYTES = 66, MOST = 127, ZERO = 64;
  template <int t, class Fn> static INLINE void step(const uint8_t* p, const uint8_t* table, float d, Fn& fn) {
    const uint8_t* q = p + 2 + 16 * t;
    const uint32_t a = word32(q + 4), b = word32(q + 12);
    const U found = entries8(table, [&](int i) INLINE_LAMBDA { return q[i < 4 ? i : i + 4]; });
    with_signs<t>(found, signs_of(a, b), odd_scales(d, a >> 28, b >> 28), fn);
  }
  template <class Fn> static INLINE void chunk(const uint8_t* p, const uint8_t* table, Fn& fn) {
    const float d = Vec::half(p) * 0.125f;
    step<0>(p, table, d, fn), step<1>(p, table, d, fn), step<2>(p, table, d, fn), step<3>(p, table, d, fn);
  }
};

struct IQ2XS : Codebook<IQ2XS> {
  static constexpr int BYTES = 74, MOST = 127, ZERO = 64;
  static INLINE uint64_t top7(uint64_t words) {  // the upper seven bits of four words, as bytes
    uint64_t x = words >> 9 & 0x007f007f007f007full;
    x = (x | x >> 8) & 0x0000ffff0000ffffull;
    return (x | x >> 16) & 0xffffffffull;
  }
  template <int t, class Fn> static INLINE void step(const uint8_t* p, const uint8_t* table, F s, Fn& fn) {
    const uint8_t* q = p + 2 + 16 * t;
    const U found = entries8(table, [&](int i) INLINE_LAMBDA { return word16(q + 2 * i) & 511; });
    with_signs<t>(found, even_signs(top7(word64(q)) | top7(word64(q + 8)) << 32), Vec::pick(s, QUADS[t].at), fn);
  }
  template <class Fn> static INLINE void chunk(const uint8_t* p, const uint8_t* table, Fn& fn) {
    const F s = odd_scales(Vec::half(p) * 0.125f, p + 66);
    step<0>(p, table, s, fn), step<1>(p, table, s, fn), step<2>(p, table, s, fn), step<3>(p, table, s, fn);
  }
};

struct IQ2S : Codebook<IQ2S> {
  static constexpr int BYTES = 82, MOST = 127, ZERO = 64;
  template <int t, class Fn> static INLINE void step(const uint8_t* p, const uint8_t* table, F s, Fn& fn) {
    uint16_t at[8];
    indices8<2>(p + 2 + 8 * t, word16(p + 66 + 2 * t), at);
    const U found = entries8(table, [&](int i) INLINE_LAMBDA { return at[i]; });
    with_signs<t>(found, word64(p + 34 + 8 * t), Vec::pick(s, QUADS[t].at), fn);
  }
  template <class Fn> static INLINE void chunk(const uint8_t* p, const uint8_t* table, Fn& fn) {
    const F s = odd_scales(Vec::half(p) * 0.125f, p + 74);
    step<0>(p, table, s, fn), step<1>(p, table, s, fn), step<2>(p, table, s, fn), step<3>(p, table, s, fn);
  }
};

struct IQ3XXS : Codebook<IQ3XXS> {
  static constexpr int BYTES = 98, MOST = 127, ZERO = 64;
  template <int t, class Fn> static INLINE void step(const uint8_t* p, const uint8_t* table, float d, Fn& fn) {
    const uint8_t* q = p + 2 + 16 * t;
    const uint32_t a = word32(p + 66 + 8 * t), b = word32(p + 70 + 8 * t);
    const U found = entries4(table, [&](int i) INLINE_LAMBDA { return q[i]; });
    with_signs<t>(found, signs_of(a, b), odd_scales(d, a >> 28, b >> 28), fn);
  }
  template <class Fn> static INLINE void chunk(const uint8_t* p, const uint8_t* table, Fn& fn) {
    const float d = Vec::half(p) * 0.25f;
    step<0>(p, table, d, fn), step<1>(p, table, d, fn), step<2>(p, table, d, fn), step<3>(p, table, d, fn);
  }
};

struct IQ3S : Codebook<IQ3S> {
  static constexpr int BYTES = 110, MOST = 127, ZERO = 16;
  template <int t, class Fn> static INLINE void step(const uint8_t* p, const uint8_t* table, float d, Fn& fn) {
    uint16_t at[16];
    indices8<1>(p + 2 + 16 * t, p[66 + 2 * t], at);
    indices8<1>(p + 10 + 16 * t, p[67 + 2 * t], at + 8);
    const unsigned scales = p[106 + t];
    const U found = entries4(table, [&](int i) INLINE_LAMBDA { return at[i]; });
    with_signs<t>(found, word64(p + 74 + 8 * t), odd_scales(d, scales & 15, scales >> 4), fn);
  }
  template <class Fn> static INLINE void chunk(const uint8_t* p, const uint8_t* table, Fn& fn) {
    const float d = Vec::half(p);
    step<0>(p, table, d, fn), step<1>(p, table, d, fn), step<2>(p, table, d, fn), step<3>(p, table, d, fn);
  }
};

// Codes 0, 1, 2 of the levels -1, 0, 1, which move up or down by an eighth.
struct IQ1S : Codebook<IQ1S> {
  static constexpr int BYTES = 50, MOST = 2, ZERO = 0;
  static INLINE float offset(uint64_t word) { return -0.875f - 0.25f * float(int(word >> 15)); }
  template <int t, class Fn> static INLINE void step(const uint8_t* p, const uint8_t* table, float d, Fn& fn) {
    const uint64_t a = word16(p + 34 + 4 * t), b = word16(p + 36 + 4 * t);
    uint16_t at[8];
    indices8<3>(p + 2 + 8 * t, (a & 0xfff) | (b & 0xfff) << 12, at);
    const F s = odd_scales(d, a >> 12 & 7, b >> 12 & 7);
    U codes[1] = {entries8(table, [&](int i) INLINE_LAMBDA { return at[i]; })};
    fn(t, codes, s, Vec::mul(s, Vec::split(offset(a), offset(b))));
  }
  template <class Fn> static INLINE void chunk(const uint8_t* p, const uint8_t* table, Fn& fn) {
    const float d = Vec::half(p);
    step<0>(p, table, d, fn), step<1>(p, table, d, fn), step<2>(p, table, d, fn), step<3>(p, table, d, fn);
  }
};

alignas(64) constexpr Lanes EIGHTS = by(4, 8);  // a number for each eight columns

struct IQ1M : Codebook<IQ1M> {
  static constexpr int BYTES = 56, MOST = 2, ZERO = 0;
  template <int t, class Fn> static INLINE void step(const uint8_t* p, const uint8_t* table, float d, Fn& fn) {
    const uint32_t high = word32(p + 32 + 4 * t);  // three bits of each index, and whether its levels move down
    uint16_t at[8];
    indices8<4>(p + 8 * t, high & 0x77777777, at);
    const F s = Vec::pick(times(Vec::from_u64(odd_numbers(Vec::spread<3>(word16(p + 48 + 2 * t) & 0xfff)), 0), d), QUADS[0].at);
    const F down = Vec::pick(Vec::from_u64(Vec::spread<4>(high >> 3 & 0x11111111), 0), EIGHTS.at);
    U codes[1] = {entries8(table, [&](int i) INLINE_LAMBDA { return at[i]; })};
    fn(t, codes, s, Vec::mul(s, Vec::fma(down, Vec::set1(-0.25f), Vec::set1(-0.875f))));
  }
  template <class Fn> static INLINE void chunk(const uint8_t* p, const uint8_t* table, Fn& fn) {
    const uint64_t w = word64(p + 48);  // the top nibbles of four words are d
    const uint16_t bits = uint16_t((w >> 12 & 0xf) | (w >> 24 & 0xf0) | (w >> 36 & 0xf00) | (w >> 48 & 0xf000));
    const float d = Vec::half((const uint8_t*)&bits);
    step<0>(p, table, d, fn), step<1>(p, table, d, fn), step<2>(p, table, d, fn), step<3>(p, table, d, fn);
  }
};

// ---- few levels ----------------------------------------------------------------------------------------------------

struct TQ20 : Super<TQ20>, TwoBits<false> {
  using TwoBits<false>::shift;
  static constexpr int BYTES = 66, MOST = 3, ZERO = 1;
  template <class Fn> static INLINE void chunk(const uint8_t* p, Fn& fn) {
    U codes[4];
    unpack(Vec::load(p), codes);
    fn(0, codes, Vec::set1(Vec::half(p + 64)));
  }
};

// The power of 3 that brings each byte's digit to the top, for the words of four vectors.
struct Powers {
  alignas(64) uint16_t of[4][32];
  constexpr Powers() : of() {
    const int digit[4][4] = {{0, 0, 1, 1}, {2, 2, 3, 3}, {4, 4, 0, 1}, {2, 3, 4, 0}}, power[5] = {1, 3, 9, 27, 81};
    for (int t = 0; t < 4; t++)
      for (int i = 0; i < 32; i++) of[t][i] = uint16_t(power[t == 3 && i >= 24 ? i % 8 / 2 : digit[t][i / 8]]);
  }
};
constexpr Powers POWERS{};

// Digits of base 3, five in each byte of 32 and then of 16, and four in each of the last four. A byte is their number as a
// fraction of 243.
struct TQ10 : Super<TQ10> {
  static constexpr int BYTES = 54, P = 1, STEPS = 4, MOST = 2, ZERO = 1;
  // Of each 16 columns the even ones, then the odd ones, as Vec::thirds gives them.
  static constexpr int column(int step, int, int b) { return 64 * step + b / 16 * 16 + b % 8 * 2 + b / 8 % 2; }
  template <class Fn> static INLINE void chunk(const uint8_t* p, Fn& fn) {
    const F s = Vec::set1(Vec::half(p + 52));
    uint32_t tail[4] = {word32(p + 48), word32(p + 48), word32(p + 48), word32(p + 48)};
    const U first = Vec::join(p, p);
    const U bytes[4] = {first, first, Vec::join4(p, p + 16, p + 32, p + 32), Vec::join4(p + 32, p + 32, p + 32, (const uint8_t*)tail)};
    for (int t = 0; t < 4; t++) {
      const U codes[1] = {Vec::thirds(bytes[t], POWERS.of[t])};
      fn(t, codes, s);
    }
  }
};

#ifdef __AVX512VBMI__
// The same, with the last four digits of a byte from a table, as fields of a byte. The first digit is the number of thirds of
// 256 that a byte reaches: 3/4 of the byte, less 1/2 to 1, has it in its two highest bits. A lane takes the same digit of 16
// bytes. The first digits of the first 32 bytes are two lanes, and those of the next 16 bytes another. The last lane has the
// digits of the last four bytes, whose fields are moved up.
struct Digits {
  alignas(64) uint8_t four[256], kept[64];
  alignas(64) int32_t up[16], at[4][16];  // at: for each vector, lanes of the fours, or of the first digits from 16 on
  constexpr Digits() : four(), kept(), up(), at() {
    for (int b = 0; b < 256; b++)
      for (int i = 0, power = 3; i < 4; i++, power *= 3) four[b] = uint8_t(four[b] | (b * power % 256 * 3 >> 8) << 2 * i);
    for (int lane = 0; lane < 16; lane++) {
      up[lane] = lane > 12 ? 2 * (16 - lane) : 0;
      for (int p = 0; p < 4; p++) at[p][lane] = lane < 12 ? lane / 4 * 4 + p : 16 + lane % 4 * 4 + p;
      for (int b = 0; b < 4; b++) kept[4 * lane + b] = uint8_t(3 << shift(lane));
    }
  }
  static constexpr int shift(int lane) { return lane < 12 ? lane % 4 * 2 : 6; }
};
constexpr Digits DIGITS{};

struct TQ10Tables : Format {
  static constexpr int C = 256, BYTES = 54, P = 4, STEPS = 1, MOST = 255, ZERO = 1;
  static constexpr int shift(int lane) { return DIGITS.shift(lane); }
  static constexpr int column(int, int p, int b) {
    const int lane = b / 4, in = 4 * p + b % 4;
    return lane < 8 ? 32 * (lane % 4 + 1) + 16 * (lane / 4) + in : lane < 12 ? 176 + 16 * (lane % 4) + in
           : lane < 14 ? 16 * (lane % 2) + in : lane < 15 ? 160 + in : 240 + in;
  }
  struct Row : TQ10::Row {
    const uint8_t* end;
    explicit Row(const fewbit_weight& w) : TQ10::Row(w), end(first + w.n * bytes) {}
  };
  template <class Fn> static INLINE void decode(const Row& r, int64_t c, Fn&& fn) {
    const uint8_t* p = r.p + c * BYTES;
    ahead(p);
    const U bytes = r.end - p < 64 ? Vec::load_part(p, 52) : Vec::load(p), four = Vec::table(DIGITS.four, bytes);
    const U first = Vec::mean(bytes, Vec::less(Vec::mean(bytes, Vec::zero()), 2));  // means are rounded up
    const U last = Vec::last_up(first, Vec::copied<0>(four), DIGITS.up);
    U codes[4];
    for (int i = 0; i < 4; i++) codes[i] = Vec::both(Vec::lanes(four, last, DIGITS.at[i]), Vec::load(DIGITS.kept));
    fn(0, codes, Vec::set1(Vec::half(p + 52)));
  }
};
#endif

struct Q20 : Small<Q20, 18, 4, 64> {  // two bits for each column, four neighbours in a byte
  static constexpr int P = 4, MOST = 3, ZERO = 1;
  static constexpr int column(int, int p, int b) { return 4 * b + p; }
  template <class Fn> static INLINE void chunk(const uint8_t* p, int there, Fn& fn) {
    const U q = Vec::join4(p + 2, p + 20, p + 38, p + 56);
    U codes[4] = {Vec::field<0, 3>(q), Vec::field<2, 3>(q), Vec::field<4, 3>(q), Vec::field<6, 3>(q)};
    fn(0, codes, four_halves<18>(p, there));
  }
};

struct Q10 : Small<Q10, 18, 4, 128> {  // a bit for each column: -1 or 1
  static constexpr int P = 2, STEPS = 4, MOST = 1, ZERO = 0;
  static constexpr int column(int step, int p, int b) { return 8 * b + 2 * step + p; }
  template <int t, class Fn> static INLINE void step(U q, F s, F o, Fn& fn) {
    U codes[2] = {Vec::field<2 * t, 1>(q), Vec::field<2 * t + 1, 1>(q)};
    fn(t, codes, s, o);
  }
  template <class Fn> static INLINE void chunk(const uint8_t* p, int there, Fn& fn) {
    const U q = Vec::join4(p + 2, p + 20, p + 38, p + 56);
    const F d = four_halves<18>(p, there), s = times(d, 2), o = times(d, -1);
    step<0>(q, s, o, fn), step<1>(q, s, o, fn), step<2>(q, s, o, fn), step<3>(q, s, o, fn);
  }
};

}  // namespace
