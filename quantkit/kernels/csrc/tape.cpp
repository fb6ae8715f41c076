// One call runs rows of many sequences through a tape, stage by stage; see tape.h.
//
// As in decoder.cpp, a row's result depends neither on the other rows nor on the number of threads.
#include "tape.h"

#include "worker.h"

namespace qk {
namespace {

class TapeRun : Worker {
 public:
  TapeRun(const Tape& tape, const Batch& batch, const Kv& kv, const TapeStates& states, const Buffers& buffers, const Member& me)
      : Worker(batch, kv, buffers, me), t_(tape), states_(states) {}

  void operator()() {
    for (int64_t i = 0; i < t_.stage_count; ++i) {
      const TapeStage& stage = t_.stages[i];
      rows(stage, i == 0);
      for (int64_t j = 0; j < stage.product_count; ++j) {
        const TapeProducts& p = stage.products[j];
        const Ready& ready = prepare(batch_.rows, p.linears, p.count, [&](int64_t row, float* to) {
          copy(to, arena(row) + p.x, p.linears->columns);
        });
        multiply(p.linears, p.count, ready, b_.arena + p.y, t_.width);
        me_.wait();
      }
      for (int64_t j = 0; j < stage.attend_count; ++j) attend(stage.attends[j]);
      for (int64_t j = 0; j < stage.mixture_count; ++j) mix(stage.mixtures[j]);
    }
    read_out({t_.head, t_.logit_scale, t_.logit_softcap}, [&](int64_t row, float* to) {
      copy(to, arena(row) + t_.result, t_.hidden);
    });
  }

 private:
  float* arena(int64_t row) const { return b_.arena + row * t_.width; }

  void rows(const TapeStage& stage, bool first) {
    int64_t begin = 0, end = batch_.rows;
    if (!stage.ordered) share(me_, batch_.rows, 1, &begin, &end);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t slot = batch_.slots[row];
      if (stage.ordered && slot % me_.count != me_.index) continue;
      if (first) {
        arena(row)[0] = static_cast<float>(batch_.tokens[row]);
        arena(row)[1] = static_cast<float>(batch_.positions[row]);
        arena(row)[2] = static_cast<float>(row);
      }
      run_steps(stage.rows, arena(row), &states_, slot);
    }
    me_.wait();
  }

  void attend(const TapeAttend& step) {
    const Attention& a = step.attention;
    const bool split = batch_.rows <= kSplitRows;
    float* memory = b_.arena;
    const AttentionJob job{&a, nullptr, &batch_, &kv_, step.cache, memory + step.q, memory + step.k, memory + step.v, t_.width,
                           memory + step.out, t_.width, split ? b_.partial : nullptr};
    if (step.append) {
      append_share(job, me_);
      me_.wait();
    }
    attention_share(job, me_);
    me_.wait();
    if (!split) return;
    int64_t begin, end;
    share(me_, batch_.rows, 1, &begin, &end);
    for (int64_t row = begin; row < end; ++row) merge_row(job, row, arena(row) + step.out);
    me_.wait();
  }

  // Experts one after another: each reads the rows that chose it.
  void mix(const TapeMixture& m) {
    int64_t begin, end;
    share(me_, batch_.rows, 1, &begin, &end);
    for (int64_t row = begin; row < end; ++row) {
      memset(arena(row) + m.out, 0, static_cast<size_t>(m.out_width) * sizeof(float));
      for (int64_t i = 0; i < m.top_k; ++i) b_.chosen[row * m.top_k + i] = static_cast<int32_t>(arena(row)[m.index + i]);
    }
    me_.wait();
    for (int64_t e = 0; e < m.experts; ++e)
      for (int64_t i = 0, last = batch_.rows * m.top_k; i < last;) {
        int64_t count = 0;  // no more than there is memory for
        for (; i < last && count < batch_.rows; ++i)
          if (b_.chosen[i] == e) mine_.picked[count++] = static_cast<int32_t>(i);
        if (count) expert(m, e, count);
      }
  }

