// Runs the C interface over odd shapes on arrays of exact size and compares with double arithmetic. Built with sanitizers.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "linear.h"
#include "vector.h"

extern "C" {
const char* qk_isa();
int32_t qk_linear(const qk::Linear*, const float*, const void*, void*, int64_t, int64_t, int32_t, int32_t);
}

void decoder_problems(bool few);
void draw_problems(bool few);

static int problems = 0;

static void check(bool right, const char* what) {
  if (!right) {
    fprintf(stderr, "wrong: %s (problem %d)\n", what, problems);
    exit(1);
  }
}

static float uniform() { return static_cast<float>(rand()) / static_cast<float>(RAND_MAX) - 0.5f; }

struct Case {
  int64_t m, rows, columns, group, block;
  int32_t kind, scale_dtype, dtype;
  bool zeros, biased;
};

// A weight in the layout, and what it stands for.
struct Weight {
  std::vector<char> codes, scale;
  std::vector<uint8_t> zero;
  std::vector<float> values;  // (rows, columns): (code - zero) * scale
};

static Weight weight(const Case& c) {
  const int64_t padded = (c.group + 7) / 8 * 8, groups = c.columns / c.group, blocks = (c.rows + 15) / 16;
  const int64_t bits = c.kind == qk::kWeightFloat32 ? 32 : c.kind == qk::kWeightBFloat16 ? 16 : c.kind == qk::kWeightU4 ? 4 : 8;
  const int64_t count = blocks * 16 * groups * padded, per_word = 32 / bits, top = 1 << (bits == 4 ? 4 : 8);
  const bool quantized = bits <= 8;
  Weight w;
  w.codes.resize(static_cast<size_t>(count * bits / 8));
  if (quantized)
    for (auto& byte : w.codes) byte = static_cast<char>(rand() >> 7);
  else
    for (int64_t i = 0; i < count; ++i) qk::store_one(w.codes.data(), i, bits == 32 ? qk::kFloat32 : qk::kBFloat16, uniform());
  const int64_t scales = quantized ? blocks * groups * 16 : 0;
  w.scale.resize(static_cast<size_t>(scales * (c.scale_dtype == qk::kFloat32 ? 4 : 2)));
  w.zero.resize(static_cast<size_t>(c.zeros ? scales : 0));
  for (int64_t i = 0; i < scales; ++i) qk::store_one(w.scale.data(), i, c.scale_dtype, uniform() + 1.0f);
  for (auto& zero : w.zero) zero = static_cast<uint8_t>(rand() % top);
  for (int64_t n = 0; n < c.rows; ++n)
    for (int64_t k = 0; k < c.columns; ++k) {
      const int64_t g = n / 16 * groups + k / c.group, column = k % c.group, at = g * 16 + n % 16;
      const int64_t word = (g * (padded / per_word) + column / per_word) * 16 + n % 16;
      if (!quantized) {
        w.values.push_back(qk::load_one(w.codes.data(), word * per_word + column % per_word, bits == 32 ? qk::kFloat32 : qk::kBFloat16));
        continue;
      }
      const auto byte = static_cast<uint8_t>(w.codes[static_cast<size_t>(word * 4 + (bits == 4 ? column % 4 : column % per_word))]);
      const int code = bits == 4 ? (column % 8 < 4 ? byte & 15 : byte >> 4) : byte;
      const int zero = c.zeros ? w.zero[static_cast<size_t>(at)] : static_cast<int>(top / 2);
      w.values.push_back(static_cast<float>(code - zero) * qk::load_one(w.scale.data(), at, c.scale_dtype));
    }
  return w;
}

