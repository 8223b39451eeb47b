#pragma once
#include <cstdint>
#include <optional>

#include "ops/core/allocator.h"
#include "ops/core/device.h"
#include "trainer/model/options.h"

namespace longspan::trainer {

// Memory of tensors of one rank at the highest moment of a training step, from shapes alone. What
// the step makes, keeps and drops is gone through in its order: DecoderForward and the backward
// pass, with the sizes that the allocator gives out.
//
// Not in it: weights packed by libraries, masks and their tables, what each thread takes for
// itself, keys and values of other ranks, buffers of communicators, the process itself.
// tests/trainer/model/memory_test compares it with the allocator of real steps.
struct MemoryForecast {
  BytesByCategory by_category{};
  size_t bytes = 0;  // their sum
};

// How a rank's share of a model's state is stored (TrainOptions).
struct StateSharding {
  int zero_stage = 0;
  int64_t parts = 1;  // ranks that share the state: parallel.hybrid_shard, or all
  bool offload_optimizer = false;
  bool accumulates = false;  // a step has several micro-batches
};

// `tokens` of one micro-batch on this rank, in `rows` rows (of one document each, which matters for
// what attention keeps for its blocks). Asks which attention this processor would run. None for
// training gates alone (model.gates_only), where most of the backward pass does not take place.
std::optional<MemoryForecast> ForecastStepMemory(const ModelOptions& model, int64_t tokens,
                                                 DeviceKind device, int64_t rows = 1,
                                                 const StateSharding& sharding = {});

}  // namespace longspan::trainer
