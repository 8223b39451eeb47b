#include "trainer/checkpoint/reader.h"

#include <fcntl.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <map>
#include <memory>

#include "ops/core/check.h"
#include "trainer/checkpoint/format.h"
#include "trainer/run_directory/file_io.h"

namespace longspan::trainer {
namespace {

class ShardFile {
 public:
  explicit ShardFile(std::filesystem::path path)
      : path_(std::move(path)), descriptor_(::open(path_.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (descriptor_ < 0) Fail(ErrnoText(errno));
  }
  ~ShardFile() { ::close(descriptor_); }
  ShardFile(const ShardFile&) = delete;
  ShardFile& operator=(const ShardFile&) = delete;

  // Reads [offset, offset + bytes) into `out` and returns its checksum.
  uint64_t Read(uint64_t offset, size_t bytes, std::byte* out) const {
    constexpr size_t kPart = size_t{1} << 20;  // hashed while in cache
    const std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> hash(XXH3_createState(),
                                                                        &XXH3_freeState);
    XXH3_64bits_reset(hash.get());
    while (bytes > 0) {
      const ssize_t got =
          ::pread(descriptor_, out, std::min(bytes, kPart), static_cast<off_t>(offset));
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) Fail(ErrnoText(errno));
      if (got == 0) Fail(Str("it ends at byte ", offset));
      const auto n = static_cast<size_t>(got);
      XXH3_64bits_update(hash.get(), out, n);
      out += n;
      offset += n;
      bytes -= n;
    }
    return XXH3_64bits_digest(hash.get());
  }

 private:
  [[noreturn]] void Fail(const std::string& reason) const {
    throw CheckpointError(Str("checkpoint shard ", path_.string(), " cannot be read: ", reason));
  }
  const std::filesystem::path path_;
  const int descriptor_;
};

// Opens files when they are first needed.
class ShardFiles {
 public:
  ShardFiles(const std::filesystem::path& directory, const checkpoint::Manifest& manifest)
      : directory_(directory), manifest_(manifest) {}

  // Reads and checks one record of `tensor`; its payload goes to `out`.
  void Read(const checkpoint::Tensor& tensor, const checkpoint::Shard& shard, std::byte* out,
            size_t bytes) {
    const std::string& name = manifest_.files(static_cast<int>(shard.file())).name();
    auto& file = open_[shard.file()];
    if (file == nullptr) file = std::make_unique<ShardFile>(directory_ / name);
    std::vector<std::byte> frame(shard.offset() - shard.frame_offset());
    if (file->Read(shard.frame_offset(), frame.size(), frame.data()) != shard.frame_xxh3() ||
        file->Read(shard.offset(), bytes, out) != shard.xxh3()) {
      throw CheckpointError(Str("checkpoint shard ", (directory_ / name).string(),
                                " is damaged: the checksum of tensor ", tensor.name(),
                                ", elements [", shard.begin(), ", ", shard.end(),
                                "), does not match; use another checkpoint"));
    }
  }

