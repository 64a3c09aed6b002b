// Uses the pool as engines do, for -fsanitize=thread: many small jobs, pauses in which workers sleep, two callers.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

#include "common.h"

extern "C" void set_num_threads(i64);

static bool sums_are_right(int jobs) {
  for (int job = 0; job < jobs; job++) {
    const i64 count = 1 + job % 37;
    std::vector<i64> squares(count, -1);
    parallel(count, [&](i64 i) { squares[i] = i * i; });
    for (i64 i = 0; i < count; i++)
      if (squares[i] != i * i) return false;
    if (job % 100 == 99) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

int main() {
  set_num_threads(4);
  std::atomic<bool> right{true};
  std::thread other([&] { right = right && sums_are_right(2000); });
  const bool own = sums_are_right(2000);
  other.join();
  puts(own && right ? "right" : "wrong");
  return own && right ? 0 : 1;
}
