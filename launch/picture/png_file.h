#pragma once
#include <string>

#include "launch/picture/pattern_picture.h"

namespace longspan::launch {

// Writes `image` as a PNG file, replacing what is there.
//
// Errors    InvalidArgument naming the file and the reason; no partial file is left
void WritePng(const Image& image, const std::string& path);

}  // namespace longspan::launch
