// One call runs a decode step, a prefill chunk, or any mixture of rows of many sequences through a whole decoder program.
//
// The team meets at a barrier wherever a value that all need is finished:
//   norm, q/k/v | rotate, append | attend | out projection, residual | norm, gate/up | activation, down, residual |
// Between two barriers every member computes its share: rows of a weight, heads, chunks of a context, or rows of activations.
// With few rows (kPrivateRows) a barrier costs more than a norm, so each member normalizes and quantizes all of them for
// itself, into memory of its own; with many they are shared out and met for.
//
// A row's result depends neither on the rows beside it nor on the number of threads: no sum is split.
#include "decoder.h"

#include <cmath>
#include <cstring>

namespace qk {
namespace {

constexpr int64_t kPrivateRows = 2;
constexpr int64_t kActivationBlock = 32;  // columns that share a scale, with int8 activations

int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Widths of a program's buffers.
struct Sizes {
  int64_t wide = 0;     // outputs of linears that are read once: [q | k | v], [gate | up], router
  int64_t input = 0;    // inputs of linears
  int64_t partial = 0;  // floats of attention's partial results, per row and chunk

  explicit Sizes(const Program& p) {
    input = p.hidden;
    for (int64_t i = 0; i < p.layer_count; ++i) {
      const Layer& layer = p.layers[i];
      const Attention& a = layer.attention;
      wide = most(wide, (a.heads + 2 * a.kv_heads) * a.head_dim);
      input = most(input, a.heads * a.head_dim);
      partial = most(partial, attention_partial_floats(a));
      wide = most(wide, layer.experts);
      for (int64_t e = 0; e < most(layer.experts, 1); ++e) {
        input = most(input, layer.mlps[e].down->columns);
        wide = most(wide, layer.mlps[e].down->columns * (layer.mlps[e].gated ? 2 : 1));
      }
    }
  }
};

// Activations made ready for linears, and the floats they were made from.
struct Ready {
  float* x;
  Rows rows;
};

// Hands out aligned pieces of one buffer; with no buffer it only counts.
struct Arena {
  char* base;
  int64_t used = 0;

  template <typename T>
  T* take(int64_t count) {
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += aligned(count * static_cast<int64_t>(sizeof(T)));
    return piece;
  }

  Ready take_ready(int64_t rows, int64_t width) {
    const int64_t blocks = (width + kActivationBlock - 1) / kActivationBlock;
    Ready ready{};
    ready.x = take<float>(rows * width);
    ready.rows.q = take<int8_t>(rows * padded_columns(width));
    ready.rows.scale = take<float>(rows * blocks);
    ready.rows.sum = take<int32_t>(rows * blocks);
    ready.rows.block = kActivationBlock;
    return ready;
  }
};

struct Buffers {
  float *residual, *before, *wide, *narrow, *attended, *mixed, *partial, *weights;
  int32_t* chosen;
  Ready shared;
  char* privates;
  int64_t private_bytes;

  Buffers(Arena& arena, const Program& p, int64_t rows, int64_t chunks, int64_t threads) {
    const Sizes sizes(p);
    residual = arena.take<float>(rows * p.hidden);
    before = arena.take<float>(rows * p.hidden);
    wide = arena.take<float>(rows * sizes.wide);
    narrow = arena.take<float>(rows * p.hidden);
    attended = arena.take<float>(rows * sizes.input);
    mixed = arena.take<float>(rows * p.hidden);
    partial = arena.take<float>((rows < kSplitRows ? rows : kSplitRows) * chunks * sizes.partial);
    weights = arena.take<float>(rows * sizes.wide);
    chosen = arena.take<int32_t>(rows * sizes.wide);
    shared = arena.take_ready(rows, sizes.input);
    Arena count{nullptr};
    count.take_ready(kPrivateRows, sizes.input);
    private_bytes = count.used;
    privates = arena.take<char>(private_bytes * threads);
  }
};

struct Call {
  const Program& p;
  const Batch& batch;
  const Kv& kv;
  Buffers buffers;
  int64_t chunks;
};

// One member's run through the program.
class Run {
 public:
  Run(const Call& call, const Member& me)
      : p_(call.p), batch_(call.batch), kv_(call.kv), b_(call.buffers), chunks_(call.chunks), me_(me), sizes_(call.p) {
    Arena arena{b_.privates + b_.private_bytes * me.index};
    mine_ = arena.take_ready(kPrivateRows, sizes_.input);
  }

