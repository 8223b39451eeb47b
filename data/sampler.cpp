#include "data/sampler.h"

#include <xxhash.h>

#include <algorithm>
#include <array>
#include <bit>
#include <mutex>
#include <optional>
#include <span>

#include "data/indexed_dataset.h"
#include "data/permutation.h"
#include "data/sidecar.h"
#include "ops/core/check.h"
#include "ops/core/rng.h"

namespace longspan::data {
namespace {

std::vector<double> Weights(const RowSamplerOptions& options) {
  std::vector<double> weights;
  for (const Source& source : options.sources) weights.push_back(source.weight);
  return weights;
}

const RowSamplerOptions& Checked(const RowSamplerOptions& options) {
  if (options.sources.empty()) throw InvalidArgument("no dataset is given to read rows from");
  if (options.context_length < 1) {
    throw InvalidArgument(
        Str("run.context_length ", options.context_length, " must be at least 1"));
  }
  if (options.alignment < 1 || options.context_length % options.alignment != 0) {
    throw InvalidArgument(Str("run.context_length ", options.context_length,
                              " must be a multiple of ", options.alignment,
                              ", on which documents start with data.align_documents"));
  }
  if (options.alignment > 1 && !options.document_mask) {
    throw InvalidArgument("data.align_documents needs data.document_mask: padding would be seen");
  }
  for (const Source& source : options.sources) {
    if (!options.shuffle && source.weight != options.sources.front().weight) {
      throw InvalidArgument(Str("weight ", source.weight, " of ", source.prefix,
                                ": datasets that are read in order cannot be weighted; leave the "
                                "weights out"));
    }
  }
  return options;
}

}  // namespace

// The rows of one source.
class RowSampler::Stream {
 public:
  Stream(const RowSamplerOptions& options, size_t source)
      : options_(options),
        dataset_(options.sources[source].prefix),
        document_keys_(options.seed, StreamOf("documents of an epoch") + source),
        row_keys_(options.seed, StreamOf("rows of an epoch") + source),
        offset_keys_(options.seed, StreamOf("first row of an epoch") + source) {
    const int64_t tokens = StreamTokens(), length = options.context_length;
    // Aligned rows need no token behind them: what ends at the stream's end has no label there.
    const int64_t behind = aligned() ? 0 : 1;
    if (tokens < length + behind) {
      throw DataError(Str(dataset_.prefix(), ".bin has ", dataset_.num_tokens(), " tokens in ",
                          dataset_.num_documents(), " documents",
                          aligned() ? Str(" (", tokens, " with data.align_documents)") : "",
                          ", and one row of run.context_length ", length, " needs ",
                          length + behind, "; give more text or a shorter context_length"));
    }
    rows_ = (tokens - behind) / length;
    spare_units_ = (tokens - behind) % length / options.alignment;
  }

  const IndexedDataset& dataset() const { return dataset_; }
  int64_t rows() const { return rows_; }

  Row Get(int64_t index) const {
    const int64_t epoch = index / rows_;
    int64_t row = index % rows_, offset = 0;
    if (options_.shuffle) {
      const auto counter = static_cast<uint64_t>(epoch);
      row = KeyedPermutation(rows_, row_keys_.Bits(counter))[row];
      // Shuffling documents alone would never reach the last tokens of a single one.
      offset = options_.alignment * static_cast<int64_t>(offset_keys_.Below(
                                        counter, static_cast<uint64_t>(spare_units_) + 1));
    }
    // Without padding the places of documents in file order are those of the dataset.
    const std::shared_ptr<const Epoch> table =
        options_.shuffle || aligned() ? TableOf(epoch) : nullptr;
    std::vector<int64_t> ends;
    const std::vector<int32_t> tokens =
        ReadStream(table.get(), offset + row * options_.context_length, ends);
    return PackRow(tokens, ends, options_.document_mask);
  }

 private:
  // The order of the documents in one epoch and their places in its stream.
  struct Epoch {
    int64_t epoch;
    std::optional<KeyedPermutation> order;  // none: that of the file
    std::vector<int64_t> begins;            // of the k-th document, then the stream's end
    int64_t Document(int64_t k) const { return order ? (*order)[k] : k; }
  };

  bool aligned() const { return options_.alignment > 1; }
  // Tokens that a document takes in the stream, padding included.
  int64_t Padded(int64_t document) const {
    const int64_t unit = options_.alignment;
    return (dataset_.DocumentLength(document) + unit - 1) / unit * unit;
  }
  int64_t StreamTokens() const {
    if (!aligned()) return dataset_.num_tokens();
    int64_t tokens = 0;
    for (int64_t d = 0; d < dataset_.num_documents(); ++d) tokens += Padded(d);
    return tokens;
  }

  std::shared_ptr<const Epoch> BuildTable(int64_t epoch) const {
    auto table = std::make_shared<Epoch>();
    table->epoch = epoch;
    const int64_t documents = dataset_.num_documents();
    if (options_.shuffle) {
      table->order.emplace(documents, document_keys_.Bits(static_cast<uint64_t>(epoch)));
    }
    table->begins.reserve(static_cast<size_t>(documents) + 1);
    table->begins.push_back(0);
    for (int64_t k = 0; k < documents; ++k) {
      table->begins.push_back(table->begins.back() + Padded(table->Document(k)));
    }
    return table;
  }

