#pragma once
#include <gtest/gtest.h>
#include <stdlib.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "data/index_writer.h"
#include "data/indexed_dataset.h"

namespace longspan::test {

namespace fs = std::filesystem;

// A folder of its own for each test, gone afterwards.
class TempFolder {
 public:
  TempFolder() {
    std::string pattern = (fs::temp_directory_path() / "longspan_data_XXXXXX").string();
    path_ = ::mkdtemp(pattern.data());
  }
  ~TempFolder() { fs::remove_all(path_); }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

inline void WriteText(const std::string& path, const std::string& text) {
  fs::create_directories(fs::path(path).parent_path());
  std::ofstream(path, std::ios::binary) << text;
}

inline std::string ReadText(const std::string& path) {
  std::ostringstream out;
  out << std::ifstream(path, std::ios::binary).rdbuf();
  return out.str();
}

// Paths below a folder, sorted, hidden ones included.
inline std::vector<std::string> ListBelow(const std::string& folder) {
  std::vector<std::string> names;
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    names.push_back(fs::relative(entry.path(), folder).string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

// The message of the expected exception; a failure and "" if it does not come.
template <class E, class F>
std::string MessageOf(F&& f) {
  try {
    f();
  } catch (const E& error) {
    return error.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return "";
}

inline void ExpectContains(const std::string& text, const std::string& part) {
  EXPECT_NE(text.find(part), std::string::npos) << "\"" << part << "\" is not in: " << text;
}

using Documents = std::vector<std::vector<int32_t>>;

inline void WriteDataset(const std::string& prefix, const Documents& documents,
                         data::TokenDType dtype = data::TokenDType::kI32) {
  data::IndexWriter writer(prefix, dtype);
  for (const auto& document : documents) {
    writer.Append(document);
    writer.EndDocument();
  }
  writer.Commit();
}

inline Documents ReadDataset(const std::string& prefix) {
  const data::IndexedDataset dataset(prefix);
  Documents documents;
  for (int64_t d = 0; d < dataset.num_documents(); ++d) {
    documents.emplace_back(static_cast<size_t>(dataset.DocumentLength(d)));
    dataset.Read(dataset.DocumentBegin(d), documents.back());
  }
  return documents;
}

// The bytes of an .idx file, written down from the format's table and not with the writer.
template <class T>
void Put(std::string& bytes, T value) {
  bytes.append(reinterpret_cast<const char*>(&value), sizeof value);
}
struct HandMadeIndex {
  uint64_t version = 1;
  uint8_t dtype = 8;
  std::vector<int32_t> lengths;
  std::vector<int64_t> offsets, documents;
  std::string Bytes() const {
    std::string b("MMIDIDX\0\0", 9);
    Put(b, version);
    Put(b, dtype);
    Put(b, uint64_t{lengths.size()});
    Put(b, uint64_t{documents.size()});
    for (const int32_t v : lengths) Put(b, v);
    for (const int64_t v : offsets) Put(b, v);
    for (const int64_t v : documents) Put(b, v);
    return b;
  }
};

}  // namespace longspan::test
