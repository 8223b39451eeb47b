#include "trainer/trainer.h"

#include <cstdio>
#include <set>

#include "data/balance.h"
#include "parallel/context/placement.h"
#include "trainer/agreement.h"
#include "trainer/identity.h"

namespace longspan::trainer {
namespace {

// Prefixes of tensor names in a checkpoint (docs/checkpoint-format.md).
constexpr const char* kWeights = "weights/";
constexpr const char* kFirstMoment = "adamw.m/";
constexpr const char* kSecondMoment = "adamw.v/";
constexpr const char* kSkippedSteps = "skipped_steps";

// A fingerprint as checkpoints and messages show it.
std::string Hex(uint64_t value) {
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(value));
  return text;
}

// Opens datasets and checks that the model knows every token in them.
std::unique_ptr<data::RowSampler> OpenSampler(const data::RowSamplerOptions& options) {
  auto sampler = std::make_unique<data::RowSampler>(options);
  const int64_t largest = sampler->MaxTokenId();
  if (largest >= options.vocab_size) {
    std::string names;
    for (const auto& source : options.sources) names += (names.empty() ? "" : ", ") + source.prefix;
    throw DataError(Str("model.vocab_size = ", options.vocab_size, " is too small for token id ",
                        largest, " in ", names, "; use at least ", largest + 1));
  }
  return sampler;
}

data::RowSamplerOptions SamplerFrom(const TrainOptions& o, const std::vector<DataSource>& sources,
                                    bool shuffle) {
  data::RowSamplerOptions s;
  for (const DataSource& source : sources) s.sources.push_back({source.path, source.weight});
  s.context_length = o.context_length;
  s.seed = o.seed;
  s.shuffle = shuffle;
  s.document_mask = o.document_mask;
  if (o.align_documents) s.alignment = ops::kMaskBlock;
  s.balanced = shuffle && o.balanced_packing;
  s.vocab_size = o.model.vocab_size;
  return s;
}

// What this rank holds of one parameter in one of its tensors.
NamedTensor Named(const ParameterStore& store, const Bucket& b, size_t spec, const char* prefix,
                  Tensor OwnedSegment::* tensor) {
  const ParameterSpec& p = b.specs[spec];
  const ParameterStore::Part part = ParameterStore::PartOf(b, spec, tensor);
  if (!store.sharded()) return {prefix + p.name, part.elements.Reshape(p.shape)};
  const parallel::ShardGroups& groups = *store.groups();
  return {prefix + p.name, part.elements,
          TensorPiece{p.shape, part.begin, groups.copy(), groups.copies()}};
}

std::vector<NamedTensor> WeightsOf(ParameterStore& store) {
  std::vector<NamedTensor> weights;
  for (const Bucket& b : store.buckets()) {
    for (size_t i = 0; i < b.specs.size(); ++i) {
      weights.push_back(Named(store, b, i, kWeights, &OwnedSegment::master));
    }
  }
  return weights;
}

// The ranks among which state is split; none where each holds all of it.
std::unique_ptr<parallel::ShardGroups> GroupsFor(const TrainOptions& o,
                                                 parallel::Communicator& world) {
  if (o.zero_stage == 0) return nullptr;
  return std::make_unique<parallel::ShardGroups>(world, o.hybrid_shard);
}

}  // namespace

EvaluationLoss EvaluateCheckpoint(Context& ctx, parallel::DeviceMesh& mesh,
                                  const TrainOptions& options, const CheckpointReader& reader,
                                  int64_t rows) {
  const auto groups = GroupsFor(options, mesh.world());
  ParameterStore store(
      ctx, options.model,
      StoreOptions{.training = false, .zero_stage = options.zero_stage, .groups = groups.get()});
  std::unique_ptr<data::RowSampler> sampler;
  OnAllRanks(mesh.world(), [&] {
    sampler = OpenSampler(SamplerFrom(options, options.validation, false));
    reader.Load(WeightsOf(store), kWeights);
  });
  RequireSame(mesh.world(), "the validation data", sampler->Fingerprint());
  store.RefreshValues();
  BatchBuilder builder(options.model, options.context_layout(mesh.node_ranks()), mesh.cp_index());
  return EvaluateLoss(ctx, mesh, options, store, *sampler, builder, rows);
}

