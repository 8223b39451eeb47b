#include "trainer/checkpoint/writer.h"

#include <glog/logging.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <set>

#include "ops/core/check.h"
#include "trainer/checkpoint/format.h"
#include "trainer/checkpoint/shard_writer.h"
#include "trainer/run_directory/file_io.h"

namespace longspan::trainer {
namespace {

using parallel::AllReduceValue;
using parallel::ReduceOp;

constexpr int64_t kShareUnit = 64;  // elements

// First element of `rank`'s share of `elements`; rank == ranks gives the end of the last share.
int64_t ShareBegin(int64_t elements, int rank, int ranks) {
  const int64_t units = (elements + kShareUnit - 1) / kShareUnit;
  __extension__ using Wide = __int128;
  const auto unit = static_cast<int64_t>(Wide{units} * rank / ranks);
  return std::min(elements, unit * kShareUnit);
}

// True when a value of `Bits` type in [data, data + count) has an exponent of all ones.
template <class Bits>
bool HasNonFinite(const std::byte* data, size_t count, Bits exponent) {
  unsigned found = 0;
  for (size_t i = 0; i < count; ++i) {
    Bits value;
    std::memcpy(&value, data + i * sizeof(Bits), sizeof(Bits));
    found |= (value & exponent) == exponent;
  }
  return found != 0;
}

bool HasNonFinite(DType dtype, const std::byte* data, size_t bytes) {
  switch (dtype) {
    case DType::kF32:
      return HasNonFinite<uint32_t>(data, bytes / 4, 0x7f800000u);
    case DType::kBF16:
      return HasNonFinite<uint16_t>(data, bytes / 2, 0x7f80u);
    case DType::kF64:
      return HasNonFinite<uint64_t>(data, bytes / 8, 0x7ff0000000000000ull);
    default:
      return false;
  }
}

// Copies bytes of `tensor` from `offset` on and looks for NaN and infinity while they are in cache.
bool CopyChecking(const Tensor& tensor, size_t offset, std::byte* to, size_t bytes) {
  // A transfer from a GPU has a latency that small pieces would pay again and again.
  const size_t block =
      tensor.device().kind == DeviceKind::kCpu ? size_t{256} << 10 : size_t{64} << 20;
  bool finite = true;
  for (size_t at = 0; at < bytes; at += block) {
    const size_t part = std::min(block, bytes - at);
    tensor.ReadRange(offset + at, part, to + at);
    finite = finite && !HasNonFinite(tensor.dtype(), to + at, part);
  }
  return finite;
}

checkpoint::Manifest ManifestOf(const CheckpointInfo& info,
                                const std::vector<NamedTensor>& tensors) {
  checkpoint::Manifest manifest;
  manifest.set_format_version(kCheckpointFormatVersion);
  manifest.set_step(info.step);
  manifest.set_config_text(info.config_text);
  manifest.set_corpus_fingerprint(info.corpus_fingerprint);
  manifest.set_samples_consumed(info.samples_consumed);
  manifest.set_seed(info.seed);
  manifest.mutable_mesh()->set_dp(info.dp);
  manifest.mutable_mesh()->set_cp(info.cp);
  for (const auto& [key, value] : info.identity) (*manifest.mutable_identity())[key] = value;
  for (const auto& [key, value] : info.extra) (*manifest.mutable_extra())[key] = value;
  for (const NamedTensor& named : tensors) {
    const TensorEntry entry = named.Entry();
    checkpoint::Tensor& tensor = *manifest.add_tensors();
    tensor.set_name(entry.name);
    tensor.set_dtype(ToElementType(entry.dtype));
    for (const int64_t dim : entry.shape) tensor.add_shape(dim);
  }
  return manifest;
}

void AddFile(checkpoint::Manifest& manifest, int rank, uint64_t bytes,
             const std::vector<WrittenPiece>& pieces) {
  for (const WrittenPiece& piece : pieces) {
    checkpoint::Shard& shard =
        *manifest.mutable_tensors(static_cast<int>(piece.tensor))->add_shards();
    shard.set_file(static_cast<uint32_t>(manifest.files_size()));
    shard.set_frame_offset(piece.frame_offset);
    shard.set_frame_xxh3(piece.frame_xxh3);
    shard.set_offset(piece.offset);
    shard.set_begin(piece.begin);
    shard.set_end(piece.end);
    shard.set_xxh3(piece.xxh3);
  }
  checkpoint::File& file = *manifest.add_files();
  file.set_name(ShardFileName(rank));
  file.set_bytes(bytes);
}

}  // namespace

struct CheckpointWriter::PendingSave {
  CheckpointInfo info;
  std::filesystem::path temporary, target;
  checkpoint::Manifest manifest;  // without shards until GatherShards; used on rank 0
  std::unique_ptr<ShardWriter> shard;
};

CheckpointWriter::CheckpointWriter(CheckpointWriterOptions options, parallel::Communicator& world)
    : options_(std::move(options)), world_(world) {
  LONGSPAN_CHECK(options_.retention.keep_last >= 1)
      << "checkpoint.keep_last is " << options_.retention.keep_last << "; at least 1 must stay";
  LONGSPAN_CHECK(options_.retention.keep_every >= 0)
      << "checkpoint.keep_every is " << options_.retention.keep_every;
  LONGSPAN_CHECK(options_.max_record_bytes >= kShareUnit * 8 &&
                 options_.max_record_bytes <= size_t{64} << 20)
      << "max_record_bytes is " << options_.max_record_bytes;
}

CheckpointWriter::~CheckpointWriter() {
  if (remover_.joinable()) remover_.join();
}

bool CheckpointWriter::pending() const { return pending_ != nullptr; }

void CheckpointWriter::Save(const CheckpointInfo& info, const std::vector<NamedTensor>& tensors) {
  Wait();
  CheckArguments(info, tensors);
  if (IsRepetition(info)) return;
  auto save = std::make_unique<PendingSave>();
  save->info = info;
  save->target = options_.directory / StepDirectoryName(info.step);
  save->temporary = save->target;
  save->temporary += ".tmp";
  save->manifest = ManifestOf(info, tensors);
  pending_ = std::move(save);
  const std::string unprepared = RunAgreed([&] { Prepare(pending_->temporary); });
  if (!unprepared.empty()) Abandon(unprepared);
  pending_->shard = std::make_unique<ShardWriter>(
      pending_->temporary / ShardFileName(world_.rank()),
      ShardWriterOptions{options_.staging_bytes, options_.write_bytes_per_second,
                         options_.stage_hook});
  const std::string unstaged = parallel::FirstError(world_, Stage(tensors));
  if (!unstaged.empty()) Abandon(unstaged);
}

void CheckpointWriter::CheckArguments(const CheckpointInfo& info,
                                      const std::vector<NamedTensor>& tensors) {
  LONGSPAN_CHECK(info.step >= 0) << "CheckpointWriter: step " << info.step;
  std::set<std::string> names;
  std::string description = Str(info.step);
  for (const NamedTensor& named : tensors) {
    LONGSPAN_CHECK(!named.name.empty() && named.tensor.defined() && names.insert(named.name).second)
        << "CheckpointWriter: tensor '" << named.name << "' is unnamed, undefined or there twice";
    const bool fits = !named.piece.has_value() ||
                      (named.piece->begin >= 0 && named.piece->copy >= 0 &&
                       named.piece->copy < named.piece->copies &&
                       named.piece->begin + named.tensor.numel() <= named.piece->shape.numel());
    LONGSPAN_CHECK(fits) << "CheckpointWriter: what is there of tensor '" << named.name
                         << "' is no piece of " << named.Entry().Describe();
    description += Str("\n", named.name, " ", named.Entry().Describe());
  }
  // The shares of all ranks have to fit together.
  const auto digest = static_cast<int64_t>(Xxh3(description));
  LONGSPAN_CHECK(AllReduceValue(world_, digest, ReduceOp::kMin) ==
                 AllReduceValue(world_, digest, ReduceOp::kMax))
      << "CheckpointWriter: ranks disagree on the step or on the list of tensors";
}

bool CheckpointWriter::IsRepetition(const CheckpointInfo& info) {
  // Rank 0 decides: only its `info` is stored.
  const bool same = world_.rank() == 0 && last_committed_ == info &&
                    WhyNotCommitted(options_.directory / StepDirectoryName(info.step)).empty();
  return AllReduceValue(world_, int64_t{same}, ReduceOp::kMax) != 0;
}

void CheckpointWriter::Prepare(const std::filesystem::path& temporary) {
  if (world_.rank() == 0) {
    if (remover_.joinable()) remover_.join();
    CreateDirectories(options_.directory);
    CleanLeftovers(options_.directory);
    CreateDirectories(temporary);
  }
  Hook("prepared");
}

std::string CheckpointWriter::Stage(const std::vector<NamedTensor>& tensors) {
  std::string error;
  try {
    for (size_t i = 0; i < tensors.size(); ++i) {
      StageTensor(static_cast<uint32_t>(i), tensors[i], error);
    }
    Hook("staged");
  } catch (const std::exception& failure) {
    if (error.empty()) error = failure.what();
  }
  pending_->shard->Finish();
  return error;
}

void CheckpointWriter::StageTensor(uint32_t index, const NamedTensor& named, std::string& error) {
  const Tensor& tensor = named.tensor;
  const size_t element = SizeOf(tensor.dtype());
  const int copy = named.piece.has_value() ? named.piece->copy : world_.rank();
  const int copies = named.piece.has_value() ? named.piece->copies : world_.size();
  const int64_t end = ShareBegin(tensor.numel(), copy + 1, copies);
  const auto record =
      static_cast<int64_t>(options_.max_record_bytes / element) / kShareUnit * kShareUnit;
  for (int64_t at = ShareBegin(tensor.numel(), copy, copies); at < end; at += record) {
    ShardPiece piece;
    piece.tensor = index;
    piece.begin = named.begin() + at;
    piece.end = named.begin() + std::min(end, at + record);
    piece.payload_bytes = static_cast<size_t>(piece.end - piece.begin) * element;
    piece.frame = RecordFrame(named.name, piece.begin, piece.end, piece.payload_bytes);
    piece.payload = std::make_unique_for_overwrite<std::byte[]>(piece.payload_bytes);
    if (!CopyChecking(tensor, static_cast<size_t>(at) * element, piece.payload.get(),
                      piece.payload_bytes) &&
        error.empty()) {
      error = Str("tensor ", named.name, " holds a NaN or an infinity");
    }
    pending_->shard->Push(std::move(piece));
  }
}

bool CheckpointWriter::Poll() {
  if (pending_ == nullptr) return false;
  // The largest status of all ranks decides: done < running < failed.
  const ShardWriter::Status status = pending_->shard->status();
  const int64_t code = status == ShardWriter::Status::kDone      ? 0
                       : status == ShardWriter::Status::kRunning ? 1
                                                                 : 2;
  const int64_t worst = AllReduceValue(world_, code, ReduceOp::kMax);
  if (worst == 1) return false;
  if (worst == 2) {
    pending_->shard->Cancel();
    // A rank that is cancelled here must not hide the error of the rank that failed.
    const std::string error = pending_->shard->Join();
    Abandon(parallel::FirstError(world_, code == 2 ? error : ""));
  }
  pending_->shard->Join();
  GatherShards();
  const std::string error = RunAgreed([&] { Commit(); });
  if (!error.empty()) Abandon(error);
  last_committed_ = std::move(pending_->info);
  pending_.reset();
  return true;
}

bool CheckpointWriter::Wait() {
  if (pending_ == nullptr) return false;
  pending_->shard->Join();
  return Poll();
}

void CheckpointWriter::GatherShards() {
  const std::vector<WrittenPiece>& mine = pending_->shard->pieces();
  struct Header {
    uint64_t pieces, file_bytes;
  };
  const Header header{mine.size(), pending_->shard->file_bytes()};
  std::vector<Header> headers(static_cast<size_t>(world_.size()));
  std::vector<std::vector<WrittenPiece>> pieces(static_cast<size_t>(world_.size()));
  std::vector<parallel::Recv> receive_headers, receive_pieces;
  if (world_.rank() == 0) {
    for (int r = 0; r < world_.size(); ++r) {
      receive_headers.push_back({r, &headers[static_cast<size_t>(r)], sizeof(Header)});
    }
  }
  world_.Exchange({{0, &header, sizeof header}}, receive_headers).Wait();
  if (world_.rank() == 0) {
    for (int r = 0; r < world_.size(); ++r) {
      auto& list = pieces[static_cast<size_t>(r)];
      list.resize(headers[static_cast<size_t>(r)].pieces);
      receive_pieces.push_back(
          {r, list.data(), static_cast<int64_t>(list.size() * sizeof(WrittenPiece))});
    }
  }
  world_
      .Exchange({{0, mine.data(), static_cast<int64_t>(mine.size() * sizeof(WrittenPiece))}},
                receive_pieces)
      .Wait();
  for (int r = 0; r < static_cast<int>(receive_pieces.size()); ++r) {
    AddFile(pending_->manifest, r, headers[static_cast<size_t>(r)].file_bytes,
            pieces[static_cast<size_t>(r)]);
  }
  // Where ranks hold copies of pieces, the order of ranks is not that of elements.
  for (checkpoint::Tensor& tensor : *pending_->manifest.mutable_tensors()) {
    std::sort(tensor.mutable_shards()->begin(), tensor.mutable_shards()->end(),
              [](const auto& a, const auto& b) { return a.begin() < b.begin(); });
  }
}

void CheckpointWriter::Commit() {
  if (world_.rank() != 0) return;
  WriteManifest();
  MoveIntoPlace();
  Retire();
}

void CheckpointWriter::WriteManifest() {
  const std::string bytes = EncodeManifest(pending_->manifest);
  DecodeManifest(bytes);  // a checkpoint that cannot be read must not be committed
  CheckFiles(pending_->temporary, pending_->manifest);
  FileWriter file(pending_->temporary / kManifestName, FileWriter::Mode::kCreate);
  file.Write(bytes);
  Hook("manifest:written");
  file.Sync();
  file.Close();
  SyncDirectory(pending_->temporary);
  Hook("manifest:synced");
}

void CheckpointWriter::MoveIntoPlace() {
  std::filesystem::path former = pending_->target;
  former += ".replaced";
  const bool replaces = std::filesystem::exists(pending_->target);
  if (replaces) {
    Rename(pending_->target, former);
    Hook("moved_aside");
  }
  Rename(pending_->temporary, pending_->target);
  Hook("renamed");
  SyncDirectory(options_.directory);
  Hook("committed");
  if (replaces) RemoveTree(former);
}

void CheckpointWriter::Retire() {
  // The new checkpoint is committed; trouble with old ones is no reason to stop.
  std::vector<std::filesystem::path> retired;
  try {
    retired = RetireCheckpoints(options_.directory, pending_->info.step, options_.retention);
    Hook("retired");
  } catch (const std::exception& failure) {
    LOG(WARNING) << "old checkpoints stay: " << failure.what();
  }
  if (retired.empty()) return;
  // Freeing the blocks of large files takes the file system long enough to be felt.
  remover_ = std::thread([retired = std::move(retired)] {
    for (const auto& path : retired) RemoveTree(path);
  });
}

// Runs `action` on this rank; returns the first error of any rank on all ranks.
std::string CheckpointWriter::RunAgreed(const std::function<void()>& action) {
  std::string error;
  try {
    action();
  } catch (const std::exception& failure) {
    error = failure.what();
  }
  return parallel::FirstError(world_, error);
}

void CheckpointWriter::Abandon(const std::string& reason) {
  const std::string step = StepDirectoryName(pending_->info.step);
  pending_.reset();  // ends this rank's thread
  world_.Barrier();  // and with it the last write into the folder
  std::string outcome;
  if (world_.rank() == 0) {
    try {
      CleanLeftovers(options_.directory);
      const auto latest = FindLatest(options_.directory);
      outcome = latest ? Str("the newest complete checkpoint is ", latest->string(),
                             "; once the cause is gone, --resume auto continues from it")
                       : "there is no earlier checkpoint";
    } catch (const std::exception& failure) {
      outcome = failure.what();
    }
  }
  outcome = parallel::BroadcastString(world_, outcome, 0);
  throw CheckpointError(Str("saving checkpoint ", step, " failed: ", reason, "; ", outcome));
}

void CheckpointWriter::Hook(const char* stage) const {
  if (options_.stage_hook) options_.stage_hook(stage);
}

}  // namespace longspan::trainer
