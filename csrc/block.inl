// What a decoder block does besides products, in float32. Sums are added in one order, whatever the instruction set.
#include <math.h>
#include <string.h>

#include "isa.h"

namespace {

typedef float F8 __attribute__((vector_size(32)));
typedef int32_t I8 __attribute__((vector_size(32)));
typedef uint32_t U8 __attribute__((vector_size(32)));
typedef uint16_t H8 __attribute__((vector_size(16)));

inline __attribute__((always_inline)) F8 load8(const float* p) {
  F8 v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline __attribute__((always_inline)) F8 load8(const uint16_t* p) {  // bfloat16
  H8 h;
  memcpy(&h, p, sizeof h);
  const U8 bits = __builtin_convertvector(h, U8) << 16;
  F8 v;
  memcpy(&v, &bits, sizeof v);
  return v;
}
struct Half {  // float16
  uint16_t bits;
};
inline __attribute__((always_inline)) F8 load8(const Half* p) {
  float v[8];
  Vec::halfs8((const uint8_t*)p, v);
  return load8(v);
}
inline __attribute__((always_inline)) void store8(float* p, F8 v) { memcpy(p, &v, sizeof v); }
inline __attribute__((always_inline)) float load1(const float* p) { return *p; }
inline __attribute__((always_inline)) float load1(const uint16_t* p) {
  const uint32_t bits = uint32_t(*p) << 16;
  float v;
  memcpy(&v, &bits, sizeof v);
  return v;
}
inline __attribute__((always_inline)) float load1(const Half* p) { return Vec::half((const uint8_t*)p); }
inline __attribute__((always_inline)) float sum8(F8 v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

template <class T> inline float dot(const float* a, const T* b, int64_t n) {
  F8 s = {}, t = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    s += load8(a + i) * load8(b + i);
    t += load8(a + i + 8) * load8(b + i + 8);
  }
  for (; i + 8 <= n; i += 8) s += load8(a + i) * load8(b + i);
  float sum = sum8(s + t);
  for (; i < n; i++) sum += a[i] * load1(b + i);
  return sum;
}

// exp(x) to about 1e-7 of its value: 2^n times a polynomial of degree 6 on [-ln 2 / 2, ln 2 / 2].
inline __attribute__((always_inline)) F8 exp8(F8 x) {
  const F8 low = F8{} - 87.0f, high = F8{} + 88.0f;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const F8 shift = F8{} + 12582912.0f;  // 1.5 · 2^23: adding it rounds to an integer
  const F8 n = (x * 1.44269504f + shift) - shift;
  const F8 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  F8 p = r * 1.3888889e-3f + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const I8 power = (__builtin_convertvector(n, I8) + 127) << 23;
  F8 scale;
  memcpy(&scale, &power, sizeof scale);
  return p * scale;
}

// Calls f on eight values at a time; the last ones are padded with zeros.
template <class Fn> inline __attribute__((always_inline)) void by_eight(int64_t n, Fn&& f) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) f(i, 8);
  if (i < n) f(i, n - i);
}
inline __attribute__((always_inline)) F8 load_up_to8(const float* p, int64_t count) {
  if (count == 8) return load8(p);
  F8 v = {};
  memcpy(&v, p, size_t(count) * sizeof(float));
  return v;
}

void norm_of(const float* x, int64_t k, const fewbit_norm& norm, float* out) {
  float mean = 0, square = 0;
  if (norm.centered) {
    F8 sum = {}, squares = {};
    by_eight(k, [&](int64_t i, int64_t count) { sum += load_up_to8(x + i, count); });
    mean = sum8(sum) / float(k);
    by_eight(k, [&](int64_t i, int64_t count) {
      F8 d = load_up_to8(x + i, count) - mean;
      for (int64_t j = count; j < 8; j++) d[j] = 0;
      squares += d * d;
    });
    square = sum8(squares);
  } else {
    square = dot(x, x, k);
  }
  const float by = 1.0f / sqrtf(square / float(k) + norm.eps);
  by_eight(k, [&](int64_t i, int64_t count) {
    F8 y = (load_up_to8(x + i, count) - mean) * by * load_up_to8(norm.weight + i, count);
    if (norm.bias) y += load_up_to8(norm.bias + i, count);
    memcpy(out + i, &y, size_t(count) * sizeof(float));
  });
}

