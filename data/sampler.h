#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "data/mixture.h"
#include "data/packing.h"

namespace longspan::data {

struct Source {
  std::string prefix;  // of an indexed dataset
  double weight = 1;
};

struct RowSamplerOptions {
  std::vector<Source> sources;
  int64_t context_length = 0;  // L, tokens of a row
  uint64_t seed = 1;
  bool shuffle = true;  // false for validation
  bool document_mask = true;
  // Documents start on multiples of so many tokens of the row; 1: wherever the last one ends. More
  // than 1 needs document_mask, and context_length must be a multiple of it.
  int64_t alignment = 1;
  // Spreads documents over rows so that rows have nearly the same work. Needs shuffle and
  // document_mask.
  bool balanced = false;
  int64_t vocab_size = 0;  // model.vocab_size: larger ids are an error; 0: not checked
};

// Maps a global sample index to a training row: a pure function of (options, datasets, index), so
// the order does not depend on ranks, and a resumed run asks for its next index without replaying.
//
// Stream   An epoch of a source is all its documents one after another, shuffled by (seed, source,
//          epoch). Row r takes the L + 1 tokens from a + r L on, so consecutive rows share one
//          token and floor((tokens - 1) / L) rows fit. Fewer than L tokens do not; the first row's
//          place a, from 0 to their number and a function of (seed, source, epoch) too, decides
//          which ones at either end of the stream are left out, other ones in each epoch. The rows
//          are then shuffled. Epochs go on without end. How a row is labelled: PackRow.
// Aligned  With an alignment A > 1 padding follows each document of the stream up to the next
//          multiple of A, and a is a multiple of A too, so every document starts on one, in its row
//          as well. No row needs a token behind its last one, for what ends at the stream's end
//          ends there: floor(padded tokens / L) rows fit, and those left out are fewer than L
//          padded tokens. PackRow says what padding is: part of the row, seen by nobody.
// Balanced  An epoch has the same tokens in as many rows, but in other ones. It is cut into
//          stretches of about 512 rows at most. Each is taken apart into its documents (and the
//          parts of documents that its ends cut off), which PackEvenly puts into rows anew, cutting
//          few of them. A part that is cut off is a document of its own, as everywhere, and keeps
//          the label of its last token wherever in the row it lies. OrderInRuns then orders the
//          rows of the stretch, eight alike one after another.
// Mixture  Sample i belongs to the source, and is its n-th sample, that Mixture::Find(i) says.
// Unshuffled  Documents and rows stay in order from a = 0 on, the sources follow one another, and
//          there is one pass: sample RowsAvailable() is an InvalidArgument. Unequal weights are
//          refused.
// Cost     Get reads L + 1 tokens after a binary search. The first row of an epoch builds a table
//          of 8 bytes a document (also one of an unshuffled source when aligned); the tables of two
//          epochs a source are kept. Balanced: the first row of a stretch packs all of it, 16 bytes
//          a document; three stretches a source are kept.
// Errors   the constructor: DataError for a bad dataset (IndexedDataset) or one with fewer than
//          L + 1 tokens (aligned: L with padding), InvalidArgument naming the option
// Threads  every const function may be called from several threads
class RowSampler {
 public:
  explicit RowSampler(const RowSamplerOptions& options);
  ~RowSampler();

  // DataError naming the file and the id if the row holds an id outside the vocabulary.
  Row Get(int64_t sample) const;

  // What a causal mask inside documents lets a query head see in that row (balance.h), without
  // reading tokens.
  int64_t Area(int64_t sample) const;

  // Rows of one pass over every source.
  int64_t RowsAvailable() const;
  int64_t TokensAvailable() const;  // in all sources
  // Largest token id in any source: from the sidecars, or by reading all tokens (then a DataError
  // for a negative one).
  int64_t MaxTokenId() const;
  // Changes when a source's content, the order of the sources or a weight changes; not with paths.
  uint64_t Fingerprint() const;

 private:
  class Stream;
  struct Place {
    const Stream* stream;
    int64_t index;  // of the stream's rows over all epochs
  };
  Place Find(int64_t sample) const;

  RowSamplerOptions options_;
  Mixture mixture_;
  std::vector<std::unique_ptr<Stream>> streams_;
};

}  // namespace longspan::data
