// FP8 codes (E4M3) of a weight, and the error of such codes, in the compiler's vectors of eight entries. With AVX2, one
// core takes 0.5 ns for each code of a bfloat16 weight, and 0.4 ns for its error; a copy of it takes 0.1 ns.

namespace {

constexpr int LANES = 8, PIECE = 128;  // entries of a vector; entries that are widened at a time
typedef uint32_t U8 __attribute__((vector_size(32)));
typedef int32_t I8 __attribute__((vector_size(32)));
typedef float F8 __attribute__((vector_size(32)));

// One of two vectors for each entry. A macro: a function that returns a vector is no part of the baseline's ABI.
#define PICK(mask, yes, no) (((U8)(mask) & (yes)) | (~(U8)(mask) & (no)))

[[gnu::always_inline]] inline void load(const uint32_t* from, U8& to) { memcpy(&to, from, sizeof to); }

// Up to PIECE entries of a weight as the bits of float32, padded with zeros to a whole vector.
template <bool NARROW> inline void take(const void* w, int64_t at, int count, uint32_t* out) {
  if (NARROW) {
    const uint16_t* from = static_cast<const uint16_t*>(w) + at;
    if (count == PIECE)
      for (int i = 0; i < PIECE; i++) out[i] = uint32_t(from[i]) << 16;
    else
      for (int i = 0; i < count; i++) out[i] = uint32_t(from[i]) << 16;
  } else {
    memcpy(out, static_cast<const uint32_t*>(w) + at, size_t(count) * 4);
  }
  for (int i = count; i % LANES; i++) out[i] = 0;
}

// Calls each(column, count) for the pieces of the columns [left, right).
template <class Each> [[gnu::always_inline]] inline void pieces(int64_t left, int64_t right, Each&& each) {
  int64_t c = left;
  for (; c + PIECE <= right; c += PIECE) each(c, PIECE);
  if (c < right) each(c, int(right - c));
}

// Writes the codes nearest to x / scale over x, ties to an even mantissa; at most 448 in magnitude.
inline void to_e4m3(uint32_t* x, int count, float scale) {
  for (int i = 0; i < count; i += LANES) {
    U8 bits;
    load(x + i, bits);
    const U8 y = (U8)((F8)bits / scale);
    U8 a = y & 0x7FFFFFFFu;
    a = PICK((I8)a < 0x43E00000, a, 0x43E00000u);  // 448
    const U8 normal = ((a + 0x7FFFFu + (a >> 20 & 1u)) >> 20) - (120u << 3);
    const U8 small = (U8)((F8)a + 16384.0f) - 0x46800000u;  // a float near 2^14 is a multiple of 2^-9
    const U8 code = PICK((I8)a < 0x3C800000, small, normal) | (y >> 24 & 0x80u);  // 2^-6, the smallest normal number
    memcpy(x + i, &code, sizeof code);
  }
}

template <bool NARROW> void fp8_codes(const fewbit_fp8& f, int64_t begin, int64_t end) {
  const int64_t across = (f.k + f.columns - 1) / f.columns;
  uint32_t x[PIECE];
  for (int64_t band = begin; band < end; band++) {
    const int64_t first = band * f.rows, last = first + f.rows < f.n ? first + f.rows : f.n;
    for (int64_t b = 0; b < across; b++) {
      const int64_t left = b * f.columns, right = left + f.columns < f.k ? left + f.columns : f.k;
      U8 most = {};
      for (int64_t row = first; row < last; row++)
        pieces(left, right, [&](int64_t c, int count) {
          take<NARROW>(f.w, row * f.k + c, count, x);
          for (int i = 0; i < count; i += LANES) {
            U8 a;
            load(x + i, a);
            a &= 0x7FFFFFFFu;  // magnitudes sort like their bits; NaN is above infinity
            most = PICK((I8)a > (I8)most, a, most);
          }
        });
      uint32_t top = 0;
      for (int i = 0; i < LANES; i++) top = most[i] > top ? most[i] : top;
      float& largest = f.top[band * across + b];
      memcpy(&largest, &top, sizeof top);
      float scale = largest / 448.0f;
      scale = top == 0 ? 1.0f : scale < 0x1p-126f ? 0x1p-126f : scale;
      for (int64_t row = first; row < last; row++)
        pieces(left, right, [&](int64_t c, int count) {
          take<NARROW>(f.w, row * f.k + c, count, x);
          to_e4m3(x, count, scale);
          uint8_t* codes = f.codes + row * f.k + c;
          if (count == PIECE)
            for (int i = 0; i < PIECE; i++) codes[i] = uint8_t(x[i]);
          else
            for (int i = 0; i < count; i++) codes[i] = uint8_t(x[i]);
        });
    }
  }
}

// Sums over the entries of a row that share a scale.
struct Sums {
  F8 error[2], square[2];
  U8 coded, given;
};

[[gnu::always_inline]] inline void add(Sums& to, int which, const uint32_t* x, const uint32_t* codes, float scale) {
  U8 bits, code;
  load(x, bits);
  load(codes, code);
  const U8 size = code & 0x7Fu;
  const F8 w = (F8)bits, d = (F8)(size << 20 | (code & 0x80u) << 24) * 0x1p120f * scale - w;
  to.error[which] += d * d;
  to.square[which] += w * w;
  to.coded |= size;
  to.given |= bits & 0x7FFFFFFFu;
}

// Adds up over the rows of each band: (code * scale - w)², w², and the groups of columns whose codes are all 0 though
// a weight is not. A group is the columns of one scale, or the whole row.
template <bool NARROW> void fp8_lost(const fewbit_fp8& f, int64_t begin, int64_t end) {
  const int64_t across = (f.k + f.columns - 1) / f.columns;
  const bool whole = f.k % f.columns;
  uint32_t x[PIECE], codes[PIECE];
  for (int64_t band = begin; band < end; band++) {
    const int64_t first = band * f.rows, last = first + f.rows < f.n ? first + f.rows : f.n;
    double* lost = f.lost + 3 * band;
    lost[0] = lost[1] = lost[2] = 0;
    for (int64_t row = first; row < last; row++) {
      uint32_t coded = 0, given = 0;
      for (int64_t b = 0; b < across; b++) {
        const int64_t left = b * f.columns, right = left + f.columns < f.k ? left + f.columns : f.k;
        const float scale = f.scale[band * across + b];
        Sums sums = {};
        pieces(left, right, [&](int64_t c, int count) {
          take<NARROW>(f.w, row * f.k + c, count, x);
          const uint8_t* from = f.codes + row * f.k + c;
          if (count == PIECE) {
            for (int i = 0; i < PIECE; i++) codes[i] = from[i];
            for (int i = 0; i < PIECE; i += 2 * LANES)
              add(sums, 0, x + i, codes + i, scale), add(sums, 1, x + i + LANES, codes + i + LANES, scale);
            return;
          }
          for (int i = 0; i < count; i++) codes[i] = from[i];
          for (int i = count; i % LANES; i++) codes[i] = 0;
          for (int i = 0; i < count; i += LANES) add(sums, 0, x + i, codes + i, scale);
        });
        for (int i = 0; i < LANES; i++) {
          lost[0] += double(sums.error[0][i]) + sums.error[1][i];
          lost[1] += double(sums.square[0][i]) + sums.square[1][i];
          coded |= sums.coded[i], given |= sums.given[i];
        }
        if (!whole || b == across - 1) {
          lost[2] += !coded && given;
          coded = given = 0;
        }
      }
    }
  }
}

void fp8_codes_of(const fewbit_fp8& f, int64_t begin, int64_t end) {
  f.type == FEWBIT_BFLOAT16 ? fp8_codes<true>(f, begin, end) : fp8_codes<false>(f, begin, end);
}
void fp8_lost_of(const fewbit_fp8& f, int64_t begin, int64_t end) {
  f.type == FEWBIT_BFLOAT16 ? fp8_lost<true>(f, begin, end) : fp8_lost<false>(f, begin, end);
}

}  // namespace

#undef PICK
