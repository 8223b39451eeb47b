#include "configs/validate_objective.h"

#include <set>

#include "configs/fields.h"
#include "configs/mixer.h"
#include "ops/core/error.h"

namespace longspan::configs {
namespace {

void CheckDuo(const Config& config, const std::string& mixer, const DuoPattern& duo,
              std::vector<Problem>& problems) {
  if (!config.objective().has_duo_gates()) {
    problems.push_back(
        {mixer + ".softmax.duo",
         "has gates that only objective.duo_gates trains, at the cost of two branches "
         "of attention (give objective { duo_gates {} }, or causal, or spans with what "
         "the gates have found out)"});
  }
  const int64_t context = config.run().context_length();
  if (duo.sinks() + duo.recent() >= context) {
    problems.push_back(
        {mixer + ".softmax.duo.recent",
         Str(duo.recent(), " and ", duo.sinks(), " sinks are all of run.context_length ", context,
             ": both branches would be the same and every gate would close (use "
             "fewer, or longer rows)")});
  }
}

void CheckSeer(const Config& config, const std::string& mixer, const SeerPattern& seer,
               std::vector<Problem>& problems) {
  const std::string path = mixer + ".softmax.seer";
  if (seer.block_size() % 64 != 0) {
    const int64_t below = seer.block_size() / 64 * 64;
    problems.push_back(
        {path + ".block_size",
         Str(seer.block_size(), " is not a multiple of 64 (use ", below, " or ", below + 64, ")")});
  }
  if (seer.gate_dim() % 2 != 0) {
    problems.push_back(
        {path + ".gate_dim",
         Str(seer.gate_dim(), " is odd (RoPE needs an even one: use ", seer.gate_dim() + 1, ")")});
  }
  if (config.parallel().cp() > 1) {
    problems.push_back(
        {"parallel.cp", Str(config.parallel().cp(), " does not go with ", DisplayPath(config, path),
                            ", which needs the whole row on one rank (use 1, or "
                            "another pattern)")});
  }
  if (config.run().device() == Run::CUDA) {
    problems.push_back({"run.device", Str("CUDA has no kernels for ", DisplayPath(config, path),
                                          " (use CPU, or another pattern)")});
  }
  if (config.objective().has_duo_gates()) {
    problems.push_back({path,
                        "has gates that objective.duo_gates does not train (train one kind "
                        "of gate at a time)"});
  }
}

// What objectives for gates have in common.
void CheckGateObjective(const Config& config, const char* objective, const char* pattern,
                        bool gates, std::vector<Problem>& problems) {
  const std::string path = Str("objective.", objective);
  if (!gates) {
    problems.push_back({path, Str("has no gates to train (give a mixer softmax { ", pattern,
                                  " } and name it in model.layers, or use next_token)")});
  }
  if (config.model().z_loss() > 0) {
    problems.push_back(
        {"model.z_loss", Str("has no effect with ", path, ", which computes no logits (use 0)")});
  }
}

void CheckSeerBlocks(const std::set<int64_t>& block_sizes, std::vector<Problem>& problems) {
  if (block_sizes.size() < 2) return;
  problems.push_back(
      {"objective.seer_gates",
       Str("counts rows of blocks, and the mixers have blocks of ", *block_sizes.begin(),
           " and of ", *block_sizes.rbegin(), " tokens (give all of them one block_size)")});
}

}  // namespace

void CheckObjective(const Config& config, std::vector<Problem>& problems) {
  const Model& model = config.model();
  bool duo = false;
  std::set<int64_t> seer;  // block sizes
  for (int i = 0; i < model.mixer_size(); ++i) {
    const Attention& attention = AttentionOf(model.mixer(i));
    const std::string path = ElementPath("model.mixer", i);
    const bool refused = model.mixer(i).has_sigmoid();  // with gates, by CheckNormalization
    if (attention.has_duo()) {
      duo = true;
      if (!refused) CheckDuo(config, path, attention.duo(), problems);
    }
    if (attention.has_seer()) {
      seer.insert(attention.seer().block_size());
      if (!refused) CheckSeer(config, path, attention.seer(), problems);
    }
  }
  if (config.objective().has_duo_gates()) {
    CheckGateObjective(config, "duo_gates", "duo {}", duo, problems);
  }
  if (config.objective().has_seer_gates()) {
    CheckGateObjective(config, "seer_gates", "seer { top_k: 16 }", !seer.empty(), problems);
    CheckSeerBlocks(seer, problems);
  }
}

}  // namespace longspan::configs
