// A whole decoder block in one call: products by `fewbit_linear`, and what is between them.
#include <atomic>

#include "isa.h"
#include "work.h"

using fewbit::Isa;

namespace {

constexpr int64_t EACH = 1 << 15;  // numbers that a thread handles before another one is worth waking

thread_local Memory held, gathered;

// The output of up to three products: each has its own rows [m, n]. Columns are counted through all of them.
struct Piece {
  float* at;
  int64_t step;
};
struct Products {
  const fewbit_rows* rows;
  int count;
  float* out;
  int64_t m;

  int64_t columns() const {
    int64_t n = 0;
    for (int i = 0; i < count; i++) n += rows[i].w->n;
    return n;
  }
  // Where `wanted` columns from `start` on are; `at` is null if no product has all of them.
  Piece piece(int64_t start, int64_t wanted) const {
    float* at = out;
    for (int i = 0; i < count; i++) {
      const int64_t n = rows[i].w->n;
      if (start < n) return start + wanted <= n ? Piece{at + start, n} : Piece{nullptr, 0};
      at += m * n, start -= n;
    }
    return {nullptr, 0};
  }
  int compute(const float* x, int64_t k, int threads) const {
    float* y = out;
    for (int i = 0; i < count; i++) {
      const fewbit_rows& r = rows[i];
      const float* from = x;
      if (r.order) {
        float* copy = reinterpret_cast<float*>(gathered.take(size_t(m * k) * sizeof(float)));
        if (!copy) return FEWBIT_MEMORY;
        for (int64_t row = 0; row < m; row++)
          for (int64_t j = 0; j < k; j++) copy[row * k + j] = x[row * k + r.order[j]];
        from = copy;
      }
      if (const int wrong = fewbit_linear(r.w, from, m, y, FEWBIT_FLOAT32, threads)) return wrong;
      if (r.bias)
        for (int64_t row = 0; row < m; row++)
          for (int64_t j = 0; j < r.w->n; j++) y[row * r.w->n + j] += r.bias[j];
      y += m * r.w->n;
    }
    return FEWBIT_OK;
  }
};

int check(const fewbit_block* b, const fewbit_call* c) {
  if (!b || !c || !c->x || !c->y || !c->keys || !c->values) return FEWBIT_SHORT;
  if (!is_type(b->type)) return FEWBIT_UNKNOWN;
  const int64_t heads = b->heads, shared = b->shared, head = b->head;
  if (heads < 1 || shared < 1 || heads % shared || head < 1 || b->width < 1 || b->inner < 0) return FEWBIT_SHAPE;
  if (b->rotated < 0 || b->rotated > head || b->rotated % 2 || (b->rotated && !(c->cosine && c->sine))) return FEWBIT_SHAPE;
  if (c->batch < 1 || c->tokens < 1) return FEWBIT_SHAPE;
  if (const fewbit_pages* p = c->pages) {
    if (!p->write || !p->read || !p->begin || !p->count) return FEWBIT_SHORT;
    if (c->batch > 1 || c->allowed || c->added || p->most < 1 || p->step < shared * head) return FEWBIT_SHAPE;
  } else if (c->filled < 0 || c->filled + c->tokens > c->length) {
    return FEWBIT_SHAPE;
  }
  const int64_t in[4] = {b->width, heads * head, b->width, b->inner};
  const int64_t qkv = (heads + 2 * shared) * head, up = (b->plain ? 1 : 2) * b->inner;
  const int64_t out[4] = {qkv + (b->together ? up : 0), b->width, up, b->width};
  if (b->together && (!b->parallel || b->counts[0] > 1 || b->counts[2] || !b->counts[3])) return FEWBIT_SHAPE;
  if (b->mixed && (b->counts[0] > 1 || b->whole)) return FEWBIT_SHAPE;
  const int products = b->counts[2] || b->counts[3] ? 4 : 2;
  for (int p = 0; p < products; p++) {
    if (p == 2 && b->together) continue;
    if (b->counts[p] < 1 || b->counts[p] > 3) return FEWBIT_SHAPE;
    int64_t n = 0;
    for (int i = 0; i < b->counts[p]; i++) {
      const fewbit_weight* w = b->products[p][i].w;
      if (!w) return FEWBIT_SHORT;
      if (w->k != in[p]) return FEWBIT_SHAPE;
      n += w->n;
    }
    if (n != out[p] || (p % 2 && b->counts[p] > 1)) return FEWBIT_SHAPE;
  }
  return FEWBIT_OK;
}

class Block {
 public:
  Block(const fewbit_block& block, const fewbit_call& call, int threads)
      : b(block), c(call), with(fewbit::in_use()), threads(threads), m(call.batch * call.tokens) {}

