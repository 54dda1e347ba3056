// Vectors of 64 bytes, 16 integers and 16 floats in plain C++: the reference for the other instruction sets.
#pragma once
#include <stdint.h>
#include <string.h>

namespace {

struct Vec {
  static constexpr int ROWS = 1;  // of W with sums in registers
  static constexpr int HALVES = 2;  // rows of x with two sums each in registers
  static constexpr int TAKEN = 0;  // what `dot` subtracts from codes above 127
  static constexpr bool SHIFTED = false;  // whether `dot` takes any bytes as codes, so that bits can stay where they are
  static constexpr int THREES = 2;  // vectors of codes of three bits for each step
  struct U { uint8_t x[64]; };
  struct I { int32_t x[16]; };
  struct F { float x[16]; };

  static U load(const uint8_t* p) { U u; memcpy(u.x, p, 64); return u; }
  static U load_part(const uint8_t* p, int64_t left) {  // the first 1 to 63 bytes
    uint8_t copy[64] = {};
    memcpy(copy, p, size_t(left));
    return load(copy);
  }
  static U join(const uint8_t* a, const uint8_t* b) { U u; memcpy(u.x, a, 32); memcpy(u.x + 32, b, 32); return u; }
  static U join4(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d) {
    U u;
    memcpy(u.x, a, 16), memcpy(u.x + 16, b, 16), memcpy(u.x + 32, c, 16), memcpy(u.x + 48, d, 16);
    return u;
  }
  static U ones() { U u; memset(u.x, 1, 64); return u; }
  static void store(uint8_t* p, U u) { memcpy(p, u.x, 64); }
  template <int shift, int mask> static U field(U u) {
    for (int i = 0; i < 64; i++) u.x[i] = (u.x[i] >> shift) & mask;
    return u;
  }
  // The lower and the upper half shifted left by a and b bits (right where negative), then masked.
  template <int a, int b, int mask> static U halves(U u) {
    for (int i = 0; i < 64; i++) {
      int by = i < 32 ? a : b;
      u.x[i] = (by >= 0 ? u.x[i] << by : u.x[i] >> -by) & mask;
    }
    return u;
  }
  static U both(U a, U b) {
    for (int i = 0; i < 64; i++) a.x[i] &= b.x[i];
    return a;
  }
  static U either(U a, U b) {
    for (int i = 0; i < 64; i++) a.x[i] |= b.x[i];
    return a;
  }
  static U flip(U a) {
    for (int i = 0; i < 64; i++) a.x[i] ^= 0x80;
    return a;
  }
  static U lookup(U codes, const uint8_t* table) {
    for (int i = 0; i < 64; i++) codes.x[i] = table[codes.x[i]];
    return codes;
  }
  // The p-th four bytes of each 16, four times.
  template <int p> static U copied(U u) {
    U out;
    for (int i = 0; i < 16; i++) memcpy(out.x + 4 * i, u.x + i / 4 * 16 + 4 * p, 4);
    return out;
  }
  static U shuffle(U u, const uint8_t* index) {  // bytes of each 16, by index
    U out;
    for (int i = 0; i < 64; i++) out.x[i] = u.x[i / 16 * 16 + index[i % 16]];
    return out;
  }
  static uint32_t word_at(U u, int i) { uint32_t word; memcpy(&word, u.x + 4 * i, 4); return word; }
  // The p-th four bytes of each 16 of a, then of b, both twice.
  template <int p> static U copied(U a, U b) {
    U out;
    for (int i = 0; i < 16; i++) memcpy(out.x + 4 * i, (i % 4 < 2 ? a : b).x + i / 4 * 16 + 4 * p, 4);
    return out;
  }
  // Each word shifted right by its own number of bits, then masked bytes.
  template <int mask> static U down(U u, const int32_t* by) {
    for (int i = 0; i < 16; i++) {
      const uint32_t word = word_at(u, i) >> by[i] & mask * 0x01010101u;
      memcpy(u.x + 4 * i, &word, 4);
    }
    return u;
  }
  // Of each 16 bytes of a, then of b, the words of four bytes with an even (odd) number.
  template <int odd> static U halved(U a, U b) {
    U out;
    for (int i = 0; i < 16; i++) memcpy(out.x + 4 * i, (i % 4 < 2 ? a : b).x + i / 4 * 16 + i % 2 * 8 + 4 * odd, 4);
    return out;
  }
  static U evens(U a, U b) { return halved<0>(a, b); }
  static U odds(U a, U b) { return halved<1>(a, b); }
  static F evens(F a, F b) {
    F out;
    for (int i = 0; i < 16; i++) out.x[i] = (i % 4 < 2 ? a : b).x[i / 4 * 4 + i % 2 * 2];
    return out;
  }
  // Four times 16 bytes, `by` bytes apart; up to the 64th byte from p on they can be read.
  template <int by> static U quarters(const uint8_t* p) { return join4(p, p + by, p + 2 * by, p + 3 * by); }
  // Bytes of each 16 in the order of `index`, each word of two shifted right by its own of `by` bits, then masked bytes.
  template <int mask> static U shifted(U u, const uint8_t* index, const uint16_t* by) {
    U out;
    for (int i = 0; i < 64; i += 2) {
      const uint8_t* from = u.x + i / 16 * 16;
      const unsigned word = unsigned(from[index[i % 16]] | from[index[i % 16 + 1]] << 8) >> by[i % 16 / 2];
      out.x[i] = word & mask, out.x[i + 1] = word >> 8 & mask;
    }
    return out;
  }
  // Codes of three bits inside of a byte: see `Within`. Codes of even and of odd words, interleaved: see `Straddling`.
  template <class Words> static U within(U u, const Words& w) { return shifted<7>(u, w.within, w.at); }
  template <int mask, class Words> static U straddling(U u, const Words& w) {
    U even = shifted<mask>(u, w.even, w.even_at), odd = shifted<mask>(u, w.odd, w.odd_at);
    for (int i = 0; i < 64; i += 2) even.x[i + 1] = odd.x[i];
    return even;
  }
  // The lower bytes of the products of bytes and factors, one of these for each two bytes, times 3 / 256. Of each 16 bytes
  // the even ones, then the odd ones.
  static U thirds(U u, const uint16_t* by) {
    U out;
    for (int i = 0; i < 64; i++) out.x[i / 16 * 16 + i % 2 * 8 + i % 16 / 2] = uint8_t(uint8_t(u.x[i] * by[i / 2]) * 3 >> 8);
    return out;
  }
  // codes | value where the byte of `held` has the bit in `bits`, else codes.
  static U add_where(U codes, U held, const uint8_t* bits, uint8_t value) {
    for (int i = 0; i < 64; i++) codes.x[i] |= held.x[i] & bits[i] ? value : 0;
    return codes;
  }
  static U words(uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f, uint64_t g, uint64_t h) {
    const uint64_t all[8] = {a, b, c, d, e, f, g, h};
    return load((const uint8_t*)all);
  }
  // Eight words from their low and high bytes.
  static void zipped(uint64_t low, uint64_t high, uint16_t* out) {
    for (int i = 0; i < 8; i++) out[i] = uint16_t((low >> 8 * i & 255) | (high >> 8 * i & 255) << 8);
  }
  // twice - codes if the code's bit of `mask` is set, else codes.
  static U mirrored(U codes, uint64_t mask, uint8_t twice) {
    for (int i = 0; i < 64; i++) codes.x[i] = (mask >> i & 1) ? uint8_t(twice - codes.x[i]) : codes.x[i];
    return codes;
  }
  // Codes as `dot` takes them. wide: some are above 127.
  template <bool wide, bool is_signed> static U ready(U u) { return is_signed ? flip(u) : u; }
  // Adds the products of P vectors of codes, which are at most `most`, and activations for each lane.
  template <int P, int most> static I dot(I sums, const U* codes, const int8_t* x) {
    for (int p = 0; p < P; p++)
      for (int i = 0; i < 64; i++) sums.x[i / 4] += int32_t(codes[p].x[i]) * x[64 * p + i];
    return sums;
  }
  static I zero() { I i; memset(i.x, 0, sizeof i.x); return i; }
  static I loadi(const int32_t* p) { I i; memcpy(i.x, p, 64); return i; }
  static void storei(int32_t* p, I i) { memcpy(p, i.x, 64); }
  static I whole(F f) { I made; for (int i = 0; i < 16; i++) made.x[i] = int32_t(f.x[i]); return made; }

