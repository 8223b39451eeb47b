#pragma once
#include <optional>
#include <string>

#include "configs/places.h"
#include "configs/proto/config.pb.h"

namespace longspan::configs {

// Applies one --set argument, "path.to.field=value", and records its place.
//
// A number, truth value or enumerator is written as in the file; a text may stand without quotes.
// An element of a repeated field is addressed by name or position (fields.h) and must exist. A
// group takes protobuf text in braces, which replaces it: "model.mixer[a].softmax.causal={}".
// Setting something inside a member of a oneof chooses that member.
//
// Returns what is wrong with the argument, in which case the config is unchanged; else nothing.
std::optional<std::string> ApplySet(const std::string& argument, Config& config, Places& places);

}  // namespace longspan::configs
