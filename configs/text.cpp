#include "configs/text.h"

#include <google/protobuf/io/tokenizer.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>
#include <google/protobuf/text_format.h>

#include <algorithm>
#include <map>
#include <optional>

#include "configs/fields.h"
#include "ops/core/error.h"

namespace longspan::configs {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::io::Tokenizer;

// Our deepest message has 6 levels; the limit keeps a broken file from exhausting the stack.
constexpr int kMaxDepth = 32;

class FirstError : public google::protobuf::io::ErrorCollector {
 public:
  void AddError(int line, int column, const std::string& message) override {
    if (!found) found = Found{line, column, message};
  }
  void AddWarning(int, int, const std::string& message) override { warnings.push_back(message); }

  struct Found {
    int line, column;
    std::string message;
  };
  std::optional<Found> found;
  std::vector<std::string> warnings;
};

std::vector<Tokenizer::Token> Tokenize(const std::string& text) {
  google::protobuf::io::ArrayInputStream stream(text.data(), static_cast<int>(text.size()));
  FirstError ignored;  // the parser meets the same errors
  Tokenizer tokenizer(&stream, &ignored);
  // The same settings as in protobuf's text parser, so that positions agree.
  tokenizer.set_allow_f_after_float(true);
  tokenizer.set_comment_style(Tokenizer::SH_COMMENT_STYLE);
  tokenizer.set_require_space_after_number(false);
  tokenizer.set_allow_multiline_strings(true);
  std::vector<Tokenizer::Token> tokens;
  while (tokenizer.Next()) tokens.push_back(tokenizer.current());
  return tokens;
}

// A field name met in the text.
struct Mention {
  size_t token;  // its name; for later elements of a [list] their first token
  std::string name;
  std::string parent_path;       // indexed
  std::string indexed_path;      // of the field itself
  const Descriptor* parent;      // null inside unknown fields
  const FieldDescriptor* field;  // null if unknown
};

// Finds the path of every field in a text. protobuf's own location tree has no unknown fields, no
// elements of [lists], and nothing at all after an error; this scan has them and never fails.
class Scanner {
 public:
  explicit Scanner(const std::vector<Tokenizer::Token>& tokens) : tokens_(tokens) {
    while (next_ < tokens_.size()) {
      ScanMessage(Config::descriptor(), "", 0);
      ++next_;  // a closing brace too many
    }
  }

  const std::vector<Mention>& mentions() const { return mentions_; }

 private:
  bool At(const char* symbol) const {
    return next_ < tokens_.size() && tokens_[next_].text == symbol;
  }
  bool Accept(const char* symbol) {
    if (!At(symbol)) return false;
    ++next_;
    return true;
  }

  void ScanMessage(const Descriptor* message, const std::string& path, int depth) {
    while (next_ < tokens_.size() && !At("}") && !At(">")) ScanField(message, path, depth);
  }

  void ScanField(const Descriptor* message, const std::string& path, int depth) {
    const size_t name_token = next_;
    std::string name = tokens_[next_++].text;
    if (name == "[") {  // an extension; we have none
      while (next_ < tokens_.size() && name.back() != ']') name += tokens_[next_++].text;
    }
    const FieldDescriptor* field = message == nullptr ? nullptr : message->FindFieldByName(name);
    std::string field_path = JoinPath(path, name);
    const bool repeated = field != nullptr && field->is_repeated();
    int& count = counts_[field_path];
    auto mention = [&](size_t token) {
      const std::string own = repeated ? ElementPath(field_path, count++) : field_path;
      mentions_.push_back({token, name, path, own, message, field});
      return own;
    };
    Accept(":");
    if (!Accept("[")) {
      ScanValue(field, mention(name_token), depth);
    } else {
      size_t token = name_token;
      do {
        if (At("]")) break;
        ScanValue(field, mention(token), depth);
        token = next_ + 1;
      } while (Accept(","));
      Accept("]");
    }
    if (!Accept(",")) Accept(";");
  }

  void ScanValue(const FieldDescriptor* field, const std::string& path, int depth) {
    if (At("{") || At("<")) {
      ++next_;
      if (depth < kMaxDepth) {
        ScanMessage(field == nullptr ? nullptr : field->message_type(), path, depth + 1);
        if (!Accept("}")) Accept(">");
      }
      return;
    }
    Accept("-");
    if (At("}") || At(">") || At("]")) return;
    if (next_ < tokens_.size()) ++next_;
    while (next_ < tokens_.size() && tokens_[next_].type == Tokenizer::TYPE_STRING) ++next_;
  }

