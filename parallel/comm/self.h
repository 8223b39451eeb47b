#pragma once
#include <memory>
#include <optional>

#include "parallel/comm/communicator.h"

namespace longspan::parallel {

// The group of one rank: reductions and broadcasts are identities, gathers and self-sends are
// copies, everything is complete when it returns. Never an error where a larger group would work.
class SelfCommunicator : public Communicator {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  std::string name() const override { return "self"; }

  Work AllReduce(Tensor t, ReduceOp op) override;
  Work AllGather(Tensor in, Tensor out) override;
  Work ReduceScatter(Tensor in, Tensor out) override;
  Work Broadcast(Tensor t, int root) override;
  // Throws CommError when the self-sends and the receives differ in number or size.
  Work Exchange(std::vector<Send> sends, std::vector<Recv> recvs) override;
  void Barrier() override {}
  void Progress() override {}
  void SetTimeout(double) override {}
  void UseDevice(std::shared_ptr<cuda::Runtime> runtime) override;
  std::unique_ptr<Communicator> Split(int color, int key) override;
  [[noreturn]] void Abort(const std::string& reason) override;

 private:
  void Copy(const Tensor& from, const Tensor& to);

  std::shared_ptr<cuda::Runtime> runtime_;
  std::optional<Device> gpu_;
};

}  // namespace longspan::parallel