static void run(const Case& c) {
  ++problems;
  const Weight w = weight(c);
  const int64_t width = c.dtype == qk::kFloat32 ? 4 : 2;
  std::vector<char> x(static_cast<size_t>(c.m * c.columns * width)), y(static_cast<size_t>(c.m * c.rows * width));
  std::vector<float> bias(static_cast<size_t>(c.rows));
  for (int64_t i = 0; i < c.m * c.columns; ++i) qk::store_one(x.data(), i, c.dtype, uniform());
  for (float& one : bias) one = uniform();
  const qk::Linear linear{w.codes.data(), w.scale.data(), c.zeros ? w.zero.data() : nullptr,          nullptr,      c.rows, c.columns,
                          c.group,        c.kind,         c.kind == qk::kWeightU4 ? 8 : 128, c.scale_dtype};
  check(qk_linear(&linear, c.biased ? bias.data() : nullptr, x.data(), y.data(), c.m, c.block, c.dtype, 1 + problems % 3) == 0,
        "status");
  const bool rounded = c.block && c.kind >= qk::kWeightU4;
  for (int64_t n = 0; n < c.rows; ++n)
    for (int64_t m = 0; m < c.m; ++m) {
      double sum = c.biased ? bias[static_cast<size_t>(n)] : 0.0, size = std::fabs(sum), moved = 0;
      for (int64_t k = 0; k < c.columns; ++k) {
        const double value = qk::load_one(x.data(), m * c.columns + k, c.dtype), one = w.values[static_cast<size_t>(n * c.columns + k)];
        sum += one * value;
        size += std::fabs(one * value);
        moved += std::fabs(one) * 0.5 / 254;  // x lies within 0.5
      }
      const double got = qk::load_one(y.data(), m * c.rows + n, c.dtype);
      const double eps = c.dtype == qk::kFloat32 ? 0.0 : c.dtype == qk::kFloat16 ? 0x1p-11 : 0x1p-8;
      check(std::fabs(got - sum) <= size * 1e-5 + (rounded ? moved : 0) + std::fabs(got) * eps + 1e-7, "product");
    }
}

// Every half there is, and floats between and beyond them, against ldexp and nearbyint.
static void halves() {
  for (uint32_t h = 0; h < 0x10000u; ++h) {
    const uint32_t exponent = (h >> 10) & 31u, mantissa = h & 0x3ffu;
    const float value = qk::half_to_float(static_cast<uint16_t>(h));
    if (exponent == 31) {
      check(mantissa ? std::isnan(value) : std::isinf(value), "half without a number");
      if (!mantissa) check(qk::float_to_half(value) == h, "infinite half");
      continue;
    }
    const double exact = exponent ? std::ldexp(1024.0 + mantissa, static_cast<int>(exponent) - 25) : std::ldexp(mantissa, -24);
    check(value == static_cast<float>(h & 0x8000u ? -exact : exact), "half to float");
    check(qk::float_to_half(value) == h, "half there and back");
  }
  for (int i = 0; i < 200000; ++i) {
    const float value = std::ldexp(uniform() + 1.0f, rand() % 50 - 30);
    const int unit = std::max(std::ilogb(value), -14) - 10;
    const double rounded = std::ldexp(std::nearbyint(std::ldexp(static_cast<double>(value), -unit)), unit);
    const float back = qk::half_to_float(qk::float_to_half(value));
    check(rounded >= 65520.0 ? std::isinf(back) : back == static_cast<float>(rounded), "float to half");
  }
  check(std::isnan(qk::half_to_float(qk::float_to_half(NAN))), "NaN to half");
  check(std::isnan(qk::bits_to_float(static_cast<uint32_t>(qk::float_to_bfloat(NAN)) << 16)), "NaN to bfloat16");
}

// With an argument, fewer problems: for an emulator.
int main(int count, char**) {
  halves();
  decoder_problems(count > 1);
  draw_problems(count > 1);
  for (int32_t kind = 0; kind < 4; ++kind)
    for (int64_t group : {1, 5, 32, 37, 64, 72})
      for (int64_t rows : {1, 7, 32, 49})
        for (int64_t m : {0, 1, 2, 3, 5, 13, 35}) {
          const int n = problems;
          const int64_t groups = kind < 2 ? 1 : 1 + n % 3, block = n % 4 < 2 ? 0 : n % 8 < 4 ? 32 : 64;
          run({m, rows, group * groups, group, block, kind, n % 3, n / 2 % 3, kind > 1 && n % 5 < 2, n % 7 < 3});
        }
#if defined(QK_TILES_EMULATED)
  check(emulated::products > 0, "no tile was multiplied");
#endif
  printf("%d problems, all right, on %s\n", problems, qk_isa());
}
