// Every op's schema. A need_* that is false gives a gradient of shape [0].
//
// Norms: the last normalized_ndim dims of input are normalised together; stats is [2, rows] (mean, rstd),
// rstd is [rows]; both float32 (float64 for float64). An
// _inference op is the same without them, a tensor less to allocate.
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

  // query [B, H, Lq, D], or packed [T, H, D] with query_starts [B + 1]; output likewise with value's width; lse is
  // [B, H, Lq] or [H, T], float32 (float64 for float64). See attention.h for the maths and docs/attention.md for
  // shapes.
  m.def(
      "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? query_starts, Tensor? key_starts,"
      " Tensor? key_lengths, Tensor? block_table, Tensor? alibi_slopes, Tensor? sinks, float scale, bool bottom_right,"
      " int window_left, int window_right, float softcap, float dropout_p, Tensor? seed)"
      " -> (Tensor output, Tensor lse)");
  m.def(
      "attention_backward(Tensor grad_output, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor output,"
      " Tensor lse, Tensor? mask, Tensor? query_starts, Tensor? key_starts, Tensor? key_lengths, Tensor? alibi_slopes,"
      " Tensor? sinks, float scale, bool bottom_right, int window_left, int window_right, float softcap,"
      " float dropout_p, Tensor? seed, bool need_query, bool need_key, bool need_value, bool need_mask,"
      " bool need_sinks)"
      " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_mask, Tensor grad_sinks)");

  // output = dropout(activation(input weight^T + bias)) + residual; weight [N, K], input [*, K], residual [*, N].
  // activation: 0 none, 1 relu, 2 gelu, 3 gelu_tanh, 4 silu. preactivation is input weight^T + bias, of shape [0] where
  // there is no activation. packed: what linear_pack made of weight, [panels, steps, 64, 2 for bfloat16 else 1].
  m.def("linear_pack(Tensor weight) -> Tensor output");
  m.def(
      "linear(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, Tensor? packed, int activation,"
      " float dropout_p, Tensor? seed)"
      " -> (Tensor output, Tensor preactivation)");
  m.def(
      "linear_inference(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, Tensor? packed, int activation,"
      " float dropout_p, Tensor? seed)"
      " -> Tensor output");
  // bias serves derivatives of the backward alone. The gradient of residual is grad_output.
  m.def(
      "linear_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? bias, Tensor preactivation,"
      " int activation, float dropout_p, Tensor? seed, bool need_input, bool need_weight, bool need_bias)"
      " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  // The same with a weight of int8, scale [N] float32 each row's: W = scale q. packed: what linear_int8_pack made of q,
  // [panels, K / 4 rounded up and 1, 64, 4]. quantize_input: x is rounded to 8 bits too, with a range of its own for
  // each row. preactivation has shape [0] where there is no activation or need_preactivation is false.
  m.def("linear_int8_pack(Tensor weight) -> Tensor packed");
  m.def(
      "linear_int8(Tensor input, Tensor packed, Tensor scale, Tensor? bias, Tensor? residual, int activation,"
      " float dropout_p, Tensor? seed, bool quantize_input, bool need_preactivation)"
      " -> (Tensor output, Tensor preactivation)");

  // Cross-entropy of linear(input, linear_weight, linear_bias), which is never stored. input [*, K], linear_weight
  // [classes, K], target [*] int64, weight [classes]. reduction: 0 none, 1 mean, 2 sum. loss is [*] or one number;
  // stats is [2, rows], the largest logit and the sum of e^(logit - largest), 0 where target is ignore_index; both
  // float32 (float64 for float64). softcap 0: none. z_loss times the log-sum-exp's square is added to each loss.
  m.def(
      "linear_cross_entropy(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight,"
      " int reduction, int ignore_index, float label_smoothing, float softcap, float z_loss, int keep)"
      " -> (Tensor loss, Tensor stats, Tensor kept)");
  m.def(
      "linear_cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor linear_weight, Tensor? linear_bias,"
      " Tensor target, Tensor? weight, Tensor stats, Tensor kept, int reduction, int ignore_index, float "
      "label_smoothing,"
      " float softcap, float z_loss, bool need_input, bool need_linear_weight, bool need_linear_bias)"
      " -> (Tensor grad_input, Tensor grad_linear_weight, Tensor grad_linear_bias)");

  // Rotary positions. input [*, D]; cos, sin [.., R / 2], R <= D, broadcast to input's rows, of its dtype or float32
  // beside 16 bits. output like input, strides too. inverse: turned back, which is the gradient.
  m.def("rotary(Tensor input, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> Tensor output");
  // Writes key and value [B, Hk, Lnew, D] into caches [B, Hk, Lmax, D], or pages [P, Hk, page, D] beside block_table
  // [B, max_pages], behind the cache_lengths [B] keys that are there, key turned at its position by the rows of cos and
  // sin [positions, R / 2]. output is query [B, H, Lq, D] turned likewise (in_order: its rows stand at
  // consecutive positions, else all at the first), or [0] without tables. new_lengths int64 are those after it.
  m.def(
      "append_kv(Tensor query, Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache,"
      " Tensor cache_lengths, Tensor? block_table, Tensor? cos, Tensor? sin, bool interleaved, bool in_order)"
      " -> (Tensor output, Tensor new_lengths)");

  // One layer stack of LSTM, GRU or RNN over whole sequences. See rnn.h for the maths and docs/rnn.md for shapes.
  //   mode           "LSTM", "GRU", "RNN_TANH" or "RNN_RELU", as torch names them, then a space and a word for each
  //                  thing that differs, in this order: coupled (the LSTM's f = 1 - i: w_ih, w_hh and biases have rows
  //                  of i, g, o), peepholes, hardsigmoid, hardtanh, layernorm
  //   weights        of each layer and direction, in torch's order: w_ih, w_hh, then b_ih, b_hh if bias, then w_hr if
  //                  the state is projected (w_hh's columns are fewer than its rows per gate), then peepholes, those
  //                  of i, f, o (coupled: i, o) one after the other, then of layer norms the gains of W_ih x and of
  //                  W_hh h, [gates * hidden] each, and of the LSTM the gain [hidden] of its c' and, if bias, the bias
  //   rates          zoneout, cell_zoneout, recurrent_dropout, weight_dropout; None for zeros. Without a seed zoneout's
  //                  expectation is taken, and the others must be 0. rnn leaves weight_dropout to rnn_pack
  //   packed         what rnn_pack made of them: bytes in the layout of the instruction set in use, or of CUDA
  //   input          [T, B, I] at any strides, or packed [rows, I] beside lengths: step by step, as in PackedSequence
  //   lengths        [B] int64 on the CPU, in any order, 0 to T; beside packed input falling (as PackedSequence is
  //                  sorted)
  //   h0, c0         [layers * directions, B, R] and [.., H]; None for zeros. R is proj_size, or hidden_size if that
  //                  is 0
  //   output         [T, B, directions * R], rows of a batch together where they are in input; packed [rows, ..].
  //                  0 past a row's length
  //   hn, cn         like h0, c0; after each row's last step. cn is [0] for all but the LSTM
  //   cells          like output, of c [.., directions * H], the last layer's after each step, if need_cells, else [0]
  //   saved          [n] float32 (float64 for float64) for the backward if need_saved, else [0]
  //   grad_weights   [n] in the weights' dtype: the gradients one after the other, each contiguous
  m.def(
      "rnn_pack(Tensor[] weights, str mode, bool bidirectional, bool bias, float weight_dropout, Tensor? seed)"
      " -> Tensor packed");
  m.def(
      "rnn(Tensor input, Tensor? lengths, Tensor? h0, Tensor? c0, Tensor packed, str mode, int hidden_size,"
      " int proj_size, int num_layers, bool bidirectional, float dropout_p, float[]? rates, Tensor? seed,"
      " bool need_saved, bool need_cells)"
      " -> (Tensor output, Tensor hn, Tensor cn, Tensor cells, Tensor saved)");
  // The same where neither a gradient nor dropout is wanted; and one step of one layer, input [B, I], states [B, H]
  m.def(
      "rnn_inference(Tensor input, Tensor? lengths, Tensor? h0, Tensor? c0, Tensor packed, str mode, int hidden_size,"
      " int proj_size, int num_layers, bool bidirectional)"
      " -> (Tensor output, Tensor hn, Tensor cn)");
  m.def(
      "rnn_cell(Tensor input, Tensor? h0, Tensor? c0, Tensor packed, str mode, int hidden_size)"
      " -> (Tensor hn, Tensor cn)");
  m.def(
      "rnn_backward(Tensor? grad_output, Tensor? grad_hn, Tensor? grad_cn, Tensor? grad_cells, Tensor input,"
      " Tensor? lengths, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor saved, str mode, bool bidirectional,"
      " bool bias, float dropout_p, float[]? rates, Tensor? seed, bool need_input, bool need_h0, bool need_c0,"
      " bool need_weights)"
      " -> (Tensor grad_input, Tensor grad_h0, Tensor grad_c0, Tensor grad_weights)");
}
