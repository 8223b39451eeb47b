#define LONGSPAN_ROW_SET avx512
#include "ops/elementwise/cpu/row_loops.h"

namespace longspan::ops::avx512 {

constinit const RowKernelSet kRowKernels = SetOf("avx512");

}  // namespace longspan::ops::avx512
