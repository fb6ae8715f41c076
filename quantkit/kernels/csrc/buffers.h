// The scratch memory of one call, in one piece that the caller owns.
#pragma once
#include <cstdint>

#include "decoder.h"

namespace qk {

constexpr int64_t kPrivateRows = 2;  // up to this many rows, every member rounds activations for itself
constexpr int64_t kForms = 3;        // different forms among linears that share their input

// Rows of activations: floats, and a rounded copy for every form and group size that the linears need.
struct Ready {
  float* x;
  char* memory;
  int64_t kinds;
  int32_t rounding;
  Rows rows[kForms];

  void fit(int64_t count, const Linear* linears, int64_t linear_count, int64_t block, int32_t round_to) {
    kinds = 0, rounding = round_to;
    const int64_t columns = linears->columns;
    const Rows plain{x, count, columns, columns, columns, block, kFormFloat32, nullptr, nullptr, nullptr, nullptr};
    rows[0] = plain;
    char* at = memory;
    for (int64_t i = 0; i < linear_count; ++i) {
      const int32_t form = form_of(linears[i], rounding);
      if (form == kFormFloat32 || find(linears[i]) < kinds) continue;
      Rows& r = rows[kinds++];
      r = plain;
      r.form = form, r.group = linears[i].group;
      place_rows(r, at);
      at += round_up(rows_bytes(r), 64);
    }
  }

  // The rows as `linear` reads them. A linear that reads floats can use any copy.
  const Rows& of(const Linear& linear) const {
    const int64_t found = find(linear);
    return rows[found < kinds ? found : 0];
  }

 private:
  int64_t find(const Linear& linear) const {
    const int32_t form = form_of(linear, rounding);
    int64_t i = 0;
    while (i < kinds && (rows[i].form != form || rows[i].group != linear.group)) ++i;
    return i;
  }
};

// Sizes that the memory of a call depends on.
struct Needs {
  int64_t hidden = 0, input = 0, wide = 0, partial = 0, ready = 0, chosen = 1, arena = 0, inner = 0;

  static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

  // The memory per row for the common input of some linears.
  void fit(const Linear* linears, int64_t count, int64_t block) {
    input = most(input, linears->columns);
    Ready rows{};
    rows.fit(1, linears, count, block, 1 << kFormInt8 | 1 << kFormBFloat16);
    int64_t total = 0;
    for (int64_t i = 0; i < rows.kinds; ++i) total += round_up(rows_bytes(rows.rows[i]), 64) + 64;
    ready = most(ready, total);
  }

  static Needs of(const Program& p, int64_t block) {
    Needs n;
    n.hidden = n.input = p.hidden;
    n.fit(p.head, 1, block);
    for (int64_t i = 0; i < p.layer_count; ++i) {
      const Layer& layer = p.layers[i];
      const Attention& a = layer.attention;
      n.fit(a.qkv, a.qkv_count, block);
      n.fit(a.out, 1, block);
      n.wide = most(n.wide, most((a.heads + 2 * a.kv_heads) * a.head_dim, layer.experts));
      n.partial = most(n.partial, attention_partial_floats(a));
      if (layer.experts) n.fit(layer.router, 1, block);
      n.chosen = most(n.chosen, layer.top_k);
      for (int64_t e = 0; e < most(layer.experts, 1); ++e) {
        const Mlp& mlp = layer.mlps[e];
        n.fit(mlp.up, mlp.up_count, block);
        n.fit(mlp.down, 1, block);
        n.wide = most(n.wide, mlp.down->columns * (mlp.gated ? 2 : 1));
      }
    }
    return n;
  }
};

struct Buffers {
  struct Private {
    Ready ready;
    int32_t* picked;
    void* scratch;
  };

  float *residual, *before, *wide, *narrow, *attended, *mixed, *partial, *weights, *arena, *inner;
  int32_t *chosen, *best;
  Ready shared, active;  // the input of most linears, and that of down projections
  int64_t bytes = 0;

  Buffers(const Needs& needs, int64_t rows, int64_t chunks, int64_t threads, char* memory)
      : memory_(memory), rows_(rows), input_(needs.input), ready_bytes_(needs.ready) {
    residual = take<float>(rows * needs.hidden);
    before = take<float>(rows * needs.hidden);
    wide = take<float>(rows * needs.wide);
    narrow = take<float>(rows * needs.hidden);
    attended = take<float>(rows * needs.input);
    mixed = take<float>(rows * needs.hidden);
    partial = take<float>((rows < kSplitRows ? rows : kSplitRows) * chunks * needs.partial);
    weights = take<float>(rows * needs.chosen);
    arena = take<float>(rows * needs.arena);
    inner = take<float>(rows * needs.inner);
    chosen = take<int32_t>(rows * needs.chosen);
    best = take<int32_t>(threads * rows);
    shared = take_ready(rows);
    active = take_ready(rows);
    privates_ = bytes;
    take_private();
    private_bytes_ = bytes - privates_;
    bytes += private_bytes_ * (threads - 1);
  }

  // The private memory of one member.
  Private member(int64_t index) const {
    Buffers view(*this);
    view.bytes = privates_ + private_bytes_ * index;
    return view.take_private();
  }

 private:
  template <typename T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(memory_ + bytes);
    bytes += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }

  Ready take_ready(int64_t rows) {
    Ready ready{};
    ready.x = take<float>(rows * input_);
    ready.memory = take<char>(rows * ready_bytes_);
    return ready;
  }

  Private take_private() {
    Private mine{};
    mine.ready = take_ready(kPrivateRows);
    mine.picked = take<int32_t>(rows_);
    mine.scratch = take<char>(kShareScratchBytes);
    return mine;
  }

  char* memory_;
  int64_t rows_, input_, ready_bytes_, privates_ = 0, private_bytes_ = 0;
};

}  // namespace qk
