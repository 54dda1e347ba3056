// The entry points: check the arguments, choose an instruction set, split rows among threads.
#include <stdlib.h>
#include <string.h>

#include <atomic>

#include "isa.h"
#include "work.h"
#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

using fewbit::Isa;

namespace {

#if defined(__x86_64__) || defined(_M_X64)
struct Cpu {
  bool avx2, avxvnni, avx512, avx512vbmi;
};

Cpu cpu() {
  unsigned a, b, c, d;
  Cpu has{};
  if (!__get_cpuid(1, &a, &b, &c, &d)) return has;
  const bool fma = c >> 12 & 1, f16c = c >> 29 & 1, osxsave = c >> 27 & 1;
  if (!osxsave || !fma || !f16c) return has;
  unsigned low, high;  // which registers the operating system saves
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & 6) != 6) return has;
  unsigned top = __get_cpuid_max(0, nullptr);
  if (top < 7) return has;
  __cpuid_count(7, 0, a, b, c, d);
  const unsigned subleafs = a;
  has.avx2 = (b >> 5 & 1) && (b >> 8 & 1);  // and BMI2
  const bool f = b >> 16 & 1, dq = b >> 17 & 1, bw = b >> 30 & 1, vl = b >> 31 & 1, vnni = c >> 11 & 1;
  has.avx512 = has.avx2 && (low & 0xe6) == 0xe6 && f && dq && bw && vl && vnni;
  has.avx512vbmi = has.avx512 && (c >> 1 & 1);
  if (subleafs >= 1) {
    __cpuid_count(7, 1, a, b, c, d);
    has.avxvnni = has.avx2 && (a >> 4 & 1);
  }
  return has;
}
#endif

#if defined(__aarch64__)
// Whether the CPU has NEON's dot product of bytes (Armv8.2 DotProd).
bool dotprod() {
#if defined(__APPLE__)
  return true;  // every Mac with an Arm processor
#elif defined(__linux__)
  return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#else
  return false;
#endif
}
#endif

// The instruction sets that this CPU supports, the best first.
const Isa* const* usable() {
  static const Isa* list[6];
  static const bool filled = [] {
    int n = 0;
#if defined(__x86_64__) || defined(_M_X64)
    const Cpu has = cpu();
    if (has.avx512vbmi) list[n++] = &fewbit::isa_avx512vbmi;
    if (has.avx512) list[n++] = &fewbit::isa_avx512;
#ifdef FEWBIT_HAS_AVXVNNI
    if (has.avxvnni) list[n++] = &fewbit::isa_avxvnni;
#endif
    if (has.avx2) list[n++] = &fewbit::isa_avx2;
#elif defined(__aarch64__)
#ifdef FEWBIT_HAS_NEONDOT
    if (dotprod()) list[n++] = &fewbit::isa_neondot;
#endif
    list[n++] = &fewbit::isa_neon;
#endif
    list[n] = &fewbit::isa_scalar;
    return true;
  }();
  (void)filled;
  return list;
}

const Isa* named(const char* name) {
  for (const Isa* const* isa = usable(); *isa; isa++)
    if (!strcmp((*isa)->name, name)) return *isa;
  return nullptr;
}

std::atomic<const Isa*> chosen{nullptr};

}  // namespace

namespace fewbit {

const Isa& in_use() {
  const Isa* found = chosen.load(std::memory_order_acquire);
  if (!found) {
    const char* asked = getenv("FEWBIT_CPU_ISA");
    found = asked ? named(asked) : nullptr;
    if (!found) found = usable()[0];
    chosen.store(found, std::memory_order_release);
  }
  return *found;
}

}  // namespace fewbit

