#include "data/json_field.h"

#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "ops/core/error.h"

namespace longspan::data {
namespace {

using Json = nlohmann::json;

// Event parser: keeps the one value that is wanted and builds nothing else.
class FieldFinder : public nlohmann::json_sax<Json> {
 public:
  explicit FieldFinder(const std::string& field) : field_(field) {}

  bool null() override { return Other(); }
  bool boolean(bool) override { return Other(); }
  bool number_integer(number_integer_t) override { return Other(); }
  bool number_unsigned(number_unsigned_t) override { return Other(); }
  bool number_float(number_float_t, const string_t&) override { return Other(); }
  bool binary(binary_t&) override { return Other(); }
  bool string(string_t& value) override {
    if (wanted_) {
      found = std::move(value);
      wanted_ = false;
      return true;
    }
    return Other();
  }
  bool start_object(std::size_t) override {
    if (!is_object_ && depth_ == 0) {
      is_object_ = true;
    } else if (!Other()) {
      return false;
    }
    ++depth_;
    return true;
  }
  bool start_array(std::size_t) override {
    if (!Other()) return false;
    ++depth_;
    return true;
  }
  bool key(string_t& name) override {
    wanted_ = depth_ == 1 && name == field_;
    return true;
  }
  bool end_object() override { return --depth_ >= 0; }
  bool end_array() override { return --depth_ >= 0; }
  bool parse_error(std::size_t, const std::string&, const Json::exception& error) override {
    reason = Str("is not valid JSON (", error.what(), ")");
    return false;
  }

  std::optional<std::string> found;
  std::string reason;

 private:
  // Any value that is not a string.
  bool Other() {
    if (depth_ == 0) reason = "is not a JSON object";
    if (wanted_) reason = Str("has a field \"", field_, "\" that is not a string");
    return reason.empty();
  }

  const std::string& field_;
  int64_t depth_ = 0;
  bool is_object_ = false, wanted_ = false;
};

}  // namespace

std::string ExtractJsonField(std::string_view line, const std::string& field) {
  FieldFinder finder(field);
  Json::sax_parse(line.begin(), line.end(), &finder);
  if (!finder.reason.empty()) throw DataError(finder.reason);
  if (!finder.found) throw DataError(Str("has no field \"", field, "\"; choose one with --field"));
  return *std::move(finder.found);
}

}  // namespace longspan::data
