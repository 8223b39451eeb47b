#pragma once
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "ops/core/tensor.h"

namespace longspan::trainer {

// What a checkpoint says besides its tensors. Only rank 0's values are stored.
struct CheckpointInfo {
  int64_t step = 0;                // optimizer steps done, >= 0
  std::string config_text;         // resolved configuration, protobuf text
  std::string corpus_fingerprint;  // identifies the training data
  int64_t samples_consumed = 0;    // rows of context_length tokens taken from the data order
  uint64_t seed = 0;               // run.seed; random numbers are functions of (seed, name, index)
  int dp = 1, cp = 1;              // layout that wrote it
  // Configuration fields that must stay as they are when a run is resumed: "run.seed" -> "1".
  std::map<std::string, std::string> identity;
  std::map<std::string, std::string> extra;  // further state of the trainer, any bytes
  bool operator==(const CheckpointInfo&) const = default;
};

// What a checkpoint knows about one of its tensors.
struct TensorEntry {
  std::string name;
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  std::string Describe() const;  // "f32[4096, 256]"
};

// The place of elements in a tensor that is split over ranks.
struct TensorPiece {
  Shape shape;               // of the whole tensor
  int64_t begin = 0;         // number of the first element held, flattened row by row
  int copy = 0, copies = 1;  // this is one of so many ranks that hold the same elements
};

// A tensor under its logical path ("weights/model.norm.weight"), which does not depend on
// layout. The name is what a checkpoint finds it by.
struct NamedTensor {
  std::string name;
  Tensor tensor;  // the whole, the same on all ranks; or flat, what this rank holds of it
  std::optional<TensorPiece> piece{};

  TensorEntry Entry() const;  // of the whole
  int64_t begin() const { return piece.has_value() ? piece->begin : 0; }
};

// One sentence for each field of `saved` that differs in `current` or is missing on one side, in
// order of field names; empty when the run may be resumed.
std::vector<std::string> DifferingIdentity(const std::map<std::string, std::string>& saved,
                                           const std::map<std::string, std::string>& current);

}  // namespace longspan::trainer