 private:
  const std::filesystem::path& directory_;
  const checkpoint::Manifest& manifest_;
  std::map<uint32_t, std::unique_ptr<ShardFile>> open_;
};

size_t PayloadBytes(const checkpoint::Shard& shard, DType dtype) {
  return static_cast<size_t>(shard.end() - shard.begin()) * SizeOf(dtype);
}

// The part of a record that `wanted` holds, in elements of the tensor.
struct Overlap {
  int64_t begin, end;
  Overlap(const checkpoint::Shard& shard, const NamedTensor& wanted)
      : begin(std::max(shard.begin(), wanted.begin())),
        end(std::min(shard.end(), wanted.begin() + wanted.tensor.numel())) {}
};

}  // namespace

struct CheckpointReader::State {
  std::filesystem::path path;
  checkpoint::Manifest manifest;
  CheckpointInfo info;
  std::vector<TensorEntry> entries;  // in the manifest's order
};

CheckpointReader::CheckpointReader(std::unique_ptr<State> state) : state_(std::move(state)) {}
CheckpointReader::CheckpointReader(CheckpointReader&&) noexcept = default;
CheckpointReader::~CheckpointReader() = default;

CheckpointReader CheckpointReader::Open(const std::filesystem::path& path) {
  auto state = std::make_unique<State>();
  state->path = path;
  try {
    state->manifest = ReadManifest(path);
    CheckFiles(path, state->manifest);
  } catch (const CheckpointError& error) {
    throw CheckpointError(Str(error.what(), "; use another checkpoint"));
  }
  state->info = InfoOf(state->manifest);
  for (const checkpoint::Tensor& tensor : state->manifest.tensors()) {
    state->entries.push_back(EntryOf(tensor));
  }
  return CheckpointReader(std::move(state));
}

const std::filesystem::path& CheckpointReader::path() const { return state_->path; }
const CheckpointInfo& CheckpointReader::info() const { return state_->info; }
const std::vector<TensorEntry>& CheckpointReader::tensors() const { return state_->entries; }

int64_t CheckpointReader::file_bytes() const {
  uint64_t bytes = 0;
  for (const checkpoint::File& file : state_->manifest.files()) bytes += file.bytes();
  return static_cast<int64_t>(bytes);
}

void CheckpointReader::Load(const std::vector<NamedTensor>& into, std::string_view prefix,
                            const std::function<bool(std::string_view)>& optional) const {
  const auto may_lack = [&](const std::string& name) { return optional && optional(name); };
  std::map<std::string, const NamedTensor*> wanted;
  for (const NamedTensor& named : into) {
    LONGSPAN_CHECK(named.tensor.defined() && wanted.emplace(named.name, &named).second)
        << "CheckpointReader: tensor '" << named.name << "' is undefined or there twice";
  }
  std::vector<std::string> differences;
  std::vector<std::pair<int, const NamedTensor*>> plan;
  for (size_t i = 0; i < state_->entries.size(); ++i) {
    const TensorEntry& saved = state_->entries[i];
    if (!std::string_view(saved.name).starts_with(prefix)) continue;
    const auto found = wanted.find(saved.name);
    if (found == wanted.end()) {
      if (may_lack(saved.name)) continue;
      differences.push_back(
          Str(saved.name, " is ", saved.Describe(), " in the checkpoint and not in the model"));
      continue;
    }
    const TensorEntry expected = found->second->Entry();
    if (saved.dtype != expected.dtype || saved.shape != expected.shape) {
      differences.push_back(Str(saved.name, " is ", saved.Describe(), " in the checkpoint and ",
                                expected.Describe(), " in the model"));
    }
    plan.emplace_back(static_cast<int>(i), found->second);
    wanted.erase(found);
  }
  for (const auto& [name, named] : wanted) {
    if (may_lack(name)) continue;
    differences.push_back(
        Str(name, " is ", named->Entry().Describe(), " in the model and not in the checkpoint"));
  }
  if (!differences.empty()) {
    // A model of another width differs in every tensor; a few of them say as much.
    constexpr size_t kNamed = 5;
    std::string text;
    for (size_t i = 0; i < std::min(kNamed, differences.size()); ++i) {
      text += Str(i == 0 ? "" : "; ", differences[i]);
    }
    if (differences.size() > kNamed) {
      text += Str("; and ", differences.size() - kNamed, " more tensors");
    }
    throw CheckpointError(Str("checkpoint ", state_->path.string(), " is of another model: ", text,
                              "; change the model section or choose another checkpoint"));
  }
  ShardFiles files(state_->path, state_->manifest);
  std::vector<std::byte> staged;  // for tensors that are not in host memory, and parts of records
  for (const auto& [index, named] : plan) {
    const checkpoint::Tensor& tensor = state_->manifest.tensors(index);
    const Tensor& target = named->tensor;
    const size_t element = SizeOf(target.dtype());
    for (const checkpoint::Shard& shard : tensor.shards()) {
      const Overlap part(shard, *named);
      if (part.begin >= part.end) continue;
      const size_t offset = static_cast<size_t>(part.begin - named->begin()) * element;
      const size_t bytes = PayloadBytes(shard, target.dtype());
      const bool whole = part.begin == shard.begin() && part.end == shard.end();
      const bool direct = whole && target.device().kind == DeviceKind::kCpu;
      if (!direct && staged.size() < bytes) staged.resize(bytes);
      std::byte* to = direct ? target.raw() + offset : staged.data();
      files.Read(tensor, shard, to, bytes);
      if (direct) continue;
      target.WriteRange(offset, static_cast<size_t>(part.end - part.begin) * element,
                        to + static_cast<size_t>(part.begin - shard.begin()) * element);
    }
  }
}

void CheckpointReader::Verify() const {
  ShardFiles files(state_->path, state_->manifest);
  std::vector<std::byte> buffer;
  for (int i = 0; i < state_->manifest.tensors_size(); ++i) {
    const checkpoint::Tensor& tensor = state_->manifest.tensors(i);
    for (const checkpoint::Shard& shard : tensor.shards()) {
      const size_t bytes = PayloadBytes(shard, state_->entries[static_cast<size_t>(i)].dtype);
      if (buffer.size() < bytes) buffer.resize(bytes);
      files.Read(tensor, shard, buffer.data(), bytes);
    }
  }
}

}  // namespace longspan::trainer
