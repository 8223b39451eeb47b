#include "parallel/context/builder.h"

#include "ops/core/error.h"
#include "parallel/context/exchange_routes.h"
#include "parallel/context/program_writer.h"

namespace longspan::parallel {

ProgramBuilder::ProgramBuilder(const ContextDemand& demand, const StrategyOptions& options)
    : demand_(demand), options_(options) {
  const auto ranks = static_cast<int>(demand.ranks());
  switch (options.kind) {
    case StrategyKind::kRing:
    case StrategyKind::kAllGather:
      break;
    case StrategyKind::kDoubleRing:
      if (options.ranks_per_node > 0 && ranks % options.ranks_per_node != 0) {
        throw InvalidArgument(Str("double ring: ", ranks, " ranks are not whole nodes of ",
                                  options.ranks_per_node,
                                  "; use ranks_per_node that divides the number of ranks"));
      }
      break;
    case StrategyKind::kExchange:
      if (ranks > 1) routes_ = std::make_shared<internal::ExchangeRoutes>(demand, options);
      break;
    default:
      throw InvalidArgument(Str("ProgramBuilder: ", ToString(options.kind),
                                " is not a strategy whose queries stay at home"));
  }
}

Programs ProgramBuilder::Build(int rank, bool with_masks) const {
  const auto ranks = static_cast<int>(demand_.ranks());
  LONGSPAN_CHECK(rank >= 0 && rank < ranks)
      << "ProgramBuilder: rank " << rank << " of " << ranks << " ranks";
  if (ranks == 1) return {};
  switch (options_.kind) {
    case StrategyKind::kAllGather:
      return internal::WriteAllGather(demand_, options_.head_groups, rank, with_masks);
    case StrategyKind::kExchange:
      return internal::WriteExchange(demand_, *routes_, rank, with_masks);
    case StrategyKind::kDoubleRing: {
      const int window = options_.ranks_per_node > 0 ? options_.ranks_per_node : ranks;
      return internal::WriteRing(demand_, rank, window, with_masks);
    }
    default:
      return internal::WriteRing(demand_, rank, ranks, with_masks);
  }
}

}  // namespace longspan::parallel
