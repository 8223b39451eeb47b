#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace longspan::data {

// One file of text input. A .jsonl file holds one document a line, any other file is one document.
struct TextFile {
  std::string path;  // to open it
  // Who it is, wherever the input lies: <last part of the input>/<path below it>, with #2, #3, ...
  // behind it where an earlier file has that key. No two files of a list share a key.
  std::string key;
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
// outputs   files that the caller will write: in folders they are left out without counting
// Errors    DataError naming the input that is missing or is one of `outputs`, or the folder that
//           cannot be read, or if no file is left
TextInputs ListTextFiles(const std::vector<std::string>& inputs,
                         const std::vector<std::string>& include,
                         const std::vector<std::string>& outputs = {});

}  // namespace longspan::data
