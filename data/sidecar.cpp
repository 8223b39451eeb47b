#include "data/sidecar.h"

#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "ops/core/error.h"

namespace longspan::data {
namespace {

using Json = nlohmann::ordered_json;

uint64_t ParseHex(const Json& value) { return std::stoull(value.get<std::string>(), nullptr, 16); }

}  // namespace

std::string HexString(uint64_t value) {
  char text[19];
  std::snprintf(text, sizeof text, "0x%016llx", static_cast<unsigned long long>(value));
  return text;
}

std::string ToJson(const Sidecar& sidecar) {
  const Json json = {{"tokenizer", sidecar.tokenizer},
                     {"vocab_size", sidecar.vocab_size},
                     {"eot_id", sidecar.eot_id},
                     {"documents", sidecar.documents},
                     {"tokens", sidecar.tokens},
                     {"max_token_id", sidecar.max_token_id},
                     {"fingerprint", HexString(sidecar.fingerprint)},
                     {"bin_xxh3", HexString(sidecar.bin_xxh3)}};
  return json.dump(2) + "\n";
}

std::optional<Sidecar> ReadSidecar(const std::string& prefix) {
  const std::string path = prefix + ".json";
  if (!std::filesystem::exists(path)) return std::nullopt;
  const InputFile file(path);
  std::string text;
  file.ReadAt(0, file.size(), text);
  try {
    const Json json = Json::parse(text);
    Sidecar sidecar;
    json.at("tokenizer").get_to(sidecar.tokenizer);
    json.at("vocab_size").get_to(sidecar.vocab_size);
    json.at("eot_id").get_to(sidecar.eot_id);
    json.at("documents").get_to(sidecar.documents);
    json.at("tokens").get_to(sidecar.tokens);
    json.at("max_token_id").get_to(sidecar.max_token_id);
    sidecar.fingerprint = ParseHex(json.at("fingerprint"));
    sidecar.bin_xxh3 = ParseHex(json.at("bin_xxh3"));
    return sidecar;
  } catch (const std::exception& error) {  // nlohmann's own types and those of stoull
    throw DataError(Str(path, " is not a sidecar of 'longspan prepare' (", error.what(),
                        "); remove it or prepare the corpus again"));
  }
}

int64_t MaxTokenId(const IndexedDataset& dataset) {
  const auto sidecar = ReadSidecar(dataset.prefix());
  if (sidecar && sidecar->fingerprint == dataset.Fingerprint()) return sidecar->max_token_id;
  return dataset.ScanMaxTokenId();
}

void VerifyAgainstSidecar(const IndexedDataset& dataset) {
  const std::string& prefix = dataset.prefix();
  const auto sidecar = ReadSidecar(prefix);
  if (!sidecar) throw DataError(Str(prefix, ".json does not exist, so nothing can be verified"));
  if (dataset.HashTokens() != sidecar->bin_xxh3) {
    throw DataError(Str(prefix, ".bin has checksum ", HexString(dataset.HashTokens()), " and not ",
                        HexString(sidecar->bin_xxh3), " of its sidecar; prepare the corpus again"));
  }
  if (dataset.Fingerprint() != sidecar->fingerprint) {
    throw DataError(Str(prefix, ".idx does not fit the fingerprint ",
                        HexString(sidecar->fingerprint),
                        " of its sidecar; prepare the corpus again"));
  }
}

}  // namespace longspan::data
