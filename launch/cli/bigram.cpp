#include "data/bigram.h"

#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "launch/cli/commands.h"

namespace longspan::launch {
namespace {

struct BigramArguments {
  std::string train, validation;
  bool json = false;
};

}  // namespace

void AddBigramCommand(CLI::App& root, int* exit_code) {
  auto a = std::make_shared<BigramArguments>();
  CLI::App* command = root.add_subcommand(
      "bigram", "Loss of a bigram model, the baseline that a language model must beat");
  command->add_option("train", a->train, "Dataset prefix to count on")->required();
  command->add_option("validation", a->validation, "Dataset prefix to predict")->required();
  command->add_flag("--json", a->json, "Print a JSON object");
  command->callback([a, exit_code] {
    const data::BigramLoss b = data::EvaluateBigram(a->train, a->validation);
    if (a->json) {
      std::printf("%s\n", nlohmann::json{{"loss", b.loss}, {"tokens", b.tokens}}.dump().c_str());
    } else {
      std::printf("bigram loss %.4f nats/token over %lld tokens\n", b.loss,
                  static_cast<long long>(b.tokens));
    }
    *exit_code = 0;
  });
}

}  // namespace longspan::launch
