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
  Rows plain, rows[kForms];

  void fit(int64_t count, const Linear* linears, int64_t linear_count, int64_t block, int32_t round_to) {
    kinds = 0, rounding = round_to;
    const int64_t columns = linears->columns;
    plain = Rows{};
    plain.x = x, plain.m = count, plain.stride = plain.columns = plain.group = columns, plain.block = block;
    char* at = memory;
    for (int64_t i = 0; i < linear_count; ++i) {
      if (find(linears[i]).form != kFormFloat32 || form_of(linears[i], rounding) == kFormFloat32) continue;
      Rows& r = rows[kinds++];
      r = plain;
      fit_rows(r, linears[i], rounding, block);
      place_rows(r, at);
      at += rows_bytes(r);
    }
  }

  // The rows as `linear` reads them.
  const Rows& of(const Linear& linear) const { return find(linear); }

  // The rounded rows, where all linears read the same; else the plain ones.
  const Rows& common() const { return kinds ? rows[0] : plain; }

 private:
  const Rows& find(const Linear& linear) const {
    Rows wanted = plain;
    fit_rows(wanted, linear, rounding, plain.block);
    for (int64_t i = 0; i < kinds; ++i)
      if (rows[i].form == wanted.form && rows[i].group == wanted.group && rows[i].block == wanted.block &&
          same_inputs(rows[i].inputs, wanted.inputs))
        return rows[i];
    return plain;
  }
};

// Sizes that the memory of a call depends on.
struct Needs {
  int64_t hidden = 0, input = 0, wide = 0, partial = 0, ready = 0, chosen = 1, arena = 0, inner = 0;

  static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

  // The memory per row for the common input of some linears.
  void fit(const Linear* linears, int64_t count, int64_t block) {
    input = most(input, linears->columns);
    for (int32_t rounding = 0; rounding < 8; rounding += 2) {  // what a call may ask for: kFormInt8, kFormBFloat16
      Ready rows{};
      rows.fit(1, linears, count, block, rounding);
      int64_t total = 0;
      for (int64_t i = 0; i < rows.kinds; ++i) total += round_up(rows_bytes(rows.rows[i]), 64) + 64;
      ready = most(ready, total);
    }
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
