#pragma once
#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "configs/proto/config.pb.h"

// Names of fields, as users write them and as messages show them.
//
// A path is a sequence of field names joined by dots, from the top of Config. An element of a
// repeated field is written field[key], where key is the element's `name` if its type has one
// (model.mixer[s2]), else its position from 0 (data.train[0]). An indexed path always has positions
// (model.mixer[1]); it is the key under which places are stored.
namespace longspan::configs {

struct PathStep {
  std::string name;
  std::optional<std::string> key;  // text inside the brackets
};

// The steps of a path, or nothing when it is not one ("a..b", "a[", "").
std::optional<std::vector<PathStep>> ParsePath(std::string_view path);

// `parent` and `child` joined by a dot; `child` alone below the top.
std::string JoinPath(const std::string& parent, const std::string& child);

// Path of the element below that of its repeated field.
std::string ElementPath(const std::string& field_path, int index);

// True if the elements of this repeated field are addressed by name.
bool IsNamed(const google::protobuf::FieldDescriptor& field);

// True if an element may have this name: letters, digits, '_' and '-', starting with a letter. So a
// name is never taken for a position, or for the end of one.
bool IsElementName(std::string_view name);

// Names of the elements of a named repeated field, in order; absent names are empty.
std::vector<std::string> ElementNames(const google::protobuf::Message& message,
                                      const google::protobuf::FieldDescriptor& field);

// Position of the element that `key` means, a position or a name (the first of that name).
std::optional<int> FindElement(const google::protobuf::Message& message,
                               const google::protobuf::FieldDescriptor& field,
                               const std::string& key);

// The path in indexed form, cut before the first step that the config does not have.
std::string IndexedPath(const Config& config, std::string_view path);

// An indexed path with names in place of positions wherever a usable name is given and unique.
std::string DisplayPath(const Config& config, std::string_view indexed_path);

// What a value of this field looks like: "a whole number", "one of CPU, CUDA", "a text", ...
std::string ValueKind(const google::protobuf::FieldDescriptor& field);

// Advice on a name that `message` does not have: the nearest name that it has, the place of the
// same name elsewhere in Config, or all names that it has.
std::string SuggestField(const google::protobuf::Descriptor& message, const std::string& name);

// Names of the message's fields; of the oneof's members. Joined by commas.
std::string FieldNames(const google::protobuf::Descriptor& message);
std::string MemberNames(const google::protobuf::OneofDescriptor& oneof);

std::string JoinNames(const std::vector<std::string>& names);  // "a, b, c"

}  // namespace longspan::configs
