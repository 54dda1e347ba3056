// Every instruction set of this machine over random weights: the products of plain C++, and for each row of x the same
// bytes whatever the number of rows. The nearest vectors of a codebook are the same bytes. A program of its own, so that
// it also runs in an emulator of another processor.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <random>
#include <vector>

#include "fewbit.h"

namespace {

constexpr int64_t N = 11, M = 40;  // rows of W: one piece that is unpacked, and a part of one; rows of x
constexpr double TOLERANCE = 1e-5;  // relative, for sums of the same products in another order
constexpr double ROUNDED_AGAIN = 2e-2;  // the same where such a sum is rounded to 8 bits for the next product

std::mt19937 numbers(1);

struct Weight {
  fewbit_weight w{};
  std::vector<std::vector<uint8_t>> parts;

  Weight(int kind, int bits, int64_t group, int64_t k) {
    parts.reserve(6);
    w.kind = kind, w.bits = bits, w.group = group, w.n = N, w.k = k;
  }
  Weight(Weight&&) = default;  // a copy's `w` would point to the parts of the original

  uint8_t* random(int part, int64_t bytes) {
    parts.emplace_back(size_t(bytes));
    for (uint8_t& byte : parts.back()) byte = uint8_t(numbers());
    w.part[part] = parts.back().data(), w.bytes[part] = bytes;
    return parts.back().data();
  }
};

uint16_t half() { return uint16_t(0x2000 | (numbers() & 0x03ff)); }  // of 2^-7 to 2^-6

void halves(uint8_t* to, int64_t count, int64_t stride = 2) {
  for (int64_t i = 0; i < count; i++) {
    const uint16_t bits = half();
    memcpy(to + i * stride, &bits, 2);
  }
}

void floats(uint8_t* to, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    const float value = 0.01f + float(numbers() % 100) * 0.001f;
    memcpy(to + 4 * i, &value, 4);
  }
}

Weight affine(int bits, int64_t group, int64_t k) {
  Weight made(FEWBIT_AFFINE, bits, group, k);
  const int64_t groups = k / group;
  made.random(0, N * ((k * bits + 7) / 8));
  halves(made.random(1, N * groups * 2), N * groups);
  made.random(2, N * ((groups * bits + 7) / 8));
  return made;
}

Weight int8(int64_t k) {
  Weight made(FEWBIT_INT8, 0, k, k);
  made.random(0, N * k);
  floats(made.random(1, 4 * N), N);
  return made;
}

// scales: where in a block of so many columns and bytes the numbers in float16 are.
Weight blocks(int kind, int64_t columns, int64_t bytes, std::vector<int> scales, int64_t k) {
  Weight made(kind, 0, 0, k);
  const int64_t count = N * (k / columns);
  uint8_t* at = made.random(0, count * bytes);
  for (int scale : scales) halves(at + scale, count, bytes);
  return made;
}

// Codes of the codebook are 1 to `top`.
Weight of_codebook(int kind, int64_t bytes, int64_t codebook, int top, int64_t k) {
  Weight made = blocks(kind, 256, bytes, {0}, k);
  uint8_t* at = made.random(1, codebook);
  for (int64_t i = 0; i < codebook; i++) at[i] = uint8_t(1 + at[i] % top);
  if (kind != FEWBIT_IQ1_M) return made;
  uint8_t* first = made.parts.front().data();  // the upper bits of d are those of a block's last byte
  for (int64_t i = bytes - 1; i < N * (k / 256) * bytes; i += bytes) first[i] = uint8_t((first[i] & 15) | 0x20);
  return made;
}

Weight levels(int64_t k) {
  Weight made(FEWBIT_LEVELS, 0, 64, k);
  made.random(0, N * k / 2);
  floats(made.random(1, 4 * N * k / 64), N * k / 64);
  floats(made.random(2, 64), 16);
  return made;
}

Weight fp8(int64_t k) {
  Weight made(FEWBIT_FP8, 1, k, k);
  uint8_t* codes = made.random(0, N * k);
  for (int64_t i = 0; i < N * k; i++) codes[i] &= 0xf7;  // no NaN
  floats(made.random(1, 4 * N), N);
  return made;
}

