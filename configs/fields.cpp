#include "configs/fields.h"

#include <algorithm>
#include <charconv>

#include "ops/core/error.h"

namespace longspan::configs {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::OneofDescriptor;

std::optional<std::vector<PathStep>> ParsePath(std::string_view path) {
  std::vector<PathStep> steps;
  while (true) {
    const size_t name_end = path.find_first_of(".[]");
    PathStep step{std::string(path.substr(0, name_end)), std::nullopt};
    if (step.name.empty()) return std::nullopt;
    path.remove_prefix(std::min(name_end, path.size()));
    if (!path.empty() && path[0] == '[') {
      const size_t close = path.find(']');
      if (close == std::string_view::npos) return std::nullopt;
      step.key = std::string(path.substr(1, close - 1));
      path.remove_prefix(close + 1);
    }
    steps.push_back(std::move(step));
    if (path.empty()) return steps;
    if (path[0] != '.') return std::nullopt;
    path.remove_prefix(1);
  }
}

std::string JoinPath(const std::string& parent, const std::string& child) {
  return parent.empty() ? child : parent + "." + child;
}

std::string ElementPath(const std::string& field_path, int index) {
  return field_path + "[" + std::to_string(index) + "]";
}

namespace {

const FieldDescriptor* NameField(const FieldDescriptor& field) {
  if (!field.is_repeated() || field.message_type() == nullptr) return nullptr;
  return field.message_type()->FindFieldByName("name");
}

// Insertions, deletions and replacements that turn `a` into `b`.
size_t EditDistance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 0; i < a.size(); ++i) {
    size_t diagonal = row[0]++;
    for (size_t j = 0; j < b.size(); ++j) {
      const size_t replaced = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = std::min({replaced, row[j] + 1, row[j + 1] + 1});
    }
  }
  return row[b.size()];
}

// Path of the first field called `name` below `message`, in the order of the schema.
std::optional<std::string> FindInSchema(const Descriptor& message, const std::string& name,
                                        const std::string& path) {
  if (message.FindFieldByName(name) != nullptr) return JoinPath(path, name);
  for (int i = 0; i < message.field_count(); ++i) {
    const FieldDescriptor& field = *message.field(i);
    if (field.message_type() == nullptr) continue;
    const std::string below = JoinPath(path, field.name()) + (field.is_repeated() ? "[]" : "");
    if (auto found = FindInSchema(*field.message_type(), name, below)) return found;
  }
  return std::nullopt;
}

// Calls visit(message, field, key) for each step of `path` while the config has it; `visit` returns
// the text of the step. Returns these texts joined.
template <class Visit>
std::string RewritePath(const Config& config, std::string_view path, Visit visit) {
  const auto steps = ParsePath(path);
  if (!steps) return "";
  std::string result;
  const Message* message = &config;
  for (const PathStep& step : *steps) {
    const FieldDescriptor* field =
        message == nullptr ? nullptr : message->GetDescriptor()->FindFieldByName(step.name);
    if (field == nullptr) break;
    std::string text = step.name;
    const bool is_message = field->message_type() != nullptr;
    const auto& reflection = *message->GetReflection();
    if (field->is_repeated()) {
      if (!step.key) return JoinPath(result, text);
      const auto index = FindElement(*message, *field, *step.key);
      if (!index) break;
      text = visit(*message, *field, *index);
      message = is_message ? &reflection.GetRepeatedMessage(*message, field, *index) : nullptr;
    } else {
      if (step.key) break;
      message = is_message ? &reflection.GetMessage(*message, field) : nullptr;
    }
    result = JoinPath(result, text);
  }
  return result;
}

}  // namespace

bool IsNamed(const FieldDescriptor& field) { return NameField(field) != nullptr; }

bool IsElementName(std::string_view name) {
  const auto is_letter = [](char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); };
  const auto in_name = [&](char c) {
    return is_letter(c) || (c >= '0' && c <= '9') || c == '_' || c == '-';
  };
  return !name.empty() && is_letter(name[0]) && std::all_of(name.begin(), name.end(), in_name);
}

