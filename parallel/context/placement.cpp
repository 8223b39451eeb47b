#include "parallel/context/placement.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

#include "ops/core/error.h"
#include "parallel/context/fingerprint.h"

namespace longspan::parallel {
namespace {

// The rank of each block of a row of `blocks` blocks.
std::vector<int32_t> OwnersOfRow(PlacementKind kind, int64_t blocks, int64_t ranks) {
  std::vector<int32_t> owner(static_cast<size_t>(blocks));
  if (kind == PlacementKind::kStriped) {
    for (int64_t b = 0; b < blocks; ++b)
      owner[static_cast<size_t>(b)] = static_cast<int32_t>(b % ranks);
    return owner;
  }
  const int64_t parts = kind == PlacementKind::kZigzag ? 2 * ranks : ranks;
  auto at = owner.begin();
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t rank = std::min(part, 2 * ranks - 1 - part);
    const auto end = at + blocks / parts + (part < blocks % parts ? 1 : 0);
    std::fill(std::exchange(at, end), end, static_cast<int32_t>(rank));
  }
  return owner;
}

void CheckSizes(int64_t rows, int64_t row_length, int64_t ranks) {
  if (rows < 0 || row_length < 1 || ranks < 1 || ranks > std::numeric_limits<int32_t>::max()) {
    throw InvalidArgument(Str("placement: ", rows, " rows of ", row_length, " tokens on ", ranks,
                              " ranks; rows must be >= 0, row_length and ranks >= 1"));
  }
  if (rows > std::numeric_limits<int32_t>::max() / row_length) {
    throw InvalidArgument(Str("placement: ", rows, " rows of ", row_length,
                              " tokens exceed 2^31 - 1 tokens of one micro-batch; use fewer rows"));
  }
}

// The blocks of each rank, ascending.
std::vector<std::vector<int32_t>> IdsOf(std::span<const int32_t> owner, int64_t ranks) {
  std::vector<std::vector<int32_t>> ids(static_cast<size_t>(ranks));
  for (size_t b = 0; b < owner.size(); ++b) {
    ids[static_cast<size_t>(owner[b])].push_back(static_cast<int32_t>(b));
  }
  return ids;
}

std::vector<std::vector<int32_t>> IdsOf(PlacementKind kind, int64_t rows, int64_t row_length,
                                        int64_t ranks) {
  CheckSizes(rows, row_length, ranks);
  if (kind == PlacementKind::kBalanced) {
    throw InvalidArgument(
        "placement: balanced goes by the work of every block; make it by Placement::Balanced or "
        "BalancedPlacement");
  }
  const std::vector<int32_t> row = OwnersOfRow(kind, ops::BlocksPerRow(row_length), ranks);
  std::vector<int32_t> owner;
  for (int64_t r = 0; r < rows; ++r) owner.insert(owner.end(), row.begin(), row.end());
  return IdsOf(owner, ranks);
}

}  // namespace

const char* ToString(PlacementKind kind) {
  switch (kind) {
    case PlacementKind::kContiguous:
      return "CONTIGUOUS";
    case PlacementKind::kZigzag:
      return "ZIGZAG";
    case PlacementKind::kStriped:
      return "STRIPED";
    case PlacementKind::kBalanced:
      break;
  }
  return "BALANCED";
}

std::string Placement::Problem(PlacementKind kind, int64_t row_length, int64_t ranks) {
  const int64_t granule =
      ranks == 1 ? 1 : ops::kMaskBlock * ranks * (kind == PlacementKind::kZigzag ? 2 : 1);
  if (row_length > 0 && row_length % granule == 0) return "";
  const int64_t below = row_length / granule * granule, above = below + granule;
  return Str("a context of ", row_length, " tokens cannot be placed ", ToString(kind),
             " on cp = ", ranks, " ranks in whole blocks of ", ops::kMaskBlock,
             " tokens; use a multiple of ", granule,
             below > 0 ? Str(", for example ", below, " or ", above) : Str(" such as ", above));
}

Placement::Placement(PlacementKind kind, int64_t rows, int64_t row_length, int64_t ranks)
    : Placement(kind, rows, row_length, IdsOf(kind, rows, row_length, ranks)) {}

Placement::Placement(PlacementKind kind, int64_t rows, int64_t row_length,
                     std::vector<std::vector<int32_t>> ids)
    : kind_(kind),
      rows_(rows),
      row_length_(row_length),
      owner_(static_cast<size_t>(rows * ops::BlocksPerRow(row_length))),
      blocks_(ids.size()) {
  for (size_t rank = 0; rank < ids.size(); ++rank) {
    ops::BlockList& list = blocks_[rank];
    list.ids = std::move(ids[rank]);
    list.token_begin = {0};
    list.token_begin.reserve(list.ids.size() + 1);
    for (const int32_t id : list.ids) {
      owner_[static_cast<size_t>(id)] = static_cast<int32_t>(rank);
      list.token_begin.push_back(list.token_begin.back() + ops::BlockTokens(row_length, id));
    }
  }
}

Placement Placement::FromOwners(int64_t rows, int64_t row_length, int64_t ranks,
                                std::span<const int32_t> owner) {
  CheckSizes(rows, row_length, ranks);
  const int64_t blocks = rows * ops::BlocksPerRow(row_length);
  LONGSPAN_CHECK(static_cast<int64_t>(owner.size()) == blocks)
      << "placement: " << owner.size() << " owners for " << blocks << " blocks";
  for (const int32_t rank : owner) {
    LONGSPAN_CHECK(rank >= 0 && rank < ranks)
        << "placement: owner " << rank << " is not one of " << ranks << " ranks";
  }
  return {PlacementKind::kBalanced, rows, row_length, IdsOf(owner, ranks)};
}

Placement Placement::Grouped(int64_t size) const {
  LONGSPAN_CHECK(size >= 1 && ranks() % size == 0)
      << "placement: groups of " << size << " of " << ranks() << " ranks";
  std::vector<std::vector<int32_t>> ids(static_cast<size_t>(ranks() / size));
  for (int64_t rank = 0; rank < ranks(); ++rank) {
    std::vector<int32_t>& group = ids[static_cast<size_t>(rank / size)];
    group.insert(group.end(), blocks(rank).ids.begin(), blocks(rank).ids.end());
  }
  return {kind_, rows_, row_length_, std::move(ids)};
}

int64_t Placement::local_tokens() const {
  for (int64_t rank = 1; rank < ranks(); ++rank) {
    LONGSPAN_CHECK(local_tokens(rank) == local_tokens(0))
        << "placement: rank " << rank << " holds " << local_tokens(rank) << " tokens and rank 0 "
        << local_tokens(0);
  }
  return local_tokens(0);
}

std::vector<TokenRange> Placement::parts(int64_t row, int64_t rank) const {
  const int64_t per_row = ops::BlocksPerRow(row_length_);
  std::vector<TokenRange> parts;
  for (const int32_t id : blocks(rank).ids) {
    if (id / per_row != row) continue;
    const int64_t begin = id % per_row * ops::kMaskBlock;
    const int64_t end = begin + ops::BlockTokens(row_length_, id);
    if (!parts.empty() && parts.back().end == begin) {
      parts.back().end = end;
    } else {
      parts.push_back({begin, end});
    }
  }
  return parts;
}

uint64_t Placement::Hash() const {
  Fingerprint print;
  print.Add(rows_).Add(row_length_).Add(ranks());
  for (const ops::BlockList& list : blocks_) print.AddAll(list.ids);
  return print.value();
}

}  // namespace longspan::parallel
