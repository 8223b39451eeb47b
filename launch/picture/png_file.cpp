#include "launch/picture/png_file.h"

#include <png.h>

#include <filesystem>

#include "ops/core/error.h"

namespace longspan::launch {

void WritePng(const Image& image, const std::string& path) {
  png_image png{};
  png.version = PNG_IMAGE_VERSION;
  png.width = static_cast<png_uint_32>(image.width);
  png.height = static_cast<png_uint_32>(image.height);
  png.format = PNG_FORMAT_RGB;
  // Under another name first, so that an error leaves an older picture as it was.
  const std::string temporary = path + ".tmp";
  const bool written =
      png_image_write_to_file(&png, temporary.c_str(), 0, image.rgb.data(), 0, nullptr) != 0;
  std::error_code error;
  if (written) std::filesystem::rename(temporary, path, error);
  if (written && !error) return;
  const std::string reason = written ? error.message() : png.message;
  std::filesystem::remove(temporary, error);
  throw InvalidArgument(Str("cannot write the picture ", path, ": ", reason,
                            "; choose a file in a folder that exists and can be written"));
}

}  // namespace longspan::launch