inline __attribute__((always_inline)) F8 activated(F8 x, int kind) {
  if (kind == FEWBIT_RELU || kind == FEWBIT_RELU2) {
    const F8 y = x > F8{} ? x : F8{};
    return kind == FEWBIT_RELU ? y : y * y;
  }
  if (kind == FEWBIT_ERF) {
    F8 y;
    for (int j = 0; j < 8; j++) y[j] = 0.5f * x[j] * (1.0f + erff(x[j] * 0.70710678f));
    return y;
  }
  // gelu with tanh is x · sigmoid(2 u), because 1 + tanh(u) = 2 sigmoid(2 u)
  const F8 u = kind == FEWBIT_SILU ? x : kind == FEWBIT_QUICK ? 1.702f * x : 1.59576912f * (x + 0.044715f * x * x * x);
  return x / (1.0f + exp8(-u));
}

void gate_of(const float* a, const float* b, int64_t n, int kind, float* out) {
  by_eight(n, [&](int64_t i, int64_t count) {
    F8 y = activated(load_up_to8(a + i, count), kind);
    if (b) y *= load_up_to8(b + i, count);
    memcpy(out + i, &y, size_t(count) * sizeof(float));
  });
}

void rotate_of(float* x, int64_t n, const float* cosine, const float* sine, int pairs) {
  const int64_t half = n / 2;
  if (pairs == FEWBIT_HALVES) {
    by_eight(half, [&](int64_t i, int64_t count) {
      const F8 a = load_up_to8(x + i, count), b = load_up_to8(x + half + i, count);
      const F8 left = a * load_up_to8(cosine + i, count) - b * load_up_to8(sine + i, count);
      const F8 right = b * load_up_to8(cosine + half + i, count) + a * load_up_to8(sine + half + i, count);
      memcpy(x + i, &left, size_t(count) * sizeof(float));
      memcpy(x + half + i, &right, size_t(count) * sizeof(float));
    });
    return;
  }
  for (int64_t i = 0; i < half; i++) {
    const int64_t first = pairs == FEWBIT_NEIGHBORS ? 2 * i : i, second = pairs == FEWBIT_NEIGHBORS ? 2 * i + 1 : i;
    const float a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = a * cosine[first] - b * sine[first];
    x[2 * i + 1] = b * cosine[second] + a * sine[second];
  }
}

// The heads [0, group) of a token that share the keys and values of `given`: q and out [group, head], contiguous.
template <class T> void attend(const fewbit::Attention& given, const float* q, float* out, float* scores) {
  const int64_t head = given.head, length = given.length, group = given.group;
  const T* keys = static_cast<const T*>(given.keys);
  const T* values = static_cast<const T*>(given.values);
  const auto place = [&](int64_t t) { return (given.slots ? given.slots[t] : t) * given.step; };
  for (int64_t t = 0; t < length; t++)
    for (int64_t h = 0; h < group; h++) {
      float s = dot(q + h * head, keys + place(t), head) * given.scale;
      if (given.cap > 0) s = given.cap * tanhf(s / given.cap);
      if (given.allowed && !given.allowed[t]) s = -INFINITY;
      if (given.added) s += given.added[t];
      scores[h * length + t] = s;
    }
  for (int64_t h = 0; h < group; h++) {
    float* s = scores + h * length;
    float top = given.sinks ? given.sinks[h] : -INFINITY;
    for (int64_t t = 0; t < length; t++) top = s[t] > top ? s[t] : top;
    if (top == -INFINITY) top = 0;  // the mask hides all: the sum below is 0, and so is the result
    F8 total = {};
    by_eight(length, [&](int64_t i, int64_t count) {
      F8 v = load_up_to8(s + i, count) - top;
      const F8 e = exp8(v);
      for (int64_t j = 0; j < 8; j++) v[j] = j < count && v[j] > -87.0f ? e[j] : 0.0f;
      total += v;
      memcpy(s + i, &v, size_t(count) * sizeof(float));
    });
    const float rest = given.sinks ? exp8(F8{} + (given.sinks[h] - top))[0] : 0.0f;
    const float sum = sum8(total) + rest, by = sum > 0 ? 1.0f / sum : 0.0f;
    for (int64_t t = 0; t < length; t++) s[t] *= by;
  }
  memset(out, 0, size_t(group * head) * sizeof(float));
  for (int64_t t = 0; t < length; t++)
    for (int64_t h = 0; h < group; h++) {
      const float p = scores[h * length + t];
      const T* v = values + place(t);
      float* o = out + h * head;
      int64_t i = 0;
      for (; i + 8 <= head; i += 8) store8(o + i, load8(o + i) + p * load8(v + i));
      for (; i < head; i++) o[i] += p * load1(v + i);
    }
}

void attend_of(const fewbit::Attention& given, const float* q, float* out, float* scores) {
  if (given.type == FEWBIT_FLOAT32) attend<float>(given, q, out, scores);
  else if (given.type == FEWBIT_BFLOAT16) attend<uint16_t>(given, q, out, scores);
  else attend<Half>(given, q, out, scores);
}

}  // namespace
