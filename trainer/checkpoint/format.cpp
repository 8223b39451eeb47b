#include "trainer/checkpoint/format.h"

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>
#include <xxhash.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <set>
#include <vector>

#include "ops/core/error.h"
#include "trainer/run_directory/file_io.h"

namespace longspan::trainer {
namespace {

static_assert(std::endian::native == std::endian::little,
              "payloads are little-endian and are written as they lie in memory");

using google::protobuf::io::CodedOutputStream;

// Tag of ShardRecord.payload on the wire: the field number and wire type 2 (length-delimited).
constexpr uint32_t kPayloadTag = (checkpoint::ShardRecord::kPayloadFieldNumber << 3) | 2;

// Map entries in order of their keys, so that equal messages give equal bytes.
std::string SerializeDeterministically(const google::protobuf::Message& message) {
  std::string bytes;
  google::protobuf::io::StringOutputStream stream(&bytes);
  CodedOutputStream coded(&stream);
  coded.SetSerializationDeterministic(true);
  message.SerializeToCodedStream(&coded);
  coded.Trim();
  return bytes;
}

DType ToDType(checkpoint::ElementType type) {
  switch (type) {
    case checkpoint::F32:
      return DType::kF32;
    case checkpoint::BF16:
      return DType::kBF16;
    case checkpoint::F64:
      return DType::kF64;
    case checkpoint::I32:
      return DType::kI32;
    case checkpoint::I64:
      return DType::kI64;
    case checkpoint::U8:
      return DType::kU8;
    default:
      throw CheckpointError(Str("element type ", static_cast<int>(type), " is not known"));
  }
}

// Elements of the tensor; refuses shapes that do not fit 63 bits.
int64_t ElementCount(const checkpoint::Tensor& tensor) {
  int64_t count = 1;
  for (const int64_t dim : tensor.shape()) {
    if (dim < 0 || __builtin_mul_overflow(count, dim, &count)) {
      throw CheckpointError(Str("tensor ", tensor.name(), " has an impossible shape"));
    }
  }
  return count;
}

struct ByteRange {
  uint64_t begin, end;
};

// Checks the shards of one tensor and files their bytes under the files that hold them.
void CheckShards(const checkpoint::Tensor& tensor, std::vector<std::vector<ByteRange>>& files) {
  const uint64_t element = SizeOf(ToDType(tensor.dtype()));
  int64_t next = 0;
  for (const checkpoint::Shard& shard : tensor.shards()) {
    if (shard.begin() != next || shard.end() <= shard.begin()) {
      throw CheckpointError(Str("tensor ", tensor.name(), " is not covered at element ", next));
    }
    if (shard.file() >= static_cast<uint32_t>(files.size()) ||
        shard.frame_offset() >= shard.offset()) {
      throw CheckpointError(Str("tensor ", tensor.name(), " has a shard without a place"));
    }
    files[shard.file()].push_back(
        {shard.frame_offset(),
         shard.offset() + element * static_cast<uint64_t>(shard.end() - shard.begin())});
    next = shard.end();
  }
  if (next != ElementCount(tensor)) {
    throw CheckpointError(Str("tensor ", tensor.name(), " is not covered at element ", next));
  }
}

void CheckManifest(const checkpoint::Manifest& manifest) {
  std::vector<std::vector<ByteRange>> ranges(static_cast<size_t>(manifest.files_size()));
  std::set<std::string> names;
  for (const checkpoint::Tensor& tensor : manifest.tensors()) {
    if (!names.insert(tensor.name()).second) {
      throw CheckpointError(Str("tensor ", tensor.name(), " occurs twice"));
    }
    CheckShards(tensor, ranges);
  }
  for (int i = 0; i < manifest.files_size(); ++i) {
    const checkpoint::File& file = manifest.files(i);
    if (file.name().empty() || file.name().find('/') != std::string::npos) {
      throw CheckpointError(Str("file name '", file.name(), "' is not a plain name"));
    }
    auto& pieces = ranges[static_cast<size_t>(i)];
    std::sort(pieces.begin(), pieces.end(),
              [](const ByteRange& a, const ByteRange& b) { return a.begin < b.begin; });
    uint64_t next = 0;
    for (const ByteRange& piece : pieces) {
      if (piece.begin != next) break;
      next = piece.end;
    }
    if (next != file.bytes()) {
      throw CheckpointError(Str("file ", file.name(), " has no checksum at byte ", next));
    }
  }
}

}  // namespace

std::string ShardFileName(int rank) {
  char name[32];
  std::snprintf(name, sizeof name, "shard_%05d.binpb", rank);
  return name;
}

uint64_t Xxh3(std::string_view bytes) { return XXH3_64bits(bytes.data(), bytes.size()); }

checkpoint::ElementType ToElementType(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return checkpoint::F32;
    case DType::kBF16:
      return checkpoint::BF16;
    case DType::kF64:
      return checkpoint::F64;
    case DType::kI32:
      return checkpoint::I32;
    case DType::kI64:
      return checkpoint::I64;
    case DType::kU8:
      return checkpoint::U8;
  }
  return checkpoint::ELEMENT_TYPE_UNSPECIFIED;
}

