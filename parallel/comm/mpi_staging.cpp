#include "parallel/comm/mpi_staging.h"

#include <algorithm>

namespace longspan::parallel::internal {

void MpiBuffer::Fetch() {
  if (twin_ == nullptr) return;
  for (int64_t at = 0; at < bytes_; at += chunk_bytes_) {
    const int64_t part = std::min(chunk_bytes_, bytes_ - at);
    queue_->Copy(host_ + at, device_ + at, static_cast<size_t>(part));
    arrived_.push_back(queue_->Record());
  }
}

void MpiBuffer::Need(int64_t end) {
  const size_t chunks = static_cast<size_t>((end + chunk_bytes_ - 1) / chunk_bytes_);
  if (chunks <= seen_ || arrived_.empty()) return;
  queue_->Synchronize(arrived_[chunks - 1]);  // in stream order: all before it as well
  seen_ = chunks;
}

std::function<void()> MpiBuffer::Return(int64_t begin, int64_t bytes) const {
  if (twin_ == nullptr) return nullptr;
  return [queue = queue_, to = device_ + begin, from = host_ + begin, bytes] {
    queue->Copy(to, from, static_cast<size_t>(bytes));
  };
}

}  // namespace longspan::parallel::internal
