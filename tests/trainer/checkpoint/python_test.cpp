#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <sstream>

#include "tests/trainer/checkpoint/support.h"

// A program that shares no code with the writer reads what it wrote.
namespace longspan::test {
namespace {

struct Output {
  int status;
  std::string text;
};

Output RunScript(const std::filesystem::path& checkpoint, const std::string& tensor) {
  const std::string command =
      Str(LONGSPAN_PYTHON " " LONGSPAN_SOURCE_DIR
                          "/tests/trainer/checkpoint/read_checkpoint.py " LONGSPAN_SOURCE_DIR " ",
          checkpoint.string(), " ", tensor, " 2>&1");
  std::FILE* pipe = ::popen(command.c_str(), "r");
  LONGSPAN_CHECK(pipe != nullptr);
  std::string text;
  char buffer[4096];
  while (const size_t got = std::fread(buffer, 1, sizeof buffer, pipe)) text.append(buffer, got);
  return {::pclose(pipe), text};
}

TEST(PythonTest, ReadsEveryTensorAndChecksum) {
  TemporaryDirectory directory;
  SaveMixed(directory.path(), 3, 77, 5, {.max_record_bytes = 1024});
  Context ctx({.threads = 1});
  for (const trainer::NamedTensor& named : MixedTensors(ctx, 5)) {
    if (!IsFloat(named.tensor.dtype())) continue;
    const Output output = RunScript(directory.path() / "step_00000077", named.name);
    ASSERT_EQ(output.status, 0) << output.text;
    std::istringstream in(output.text);
    std::string line;
    ASSERT_TRUE(std::getline(in, line));
    EXPECT_EQ(line.rfind("step 77 ", 0), 0u) << line;
    int64_t count = 0;
    DispatchFloat(named.tensor.dtype(), "test", [&]<class T>() {
      for (; std::getline(in, line); ++count) {
        ASSERT_LT(count, named.tensor.numel());
        EXPECT_EQ(std::strtod(line.c_str(), nullptr),
                  static_cast<double>(named.tensor.data<T>()[count]))
            << named.name << " element " << count;
      }
    });
    EXPECT_EQ(count, named.tensor.numel()) << named.name;
  }
}

TEST(PythonTest, NoticesAFlippedBit) {
  TemporaryDirectory directory;
  SaveMixed(directory.path(), 1, 1, 5);
  const auto file = directory.path() / "step_00000001" / "shard_00000.binpb";
  std::FILE* shard = std::fopen(file.c_str(), "r+");
  ASSERT_NE(shard, nullptr);
  std::fseek(shard, 100, SEEK_SET);
  const int byte = std::fgetc(shard);
  std::fseek(shard, 100, SEEK_SET);
  std::fputc(byte ^ 1, shard);
  std::fclose(shard);
  const Output output = RunScript(directory.path() / "step_00000001", "model.norm");
  EXPECT_NE(output.status, 0);
  EXPECT_NE(output.text.find("payload checksum"), std::string::npos) << output.text;
}

}  // namespace
}  // namespace longspan::test
