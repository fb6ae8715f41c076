// Runs qk_draw over odd vocabularies on arrays of exact size: every token must be one that its filters leave.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

extern "C" {
int64_t qk_draw_scratch(int64_t n);
int32_t qk_draw(const void*, const float*, const int32_t*, const float*, const float*, const int64_t*, const int32_t*, int32_t*,
                float*, int64_t, int64_t, int32_t, int32_t);
}

namespace {

void check(bool right, const char* what, int64_t n, int row) {
  if (right) return;
  fprintf(stderr, "wrong: %s (row %d of %lld tokens)\n", what, row, static_cast<long long>(n));
  exit(1);
}

// How many logits are larger, and the probability of the others: one that goes has no more than `rest` of it.
struct Place { int64_t above; double reached; };

Place place_of(const float* logits, int64_t n, int32_t token) {
  Place place{0, 0};
  double total = 0;
  for (int64_t i = 0; i < n; ++i) {
    place.above += logits[i] > logits[token];
    total += std::exp(double(logits[i]));
    if (logits[i] <= logits[token]) place.reached += std::exp(double(logits[i]));
  }
  return {place.above, place.reached / total};
}

}  // namespace

void draw_problems(bool few) {
  for (int64_t n : {1, 2, 63, 64, 65, 127, 700, 2049}) {
    if (few && n > 128) continue;
    const int rows = 12;
    std::vector<float> logits(rows * n), temperature(rows, 1.0f), rest(rows), min_p(rows);
    for (float& x : logits) x = 8.0f * static_cast<float>(rand()) / static_cast<float>(RAND_MAX);
    std::vector<int32_t> top_k(rows, INT32_MAX), position(rows), chosen(rows, -7);
    std::vector<int64_t> seed(rows);
    for (int row = 0; row < rows; ++row) position[row] = row - 1, seed[row] = int64_t(row) << 33;
    temperature[0] = 0;
    top_k[1] = 1, top_k[2] = 3, top_k[3] = 64, top_k[4] = 65;
    rest[5] = 0.5f, rest[6] = 0.05f, rest[7] = 0.9999f;
    top_k[8] = 5, rest[8] = 0.2f, min_p[8] = 0.1f;
    min_p[9] = 1.0f;
    logits[10 * n + n / 2] = NAN;
    for (int64_t i = 0; i < n; ++i) logits[11 * n + i] = -INFINITY;
    std::vector<float> scratch(rows * qk_draw_scratch(n));
    for (int32_t threads : {1, 2}) {
      qk_draw(logits.data(), temperature.data(), top_k.data(), rest.data(), min_p.data(), seed.data(), position.data(),
              chosen.data(), scratch.data(), rows, n, 0, threads);
      check(chosen[10] == -1 && chosen[11] == -1, "a token where there is none", n, 10);
      for (int row = 0; row < 10; ++row) {
        check(chosen[row] >= 0 && chosen[row] < n, "not a token", n, row);
        const Place place = place_of(logits.data() + row * n, n, chosen[row]);
        const bool best = row == 0 || row == 7 || row == 9;
        check(place.above < (best ? 1 : top_k[row]), "beyond top-k", n, row);
        check(place.above == 0 || row == 8 || place.reached > rest[row] - 1e-5, "beyond top-p", n, row);
      }
    }
  }
}
