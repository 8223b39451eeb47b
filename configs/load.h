#pragma once
#include <string>
#include <string_view>
#include <vector>

#include "configs/places.h"
#include "configs/proto/config.pb.h"
#include "configs/validate.h"

namespace longspan::configs {

// A configuration without problems, and where its values came from.
struct LoadedConfig {
  Config config;  // every default filled in (defaults.h)
  Places places;

  // The config as protobuf text; loading it again gives the same config. Saved with the run.
  std::string resolved_text() const;

  // "file:line" or "--set argument" of the value at a path (fields.h); for a default, of the
  // nearest group around it that was given, else the file's name alone.
  std::string Where(std::string_view field) const;
};

// Reads a configuration in protobuf text format, applies the --set arguments (overrides.h) in
// order, validates (validate.h) and fills in defaults.
//
// Throws one ConfigError. A file that cannot be read, or text that does not parse (syntax, wrong
// type, a single field given twice), reports its first place, "file:line:column: ...". Otherwise
// unknown fields, unusable --set arguments and problems of the values are reported all together,
// one per line in the order of the file, "file:line: model.num_kv_heads: 3 does not divide ...".
LoadedConfig Load(const std::string& path, const std::vector<std::string>& sets = {});

// The same for a text; `name` stands for the file in messages.
LoadedConfig LoadText(const std::string& text, const std::string& name,
                      const std::vector<std::string>& sets = {});

// Throws a ConfigError with one line per problem, in the same form. `problems` is not empty.
[[noreturn]] void ThrowProblems(const LoadedConfig& loaded, const std::vector<Problem>& problems);

}  // namespace longspan::configs
