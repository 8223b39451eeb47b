#include "tests/trainer/checkpoint/support.h"

#include <sys/wait.h>
#include <unistd.h>

#include <bit>
#include <cstdlib>
#include <cstring>

#include "ops/core/rng.h"
#include "parallel/comm/local.h"

namespace longspan::test {
namespace {

struct Spec {
  const char* name;
  Shape shape;
  DType dtype;
};

const std::vector<Spec>& Specs() {
  static const std::vector<Spec> specs = {
      {"model.embedding", {7, 33}, DType::kF32},
      {"model.norm", {64}, DType::kF32},
      {"model.scale", {}, DType::kF32},
      {"model.copy", {5, 13}, DType::kBF16},
      {"optimizer.m", {3, 3, 31}, DType::kF64},
      {"optimizer.steps", {1}, DType::kI64},
      {"optimizer.none", {0, 8}, DType::kF32},
      {"state.bytes", {131}, DType::kU8},
      {"state.counts", {2, 2, 5, 11}, DType::kI32},
  };
  return specs;
}

void Fill(Tensor& tensor, const Philox& rng) {
  for (int64_t i = 0; i < tensor.numel(); ++i) {
    const auto at = static_cast<size_t>(i);
    const auto index = static_cast<uint64_t>(i);
    switch (tensor.dtype()) {
      case DType::kF32:
        tensor.data<float>()[at] = static_cast<float>(rng.Normal(index));
        break;
      case DType::kBF16:
        tensor.data<BF16>()[at] = BF16(static_cast<float>(rng.Normal(index)));
        break;
      case DType::kF64:
        tensor.data<double>()[at] = rng.Normal(index);
        break;
      case DType::kI32:
        tensor.data<int32_t>()[at] = static_cast<int32_t>(rng.Bits(index));
        break;
      case DType::kI64:
        tensor.data<int64_t>()[at] = static_cast<int64_t>(rng.Bits(index));
        break;
      case DType::kU8:
        tensor.data<uint8_t>()[at] = static_cast<uint8_t>(rng.Bits(index));
        break;
    }
  }
}

}  // namespace

TemporaryDirectory::TemporaryDirectory() {
  std::string name = (std::filesystem::temp_directory_path() / "longspan_test.XXXXXX").string();
  LONGSPAN_CHECK(::mkdtemp(name.data()) != nullptr) << name;
  path_ = name;
}

TemporaryDirectory::~TemporaryDirectory() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

std::vector<trainer::NamedTensor> MixedTensors(Context& ctx, uint64_t version) {
  std::vector<trainer::NamedTensor> tensors;
  for (const Spec& spec : Specs()) {
    Tensor tensor = ctx.Empty(spec.shape, spec.dtype);
    Fill(tensor, Philox(version, StreamOf(spec.name)));
    tensors.push_back({spec.name, tensor});
  }
  return tensors;
}

std::vector<trainer::NamedTensor> BlankTensors(Context& ctx) {
  std::vector<trainer::NamedTensor> tensors;
  for (const Spec& spec : Specs()) {
    Tensor tensor = ctx.Empty(spec.shape, spec.dtype);
    std::memset(tensor.raw(), 0x5a, tensor.bytes());
    tensors.push_back({spec.name, tensor});
  }
  return tensors;
}

std::string FirstDifference(const std::vector<trainer::NamedTensor>& a,
                            const std::vector<trainer::NamedTensor>& b) {
  if (a.size() != b.size()) return "the number of tensors";
  for (size_t i = 0; i < a.size(); ++i) {
    const Tensor &x = a[i].tensor, &y = b[i].tensor;
    if (a[i].name != b[i].name || x.dtype() != y.dtype() || !(x.shape() == y.shape()) ||
        std::memcmp(x.raw(), y.raw(), x.bytes()) != 0) {
      return a[i].name;
    }
  }
  return "";
}

trainer::CheckpointInfo SampleInfo(int64_t step, uint64_t version) {
  trainer::CheckpointInfo info;
  info.step = step;
  info.config_text = "run { seed: 7 }\n";
  info.corpus_fingerprint = "corpus-4711";
  info.samples_consumed = step * 3;
  info.seed = 0xfedcba9876543210ull;
  info.dp = 2;
  info.cp = 3;
  info.identity = {{"run.seed", "7"}, {"model.hidden_size", "256"}};
  info.extra = {{"version", std::to_string(version)}, {"raw", std::string("\0\xff\x01", 3)}};
  return info;
}

void SaveMixed(const std::filesystem::path& directory, int ranks, int64_t step, uint64_t version,
               trainer::CheckpointWriterOptions options) {
  options.directory = directory;
  parallel::RunLocal(ranks, [&](parallel::Communicator& world) {
    Context ctx({.threads = 1});
    trainer::CheckpointWriter writer(options, world);
    writer.Save(SampleInfo(step, version), MixedTensors(ctx, version));
    writer.Wait();
  });
}

std::set<std::string> Names(const std::filesystem::path& directory) {
  std::set<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    names.insert(entry.path().filename().string());
  }
  return names;
}

int RunInChild(const std::function<void()>& action) {
  const pid_t child = ::fork();
  LONGSPAN_CHECK(child >= 0);
  if (child == 0) {
    try {
      action();
    } catch (const std::exception& error) {
      std::fprintf(stderr, "child: %s\n", error.what());
      ::_exit(99);
    }
    ::_exit(0);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

}  // namespace longspan::test