std::vector<std::string> ElementNames(const Message& message, const FieldDescriptor& field) {
  std::vector<std::string> names;
  const auto& reflection = *message.GetReflection();
  for (int i = 0; i < reflection.FieldSize(message, &field); ++i) {
    const Message& element = reflection.GetRepeatedMessage(message, &field, i);
    names.push_back(element.GetReflection()->GetString(element, NameField(field)));
  }
  return names;
}

std::optional<int> FindElement(const Message& message, const FieldDescriptor& field,
                               const std::string& key) {
  int index = 0;
  const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), index);
  if (error == std::errc() && end == key.data() + key.size()) {
    const int size = message.GetReflection()->FieldSize(message, &field);
    return index >= 0 && index < size ? std::optional<int>(index) : std::nullopt;
  }
  if (!IsNamed(field) || key.empty()) return std::nullopt;
  const std::vector<std::string> names = ElementNames(message, field);
  const auto it = std::find(names.begin(), names.end(), key);
  return it == names.end() ? std::nullopt : std::optional<int>(it - names.begin());
}

std::string IndexedPath(const Config& config, std::string_view path) {
  return RewritePath(config, path, [](const Message&, const FieldDescriptor& field, int index) {
    return ElementPath(field.name(), index);
  });
}

std::string DisplayPath(const Config& config, std::string_view indexed_path) {
  return RewritePath(
      config, indexed_path, [](const Message& message, const FieldDescriptor& field, int index) {
        if (IsNamed(field)) {
          const std::vector<std::string> names = ElementNames(message, field);
          const std::string& name = names[index];
          if (IsElementName(name) && std::count(names.begin(), names.end(), name) == 1) {
            return field.name() + "[" + name + "]";
          }
        }
        return ElementPath(field.name(), index);
      });
}

std::string ValueKind(const FieldDescriptor& field) {
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_INT64:
      return "a whole number";
    case FieldDescriptor::CPPTYPE_DOUBLE:
      return "a number";
    case FieldDescriptor::CPPTYPE_BOOL:
      return "true or false";
    case FieldDescriptor::CPPTYPE_STRING:
      return "a text";
    case FieldDescriptor::CPPTYPE_ENUM: {
      std::vector<std::string> names;
      for (int i = 0; i < field.enum_type()->value_count(); ++i) {
        names.push_back(field.enum_type()->value(i)->name());
      }
      return "one of " + JoinNames(names);
    }
    default:
      return "a group of fields in braces";
  }
}

std::string SuggestField(const Descriptor& message, const std::string& name) {
  std::string nearest;
  size_t best = name.size() / 3 + 1;  // further apart is no longer a typing error
  for (int i = 0; i < message.field_count(); ++i) {
    const size_t distance = EditDistance(name, message.field(i)->name());
    if (distance <= best && (nearest.empty() || distance < best)) {
      best = distance;
      nearest = message.field(i)->name();
    }
  }
  for (int i = 0; nearest.empty() && name.size() >= 3 && i < message.field_count(); ++i) {
    if (message.field(i)->name().find(name) != std::string::npos)
      nearest = message.field(i)->name();
  }
  if (!nearest.empty()) return "did you mean " + nearest + "?";
  if (auto elsewhere = FindInSchema(*Config::descriptor(), name, "")) {
    return "did you mean " + *elsewhere + "?";
  }
  if (message.field_count() == 0) return message.name() + " has no fields";
  return "known fields: " + FieldNames(message);
}

std::string FieldNames(const Descriptor& message) {
  std::vector<std::string> names;
  for (int i = 0; i < message.field_count(); ++i) names.push_back(message.field(i)->name());
  return JoinNames(names);
}

std::string MemberNames(const OneofDescriptor& oneof) {
  std::vector<std::string> names;
  for (int i = 0; i < oneof.field_count(); ++i) names.push_back(oneof.field(i)->name());
  return JoinNames(names);
}

std::string JoinNames(const std::vector<std::string>& names) {
  std::string joined;
  for (const std::string& name : names) joined += (joined.empty() ? "" : ", ") + name;
  return joined;
}

}  // namespace longspan::configs
