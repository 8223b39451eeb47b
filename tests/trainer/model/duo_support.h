#pragma once
#include "tests/trainer/model/model_support.h"
#include "trainer/objective.h"

namespace longspan::test {

// SmallModel with gates in its first and last layer and a causal layer between them, and the
// objective that trains them.
inline trainer::ModelOptions GatedModel(DType dtype, int64_t sinks, int64_t recent) {
  trainer::ModelOptions m = SmallModel(dtype);
  m.mixers = {{.name = "duo",
               .pattern = ops::AttentionPattern::Causal(),
               .duo = trainer::DuoOptions{sinks, recent}},
              {.name = "dense", .pattern = ops::AttentionPattern::Causal()}};
  m.layers = {0, 1, 0};
  m.gates_only = true;
  return m;
}

inline trainer::ObjectiveOptions DuoObjective(double regularization) {
  return {.kind = trainer::ObjectiveKind::kDuoGates, .regularization = regularization};
}

}  // namespace longspan::test
