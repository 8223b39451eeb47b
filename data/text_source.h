#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace longspan::data {

// One file of text input. A .jsonl file holds one document a line, any other file is one document.
struct TextFile {
  std::string path;  // to open it
  std::string key;   // <last part of the input>/<path below it>: who it is, wherever the input lies
  int64_t bytes = 0;
  bool jsonl = false;
};

struct TextInputs {
  std::vector<TextFile> files;
  int64_t excluded = 0;  // no --include pattern fits
  int64_t hidden = 0;    // names beginning with a dot, a folder counting once
  int64_t repeated = 0;  // reached before under another name
  int64_t unusable = 0;  // links to nothing, sockets, devices
};

// Lists the files below `inputs` (files or folders), in the order of `inputs` and, within a folder,
// of the names' bytes, whatever the file system's order is. Links are followed; each file and
// folder is taken once however often it is reached, so loops of links end. Hidden entries are left
// out. A file named as an input is always taken.
//
// include   shell patterns; a file in a folder is taken if any fits (all are, if there are none). A
//           pattern with a '/' is compared with the path below the input ('*' also stands for '/'),
//           another one with the file's name.
// exclude   files to leave out without counting, such as the outputs of an earlier run
// Errors    DataError naming the input that is missing or the folder that cannot be read, or if no
//           file is left
TextInputs ListTextFiles(const std::vector<std::string>& inputs,
                         const std::vector<std::string>& include,
                         const std::vector<std::string>& exclude = {});

}  // namespace longspan::data
