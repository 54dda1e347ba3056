// Vectors of 64 bytes as one register: AVX-512 (F, BW, DQ, VL) with VNNI, F16C, FMA and BMI2; with VBMI if the compiler
// enables it.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

template <int by> struct Words {  // of four times 16 bytes, `by` bytes apart, the numbers of their words
  uint16_t of[32];
  constexpr Words() : of() {
    for (int i = 0; i < 32; i++) of[i] = uint16_t((i / 8 * by + i % 8 * 2) / 2 % 32);
  }
};

struct Vec {
  static constexpr int ROWS = 4;  // of W with sums in registers
  static constexpr int HALVES = 8;  // rows of x with two sums each in registers
  static constexpr int TAKEN = 0;  // what `dot` subtracts from codes above 127
  static constexpr bool SHIFTED = true;  // whether `dot` takes any bytes as codes, so that bits can stay where they are
#ifdef __AVX512VBMI__
  static constexpr int THREES = 4;  // vectors of codes of three bits for each step
#else
  static constexpr int THREES = 2;
#endif
  using U = __m512i;
  using I = __m512i;
  using F = __m512;

  static U load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static U load_part(const uint8_t* p, int64_t left) {  // the first 1 to 63 bytes
    return _mm512_maskz_loadu_epi8((1ull << left) - 1, p);
  }
  static __m256i part32(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
  static __m128i part16(const uint8_t* p) { return _mm_loadu_si128((const __m128i*)p); }
  static U join(const uint8_t* a, const uint8_t* b) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(part32(a)), part32(b), 1);
  }
  static U join4(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d) {
    __m256i lo = _mm256_inserti128_si256(_mm256_castsi128_si256(part16(a)), part16(b), 1);
    __m256i hi = _mm256_inserti128_si256(_mm256_castsi128_si256(part16(c)), part16(d), 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(lo), hi, 1);
  }
  static U ones() { return _mm512_set1_epi8(1); }
  static void store(uint8_t* p, U u) { _mm512_storeu_si512(p, u); }
  template <int shift, int mask> static U field(U u) {
    U s = shift ? _mm512_srli_epi16(u, shift) : u;
    return _mm512_and_si512(s, _mm512_set1_epi8((char)mask));
  }
  template <int by> static __m256i shift32(__m256i x) {
    return by > 0 ? _mm256_slli_epi16(x, by > 0 ? by : 0) : by < 0 ? _mm256_srli_epi16(x, by < 0 ? -by : 0) : x;
  }
  template <int a, int b, int mask> static U halves(U u) {
    __m256i lo = shift32<a>(_mm512_castsi512_si256(u)), hi = shift32<b>(_mm512_extracti64x4_epi64(u, 1));
    return _mm512_and_si512(_mm512_inserti64x4(_mm512_castsi256_si512(lo), hi, 1), _mm512_set1_epi8((char)mask));
  }
  template <int p> static U copied(U u) { return _mm512_shuffle_epi32(u, (_MM_PERM_ENUM)(p * 0x55)); }
  template <int p> static U copied(U a, U b) {
    return _mm512_castps_si512(_mm512_shuffle_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), p * 0x55));
  }
  template <int mask> static U down(U u, const int32_t* by) {
    return _mm512_and_si512(_mm512_srlv_epi32(u, _mm512_loadu_si512(by)), _mm512_set1_epi8((char)mask));
  }
  static U both(U a, U b) { return _mm512_and_si512(a, b); }
  template <class Bits> static F six_bits(const uint8_t* p, const Bits& bits) {
    const __m128i block = part16(p);
    const U all = _mm512_broadcast_i32x4(block);
    const U low = both(_mm512_srlv_epi32(_mm512_shuffle_epi8(all, load(bits.low)), load((const uint8_t*)bits.shift)),
                       load((const uint8_t*)bits.mask));
    const U high = _mm512_srli_epi32(_mm512_shuffle_epi8(all, load(bits.high)), 2);
    const U found = _mm512_ternarylogic_epi32(low, high, _mm512_set1_epi32(0x30), 0xf8);  // low | (high & 0x30)
    const __m256i halves = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(block), part32(bits.halves));
    return mul(cvt(found), _mm512_cvtph_ps(_mm256_xor_si256(halves, part32(bits.sign))));
  }
  static U either(U a, U b) { return _mm512_or_si512(a, b); }
  static U flip(U a) { return _mm512_xor_si512(a, _mm512_set1_epi8((char)0x80)); }
  static U lookup(U codes, const uint8_t* table) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(part16(table)), codes);
  }
  template <int by> static U quarters(const uint8_t* p) {
    alignas(64) static constexpr Words<by> AT{};
    return _mm512_permutexvar_epi16(load((const uint8_t*)AT.of), load(p));
  }
