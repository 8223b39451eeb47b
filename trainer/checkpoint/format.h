#pragma once
#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>

#include "ops/core/dtype.h"
#include "trainer/checkpoint/checkpoint.h"
#include "trainer/checkpoint/checkpoint.pb.h"

namespace longspan::trainer {

// Encoding of checkpoints, shared by writer and reader; other code includes writer.h or reader.h.

inline constexpr uint32_t kCheckpointFormatVersion = 1;
inline constexpr const char* kManifestName = "manifest.binpb";

std::string ShardFileName(int rank);  // "shard_00003.binpb"

uint64_t Xxh3(std::string_view bytes);

checkpoint::ElementType ToElementType(DType dtype);

// Bytes of a ShardRecord before its payload: length of the record, tensor, begin, end, tag and
// length of the payload.
std::string RecordFrame(const std::string& tensor, int64_t begin, int64_t end,
                        size_t payload_bytes);

// The whole of manifest.binpb. The same manifest always gives the same bytes.
std::string EncodeManifest(const checkpoint::Manifest& manifest);

// The reverse, with all checks: checksum, format version, shards that cover every element of every
// tensor and every byte of every file exactly once. Errors: CheckpointError.
checkpoint::Manifest DecodeManifest(const std::string& bytes);

// DecodeManifest of a checkpoint directory's manifest; the message names the file. Does not look at
// the shard files.
checkpoint::Manifest ReadManifest(const std::filesystem::path& directory);

// Throws CheckpointError unless every file of the manifest is there with its size.
void CheckFiles(const std::filesystem::path& directory, const checkpoint::Manifest& manifest);

CheckpointInfo InfoOf(const checkpoint::Manifest& manifest);
TensorEntry EntryOf(const checkpoint::Tensor& tensor);

}  // namespace longspan::trainer