  // Building happens under the lock: a second thread that needs the same table waits for it.
  std::shared_ptr<const Epoch> TableOf(int64_t epoch) const {
    const std::lock_guard lock(mutex_);
    for (auto& table : tables_) {
      if (table && table->epoch == epoch) return table;
    }
    std::swap(tables_[0], tables_[1]);  // the older one goes
    tables_[0] = BuildTable(epoch);
    return tables_[0];
  }

  // Place of the epoch's k-th document in its stream and in the file; no table means file order.
  int64_t StreamBegin(const Epoch* table, int64_t k) const {
    return table ? table->begins[static_cast<size_t>(k)] : dataset_.DocumentBegin(k);
  }

  // Tokens [begin, begin + L] of the stream and the borders of documents and padding among them, as
  // PackRow wants them.
  std::vector<int32_t> ReadStream(const Epoch* table, int64_t begin,
                                  std::vector<int64_t>& ends) const {
    const int64_t end = begin + options_.context_length + 1;
    std::vector<int32_t> tokens(static_cast<size_t>(end - begin), kPadding);
    // The last document that begins at or before `begin`; empty documents cannot be the last such.
    int64_t low = 0, high = dataset_.num_documents();
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (StreamBegin(table, middle) <= begin ? low : high) = middle;
    }
    int64_t at = begin;
    for (int64_t k = low; at < end && k < dataset_.num_documents(); ++k) {
      const int64_t document = table ? table->Document(k) : k;
      const int64_t document_begin = StreamBegin(table, k);
      const int64_t document_end = document_begin + dataset_.DocumentLength(document);
      const int64_t padding_end = StreamBegin(table, k + 1);
      if (padding_end <= at) continue;  // an empty document
      const int64_t count = std::min(document_end, end) - at;
      const auto part =
          std::span(tokens).subspan(static_cast<size_t>(at - begin), static_cast<size_t>(count));
      dataset_.Read(dataset_.DocumentBegin(document) + (at - document_begin), part);
      CheckIds(part);
      for (const int64_t border : {document_end, padding_end}) {
        if (border <= end && (ends.empty() || ends.back() < border - begin)) {
          ends.push_back(border - begin);
        }
      }
      at = padding_end;
    }
    return tokens;
  }

  void CheckIds(std::span<const int32_t> tokens) const {
    for (const int32_t id : tokens) {
      if (id < 0) {
        throw DataError(Str(dataset_.prefix(), ".bin holds token id ", id,
                            ", which is negative: damaged or foreign data; prepare the corpus "
                            "again"));
      }
      if (options_.vocab_size > 0 && id >= options_.vocab_size) {
        throw DataError(Str(dataset_.prefix(), ".bin holds token id ", id,
                            ", which is not below model.vocab_size ", options_.vocab_size,
                            "; set model.vocab_size to that of the corpus's tokenizer"));
      }
    }
  }

  const RowSamplerOptions& options_;
  IndexedDataset dataset_;
  Philox document_keys_, row_keys_, offset_keys_;
  int64_t rows_ = 0;
  int64_t spare_units_ = 0;   // of `alignment` tokens, that no row of an epoch takes
  mutable std::mutex mutex_;  // guards tables_
  mutable std::array<std::shared_ptr<const Epoch>, 2> tables_;
};

RowSampler::RowSampler(const RowSamplerOptions& options)
    : options_(Checked(options)), mixture_(Weights(options)) {
  for (size_t s = 0; s < options_.sources.size(); ++s) {
    streams_.push_back(std::make_unique<Stream>(options_, s));
  }
}

RowSampler::~RowSampler() = default;

Row RowSampler::Get(int64_t sample) const {
  if (options_.shuffle) {
    const Mixture::Place place = mixture_.Find(sample);
    return streams_[static_cast<size_t>(place.source)]->Get(place.index);
  }
  int64_t index = sample;
  for (const auto& stream : streams_) {
    if (index >= 0 && index < stream->rows()) return stream->Get(index);
    index -= stream->rows();
  }
  throw InvalidArgument(
      Str("row ", sample, " does not exist: the datasets hold ", RowsAvailable(), " rows"));
}

int64_t RowSampler::RowsAvailable() const {
  int64_t rows = 0;
  for (const auto& stream : streams_) rows += stream->rows();
  return rows;
}

int64_t RowSampler::TokensAvailable() const {
  int64_t tokens = 0;
  for (const auto& stream : streams_) tokens += stream->dataset().num_tokens();
  return tokens;
}

int64_t RowSampler::MaxTokenId() const {
  int64_t largest = -1;
  for (const auto& stream : streams_) {
    largest = std::max(largest, data::MaxTokenId(stream->dataset()));
  }
  return largest;
}

uint64_t RowSampler::Fingerprint() const {
  std::vector<uint64_t> parts;
  for (size_t s = 0; s < streams_.size(); ++s) {
    parts.push_back(streams_[s]->dataset().Fingerprint());
    parts.push_back(std::bit_cast<uint64_t>(options_.sources[s].weight));
  }
  return XXH3_64bits(parts.data(), parts.size() * sizeof(uint64_t));
}

}  // namespace longspan::data
