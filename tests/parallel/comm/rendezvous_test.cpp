#include "parallel/comm/rendezvous.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <thread>

#include "ops/core/error.h"

namespace longspan::test {
namespace {

namespace fs = std::filesystem;
using parallel::Rendezvous;

std::optional<Rendezvous> From(const std::map<std::string, std::string>& variables) {
  return parallel::RendezvousFrom([&](const char* name) -> std::optional<std::string> {
    const auto it = variables.find(name);
    return it == variables.end() ? std::nullopt : std::optional(it->second);
  });
}

std::string ErrorOf(const std::function<void()>& body) {
  try {
    body();
  } catch (const CommError& e) {
    return e.what();
  }
  return "no error";
}

void ExpectNamed(const std::string& error, const std::string& text) {
  EXPECT_NE(error.find(text), std::string::npos) << error;
}

class RendezvousTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ =
        fs::temp_directory_path() / ("longspan-rendezvous-" + std::to_string(getpid()) + "-" +
                                     testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::remove_all(folder_);
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  Rendezvous Of(int rank, const std::string& job = "7", int size = 3) const {
    return {.file = (folder_ / "meet").string(), .job_id = job, .rank = rank, .size = size};
  }
  size_t Files() const {
    return static_cast<size_t>(std::distance(fs::directory_iterator(folder_), {}));
  }

  fs::path folder_;
};

// Every byte value, and none that ends a line or a word in the file.
std::string AnId() {
  std::string id;
  for (int i = 0; i < 256; ++i) id += static_cast<char>(i);
  return id;
}

TEST_F(RendezvousTest, VariablesOfOurOwn) {
  const auto r = From({{"LONGSPAN_RENDEZVOUS", folder_ / "file"},
                       {"LONGSPAN_RANK", "3"},
                       {"LONGSPAN_WORLD_SIZE", "8"},
                       {"LONGSPAN_LOCAL_RANK", "1"},
                       {"LONGSPAN_LOCAL_SIZE", "2"},
                       {"LONGSPAN_JOB_ID", "train-1"},
                       {"SLURM_PROCID", "5"},
                       {"SLURM_NTASKS", "16"},
                       {"SLURM_JOB_ID", "99"}});
  ASSERT_TRUE(r.has_value());
  EXPECT_EQ(r->file, (folder_ / "file").string());
  EXPECT_EQ(r->rank, 3);
  EXPECT_EQ(r->size, 8);
  EXPECT_EQ(r->local_rank, 1);
  EXPECT_EQ(r->local_size, 2);
  EXPECT_EQ(r->least_local_size, 2);
  EXPECT_EQ(r->job_id, "train-1");
}

// Without a word of which ranks share a node, none are known to.
TEST_F(RendezvousTest, RanksThatAreKnownToShareANode) {
  std::map<std::string, std::string> variables = {{"LONGSPAN_RENDEZVOUS", folder_},
                                                  {"LONGSPAN_RANK", "9"},
                                                  {"LONGSPAN_WORLD_SIZE", "16"},
                                                  {"LONGSPAN_JOB_ID", "1"}};
  EXPECT_EQ(From(variables)->least_local_size, 1);
  variables["LONGSPAN_LOCAL_RANK"] = "6";
  EXPECT_EQ(From(variables)->least_local_size, 7);
  variables["LONGSPAN_LOCAL_SIZE"] = "8";
  EXPECT_EQ(From(variables)->least_local_size, 8);
}

TEST_F(RendezvousTest, VariablesOfSlurmAndAFolder) {
  std::map<std::string, std::string> slurm = {
      {"SLURM_PROCID", "5"},       {"SLURM_NTASKS", "16"}, {"SLURM_LOCALID", "1"},
      {"SLURM_JOB_ID", "99"},      {"SLURM_STEP_ID", "2"}, {"SLURM_NTASKS_PER_NODE", "4"},
      {"SLURM_RESTART_COUNT", "1"}};
  EXPECT_FALSE(From(slurm).has_value()) << "the shell of a batch script has these too";
  slurm["LONGSPAN_RENDEZVOUS"] = folder_;
  const auto r = From(slurm);
  ASSERT_TRUE(r.has_value());
  EXPECT_EQ(r->rank, 5);
  EXPECT_EQ(r->size, 16);
  EXPECT_EQ(r->local_rank, 1);
  EXPECT_EQ(r->local_size, 4);
  EXPECT_EQ(r->job_id, "99.2.1") << "a requeued job is another job";
  EXPECT_EQ(r->file, (folder_ / "longspan-99.2.1.rendezvous").string());
}

TEST_F(RendezvousTest, WhatIsMissingOrWrongIsNamed) {
  std::map<std::string, std::string> good = {{"LONGSPAN_RENDEZVOUS", folder_},
                                             {"LONGSPAN_RANK", "0"},
                                             {"LONGSPAN_WORLD_SIZE", "2"},
                                             {"LONGSPAN_JOB_ID", "a"}};
  EXPECT_EQ(From(good)->local_rank, 0);
  for (const char* name : {"LONGSPAN_RANK", "LONGSPAN_WORLD_SIZE", "LONGSPAN_JOB_ID"}) {
    auto bad = good;
    bad.erase(name);
    ExpectNamed(ErrorOf([&] { From(bad); }), name);
  }
  for (const auto& [name, value] : {std::pair{"LONGSPAN_RANK", "2"},
                                    {"LONGSPAN_RANK", "-1"},
                                    {"LONGSPAN_RANK", "0x"},
                                    {"LONGSPAN_WORLD_SIZE", "0"},
                                    {"LONGSPAN_LOCAL_RANK", "2"}}) {
    auto bad = good;
    bad[name] = value;
    ExpectNamed(ErrorOf([&] { From(bad); }), Str(name, "=", value));
  }
  good["LONGSPAN_JOB_ID"] = "../x";
  ExpectNamed(ErrorOf([&] { From(good); }), "job id \"../x\"");
}

TEST_F(RendezvousTest, TheIdReachesAllRanksWhoeverComesFirst) {
  std::vector<std::string> got(3);
  std::vector<std::thread> ranks;
  for (int rank = 1; rank < 3; ++rank) {
    ranks.emplace_back([&, rank] { got[static_cast<size_t>(rank)] = AwaitId(Of(rank), 30); });
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  PublishId(Of(0), AnId());
  for (auto& rank : ranks) rank.join();
  EXPECT_EQ(got[1], AnId());
  EXPECT_EQ(got[2], AnId());
  EXPECT_EQ(AwaitId(Of(1), 0), AnId()) << "a late rank finds it at once";
  EXPECT_EQ(Files(), 1u) << "no temporary file stays";
  Retire(Of(0));
  EXPECT_EQ(Files(), 0u);
}

TEST_F(RendezvousTest, FilesOfAnEarlierJobAreNotTaken) {
  PublishId(Of(0, "6"), "old");
  ExpectNamed(ErrorOf([&] { AwaitId(Of(1, "7"), 0.05); }), "the file is of job 6");
  PublishId(Of(0, "7"), "fresh");  // takes its place
  EXPECT_EQ(AwaitId(Of(1, "7"), 1), "fresh");
  ExpectNamed(ErrorOf([&] { PublishId(Of(0, "7"), "again"); }), "is there already");
  ExpectNamed(ErrorOf([&] { AwaitId(Of(1, "7", 4), 1); }),
              "one of 4 ranks, rank 0 of job 7 as one of 3");
  Retire(Of(0, "6"));  // another's file
  EXPECT_EQ(Files(), 1u);
}

TEST_F(RendezvousTest, DamagedAndMissingFilesCountAsNone) {
  ExpectNamed(ErrorOf([&] { AwaitId(Of(1), 0.05); }), "there is no such file");
  for (const char* text : {"", "something else", "longspan-rendezvous-1\n7\n3\n0a0",
                           "longspan-rendezvous-1\n7\n3\n0g\nend\n"}) {
    std::ofstream(folder_ / "meet") << text;
    EXPECT_THROW(AwaitId(Of(1), 0), CommError) << text;
  }
  Rendezvous nowhere = Of(0);
  nowhere.file = (folder_ / "no" / "such" / "folder").string();
  ExpectNamed(ErrorOf([&] { PublishId(nowhere, "x"); }), "cannot write");
}

TEST_F(RendezvousTest, TheFirstFailureIsPublishedAndANewJobForgetsIt) {
  EXPECT_EQ(PublishedFailure(Of(1)), std::nullopt);
  PublishFailure(Of(2), "GPU is lost");
  PublishFailure(Of(0), "consequence");
  EXPECT_EQ(PublishedFailure(Of(1)), "rank 2: GPU is lost");
  EXPECT_EQ(PublishedFailure(Of(1, "8")), std::nullopt) << "another job";
  PublishId(Of(0), "x");
  EXPECT_EQ(PublishedFailure(Of(1)), std::nullopt);
}

}  // namespace
}  // namespace longspan::test
