// Choosing codes: the search for scales and zero points, the column sweep of GPTQ, and coordinate descent after it.
//
// quantkit/numerics/search.py, sweep.py and descent.py define the algorithms; here they do not pass through memory in every
// step. Results do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <memory>
#include <new>

#include "parallel.h"
#include "vector.h"

#define QK_EXPORT extern "C" __attribute__((visibility("default")))

namespace qk {
namespace {

constexpr int kRows = 4 * kWidth;  // rows of w in a sweep, one per lane
constexpr int64_t kColumns = 64;   // columns whose updates of the later columns are collected and applied together

// Adding and subtracting 1.5 * 2^23 rounds to the nearest integer, ties to even, for |x| < 2^22.
inline Floats nearest(Floats x) { return (x + 0x1.8p23f) - 0x1.8p23f; }

inline Floats clamp(Floats x, Floats low, Floats high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

inline float sum(Floats x) {
  float total = 0;
  for (int i = 0; i < kWidth; ++i) total += x[i];
  return total;
}

float round_to(float scale, int32_t dtype) {
  if (scale == 0) return 1;
  if (dtype == kFloat32) return scale;
  uint16_t raw;
  store_one(&raw, 0, dtype, scale);
  float stored = load_one(&raw, 0, dtype);
  return stored != 0 ? stored : dtype == kFloat16 ? 0x1p-14f : 0x1p-126f;
}

struct Search {
  const float* weight;      // (rows, columns)
  const float* importance;  // (columns,)
  const float* ratios;
  float* scale;   // (rows, columns / group)
  uint8_t* zero;  // (rows, columns / group)
  int64_t columns, group, ratio_count;
  int32_t top, zero_code, scale_dtype, refit;  // zero_code < 0: asymmetric
};

struct Fit {
  float cross, norm;  // sum h w l, sum h l^2 over the levels l of a group
};

Fit fit(const float* w, const float* hw, const float* h, int64_t size, float scale, float zero, int32_t top) {
  const Floats inverse = splat(1 / scale), low = splat(-zero), high = splat(top - zero);
  Floats cross{}, norm{};
  for (int64_t i = 0; i < size; i += kWidth) {
    const Floats level = nearest(clamp(*reinterpret_cast<const FloatsAnywhere*>(w + i) * inverse, low, high));
    cross += *reinterpret_cast<const FloatsAnywhere*>(hw + i) * level;
    norm += *reinterpret_cast<const FloatsAnywhere*>(h + i) * level * level;
  }
  return {sum(cross), sum(norm)};
}

void search_group(const Search& s, const float* w, const float* hw, const float* h, int64_t size, float* scale, uint8_t* zero) {
  float low = 0, high = 0;
  for (int64_t i = 0; i < size; ++i) low = std::min(low, w[i]), high = std::max(high, w[i]);
  const bool symmetric = s.zero_code >= 0;
  const float base = symmetric ? std::max(-low, high) * (2.0f / s.top) : (high - low) / s.top;
  float best = INFINITY;
  *scale = round_to(base, s.scale_dtype), *zero = 0;  // kept if no candidate has a finite loss; the caller refuses it
  for (int64_t r = 0; r < (symmetric ? 2 : 1) * s.ratio_count; ++r) {  // symmetric: once with either sign
    const float ratio = r < s.ratio_count ? s.ratios[r] : -s.ratios[r - s.ratio_count];
    float tried = round_to(base * ratio, s.scale_dtype);
    const float offset = symmetric ? static_cast<float>(s.zero_code)
                                   : std::min(std::max(std::nearbyint(-low * ratio / tried), 0.0f), float(s.top));
    for (int attempt = 0; attempt <= s.refit; ++attempt) {
      const Fit f = fit(w, hw, h, size, tried, offset, s.top);
      // sum h (w - s l)^2 minus sum h w^2, which is the same for all candidates
      const float loss = tried * (tried * f.norm - 2 * f.cross);
      if (loss < best) best = loss, *scale = tried, *zero = static_cast<uint8_t>(offset);
      if (!(f.norm > 0 && f.cross * tried > 0)) break;
      tried = round_to(f.cross / f.norm, s.scale_dtype);
    }
  }
}

void search_rows(const void* job, int64_t begin, int64_t end) {
  const Search& s = *static_cast<const Search*>(job);
  const int64_t size = (s.group + kWidth - 1) / kWidth * kWidth, groups = s.columns / s.group;
  std::unique_ptr<float[]> memory(new float[3 * size]());
  float *w = memory.get(), *hw = w + size, *h = hw + size;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t i = 0; i < s.group; ++i) {
        w[i] = s.weight[row * s.columns + g * s.group + i];
        h[i] = s.importance[g * s.group + i];
        hw[i] = h[i] * w[i];
      }
      const int64_t at = row * groups + g;
      search_group(s, w, hw, h, size, s.scale + at, s.zero + at);
    }
  }
}