  void operator()() {
    embed();
    for (int64_t i = 0; i < p_.layer_count; ++i) {
      const Layer& layer = p_.layers[i];
      if (layer.parallel) keep();
      attention(layer, i);
      feed_forward(layer);
    }
    read_out();
  }

 private:
  // Fill rows of activations with fill(row, destination) and make them ready for linears that read `columns` of them. On
  // return they are complete.
  template <typename Fill>
  const Rows& prepare(int64_t rows, int64_t columns, Fill fill) {
    const bool alone = rows <= kPrivateRows;
    Ready& ready = alone ? mine_ : b_.shared;
    Rows& r = ready.rows;
    int64_t begin = 0, end = rows;
    if (!alone) share(me_, rows, 1, &begin, &end);
    Rows& local = alone ? r : shared_rows_;
    local = r;
    local.x = ready.x;
    local.m = rows;
    local.columns = columns;
    local.stride = columns;
    for (int64_t row = begin; row < end; ++row) fill(row, ready.x + row * columns);
    if (!batch_.exact) prepare_rows(local, begin, end);
    if (!alone) me_.wait();
    return local;
  }

  // My share of linears whose outputs lie side by side in rows of y; returns nothing to wait for.
  void multiply(const Linear* linears, int64_t count, const Rows& rows, float* y, int64_t y_stride) {
    int64_t total = 0, begin, end;
    for (int64_t i = 0; i < count; ++i) total += linear_blocks(linears[i]);
    share(me_, total, 1, &begin, &end);
    for (int64_t i = 0, first = 0; i < count; ++i) {
      const int64_t blocks = linear_blocks(linears[i]);
      const int64_t from = begin > first ? begin - first : 0, to = end - first < blocks ? end - first : blocks;
      if (from < to) linear_share(linears[i], rows, batch_.exact != 0, y, y_stride, from, to, nullptr);
      first += blocks;
      y += linears[i].rows;
    }
  }

  void embed() {
    int64_t begin, end;
    share(me_, batch_.rows * p_.hidden, kWidth, &begin, &end);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / p_.hidden, column = i % p_.hidden;
      const float value = load_one(p_.embedding, batch_.tokens[row] * p_.hidden + column, p_.embedding_dtype);
      b_.residual[i] = value * p_.embedding_scale;
    }
    me_.wait();
  }

  void keep() {
    int64_t begin, end;
    share(me_, batch_.rows * p_.hidden, kWidth, &begin, &end);
    memcpy(b_.before + begin, b_.residual + begin, static_cast<size_t>(end - begin) * sizeof(float));
    me_.wait();
  }

  const Rows& normalized(const Norm& norm, const float* x) {
    return prepare(batch_.rows, p_.hidden, [&](int64_t row, float* to) {
      if (norm.gain) normalize_row(norm, x + row * p_.hidden, to);
      else memcpy(to, x + row * p_.hidden, static_cast<size_t>(p_.hidden) * sizeof(float));
    });
  }

  // residual += scale * norm(y); my rows of w have been written to y, others' have not yet.
  void add(const Norm& norm, float* y, float scale) {
    me_.wait();
    int64_t begin, end;
    if (norm.gain) {
      share(me_, batch_.rows, 1, &begin, &end);
      for (int64_t row = begin; row < end; ++row) normalize_row(norm, y + row * p_.hidden, y + row * p_.hidden);
      begin *= p_.hidden;
      end *= p_.hidden;
    } else {
      share(me_, batch_.rows * p_.hidden, kWidth, &begin, &end);
    }
    for (int64_t i = begin; i < end; ++i) b_.residual[i] += scale * y[i];
    me_.wait();
  }

