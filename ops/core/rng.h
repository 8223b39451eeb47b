#pragma once
#include <array>
#include <cmath>
#include <cstdint>
#include <numbers>

namespace longspan {

// Counter-based random numbers (Philox 4x32-10, Salmon et al., SC'11): a pure function of
// (seed, stream, index), so a value does not depend on the order of calls, on threads or ranks.
// `stream` identifies the consumer, for example a hash of a tensor's name.
class Philox {
 public:
  Philox(uint64_t seed, uint64_t stream) : seed_(seed), stream_(stream) {}

  std::array<uint32_t, 4> Block(uint64_t index) const {
    uint32_t c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(index >> 32);
    uint32_t c2 = static_cast<uint32_t>(stream_), c3 = static_cast<uint32_t>(stream_ >> 32);
    uint32_t k0 = static_cast<uint32_t>(seed_), k1 = static_cast<uint32_t>(seed_ >> 32);
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
      const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
      const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
      c1 = static_cast<uint32_t>(p1);
      c3 = static_cast<uint32_t>(p0);
      c0 = n0;
      c2 = n2;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    return {c0, c1, c2, c3};
  }
  uint64_t Bits(uint64_t index) const {
    const auto b = Block(index);
    return (uint64_t{b[1]} << 32) | b[0];
  }
  // Uniform in [0, 1), 53 bits.
  double Uniform(uint64_t index) const { return static_cast<double>(Bits(index) >> 11) * 0x1p-53; }
  // Uniform integer in [0, bound), bound > 0; bias below 2^-64 * bound.
  uint64_t Below(uint64_t index, uint64_t bound) const {
    __extension__ using Wide = unsigned __int128;
    return static_cast<uint64_t>((Wide{Bits(index)} * bound) >> 64);
  }
  // Standard normal by Box-Muller; element `index` uses block index / 2.
  double Normal(uint64_t index) const {
    const auto b = Block(index / 2);
    const double u1 = (static_cast<double>(b[0]) + static_cast<double>(b[1] >> 11) * 0x1p32 + 1.0) *
                      (1.0 / (0x1p53 + 1.0));  // (0, 1]
    const double u2 =
        (static_cast<double>(b[2]) + static_cast<double>(b[3] >> 11) * 0x1p32) * 0x1p-53;
    const double radius = std::sqrt(-2.0 * std::log(u1)), angle = 2.0 * std::numbers::pi * u2;
    return index % 2 == 0 ? radius * std::cos(angle) : radius * std::sin(angle);
  }

 private:
  uint64_t seed_, stream_;
};

// FNV-1a: turns a name into a stream id that is the same in every build.
constexpr uint64_t StreamOf(const char* name) {
  uint64_t h = 0xcbf29ce484222325ull;
  for (; *name != 0; ++name) h = (h ^ static_cast<uint8_t>(*name)) * 0x100000001b3ull;
  return h;
}

}  // namespace longspan
