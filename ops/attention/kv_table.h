#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "ops/attention/device_copies.h"

namespace longspan::ops {

// Where the key blocks of a storage lie: per kv head, a table from global key block to element
// offset. Token i of a block is at offset + i * token_stride. Immutable, and shared by the views of
// all tensors with this layout, so that it reaches a GPU once.
class KvTable {
 public:
  // `offsets` [kv_heads, blocks] begins with block `first_block`; -1 for a block that is absent.
  // InvalidArgument when its size is no multiple of kv_heads.
  KvTable(int64_t kv_heads, int64_t token_stride, int64_t first_block,
          std::vector<int64_t> offsets);

  int64_t kv_heads() const { return kv_heads_; }
  int64_t token_stride() const { return token_stride_; }  // elements
  int64_t first_block() const { return first_block_; }    // global id of table entry 0
  int64_t blocks() const { return blocks_; }              // table entries per kv head
  const std::vector<int64_t>& offsets() const { return offsets_; }
  // -1 for blocks that are absent or outside the table.
  int64_t Offset(int64_t kv_head, int64_t block_id) const {
    const int64_t at = block_id - first_block_;
    return at < 0 || at >= blocks_ ? -1 : offsets_[static_cast<size_t>(kv_head * blocks_ + at)];
  }
  // Every token of every block starts at a multiple of this many elements (0: there is no block).
  int64_t alignment() const { return alignment_; }

  const DeviceCopies& device_copies() const { return device_copies_; }

 private:
  int64_t kv_heads_, token_stride_, first_block_, blocks_, alignment_ = 0;
  std::vector<int64_t> offsets_;
  DeviceCopies device_copies_;
};

// Keys in rows [kv_heads, head_dim] of a storage: block i of a list starts at row first_rows[i],
// or, where that is empty, right behind block i - 1.
struct KvLayout {
  int64_t kv_heads = 0, head_dim = 0;
  std::vector<int64_t> first_rows;
  bool operator==(const KvLayout&) const = default;
};

// The tables of one mask's keys, one per layout, made when first wanted. Thread-safe.
class KvTableCache {
 public:
  template <class Make>
  std::shared_ptr<const KvTable> Get(const KvLayout& layout, const Make& make) const {
    const std::lock_guard lock(mutex_);
    for (const auto& [key, table] : tables_) {
      if (key == layout) return table;
    }
    tables_.emplace_back(layout, make());
    return tables_.back().second;
  }

 private:
  mutable std::mutex mutex_;
  mutable std::vector<std::pair<KvLayout, std::shared_ptr<const KvTable>>> tables_;
};

}  // namespace longspan::ops
