#include "ops/attention/cuda/device_mask.h"

#include <cstring>

#include "ops/core/cuda/backend.h"

namespace longspan::ops {
namespace {

constexpr size_t kAlignment = 16;  // bytes, of every array

Tensor Uploaded(Context& ctx, const void* data, size_t bytes) {
  Tensor copy = ctx.Empty({static_cast<int64_t>(bytes)}, DType::kU8);
  cuda::Upload(ctx.cuda(), copy.raw(), data, bytes);
  return copy;
}

template <class T>
struct Copy {
  Tensor storage;
  T view;
};

DocumentArrays OnDevice(Context& ctx, const Documents& documents) {
  const size_t tokens = documents.doc_begin.size();
  const Tensor& copy = documents.device_copies.Get<Tensor>(ctx, [&] {
    std::vector<int32_t> both = documents.doc_begin;
    both.insert(both.end(), documents.doc_end.begin(), documents.doc_end.end());
    return Uploaded(ctx, both.data(), both.size() * sizeof(int32_t));
  });
  const auto* begin = reinterpret_cast<const int32_t*>(copy.raw());
  return {begin, begin + tokens};
}

}  // namespace

template <class T>
size_t FlatMask::Add(const std::vector<T>& values) {
  const size_t at = (bytes_.size() + kAlignment - 1) / kAlignment * kAlignment;
  bytes_.resize(at + values.size() * sizeof(T));
  if (!values.empty()) std::memcpy(bytes_.data() + at, values.data(), values.size() * sizeof(T));
  return at;
}

FlatMask::Axis FlatMask::AddAxis(const BlockMask& mask, const BlockList& list,
                                 const BlockRuns& runs) {
  const std::vector<BlockTask> tasks = TasksByCost(mask, runs);
  Axis axis;
  axis.blocks = list.size();
  axis.task_count = static_cast<int64_t>(tasks.size());
  for (const BlockTask& task : tasks) {
    if (!runs.Row(mask.pattern_of(task.kv_head), task.index).empty()) ++axis.busy_tasks;
  }
  axis.ids = Add(list.ids);
  axis.token_begin = Add(list.token_begin);
  axis.offsets = Add(runs.offsets);
  axis.runs = Add(runs.runs);
  axis.tasks = Add(tasks);
  return axis;
}

FlatMask::FlatMask(const BlockMask& mask)
    : rule_(mask.rule()),
      kv_heads_(mask.kv_heads()),
      patterns_(mask.patterns()),
      blocks_per_row_(BlocksPerRow(mask.documents().row_length)) {
  std::vector<int32_t> pattern_of, rule_head;
  for (int64_t h = 0; h < kv_heads_; ++h) {
    pattern_of.push_back(mask.pattern_of(h));
    rule_head.push_back(static_cast<int32_t>(mask.rule_head(h)));
  }
  pattern_of_ = Add(pattern_of);
  rule_head_ = Add(rule_head);
  query_begin_ = Add(QueryTokenOffsets(mask));
  segment_ends_ = Add(mask.pattern().segment_ends);
  spans_ = Add(mask.pattern().spans);
  rows_ = AddAxis(mask, mask.queries(), mask.row_runs());
  columns_ = AddAxis(mask, mask.keys(), mask.column_runs());
}

DeviceMask FlatMask::At(const void* base, DocumentArrays documents) const {
  const auto* first = static_cast<const std::byte*>(base);
  const auto at = [&]<class T>(const T*& pointer, size_t offset) {
    pointer = reinterpret_cast<const T*>(first + offset);
  };
  const auto axis_at = [&](DeviceAxis& to, const Axis& from) {
    to.blocks = from.blocks;
    to.task_count = from.task_count;
    to.busy_tasks = from.busy_tasks;
    at(to.ids, from.ids);
    at(to.token_begin, from.token_begin);
    at(to.offsets, from.offsets);
    at(to.runs, from.runs);
    at(to.tasks, from.tasks);
  };
  DeviceMask mask{};
  mask.rule = rule_;
  mask.rule.doc_begin = documents.begin;
  mask.rule.doc_end = documents.end;
  at(mask.rule.segment_ends, segment_ends_);
  at(mask.rule.spans, spans_);
  mask.kv_heads = kv_heads_;
  mask.patterns = patterns_;
  mask.blocks_per_row = blocks_per_row_;
  at(mask.pattern_of, pattern_of_);
  at(mask.rule_head, rule_head_);
  at(mask.query_begin, query_begin_);
  axis_at(mask.rows, rows_);
  axis_at(mask.columns, columns_);
  return mask;
}

const DeviceMask& OnDevice(Context& ctx, const BlockMask& mask) {
  return mask.device_copies()
      .Get<Copy<DeviceMask>>(
          ctx,
          [&] {
            const FlatMask flat(mask);
            const Tensor copy = Uploaded(ctx, flat.bytes().data(), flat.bytes().size());
            return Copy<DeviceMask>{copy, flat.At(copy.raw(), OnDevice(ctx, mask.documents()))};
          })
      .view;
}

const DeviceKvTable& OnDevice(Context& ctx, const KvTable& table) {
  return table.device_copies()
      .Get<Copy<DeviceKvTable>>(
          ctx,
          [&] {
            const Tensor copy =
                Uploaded(ctx, table.offsets().data(), table.offsets().size() * sizeof(int64_t));
            return Copy<DeviceKvTable>{copy,
                                       {.token_stride = table.token_stride(),
                                        .first_block = table.first_block(),
                                        .blocks = table.blocks(),
                                        .offsets = reinterpret_cast<const int64_t*>(copy.raw())}};
          })
      .view;
}

}  // namespace longspan::ops
