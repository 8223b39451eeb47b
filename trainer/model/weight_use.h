#pragma once
#include <cstddef>
#include <optional>

namespace longspan::trainer {

// Brackets the use of a decoder's buckets of weights on a tape, in forward order: each is held
// while its layer runs and again while it is differentiated, and the next one of either direction
// is collected meanwhile (ParameterStore::Hold). Does nothing where no state is sharded.
//
// What is recorded before a layer runs after its backward pass, and the reverse. A template for the
// forecast of memory, which has a tape and a store without numbers (memory.cpp).
template <class Tape, class Store>
class WeightUse {
 public:
  // `tied`: bucket 0 is used again together with the last one, and stays until then.
  WeightUse(Tape& tape, Store& store, bool tied) : tape_(tape), store_(store), tied_(tied) {}

  void BeginEmbedding() {
    if (!store_.sharded()) return;
    store_.Hold(0, 1);
    if (tied_) tape_.Record([&store = store_] { store.Drop(0); });
  }
  void EndEmbedding() {
    if (!store_.sharded()) return;
    tape_.Record([&store = store_] { store.OpenGrads(0); });
    if (!tied_) store_.Drop(0);
  }

  // `differentiated`: the entries between need the weights in the backward pass.
  void BeginLayer(size_t bucket, bool differentiated) {
    if (!store_.sharded()) return;
    store_.Hold(bucket, bucket + 1);
    if (differentiated) tape_.Record([&store = store_, bucket] { store.Drop(bucket); });
  }
  void EndLayer(size_t bucket, bool differentiated) {
    if (!store_.sharded()) return;
    store_.Drop(bucket);
    if (!differentiated) return;
    tape_.Record([&store = store_, bucket, previous = previous_] {
      store.OpenGrads(bucket);
      store.Hold(bucket, previous);
    });
    previous_ = bucket;
  }

  // The last bucket, whose backward pass comes first: of a tape that records it stays.
  void BeginHead(size_t bucket) {
    if (!store_.sharded()) return;
    store_.Hold(bucket, std::nullopt);
    tape_.Record([&store = store_, bucket] { store.Drop(bucket); });
  }
  void EndHead(size_t bucket) {
    if (!store_.sharded()) return;
    if (!tape_.recording()) {
      store_.Drop(bucket);
      if (tied_) store_.Drop(0);
      return;
    }
    tape_.Record([&store = store_, bucket, tied = tied_, previous = previous_] {
      store.OpenGrads(bucket);
      if (tied) store.OpenGrads(0);
      if (previous.has_value()) store.Prefetch(*previous);
    });
  }

 private:
  Tape& tape_;
  Store& store_;
  const bool tied_;
  std::optional<size_t> previous_;  // the layer that is differentiated after the next one
};

}  // namespace longspan::trainer