#ifdef __AVX512VBMI__
  // Of 64 or 96 bytes those that `index` names. From 64 on, it counts the last 64 bytes again.
  template <int count> static U bytes(const uint8_t* p, const uint8_t* index) {
    if constexpr (count == 64) return _mm512_permutexvar_epi8(load(index), load(p));
    return _mm512_permutex2var_epi8(load(p), load(index), load(p + count - 64));
  }
  static U table(const uint8_t* table, U bytes) {  // of 256 bytes
    const U low = _mm512_permutex2var_epi8(load(table), bytes, load(table + 64));
    const U high = _mm512_permutex2var_epi8(load(table + 128), bytes, load(table + 192));
    return _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(bytes), high);
  }
  // Lanes of a, or of b from number 16 on.
  static U lanes(U a, U b, const int32_t* at) { return _mm512_permutex2var_epi32(a, load((const uint8_t*)at), b); }
  // The last three lanes are those of `last`, each shifted left by its own number of bits.
  static U last_up(U u, U last, const int32_t* by) { return _mm512_mask_sllv_epi32(u, 0xe000, last, load((const uint8_t*)by)); }
  static U mean(U a, U b) { return _mm512_avg_epu8(a, b); }
  static U less(U a, uint8_t b) { return _mm512_subs_epu8(a, _mm512_set1_epi8((char)b)); }  // at least 0
  // Of each 8 bytes, fields that begin at these bits.
  template <int mask> static U fields(U u, const uint8_t* at) {
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(load(at), u), _mm512_set1_epi8((char)mask));
  }