namespace {

struct Block {
  int columns, bytes, codebook = 0;  // bytes of the codebook
};

Block block(int kind) {
  switch (kind) {
    case FEWBIT_Q4_0: return {32, 18};
    case FEWBIT_Q4_1: return {32, 20};
    case FEWBIT_Q5_0: return {32, 22};
    case FEWBIT_Q5_1: return {32, 24};
    case FEWBIT_Q8_0: return {32, 34};
    case FEWBIT_Q2_K: return {256, 84};
    case FEWBIT_Q3_K: return {256, 110};
    case FEWBIT_Q4_K: return {256, 144};
    case FEWBIT_Q5_K: return {256, 176};
    case FEWBIT_Q6_K: return {256, 210};
    case FEWBIT_IQ4_NL: return {32, 18};
    case FEWBIT_IQ4_XS: return {256, 136};
    case FEWBIT_IQ2_XXS: return {256, 66, 8 * 256};
    case FEWBIT_IQ2_XS: return {256, 74, 8 * 512};
    case FEWBIT_IQ2_S: return {256, 82, 8 * 1024};
    case FEWBIT_IQ3_XXS: return {256, 98, 4 * 256};
    case FEWBIT_IQ3_S: return {256, 110, 4 * 512};
    case FEWBIT_IQ1_S: return {256, 50, 8 * 2048};
    case FEWBIT_IQ1_M: return {256, 56, 8 * 2048};
    case FEWBIT_TQ1_0: return {256, 54};
    case FEWBIT_TQ2_0: return {256, 66};
    case FEWBIT_Q1_0: return {128, 18};
    case FEWBIT_Q2_0: return {64, 18};
    default: return {0, 0};
  }
}

bool holds(const fewbit_weight& w, int part, int64_t bytes) { return w.part[part] && w.bytes[part] >= bytes; }

// Checks that the buffers contain every byte that a kernel will read.
int check(const fewbit_weight* given) {
  if (!given) return FEWBIT_SHORT;
  const fewbit_weight& w = *given;
  if (w.n < 0 || w.k <= 0 || w.k > (1 << 30) || w.n > (int64_t(1) << 40) / w.k) return FEWBIT_SHAPE;
  if (const Block b = block(w.kind); b.columns) {
    if (w.k % b.columns) return FEWBIT_SHAPE;
    const bool known = !b.codebook || holds(w, 1, b.codebook);
    return known && holds(w, 0, w.n * (w.k / b.columns) * b.bytes) ? FEWBIT_OK : FEWBIT_SHORT;
  }
  switch (w.kind) {
    case FEWBIT_AFFINE: {
      if (w.bits < 2 || w.bits > 8 || w.group <= 0 || w.k % w.group) return FEWBIT_SHAPE;
      const int64_t groups = w.k / w.group, vectors = 8 % w.bits ? 1 : 8 / w.bits, chunk = 64 * vectors;
      const bool whole = groups == 1 || w.group % chunk == 0;
      const int64_t lane = vectors == 1 ? 8 : 4 * vectors;  // columns that share a scale in any case
      if (!whole && (chunk % w.group || w.group % lane)) return FEWBIT_SHAPE;
      if (!holds(w, 0, w.n * ((w.k * w.bits + 7) / 8)) || !holds(w, 1, w.n * groups * 2)) return FEWBIT_SHORT;
      return !w.part[2] || holds(w, 2, w.n * ((groups * w.bits + 7) / 8)) ? FEWBIT_OK : FEWBIT_SHORT;
    }
    case FEWBIT_INT8: return holds(w, 0, w.n * w.k) && holds(w, 1, w.n * 4) ? FEWBIT_OK : FEWBIT_SHORT;
    case FEWBIT_LEVELS:
    case FEWBIT_LEVELS_DOUBLE: {
      if (w.group < 32 || w.group % 32 || w.k % w.group) return FEWBIT_SHAPE;
      const int64_t blocks = w.n * (w.k / w.group);
      if (!holds(w, 0, w.n * w.k / 2)) return FEWBIT_SHORT;
      if (w.kind == FEWBIT_LEVELS) return holds(w, 1, 4 * blocks) && holds(w, 2, 64) ? FEWBIT_OK : FEWBIT_SHORT;
      return holds(w, 1, blocks) && holds(w, 2, (blocks + 255) / 256 * 4) && holds(w, 3, 4) && holds(w, 4, 1024) &&
                     holds(w, 5, 64)
                 ? FEWBIT_OK
                 : FEWBIT_SHORT;
    }
    case FEWBIT_FP8: {
      if (w.bits < 1 || w.group < 1 || (w.group < w.k && w.group % 64)) return FEWBIT_SHAPE;
      const int64_t scales = ((w.n + w.bits - 1) / w.bits) * ((w.k + w.group - 1) / w.group);
      return holds(w, 0, w.n * w.k) && holds(w, 1, 4 * scales) ? FEWBIT_OK : FEWBIT_SHORT;
    }
    case FEWBIT_F16:
    case FEWBIT_BF16: return holds(w, 0, w.n * w.k * 2) ? FEWBIT_OK : FEWBIT_SHORT;
    case FEWBIT_MXFP4:
    case FEWBIT_NVFP4: {
      const bool nv = w.kind == FEWBIT_NVFP4;
      const int64_t group = nv ? 16 : 32;
      if (w.k % group) return FEWBIT_SHAPE;
      if (!holds(w, 0, w.n * w.k / 2) || !holds(w, 1, w.n * (w.k / group))) return FEWBIT_SHORT;
      return !nv || holds(w, 2, 4 * w.n) ? FEWBIT_OK : FEWBIT_SHORT;
    }
    default: return FEWBIT_UNKNOWN;
  }
}

int check(const fewbit_fp8* f) {
  if (!f || !f->w) return FEWBIT_SHORT;
  if (f->type != FEWBIT_FLOAT32 && f->type != FEWBIT_BFLOAT16) return FEWBIT_UNKNOWN;
  if (f->n < 0 || f->k <= 0 || f->k > (1 << 30) || f->n > (int64_t(1) << 40) / f->k) return FEWBIT_SHAPE;
  return f->rows < 1 || f->columns < 1 ? FEWBIT_SHAPE : FEWBIT_OK;
}

int check(const fewbit_vectors* v) {
  if (!v || !v->grid || !v->ranks || !v->x || !v->h || !v->s) return FEWBIT_SHORT;
  if (!v->square != !v->cross) return FEWBIT_SHORT;
  const bool known = (v->columns == 8 && v->halves == 1) || (v->columns == 4 && (v->halves == 1 || v->halves == 2));
  if (!known || (v->metric && v->square)) return FEWBIT_UNKNOWN;
  if (v->entries < 64 || v->entries % 64 || v->entries * v->halves > FEWBIT_MOST_ENTRIES) return FEWBIT_SHAPE;
  if (v->tries < 1 || v->tries > FEWBIT_MOST_TRIES || v->magnitudes < 1 || v->magnitudes > 128) return FEWBIT_SHAPE;
  return v->rows < 0 || v->vectors < 0 || v->step < 0 ? FEWBIT_SHAPE : FEWBIT_OK;
}

void share_bands(const fewbit_fp8& f, int threads, void (*task)(const fewbit_fp8&, int64_t, int64_t)) {
  const int64_t bands = (f.n + f.rows - 1) / f.rows, least = 1 + (1 << 16) / (f.rows * f.k);
  share(bands, least, threads, [&](int64_t begin, int64_t end) { task(f, begin, end); });
}

// What a row of W costs in a product with m rows of x: the first ones hide behind reading it from memory.
int64_t cost(int64_t m) { return m <= 2 ? 2 : m; }

thread_local Memory memory;

constexpr int64_t ROUNDED = 256;  // rows of x that are rounded at once: some megabytes

// What a thread needs to round a row of x: codes, scales, and, if asked for, a row in float32.
struct Scratch {
  int64_t padded, bytes;
  int8_t* codes = nullptr;
  float *scales = nullptr, *row = nullptr;
  Scratch(int64_t k, int64_t columns, bool wide)
      : padded((columns + 255) / 256 * 256), bytes((padded + padded / 8 + (wide ? 4 * k : 0) + 63) / 64 * 64) {}
  Scratch of(char* held, int64_t i) const {
    Scratch own = *this;
    own.codes = reinterpret_cast<int8_t*>(held + bytes * i);
    own.scales = reinterpret_cast<float*>(held + bytes * i + padded);
    own.row = reinterpret_cast<float*>(held + bytes * i + padded + padded / 8);
    return own;
  }
};

// Rounds the rows of x, of this type, each to `out + i * bytes`. `held`: scratch of each thread.
void round_rows(const Isa& with, const fewbit_weight& w, const void* x, int type, int64_t m, char* out, int64_t bytes,
                const Scratch& scratch, char* held, int threads) {
  std::atomic<int> next{0};
  share(m, 1 + (1 << 15) / w.k, threads, [&](int64_t begin, int64_t end) {
    const Scratch own = scratch.of(held, next.fetch_add(1));
    for (int64_t i = begin; i < end; i++) {
      const float* row = static_cast<const float*>(x) + i * w.k;
      if (type != FEWBIT_FLOAT32) with.read(static_cast<const uint16_t*>(x) + i * w.k, type, w.k, own.row), row = own.row;
      with.round(w, row, own.codes, own.scales, out + i * bytes);
    }
  });
}

}  // namespace

