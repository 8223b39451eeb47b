#include "tests/parallel/context/program_check.h"

#include <gtest/gtest.h>

#include <map>

namespace longspan::test {

using namespace parallel;

namespace {

struct Row {
  bool written = false;
  int sending = 0;
  bool receiving = false;
};

class Checker {
 public:
  Checker(const Program& program, int64_t row_length, std::vector<bool>& kept)
      : program_(program), row_length_(row_length), kept_(kept) {
    rows_[0].resize(static_cast<size_t>(program.work_rows));
    rows_[1].resize(static_cast<size_t>(program.kept_rows));
    rows_[2].resize(static_cast<size_t>(program.grad_rows));
    for (size_t i = 0; i < std::min(kept.size(), rows_[1].size()); ++i)
      rows_[1][i].written = kept[i];
  }

  void Run() {
    for (size_t i = 0; i < program_.instructions.size(); ++i) {
      SCOPED_TRACE(Str("instruction ", i));
      Do(program_.instructions[i]);
      if (::testing::Test::HasFailure()) return;
    }
    EXPECT_TRUE(flying_.empty()) << "a transfer is never waited for";
    kept_.clear();
    for (const Row& row : rows_[1]) kept_.push_back(row.written);
  }

 private:
  template <class F>
  void ForRows(Arena arena, int64_t begin, int64_t count, const F& f) {
    std::vector<Row>& rows = rows_[static_cast<size_t>(arena)];
    ASSERT_GE(begin, 0);
    ASSERT_LE(begin + count, static_cast<int64_t>(rows.size())) << "outside of its arena";
    for (int64_t i = begin; i < begin + count; ++i) f(rows[static_cast<size_t>(i)]);
  }
  void Read(Arena arena, int64_t begin, int64_t count) {
    bool written = true, free = true;
    ForRows(arena, begin, count, [&](const Row& row) {
      written = written && row.written;
      free = free && !row.receiving;
    });
    EXPECT_TRUE(written) << "rows " << begin << " to " << begin + count << " were never written";
    EXPECT_TRUE(free) << "rows " << begin << " to " << begin + count << " are being received";
  }
  void Write(Arena arena, int64_t begin, int64_t count) {
    bool free = true;
    ForRows(arena, begin, count, [&](Row& row) {
      free = free && !row.receiving && row.sending == 0;
      row.written = true;
    });
    EXPECT_TRUE(free) << "rows " << begin << " to " << begin + count << " are in flight";
  }
  int64_t Tokens(const Piece& piece) const { return ops::BlockTokens(row_length_, piece.block); }

  void Do(const Instruction& instruction) {
    const auto index = static_cast<size_t>(instruction.index);
    switch (instruction.op) {
      case Instruction::Op::kPack:
        for (const Piece& p : program_.packs[index].pieces) {
          Write(program_.packs[index].arena, p.row, Tokens(p));
        }
        break;
      case Instruction::Op::kAddHome:
        ASSERT_EQ(program_.packs[index].arena, Arena::kGrad);
        for (const Piece& p : program_.packs[index].pieces) Read(Arena::kGrad, p.row, Tokens(p));
        break;
      case Instruction::Op::kMove:
      case Instruction::Op::kAddRows: {
        const RowMoves& list = program_.moves[index];
        for (const RowMove& m : list.moves) {
          Read(list.from, m.from, m.rows);
          if (instruction.op == Instruction::Op::kAddRows) Read(list.to, m.to, m.rows);
          Write(list.to, m.to, m.rows);
        }
        break;
      }
      case Instruction::Op::kZero:
        Write(program_.spans[index].arena, program_.spans[index].begin,
              program_.spans[index].rows());
        break;
      case Instruction::Op::kPost:
        Post(instruction.index);
        break;
      case Instruction::Op::kWait:
        Wait(instruction.index);
        break;
      case Instruction::Op::kCompute:
        Compute(program_.computes[index]);
        break;
    }
  }

