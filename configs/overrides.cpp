#include "configs/overrides.h"

#include <google/protobuf/io/tokenizer.h>
#include <google/protobuf/text_format.h>

#include "configs/fields.h"
#include "ops/core/error.h"

namespace longspan::configs {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::TextFormat;

class FirstMessage : public google::protobuf::io::ErrorCollector {
 public:
  void AddError(int, int, const std::string& message) override {
    if (text.empty()) text = message;
  }
  std::string text;
};

// The field that a path leads to, without changing anything on the way.
struct Target {
  std::vector<const FieldDescriptor*> fields;
  std::vector<int> indices;  // position in a repeated field, -1 for a single one
  std::string indexed_path;
};

// A member of a oneof that is not chosen, or an absent message, has default contents.
const Message* Below(const Message& message, const FieldDescriptor& field, int index) {
  const auto& reflection = *message.GetReflection();
  return index >= 0 ? &reflection.GetRepeatedMessage(message, &field, index)
                    : &reflection.GetMessage(message, &field);
}

std::string NoElement(const Message& message, const FieldDescriptor& field, const std::string& path,
                      const std::string& key) {
  const int size = message.GetReflection()->FieldSize(message, &field);
  if (size == 0) return Str(path, " has no elements; add one to the file");
  if (IsNamed(field)) {
    return Str(path, " has no element ", key, " (names: ", JoinNames(ElementNames(message, field)),
               ")");
  }
  return Str(path, " has no element ", key, " (positions: 0 to ", size - 1, ")");
}

std::string ExampleKey(const Message& message, const FieldDescriptor& field) {
  if (!IsNamed(field)) return "0";
  const std::vector<std::string> names = ElementNames(message, field);
  return names.empty() || names[0].empty() ? "0" : names[0];
}

// Follows the path; on failure fills `problem` and returns an unusable target.
Target FollowPath(const Config& config, const std::vector<PathStep>& steps, std::string& problem) {
  Target target;
  const Message* message = &config;
  std::string path;  // as given, so far
  for (size_t i = 0; i < steps.size(); ++i) {
    const PathStep& step = steps[i];
    const FieldDescriptor* field = message->GetDescriptor()->FindFieldByName(step.name);
    const std::string field_path = JoinPath(path, step.name);
    if (field == nullptr) {
      problem = Str(field_path, ": unknown field (",
                    SuggestField(*message->GetDescriptor(), step.name), ")");
      return target;
    }
    int index = -1;
    if (field->is_repeated()) {
      if (!step.key) {
        problem = Str(field_path, " is a list; address one element, as in ", field_path, "[",
                      ExampleKey(*message, *field), "]");
        return target;
      }
      const auto found = FindElement(*message, *field, *step.key);
      if (!found) {
        problem = NoElement(*message, *field, field_path, *step.key);
        return target;
      }
      index = *found;
    } else if (step.key) {
      problem = Str(field_path, " is not a list; leave out [", *step.key, "]");
      return target;
    }
    const bool is_last = i + 1 == steps.size();
    if (!is_last && field->message_type() == nullptr) {
      problem = Str(field_path, " is ", ValueKind(*field), " and has no field ", steps[i + 1].name);
      return target;
    }
    target.fields.push_back(field);
    target.indices.push_back(index);
    target.indexed_path =
        JoinPath(target.indexed_path, index >= 0 ? ElementPath(step.name, index) : step.name);
    path = field_path + (step.key ? "[" + *step.key + "]" : "");
    if (!is_last) message = Below(*message, *field, index);
  }
  return target;
}

// Parses `value` as one value of `field` into `holder`, an empty message of the field's parent
// type.
std::optional<std::string> ParseValue(const std::string& path, const std::string& value,
                                      const FieldDescriptor& field, Message& holder) {
  if (value.empty()) return Str(path, " has no value (give ", ValueKind(field), ")");
  const bool is_text = field.cpp_type() == FieldDescriptor::CPPTYPE_STRING;
  if (is_text && value[0] != '"' && value[0] != '\'') {
    holder.GetReflection()->SetString(&holder, &field, value);
    return std::nullopt;
  }
  const bool is_group = field.message_type() != nullptr;
  if (is_group && value[0] != '{') {
    const std::string fields = FieldNames(*field.message_type());
    return Str(path, ": ", value, " is not a group of fields in braces",
               fields.empty() ? " (give {})" : " (or set one of its fields: " + fields + ")");
  }
  FirstMessage errors;
  TextFormat::Parser parser;
  parser.RecordErrorsTo(&errors);
  if (parser.ParseFieldValueFromString(value, &field, &holder) && errors.text.empty()) {
    return std::nullopt;
  }
  if (is_group || is_text) {
    const std::string why = errors.text.empty() ? "something follows the value" : errors.text;
    return Str(path, ": ", value, " does not parse: ", why);
  }
  if (errors.text.find("out of range") != std::string::npos) {
    return Str(path, ": ", value, " is out of range (give ", ValueKind(field), ")");
  }
  return Str(path, ": ", value, " is not ", ValueKind(field));
}

void CopyValue(const Message& from, const FieldDescriptor& field, Message& to, int index) {
  const auto& reflection = *to.GetReflection();
  if (field.message_type() != nullptr) {
    Message* target = index >= 0 ? reflection.MutableRepeatedMessage(&to, &field, index)
                                 : reflection.MutableMessage(&to, &field);
    // A repeated field was parsed as one added element.
    target->CopyFrom(index >= 0 ? reflection.GetRepeatedMessage(from, &field, 0)
                                : reflection.GetMessage(from, &field));
  } else if (index >= 0) {
    if (field.cpp_type() != FieldDescriptor::CPPTYPE_INT64) {
      throw ConfigError(Str("the schema's list ", field.full_name(), " has an unexpected type"));
    }
    reflection.SetRepeatedInt64(&to, &field, index,
                                from.GetReflection()->GetRepeatedInt64(from, &field, 0));
  } else {
    to.MergeFrom(from);  // `from` holds this one value and nothing else
  }
}

}  // namespace

