#include "parallel/mesh/device_mesh.h"

#include <gtest/gtest.h>

#include "parallel/comm/local.h"
#include "parallel/comm/self.h"

namespace longspan::test {
namespace {

using parallel::Communicator;
using parallel::DeviceMesh;
using parallel::ReduceOp;

TEST(DeviceMeshTest, CpIsInnermost) {
  parallel::RunLocal(6, [](Communicator& world) {
    DeviceMesh mesh(world, {.dp = 2, .cp = 3});
    EXPECT_EQ(&mesh.world(), &world);
    EXPECT_EQ(mesh.shape().dp, 2);
    EXPECT_EQ(mesh.shape().cp, 3);
    EXPECT_EQ(mesh.dp_index(), world.rank() / 3);
    EXPECT_EQ(mesh.cp_index(), world.rank() % 3);
    EXPECT_EQ(mesh.axis("cp").size(), 3);
    EXPECT_EQ(mesh.axis("cp").rank(), world.rank() % 3);
    EXPECT_EQ(mesh.axis("dp").size(), 2);
    EXPECT_EQ(mesh.axis("dp").rank(), world.rank() / 3);
    // Who is really behind the axes: ranks {3d, 3d+1, 3d+2} along cp, {c, c+3} along dp.
    const int64_t bit = int64_t{1} << world.rank();
    EXPECT_EQ(AllReduceValue(mesh.axis("cp"), bit, ReduceOp::kSum), world.rank() < 3 ? 7 : 56);
    EXPECT_EQ(AllReduceValue(mesh.axis("dp"), bit, ReduceOp::kSum), 9 << (world.rank() % 3));
    EXPECT_THROW(mesh.axis("tp"), InvalidArgument);
  });
}

TEST(DeviceMeshTest, AxesOfOneRankAreGroupsOfOne) {
  parallel::SelfCommunicator self;
  DeviceMesh mesh(self, {});
  EXPECT_EQ(mesh.axis("dp").size(), 1);
  EXPECT_EQ(mesh.axis("cp").size(), 1);
  parallel::RunLocal(3, [](Communicator& world) {
    DeviceMesh wide(world, {.dp = 1, .cp = 3}), tall(world, {.dp = 3, .cp = 1});
    EXPECT_EQ(wide.axis("dp").size(), 1);
    EXPECT_EQ(tall.axis("cp").size(), 1);
    EXPECT_EQ(tall.dp_index(), world.rank());
    EXPECT_EQ(wide.cp_index(), world.rank());
  });
}

// The largest groups of neighbours that cut the cp axis evenly and never lie across nodes, found by
// trying.
TEST(DeviceMeshTest, GroupsOfNeighboursShareANode) {
  for (const auto& [dp, cp] : {std::pair{1, 6}, {2, 4}, {3, 4}, {6, 2}, {12, 1}}) {
    for (const int node_ranks : {0, 1, 2, 3, 4, 6, 12}) {
      const int ranks = dp * cp;
      if (node_ranks > 0 && ranks % node_ranks != 0) continue;
      int largest = 0;
      for (int n = 1; n <= cp; ++n) {
        bool together = cp % n == 0;
        for (int r = 0; r < ranks && node_ranks > 0; ++r) {
          together = together && r / node_ranks == r / n * n / node_ranks;
        }
        if (together) largest = n;
      }
      SCOPED_TRACE(Str("dp ", dp, " cp ", cp, " nodes of ", node_ranks));
      parallel::RunLocal(ranks, [&](Communicator& world) {
        const DeviceMesh mesh(world, {.dp = dp, .cp = cp, .node_ranks = node_ranks});
        EXPECT_EQ(mesh.node_ranks(), largest == cp ? 0 : largest);
      });
    }
  }
}

std::string ConfigErrorOf(int ranks, parallel::MeshShape shape) {
  std::string message;
  parallel::RunLocal(ranks, [&](Communicator& world) {
    try {
      DeviceMesh mesh(world, shape);
    } catch (const ConfigError& e) {
      if (world.rank() == 0) message = e.what();
    }
  });
  return message;
}

TEST(DeviceMeshTest, AWrongNumberOfRanksIsOneSentence) {
  EXPECT_EQ(ConfigErrorOf(3, {.dp = 2, .cp = 2}),
            "parallel.dp = 2 times parallel.cp = 2 needs 4 ranks but 3 were launched: start 4 "
            "(launch/mpirun.sh -n 4) or set dp and cp so that dp * cp = 3");
  EXPECT_EQ(ConfigErrorOf(1, {.dp = 1, .cp = 2}),
            "parallel.dp = 1 times parallel.cp = 2 needs 2 ranks but 1 was launched: start 2 "
            "(launch/mpirun.sh -n 2) or set dp and cp so that dp * cp = 1");
  EXPECT_EQ(ConfigErrorOf(1, {.dp = 1 << 16, .cp = 1 << 16}).find("parallel.dp = 65536"), 0u)
      << "the product must not overflow to 0";
  EXPECT_EQ(ConfigErrorOf(2, {.dp = 0, .cp = 2}),
            "parallel.dp = 0 and parallel.cp = 2 must both be at least 1");
  EXPECT_NE(ConfigErrorOf(2, {.dp = -1, .cp = -2}), "") << "the product of two negatives";
}

}  // namespace
}  // namespace longspan::test
