#pragma once
#include <map>
#include <string>

#include "trainer/options.h"

namespace longspan::trainer {

// The field that says how each layer mixes tokens.
constexpr const char* kLayersField = "model.layers";

// The configuration fields that a resumed run must share with its checkpoint, by the names users
// write: the model, the seed, the batch and how rows are cut, the corpus. Everything else (steps,
// schedule, logging, evaluation, layout) may change.
std::map<std::string, std::string> IdentityOf(const TrainOptions& options,
                                              const std::string& corpus_fingerprint);

}  // namespace longspan::trainer
