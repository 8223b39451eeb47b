#pragma once
#include <cstdint>
#include <string>

namespace longspan::data {

struct BigramLoss {
  double loss = 0;     // nats per predicted token
  int64_t tokens = 0;  // predicted: every token of a document but its first
};

// The baseline a language model must beat: a bigram model counted on dataset `train` predicts
// dataset `validation`, inside documents only, which are the labels that training with
// document_mask uses.
//
//   P(b | a) = (count(a b) + T(a) P(b)) / (count(a .) + T(a))      (Witten-Bell)
//   P(b)     = (count(b) + 1) / (tokens + vocabulary)
//
// T(a) is the number of different tokens that follow a. Vocabularies up to 4096 ids (the table of
// counts is dense); DataError otherwise, for a negative id, or when a dataset has
// nothing to predict.
BigramLoss EvaluateBigram(const std::string& train, const std::string& validation);

}  // namespace longspan::data
