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
// A value that an op cannot take
class InvalidArgument : public Error {
  using Error::Error;
};
// Valid, but not built (docs/status.md)
class Unsupported : public Error {
  using Error::Error;
};
// Datasets, tokenizers, text input
class DataError : public Error {
  using Error::Error;
};
// Configuration files and --set
class ConfigError : public Error {
  using Error::Error;
};
// Checkpoints and run directories
class CheckpointError : public Error {
  using Error::Error;
};
// Communicators and launchers
class CommError : public Error {
  using Error::Error;
};
class CudaError : public Error {
  using Error::Error;
};

// Concatenates its arguments as operator<< prints them: Str("rank ", 3, " of ", 4).
template <class... Args>
std::string Str(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

}  // namespace longspan
