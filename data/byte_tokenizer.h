#pragma once
#include "data/tokenizer.h"

namespace longspan::data {

// One token a byte: ids 0..255 are the bytes, then 256 <|eot|>, 257 <|bos|>, 258 <|pad|>.
// vocab_size() is 259, the number of ids in use. A model may have more rows than that: 320, the
// next multiple of 64, is the customary model.vocab_size, and the rows above 258 stay unused.
class ByteTokenizer : public Tokenizer {
 public:
  static constexpr int32_t kEot = 256, kBos = 257, kPad = 258, kVocabSize = 259;

  void Encode(std::string_view document, std::vector<int32_t>& out) const override;
  std::string Decode(std::span<const int32_t> ids) const override;
  size_t FindCut(std::string_view) const override { return 0; }
  int32_t vocab_size() const override { return kVocabSize; }
  int32_t eot_id() const override { return kEot; }
  std::string name() const override { return "byte"; }
};

}  // namespace longspan::data
