// What runs of every kind of program have in common: rounding the input of linears, sharing them, and reading out logits.
#pragma once
#include <cmath>
#include <cstring>

#include "buffers.h"

namespace qk {

inline void copy(float* to, const float* from, int64_t count) {
  memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
}

struct Head {
  const Linear* head;
  float scale, softcap;  // softcap 0: none
};

// One member's part of a call.
class Worker {
 protected:
  Worker(const Batch& batch, const Kv& kv, const Buffers& buffers, const Member& me)
      : batch_(batch), kv_(kv), b_(buffers), me_(me), mine_(buffers.member(me.index)) {}

  // Fill rows of activations with fill(row, destination) and round them for `linears`. They are complete on return.
  template <typename Fill>
  const Ready& prepare(int64_t rows, const Linear* linears, int64_t count, Fill fill) {
    const bool alone = rows <= kPrivateRows;
    ready_ = alone ? mine_.ready : b_.shared;
    ready_.fit(rows, linears, count, batch_.activation_block, batch_.rounding);
    int64_t begin = 0, end = rows;
    if (!alone) share(me_, rows, 1, &begin, &end);
    for (int64_t row = begin; row < end; ++row) fill(row, ready_.x + row * linears->columns);
    for (int64_t i = 0; i < ready_.kinds; ++i) prepare_rows(ready_.rows[i], begin, end);
    if (!alone) me_.wait();
    return ready_;
  }

  // A weight as this call reads it.
  Linear as_read(Linear l) const {
    if (batch_.draft && l.kind == kWeightPlanes) l.kind = kWeightHighPlane;
    return l;
  }

  // My share of linears whose outputs are concatenated in rows of y; the shares of others may be incomplete on return.
  void multiply(const Linear* linears, int64_t count, const Ready& ready, float* y, int64_t y_stride) {
    int64_t total = 0, begin, end;
    for (int64_t i = 0; i < count; ++i) total += linear_blocks(linears[i]);
    share(me_, total, 1, &begin, &end);
    for (int64_t i = 0, first = 0; i < count; ++i) {
      const int64_t blocks = linear_blocks(linears[i]);
      const int64_t from = begin > first ? begin - first : 0, to = end - first < blocks ? end - first : blocks;
      if (from < to) {
        const Linear linear = as_read(linears[i]);
        linear_share(linear, ready.of(linear), y, y_stride, from, to, mine_.scratch);
      }
      first += blocks;
      y += linears[i].rows;
    }
  }

  // My share of an array (rows, columns): whole rows if there are enough, else some columns of every row.
  template <typename F>
  void each_part(int64_t rows, int64_t columns, F f) {
    int64_t begin, end;
    const bool by_row = rows >= me_.count;
    share(me_, by_row ? rows : columns, by_row ? 1 : kWidth, &begin, &end);
    for (int64_t row = by_row ? begin : 0; row < (by_row ? end : rows); ++row)
      f(row, by_row ? 0 : begin, by_row ? columns : end);
  }

  // Logits of the selected rows; fill(row, to) writes what the head reads.
  template <typename Fill>
  void read_out(const Head& h, Fill fill) {
    const int64_t count = batch_.logit_count, width = batch_.vocabulary;
    if (!count) return;
    const Ready& ready = prepare(count, h.head, 1, [&](int64_t i, float* to) { fill(batch_.logit_rows[i], to); });
    multiply(h.head, 1, ready, batch_.logits, width);
    int64_t begin, end;
    share(me_, linear_blocks(*h.head), 1, &begin, &end);
    begin *= 16;
    end = end * 16 < width ? end * 16 : width;
    for (int64_t i = 0; i < count; ++i) finish(h, i, begin, end);
    if (!batch_.argmax) return;
    me_.wait();
    for (int64_t i = 0; me_.index == 0 && i < count; ++i) {
      int64_t best = b_.best[i];
      for (int32_t t = 1; t < me_.count; ++t) {
        const int64_t other = b_.best[t * batch_.rows + i];
        if (other >= 0 && (best < 0 || batch_.logits[i * width + other] > batch_.logits[i * width + best])) best = other;
      }
      batch_.argmax[i] = static_cast<int32_t>(best);
    }
  }

  // Scale and cap my logits of one row, and find the largest one.
  void finish(const Head& h, int64_t row, int64_t begin, int64_t end) {
    float* logits = batch_.logits + row * batch_.vocabulary;
    const float cap = h.softcap;
    if (h.scale != 1.0f || cap > 0)
      for (int64_t i = begin; i < end; ++i) {
        logits[i] *= h.scale;
        if (cap > 0) logits[i] = cap * tanhf(logits[i] / cap);
      }
    int64_t i = begin, best = begin < end ? begin : -1;
    if (batch_.argmax && best >= 0) {
      Floats most = splat(-INFINITY);
      for (; i + kWidth <= end; i += kWidth) {
        const Floats values = load(logits + i);
        most = values > most ? values : most;
      }
      float top = -INFINITY;
      for (int lane = 0; lane < kWidth; ++lane) top = most[lane] > top ? most[lane] : top;
      for (; i < end; ++i) top = logits[i] > top ? logits[i] : top;
      for (i = begin; i < end && logits[i] != top; ++i) {
      }
      if (i < end) best = i;
    }
    b_.best[me_.index * batch_.rows + row] = static_cast<int32_t>(best);
  }

  const Batch& batch_;
  const Kv& kv_;
  const Buffers& b_;
  const Member& me_;
  const Buffers::Private mine_;
  Ready ready_;
};

}  // namespace qk
