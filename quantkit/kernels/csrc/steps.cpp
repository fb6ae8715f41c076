// Arithmetic of a tape on the values of one row.
//
// Maps run along the innermost axis in blocks: an operand that is contiguous is read where it is, any other is gathered into a
// small buffer first, so that the arithmetic itself always has whole registers.
#include <cmath>
#include <cstring>

#include "tape.h"

namespace qk {
namespace {

constexpr int64_t kBlock = 128;

const float* base(const Operand& x, const float* arena) { return (x.constant ? x.constant : arena) + x.offset; }

// Call f(offsets of the operands, offset of the result) for every index of the outer axes.
template <typename F>
void each_outer(const TapeStep& s, int operands, const float* const* from, const int64_t* out_strides, F f) {
  const int outer = s.axes - 1;
  int64_t index[kAxes] = {}, at[kOperands] = {}, to = 0;
  for (;;) {
    const float* p[kOperands];
    for (int j = 0; j < operands; ++j) p[j] = from[j] + at[j];
    f(p, to);
    int axis = outer - 1;
    for (; axis >= 0; --axis) {
      ++index[axis];
      to += out_strides[axis];
      for (int j = 0; j < operands; ++j) at[j] += s.in[j].strides[axis];
      if (index[axis] < s.shape[axis]) break;
      to -= out_strides[axis] * s.shape[axis];
      for (int j = 0; j < operands; ++j) at[j] -= s.in[j].strides[axis] * s.shape[axis];
      index[axis] = 0;
    }
    if (axis < 0) return;
  }
}

// Elements [i, i + n) of an operand along the innermost axis, contiguous.
const float* block_of(const float* p, int64_t stride, int64_t i, int64_t n, float* buffer) {
  if (stride == 1) return p + i;
  for (int64_t k = 0; k < n; ++k) buffer[k] = p[(i + k) * stride];
  return buffer;
}

template <int N, typename F>
void map(const TapeStep& s, float* arena, F f) {
  const float* from[kOperands];
  for (int j = 0; j < N; ++j) from[j] = base(s.in[j], arena);
  int64_t strides[kAxes];
  strides[s.axes - 1] = 1;
  for (int axis = s.axes - 2; axis >= 0; --axis) strides[axis] = strides[axis + 1] * s.shape[axis + 1];
  const int64_t length = s.shape[s.axes - 1];
  float* out = arena + s.out;
  alignas(64) float buffers[N][kBlock + kWidth];
  each_outer(s, N, from, strides, [&](const float* const* p, int64_t to) {
    for (int64_t i = 0; i < length; i += kBlock) {
      const int64_t n = length - i < kBlock ? length - i : kBlock;
      const float* x[N];
      for (int j = 0; j < N; ++j) x[j] = block_of(p[j], s.in[j].strides[s.axes - 1], i, n, buffers[j]);
      int64_t k = 0;
      for (; k + kWidth <= n; k += kWidth) {
        Floats v[N];
        for (int j = 0; j < N; ++j) v[j] = load(x[j] + k);
        store(out + to + i + k, f(v));
      }
      if (k == n) continue;
      Floats v[N];
      for (int j = 0; j < N; ++j) {
        v[j] = Floats{};
        for (int64_t l = k; l < n; ++l) v[j][l - k] = x[j][l];
      }
      const Floats y = f(v);
      for (int64_t l = k; l < n; ++l) out[to + i + l] = y[l - k];
    }
  });
}

template <typename F>
Floats lanes(Floats x, F f) {
  Floats y;
  for (int i = 0; i < kWidth; ++i) y[i] = f(x[i]);
  return y;
}

Floats select(Ints mask, Floats a, Floats b) { return mask ? a : b; }
Floats truth(Ints mask) { return mask ? splat(1.0f) : Floats{}; }

// exp with its limits; exp_floats itself stops short of them.
Floats exponential(Floats x) {
  Floats y = exp_floats(x);
  y = x < -87.3f ? Floats{} : y;
  return x > 88.7f ? splat(INFINITY) : y;
}

Floats logistic(Floats x) { return 1.0f / (1.0f + exp_floats(-x)); }

Floats hyperbolic_tangent(Floats x) {
  const Floats square = x * x, small = x * (1.0f + square * (-0.333333333f + square * 0.133333333f));
  const Floats large = 1.0f - 2.0f / (1.0f + exp_floats(2.0f * x));
  return select((x < 0.1f) & (x > -0.1f), small, large);
}

void run_map(const TapeStep& s, float* arena) {
  typedef const Floats* V;
  switch (s.kind) {
    case 0: return map<1>(s, arena, [](V v) { return v[0]; });
    case 1: return map<1>(s, arena, [](V v) { return -v[0]; });
    case 2: return map<1>(s, arena, [](V v) { return select(v[0] < 0.0f, -v[0], v[0]); });
    case 3: return map<1>(s, arena, [](V v) { return exponential(v[0]); });
    case 4: return map<1>(s, arena, [](V v) { return lanes(v[0], [](float x) { return logf(x); }); });
    case 5: return map<1>(s, arena, [](V v) { return lanes(v[0], [](float x) { return sqrtf(x); }); });
    case 6: return map<1>(s, arena, [](V v) { return 1.0f / lanes(v[0], [](float x) { return sqrtf(x); }); });
    case 7: return map<1>(s, arena, [](V v) { return 1.0f / v[0]; });
    case 8: return map<1>(s, arena, [](V v) { return v[0] * v[0]; });
    case 9: return map<1>(s, arena, [](V v) { return logistic(v[0]); });
    case 10: return map<1>(s, arena, [](V v) { return hyperbolic_tangent(v[0]); });
    case 11: return map<1>(s, arena, [](V v) { return v[0] * logistic(v[0]); });
    case 12: return map<1>(s, arena, [](V v) {
      return 0.5f * v[0] * (1.0f + lanes(v[0] * 0.70710678f, [](float x) { return erff(x); }));
    });
    case 13: return map<1>(s, arena, [](V v) { return v[0] * logistic(1.59576912f * (v[0] + 0.044715f * v[0] * v[0] * v[0])); });
    case 14: return map<1>(s, arena, [](V v) { return select(v[0] > 0.0f, v[0], Floats{}); });
    case 15: return map<1>(s, arena, [](V v) { return lanes(v[0], [](float x) { return x > 20 ? x : log1pf(expf(x)); }); });
    case 16: return map<1>(s, arena, [](V v) { return lanes(v[0], [](float x) { return sinf(x); }); });
    case 17: return map<1>(s, arena, [](V v) { return lanes(v[0], [](float x) { return cosf(x); }); });
    case 18: return map<1>(s, arena, [](V v) { return lanes(v[0], [](float x) { return erff(x); }); });
    case 19: return map<1>(s, arena, [](V v) { return lanes(v[0], [](float x) { return floorf(x); }); });
    case 20: return map<1>(s, arena, [](V v) { return truth(v[0] > 0.0f) - truth(v[0] < 0.0f); });
    case 21: return map<1>(s, arena, [](V v) { return lanes(v[0], [](float x) { return expm1f(x); }); });
    case 22: return map<1>(s, arena, [](V v) { return lanes(v[0], [](float x) { return log1pf(x); }); });
    case 23: return map<1>(s, arena, [](V v) { return truth(v[0] == 0.0f); });
    case 24: return map<2>(s, arena, [](V v) { return v[0] + v[1]; });
    case 25: return map<2>(s, arena, [](V v) { return v[0] - v[1]; });
    case 26: return map<2>(s, arena, [](V v) { return v[0] * v[1]; });
    case 27: return map<2>(s, arena, [](V v) { return v[0] / v[1]; });
    case 28: return map<2>(s, arena, [](V v) {
      Floats y;
      for (int i = 0; i < kWidth; ++i) y[i] = powf(v[0][i], v[1][i]);
      return y;
    });
    case 29: return map<2>(s, arena, [](V v) { return select(v[0] > v[1], v[0], v[1]); });
    case 30: return map<2>(s, arena, [](V v) { return select(v[0] < v[1], v[0], v[1]); });
    case 31: return map<2>(s, arena, [](V v) { return truth(v[0] < v[1]); });
    case 32: return map<2>(s, arena, [](V v) { return truth(v[0] <= v[1]); });
    case 33: return map<2>(s, arena, [](V v) { return truth(v[0] > v[1]); });
    case 34: return map<2>(s, arena, [](V v) { return truth(v[0] >= v[1]); });
    case 35: return map<2>(s, arena, [](V v) { return truth(v[0] == v[1]); });
    case 36: return map<2>(s, arena, [](V v) { return truth(v[0] != v[1]); });
    default: return map<3>(s, arena, [](V v) { return select(v[0] != 0.0f, v[1], v[2]); });
  }
}

// -- along rows: the first operand is (outer, n), the result (outer, ...)

struct RowsOf {
  const float* p;
  int64_t outer, inner;
  RowsOf(const Operand& x, const float* arena) : p(base(x, arena)), outer(x.strides[0]), inner(x.strides[1]) {}
  float at(int64_t o, int64_t i) const { return p[o * outer + i * inner]; }
};

float sum_of(const float* x, int64_t stride, int64_t n) {
  float total = 0;
  int64_t i = 0;
  if (stride == 1) {
    Floats sums = {};
    for (; i + kWidth <= n; i += kWidth) sums += load(x + i);
    for (int lane = 0; lane < kWidth; ++lane) total += sums[lane];
  }
  for (; i < n; ++i) total += x[i * stride];
  return total;
}

void softmax(const RowsOf& x, int64_t o, int64_t n, float* y) {
  float top = -INFINITY, total = 0;
  for (int64_t i = 0; i < n; ++i) top = x.at(o, i) > top ? x.at(o, i) : top;
  for (int64_t i = 0; i < n; ++i) total += y[i] = expf(x.at(o, i) - top);
  for (int64_t i = 0; i < n; ++i) y[i] /= total;
}

// The k largest, the first of equal ones first.
void top(const RowsOf& x, int64_t o, int64_t n, int64_t k, float* values, float* indices) {
  for (int64_t i = 0; i < k; ++i) {
    int64_t best = -1;
    for (int64_t j = 0; j < n; ++j) {
      const float v = x.at(o, j);
      if (i && (v > values[i - 1] || (v == values[i - 1] && static_cast<float>(j) <= indices[i - 1]))) continue;
      if (best < 0 || v > x.at(o, best)) best = j;
    }
    best = best < 0 ? 0 : best;  // NaN among them
    values[i] = x.at(o, best);
    indices[i] = static_cast<float>(best);
  }
}

int64_t place(float index, int64_t n) {
  const int64_t i = static_cast<int64_t>(index);
  return i < 0 ? 0 : i < n ? i : n - 1;
}

// a (b, m, k), c (b, n, k): (b, m, n). Along k if c is contiguous there, else along n.
void contract(const TapeStep& s, float* arena) {
  const Operand &x = s.in[0], &z = s.in[1];
  const int64_t batch = s.shape[0], rows = s.shape[1], k_count = s.shape[2], n_count = s.n;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t m = 0; m < rows; ++m) {
      const float *a = base(x, arena) + b * x.strides[0] + m * x.strides[1], *c = base(z, arena) + b * z.strides[0];
      float* y = arena + s.out + (b * rows + m) * n_count;
      if (z.strides[1] == 1) {
        for (int64_t n = 0; n < n_count; ++n) y[n] = 0;
        for (int64_t k = 0; k < k_count; ++k) {
          const float factor = a[k * x.strides[2]], *row = c + k * z.strides[2];
          int64_t n = 0;
          for (; n + kWidth <= n_count; n += kWidth) store(y + n, load(y + n) + factor * load(row + n));
          for (; n < n_count; ++n) y[n] += factor * row[n];
        }
        continue;
      }
      for (int64_t n = 0; n < n_count; ++n) {
        const float* row = c + n * z.strides[1];
        float total = 0;
        int64_t k = 0;
        if (x.strides[2] == 1 && z.strides[2] == 1) {
          Floats sums = {};
          for (; k + kWidth <= k_count; k += kWidth) sums += load(a + k) * load(row + k);
          for (int lane = 0; lane < kWidth; ++lane) total += sums[lane];
        }
        for (; k < k_count; ++k) total += a[k * x.strides[2]] * row[k * z.strides[2]];
        y[n] = total;
      }
    }
}

void run_rows(const TapeStep& s, float* arena) {
  if (s.kind == kRowKinds + 8) return contract(s, arena);
  const RowsOf x(s.in[0], arena);
  const int64_t outer = s.shape[0], n = s.shape[1], m = s.m;
  float* y = arena + s.out;
  for (int64_t o = 0; o < outer; ++o) switch (s.kind - kRowKinds) {
      case 0: y[o] = sum_of(x.p + o * x.outer, x.inner, n); break;
      case 1:
      case 2: {
        float best = x.at(o, 0);
        for (int64_t i = 1; i < n; ++i) best = s.kind == kRowKinds + 1 ? fmaxf(best, x.at(o, i)) : fminf(best, x.at(o, i));
        y[o] = best;
        break;
      }
      case 3: softmax(x, o, n, y + o * n); break;
      case 4: {
        float total = 0;
        for (int64_t i = 0; i < n; ++i) y[o * n + i] = total += x.at(o, i);
        break;
      }
      case 5: top(x, o, n, m, y + o * m, y + (outer + o) * m); break;
      case 6: {
        const RowsOf index(s.in[1], arena);
        for (int64_t i = 0; i < m; ++i) y[o * m + i] = x.at(o, place(index.at(o, i), n));
        break;
      }
      case 7: {
        const RowsOf index(s.in[1], arena), values(s.in[2], arena);
        for (int64_t i = 0; i < n; ++i) y[o * n + i] = x.at(o, i);
        for (int64_t i = 0; i < m; ++i) {
          float& to = y[o * n + place(index.at(o, i), n)];
          to = values.at(o, i) + (s.numbers[0] != 0 ? to : 0.0f);
        }
        break;
      }
      default: {
        const Norm norm{s.in[1].constant + s.in[1].offset, s.in[2].constant + s.in[2].offset, n, s.numbers[0], s.numbers[1] != 0};
        const float* row = x.p + o * x.outer;
        if (x.inner != 1) {
          for (int64_t i = 0; i < n; ++i) y[o * n + i] = x.at(o, i);
          row = y + o * n;
        }
        normalize_row(norm, row, y + o * n);
      }
    }
}

void join(const TapeStep& s, float* arena) {
  const float* from[kOperands] = {base(s.in[0], arena)};
  const int64_t length = s.shape[s.axes - 1], stride = s.in[0].strides[s.axes - 1], step = s.out_strides[s.axes - 1];
  each_outer(s, 1, from, s.out_strides, [&](const float* const* p, int64_t to) {
    float* y = arena + s.out + to;
    if (stride == 1 && step == 1) memcpy(y, p[0], static_cast<size_t>(length) * sizeof(float));
    else for (int64_t i = 0; i < length; ++i) y[i * step] = p[0][i * stride];
  });
}

void look_up(const TapeStep& s, float* arena) {
  const int64_t row = static_cast<int64_t>(*base(s.in[0], arena)) * s.n;
  const int32_t dtype = static_cast<int32_t>(s.m);
  for (int64_t i = 0; i < s.n; ++i) arena[s.out + i] = load_one(s.table, row + i, dtype);
}

}  // namespace

void run_steps(const TapeSteps& steps, float* arena, const TapeStates* states, int64_t slot) {
  for (int64_t i = 0; i < steps.count; ++i) {
    const TapeStep& s = steps.steps[i];
    switch (s.kind) {
      case kJoin: join(s, arena); break;
      case kLookup: look_up(s, arena); break;
      case kLoad:
      case kStore: {
        float *state = states->memory[s.n] + states->places[slot] * s.m, *x = arena + (s.kind == kLoad ? s.out : s.in[0].offset);
        memcpy(s.kind == kLoad ? x : state, s.kind == kLoad ? state : x, static_cast<size_t>(s.m) * sizeof(float));
        break;
      }
      default: s.kind < kRowKinds ? run_map(s, arena) : run_rows(s, arena);
    }
  }
}

}  // namespace qk