std::optional<std::string> ApplySet(const std::string& argument, Config& config, Places& places) {
  const size_t equals = argument.find('=');
  if (equals == std::string::npos) return "has no '=' (write path.to.field=value)";
  const std::string path = argument.substr(0, equals), value = argument.substr(equals + 1);
  const auto steps = ParsePath(path);
  if (!steps) return Str("'", path, "' is not a path of fields (write path.to.field=value)");

  std::string problem;
  const Target target = FollowPath(config, *steps, problem);
  if (!problem.empty()) return problem;

  const FieldDescriptor& last = *target.fields.back();
  const Message* prototype =
      google::protobuf::MessageFactory::generated_factory()->GetPrototype(last.containing_type());
  const std::unique_ptr<Message> holder(prototype->New());
  if (auto wrong = ParseValue(path, value, last, *holder)) return wrong;

  Message* message = &config;
  std::string indexed_path;
  for (size_t i = 0; i + 1 < target.fields.size(); ++i) {
    const FieldDescriptor* field = target.fields[i];
    const auto& reflection = *message->GetReflection();
    const int index = target.indices[i];
    if (index >= 0) {
      indexed_path = JoinPath(indexed_path, ElementPath(field->name(), index));
      message = reflection.MutableRepeatedMessage(message, field, index);
      continue;
    }
    indexed_path = JoinPath(indexed_path, field->name());
    if (!reflection.HasField(*message, field)) places.SetArgument(indexed_path, argument);
    message = reflection.MutableMessage(message, field);
  }
  CopyValue(*holder, last, *message, target.indices.back());
  places.SetArgument(target.indexed_path, argument);
  return std::nullopt;
}

}  // namespace longspan::configs
