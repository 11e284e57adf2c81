// Every op's schema. The last normalized_ndim dims of input are normalised together; stats is [2, rows] (mean, rstd),
// rstd is [rows]; both float32 (float64 for float64). A _inference op is the same without
// them, a tensor less to allocate. A need_* that is false gives a gradient of shape [0].
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(handtuned, m) {
  m.def(
      "layer_norm(Tensor input, int normalized_ndim, Tensor? weight, Tensor? bias, float eps)"
      " -> (Tensor output, Tensor stats)");
  m.def(
      "layer_norm_inference(Tensor input, int normalized_ndim, Tensor? weight, Tensor? bias, float eps)"
      " -> Tensor output");
  m.def(
      "layer_norm_backward(Tensor grad_output, Tensor input, int normalized_ndim, Tensor stats, Tensor? weight,"
      " bool need_input, bool need_weight, bool need_bias)"
      " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "rms_norm(Tensor input, int normalized_ndim, Tensor? weight, float eps)"
      " -> (Tensor output, Tensor rstd)");
  m.def(
      "rms_norm_inference(Tensor input, int normalized_ndim, Tensor? weight, float eps)"
      " -> Tensor output");
  m.def(
      "rms_norm_backward(Tensor grad_output, Tensor input, int normalized_ndim, Tensor rstd, Tensor? weight,"
      " bool need_input, bool need_weight)"
      " -> (Tensor grad_input, Tensor grad_weight)");

  // new_residual = dropout(input) + residual, output = norm(new_residual). seed: one int64, needed if dropout_p > 0.
  // Without dropout grad_input equals grad_residual and has shape [0].
  m.def(
      "add_layer_norm(Tensor input, Tensor residual, int normalized_ndim, Tensor? weight, Tensor? bias, float eps,"
      " float dropout_p, Tensor? seed)"
      " -> (Tensor output, Tensor new_residual, Tensor stats)");
  m.def(
      "add_layer_norm_backward(Tensor grad_output, Tensor? grad_new_residual, Tensor new_residual,"
      " int normalized_ndim, Tensor stats, Tensor? weight, float dropout_p, Tensor? seed,"
      " bool need_input, bool need_residual, bool need_weight, bool need_bias)"
      " -> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "add_rms_norm(Tensor input, Tensor residual, int normalized_ndim, Tensor? weight, float eps, float dropout_p,"
      " Tensor? seed)"
      " -> (Tensor output, Tensor new_residual, Tensor rstd)");
  m.def(
      "add_rms_norm_backward(Tensor grad_output, Tensor? grad_new_residual, Tensor new_residual,"
      " int normalized_ndim, Tensor rstd, Tensor? weight, float dropout_p, Tensor? seed,"
      " bool need_input, bool need_residual, bool need_weight)"
      " -> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight)");
}
