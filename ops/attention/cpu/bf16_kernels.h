#pragma once
#include <stdint.h>

namespace longspan::ops {

// The inner loops of blocked attention on bf16 operands with f32 sums, once per instruction set.
// Plain structs and function pointers only: code compiled for a special instruction set includes no
// other header that code of the baseline shares. bf16 values are held as uint16_t.
//
// A block is 64 tokens. Its operands, `dim` padded with zeros to a multiple of 32:
//   rows     [64][ld]          a token a row
//   columns  [padded][64]      transposed
//   lanes    [padded / 2][64][2]  transposed, with two neighbours of the inner sum side by side:
//            64 output columns ("lanes") whose right-hand side a dot product instruction takes
// Results have 64 lanes: [rows][64] f32. All but rows start at 64 bytes.

// sum_t a[r * a_row + t] * b[t / 2][n][t % 2] over t < inner, for r < rows and n < 64 lanes.
struct Bf16Product {
  const uint16_t* a;
  const uint16_t* b;
  int inner;
};

// Rows of memory that are needed soon.
struct Bf16Ahead {
  const void* at = nullptr;
  int64_t stride = 0;  // bytes
  int bytes = 0;       // of a row
  int rows = 0;
};

// Asks for part `part` of `parts` of them. Inlined whatever it costs: a call of a function that
// only prefetches counts as one without effect and is dropped.
__attribute__((always_inline)) static inline void AskForRows(const Bf16Ahead& ahead, int part,
                                                             int parts) {
  const char* base = static_cast<const char*>(ahead.at);
  for (int r = ahead.rows * part / parts; r < ahead.rows * (part + 1) / parts; ++r) {
    for (int b = 0; b < ahead.bytes; b += 64) __builtin_prefetch(base + r * ahead.stride + b);
  }
}

// c[r][n] (+)= the sum of `count` products. a is 0 and b finite up to the next multiple of 32 of
// `inner`, and a and c have memory for the next multiple of 16 of `rows`: an implementation may
// compute those too. What is summed at once is read and written once. On the way it asks for
// `ahead`: asking for all of it at once would wait for memory.
struct Bf16Gemm {
  const Bf16Product* products;
  int count;
  int64_t a_row;
  float* c;
  int rows;
  bool add;
  Bf16Ahead ahead[2] = {};
};

// One step of the online softmax over `keys` rows of scores; lanes are queries. Probabilities
// exp2(scale * s - maximum) go to `p` in lanes form, 0 from row `keys` on. The running maximum, in
// units of log2, follows a lane's scores only when they exceed it by 2^kSlack: probabilities stay
// below 2^kSlack, and what was summed up seldom has to be rescaled. bits[key] masks the lanes,
// null: everything is visible. A lane that has seen nothing keeps maximum = -inf.
//
// `sum` adds the probabilities, for lse; `weight` adds them as rounded, for the mean of the values:
// weights then add up to 1, and a key that outweighs all others gives its value exactly.
struct Bf16Softmax {
  const float* s;
  uint16_t* p;
  int keys;
  float scale;  // includes log2(e)
  const uint64_t* bits;
  float* maximum;
  float* sum;
  float* weight;
  float* rescale;  // of earlier output, by lane
};
inline constexpr float kSlack = 8;

// The step of sigmoid attention: weights p = 1 / (1 + exp2(-scale * s - bias)), otherwise as above.
struct Bf16Sigmoid {
  const float* s;
  uint16_t* p;
  int keys;
  float scale, bias;  // include log2(e)
  const uint64_t* bits;
};

// p = exp2(scale * s - lse) and ds = p * (dp - delta), both in lanes form, 0 from row `rows` on.
// lse is in units of log2. With lanes = queries lse and delta are per lane and bits per row (key);
// with lanes = keys they are per row (query), p is wanted too, and ds also goes to `ds_rows`
// [64][64] as it is, unless that is null. Of sigmoid p = 1 / (1 + exp2(lse - scale * s)), where lse
// is minus the bias, and ds = p * (1 - p) * dp.
struct Bf16Gradient {
  const float* s;
  const float* dp;
  uint16_t* p;
  uint16_t* ds;
  uint16_t* ds_rows;
  int rows;
  float scale;
  const uint64_t* bits;
  const float* lse;
  const float* delta;
};

// to[t * stride + d] = (add: +=) scale[t] * from[d][t] for t < tokens, d < dim.
struct LaneStore {
  const float* from;
  const float* scale;
  int tokens, dim;
  int64_t stride;
};

__attribute__((always_inline)) static inline void AskFor(const Bf16Gemm& gemm, int part,
                                                         int parts) {
  AskForRows(gemm.ahead[0], part, parts);
  AskForRows(gemm.ahead[1], part, parts);
}

struct Bf16Kernels {
  // Around each task: set up and give back what `gemm` needs of the processor.
  void (*begin_task)();
  void (*end_task)();
  void (*gemm)(const Bf16Gemm& gemm);
  // Rows of any layout to padded rows with ld = padded; zeros past `dim` and past `tokens`.
  void (*copy_rows)(const uint16_t* from, int64_t stride, int tokens, int dim, int padded,
                    uint16_t* to);
  void (*round_rows)(const float* from, int64_t stride, int tokens, int dim, int padded,
                     uint16_t* to);
  // Complete rows to the other forms.
  void (*to_columns)(const uint16_t* rows, int64_t ld, int padded, uint16_t* to);
  void (*to_lanes)(const uint16_t* rows, int64_t ld, int padded, uint16_t* to);
  // Whether some lane's maximum moved, so that earlier output must be multiplied by `rescale`.
  bool (*softmax)(const Bf16Softmax& step);
  void (*gradient_by_query)(const Bf16Gradient& step);  // lanes = queries
  void (*gradient_by_key)(const Bf16Gradient& step);    // lanes = keys
  void (*sigmoid)(const Bf16Sigmoid& step);
  void (*sigmoid_gradient_by_key)(const Bf16Gradient& step);
  void (*scale_lanes)(float* c, int rows, const float* scale);
  void (*store_f32)(const LaneStore& store, float* to);
  void (*store_bf16)(const LaneStore& store, uint16_t* to);
  void (*add_f32)(const LaneStore& store, float* to);
};

namespace avx512_bf16 {
extern const Bf16Kernels kKernels;
}
// What AMX replaces of them: begin_task, end_task and gemm.
namespace amx {
void Configure();
void Release();
void Gemm(const Bf16Gemm& gemm);
}  // namespace amx

}  // namespace longspan::ops
