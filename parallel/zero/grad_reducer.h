#pragma once
#include <vector>

#include "parallel/comm/communicator.h"

namespace longspan::parallel {

// Sums gradient buckets over all ranks (dp x cp: the world of the mesh) while the backward pass of
// the last micro-batch is still running.
//
// Buckets are registered in forward order; backward finishes them last to first. AllReduce calls
// are issued strictly in that order, whatever the order of BucketReady, so that all ranks agree: a
// bucket that is ready early waits for its turn.
//
// Shapes    buckets [n_i], any n_i >= 0; summed in place. An empty one (nothing in it is trained)
//           costs no operation, so n_i must be the same on all ranks
// Dtypes    f32 or f64, each bucket its own
// Numerics  one sum per element in the communicator's fixed order; identical bits on every rank
// Errors    InvalidArgument for other dtypes, a wrong index, a bucket marked twice, and in Finish
//           when a bucket was never marked (its gradient would silently stay a local one)
// Threads   one thread at a time; `comm` must outlive the reducer
class GradReducer {
 public:
  GradReducer(Communicator& comm, std::vector<Tensor> buckets);
  GradReducer(const GradReducer&) = delete;
  GradReducer& operator=(const GradReducer&) = delete;

  int num_buckets() const { return static_cast<int>(buckets_.size()); }

  // Gradients of bucket `i` are final on this rank; nobody may touch them until Finish.
  void BucketReady(int i);
  // Waits until every bucket holds its sum and gets ready for the next step.
  void Finish();

  // Blocking sum over ranks of a few values: loss sums, valid tokens, flags. Empty is fine. Every
  // rank must call it at the same place between its other operations.
  std::vector<double> SumScalars(const std::vector<double>& values);

 private:
  void IssueReady();

  Communicator* comm_;
  std::vector<Tensor> buckets_;
  std::vector<char> ready_;
  std::vector<Work> works_;  // in order of issue
  int next_;                 // the bucket to issue next; all above it are issued
};

}  // namespace longspan::parallel
