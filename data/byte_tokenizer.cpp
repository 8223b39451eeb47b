#include "data/byte_tokenizer.h"

#include "ops/core/error.h"

namespace longspan::data {

void ByteTokenizer::Encode(std::string_view document, std::vector<int32_t>& out) const {
  const size_t base = out.size();
  out.resize(base + document.size());
  int32_t* ids = out.data() + base;
  for (size_t i = 0; i < document.size(); ++i) ids[i] = static_cast<uint8_t>(document[i]);
}

std::string ByteTokenizer::Decode(std::span<const int32_t> ids) const {
  std::string text;
  text.reserve(ids.size());
  for (const int32_t id : ids) {
    if (id >= 0 && id < 256) {
      text.push_back(static_cast<char>(id));
    } else if (id == kEot) {
      text += "<|eot|>";
    } else if (id == kBos) {
      text += "<|bos|>";
    } else if (id == kPad) {
      text += "<|pad|>";
    } else {
      throw InvalidArgument(
          Str("token id ", id, " is not one of the byte tokenizer's 0..", kVocabSize - 1));
    }
  }
  return text;
}

}  // namespace longspan::data
