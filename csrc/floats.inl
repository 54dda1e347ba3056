// Products with weights whose values are no integers: sixteen levels, FP8, and floats of 16 bits that are not quantized.
// Activations are not rounded.

namespace {

// Calls `Fmt::product` for few rows of x, as numbers of which each row has `stride`: for several rows of W at once, so that
// loading x costs less, and sums wait less for each other.
template <class Fmt, int M> void few_rows(const fewbit_weight& w, const float* x, float* y, int64_t begin, int64_t end) {
  constexpr int R = M < Vec::ROWS ? Vec::ROWS / M : 1;
  typename Fmt::template Scales<R> scales(w);
  int64_t n = begin;
  for (; n + R <= end; n += R) Fmt::template product<M, R>(w, scales, x, y, n);
  for (; n < end; n++) Fmt::template product<M, 1>(w, scales, x, y, n);
}
template <class Fmt>
void by_rows(const fewbit_weight& w, const float* x, int64_t stride, int64_t m, float* y, int64_t begin, int64_t end) {
  const int64_t span = m > 4 ? 8 : end - begin;
  for (int64_t n = begin; n < end; n += span) {
    const int64_t last = n + span < end ? n + span : end;
    int64_t i = 0;
    for (; i + 4 <= m; i += 4) few_rows<Fmt, 4>(w, x + i * stride, y + i * w.n, n, last);
    if (m - i == 3) few_rows<Fmt, 3>(w, x + i * stride, y + i * w.n, n, last);
    if (m - i == 2) few_rows<Fmt, 2>(w, x + i * stride, y + i * w.n, n, last);
    if (m - i == 1) few_rows<Fmt, 1>(w, x + i * stride, y + i * w.n, n, last);
  }
}

// A row of activations, and zeros up to `columns`.
inline void padded(const fewbit_weight& w, const float* x, float* out, int64_t columns) {
  memcpy(out, x, size_t(w.k) * 4);
  memset(out + w.k, 0, size_t(columns - w.k) * 4);
}

// Sixteen levels in float32. Activations are not rounded, since the levels are not integers. Column order: of each 32
// columns the 16 even ones, then the 16 odd ones.
template <bool twofold> struct Levels {
  static int64_t columns(const fewbit_weight& w) { return w.k; }
  static int64_t rounded_bytes(const fewbit_weight& w) { return w.k * 4; }
  // The scales of blocks of the r-th of up to R rows. Twofold ones are looked up in a table that serves 256 blocks.
  template <int R> struct Scales {
    const float *scale, *map, *offset;
    const uint8_t* code;
    int64_t held[R];
    float tables[R][256];
    explicit Scales(const fewbit_weight& w)
        : scale((const float*)w.part[twofold ? 2 : 1]), map((const float*)w.part[4]), offset((const float*)w.part[3]),
          code((const uint8_t*)w.part[1]) {
      for (int r = 0; r < R; r++) held[r] = -1;
    }
    // Makes the table for this block. Returns how many blocks it serves from there on.
    int64_t serve(int r, int64_t block) {
      if constexpr (!twofold) return INT64_MAX;
      if (const int64_t at = block / 256; at != held[r]) {
        const F by = Vec::set1(scale[at]), plus = Vec::set1(*offset);
        for (int i = 0; i < 256; i += 16) Vec::storef(tables[r] + i, Vec::add(Vec::mul(Vec::loadf(map + i), by), plus));
        held[r] = at;
      }
      return 256 - block % 256;
    }
    INLINE float operator()(int r, int64_t block) const { return twofold ? tables[r][code[block]] : scale[block]; }
  };
  static const float* levels(const fewbit_weight& w) { return (const float*)w.part[twofold ? 5 : 2]; }
  static void arrange(const fewbit_weight& w, const float* x, float* out) {
    for (int64_t start = 0; start < w.k; start += 32)
      for (int i = 0; i < 16; i++) out[start + i] = x[start + 2 * i], out[start + 16 + i] = x[start + 2 * i + 1];
  }
  static void round(const fewbit_weight& w, const float* x, int8_t*, float*, char* out) { arrange(w, x, (float*)out); }

  // R rows of W from n on.
  template <int M, int R, class Held>
  static void product(const fewbit_weight& w, Held& scales, const float* x, float* y, int64_t n) {
    const F table = Vec::loadf(levels(w));
    const int64_t blocks = w.k / w.group, bytes = w.k / 2;
    const uint8_t* p = (const uint8_t*)w.part[0] + n * bytes;
    F sums[R][M];
    for (int r = 0; r < R; r++)
      for (int m = 0; m < M; m++) sums[r][m] = Vec::set1(0);
    for (int64_t b = 0; b < blocks;) {
      int64_t until = blocks;
      for (int r = 0; r < R; r++)
        if (const int64_t served = scales.serve(r, (n + r) * blocks + b); served < until - b) until = b + served;
      for (; b < until; b++) {
        F even[R][M], odd[R][M];
        for (int r = 0; r < R; r++)
          for (int m = 0; m < M; m++) even[r][m] = odd[r][m] = Vec::set1(0);
        if (b % (twofold ? 64 : 16) == 0)
          for (int r = 0; r < R; r++) ahead_scales((const uint8_t*)w.part[1] + ((n + r) * blocks + b) * (twofold ? 1 : 4));
        for (int64_t i = 0; i < w.group; i += 32, p += 16, x += 32) {
          for (int r = 0; r < R; r++) {
            const uint8_t* q = p + r * bytes;
            __builtin_prefetch(q + R * bytes, 0, 2);
            const F a = Vec::levels<4>(q, table), c = Vec::levels<0>(q, table);
            for (int m = 0; m < M; m++) {
              even[r][m] = Vec::fma(a, Vec::loadf(x + m * w.k), even[r][m]);
              odd[r][m] = Vec::fma(c, Vec::loadf(x + m * w.k + 16), odd[r][m]);
            }
          }
        }
        for (int r = 0; r < R; r++) {
          const F s = Vec::set1(scales(r, (n + r) * blocks + b));
          for (int m = 0; m < M; m++) sums[r][m] = Vec::fma(s, Vec::add(even[r][m], odd[r][m]), sums[r][m]);
        }
      }
    }
    for (int r = 0; r < R; r++)
      for (int m = 0; m < M; m++) y[m * w.n + n + r] = Vec::sum(sums[r][m]);
  }
  static void linear(const fewbit_weight& w, const char* rounded, int64_t m, float* y, int64_t begin, int64_t end) {
    by_rows<Levels>(w, (const float*)rounded, w.k, m, y, begin, end);
  }
  static void decode(const fewbit_weight& w, int64_t begin, int64_t end, float* out) {
    const F table = Vec::loadf(levels(w));
    const uint8_t* p = (const uint8_t*)w.part[0] + begin * w.k / 2;
    Scales<1> scales(w);
    for (int64_t b = begin * (w.k / w.group); b < end * (w.k / w.group); b++) {
      scales.serve(0, b);
      const F s = Vec::set1(scales(0, b));
      for (int64_t i = 0; i < w.group; i += 32, p += 16, out += 32) {
        Vec::storef(out, Vec::mul(Vec::levels<4>(p, table), s));
        Vec::storef(out + 16, Vec::mul(Vec::levels<0>(p, table), s));
      }
    }
  }
};

// 8-bit floats (E4M3). Activations are not rounded, since the values are not integers. Columns keep their order; a row of
// activations is padded with zeros to a multiple of 64. At the end of a row of W this may also read codes of the next row.
struct Fp8 {
  static constexpr int C = 64;
  static int64_t columns(const fewbit_weight& w) { return (w.k + C - 1) / C * C; }
  static int64_t rounded_bytes(const fewbit_weight& w) { return columns(w) * 4; }
  static void arrange(const fewbit_weight& w, const float* x, float* out) { padded(w, x, out, columns(w)); }
  static void round(const fewbit_weight& w, const float* x, int8_t*, float*, char* out) { arrange(w, x, (float*)out); }

