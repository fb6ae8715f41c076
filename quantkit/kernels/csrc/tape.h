// A tape as plain structs, mirrored by ctypes in kernels/cpu/tape_structs.py; kernels/program/tape.py says what steps mean.
//
// A row's values lie in its arena, `width` floats. Steps are in stages: first the arithmetic of every row by itself, then what
// the team does together (products, attention, mixtures). Rows of a stage with states run in order, those of one sequence by
// one member.
#pragma once
#include "decoder.h"

namespace qk {

constexpr int kAxes = 6, kOperands = 3;

struct Operand {
  const float* constant;  // null: the row's arena
  int64_t offset;
  int64_t strides[kAxes];
};

// kind: number of a map, or kRowKinds + number of an operation along rows, or one of the following.
enum StepKind : int32_t { kRowKinds = 64, kJoin = 96, kLookup = 97, kLoad = 98, kStore = 99 };

struct TapeStep {
  int32_t kind, axes;
  int64_t shape[kAxes];        // of the result of a map; of the first operand otherwise
  Operand in[kOperands];
  int64_t out;                 // offset in the arena
  int64_t out_strides[kAxes];  // of a join
  int64_t n, m;                // lookup: width, dtype; load and store: state, size; rows: see steps.cpp
  const void* table;           // lookup
  float numbers[2];
};

struct TapeProducts {  // linears with the same input, whose outputs are neighbours
  const Linear* linears;
  int64_t count, x, y;
};

struct TapeAttend {
  Attention attention;
  int64_t q, k, v, out, cache;
  int32_t append, pad;
};

struct TapeSteps {
  const TapeStep* steps;
  int64_t count, result;  // result: where it is in the arena
};

struct TapeMixture {
  const Linear *up, *down;  // [experts]
  int64_t experts, top_k, x, index, weights, out, in_width, out_width;
  TapeSteps inner, outer;
  int64_t inner_width, inner_input, outer_input;  // arena of `inner` and `outer`, and where their inputs are; outer.count 0: none
};

struct TapeStage {
  TapeSteps rows;
  const TapeProducts* products;
  int64_t product_count;
  const TapeAttend* attends;
  int64_t attend_count;
  const TapeMixture* mixtures;
  int64_t mixture_count;
  int32_t ordered, pad;
};

struct Tape {
  const TapeStage* stages;
  int64_t stage_count, width, hidden, result;  // result: what the head reads, `hidden` floats
  const Linear* head;
  float logit_scale, logit_softcap;
};

struct TapeStates {
  float* const* memory;       // by state: [place][size]
  const int32_t* places;      // by slot of the batch
};

// Run steps on one row. `arena` holds its values, the token and the position first.
void run_steps(const TapeSteps& steps, float* arena, const TapeStates* states, int64_t slot);

}  // namespace qk
