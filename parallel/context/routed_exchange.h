#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "ops/attention/kv_rows.h"
#include "ops/attention/kv_table.h"
#include "parallel/context/program.h"
#include "parallel/context/routed_plan.h"

namespace longspan::parallel {

// What one rank sends, receives and keeps once all ranks know which (kv head, block) pieces each of
// them needs: the part of routed attention that depends on the data. Host data; every rank derives
// its own from the same requests.
//
// The arena of keys holds every needed piece whole, K and V side by side in rows [2, D]: first what
// comes from each other rank, in ascending rank, as one message (for each kv head, for each block,
// the tokens that rank owns); a piece that comes whole from one rank stays where it arrives. All
// others are put together behind the messages, the parts of a block in ascending rank. The arena of
// gradients has the same rows and goes back the same way.
class RoutedExchange {
 public:
  // `requests` [ranks, kv_heads, ceil(blocks / 8)]: ListedBlocks of every rank.
  RoutedExchange(const RoutedPlan& plan, std::span<const uint8_t> requests);

  int64_t arena_rows() const { return arena_rows_; }
  int64_t received_rows() const { return received_rows_; }  // keys, in one pass
  int64_t sent_rows() const { return sent_rows_; }
  // Whether the arena of this rank stays for the backward pass.
  bool keeps() const { return keeps_[static_cast<size_t>(rank_)]; }
  // Keys in a forward pass; spans of recvs lie in the arena, of sends in a buffer of sent_rows().
  const Transfer& keys() const { return keys_; }
  // The same for ranks that do not keep their arenas: what a backward pass sends.
  const Transfer& again() const { return again_; }
  // Gradients: spans of sends lie in the arena of gradients, of recvs in a buffer of sent_rows().
  const Transfer& grads() const { return grads_; }

  const ops::RowTable& pack() const { return pack_; }          // k, v -> rows to send
  const ops::RowTable& own() const { return own_; }            // k, v -> arena
  const ops::RowTable& assemble() const { return assemble_; }  // arena -> arena
  const ops::RowTable& spread() const { return spread_; }      // gradients, the way back
  const ops::RowTable& home_own() const { return home_own_; }  // gradients -> dk, dv
  const ops::RowTable& home() const { return home_; }          // received ones -> dk, dv

  // Where the pieces lie in an arena of rows [2, head_dim].
  std::shared_ptr<const ops::KvTable> MakeTable(int64_t head_dim) const;

 private:
  class Requests;
  void PlanArena(const RoutedPlan& plan, const Requests& requests);
  void PlanSends(const RoutedPlan& plan, const Requests& requests);

  int rank_;
  int64_t kv_heads_, blocks_;
  int64_t arena_rows_ = 0, received_rows_ = 0, sent_rows_ = 0;
  std::vector<bool> keeps_;         // by rank
  std::vector<int64_t> piece_row_;  // [kv heads, blocks], -1: not needed
  Transfer keys_, again_, grads_;
  ops::RowTable pack_, own_, assemble_, spread_, home_own_, home_;
};

}  // namespace longspan::parallel
