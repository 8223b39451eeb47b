#pragma once
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "ops/core/dtype.h"

namespace longspan::launch {

// The words of a case name, separated by '_': first whole words, then sizes, which are letters and
// a number. Each is taken once; Finish complains about those that nobody asked for.
//
// Errors   InvalidArgument naming the case, the word and the form of such names
class CaseName {
 public:
  // `form` ends the messages: "..., with W1024_S64 for window".
  CaseName(const std::string& name, std::string_view form);

  [[noreturn]] void Fail(const std::string& problem) const;

  // The next word that is not a size; empty when there is none.
  std::string Word();
  const std::string& Peek() const;
  DType ReadDType();
  // All remaining words are sizes.
  void ReadSizes();
  // The size with these letters, `otherwise` when it is not there.
  int64_t Take(const std::string& letters, int64_t smallest, std::optional<int64_t> otherwise = {});
  void Finish() const;

 private:
  const std::string name_, form_;
  std::vector<std::string> words_;
  std::map<std::string, int64_t> sizes_;
};

}  // namespace longspan::launch
