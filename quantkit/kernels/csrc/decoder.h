// A decoder program as plain structs, mirrored by ctypes in kernels/cpu/structs.py, and the pieces that decoder.cpp and
// attention.cpp share.
// What the fields mean is said once, in kernels/program/definition.py.
#pragma once
#include <cstdint>

#include "linear.h"
#include "team.h"
#include "elementary.h"

namespace qk {

struct Norm {
  const float *gain, *shift;  // no gain: no norm
  int64_t width;
  float eps;
  int32_t center;
};

struct Attention {
  const Linear* qkv;  // outputs side by side: [q | k | v]
  int64_t qkv_count;
  const Linear* out;
  Norm q_norm, k_norm;
  int64_t heads, kv_heads, head_dim;
  int64_t rotary;  // index, or -1
  int64_t window;  // 0: all
  float scale, softcap;  // softcap 0: none
};

struct Mlp {
  const Linear* up;  // outputs side by side: [gate | up]
  int64_t up_count;
  const Linear* down;
  int32_t activation, gated;
};

struct Layer {
  Attention attention;
  Norm attention_in, attention_out, mlp_in, mlp_out;
  const Mlp* mlps;
  int64_t experts;       // 0: one plain network
  const Linear* router;  // where there are experts
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

// Keys and values of all sequences, in pages of kPageTokens tokens. Of each page and head, keys lie channel by channel
// ([head_dim][tokens]: one register holds a channel of several tokens, so a score needs no sum across lanes), values token by
// token ([tokens][head_dim]). int8 has one scale per token and head.
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
  int64_t chunks;   // of kChunkTokens keys, that the longest context takes
  int32_t rounding;          // of activations: see form_of
  int32_t activation_block;  // columns per scale of int8 ones
  int32_t draft;    // read only the high plane of weights that are in planes
};

// What attention needs of a call.
struct AttentionJob {
  const Attention* a;
  const Rotary* rotary;
  const Batch* batch;
  const Kv* kv;
  int64_t layer;
  float* qkv;            // [rows][(heads + 2 kv_heads) * head_dim]; queries are normalized and rotated in place
  float* out;            // [rows][heads * head_dim]
  float* partial;        // [row][head][chunk]: see attention.cpp; null: contexts are not split
};

constexpr int64_t kChunkTokens = 128;  // keys whose softmax is taken at once; partial results are merged in order
constexpr int64_t kMaxHeadDim = 512;
constexpr int64_t kSplitRows = 4;      // up to so many rows, a context is split over threads

int64_t attention_partial_floats(const Attention& a);  // per row and chunk
void append_share(const AttentionJob& job, const Member& me);   // rotate queries and keys, append keys and values
void attention_share(const AttentionJob& job, const Member& me);
void merge_row(const AttentionJob& job, int64_t row, float* out);  // after a split: one row's output

void normalize_row(const Norm& norm, const float* x, float* y);
void activate_row(int32_t activation, bool gated, const float* x, float* y, int64_t width);

}  // namespace qk
