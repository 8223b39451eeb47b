#include "tests/ops/attention/mask_cases.h"

#include <algorithm>
#include <numeric>

#include "ops/core/rng.h"

namespace longspan::test {
namespace {

using ops::AttentionPattern;
using ops::BlockList;
using ops::Documents;
using ops::S2Options;
using ops::StridePhase;

S2Options Incomplete(S2Options s2) {
  s2.allow_incomplete_coverage = true;
  return s2;
}

std::shared_ptr<const Documents> Rows(int64_t row_length,
                                      const std::vector<std::vector<int64_t>>& ends) {
  return std::make_shared<Documents>(Documents::FromEnds(row_length, ends));
}

// Documents of pseudo-random length up to `longest`.
std::vector<int64_t> RandomEnds(int64_t row_length, int64_t longest, uint64_t seed) {
  const Philox rng(seed, StreamOf("document ends"));
  std::vector<int64_t> ends;
  for (int64_t at = 0; at < row_length;) {
    at += 1 + static_cast<int64_t>(rng.Below(ends.size(), static_cast<uint64_t>(longest)));
    ends.push_back(std::min(at, row_length));
  }
  return ends;
}

std::vector<int32_t> Range(int64_t begin, int64_t end) {
  std::vector<int32_t> ids(static_cast<size_t>(std::max<int64_t>(0, end - begin)));
  std::iota(ids.begin(), ids.end(), static_cast<int32_t>(begin));
  return ids;
}

std::vector<int32_t> Concatenate(std::vector<int32_t> a, const std::vector<int32_t>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

}  // namespace

std::vector<NamedPattern> Patterns() {
  std::vector<NamedPattern> out;
  const auto add = [&](const AttentionPattern& p) { out.push_back({p.ToString(), p}); };
  add(AttentionPattern::Full());
  add(AttentionPattern::Causal());
  for (const int64_t window : {1, 7, 63, 64, 65, 128, 200, 100000}) {
    for (const int64_t sinks : {0, 1, 64, 70}) {
      if ((window + sinks) % 3 != 0 || window == 65) add(AttentionPattern::Window(window, sinks));
    }
  }
  for (const int64_t block : {16, 32, 64, 128, 256}) {
    add(AttentionPattern::S2({.block_size = block, .local_blocks = 1, .stride_blocks = 4}));
    add(AttentionPattern::S2({.block_size = block, .local_blocks = 2, .stride_blocks = 3}));
    add(AttentionPattern::S2(
        Incomplete({.block_size = block, .local_blocks = 1, .stride_blocks = 6})));
    add(AttentionPattern::S2({.block_size = block,
                              .local_blocks = 3,
                              .stride_blocks = 2,
                              .homogeneous = true,
                              .phase = StridePhase::kRow}));
    add(AttentionPattern::S2({.block_size = block,
                              .local_blocks = 1,
                              .stride_blocks = 5,
                              .head_offset = 2,
                              .dense_heads = 2}));
    add(AttentionPattern::S2(Incomplete({.block_size = block,
                                         .local_blocks = 2,
                                         .stride_blocks = 8,
                                         .head_step = 3,
                                         .head_offset = 9,
                                         .phase = StridePhase::kRow})));
  }
  add(AttentionPattern::S2({.block_size = 64, .local_blocks = 1, .stride_blocks = 1}));
  add(AttentionPattern::S2(
      Incomplete({.block_size = 16, .local_blocks = 5, .stride_blocks = 1000000})));
  add(AttentionPattern::S2({.block_size = 1024, .local_blocks = 1, .stride_blocks = 2}));
  return out;
}

std::vector<NamedDocuments> DocumentSets() {
  return {
      {"one document", Rows(640, {{640}})},
      {"short row", Rows(37, {{37}})},
      {"one token", Rows(1, {{1}})},
      {"odd row", Rows(999, {{999}})},
      {"long row", Rows(2048, {{2048}})},
      {"borders on blocks", Rows(512, {{64, 256, 512}})},
      {"borders inside blocks", Rows(700, {{30, 50, 331, 390, 700}})},
      {"long documents, borders inside", Rows(1500, {{500, 1001, 1500}})},
      {"many small", Rows(400, {RandomEnds(400, 20, 1)})},
      {"random", Rows(1100, {RandomEnds(1100, 300, 2)})},
      {"rows", Rows(256, {{256}, {100, 256}, {256}})},
      {"odd rows", Rows(201, {{201}, {64, 65, 201}, RandomEnds(201, 90, 3), {200, 201}})},
  };
}

std::vector<NamedShard> Shards(const Documents& documents) {
  const int64_t n = documents.rows * ops::BlocksPerRow(documents.row_length);
  const auto list = [&](std::vector<int32_t> ids) { return BlockList::FromIds(documents, ids); };
  const int64_t eighth = std::max<int64_t>(1, n / 8), half = (n + 1) / 2;
  std::vector<int32_t> shuffled = Range(0, n), odd, third;
  const Philox rng(7, StreamOf("shuffle"));
  for (size_t i = shuffled.size(); i > 1; --i)
    std::swap(shuffled[i - 1], shuffled[rng.Below(i, i)]);
  for (int64_t i = 1; i < n; i += 2) odd.push_back(static_cast<int32_t>(i));
  for (int64_t i = 0; i < n; i += 3) third.push_back(static_cast<int32_t>(i));
  const auto zigzag = Concatenate(Range(eighth, std::min(n, 2 * eighth)),
                                  Range(std::max(2 * eighth, n - 2 * eighth), n - eighth));
  return {
      {"whole", BlockList::All(documents), BlockList::All(documents)},
      {"contiguous part against itself", list(Range(half, n)), list(Range(half, n))},
      {"ring step: later queries, earlier keys", list(Range(half, n)), list(Range(0, half))},
      {"ring step: earlier queries, later keys", list(Range(0, half)), list(Range(half, n))},
      {"zigzag pair against all", list(zigzag), BlockList::All(documents)},
      {"zigzag pair against the rest", list(zigzag),
       list(Concatenate(Range(0, eighth), Range(std::max(eighth, n - eighth), n)))},
      {"striped", list(odd), list(third)},
      {"shuffled", list(shuffled),
       list(std::vector<int32_t>(shuffled.rbegin(), shuffled.rend() - n / 3))},
      {"no keys", BlockList::All(documents), list({})},
  };
}

std::vector<MaskCase> AllMaskCases() {
  std::vector<MaskCase> cases;
  for (const NamedDocuments& documents : DocumentSets()) {
    for (const NamedShard& shard : Shards(*documents.documents)) {
      for (const NamedPattern& pattern : Patterns()) cases.push_back({pattern, documents, shard});
    }
  }
  return cases;
}

std::vector<MaskCase> SampleMaskCases(size_t count, uint64_t seed) {
  std::vector<MaskCase> cases = AllMaskCases();
  const Philox rng(seed, StreamOf("mask cases"));
  for (size_t i = 0; i + 1 < cases.size() && i < count; ++i) {
    std::swap(cases[i], cases[i + rng.Below(i, cases.size() - i)]);
  }
  if (cases.size() > count) cases.resize(count);
  return cases;
}

}  // namespace longspan::test
