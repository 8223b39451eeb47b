#include "configs/defaults.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <sstream>

#include "configs/mixer.h"
#include "ops/core/error.h"

namespace longspan::configs {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;

void SetDefault(const FieldDescriptor* field, Message* message) {
  const auto& reflection = *message->GetReflection();
  switch (field->cpp_type()) {
    case FieldDescriptor::CPPTYPE_INT64:
      return reflection.SetInt64(message, field, field->default_value_int64());
    case FieldDescriptor::CPPTYPE_DOUBLE:
      return reflection.SetDouble(message, field, field->default_value_double());
    case FieldDescriptor::CPPTYPE_BOOL:
      return reflection.SetBool(message, field, field->default_value_bool());
    case FieldDescriptor::CPPTYPE_ENUM:
      return reflection.SetEnum(message, field, field->default_value_enum());
    case FieldDescriptor::CPPTYPE_STRING:
      return reflection.SetString(message, field, field->default_value_string());
    default:
      throw ConfigError(Str("the schema's field ", field->full_name(), " has an unexpected type"));
  }
}

void FillStaticDefaults(Message* message) {
  const auto& reflection = *message->GetReflection();
  for (int i = 0; i < message->GetDescriptor()->field_count(); ++i) {
    const FieldDescriptor* field = message->GetDescriptor()->field(i);
    if (field->is_repeated()) {
      if (field->message_type() == nullptr) continue;
      for (int k = 0; k < reflection.FieldSize(*message, field); ++k) {
        FillStaticDefaults(reflection.MutableRepeatedMessage(message, field, k));
      }
      continue;
    }
    const bool absent = !reflection.HasField(*message, field);
    if (absent && field->real_containing_oneof() != nullptr) continue;
    if (field->message_type() != nullptr) {
      FillStaticDefaults(reflection.MutableMessage(message, field));
    } else if (absent && field->has_default_value()) {
      SetDefault(field, message);
    }
  }
}

}  // namespace

int64_t HeadDim(const Model& model) {
  return model.has_head_dim() ? model.head_dim() : model.hidden_size() / model.num_heads();
}

Precision ResidualDtype(const Config& config) {
  return config.model().has_residual_dtype() ? config.model().residual_dtype()
                                             : config.run().precision();
}

int64_t HeadStep(const S2Pattern& s2, int64_t num_kv_heads) {
  if (s2.has_head_step()) return s2.head_step();
  return std::max<int64_t>(1, s2.stride_blocks() / num_kv_heads);
}

double SigmoidBias(const Attention& sigmoid, int64_t context_length) {
  return sigmoid.has_bias() ? sigmoid.bias() : -std::log(static_cast<double>(context_length));
}

int64_t DecaySteps(const WsdSchedule& wsd, int64_t run_steps) {
  if (wsd.has_decay_steps()) return wsd.decay_steps();
  return std::max<int64_t>(1, std::llround(wsd.decay_fraction() * static_cast<double>(run_steps)));
}

std::vector<LayerRun> LayerRuns(const std::string& layers) {
  constexpr int64_t kMost = 65536;
  std::vector<LayerRun> runs;
  std::istringstream words(layers);
  for (std::string word; words >> word;) {
    const size_t star = word.find('*');
    LayerRun& run = runs.emplace_back(LayerRun{word.substr(0, star), 1});
    if (star == std::string::npos) continue;
    const char* end = word.data() + word.size();
    const auto [stop, error] = std::from_chars(word.data() + star + 1, end, run.count);
    if (error != std::errc() || stop != end || run.count < 1 || run.count > kMost) run.count = 0;
  }
  return runs;
}

std::vector<int> LayerMixers(const Model& model) {
  std::vector<int> tile;
  for (const LayerRun& run : LayerRuns(model.layers())) {
    const auto it = std::find_if(model.mixer().begin(), model.mixer().end(),
                                 [&](const Mixer& mixer) { return mixer.name() == run.name; });
    if (it == model.mixer().end() || run.count < 1) {
      throw ConfigError(Str("model.layers names '", run.name, "', which is no mixer with a count"));
    }
    tile.insert(tile.end(), static_cast<size_t>(run.count),
                static_cast<int>(it - model.mixer().begin()));
  }
  if (tile.empty()) throw ConfigError("model.layers names no mixer");
  std::vector<int> layers(model.num_layers());
  for (size_t i = 0; i < layers.size(); ++i) layers[i] = tile[i % tile.size()];
  return layers;
}

void FillDefaults(Config& config) {
  FillStaticDefaults(&config);
  Objective& objective = *config.mutable_objective();
  if (objective.kind_case() == Objective::KIND_NOT_SET) objective.mutable_next_token();
  Model& model = *config.mutable_model();
  model.set_head_dim(HeadDim(model));
  if (!model.has_embedding_init_std()) model.set_embedding_init_std(model.init_std());
  model.set_residual_dtype(ResidualDtype(config));
  for (Mixer& mixer : *model.mutable_mixer()) {
    if (mixer.kind_case() == Mixer::KIND_NOT_SET) continue;
    Attention& attention = MutableAttention(mixer);
    if (mixer.has_sigmoid()) {
      attention.set_bias(SigmoidBias(attention, config.run().context_length()));
    }
    if (!attention.has_s2() || attention.s2().homogeneous()) continue;
    S2Pattern& s2 = *attention.mutable_s2();
    s2.set_head_step(HeadStep(s2, model.num_kv_heads()));
  }
  if (config.schedule().has_wsd()) {
    WsdSchedule& wsd = *config.mutable_schedule()->mutable_wsd();
    if (wsd.decay_length_case() == WsdSchedule::DECAY_LENGTH_NOT_SET) {
      wsd.set_decay_fraction(wsd.decay_fraction());
    }
  }
}

}  // namespace longspan::configs
