#include "data/indexed_dataset.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>

#include <numeric>
#include <string>
#include <vector>

#include "data/bigram.h"
#include "data/index_writer.h"
#include "data/sidecar.h"
#include "ops/core/error.h"
#include "tests/data/data_support.h"

namespace longspan::test {
namespace {

using data::IndexedDataset;
using data::IndexWriter;
using data::TokenDType;

// Three sequences of 3, 2 and 1 u16 tokens in two documents.
HandMadeIndex Small() {
  HandMadeIndex index;
  index.lengths = {3, 2, 1};
  index.offsets = {0, 6, 10};
  index.documents = {0, 2, 3};
  return index;
}

class IndexedDatasetTest : public testing::Test {
 protected:
  std::string prefix() const { return temp_ / "set"; }
  void Write(const std::string& index, const std::string& tokens) const {
    WriteText(prefix() + ".idx", index);
    WriteText(prefix() + ".bin", tokens);
  }
  // What opening the dataset complains about; every message must name one of its files.
  std::string OpenError() const {
    const std::string message = MessageOf<DataError>([&] { IndexedDataset dataset(prefix()); });
    ExpectContains(message, prefix() + ".");
    return message;
  }
  const TempFolder temp_;
  const std::string tokens_ = std::string("\1\0\2\0\3\0\xff\xff\5\0\6\1", 12);
};

TEST_F(IndexedDatasetTest, ReadsSequencesAndDocuments) {
  Write(Small().Bytes(), tokens_);
  const IndexedDataset dataset(prefix());
  EXPECT_EQ(dataset.num_tokens(), 6);
  EXPECT_EQ(dataset.num_sequences(), 3);
  EXPECT_EQ(dataset.num_documents(), 2);
  EXPECT_EQ(dataset.SequenceLength(1), 2);
  EXPECT_EQ(dataset.dtype(), TokenDType::kU16);
  EXPECT_EQ(ReadDataset(prefix()), (Documents{{1, 2, 3, 65535, 5}, {262}}));
  EXPECT_EQ(dataset.ScanMaxTokenId(), 65535);
  std::vector<int32_t> two(2);
  dataset.Read(4, two);
  EXPECT_EQ(two, (std::vector<int32_t>{5, 262}));
  EXPECT_THROW(dataset.Read(5, two), InvalidArgument);
  EXPECT_THROW(dataset.Read(-1, two), InvalidArgument);
  EXPECT_THROW(dataset.DocumentBegin(3), InvalidArgument);
}

TEST_F(IndexedDatasetTest, EmptySequencesAndDocumentsAreLegal) {
  HandMadeIndex index;
  index.lengths = {0, 2, 0};
  index.offsets = {0, 0, 4};
  index.documents = {0, 1, 1, 3};  // an empty sequence, no sequence, two tokens
  Write(index.Bytes(), std::string("\7\0\x8\0", 4));
  EXPECT_EQ(ReadDataset(prefix()), (Documents{{}, {}, {7, 8}}));
  index.lengths = {}, index.offsets = {}, index.documents = {0};
  Write(index.Bytes(), "");
  EXPECT_EQ(IndexedDataset(prefix()).num_documents(), 0);
  EXPECT_EQ(IndexedDataset(prefix()).ScanMaxTokenId(), -1);
}

template <class T>
std::string Raw(const std::vector<T>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

TEST_F(IndexedDatasetTest, ReadsEveryIntegerType) {
  const auto read = [&](uint8_t dtype, int64_t width, const std::string& tokens) {
    HandMadeIndex index;
    index.dtype = dtype;
    index.lengths = {2, 1};
    index.offsets = {0, 2 * width};
    index.documents = {0, 1, 2};
    Write(index.Bytes(), tokens);
    return ReadDataset(prefix());
  };
  EXPECT_EQ(read(1, 1, Raw<uint8_t>({0, 255, 7})), (Documents{{0, 255}, {7}}));
  EXPECT_EQ(read(2, 1, Raw<int8_t>({0, 127, -1})), (Documents{{0, 127}, {-1}}));
  EXPECT_EQ(read(3, 2, Raw<int16_t>({1, 32767, -2})), (Documents{{1, 32767}, {-2}}));
  EXPECT_EQ(read(4, 4, Raw<int32_t>({1, 2147483647, -3})), (Documents{{1, 2147483647}, {-3}}));
  EXPECT_EQ(read(5, 8, Raw<int64_t>({1, 2147483647, 5})), (Documents{{1, 2147483647}, {5}}));
  EXPECT_EQ(read(8, 2, Raw<uint16_t>({1, 65535, 5})), (Documents{{1, 65535}, {5}}));
  ExpectContains(MessageOf<DataError>([&] {
                   read(5, 8, Raw<int64_t>({1, 1ll << 31, 5}));
                 }),
                 "outside 32 bits");
  for (const uint8_t dtype : {0, 6, 7, 9, 255}) {
    ExpectContains(MessageOf<DataError>([&] { read(dtype, 4, std::string(12, 'x')); }),
                   "dtype code " + std::to_string(dtype));
  }
}

TEST_F(IndexedDatasetTest, EveryTruncationOfTheIndexIsNamed) {
  const std::string whole = Small().Bytes();
  for (size_t length = 0; length < whole.size(); ++length) {
    Write(whole.substr(0, length), tokens_);
    ExpectContains(OpenError(), "set.idx is truncated");
  }
  Write(whole + "x", tokens_);
  ExpectContains(OpenError(), "1 bytes longer");
  Write(whole + "abc", tokens_);  // as many as sequences: the modes of a multimodal set
  ExpectContains(OpenError(), "multimodal");
}

TEST_F(IndexedDatasetTest, EveryFlippedBitOfHeaderLengthsAndOffsetsIsNoticed) {
  const std::string whole = Small().Bytes();
  for (size_t bit = 0; bit < (34 + 12 * 3) * 8; ++bit) {
    std::string damaged = whole;
    damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << bit % 8));
    Write(damaged, tokens_);
    EXPECT_THROW(IndexedDataset dataset(prefix()), DataError) << "bit " << bit;
  }
}

TEST_F(IndexedDatasetTest, ForeignFilesAreNamed) {
  Write("{\"text\": \"this is no index, but it is long enough\"}", tokens_);
  ExpectContains(OpenError(), "not a Megatron index");
  Write("PK", tokens_);
  ExpectContains(OpenError(), "not a Megatron index");
  HandMadeIndex index = Small();
  index.version = 2;
  Write(index.Bytes(), tokens_);
  ExpectContains(OpenError(), "version 2");
}

TEST_F(IndexedDatasetTest, BadDocumentIndexIsNamed) {
  for (const std::vector<int64_t>& documents :
       {std::vector<int64_t>{1, 2, 3}, {0, 4, 3}, {0, 2, 1, 3}, {0, 2}, {0, -1, 3}, {0, 3, 4}}) {
    HandMadeIndex index = Small();
    index.documents = documents;
    Write(index.Bytes(), tokens_);
    ExpectContains(OpenError(), "document index");
  }
  HandMadeIndex index = Small();
  index.documents = {};
  Write(index.Bytes(), tokens_);
  ExpectContains(OpenError(), "empty document index");
}

TEST_F(IndexedDatasetTest, WrongLengthOfTokensIsNamed) {
  const std::string whole = Small().Bytes();
  for (size_t length = 0; length < tokens_.size(); ++length) {
    Write(whole, tokens_.substr(0, length));
    ExpectContains(OpenError(), "set.bin is truncated: " + std::to_string(length) + " bytes");
  }
  Write(whole, tokens_ + "x");
  ExpectContains(OpenError(), "set.bin is too long");
}

TEST_F(IndexedDatasetTest, MissingFilesAndWrongPrefixesAreNamed) {
  ExpectContains(OpenError(), "set.idx does not exist");
  Write(Small().Bytes(), tokens_);
  fs::remove(prefix() + ".bin");
  ExpectContains(OpenError(), "set.bin does not exist");
  ExpectContains(MessageOf<DataError>([&] { IndexedDataset dataset(prefix() + ".idx"); }),
                 "without .idx");
}

TEST_F(IndexedDatasetTest, WriterMakesExactlyTheDocumentedBytes) {
  IndexWriter writer(prefix(), TokenDType::kU16, /*max_sequence_tokens=*/3);
  writer.Append(std::vector<int32_t>{1, 2});  // a document in parts, longer than one sequence
  writer.Append(std::vector<int32_t>{3, 4, 5, 6, 7});
  writer.EndDocument();
  writer.Append(std::vector<int32_t>{8, 9, 10});  // exactly one sequence
  writer.EndDocument();
  writer.Append(std::vector<int32_t>{11});
  writer.EndDocument();
  writer.Commit();
  HandMadeIndex expected;
  expected.lengths = {3, 3, 1, 3, 1};
  expected.offsets = {0, 6, 12, 14, 20};
  expected.documents = {0, 3, 4, 5};
  EXPECT_EQ(ReadText(prefix() + ".idx"), expected.Bytes());
  EXPECT_EQ(ReadText(prefix() + ".bin"), Raw<uint16_t>({1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}));
  EXPECT_EQ(ReadDataset(prefix()), (Documents{{1, 2, 3, 4, 5, 6, 7}, {8, 9, 10}, {11}}));
  EXPECT_EQ(ListBelow(temp_.path()), (std::vector<std::string>{"set.bin", "set.idx"}));
}

TEST_F(IndexedDatasetTest, WriterHandlesMoreDocumentsThanOneChunk) {
  Documents documents;
  for (int32_t d = 0; d < 70000; ++d) documents.push_back(std::vector<int32_t>(1 + d % 3, d));
  WriteDataset(prefix(), documents);
  EXPECT_EQ(ReadDataset(prefix()), documents);
}

TEST_F(IndexedDatasetTest, DroppedDocumentsLeaveNoTrace) {
  IndexWriter writer(prefix(), TokenDType::kU16);
  writer.DropDocument();
  writer.Append(std::vector<int32_t>{1, 2});
  writer.EndDocument();
  writer.Append(std::vector<int32_t>(3'000'000, 9));  // more than any buffer
  writer.DropDocument();
  writer.Append(std::vector<int32_t>{3});
  writer.EndDocument();
  writer.Commit();
  EXPECT_EQ(ReadDataset(prefix()), (Documents{{1, 2}, {3}}));
  EXPECT_EQ(writer.tokens_hash(), IndexedDataset(prefix()).HashTokens());
}

TEST_F(IndexedDatasetTest, WriterRefusesWhatWouldBeWrong) {
  EXPECT_EQ(data::TokenDTypeForVocabulary(65499), TokenDType::kU16);
  EXPECT_EQ(data::TokenDTypeForVocabulary(65500), TokenDType::kI32);
  IndexWriter writer(prefix(), TokenDType::kU16);
  EXPECT_THROW(writer.Append(std::vector<int32_t>{65536}), InvalidArgument);
  EXPECT_THROW(writer.Append(std::vector<int32_t>{-1}), InvalidArgument);
  EXPECT_THROW(writer.EndDocument(), InvalidArgument);
  writer.Append(std::vector<int32_t>{65535});
  EXPECT_THROW(writer.Commit(), InvalidArgument);
}

TEST_F(IndexedDatasetTest, UncommittedWriterLeavesNothingAndOldFilesStay) {
  WriteDataset(prefix(), {{1}, {2}});
  WriteText(prefix() + ".json", "old");
  {
    IndexWriter writer(prefix(), TokenDType::kU16);
    writer.Append(std::vector<int32_t>{5});
    writer.EndDocument();
    writer.Finish();
    EXPECT_EQ(ReadDataset(writer.temporary_prefix()), (Documents{{5}}));
  }
  EXPECT_EQ(ReadDataset(prefix()), (Documents{{1}, {2}}));
  EXPECT_EQ(ListBelow(temp_.path()), (std::vector<std::string>{"set.bin", "set.idx", "set.json"}));
  WriteDataset(prefix(), {{7}});
  EXPECT_FALSE(fs::exists(prefix() + ".json")) << "a sidecar of other data must not stay";
}

TEST_F(IndexedDatasetTest, FoldersInThePlaceOfOutputsAreRefusedBeforeAnythingGoes) {
  WriteDataset(prefix(), {{1}});
  WriteText(prefix() + ".json", "old");
  IndexWriter writer(prefix(), TokenDType::kU16);
  writer.Append(std::vector<int32_t>{5});
  writer.EndDocument();
  fs::remove(prefix() + ".bin");
  fs::create_directory(prefix() + ".bin");
  ExpectContains(MessageOf<DataError>([&] { writer.Commit(); }), "set.bin is a folder");
  ExpectContains(MessageOf<DataError>([&] { IndexWriter again(prefix(), TokenDType::kU16); }),
                 "set.bin is a folder");
  EXPECT_TRUE(fs::exists(prefix() + ".idx"));
  EXPECT_TRUE(fs::exists(prefix() + ".json"));
}

TEST_F(IndexedDatasetTest, LeftoversOfTheDeadGoAndFilesOfTheLivingStay) {
  using Strings = std::vector<std::string>;
  const Strings foreign = {".other.tmp1.bin", ".set.tmp.bin", ".set.tmp1.tmp2.bin", ".set.tmp1.txt",
                           ".set.tmpx.bin"};
  for (const std::string& name : foreign) WriteText(temp_ / name, "x");
  for (const char* name : {".set.tmp1.bin", ".set.tmp1.idx", ".set.tmp0af.json"}) {
    WriteText(temp_ / name, "x");
  }
  IndexWriter living(prefix(), TokenDType::kU16);
  Strings names = ListBelow(temp_.path());
  EXPECT_EQ(names.size(), foreign.size() + 2);
  for (const std::string& name : foreign) {
    EXPECT_TRUE(fs::exists(temp_ / name)) << name;
  }
  living.Append(std::vector<int32_t>{5});
  living.EndDocument();
  living.Stage("{}");  // its files are closed now, but not abandoned
  WriteDataset(prefix(), {{7}, {8}});
  EXPECT_EQ(ReadDataset(prefix()), (Documents{{7}, {8}}));
  living.Publish();
  EXPECT_EQ(ReadDataset(prefix()), (Documents{{5}}));
  names = foreign;
  names.insert(names.end(), {"set.bin", "set.idx", "set.json"});
  EXPECT_EQ(ListBelow(temp_.path()), names);
}

TEST_F(IndexedDatasetTest, NegativeIdsAreNamedByWhateverReadsAll) {
  WriteDataset(temp_ / "good", {{1, 2, 3}, {3, 1}});
  HandMadeIndex index;
  index.dtype = 4;
  index.lengths = {3};
  index.offsets = {0};
  index.documents = {0, 1};
  Write(index.Bytes(), Raw<int32_t>({1, -7, 2}));
  const std::string expected = "set.bin holds token id -7 at token 1, which is negative";
  ExpectContains(MessageOf<DataError>([&] { IndexedDataset(prefix()).ScanMaxTokenId(); }),
                 expected);
  ExpectContains(MessageOf<DataError>([&] { data::EvaluateBigram(prefix(), temp_ / "good"); }),
                 expected);
  ExpectContains(MessageOf<DataError>([&] { data::EvaluateBigram(temp_ / "good", prefix()); }),
                 expected);
  EXPECT_EQ(data::EvaluateBigram(temp_ / "good", temp_ / "good").tokens, 3);
}

TEST_F(IndexedDatasetTest, TokensBeyondFourGibibytesAreRead) {
  constexpr int64_t kSequences = 5, kLength = int64_t{1} << 29;
  HandMadeIndex index;
  for (int64_t s = 0; s < kSequences; ++s) {
    index.lengths.push_back(static_cast<int32_t>(kLength));
    index.offsets.push_back(2 * s * kLength);
    index.documents.push_back(s);
  }
  index.documents.push_back(kSequences);
  Write(index.Bytes(), "");
  fs::resize_file(prefix() + ".bin", 2 * kSequences * kLength);  // takes no room on the disk
  const auto put = [&](int64_t token, const std::string& bytes) {
    std::fstream file(prefix() + ".bin", std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(2 * token);
    file << bytes;
  };
  const int64_t last = (kSequences - 1) * kLength, end = kSequences * kLength;
  put(last - 1, Raw<uint16_t>({3, 4}));
  put(end - 2, Raw<uint16_t>({5, 6}));
  const IndexedDataset dataset(prefix());
  EXPECT_EQ(dataset.num_tokens(), end);
  EXPECT_EQ(dataset.DocumentBegin(kSequences - 1), last);
  std::vector<int32_t> ids(4);
  dataset.Read(last - 2, ids);
  EXPECT_EQ(ids, (std::vector<int32_t>{0, 3, 4, 0}));
  dataset.Read(end - 4, ids);
  EXPECT_EQ(ids, (std::vector<int32_t>{0, 0, 5, 6}));
  EXPECT_THROW(dataset.Read(end - 3, ids), InvalidArgument);
}

TEST_F(IndexedDatasetTest, FullDiskIsReportedAndCleanedUp) {
  ::signal(SIGXFSZ, SIG_IGN);  // then a write beyond the limit fails as one on a full disk does
  rlimit old{};
  ::getrlimit(RLIMIT_FSIZE, &old);
  const rlimit small{1 << 20, old.rlim_max};
  ::setrlimit(RLIMIT_FSIZE, &small);
  const std::string message = MessageOf<DataError>([&] {
    IndexWriter writer(prefix(), TokenDType::kI32);
    for (int i = 0; i < 100; ++i) writer.Append(std::vector<int32_t>(10000, i));
  });
  ::setrlimit(RLIMIT_FSIZE, &old);
  ExpectContains(message, "cannot write");
  ExpectContains(message, ".bin");
  EXPECT_TRUE(ListBelow(temp_.path()).empty());
}

TEST_F(IndexedDatasetTest, FingerprintSeesContentAndNotNames) {
  Write(Small().Bytes(), tokens_);
  const uint64_t original = IndexedDataset(prefix()).Fingerprint();
  fs::copy(prefix() + ".idx", temp_ / "copy.idx");
  fs::copy(prefix() + ".bin", temp_ / "copy.bin");
  EXPECT_EQ(IndexedDataset(temp_ / "copy").Fingerprint(), original);
  for (size_t byte = 0; byte < tokens_.size(); ++byte) {
    std::string changed = tokens_;
    changed[byte] = static_cast<char>(changed[byte] ^ 1);
    Write(Small().Bytes(), changed);
    EXPECT_NE(IndexedDataset(prefix()).Fingerprint(), original) << byte;
  }
  HandMadeIndex other = Small();
  other.documents = {0, 1, 3};
  Write(other.Bytes(), tokens_);
  EXPECT_NE(IndexedDataset(prefix()).Fingerprint(), original);
}

TEST_F(IndexedDatasetTest, FingerprintOfLargeFilesCoversBothEnds) {
  std::string tokens(20 << 20, 'a');
  HandMadeIndex index;
  index.lengths = {10 << 20};
  index.offsets = {0};
  index.documents = {0, 1};
  Write(index.Bytes(), tokens);
  const uint64_t original = IndexedDataset(prefix()).Fingerprint();
  for (const size_t byte : {size_t{0}, tokens.size() / 3, tokens.size() - 1}) {
    std::string changed = tokens;
    // Wide enough to touch a sampled page wherever it lies: pages are 5 KiB apart here.
    for (size_t i = byte; i < std::min(byte + 2048, changed.size()); ++i) changed[i] = 'b';
    Write(index.Bytes(), changed);
    EXPECT_NE(IndexedDataset(prefix()).Fingerprint(), original) << byte;
  }
}

TEST_F(IndexedDatasetTest, SidecarRoundTripsAndVerifies) {
  WriteDataset(prefix(), {{1, 2}, {900}});
  EXPECT_FALSE(data::ReadSidecar(prefix()).has_value());
  const auto verify = [&] { data::VerifyAgainstSidecar(IndexedDataset(prefix())); };
  ExpectContains(MessageOf<DataError>(verify), "set.json does not exist");
  data::Sidecar sidecar{.tokenizer = "byte", .vocab_size = 259, .eot_id = 256, .documents = 2};
  sidecar.tokens = 3;
  sidecar.max_token_id = 123;  // not the truth, to tell the sidecar's word from a scan
  sidecar.fingerprint = IndexedDataset(prefix()).Fingerprint();
  sidecar.bin_xxh3 = IndexedDataset(prefix()).HashTokens();
  WriteText(prefix() + ".json", data::ToJson(sidecar));
  const auto read = data::ReadSidecar(prefix());
  ASSERT_TRUE(read.has_value());
  EXPECT_EQ(read->tokenizer, "byte");
  EXPECT_EQ(read->vocab_size, 259);
  EXPECT_EQ(read->eot_id, 256);
  EXPECT_EQ(read->documents, 2);
  EXPECT_EQ(read->tokens, 3);
  EXPECT_EQ(read->fingerprint, sidecar.fingerprint);
  EXPECT_EQ(read->bin_xxh3, sidecar.bin_xxh3);
  verify();
  EXPECT_EQ(data::MaxTokenId(IndexedDataset(prefix())), 123);

  std::string tokens = ReadText(prefix() + ".bin");
  tokens[4] ^= 8;
  WriteText(prefix() + ".bin", tokens);
  ExpectContains(MessageOf<DataError>(verify), "set.bin has checksum");
  EXPECT_EQ(data::MaxTokenId(IndexedDataset(prefix())), 900) << "a stale sidecar is not believed";

  for (const char* bad : {"", "{}", "not json", "{\"tokenizer\": 3}"}) {
    WriteText(prefix() + ".json", bad);
    ExpectContains(MessageOf<DataError>([&] { data::ReadSidecar(prefix()); }), "set.json");
  }
}

}  // namespace
}  // namespace longspan::test
