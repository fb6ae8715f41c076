// One call runs a decode step, a prefill chunk, or any mixture of rows of many sequences through a whole decoder program.
//
// The team meets at a barrier whenever a value is complete that all members need:
//   norm, q/k/v | rotate, append | attend | out projection, residual | norm, gate/up | activation, down, residual |
// Between two barriers every member computes its share: rows of a weight, heads, chunks of a context, or rows of activations.
// With few rows (kPrivateRows), a barrier costs more than a norm, so each member normalizes and rounds all of them in its own
// memory; with many rows, the rows are distributed, followed by a barrier.
//
// A row's result depends neither on the other rows nor on the number of threads, because no sum is split.
#include "decoder.h"

#include <cmath>
#include <cstring>

#include "worker.h"

namespace qk {
namespace {

constexpr int64_t kFusedRows = 8;    // up to this many rows, all inner activations of a network stay in the cache;
constexpr int64_t kFusedBlocks = 2;  // with more rows, this many of their blocks do

// One member's run through the program.
class Run : Worker {
 public:
  Run(const Program& program, const Batch& batch, const Kv& kv, const Buffers& buffers, const Member& me)
      : Worker(batch, kv, buffers, me), p_(program) {}

  void operator()() {
    embed();
    for (int64_t i = 0; i < p_.layer_count; ++i) {
      const Layer& layer = p_.layers[i];
      if (layer.parallel) keep();
      attention(layer, i);
      feed_forward(layer);
    }
    read_out({p_.head, p_.logit_scale, p_.logit_softcap}, [&](int64_t row, float* to) {
      const float* x = b_.residual + row * p_.hidden;
      if (p_.final_norm.gain) normalize_row(p_.final_norm, x, to);
      else copy(to, x, p_.hidden);
    });
  }

 private:
  void embed() {
    each_part(batch_.rows, p_.hidden, [&](int64_t row, int64_t begin, int64_t end) {
      const int64_t token = batch_.tokens[row] * p_.hidden;
      for (int64_t i = begin; i < end; ++i)
        b_.residual[row * p_.hidden + i] = load_one(p_.embedding, token + i, p_.embedding_dtype) * p_.embedding_scale;
    });
    me_.wait();
  }

  // In a parallel block, both networks read the input of the layer.
  void keep() {
    each_part(batch_.rows, p_.hidden, [&](int64_t row, int64_t begin, int64_t end) {
      copy(b_.before + row * p_.hidden + begin, b_.residual + row * p_.hidden + begin, end - begin);
    });
  }

  const Ready& normalized(const Norm& norm, const float* x, const Linear* linears, int64_t count) {
    return prepare(batch_.rows, linears, count, [&](int64_t row, float* to) {
      if (norm.gain) normalize_row(norm, x + row * p_.hidden, to);
      else copy(to, x + row * p_.hidden, p_.hidden);
    });
  }

  // residual += scale * norm(y), where each member has written a part of y.
  void add(const Norm& norm, float* y, float scale) {
    me_.wait();
    if (norm.gain) {
      int64_t begin, end;
      share(me_, batch_.rows, 1, &begin, &end);
      for (int64_t row = begin; row < end; ++row) normalize_row(norm, y + row * p_.hidden, y + row * p_.hidden);
      for (int64_t i = begin * p_.hidden; i < end * p_.hidden; ++i) b_.residual[i] += scale * y[i];
    } else {
      each_part(batch_.rows, p_.hidden, [&](int64_t row, int64_t begin, int64_t end) {
        for (int64_t i = row * p_.hidden + begin; i < row * p_.hidden + end; ++i) b_.residual[i] += scale * y[i];
      });
    }
    me_.wait();
  }

  // residual += scale * norm(w x). Without a norm, each member adds its own part, and no barrier is needed in between.
  void multiply_add(const Linear& w, const Ready& ready, const Norm& norm, float scale) {
    multiply(&w, 1, ready, b_.narrow, p_.hidden);
    if (norm.gain) return add(norm, b_.narrow, scale);
    int64_t begin, end;
    share(me_, linear_blocks(w), 1, &begin, &end);
    end = end * 16 < p_.hidden ? end * 16 : p_.hidden;
    for (int64_t row = 0; row < batch_.rows; ++row)
      for (int64_t i = row * p_.hidden + begin * 16; i < row * p_.hidden + end; ++i) b_.residual[i] += scale * b_.narrow[i];
    me_.wait();
  }

