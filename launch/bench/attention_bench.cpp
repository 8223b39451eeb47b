#include "launch/bench/attention_bench.h"

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <tuple>
#include <utility>

#include "launch/bench/attention_operands.h"
#include "launch/bench/moba_bench.h"
#include "launch/picture/mask_facts.h"
#include "ops/attention/attention.h"

namespace longspan::launch {
namespace {

// Operands of the cases of one shape, and gradients, which are added to.
struct Operands : AttentionOperands {
  Operands(Context& ctx, const AttentionCase& c) : AttentionOperands(ctx, c) {
    const DType wide = AccumulatorOf(c.dtype);
    dq = ctx.Zeros(q.shape(), wide);
    dk = ctx.Zeros(k.shape(), wide);
    dv = ctx.Zeros(v.shape(), wide);
  }
  Tensor dq, dk, dv;
};

// The mask of one case over its operands; forward and backward of any implementation.
class AttentionRun {
 public:
  AttentionRun(Context& ctx, const AttentionCase& c, std::shared_ptr<Operands> operands = nullptr)
      : ctx_(ctx), operands_(std::move(operands)), normalization_(c.normalization) {
    if (operands_ == nullptr) operands_ = std::make_shared<Operands>(ctx, c);
    const auto documents = std::make_shared<const ops::Documents>(c.Documents());
    const ops::BlockList blocks = ops::BlockList::All(*documents);
    mask_ = ops::BlockMask::Build(c.pattern, c.kv_heads, documents, blocks, blocks);
    kv_ = ops::MakeKvView(operands_->k, operands_->v, blocks);
    grads_ = ops::MakeKvGradView(operands_->dk, operands_->dv, blocks);
  }

  ops::AttentionResult Forward(const std::string& implementation) {
    return ops::AttentionForward(ctx_, operands_->q, kv_, *mask_, Options(implementation));
  }
  // Adds to dq, dk and dv.
  void Backward(const std::string& implementation, const ops::AttentionResult& saved) {
    const Operands& x = *operands_;
    const bool softmax = normalization_ == ops::Normalization::kSoftmax;
    const Tensor delta = softmax ? ops::AttentionDelta(ctx_, x.d_out, saved.o) : Tensor();
    ops::AttentionBackward(ctx_, x.d_out, x.q, kv_, saved.lse, delta, *mask_, operands_->dq, grads_,
                           Options(implementation));
  }

  // Both passes, the first ones.
  AttentionValues Values(const std::string& implementation) {
    const ops::AttentionResult result = Forward(implementation);
    Backward(implementation, result);
    return {result.o, result.lse, operands_->dq, operands_->dk, operands_->dv};
  }

  const ops::BlockMask& mask() const { return *mask_; }

 private:
  ops::AttentionOptions Options(const std::string& implementation) const {
    ops::AttentionOptions options;
    options.implementation = implementation;
    options.round_output = true;
    options.normalization = normalization_;
    return options;
  }

