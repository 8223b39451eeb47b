#pragma once
#include <limits>
#include <map>
#include <string>

namespace longspan::configs {

// Where a value came from.
struct Place {
  int line = 0;          // of the file, from 1; 0: the file says nothing about it
  std::string argument;  // of --set, when that gave the value

  // Order of reports: from the top of the file to its end, then --set.
  int Order() const { return argument.empty() ? line : std::numeric_limits<int>::max(); }
};

// Places of all values of a config, by indexed path (fields.h).
class Places {
 public:
  explicit Places(std::string file) : file_(std::move(file)) {}

  void SetLine(const std::string& indexed_path, int line) { places_[indexed_path].line = line; }

  // --set gave the value, and whatever the file said below this path no longer holds.
  void SetArgument(const std::string& indexed_path, const std::string& argument) {
    for (auto it = places_.lower_bound(indexed_path); it != places_.end();) {
      if (it->first.compare(0, indexed_path.size(), indexed_path) != 0) break;
      const char next = it->first.c_str()[indexed_path.size()];
      it = next == '.' || next == '[' || next == '\0' ? places_.erase(it) : std::next(it);
    }
    places_[indexed_path].argument = argument;
  }

  // Place of the value, or of the nearest message around it that has one.
  Place Find(std::string indexed_path) const {
    while (!indexed_path.empty()) {
      const auto it = places_.find(indexed_path);
      if (it != places_.end()) return it->second;
      const size_t cut = indexed_path.find_last_of(".[");
      indexed_path.resize(cut == std::string::npos ? 0 : cut);
    }
    return {};
  }

  // "file:line", "file" or "--set argument".
  std::string Describe(const Place& place) const {
    if (!place.argument.empty()) return "--set " + place.argument;
    return place.line > 0 ? file_ + ":" + std::to_string(place.line) : file_;
  }

 private:
  std::string file_;
  std::map<std::string, Place> places_;
};

}  // namespace longspan::configs
