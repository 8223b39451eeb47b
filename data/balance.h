#pragma once
#include <cstdint>
#include <span>
#include <vector>

namespace longspan::data {

// Even work among rows and replicas. Work is measured as causal area: the (query, key) pairs of one
// query head that a causal mask inside documents lets through. Everything here is a pure function
// of its arguments.

// Area of a document of n tokens: n (n + 1) / 2. n is at most 2^30, the longest row.
constexpr int64_t CausalArea(int64_t tokens) { return tokens * (tokens + 1) / 2; }

// Tokens [begin, begin + tokens) of a stream of documents, all of one document (with the padding
// behind it, if any).
struct Piece {
  int64_t begin = 0, tokens = 0;
  bool operator==(const Piece&) const = default;
};

// Spreads pieces over `rows` rows of exactly `length` tokens; together they must have as many. From
// the longest piece to the shortest, each goes to the row with the least area so far among those
// with room for it. Pieces are cut only where they must be: those longer than a row into whole rows
// from their beginning on, and one that fits nowhere where the row with most room ends. If all
// pieces are multiples of some number and so is `length`, then all parts are.
//
// Each row lists its pieces in the order of the stream. O(n log n) for n pieces while few rows that
// are nearly full have little area.
std::vector<std::vector<Piece>> PackEvenly(std::vector<Piece> pieces, int64_t rows, int64_t length);

// An order of rows in which neighbours are alike: sorted by area (equal ones at random), cut into
// runs of `run` rows, and the runs shuffled; what is left over comes last. Then rows that are
// worked on at the same time have nearly the same area, whatever their number up to `run`.
std::vector<int64_t> OrderInRuns(std::span<const int64_t> areas, int64_t run, uint64_t key);

// Deals the rows of a step to replicas: result[(m * replicas + r) * micro_batch_rows + i] is the
// i-th row that replica r works on in its m-th micro-batch. Every micro-batch takes the largest
// rows that are left, for all replicas together; of those each goes to the replica with the least
// area so far that has room for it. areas.size() must be a multiple of replicas * micro_batch_rows.
std::vector<int64_t> DealRows(std::span<const int64_t> areas, int64_t replicas,
                              int64_t micro_batch_rows);

}  // namespace longspan::data
