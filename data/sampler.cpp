#include "data/sampler.h"

#include <xxhash.h>

#include <algorithm>
#include <array>
#include <bit>
#include <mutex>
#include <optional>
#include <span>

#include "data/balance.h"
#include "data/indexed_dataset.h"
#include "data/permutation.h"
#include "data/sidecar.h"
#include "ops/core/check.h"
#include "ops/core/rng.h"

namespace longspan::data {
namespace {

// Balanced rows: so many are packed together, and so many alike follow one another.
constexpr int64_t kStretchRows = 512, kRunRows = 8;

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
  if (options.balanced && !(options.shuffle && options.document_mask)) {
    throw InvalidArgument(
        "data.packing: BALANCED needs rows that are shuffled and data.document_mask; use GREEDY");
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
        offset_keys_(options.seed, StreamOf("first row of an epoch") + source),
        stretch_keys_(options.seed, StreamOf("rows of a stretch") + source) {
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
    const RowPlace at = Locate(index);
    std::vector<int64_t> ends;
    if (at.pieces.empty()) {
      std::vector<int32_t> tokens(static_cast<size_t>(options_.context_length) + 1, kPadding);
      Read(at.table.get(), at.begin, tokens, ends);
      return PackRow(tokens, ends, options_.document_mask);
    }
    return PackPieces(at);
  }

  int64_t Area(int64_t index) const {
    const int64_t length = options_.context_length;
    if (!options_.document_mask) return CausalArea(length);
    const RowPlace at = Locate(index);
    int64_t area = 0;
    const auto add = [&](const Piece& piece) {
      ForDocuments(at.table.get(), piece.begin, piece.begin + piece.tokens,
                   [&](const DocumentPart& part) {
                     area += CausalArea(part.tokens) + CausalArea(part.padding);
                   });
    };
    for (const Piece& piece : at.pieces) add(piece);
    if (at.pieces.empty()) add({at.begin, length});
    return area;
  }

 private:
  // The order of the documents in one epoch and their places in its stream.
  struct Epoch {
    int64_t epoch;
    std::optional<KeyedPermutation> order;  // none: that of the file
    std::vector<int64_t> begins;            // of the k-th document, then the stream's end
    int64_t Document(int64_t k) const { return order ? (*order)[k] : k; }
  };
  // Rows that were packed together, in the order in which they are handed out.
  struct Stretch {
    int64_t epoch, number;
    std::vector<std::vector<Piece>> rows;
  };
  // Where a row's tokens are: in pieces, or from `begin` on.
  struct RowPlace {
    std::shared_ptr<const Epoch> table;  // none: places in the stream are those in the dataset
    int64_t begin = 0;
    std::span<const Piece> pieces;
    std::shared_ptr<const Stretch> stretch;  // owns the pieces
  };
  // The part of one document in a range of the stream, and the padding behind it in that range.
  struct DocumentPart {
    int64_t source;  // first token in the dataset
    int64_t begin;   // the same in the stream
    int64_t tokens, padding;
    bool ends;  // with its document
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

  // The pieces are read one by one, each with the token behind it, which may be its last label.
  Row PackPieces(const RowPlace& at) const {
    std::vector<int32_t> tokens, labels(static_cast<size_t>(options_.context_length), kNoLabel);
    std::vector<int64_t> ends;
    for (const Piece& piece : at.pieces) {
      std::vector<int32_t> part(static_cast<size_t>(piece.tokens) + 1, kPadding);
      std::vector<int64_t> part_ends;
      Read(at.table.get(), piece.begin, part, part_ends);
      const auto first = static_cast<int64_t>(tokens.size());
      for (const int64_t end : part_ends) {
        if (end < piece.tokens) ends.push_back(first + end);
      }
      const bool whole =
          std::find(part_ends.begin(), part_ends.end(), piece.tokens) != part_ends.end();
      tokens.insert(tokens.end(), part.begin(), part.end() - 1);
      ends.push_back(first + piece.tokens);
      if (!whole) labels[tokens.size() - 1] = part.back();
    }
    tokens.push_back(kPadding);
    Row row = PackRow(tokens, ends, /*document_mask=*/true);
    for (size_t i = 0; i < labels.size(); ++i) {
      if (labels[i] != kNoLabel) row.labels[i] = labels[i];
    }
    return row;
  }

  RowPlace Locate(int64_t index) const {
    const int64_t epoch = index / rows_;
    RowPlace at;
    // Without padding the places of documents in file order are those of the dataset.
    if (options_.shuffle || aligned()) at.table = TableOf(epoch);
    int64_t row = index % rows_;
    if (options_.balanced) {
      const int64_t stretches = Stretches();
      int64_t number = row * stretches / rows_;
      while (row < StretchBegin(number)) --number;
      while (row >= StretchBegin(number + 1)) ++number;
      at.stretch = StretchOf(at.table, number);
      at.pieces = at.stretch->rows[static_cast<size_t>(row - StretchBegin(number))];
      return at;
    }
    if (options_.shuffle) {
      row = KeyedPermutation(rows_, row_keys_.Bits(static_cast<uint64_t>(epoch)))[row];
    }
    at.begin = Offset(epoch) + row * options_.context_length;
    return at;
  }

  // Place of the epoch's first row in the stream. Shuffling documents alone would never reach the
  // last tokens of a single one.
  int64_t Offset(int64_t epoch) const {
    if (!options_.shuffle) return 0;
    return options_.alignment *
           static_cast<int64_t>(offset_keys_.Below(static_cast<uint64_t>(epoch),
                                                   static_cast<uint64_t>(spare_units_) + 1));
  }

  // Stretches of nearly equal numbers of rows, whole runs but for the last one.
  int64_t Stretches() const { return (rows_ + kStretchRows - 1) / kStretchRows; }
  int64_t StretchBegin(int64_t number) const {
    const int64_t stretches = Stretches();
    if (number == stretches) return rows_;
    return rows_ / kRunRows * number / stretches * kRunRows;
  }

  Stretch PackStretch(const Epoch& table, int64_t number) const {
    const int64_t first = StretchBegin(number), count = StretchBegin(number + 1) - first;
    const int64_t length = options_.context_length;
    const int64_t begin = Offset(table.epoch) + first * length;
    std::vector<Piece> pieces;
    ForDocuments(&table, begin, begin + count * length, [&](const DocumentPart& part) {
      pieces.push_back({part.begin, part.tokens + part.padding});
    });
    const std::vector<std::vector<Piece>> packed = PackEvenly(std::move(pieces), count, length);
    std::vector<int64_t> areas;
    for (const std::vector<Piece>& row : packed) {
      int64_t area = 0;
      for (const Piece& piece : row) area += CausalArea(piece.tokens);
      areas.push_back(area);
    }
    Stretch stretch{table.epoch, number, {}};
    const auto counter = static_cast<uint64_t>(table.epoch * Stretches() + number);
    for (const int64_t row : OrderInRuns(areas, kRunRows, stretch_keys_.Bits(counter))) {
      stretch.rows.push_back(packed[static_cast<size_t>(row)]);
    }
    return stretch;
  }

  std::shared_ptr<const Stretch> StretchOf(const std::shared_ptr<const Epoch>& table,
                                           int64_t number) const {
    const std::lock_guard lock(stretch_mutex_);
    for (auto& stretch : stretches_) {
      if (stretch && stretch->epoch == table->epoch && stretch->number == number) return stretch;
    }
    std::rotate(stretches_.begin(), stretches_.end() - 1, stretches_.end());  // the oldest goes
    stretches_[0] = std::make_shared<const Stretch>(PackStretch(*table, number));
    return stretches_[0];
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

  // Calls body(DocumentPart) for every document with a part in [begin, end) of the stream, in
  // order.
  template <class Body>
  void ForDocuments(const Epoch* table, int64_t begin, int64_t end, Body body) const {
    // The last document that begins at or before `begin`; empty documents cannot be the last such.
    int64_t low = 0, high = dataset_.num_documents();
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (StreamBegin(table, middle) <= begin ? low : high) = middle;
    }
    int64_t at = begin;
    for (int64_t k = low; at < end && k < dataset_.num_documents(); ++k) {
      const int64_t document = table ? table->Document(k) : k;
      const int64_t document_begin = StreamBegin(table, k), padding_end = StreamBegin(table, k + 1);
      if (padding_end <= at) continue;  // an empty document
      const int64_t document_end = document_begin + dataset_.DocumentLength(document);
      const int64_t tokens_end = std::clamp(document_end, at, end);
      body(DocumentPart{.source = dataset_.DocumentBegin(document) + (at - document_begin),
                        .begin = at,
                        .tokens = tokens_end - at,
                        .padding = std::min(padding_end, end) - tokens_end,
                        .ends = document_end <= end});
      at = padding_end;
    }
  }

  // Tokens of the stream from `begin` on into `tokens`, which are padding so far, and the borders
  // of documents and padding among them, as PackRow wants them.
  void Read(const Epoch* table, int64_t begin, std::span<int32_t> tokens,
            std::vector<int64_t>& ends) const {
    const int64_t end = begin + static_cast<int64_t>(tokens.size());
    ForDocuments(table, begin, end, [&](const DocumentPart& part) {
      const auto place =
          tokens.subspan(static_cast<size_t>(part.begin - begin), static_cast<size_t>(part.tokens));
      dataset_.Read(part.source, place);
      CheckIds(place);
      const int64_t tokens_end = part.begin - begin + part.tokens;
      if (part.ends && part.tokens > 0) ends.push_back(tokens_end);
      if (part.padding > 0) ends.push_back(tokens_end + part.padding);
    });
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
  Philox document_keys_, row_keys_, offset_keys_, stretch_keys_;
  int64_t rows_ = 0;
  int64_t spare_units_ = 0;   // of `alignment` tokens, that no row of an epoch takes
  mutable std::mutex mutex_;  // guards tables_
  mutable std::array<std::shared_ptr<const Epoch>, 2> tables_;
  mutable std::mutex stretch_mutex_;  // guards stretches_; taken without the other
  mutable std::array<std::shared_ptr<const Stretch>, 3> stretches_;
};

RowSampler::RowSampler(const RowSamplerOptions& options)
    : options_(Checked(options)), mixture_(Weights(options)) {
  for (size_t s = 0; s < options_.sources.size(); ++s) {
    streams_.push_back(std::make_unique<Stream>(options_, s));
  }
}

RowSampler::~RowSampler() = default;

RowSampler::Place RowSampler::Find(int64_t sample) const {
  if (options_.shuffle) {
    const Mixture::Place place = mixture_.Find(sample);
    return {streams_[static_cast<size_t>(place.source)].get(), place.index};
  }
  int64_t index = sample;
  for (const auto& stream : streams_) {
    if (index >= 0 && index < stream->rows()) return {stream.get(), index};
    index -= stream->rows();
  }
  throw InvalidArgument(
      Str("row ", sample, " does not exist: the datasets hold ", RowsAvailable(), " rows"));
}

Row RowSampler::Get(int64_t sample) const {
  const Place place = Find(sample);
  return place.stream->Get(place.index);
}

int64_t RowSampler::Area(int64_t sample) const {
  const Place place = Find(sample);
  return place.stream->Area(place.index);
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
