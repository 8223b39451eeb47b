#pragma once

// Marks functions that host and device compile alike, so that a test on the host covers the formula
// that a kernel uses. Plain C++ elsewhere.
#ifdef __CUDACC__
#define LONGSPAN_HD __host__ __device__
#else
#define LONGSPAN_HD
#endif
