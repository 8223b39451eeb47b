#include "data/tokenizer.h"

#include "data/byte_tokenizer.h"
#include "ops/core/error.h"

namespace longspan::data {

std::unique_ptr<Tokenizer> MakeTokenizer(const std::string& spec) {
  if (spec == "byte") return std::make_unique<ByteTokenizer>();
  throw Unsupported(
      Str("--tokenizer ", spec, ": tokenizer files are not supported yet; use --tokenizer byte"));
}

}  // namespace longspan::data