// float16 or bfloat16, not quantized.
Weight floats16(bool brain, int64_t k) {
  Weight made(brain ? FEWBIT_BF16 : FEWBIT_F16, 0, 0, k);
  uint8_t* at = made.random(0, N * k * 2);
  for (int64_t i = 1; i < N * k * 2; i += 2) at[i] = uint8_t((at[i] & 0x83) | (brain ? 0x3c : 0x20));  // 2^-7 or so
  return made;
}

Weight fp4(bool nv, int64_t k) {
  const int64_t group = nv ? 16 : 32;
  Weight made(nv ? FEWBIT_NVFP4 : FEWBIT_MXFP4, 0, group, k);
  made.random(0, N * k / 2);
  uint8_t* scales = made.random(1, N * (k / group));
  for (int64_t i = 0; i < N * (k / group); i++) scales[i] = uint8_t(nv ? scales[i] & 0x77 : 120 + scales[i] % 8);
  if (nv) floats(made.random(2, 4 * N), N);
  return made;
}

std::vector<Weight> weights() {
  std::vector<Weight> all;
  for (int64_t k : {512, 768}) {
    for (int bits = 2; bits <= 8; bits++)
      for (int64_t group : {int64_t(32), int64_t(256), k}) all.push_back(affine(bits, group, k));
    all.push_back(int8(k));
    all.push_back(blocks(FEWBIT_Q4_0, 32, 18, {0}, k));
    all.push_back(blocks(FEWBIT_Q4_1, 32, 20, {0, 2}, k));
    all.push_back(blocks(FEWBIT_Q5_0, 32, 22, {0}, k));
    all.push_back(blocks(FEWBIT_Q5_1, 32, 24, {0, 2}, k));
    all.push_back(blocks(FEWBIT_Q8_0, 32, 34, {0}, k));
    all.push_back(blocks(FEWBIT_Q2_K, 256, 84, {80, 82}, k));
    all.push_back(blocks(FEWBIT_Q3_K, 256, 110, {108}, k));
    all.push_back(blocks(FEWBIT_Q4_K, 256, 144, {0, 2}, k));
    all.push_back(blocks(FEWBIT_Q5_K, 256, 176, {0, 2}, k));
    all.push_back(blocks(FEWBIT_Q6_K, 256, 210, {208}, k));
    all.push_back(blocks(FEWBIT_IQ4_NL, 32, 18, {0}, k));
    all.push_back(blocks(FEWBIT_IQ4_XS, 256, 136, {0}, k));
    all.push_back(of_codebook(FEWBIT_IQ2_XXS, 66, 8 * 256, 127, k));
    all.push_back(of_codebook(FEWBIT_IQ2_XS, 74, 8 * 512, 127, k));
    all.push_back(of_codebook(FEWBIT_IQ2_S, 82, 8 * 1024, 127, k));
    all.push_back(of_codebook(FEWBIT_IQ3_XXS, 98, 4 * 256, 127, k));
    all.push_back(of_codebook(FEWBIT_IQ3_S, 110, 4 * 512, 31, k));
    all.push_back(of_codebook(FEWBIT_IQ1_S, 50, 8 * 2048, 3, k));
    all.push_back(of_codebook(FEWBIT_IQ1_M, 56, 8 * 2048, 3, k));
    all.push_back(blocks(FEWBIT_TQ1_0, 256, 54, {52}, k));
    all.push_back(blocks(FEWBIT_TQ2_0, 256, 66, {64}, k));
    all.push_back(blocks(FEWBIT_Q1_0, 128, 18, {0}, k));
    all.push_back(blocks(FEWBIT_Q2_0, 64, 18, {0}, k));
    all.push_back(levels(k));
    all.push_back(fp8(k));
    for (bool brain : {false, true}) all.push_back(floats16(brain, k)), all.push_back(floats16(brain, k - 27));
    all.push_back(fp4(false, k));
    all.push_back(fp4(true, k));
  }
  return all;
}

