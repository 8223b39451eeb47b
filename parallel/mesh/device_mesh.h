#pragma once
#include <memory>
#include <string_view>

#include "parallel/comm/communicator.h"

namespace longspan::parallel {

struct MeshShape {
  int dp = 1;  // data-parallel replicas
  int cp = 1;  // ranks that share each sequence
  // Neighbouring ranks of the world that share a node; 0: all of them.
  int node_ranks = 0;
};

// The ranks of a job as a dp x cp grid with cp innermost: rank = dp_index * cp + cp_index, so that
// the ranks of one sequence are neighbours (the same node where possible).
//
// Errors   ConfigError naming parallel.dp, parallel.cp and the number of ranks when the product
//          does not match; InvalidArgument for an unknown axis
// Threads  construction is collective over `world`; every axis has its own communicator
class DeviceMesh {
 public:
  // `world` must outlive the mesh.
  DeviceMesh(Communicator& world, MeshShape shape);

  const MeshShape& shape() const { return shape_; }
  Communicator& world() { return *world_; }
  // "cp": the ranks that share my sequences, ordered by cp_index; "dp": those with my cp_index.
  Communicator& axis(std::string_view name);
  int dp_index() const { return dp_index_; }
  int cp_index() const { return cp_index_; }
  // Neighbouring ranks of the cp axis that certainly share a node, so that groups of so many never
  // lie across nodes; 0 when all do.
  int node_ranks() const;

 private:
  Communicator* world_;
  MeshShape shape_;
  int dp_index_ = 0, cp_index_ = 0;
  std::unique_ptr<Communicator> dp_, cp_;
};

}  // namespace longspan::parallel
