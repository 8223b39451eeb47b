#pragma once
#include "parallel/comm/bootstrap.h"

namespace longspan::test {

// The job of this test process; mpi_main.cpp starts it before the tests and finishes it after them.
parallel::Bootstrap& Job();

}  // namespace longspan::test
