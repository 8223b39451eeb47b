#pragma once
#include <google/protobuf/descriptor.h>

#include <string>

#include "configs/proto/config.pb.h"

namespace longspan::configs {

// The attention of a mixer, whichever normalization it has; an empty one when none is given.
inline const Attention& AttentionOf(const Mixer& mixer) {
  return mixer.has_sigmoid() ? mixer.sigmoid() : mixer.softmax();
}
// That of a mixer with a kind, to be changed.
inline Attention& MutableAttention(Mixer& mixer) {
  return mixer.has_sigmoid() ? *mixer.mutable_sigmoid() : *mixer.mutable_softmax();
}

// The name of its field: "softmax" (also when none is given) or "sigmoid".
inline const char* NormalizationOf(const Mixer& mixer) {
  return mixer.has_sigmoid() ? "sigmoid" : "softmax";
}

// The name of its pattern's field, as "causal"; empty when none is given.
inline std::string PatternOf(const Mixer& mixer) {
  const Attention& attention = AttentionOf(mixer);
  const auto* chosen = attention.GetReflection()->GetOneofFieldDescriptor(
      attention, Attention::descriptor()->FindOneofByName("pattern"));
  return chosen == nullptr ? "" : chosen->name();
}

}  // namespace longspan::configs
