#include <glog/logging.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>

#include "launch/cli/commands.h"
#include "launch/cli/prepare.h"
#include "parallel/comm/bootstrap.h"

namespace {

// Under a launcher every rank parses the same arguments; only one of them should answer.
bool Speaks() {
  for (const char* name :
       {"LONGSPAN_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID"}) {
    const auto rank = longspan::parallel::Environment(name);
    if (rank.has_value()) return *rank == "0";
  }
  return true;
}

constexpr int kUsageError = 2;

}  // namespace

int main(int argc, char** argv) {
  FLAGS_logtostderr = true;
  FLAGS_minloglevel = 1;  // warnings and errors
  google::InitGoogleLogging(argv[0]);

  CLI::App app{"Trains long-context language models.", "longspan"};
  app.require_subcommand(1);
  app.set_version_flag("--version", std::string("longspan 0.1.0"));
  int exit_code = 0;
  longspan::launch::AddPrepareCommand(app, &exit_code);
  longspan::launch::AddBigramCommand(app, &exit_code);
  longspan::launch::AddTrainCommand(app, &exit_code);
  longspan::launch::AddEvalCommand(app, &exit_code);
  longspan::launch::AddInspectCommand(app, &exit_code);
  longspan::launch::AddBenchCommand(app, &exit_code);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    if (!Speaks()) return e.get_exit_code() == 0 ? 0 : kUsageError;
    return app.exit(e) == 0 ? 0 : kUsageError;
  } catch (const std::exception& e) {
    if (Speaks()) std::fprintf(stderr, "longspan: error: %s\n", e.what());
    return kUsageError;
  }
  return exit_code;
}