  void attention(const Layer& layer, int64_t index) {
    const Attention& a = layer.attention;
    const int64_t width = (a.heads + 2 * a.kv_heads) * a.head_dim, inner = a.heads * a.head_dim;
    multiply(a.qkv, a.qkv_count, normalized(layer.attention_in, b_.residual, a.qkv, a.qkv_count), b_.wide, width);
    me_.wait();
    wide_norms(a, width);
    const bool split = batch_.rows <= kSplitRows;
    float *keys = b_.wide + a.heads * a.head_dim, *values = keys + a.kv_heads * a.head_dim;
    const AttentionJob job{&a,   a.rotary < 0 ? nullptr : p_.rotaries + a.rotary, &batch_, &kv_, index, b_.wide, keys, values,
                           width, b_.attended, inner, split ? b_.partial : nullptr};
    append_share(job, me_);
    me_.wait();
    attention_share(job, me_);
    me_.wait();
    const Ready& ready = prepare(batch_.rows, a.out, 1, [&](int64_t row, float* to) {
      if (split) merge_row(job, row, to);
      else copy(to, b_.attended + row * inner, inner);
    });
    multiply_add(*a.out, ready, layer.attention_out, layer.attention_scale);
  }

  // Norms over all heads of a row.
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
    const float* x = layer.parallel ? b_.before : b_.residual;
    if (layer.experts) {
      mixture(layer, normalized(layer.mlp_in, x, layer.router, 1));
      return add(layer.mlp_out, b_.mixed, layer.mlp_scale);
    }
    const Mlp& mlp = *layer.mlps;
    const Ready& active = activated(mlp, normalized(layer.mlp_in, x, mlp.up, mlp.up_count), batch_.rows);
    multiply_add(*mlp.down, active, layer.mlp_out, layer.mlp_scale);
  }

  // act(gate) * up, rounded for the down projection. A member computes the same part of gate and up, and rounds the result
  // while it is in the cache; with many rows, a few activation blocks at a time.
  const Ready& activated(const Mlp& mlp, const Ready& ready, int64_t rows) {
    active_ = b_.active;
    active_.fit(rows, mlp.down, 1, batch_.activation_block, batch_.rounding);
    const Rows& to = active_.common();
    const int64_t inner = mlp.down->columns;
    if (whole_rows(to) || to.group % 16 || to.block % 16 || mlp.up->rows != (mlp.gated && mlp.up_count == 1 ? 2 * inner : inner))
      return activated_apart(mlp, ready, rows);
    int64_t begin, end;
    share(me_, rows_blocks(to), 1, &begin, &end);
    float* memory = b_.wide + block_column(to, begin) * rows * (mlp.gated ? 2 : 1);
    for (int64_t next; begin < end; begin = next) {
      next = rows > kFusedRows && begin + kFusedBlocks < end ? begin + kFusedBlocks : end;
      activated_part(mlp, ready, to, begin, next, memory);
    }
    me_.wait();
    return active_;
  }

  // Compute activation blocks [begin, end) of the rows; the results of the linears go to `memory`.
  void activated_part(const Mlp& mlp, const Ready& ready, const Rows& to, int64_t begin, int64_t end, float* memory) {
    const int64_t first = block_column(to, begin), count = block_column(to, end) - first, width = mlp.gated ? 2 * count : count;
    for (int64_t half = 0; half < (mlp.gated ? 2 : 1); ++half) {
      const Linear l = as_read(mlp.up[half < mlp.up_count ? half : 0]);
      const int64_t row = first + (half < mlp.up_count ? 0 : mlp.down->columns);  // of the weight
      linear_share(l, ready.of(l), memory + half * count - row, width, row / 16, (row + count) / 16,
                   mine_.scratch);
    }
    for (int64_t m = 0; m < to.m; ++m)
      activate_row(mlp.activation, mlp.gated != 0, memory + m * width, active_.x + m * to.stride + first, count);
    if (active_.kinds) prepare_blocks(to, 0, to.m, begin, end);
  }

  // The same if activation blocks and blocks of the weight are not aligned.
  const Ready& activated_apart(const Mlp& mlp, const Ready& ready, int64_t rows) {
    const int64_t inner = mlp.down->columns, width = inner * (mlp.gated ? 2 : 1);
    multiply(mlp.up, mlp.up_count, ready, b_.wide, width);
    me_.wait();
    return prepare(rows, mlp.down, 1, [&](int64_t row, float* to) {
      activate_row(mlp.activation, mlp.gated != 0, b_.wide + row * width, to, inner);
    });
  }