#endif
  static U shuffle(U u, const uint8_t* index) {
    return _mm512_shuffle_epi8(u, _mm512_broadcast_i32x4(part16(index)));
  }
  template <class Words> static U within(U u, const Words& w) {
    const U words = _mm512_srlv_epi16(shuffle(u, w.within), _mm512_broadcast_i32x4(part16((const uint8_t*)w.at)));
    return _mm512_and_si512(words, _mm512_set1_epi8(7));
  }
  template <int mask, class Words> static U straddling(U u, const Words& w) {
    const U eight = _mm512_set1_epi16(8), odd_at = _mm512_broadcast_i32x4(part16((const uint8_t*)w.odd_at));
    const U even = _mm512_srlv_epi16(shuffle(u, w.even), _mm512_broadcast_i32x4(part16((const uint8_t*)w.even_at)));
    const U odd = _mm512_sllv_epi16(shuffle(u, w.odd), _mm512_sub_epi16(eight, odd_at));
    return _mm512_and_si512(_mm512_ternarylogic_epi32(_mm512_set1_epi16(255), even, odd, 0xca), _mm512_set1_epi8((char)mask));
  }
  static F evens(F a, F b) { return _mm512_shuffle_ps(a, b, 0x88); }
  static U evens(U a, U b) { return _mm512_castps_si512(evens(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b))); }
  static U odds(U a, U b) {
    return _mm512_castps_si512(_mm512_shuffle_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), 0xdd));
  }
  static U thirds(U u, const uint16_t* by) {
    const U factor = load((const uint8_t*)by), three = _mm512_set1_epi16(3);
    const U even = _mm512_mullo_epi16(_mm512_slli_epi16(u, 8), factor);
    const U odd = _mm512_mullo_epi16(_mm512_and_si512(u, _mm512_set1_epi16((short)0xff00)), factor);
    return _mm512_packus_epi16(_mm512_mulhi_epu16(even, three), _mm512_mulhi_epu16(odd, three));
  }
  static U add_where(U codes, U held, const uint8_t* bits, uint8_t value) {
    const __mmask64 set = _mm512_test_epi8_mask(held, load(bits));
    return _mm512_mask_add_epi8(codes, set, codes, _mm512_set1_epi8((char)value));
  }
  static U words(uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f, uint64_t g, uint64_t h) {
    return _mm512_set_epi64((long long)h, (long long)g, (long long)f, (long long)e, (long long)d, (long long)c,
                            (long long)b, (long long)a);
  }
  static void zipped(uint64_t low, uint64_t high, uint16_t* out) {
    const __m128i both = _mm_unpacklo_epi8(_mm_cvtsi64_si128((long long)low), _mm_cvtsi64_si128((long long)high));
    _mm_storeu_si128((__m128i*)out, both);
  }
  static U mirrored(U codes, uint64_t mask, uint8_t twice) {
    return _mm512_mask_sub_epi8(codes, (__mmask64)mask, _mm512_set1_epi8((char)twice), codes);
  }
  template <bool wide, bool is_signed> static U ready(U u) { return is_signed ? flip(u) : u; }
  template <int P, int most> static I dot(I sums, const U* codes, const int8_t* x) {
    for (int p = 0; p < P; p++) sums = _mm512_dpbusd_epi32(sums, codes[p], _mm512_loadu_si512(x + 64 * p));
    return sums;
  }
  static I zero() { return _mm512_setzero_si512(); }
  static I loadi(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void storei(int32_t* p, I i) { _mm512_storeu_si512(p, i); }
  static I whole(F f) { return _mm512_cvtps_epi32(f); }

  static F cvt(I a) { return _mm512_cvtepi32_ps(a); }
  static F set1(float v) { return _mm512_set1_ps(v); }
  static F loadf(const float* p) { return _mm512_loadu_ps(p); }
  static void storef(float* p, F f) { _mm512_storeu_ps(p, f); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F over(F a, F b) { return _mm512_div_ps(a, b); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F pick(F a, const int32_t* index) { return _mm512_permutexvar_ps(_mm512_loadu_si512(index), a); }
  template <int from> static F pick8(F a, const int32_t* index) { return pick(a, index); }
  struct Held {
    F x = set1(0);
    void hold(F f) { x = f; }
    F lanes(const int32_t* index, int64_t from, int64_t) const {
      return _mm512_permutexvar_ps(_mm512_add_epi32(_mm512_loadu_si512(index), _mm512_set1_epi32(int(from))), x);
    }
  };
  static F from_bytes(const uint8_t* p) { return cvt(_mm512_cvtepu8_epi32(part16(p))); }
  static F from_u64(uint64_t a, uint64_t b) {
    return cvt(_mm512_cvtepu8_epi32(_mm_set_epi64x((long long)b, (long long)a)));
  }
  static F halfs_u64(uint64_t h) {  // four halves; the other lanes are not used
    return _mm512_castps128_ps512(_mm_cvtph_ps(_mm_cvtsi64_si128((long long)h)));
  }
  static F from_signed(const uint8_t* p) { return cvt(_mm512_cvtepi8_epi32(part16(p))); }
  static F split(float lo, float hi) {
    return _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(lo), _mm512_set1_ps(hi));
  }
  static float half(const uint8_t* p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return _cvtsh_ss(h);
  }
  static F halfs(const uint8_t* p, int count) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), p));
  }
  template <int shift> static F levels(const uint8_t* p, F table) {
    return _mm512_permutexvar_ps(_mm512_srli_epi32(_mm512_cvtepu8_epi32(part16(p)), shift), table);
  }
  static F halves_of(__m128i codes) {  // of E4M3 codes: sign and exponent move up, and the copied sign is cleared
    const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7);
    return _mm512_cvtph_ps(_mm256_and_si256(wide, _mm256_set1_epi16((short)0xbfff)));
  }
  static F halfs(const uint8_t* p) { return _mm512_cvtph_ps(part32(p)); }
  static void halfs8(const uint8_t* p, float* out) { _mm256_storeu_ps(out, _mm256_cvtph_ps(part16(p))); }
  static void to_halfs(F f, uint8_t* p) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static F bfloat(const uint8_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(part32(p)), 16));
  }
  static void fp8s(const uint8_t* p, F* out) {  // 64 numbers
    for (int i = 0; i < 2; i++) {
      const __m512i wide = _mm512_slli_epi16(_mm512_cvtepi8_epi16(part32(p + 32 * i)), 7);
      const __m512i halves = _mm512_and_si512(wide, _mm512_set1_epi16((short)0xbfff));
      out[2 * i] = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
      out[2 * i + 1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
    }
  }
  static F fp8_u64(uint64_t x) { return halves_of(_mm_cvtsi64_si128((long long)x)); }
  static F e8m0_u32(uint32_t x) {
    return _mm512_castsi512_ps(_mm512_castsi128_si512(_mm_slli_epi32(_mm_cvtepu8_epi32(_mm_cvtsi32_si128((int)x)), 23)));
  }
  static float sum(F a) {
    __m256 x = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
  }
  template <int bits> static uint64_t spread(uint64_t x) {
    return _pdep_u64(x, 0x0101010101010101ull * ((1u << bits) - 1));
  }
};

}  // namespace