  // Sixty-four codes from p on; zeros beyond the end of the weight, where a copy of its last codes is read.
  struct Codes {
    const uint8_t* end;
    uint8_t last[2 * C] = {};
    explicit Codes(const fewbit_weight& w) : end((const uint8_t*)w.part[0] + w.n * w.k) {
      const int64_t held = w.n * w.k < C ? w.n * w.k : C;
      memcpy(last + C - held, end - held, size_t(held));
    }
    INLINE const uint8_t* operator()(const uint8_t* p) const { return p + C <= end ? p : last + C - (end - p); }
  };
  // The scales of row n. Vec::fp8s gives a 256th of each number.
  template <int R> struct Scales {
    const float* scale;
    int64_t rows, across;
    explicit Scales(const fewbit_weight& w)
        : scale((const float*)w.part[1]), rows(w.bits), across((w.k + w.group - 1) / w.group) {}
    INLINE const float* of(int64_t n) const { return scale + n / rows * across; }
  };

  // R rows of W from n on.
  template <int M, int R, class Held>
  static void product(const fewbit_weight& w, Held& scale, const float* x, float* y, int64_t n) {
    const int64_t padded = columns(w), across = (w.k + w.group - 1) / w.group;
    const uint8_t* p = (const uint8_t*)w.part[0] + n * w.k;
    const Codes codes(w);
    const float* scale_of[R];
    for (int r = 0; r < R; r++) scale_of[r] = scale.of(n + r);
    F sums[R][M];
    for (int r = 0; r < R; r++)
      for (int m = 0; m < M; m++) sums[r][m] = Vec::set1(0);
    for (int64_t block = 0, c = 0; block < across; block++) {
      const int64_t to = c + w.group < w.k ? c + w.group : w.k;
      F even[R][M], odd[R][M];
      for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) even[r][m] = odd[r][m] = Vec::set1(0);
      for (; c < to; c += C)
        for (int r = 0; r < R; r++) {
          __builtin_prefetch(p + (R + r) * w.k + c, 0, 2);
          const uint8_t* q = codes(p + r * w.k + c);
          F v[4];
          Vec::fp8s(q, v);
          for (int m = 0; m < M; m++) {
            const float* at = x + m * padded + c;
            even[r][m] = Vec::fma(v[0], Vec::loadf(at), even[r][m]);
            odd[r][m] = Vec::fma(v[1], Vec::loadf(at + 16), odd[r][m]);
            even[r][m] = Vec::fma(v[2], Vec::loadf(at + 32), even[r][m]);
            odd[r][m] = Vec::fma(v[3], Vec::loadf(at + 48), odd[r][m]);
          }
        }
      for (int r = 0; r < R; r++) {
        const F s = Vec::set1(256.0f * scale_of[r][block]);
        for (int m = 0; m < M; m++) sums[r][m] = Vec::fma(s, Vec::add(even[r][m], odd[r][m]), sums[r][m]);
      }
    }
    for (int r = 0; r < R; r++)
      for (int m = 0; m < M; m++) y[m * w.n + n + r] = Vec::sum(sums[r][m]);
  }
  static void linear(const fewbit_weight& w, const char* rounded, int64_t m, float* y, int64_t begin, int64_t end) {
    by_rows<Fp8>(w, (const float*)rounded, columns(w), m, y, begin, end);
  }
  static void decode(const fewbit_weight& w, int64_t begin, int64_t end, float* out) {
    const Scales<1> scale(w);
    const Codes codes(w);
    for (int64_t n = begin; n < end; n++, out += columns(w))
      for (int64_t c = 0; c < w.k; c += C) {
        const F s = Vec::set1(256.0f * scale.of(n)[c / w.group]);
        const uint8_t* p = codes((const uint8_t*)w.part[0] + n * w.k + c);
        ahead(p);
        F v[4];
        Vec::fp8s(p, v);
        for (int i = 0; i < 4; i++) Vec::storef(out + c + 16 * i, Vec::mul(v[i], s));
      }
  }
};