struct Sweep {
  const float* weight;    // (columns, rows), in the order of the sweep
  const float* scale;     // (columns, rows)
  const float* zero;      // (columns, rows), or null
  const float* factor;    // U transposed: (columns, columns), lower triangular
  uint8_t* codes;         // (columns, rows)
  int64_t columns, rows;  // rows padded to a multiple of kRows
  int32_t top;
  float zero_code;
};

typedef Floats Tile[4];

inline void load(Tile& tile, const float* p) {
  for (int i = 0; i < 4; ++i) tile[i] = *reinterpret_cast<const FloatsAnywhere*>(p + i * kWidth);
}

// Subtract factor[j][first..last) * errors from column j.
inline void update(float* column, const float* factor, const float* errors, int64_t count) {
  Tile total;
  load(total, column);
  for (int64_t k = 0; k < count; ++k) {
    const Floats u = splat(factor[k]);
    Tile error;
    load(error, errors + k * kRows);
    for (int i = 0; i < 4; ++i) total[i] -= u * error[i];
  }
  for (int i = 0; i < 4; ++i) *reinterpret_cast<FloatsAnywhere*>(column + i * kWidth) = total[i];
}

void round_column(const Sweep& s, const float* column, int64_t at, float inverse_diagonal, float* error) {
  for (int i = 0; i < 4; ++i) {
    const Floats w = *reinterpret_cast<const FloatsAnywhere*>(column + i * kWidth);
    const Floats scale = *reinterpret_cast<const FloatsAnywhere*>(s.scale + at + i * kWidth);
    const Floats zero = s.zero ? (Floats)*reinterpret_cast<const FloatsAnywhere*>(s.zero + at + i * kWidth) : splat(s.zero_code);
    const Floats level = nearest(clamp(w / scale, -zero, static_cast<float>(s.top) - zero));
    *reinterpret_cast<FloatsAnywhere*>(error + i * kWidth) = (w - level * scale) * inverse_diagonal;
    const Floats code = level + zero;
    for (int lane = 0; lane < kWidth; ++lane) s.codes[at + i * kWidth + lane] = static_cast<uint8_t>(code[lane]);
  }
}

void sweep_rows(const void* job, int64_t begin, int64_t end) {
  const Sweep& s = *static_cast<const Sweep*>(job);
  std::unique_ptr<float[]> memory(new float[(s.columns + kColumns) * kRows]);
  float *w = memory.get(), *errors = w + s.columns * kRows;
  for (int64_t tile = begin; tile < end; ++tile) {
    for (int64_t k = 0; k < s.columns; ++k) memcpy(w + k * kRows, s.weight + k * s.rows + tile * kRows, kRows * 4);
    for (int64_t first = 0; first < s.columns; first += kColumns) {
      const int64_t last = std::min(first + kColumns, s.columns);
      for (int64_t k = first; k < last; ++k) {
        const float* row = s.factor + k * s.columns;
        update(w + k * kRows, row + first, errors, k - first);
        round_column(s, w + k * kRows, k * s.rows + tile * kRows, 1 / row[k], errors + (k - first) * kRows);
      }
      for (int64_t j = last; j < s.columns; ++j) update(w + j * kRows, s.factor + j * s.columns + first, errors, last - first);
    }
  }
}