  void attention(const Layer& layer, int64_t index) {
    const Attention& a = layer.attention;
    const int64_t width = (a.heads + 2 * a.kv_heads) * a.head_dim;
    multiply(a.qkv, a.qkv_count, normalized(layer.attention_in, b_.residual), b_.wide, width);
    me_.wait();
    wide_norms(a, width);
    const bool split = batch_.rows <= kSplitRows;
    AttentionJob job{&a,  a.rotary < 0 ? nullptr : p_.rotaries + a.rotary, &batch_, &kv_, index, b_.wide, b_.attended,
                     split ? b_.partial : nullptr, chunks_};
    append_share(job, me_);
    me_.wait();
    attention_share(job, me_);
    me_.wait();
    const int64_t inner = a.heads * a.head_dim;
    const Rows& rows = prepare(batch_.rows, inner, [&](int64_t row, float* to) {
      if (split) merge_row(job, row, to);
      else memcpy(to, b_.attended + row * inner, static_cast<size_t>(inner) * sizeof(float));
    });
    multiply(a.out, 1, rows, b_.narrow, p_.hidden);
    add(layer.attention_out, b_.narrow, layer.attention_scale);
  }

  // Norms over all heads of a row at once.
  void wide_norms(const Attention& a, int64_t width) {
    const bool q = a.q_norm.gain && a.q_norm.width != a.head_dim, k = a.k_norm.gain && a.k_norm.width != a.head_dim;
    if (!q && !k) return;
    int64_t begin, end;
    share(me_, batch_.rows, 1, &begin, &end);
    for (int64_t row = begin; row < end; ++row) {
      float *queries = b_.wide + row * width, *keys = queries + a.heads * a.head_dim;
      if (q) normalize_row(a.q_norm, queries, queries);
      if (k) normalize_row(a.k_norm, keys, keys);
    }
    me_.wait();
  }

  void feed_forward(const Layer& layer) {
    const Rows& rows = normalized(layer.mlp_in, layer.parallel ? b_.before : b_.residual);
    if (layer.experts) {
      mixture(layer, rows);
      return add(layer.mlp_out, b_.mixed, layer.mlp_scale);
    }
    network(*layer.mlps, rows, batch_.rows, b_.narrow);
    add(layer.mlp_out, b_.narrow, layer.mlp_scale);
  }

  // y = down(act(up(x))); my part of y is written, others' not yet.
  void network(const Mlp& mlp, const Rows& rows, int64_t count, float* y) {
    const int64_t inner = mlp.down->columns, width = inner * (mlp.gated ? 2 : 1);
    multiply(mlp.up, mlp.up_count, rows, b_.wide, width);
    me_.wait();
    const Rows& active = prepare(count, inner, [&](int64_t row, float* to) {
      activate_row(mlp.activation, mlp.gated != 0, b_.wide + row * width, to, inner);
    });
    multiply(mlp.down, 1, active, y, p_.hidden);
  }

  void mixture(const Layer& layer, const Rows& rows);

