// Runs the decoder on a tiny random program of odd sizes, in memory of exact size, and compares reading a sequence at once with
// reading it piece by piece, bit for bit. Part of the sanitized driver.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "buffers.h"

extern "C" {
int64_t qk_decoder_bytes(const qk::Program*, int64_t, int64_t, int32_t, int32_t);
void qk_decoder_run(const qk::Program*, const qk::Batch*, const qk::Kv*, void*, int32_t);
}

namespace {

constexpr int64_t kHidden = 24, kHeads = 6, kKvHeads = 2, kHeadDim = 12, kInner = 40, kVocabulary = 37, kExperts = 3;
constexpr int64_t kTokens = 150, kPages = 7, kBlock = 16;

float uniform() { return static_cast<float>(rand()) / static_cast<float>(RAND_MAX) - 0.5f; }

// Memory aligned as the layout wants it and not a byte longer.
struct Exact {
  explicit Exact(int64_t bytes) : p(aligned_alloc(64, static_cast<size_t>(qk::round_up(bytes, 64)))) {
    for (int64_t i = 0; i < bytes; ++i) static_cast<unsigned char*>(p)[i] = static_cast<unsigned char>(rand());
  }
  Exact(const Exact&) = delete;
  ~Exact() { free(p); }
  void* p;
};

struct Model {
  std::vector<Exact*> owned;
  std::vector<qk::Linear> linears;
  std::vector<qk::Mlp> mlps;
  std::vector<qk::Layer> layers;
  qk::Rotary rotary{};
  qk::Program program{};

  float* floats(int64_t count, float around = 0) {
    owned.push_back(new Exact(count * 4));
    float* p = static_cast<float*>(owned.back()->p);
    for (int64_t i = 0; i < count; ++i) p[i] = around + uniform();
    return p;
  }

  qk::Linear linear(int64_t rows, int64_t columns, bool quantized, bool narrow = false) {
    const int64_t blocks = (rows + 15) / 16, group = quantized ? 8 : columns, padded = qk::round_up(group, 8);
    qk::Linear l{};
    l.rows = rows, l.columns = columns, l.group = group, l.bias = floats(rows), l.factor = 1;
    if (quantized) {
      owned.push_back(new Exact(blocks * columns * 8));
      l.codes = owned.back()->p;
      float* scales = floats(blocks * columns / group * 16);
      for (int64_t i = 0; i < blocks * columns / group * 16; ++i) scales[i] *= 0.1f;
      l.scales = scales, l.kind = qk::kWeightU4, l.zero_code = 8, l.scale_dtype = qk::kFloat32;
    } else {
      float* values = floats(blocks * padded * 16);
      l.codes = values, l.kind = qk::kWeightFloat32;
      if (narrow) {
        owned.push_back(new Exact(blocks * padded * 32));
        for (int64_t i = 0; i < blocks * padded * 16; ++i) qk::store_one(owned.back()->p, i, qk::kBFloat16, values[i]);
        l.codes = owned.back()->p, l.kind = qk::kWeightBFloat16;
      }
    }
    return l;
  }

  qk::Norm norm(int64_t width, bool center) { return {floats(width, 1), center ? floats(width) : nullptr, width, 1e-5f, center}; }

  Model() {
    linears.reserve(64);
    mlps.reserve(16);
    const auto keep = [this](const qk::Linear& l) { linears.push_back(l); return &linears.back(); };
    for (int kind = 0; kind < 3; ++kind) {
      const bool quantized = kind != 1;
      qk::Layer layer{};
      qk::Attention& a = layer.attention;
      a.qkv = keep(linear(kHeads * kHeadDim, kHidden, quantized));
      keep(linear(kKvHeads * kHeadDim, kHidden, false, kind != 2));
      keep(linear(kKvHeads * kHeadDim, kHidden, quantized));
      a.qkv_count = 3;
      qk::Linear out = linear(kHidden, kHeads * kHeadDim, quantized);
      static const qk::Inputs tokens{nullptr, 0, kHeads * kHeadDim, 0, 127}, stored{nullptr, 0, kHeads * kHeadDim, 0.01f, 127};
      if (kind) out.inputs = kind == 1 ? &tokens : &stored;  // rounded by a scheme
      a.out = keep(out);
      a.heads = kHeads, a.kv_heads = kKvHeads, a.head_dim = a.value_dim = kHeadDim;
      a.rotary = kind == 2 ? -1 : 0, a.window = kind == 0 ? 0 : 45, a.scale = 0.3f, a.softcap = kind == 1 ? 5.0f : 0.0f;
      if (kind == 0) a.q_norm = norm(kHeads * kHeadDim, false), a.k_norm = norm(kHeadDim, true);
      layer.attention_in = norm(kHidden, kind == 1);
      if (kind == 2) layer.attention_out = norm(kHidden, false), layer.mlp_out = norm(kHidden, false);
      layer.mlp_in = norm(kHidden, false);
      layer.experts = kind == 2 ? kExperts : 0, layer.top_k = kind == 2 ? 2 : 0, layer.normalize = 1;
      if (layer.experts) layer.router = keep(linear(kExperts, kHidden, false));
      const size_t first = mlps.size();
      for (int64_t e = 0; e < std::max<int64_t>(layer.experts, 1); ++e) {
        qk::Mlp mlp{};
        mlp.gated = kind != 1, mlp.activation = kind, mlp.up_count = 1;
        mlp.up = keep(linear(kInner * (mlp.gated ? 2 : 1), kHidden, quantized));
        mlp.down = keep(linear(kHidden, kInner, quantized, true));
        mlps.push_back(mlp);
      }
      layer.mlps = &mlps[first];
      layer.attention_scale = 0.5f, layer.mlp_scale = 1.5f, layer.expert_scale = 1.0f, layer.parallel = kind == 1;
      layers.push_back(layer);
    }
    rotary = {floats(kTokens * 4), floats(kTokens * 4), kTokens, 8, 1};
    program.embedding = floats(kVocabulary * kHidden);
    program.hidden = kHidden, program.layers = layers.data(), program.layer_count = 3, program.rotaries = &rotary;
    program.head = keep(linear(kVocabulary, kHidden, true));
    program.final_norm = norm(kHidden, false);
    program.embedding_scale = 2.0f, program.logit_scale = 0.5f, program.logit_softcap = 7.0f;
  }

