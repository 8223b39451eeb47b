#include "parallel/context/program.h"

namespace longspan::parallel {
namespace {

bool SameKind(Arena a, Arena b) { return (a == Arena::kGrad) == (b == Arena::kGrad); }

int64_t RowsOf(const std::vector<Message>& messages, Arena arena) {
  int64_t rows = 0;
  for (const Message& m : messages) rows += SameKind(m.span.arena, arena) ? m.span.rows() : 0;
  return rows;
}

std::vector<TimelineMessage> InBytes(const std::vector<Message>& messages,
                                     const ProgramSizes& sizes) {
  std::vector<TimelineMessage> list;
  for (const Message& m : messages) {
    const int64_t element = m.span.arena == Arena::kGrad ? sizes.grad_bytes : sizes.key_bytes;
    list.push_back({m.peer, m.span.rows() * 2 * sizes.head_dim * element});
  }
  return list;
}

}  // namespace

int64_t Program::SentRows(Arena arena) const {
  int64_t rows = 0;
  for (const Transfer& t : transfers) rows += RowsOf(t.sends, arena);
  return rows;
}

int64_t Program::ReceivedRows(Arena arena) const {
  int64_t rows = 0;
  for (const Transfer& t : transfers) rows += RowsOf(t.recvs, arena);
  return rows;
}

int64_t Program::VisiblePairs() const {
  int64_t pairs = 0;
  for (const ComputeStep& step : computes) pairs += step.pairs;
  return pairs;
}

double StepFlops(int64_t pairs, const ProgramSizes& sizes) {
  const double each = (sizes.backward ? 10.0 : 4.0) * static_cast<double>(sizes.head_dim);
  return each * static_cast<double>(pairs * (sizes.heads / sizes.kv_heads));
}

Timeline MakeTimeline(const Program& program, const ProgramSizes& sizes) {
  Timeline timeline;
  for (const Instruction& i : program.instructions) {
    TimelineEvent event;
    switch (i.op) {
      case Instruction::Op::kPost: {
        const Transfer& transfer = program.transfers[static_cast<size_t>(i.index)];
        event.kind = TimelineEvent::Kind::kPost;
        event.transfer = i.index;
        event.sends = InBytes(transfer.sends, sizes);
        event.recvs = InBytes(transfer.recvs, sizes);
        break;
      }
      case Instruction::Op::kWait:
        event.kind = TimelineEvent::Kind::kWait;
        event.transfer = i.index;
        break;
      case Instruction::Op::kCompute:
        event.kind = TimelineEvent::Kind::kCompute;
        event.flops = StepFlops(program.computes[static_cast<size_t>(i.index)].pairs, sizes);
        break;
      default:
        continue;  // moves of rows, bound by memory
    }
    timeline.push_back(std::move(event));
  }
  return timeline;
}

}  // namespace longspan::parallel
