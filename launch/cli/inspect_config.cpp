#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>

#include "launch/cli/inspect.h"
#include "launch/picture/mask_facts.h"
#include "launch/picture/pattern_picture.h"
#include "launch/picture/png_file.h"
#include "ops/core/error.h"
#include "trainer/from_config.h"
#include "trainer/model/memory.h"
#include "trainer/model/parameters.h"

namespace longspan::launch {
namespace {

using Json = nlohmann::ordered_json;

constexpr int64_t kTextCells = 48;  // rows and columns of a picture in text
constexpr int64_t kImageCells = 256;

std::string Fraction(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.4f", value);
  return text;
}

// "0, 2-4" for {0, 2, 3, 4}.
std::string Ranges(const std::vector<int64_t>& numbers) {
  std::string text;
  for (size_t i = 0; i < numbers.size();) {
    size_t end = i + 1;
    while (end < numbers.size() && numbers[end] == numbers[end - 1] + 1) ++end;
    text += Str(text.empty() ? "" : ", ", numbers[i]);
    if (end - i > 1) text += Str("-", numbers[end - 1]);
    i = end;
  }
  return text;
}

std::string PartOf(const std::string& parameter) {
  const auto has = [&](const char* part) { return parameter.find(part) != std::string::npos; };
  if (has("norm")) return "norms";
  if (has("embed_tokens")) return "embedding";
  if (has("lm_head")) return "output";
  if (has(".self_attn.")) return "attention";
  if (has(".mlp.")) return "feed_forward";
  return "other";
}

void DescribeModel(const trainer::ModelOptions& model, InspectReport& report) {
  std::map<std::string, int64_t> parts;
  for (const trainer::BucketSpec& bucket : trainer::ListParameters(model)) {
    for (const trainer::ParameterSpec& p : bucket.parameters) {
      parts[PartOf(p.name)] += p.shape.numel();
    }
  }
  const int64_t total = trainer::CountParameters(model);
  Json by_part;
  std::string split;
  for (const char* part : {"embedding", "attention", "feed_forward", "norms", "output", "other"}) {
    if (!parts.contains(part)) continue;
    by_part[part] = parts[part];
    split += Str(split.empty() ? "" : ", ", part, " ", Grouped(parts[part]));
  }
  report.json["parameters"] = total;
  report.json["matmul_parameters"] = trainer::CountMatmulParameters(model);
  report.json["parameters_by_part"] = by_part;
  report.text += ReportLine("parameters", Grouped(total));
  report.text += ReportLine("", split);
}

void DescribeBatch(const configs::Config& c, InspectReport& report) {
  const int64_t rows = c.run().global_batch_tokens() / c.run().context_length();
  const int64_t replicas = c.parallel().dp(), micro_rows = c.run().micro_batch_rows();
  report.json["context_length"] = c.run().context_length();
  report.json["tokens_per_step"] = c.run().global_batch_tokens();
  report.json["rows_per_step"] = rows;
  report.json["micro_batches_per_step"] = rows / (replicas * micro_rows);
  report.json["ranks"] = replicas * c.parallel().cp();
  report.json["steps"] = c.run().steps();
  report.json["tokens_total"] = c.run().steps() * c.run().global_batch_tokens();
  report.text += ReportLine("tokens per step",
                            Str(Grouped(c.run().global_batch_tokens()), ": ", rows, " rows of ",
                                Grouped(c.run().context_length()), " tokens, ",
                                rows / (replicas * micro_rows), " micro-batches a replica"));
  report.text += ReportLine("ranks", Str(replicas * c.parallel().cp(), " (dp ", replicas, " x cp ",
                                         c.parallel().cp(), ")"));
  report.text +=
      ReportLine("steps", Str(Grouped(c.run().steps()), ": ",
                              Grouped(c.run().steps() * c.run().global_batch_tokens()), " tokens"));
}

// Tensors of one rank at the highest moment of a step.
void DescribeMemory(const configs::Config& c, const trainer::ModelOptions& model,
                    InspectReport& report) {
  const int64_t tokens = c.run().micro_batch_rows() * c.run().context_length() / c.parallel().cp();
  const bool gpu = c.run().device() == configs::Run::CUDA;
  const configs::Parallel& parallel = c.parallel();
  const int64_t group = parallel.hybrid_shard();
  const trainer::StateSharding sharding{
      .zero_stage = static_cast<int>(parallel.zero_stage()),
      .parts = group > 0 ? group : parallel.dp() * parallel.cp(),
      .offload_optimizer = parallel.offload_optimizer(),
      .accumulates = c.run().global_batch_tokens() >
                     c.run().context_length() * c.run().micro_batch_rows() * parallel.dp()};
  const auto forecast =
      trainer::ForecastStepMemory(model, tokens, gpu ? DeviceKind::kCuda : DeviceKind::kCpu,
                                  c.run().micro_batch_rows(), sharding);
  if (!forecast.has_value()) {
    report.json["memory_of_step"] = nullptr;
    return;
  }
  Json by_category;
  std::string split;
  for (size_t i = 0; i < kMemoryCategories; ++i) {
    const size_t bytes = forecast->by_category[i];
    if (bytes == 0) continue;
    const char* const name = ToString(static_cast<MemoryCategory>(i));
    by_category[name] = bytes;
    split += Str(split.empty() ? "" : ", ", name, " ", FormatBytes(static_cast<int64_t>(bytes)));
  }
  report.json["memory_of_step"] = {{"bytes", forecast->bytes}, {"by_category", by_category}};
  report.text += ReportLine(
      "memory of a step",
      Str(FormatBytes(static_cast<int64_t>(forecast->bytes)), " of tensors on each rank: ", split));
}

std::vector<int64_t> LayersOf(const trainer::ModelOptions& model, size_t mixer) {
  std::vector<int64_t> layers;
  for (size_t i = 0; i < model.layers.size(); ++i) {
    if (model.layers[i] == static_cast<int>(mixer)) layers.push_back(static_cast<int64_t>(i));
  }
  return layers;
}

// One picture per distinct head pattern, at most `cells` wide.
std::vector<Panel> PanelsOf(const trainer::MixerOptions& mixer, int64_t kv_heads, int64_t length,
                            int64_t cells) {
  if (mixer.moba) {
    const int64_t shown = MobaPictureLength(*mixer.moba, length, cells);
    return {MobaAscii(*WholeRowPlan(*mixer.moba, kv_heads, shown), cells)};
  }
  const ops::AttentionPattern& pattern = mixer.pattern;
  const auto mask = WholeRowMask(pattern, kv_heads, PictureLength(pattern, length, cells));
  std::vector<Panel> panels;
  for (const auto& heads : HeadsByPattern(*mask))
    panels.push_back(mask->Ascii(heads.front(), cells));
  return panels;
}

std::string PictureLines(const Panel& picture) {
  std::string text;
  for (size_t begin = 0; begin < picture.size();) {
    const size_t end = picture.find('\n', begin);
    text += "    " + picture.substr(begin, end - begin) + "\n";
    begin = end + 1;
  }
  return text;
}

void DescribeHeads(const ops::BlockMask& mask, const ops::AttentionPattern& pattern, int64_t length,
                   Json& mixer, std::string& text) {
  const int64_t shown = PictureLength(pattern, length, kTextCells);
  const auto small = shown == length ? nullptr : WholeRowMask(pattern, mask.kv_heads(), shown);
  const ops::BlockMask& source = small == nullptr ? mask : *small;
  const int64_t blocks = ops::BlocksPerRow(shown);
  const int64_t cells = std::min(kTextCells, blocks);
  mixer["picture_length"] = shown;
  mixer["heads"] = Json::array();
  for (const auto& heads : HeadsByPattern(mask)) {
    const MaskFacts facts = FactsOfHead(mask, heads.front());
    const Panel picture = source.Ascii(heads.front(), kTextCells);
    mixer["heads"].push_back({{"kv_heads", heads},
                              {"density", facts.visible_fraction},
                              {"block_density", facts.block_fraction},
                              {"picture", picture}});
    text += Str(
        heads.size() == 1 ? "\n  kv head " : "\n  kv heads ", Ranges(heads), " of ",
        mask.kv_heads(), ", density ", Fraction(facts.visible_fraction), "; ",
        shown == length ? "" : "the first ", Grouped(shown), " tokens, a cell is ",
        cells == blocks ? Str(ops::kMaskBlock, " tokens") : Str("about ", shown / cells, " tokens"),
        "\n");
    text += PictureLines(picture);
  }
}

// Returns the density of the mixer, taking every chosen block as a whole one.
double DescribeRouted(const trainer::ModelOptions& model, size_t index, int64_t length,
                      InspectReport& report) {
  const trainer::MixerOptions& mixer = model.mixers[index];
  const std::vector<int64_t> layers = LayersOf(model, index);
  const auto plan = WholeRowPlan(*mixer.moba, model.num_kv_heads, length);
  const MaskFacts facts = FactsOf(*plan);
  const int64_t shown = MobaPictureLength(*mixer.moba, length, kTextCells);
  const Panel picture =
      MobaAscii(*WholeRowPlan(*mixer.moba, model.num_kv_heads, shown), kTextCells);
  std::vector<int64_t> heads;
  for (int64_t h = 0; h < model.num_kv_heads; ++h) heads.push_back(h);
  Json all_heads = {{"kv_heads", heads},
                    {"density", facts.visible_fraction},
                    {"block_density", facts.block_fraction},
                    {"picture", picture}};
  report.json["mixers"].push_back({{"name", mixer.name},
                                   {"pattern", mixer.PatternToString()},
                                   {"routed", true},
                                   {"layers", layers},
                                   {"normalization", "softmax"},
                                   {"bias", nullptr},
                                   {"length", length},
                                   {"density", facts.visible_fraction},
                                   {"block_density", facts.block_fraction},
                                   {"coverage", nullptr},
                                   {"visible_pairs", facts.visible_pairs},
                                   {"mask_bytes", plan->own->bytes()},
                                   {"picture_length", shown},
                                   {"heads", Json::array({std::move(all_heads)})}});
  std::string& text = report.text;
  text += Str("\nmixer ", mixer.name, ": ", mixer.PatternToString(), ", routed\n");
  text += ReportLine("layers", Ranges(layers));
  text += ReportLine("density", Str(Fraction(facts.visible_fraction), " of the pairs and ",
                                    Fraction(facts.block_fraction),
                                    " of the 64 x 64 blocks of causal attention, one document of ",
                                    Grouped(length), " tokens; at most, as the data choose"));
  text += Str("\n  each token and query head: its own block and at most ", plan->width(),
              " of those marked + before it; ", shown == length ? "" : "the first ", Grouped(shown),
              " tokens\n", PictureLines(picture));
  return facts.visible_fraction;
}

void DescribeNormalization(const trainer::MixerOptions& mixer, Json& json, std::string& text) {
  json["normalization"] = mixer.IsSigmoid() ? "sigmoid" : "softmax";
  json["bias"] = mixer.bias.has_value() ? Json(*mixer.bias) : Json();
  if (!mixer.IsSigmoid()) return;
  const double weight = 1 / (1 + std::exp(-*mixer.bias));
  text += ReportLine("normalization",
                     Str("sigmoid, bias ", *mixer.bias, "; a score of 0 weighs ", weight));
}

// Returns the density of the mixer.
double DescribeMixer(const trainer::ModelOptions& model, size_t index, int64_t length,
                     InspectReport& report) {
  const trainer::MixerOptions& mixer = model.mixers[index];
  if (mixer.moba) return DescribeRouted(model, index, length, report);
  const std::vector<int64_t> layers = LayersOf(model, index);
  const auto mask = WholeRowMask(mixer.pattern, model.num_kv_heads, length);
  const MaskFacts facts = FactsOf(*mask);
  const bool is_s2 = mixer.pattern.kind == ops::PatternKind::kS2;
  const double coverage = mixer.pattern.Coverage(model.num_kv_heads);
  Json json = {{"name", mixer.name},
               {"pattern", mixer.PatternToString()},
               {"layers", layers},
               {"length", length},
               {"density", facts.visible_fraction},
               {"block_density", facts.block_fraction},
               {"coverage", is_s2 ? Json(coverage) : Json()},
               {"visible_pairs", facts.visible_pairs},
               {"mask_bytes", mask->bytes()}};
  std::string& text = report.text;
  text += Str("\nmixer ", mixer.name, ": ", mixer.PatternToString(), "\n");
  text += ReportLine("layers", Ranges(layers));
  DescribeNormalization(mixer, json, text);
  text += ReportLine("density", Str(Fraction(facts.visible_fraction), " of the pairs and ",
                                    Fraction(facts.block_fraction), " of the 64 x 64 blocks of ",
                                    mixer.pattern.LooksAhead() ? "attention in both directions"
                                                               : "causal attention",
                                    ", one document of ", Grouped(length), " tokens"));
  if (is_s2) {
    text += ReportLine("coverage",
                       Fraction(coverage) + " of the distant blocks, all kv heads together");
  }
  if (mixer.duo) {
    text += ReportLine("gates", Str("mix this with ", mixer.duo->Stream().ToString(),
                                    ", one a kv head; both branches run"));
  }
  if (mixer.seer) {
    text +=
        ReportLine("gates", Str("choose among these blocks by ", mixer.seer->selection.ToString(),
                                "; what they choose depends on the text"));
  }
  text += ReportLine("mask", FormatBytes(static_cast<int64_t>(mask->bytes())));
  DescribeHeads(*mask, mixer.pattern, length, json, text);
  report.json["mixers"].push_back(std::move(json));
  return facts.visible_fraction;
}

void WritePicture(const trainer::ModelOptions& model, int64_t length, const std::string& path) {
  std::vector<std::vector<Panel>> rows;
  for (const trainer::MixerOptions& mixer : model.mixers) {
    rows.push_back(PanelsOf(mixer, model.num_kv_heads, length, kImageCells));
  }
  WritePng(DrawPanels(rows), path);
}

}  // namespace

InspectReport DescribeConfig(const configs::LoadedConfig& loaded, const InspectOptions& options) {
  const configs::Config& config = loaded.config;
  const trainer::ModelOptions model = trainer::ModelFromConfig(config);
  const int64_t length = options.length > 0 ? options.length : config.run().context_length();
  InspectReport report;
  DescribeModel(model, report);
  DescribeBatch(config, report);
  DescribeMemory(config, model, report);

  Json layers = Json::array();
  std::string listing;
  for (int mixer : model.layers) {
    const std::string& name = model.mixers[static_cast<size_t>(mixer)].name;
    layers.push_back(name);
    listing += (listing.empty() ? "" : " ") + name;
  }
  report.json["layers"] = std::move(layers);
  report.text += ReportLine("layers", Str(model.num_layers(), ": ", listing));

  const size_t summary = report.text.size();
  report.json["mixers"] = Json::array();
  std::vector<double> densities;
  for (size_t i = 0; i < model.mixers.size(); ++i) {
    densities.push_back(DescribeMixer(model, i, length, report));
  }
  double sum = 0;
  for (int mixer : model.layers) sum += densities[static_cast<size_t>(mixer)];
  const double mean = sum / static_cast<double>(model.num_layers());
  report.json["mean_density"] = mean;
  report.text.insert(summary, ReportLine("mean density", Str(Fraction(mean), " over all layers at ",
                                                             Grouped(length), " tokens")));
  if (!options.png.empty()) {
    WritePicture(model, length, options.png);
    report.json["png"] = options.png;
    report.text += Str("\npicture written to ", options.png, "\n");
  }
  return report;
}

InspectReport InspectConfig(const InspectOptions& options) {
  const configs::LoadedConfig loaded = configs::Load(options.target, options.sets);
  InspectReport details = DescribeConfig(loaded, options);
  InspectReport report;
  report.json = {{"kind", "config"}, {"path", options.target}};
  report.json.update(details.json);
  report.json["resolved"] = loaded.resolved_text();
  report.text = Str("configuration ", options.target, ", with all defaults:\n\n",
                    loaded.resolved_text(), "\n", details.text);
  return report;
}

}  // namespace longspan::launch