  static F cvt(I a) { F f; for (int i = 0; i < 16; i++) f.x[i] = float(a.x[i]); return f; }
  static F set1(float v) { F f; for (int i = 0; i < 16; i++) f.x[i] = v; return f; }
  static F loadf(const float* p) { F f; memcpy(f.x, p, 64); return f; }
  static void storef(float* p, F f) { memcpy(p, f.x, 64); }
  static F mul(F a, F b) { for (int i = 0; i < 16; i++) a.x[i] *= b.x[i]; return a; }
  static F over(F a, F b) { for (int i = 0; i < 16; i++) a.x[i] /= b.x[i]; return a; }
  static F add(F a, F b) { for (int i = 0; i < 16; i++) a.x[i] += b.x[i]; return a; }
  static F min(F a, F b) { for (int i = 0; i < 16; i++) a.x[i] = a.x[i] < b.x[i] ? a.x[i] : b.x[i]; return a; }
  static F max(F a, F b) { for (int i = 0; i < 16; i++) a.x[i] = a.x[i] > b.x[i] ? a.x[i] : b.x[i]; return a; }
  static F fma(F a, F b, F c) {
    // In double a product of floats is exact, so this nearly always rounds like a fused multiply-add.
    // gcc 12 would not always round a product to float first, depending on the loop around.
    __asm__("" : "+m"(a), "+m"(c));
    for (int i = 0; i < 16; i++) a.x[i] = float(double(a.x[i]) * b.x[i] + c.x[i]);
    return a;
  }
  static F pick(F a, const int32_t* index) { F f; for (int i = 0; i < 16; i++) f.x[i] = a.x[index[i]]; return f; }
  // The same, if all are among eight: lanes 0 to 7, or from lane 8 on.
  template <int from> static F pick8(F a, const int32_t* index) { return pick(a, index); }
  // Sixteen floats, of which lanes take those from `from` on by index. Lanes 8 to 15 are as the others, but `half` further.
  struct Held {
    float x[32] = {};
    void hold(F f) { storef(x, f); }
    F lanes(const int32_t* index, int64_t from, int64_t) const { return pick(loadf(x + from), index); }
  };
  static F from_bytes(const uint8_t* p) { F f; for (int i = 0; i < 16; i++) f.x[i] = float(p[i]); return f; }
  static F from_u64(uint64_t a, uint64_t b) { uint64_t x[2] = {a, b}; return from_bytes((const uint8_t*)x); }
  static F halfs_u64(uint64_t h) { return halfs((const uint8_t*)&h, 4); }
  static F from_signed(const uint8_t* p) { F f; for (int i = 0; i < 16; i++) f.x[i] = float(int8_t(p[i])); return f; }
  static F split(float lo, float hi) { F f; for (int i = 0; i < 16; i++) f.x[i] = i < 8 ? lo : hi; return f; }
  static float half(const uint8_t* p) {
    uint16_t h;
    memcpy(&h, p, 2);
    uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023, bits;
    if (exponent == 31) bits = sign | 0x7f800000u | mantissa << 13;
    else if (exponent) bits = sign | (exponent + 112) << 23 | mantissa << 13;
    else {
      float tiny = float(mantissa) * (1.0f / 16777216.0f);
      memcpy(&bits, &tiny, 4);
      bits |= sign;
    }
    float f;
    memcpy(&f, &bits, 4);
    return f;
  }
  // `count` (at most 16) halves from p, then zeros.
  static F halfs(const uint8_t* p, int count) {
    F f;
    for (int i = 0; i < 16; i++) f.x[i] = i < count ? half(p + 2 * i) : 0.0f;
    return f;
  }
  // The low (shift 0) or high (shift 4) nibbles of 16 bytes, looked up in a table of floats.
  template <int shift> static F levels(const uint8_t* p, F table) {
    F f;
    for (int i = 0; i < 16; i++) f.x[i] = table.x[(p[i] >> shift) & 15];
    return f;
  }
  // The numbers of sixteen E4M3 codes, times 2^-8: their bits, moved, are halves.
  static F fp8(const uint8_t* p) {
    F f;
    for (int i = 0; i < 16; i++) {
      const uint16_t h = uint16_t((p[i] & 0x80) << 8 | (p[i] & 0x7f) << 7);
      f.x[i] = half((const uint8_t*)&h);
    }
    return f;
  }
  // Sixteen numbers in float16 or bfloat16.
  static F halfs(const uint8_t* p) { return halfs(p, 16); }
  static void halfs8(const uint8_t* p, float* out) { for (int i = 0; i < 8; i++) out[i] = half(p + 2 * i); }
  static uint16_t to_half(float f) {  // rounds to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &f, 4);
    const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return uint16_t(sign | 0x7e00 | (size >> 13 & 0x3ff));  // NaN
    if (size >= 0x47800000) return uint16_t(sign | 0x7c00);  // 2^16 or more
    if (size < 0x38800000) {  // less than 2^-14: a float near 1/2 is a multiple of 2^-24
      memcpy(&f, &size, 4);
      f += 0.5f;
      memcpy(&bits, &f, 4);
      return uint16_t(sign | (bits - 0x3f000000));
    }
    return uint16_t(sign | (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13);
  }
  static void to_halfs(F f, uint8_t* p) {  // sixteen numbers
    for (int i = 0; i < 16; i++) {
      const uint16_t h = to_half(f.x[i]);
      memcpy(p + 2 * i, &h, 2);
    }
  }
  static F bfloat(const uint8_t* p) {
    F f;
    for (int i = 0; i < 16; i++) {
      uint16_t h;
      memcpy(&h, p + 2 * i, 2);
      const uint32_t bits = uint32_t(h) << 16;
      memcpy(&f.x[i], &bits, 4);
    }
    return f;
  }
  static void fp8s(const uint8_t* p, F* out) {  // 64 numbers
    for (int i = 0; i < 4; i++) out[i] = fp8(p + 16 * i);
  }
  static F fp8_u64(uint64_t x) { uint64_t both[2] = {x, 0}; return fp8((const uint8_t*)both); }
  // Powers of two from four E8M0 codes, 0 for code 0. The other lanes are not used.
  static F e8m0_u32(uint32_t x) {
    F f{};
    for (int i = 0; i < 4; i++) {
      const uint32_t bits = (x >> (8 * i) & 255) << 23;
      memcpy(&f.x[i], &bits, 4);
    }
    return f;
  }
  static float sum(F a) {
    for (int n = 8; n; n /= 2)
      for (int i = 0; i < n; i++) a.x[i] += a.x[i + n];
    return a.x[0];
  }
  // Eight fields of `bits` bits each, unpacked to one byte each.
  template <int bits> static uint64_t spread(uint64_t x) {
    uint64_t out = 0;
    for (int i = 0; i < 8; i++) out |= (x >> (i * bits) & ((1u << bits) - 1)) << (8 * i);
    return out;
  }
};

}  // namespace