  int run() {
    const int64_t width = b.width, inside = b.heads * b.head, all = (b.heads + 2 * b.shared) * b.head;
    const int64_t up_and_gate = (b.plain ? 1 : 2) * b.inner, most = all + up_and_gate, second = inside > b.inner ? inside : b.inner;
    const int64_t group = b.heads / b.shared, shares = threads < 1 ? 1 : threads;
    const int64_t scratch = group * (c.pages ? c.pages->most : c.filled + c.tokens);
    float* h = reinterpret_cast<float*>(held.take(size_t(m * (3 * width + most + second) + scratch * shares) * 4));
    if (!h) return FEWBIT_MEMORY;
    float *n = h + m * width, *side = n + m * width, *first = side + m * width, *joined = first + m * most;
    scores = joined + m * second;
    with.read(c.x, b.type, m * width, h);

    Products qkv{b.products[0], b.counts[0], first, m}, output{b.products[1], 1, n, m};
    Products gated{b.products[2], b.counts[2], first, m}, down{b.products[3], 1, n, m};
    const int64_t first_k = b.mixed ? group * b.head : inside, keys = b.mixed ? b.head : b.shared * b.head;
    const Piece q = qkv.piece(0, b.mixed ? first_k : inside), k = qkv.piece(first_k, keys);
    const Piece v = qkv.piece(first_k + keys, keys);
    const Products& ups = b.together ? qkv : gated;
    const int64_t first_up = b.together ? all : 0;
    const Piece gate = ups.piece(first_up, b.inner);
    const Piece up = b.plain ? Piece{nullptr, 0} : ups.piece(first_up + b.inner, b.inner);
    const bool mlp = b.counts[3] > 0;
    if (!q.at || !k.at || !v.at || (mlp && (!gate.at || (!b.plain && !up.at)))) return FEWBIT_SHAPE;

    if (const int wrong = qkv.compute(normed(h, n, 0), width, threads)) return wrong;
    by_rows(inside, [&](int64_t i) { keep(i, q, k, v); });
    attend(q, joined, scratch);
    if (const int wrong = output.compute(joined, inside, threads)) return wrong;
    if (!b.parallel || !mlp) add(h, n, 1);
    if (mlp) {
      if (!b.together)
        if (const int wrong = gated.compute(normed(h, side, 2), width, threads)) return wrong;
      if (b.parallel) add(h, n, 1);
      by_rows(4 * b.inner, [&](int64_t i) {
        const float* by = b.plain ? nullptr : up.at + i * up.step;
        with.gate(gate.at + i * gate.step, by, b.inner, b.activation, joined + i * b.inner);
      });
      if (const int wrong = down.compute(joined, b.inner, threads)) return wrong;
      add(h, n, 3);
    }
    with.write(h, b.type, m * width, c.y);
    return FEWBIT_OK;
  }

 private:
  const fewbit_block& b;
  const fewbit_call& c;
  const Isa& with;
  const int threads;
  const int64_t m;
  float* scores = nullptr;

