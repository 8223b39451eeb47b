#include <gtest/gtest.h>
#include <sys/resource.h>

#include <cmath>
#include <csignal>
#include <cstring>
#include <ctime>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>

#include "tests/trainer/checkpoint/support.h"
#include "trainer/metrics/crc32c.h"
#include "trainer/metrics/event.pb.h"
#include "trainer/metrics/event_writer.h"
#include "trainer/metrics/jsonl_sink.h"
#include "trainer/metrics/terminal_line.h"
#include "trainer/run_directory/file_io.h"

namespace longspan::test {
namespace {

using trainer::EvalMetrics;
using trainer::JsonlSink;
using trainer::StepMetrics;
using trainer::TerminalLine;

StepMetrics Sample(int64_t step) {
  StepMetrics metrics;
  metrics.step = step;
  metrics.loss = 0.1 + 0.2;  // 17 digits are needed to read it back
  metrics.grad_norm = 1.5;
  metrics.lr = 3e-4;
  metrics.tokens = 8192;
  metrics.valid_tokens = 8191;
  metrics.step_ms = 1000;
  metrics.tokens_per_s = 8192;
  metrics.mfu = 0.412;
  metrics.work_max_over_mean = 1.25;
  metrics.comm_bytes = int64_t{1} << 40;
  metrics.control_bytes = 16;
  metrics.strategies = {{"ring", 4096, 2.5}, {"exchange", 64, {}}};
  metrics.plan_ms = 0.5;
  metrics.context_work_max_over_mean = 1.5;
  metrics.peak_rss_bytes = 123456789;
  metrics.peak_device_bytes = 300;
  metrics.peak_device_memory = {{"parameters", 100}, {"activations", 200}};
  return metrics;
}

std::vector<std::string> Lines(const std::filesystem::path& path) {
  std::ifstream in(path);
  std::vector<std::string> lines;
  for (std::string line; std::getline(in, line);) lines.push_back(line);
  return lines;
}

class JsonlSinkTest : public testing::Test {
 protected:
  void WriteSteps(int64_t first, int64_t last, int64_t resumed_from) {
    JsonlSink sink(path_, resumed_from);
    for (int64_t step = first; step <= last; ++step) {
      sink.Write(Sample(step));
      if (step % 2 == 0) sink.Write(EvalMetrics{step, "validation_loss", 2.5});
    }
  }
  // "1 2 2e 3": steps of the file in order, e for evaluations.
  std::string Steps() const {
    std::string text;
    for (const std::string& line : Lines(path_)) {
      const auto object = nlohmann::json::parse(line);
      text += Str(text.empty() ? "" : " ", object["step"].get<int64_t>(),
                  object.contains("eval") ? "e" : "");
    }
    return text;
  }
  TemporaryDirectory directory_;
  std::filesystem::path path_ = directory_.path() / "metrics.jsonl";
};

TEST_F(JsonlSinkTest, WritesTheAgreedKeysInOrder) {
  JsonlSink sink(path_, -1);
  sink.Write(Sample(3));
  sink.Write(EvalMetrics{3, "passkey@8192", 0.75});
  const std::vector<std::string> lines = Lines(path_);  // on disk while the sink is open
  ASSERT_EQ(lines.size(), 2u);
  EXPECT_EQ(
      lines[0],
      R"({"step":3,"loss":0.30000000000000004,"grad_norm":1.5,"lr":0.0003,"tokens":8192,)"
      R"("valid_tokens":8191,"step_ms":1000.0,"tokens_per_s":8192.0,"mfu":0.412,)"
      R"("work_max_over_mean":1.25,"comm_bytes":1099511627776,"control_bytes":16,"strategies":{)"
      R"("ring":{"bytes":4096,"exposed_ms":2.5},"exchange":{"bytes":64,"exposed_ms":null}},)"
      R"("plan_ms":0.5,"context_work_max_over_mean":1.5,"peak_rss_bytes":123456789,)"
      R"("peak_device_bytes":300,"peak_device_memory":{"parameters":100,"activations":200}})");
  EXPECT_EQ(lines[1], R"({"step":3,"eval":"passkey@8192","value":0.75})");
}

TEST_F(JsonlSinkTest, UnknownAndNonFiniteValuesAreNull) {
  JsonlSink sink(path_, -1);
  StepMetrics metrics = Sample(1);
  metrics.mfu.reset();
  metrics.loss = std::numeric_limits<double>::quiet_NaN();
  metrics.grad_norm = std::numeric_limits<double>::infinity();
  sink.Write(metrics);
  const auto object = nlohmann::json::parse(Lines(path_).at(0));
  EXPECT_TRUE(object["mfu"].is_null());
  EXPECT_TRUE(object["loss"].is_null());
  EXPECT_TRUE(object["grad_norm"].is_null());
}

TEST_F(JsonlSinkTest, IsCutBackToTheResumedStep) {
  WriteSteps(1, 6, -1);
  WriteSteps(4, 5, 3);
  EXPECT_EQ(Steps(), "1 2 2e 3 4 4e 5");
  WriteSteps(6, 6, 5);  // nothing to cut
  EXPECT_EQ(Steps(), "1 2 2e 3 4 4e 5 6 6e");
  WriteSteps(1, 1, 0);
  EXPECT_EQ(Steps(), "1");
  EXPECT_EQ(Names(directory_.path()), std::set<std::string>{"metrics.jsonl"});
}

TEST_F(JsonlSinkTest, AFreshStartKeepsNothing) {
  std::ofstream(path_) << "{\"step\":0,\"eval\":\"a\",\"value\":1}\n{\"step\":1}\n";
  WriteSteps(1, 2, -1);
  EXPECT_EQ(Steps(), "1 2 2e");
}

TEST_F(JsonlSinkTest, AHalfWrittenLastLineIsDropped) {
  WriteSteps(1, 3, -1);
  const std::string whole = trainer::ReadFile(path_);
  const size_t last = whole.rfind("{\"step\":3");
  for (const size_t size :
       {last + 1, last + 2, last + 9, last + 10, last + 60, whole.size() - 2, whole.size() - 1}) {
    std::ofstream(path_, std::ios::trunc) << whole.substr(0, size);
    WriteSteps(3, 3, 3);  // even though the cut line was of a step to keep
    ASSERT_EQ(Steps(), "1 2 2e 3") << "cut to " << size;
  }
}

TEST_F(JsonlSinkTest, AForeignLineInTheMiddleIsAnErrorAndChangesNothing) {
  const std::string content = "{\"step\":1}\nhello\n{\"step\":2}\n";
  std::ofstream(path_) << content;
  const std::string error = ErrorOf<CheckpointError>([&] { JsonlSink sink(path_, 1); });
  EXPECT_NE(error.find("metrics.jsonl:2 is not a metrics line"), std::string::npos) << error;
  EXPECT_EQ(trainer::ReadFile(path_), content);
  EXPECT_EQ(Names(directory_.path()), std::set<std::string>{"metrics.jsonl"});
}

// The limit on file sizes stands in for a full disk.
TEST_F(JsonlSinkTest, AFailedWriteIsReported) {
  EXPECT_EQ(RunInChild([&] {
              std::signal(SIGXFSZ, SIG_IGN);
              const rlimit limit{1000, 1000};
              LONGSPAN_CHECK(::setrlimit(RLIMIT_FSIZE, &limit) == 0);
              JsonlSink sink(path_, -1);
              const std::string error = ErrorOf<CheckpointError>([&] {
                for (int64_t step = 1; step < 20; ++step) sink.Write(Sample(step));
              });
              LONGSPAN_CHECK(error == "cannot write " + path_.string() + ": File too large")
                  << error;
            }),
            0);
  // What fitted is complete, the rest goes when the run is resumed.
  WriteSteps(3, 3, 2);
  EXPECT_EQ(Steps(), "1 2 3");
}

TEST(Crc32cTest, MatchesPublishedValues) {
  EXPECT_EQ(trainer::Crc32c("123456789"), 0xE3069283u);
  EXPECT_EQ(trainer::MaskedCrc32c("123456789"), 0xC78AB0E5u);
  EXPECT_EQ(trainer::Crc32c(""), 0u);
  // RFC 3720, B.4: 32 bytes of zeros and of ones.
  EXPECT_EQ(trainer::Crc32c(std::string(32, '\0')), 0x8A9136AAu);
  EXPECT_EQ(trainer::Crc32c(std::string(32, '\xff')), 0x62A8AB43u);
}

// Takes an event file apart by its framing.
std::vector<metrics::Event> ReadEvents(const std::filesystem::path& path) {
  const std::string bytes = trainer::ReadFile(path);
  std::vector<metrics::Event> events;
  for (size_t at = 0; at < bytes.size();) {
    uint64_t length;
    uint32_t length_crc, data_crc;
    std::memcpy(&length, &bytes.at(at), 8);
    std::memcpy(&length_crc, &bytes.at(at + 8), 4);
    EXPECT_EQ(length_crc, trainer::MaskedCrc32c(bytes.substr(at, 8)));
    const std::string data = bytes.substr(at + 12, length);
    std::memcpy(&data_crc, &bytes.at(at + 12 + length), 4);
    EXPECT_EQ(data_crc, trainer::MaskedCrc32c(data));
    events.emplace_back();
    EXPECT_TRUE(events.back().ParseFromString(data));
    EXPECT_EQ(events.back().GetReflection()->GetUnknownFields(events.back()).field_count(), 0);
    at += 12 + length + 4;
    EXPECT_LE(at, bytes.size());
  }
  return events;
}

TEST(EventWriterTest, WritesFramedEventsInANewFileEachTime) {
  TemporaryDirectory directory;
  trainer::EventWriter first(directory.path(), -1), second(directory.path(), 10);
  EXPECT_NE(first.path(), second.path());
  EXPECT_EQ(Names(directory.path()).size(), 2u);
  EXPECT_TRUE(second.path().filename().string().starts_with("events.out.tfevents."));

  second.Write(Sample(11));
  second.Write(EvalMetrics{11, "validation_loss", 2.25});
  second.Write(EvalMetrics{11, "accuracy", 0});
  const std::vector<metrics::Event> events = ReadEvents(second.path());
  ASSERT_EQ(events.size(), 5u);
  EXPECT_EQ(events[0].file_version(), "brain.Event:2");
  EXPECT_EQ(events[0].source_metadata().writer(), "longspan");
  EXPECT_EQ(events[1].session_log().status(), metrics::SessionLog::START);
  EXPECT_EQ(events[1].step(), 11);
  EXPECT_EQ(events[2].step(), 11);
  EXPECT_NEAR(events[2].wall_time(), static_cast<double>(std::time(nullptr)), 60);
  std::map<std::string, float> scalars;
  for (const auto& value : events[2].summary().value()) scalars[value.tag()] = value.simple_value();
  EXPECT_EQ(scalars.at("train/loss"), 0.3f);
  EXPECT_EQ(scalars.at("train/lr"), 3e-4f);
  EXPECT_EQ(scalars.at("train/mfu"), 0.412f);
  EXPECT_EQ(scalars.size(), 8u);
  EXPECT_EQ(events[3].summary().value(0).tag(), "eval/validation_loss");
  EXPECT_EQ(events[3].summary().value(0).simple_value(), 2.25f);
  EXPECT_TRUE(events[4].summary().value(0).has_simple_value()) << "a zero is a point, too";
}

// Everything that a stream got so far.
class CapturedStream {
 public:
  CapturedStream() : stream_(std::tmpfile()) {}
  ~CapturedStream() { std::fclose(stream_); }
  std::FILE* get() { return stream_; }
  std::string text() {
    std::string result(static_cast<size_t>(std::ftell(stream_)), '\0');
    std::rewind(stream_);
    result.resize(std::fread(result.data(), 1, result.size(), stream_));
    return result;
  }

