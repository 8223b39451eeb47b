#include "ops/attention/cpu/bf16_pieces.h"

#include <algorithm>
#include <numeric>
#include <tuple>

#include "ops/attention/tasks.h"

namespace longspan::ops::cpu {

MaskParts::MaskParts(const BlockMask& mask, int64_t group)
    : mask_(mask),
      group_(group),
      piece_entries_(std::max<int64_t>(1, kTilesOfPiece / group)),
      part_entries_(std::max<int64_t>(1, kTilesOfPart / group)),
      query_index_(IndexByBlock(mask.documents(), mask.queries())) {
  int64_t entries = 0;
  for (int64_t h = 0; h < mask.kv_heads(); ++h) entries += mask.entries(mask.pattern_of(h));
  most_tiles_ = std::min(entries, part_entries_) * group;
  // A column that is cut has at least two pieces, of which all but the first and the last that a
  // part holds are complete.
  most_shared_ = most_tiles_ / group / piece_entries_ * 2 + 2;
}

bool MaskParts::Next(MaskPart& part) {
  part = MaskPart{};
  part.group_ = group_;
  AddPieces(part);
  if (part.pieces_.empty()) return false;
  FindSharedColumns(part);
  part.piece_order_.resize(part.pieces_.size());
  std::iota(part.piece_order_.begin(), part.piece_order_.end(), 0);
  // Pieces of the same queries follow each other: queries and their gradients come from a cache
  // then.
  const auto key = [&](int32_t i) {
    const MaskPiece& piece = part.pieces_[static_cast<size_t>(i)];
    return std::tuple(piece.begin - piece.end, piece.kv_head,
                      part.EntriesOf(piece).front().query / piece_entries_, piece.column);
  };
  std::stable_sort(part.piece_order_.begin(), part.piece_order_.end(),
                   [&](int32_t a, int32_t b) { return key(a) < key(b); });
  MakeRows(part);
  return true;
}

// Columns of one kv head after another, so that a row meets many of its entries in one part.
void MaskParts::AddPieces(MaskPart& part) {
  const auto left = [&] { return part_entries_ - static_cast<int64_t>(part.entries_.size()); };
  for (; head_ < mask_.kv_heads(); ++head_, column_ = 0) {
    for (; column_ < mask_.keys().size(); ++column_, entry_ = 0) {
      int64_t passed = 0;  // entries of the column before the run
      for (const BlockRun& run : mask_.column_runs().Row(mask_.pattern_of(head_), column_)) {
        while (entry_ < passed + run.count) {
          if (left() == 0) return;
          const bool continues =
              !part.pieces_.empty() && part.pieces_.back().kv_head == head_ &&
              part.pieces_.back().column == column_ &&
              part.pieces_.back().end - part.pieces_.back().begin < piece_entries_;
          const auto at = static_cast<int64_t>(part.entries_.size());
          if (!continues) {
            part.pieces_.push_back({.column = static_cast<int32_t>(column_),
                                    .kv_head = static_cast<int32_t>(head_),
                                    .begin = at,
                                    .end = at,
                                    .shared = -1});
          }
          part.entries_.push_back({run.block(static_cast<int32_t>(entry_ - passed)),
                                   run.kind() == BlockKind::kPartial});
          ++part.pieces_.back().end;
          ++entry_;
        }
        passed += run.count;
      }
    }
  }
}

void MaskParts::FindSharedColumns(MaskPart& part) const {
  int64_t shared = 0;
  for (size_t begin = 0; begin < part.pieces_.size();) {
    size_t end = begin + 1;
    while (end < part.pieces_.size() && part.pieces_[end].column == part.pieces_[begin].column &&
           part.pieces_[end].kv_head == part.pieces_[begin].kv_head) {
      ++end;
    }
    if (end - begin > 1) {
      for (size_t i = begin; i < end; ++i) part.pieces_[i].shared = shared++;
      part.shared_columns_.emplace_back(begin, end);
    }
    begin = end;
  }
}

void MaskParts::MakeRows(MaskPart& part) const {
  const int64_t queries = mask_.queries().size(), rows = mask_.kv_heads() * queries;
  const auto row_of = [&](const MaskPiece& piece, const PieceEntry& entry) {
    return static_cast<size_t>(piece.kv_head * queries +
                               query_index_[static_cast<size_t>(entry.query)]);
  };
  part.row_begin_.assign(static_cast<size_t>(rows) + 1, 0);
  for (const MaskPiece& piece : part.pieces_) {
    for (const PieceEntry& entry : part.EntriesOf(piece))
      ++part.row_begin_[row_of(piece, entry) + 1];
  }
  for (size_t r = 0; r < static_cast<size_t>(rows); ++r) {
    if (part.row_begin_[r + 1] > 0) part.row_order_.push_back(static_cast<int64_t>(r));
  }
  std::stable_sort(part.row_order_.begin(), part.row_order_.end(), [&](int64_t a, int64_t b) {
    return part.row_begin_[static_cast<size_t>(a) + 1] >
           part.row_begin_[static_cast<size_t>(b) + 1];
  });
  std::partial_sum(part.row_begin_.begin(), part.row_begin_.end(), part.row_begin_.begin());
  part.row_tiles_.resize(part.entries_.size());
  std::vector<int64_t> next(part.row_begin_.begin(), part.row_begin_.end() - 1);
  for (const MaskPiece& piece : part.pieces_) {
    for (const PieceEntry& entry : part.EntriesOf(piece)) {
      part.row_tiles_[static_cast<size_t>(next[row_of(piece, entry)]++)] = {
          piece.column, part.TileOf(piece, entry)};
    }
  }
}

}  // namespace longspan::ops::cpu
