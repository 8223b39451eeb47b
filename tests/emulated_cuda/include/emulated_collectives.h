#pragma once
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

// Operations that several threads of a block take part in. Each suspends its thread until all have
// arrived; one that can never complete ends the kernel with a report (see emulator.h).

namespace longspan::emulated {

// Called once, by the last lane to arrive. operands[l] is what lane l of the warp passed, null for
// a lane that is not in `mask`.
using Combine = void (*)(void* const* operands, uint32_t mask);

// Waits until all lanes in `mask` are in a collective with the same mask and `combine`, which then
// reads and writes their operands. `what` is for messages.
void WarpCollective(const char* what, uint32_t mask, Combine combine, void* operand);

// Waits for all threads of the block; returns the number of them that passed true.
int BlockBarrier(bool predicate = true);
int BlockThreads();

// The block's dynamic shared memory, filled with 0xff when the block begins.
std::byte* DynamicShared();

// Ends the kernel as a failed launch with `why` in the report.
[[noreturn]] void FailKernel(const char* why);

constexpr uint32_t kAbsent = 0xffffffffu;  // value of a lane that takes no part: NaN in all types

enum class ShuffleKind { kFrom, kUp, kDown, kXor };

template <class T>
struct ShuffleOperand {
  T value, result;
  int argument, width, lane;
};

template <ShuffleKind kKind>
int ShuffleSource(int lane, int argument, int width) {
  const int first = lane / width * width, last = first + width - 1;
  int source = 0;
  switch (kKind) {
    case ShuffleKind::kFrom:
      return first + (argument & (width - 1));
    case ShuffleKind::kUp:
      source = lane - argument;
      return source < first ? lane : source;
    case ShuffleKind::kDown:
      source = lane + argument;
      return source > last ? lane : source;
    case ShuffleKind::kXor:
      source = lane ^ argument;
      return source > last ? lane : source;
  }
  return source;
}

int Lane();

template <ShuffleKind kKind, class T>
T Shuffle(const char* what, uint32_t mask, T value, int argument, int width) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  if (width <= 0 || width > 32 || (width & (width - 1)) != 0) {
    FailKernel("a shuffle whose width is not a power of two up to 32");
  }
  ShuffleOperand<T> mine{value, {}, argument, width, Lane()};
  WarpCollective(
      what, mask,
      [](void* const* operands, uint32_t) {
        for (int lane = 0; lane < 32; ++lane) {
          auto* to = static_cast<ShuffleOperand<T>*>(operands[lane]);
          if (to == nullptr) continue;
          const int source = ShuffleSource<kKind>(lane, to->argument, to->width);
          const auto* from = static_cast<const ShuffleOperand<T>*>(operands[source]);
          if (from != nullptr) {
            to->result = from->value;
          } else {
            std::memset(static_cast<void*>(&to->result), 0xff, sizeof(T));
          }
        }
      },
      &mine);
  return mine.result;
}

struct VoteOperand {
  uint32_t value, result;
};
template <class Reduce>
uint32_t Vote(const char* what, uint32_t mask, uint32_t value, Reduce) {
  static_assert(std::is_empty_v<Reduce>);
  VoteOperand mine{value, 0};
  WarpCollective(
      what, mask,
      [](void* const* operands, uint32_t members) {
        uint32_t values[32] = {};
        for (int lane = 0; lane < 32; ++lane) {
          if (members >> lane & 1) values[lane] = static_cast<VoteOperand*>(operands[lane])->value;
        }
        const uint32_t result = Reduce{}(values, members);
        for (int lane = 0; lane < 32; ++lane) {
          if (members >> lane & 1) static_cast<VoteOperand*>(operands[lane])->result = result;
        }
      },
      &mine);
  return mine.result;
}
struct Ballot {
  uint32_t operator()(const uint32_t* values, uint32_t members) const {
    uint32_t bits = 0;
    for (int lane = 0; lane < 32; ++lane) {
      if ((members >> lane & 1) && values[lane] != 0) bits |= 1u << lane;
    }
    return bits;
  }
};

}  // namespace longspan::emulated