 private:
  std::FILE* stream_;
};

TEST(TerminalLineTest, PlainLinesOutsideATerminal) {
  CapturedStream out;
  {
    TerminalLine line(out.get(), 400);
    line.Update(Sample(120));
    line.Note("saved step_00000120");
    StepMetrics next = Sample(121);
    next.mfu.reset();
    next.step_ms = 3000;
    line.Update(next);
  }
  EXPECT_EQ(out.text(),
            "step 120/400  loss 0.3000  8192 tok/s  mfu 41.2%  eta 4m40s\n"
            "saved step_00000120\n"
            "step 121/400  loss 0.3000  8192 tok/s  eta 9m18s\n");  // mean of 1 s and 3 s
}

TEST(TerminalLineTest, OneLineIsRewrittenOnATerminal) {
  CapturedStream out;
  {
    TerminalLine line(out.get(), 400, {.terminal = true, .columns = 20});
    line.Update(Sample(1));
    line.Update(Sample(2));
    line.Note("a note that is longer than the line");
  }
  EXPECT_EQ(out.text(),
            "\r\x1b[Kstep 1/400  loss 0.\r\x1b[Kstep 2/400  loss 0."
            "\r\x1b[Ka note that is longer than the line\nstep 2/400  loss 0.\n");
}

TEST(TerminalLineTest, EtaFollowsRecentSteps) {
  CapturedStream out;
  TerminalLine line(out.get(), 1000);
  EXPECT_TRUE(std::isnan(line.eta_seconds(0)));
  StepMetrics slow = Sample(1), quick = Sample(2);
  slow.step_ms = 1e6;
  line.Update(slow);
  quick.step_ms = 100;
  for (int i = 0; i < 32; ++i) line.Update(quick);
  EXPECT_DOUBLE_EQ(line.eta_seconds(500), 50) << "the first step is out of the average";
  EXPECT_EQ(line.eta_seconds(2000), 0);
}

TEST(TerminalLineTest, DurationsKeepTwoUnits) {
  EXPECT_EQ(trainer::FormatDuration(0.4), "0s");
  EXPECT_EQ(trainer::FormatDuration(59.6), "1m00s");
  EXPECT_EQ(trainer::FormatDuration(3599), "59m59s");
  EXPECT_EQ(trainer::FormatDuration(7500), "2h05m");
  EXPECT_EQ(trainer::FormatDuration(274000), "3d04h");
  EXPECT_EQ(trainer::FormatDuration(NAN), "?");
}

TEST(MetricsTest, PeakMemoryGrowsWithUse) {
  const int64_t before = trainer::PeakRssBytes();
  std::vector<char> block(static_cast<size_t>(before) + (64 << 20), 1);
  EXPECT_GE(trainer::PeakRssBytes(), static_cast<int64_t>(block.size()));
}

}  // namespace
}  // namespace longspan::test