  template <class Fn> void by_rows(int64_t numbers, Fn&& task) const {
    share(m, 1 + EACH / numbers, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) task(i);
    });
  }
  const float* normed(const float* x, float* out, int which) const {
    if (!b.norm[which].weight) return x;
    by_rows(b.width, [&](int64_t i) { with.norm(x + i * b.width, b.width, b.norm[which], out + i * b.width); });
    return out;
  }
  void add(float* h, float* branch, int which) const {  // h += residual · norm(branch)
    by_rows(b.width, [&](int64_t i) {
      float *to = h + i * b.width, *from = branch + i * b.width;
      if (b.norm[which].weight) with.norm(from, b.width, b.norm[which], from);
      for (int64_t j = 0; j < b.width; j++) to[j] += b.residual * from[j];
    });
  }
  // Numbers from the q (k, v) of one head of k to that of the next one.
  int64_t step_of_q() const { return b.head * (b.heads / b.shared + (b.mixed ? 2 : 0)); }
  int64_t step_of_k() const { return b.mixed ? step_of_q() : b.head; }
  void normed_heads(float* x, int64_t heads, int which) const {
    if (!b.norm[which].weight) return;
    const int64_t count = b.whole ? 1 : heads, k = b.whole ? heads * b.head : b.head;
    for (int64_t i = 0; i < count; i++) with.norm(x + i * k, k, b.norm[which], x + i * k);
  }
  void turned(float* x, int64_t heads, int64_t angle) const {
    if (!b.rotated) return;
    for (int64_t j = 0; j < heads; j++)
      with.rotate(x + j * b.head, b.rotated, c.cosine + angle, c.sine + angle, b.pairs);
  }
  // The same for one run of heads, norms before or after positions.
  void prepare(float* x, int64_t heads, int which, int64_t angle) const {
    if (!b.late) normed_heads(x, heads, which);
    turned(x, heads, angle);
    if (b.late) normed_heads(x, heads, which);
  }
  // Norms and positions of a row's q and k, and its k and v into the cache.
  void keep(int64_t i, const Piece& q, const Piece& k, const Piece& v) const {
    const int64_t text = i / c.tokens, token = i % c.tokens, head = b.head, angle = text * c.turn + token * b.rotated;
    float *own = q.at + i * q.step, *key = k.at + i * k.step, *value = v.at + i * v.step;
    const int64_t runs = b.mixed ? b.shared : 1;  // of heads that are one after the other
    for (int64_t j = 0; j < runs; j++) {
      prepare(own + j * step_of_q(), b.heads / runs, 4, angle);
      prepare(key + j * step_of_k(), b.shared / runs, 5, angle);
    }
    for (int64_t j = 0; j < b.shared; j++) {
      const int64_t to = c.pages ? c.pages->write[i] * c.pages->step + j * head
                                 : ((text * b.shared + j) * c.length + c.filled + token) * head;
      put(c.keys, to, key + j * step_of_k());
      put(c.values, to, value + j * step_of_k());
    }
  }
  void put(void* cache, int64_t to, const float* from) const {
    with.write(from, b.type, b.head, static_cast<char*>(cache) + to * size_of(b.type));
  }
  void attend(const Piece& q, float* out, int64_t scratch) const {
    const int64_t group = b.heads / b.shared, size = size_of(b.type), units = m * b.shared;
    std::atomic<int> next{0};
    share(units, 1 + EACH / (2 * scratch * b.head), threads, [&](int64_t begin, int64_t end) {
      float* own = scores + scratch * next.fetch_add(1);
      for (int64_t unit = begin; unit < end; unit++) {
        const int64_t i = unit / b.shared, g = unit % b.shared, text = i / c.tokens, token = i % c.tokens;
        const fewbit_pages* pages = c.pages;
        const int64_t start = (pages ? g : (text * b.shared + g) * c.length) * b.head * size;
        const int64_t mask = text * c.text + token * c.row, seen = c.allowed || c.added ? c.tokens : token + 1;
        const fewbit::Attention given{static_cast<const char*>(c.keys) + start,
                                      static_cast<const char*>(c.values) + start,
                                      pages ? pages->read + pages->begin[i] : nullptr,
                                      pages ? pages->step : b.head,
                                      pages ? pages->count[i] : c.filled + seen,
                                      b.head,
                                      group,
                                      b.type,
                                      b.scale,
                                      b.cap,
                                      c.allowed ? c.allowed + mask : nullptr,
                                      c.added ? c.added + mask : nullptr,
                                      b.sinks ? b.sinks + g * group : nullptr};
        with.attend(given, q.at + i * q.step + g * step_of_q(), out + (i * b.heads + g * group) * b.head, own);
      }
    });
  }
};

}  // namespace

extern "C" int fewbit_decode_block(const fewbit_block* block, const fewbit_call* call, int threads) {
  if (const int wrong = check(block, call)) return wrong;
  return Block(*block, *call, threads).run();
}
