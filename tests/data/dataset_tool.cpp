// Lets tests in other languages use the reader and the writer:
//   dataset_tool read PREFIX               prints one line of token ids a document
//   dataset_tool write PREFIX VOCAB SPLIT  reads such lines from standard input; SPLIT is the
//   longest
//                                          sequence
#include <cstdio>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "data/index_writer.h"
#include "data/indexed_dataset.h"

namespace longspan::data {
namespace {

void Read(const std::string& prefix) {
  const IndexedDataset dataset(prefix);
  for (int64_t d = 0; d < dataset.num_documents(); ++d) {
    std::vector<int32_t> ids(static_cast<size_t>(dataset.DocumentLength(d)));
    dataset.Read(dataset.DocumentBegin(d), ids);
    for (size_t i = 0; i < ids.size(); ++i) std::cout << (i > 0 ? " " : "") << ids[i];
    std::cout << "\n";
  }
}

void Write(const std::string& prefix, int64_t vocab_size, int64_t longest) {
  IndexWriter writer(prefix, TokenDTypeForVocabulary(vocab_size), longest);
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream in(line);
    for (int32_t id; in >> id;) writer.Append(std::vector<int32_t>{id});
    writer.EndDocument();
  }
  writer.Commit();
}

}  // namespace
}  // namespace longspan::data

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  try {
    if (arguments.size() == 2 && arguments[0] == "read") {
      longspan::data::Read(arguments[1]);
    } else if (arguments.size() == 4 && arguments[0] == "write") {
      longspan::data::Write(arguments[1], std::stoll(arguments[2]), std::stoll(arguments[3]));
    } else {
      return 64;
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
