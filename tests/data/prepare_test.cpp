#include "data/prepare.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "data/byte_tokenizer.h"
#include "data/encode.h"
#include "data/indexed_dataset.h"
#include "ops/core/error.h"
#include "ops/core/rng.h"
#include "tests/data/data_support.h"

namespace longspan::test {
namespace {

using data::Prepare;
using data::PrepareOptions;
using data::PrepareProgress;
using data::PrepareResult;
using Strings = std::vector<std::string>;

std::vector<int32_t> Bytes(const std::string& text, bool eot = true) {
  std::vector<int32_t> ids;
  for (const char c : text) ids.push_back(static_cast<uint8_t>(c));
  if (eot) ids.push_back(256);
  return ids;
}

// Text of characters of 1 to 4 bytes.
std::string RandomText(size_t characters, uint64_t seed) {
  const Philox rng(seed, StreamOf("prepare test"));
  const char* const alphabet[] = {
      "a", " ", "\n", "Z", "\xC3\xA4", "\xE2\x82\xAC", "\xF0\x9F\x99\x82"};
  std::string text;
  for (size_t i = 0; i < characters; ++i) text += alphabet[rng.Below(i, 7)];
  return text;
}

// Spaces are tokens of their own; other bytes go in pairs that never span a space. Where a document
// is cut therefore matters, unless FindCut is asked.
class PairTokenizer : public data::Tokenizer {
 public:
  void Encode(std::string_view document, std::vector<int32_t>& out) const override {
    for (size_t i = 0; i < document.size();) {
      const auto byte = [&](size_t k) {
        return static_cast<int32_t>(static_cast<uint8_t>(document[k]));
      };
      if (document[i] != ' ' && i + 1 < document.size() && document[i + 1] != ' ') {
        out.push_back(256 + byte(i) * 256 + byte(i + 1));
        i += 2;
      } else {
        out.push_back(byte(i++));
      }
    }
  }
  std::string Decode(std::span<const int32_t>) const override { return ""; }
  size_t FindCut(std::string_view text) const override {
    return std::min(text.find(' '), text.size());
  }
  int32_t vocab_size() const override { return 256 + 65536 + 1; }
  int32_t eot_id() const override { return 256 + 65536; }
  std::string name() const override { return "pair"; }
};

class PrepareTest : public testing::Test {
 protected:
  PrepareOptions Options(const Strings& inputs) const {
    PrepareOptions options;
    options.inputs = inputs;
    options.out = out();
    options.threads = 2;
    return options;
  }
  std::string in(const std::string& name = "") const {
    return temp_ / (name.empty() ? "in" : "in/" + name);
  }
  std::string out() const { return temp_ / "out/set"; }
  // Runs into the error and checks that no file or folder has appeared or gone.
  std::string FailureOf(const PrepareOptions& options) const {
    const Strings before = ListBelow(temp_.path());
    const std::string message = MessageOf<Error>([&] { Prepare(options); });
    EXPECT_EQ(ListBelow(temp_.path()), before);
    return message;
  }
  const TempFolder temp_;
};

TEST_F(PrepareTest, DocumentsAreBytesAndEndOfTextInOrder) {
  WriteText(in("b.txt"), "second");
  WriteText(in("a.txt"), "first \xC3\xA4");
  WriteText(in("c.jsonl"), "{\"text\":\"third\"}\n{\"text\":\"fourth\"}");
  const PrepareResult result = Prepare(Options({in()}));
  EXPECT_EQ(ReadDataset(out()),
            (Documents{Bytes("first \xC3\xA4"), Bytes("second"), Bytes("third"), Bytes("fourth")}));
  EXPECT_EQ(ListBelow(temp_ / "out"), (Strings{"set.bin", "set.idx", "set.json"}));
  ASSERT_EQ(result.datasets.size(), 1u);
  const data::Sidecar& info = result.datasets[0].info;
  EXPECT_EQ(info.tokenizer, "byte");
  EXPECT_EQ(info.vocab_size, 259);
  EXPECT_EQ(info.eot_id, 256);
  EXPECT_EQ(info.documents, 4);
  EXPECT_EQ(info.tokens, 8 + 6 + 5 + 6 + 4);
  EXPECT_EQ(info.max_token_id, 256);
  EXPECT_EQ(result.files, 3);
  EXPECT_EQ(result.bytes, 14 + 17 + 17);
  const data::IndexedDataset dataset(out());
  EXPECT_EQ(dataset.dtype(), data::TokenDType::kU16);
  data::VerifyAgainstSidecar(dataset);
  ExpectContains(ToJson(result), "\"documents\": 4");
}

TEST_F(PrepareTest, OutputDoesNotDependOnThreadsOrUnits) {
  for (int f = 0; f < 40; ++f) {
    WriteText(in(Str("f", f, ".txt")), RandomText(static_cast<size_t>(f * f), f));
  }
  WriteText(in("broken.txt"), RandomText(900, 50) + "\xFF" + RandomText(900, 51));
  std::string lines;
  for (int l = 0; l < 60; ++l) {
    const std::string text(static_cast<size_t>(l * 7 % 90), static_cast<char>('a' + l % 26));
    lines +=
        "{\"id\":" + std::to_string(l) + ",\"text\":\"" + text + "\"}" + (l % 2 ? "\n" : "\r\n\n");
  }
  WriteText(in("lines.jsonl"), lines);
  const auto run = [&](int threads, int64_t unit_bytes) {
    PrepareOptions options = Options({in()});
    options.threads = threads;
    options.unit_bytes = unit_bytes;
    options.validation_fraction = 0.3;
    options.overwrite = true;
    const PrepareResult result = Prepare(options);
    EXPECT_EQ(result.skipped_empty, 2);  // f0.txt and the lines 0 have nothing in them
    EXPECT_EQ(result.skipped_invalid_utf8, 1);
    std::string all;
    for (const char* name : {"/train.bin", "/train.idx", "/train.json", "/validation.bin",
                             "/validation.idx", "/validation.json"}) {
      all += ReadText(out() + name) + "|";
    }
    return all;
  };
  const std::string expected = run(1, 1 << 20);
  for (const int threads : {1, 2, 5}) {
    for (const int64_t unit_bytes : {1, 37, 1000, 1 << 20}) {
      ASSERT_EQ(run(threads, unit_bytes), expected) << threads << " " << unit_bytes;
    }
  }
}

TEST_F(PrepareTest, CharactersAcrossPieceBordersSurvive) {
  const std::string text = RandomText(300, 1) + "\xF0\x9F\x99\x82";
  WriteText(in("a.txt"), text);
  for (int64_t unit_bytes = 1; unit_bytes < 20; ++unit_bytes) {
    PrepareOptions options = Options({in()});
    options.unit_bytes = unit_bytes;
    options.overwrite = true;
    EXPECT_EQ(Prepare(options).skipped_invalid_utf8, 0);
    ASSERT_EQ(ReadDataset(out()), (Documents{Bytes(text)})) << unit_bytes;
  }
}

TEST_F(PrepareTest, TokenizersChooseWhereLongDocumentsAreCut) {
  std::string text;
  for (int i = 0; i < 60000; ++i) text += std::string(static_cast<size_t>(1 + i % 9), 'w') + " ";
  ASSERT_GT(text.size(), size_t{256 << 10}) << "must be longer than what is encoded at once";
  WriteText(in("a.txt"), text);
  const PairTokenizer tokenizer;
  std::vector<int32_t> expected;
  tokenizer.Encode(text, expected);
  expected.push_back(tokenizer.eot_id());
  for (const int64_t unit_bytes : {1 << 20, 10007, 1001}) {
    PrepareOptions options = Options({in()});
    options.unit_bytes = unit_bytes;
    options.overwrite = true;
    const PrepareResult result = PrepareWith(options, tokenizer);
    ASSERT_EQ(ReadDataset(out()), Documents{expected}) << unit_bytes;
    EXPECT_EQ(result.datasets[0].info.max_token_id, tokenizer.eot_id());
    EXPECT_EQ(data::IndexedDataset(out()).dtype(), data::TokenDType::kI32);
  }
}

TEST_F(PrepareTest, BinaryAndInvalidFilesAreSkippedAndCounted) {
  const std::string text = RandomText(2000, 2);
  WriteText(in("a.txt"), "good");
  WriteText(in("b.bin"), std::string("x\0y", 3));
  WriteText(in("c.latin1"), "caf\xE9");
  WriteText(in("d.txt"), "");
  WriteText(in("e.txt"), text + std::string(1, '\0'));  // defect in the last piece
  WriteText(in("f.txt"), "\xFF" + text);                // and in the first
  WriteText(in("g.txt"), text + "\xC3");                // cut short
  WriteText(in("h.txt"), "also good");
  WriteText(in("i.jsonl"), "{\"text\":\"a\\u0000b\"}\n{\"text\":\"c\"}\n{\"text\":\"\"}\n\n");
  for (const int64_t unit_bytes : {1 << 20, 100}) {
    PrepareOptions options = Options({in()});
    options.unit_bytes = unit_bytes;
    options.overwrite = true;
    const PrepareResult result = Prepare(options);
    EXPECT_EQ(ReadDataset(out()), (Documents{Bytes("good"), Bytes("also good"), Bytes("c")}));
    EXPECT_EQ(result.skipped_binary, 3);
    EXPECT_EQ(result.skipped_invalid_utf8, 3);
    EXPECT_EQ(result.skipped_empty, 2);
    data::VerifyAgainstSidecar(data::IndexedDataset(out()));
  }
}

TEST_F(PrepareTest, JsonLinesTakeTheirFieldAndNameBadLines) {
  WriteText(in("a.jsonl"), "{\"body\":\"x\"}\r\n\n  \n{\"body\":\"y\"}\n");
  PrepareOptions options = Options({in("a.jsonl")});
  options.field = "body";
  Prepare(options);
  EXPECT_EQ(ReadDataset(out()), (Documents{Bytes("x"), Bytes("y")}));
  options.field = "text";
  options.overwrite = true;
  ExpectContains(FailureOf(options), "a.jsonl:1: the line has no field \"text\"");

  std::string lines;
  for (int l = 0; l < 500; ++l) lines += "{\"text\":\"" + std::string(20, 'x') + "\"}\n";
  WriteText(in("b.jsonl"), lines + "{\"text\":3}\n" + lines + "oops\n");
  for (const int64_t unit_bytes : {1 << 20, 100}) {
    PrepareOptions late = Options({in("b.jsonl")});
    late.overwrite = true;
    late.unit_bytes = unit_bytes;
    late.threads = 4;
    ExpectContains(FailureOf(late),
                   "b.jsonl:501: the line has a field \"text\" that is not a string");
  }
}

TEST_F(PrepareTest, LinesLongerThanUnitsStayWhole) {
  const std::string text(300000, 'q');
  WriteText(in("a.jsonl"), "{\"text\":\"a\"}\n{\"text\":\"" + text + "\"}\n{\"text\":\"b\"}\n");
  for (const int64_t unit_bytes : {1 << 20, 1 << 16, 5}) {
    PrepareOptions options = Options({in()});
    options.unit_bytes = unit_bytes;
    options.overwrite = true;
    Prepare(options);
    EXPECT_EQ(ReadDataset(out()), (Documents{Bytes("a"), Bytes(text), Bytes("b")})) << unit_bytes;
  }
}

TEST_F(PrepareTest, SplitKeepsDocumentsOnTheirSide) {
  for (int f = 0; f < 300; ++f) WriteText(in(Str("f", f)), Str("doc ", f));
  PrepareOptions options = Options({in()});
  options.validation_fraction = 0.2;
  options.overwrite = true;
  const auto split = [&](const PrepareOptions& o) {
    Prepare(o);
    Documents sides[2] = {ReadDataset(o.out + "/train"), ReadDataset(o.out + "/validation")};
    for (auto& side : sides) std::sort(side.begin(), side.end());
    return std::pair(sides[0], sides[1]);
  };
  const auto [train, validation] = split(options);
  EXPECT_EQ(train.size() + validation.size(), 300u);
  EXPECT_NEAR(static_cast<double>(validation.size()), 60, 25);

  // More documents, and a folder that was moved: nobody changes sides.
  fs::rename(in(), temp_ / "moved");
  fs::create_directory(temp_ / "elsewhere");
  fs::rename(temp_ / "moved", temp_ / "elsewhere/in");
  for (int f = 0; f < 50; ++f) WriteText(temp_ / Str("elsewhere/in/a", f), "new");
  PrepareOptions more = options;
  more.inputs = {temp_ / "elsewhere/in"};
  const auto [more_train, more_validation] = split(more);
  EXPECT_EQ(more_train.size() + more_validation.size(), 350u);
  EXPECT_TRUE(std::includes(more_train.begin(), more_train.end(), train.begin(), train.end()));
  EXPECT_TRUE(std::includes(more_validation.begin(), more_validation.end(), validation.begin(),
                            validation.end()));
  more.seed = 2;
  EXPECT_NE(split(more).second, more_validation);
}

TEST_F(PrepareTest, FilesOfOneNameAreSplitLikeOthers) {
  Strings inputs;
  for (int f = 0; f < 99; ++f) {
    inputs.push_back(in(Str("d", f, "/text.txt")));
    WriteText(inputs.back(), Str("doc ", f));
  }
  PrepareOptions options = Options(inputs);
  options.validation_fraction = 0.3;
  options.overwrite = true;
  EXPECT_NEAR(static_cast<double>(Prepare(options).datasets[1].info.documents), 30, 20);
  options.inputs.resize(2);
  options.validation_fraction = 0.01;
  EXPECT_EQ(Prepare(options).datasets[1].info.documents, 1);
}

TEST_F(PrepareTest, EqualJsonLinesAreOnTheSameSide) {
  std::string lines;
  for (int l = 0; l < 100; ++l) lines += Str("{\"text\":\"t", l, "\"}\n");
  WriteText(in("a.jsonl"), lines);
  WriteText(in("b.jsonl"), lines);
  PrepareOptions options = Options({in()});
  options.validation_fraction = 0.3;
  Prepare(options);
  const Documents validation = ReadDataset(out() + "/validation");
  ASSERT_FALSE(validation.empty());
  for (const auto& document : validation) {
    EXPECT_EQ(std::count(validation.begin(), validation.end(), document), 2);
  }
}

TEST_F(PrepareTest, BothSidesGetADocument) {
  for (int f = 0; f < 5; ++f) WriteText(in("f" + std::to_string(f)), std::string(1, 'a' + f));
  for (const double fraction : {1e-6, 1 - 1e-6}) {
    PrepareOptions options = Options({in()});
    options.validation_fraction = fraction;
    options.overwrite = true;
    const PrepareResult result = Prepare(options);
    EXPECT_EQ(result.datasets[0].info.documents, fraction < 0.5 ? 4 : 1);
    EXPECT_EQ(result.datasets[1].info.documents, fraction < 0.5 ? 1 : 4);
    EXPECT_EQ(result.bytes, 5) << "the second reading does not count";
  }
  PrepareOptions one = Options({in("f0")});
  one.out = temp_ / "one";
  one.validation_fraction = 0.5;
  ExpectContains(FailureOf(one), "needs two different ones");
  WriteText(temp_ / "equal.jsonl", "{\"text\":\"a\"}\n{\"text\":\"a\"}\n");
  one.inputs = {temp_ / "equal.jsonl"};
  ExpectContains(FailureOf(one), "needs two different ones");
}

TEST_F(PrepareTest, ExistingOutputIsRefusedBeforeTheInputIsRead) {
  WriteText(in("a.txt"), "a");
  Prepare(Options({in()}));
  PrepareOptions options = Options({temp_ / "missing"});
  ExpectContains(FailureOf(options), "set.bin exists");
  options.overwrite = true;
  ExpectContains(FailureOf(options), temp_ / "missing");
  EXPECT_EQ(ReadDataset(out()), (Documents{Bytes("a")})) << "a failed overwrite changes nothing";

  options.inputs = {in()};
  WriteText(in("b.txt"), "b");
  Prepare(options);
  EXPECT_EQ(ReadDataset(out()), (Documents{Bytes("a"), Bytes("b")}));
  // Any one of the files counts.
  fs::remove(out() + ".bin"), fs::remove(out() + ".idx");
  options.overwrite = false;
  ExpectContains(FailureOf(options), "set.json exists");
}

TEST_F(PrepareTest, OwnOutputInsideTheInputIsNotRead) {
  WriteText(in("a.txt"), "a");
  PrepareOptions options = Options({in()});
  options.out = in("corpus");
  options.overwrite = true;
  for (int round = 0; round < 2; ++round) {
    EXPECT_EQ(Prepare(options).files, 1);
    EXPECT_EQ(ReadDataset(in("corpus")), (Documents{Bytes("a")}));
  }
}

TEST_F(PrepareTest, InputsThatAreOutputsAreRefused) {
  WriteText(in("notes.json"), "precious");
  WriteText(in("more.txt"), "more");
  PrepareOptions options = Options({in("notes.json"), in("more.txt")});
  options.out = in("notes");
  options.overwrite = true;
  ExpectContains(FailureOf(options), in("notes.json") + " would be overwritten by --out");
  EXPECT_EQ(ReadText(in("notes.json")), "precious");
}

// A folder in the place of an output is what can be made to fail at a known moment.
TEST_F(PrepareTest, OutputsArePublishedTogetherOrNotAtAll) {
  for (int f = 0; f < 20; ++f) WriteText(in(Str("f", f)), Str("doc ", f));
  PrepareOptions options = Options({in()});
  options.validation_fraction = 0.5;
  options.overwrite = true;
  Prepare(options);
  const std::string train = ReadText(out() + "/train.bin");
  WriteText(in("f20"), std::string(1000, 'a'));
  WriteText(in("f21"), std::string(1000, 'b'));
  fs::remove(out() + "/validation.json");
  const Strings before = ListBelow(temp_ / "out");
  // It appears while the input is read, so only the validation side's last step can notice it.
  const auto appear = [&](const PrepareProgress&) {
    fs::create_directory(out() + "/validation.json");
  };
  ExpectContains(MessageOf<DataError>([&] { Prepare(options, appear); }),
                 "validation.json is a folder");
  fs::remove(out() + "/validation.json");
  EXPECT_EQ(ListBelow(temp_ / "out"), before);
  EXPECT_EQ(ReadText(out() + "/train.bin"), train);
  // One that is there from the start is named before the input is encoded.
  fs::remove(out() + "/train.bin");
  fs::create_directory(out() + "/train.bin");
  ExpectContains(FailureOf(options), "train.bin is a folder");
  EXPECT_TRUE(fs::exists(out() + "/train.idx"));
}

TEST_F(PrepareTest, InputsThatChangeAreNamed) {
  const std::string line = Str("{\"text\":\"", std::string(40, 'x'), "\"}\n");
  WriteText(in("a.jsonl"), line + line);
  WriteText(in("b.txt"), line + line);
  const auto listed = static_cast<int64_t>(2 * line.size());
  const data::ByteTokenizer tokenizer;
  for (const int64_t change : {-30, +30}) {
    for (const char* name : {"a.jsonl", "b.txt"}) {
      const std::vector<data::TextFile> files = {{in(name), name, listed + change, name[0] == 'a'}};
      data::UnitEncoder encoder({files, tokenizer, data::TokenDType::kU16});
      data::UnitPlanner planner(files, 50);
      const std::string message = MessageOf<DataError>([&] {
        while (const auto unit = planner.Next()) encoder.Encode(*unit);
      });
      ExpectContains(message, in(name) + " changed while it was read");
    }
  }
}

TEST_F(PrepareTest, FailuresLeaveNothingBehind) {
  WriteText(in("a.txt"), "a");
  WriteText(in("z.jsonl"), "{\"text\":\"a\"}\nbroken\n");
  PrepareOptions options = Options({in()});
  options.out = temp_ / "new/folders/set";
  ExpectContains(FailureOf(options), "z.jsonl:2: the line is not valid JSON");
  options.validation_fraction = 0.5;
  ExpectContains(FailureOf(options), "z.jsonl:2");
  options.inputs = {in("a.txt"), temp_ / "gone.txt"};
  ExpectContains(FailureOf(options), temp_ / "gone.txt");
  WriteText(in("empty"), "");
  options.inputs = {in("empty")};
  options.validation_fraction = 0;
  ExpectContains(FailureOf(options), "0 document(s) of text (0 binary, 0 not UTF-8 and 1 empty");
  options.inputs = {in("a.txt")};
  options.out = in("a.txt") + "/set";  // below a file
  ExpectContains(FailureOf(options), "cannot create folder");
}

TEST_F(PrepareTest, ProgressReportsTotalsAndMayStopTheWork) {
  for (int f = 0; f < 10; ++f) WriteText(in("f" + std::to_string(f)), std::string(1000, 'a'));
  PrepareProgress last;
  int calls = 0;
  Prepare(Options({in()}), [&](const PrepareProgress& now) {
    EXPECT_GE(now.bytes, last.bytes);
    last = now;
    ++calls;
  });
  EXPECT_GE(calls, 1);
  EXPECT_EQ(last.bytes, 10000);
  EXPECT_EQ(last.total_bytes, 10000);
  EXPECT_EQ(last.documents, 10);
  EXPECT_EQ(last.tokens, 10010);

  PrepareOptions options = Options({in()});
  options.out = temp_ / "other/set";
  const auto stop = [](const PrepareProgress&) { throw Error("interrupted"); };
  EXPECT_THROW(Prepare(options, stop), Error);
  EXPECT_FALSE(fs::exists(temp_ / "other"));
}

TEST_F(PrepareTest, BadOptionsAreNamed) {
  WriteText(in("a.txt"), "a");
  const auto message = [&](const std::function<void(PrepareOptions&)>& change) {
    PrepareOptions options = Options({in()});
    change(options);
    return FailureOf(options);
  };
  ExpectContains(message([](auto& o) { o.inputs = {}; }), "at least one input");
  ExpectContains(message([](auto& o) { o.out = ""; }), "--out");
  ExpectContains(message([](auto& o) { o.out = "folder/"; }), "--out");
  for (const double fraction : {-0.1, 1.0, std::nan("")}) {
    ExpectContains(message([&](auto& o) { o.validation_fraction = fraction; }),
                   "--validation-fraction");
  }
  ExpectContains(message([](auto& o) { o.threads = -1; }), "--threads -1");
  ExpectContains(message([](auto& o) { o.tokenizer = "some.model"; }), "some.model");
}

}  // namespace
}  // namespace longspan::test