  Context& ctx_;
  std::shared_ptr<Operands> operands_;
  const ops::Normalization normalization_;
  std::shared_ptr<const ops::BlockMask> mask_;
  ops::KvView kv_;
  ops::KvGradView grads_;
};

void Check(Context& ctx, const AttentionCase& problem, const std::string& implementation) {
  const AttentionCase small = SmallVersion(problem);
  Context host(ContextOptions{.threads = ctx.threads()});
  RequireSameValues(problem, implementation, AttentionRun(ctx, small).Values(implementation),
                    AttentionRun(host, small).Values(kReference));
}

// What is run of a case: all of it, or its first kv heads.
AttentionCase TimedPart(const AttentionCase& c) {
  AttentionCase part = c;
  if (c.timed_kv_heads == 0) return part;
  part.kv_heads = c.timed_kv_heads;
  part.heads = c.heads / c.kv_heads * c.timed_kv_heads;
  return part;
}

// One case of a group, with its times.
struct Contender {
  AttentionCase problem;
  std::shared_ptr<AttentionRun> run;
  double factor = 1;            // kv heads over those that are run
  ops::AttentionResult saved;   // of the forward pass
  std::vector<Timing> timings;  // of one pass, by implementation
};

std::vector<Contender> Prepare(Context& ctx, const std::vector<AttentionCase>& group) {
  std::vector<Contender> contenders;
  std::map<int64_t, std::shared_ptr<Operands>> operands;  // by kv heads
  for (const AttentionCase& c : group) {
    const AttentionCase part = TimedPart(c);
    if (part.kv_heads != c.kv_heads) {
      const auto whole = WholeRowMask(c.pattern, c.kv_heads, c.tokens);
      if (HeadsByPattern(*whole).size() > 1) {
        throw InvalidArgument(Str("benchmark case \"", c.name, "\": G", c.timed_kv_heads,
                                  " would leave out kv heads with other patterns; leave G out"));
      }
    }
    auto& shared = operands[part.kv_heads];
    if (shared == nullptr) shared = std::make_shared<Operands>(ctx, part);
    Contender contender;
    contender.problem = c;
    contender.run = std::make_shared<AttentionRun>(ctx, part, shared);
    contender.factor =
        static_cast<double>(c.kv_heads) / static_cast<double>(std::max<int64_t>(1, part.kv_heads));
    contenders.push_back(std::move(contender));
  }
  return contenders;
}

BenchRecord Describe(const Contender& contender, bool backward, const MachinePeaks& peaks) {
  const AttentionCase& c = contender.problem;
  const ops::BlockMask& mask = contender.run->mask();
  const MaskFacts facts = FactsOf(mask);
  const double group = static_cast<double>(c.heads) / static_cast<double>(c.kv_heads);
  const double pairs = static_cast<double>(mask.TotalVisiblePairs()) * contender.factor * group;
  const double q = static_cast<double>(c.tokens * c.heads * c.head_dim);
  const double kv = 2.0 * static_cast<double>(c.tokens * c.kv_heads * c.head_dim);
  const double size = static_cast<double>(SizeOf(c.dtype));
  const double gradient_size = static_cast<double>(SizeOf(AccumulatorOf(c.dtype)));
  const double read_in_backward = c.IsSigmoid() ? 2 : 3;  // of the size of q
  const double forward_flops = 4 * pairs * static_cast<double>(c.head_dim);
  BenchRecord r = RecordOf("attention", c.name, backward, c.dtype, peaks);
  r.flops = backward ? 2.5 * forward_flops : forward_flops;
  r.bytes = backward ? (read_in_backward * q + kv) * size + (q + kv) * gradient_size
                     : (2 * q + kv) * size;
  r.visible_fraction = facts.visible_fraction;
  r.block_fraction = facts.block_fraction;
  r.timed_kv_heads = c.timed_kv_heads;
  return r;
}

// Times every implementation on every case, all in the same rounds.
void Time(Context& ctx, std::vector<Contender>& contenders,
          const std::vector<std::string>& implementations, const BenchOptions& options,
          const std::function<void(Contender&, const std::string&)>& once) {
  std::vector<std::function<void()>> runs;
  for (Contender& c : contenders) {
    for (const std::string& name : implementations) runs.push_back([&] { once(c, name); });
  }
  const std::vector<Timing> timings = options.Time(ctx, runs);
  auto next = timings.begin();
  for (Contender& c : contenders) {
    c.timings.assign(next, next + static_cast<std::ptrdiff_t>(implementations.size()));
    next += static_cast<std::ptrdiff_t>(implementations.size());
    for (Timing& t : c.timings) t.median_ms *= c.factor, t.p90_ms *= c.factor;
  }
}

bool IsDense(const AttentionCase& c) {
  return c.pattern.kind == ops::PatternKind::kCausal || c.pattern.kind == ops::PatternKind::kFull;
}

// The contender that `c` is a sparse version of.
const Contender* DenseOf(const std::vector<Contender>& contenders, const Contender& c) {
  if (IsDense(c.problem)) return nullptr;
  for (const Contender& other : contenders) {
    if (other.problem.normalization != c.problem.normalization) continue;
    const bool both_ways = other.problem.pattern.kind == ops::PatternKind::kFull;
    if (IsDense(other.problem) && both_ways == c.problem.pattern.LooksAhead()) return &other;
  }
  return nullptr;
}

// The records of causal softmax attention among those of `masks`.
std::vector<BenchRecord> DenseRecords(const std::vector<AttentionCase>& masks,
                                      const std::vector<BenchRecord>& records) {
  std::vector<BenchRecord> dense;
  for (const AttentionCase& c : masks) {
    if (c.pattern.kind != ops::PatternKind::kCausal || c.IsSigmoid()) continue;
    for (const BenchRecord& r : records) {
      if (r.name == c.name) dense.push_back(r);
    }
  }
  return dense;
}

std::vector<BenchRecord> RecordsOf(const std::vector<Contender>& contenders,
                                   const std::vector<std::string>& implementations, bool backward,
                                   const MachinePeaks& peaks) {
  std::vector<BenchRecord> records;
  for (const Contender& c : contenders) {
    const Contender* const dense = DenseOf(contenders, c);
    for (size_t i = 0; i < implementations.size(); ++i) {
      BenchRecord r = Describe(c, backward, peaks);
      r.implementation = implementations[i];
      r.timing = c.timings[i];
      if (dense != nullptr) r.time_fraction = r.timing.median_ms / dense->timings[i].median_ms;
      records.push_back(std::move(r));
    }
  }
  return records;
}

std::vector<BenchRecord> BenchMasks(Context& ctx, const std::vector<AttentionCase>& group,
                                    const BenchOptions& options, const MachinePeaks& peaks) {
  const std::vector<std::string> implementations =
      ChooseAttention(ctx, group.front(), options.implementation);
  for (const AttentionCase& c : group) {
    for (const std::string& name : implementations) {
      if (name != kReference) Check(ctx, c, name);
    }
  }

  std::vector<Contender> contenders = Prepare(ctx, group);
  std::vector<BenchRecord> records;
  const auto add = [&](bool backward) {
    for (BenchRecord& r : RecordsOf(contenders, implementations, backward, peaks)) {
      records.push_back(std::move(r));
    }
  };
  if (options.forward) {
    Time(ctx, contenders, implementations, options,
         [](Contender& c, const std::string& name) { c.run->Forward(name); });
    add(false);
  }
  if (options.backward) {
    for (Contender& c : contenders) c.saved = c.run->Forward(implementations.front());
    Time(ctx, contenders, implementations, options,
         [](Contender& c, const std::string& name) { c.run->Backward(name, c.saved); });
    add(true);
  }
  return records;
}

}  // namespace

std::vector<std::vector<AttentionCase>> GroupByShape(const std::vector<AttentionCase>& cases) {
  std::vector<std::vector<AttentionCase>> groups;
  const auto shape = [](const AttentionCase& c) {
    return std::tuple(c.dtype, c.tokens, c.heads, c.kv_heads, c.head_dim, c.document_tokens);
  };
  for (const AttentionCase& c : cases) {
    const auto same = std::find_if(groups.begin(), groups.end(), [&](const auto& group) {
      return shape(group.front()) == shape(c);
    });
    if (same == groups.end()) {
      groups.push_back({c});
    } else {
      same->push_back(c);
    }
  }
  return groups;
}

std::vector<BenchRecord> BenchAttention(Context& ctx, const std::vector<AttentionCase>& group,
                                        const BenchOptions& options, const MachinePeaks& peaks) {
  std::vector<AttentionCase> masks;
  for (const AttentionCase& c : group) {
    if (!c.moba.has_value()) masks.push_back(c);
  }
  std::vector<BenchRecord> records;
  if (!masks.empty()) records = BenchMasks(ctx, masks, options, peaks);
  const std::vector<BenchRecord> dense = DenseRecords(masks, records);
  for (const AttentionCase& c : group) {
    if (!c.moba.has_value()) continue;
    for (BenchRecord& r : BenchMoba(ctx, c, options, peaks)) {
      for (const BenchRecord& d : dense) {  // the fastest
        if (d.pass != r.pass) continue;
        const double fraction = r.timing.median_ms / d.timing.median_ms;
        r.time_fraction = std::max(fraction, r.time_fraction.value_or(0));
      }
      records.push_back(std::move(r));
    }
  }
  // Both passes of a case together, in the order of the cases.
  const auto place = [&](const BenchRecord& r) {
    return std::find_if(group.begin(), group.end(),
                        [&](const AttentionCase& c) { return c.name == r.name; }) -
           group.begin();
  };
  std::stable_sort(records.begin(), records.end(),
                   [&](const BenchRecord& a, const BenchRecord& b) { return place(a) < place(b); });
  return records;
}

}  // namespace longspan::launch
