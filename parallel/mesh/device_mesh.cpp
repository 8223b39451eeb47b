#include "parallel/mesh/device_mesh.h"

#include <numeric>

namespace longspan::parallel {

DeviceMesh::DeviceMesh(Communicator& world, MeshShape shape) : world_(&world), shape_(shape) {
  const int64_t product = int64_t{shape.dp} * shape.cp;
  if (shape.dp < 1 || shape.cp < 1) {
    throw ConfigError(Str("parallel.dp = ", shape.dp, " and parallel.cp = ", shape.cp,
                          " must both be at least 1"));
  }
  if (product != world.size()) {
    throw ConfigError(Str("parallel.dp = ", shape.dp, " times parallel.cp = ", shape.cp, " needs ",
                          product, product == 1 ? " rank" : " ranks", " but ", world.size(),
                          world.size() == 1 ? " was" : " were", " launched: start ", product,
                          " (launch/mpirun.sh -n ", product,
                          ") or set dp and cp so that dp * cp = ", world.size()));
  }
  dp_index_ = world.rank() / shape.cp;
  cp_index_ = world.rank() % shape.cp;
  cp_ = world.Split(dp_index_, cp_index_);
  dp_ = world.Split(cp_index_, dp_index_);
}

int DeviceMesh::node_ranks() const {
  if (shape_.node_ranks == 0 || shape_.node_ranks % shape_.cp == 0) return 0;
  return std::gcd(shape_.node_ranks, shape_.cp);
}

Communicator& DeviceMesh::axis(std::string_view name) {
  if (name == "cp") return *cp_;
  if (name == "dp") return *dp_;
  throw InvalidArgument(Str("mesh axis \"", name, "\" does not exist: use \"dp\" or \"cp\""));
}

}  // namespace longspan::parallel