  void Post(int32_t index) {
    EXPECT_TRUE(flying_.insert({index, true}).second);
    const Transfer& transfer = program_.transfers[static_cast<size_t>(index)];
    for (const Message& m : transfer.sends) {
      EXPECT_GT(m.span.rows(), 0);
      Read(m.span.arena, m.span.begin, m.span.rows());
      ForRows(m.span.arena, m.span.begin, m.span.rows(), [](Row& row) { ++row.sending; });
    }
    for (const Message& m : transfer.recvs) {
      EXPECT_GT(m.span.rows(), 0);
      Write(m.span.arena, m.span.begin, m.span.rows());
      ForRows(m.span.arena, m.span.begin, m.span.rows(), [](Row& row) { row.receiving = true; });
    }
  }
  void Wait(int32_t index) {
    EXPECT_EQ(flying_.erase(index), 1u);
    const Transfer& transfer = program_.transfers[static_cast<size_t>(index)];
    for (const Message& m : transfer.sends) {
      ForRows(m.span.arena, m.span.begin, m.span.rows(), [](Row& row) { --row.sending; });
    }
    for (const Message& m : transfer.recvs) {
      ForRows(m.span.arena, m.span.begin, m.span.rows(), [](Row& row) { row.receiving = false; });
    }
  }
  void Compute(const ComputeStep& step) {
    ASSERT_NE(step.mask, nullptr);
    EXPECT_EQ(step.mask->TotalVisiblePairs(), step.pairs);
    EXPECT_GT(step.pairs, 0);
    const auto before = [](const Piece& a, const Piece& b) {
      return std::pair(a.kv_head, a.block) < std::pair(b.kv_head, b.block);
    };
    EXPECT_TRUE(std::is_sorted(step.keys.pieces.begin(), step.keys.pieces.end(), before));
    for (const Piece& p : step.keys.pieces) Read(step.keys.arena, p.row, Tokens(p));
    for (const Piece& p : step.grads.pieces) Read(Arena::kGrad, p.row, Tokens(p));
    for (const Piece& p : step.grads.pieces) Write(Arena::kGrad, p.row, Tokens(p));
    if (!step.grads.pieces.empty()) {
      ASSERT_EQ(step.grads.pieces.size(), step.keys.pieces.size());
      for (size_t i = 0; i < step.keys.pieces.size(); ++i) {
        EXPECT_EQ(step.grads.pieces[i].kv_head, step.keys.pieces[i].kv_head);
        EXPECT_EQ(step.grads.pieces[i].block, step.keys.pieces[i].block);
      }
    }
  }

  const Program& program_;
  const int64_t row_length_;
  std::vector<bool>& kept_;
  std::vector<Row> rows_[3];
  std::map<int32_t, bool> flying_;
};

using Flow = std::vector<std::pair<Arena, int64_t>>;  // messages from one rank to another
Arena KindOf(const Message& m) {
  return m.span.arena == Arena::kGrad ? Arena::kGrad : Arena::kWork;
}

}  // namespace

void CheckProgram(const Program& program, int64_t row_length, std::vector<bool>& kept) {
  Checker(program, row_length, kept).Run();
}

void CheckTransfersMatch(const std::vector<Program>& ranks) {
  for (const Program& program : ranks) {
    ASSERT_EQ(program.transfers.size(), ranks[0].transfers.size());
  }
  for (size_t t = 0; t < ranks[0].transfers.size(); ++t) {
    std::map<std::pair<int, int>, Flow> sent, received;  // [from, to]
    for (int r = 0; r < static_cast<int>(ranks.size()); ++r) {
      const Transfer& transfer = ranks[static_cast<size_t>(r)].transfers[t];
      for (const Message& m : transfer.sends) {
        EXPECT_NE(m.peer, r);
        sent[{r, m.peer}].emplace_back(KindOf(m), m.span.rows());
      }
      for (const Message& m : transfer.recvs) {
        received[{m.peer, r}].emplace_back(KindOf(m), m.span.rows());
      }
    }
    EXPECT_EQ(sent, received) << "transfer " << t;
  }
}

void CheckSameOutline(const Program& a, const Program& b) {
  ASSERT_EQ(a.transfers.size(), b.transfers.size());
  const auto same = [](const std::vector<Message>& x, const std::vector<Message>& y) {
    return std::equal(x.begin(), x.end(), y.begin(), y.end(),
                      [](auto& m, auto& n) { return m.peer == n.peer && m.span == n.span; });
  };
  for (size_t t = 0; t < a.transfers.size(); ++t) {
    EXPECT_TRUE(same(a.transfers[t].sends, b.transfers[t].sends)) << t;
    EXPECT_TRUE(same(a.transfers[t].recvs, b.transfers[t].recvs)) << t;
  }
  ASSERT_EQ(a.computes.size(), b.computes.size());
  for (size_t i = 0; i < a.computes.size(); ++i) {
    EXPECT_EQ(a.computes[i].pairs, b.computes[i].pairs);
    EXPECT_EQ(a.computes[i].own, b.computes[i].own);
  }
  EXPECT_EQ(a.work_rows, b.work_rows);
  EXPECT_EQ(a.kept_rows, b.kept_rows);
  EXPECT_EQ(a.grad_rows, b.grad_rows);
}

}  // namespace longspan::test
