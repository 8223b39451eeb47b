#pragma once
#include <sstream>

#include "ops/core/error.h"

namespace longspan::internal {

// Collects a streamed message and throws InvalidArgument at the end of the full expression.
class CheckFailure {
 public:
  CheckFailure(const char* file, int line, const char* expression) {
    out_ << file << ":" << line << ": " << expression << " does not hold";
  }
  [[noreturn]] ~CheckFailure() noexcept(false) { throw InvalidArgument(out_.str()); }
  template <class T>
  CheckFailure& operator<<(const T& value) {
    if (!separated_) out_ << ": ";
    separated_ = true;
    out_ << value;
    return *this;
  }

 private:
  std::ostringstream out_;
  bool separated_ = false;
};

}  // namespace longspan::internal

// LONGSPAN_CHECK(a == b) << "RmsNorm: w has " << n << " elements";  always on, throws.
#define LONGSPAN_CHECK(condition) \
  if (condition) {                \
  } else                          \
    ::longspan::internal::CheckFailure(__FILE__, __LINE__, #condition)

// For inner invariants on hot paths: checked in debug builds only.
#ifdef NDEBUG
#define LONGSPAN_DCHECK(condition) LONGSPAN_CHECK(true || (condition))
#else
#define LONGSPAN_DCHECK(condition) LONGSPAN_CHECK(condition)
#endif
