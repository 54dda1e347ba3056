// Integers with a scale (and a zero point) for each group of columns, codes in a bit stream by row, in the form of
// formats.inl; and those of LLM.int8().

namespace {

// How sixteen codes in 2 BITS bytes become bytes. A code is inside a word of 16 bits: `even` (`odd`) are the bytes of the words
// of codes with an even (odd) number, and `even_at` (`odd_at`) where the codes begin in them. The product with `even_by`
// (`odd_by`) has the code in the upper byte.
template <int BITS> struct Straddling {
  alignas(16) uint8_t even[16], odd[16];
  alignas(16) uint16_t even_at[8], odd_at[8], even_by[8], odd_by[8];
  constexpr Straddling() : even(), odd(), even_at(), odd_at(), even_by(), odd_by() {
    for (int i = 0; i < 8; i++) put(i, 2 * i * BITS, (2 * i + 1) * BITS);
  }
  constexpr void put(int i, int a, int b) {
    even[2 * i] = uint8_t(a / 8), even[2 * i + 1] = uint8_t(a / 8 + 1), even_at[i] = uint16_t(a % 8);
    odd[2 * i] = uint8_t(b / 8), odd[2 * i + 1] = uint8_t(b / 8 + 1), odd_at[i] = uint16_t(b % 8);
    even_by[i] = uint16_t(1 << (8 - a % 8)), odd_by[i] = uint16_t(1 << (8 - b % 8));
  }
};

// How 32 codes of three bits in 12 bytes become two vectors. Eight codes have three bytes, and a word has the same code of two
// neighbours of eight. Codes inside of a byte make the first vector: `within` has this byte of both, and `at` where the code
// begins; the product with `by` has it at the top of the byte. The others make the second vector, as above.
constexpr int THREE_BITS[2][4] = {{0, 1, 3, 4}, {2, 5, 6, 7}};
struct Within : Straddling<3> {
  alignas(16) uint8_t within[16];
  alignas(16) uint16_t at[8], by[8];
  constexpr Within() : within(), at(), by() {
    for (int i = 0; i < 8; i++) {
      const int first = 48 * (i / 4), bit = 3 * THREE_BITS[0][i % 4], a = first + 3 * THREE_BITS[1][i % 4];
      within[2 * i] = uint8_t((first + bit) / 8), within[2 * i + 1] = uint8_t((first + bit) / 8 + 3), at[i] = uint16_t(bit % 8);
      by[i] = uint16_t(1 << (5 - bit % 8));
      put(i, a, a + 24);
    }
  }
};

// How codes become bytes where a byte can be any eight bits of its word of 64. `bytes` brings the bytes of eight codes into
// each word, and the codes begin at its bits `at`. With one vector, these are eight codes in a row. With four vectors, a
// lane has 16 codes in a row, and a word has codes of two lanes: the first eight of each for two of the vectors, and the
// last eight of each for the others.
template <int BITS, int VECTORS> struct Fields {
  static constexpr int HALVES = VECTORS == 4 ? 2 : 1, EACH = VECTORS / HALVES;
  alignas(64) uint8_t bytes[HALVES][64], at[VECTORS][64];
  constexpr Fields() : bytes(), at() {
    for (int i = 0; i < 64; i++) {
      for (int half = 0; half < HALVES; half++) {
        const int byte = HALVES == 1 ? i / 8 * BITS + i % 8 : i / 4 * 2 * BITS + half * BITS + i % 4 % BITS;
        bytes[half][i] = uint8_t(byte < 64 ? byte : byte + 128 - VECTORS * 8 * BITS);  // see Vec::bytes
      }
      for (int p = 0; p < VECTORS; p++)
        at[p][i] = uint8_t(HALVES == 1 ? i % 8 * BITS : i / 4 % 2 * 32 + (4 * p + i % 4) % 8 * BITS);
    }
  }
};

// `P` vectors of codes for each step.
template <int BITS, int VECTORS = 8 % BITS ? 1 : 8 / BITS> struct Affine : Format {
  static constexpr int P = VECTORS, C = 64 * P, STEPS = 1, BYTES = C * BITS / 8;
  static constexpr int MOST = (1 << BITS) - 1, ZERO = 0;
  static constexpr bool THREE = BITS == 3 && P > 1;
  static constexpr int column(int, int p, int b) {
    return THREE && P == 4 ? b / 4 * 16 + 4 * p + b % 4
           : THREE         ? b / 8 * 16 + b % 2 * 8 + THREE_BITS[p % 2][b % 8 / 2]
                           : P * b + p;
  }
  struct Row {
    const uint8_t *first, *end, *codes, *first_scale, *scale, *first_zero, *zero_end, *zero;
    int64_t bytes, groups, zero_bytes;
    int64_t chunks_a_group;  // the group of a chunk is `in_chunk * chunk >> shift`; if shift is negative, a division is needed
    int shift, in_chunk;
    Lanes lanes;
    mutable int64_t held = -1;  // the first of the 16 groups of `scales` and `offsets`
    mutable Vec::Held scales, offsets;
    explicit Row(const fewbit_weight& w) {
      groups = w.k / w.group;
      bytes = (w.k * BITS + 7) / 8;
      zero_bytes = (groups * BITS + 7) / 8;
      codes = first = (const uint8_t*)w.part[0];
      end = first + w.n * bytes;
      scale = first_scale = (const uint8_t*)w.part[1];
      zero = first_zero = (const uint8_t*)w.part[2];
      zero_end = zero ? zero + w.n * zero_bytes : nullptr;
      const bool whole = w.group % C == 0 || groups == 1;
      chunks_a_group = whole && groups > 1 ? w.group / C : 1;
      const bool power = !(chunks_a_group & (chunks_a_group - 1));
      shift = groups == 1 ? 62 : power ? __builtin_ctzll((unsigned long long)chunks_a_group) : -1;
      in_chunk = whole ? 1 : int(C / w.group);
      lanes = by(4 * P, whole ? 0 : int(w.group));
    }
    void to(int64_t n) {
      codes = first + n * bytes;
      scale = first_scale + n * groups * 2;
      if (first_zero) zero = first_zero + n * zero_bytes;
      held = -1;
    }
  };
  // Of the 16 groups from a multiple of 16 on. Zeros of groups that are not there mean nothing.
  static INLINE F zeros(const Row& r, int64_t from) {
    const uint8_t* p = r.zero + from * BITS / 8;
    uint8_t copy[16] = {};
    ahead_scales(p);
    if (p + BITS + 8 > r.zero_end) {
      memcpy(copy, p, size_t(r.zero_end - p < 2 * BITS ? r.zero_end - p : 2 * BITS));
      p = copy;
    }
    return Vec::from_u64(Vec::spread<BITS>(word64(p)), Vec::spread<BITS>(word64(p + BITS)));
  }
  template <class Fn> static INLINE void decode(const Row& r, int64_t c, Fn&& fn) {
    const uint8_t* p = r.codes + c * BYTES;
    ahead(p);
    const int64_t group = r.shift >= 0 ? c * r.in_chunk >> r.shift : int64_t(uint32_t(c) / uint32_t(r.chunks_a_group));
    U codes[P];
    unpack(p, r.end - p, codes);
    if (BITS == 8 && r.in_chunk == 1) {  // from memory, a fifth faster than by 16 groups
      const F s = Vec::set1(Vec::half(r.scale + 2 * group));
      return fn(0, codes, s, times(s, r.zero ? -float(r.zero[group]) : -128.0f));
    }
    if (const int64_t from = group & ~int64_t(15); from != r.held) {
      const int64_t there = r.groups - from;
      r.held = from;
      ahead_scales(r.scale + 2 * from);
      const F s = Vec::halfs(r.scale + 2 * from, there < 16 ? int(there) : 16);
      r.scales.hold(s);
      r.offsets.hold(r.zero ? Vec::mul(s, times(zeros(r, from), -1)) : times(s, -float(1 << (BITS - 1))));
    }
    const int64_t at = group & 15;
    fn(0, codes, r.scales.lanes(r.lanes.at, at, r.in_chunk / 2), r.offsets.lanes(r.lanes.at, at, r.in_chunk / 2));
  }
  // At the end of a row this may read codes of the next row. They are multiplied by activations of 0.
  static INLINE void unpack(const uint8_t* p, int64_t left, U* codes) {
    if constexpr (8 % BITS == 0) {
      const U q = left < BYTES ? Vec::load_part(p, left) : Vec::load(p);
      fields(q, codes);
    } else {
      constexpr int READ = BYTES < 64 ? 64 : BYTES;
      uint8_t copy[READ];
      if (left < READ) {
        memset(copy, 0, sizeof copy);
        memcpy(copy, p, size_t(left < BYTES ? left : BYTES));
        p = copy;
      }
#ifdef __AVX512VBMI__
      static constexpr Fields<BITS, P> word{};
      for (int half = 0; half < word.HALVES; half++) {
        const U q = Vec::bytes<READ>(p, word.bytes[half]);
        for (int i = half * word.EACH; i < (half + 1) * word.EACH; i++)
          codes[i] = Vec::fields<(1 << BITS) - 1>(q, word.at[i]);
      }
#else
      const U q = Vec::quarters<BYTES / 4>(p);
      if constexpr (THREE) {
        static constexpr Within word{};
        codes[0] = Vec::within(q, word), codes[1] = Vec::straddling<7>(q, word);
      } else {
        static constexpr Straddling<BITS> word{};
        codes[0] = Vec::straddling<(1 << BITS) - 1>(q, word);
      }
#endif
    }
  }
  static INLINE void fields(U q, U* codes) {
    if constexpr (BITS == 8) codes[0] = q;
    else if constexpr (BITS == 4) {
      codes[0] = Vec::field<0, 15>(q), codes[1] = Vec::field<4, 15>(q);
    } else {
      codes[0] = Vec::field<0, 3>(q), codes[1] = Vec::field<2, 3>(q);
      codes[2] = Vec::field<4, 3>(q), codes[3] = Vec::field<6, 3>(q);
    }
  }
};

using Threes = Affine<3, Vec::THREES>;  // lanes of 8 or 16 codes: these must share a scale

struct Int8 : Format {
  static constexpr int P = 1, C = 64, STEPS = 1, MOST = 255, ZERO = 128;
  static constexpr bool SIGNED = true;
  static constexpr int column(int, int, int b) { return b; }
  struct Row {
    const uint8_t *first, *end, *codes;
    const float* scales;
    int64_t k;
    float scale = 0;
    explicit Row(const fewbit_weight& w) : first((const uint8_t*)w.part[0]), codes(first), k(w.k) {
      end = first + w.n * k;
      scales = (const float*)w.part[1];
    }
    void to(int64_t n) {
      codes = first + n * k;
      scale = scales[n] * (1.0f / 127.0f);
    }
  };
  template <class Fn> static INLINE void decode(const Row& r, int64_t c, Fn&& fn) {
    const uint8_t* p = r.codes + c * C;
    const int64_t left = r.end - p;
    ahead(p);
    U codes[1] = {left < C ? Vec::load_part(p, left) : Vec::load(p)};
    fn(0, codes, Vec::set1(r.scale));
  }
};

}  // namespace
