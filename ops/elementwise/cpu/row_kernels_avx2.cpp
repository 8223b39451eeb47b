#define LONGSPAN_ROW_SET avx2
#include "ops/elementwise/cpu/row_loops.h"

namespace longspan::ops::avx2 {

const RowKernelSet kRowKernels = {"avx2", TableOf<float>(), TableOf<BF16>()};

}  // namespace longspan::ops::avx2
