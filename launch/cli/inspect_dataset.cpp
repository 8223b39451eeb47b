#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <optional>
#include <vector>

#include "data/byte_tokenizer.h"
#include "data/indexed_dataset.h"
#include "data/sidecar.h"
#include "launch/cli/inspect.h"
#include "ops/core/error.h"

namespace longspan::launch {
namespace {

using Json = nlohmann::ordered_json;

constexpr int64_t kSampleTokens = 200;

void DescribeStream(const data::IndexedDataset& dataset, InspectReport& report) {
  const int64_t documents = dataset.num_documents();
  int64_t shortest = documents > 0 ? dataset.DocumentLength(0) : 0, longest = 0;
  for (int64_t d = 0; d < documents; ++d) {
    const int64_t length = dataset.DocumentLength(d);
    shortest = std::min(shortest, length);
    longest = std::max(longest, length);
  }
  const double mean =
      documents > 0 ? static_cast<double>(dataset.num_tokens()) / static_cast<double>(documents)
                    : 0;
  report.json.update(Json{{"documents", documents},
                          {"sequences", dataset.num_sequences()},
                          {"tokens", dataset.num_tokens()},
                          {"dtype", ToString(dataset.dtype())},
                          {"shortest_document", shortest},
                          {"longest_document", longest},
                          {"mean_document", mean},
                          {"fingerprint", data::HexString(dataset.Fingerprint())}});
  char rounded[32];
  std::snprintf(rounded, sizeof rounded, "%.1f", mean);
  report.text += ReportLine(
      "documents", Str(Grouped(documents), " in ", Grouped(dataset.num_sequences()), " sequences"));
  report.text += ReportLine(
      "tokens", Str(Grouped(dataset.num_tokens()), " of type ", ToString(dataset.dtype())));
  report.text += ReportLine("document length", Str("shortest ", Grouped(shortest), ", mean ",
                                                   rounded, ", longest ", Grouped(longest)));
  report.text += ReportLine("fingerprint", data::HexString(dataset.Fingerprint()));
}

void DescribeSidecar(const std::optional<data::Sidecar>& sidecar,
                     const data::IndexedDataset& dataset, InspectReport& report) {
  if (!sidecar.has_value()) {
    report.json["sidecar"] = nullptr;
    report.text += ReportLine("sidecar", "none: not written by 'longspan prepare'");
    return;
  }
  const bool fits = sidecar->fingerprint == dataset.Fingerprint();
  report.json["sidecar"] = Json::parse(data::ToJson(*sidecar));
  report.json["sidecar_fits"] = fits;
  const std::string doubt = fits ? ""
                                 : "; it belongs to other data (fingerprint " +
                                       data::HexString(sidecar->fingerprint) + ")";
  report.text +=
      ReportLine("sidecar", Str("tokenizer ", sidecar->tokenizer, " with ",
                                Grouped(sidecar->vocab_size), " ids, end of text ", sidecar->eot_id,
                                ", largest id ", sidecar->max_token_id, doubt));
}

void DescribeText(const std::optional<data::Sidecar>& sidecar, const data::IndexedDataset& dataset,
                  InspectReport& report) {
  const data::ByteTokenizer tokenizer;
  if (!sidecar.has_value() || sidecar->tokenizer != tokenizer.name()) return;
  std::vector<int32_t> ids(static_cast<size_t>(std::min(kSampleTokens, dataset.num_tokens())));
  dataset.Read(0, ids);
  std::string line;
  try {
    const std::string text = tokenizer.Decode(ids);
    report.json["text"] = text;
    // Quoted, so that control characters do not reach the terminal.
    line = Json(text).dump(-1, ' ', false, Json::error_handler_t::replace);
  } catch (const InvalidArgument& error) {  // damaged data that --no-verify lets through
    report.json["text"] = nullptr;
    line = Str("text that cannot be decoded: ", error.what());
  }
  report.text += ReportLine("begins with", line);
}

}  // namespace

InspectReport InspectDataset(const InspectOptions& options) {
  const data::IndexedDataset dataset(options.target);
  const auto sidecar = data::ReadSidecar(options.target);
  const bool verify = options.verify && sidecar.has_value();
  if (verify) data::VerifyAgainstSidecar(dataset);
  InspectReport report;
  report.json = {{"kind", "dataset"}, {"prefix", options.target}};
  report.text = Str("dataset ", options.target, "\n");
  DescribeStream(dataset, report);
  DescribeSidecar(sidecar, dataset, report);
  DescribeText(sidecar, dataset, report);
  int64_t bytes = 0;
  for (const char* ending : {".bin", ".idx"}) {
    bytes += static_cast<int64_t>(std::filesystem::file_size(options.target + ending));
  }
  report.json["file_bytes"] = bytes;
  report.json["verified_bytes"] = verify ? Json(bytes) : Json();
  report.text += ReportLine("files", FormatBytes(bytes));
  report.text += verify           ? Str("verified ", bytes, " bytes against the sidecar\n")
                 : options.verify ? "not verified: there is no sidecar with checksums\n"
                                  : "not verified (--no-verify)\n";
  return report;
}

}  // namespace longspan::launch
