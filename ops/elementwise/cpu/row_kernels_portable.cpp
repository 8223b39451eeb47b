#define LONGSPAN_ROW_SET portable
#include "ops/elementwise/cpu/row_loops.h"

namespace longspan::ops::portable {

const RowKernelSet kRowKernels = {"portable", TableOf<float>(), TableOf<BF16>()};
const RowKernels<double> kRowKernelsF64 = TableOf<double>();

}  // namespace longspan::ops::portable
