// Vectors of 64 bytes as four registers of 16: AArch64's NEON, with its dot product if the compiler enables it.
#pragma once
#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

namespace {

struct Vec {
  static constexpr int ROWS = 2;  // of W with sums in registers
  static constexpr int HALVES = 2;  // rows of x with two sums each in registers
  static constexpr int TAKEN = 128;  // what `dot` subtracts from codes above 127
  static constexpr bool SHIFTED = false;  // whether `dot` takes any bytes as codes, so that bits can stay where they are
  static constexpr int THREES = 2;  // vectors of codes of three bits for each step
  struct U { uint8x16_t x[4]; };
  struct I { int32x4_t x[4]; };
  struct F { float32x4_t x[4]; };

  static U load(const uint8_t* p) { return {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}}; }
  static U load_part(const uint8_t* p, int64_t left) {  // the first 1 to 63 bytes
    uint8_t copy[64] = {};
    memcpy(copy, p, size_t(left));
    return load(copy);
  }
  static U join(const uint8_t* a, const uint8_t* b) {
    return {{vld1q_u8(a), vld1q_u8(a + 16), vld1q_u8(b), vld1q_u8(b + 16)}};
  }
  static U join4(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d) {
    return {{vld1q_u8(a), vld1q_u8(b), vld1q_u8(c), vld1q_u8(d)}};
  }
  static U ones() { const uint8x16_t one = vdupq_n_u8(1); return {{one, one, one, one}}; }
  static void store(uint8_t* p, U u) { for (int i = 0; i < 4; i++) vst1q_u8(p + 16 * i, u.x[i]); }
  template <int a, int b, int mask> static U halves(U u) {
    const int8x16_t lo = vdupq_n_s8(a), hi = vdupq_n_s8(b);  // negative shifts right
    for (int i = 0; i < 4; i++) u.x[i] = vandq_u8(vshlq_u8(u.x[i], i < 2 ? lo : hi), vdupq_n_u8(mask));
    return u;
  }
  template <int shift, int mask> static U field(U u) { return halves<-shift, -shift, mask>(u); }
  template <int p> static U copied(U u) {
    for (int i = 0; i < 4; i++) u.x[i] = vreinterpretq_u8_u32(vdupq_laneq_u32(words(u.x[i]), p));
    return u;
  }
  template <int p> static U copied(U a, U b) {
    for (int i = 0; i < 4; i++) {
      const uint32x4_t x = vdupq_laneq_u32(words(a.x[i]), p), y = vdupq_laneq_u32(words(b.x[i]), p);
      a.x[i] = vreinterpretq_u8_u32(vcombine_u32(vget_low_u32(x), vget_low_u32(y)));
    }
    return a;
  }
  template <int mask> static U down(U u, const int32_t* by) {
    for (int i = 0; i < 4; i++) {
      const uint32x4_t bits = vshlq_u32(words(u.x[i]), vnegq_s32(vld1q_s32(by + 4 * i)));
      u.x[i] = vandq_u8(vreinterpretq_u8_u32(bits), vdupq_n_u8(mask));
    }
    return u;
  }
  static U both(U a, U b) { for (int i = 0; i < 4; i++) a.x[i] = vandq_u8(a.x[i], b.x[i]); return a; }
  static U either(U a, U b) { for (int i = 0; i < 4; i++) a.x[i] = vorrq_u8(a.x[i], b.x[i]); return a; }
  static U flip(U a) { for (int i = 0; i < 4; i++) a.x[i] = veorq_u8(a.x[i], vdupq_n_u8(0x80)); return a; }
  static U lookup(U codes, const uint8_t* table) {
    const uint8x16_t t = vld1q_u8(table);
    for (int i = 0; i < 4; i++) codes.x[i] = vqtbl1q_u8(t, codes.x[i]);
    return codes;
  }
  template <int by> static U quarters(const uint8_t* p) { return join4(p, p + by, p + 2 * by, p + 3 * by); }
  static U shuffle(U u, const uint8_t* index) {
    for (int i = 0; i < 4; i++) u.x[i] = vqtbl1q_u8(u.x[i], vld1q_u8(index));
    return u;
  }
  static uint32x4_t words(uint8x16_t x) { return vreinterpretq_u32_u8(x); }
  static U evens(U a, U b) {
    for (int i = 0; i < 4; i++) a.x[i] = vreinterpretq_u8_u32(vuzp1q_u32(words(a.x[i]), words(b.x[i])));
    return a;
  }
  static U odds(U a, U b) {
    for (int i = 0; i < 4; i++) a.x[i] = vreinterpretq_u8_u32(vuzp2q_u32(words(a.x[i]), words(b.x[i])));
    return a;
  }
  static F evens(F a, F b) { for (int i = 0; i < 4; i++) a.x[i] = vuzp1q_f32(a.x[i], b.x[i]); return a; }
  static U mul16(U u, const uint16_t* by) {
    for (int i = 0; i < 4; i++) u.x[i] = vreinterpretq_u8_u16(vmulq_u16(vreinterpretq_u16_u8(u.x[i]), vld1q_u16(by)));
    return u;
  }
  template <int mask> static U upper(U even, U odd) {
    for (int i = 0; i < 4; i++) {  // bytes 1, 3, 5 ... of both, interleaved
      even.x[i] = vandq_u8(vtrn2q_u8(even.x[i], odd.x[i]), vdupq_n_u8(mask));
    }
    return even;
  }
  template <class Words> static U within(U u, const Words& w) { return field<5, 7>(mul16(shuffle(u, w.within), w.by)); }
  template <int mask, class Words> static U straddling(U u, const Words& w) {
    return upper<mask>(mul16(shuffle(u, w.even), w.even_by), mul16(shuffle(u, w.odd), w.odd_by));
  }
  static U thirds(U u, const uint16_t* by) {
    for (int i = 0; i < 4; i++) {
      const uint16x8_t x = vreinterpretq_u16_u8(u.x[i]), factor = vld1q_u16(by + 8 * i), low = vdupq_n_u16(255);
      const uint16x8_t even = vandq_u16(vmulq_u16(x, factor), low), odd = vandq_u16(vmulq_u16(vshrq_n_u16(x, 8), factor), low);
      u.x[i] = vcombine_u8(vshrn_n_u16(vmulq_n_u16(even, 3), 8), vshrn_n_u16(vmulq_n_u16(odd, 3), 8));
    }
    return u;
  }
  // All bits of a byte whose bit of `mask` is set.
  static uint8x16_t by_bits(uint64_t mask) {
    static const uint8_t order[16] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
    static const uint8_t bit[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    return vtstq_u8(vqtbl1q_u8(vreinterpretq_u8_u64(vdupq_n_u64(mask)), vld1q_u8(order)), vld1q_u8(bit));
  }
  static U add_where(U codes, U held, const uint8_t* bits, uint8_t value) {
    for (int i = 0; i < 4; i++) {
      const uint8x16_t set = vtstq_u8(held.x[i], vld1q_u8(bits + 16 * i));
      codes.x[i] = vorrq_u8(codes.x[i], vandq_u8(set, vdupq_n_u8(value)));
    }
    return codes;
  }
  static U words(uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f, uint64_t g, uint64_t h) {
    const auto two = [](uint64_t lo, uint64_t hi) { return vcombine_u8(vcreate_u8(lo), vcreate_u8(hi)); };
    return {{two(a, b), two(c, d), two(e, f), two(g, h)}};
  }
  static void zipped(uint64_t low, uint64_t high, uint16_t* out) {
    const uint8x8x2_t both = vzip_u8(vcreate_u8(low), vcreate_u8(high));
    vst1_u8((uint8_t*)out, both.val[0]), vst1_u8((uint8_t*)(out + 4), both.val[1]);
  }
  static U mirrored(U codes, uint64_t mask, uint8_t twice) {
    for (int i = 0; i < 4; i++)
      codes.x[i] = vbslq_u8(by_bits(mask >> (16 * i)), vsubq_u8(vdupq_n_u8(twice), codes.x[i]), codes.x[i]);
    return codes;
  }
  static int32x4_t dot16(int32x4_t acc, int8x16_t a, int8x16_t b) {
#ifdef __ARM_FEATURE_DOTPROD
    return vdotq_s32(acc, a, b);
#else
    int16x8_t lo = vmull_s8(vget_low_s8(a), vget_low_s8(b)), hi = vmull_high_s8(a, b);
    return vaddq_s32(acc, vpaddq_s32(vpaddlq_s16(lo), vpaddlq_s16(hi)));
#endif
  }
  // Codes as `dot` takes them: those above 127 minus 128.
  template <bool wide, bool is_signed> static U ready(U u) { return wide && !is_signed ? flip(u) : u; }
  template <int P, int most> static I dot(I sums, const U* codes, const int8_t* x) {
    for (int p = 0; p < P; p++)
      for (int i = 0; i < 4; i++)
        sums.x[i] = dot16(sums.x[i], vreinterpretq_s8_u8(codes[p].x[i]), vld1q_s8(x + 64 * p + 16 * i));
    return sums;
  }
  static I zero() { const int32x4_t z = vdupq_n_s32(0); return {{z, z, z, z}}; }

  static I loadi(const int32_t* p) { I made; for (int i = 0; i < 4; i++) made.x[i] = vld1q_s32(p + 4 * i); return made; }
  static void storei(int32_t* p, I from) { for (int i = 0; i < 4; i++) vst1q_s32(p + 4 * i, from.x[i]); }
  static I whole(F f) { I made; for (int i = 0; i < 4; i++) made.x[i] = vcvtnq_s32_f32(f.x[i]); return made; }
  static F cvt(I a) { F f; for (int i = 0; i < 4; i++) f.x[i] = vcvtq_f32_s32(a.x[i]); return f; }
  static F set1(float v) { const float32x4_t z = vdupq_n_f32(v); return {{z, z, z, z}}; }
  static F loadf(const float* p) { F f; for (int i = 0; i < 4; i++) f.x[i] = vld1q_f32(p + 4 * i); return f; }
  static void storef(float* p, F f) { for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, f.x[i]); }
  static F mul(F a, F b) { for (int i = 0; i < 4; i++) a.x[i] = vmulq_f32(a.x[i], b.x[i]); return a; }
  static F over(F a, F b) { for (int i = 0; i < 4; i++) a.x[i] = vdivq_f32(a.x[i], b.x[i]); return a; }
  static F add(F a, F b) { for (int i = 0; i < 4; i++) a.x[i] = vaddq_f32(a.x[i], b.x[i]); return a; }
  static F min(F a, F b) { for (int i = 0; i < 4; i++) a.x[i] = vminq_f32(a.x[i], b.x[i]); return a; }
  static F max(F a, F b) { for (int i = 0; i < 4; i++) a.x[i] = vmaxq_f32(a.x[i], b.x[i]); return a; }
  static F fma(F a, F b, F c) { for (int i = 0; i < 4; i++) c.x[i] = vfmaq_f32(c.x[i], a.x[i], b.x[i]); return c; }
  static F pick(F a, const int32_t* index) {
    float from[16], to[16];
    storef(from, a);
    for (int i = 0; i < 16; i++) to[i] = from[index[i]];
    return loadf(to);
  }
  template <int from> static F pick8(F a, const int32_t* index) { return pick(a, index); }
  struct Held {
    float x[32] = {};
    void hold(F f) { storef(x, f); }
    F lanes(const int32_t* index, int64_t from, int64_t) const {
      float to[16];
      for (int i = 0; i < 16; i++) to[i] = x[from + index[i]];
      return loadf(to);
    }
  };
  static F from_bytes(const uint8_t* p) {
    float to[16];
    for (int i = 0; i < 16; i++) to[i] = (float)p[i];
    return loadf(to);
  }
  static F from_u64(uint64_t a, uint64_t b) { uint64_t x[2] = {a, b}; return from_bytes((const uint8_t*)x); }
  static F halfs_u64(uint64_t h) { return halfs((const uint8_t*)&h, 4); }
  static F from_signed(const uint8_t* p) {
    float to[16];
    for (int i = 0; i < 16; i++) to[i] = (float)(int8_t)p[i];
    return loadf(to);
  }
  static F split(float lo, float hi) {
    return {{vdupq_n_f32(lo), vdupq_n_f32(lo), vdupq_n_f32(hi), vdupq_n_f32(hi)}};
  }
  static float half(const uint8_t* p) {
    __fp16 h;
    memcpy(&h, p, 2);
    return (float)h;
  }
  static F halfs(const uint8_t* p, int count) {
    float to[16];
    for (int i = 0; i < 16; i++) to[i] = i < count ? half(p + 2 * i) : 0.0f;
    return loadf(to);
  }
  template <int shift> static F levels(const uint8_t* p, F table) {
    float from[16], to[16];
    storef(from, table);
    for (int i = 0; i < 16; i++) to[i] = from[(p[i] >> shift) & 15];
    return loadf(to);
  }
  static F fp8(const uint8_t* p) {  // the bits of E4M3 codes move up, and the copied sign is cleared
    const int8x16_t x = vreinterpretq_s8_u8(vld1q_u8(p));
    const uint16x8_t mask = vdupq_n_u16(0xbfff);
    const uint16x8_t lo = vandq_u16(vreinterpretq_u16_s16(vshlq_n_s16(vmovl_s8(vget_low_s8(x)), 7)), mask);
    const uint16x8_t hi = vandq_u16(vreinterpretq_u16_s16(vshlq_n_s16(vmovl_s8(vget_high_s8(x)), 7)), mask);
    const float16x8_t a = vreinterpretq_f16_u16(lo), b = vreinterpretq_f16_u16(hi);
    return {{vcvt_f32_f16(vget_low_f16(a)), vcvt_f32_f16(vget_high_f16(a)), vcvt_f32_f16(vget_low_f16(b)),
             vcvt_f32_f16(vget_high_f16(b))}};
  }
  static F halfs(const uint8_t* p) {
    F f;
    for (int i = 0; i < 4; i++) f.x[i] = vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p + 8 * i)));
    return f;
  }
  static void halfs8(const uint8_t* p, float* out) {
    for (int i = 0; i < 2; i++) vst1q_f32(out + 4 * i, vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p + 8 * i))));
  }
  static void to_halfs(F f, uint8_t* p) {
    for (int i = 0; i < 4; i++) vst1_u8(p + 8 * i, vreinterpret_u8_f16(vcvt_f16_f32(f.x[i])));
  }
  static F bfloat(const uint8_t* p) {
    F f;
    for (int i = 0; i < 4; i++)
      f.x[i] = vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(p + 8 * i)), 16));
    return f;
  }
  static void fp8s(const uint8_t* p, F* out) {  // 64 numbers
    for (int i = 0; i < 4; i++) out[i] = fp8(p + 16 * i);
  }
  static F fp8_u64(uint64_t x) { uint64_t both[2] = {x, 0}; return fp8((const uint8_t*)both); }
  static F e8m0_u32(uint32_t x) {
    const uint8x8_t codes = vreinterpret_u8_u32(vdup_n_u32(x));
    const uint32x4_t bits = vshlq_n_u32(vmovl_u16(vget_low_u16(vmovl_u8(codes))), 23);
    const float32x4_t z = vdupq_n_f32(0);
    return {{vreinterpretq_f32_u32(bits), z, z, z}};
  }
  static float sum(F a) {
    return vaddvq_f32(vaddq_f32(vaddq_f32(a.x[0], a.x[1]), vaddq_f32(a.x[2], a.x[3])));
  }
  template <int bits> static uint64_t spread(uint64_t x) {
    uint64_t out = 0;
    for (int i = 0; i < 8; i++) out |= (x >> (i * bits) & ((1u << bits) - 1)) << (8 * i);
    return out;
  }
};

}  // namespace
