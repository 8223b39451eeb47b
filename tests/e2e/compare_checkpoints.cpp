// compare_checkpoints EXPECTED ACTUAL [PREFIX]: how far the tensors of two checkpoints, of any
// layouts, are apart. With a prefix such as "weights/" only tensors whose names begin with it.
//
// Prints {"tensors": [{"name", "dtype", "numel", "max_difference", "max", "norm_difference",
// "norm"}, ...]}: largest magnitude and Euclidean norm of (actual - expected) and of expected, in
// f64. A number that is not finite is printed as null. Exit code 2 when a checkpoint is damaged or
// names, dtypes or shapes differ.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <exception>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "ops/core/context.h"
#include "ops/core/error.h"
#include "tests/support/numeric.h"
#include "trainer/checkpoint/reader.h"

namespace longspan::test {
namespace {

using nlohmann::ordered_json;
using trainer::CheckpointReader;
using trainer::NamedTensor;

Shape ShapeOf(const std::vector<int64_t>& dims) {
  Shape shape = dims.size() == 0   ? Shape{}
                : dims.size() == 1 ? Shape{0}
                : dims.size() == 2 ? Shape{0, 0}
                : dims.size() == 3 ? Shape{0, 0, 0}
                                   : Shape{0, 0, 0, 0};
  for (int i = 0; i < shape.rank(); ++i) shape.set(i, dims[static_cast<size_t>(i)]);
  return shape;
}

// Tensors of the form that `like` has, filled from `reader`.
std::vector<NamedTensor> Load(Context& ctx, const CheckpointReader& reader,
                              const CheckpointReader& like, const std::string& prefix) {
  std::vector<NamedTensor> tensors;
  for (const trainer::TensorEntry& entry : like.tensors()) {
    if (!entry.name.starts_with(prefix)) continue;
    tensors.push_back({entry.name, ctx.Empty(ShapeOf(entry.shape), entry.dtype)});
  }
  reader.Load(tensors, prefix);
  return tensors;
}

double Norm(const Vec& v) { return std::sqrt(Dot(v, v)); }

// NaN when any element is, unlike std::max.
double LargestMagnitude(const Vec& v) {
  double largest = 0;
  for (double x : v) {
    if (!(std::abs(x) <= largest)) largest = std::abs(x);
    if (std::isnan(largest)) break;
  }
  return largest;
}

ordered_json Compare(const NamedTensor& expected, const NamedTensor& actual) {
  const Vec e = ToVec(expected.tensor), a = ToVec(actual.tensor);
  Vec difference(e.size());
  for (size_t i = 0; i < e.size(); ++i) difference[i] = a[i] - e[i];
  return {{"name", expected.name},
          {"dtype", ToString(expected.tensor.dtype())},
          {"numel", expected.tensor.numel()},
          {"max_difference", LargestMagnitude(difference)},
          {"max", LargestMagnitude(e)},
          {"norm_difference", Norm(difference)},
          {"norm", Norm(e)}};
}

int Main(const std::string& expected_path, const std::string& actual_path,
         const std::string& prefix) {
  Context ctx(ContextOptions{.threads = 1});
  const auto expected_reader = CheckpointReader::Open(expected_path);
  const auto actual_reader = CheckpointReader::Open(actual_path);
  const auto expected = Load(ctx, expected_reader, expected_reader, prefix);
  const auto actual = Load(ctx, actual_reader, expected_reader, prefix);
  ordered_json tensors = ordered_json::array();
  for (size_t i = 0; i < expected.size(); ++i) tensors.push_back(Compare(expected[i], actual[i]));
  std::printf("%s\n", ordered_json{{"tensors", tensors}}.dump().c_str());
  return 0;
}

}  // namespace
}  // namespace longspan::test

int main(int argc, char** argv) {
  if (argc < 3 || argc > 4) {
    std::fprintf(stderr, "usage: compare_checkpoints EXPECTED ACTUAL [PREFIX]\n");
    return 2;
  }
  try {
    return longspan::test::Main(argv[1], argv[2], argc == 4 ? argv[3] : "");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "compare_checkpoints: %s\n", error.what());
    return 2;
  }
}
