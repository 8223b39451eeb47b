#pragma once
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "ops/attention/block_mask.h"

namespace longspan::ops::cpu {

// The entries of a mask cut for the backward pass: parts that are worked on one after another, each
// of pieces (consecutive entries of one column) that are tasks. For every entry a part keeps one
// tile of score gradients a query head of the group, until the rows have read it. Sizes and order
// depend on the mask and the group alone.

struct PieceEntry {
  int32_t query;  // block id
  bool partial;
};

struct MaskPiece {
  int32_t column;  // of mask.keys()
  int32_t kv_head;
  int64_t begin, end;  // entries of the part
  int64_t shared;      // place among the part's pieces whose column has several; -1: the only one
};

// The tiles of an entry, as its row reads them: one a query head from `tile` on.
struct RowTile {
  int32_t column;
  int64_t tile;
};

class MaskPart {
 public:
  int64_t piece_count() const { return static_cast<int64_t>(pieces_.size()); }
  // Longest first.
  const MaskPiece& PieceBySize(int64_t i) const {
    return pieces_[static_cast<size_t>(piece_order_[static_cast<size_t>(i)])];
  }
  std::span<const PieceEntry> EntriesOf(const MaskPiece& piece) const {
    return {entries_.data() + piece.begin, entries_.data() + piece.end};
  }
  // Of the group's first query head; `entry` is one of EntriesOf(piece).
  int64_t TileOf(const MaskPiece&, const PieceEntry& entry) const {
    return (&entry - entries_.data()) * group_;
  }

  // Columns that several pieces of this part contribute to, each with its pieces in order.
  int64_t shared_column_count() const { return static_cast<int64_t>(shared_columns_.size()); }
  std::span<const MaskPiece> SharedColumn(int64_t i) const {
    const auto [begin, end] = shared_columns_[static_cast<size_t>(i)];
    return {pieces_.data() + begin, pieces_.data() + end};
  }

  // Rows kv_head * queries + index of a query block that have entries here, longest first.
  int64_t row_count() const { return static_cast<int64_t>(row_order_.size()); }
  int64_t RowBySize(int64_t i) const { return row_order_[static_cast<size_t>(i)]; }
  std::span<const RowTile> TilesOfRow(int64_t row) const {
    return {row_tiles_.data() + row_begin_[static_cast<size_t>(row)],
            row_tiles_.data() + row_begin_[static_cast<size_t>(row) + 1]};
  }

 private:
  friend class MaskParts;
  int64_t group_ = 1;
  std::vector<PieceEntry> entries_;
  std::vector<MaskPiece> pieces_;
  std::vector<int32_t> piece_order_;
  std::vector<std::pair<size_t, size_t>> shared_columns_;  // of pieces_
  std::vector<int64_t> row_begin_;
  std::vector<RowTile> row_tiles_;
  std::vector<int64_t> row_order_;
};

class MaskParts {
 public:
  static constexpr int64_t kTilesOfPiece = 64, kTilesOfPart = 8192;  // of 8 KB: 64 MB

  // `mask` must outlive this.
  MaskParts(const BlockMask& mask, int64_t group);

  // Upper bounds over all parts.
  int64_t most_tiles() const { return most_tiles_; }
  int64_t most_shared() const { return most_shared_; }

  // The next part, false after the last.
  bool Next(MaskPart& part);

 private:
  void AddPieces(MaskPart& part);
  void FindSharedColumns(MaskPart& part) const;
  void MakeRows(MaskPart& part) const;

  const BlockMask& mask_;
  const int64_t group_, piece_entries_, part_entries_;
  const std::vector<int32_t> query_index_;  // by block id
  int64_t most_tiles_ = 0, most_shared_ = 0;
  int64_t head_ = 0, column_ = 0, entry_ = 0;  // where the next part begins
};

}  // namespace longspan::ops::cpu
