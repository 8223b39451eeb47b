#include "configs/validate_objective.h"

#include "configs/fields.h"
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

}  // namespace

void CheckObjective(const Config& config, std::vector<Problem>& problems) {
  const Model& model = config.model();
  bool duo = false;
  for (int i = 0; i < model.mixer_size(); ++i) {
    if (!model.mixer(i).softmax().has_duo()) continue;
    duo = true;
    CheckDuo(config, ElementPath("model.mixer", i), model.mixer(i).softmax().duo(), problems);
  }
  if (!config.objective().has_duo_gates()) return;
  if (!duo) {
    problems.push_back({"objective.duo_gates",
                        "has no gates to train (give a mixer softmax { duo {} } and name it in "
                        "model.layers, or use next_token)"});
  }
  if (model.z_loss() > 0) {
    problems.push_back(
        {"model.z_loss",
         "has no effect with objective.duo_gates, which computes no logits (use 0)"});
  }
}

}  // namespace longspan::configs