std::string RecordFrame(const std::string& tensor, int64_t begin, int64_t end,
                        size_t payload_bytes) {
  checkpoint::ShardRecord record;
  record.set_tensor(tensor);
  record.set_begin(begin);
  record.set_end(end);
  const std::string fields = record.SerializeAsString();
  std::string frame;
  google::protobuf::io::StringOutputStream stream(&frame);
  CodedOutputStream coded(&stream);
  coded.WriteVarint64(fields.size() + CodedOutputStream::VarintSize32(kPayloadTag) +
                      CodedOutputStream::VarintSize64(payload_bytes) + payload_bytes);
  coded.WriteString(fields);
  coded.WriteTag(kPayloadTag);
  coded.WriteVarint64(payload_bytes);
  coded.Trim();
  return frame;
}

std::string EncodeManifest(const checkpoint::Manifest& manifest) {
  checkpoint::Envelope envelope;
  envelope.set_manifest(SerializeDeterministically(manifest));
  envelope.set_xxh3(Xxh3(envelope.manifest()));
  return envelope.SerializeAsString();
}

checkpoint::Manifest DecodeManifest(const std::string& bytes) {
  checkpoint::Envelope envelope;
  // The checksum covers the manifest; comparing with the only encoding that a writer produces
  // covers the envelope around it, where a lenient parser would skip damage as unknown fields.
  const bool parsed = envelope.ParseFromString(bytes);
  envelope.DiscardUnknownFields();
  if (!parsed || envelope.SerializeAsString() != bytes ||
      Xxh3(envelope.manifest()) != envelope.xxh3()) {
    throw CheckpointError("the checksum does not match, so the file is damaged or truncated");
  }
  checkpoint::Manifest manifest;
  if (!manifest.ParseFromString(envelope.manifest())) {
    throw CheckpointError("the content is not a manifest");
  }
  if (manifest.format_version() != kCheckpointFormatVersion) {
    throw CheckpointError(Str("the format version is ", manifest.format_version(),
                              " and this program reads version ", kCheckpointFormatVersion));
  }
  CheckManifest(manifest);
  return manifest;
}

checkpoint::Manifest ReadManifest(const std::filesystem::path& directory) {
  const std::filesystem::path file = directory / kManifestName;
  std::error_code ignored;
  if (!std::filesystem::exists(file, ignored)) {
    throw CheckpointError(
        Str(directory.string(), " is not a checkpoint: it has no ", kManifestName));
  }
  const std::string bytes = ReadFile(file);
  try {
    return DecodeManifest(bytes);
  } catch (const CheckpointError& error) {
    throw CheckpointError(
        Str("checkpoint manifest ", file.string(), " cannot be used: ", error.what()));
  }
}

void CheckFiles(const std::filesystem::path& directory, const checkpoint::Manifest& manifest) {
  for (const checkpoint::File& file : manifest.files()) {
    const std::filesystem::path path = directory / file.name();
    std::error_code error;
    const uint64_t bytes = std::filesystem::file_size(path, error);
    if (error) {
      throw CheckpointError(
          Str("checkpoint shard ", path.string(), " cannot be read: ", error.message()));
    }
    if (bytes != file.bytes()) {
      throw CheckpointError(Str("checkpoint shard ", path.string(), " has ", bytes,
                                " bytes where the manifest says ", file.bytes()));
    }
  }
}

CheckpointInfo InfoOf(const checkpoint::Manifest& manifest) {
  CheckpointInfo info;
  info.step = manifest.step();
  info.config_text = manifest.config_text();
  info.corpus_fingerprint = manifest.corpus_fingerprint();
  info.samples_consumed = manifest.samples_consumed();
  info.seed = manifest.seed();
  info.dp = manifest.mesh().dp();
  info.cp = manifest.mesh().cp();
  info.identity = {manifest.identity().begin(), manifest.identity().end()};
  info.extra = {manifest.extra().begin(), manifest.extra().end()};
  return info;
}

TensorEntry EntryOf(const checkpoint::Tensor& tensor) {
  return {tensor.name(), ToDType(tensor.dtype()), {tensor.shape().begin(), tensor.shape().end()}};
}

}  // namespace longspan::trainer