// Numbers of a type as bytes, rounded towards 0, and back.
std::vector<uint8_t> packed(const std::vector<float>& x, int type) {
  std::vector<uint8_t> made(x.size() * 4);
  for (size_t i = 0; i < x.size(); i++) {
    const float value = type == FEWBIT_FLOAT16 ? x[i] * 0x1p-112f : x[i];
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (type == FEWBIT_FLOAT16) bits = (bits & 0x80000000u) | (bits & 0x7fffffffu) << 3;
    if (type == FEWBIT_FLOAT32) memcpy(&made[4 * i], &bits, 4);
    else memcpy(&made[2 * i], reinterpret_cast<const char*>(&bits) + 2, 2);
  }
  return made;
}
std::vector<float> unpacked(const std::vector<uint8_t>& bytes, int type) {
  std::vector<float> made(bytes.size() / 4);
  for (size_t i = 0; i < made.size(); i++) {
    uint32_t bits = 0;
    if (type == FEWBIT_FLOAT32) memcpy(&bits, &bytes[4 * i], 4);
    else memcpy(reinterpret_cast<char*>(&bits) + 2, &bytes[2 * i], 2);
    if (type == FEWBIT_FLOAT16) bits = (bits & 0x80000000u) | (bits & 0x7fffffffu) >> 3;
    memcpy(&made[i], &bits, 4);
    if (type == FEWBIT_FLOAT16) made[i] *= 0x1p112f;
  }
  return made;
}
double apart(const std::vector<float>& a, const std::vector<float>& b) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < a.size(); i++) error += pow(double(a[i]) - b[i], 2), norm += pow(b[i], 2);
  return norm > 0 ? sqrt(error / norm) : 1;
}

constexpr double EQUAL[3] = {TOLERANCE, 1e-2, 2e-3};  // for sums that are rounded to each type

// An empty text if this instruction set multiplies as plain C++ does, else what is wrong.
const char* wrong(const fewbit_weight& w, const char* isa) {
  std::vector<float> x(size_t(M * w.k)), y(M * N), plain(M * N), one(N);
  std::normal_distribution<float> normal;
  for (float& value : x) value = normal(numbers);
  if (fewbit_force("scalar") || fewbit_linear(&w, x.data(), M, plain.data(), FEWBIT_FLOAT32, 1)) return "refused";
  if (fewbit_force(isa) || fewbit_linear(&w, x.data(), M, y.data(), FEWBIT_FLOAT32, 2)) return "refused";
  for (int64_t i = 0; i < M; i++) {
    if (fewbit_linear(&w, x.data() + i * w.k, 1, one.data(), FEWBIT_FLOAT32, 1)) return "refused";
    if (memcmp(one.data(), y.data() + i * N, sizeof(float) * N)) return "a row alone has another result";
  }
  if (!(apart(y, plain) <= TOLERANCE)) return "the product is not that of plain C++";
  for (int type : {FEWBIT_BFLOAT16, FEWBIT_FLOAT16}) {
    const std::vector<uint8_t> narrow = packed(x, type);
    std::vector<uint8_t> a(y.size() * 4), b(y.size() * 4);
    if (fewbit_force("scalar") || fewbit_linear(&w, narrow.data(), M, a.data(), type, 1)) return "refused";
    if (fewbit_force(isa) || fewbit_linear(&w, narrow.data(), M, b.data(), type, 2)) return "refused";
    if (!(apart(unpacked(b, type), unpacked(a, type)) <= EQUAL[type])) return "other products in 16 bits than plain C++";
  }
  return "";
}

std::vector<float> normal(int64_t count) {
  std::vector<float> made(static_cast<size_t>(count));
  std::normal_distribution<float> draw;
  for (float& value : made) value = draw(numbers);
  return made;
}

