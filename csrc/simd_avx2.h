// Vectors of 64 bytes as two registers of 32: AVX2 with FMA, F16C and BMI2; with AVX-VNNI if the compiler enables it.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

struct Vec {
  static constexpr int ROWS = 1;  // of W with sums in registers
  static constexpr int HALVES = 2;  // rows of x with two sums each in registers
#ifdef __AVXVNNI__
  static constexpr int TAKEN = 0;  // what `dot` subtracts from codes above 127
  static constexpr bool SHIFTED = true;  // whether `dot` takes any bytes as codes, so that bits can stay where they are
#else
  static constexpr int TAKEN = 128;
  static constexpr bool SHIFTED = false;
#endif
  static constexpr int THREES = 2;  // vectors of codes of three bits for each step
  struct U { __m256i lo, hi; };
  using I = U;
  struct F { __m256 lo, hi; };

  static __m256i part32(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
  static __m128i part16(const uint8_t* p) { return _mm_loadu_si128((const __m128i*)p); }
  static U load(const uint8_t* p) { return {part32(p), part32(p + 32)}; }
  static U load_part(const uint8_t* p, int64_t left) {  // the first 1 to 63 bytes
    uint8_t copy[64] = {};
    memcpy(copy, p, size_t(left));
    return load(copy);
  }
  static U join(const uint8_t* a, const uint8_t* b) { return {part32(a), part32(b)}; }
  static U join4(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d) {
    return {_mm256_inserti128_si256(_mm256_castsi128_si256(part16(a)), part16(b), 1),
            _mm256_inserti128_si256(_mm256_castsi128_si256(part16(c)), part16(d), 1)};
  }
  static U ones() { return {_mm256_set1_epi8(1), _mm256_set1_epi8(1)}; }
  static void store(uint8_t* p, U u) {
    _mm256_storeu_si256((__m256i*)p, u.lo);
    _mm256_storeu_si256((__m256i*)(p + 32), u.hi);
  }
  template <int by> static __m256i shift32(__m256i x) {
    return by > 0 ? _mm256_slli_epi16(x, by > 0 ? by : 0) : by < 0 ? _mm256_srli_epi16(x, by < 0 ? -by : 0) : x;
  }
  template <int a, int b, int mask> static U halves(U u) {
    __m256i m = _mm256_set1_epi8((char)mask);
    return {_mm256_and_si256(shift32<a>(u.lo), m), _mm256_and_si256(shift32<b>(u.hi), m)};
  }
  template <int shift, int mask> static U field(U u) { return halves<-shift, -shift, mask>(u); }
  template <int which> static __m256i words32(__m256i a, __m256i b) {
    return _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), which));
  }
  template <int p> static U copied(U u) {
    return {_mm256_shuffle_epi32(u.lo, p * 0x55), _mm256_shuffle_epi32(u.hi, p * 0x55)};
  }
  template <int p> static U copied(U a, U b) { return {words32<p * 0x55>(a.lo, b.lo), words32<p * 0x55>(a.hi, b.hi)}; }
  template <int mask> static __m256i down32(__m256i x, const int32_t* by) {
    return _mm256_and_si256(_mm256_srlv_epi32(x, part32((const uint8_t*)by)), _mm256_set1_epi8((char)mask));
  }
  template <int mask> static U down(U u, const int32_t* by) { return {down32<mask>(u.lo, by), down32<mask>(u.hi, by + 8)}; }
  static U both(U a, U b) { return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)}; }
  static U either(U a, U b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
  static U flip(U a) {
    __m256i m = _mm256_set1_epi8((char)0x80);
    return {_mm256_xor_si256(a.lo, m), _mm256_xor_si256(a.hi, m)};
  }
  static U lookup(U codes, const uint8_t* table) {
    __m256i t = _mm256_broadcastsi128_si256(part16(table));
    return {_mm256_shuffle_epi8(t, codes.lo), _mm256_shuffle_epi8(t, codes.hi)};
  }
  template <int by> static U quarters(const uint8_t* p) { return join4(p, p + by, p + 2 * by, p + 3 * by); }
  static U shuffle(U u, const uint8_t* index) {
    __m256i at = _mm256_broadcastsi128_si256(part16(index));
    return {_mm256_shuffle_epi8(u.lo, at), _mm256_shuffle_epi8(u.hi, at)};
  }
  template <int odd> static __m256 halved(__m256 a, __m256 b) { return _mm256_shuffle_ps(a, b, odd ? 0xdd : 0x88); }
  template <int odd> static __m256i halved(__m256i a, __m256i b) { return words32<odd ? 0xdd : 0x88>(a, b); }
  static U evens(U a, U b) { return {halved<0>(a.lo, b.lo), halved<0>(a.hi, b.hi)}; }
  static U odds(U a, U b) { return {halved<1>(a.lo, b.lo), halved<1>(a.hi, b.hi)}; }
  static F evens(F a, F b) { return {halved<0>(a.lo, b.lo), halved<0>(a.hi, b.hi)}; }
  static U mul16(U u, const uint16_t* by) {
    __m256i factor = _mm256_broadcastsi128_si256(part16((const uint8_t*)by));
    return {_mm256_mullo_epi16(u.lo, factor), _mm256_mullo_epi16(u.hi, factor)};
  }
  template <int mask> static __m256i upper32(__m256i even, __m256i odd) {
    return _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(even, 8), _mm256_set1_epi16(mask)),
                           _mm256_and_si256(odd, _mm256_set1_epi16((short)(mask << 8))));
  }
  template <int mask> static U upper(U even, U odd) {
    return {upper32<mask>(even.lo, odd.lo), upper32<mask>(even.hi, odd.hi)};
  }
  template <class Words> static U within(U u, const Words& w) { return field<5, 7>(mul16(shuffle(u, w.within), w.by)); }
  template <int mask, class Words> static U straddling(U u, const Words& w) {
    return upper<mask>(mul16(shuffle(u, w.even), w.even_by), mul16(shuffle(u, w.odd), w.odd_by));
  }
  static __m256i thirds32(__m256i x, const uint16_t* by) {
    const __m256i factor = part32((const uint8_t*)by), three = _mm256_set1_epi16(3);
    const __m256i even = _mm256_mullo_epi16(_mm256_slli_epi16(x, 8), factor);
    const __m256i odd = _mm256_mullo_epi16(_mm256_and_si256(x, _mm256_set1_epi16((short)0xff00)), factor);
    return _mm256_packus_epi16(_mm256_mulhi_epu16(even, three), _mm256_mulhi_epu16(odd, three));
  }
  static U thirds(U u, const uint16_t* by) { return {thirds32(u.lo, by), thirds32(u.hi, by + 16)}; }
  static __m256i by_bits(uint32_t mask, uint8_t value) {
    const __m256i which = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
    const __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201ull);
    __m256i held = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32((int)mask), which), bit);
    return _mm256_and_si256(_mm256_cmpeq_epi8(held, bit), _mm256_set1_epi8((char)value));
  }
  static __m256i where(__m256i held, const uint8_t* bits, uint8_t value) {
    const __m256i bit = part32(bits);
    return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(held, bit), bit), _mm256_set1_epi8((char)value));
  }
  static U add_where(U codes, U held, const uint8_t* bits, uint8_t value) {
    return {_mm256_or_si256(codes.lo, where(held.lo, bits, value)),
            _mm256_or_si256(codes.hi, where(held.hi, bits + 32, value))};
  }
  static U words(uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f, uint64_t g, uint64_t h) {
    return {_mm256_set_epi64x((long long)d, (long long)c, (long long)b, (long long)a),
            _mm256_set_epi64x((long long)h, (long long)g, (long long)f, (long long)e)};
  }
  static void zipped(uint64_t low, uint64_t high, uint16_t* out) {
    const __m128i both = _mm_unpacklo_epi8(_mm_cvtsi64_si128((long long)low), _mm_cvtsi64_si128((long long)high));
    _mm_storeu_si128((__m128i*)out, both);
  }
  static __m256i mirrored32(__m256i codes, uint32_t mask, uint8_t twice) {
    const __m256i minus = by_bits(mask, 0xff);
    return _mm256_add_epi8(_mm256_sub_epi8(_mm256_xor_si256(codes, minus), minus),
                           _mm256_and_si256(minus, _mm256_set1_epi8((char)twice)));
  }
  static U mirrored(U codes, uint64_t mask, uint8_t twice) {
    return {mirrored32(codes.lo, (uint32_t)mask, twice), mirrored32(codes.hi, (uint32_t)(mask >> 32), twice)};
  }
  // Codes as `dot` takes them: without VNNI, those above 127 minus 128.
  template <bool wide, bool is_signed> static U ready(U u) { return wide && is_signed != (TAKEN > 0) ? flip(u) : u; }
  // Sums, codes and activations are every second register from these on.
  template <int P, int most> static __m256i dot32(__m256i sums, const __m256i* u, const __m256i* x) {
#ifdef __AVXVNNI__
    for (int p = 0; p < P; p++) sums = _mm256_dpbusd_avx_epi32(sums, u[2 * p], _mm256_loadu_si256(x + 2 * p));
#else
    constexpr int FIT = most > 127 ? 1 : 32767 / (2 * 127 * most);  // so many sums of two products fit into 16 bits
    for (int p = 0; p < P; p += FIT) {
      __m256i words = pairs<(most > 127)>(u[2 * p], _mm256_loadu_si256(x + 2 * p));
      for (int i = p + 1; i < P && i < p + FIT; i++)
        words = _mm256_add_epi16(words, pairs<false>(u[2 * i], _mm256_loadu_si256(x + 2 * i)));
      sums = _mm256_add_epi32(sums, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
    }
#endif
    return sums;
  }
  template <bool wide> static __m256i pairs(__m256i u, __m256i x) {
    return wide ? _mm256_maddubs_epi16(_mm256_abs_epi8(u), _mm256_sign_epi8(x, u)) : _mm256_maddubs_epi16(u, x);
  }
  template <int P, int most> static I dot(I sums, const U* codes, const int8_t* x) {
    const __m256i* at = (const __m256i*)x;
    return {dot32<P, most>(sums.lo, &codes->lo, at), dot32<P, most>(sums.hi, &codes->hi, at + 1)};
  }
  static I zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static I loadi(const int32_t* p) { return load((const uint8_t*)p); }
  static void storei(int32_t* p, I i) { store((uint8_t*)p, i); }
  static I whole(F f) { return {_mm256_cvtps_epi32(f.lo), _mm256_cvtps_epi32(f.hi)}; }

  static F cvt(I a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
  static F set1(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
  static F loadf(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void storef(float* p, F f) { _mm256_storeu_ps(p, f.lo), _mm256_storeu_ps(p + 8, f.hi); }
  static F mul(F a, F b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
  static F over(F a, F b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
  static F add(F a, F b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
  static F min(F a, F b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
  static F max(F a, F b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
  static F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
  static __m256 pick8(F a, __m256i index) {
    __m256 lo = _mm256_permutevar8x32_ps(a.lo, index), hi = _mm256_permutevar8x32_ps(a.hi, index);
    return _mm256_blendv_ps(lo, hi, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));  // bit 3 selects the half
  }
  template <int from> static F pick8(F a, const int32_t* index) {
    const __m256 held = from ? a.hi : a.lo;
    return {_mm256_permutevar8x32_ps(held, part32((const uint8_t*)index)),
            _mm256_permutevar8x32_ps(held, part32((const uint8_t*)(index + 8)))};
  }
  static F pick(F a, const int32_t* index) {
    return {pick8(a, part32((const uint8_t*)index)), pick8(a, part32((const uint8_t*)(index + 8)))};
  }
  struct Held {  // in memory: a lane of any of 16 floats in two registers would take two permutations
    float x[32] = {};
    void hold(F f) { storef(x, f); }
    F lanes(const int32_t* index, int64_t from, int64_t half) const {
      const __m256i at = part32((const uint8_t*)index);
      return {_mm256_permutevar8x32_ps(_mm256_loadu_ps(x + from), at),
              _mm256_permutevar8x32_ps(_mm256_loadu_ps(x + from + half), at)};
    }
  };
  static I widen(__m128i x) { return {_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8))}; }
  static F from_bytes(const uint8_t* p) { return cvt(widen(part16(p))); }
  static F from_u64(uint64_t a, uint64_t b) { return cvt(widen(_mm_set_epi64x((long long)b, (long long)a))); }
  static F halfs_u64(uint64_t h) {
    __m256 x = _mm256_cvtph_ps(_mm_cvtsi64_si128((long long)h));
    return {x, x};
  }
  static F from_signed(const uint8_t* p) {
    __m128i x = part16(p);
    return cvt(I{_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8))});
  }
  static F split(float lo, float hi) { return {_mm256_set1_ps(lo), _mm256_set1_ps(hi)}; }
  static float half(const uint8_t* p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return _cvtsh_ss(h);
  }
  static F halfs(const uint8_t* p, int count) {
    uint16_t h[16];
    if (count == 1) {
      float first = half(p);  // the only one that is used
      return set1(first);
    }
    memset(h, 0, sizeof h);
    memcpy(h, p, 2 * (size_t)count);
    return {_mm256_cvtph_ps(part16((const uint8_t*)h)), _mm256_cvtph_ps(part16((const uint8_t*)(h + 8)))};
  }
  template <int shift> static F levels(const uint8_t* p, F table) {
    __m128i x = _mm_and_si128(_mm_srli_epi16(part16(p), shift), _mm_set1_epi8(15));
    I index = widen(x);
    return {pick8(table, index.lo), pick8(table, index.hi)};
  }
  static __m256 halves_of(__m128i codes) {  // of eight E4M3 codes: their bits move up, and the copied sign is cleared
    const __m128i wide = _mm_slli_epi16(_mm_cvtepi8_epi16(codes), 7);
    return _mm256_cvtph_ps(_mm_and_si128(wide, _mm_set1_epi16((short)0xbfff)));
  }
  static F fp8(const uint8_t* p) {
    const __m128i x = part16(p);
    return {halves_of(x), halves_of(_mm_srli_si128(x, 8))};
  }
  static F halfs(const uint8_t* p) { return {_mm256_cvtph_ps(part16(p)), _mm256_cvtph_ps(part16(p + 16))}; }
  static void halfs8(const uint8_t* p, float* out) { _mm256_storeu_ps(out, _mm256_cvtph_ps(part16(p))); }
  static void to_halfs(F f, uint8_t* p) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(f.lo, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i*)(p + 16), _mm256_cvtps_ph(f.hi, _MM_FROUND_TO_NEAREST_INT));
  }
  static __m256 bfloat8(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
  static F bfloat(const uint8_t* p) { return {bfloat8(part16(p)), bfloat8(part16(p + 16))}; }
  static void fp8s(const uint8_t* p, F* out) {  // 64 numbers
    for (int i = 0; i < 4; i++) out[i] = fp8(p + 16 * i);
  }
  static F fp8_u64(uint64_t x) { return {halves_of(_mm_cvtsi64_si128((long long)x)), _mm256_setzero_ps()}; }
  static F e8m0_u32(uint32_t x) {
    const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu8_epi32(_mm_cvtsi32_si128((int)x)), 23);
    return {_mm256_castsi256_ps(bits), _mm256_setzero_ps()};
  }
  static float sum(F a) {
    __m256 x = _mm256_add_ps(a.lo, a.hi);
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
  }
  template <int bits> static uint64_t spread(uint64_t x) {
    return _pdep_u64(x, 0x0101010101010101ull * ((1u << bits) - 1));
  }
};

}  // namespace
