#include "data/indexed_dataset.h"

#include <xxhash.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <vector>

#include "ops/core/check.h"

namespace longspan::data {
namespace {

constexpr int64_t kSampledPages = 4096, kPageBytes = 4096, kReadBytes = 1 << 20;

template <class T>
T Load(const uint8_t* at) {  // the arrays of an .idx start at byte 34: nothing in it is aligned
  T value;
  std::memcpy(&value, at, sizeof(T));
  return value;
}

class Hasher {
 public:
  Hasher() { XXH3_64bits_reset(state_.get()); }
  void Add(const void* bytes, size_t count) { XXH3_64bits_update(state_.get(), bytes, count); }
  void AddRange(const InputFile& file, int64_t begin, int64_t count) {
    for (const int64_t end = begin + count; begin < end; begin += kReadBytes) {
      const int64_t wanted = std::min(end - begin, kReadBytes);
      buffer_.clear();
      if (file.ReadAt(begin, wanted, buffer_) != wanted) {
        throw DataError(Str(file.path(), " became shorter while it was read"));
      }
      Add(buffer_.data(), buffer_.size());
    }
  }
  uint64_t Digest() const { return XXH3_64bits_digest(state_.get()); }

 private:
  std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> state_{XXH3_createState(),
                                                                  XXH3_freeState};
  std::string buffer_;
};

std::string CheckedPrefix(const std::string& prefix) {
  for (const char* suffix : {".idx", ".bin"}) {
    if (prefix.ends_with(suffix)) {
      throw DataError(Str(prefix, " names a file; give the dataset's prefix without ", suffix));
    }
  }
  for (const char* suffix : {".idx", ".bin"}) {
    if (!std::filesystem::exists(prefix + suffix)) {
      throw DataError(Str(prefix, suffix, " does not exist; ", prefix,
                          " must be the prefix of a dataset made by 'longspan prepare'"));
    }
  }
  return prefix;
}

}  // namespace

IndexedDataset::IndexedDataset(const std::string& prefix)
    : prefix_(CheckedPrefix(prefix)), index_(prefix + ".idx"), tokens_(prefix + ".bin") {
  CheckHeader();
  CheckIndex();
  CheckTokens();
}

void IndexedDataset::CheckHeader() {
  const auto bytes = index_.bytes();
  const std::string& path = index_.path();
  const auto size = static_cast<int64_t>(bytes.size());
  const size_t common = std::min(bytes.size(), sizeof kMagic);
  if (common > 0 && std::memcmp(bytes.data(), kMagic, common) != 0) {
    throw DataError(Str(path,
                        " is not a Megatron index: it does not begin with MMIDIDX; make it "
                        "with 'longspan prepare'"));
  }
  if (size < kHeaderBytes) {
    throw DataError(Str(path, " is truncated: it has ", size, " bytes and its header alone has ",
                        kHeaderBytes, "; prepare the corpus again"));
  }
  const auto version = Load<uint64_t>(bytes.data() + 9);
  if (version != 1) {
    throw DataError(Str(path, " has format version ", version, "; only version 1 is known"));
  }
  const uint8_t code = bytes[17];
  if (!IsTokenDType(code)) {
    throw DataError(Str(path, " has dtype code ", static_cast<int>(code),
                        code == 6 || code == 7 ? " (floating point)" : "",
                        "; token ids need one of 1, 2, 3, 4, 5, 8"));
  }
  dtype_ = static_cast<TokenDType>(code);
  const auto sequences = Load<uint64_t>(bytes.data() + 18);
  const auto entries = Load<uint64_t>(bytes.data() + 26);
  const auto room = static_cast<uint64_t>(size - kHeaderBytes);
  // Divisions, because the products overflow for a damaged header.
  if (sequences > room / 12 || entries > (room - 12 * sequences) / 8) {
    throw DataError(Str(path, " is truncated: ", size, " bytes cannot hold the ", sequences,
                        " sequences and ", entries,
                        " document entries of its header; prepare the corpus again"));
  }
  if (entries == 0) {
    throw DataError(Str(path, " has an empty document index; it must begin with 0"));
  }
  const uint64_t extra = room - 12 * sequences - 8 * entries;
  if (extra != 0) {
    throw DataError(Str(path, " is ", extra, " bytes longer than its header says",
                        extra == sequences ? "; multimodal datasets are not supported"
                                           : "; it is damaged or foreign"));
  }
  num_sequences_ = static_cast<int64_t>(sequences);
  num_documents_ = static_cast<int64_t>(entries) - 1;
}

void IndexedDataset::CheckIndex() const {
  const std::string& path = index_.path();
  const uint8_t* lengths = index_.bytes().data() + kHeaderBytes;
  const uint8_t* offsets = lengths + 4 * num_sequences_;
  const uint8_t* documents = offsets + 8 * num_sequences_;
  const int64_t width = SizeOf(dtype_);
  int64_t end = 0;
  for (int64_t s = 0; s < num_sequences_; ++s) {
    const auto length = Load<int32_t>(lengths + 4 * s);
    const auto offset = Load<int64_t>(offsets + 8 * s);
    if (length < 0 || offset != end) {
      throw DataError(Str(path, " is inconsistent: sequence ", s, " has ", length,
                          " tokens at byte ", offset, " where byte ", end,
                          " was due; prepare the corpus again"));
    }
    end += length * width;
  }
  int64_t previous = 0;
  for (int64_t d = 0; d <= num_documents_; ++d) {
    const auto first = Load<int64_t>(documents + 8 * d);
    const bool good = d == 0 ? first == 0 : first >= previous && first <= num_sequences_;
    if (!good || (d == num_documents_ && first != num_sequences_)) {
      throw DataError(Str(path, " is inconsistent: entry ", d, " of ", num_documents_ + 1,
                          " in its document index is ", first,
                          "; entries must rise from 0 to the number of sequences, ",
                          num_sequences_));
    }
    previous = first;
  }
}

void IndexedDataset::CheckTokens() {
  const int64_t width = SizeOf(dtype_);
  const int64_t last = num_sequences_ - 1;
  const uint8_t* lengths = index_.bytes().data() + kHeaderBytes;
  const int64_t due = last < 0 ? 0
                               : Load<int64_t>(lengths + 4 * num_sequences_ + 8 * last) +
                                     Load<int32_t>(lengths + 4 * last) * width;
  const auto size = static_cast<int64_t>(tokens_.bytes().size());
  if (size != due) {
    throw DataError(Str(tokens_.path(), size < due ? " is truncated: " : " is too long: ", size,
                        " bytes where ", index_.path(), " needs ", due,
                        "; the two files must come from one run of 'longspan prepare'"));
  }
  num_tokens_ = due / width;
}

int64_t IndexedDataset::SequenceLength(int64_t sequence) const {
  LONGSPAN_CHECK(sequence >= 0 && sequence < num_sequences_) << sequence;
  return Load<int32_t>(index_.bytes().data() + kHeaderBytes + 4 * sequence);
}

int64_t IndexedDataset::DocumentBegin(int64_t document) const {
  LONGSPAN_CHECK(document >= 0 && document <= num_documents_) << document;
  const uint8_t* offsets = index_.bytes().data() + kHeaderBytes + 4 * num_sequences_;
  const auto sequence = Load<int64_t>(offsets + 8 * num_sequences_ + 8 * document);
  if (sequence == num_sequences_) return num_tokens_;
  return Load<int64_t>(offsets + 8 * sequence) / SizeOf(dtype_);
}

void IndexedDataset::Read(int64_t begin, std::span<int32_t> out) const {
  const auto count = static_cast<int64_t>(out.size());
  LONGSPAN_CHECK(begin >= 0 && count <= num_tokens_ - begin)
      << prefix_ << ": tokens " << begin << " + " << count << " of " << num_tokens_;
  if (!UnpackTokens(tokens_.bytes().data() + begin * SizeOf(dtype_), dtype_, out)) {
    throw DataError(Str(tokens_.path(), " holds a token id outside 32 bits among tokens ", begin,
                        "..", begin + count - 1));
  }
}

int64_t IndexedDataset::ScanMaxTokenId() const {
  int64_t largest = -1;
  std::vector<int32_t> buffer;
  for (int64_t begin = 0; begin < num_tokens_; begin += int64_t{1} << 16) {
    buffer.resize(static_cast<size_t>(std::min(num_tokens_ - begin, int64_t{1} << 16)));
    Read(begin, buffer);
    const auto [low, high] = std::minmax_element(buffer.begin(), buffer.end());
    if (*low < 0) {
      throw DataError(Str(tokens_.path(), " holds token id ", *low, " at token ",
                          begin + (low - buffer.begin()),
                          ", which is negative: damaged or foreign data; prepare the corpus "
                          "again"));
    }
    largest = std::max(largest, int64_t{*high});
  }
  return largest;
}

uint64_t IndexedDataset::Fingerprint() const {
  std::call_once(fingerprint_once_, [this] {
    Hasher hasher;
    hasher.Add(index_.bytes().data(), index_.bytes().size());
    const auto size = static_cast<int64_t>(tokens_.bytes().size());
    hasher.Add(&size, sizeof size);
    // Read and not mapped: touching mapped pages all over a large file makes much of it resident.
    const InputFile file(tokens_.path());
    if (size <= kSampledPages * kPageBytes) {
      hasher.AddRange(file, 0, size);
    } else {
      const __int128 span = size - kPageBytes;  // the first and the last page are in the sample
      for (int64_t page = 0; page < kSampledPages; ++page) {
        hasher.AddRange(file, static_cast<int64_t>(span * page / (kSampledPages - 1)), kPageBytes);
      }
    }
    fingerprint_ = hasher.Digest();
  });
  return fingerprint_;
}

uint64_t IndexedDataset::HashTokens() const {
  Hasher hasher;
  hasher.AddRange(InputFile(tokens_.path()), 0, static_cast<int64_t>(tokens_.bytes().size()));
  return hasher.Digest();
}

}  // namespace longspan::data