extern "C" {

int fewbit_abi(void) { return 14; }

const char* fewbit_isa(void) { return fewbit::in_use().name; }

int fewbit_force(const char* name) {
  const Isa* found = name ? named(name) : usable()[0];
  if (!found) return FEWBIT_UNKNOWN;
  chosen.store(found, std::memory_order_release);
  return FEWBIT_OK;
}

void fewbit_use_openmp(fewbit_parallel parallel) { fewbit::use_openmp(parallel); }

int64_t fewbit_columns(const fewbit_weight* w) {
  const int wrong = check(w);
  return wrong ? -wrong : fewbit::in_use().columns(*w);
}

int fewbit_linear(const fewbit_weight* w, const void* x, int64_t m, void* y, int type, int threads) {
  if (const int wrong = check(w)) return wrong;
  if (!is_type(type)) return FEWBIT_UNKNOWN;
  if (m <= 0 || w->n == 0) return FEWBIT_OK;
  const Isa& with = fewbit::in_use();
  const bool narrow = type != FEWBIT_FLOAT32;
  const int64_t n = w->n, most = m < ROUNDED ? m : ROUNDED, row = with.rounded_bytes(*w), all = (row * most + 63) / 64 * 64;
  const Scratch scratch(w->k, with.columns(*w), narrow);
  const int64_t shares = threads < 1 ? 1 : threads;
  char* held = memory.take(size_t(all + scratch.bytes * shares + (narrow ? 4 * most * n : 0)));
  if (!held) return FEWBIT_MEMORY;
  // A smaller share is finished before another thread wakes up.
  const int64_t least = 1 + (1 << 16) / w->k;
  for (int64_t first = 0; first < m; first += most) {
    const int64_t rows = m - first < most ? m - first : most;
    const char* from = static_cast<const char*>(x) + first * w->k * size_of(type);
    char* to = static_cast<char*>(y) + first * n * size_of(type);
    float* sums = reinterpret_cast<float*>(narrow ? held + all + scratch.bytes * shares : to);
    round_rows(with, *w, from, type, rows, held, row, scratch, held + all, threads);
    share(n, least, threads, [&](int64_t begin, int64_t end) {
      with.linear(*w, held, rows, sums, begin, end);
      for (int64_t i = 0; narrow && i < rows; i++)
        with.write(sums + i * n + begin, type, end - begin, to + (i * n + begin) * size_of(type));
    });
  }
  return FEWBIT_OK;
}

int fewbit_grouped(const fewbit_weight* w, int64_t count, const int64_t* begin, const int64_t* end, const void* x,
                   int64_t m, void* y, int type, int threads) {
  if (!is_type(type)) return FEWBIT_UNKNOWN;
  if (m <= 0 || count <= 0) return FEWBIT_OK;
  if (!w || !begin || !end) return FEWBIT_SHORT;
  int64_t rows = 0, units = 0;  // rows of x that have a weight; what all threads have to do
  for (int64_t e = 0; e < count; e++) {
    if (begin[e] == end[e]) continue;
    if (begin[e] < 0 || begin[e] > end[e] || end[e] > m) return FEWBIT_SHAPE;
    if (const int wrong = check(w + e)) return wrong;
    const fewbit_weight &own = w[e], &first = w[0];
    if (own.kind != first.kind || own.bits != first.bits || own.group != first.group || own.n != first.n ||
        own.k != first.k)
      return FEWBIT_SHAPE;
    rows += end[e] - begin[e];
    units += own.n * cost(end[e] - begin[e]);
  }
  if (!rows || w->n == 0) return FEWBIT_OK;
  const Isa& with = fewbit::in_use();
  const bool narrow = type != FEWBIT_FLOAT32;
  const int64_t n = w->n, k = w->k;
  const int64_t row = with.rounded_bytes(*w), all = (row * m + 63) / 64 * 64;
  const Scratch scratch(k, with.columns(*w), narrow);
  const int64_t shares = threads < 1 ? 1 : threads;
  char* held = memory.take(size_t(all + scratch.bytes * shares + (narrow ? 4 * m * n : 0)));
  if (!held) return FEWBIT_MEMORY;
  float* sums = narrow ? reinterpret_cast<float*>(held + all + scratch.bytes * shares) : static_cast<float*>(y);
  round_rows(with, *w, x, type, m, held, row, scratch, held + all, threads);
  // Threads get equal shares of the units, and each starts where the one before it ends, inside of a weight or not.
  share(units, 2 * (1 + (1 << 16) / k), threads, [&](int64_t from, int64_t to) {
    int64_t base = 0;
    for (int64_t e = 0; e < count && base < to; e++) {
      const int64_t own = end[e] - begin[e];
      if (!own) continue;
      const int64_t each = cost(own), first = (from - base + each - 1) / each, last = (to - base + each - 1) / each;
      const int64_t top = from > base ? first : 0, bottom = last < n ? last : n;
      if (top < bottom) with.linear(w[e], held + begin[e] * row, own, sums + begin[e] * n, top, bottom);
      base += n * each;
    }
  });
  if (narrow)
    for (int64_t e = 0; e < count; e++)
      with.write(sums + begin[e] * n, type, (end[e] - begin[e]) * n, static_cast<uint16_t*>(y) + begin[e] * n);
  return FEWBIT_OK;
}

int fewbit_decode(const fewbit_weight* w, int64_t begin, int64_t end, float* out, int threads) {
  if (const int wrong = check(w)) return wrong;
  if (begin < 0 || end > w->n || begin > end) return FEWBIT_SHAPE;
  const Isa& with = fewbit::in_use();
  const int64_t columns = with.columns(*w);
  share(end - begin, 1 + (1 << 16) / w->k, threads, [&](int64_t a, int64_t b) {
    with.decode(*w, begin + a, begin + b, out + a * columns);
  });
  return FEWBIT_OK;
}

int fewbit_arrange(const fewbit_weight* w, const float* x, int64_t m, float* out, int threads) {
  if (const int wrong = check(w)) return wrong;
  const Isa& with = fewbit::in_use();
  const int64_t columns = with.columns(*w);
  share(m, 1 + (1 << 16) / w->k, threads, [&](int64_t a, int64_t b) {
    for (int64_t i = a; i < b; i++) with.arrange(*w, x + i * w->k, out + i * columns);
  });
  return FEWBIT_OK;
}

int fewbit_fp8_codes(const fewbit_fp8* f, int threads) {
  if (const int wrong = check(f)) return wrong;
  if (!f->codes || !f->top) return FEWBIT_SHORT;
  share_bands(*f, threads, fewbit::in_use().fp8_codes);
  return FEWBIT_OK;
}

int fewbit_fp8_lost(const fewbit_fp8* f, int threads) {
  if (const int wrong = check(f)) return wrong;
  if (!f->codes || !f->scale || !f->lost) return FEWBIT_SHORT;
  share_bands(*f, threads, fewbit::in_use().fp8_lost);
  return FEWBIT_OK;
}

int fewbit_nearest_vectors(const fewbit_vectors* v, int threads) {
  if (const int wrong = check(v)) return wrong;
  const auto task = fewbit::in_use().vectors;
  share(v->rows, 1 + 256 / (v->vectors + 1), threads, [&](int64_t begin, int64_t end) { task(*v, begin, end); });
  return FEWBIT_OK;
}

}  // extern "C"
