#define LONGSPAN_ROW_SET avx512
#include "ops/elementwise/cpu/row_loops.h"

namespace longspan::ops::avx512 {

const RowKernelSet kRowKernels = {"avx512", TableOf<float>(), TableOf<BF16>()};

}  // namespace longspan::ops::avx512
