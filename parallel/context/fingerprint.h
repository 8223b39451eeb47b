#pragma once
#include <concepts>
#include <cstdint>
#include <string_view>

namespace longspan::parallel {

// A 64-bit number for a sequence of numbers and texts: the same on every machine for the same
// sequence, another one for any other sequence but for chance. Ranks compare it before they act on
// something that each of them has derived alone.
class Fingerprint {
 public:
  template <std::integral T>
  Fingerprint& Add(T x) {  // by value: the type makes no difference
    state_ = (state_ + 0x9e3779b97f4a7c15u) ^ static_cast<uint64_t>(x);
    state_ = (state_ ^ state_ >> 30) * 0xbf58476d1ce4e5b9u;
    state_ = (state_ ^ state_ >> 27) * 0x94d049bb133111ebu;
    state_ ^= state_ >> 31;  // a bijection of 64 bits (the last steps of SplitMix64)
    return *this;
  }
  Fingerprint& Add(std::string_view text) {
    Add(text.size());
    for (const char c : text) Add(static_cast<unsigned char>(c));
    return *this;
  }
  // Of a list of whole numbers, its length included.
  template <class List>
  Fingerprint& AddAll(const List& list) {
    Add(list.size());
    for (const auto x : list) Add(x);
    return *this;
  }
  uint64_t value() const { return state_; }

 private:
  uint64_t state_ = 0;
};

}  // namespace longspan::parallel