  void expert(const TapeMixture& m, int64_t e, int64_t count) {
    const int64_t width = m.inner_width;
    const Ready& some = prepare(count, m.up + e, 1, [&](int64_t i, float* to) {
      copy(to, arena(mine_.picked[i] / m.top_k) + m.x, m.in_width);
    });
    multiply(m.up + e, 1, some, b_.inner + m.inner_input, width);
    me_.wait();
    const Ready& active = prepare(count, m.down + e, 1, [&](int64_t i, float* to) {
      // With few rows, every member computes all of them, each in memory of its own.
      float* memory = b_.inner + i * width;
      if (count <= kPrivateRows && me_.count > 1) {
        float* own = b_.inner + ((1 + me_.index) * batch_.rows + i) * width;
        copy(own + m.inner_input, memory + m.inner_input, m.up[e].rows);
        memory = own;
      }
      run_steps(m.inner, memory, nullptr, 0);
      copy(to, memory + m.inner.result, m.down[e].columns);
    });
    multiply(m.down + e, 1, active, b_.inner + m.outer_input, width);
    me_.wait();
    int64_t begin, end;
    share(me_, count, 1, &begin, &end);
    for (int64_t i = begin; i < end; ++i) {
      float* memory = b_.inner + i * width;
      if (m.outer.count) run_steps(m.outer, memory, nullptr, 0);
      const float *y = memory + (m.outer.count ? m.outer.result : m.outer_input), *row = arena(mine_.picked[i] / m.top_k);
      const float weight = row[m.weights + mine_.picked[i] % m.top_k];
      float* sum = arena(mine_.picked[i] / m.top_k) + m.out;
      for (int64_t d = 0; d < m.out_width; ++d) sum[d] += weight * y[d];
    }
    me_.wait();
  }

  const Tape& t_;
  const TapeStates& states_;
};

Needs needs_of(const Tape& t, int64_t block, int64_t threads) {
  Needs n;
  n.hidden = n.input = t.hidden;
  n.arena = t.width;
  n.fit(t.head, 1, block);
  for (int64_t i = 0; i < t.stage_count; ++i) {
    const TapeStage& stage = t.stages[i];
    for (int64_t j = 0; j < stage.product_count; ++j) n.fit(stage.products[j].linears, stage.products[j].count, block);
    for (int64_t j = 0; j < stage.attend_count; ++j)
      n.partial = Needs::most(n.partial, attention_partial_floats(stage.attends[j].attention));
    for (int64_t j = 0; j < stage.mixture_count; ++j) {
      const TapeMixture& m = stage.mixtures[j];
      for (int64_t e = 0; e < m.experts; ++e) {
        n.fit(m.up + e, 1, block);
        n.fit(m.down + e, 1, block);
      }
      n.chosen = Needs::most(n.chosen, m.top_k);
      n.inner = Needs::most(n.inner, m.inner_width * (1 + threads));
    }
  }
  return n;
}

struct TapeCall {
  const Tape& tape;
  const Batch& batch;
  const Kv& kv;
  const TapeStates& states;
  const Buffers& buffers;
};

void run(const Member& me, void* argument) {
  const TapeCall& call = *static_cast<const TapeCall*>(argument);
  TapeRun(call.tape, call.batch, call.kv, call.states, call.buffers, me)();
}

}  // namespace
}  // namespace qk

#define QK_EXPORT extern "C" __attribute__((visibility("default")))

// As qk_decoder_bytes and qk_decoder_run.
QK_EXPORT int64_t qk_tape_bytes(const qk::Tape* tape, int64_t rows, int64_t chunks, int32_t block, int32_t threads) {
  return qk::Buffers(qk::needs_of(*tape, block, threads), rows, chunks, threads, nullptr).bytes;
}

QK_EXPORT void qk_tape_run(const qk::Tape* tape, const qk::Batch* batch, const qk::Kv* kv, const qk::TapeStates* states,
                           void* scratch, int32_t threads) {
  const qk::Needs needs = qk::needs_of(*tape, batch->activation_block, threads);
  const qk::Buffers buffers(needs, batch->rows, batch->chunks, threads, static_cast<char*>(scratch));
  qk::TapeCall call{*tape, *batch, *kv, *states, buffers};
  qk::run_team(threads, qk::run, &call);
}
