#include "tests/ops/attention/mask_cases.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <map>
#include <numeric>
#include <set>
#include <utility>

#include "ops/core/error.h"
#include "ops/core/rng.h"

namespace longspan::test {
namespace {

using ops::AttentionPattern;
using ops::BlockList;
using ops::Documents;
using ops::RandomBlocksOptions;
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

void AddS2(std::vector<AttentionPattern>& out) {
  const auto add = [&](const S2Options& s2) { out.push_back(AttentionPattern::S2(s2)); };
  for (const int64_t block : {16, 32, 64, 128, 256}) {
    add({.block_size = block, .local_blocks = 1, .stride_blocks = 4});
    add({.block_size = block, .local_blocks = 2, .stride_blocks = 3});
    add(Incomplete({.block_size = block, .local_blocks = 1, .stride_blocks = 6}));
    add({.block_size = block,
         .local_blocks = 3,
         .stride_blocks = 2,
         .homogeneous = true,
         .phase = StridePhase::kRow});
    add({.block_size = block,
         .local_blocks = 1,
         .stride_blocks = 5,
         .head_offset = 2,
         .dense_heads = 2});
    add(Incomplete({.block_size = block,
                    .local_blocks = 2,
                    .stride_blocks = 8,
                    .head_step = 3,
                    .head_offset = 9,
                    .phase = StridePhase::kRow}));
  }
  add({.block_size = 64, .local_blocks = 1, .stride_blocks = 1});
  add(Incomplete({.block_size = 16, .local_blocks = 5, .stride_blocks = 1000000}));
  add({.block_size = 1024, .local_blocks = 1, .stride_blocks = 2});
}

void AddIntervals(std::vector<AttentionPattern>& out) {
  for (const int64_t window : {1, 7, 63, 64, 65, 127, 128, 200, 100000}) {
    for (const int64_t sinks : {0, 1, 64, 70}) {
      if ((window + sinks) % 3 != 0 || window == 65) {
        out.push_back(AttentionPattern::Window(window, sinks));
      }
    }
  }
  for (const auto& [window, sinks] :
       {std::pair{1, 0}, {7, 0}, {64, 1}, {65, 70}, {127, 0}, {200, 0}, {100000, 5}}) {
    out.push_back(AttentionPattern::Window(window, sinks, true));
  }
  for (const auto& [window, global] :
       {std::pair{1, 1}, {33, 70}, {64, 64}, {200, 10}, {7, 100000}, {100, 0}}) {
    out.push_back(AttentionPattern::GlobalWindow(window, global, global != 64));
  }
  for (const int64_t prefix : {0, 1, 2, 63, 64, 65, 200, 100000}) {
    out.push_back(AttentionPattern::Prefix(prefix));
  }
  for (const std::vector<int64_t>& lengths :
       {std::vector<int64_t>{1}, {7}, {64}, {100, 50}, {30, 1, 2, 3, 64}, {200, 20}, {100000}}) {
    out.push_back(AttentionPattern::SharedQuestion(lengths));
    out.push_back(AttentionPattern::CausalBlockwise(lengths));
  }
  for (const int64_t block : {16, 64, 128, 1024}) {
    out.push_back(AttentionPattern::BlockCausal(block));
  }
  out.push_back(AttentionPattern::Spans({{}, {1, 0}, {64, 3}, {200, 70}}));
  out.push_back(AttentionPattern::Spans({{30, 0}, {30, 0}, {}, {100000, 5}}));
}

void AddBlocks(std::vector<AttentionPattern>& out) {
  for (const int64_t block : {16, 32, 64, 128}) {
    out.push_back(AttentionPattern::Power({block, 1, 0}));
    out.push_back(AttentionPattern::Power({block, 3, 1}));
    out.push_back(AttentionPattern::Power({block, 5, 4}));
    out.push_back(AttentionPattern::Dilated({block, 3, 2}));
    out.push_back(AttentionPattern::Dilated({block, 2, 3, true}));
  }
  out.push_back(AttentionPattern::Power({16, 100000, 0}));
  out.push_back(AttentionPattern::Power({64, 1, 100000}));
  out.push_back(AttentionPattern::Dilated({16, 5, 1}));
  out.push_back(AttentionPattern::Dilated({32, 100000, 5, true}));
  out.push_back(AttentionPattern::Dilated({256, 2, 1, true}));
  out.push_back(AttentionPattern::Dilated({64, 1, 7}));
  const auto add = [&](const RandomBlocksOptions& random) {
    out.push_back(AttentionPattern::RandomBlocks(random));
  };
  add({.block_size = 16, .density = 0.3});
  add({.block_size = 64, .density = 0.3, .seed = 5});
  add({.block_size = 64, .density = 1});
  add({.block_size = 64, .density = 0.5, .bidirectional = true});
  add({.block_size = 128, .density = 0.4, .own_block = false});
  add({.block_size = 32, .density = 0.02, .bidirectional = true, .own_block = false});
  add({.block_size = 16, .density = 0.3, .mean_blocks = 5, .min_blocks = 2, .bidirectional = true});
  add({.block_size = 64,
       .density = 0.4,
       .mean_blocks = 3,
       .per_head = true,
       .phase = StridePhase::kRow});
  add({.block_size = 32, .density = 0.6, .mean_blocks = 4, .min_blocks = 4, .own_block = false});
  add({.block_size = 64, .density = 0.3, .bidirectional = true, .per_head = true});
}

}  // namespace

std::vector<NamedPattern> Patterns() {
  std::vector<AttentionPattern> patterns{AttentionPattern::Full(), AttentionPattern::Causal()};
  AddIntervals(patterns);
  AddS2(patterns);
  AddBlocks(patterns);
  std::vector<NamedPattern> named;
  for (const AttentionPattern& p : patterns) named.push_back({p.ToString(), p});
  return named;
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
  const std::vector<MaskCase> all = AllMaskCases();
  const std::vector<NamedPattern> patterns = Patterns();
  std::map<ops::PatternKind, std::vector<size_t>> of_kind;
  for (size_t p = 0; p < patterns.size(); ++p) of_kind[patterns[p].pattern.kind].push_back(p);
  using Pair = std::pair<std::string, std::string>;
  const auto pairs_of = [](const MaskCase& c) {
    const std::string kind = Str(static_cast<int>(c.pattern.pattern.kind));
    return std::array<Pair, 4>{Pair{c.pattern.name, ""}, Pair{kind, c.documents.name},
                               Pair{kind, c.shard.name}, Pair{c.documents.name, c.shard.name}};
  };
  // Of some candidates, each of a kind drawn evenly, the one with most pairs not yet seen.
  const Philox rng(seed, StreamOf("mask cases"));
  uint64_t draws = 0;
  const auto draw = [&](size_t below) { return rng.Below(draws++, below); };
  std::set<Pair> seen;
  std::set<size_t> taken;
  std::vector<MaskCase> cases;
  while (cases.size() < std::min(count, all.size())) {
    size_t best = all.size();
    int most = -1;
    for (int n = 0; n < 60; ++n) {
      const auto& [kind, members] = *std::next(of_kind.begin(), draw(of_kind.size()));
      const size_t setting = draw(all.size() / patterns.size());  // documents and shard
      const size_t candidate = setting * patterns.size() + members[draw(members.size())];
      if (taken.count(candidate) != 0) continue;
      int fresh = 0;
      for (const Pair& pair : pairs_of(all[candidate])) fresh += seen.count(pair) == 0;
      if (fresh > most) {
        most = fresh;
        best = candidate;
      }
    }
    if (best == all.size()) continue;
    taken.insert(best);
    for (const Pair& pair : pairs_of(all[best])) seen.insert(pair);
    cases.push_back(all[best]);
  }
  return cases;
}

}  // namespace longspan::test
