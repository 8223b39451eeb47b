#define LONGSPAN_ROW_SET avx512_bf16
#include "ops/elementwise/cpu/row_loops.h"

namespace longspan::ops::avx512_bf16 {

constinit const RowKernelSet kRowKernels = SetOf("avx512_bf16");

}  // namespace longspan::ops::avx512_bf16