// A block of a type whose options are the bits of `which`, and the results of one call of it: y, keys and values.
struct Result {
  int status;
  std::vector<float> y, keys, values;
};
Result block(unsigned which, int type, int64_t tokens, const char* isa, int threads) {
  numbers.seed(which);
  const auto option = [&](int bit) { return int(which >> bit & 1); };
  const int64_t head = 20, shared = 2, heads = 8, width = 64, inner = 96, filled = 9, length = filled + tokens + 3;
  const int plain = option(0), mixed = option(1);
  std::vector<Weight> held;
  held.reserve(8);
  std::vector<std::vector<float>> numbers_of;
  numbers_of.reserve(40);
  const auto floats_of = [&](int64_t count) { return numbers_of.push_back(normal(count)), numbers_of.back().data(); };
  const auto rows = [&](int64_t n, int64_t k) {
    Weight made(FEWBIT_AFFINE, 4, 32, k);
    made.w.n = n;
    made.random(0, n * k / 2);
    halves(made.random(1, n * k / 32 * 2), n * k / 32);
    held.push_back(std::move(made));
    return fewbit_rows{&held.back().w, option(2) ? floats_of(n) : nullptr, nullptr};
  };
  fewbit_block b{};
  b.type = type, b.plain = plain, b.mixed = mixed, b.parallel = option(3), b.late = option(4);
  b.whole = !mixed && option(5), b.activation = int(which % 6), b.pairs = int(which % 3);
  b.width = width, b.inner = inner, b.heads = heads, b.shared = shared, b.head = head;
  b.rotated = option(6) ? 12 : head, b.scale = 0.2f, b.cap = option(7) ? 5.0f : 0.0f, b.residual = 0.7f;
  for (int i = 0; i < 6; i++) {
    if (i < 4 ? option(7) && i % 2 : !option(8)) continue;
    const int64_t k = i < 4 ? width : b.whole ? (i == 4 ? heads : shared) * head : head;
    b.norm[i] = {floats_of(k), option(9) ? floats_of(k) : nullptr, 1e-5f, option(10)};
  }
  b.sinks = option(11) ? floats_of(heads) : nullptr;
  b.together = b.parallel && which % 5 < 2;
  const int64_t qkv = (heads + 2 * shared) * head, ups = (plain ? 1 : 2) * inner;
  const bool stacked = mixed || b.together;
  b.products[0][0] = rows(stacked ? qkv + (b.together ? ups : 0) : heads * head, width), b.counts[0] = stacked ? 1 : 3;
  if (!stacked) b.products[0][1] = rows(shared * head, width), b.products[0][2] = rows(shared * head, width);
  b.products[1][0] = rows(width, heads * head), b.counts[1] = 1;
  if (!b.together) b.products[2][0] = rows(inner, width), b.counts[2] = plain ? 1 : 2;
  if (!b.together && !plain) b.products[2][1] = rows(inner, width);
  b.products[3][0] = rows(width, inner), b.counts[3] = 1;
  const std::vector<float> turned = normal(tokens * b.rotated);
  const std::vector<uint8_t> x = packed(normal(tokens * width), type);
  std::vector<uint8_t> y(x.size()), keys = packed(normal(shared * length * head), type);
  std::vector<uint8_t> values = packed(normal(shared * length * head), type);
  fewbit_call c{};
  c.x = x.data(), c.y = y.data(), c.batch = 1, c.tokens = tokens, c.filled = filled, c.length = length;
  c.cosine = c.sine = turned.data(), c.keys = keys.data(), c.values = values.data();
  const int status = fewbit_force(isa) || fewbit_decode_block(&b, &c, threads);
  return {status, unpacked(y, type), unpacked(keys, type), unpacked(values, type)};
}

// Blocks whose results are not those of plain C++, or depend on the number of threads.
int wrong_blocks(const char* isa, unsigned count) {
  int mistakes = 0;
  for (unsigned which = 0; which < count; which++) {
    const unsigned options = which * 2654435761u >> 20;
    const int64_t tokens = which % 2 ? 1 : 3;
    const int type = int(which % 3);
    const Result plain = block(options, type, tokens, "scalar", 1), one = block(options, type, tokens, isa, 1);
    const Result more = block(options, type, tokens, isa, 3);
    const char* what = plain.status || one.status || more.status                      ? "refused"
                       : one.y != more.y || one.keys != more.keys                     ? "threads change the result"
                       : apart(one.keys, plain.keys) > EQUAL[type]                    ? "other keys than plain C++"
                       : apart(one.values, plain.values) > EQUAL[type]                ? "other values than plain C++"
                       : !(apart(one.y, plain.y) <= ROUNDED_AGAIN)                    ? "not the result of plain C++"
                                                                                      : "";
    if (!*what) continue;
    printf("%s: block with options %u, type %d, %d tokens: %s\n", isa, options, type, int(tokens), what);
    mistakes++;
  }
  return mistakes;
}

