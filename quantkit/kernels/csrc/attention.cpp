// Attention over paged keys and values, for any number of rows of any sequences.
//
// A row's context is read in chunks of kChunkTokens keys. For each chunk and query, the scores are computed, their maximum m,
// the sum s of exp(score - m), and the weighted sum of the values. Chunks are merged in order (the running maximum of Milakov
// and Gimelshein 2018, arXiv:1805.02867), so a row's result depends neither on the other rows of the call nor on the threads,
// whether one thread reads the whole context or each chunk has its own (few rows: kSplitRows).
#include <cmath>

#include "decoder.h"
#include "kv.h"

namespace qk {
namespace {

constexpr int kQueries = kWidth == 16 ? 8 : 4;               // queries whose sums are in registers at the same time
constexpr int kTokenParts = static_cast<int>(kPageTokens) / kWidth;  // registers per channel of a page
constexpr int kTokenStep = kTokenParts < 2 ? kTokenParts : 2;

// The pages of one sequence, for one layer and key/value head.
template <typename T>
struct Context {
  const typename T::Stored *keys, *values;
  const float *key_scales, *value_scales;
  const int32_t* pages;
  int64_t key_stride, value_stride, scale_stride;

  Context(const AttentionJob& job, int64_t slot, int64_t head) {
    const Attention& a = *job.a;
    const Kv& kv = *job.kv;
    scale_stride = a.kv_heads * kPageTokens;
    key_stride = scale_stride * a.head_dim;
    value_stride = scale_stride * a.value_dim;
    pages = kv.block_table + slot * kv.table_stride;
    keys = static_cast<const typename T::Stored*>(kv.keys[job.layer]) + head * kPageTokens * a.head_dim;
    values = static_cast<const typename T::Stored*>(kv.values[job.layer]) + head * kPageTokens * a.value_dim;
    const bool scaled = kv.kind == kKvInt8;
    key_scales = scaled ? kv.key_scales[job.layer] + head * kPageTokens : nullptr;
    value_scales = scaled ? kv.value_scales[job.layer] + head * kPageTokens : nullptr;
  }
  const typename T::Stored* keys_of(int64_t page) const { return keys + pages[page] * key_stride; }
  const typename T::Stored* values_of(int64_t page) const { return values + pages[page] * value_stride; }
};

// Prefetch `bytes` of the next page, from byte `at` on. Pages may be anywhere; the hardware prefetches neighbouring memory
// only.
inline void fetch(const void* next, int64_t at, int64_t bytes) {
  for (int64_t i = (at + 63) / 64 * 64; i < at + bytes; i += 64) __builtin_prefetch(static_cast<const char*>(next) + i);
}

// Scores of Q queries with the keys of one page: scores[q][token]. `next` is the page that is read afterwards.
template <typename T, int Q>
void page_scores(const typename T::Stored* keys, const void* next, int64_t head_dim, const float* const* queries,
                 float* scores) {
  constexpr int64_t kBytes = kPageTokens * static_cast<int64_t>(sizeof(typename T::Stored));  // per channel
  for (int part = 0; part < kTokenParts; part += kTokenStep) {
    Floats sum[Q][kTokenStep] = {};
    const typename T::Stored* at = keys + part * kWidth;
    for (int64_t d = 0; d < head_dim; ++d, at += kPageTokens) {
      if (part == 0) fetch(next, d * kBytes, kBytes);
      Floats key[kTokenStep];
      for (int t = 0; t < kTokenStep; ++t) key[t] = T::load(at + t * kWidth);
      for (int q = 0; q < Q; ++q)
        for (int t = 0; t < kTokenStep; ++t) sum[q][t] += key[t] * queries[q][d];
    }
    for (int q = 0; q < Q; ++q)
      for (int t = 0; t < kTokenStep; ++t) store(scores + q * kChunkTokens + (part + t) * kWidth, sum[q][t]);
  }
}

// acc[q][0..width) += sum over tokens of weight[q][token] * value[token], for one page; `next` is the page that is read
// afterwards.
template <typename T, int Q, int PARTS>
void page_values(const typename T::Stored* values, const void* next, int64_t head_dim, int64_t tokens, const float* weights,
                 float* const* acc) {
  constexpr int64_t kSize = sizeof(typename T::Stored), kBytes = PARTS * kWidth * kSize;
  Floats sum[Q][PARTS];
  for (int q = 0; q < Q; ++q)
    for (int p = 0; p < PARTS; ++p) sum[q][p] = load(acc[q] + p * kWidth);
  for (int64_t t = 0; t < tokens; ++t, values += head_dim) {
    fetch(next, t * head_dim * kSize, kBytes);
    Floats value[PARTS];
    for (int p = 0; p < PARTS; ++p) value[p] = T::load(values + p * kWidth);
    for (int q = 0; q < Q; ++q)
      for (int p = 0; p < PARTS; ++p) sum[q][p] += value[p] * weights[q * kChunkTokens + t];
  }
  for (int q = 0; q < Q; ++q)
    for (int p = 0; p < PARTS; ++p) store(acc[q] + p * kWidth, sum[q][p]);
}

template <typename T, int Q>
void add_values(const typename T::Stored* values, const void* next, int64_t head_dim, int64_t tokens, const float* weights,
                float* const* acc) {
  constexpr int kParts = Q > 4 ? 2 : 4;  // as many sums as fit in registers
  int64_t d = 0;
  float* at[Q];
  const auto following = [&] { return static_cast<const char*>(next) + d * static_cast<int64_t>(sizeof(typename T::Stored)); };
  for (; d + kParts * kWidth <= head_dim; d += kParts * kWidth) {
    for (int q = 0; q < Q; ++q) at[q] = acc[q] + d;
    page_values<T, Q, kParts>(values + d, following(), head_dim, tokens, weights, at);
  }
  for (; d + kWidth <= head_dim; d += kWidth) {
    for (int q = 0; q < Q; ++q) at[q] = acc[q] + d;
    page_values<T, Q, 1>(values + d, following(), head_dim, tokens, weights, at);
  }
  for (; d < head_dim; ++d)
    for (int q = 0; q < Q; ++q)
      for (int64_t t = 0; t < tokens; ++t) acc[q][d] += T::one(values[t * head_dim + d]) * weights[q * kChunkTokens + t];
}

// The partial result of one query and chunk: m, s, then value_dim weighted values.
struct Query {
  const float* q;
  int64_t first, last;  // the keys that it sees
  float* partial;
  float slope;
};

float slope_of(const Attention& a, int64_t head) { return a.slopes ? a.slopes[head] : 0.0f; }

// Convert the scores of a query in a chunk (from, to) to weights exp(score - m), 0 for keys it does not see; set m and their
// sum s.
void weigh(const Attention& a, const Query& query, int64_t start, int64_t from, int64_t to, float* row) {
  const int64_t begin = query.first - start, end = query.last - start;
  const Floats never = splat(-INFINITY);
  from = from / kWidth * kWidth;
  Floats most = never;
  for (int64_t t = from; t < to; t += kWidth) {
    Floats score = load(row + t) * a.scale;
    if (a.softcap > 0)
      for (int lane = 0; lane < kWidth; ++lane) score[lane] = a.softcap * tanhf(score[lane] / a.softcap);
    if (query.slope != 0)
      for (int lane = 0; lane < kWidth; ++lane) score[lane] += query.slope * static_cast<float>(t + lane + 1 - end);
    if (t < begin || t + kWidth > end)
      for (int lane = 0; lane < kWidth; ++lane)
        if (t + lane < begin || t + lane >= end) score[lane] = -INFINITY;
    most = score > most ? score : most;
    store(row + t, score);
  }
  float m = -INFINITY, s = 0;
  for (int lane = 0; lane < kWidth; ++lane) m = most[lane] > m ? most[lane] : m;
  const float base = m == -INFINITY ? 0 : m;
  Floats total = {};
  for (int64_t t = from; t < to; t += kWidth) {
    Floats score = load(row + t), weight = exp_floats(score - base);
    weight = score == never ? Floats{} : weight;
    total += weight;
    store(row + t, weight);
  }
  for (int lane = 0; lane < kWidth; ++lane) s += total[lane];
  query.partial[0] = m;
  query.partial[1] = s;
}

template <typename T, int Q>
void chunk(const AttentionJob& job, const Context<T>& context, int64_t start, const Query* queries, const void* after) {
  const Attention& a = *job.a;
  alignas(64) float scores[Q * kChunkTokens];
  const float* q[Q];
  float* acc[Q];
  int64_t low = INT64_MAX, high = 0;
  for (int i = 0; i < Q; ++i) {
    q[i] = queries[i].q;
    acc[i] = queries[i].partial + 2;
    low = queries[i].first < low ? queries[i].first : low;
    high = queries[i].last > high ? queries[i].last : high;
    for (int64_t d = 0; d < a.value_dim; ++d) acc[i][d] = 0;
  }
  low = low > start ? low : start;
  high = high < start + kChunkTokens ? high : start + kChunkTokens;
  const int64_t first_page = low / kPageTokens, last_page = (high + kPageTokens - 1) / kPageTokens;
  for (int64_t page = first_page; page < last_page; ++page) {
    float* at = scores + page * kPageTokens - start;
    const typename T::Stored* next = page + 1 < last_page ? context.keys_of(page + 1) : context.values_of(first_page);
    page_scores<T, Q>(context.keys_of(page), next, a.head_dim, q, at);
    if (!context.key_scales) continue;
    const float* scales = context.key_scales + context.pages[page] * context.scale_stride;
    for (int i = 0; i < Q; ++i)
      for (int64_t t = 0; t < kPageTokens; t += kWidth)
        store(at + i * kChunkTokens + t, load(at + i * kChunkTokens + t) * load(scales + t));
  }
  for (int i = 0; i < Q; ++i) weigh(a, queries[i], start, low - start, high - start, scores + i * kChunkTokens);
  for (int64_t page = first_page; page < last_page; ++page) {
    float* weights = scores + page * kPageTokens - start;
    const int64_t skipped = low > page * kPageTokens ? low - page * kPageTokens : 0;
    const int64_t tokens = high < (page + 1) * kPageTokens ? high - page * kPageTokens : kPageTokens;
    if (context.value_scales) {
      const float* scales = context.value_scales + context.pages[page] * context.scale_stride;
      for (int i = 0; i < Q; ++i)
        for (int64_t t = skipped; t < tokens; ++t) weights[i * kChunkTokens + t] *= scales[t];
    }
    const void* next = page + 1 < last_page ? context.values_of(page + 1) : after;
    add_values<T, Q>(context.values_of(page) + skipped * a.value_dim, next, a.value_dim, tokens - skipped, weights + skipped, acc);
  }
}

// `after` is the page that is read after the chunk.
template <typename T>
void chunks(const AttentionJob& job, const Context<T>& context, int64_t start, const Query* queries, int64_t count,
            const void* after) {
  int64_t i = 0;
  if constexpr (kQueries > 4)
    for (; i + kQueries <= count; i += kQueries) chunk<T, kQueries>(job, context, start, queries + i, after);
  for (; i + 4 <= count; i += 4) chunk<T, 4>(job, context, start, queries + i, after);
  if (i + 3 == count) return chunk<T, 3>(job, context, start, queries + i, after);
  if (i + 2 == count) return chunk<T, 2>(job, context, start, queries + i, after);
  if (i + 1 == count) chunk<T, 1>(job, context, start, queries + i, after);
}

// Merge the partial result of a chunk into the running one; the first chunk is copied.
void merge(float* running, const float* partial, int64_t value_dim) {
  if (partial[0] == -INFINITY) return;
  const float m = running[0] > partial[0] ? running[0] : partial[0];
  const float old = running[0] == -INFINITY ? 0.0f : expf(running[0] - m), fresh = expf(partial[0] - m);
  running[0] = m;
  for (int64_t i = 1; i < value_dim + 2; ++i) running[i] = running[i] * old + partial[i] * fresh;
}

void finish(const Attention& a, int64_t head, const float* running, float* out) {
  float scale = 1.0f / running[1];
  if (a.sinks) {
    const float sink = a.sinks[head], m = running[0] > sink ? running[0] : sink, own = expf(running[0] - m);
    scale = own / (running[1] * own + expf(sink - m));
  }
  for (int64_t d = 0; d < a.value_dim; ++d) out[d] = running[2 + d] * scale;
}

struct Span {
  int64_t first, last;  // the keys that a row sees
  int64_t first_chunk, last_chunk;
};

Span span(const AttentionJob& job, int64_t row) {
  const int64_t last = job.batch->positions[row] + 1, window = job.a->window;
  int64_t first = window > 0 && last > window ? last - window : 0;
  if (job.a->chunk > 0 && (last - 1) / job.a->chunk * job.a->chunk > first) first = (last - 1) / job.a->chunk * job.a->chunk;
  return {first, last, first / kChunkTokens, (last + kChunkTokens - 1) / kChunkTokens};
}

float* partial_at(const AttentionJob& job, int64_t row, int64_t head, int64_t chunk_index) {
  return job.partial + ((row * job.a->heads + head) * job.batch->chunks + chunk_index) * (job.a->value_dim + 2);
}

constexpr int64_t kBlockQueries = 32;  // queries that read a chunk together, while it is in the cache

// Few rows: distribute all chunks of all rows and key/value heads over the threads.
template <typename T>
void split_share(const AttentionJob& job, const Member& me) {
  const Attention& a = *job.a;
  const int64_t group = a.heads / a.kv_heads;
  int64_t item = 0;
  for (int64_t row = 0; row < job.batch->rows; ++row) {
    const Span seen = span(job, row);
    for (int64_t c = seen.first_chunk; c < seen.last_chunk; ++c)
      for (int64_t kv_head = 0; kv_head < a.kv_heads; ++kv_head, ++item) {
        if (item % me.count != me.index) continue;
        const Context<T> context(job, job.batch->slots[row], kv_head);
        const int64_t far = kv_head + me.count, next_chunk = c + far / a.kv_heads;  // the one that I read next
        const Context<T> further(job, job.batch->slots[row], far % a.kv_heads);
        const void* after = further.keys_of((next_chunk < seen.last_chunk ? next_chunk : c) * kChunkTokens / kPageTokens);
        for (int64_t g = 0; g < group; g += kBlockQueries) {
          Query queries[kBlockQueries];
          const int64_t count = group - g < kBlockQueries ? group - g : kBlockQueries;
          for (int64_t i = 0; i < count; ++i) {
            const int64_t head = kv_head * group + g + i;
            queries[i] = {query_at(job, row, head), seen.first, seen.last, partial_at(job, row, head, c - seen.first_chunk),
                          slope_of(a, head)};
          }
          chunks<T>(job, context, c * kChunkTokens, queries, count, after);
        }
      }
  }
}

// Attention of queries of one sequence and key/value head, chunk by chunk; `after` is the page that is read afterwards.
template <typename T>
void block(const AttentionJob& job, int64_t row, int64_t rows, int64_t kv_head, int64_t g, int64_t per_row, const void* after) {
  const Attention& a = *job.a;
  const int64_t size = a.value_dim + 2, count = rows * per_row;
  alignas(64) float running[kBlockQueries * (kMaxHeadDim + 2)], fresh[kQueries * (kMaxHeadDim + 2)];
  Query queries[kBlockQueries];
  int64_t first_chunk = INT64_MAX, last_chunk = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Span seen = span(job, row + i / per_row);
    const int64_t head = kv_head * (a.heads / a.kv_heads) + g + i % per_row;
    queries[i] = {query_at(job, row + i / per_row, head), seen.first, seen.last, fresh + i % kQueries * size, slope_of(a, head)};
    running[i * size] = -INFINITY;
    for (int64_t d = 1; d < size; ++d) running[i * size + d] = 0;
    first_chunk = seen.first_chunk < first_chunk ? seen.first_chunk : first_chunk;
    last_chunk = seen.last_chunk > last_chunk ? seen.last_chunk : last_chunk;
  }
  const Context<T> context(job, job.batch->slots[row], kv_head);
  for (int64_t c = first_chunk; c < last_chunk; ++c) {
    const int64_t start = c * kChunkTokens;
    const void* further = c + 1 < last_chunk ? context.keys_of((start + kChunkTokens) / kPageTokens) : after;
    for (int64_t i = 0; i < count; i += kQueries) {
      const int64_t some = count - i < kQueries ? count - i : kQueries;
      int64_t used = 0;
      Query seeing[kQueries];  // the queries that see keys of this chunk
      int64_t index[kQueries];
      for (int64_t j = i; j < i + some; ++j)
        if (queries[j].first < start + kChunkTokens && queries[j].last > start) {
          seeing[used] = queries[j];
          index[used++] = j;
        }
      chunks<T>(job, context, start, seeing, used, i + kQueries < count ? context.keys_of(start / kPageTokens) : further);
      for (int64_t j = 0; j < used; ++j) merge(running + index[j] * size, seeing[j].partial, a.value_dim);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t head = kv_head * (a.heads / a.kv_heads) + g + i % per_row;
    finish(a, head, running + i * size, job.out + (row + i / per_row) * job.out_stride + head * a.value_dim);
  }
}

// Many rows: neighbouring rows of one sequence read their context together.
template <typename T>
void block_share(const AttentionJob& job, const Member& me) {
  const Attention& a = *job.a;
  const int64_t group = a.heads / a.kv_heads, per_row = group < kBlockQueries ? group : kBlockQueries;
  const int64_t most = kBlockQueries / per_row;
  int64_t item = 0;
  for (int64_t row = 0, rows; row < job.batch->rows; row += rows) {
    rows = 1;
    while (rows < most && row + rows < job.batch->rows && job.batch->slots[row + rows] == job.batch->slots[row]) ++rows;
    for (int64_t kv_head = 0; kv_head < a.kv_heads; ++kv_head)
      for (int64_t g = 0; g < group; g += per_row, ++item) {
        if (item % me.count != me.index) continue;
        const int64_t far = kv_head + me.count, own = far < a.kv_heads ? row : row + rows;  // what I read next, or near it
        const int64_t next = own < job.batch->rows ? own : row;
        const Context<T> further(job, job.batch->slots[next], far % a.kv_heads);
        const void* after = further.keys_of(span(job, next).first_chunk * kChunkTokens / kPageTokens);
        block<T>(job, row, rows, kv_head, g, group - g < per_row ? group - g : per_row, after);
      }
  }
}

template <typename T>
void attend(const AttentionJob& job, const Member& me) {
  job.partial ? split_share<T>(job, me) : block_share<T>(job, me);
}

}  // namespace

int64_t attention_partial_floats(const Attention& a) { return a.heads * (a.value_dim + 2); }

void attention_share(const AttentionJob& job, const Member& me) {
  switch (job.kv->kind) {
    case kKvFloat32: return attend<Float32>(job, me);
    case kKvBFloat16: return attend<BFloat16>(job, me);
    default: return attend<Int8>(job, me);
  }
}

void merge_row(const AttentionJob& job, int64_t row, float* out) {
  const Attention& a = *job.a;
  const Span seen = span(job, row);
  alignas(64) float running[kMaxHeadDim + 2];
  for (int64_t head = 0; head < a.heads; ++head) {
    running[0] = -INFINITY;
    for (int64_t d = 1; d < a.value_dim + 2; ++d) running[d] = 0;
    for (int64_t c = seen.first_chunk; c < seen.last_chunk; ++c)
      merge(running, partial_at(job, row, head, c - seen.first_chunk), a.value_dim);
    finish(a, head, running, out + head * a.value_dim);
  }
}

}  // namespace qk
