#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

namespace longspan {

// Every failure that a caller can cause or meet is one of these types. The message is one
// sentence that names the field, file or value and says what would be right; the command line
// prints it unchanged. Programming errors come from LONGSPAN_CHECK (check.h).
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};
class InvalidArgument : public Error { using Error::Error; };  // a value that an op cannot take
class Unsupported : public Error { using Error::Error; };      // valid, but not built (docs/status.md)
class DataError : public Error { using Error::Error; };        // datasets, tokenizers, text input
class ConfigError : public Error { using Error::Error; };      // configuration files and --set
class CheckpointError : public Error { using Error::Error; };  // checkpoints and run directories
class CommError : public Error { using Error::Error; };        // communicators and launchers
class CudaError : public Error { using Error::Error; };

// Concatenates its arguments as operator<< prints them: Str("rank ", 3, " of ", 4).
template <class... Args>
std::string Str(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

}  // namespace longspan
