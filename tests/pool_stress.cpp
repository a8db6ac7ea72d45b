// Calls of the pool from several threads at once, of changing size; built with ThreadSanitizer, which
// ends the program where two threads touch the same memory in no order.
//
// Prints what went wrong and ends with 1, or ends with 0 in silence.

#include <atomic>
#include <chrono>
#include <cstdio>
#include <stdexcept>
#include <thread>
#include <vector>

#include "../csrc/cpu/pool.hpp"

using fastshift::cpu::parallel;

namespace {

std::atomic<int> wrong{0};

void expect(bool right, const char* what, int caller, int round) {
  if (right) return;
  std::printf("caller %d, round %d: %s\n", caller, round, what);
  ++wrong;
}

// Long enough for another thread to take the next task.
void work() {
  for (volatile int i = 0; i < 2000; i = i + 1) {
  }
}

// Each task writes its own plain int, as kernels write rows; the caller reads them after the call.
void calls(int caller, int rounds) {
  std::vector<int> written;
  for (int round = 0; round < rounds; ++round) {
    const int count = (7 * round + caller) % 23, threads = 1 + (round + caller) % 5;
    written.assign(count, 0);
    parallel(count, threads, [&](int index) {
      work();
      written[index] += index + round;
    });
    bool each_once = true;
    for (int index = 0; index < count; ++index) each_once &= written[index] == index + round;
    expect(each_once, "a task was left out or done twice", caller, round);
    if (round % 16 == 0) std::this_thread::sleep_for(std::chrono::microseconds(60));  // threads sleep
    if (round % 8 != 0) continue;
    bool thrown = false;
    try {
      parallel(9, threads, [&](int index) {
        work();
        if (index == 4) throw std::runtime_error("asked for");
      });
    } catch (const std::runtime_error&) {
      thrown = true;
    }
    expect(thrown, "an error of a task did not reach its caller", caller, round);
  }
}

}  // namespace

int main() {
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller) callers.emplace_back(calls, caller, 400);
  for (std::thread& caller : callers) caller.join();
  return wrong == 0 ? 0 : 1;
}
