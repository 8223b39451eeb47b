#define LONGSPAN_ROW_SET avx2
#include "ops/elementwise/cpu/row_loops.h"

namespace longspan::ops::avx2 {

constinit const RowKernelSet kRowKernels = SetOf("avx2");

}  // namespace longspan::ops::avx2
