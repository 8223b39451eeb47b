#include <algorithm>
#include <cstdio>
#include <map>
#include <set>

#include "configs/defaults.h"
#include "configs/mixer.h"
#include "launch/cli/inspect.h"
#include "ops/core/context.h"
#include "ops/core/error.h"
#include "trainer/model/parameters.h"

namespace longspan::launch {
namespace {

using Json = nlohmann::ordered_json;

constexpr double kThreshold =
    0.5;  // at and below it the streaming branch is enough (arXiv 2410.10819)
constexpr const char* kWeights = "weights/";

struct LayerGates {
  int64_t layer;
  std::vector<double> alpha;  // by kv head
  bool Streams(size_t head) const { return alpha[head] <= kThreshold; }
};

// Layer of "weights/model.layers.7.self_attn.duo_alpha".
int64_t LayerOf(const std::string& name) {
  const std::string before = Str(kWeights, "model.layers.");
  if (!name.starts_with(before)) throw CheckpointError(Str("tensor ", name, " is of no layer"));
  return std::stoll(name.substr(before.size()));
}

std::vector<double> Values(const Tensor& t) {
  std::vector<double> values(static_cast<size_t>(t.numel()));
  DispatchFloat(t.dtype(), "inspect", [&]<class T>() {
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<double>(t.data<T>()[i]);
  });
  return values;
}

std::vector<LayerGates> ReadGates(const trainer::CheckpointReader& reader) {
  Context ctx(ContextOptions{.threads = 1});
  std::vector<trainer::NamedTensor> gates;
  for (const trainer::TensorEntry& t : reader.tensors()) {
    if (!t.name.starts_with(kWeights) || !t.name.ends_with(trainer::kDuoGate)) continue;
    if (t.shape.size() != 1 || !IsFloat(t.dtype)) {
      throw CheckpointError(
          Str("tensor ", t.name, " is ", t.Describe(), ", not one gate a kv head"));
    }
    gates.push_back({t.name, ctx.Empty({t.shape[0]}, t.dtype)});
  }
  reader.Load(gates, kWeights, [](std::string_view) { return true; });
  std::vector<LayerGates> layers;
  for (const trainer::NamedTensor& t : gates) layers.push_back({LayerOf(t.name), Values(t.tensor)});
  std::sort(layers.begin(), layers.end(),
            [](const auto& a, const auto& b) { return a.layer < b.layer; });
  return layers;
}

std::string Fixed(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%7.3f", value);
  return text;
}

void DescribeTable(const std::vector<LayerGates>& layers, InspectReport& report) {
  Json table = Json::array();
  std::string& text = report.text;
  text += Str("\ngates: alpha of each kv head, 1 = full attention, up to ", kThreshold,
              " = streaming is enough\n  layer");
  size_t heads = 0, streaming = 0, all = 0;
  for (const LayerGates& l : layers) heads = std::max(heads, l.alpha.size());
  for (size_t h = 0; h < heads; ++h) text += Str(h < 10 ? "      " : "     ", h);
  text += "  streaming\n";
  for (const LayerGates& l : layers) {
    Json streams = Json::array();
    std::string row, list;
    for (size_t h = 0; h < l.alpha.size(); ++h) {
      row += Fixed(l.alpha[h]);
      if (!l.Streams(h)) continue;
      streams.push_back(h);
      list += Str(list.empty() ? "" : ", ", h);
    }
    streaming += streams.size();
    all += l.alpha.size();
    const std::string number = std::to_string(l.layer);
    text += "  " + std::string(5 - std::min<size_t>(5, number.size()), ' ') + number + row + "  " +
            (list.empty() ? "none" : list) + "\n";
    table.push_back({{"layer", l.layer}, {"alpha", l.alpha}, {"streaming", streams}});
  }
  text += ReportLine("streaming heads", Str(streaming, " of ", all));
  report.json["gates"] = {
      {"threshold", kThreshold}, {"layers", std::move(table)}, {"streaming", streaming}};
}

std::string Span(const configs::DuoPattern* stream) {
  if (stream == nullptr) return "head {}";
  return Str("head { window: ", stream->recent(), " sinks: ", stream->sinks(), " }");
}

// The mixers and layers that use what the gates say: one mixer for each set of streaming heads.
std::string ConfigLines(const std::vector<LayerGates>& layers, const configs::Model& model,
                        const std::vector<int>& mixer_of_layer) {
  std::map<std::string, std::string> names;  // of new mixers, by their text
  std::set<std::string> taken;
  for (const configs::Mixer& mixer : model.mixer()) taken.insert(mixer.name());
  int number = 0;
  std::map<int64_t, const LayerGates*> gates;
  for (const LayerGates& l : layers) gates[l.layer] = &l;
  std::string mixers, order;
  for (size_t i = 0; i < mixer_of_layer.size(); ++i) {
    const configs::Mixer& mixer = model.mixer(mixer_of_layer[i]);
    const auto found = gates.find(static_cast<int64_t>(i));
    std::string name = mixer.name();
    const configs::Attention& attention = configs::AttentionOf(mixer);
    if (found != gates.end() && attention.has_duo()) {
      std::string spans;
      for (size_t h = 0; h < found->second->alpha.size(); ++h) {
        spans += Str(" ", Span(found->second->Streams(h) ? &attention.duo() : nullptr));
      }
      std::string& chosen = names[spans];
      if (chosen.empty()) {
        do {
          chosen = Str(mixer.name(), "_", number++);
        } while (taken.contains(chosen));
        mixers += Str("  mixer { name: \"", chosen, "\" ", configs::NormalizationOf(mixer),
                      " { spans {", spans, " } } }\n");
      }
      name = chosen;
    }
    order += Str(order.empty() ? "" : " ", name);
  }
  return mixers + "  layers: \"" + order + "\"\n";
}

}  // namespace

void DescribeGates(const trainer::CheckpointReader& reader, const configs::LoadedConfig* config,
                   InspectReport& report) {
  const std::vector<LayerGates> layers = ReadGates(reader);
  if (layers.empty()) return;
  DescribeTable(layers, report);
  if (config == nullptr) return;
  const configs::Model& model = config->config.model();
  const std::string lines = ConfigLines(layers, model, configs::LayerMixers(model));
  report.json["gates"]["config"] = lines;
  report.text +=
      "\nconfiguration that lets the streaming heads stream, in place of the mixers with "
      "gates; start it with --init-from\n" +
      lines;
}

}  // namespace longspan::launch
