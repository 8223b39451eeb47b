#pragma once
#include "ops/core/context.h"
#include "ops/core/tensor.h"

// CUDA halves of elementwise.h: operands have been checked, outputs allocated on ctx's GPU.
namespace longspan::ops::internal {

void AddIntoCuda(Context& ctx, Tensor& dst, const Tensor& src);
Tensor AddCuda(Context& ctx, const Tensor& a, const Tensor& b, Tensor sum);
void ScaleCuda(Context& ctx, Tensor& t, double factor);
void ClampCuda(Context& ctx, Tensor& t, double low, double high);
void FillCuda(Context& ctx, Tensor& t, double value);
void CastIntoCuda(Context& ctx, const Tensor& src, Tensor& dst);
void AddRowsIntoCuda(Context& ctx, Tensor& dst, const Tensor& rows);

}  // namespace longspan::ops::internal
