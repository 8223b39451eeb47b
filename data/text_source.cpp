#include "data/text_source.h"

#include <dirent.h>
#include <fnmatch.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <map>
#include <memory>
#include <set>
#include <unordered_map>
#include <utility>

#include "data/file.h"
#include "ops/core/error.h"

namespace longspan::data {
namespace {

class Lister {
 public:
  Lister(const std::vector<std::string>& include, const std::vector<std::string>& outputs)
      : include_(include) {
    for (const std::string& path : outputs) {
      struct stat info {};
      if (::stat(path.c_str(), &info) == 0) outputs_.insert({{info.st_dev, info.st_ino}, path});
    }
  }

  void AddInput(const std::string& input) {
    struct stat info {};
    if (::stat(input.c_str(), &info) != 0) {
      throw DataError(Str("cannot read input ", input, ": ", SystemReason()));
    }
    const std::string name = std::filesystem::canonical(input).filename().string();
    if (S_ISDIR(info.st_mode)) {
      AddFolder(input, name, "", info);
    } else if (S_ISREG(info.st_mode)) {
      const auto output = outputs_.find({info.st_dev, info.st_ino});
      if (output != outputs_.end()) {
        throw DataError(Str("input ", input, " would be overwritten by --out, which writes ",
                            output->second, "; choose another --out"));
      }
      AddFile(input, name, info);
    } else {
      throw DataError(Str("input ", input, " is neither a file nor a folder"));
    }
  }

  TextInputs Take() { return std::move(result_); }

 private:
  using FileId = std::pair<dev_t, ino_t>;

  // False if this file or folder was taken before.
  bool FirstVisit(const struct stat& info) {
    if (visited_.insert({info.st_dev, info.st_ino}).second) return true;
    ++result_.repeated;
    return false;
  }

  void AddFile(const std::string& path, const std::string& key, const struct stat& info) {
    if (outputs_.contains({info.st_dev, info.st_ino}) || !FirstVisit(info)) return;
    result_.files.push_back({path, UnusedKey(key), info.st_size, path.ends_with(".jsonl")});
  }

  // Different files need different keys, or a split by key could not part them.
  std::string UnusedKey(const std::string& key) {
    int64_t& uses = key_uses_[key];
    if (++uses == 1) return key;
    std::string numbered = Str(key, "#", uses);
    while (!key_uses_.emplace(numbered, 1).second) numbered = Str(key, "#", ++uses);
    return numbered;
  }

  bool Included(const std::string& name, const std::string& below) const {
    return include_.empty() ||
           std::any_of(include_.begin(), include_.end(), [&](const std::string& pattern) {
             const std::string& subject = pattern.find('/') == std::string::npos ? name : below;
             return ::fnmatch(pattern.c_str(), subject.c_str(), 0) == 0;
           });
  }

  // `below` is the folder's path under its input, with a '/' at its end unless it is the input.
  void AddFolder(const std::string& path, const std::string& key, const std::string& below,
                 const struct stat& folder) {
    if (!FirstVisit(folder)) return;
    for (const std::string& name : SortedNames(path)) {
      if (name.front() == '.') {
        ++result_.hidden;
        continue;
      }
      const std::string child = path.ends_with('/') ? path + name : path + "/" + name;
      const std::string child_below = below + name, child_key = key + "/" + name;
      struct stat info {};
      if (::stat(child.c_str(), &info) != 0) {
        if (errno != ENOENT && errno != ELOOP) {
          throw DataError(Str("cannot read input ", child, ": ", SystemReason()));
        }
        ++result_.unusable;  // a link to nothing or to itself
      } else if (S_ISDIR(info.st_mode)) {
        AddFolder(child, child_key, child_below + "/", info);
      } else if (!S_ISREG(info.st_mode)) {
        ++result_.unusable;
      } else if (!Included(name, child_below)) {
        ++result_.excluded;
      } else {
        AddFile(child, child_key, info);
      }
    }
  }

  static std::vector<std::string> SortedNames(const std::string& path) {
    const std::unique_ptr<DIR, int (*)(DIR*)> folder(::opendir(path.c_str()), ::closedir);
    if (!folder) throw DataError(Str("cannot read folder ", path, ": ", SystemReason()));
    std::vector<std::string> names;
    while (const dirent* entry = ::readdir(folder.get())) {
      const std::string name = entry->d_name;
      if (name != "." && name != "..") names.push_back(name);
    }
    std::sort(names.begin(), names.end());
    return names;
  }

  const std::vector<std::string>& include_;
  std::map<FileId, std::string> outputs_;
  std::set<FileId> visited_;
  std::unordered_map<std::string, int64_t> key_uses_;
  TextInputs result_;
};

}  // namespace

TextInputs ListTextFiles(const std::vector<std::string>& inputs,
                         const std::vector<std::string>& include,
                         const std::vector<std::string>& outputs) {
  Lister lister(include, outputs);
  for (const std::string& input : inputs) lister.AddInput(input);
  TextInputs result = lister.Take();
  if (result.files.empty()) {
    throw DataError(Str("no input file found",
                        inputs.empty() ? std::string() : Str(" in ", inputs.front()),
                        inputs.size() > 1 ? " and the other inputs" : "", ": ", result.excluded,
                        " do not fit --include, ", result.hidden, " are hidden, ", result.unusable,
                        " are not regular files"));
  }
  return result;
}

}  // namespace longspan::data