  void read_out() {
    const int64_t count = batch_.wanted_count;
    if (!count) return;
    const int64_t begin_row = 0;
    (void)begin_row;
    for (int64_t first = 0; first < count; first += batch_.rows) {  // wanted rows may repeat, but not fit the buffers
      const int64_t some = count - first < batch_.rows ? count - first : batch_.rows;
      const Rows& rows = prepare(some, p_.hidden, [&](int64_t i, float* to) {
        const float* x = b_.residual + batch_.wanted[first + i] * p_.hidden;
        if (p_.final_norm.gain) normalize_row(p_.final_norm, x, to);
        else memcpy(to, x, static_cast<size_t>(p_.hidden) * sizeof(float));
      });
      float* logits = batch_.logits + first * batch_.vocabulary;
      multiply(p_.head, 1, rows, logits, batch_.vocabulary);
      me_.wait();
      finish(logits, some * batch_.vocabulary);
    }
    if (!batch_.argmax) return;
    me_.wait();
    int64_t begin, end;
    share(me_, count, 1, &begin, &end);
    for (int64_t i = begin; i < end; ++i) batch_.argmax[i] = largest(batch_.logits + i * batch_.vocabulary);
  }

  void finish(float* logits, int64_t total) {
    if (p_.logit_scale == 1.0f && p_.logit_softcap == 0.0f) return;
    int64_t begin, end;
    share(me_, total, kWidth, &begin, &end);
    const float cap = p_.logit_softcap;
    for (int64_t i = begin; i < end; ++i) {
      const float value = logits[i] * p_.logit_scale;
      logits[i] = cap > 0 ? cap * tanhf(value / cap) : value;
    }
  }

  int32_t largest(const float* row) const {
    int32_t best = 0;
    for (int64_t i = 1; i < batch_.vocabulary; ++i)
      if (row[i] > row[best]) best = static_cast<int32_t>(i);
    return best;
  }

  const Program& p_;
  const Batch& batch_;
  const Kv& kv_;
  Buffers b_;
  const int64_t chunks_;
  const Member& me_;
  const Sizes sizes_;
  Ready mine_;
  Rows shared_rows_;
};

// Experts one after another; each reads the rows that chose it, and what it returns is added in the order of experts.
void Run::mixture(const Layer& layer, const Rows& rows) {
  const int64_t experts = layer.experts, k = layer.top_k, hidden = p_.hidden;
  multiply(layer.router, 1, rows, b_.wide, experts);
  float* inputs = b_.attended;  // free by now; the experts' networks overwrite what `rows` points at
  int64_t begin, end;
  share(me_, batch_.rows, 1, &begin, &end);
  for (int64_t row = begin; row < end; ++row) memcpy(inputs + row * hidden, rows.x + row * hidden, static_cast<size_t>(hidden) * 4);
  me_.wait();
  for (int64_t row = begin; row < end; ++row) {
    float *p = b_.wide + row * experts, *weight = b_.weights + row * k, total = 0, sum = 0, top = p[0];
    int32_t* chosen = b_.chosen + row * k;
    for (int64_t e = 0; e < experts; ++e) top = p[e] > top ? p[e] : top;
    for (int64_t e = 0; e < experts; ++e) total += p[e] = expf(p[e] - top);
    for (int64_t i = 0; i < k; ++i) {
      int64_t best = 0;
      for (int64_t e = 1; e < experts; ++e)
        if (p[e] > p[best]) best = e;
      chosen[i] = static_cast<int32_t>(best);
      weight[i] = p[best] / total;
      sum += weight[i];
      p[best] = -1.0f;
    }
    for (int64_t i = 0; i < k; ++i) weight[i] = weight[i] * layer.expert_scale / (layer.normalize ? sum : 1.0f);
    memset(b_.mixed + row * hidden, 0, static_cast<size_t>(hidden) * sizeof(float));
  }
  me_.wait();
  for (int64_t e = 0; e < experts; ++e) {
    int64_t count = 0;
    int32_t* picked = picked_rows(e, k, &count);
    if (!count) continue;
    const Rows& some = prepare(count, hidden, [&](int64_t i, float* to) {
      memcpy(to, inputs + picked[i] * hidden, static_cast<size_t>(hidden) * sizeof(float));
    });
    network(layer.mlps[e], some, count, b_.narrow);
    me_.wait();
    share(me_, count, 1, &begin, &end);
  }
}

}  // namespace
}  // namespace qk
