#define LONGSPAN_ROW_SET portable
#include "ops/elementwise/cpu/row_loops.h"

namespace longspan::ops::portable {

constinit const RowKernelSet kRowKernels = SetOf("portable");
constinit const RowKernels<double> kRowKernelsF64 = TableOf<double, false>();

}  // namespace longspan::ops::portable
