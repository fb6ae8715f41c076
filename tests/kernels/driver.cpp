// Runs the C interface over odd shapes on arrays of exact size and compares with double arithmetic. Built with sanitizers.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "vector.h"

extern "C" {
int32_t qk_wq_matmul(const void*, const void*, const void*, const void*, const void*, void*, int64_t, int64_t, int64_t, int64_t,
                     int32_t, int32_t, int32_t, int32_t, int32_t);
int32_t qk_wq_split(const void*, const void*, const void*, void*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int32_t,
                    int32_t, int32_t, int32_t);
}

static int problems = 0;

static void check(bool right, const char* what) {
  if (!right) {
    fprintf(stderr, "wrong: %s (problem %d)\n", what, problems);
    exit(1);
  }
}

static float uniform() { return static_cast<float>(rand()) / static_cast<float>(RAND_MAX) - 0.5f; }

struct Case {
  int64_t m, rows, columns, group;
  int32_t bits, scale_dtype, dtype;
  bool zeros, biased;
};

static void run(const Case& c) {
  ++problems;
  const int64_t codes = 32 / c.bits, groups = c.columns / c.group, per_group = (c.group + codes - 1) / codes;
  const int64_t blocks = (c.rows + 15) / 16, top = 1 << c.bits, width = c.dtype == qk::kFloat32 ? 4 : 2;
  std::vector<uint32_t> words(static_cast<size_t>(blocks * groups * per_group * 16));
  for (auto& word : words) word = static_cast<uint32_t>(rand()) * 2654435761u;
  std::vector<char> scale(static_cast<size_t>(blocks * groups * 16 * (c.scale_dtype == qk::kFloat32 ? 4 : 2)));
  std::vector<uint8_t> zero(static_cast<size_t>(blocks * groups * 16));
  for (size_t i = 0; i < zero.size(); ++i) {
    qk::store_one(scale.data(), static_cast<int64_t>(i), c.scale_dtype, uniform() + 1.0f);
    zero[i] = static_cast<uint8_t>(c.zeros ? rand() % top : top / 2);
  }
  std::vector<char> x(static_cast<size_t>(c.m * c.columns * width)), y(static_cast<size_t>(c.m * c.rows * width));
  std::vector<char> bias(static_cast<size_t>(c.rows * width));
  for (int64_t i = 0; i < c.m * c.columns; ++i) qk::store_one(x.data(), i, c.dtype, uniform());
  for (int64_t i = 0; i < c.rows; ++i) qk::store_one(bias.data(), i, c.dtype, uniform());
  const void* zeros = c.zeros ? zero.data() : nullptr;
  check(qk_wq_matmul(words.data(), scale.data(), zeros, c.biased ? bias.data() : nullptr, x.data(), y.data(), c.m, c.rows,
                     c.columns, c.group, c.bits, static_cast<int32_t>(top / 2), c.scale_dtype, c.dtype, 1 + problems % 3) == 0,
        "status");
  const int64_t ld = blocks * 16;
  std::vector<uint16_t> pair(static_cast<size_t>(2 * c.columns * ld));
  check(qk_wq_split(words.data(), scale.data(), zeros, pair.data(), ld, 0, blocks, c.rows, c.columns, c.group, c.bits,
                    static_cast<int32_t>(top / 2), c.scale_dtype, 2) == 0,
        "status of the split");
  for (int64_t n = 0; n < c.rows; ++n)
    for (int64_t m = 0; m < c.m; ++m) {
      double sum = c.biased ? qk::load_one(bias.data(), n, c.dtype) : 0.0, size = std::fabs(sum);
      for (int64_t k = 0; k < c.columns; ++k) {
        const int64_t at = (n / 16 * groups + k / c.group), in_group = k % c.group;
        const uint32_t word = words[static_cast<size_t>((at * per_group + in_group / codes) * 16 + n % 16)];
        const int64_t code = (word >> (c.bits * (in_group % codes))) & static_cast<uint32_t>(top - 1);
        const double offset = zero[static_cast<size_t>(at * 16 + n % 16)];
        const double w = (static_cast<double>(code) - offset) * qk::load_one(scale.data(), at * 16 + n % 16, c.scale_dtype);
        const size_t place = static_cast<size_t>(k * ld + n), low = place + static_cast<size_t>(c.columns * ld);
        const double two = qk::load_one(pair.data(), static_cast<int64_t>(place), qk::kBFloat16) +
                           static_cast<double>(qk::load_one(pair.data(), static_cast<int64_t>(low), qk::kBFloat16));
        check(std::fabs(two - w) <= std::fabs(w) * 0x1p-16, "weight in two parts");
        const double value = qk::load_one(x.data(), m * c.columns + k, c.dtype);
        sum += w * value;
        size += std::fabs(w * value);
      }
      const double got = qk::load_one(y.data(), m * c.rows + n, c.dtype);
      const double eps = c.dtype == qk::kFloat32 ? 0.0 : c.dtype == qk::kFloat16 ? 0x1p-11 : 0x1p-8;
      check(std::fabs(got - sum) <= size * 1e-5 + std::fabs(sum) * eps + 1e-7, "product");
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

int main() {
  halves();
  for (int32_t bits : {2, 4, 8})
    for (int64_t group : {1, 5, 16, 37})
      for (int64_t rows : {1, 7, 32, 49})
        for (int64_t m : {0, 1, 2, 3, 5, 13, 35}) {
          const int n = problems;
          run({m, rows, group * (1 + n % 3), group, bits, n % 2, n % 3, n % 5 < 2, n % 7 < 3});
        }
  check(qk_wq_matmul(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 1, 1, 1, 1, 3, 0, 0, 0, 1) == 1, "bad bits");
  printf("%d problems, all right\n", problems);
}
