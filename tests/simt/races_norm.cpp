// Norms: short rows and rows of several warps, in registers and in shared memory; several chunks of rows.
#include "launchers.h"
#include "norm_plan.h"
#include "races.h"

namespace {

using namespace handtuned;

struct Shape {
  int64_t rows, cols;
  DType dtype;
  bool centre, add, dropout;
  bool sums;  // dweight and dbias, which take 256 threads for every 32 columns: ThreadSanitizer cannot have many
};

// Short rows and rows of several warps, in registers and in shared memory; several chunks of rows.
const Shape kShapes[] = {
    {21, 72, DType::f32, true, true, true, true},
    {18, 20, DType::f64, true, false, false, true},
    {3, 1100, DType::bf16, true, true, false, false},
    {2, 7000, DType::f64, false, false, true, false},
};

StridedRows rows_of(Buffer& buffer, const Shape& s) {
  StridedRows rows;
  rows.data = buffer.data();
  rows.ndim = 1;
  rows.size[0] = s.rows;
  rows.stride[0] = s.cols;
  return rows;
}

int norm(const Shape& s) {
  const int64_t tensor = s.rows * s.cols * bytes_of(s.dtype), row = s.cols * 8, column = s.rows * 8;
  const cuda::RowPlan plan = cuda::plan_backward(s.cols, s.dtype, s.dropout);
  Buffer x(tensor), residual(tensor), y(tensor), h(tensor), dy(tensor), dh(tensor), dx(tensor), dropped(tensor);
  Buffer weight(row), bias(row), dweight(row), dbias(row), mean(column), rstd(column);
  Buffer partials(cuda::chunks(s.rows, plan) * 2 * s.cols * 8);
  const uint64_t seed = 1234;
  const Dropout dropout = {s.dropout ? 0.3 : 0.0, 0, s.dropout ? &seed : nullptr};

  NormForward f = {};
  f.rows = s.rows, f.cols = s.cols, f.dtype = f.weight_dtype = s.dtype;
  f.centre = s.centre, f.eps = 1e-5, f.dropout = dropout;
  f.input = rows_of(x, s);
  if (s.add) f.residual = rows_of(residual, s), f.new_residual = h.data();
  f.weight = weight.data(), f.bias = bias.data(), f.output = y.data();
  f.mean = s.centre ? mean.data() : nullptr, f.rstd = rstd.data();
  if (int status = cuda::norm_forward(f, 0, nullptr)) return status;

  NormBackward b = {};
  b.rows = s.rows, b.cols = s.cols, b.dtype = b.weight_dtype = s.dtype;
  b.centre = s.centre, b.dropout = dropout;
  b.grad_output = rows_of(dy, s), b.input = s.add ? rows_of(h, s) : rows_of(x, s);
  if (s.add) b.grad_new_residual = rows_of(dh, s);
  b.weight = weight.data(), b.mean = f.mean, b.rstd = rstd.data();
  b.grad_normalised = dx.data(), b.grad_dropped = s.dropout ? dropped.data() : nullptr;
  if (s.sums) b.grad_weight = dweight.data(), b.grad_bias = dbias.data(), b.partials = partials.data();
  return cuda::norm_backward(b, 0, nullptr);
}

}  // namespace

int norms() {
  for (const Shape& s : kShapes)
    if (int status = norm(s)) return status;
  return 0;
}
