// A stress test of the team of threads, built with the thread sanitizer: every member writes its part of an array, waits, and
// reads what the others wrote.
#include "team.h"

#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

struct Work {
  std::vector<int64_t> parts;
  int64_t seed;
  int32_t rounds;
};

static void work(const qk::Member& me, void* argument) {
  Work& work = *static_cast<Work*>(argument);
  int64_t mine = work.seed;
  for (int32_t round = 0; round < work.rounds; ++round) {
    work.parts[static_cast<size_t>(me.index)] = mine + me.index;
    me.wait();
    int64_t sum = 0;
    for (int32_t i = 0; i < me.count; ++i) sum += work.parts[static_cast<size_t>(i)];
    me.wait();
    mine = sum % 1000003;
  }
  me.wait();  // all have read the seed
  if (me.index == 0) work.seed = mine;
}

static void check(int32_t threads, int32_t rounds, int64_t seed) {
  int64_t want = seed;
  for (int32_t round = 0; round < rounds; ++round) want = (want * threads + threads * (threads - 1) / 2) % 1000003;
  Work job{std::vector<int64_t>(static_cast<size_t>(threads)), seed, rounds};
  qk::run_team(threads, work, &job);
  if (job.seed != want) {
    fprintf(stderr, "%d threads, %d rounds: got %lld, want %lld\n", threads, rounds, static_cast<long long>(job.seed),
            static_cast<long long>(want));
    exit(1);
  }
}

int main() {
  for (int32_t i = 0; i < 300; ++i) check(1 + i % 5, i % 7, i);
  check(2, 300, 5);
  std::vector<std::thread> callers;  // calls from several threads take turns
  for (int64_t caller = 0; caller < 3; ++caller)
    callers.emplace_back([caller] {
      for (int32_t i = 0; i < 40; ++i) check(1 + (i + static_cast<int32_t>(caller)) % 4, 3, caller);
    });
  for (auto& caller : callers) caller.join();
  int64_t covered = 0;  // shares cover everything once
  for (int64_t total : {0, 1, 5, 16, 33})
    for (int32_t index = 0; index < 3; ++index) {
      int64_t begin, end;
      qk::share(qk::Member{index, 3, nullptr}, total, 4, &begin, &end);
      covered += end - begin;
    }
  if (covered != 55) return 1;
  puts("all right");
}
