// The nearest vectors of a codebook, for the encoders of iq2 and iq3: see fewbit/schemes/ggml/vectors.py.
//
// Sums run over columns, and a lane has an entry. Products are rounded before they are added. So all instruction sets
// give the same bits.

#include <math.h>

#include "isa.h"

namespace {

constexpr int COMPARED = 8, LANE = 16;

inline float smaller(float a, float b) { return a < b ? a : b; }

inline float lowest(Vec::F found) {
  alignas(64) float lanes[LANE];
  Vec::storef(lanes, found);
  for (int width = LANE / 2; width; width /= 2)
    for (int i = 0; i < width; i++) lanes[i] = smaller(lanes[i], lanes[i + width]);
  return lanes[0];
}

// The errors of all entries for one vector of HALVES * COLUMNS columns, up to a constant and divided by the scale:
// square · s + cross. square: sum h g². cross: -2 sum h |x| g; `flipped`: with the best sign of each entry flipped.
template <int COLUMNS, int HALVES> struct Nearest {
  static constexpr int WIDE = COLUMNS * HALVES;
  const fewbit_vectors& v;
  alignas(64) float square[FEWBIT_MOST_ENTRIES], cross[FEWBIT_MOST_ENTRIES], flipped[FEWBIT_MOST_ENTRIES];
  alignas(64) float scores[FEWBIT_MOST_ENTRIES];
  float u[WIDE];
  bool odd;  // the signs of x have the wrong parity

  explicit Nearest(const fewbit_vectors& v) : v(v) {}

  void weigh(const float* h) {
    for (int half = 0; half < HALVES; half++)
      for (int e = 0; e < v.entries; e += LANE) {
        Vec::F sum = Vec::set1(0);
        for (int i = 0; i < COLUMNS; i++) {
          const Vec::F g = Vec::loadf(v.grid + i * v.entries + e);
          sum = Vec::add(sum, Vec::mul(Vec::set1(h[half * COLUMNS + i]), Vec::mul(g, g)));
        }
        Vec::storef(square + half * v.entries + e, sum);
      }
  }

  template <bool ODD> void cross_of(int half) {
    Vec::F by[COLUMNS];
    for (int i = 0; i < COLUMNS; i++) by[i] = Vec::set1(u[half * COLUMNS + i]);
    for (int e = 0; e < v.entries; e += LANE) {
      const float* grid = v.grid + e;
      Vec::F sum = Vec::mul(by[0], Vec::loadf(grid)), most = sum;
      for (int i = 1; i < COLUMNS; i++) {
        const Vec::F product = Vec::mul(by[i], Vec::loadf(grid + i * v.entries));
        sum = Vec::add(sum, product);
        if (ODD) most = Vec::max(most, product);
      }
      if (ODD) {
        // -2 (B - 2 least of u g), where `most` is -2 times that least product
        const Vec::F other = Vec::add(sum, Vec::mul(Vec::set1(-2), most));
        if (HALVES == 1) sum = other;
        else Vec::storef(flipped + half * v.entries + e, other);
      }
      Vec::storef(cross + half * v.entries + e, sum);
    }
  }

  void take(const float* x, const float* h) {
    int minus = 0;
    for (int i = 0; i < WIDE; i++) {
      u[i] = -2 * (h[i] * (x[i] < 0 ? -x[i] : x[i]));
      minus += x[i] < 0;
    }
    odd = v.even && minus % 2;
    for (int half = 0; half < HALVES; half++) odd ? cross_of<true>(half) : cross_of<false>(half);
  }

  // The least score of a half at TRIES scales. `of`: cross or flipped.
  template <int TRIES> void least(const float* of, int half, const float* s, float* out) {
    Vec::F found[TRIES], scale[TRIES];
    for (int t = 0; t < TRIES; t++) found[t] = Vec::set1(INFINITY), scale[t] = Vec::set1(s[t]);
    for (int e = half * v.entries; e < (half + 1) * v.entries; e += LANE) {
      const Vec::F a = Vec::loadf(square + e), b = Vec::loadf(of + e);
      for (int t = 0; t < TRIES; t++) found[t] = Vec::min(found[t], Vec::add(Vec::mul(scale[t], a), b));
    }
    for (int t = 0; t < TRIES; t++) out[t] = lowest(found[t]);
  }
  void least(const float* of, int half, const float* s, float* out, int64_t tries) {
    for (; tries >= 4; tries -= 4, s += 4, out += 4) least<4>(of, half, s, out);
    if (tries == 3) least<3>(of, half, s, out);
    if (tries == 2) least<2>(of, half, s, out);
    if (tries == 1) least<1>(of, half, s, out);
  }

  // The least error of the vector at each scale, up to a constant.
  void errors(const float* s, float* out, int64_t tries) {
    float one[2][FEWBIT_MOST_TRIES], other[2][FEWBIT_MOST_TRIES];
    for (int half = 0; half < HALVES; half++) {
      least(cross, half, s, one[half], tries);
      if (HALVES == 2 && odd) least(flipped, half, s, other[half], tries);
    }
    for (int64_t t = 0; t < tries; t++) {
      float sum = one[0][t];
      if (HALVES == 2) {
        sum += one[1][t];
        if (odd) {
          const float first = other[0][t] - one[0][t], second = other[1][t] - one[1][t];
          sum += smaller(first, second);
        }
      }
      out[t] = sum * s[t];
    }
  }

  // The `count` best entries of a half at scale s, the best first; of equal ones, the lowest index first.
  void best(const float* of, int half, float s, int count, int* index) {
    const float *a = square + half * v.entries, *b = of + half * v.entries;
    alignas(64) float lanes[LANE];
    Vec::F found = Vec::set1(INFINITY);
    const Vec::F scale = Vec::set1(s);
    for (int e = 0; e < v.entries; e += LANE) {
      const Vec::F score = Vec::add(Vec::mul(scale, Vec::loadf(a + e)), Vec::loadf(b + e));
      Vec::storef(scores + e, score);
      found = Vec::min(found, score);
    }
    Vec::storef(lanes, found);
    for (int n = 0; n < count; n++) {
      const float top = lowest(Vec::loadf(lanes));
      int at = v.entries;
      for (int i = 0; i < LANE; i++) {
        if (lanes[i] != top) continue;
        int e = i;
        while (e < v.entries && scores[e] != top) e += LANE;
        at = e < at ? e : at;
      }
      index[n] = at = at < v.entries ? at : 0;
      if (n + 1 == count) break;
      scores[at] = INFINITY;
      float least[4] = {INFINITY, INFINITY, INFINITY, INFINITY};
      for (int e = at % LANE; e < v.entries; e += 4 * LANE)
        for (int i = 0; i < 4; i++) least[i] = smaller(least[i], scores[e + i * LANE]);
      lanes[at % LANE] = smaller(smaller(least[0], least[1]), smaller(least[2], least[3]));
    }
  }

  // The column of a half whose sign an entry flips at the least cost.
  int cheapest(int half, int entry) const {
    int at = 0;
    float most = -INFINITY;
    for (int i = 0; i < COLUMNS; i++) {
      const float product = u[half * COLUMNS + i] * v.grid[i * v.entries + entry];
      if (product > most) most = product, at = i;
    }
    return at;
  }

  // Entries of both halves at scale s; the return value is the half whose sign is flipped, or -1.
  int choose(float s, int* index) {
    for (int half = 0; half < HALVES; half++) best(cross, half, s, 1, index + half);
    if (!odd) return -1;
    if (HALVES == 1) return 0;
    int other[2];
    float lost[2];
    for (int half = 0; half < 2; half++) {
      best(flipped, half, s, 1, other + half);
      const int was = half * v.entries + index[half % HALVES], is = half * v.entries + other[half];
      lost[half] = (s * square[is] + flipped[is]) - (s * square[was] + cross[was]);
    }
    const int which = lost[1] < lost[0];
    index[which % HALVES] = other[which];
    return which;
  }

  void write(const float* x, const int* index, int half, uint8_t* codes) const {
    for (int i = 0; i < WIDE; i++) {
      const int rank = v.ranks[index[i / COLUMNS] * COLUMNS + i % COLUMNS];
      codes[i] = uint8_t(x[i] < 0 ? v.magnitudes - 1 - rank : v.magnitudes + rank);
    }
    if (half < 0) return;
    uint8_t& code = codes[half * COLUMNS + cheapest(half, index[half % HALVES])];
    code = uint8_t(2 * v.magnitudes - 1 - code);
  }

  // What an entry misses of a half of x at scale s. flip: whether the sign of its cheapest column is flipped.
  void miss(const float* x, float s, int half, int entry, bool flip, float* out) const {
    for (int i = 0; i < COLUMNS; i++) {
      const float own = x[half * COLUMNS + i], level = s * v.grid[i * v.entries + entry];
      out[i] = (own < 0 ? -level : level) - own;
    }
    if (!flip) return;
    const int i = cheapest(half, entry);
    out[i] = -out[i] - 2 * x[half * COLUMNS + i];
  }

  // The codes with the least error under the metric, of the vectors that are nearest under its diagonal. Of two halves,
  // one has an entry of `first` (and the flipped sign if signs are odd), the other one of `second`.
  void under(const float* x, float s, uint8_t* codes) {
    constexpr int FEWER = HALVES == 1 ? 1 : COMPARED / 2, PAIRS = COMPARED * FEWER;
    int first[HALVES][COMPARED], second[HALVES][COMPARED], chosen[2], flip = -1;
    float of_first[COMPARED][COLUMNS], of_second[COMPARED][COLUMNS], least = 0;
    bool any = false;
    for (int half = 0; half < HALVES; half++) {
      best(HALVES == 2 && odd ? flipped : cross, half, s, COMPARED, first[half]);
      if (HALVES == 2) best(cross, half, s, FEWER, second[half]);
    }
    for (int half = 0; half < HALVES; half++) {
      const int other = HALVES - 1 - half;
      for (int n = 0; n < COMPARED; n++) miss(x, s, half, first[half][n], odd, of_first[n]);
      if (HALVES == 2)
        for (int n = 0; n < FEWER; n++) miss(x, s, other, second[other][n], false, of_second[n]);
      for (int from = 0; from < PAIRS; from += LANE) {
        alignas(64) float missed[WIDE][LANE] = {}, errors[LANE];
        const int count = PAIRS - from < LANE ? PAIRS - from : LANE;
        for (int n = 0; n < count; n++)
          for (int i = 0; i < COLUMNS; i++) {
            missed[half * COLUMNS + i][n] = of_first[(from + n) / FEWER][i];
            if (HALVES == 2) missed[other * COLUMNS + i][n] = of_second[(from + n) % FEWER][i];
          }
        Vec::F sum = Vec::set1(0);
        for (int i = 0; i < WIDE; i++) {
          Vec::F row = Vec::set1(0);
          for (int j = 0; j < WIDE; j++)
            row = Vec::add(row, Vec::mul(Vec::set1(v.metric[j * WIDE + i]), Vec::loadf(missed[j])));
          sum = Vec::add(sum, Vec::mul(row, Vec::loadf(missed[i])));
        }
        Vec::storef(errors, sum);
        for (int n = 0; n < count; n++) {
          if (any && !(errors[n] < least)) continue;
          any = true, least = errors[n], flip = odd ? half : -1;
          chosen[half] = first[half][(from + n) / FEWER];
          if (HALVES == 2) chosen[other] = second[other][(from + n) % FEWER];
        }
      }
    }
    write(x, chosen, flip, codes);
  }

  void run(int64_t begin, int64_t end) {
    float scale[FEWBIT_MOST_TRIES], found[FEWBIT_MOST_TRIES];
    for (int64_t j = 0; j < v.vectors; j++)
      for (int64_t row = begin; row < end; row++) {
        const float* h = v.h + row * v.step + j * WIDE;
        if (row == begin || v.step) weigh(h);
        const int64_t at = row * v.vectors + j;
        const float* x = v.x + at * WIDE;
        take(x, h);
        const float s = v.s[at];
        if (v.least) {
          const int64_t all = v.rows * v.vectors;
          for (int64_t t = 0; t < v.tries; t++) scale[t] = v.s[t * all + at];
          errors(scale, found, v.tries);
          for (int64_t t = 0; t < v.tries; t++) v.least[t * all + at] = found[t];
        }
        if (v.codes && v.metric) {
          under(x, s, v.codes + at * WIDE);
        } else if (v.codes || v.square) {
          int index[2] = {};
          const int half = choose(s, index);
          if (v.codes) write(x, index, half, v.codes + at * WIDE);
          if (!v.square) continue;
          float a = 0, b = 0;
          for (int i = 0; i < HALVES; i++) {
            const int e = i * v.entries + index[i];
            a += square[e];
            b += (HALVES == 2 && half == i ? flipped : cross)[e];
          }
          v.square[at] = a, v.cross[at] = -0.5f * b;
        }
      }
  }
};

void vectors_of(const fewbit_vectors& v, int64_t begin, int64_t end) {
  if (v.columns == 8) Nearest<8, 1>(v).run(begin, end);
  else if (v.halves == 1) Nearest<4, 1>(v).run(begin, end);
  else Nearest<4, 2>(v).run(begin, end);
}

}  // namespace
