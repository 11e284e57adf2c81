// Recurrent layers: weights into panels, once for many calls.
#pragma once
#include "rnn_noise.h"

namespace handtuned::HANDTUNED_ISA {

// L rows of numbers become L vectors, one of each k: columns [k, k + L) of rows [row, row + L) that are below `rows`.
template <class A, class T>
HT_INLINE void load_columns(const T* matrix, int64_t pitch, int64_t rows, int64_t cols, vec<A>* column) {
  constexpr int L = kLanes<A>;
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) column[i] = i < rows && cols > 0 ? load_first(matrix + i * pitch, cols) : vec<A>{};
  transpose<A>(column);
}

// One panel of W [gates * out, in], row-major at `pitch`.
template <class E, class T>
__attribute__((noinline)) void pack_panel(const T* w, int64_t pitch, const PanelShape& m, int64_t panel, T* to) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  const int64_t step = m.vectors() * L;
  for (int64_t v = 0; v < m.unit_vectors(); ++v) {
    for (int64_t g = 0; g < m.gates; ++g) {
      const int64_t unit = (panel * m.unit_vectors() + v) * L;
      const T* rows = w + (g * m.out + unit) * pitch;
      T* column_to = to + (v * m.gates + g) * L * kPack<E>;
      for (int64_t k = 0; k < round_up(m.in, 2); k += L) {
        vec<A> column[L];
        load_columns<A>(rows + k, pitch, m.out - unit, m.in - k, column);
        for (int i = 0; i < L && k + i < round_up(m.in, 2); i += kPack<E>) {
          if constexpr (std::is_same_v<E, pair>) {
            const u32 pairs = narrow_pair(column[i], column[i + 1]);
            __builtin_memcpy(column_to + (k + i) * step, &pairs, sizeof pairs);
          } else {
            store(column_to + (k + i) * step, column[i]);
          }
        }
      }
    }
  }
}

template <class E, class T>
void rnn_pack_in(const RnnPack& p) {
  using A = Accumulate<E>;
  constexpr int L = kLanes<A>;
  const int64_t gates = gates_of(p.cell);
  char* packed = static_cast<char*>(p.packed_weights) + kRnnHeaderBytes;
  const void* const* weight = p.weights;
  for (int64_t i = 0; i < p.layers * p.directions; ++i) {
    const int64_t width = rnn_input_size(p, i / p.directions);
    const void* bias[2] = {p.bias ? weight[2] : nullptr, p.bias ? weight[3] : nullptr};
    auto pack = [&](const void* from, const PanelShape& m) {
      T* to = reinterpret_cast<T*>(packed);
      parallel_for(panels_of<A>(m), 1 + (32 << 10) / (1 + panel_numbers<A>(m)), [&](int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; ++panel)
          pack_panel<E>(static_cast<const T*>(from), m.in, m, panel, to + panel * panel_numbers<A>(m));
      });
      packed += rnn_matrix_bytes(p.dtype, m.gates, m.out, m.in);
    };
    pack(weight[0], {gates, p.hidden, width});
    if (p.weight_dropout.p > 0) {
      Scratch<T> dropped(rnn_weight_numbers(p));
      pack(drop_weights<A>(p, i, static_cast<const T*>(weight[1]), dropped.data), {gates, p.hidden, p.state});
    } else {
      pack(weight[1], {gates, p.hidden, p.state});
    }
    if (p.state != p.hidden) pack(weight[2 + 2 * p.bias], {1, p.state, p.hidden});
    // Of each unit and gate, in the order of the matrices' columns.
    auto pack_columns = [&](const void* numbers) {
      const PanelShape m{gates, p.hidden, 1};
      A* to = reinterpret_cast<A*>(packed);
      for (int64_t v = 0; v < panels_of<A>(m) * m.vectors(); ++v, to += L) {
        const int64_t unit = v / gates * L, n = p.hidden - unit;
        const T* from = static_cast<const T*>(numbers) + v % gates * p.hidden + unit;
        store(to, numbers && n > 0 ? load_first(from, n) : vec<A>{});
      }
      packed += rnn_bias_bytes(p) / 2;
    };
    auto pack_units = [&](const void* numbers) {
      A* to = reinterpret_cast<A*>(packed);
      __builtin_memset(to, 0, p.hidden * sizeof(A));
      if (numbers) copy_row<A, T>(to, static_cast<const T*>(numbers), p.hidden, nullptr);
      packed += rnn_peephole_pitch(p) * int64_t(sizeof(A));
    };
    for (const void* b : bias) pack_columns(p.layer_norm ? nullptr : b);
    const int64_t each = rnn_weights_each(p, p.bias);
    const void* const* gains = weight + each - rnn_gains_each(p, p.bias);
    for (int64_t k = 0; k < rnn_peepholes(p); ++k) pack_units(static_cast<const T*>(gains[-1]) + k * p.hidden);
    if (p.layer_norm) {
      pack_columns(gains[0]), pack_columns(gains[1]);
      if (has_cell_state(p.cell)) pack_units(gains[2]), pack_units(p.bias ? gains[3] : nullptr);
      for (const void* b : bias) pack_columns(b);
    }
    weight += each;
  }
}

}  // namespace handtuned::HANDTUNED_ISA
