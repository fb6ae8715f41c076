// A decoder program as plain structs, mirrored by ctypes in kernels/cpu/structs.py, and the pieces that decoder.cpp and
// attention.cpp share.
// kernels/program/definition.py documents the fields.
#pragma once
#include <cstdint>

#include "linear.h"
#include "team.h"
#include "elementary.h"

namespace qk {

struct Norm {
  const float *gain, *shift;  // gain null: no norm
  int64_t width;
  float eps;
  int32_t center;
};

struct Attention {
  const Linear* qkv;  // concatenated outputs: [q | k | v]
  int64_t qkv_count;
  const Linear* out;
  Norm q_norm, k_norm;
  int64_t heads, kv_heads, head_dim, value_dim;
  int64_t rotary;  // index, or -1
  int64_t window, chunk;  // 0: all
  const float *sinks, *slopes;  // [heads]: a logit per head that has no value; what scores grow by per position; or null
  float scale, softcap;  // softcap 0: none
};

struct Mlp {
  const Linear* up;  // concatenated outputs: [gate | up]
  int64_t up_count;
  const Linear* down;
  int32_t activation, gated;
};

struct Layer {
  Attention attention;
  Norm attention_in, attention_out, mlp_in, mlp_out;
  const Mlp* mlps;
  int64_t experts;       // 0: one feed-forward network
  const Linear* router;  // with experts only
  int64_t top_k;
  float attention_scale, mlp_scale, expert_scale;
  int32_t normalize, parallel;
};

struct Rotary {
  const float *cos, *sin;  // [length][dim / 2]
  int64_t length, dim;
  int32_t interleaved;
};

struct Program {
  const void* embedding;  // [..][hidden] of embedding_dtype
  int64_t hidden;
  const Layer* layers;
  int64_t layer_count;
  const Rotary* rotaries;
  const Linear* head;
  Norm final_norm;
  float embedding_scale, logit_scale, logit_softcap;
  int32_t embedding_dtype;
};

// Keys and values of all sequences, in pages of kPageTokens tokens. In each page and head, keys are stored by channel
// ([head_dim][tokens]: a register has one channel of several tokens, so a score needs no sum across lanes), values by token
// ([tokens][head_dim]). int8 has one scale per token and head.
constexpr int64_t kPageTokens = 32;
enum KvKind : int32_t { kKvFloat32 = 0, kKvBFloat16 = 1, kKvInt8 = 2 };

struct Kv {
  void *const *keys, *const *values;                // by layer: [page][kv_head][...]
  float *const *key_scales, *const *value_scales;   // by layer: [page][kv_head][token], for int8
  const int32_t* block_table;                       // [slot][table_stride]: the pages of a sequence, in order
  int64_t table_stride;
  int32_t kind;
};

// Rows of one call: token `tokens[i]` at position `positions[i]` of the sequence in slot `slots[i]`.
struct Batch {
  int64_t rows;
  const int32_t *tokens, *positions, *slots;
  const int32_t* logit_rows;  // [logit_count]: rows whose logits are computed
  int64_t logit_count, vocabulary;  // logit_count <= rows
  float* logits;    // [logit_count][vocabulary]
  int32_t* argmax;  // [logit_count], or null
  int64_t chunks;   // chunks of kChunkTokens keys in the longest context
  int32_t rounding;          // of activations: see form_of
  int32_t activation_block;  // columns per scale of int8 ones
  int32_t draft;    // read only the high plane of weights that are stored in planes
};

// The inputs and outputs of attention in one layer.
struct AttentionJob {
  const Attention* a;
  const Rotary* rotary;
  const Batch* batch;
  const Kv* kv;
  int64_t layer;
  float *q, *k, *v;      // [rows] at `stride`: heads one after another; queries and keys are normalized and rotated in place
  int64_t stride;
  float* out;            // [rows][heads * value_dim] at `out_stride`
  int64_t out_stride;
  float* partial;        // [row][head][chunk]: see attention.cpp; null if contexts are not split
};

constexpr int64_t kChunkTokens = 128;  // keys per partial softmax; partial results are merged in order
constexpr int64_t kMaxHeadDim = 512;
constexpr int64_t kSplitRows = 4;      // up to this many rows, contexts are split over threads

int64_t attention_partial_floats(const Attention& a);  // per row and chunk
void append_share(const AttentionJob& job, const Member& me);   // rotate queries and keys, append keys and values
void attention_share(const AttentionJob& job, const Member& me);
void merge_row(const AttentionJob& job, int64_t row, float* out);  // after a split: one row's output

void normalize_row(const Norm& norm, const float* x, float* y);
void activate_row(int32_t activation, bool gated, const float* x, float* y, int64_t width);

}  // namespace qk