inline void __syncthreads() { longspan::emulated::BlockBarrier(); }
inline int __syncthreads_count(int predicate) {
  return longspan::emulated::BlockBarrier(predicate != 0);
}
inline int __syncthreads_or(int predicate) {
  return longspan::emulated::BlockBarrier(predicate != 0) > 0;
}
inline int __syncthreads_and(int predicate) {
  return longspan::emulated::BlockBarrier(predicate != 0) == longspan::emulated::BlockThreads();
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  longspan::emulated::WarpCollective(
      "__syncwarp", mask, [](void* const*, uint32_t) {}, nullptr);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  using namespace longspan::emulated;
  return Shuffle<ShuffleKind::kFrom>("__shfl_sync", mask, value, source, width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  using namespace longspan::emulated;
  return Shuffle<ShuffleKind::kUp>("__shfl_up_sync", mask, value, static_cast<int>(delta), width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  using namespace longspan::emulated;
  return Shuffle<ShuffleKind::kDown>("__shfl_down_sync", mask, value, static_cast<int>(delta),
                                     width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  using namespace longspan::emulated;
  return Shuffle<ShuffleKind::kXor>("__shfl_xor_sync", mask, value, lanes, width);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  using namespace longspan::emulated;
  return Vote("__ballot_sync", mask, predicate != 0, Ballot());
}
inline int __any_sync(unsigned mask, int predicate) {
  using namespace longspan::emulated;
  return Vote("__any_sync", mask, predicate != 0, [](const uint32_t* values, uint32_t members) {
    return uint32_t{Ballot()(values, members) != 0};
  });
}
inline int __all_sync(unsigned mask, int predicate) {
  using namespace longspan::emulated;
  return Vote("__all_sync", mask, predicate != 0, [](const uint32_t* values, uint32_t members) {
    return uint32_t{Ballot()(values, members) == members};
  });
}

#define LONGSPAN_EMULATED_REDUCE(name, T, step)                                     \
  inline T name(unsigned mask, T value) {                                           \
    return std::bit_cast<T>(                                                        \
        longspan::emulated::Vote(#name, mask, std::bit_cast<uint32_t>(value),       \
                                 [](const uint32_t* values, uint32_t members) {     \
                                   bool first = true;                               \
                                   T sum{};                                         \
                                   for (int lane = 0; lane < 32; ++lane) {          \
                                     if (!(members >> lane & 1)) continue;          \
                                     const T next = std::bit_cast<T>(values[lane]); \
                                     sum = first ? next : static_cast<T>(step);     \
                                     first = false;                                 \
                                   }                                                \
                                   return std::bit_cast<uint32_t>(sum);             \
                                 }));                                               \
  }
LONGSPAN_EMULATED_REDUCE(__reduce_add_sync, unsigned, sum + next)
LONGSPAN_EMULATED_REDUCE(__reduce_min_sync, unsigned, sum < next ? sum : next)
LONGSPAN_EMULATED_REDUCE(__reduce_max_sync, unsigned, sum > next ? sum : next)
LONGSPAN_EMULATED_REDUCE(__reduce_and_sync, unsigned, sum& next)
LONGSPAN_EMULATED_REDUCE(__reduce_or_sync, unsigned, sum | next)
LONGSPAN_EMULATED_REDUCE(__reduce_xor_sync, unsigned, sum ^ next)
LONGSPAN_EMULATED_REDUCE(__reduce_min_sync, int, sum < next ? sum : next)
LONGSPAN_EMULATED_REDUCE(__reduce_max_sync, int, sum > next ? sum : next)
#undef LONGSPAN_EMULATED_REDUCE

[[noreturn]] inline void __trap() { longspan::emulated::FailKernel("__trap()"); }
