#pragma once
#include <string>
#include <vector>

#include "configs/proto/config.pb.h"

namespace longspan::configs {

// One occurrence of a field, or of an element of a repeated field, in a text. Lines count from 1.
struct FieldPlace {
  std::string indexed_path;
  int line = 0;
};

struct UnknownField {
  std::string path;  // as messages show it
  std::string advice;
  int line = 0;
};

struct ParsedText {
  Config config;  // only what the text gives
  std::vector<FieldPlace> places;
  std::vector<UnknownField> unknown;
};

// Reads protobuf text. Unknown fields are collected and skipped. Everything else that does not
// parse (syntax, a value of the wrong type, a single field or two members of a oneof given twice)
// throws a ConfigError about its first place: "<name>:<line>:<column>: ...".
ParsedText ParseText(const std::string& text, const std::string& name);

}  // namespace longspan::configs
