#pragma once
#include <CLI/CLI.hpp>
#include <memory>
#include <string>
#include <vector>

#include "launch/bench/context_parallel_bench.h"

namespace longspan::launch {

// The options of `bench context_parallel` alone.
struct ContextParallelArguments {
  std::vector<std::string> strategies, placements;
  std::vector<int> ranks;
  int ranks_per_node = 0;
  double teraflops = 600, gigabytes = 400, node_gigabytes = 50, latency_us = 10;
  double dense_ring_time = 0;  // 0: the links are as fast as those numbers say
  bool plan_only = false;

  // Names of options, for those that want to refuse them.
  static const std::vector<const char*>& Names();
};

void AddContextParallelOptions(CLI::App& command, ContextParallelArguments& arguments);

// Errors: InvalidArgument for names that do not exist and numbers that cannot be.
ContextParallelOptions ContextParallelOptionsOf(const ContextParallelArguments& arguments);

}  // namespace longspan::launch