struct Descent {
  float* residual;        // (columns, rows): (W - Q) H transposed, in the order of the descent; overwritten
  const float* scale;     // (columns, rows)
  const float* zero;      // (columns, rows), or null
  const float* hessian;   // (columns, columns)
  uint8_t* codes;         // (columns, rows), in and out
  int64_t columns, rows;  // rows padded to a multiple of kRows
  int32_t top;
  float zero_code;
};

// Set one column to the best codes with all others fixed; `moves` receives the changes of the weights.
void improve_column(const Descent& d, const float* column, int64_t at, float inverse_diagonal, float* moves) {
  for (int i = 0; i < 4; ++i, at += kWidth, moves += kWidth) {
    const Floats scale = *reinterpret_cast<const FloatsAnywhere*>(d.scale + at);
    const Floats zero = d.zero ? (Floats)*reinterpret_cast<const FloatsAnywhere*>(d.zero + at) : splat(d.zero_code);
    const Floats level = to_floats(load_bytes(d.codes + at)) - zero;
    const Floats wanted = level + *reinterpret_cast<const FloatsAnywhere*>(column + i * kWidth) * inverse_diagonal / scale;
    const Floats better = nearest(clamp(wanted, -zero, static_cast<float>(d.top) - zero));
    *reinterpret_cast<FloatsAnywhere*>(moves) = (better - level) * scale;
    const Floats code = better + zero;
    for (int lane = 0; lane < kWidth; ++lane) d.codes[at + lane] = static_cast<uint8_t>(code[lane]);
  }
}

void descend_rows(const void* job, int64_t begin, int64_t end) {
  const Descent& d = *static_cast<const Descent*>(job);
  std::unique_ptr<float[]> memory(new float[(d.columns + kColumns) * kRows]);
  float *r = memory.get(), *moves = r + d.columns * kRows;
  for (int64_t tile = begin; tile < end; ++tile) {
    for (int64_t k = 0; k < d.columns; ++k) memcpy(r + k * kRows, d.residual + k * d.rows + tile * kRows, kRows * 4);
    for (int64_t first = 0; first < d.columns; first += kColumns) {
      const int64_t last = std::min(first + kColumns, d.columns);
      for (int64_t k = first; k < last; ++k) {
        const float* row = d.hessian + k * d.columns;
        update(r + k * kRows, row + first, moves, k - first);
        improve_column(d, r + k * kRows, k * d.rows + tile * kRows, 1 / row[k], moves + (k - first) * kRows);
      }
      for (int64_t j = last; j < d.columns; ++j) update(r + j * kRows, d.hessian + j * d.columns + first, moves, last - first);
    }
  }
}

}  // namespace
}  // namespace qk

QK_EXPORT int32_t qk_sweep_rows() { return qk::kRows; }

QK_EXPORT int32_t qk_search(const float* weight, const float* importance, const float* ratios, float* scale, uint8_t* zero,
                            int64_t rows, int64_t columns, int64_t group, int64_t ratio_count, int32_t top, int32_t zero_code,
                            int32_t scale_dtype, int32_t refit, int32_t threads) {
  qk::Search job{weight, importance, ratios, scale, zero, columns, group, ratio_count, top, zero_code, scale_dtype, refit};
  qk::parallel_for(rows, 16, threads, qk::search_rows, &job);
  return 0;
}

QK_EXPORT int32_t qk_sweep(const float* weight, const float* scale, const float* zero, const float* factor, uint8_t* codes,
                           int64_t columns, int64_t rows, int32_t top, int32_t zero_code, int32_t threads) {
  qk::Sweep job{weight, scale, zero, factor, codes, columns, rows, top, static_cast<float>(zero_code)};
  qk::parallel_for(rows / qk::kRows, 1, threads, qk::sweep_rows, &job);
  return 0;
}

QK_EXPORT int32_t qk_descend(float* residual, const float* scale, const float* zero, const float* hessian, uint8_t* codes,
                             int64_t columns, int64_t rows, int32_t top, int32_t zero_code, int32_t threads) {
  qk::Descent job{residual, scale, zero, hessian, codes, columns, rows, top, static_cast<float>(zero_code)};
  qk::parallel_for(rows / qk::kRows, 1, threads, qk::descend_rows, &job);
  return 0;
}
