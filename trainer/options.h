#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "ops/core/device.h"
#include "parallel/comm/communicator.h"
#include "trainer/batch_plans.h"
#include "trainer/model/options.h"
#include "trainer/schedule.h"

namespace longspan::trainer {

struct DataSource {
  std::string path;  // dataset prefix, without .bin / .idx
  double weight = 1;
};

struct AdamWSettings {
  double lr = 0, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1;
};

enum class NonFinitePolicy { kStop, kSkip };
// What carries data between the GPUs of ranks; kAuto: NCCL where it is built in, else MPI.
enum class CommBackend { kAuto, kNccl, kMpi };

// What a step minimises (objective.h).
enum class ObjectiveKind { kNextToken, kDuoGates, kSeerGates };
struct ObjectiveOptions {
  ObjectiveKind kind = ObjectiveKind::kNextToken;
  double regularization = 0;        // kDuoGates: price of open gates, per unit of their mean
  bool drop_first_quarter = false;  // kSeerGates: of each row's query blocks

  const char* name()
      const;  // "next_token", "duo_gates", "seer_gates": as configurations and metrics say
  std::string ToString() const;  // "duo_gates regularization 0.05"
};

// Everything a training run needs, as plain values; trainer/from_config fills it from protobuf.
struct TrainOptions {
  ModelOptions model;

  ObjectiveOptions objective;  // model.gates_only follows it

  uint64_t seed = 1;
  int64_t steps = 0;
  int64_t context_length = 0;       // tokens of a row
  int64_t micro_batch_rows = 1;     // rows a data-parallel replica works on at once
  int64_t global_batch_tokens = 0;  // tokens of an optimizer step, over all replicas
  int threads = 0;                  // per rank; 0 = cores / ranks on this host
  bool deterministic = true;
  bool sync_checks = false;  // ContextOptions
  DeviceKind device = DeviceKind::kCpu;

  int64_t dp = 1, cp = 1;
  parallel::PlacementKind placement = parallel::PlacementKind::kZigzag;
  parallel::StrategyOptions strategy{};  // ranks_per_node 0: as the launcher placed the ranks
  int64_t keep_key_bytes = 0;            // ContextLayout
  parallel::NetworkOptions network{};    // of auto
  CommBackend backend = CommBackend::kAuto;
  double timeout_s = parallel::kDefaultTimeoutS;  // of one operation among ranks
  // What is split over ranks: 1 the optimizer's state, 2 and gradients, 3 and weights (ZeRO).
  int zero_stage = 0;
  int64_t hybrid_shard = 0;        // ranks that hold all of it together; 0: all
  bool offload_optimizer = false;  // its moments in host memory; CUDA only

  std::vector<DataSource> train, validation;
  bool document_mask = true;
  bool align_documents = false;   // to the blocks of attention masks
  bool balanced_packing = false;  // of training rows, and of the rows of a step over replicas
  int prefetch_micro_batches = 2;

  AdamWSettings adamw;
  double clip_norm = 1.0;  // 0 = off
  ScheduleOptions schedule;

  NonFinitePolicy on_nonfinite = NonFinitePolicy::kStop;
  int64_t max_skipped_steps = 10;

  int64_t log_every_steps = 1;
  int64_t checkpoint_every_steps = 0;  // 0 = only at the end
  int64_t keep_last = 3, keep_every = 0;
  int64_t evaluation_every_steps = 0;  // 0 = never
  int64_t evaluation_rows = 0;         // 0 = all

  int64_t rows_per_step() const { return global_batch_tokens / context_length; }
  // `node_ranks`: neighbouring cp ranks of a node, as the launcher placed them (DeviceMesh).
  ContextLayout context_layout(int node_ranks) const {
    ContextLayout layout{.placement = placement,
                         .rows = micro_batch_rows,
                         .row_length = context_length,
                         .ranks = cp,
                         .strategy = strategy,
                         .keep_key_bytes = keep_key_bytes,
                         .network = network};
    if (strategy.ranks_per_node == 0) layout.strategy.ranks_per_node = node_ranks;
    layout.network.ranks_per_node = layout.strategy.ranks_per_node;
    return layout;
  }
  int64_t accumulation() const { return rows_per_step() / (dp * micro_batch_rows); }
};

}  // namespace longspan::trainer
