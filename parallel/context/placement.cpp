#include "parallel/context/placement.h"

#include "ops/core/error.h"

namespace longspan::parallel {
namespace {

int64_t Granule(PlacementKind kind, int64_t ranks) {
  if (ranks == 1) return 1;
  return ops::kMaskBlock * ranks * (kind == PlacementKind::kZigzag ? 2 : 1);
}

std::vector<TokenRange> PartsOf(PlacementKind kind, int64_t row_length, int64_t ranks,
                                int64_t rank) {
  if (ranks == 1) return {{0, row_length}};
  if (kind == PlacementKind::kContiguous) {
    const int64_t n = row_length / ranks;
    return {{rank * n, (rank + 1) * n}};
  }
  const int64_t n = row_length / (2 * ranks), mirror = 2 * ranks - 1 - rank;
  return {{rank * n, (rank + 1) * n}, {mirror * n, (mirror + 1) * n}};
}

}  // namespace

const char* ToString(PlacementKind kind) {
  return kind == PlacementKind::kContiguous ? "CONTIGUOUS" : "ZIGZAG";
}

std::string Placement::Problem(PlacementKind kind, int64_t row_length, int64_t ranks) {
  const int64_t granule = Granule(kind, ranks);
  if (row_length > 0 && row_length % granule == 0) return "";
  const int64_t below = row_length / granule * granule, above = below + granule;
  return Str("a context of ", row_length, " tokens cannot be placed ", ToString(kind),
             " on cp = ", ranks, " ranks in whole blocks of ", ops::kMaskBlock,
             " tokens; use a multiple of ", granule,
             below > 0 ? Str(", for example ", below, " or ", above) : Str(" such as ", above));
}

Placement::Placement(PlacementKind kind, int64_t rows, int64_t row_length, int64_t ranks)
    : kind_(kind), rows_(rows), row_length_(row_length) {
  const std::string problem = Problem(kind, row_length, ranks);
  if (!problem.empty()) throw InvalidArgument(problem);
  const ops::Documents shape = ops::Documents::OnePerRow(rows, row_length);
  const int64_t blocks_per_row = ops::BlocksPerRow(row_length);
  for (int64_t rank = 0; rank < ranks; ++rank) {
    parts_.push_back(PartsOf(kind, row_length, ranks, rank));
    std::vector<int32_t> ids;
    for (int64_t row = 0; row < rows; ++row) {
      for (const TokenRange& part : parts_.back()) {
        const int64_t end = (part.end + ops::kMaskBlock - 1) / ops::kMaskBlock;
        for (int64_t b = part.begin / ops::kMaskBlock; b < end; ++b) {
          ids.push_back(static_cast<int32_t>(row * blocks_per_row + b));
        }
      }
    }
    blocks_.push_back(ops::BlockList::FromIds(shape, std::move(ids)));
  }
}

}  // namespace longspan::parallel
