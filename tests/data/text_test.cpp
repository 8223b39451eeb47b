#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "data/byte_tokenizer.h"
#include "data/json_field.h"
#include "data/text_source.h"
#include "data/tokenizer.h"
#include "data/utf8.h"
#include "ops/core/error.h"
#include "tests/data/data_support.h"

namespace longspan::test {
namespace {

using data::ClassifyText;
using data::TextKind;

// Encodes a code point without judging it: surrogates and values above U+10FFFF come out too.
std::string Utf8(uint32_t c) {
  const auto byte = [](uint32_t v) { return static_cast<char>(v); };
  if (c < 0x80) return {byte(c)};
  if (c < 0x800) return {byte(0xC0 | c >> 6), byte(0x80 | (c & 63))};
  if (c < 0x10000) {
    return {byte(0xE0 | c >> 12), byte(0x80 | (c >> 6 & 63)), byte(0x80 | (c & 63))};
  }
  return {byte(0xF0 | c >> 18), byte(0x80 | (c >> 12 & 63)), byte(0x80 | (c >> 6 & 63)),
          byte(0x80 | (c & 63))};
}

TEST(Utf8Test, EveryCodePointIsJudgedRight) {
  int64_t valid = 0;
  for (uint32_t c = 1; c < 0x120000; ++c) {
    const bool good = c <= 0x10FFFF && !(c >= 0xD800 && c <= 0xDFFF);
    ASSERT_EQ(ClassifyText(Utf8(c)) == TextKind::kText, good) << std::hex << c;
    valid += good;
  }
  EXPECT_EQ(valid, 0x10FFFF - 0x800);
}

TEST(Utf8Test, NoOtherShortStringIsAccepted) {
  // Counting catches overlong forms and stray continuations: only the strings composed of valid
  // characters may pass.
  int64_t two = 0, three = 0;
  std::string s(3, 'x');
  for (int a = 0; a < 256; ++a) {
    for (int b = 0; b < 256; ++b) {
      s[0] = static_cast<char>(a), s[1] = static_cast<char>(b);
      two += ClassifyText(std::string_view(s).substr(0, 2)) == TextKind::kText;
      for (int c = 0; c < 256; ++c) {
        s[2] = static_cast<char>(c);
        three += ClassifyText(s) == TextKind::kText;
      }
    }
  }
  EXPECT_EQ(two, 127 * 127 + 1920);
  EXPECT_EQ(three, 127 * 127 * 127 + 2 * 127 * 1920 + (0x10000 - 0x800 - 0x800));
  for (const char* bad : {"\xF0\x8F\xBF\xBF", "\xF4\x90\x80\x80", "\xF5\x80\x80\x80", "\xFF"}) {
    EXPECT_EQ(ClassifyText(bad), TextKind::kInvalidUtf8);
  }
}

TEST(Utf8Test, DefectsAndCharactersAreSeenAtEveryOffset) {
  const std::string characters[] = {"\xC3\xA4", "\xE2\x82\xAC", "\xF0\x9F\x99\x82"};
  for (size_t at = 0; at < 200; ++at) {
    std::string text(200, 'a');
    text[at] = '\0';
    EXPECT_EQ(ClassifyText(text), TextKind::kBinary) << at;
    text[at] = '\x80';
    EXPECT_EQ(ClassifyText(text), TextKind::kInvalidUtf8) << at;
    for (const std::string& c : characters) {
      const std::string before(at, 'a');
      EXPECT_EQ(ClassifyText(before + c + std::string(80, 'b')), TextKind::kText) << at;
      EXPECT_EQ(ClassifyText(before + c.substr(0, c.size() - 1)), TextKind::kInvalidUtf8) << at;
    }
  }
  // The first defect decides.
  EXPECT_EQ(ClassifyText(std::string("a\0\x80", 3)), TextKind::kBinary);
  EXPECT_EQ(ClassifyText(std::string("a\x80\0", 3)), TextKind::kInvalidUtf8);
  EXPECT_EQ(ClassifyText(""), TextKind::kText);
}

TEST(ByteTokenizerTest, IdsAreBytesAndComeBack) {
  const data::ByteTokenizer tokenizer;
  std::string all;
  for (int b = 0; b < 256; ++b) all.push_back(static_cast<char>(b));
  std::vector<int32_t> ids = {7};  // Encode appends
  tokenizer.Encode(all, ids);
  ASSERT_EQ(ids.size(), 257u);
  EXPECT_EQ(ids[0], 7);
  for (int b = 0; b < 256; ++b) EXPECT_EQ(ids[static_cast<size_t>(b) + 1], b);
  ids.erase(ids.begin());
  EXPECT_EQ(tokenizer.Decode(ids), all);
  EXPECT_EQ(tokenizer.Decode(std::vector<int32_t>{72, 256, 257, 258}), "H<|eot|><|bos|><|pad|>");
  EXPECT_EQ(tokenizer.vocab_size(), 259);
  EXPECT_EQ(tokenizer.eot_id(), 256);
  EXPECT_THROW(tokenizer.Decode(std::vector<int32_t>{259}), InvalidArgument);
  EXPECT_THROW(tokenizer.Decode(std::vector<int32_t>{-1}), InvalidArgument);
}

TEST(TokenizerTest, FilesAreRefusedAsUnsupported) {
  EXPECT_EQ(data::MakeTokenizer("byte")->name(), "byte");
  ExpectContains(MessageOf<Unsupported>([] { data::MakeTokenizer("gpt2.json"); }), "gpt2.json");
}

TEST(JsonFieldTest, TakesTheTopLevelStringOnly) {
  EXPECT_EQ(data::ExtractJsonField(R"({"id":1,"text":"a\n\u00e4\ud83d\ude42"})", "text"),
            "a\n\xC3\xA4\xF0\x9F\x99\x82");
  EXPECT_EQ(
      data::ExtractJsonField(
          R"( {"meta":{"text":"no"},"list":[{"text":"no"}],"text":"yes","z":{"text":1}} )", "text"),
      "yes");
  EXPECT_EQ(data::ExtractJsonField(R"({"body":"b","text":"t"})", "body"), "b");
  EXPECT_EQ(data::ExtractJsonField(R"({"text":"a","text":"b"})", "text"), "b");
  EXPECT_EQ(data::ExtractJsonField(R"({"text":""})", "text"), "");
}

TEST(JsonFieldTest, SaysWhatIsWrong) {
  const auto reason = [](const std::string& line) {
    return MessageOf<DataError>([&] { data::ExtractJsonField(line, "text"); });
  };
  ExpectContains(reason(R"({"body":"x"})"), "has no field \"text\"");
  ExpectContains(reason(R"({"meta":{"text":"x"}})"), "has no field \"text\"");
  ExpectContains(reason("{}"), "has no field");
  for (const char* value : {"1", "-1", "1.5", "null", "true", "[\"x\"]", "{\"text\":\"x\"}"}) {
    ExpectContains(reason(std::string("{\"text\":") + value + "}"), "not a string");
  }
  for (const char* line : {"\"x\"", "[1]", "[{\"text\":\"x\"}]", "3", "null"}) {
    ExpectContains(reason(line), "not a JSON object");
  }
  for (const char* line : {"{\"text\":\"x\"", "{\"text\":\"x\"} {}", "hello", "{\"text\":\"\x80\"}",
                           "{\"text\":\"\\ud800\"}"}) {
    ExpectContains(reason(line), "not valid JSON");
  }
}

std::vector<std::string> Keys(const data::TextInputs& inputs) {
  std::vector<std::string> keys;
  for (const auto& file : inputs.files) keys.push_back(file.key);
  return keys;
}
using Strings = std::vector<std::string>;

TEST(TextSourceTest, ListsFoldersInTheOrderOfNames) {
  const TempFolder temp;
  for (const char* name : {"in/b.txt", "in/a/z.txt", "in/a.txt", "in/B.txt", "in/c/d/e.c",
                           "in/.git/config", "in/.hidden", "in/x.jsonl"}) {
    WriteText(temp / name, "text");
  }
  const auto inputs = data::ListTextFiles({temp / "in"}, {});
  EXPECT_EQ(Keys(inputs), (Strings{"in/B.txt", "in/a/z.txt", "in/a.txt", "in/b.txt", "in/c/d/e.c",
                                   "in/x.jsonl"}));
  EXPECT_EQ(inputs.hidden, 2);
  EXPECT_TRUE(inputs.files.back().jsonl);
  EXPECT_FALSE(inputs.files.front().jsonl);
  EXPECT_EQ(inputs.files[1].path, temp / "in/a/z.txt");
  EXPECT_EQ(inputs.files[1].bytes, 4);
  // The order of inputs is kept, a slash at the end changes nothing, a file's key is its name.
  EXPECT_EQ(Keys(data::ListTextFiles({temp / "in/c/", temp / "in/a.txt", temp / "in/a"}, {})),
            (Strings{"c/d/e.c", "a.txt", "a/z.txt"}));
}

TEST(TextSourceTest, IncludeComparesNamesOrPaths) {
  const TempFolder temp;
  for (const char* name : {"in/a.c", "in/a.h", "in/sub/b.c", "in/sub/deep/c.c", "in/d.txt"}) {
    WriteText(temp / name, "text");
  }
  const auto keys = [&](const Strings& include) {
    return Keys(data::ListTextFiles({temp / "in"}, include));
  };
  EXPECT_EQ(keys({"*.[ch]"}), (Strings{"in/a.c", "in/a.h", "in/sub/b.c", "in/sub/deep/c.c"}));
  EXPECT_EQ(keys({"sub/*.c"}), (Strings{"in/sub/b.c", "in/sub/deep/c.c"}));
  EXPECT_EQ(keys({"*.h", "d.*"}), (Strings{"in/a.h", "in/d.txt"}));
  const auto inputs = data::ListTextFiles({temp / "in", temp / "in/d.txt"}, {"*.h"});
  EXPECT_EQ(Keys(inputs), (Strings{"in/a.h", "d.txt"})) << "a file that is named is taken";
  EXPECT_EQ(inputs.excluded, 4);
  const auto none = [&] { data::ListTextFiles({temp / "in"}, {"*.rs"}); };
  ExpectContains(MessageOf<DataError>(none), "5 do not fit --include");
}

TEST(TextSourceTest, LinksAreFollowedOnceAndLoopsEnd) {
  const TempFolder temp;
  WriteText(temp / "in/sub/a.txt", "text");
  WriteText(temp / "else/b.txt", "text");
  fs::create_directory_symlink(temp / "in", temp / "in/sub/loop");
  fs::create_directory_symlink(temp / "else", temp / "in/linked");
  fs::create_symlink(temp / "in/sub/a.txt", temp / "in/z.txt");
  fs::create_symlink(temp / "nowhere", temp / "in/dangling");
  fs::create_symlink(temp / "in/self", temp / "in/self");
  const auto inputs = data::ListTextFiles({temp / "in", temp / "in/sub/a.txt"}, {});
  EXPECT_EQ(Keys(inputs), (Strings{"in/linked/b.txt", "in/sub/a.txt"}));
  EXPECT_EQ(inputs.repeated, 3);  // loop, z.txt and the second input
  EXPECT_EQ(inputs.unusable, 2);  // dangling, self
  EXPECT_EQ(Keys(data::ListTextFiles({temp / "in"}, {}, {temp / "else/b.txt"})),
            (Strings{"in/sub/a.txt"}));
}

TEST(TextSourceTest, DifferentFilesHaveDifferentKeys) {
  const TempFolder temp;
  for (const char* name : {"a/text", "b/text", "c/text", "d/text#2", "e/in/x", "f/in/x"}) {
    WriteText(temp / name, "text");
  }
  const auto keys = [&](Strings inputs) {
    for (std::string& input : inputs) input = temp / input;
    return Keys(data::ListTextFiles(inputs, {}));
  };
  EXPECT_EQ(keys({"b/text", "a/text", "b/text", "c/text"}), (Strings{"text", "text#2", "text#3"}));
  EXPECT_EQ(keys({"e/in", "f/in"}), (Strings{"in/x", "in/x#2"}));
  // A name that looks like a numbered key.
  EXPECT_EQ(keys({"a/text", "d/text#2", "b/text"}), (Strings{"text", "text#2", "text#3"}));
  EXPECT_EQ(keys({"a/text", "b/text", "d/text#2"}), (Strings{"text", "text#2", "text#2#2"}));
}

TEST(TextSourceTest, OutputsAreLeftOutOfFoldersAndRefusedAsInputs) {
  const TempFolder temp;
  for (const char* name : {"in/a.txt", "in/set.json"}) WriteText(temp / name, "text");
  const Strings outputs = {temp / "in/set.json", temp / "in/set.bin"};
  EXPECT_EQ(Keys(data::ListTextFiles({temp / "in"}, {}, outputs)), (Strings{"in/a.txt"}));
  const Strings inputs = {temp / "in", temp / "in/../in/set.json"};
  const std::string message =
      MessageOf<DataError>([&] { data::ListTextFiles(inputs, {}, outputs); });
  ExpectContains(message, inputs[1] + " would be overwritten by --out");
  ExpectContains(message, outputs[0]);
}

TEST(TextSourceTest, MissingAndOddInputsAreNamed) {
  const TempFolder temp;
  ExpectContains(MessageOf<DataError>([&] { data::ListTextFiles({temp / "nothing"}, {}); }),
                 temp / "nothing");
  ExpectContains(MessageOf<DataError>([] { data::ListTextFiles({"/dev/null"}, {}); }),
                 "neither a file nor a folder");
  ExpectContains(MessageOf<DataError>([&] { data::ListTextFiles({temp.path()}, {}); }),
                 "no input file found");
}

}  // namespace
}  // namespace longspan::test