// All that `fewbit_vectors` asks for, as bytes.
std::vector<uint8_t> nearest(int entries, int columns, int halves, int even, const char* isa, int threads) {
  numbers.seed(unsigned(entries + even));
  const int wide = columns * halves, magnitudes = 3;
  const int64_t rows = 300, vectors = 3, count = rows * vectors, tries = 7;
  std::vector<float> grid(size_t(entries * columns)), levels = {1, 3, 5};
  std::vector<float> x = normal(count * wide), h = normal(vectors * wide), s = normal(tries * count), metric(size_t(wide * wide), 0.1f);
  std::vector<uint8_t> ranks(size_t(entries * columns));
  for (int e = 0; e < entries; e++)
    for (int i = 0; i < columns; i++) {
      const int rank = int(numbers() % magnitudes);
      ranks[size_t(e * columns + i)] = uint8_t(rank), grid[size_t(i * entries + e)] = levels[size_t(rank)];
    }
  for (float& value : h) value = fabsf(value);
  for (float& value : s) value = fabsf(value);
  for (int i = 0; i < wide; i++) metric[size_t(i * wide + i)] = 1;
  std::vector<float> numbers_of(size_t((tries + 2) * count));
  std::vector<uint8_t> codes(size_t(2 * count * wide));
  fewbit_vectors v{};
  v.entries = entries, v.columns = columns, v.halves = halves, v.even = even, v.magnitudes = magnitudes, v.tries = tries;
  v.rows = rows, v.vectors = vectors, v.grid = grid.data(), v.ranks = ranks.data();
  v.x = x.data(), v.h = h.data(), v.s = s.data(), v.least = numbers_of.data();
  v.square = v.least + tries * count, v.cross = v.square + count, v.codes = codes.data();
  int status = fewbit_force(isa) || fewbit_nearest_vectors(&v, threads);
  v.metric = metric.data(), v.codes += count * wide, v.least = v.square = v.cross = nullptr;
  if (status || fewbit_nearest_vectors(&v, threads)) return {};
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(numbers_of.data());
  codes.insert(codes.end(), bytes, bytes + 4 * numbers_of.size());
  return codes;
}

int wrong_vectors(const char* isa) {
  int mistakes = 0;
  for (int columns : {8, 4})
    for (int halves = 1; halves * columns <= 8; halves++)
      for (int even : {0, 1})
        for (int entries : {256, 512}) {
          const std::vector<uint8_t> plain = nearest(entries, columns, halves, even, "scalar", 1);
          if (!plain.empty() && plain == nearest(entries, columns, halves, even, isa, 3)) continue;
          printf("%s: %d entries of %d columns, %d halves, even %d: not plain C++\n", isa, entries, columns, halves, even);
          mistakes++;
        }
  return mistakes;
}

}  // namespace

int main() {
  int mistakes = 0, sets = 0;  // instruction sets besides plain C++
  for (const char* isa : {"avx512vbmi", "avx512", "avxvnni", "avx2", "neondot", "neon"}) {
    if (fewbit_force(isa)) continue;
    sets++;
    const std::vector<Weight> all = weights();
    for (const Weight& made : all) {
      const fewbit_weight& w = made.w;
      const char* what = wrong(w, isa);
      if (!*what) continue;
      printf("%s: layout %d, %d bits, groups of %d, %d columns: %s\n", isa, int(w.kind), int(w.bits), int(w.group),
             int(w.k), what);
      mistakes++;
    }
    mistakes += wrong_blocks(isa, 200) + wrong_vectors(isa);
    printf("%s: %d weights, 200 blocks, 12 codebooks\n", isa, int(all.size()));
  }
  if (!sets) printf("no instruction set besides plain C++\n");
  return mistakes || !sets;
}
