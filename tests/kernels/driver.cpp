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
  bool zeros, biased, offsets;
};

// Numbers of a table, e.g. FP4, and floats of 8 bits.
static qk::Table table() {
  qk::Table t{};
  const float numbers[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
  for (int i = 0; i < 16; ++i) {
    t.number[i] = i < 8 ? numbers[i] : -numbers[i - 8];
    t.pair[i] = t.pair[i + 16] = qk::float_to_bfloat(t.number[i]);
    t.byte[i] = static_cast<uint8_t>(128 + static_cast<int>(2 * t.number[i]));
  }
  t.unit = 0.5f, t.exact = 1;
  return t;
}

static float e4m3(uint8_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const float value = exponent ? std::ldexp(1.0f + mantissa / 8.0f, exponent - 7) : std::ldexp(mantissa / 8.0f, -6);
  return code & 128 ? -value : value;
}

static bool narrow(int32_t kind) { return kind == qk::kWeightU4 || kind == qk::kWeightT4; }

// A stored scale or offset: what is written, and its value, of which `super` is a factor if integers are stored.
static float scale_at(const std::vector<char>& values, int64_t at, int32_t dtype, float super) {
  if (dtype == qk::kScaleInt8) return static_cast<float>(static_cast<int8_t>(values[static_cast<size_t>(at)])) * super;
  const auto byte = static_cast<uint8_t>(values[static_cast<size_t>(dtype < 3 ? 0 : at)]);
  if (dtype == qk::kScaleE8M0) return std::ldexp(1.0f, byte - 127);
  if (dtype == qk::kScaleE4M3) return e4m3(byte);
  return qk::load_one(values.data(), at, dtype);
}

static std::vector<char> scales_of(int64_t count, int32_t dtype, float shift) {
  std::vector<char> values(static_cast<size_t>(count * (dtype == qk::kFloat32 ? 4 : dtype < 3 ? 2 : 1)));
  for (int64_t i = 0; i < count; ++i) {
    if (dtype < 3) qk::store_one(values.data(), i, dtype, uniform() + shift);
    else values[static_cast<size_t>(i)] = static_cast<char>(dtype == qk::kScaleE8M0 ? 125 + rand() % 4 : dtype == qk::kScaleE4M3 ? rand() % 64 : rand() % 64 - 32);
  }
  return values;
}

// A weight in the layout, and what it stands for.
struct Weight {
  std::vector<char> codes, scale, offset;
  std::vector<uint8_t> zero;
  std::vector<uint16_t> supers;
  std::vector<float> values;  // (rows, columns): (code - zero) * scale
};

static Weight weight(const Case& c) {
  const int64_t padded = (c.group + 7) / 8 * 8, groups = c.columns / c.group, blocks = (c.rows + 15) / 16;
  const int64_t bits = c.kind == qk::kWeightFloat32 ? 32 : c.kind == qk::kWeightBFloat16 ? 16 : narrow(c.kind) ? 4 : 8;
  const int64_t count = blocks * 16 * groups * padded, per_word = 32 / bits, top = 1 << (bits == 4 ? 4 : 8);
  const bool quantized = bits <= 8;
  Weight w;
  w.codes.resize(static_cast<size_t>(count * bits / 8));
  if (quantized)
    for (auto& byte : w.codes) byte = static_cast<char>(rand() >> 7 & (c.kind == qk::kWeightF8 ? 0xbf : 0xff));
  else
    for (int64_t i = 0; i < count; ++i) qk::store_one(w.codes.data(), i, bits == 32 ? qk::kFloat32 : qk::kBFloat16, uniform());
  const int64_t scales = quantized ? blocks * groups * 16 : 0;
  w.scale = scales_of(scales, c.scale_dtype, 1.0f);
  if (c.offsets) w.offset = scales_of(scales, c.scale_dtype, 0.0f);
  if (c.scale_dtype == qk::kScaleInt8)
    for (int64_t i = 0; i < 2 * scales; ++i) w.supers.push_back(qk::float_to_half(uniform() / 16));
  w.zero.resize(static_cast<size_t>(c.zeros ? scales : 0));
  for (auto& zero : w.zero) zero = static_cast<uint8_t>(rand() % top);
  const qk::Table numbers = table();
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
      const int zero = c.zeros ? w.zero[static_cast<size_t>(at)] : c.offsets ? 0 : static_cast<int>(top / 2);
      const auto super = [&](int64_t i) { return w.supers.empty() ? 1.0f : qk::half_to_float(w.supers[static_cast<size_t>(i)]); };
      const float number = c.kind == qk::kWeightT4 ? numbers.number[code] : c.kind == qk::kWeightF8 ? e4m3(byte) : static_cast<float>(code - zero);
      const float offset = c.offsets ? scale_at(w.offset, at, c.scale_dtype, super(scales + at)) : 0.0f;
      w.values.push_back(number * scale_at(w.scale, at, c.scale_dtype, super(at)) + offset);
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
  const qk::Table numbers = table();
  qk::Linear linear{};
  linear.codes = w.codes.data(), linear.scales = w.scale.data(), linear.zeros = c.zeros ? w.zero.data() : nullptr;
  linear.offsets = c.offsets ? w.offset.data() : nullptr, linear.supers = w.supers.data();
  linear.table = c.kind == qk::kWeightT4 ? &numbers : nullptr;
  linear.rows = c.rows, linear.columns = c.columns, linear.group = c.group, linear.kind = c.kind;
  linear.zero_code = c.kind == qk::kWeightU4 ? 8 : 128, linear.scale_dtype = c.scale_dtype, linear.factor = 1;
  if (c.offsets) linear.zero_code = 0;
  check(qk_linear(&linear, c.biased ? bias.data() : nullptr, x.data(), y.data(), c.m, c.block, c.dtype, 1 + problems % 3) == 0,
        "status");
  const bool rounded = c.block && c.kind >= qk::kWeightU4 && c.kind != qk::kWeightF8;
  for (int64_t n = 0; n < c.rows; ++n)
    for (int64_t m = 0; m < c.m; ++m) {
      double sum = c.biased ? bias[static_cast<size_t>(n)] : 0.0, size = std::fabs(sum), moved = 0;
      for (int64_t k = 0; k < c.columns; ++k) {
        const double value = qk::load_one(x.data(), m * c.columns + k, c.dtype), one = w.values[static_cast<size_t>(n * c.columns + k)];
        sum += one * value;
        size += std::fabs(one * value);
        moved += std::fabs(one) * 0.5 / 254;  // x lies within 0.5
        if (c.offsets) size += 20 * std::fabs(value);  // an offset may cancel what codes stand for
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
  for (int32_t kind : {0, 1, 2, 3, 6, 7})
    for (int64_t group : {1, 5, 32, 37, 64, 72})
      for (int64_t rows : {1, 7, 32, 49})
        for (int64_t m : {0, 1, 2, 3, 5, 13, 35}) {
          const int n = problems;
          const int64_t groups = kind < 2 ? 1 : 1 + n % 3, block = n % 4 < 2 ? 0 : n % 8 < 4 ? 32 : 64;
          const bool offsets = (kind == 2 || kind == 3) && n % 11 < 3;
        const int32_t stored = kind < 2 ? 0 : offsets ? (n % 4 ? n % 3 : 5) : n % 6;
        run({m, rows, group * groups, group, block, kind, stored, n / 2 % 3, (kind == 2 || kind == 3) && !offsets && n % 5 < 2, n % 7 < 3, offsets});
        }
#if defined(QK_TILES_EMULATED)
  check(emulated::products > 0, "no tile was multiplied");
#endif
  printf("%d problems, all right, on %s\n", problems, qk_isa());
}