// Floats of 16 bits that are not quantized: bfloat16 if `brain`, else float16. Columns keep their order; a row of
// activations is padded with zeros to a multiple of 32, and so is the end of a row of W.
template <bool brain> struct Halves {
  static constexpr int C = 32;
  // Bytes of a weight that is read past the caches for one row of x: most last caches have no room for it, and would lose what
  // the rest of a token reads. On an EPYC of 2025, one thread then takes 0.95 to 0.98 of the time.
  static constexpr int64_t PAST = 1 << 25;
  static INLINE void ahead_once(const void* p) { __builtin_prefetch((const uint8_t*)p + 8192, 0, 0); }
  static int64_t columns(const fewbit_weight& w) { return (w.k + C - 1) / C * C; }
  static int64_t rounded_bytes(const fewbit_weight& w) { return columns(w) * 4; }
  static void arrange(const fewbit_weight& w, const float* x, float* out) { padded(w, x, out, columns(w)); }
  static void round(const fewbit_weight& w, const float* x, int8_t*, float*, char* out) { arrange(w, x, (float*)out); }

  static INLINE F widened(const uint16_t* p) { return brain ? Vec::bfloat((const uint8_t*)p) : Vec::halfs((const uint8_t*)p); }

  // M rows of x, as far as there are so many, then the rest by fewer: rows [begin, end) of W.
  template <int M>
  static void rows(const fewbit_weight& w, const float* x, int64_t m, float* y, int64_t begin, int64_t end) {
    const int64_t stride = columns(w);
    int64_t i = 0;
    for (; i + M <= m; i += M)
      for (int64_t n = begin; n < end; n++) product<M>(w, x + i * stride, y + i * w.n, n);
    if constexpr (M > 1)
      if (i < m) rows<M / 2>(w, x + i * stride, m - i, y + i * w.n, begin, end);
  }
  template <int M, bool once = false>
  static INLINE void product(const fewbit_weight& w, const float* x, float* y, int64_t n) {
    const int64_t stride = columns(w), whole = w.k / C * C;
    const uint16_t* p = (const uint16_t*)w.part[0] + n * w.k;
    F even[M], odd[M];
    for (int m = 0; m < M; m++) even[m] = odd[m] = Vec::set1(0);
    const auto step = [&](const uint16_t* q, int64_t c) INLINE_LAMBDA {
      const F a = widened(q), b = widened(q + 16);
      for (int m = 0; m < M; m++) {
        even[m] = Vec::fma(a, Vec::loadf(x + m * stride + c), even[m]);
        odd[m] = Vec::fma(b, Vec::loadf(x + m * stride + c + 16), odd[m]);
      }
    };
    for (int64_t c = 0; c < whole; c += C) {
      if constexpr (once) ahead_once(p + c);
      else ahead((const uint8_t*)(p + c));
      step(p + c, c);
    }
    if (whole < w.k) {
      uint16_t rest[C] = {};
      memcpy(rest, p + whole, size_t(w.k - whole) * 2);
      step(rest, whole);
    }
    for (int m = 0; m < M; m++) y[m * w.n + n] = Vec::sum(Vec::add(even[m], odd[m]));
  }
  static void linear(const fewbit_weight& w, const char* rounded, int64_t m, float* y, int64_t begin, int64_t end) {
    if (m == 1 && 2 * w.n * w.k >= PAST) {
      for (int64_t n = begin; n < end; n++) product<1, true>(w, (const float*)rounded, y, n);
      return;
    }
    const int64_t span = m > 1 ? 8 : end - begin;  // rows of W that stay in a cache until all of x has met them
    for (int64_t n = begin; n < end; n += span)
      rows<Vec::HALVES>(w, (const float*)rounded, m, y, n, n + span < end ? n + span : end);
  }
  static void decode(const fewbit_weight& w, int64_t begin, int64_t end, float* out) {
    for (int64_t n = begin; n < end; n++)
      for (int64_t c = 0; c < columns(w); c += 16, out += 16) {
        const uint16_t* q = (const uint16_t*)w.part[0] + n * w.k + c;
        const int64_t left = w.k - c;
        uint16_t rest[16] = {};
        if (left < 16) q = (const uint16_t*)memcpy(rest, q, size_t(left > 0 ? left : 0) * 2);
        Vec::storef(out, widened(q));
      }
  }
};

