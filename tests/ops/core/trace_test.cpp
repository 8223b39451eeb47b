#include "ops/core/trace.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <thread>

#include "ops/core/context.h"
#include "ops/elementwise/elementwise.h"
#include "tests/ops/op_test.h"

namespace longspan::test {
namespace {

using Json = nlohmann::json;

std::vector<Json> EventsOf(const std::string& text) {
  return Json::parse(text).at("traceEvents").get<std::vector<Json>>();
}

std::map<std::string, Json> SpansOn(const std::string& track, const std::vector<Json>& events,
                                    int process) {
  int tid = -1;
  std::map<std::string, Json> spans;
  for (const Json& e : events) {
    if (e["ph"] == "M" && e["name"] == "thread_name" && e["args"]["name"] == track &&
        e["pid"] == process) {
      tid = e["tid"];
    }
  }
  for (const Json& e : events) {
    if (e["ph"] == "X" && e["pid"] == process && e["tid"] == tid) spans[e["name"]] = e;
  }
  return spans;
}

void Sleep(int milliseconds) {
  std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
}

TEST(TraceTest, HostScopesAddUpAndNestedOnesBothCount) {
  Trace trace;
  for (int i = 0; i < 2; ++i) {
    const TraceScope outer(trace, "outer");
    Sleep(3);
    const TraceScope inner(trace, "inner");
    Sleep(3);
  }
  const auto totals = trace.Totals();
  EXPECT_GE(totals.at("inner"), 6e-3);
  EXPECT_GE(totals.at("outer"), totals.at("inner") + 6e-3);
  trace.Reset();
  EXPECT_TRUE(trace.Totals().empty());
}

TEST(TraceTest, ChromeTraceHasOneTrackAThreadAndOneProcessARank) {
  const auto origin = std::chrono::steady_clock::now();
  std::vector<std::string> events;
  for (int rank = 0; rank < 2; ++rank) {
    auto recorder = std::make_shared<TraceRecorder>(rank, origin);
    Trace main, other;
    main.Record(recorder, "compute");
    other.Record(recorder, "batches");
    {
      const TraceScope outer(main, "outer");
      Sleep(2);
      const TraceScope inner(main, "inner");
      const TraceScope elsewhere(other, "elsewhere");
      Sleep(2);
    }
    main.Record(nullptr, "");
    { const TraceScope late(main, "late"); }
    events.push_back(recorder->Events());
  }
  const auto parsed = EventsOf(ChromeTrace(events));
  for (int rank = 0; rank < 2; ++rank) {
    const auto compute = SpansOn("compute", parsed, rank);
    const auto batches = SpansOn("batches", parsed, rank);
    ASSERT_EQ(compute.size(), 2u);
    ASSERT_EQ(batches.size(), 1u);
    const Json &outer = compute.at("outer"), &inner = compute.at("inner");
    EXPECT_GE(outer["dur"].get<double>(), 4000);
    EXPECT_GE(inner["dur"].get<double>(), 2000);
    EXPECT_GE(inner["ts"].get<double>(), outer["ts"].get<double>() + 2000);
    EXPECT_LE(inner["ts"].get<double>() + inner["dur"].get<double>(),
              outer["ts"].get<double>() + outer["dur"].get<double>() + 0.01);
  }
  // One clock for both.
  EXPECT_GT(SpansOn("compute", parsed, 1).at("outer")["ts"].get<double>(),
            SpansOn("compute", parsed, 0).at("outer")["ts"].get<double>() + 4000);
}

// On a GPU the host's time in a scope says nothing about the work in it.
TEST(TraceTest, DeviceScopesMeasureTheDevice) {
  if (!OnCuda()) {
    Context ctx = OpContext();
    { const TraceScope scope(ctx.trace(), "host"); }
    EXPECT_EQ(ctx.trace().Totals().count("host"), 1u);
    return;
  }
  Context ctx = OpContext();
  Tensor t = ctx.Zeros({1 << 16}, DType::kF32);
  {
    const TraceScope scope(ctx.trace(), "untimed");
    ops::Fill(ctx, t, 1);
  }
  ctx.trace().WaitForDevice();
  EXPECT_TRUE(ctx.trace().Totals().empty()) << "a GPU without events has no times";

  auto recorder = std::make_shared<TraceRecorder>(3);
  ctx.trace().TimeDevice(true);
  ctx.trace().Record(recorder, "compute");
  {
    const TraceScope work(ctx.trace(), "work");
    for (int i = 0; i < 20; ++i) ops::Scale(ctx, t, 1.5);
  }
  {
    const TraceScope idle(ctx.trace(), "idle");
    Sleep(30);  // the host's, not the device's: nothing is on the stream
  }
  ctx.trace().WaitForDevice();
  const auto totals = ctx.trace().Totals();
  EXPECT_GT(totals.at("work"), 0);
  const auto parsed = EventsOf(ChromeTrace({recorder->Events()}));
  const auto host = SpansOn("compute", parsed, 3), device = SpansOn("GPU", parsed, 3);
  ASSERT_EQ(host.size(), 2u);
  ASSERT_EQ(device.size(), 2u);
  EXPECT_NEAR(device.at("work")["dur"].get<double>() * 1e-6, totals.at("work"), 1e-6);
  EXPECT_GE(device.at("idle")["ts"].get<double>() + 1,
            device.at("work")["ts"].get<double>() + device.at("work")["dur"].get<double>());
  // The device begins what the host has issued, on the host's clock.
  EXPECT_GE(device.at("work")["ts"].get<double>() + 1, host.at("work")["ts"].get<double>());
}

}  // namespace
}  // namespace longspan::test
