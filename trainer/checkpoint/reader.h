#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string_view>
#include <vector>

#include "trainer/checkpoint/checkpoint.h"

namespace longspan::trainer {

// Reads one checkpoint directory, whatever number of ranks wrote it. Makes no use of a
// communicator: every rank that needs the tensors reads them.
//
// Errors: CheckpointError naming the file (and the tensor) that is missing, truncated, damaged, of
// another format version, or not what the caller asked for.
class CheckpointReader {
 public:
  // Checks the manifest and the presence and size of every file.
  static CheckpointReader Open(const std::filesystem::path& path);
  CheckpointReader(CheckpointReader&&) noexcept;
  ~CheckpointReader();

  const std::filesystem::path& path() const;
  const CheckpointInfo& info() const;
  const std::vector<TensorEntry>& tensors() const;
  int64_t file_bytes() const;  // of all shard files

  // Fills the tensors of `into` by name. Names that begin with `prefix` must be the same set on
  // both sides, with equal dtypes and shapes: nothing is converted, and differences are reported
  // (the first few by name) before anything is written. Every byte read is checked; after a
  // checksum error the content of `into` is undefined. With the default prefix everything is read.
  // Tensors whose names `optional` accepts may be on one side alone; they are then left as they
  // are. Of a tensor that is split over ranks each reads the records that its piece touches.
  void Load(const std::vector<NamedTensor>& into, std::string_view prefix = "",
            const std::function<bool(std::string_view name)>& optional = nullptr) const;

  // Reads every byte of every file and checks it.
  void Verify() const;

 private:
  struct State;
  explicit CheckpointReader(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace longspan::trainer
