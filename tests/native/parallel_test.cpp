// The parallel loop: every index once, from several callers at a time, with exceptions, and after a fork.
#include "parallel.h"

#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <vector>

namespace {

using mtl::cpu::parallel_for;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("failed: %s\n", what);
  std::exit(1);
}

void loop(int n, int threads) {
  std::vector<int> visits(n);
  parallel_for(n, threads, [&](std::int64_t i) { visits[i] += 1; });
  for (int count : visits) expect(count == 1, "every index once");
}

void pause(int microseconds) { std::this_thread::sleep_for(std::chrono::microseconds(microseconds)); }

void many_loops() {
  for (int round = 0; round < 5000; ++round) {
    loop(round % 50, round % 6);
    if (round % 500 == 0) pause(200);  // long enough for the workers to sleep
  }
}

void several_callers() {
  std::vector<std::thread> callers;
  for (int t = 0; t < 4; ++t) {
    callers.emplace_back([] {
      for (int round = 0; round < 1000; ++round) {
        loop(2 + round % 60, 4);
        if (round % 64 == 0) pause(40);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
}

void exceptions() {
  for (int round = 0; round < 500; ++round) {
    bool caught = false;
    try {
      parallel_for(20, 4, [&](std::int64_t i) {
        if (i % 7 == round % 7) throw std::runtime_error("thrown");
      });
    } catch (const std::runtime_error&) {
      caught = true;
    }
    expect(caught, "an exception reaches the caller");
    loop(20, 4);
  }
}

void forks() {
  for (int round = 0; round < 10; ++round) {
    loop(30, 4);
    const pid_t child = fork();
    if (child == 0) {
      alarm(20);
      for (int i = 0; i < 50; ++i) loop(30, 4);
      _exit(0);
    }
    int status = -1;
    waitpid(child, &status, 0);
    expect(status == 0, "the pool works in a forked child");
  }
}

}  // namespace

int main(int argc, char** argv) {
  many_loops();
  several_callers();
  exceptions();
  if (argc > 1 && std::strcmp(argv[1], "fork") == 0) forks();
  std::puts("passed");
}
