// How weights become the left operands of many.cu and hopper.cu, scaled and rounded once to the type of x.

__device__ __forceinline__ float first(u32 v) { return BFLOAT ? __uint_as_float(v << 16) : half_of(v & 0xFFFF); }
__device__ __forceinline__ float second(u32 v) { return BFLOAT ? __uint_as_float(v & 0xFFFF0000u) : half_of(v >> 16); }

// The factors for decoding. If PACKED, a scale is the sum of two numbers of x's type, so that it keeps its precision.
struct Maker { Grid grid; u32 zero, scale, rest; };

__device__ __forceinline__ Maker maker(const Grid& grid) {
  Maker m = {grid};
#if PACKED
  m.zero = two(grid.zero, grid.zero), m.scale = two(grid.scale, grid.scale);
  const float rest = grid.scale - first(m.scale);
  m.rest = two(rest, rest);
#endif
  return m;
}

// The left operand of step e of 32 columns, from the steps of rows g and g + 8, as numbers.
__device__ __forceinline__ void numbers(u32* a, const Step* s, const Maker* makers, const u32* pairs, int span, int e) {
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Maker& m = makers[r];
#if FACTORED
      a[half * 2 + r] = times(pair(s[r], e * 2 + half, span, 0), m.grid.pair);
      continue;
#endif
#if LOW == 8 && !LEVEL
      const u32 word = s[r].low.v[e * 2 + half];
      const float zero = m.grid.zero - 8388608.0f, low = number(word, span, zero), high = number(word, span + 2, zero);
#else
      const u32 v = TABLE ? looked_up(pairs, s[r].low.v[e * 2 + half], span)
                  : LEVEL ? pair(s[r], e * 2 + half, span, 0) : codes(s[r], e * 2 + half, span);
      const float low = first(v), high = second(v);
#endif
#if PACKED
      const u32 level = LEVEL ? v : less(v, m.zero);
      a[half * 2 + r] = SCALE == 4 ? times(level, m.scale) : times(level, m.scale, times(level, m.rest));
#else
      const float least = SUMS ? m.grid.least : -0.0f;
      a[half * 2 + r] = two(low * m.grid.scale + least, high * m.grid.scale + least);
#endif
    }
}

#ifdef WGMMA
// The wgmma descriptor of 16 columns of all rows: groups of eight rows, 1024 bytes apart, with permuted parts. Other
// columns are `bytes / 16` further.
__device__ __forceinline__ unsigned long long descriptor(u32 address) {
  return (unsigned long long)(address >> 4 & 0x3FFF) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
#endif

