// The loops over rows for every format and instruction set: products with rounded activations, and decoding.

#include "isa.h"
#include "block.inl"
#include "formats.inl"
#include "integers.inl"
#include "codebooks.inl"
#include "floats.inl"
#include "fp8.inl"
#include "vectors.inl"

namespace {

template <class Fmt> struct Order {  // position in the kernel's order -> column of a chunk
  uint16_t at[Fmt::C];
  constexpr Order() : at() {
    for (int s = 0, i = 0; s < Fmt::STEPS; s++)
      for (int p = 0; p < Fmt::P; p++)
        for (int b = 0; b < 64; b++) at[i++] = uint16_t(Fmt::column(s, p, b));
  }
  constexpr bool in_fours() const {  // four columns in a row stay so
    for (int i = 0; i < Fmt::C; i++)
      if (at[i] != at[i / 4 * 4] + i % 4) return false;
    return true;
  }
  constexpr bool in_turns() const {  // P neighbours are at the same place of P vectors
    for (int i = 0; i < Fmt::C; i++)
      if (Fmt::STEPS > 1 || at[i] != i % 64 * Fmt::P + i / 64) return false;
    return true;
  }
};
template <class Fmt> constexpr Order<Fmt> ORDER{};

template <class Fmt> struct Power {  // by which codes of a lane are multiplied
  float of[16];
  bool any = false;  // other than 1
  constexpr Power() : of() {
    for (int lane = 0; lane < 16; lane++) of[lane] = float(1 << Fmt::shift(lane)), any |= Fmt::shift(lane) > 0;
  }
};
template <class Fmt> constexpr Power<Fmt> POWER{};

// Bytes of a step's activations: 64 P codes, then for each lane their scale and their sum, or what sums of products start
// with. A step of W that is unpacked for many rows of x has the same size: its codes, S and B.
template <class Fmt> constexpr int64_t STEP = 64 * Fmt::P + 128;
template <class Fmt> int64_t chunks(const fewbit_weight& w) { return (w.k + Fmt::C - 1) / Fmt::C; }

// What `Vec::dot` subtracts from each code. If all lanes have the same zero, sums of products start with the rest of it, so
// that they are those of codes minus this zero.
template <class Fmt> constexpr int TAKEN = Fmt::MOST > 127 ? Vec::TAKEN : 0;
template <class Fmt> constexpr bool STARTS = Fmt::ZERO > TAKEN<Fmt>;

// The sums of a row of W and a row of x (`at`: its step), with the products of one more step. The one place where such
// products are added up: a row's result must not depend on how many rows there are.
template <class Fmt> INLINE F added(F sums, const U* codes, F s, F o, const char* at) {
  const char* lanes = at + 64 * Fmt::P;
  const F units = Vec::loadf((const float*)lanes);
  const I start = STARTS<Fmt> ? Vec::loadi((const int32_t*)lanes + 16) : Vec::zero();
  const F dot = Vec::cvt(Vec::dot<Fmt::P, Fmt::MOST>(start, codes, (const int8_t*)at));
  if constexpr (Fmt::ZERO) return Vec::fma(units, Vec::mul(s, dot), sums);
  // The offset's share is added for each step. Added once for a whole row, it would cost precision.
  return Vec::fma(units, Vec::fma(s, dot, Vec::mul(o, Vec::loadf((const float*)lanes + 16))), sums);
}

// A step's codes and offset as `added` takes them.
template <class Fmt> INLINE void ready(const U* codes, U* out) {
  for (int p = 0; p < Fmt::P; p++) out[p] = Vec::ready<(Fmt::MOST > 127), Fmt::SIGNED>(codes[p]);
}
template <class Fmt> INLINE F offset(F s, F o) {
  return TAKEN<Fmt> ? Vec::fma(s, Vec::set1(TAKEN<Fmt>), o) : o;
}

// Rows of W that are unpacked at once for more than four rows of x, and the most rows of x that they meet.
constexpr int64_t UNPACKED = 8, BATCH = 32;

template <class Fmt, int M> void product(const fewbit_weight& w, const char* x, int64_t stride, float* y, int64_t begin,
                                         int64_t end) {
  const int64_t count = chunks<Fmt>(w);
  typename Fmt::Row row(w);
  for (int64_t n = begin; n < end; n++) {
    row.to(n);
    F sums[M];
    for (int m = 0; m < M; m++) sums[m] = Vec::set1(0);
    for (int64_t c = 0; c < count; c++) {
      const char* chunk = x + c * Fmt::STEPS * STEP<Fmt>;
      Fmt::decode(row, c, [&](int step, const U* given, F s, F o = F{}) INLINE_LAMBDA {
        U codes[Fmt::P];
        ready<Fmt>(given, codes);
        o = offset<Fmt>(s, o);
        for (int m = 0; m < M; m++) sums[m] = added<Fmt>(sums[m], codes, s, o, chunk + m * stride + step * STEP<Fmt>);
      });
    }
    for (int m = 0; m < M; m++) y[m * w.n + n] = Vec::sum(sums[m]);
  }
}

// Adds the products of `steps` unpacked steps of a row of W and of M rows of x to `sums`, 16 for each of these.
template <class Fmt, int M>
INLINE void advance(const char* unpacked, const char* x, int64_t stride, int64_t steps, float* sums) {
  F held[M];
  for (int m = 0; m < M; m++) held[m] = Vec::loadf(sums + 16 * m);
  for (int64_t i = 0; i < steps; i++, unpacked += STEP<Fmt>, x += STEP<Fmt>) {
    U codes[Fmt::P];
    for (int p = 0; p < Fmt::P; p++) codes[p] = Vec::load((const uint8_t*)unpacked + 64 * p);
    const float* lanes = (const float*)(unpacked + 64 * Fmt::P);
    const F s = Vec::loadf(lanes), o = Fmt::ZERO ? s : Vec::loadf(lanes + 16);
    for (int m = 0; m < M; m++) held[m] = added<Fmt>(held[m], codes, s, o, x + m * stride);
  }
  for (int m = 0; m < M; m++) Vec::storef(sums + 16 * m, held[m]);
}

// The same as `product` for up to BATCH rows of x, in the same order of additions. Pieces of a few rows of W are unpacked
// into the L1 cache, once for all rows of x.
template <class Fmt> void products(const fewbit_weight& w, const char* x, int64_t stride, int64_t m, float* y,
                                   int64_t begin, int64_t end) {
  constexpr int64_t STEPS = 8, CHUNKS = STEPS / Fmt::STEPS;
  alignas(64) char unpacked[UNPACKED][STEPS * STEP<Fmt>];
  alignas(64) float sums[UNPACKED][16 * BATCH];
  const int64_t count = chunks<Fmt>(w);
  typename Fmt::Row row(w);
  for (int64_t n = begin; n < end; n += UNPACKED) {
    const int64_t rows = end - n < UNPACKED ? end - n : UNPACKED;
    memset(sums, 0, sizeof sums);
    for (int64_t from = 0; from < count; from += CHUNKS) {
      const int64_t to = count - from < CHUNKS ? count : from + CHUNKS;
      for (int64_t r = 0; r < rows; r++) {
        row.to(n + r);
        for (int64_t c = from; c < to; c++) {
          char* chunk = unpacked[r] + (c - from) * Fmt::STEPS * STEP<Fmt>;
          Fmt::decode(row, c, [&](int step, const U* given, F s, F o = F{}) INLINE_LAMBDA {
            char* at = chunk + step * STEP<Fmt>;
            U codes[Fmt::P];
            ready<Fmt>(given, codes);
            for (int p = 0; p < Fmt::P; p++) Vec::store((uint8_t*)at + 64 * p, codes[p]);
            Vec::storef((float*)(at + 64 * Fmt::P), s);
            if (!Fmt::ZERO) Vec::storef((float*)(at + 64 * Fmt::P) + 16, offset<Fmt>(s, o));
          });
        }
      }
      const int64_t steps = (to - from) * Fmt::STEPS;
      const char* piece = x + from * Fmt::STEPS * STEP<Fmt>;
      int64_t i = 0;
      for (; i + 4 <= m; i += 4)
        for (int64_t r = 0; r < rows; r++)
          advance<Fmt, 4>(unpacked[r], piece + i * stride, stride, steps, sums[r] + 16 * i);
      for (; i + 2 <= m; i += 2)
        for (int64_t r = 0; r < rows; r++)
          advance<Fmt, 2>(unpacked[r], piece + i * stride, stride, steps, sums[r] + 16 * i);
      for (; i < m; i++)
        for (int64_t r = 0; r < rows; r++)
          advance<Fmt, 1>(unpacked[r], piece + i * stride, stride, steps, sums[r] + 16 * i);
    }
    for (int64_t i = 0; i < m; i++)
      for (int64_t r = 0; r < rows; r++) y[i * w.n + n + r] = Vec::sum(Vec::loadf(sums[r] + 16 * i));
  }
}

// Calls `fn(first, rows)` for equal pieces of m rows of so many bytes. A piece has at most BATCH rows, and at least 16 if
// not all of it fits into half of the L2 cache.
template <class Fn> void in_pieces(int64_t m, int64_t bytes, Fn&& fn) {
  const int64_t fit = (1 << 18) / bytes, most = fit < 16 ? 16 : fit < BATCH ? fit : BATCH, pieces = (m + most - 1) / most;
  for (int64_t i = 0; i < pieces; i++) fn(m * i / pieces, m * (i + 1) / pieces - m * i / pieces);
}

// Rounds 32 numbers to 8 bits. Returns what a code is worth.
inline float quantize32(const float* x, int8_t* codes) {
  uint32_t bits[32], top_bits = 0;
  for (int i = 0; i < 32; i++) {  // magnitudes of floats sort like their bits; integers vectorize best
    uint32_t size;
    memcpy(&size, x + i, 4);
    size &= 0x7fffffff;
    top_bits = size > top_bits ? size : top_bits;
  }
  float top;
  memcpy(&top, &top_bits, 4);
  if (top_bits >= 0x7f800000) {  // if one is NaN or infinite, all become NaN
    memset(codes, 0, 32);
    return top * 0.0f;
  }
  const float by = top >= 1e-30f ? 127.0f / top : 0.0f;
  float v[32];
  for (int i = 0; i < 32; i++) v[i] = x[i] * by + 12582912.0f;  // 1.5 * 2^23: rounds, ties to even
  memcpy(bits, v, sizeof bits);
  for (int i = 0; i < 32; i++) codes[i] = int8_t(bits[i]);
  return top >= 1e-30f ? top / 127.0f : 0.0f;
}

// Rounds x [k] in groups of 32 columns.
void quantize(const float* x, int64_t k, int8_t* codes, float* scales) {
  const int64_t whole = k / 32 * 32;
  for (int64_t start = 0; start < whole; start += 32) scales[start / 32] = quantize32(x + start, codes + start);
  if (whole == k) return;
  float rest[32] = {};
  memcpy(rest, x + whole, size_t(k - whole) * sizeof(float));
  scales[whole / 32] = quantize32(rest, codes + whole);
}

template <class Fmt> struct Kernels {
  static int64_t columns(const fewbit_weight& w) { return chunks<Fmt>(w) * Fmt::C; }
  static int64_t rounded_bytes(const fewbit_weight& w) { return chunks<Fmt>(w) * Fmt::STEPS * STEP<Fmt>; }

  static void round(const fewbit_weight& w, const float* x, int8_t* codes, float* scales, char* out) {
    const int64_t padded = columns(w);
    memset(codes, 0, size_t((padded + 255) / 256 * 256));
    memset(scales, 0, size_t((padded + 255) / 256 * 8) * sizeof(float));
    quantize(x, w.k, codes, scales);
    U ones[Fmt::P];
    for (U& one : ones) one = Vec::ones();
    const int64_t count = chunks<Fmt>(w);
    for (int64_t c = 0; c < count; c++) {
      for (int s = 0; s < Fmt::STEPS; s++, out += STEP<Fmt>) {
        const uint16_t* order = ORDER<Fmt>.at + s * 64 * Fmt::P;
        int8_t* bytes = (int8_t*)out;
        float* lanes = (float*)(out + 64 * Fmt::P);
        const int8_t* from = codes + c * Fmt::C;
        if constexpr (ORDER<Fmt>.in_fours())
          for (int i = 0; i < 64 * Fmt::P; i += 4) memcpy(bytes + i, from + order[i], 4);
        else if constexpr (ORDER<Fmt>.in_turns())
          for (int p = 0; p < Fmt::P; p++)
            for (int i = 0; i < 64; i++) bytes[64 * p + i] = from[Fmt::P * i + p];
        else
          for (int i = 0; i < 64 * Fmt::P; i++) bytes[i] = from[order[i]];
        for (int lane = 0; lane < 16; lane++)
          lanes[lane] = scales[(c * Fmt::C + order[4 * lane]) / 32] * (1.0f / float(1 << Fmt::shift(lane)));
        const F sums = Vec::mul(Vec::cvt(Vec::dot<Fmt::P, 1>(Vec::zero(), ones, bytes)), Vec::loadf(POWER<Fmt>.of));
        if (!Fmt::ZERO) Vec::storef(lanes + 16, sums);
        if (STARTS<Fmt>) Vec::storei((int32_t*)lanes + 16, Vec::whole(times(sums, TAKEN<Fmt> - Fmt::ZERO)));
      }
    }
  }

  static void linear(const fewbit_weight& w, const char* x, int64_t m, float* y, int64_t begin, int64_t end) {
    const int64_t stride = rounded_bytes(w);
    if (m == 1) product<Fmt, 1>(w, x, stride, y, begin, end);
    else if (m == 2) product<Fmt, 2>(w, x, stride, y, begin, end);
    else if (m == 3) product<Fmt, 3>(w, x, stride, y, begin, end);
    else if (m == 4) product<Fmt, 4>(w, x, stride, y, begin, end);
    else in_pieces(m, stride, [&](int64_t i, int64_t rows) {
      products<Fmt>(w, x + i * stride, stride, rows, y + i * w.n, begin, end);
    });
  }

  static void decode(const fewbit_weight& w, int64_t begin, int64_t end, float* out) {
    alignas(64) static constexpr Lanes spread[4] = {by(1, 4, 0), by(1, 4, 4), by(1, 4, 8), by(1, 4, 12)};
    const int64_t count = chunks<Fmt>(w);
    typename Fmt::Row row(w);
    for (int64_t n = begin; n < end; n++) {
      row.to(n);
      for (int64_t c = 0; c < count; c++, out += Fmt::C)
        Fmt::decode(row, c, [&](int step, const U* codes, F s, F o = F{}) INLINE_LAMBDA {
          uint8_t bytes[64 * Fmt::P];
          for (int p = 0; p < Fmt::P; p++) Vec::store(bytes + 64 * p, Fmt::SIGNED ? Vec::flip(codes[p]) : codes[p]);
          if (Fmt::ZERO) o = times(s, -Fmt::ZERO);
          if (POWER<Fmt>.any) s = Vec::over(s, Vec::loadf(POWER<Fmt>.of));
          float* to = out + step * 64 * Fmt::P;
          for (int j = 0; j < 4; j++) {
            const F sj = Vec::pick(s, spread[j].at), oj = Vec::pick(o, spread[j].at);
            for (int p = 0; p < Fmt::P; p++)
              Vec::storef(to + 64 * p + 16 * j, Vec::fma(sj, Vec::from_bytes(bytes + 64 * p + 16 * j), oj));
          }
        });
    }
  }

  static void arrange(const fewbit_weight& w, const float* x, float* out) {
    const int64_t count = chunks<Fmt>(w);
    for (int64_t c = 0; c < count; c++)
      for (int i = 0; i < Fmt::C; i++, out++) {
        const int64_t column = c * Fmt::C + ORDER<Fmt>.at[i];
        *out = column < w.k ? x[column] : 0.0f;
      }
  }
};

template <class Fn> auto with_format(const fewbit_weight& w, Fn&& fn) {
  switch (w.kind) {
    case FEWBIT_INT8: return fn(Kernels<Pair<Int8>>{});
    case FEWBIT_LEVELS: return fn(Levels<false>{});
    case FEWBIT_LEVELS_DOUBLE: return fn(Levels<true>{});
    case FEWBIT_FP8: return fn(Fp8{});
    case FEWBIT_F16: return fn(Halves<false>{});
    case FEWBIT_BF16: return fn(Halves<true>{});
    case FEWBIT_MXFP4: return fn(Kernels<Fp4<false>>{});
    case FEWBIT_NVFP4: return fn(Kernels<Fp4<true>>{});
    case FEWBIT_Q4_0: return fn(Kernels<Q45<Q40>>{});
    case FEWBIT_Q4_1: return fn(Kernels<Q45<Q41>>{});
    case FEWBIT_Q5_0: return fn(Kernels<Q45<Q50>>{});
    case FEWBIT_Q5_1: return fn(Kernels<Q45<Q51>>{});
    case FEWBIT_IQ4_NL: return fn(Kernels<Q45<IQ4>>{});
    case FEWBIT_Q8_0: return fn(Kernels<Pair<Q80>>{});
    case FEWBIT_Q2_K: return fn(Kernels<Q23K<false>>{});
    case FEWBIT_Q3_K: return fn(Kernels<Q23K<true>>{});
    case FEWBIT_Q4_K: return fn(Kernels<Q45K<false>>{});
    case FEWBIT_Q5_K: return fn(Kernels<Q45K<true>>{});
    case FEWBIT_Q6_K: return fn(Kernels<Pair<Q6K>>{});
    case FEWBIT_IQ4_XS: return fn(Kernels<IQ4XS>{});
    case FEWBIT_IQ2_XXS: return fn(Kernels<Pair<IQ2XXS>>{});
    case FEWBIT_IQ2_XS: return fn(Kernels<Pair<IQ2XS>>{});
    case FEWBIT_IQ2_S: return fn(Kernels<Pair<IQ2S>>{});
    case FEWBIT_IQ3_XXS: return fn(Kernels<Pair<IQ3XXS>>{});
    case FEWBIT_IQ3_S: return fn(Kernels<Pair<IQ3S>>{});
    case FEWBIT_IQ1_S: return fn(Kernels<Pair<IQ1S>>{});
    case FEWBIT_IQ1_M: return fn(Kernels<Pair<IQ1M>>{});
#ifdef __AVX512VBMI__
    case FEWBIT_TQ1_0: return fn(Kernels<TQ10Tables>{});
#else
    case FEWBIT_TQ1_0: return fn(Kernels<Pair<TQ10>>{});
#endif
    case FEWBIT_TQ2_0: return fn(Kernels<TQ20>{});
    case FEWBIT_Q1_0: return fn(Kernels<Q10>{});
    case FEWBIT_Q2_0: return fn(Kernels<Q20>{});
    default: break;
  }
  switch (w.bits) {
    case 2: return fn(Kernels<Affine<2>>{});
    case 3:
      if (w.group % 16 || (w.group < w.k && w.group % Threes::C && Threes::C % w.group)) return fn(Kernels<Pair<Affine<3>>>{});
      return fn(Kernels<Threes>{});
    case 4: return fn(Kernels<Affine<4>>{});
    case 5: return fn(Kernels<Pair<Affine<5>>>{});
    case 6: return fn(Kernels<Pair<Affine<6>>>{});
    case 7: return fn(Kernels<Pair<Affine<7>>>{});
    default: return fn(Kernels<Pair<Affine<8>>>{});
  }
}

int64_t columns_of(const fewbit_weight& w) {
  return with_format(w, [&](auto k) { return decltype(k)::columns(w); });
}
int64_t rounded_bytes_of(const fewbit_weight& w) {
  return with_format(w, [&](auto k) { return decltype(k)::rounded_bytes(w); });
}
void round_of(const fewbit_weight& w, const float* x, int8_t* codes, float* scales, char* out) {
  with_format(w, [&](auto k) { decltype(k)::round(w, x, codes, scales, out); });
}
void linear_of(const fewbit_weight& w, const char* rounded, int64_t m, float* y, int64_t begin, int64_t end) {
  with_format(w, [&](auto k) { decltype(k)::linear(w, rounded, m, y, begin, end); });
}
void decode_of(const fewbit_weight& w, int64_t begin, int64_t end, float* out) {
  with_format(w, [&](auto k) { decltype(k)::decode(w, begin, end, out); });
}
void arrange_of(const fewbit_weight& w, const float* x, float* out) {
  with_format(w, [&](auto k) { decltype(k)::arrange(w, x, out); });
}

}  // namespace

#define FEWBIT_ISA(symbol, text) \
  namespace fewbit { \
  const Isa symbol = {text, columns_of, rounded_bytes_of, round_of, linear_of, decode_of, arrange_of, \
                      fp8_codes_of, fp8_lost_of, read_of, write_of, norm_of, gate_of, rotate_of, attend_of, vectors_of}; \
  }
