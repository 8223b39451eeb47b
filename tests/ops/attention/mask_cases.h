#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "ops/attention/block_mask.h"

namespace longspan::test {

// The product patterns x documents x shards over which masks and kernels are tested.
struct NamedPattern {
  std::string name;
  ops::AttentionPattern pattern;
};
struct NamedDocuments {
  std::string name;
  std::shared_ptr<const ops::Documents> documents;
};
// Queries of one rank against keys that it holds or receives.
struct NamedShard {
  std::string name;
  ops::BlockList queries, keys;
};

struct MaskCase {
  NamedPattern pattern;
  NamedDocuments documents;
  NamedShard shard;
  int64_t kv_heads = 4;
  std::string Name() const { return pattern.name + " | " + documents.name + " | " + shard.name; }
};

std::vector<NamedPattern> Patterns();
std::vector<NamedDocuments> DocumentSets();
std::vector<NamedShard> Shards(const ops::Documents& documents);

// The whole product, or `count` of its cases: drawn so that every pattern and every pair of a kind
// of pattern, documents and a shard come early.
std::vector<MaskCase> AllMaskCases();
std::vector<MaskCase> SampleMaskCases(size_t count, uint64_t seed);

}  // namespace longspan::test
