// Every instruction set of this machine over random weights: the products of plain C++, and for each row of x the same
// bytes whatever the number of rows. A program of its own, so that it also runs in an emulator of another processor.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <random>
#include <vector>

#include "fewbit.h"

namespace {

constexpr int64_t N = 11, M = 40;  // rows of W: one piece that is unpacked, and a part of one; rows of x
constexpr double TOLERANCE = 1e-5;  // relative, for sums of the same products in another order

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
    all.push_back(levels(k));
    all.push_back(fp8(k));
    all.push_back(fp4(false, k));
    all.push_back(fp4(true, k));
  }
  return all;
}

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
  double error = 0, norm = 0;
  for (size_t i = 0; i < y.size(); i++) error += pow(double(y[i]) - plain[i], 2), norm += pow(plain[i], 2);
  return norm > 0 && error <= TOLERANCE * TOLERANCE * norm ? "" : "the product is not that of plain C++";
}

}  // namespace

int main() {
  int mistakes = 0, sets = 0;  // instruction sets besides plain C++
  for (const char* isa : {"avx512", "avxvnni", "avx2", "neondot", "neon"}) {
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
    printf("%s: %d weights\n", isa, int(all.size()));
  }
  if (!sets) printf("no instruction set besides plain C++\n");
  return mistakes || !sets;
}
