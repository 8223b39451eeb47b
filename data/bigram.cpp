#include "data/bigram.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "data/indexed_dataset.h"
#include "ops/core/error.h"

namespace longspan::data {
namespace {

constexpr int64_t kMaxVocabulary = 4096;
constexpr int64_t kPieceTokens = 1 << 20;

// Calls visit(previous, token) for each adjacent pair of a document, and visit(-1, token) for its
// first token.
void ForEachPair(const IndexedDataset& dataset,
                 const std::function<void(int32_t, int32_t)>& visit) {
  std::vector<int32_t> piece;
  for (int64_t d = 0; d < dataset.num_documents(); ++d) {
    const int64_t end = dataset.DocumentBegin(d + 1);
    int32_t previous = -1;
    for (int64_t begin = dataset.DocumentBegin(d); begin < end; begin += kPieceTokens) {
      piece.resize(static_cast<size_t>(std::min(kPieceTokens, end - begin)));
      dataset.Read(begin, piece);
      for (int32_t token : piece) {
        visit(previous, token);
        previous = token;
      }
    }
  }
}

}  // namespace

BigramLoss EvaluateBigram(const std::string& train, const std::string& validation) {
  const IndexedDataset train_set(train), validation_set(validation);
  const int64_t vocabulary =
      std::max(train_set.ScanMaxTokenId(), validation_set.ScanMaxTokenId()) + 1;
  if (vocabulary > kMaxVocabulary) {
    throw DataError(Str("a bigram model is built for at most ", kMaxVocabulary, " token ids, but ",
                        train, " and ", validation, " use ", vocabulary,
                        "; prepare them with --tokenizer byte"));
  }
  const size_t v = static_cast<size_t>(vocabulary);
  std::vector<double> pairs(v * v), follows(v), kinds(v), unigram(v, 1.0);
  double tokens = static_cast<double>(v);
  ForEachPair(train_set, [&](int32_t a, int32_t b) {
    unigram[static_cast<size_t>(b)] += 1;
    tokens += 1;
    if (a < 0) return;
    double& count = pairs[static_cast<size_t>(a) * v + static_cast<size_t>(b)];
    if (count == 0) kinds[static_cast<size_t>(a)] += 1;
    count += 1;
    follows[static_cast<size_t>(a)] += 1;
  });
  BigramLoss result;
  double sum = 0;
  ForEachPair(validation_set, [&](int32_t a, int32_t b) {
    if (a < 0) return;
    const size_t i = static_cast<size_t>(a), j = static_cast<size_t>(b);
    const double back_off = unigram[j] / tokens;
    const double p = follows[i] > 0
                         ? (pairs[i * v + j] + kinds[i] * back_off) / (follows[i] + kinds[i])
                         : back_off;
    sum -= std::log(p);
    ++result.tokens;
  });
  if (result.tokens == 0) throw DataError(validation + " has no document of two tokens or more");
  result.loss = sum / static_cast<double>(result.tokens);
  return result;
}

}  // namespace longspan::data