Trainer::Trainer(Context& ctx, parallel::DeviceMesh& mesh, const TrainOptions& options)
    : ctx_(ctx),
      mesh_(mesh),
      options_(options),
      groups_(GroupsFor(options_, mesh.world())),
      store_(ctx, options_.model,
             StoreOptions{.zero_stage = options_.zero_stage,
                          .groups = groups_.get(),
                          .offload_optimizer = options_.offload_optimizer}),
      train_step_(ctx, mesh, options_, store_) {
  OnAllRanks(mesh.world(), [&] { OpenData(); });
  RequireSame(mesh.world(), "the training data", train_->Fingerprint());
  if (validation_ != nullptr) {
    RequireSame(mesh.world(), "the validation data", validation_->Fingerprint());
  }
  store_.Initialize(options_.seed);
}

Trainer::~Trainer() = default;

void Trainer::OpenData() {
  train_ = OpenSampler(SamplerFrom(options_, options_.train, true));
  const ContextLayout layout = options_.context_layout(mesh_.node_ranks());
  const int cp_rank = mesh_.cp_index();
  train_builder_ = std::make_unique<BatchBuilder>(options_.model, layout, cp_rank);
  if (options_.validation.empty()) return;
  validation_ = OpenSampler(SamplerFrom(options_, options_.validation, false));
  validation_builder_ = std::make_unique<BatchBuilder>(options_.model, layout, cp_rank);
}

void Trainer::StartLoader() {
  data::LoaderOptions o;
  o.row = [this](int64_t sample) { return train_->Get(sample); };
  o.rows = options_.micro_batch_rows;
  o.depth = options_.prefetch_micro_batches;
  o.first_index = step_ * options_.accumulation();
  // Step s works on rows [s G, (s + 1) G) of the global order whatever the layout: micro-batch m
  // gives each replica the next `rows` of them, or of the order in which DealRows deals them.
  const int64_t replica = mesh_.dp_index();
  o.sample_indices = [this, replica,
                      dealt = std::pair<int64_t, std::vector<int64_t>>(-1, {})](int64_t n) mutable {
    const int64_t accumulation = options_.accumulation(), rows = options_.micro_batch_rows;
    const int64_t step = n / accumulation, first = step * options_.rows_per_step();
    const int64_t begin = (n % accumulation * options_.dp + replica) * rows;
    if (options_.balanced_packing && dealt.first != step) dealt = {step, DealStep(first)};
    std::vector<int64_t> samples;
    for (int64_t i = begin; i < begin + rows; ++i) {
      samples.push_back(first +
                        (options_.balanced_packing ? dealt.second[static_cast<size_t>(i)] : i));
    }
    return samples;
  };
  o.attach = [this](const data::MicroBatch& batch) -> std::shared_ptr<void> {
    return train_builder_->Build(batch);
  };
  loader_ = std::make_unique<data::Loader>(std::move(o));
}

// The order in which the rows of the step that begins with sample `first` are worked on.
std::vector<int64_t> Trainer::DealStep(int64_t first) const {
  std::vector<int64_t> areas;
  for (int64_t i = 0; i < options_.rows_per_step(); ++i) areas.push_back(train_->Area(first + i));
  return data::DealRows(areas, options_.dp, options_.micro_batch_rows);
}

StepResult Trainer::Step(const std::function<RankNote()>& note) {
  return FinishStep(BeginStep(note));
}

PendingStep Trainer::BeginStep(const std::function<RankNote()>& note) {
  if (loader_ == nullptr) StartLoader();
  PendingStep pending = train_step_.Begin(*loader_, step_, note);
  ++step_;
  return pending;
}

StepResult Trainer::FinishStep(PendingStep pending) {
  StepResult result = train_step_.Finish(std::move(pending));
  if (result.skipped && ++skipped_steps_ > options_.max_skipped_steps) {
    throw StepFailure(
        Str("step ", result.step, ": ", skipped_steps_,
            " steps have been skipped because loss or gradient were not finite, more than ",
            "run.max_skipped_steps = ", options_.max_skipped_steps,
            "; lower optimizer.adamw.lr or look at the data"));
  }
  return result;
}