  // Experts one after another: each reads the rows that chose it, and its results are added to them.
  void mixture(const Layer& layer, const Ready& ready) {
    const int64_t hidden = p_.hidden;
    float* inputs = b_.attended;  // the experts' own activations overwrite what `ready` holds
    multiply(layer.router, 1, ready, b_.wide, layer.experts);
    each_part(batch_.rows, hidden, [&](int64_t row, int64_t begin, int64_t end) {
      copy(inputs + row * hidden + begin, ready.x + row * hidden + begin, end - begin);
      memset(b_.mixed + row * hidden + begin, 0, static_cast<size_t>(end - begin) * sizeof(float));
    });
    me_.wait();
    int64_t begin, end;
    share(me_, batch_.rows, 1, &begin, &end);
    for (int64_t row = begin; row < end; ++row) choose(layer, row);
    me_.wait();
    for (int64_t e = 0; e < layer.experts; ++e) {
      int64_t count = 0;
      for (int64_t i = 0; i < batch_.rows * layer.top_k; ++i)
        if (b_.chosen[i] == e) mine_.picked[count++] = static_cast<int32_t>(i);
      if (!count) continue;
      const Mlp& mlp = layer.mlps[e];
      const Ready& some = prepare(count, mlp.up, mlp.up_count, [&](int64_t i, float* to) {
        copy(to, inputs + mine_.picked[i] / layer.top_k * hidden, hidden);
      });
      const Ready& active = activated(mlp, some, count);
      multiply(mlp.down, 1, active, b_.narrow, hidden);
      me_.wait();
      each_part(count, hidden, [&](int64_t i, int64_t from, int64_t to) {
        const float* y = b_.narrow + i * hidden;
        float* sum = b_.mixed + mine_.picked[i] / layer.top_k * hidden;
        for (int64_t d = from; d < to; ++d) sum[d] += b_.weights[mine_.picked[i]] * y[d];
      });
      me_.wait();
    }
  }

  // The most probable experts of a row and their weights.
  void choose(const Layer& layer, int64_t row) {
    float *p = b_.wide + row * layer.experts, *weight = b_.weights + row * layer.top_k;
    float top = p[0], total = 0, sum = 0;
    for (int64_t e = 1; e < layer.experts; ++e) top = p[e] > top ? p[e] : top;
    for (int64_t e = 0; e < layer.experts; ++e) total += p[e] = expf(p[e] - top);
    for (int64_t i = 0; i < layer.top_k; ++i) {
      int64_t best = 0;
      for (int64_t e = 1; e < layer.experts; ++e) best = p[e] > p[best] ? e : best;
      b_.chosen[row * layer.top_k + i] = static_cast<int32_t>(best);
      sum += weight[i] = p[best] / total;
      p[best] = -1;
    }
    for (int64_t i = 0; i < layer.top_k; ++i) weight[i] *= layer.expert_scale / (layer.normalize ? sum : 1.0f);
  }

  const Program& p_;
  Ready active_;
};

struct Call {
  const Program& program;
  const Batch& batch;
  const Kv& kv;
  const Buffers& buffers;
};

void run(const Member& me, void* argument) {
  const Call& call = *static_cast<const Call*>(argument);
  Run(call.program, call.batch, call.kv, call.buffers, me)();
}

}  // namespace
}  // namespace qk

#define QK_EXPORT extern "C" __attribute__((visibility("default")))

// Bytes of scratch memory (64-byte aligned) for calls of up to `rows` rows, contexts of `chunks`, and `threads` threads.
QK_EXPORT int64_t qk_decoder_bytes(const qk::Program* program, int64_t rows, int64_t chunks, int32_t block, int32_t threads) {
  return qk::Buffers(qk::Needs::of(*program, block), rows, chunks, threads, nullptr).bytes;
}

// Run one call. The arguments are not checked here; kernels/cpu/decoder.py has checked them.
QK_EXPORT void qk_decoder_run(const qk::Program* program, const qk::Batch* batch, const qk::Kv* kv, void* scratch, int32_t threads) {
  const qk::Needs needs = qk::Needs::of(*program, batch->activation_block);
  const qk::Buffers buffers(needs, batch->rows, batch->chunks, threads, static_cast<char*>(scratch));
  qk::Call call{*program, *batch, *kv, buffers};
  qk::run_team(threads, qk::run, &call);
}
