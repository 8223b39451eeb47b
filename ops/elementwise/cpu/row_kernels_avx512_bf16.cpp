#define LONGSPAN_ROW_SET avx512_bf16
#include "ops/elementwise/cpu/row_loops.h"

namespace longspan::ops::avx512_bf16 {

const RowKernelSet kRowKernels = {"avx512_bf16", TableOf<float>(), TableOf<BF16>()};

}  // namespace longspan::ops::avx512_bf16