void read_of(const void* from, int type, int64_t n, float* out) {
  if (type == FEWBIT_FLOAT32) return void(memcpy(out, from, size_t(n) * 4));
  const uint16_t* p = (const uint16_t*)from;
  const auto sixteen = [&](const uint16_t* q) INLINE_LAMBDA {
    return type == FEWBIT_BFLOAT16 ? Vec::bfloat((const uint8_t*)q) : Vec::halfs((const uint8_t*)q);
  };
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) Vec::storef(out + i, sixteen(p + i));
  if (i == n) return;
  uint16_t rest[16] = {};
  float wide[16];
  memcpy(rest, p + i, size_t(n - i) * 2);
  Vec::storef(wide, sixteen(rest));
  memcpy(out + i, wide, size_t(n - i) * 4);
}

// bfloat16 is the upper half of float32. NaN stays NaN.
inline void to_bfloats(const float* x, int64_t n, uint16_t* to) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits;
    memcpy(&bits, x + i, 4);
    const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    to[i] = uint16_t(nan ? bits >> 16 | 0x40 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }
}
void write_of(const float* x, int type, int64_t n, void* to) {
  if (type == FEWBIT_FLOAT32) return void(memcpy(to, x, size_t(n) * 4));
  if (type == FEWBIT_BFLOAT16) return to_bfloats(x, n, (uint16_t*)to);
  uint8_t* p = (uint8_t*)to;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) Vec::to_halfs(Vec::loadf(x + i), p + 2 * i);
  if (i == n) return;
  float wide[16] = {};
  uint8_t rest[32];
  memcpy(wide, x + i, size_t(n - i) * 4);
  Vec::to_halfs(Vec::loadf(wide), rest);
  memcpy(p + 2 * i, rest, size_t(n - i) * 2);
}

}  // namespace