  const std::vector<Tokenizer::Token>& tokens_;
  size_t next_ = 0;
  std::vector<Mention> mentions_;
  std::map<std::string, int> counts_;  // elements seen, by path of the repeated field
};

bool Contains(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

// protobuf reports some errors at the token after the one that is wrong.
bool ReportedLate(const std::string& message) {
  return Contains(message, "specified multiple times") ||
         Contains(message, "is specified along with") ||
         Contains(message, "Unknown enumeration value") ||
         Contains(message, "Invalid value for boolean");
}

// Describes an error inside a known field in our words, or nothing when it is one of syntax.
std::optional<std::string> DescribeFieldError(const std::vector<Tokenizer::Token>& tokens,
                                              const std::vector<Mention>& mentions, size_t token,
                                              const std::string& message) {
  auto after = std::find_if(mentions.begin(), mentions.end(),
                            [&](const Mention& m) { return m.token > token; });
  if (after == mentions.begin()) return std::nullopt;
  const Mention& mention = *(after - 1);
  if (mention.field == nullptr) return std::nullopt;
  const std::string& path = mention.indexed_path;
  if (Contains(message, "specified multiple times")) {
    const auto first = std::find_if(mentions.begin(), mentions.end(), [&](const Mention& m) {
      return m.indexed_path == mention.indexed_path;
    });
    return Str(path, ": given twice, first on line ", tokens[first->token].line + 1,
               " (remove one of them)");
  }
  if (Contains(message, "is specified along with")) {
    return Str(path, ": more than one choice is given (keep one of ",
               MemberNames(*mention.field->containing_oneof()), ")");
  }
  // What stands between the name and the wrong value: "name :", "name : -", "name : [".
  bool has_colon = mention.field->message_type() != nullptr;  // for a group it is optional
  for (size_t i = mention.token + 1; i < token; ++i) {
    const std::string& text = tokens[i].text;
    if (text != ":" && text != "-" && text != "[") return std::nullopt;
    has_colon |= text == ":";
  }
  if (token == mention.token || !has_colon) return std::nullopt;
  if (token >= tokens.size() || tokens[token].text == "}") {
    return Str(path, ": has no value (give ", ValueKind(*mention.field), ")");
  }
  const std::string& value = tokens[token].text;
  return Contains(message, "out of range")
             ? Str(path, ": ", value, " is out of range (give ", ValueKind(*mention.field), ")")
             : Str(path, ": ", value, " is not ", ValueKind(*mention.field));
}

[[noreturn]] void ThrowParseError(const std::string& name, const FirstError::Found& error,
                                  const std::vector<Tokenizer::Token>& tokens,
                                  const std::vector<Mention>& mentions) {
  // The first token that does not end before the reported position.
  size_t token = 0;
  while (token < tokens.size() &&
         std::pair(tokens[token].line, tokens[token].column) < std::pair(error.line, error.column))
    ++token;
  int line = error.line, column = error.column;
  if (ReportedLate(error.message) && token > 0) {
    --token;
    line = tokens[token].line;
    column = tokens[token].column;
  }
  std::string text = error.message;
  if (auto described = DescribeFieldError(tokens, mentions, token, error.message)) {
    text = *described;
  } else {
    if (!text.empty() && text.back() == '.') text.pop_back();
    if (token >= tokens.size() && text.rfind("Expected", 0) == 0) {
      text = "the text ends too early (a closing brace or a value is missing)";
    }
  }
  throw ConfigError(Str(name, ":", line + 1, ":", column + 1, ": ", text));
}

}  // namespace

ParsedText ParseText(const std::string& text, const std::string& name) {
  const std::vector<Tokenizer::Token> tokens = Tokenize(text);
  const std::vector<Mention> mentions = Scanner(tokens).mentions();
  ParsedText parsed;
  FirstError errors;
  google::protobuf::TextFormat::Parser parser;
  parser.RecordErrorsTo(&errors);
  parser.AllowUnknownField(true);
  parser.SetRecursionLimit(kMaxDepth);
  const bool ok = parser.ParseFromString(text, &parsed.config);
  if (errors.found) ThrowParseError(name, *errors.found, tokens, mentions);
  if (!ok) throw ConfigError(Str(name, ": is not a configuration in protobuf text format"));

  for (const Mention& mention : mentions) {
    const int line = tokens[mention.token].line + 1;
    if (mention.field != nullptr) {
      parsed.places.push_back({mention.indexed_path, line});
    } else if (mention.parent != nullptr) {
      const std::string parent = DisplayPath(parsed.config, mention.parent_path);
      parsed.unknown.push_back(
          {JoinPath(parent, mention.name), SuggestField(*mention.parent, mention.name), line});
    }
  }
  // Each warning is something that the parser skipped: none may go unreported.
  if (parsed.unknown.empty() && !errors.warnings.empty()) {
    throw ConfigError(Str(name, ": ", errors.warnings.front()));
  }
  return parsed;
}

}  // namespace longspan::configs