EvaluationLoss Trainer::Evaluate() {
  LONGSPAN_CHECK(validation_ != nullptr) << "Evaluate without validation data";
  return EvaluateLoss(ctx_, mesh_, options_, store_, *validation_, *validation_builder_,
                      options_.evaluation_rows);
}

CheckpointInfo Trainer::Info(const std::string& config_text) const {
  CheckpointInfo info;
  info.step = step_;
  info.config_text = config_text;
  info.corpus_fingerprint = Hex(train_->Fingerprint());
  info.samples_consumed = step_ * options_.rows_per_step();
  info.seed = options_.seed;
  info.dp = static_cast<int>(options_.dp);
  info.cp = static_cast<int>(options_.cp);
  info.identity = IdentityOf(options_, info.corpus_fingerprint);
  info.extra[kSkippedSteps] = std::to_string(skipped_steps_);
  return info;
}

std::vector<NamedTensor> Trainer::State() {
  std::vector<NamedTensor> state = WeightsOf(store_);
  for (Bucket& b : store_.buckets()) {
    for (size_t i = 0; i < b.specs.size(); ++i) {
      if (b.offsets[i] >= b.trained_end) continue;  // frozen: it has none
      state.push_back(Named(store_, b, i, kFirstMoment, &OwnedSegment::m));
      state.push_back(Named(store_, b, i, kSecondMoment, &OwnedSegment::v));
    }
  }
  return state;
}

void Trainer::Resume(const CheckpointReader& reader) {
  const CheckpointInfo& info = reader.info();
  OnAllRanks(mesh_.world(), [&] {
    const auto differences =
        DifferingIdentity(info.identity, IdentityOf(options_, Hex(train_->Fingerprint())));
    if (!differences.empty()) {
      std::string text = "cannot resume from " + reader.path().string() + ": ";
      for (size_t i = 0; i < differences.size(); ++i) text += (i ? "; " : "") + differences[i];
      throw CheckpointError(text + "; undo the change, or start a new run directory with " +
                            "--init-from to keep the weights only");
    }
    reader.Load(State());
  });
  step_ = info.step;
  const auto skipped = info.extra.find(kSkippedSteps);
  skipped_steps_ = skipped == info.extra.end() ? 0 : std::stoll(skipped->second);
  train_step_.SetSkippedSteps(skipped_steps_);
  store_.RefreshValues();
  loader_.reset();
}

void Trainer::Record(std::shared_ptr<TraceRecorder> recorder) {
  train_builder_->trace().Record(std::move(recorder), "batches");
}

std::string Trainer::InitFrom(const CheckpointReader& reader) {
  // Gates alone may be on one side only: a dense checkpoint has none yet, and a model that uses
  // what they have found out has none any more.
  OnAllRanks(mesh_.world(), [&] { reader.Load(WeightsOf(store_), kWeights, IsGateName); });
  store_.RefreshValues();
  std::set<std::string> saved;
  for (const TensorEntry& t : reader.tensors()) {
    if (t.name.starts_with(kWeights) && IsGateName(t.name)) saved.insert(t.name);
  }
  int64_t fresh = 0;
  for (const Bucket& b : store_.buckets()) {
    for (const ParameterSpec& p : b.specs) {
      if (!p.gate || saved.erase(kWeights + p.name) > 0) continue;
      ++fresh;
      if (p.routes && !options_.model.gates_only) {
        throw CheckpointError(Str("checkpoint ", reader.path().string(), " lacks ", p.name,
                                  ", which this objective does not train: first teach the gates "
                                  "with objective.seer_gates"));
      }
    }
  }
  std::string note = Str("weights from ", reader.path().string());
  if (fresh > 0) note += Str("; it lacks ", fresh, " tensors of gates, which start anew");
  if (!saved.empty()) note += Str("; its ", saved.size(), " tensors of gates have no place here");
  // Often wanted, but a bias derived from another context length is easily overlooked.
  const auto layers = reader.info().identity.find(kLayersField);
  if (layers != reader.info().identity.end() &&
      layers->second != IdentityOf(options_, "").at(kLayersField)) {
    note += "; its layers have other patterns, normalization or bias";
  }
  return note;
}

}  // namespace longspan::trainer
