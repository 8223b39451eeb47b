#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace longspan::data {

// Text to token ids and back. Implementations are immutable, so one object serves many threads.
//
// Text       valid UTF-8 without NUL bytes (data/utf8.h checks it before a tokenizer sees it)
// Ids        in [0, vocab_size()); special ids are never produced by Encode
// Round trip Decode(Encode(text)) == text
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  // Appends the ids of `document` to `out`. The end-of-text id is the caller's business: a prepared
  // corpus has one after every document.
  virtual void Encode(std::string_view document, std::vector<int32_t>& out) const = 0;

  // Special ids decode to their names, such as "<|eot|>". InvalidArgument for an id outside the
  // vocabulary.
  virtual std::string Decode(std::span<const int32_t> ids) const = 0;

  // Long documents are encoded in pieces. Returns the smallest offset in `text` at which a cut does
  // not change the ids: Encode(before) followed by Encode(after) equals Encode of the whole,
  // whatever precedes and follows `text`. text.size() means that there is no such place; the cut is
  // then made there all the same.
  virtual size_t FindCut(std::string_view text) const = 0;

  // The smallest model.vocab_size that can be trained on this tokenizer's output.
  virtual int32_t vocab_size() const = 0;
  virtual int32_t eot_id() const = 0;  // end of text
  virtual std::string name() const = 0;
};

// `spec` is "byte" or the path of a tokenizer file. Files are not supported yet: Unsupported.
std::unique_ptr<Tokenizer> MakeTokenizer(const std::string& spec);

}  // namespace longspan::data
