#include "launch/bench/case_name.h"

#include <charconv>

#include "ops/core/error.h"

namespace longspan::launch {
namespace {

constexpr int64_t kLargest = int64_t{1} << 30;
const std::string kNothing;

}  // namespace

CaseName::CaseName(const std::string& name, std::string_view form) : name_(name), form_(form) {
  std::string_view rest = name;
  for (;;) {
    const size_t end = rest.find('_');
    words_.emplace_back(rest.substr(0, end));
    if (end == std::string_view::npos) break;
    rest.remove_prefix(end + 1);
  }
}

void CaseName::Fail(const std::string& problem) const {
  throw InvalidArgument(Str("benchmark case \"", name_, "\": ", problem, "; the form is ", form_));
}

std::string CaseName::Word() {
  if (words_.empty()) return "";
  std::string word = words_.front();
  words_.erase(words_.begin());
  return word;
}

const std::string& CaseName::Peek() const { return words_.empty() ? kNothing : words_.front(); }

DType CaseName::ReadDType() {
  const std::string word = Word();
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF64}) {
    if (word == ToString(dtype)) return dtype;
  }
  Fail(Str("\"", word, "\" is not a dtype; use f32, bf16 or f64"));
}

void CaseName::ReadSizes() {
  for (const std::string& word : words_) {
    const size_t digits = word.find_first_of("0123456789");
    int64_t value = 0;
    const char* const end = word.data() + word.size();
    const bool has_both = digits != std::string::npos && digits > 0;
    if (!has_both || std::from_chars(word.data() + digits, end, value).ptr != end ||
        value > kLargest) {
      Fail(Str("\"", word, "\" is not a size such as T4096"));
    }
    if (!sizes_.emplace(word.substr(0, digits), value).second) {
      Fail(Str("\"", word, "\" gives ", word.substr(0, digits), " a second time"));
    }
  }
  words_.clear();
}

int64_t CaseName::Take(const std::string& letters, int64_t smallest,
                       std::optional<int64_t> otherwise) {
  const auto it = sizes_.find(letters);
  if (it == sizes_.end()) {
    if (otherwise.has_value()) return *otherwise;
    Fail(Str(letters, " is missing"));
  }
  const int64_t value = it->second;
  sizes_.erase(it);
  if (value < smallest) Fail(Str("\"", letters, value, "\" is less than ", smallest));
  return value;
}

void CaseName::Finish() const {
  if (sizes_.empty()) return;
  const auto& [letters, value] = *sizes_.begin();
  Fail(Str("\"", letters, value, "\" does not belong to this kind of case"));
}

}  // namespace longspan::launch
