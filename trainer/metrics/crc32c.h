#pragma once
#include <cstdint>
#include <string_view>

namespace longspan::trainer {

// CRC-32C (Castagnoli, reflected polynomial 0x82F63B78), as event files use it.
uint32_t Crc32c(std::string_view bytes);

// Event files store checksums rotated and offset, because a checksum of data that holds its own
// checksum is weak: ((c >> 15) | (c << 17)) + 0xa282ead8.
uint32_t MaskedCrc32c(std::string_view bytes);

}  // namespace longspan::trainer