  ~Model() {
    for (Exact* memory : owned) delete memory;
  }
};

struct Pages {
  std::vector<Exact*> owned;
  std::vector<void*> keys, values;
  std::vector<float*> key_scales, value_scales;
  qk::Kv kv{};

  Pages(int32_t kind, const int32_t* table) {
    const int64_t heads = kPages * kKvHeads * qk::kPageTokens, size = kind == qk::kKvFloat32 ? 4 : kind == qk::kKvBFloat16 ? 2 : 1;
    for (int layer = 0; layer < 3; ++layer) {
      for (auto* list : {&keys, &values}) list->push_back(take(heads * kHeadDim * size));
      for (auto* list : {&key_scales, &value_scales}) list->push_back(static_cast<float*>(take(heads * 4)));
    }
    kv = {keys.data(), values.data(), key_scales.data(), value_scales.data(), table, kPages, kind};
  }
  void* take(int64_t bytes) { return owned.emplace_back(new Exact(bytes))->p; }
  ~Pages() {
    for (Exact* memory : owned) delete memory;
  }
};

// Logits of all tokens, read in pieces of `step` tokens.
std::vector<float> read(const Model& model, int32_t kind, int64_t step, int32_t threads, int32_t rounding) {
  std::vector<int32_t> table(kPages), slots(kTokens), positions(kTokens), tokens(kTokens), wanted(kTokens), best(kTokens);
  for (int32_t i = 0; i < kTokens; ++i) positions[i] = i, tokens[i] = i * 7 % kVocabulary, wanted[i] = i;
  for (int32_t i = 0; i < kPages; ++i) table[i] = (i * 3 + 1) % kPages;
  Pages pages(kind, table.data());
  std::vector<float> logits(kTokens * kVocabulary);
  for (int64_t start = 0; start < kTokens; start += step) {
    const int64_t count = std::min(step, kTokens - start), chunks = (start + count + qk::kChunkTokens - 1) / qk::kChunkTokens + 1;
    qk::Batch batch{count, &tokens[start], &positions[start], slots.data(), wanted.data(), count, kVocabulary,
                    &logits[start * kVocabulary], best.data(), chunks, rounding, kBlock, 0};
    Exact scratch(qk_decoder_bytes(&model.program, count, chunks, kBlock, threads));
    qk_decoder_run(&model.program, &batch, &pages.kv, scratch.p, threads);
    for (int64_t i = 0; i < count; ++i) {
      const float* row = &logits[(start + i) * kVocabulary];
      if (row[best[i]] != *std::max_element(row, row + kVocabulary)) fprintf(stderr, "wrong: argmax\n"), exit(1);
    }
  }
  return logits;
}

}  // namespace

void decoder_problems(bool few) {
  const Model model;
  for (int32_t kind = 0; kind < (few ? 1 : 3); ++kind)
    for (int32_t rounding : {0, 1 << qk::kFormInt8, 1 << qk::kFormInt8 | 1 << qk::kFormBFloat16}) {
      const std::vector<float> whole = read(model, kind, kTokens, 1, rounding);
      for (float value : whole)
        if (!(value > -7.01f && value < 7.01f)) fprintf(stderr, "wrong: a logit is %f\n", value), exit(1);
      for (int64_t step : few ? std::vector<int64_t>{3, 64} : std::vector<int64_t>{1, 2, 3, 5, 64})
        if (read(model, kind, step, 1 + static_cast<int32_t>(step) % 3, rounding) != whole)
          fprintf(stderr, "wrong: pieces of %d tokens\n", static_cast<int>(step)), exit(1);
    }
}
