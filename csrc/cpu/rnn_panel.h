// Recurrent layers, what all of them stand on: matrices in panels, and products with them.
//
// A panel is a matrix's columns for one to four vectors of outputs, of which all gates lie side by side at each step k
// of the summed width:
//   LSTM  4 gates x 1 vector of hidden units,  GRU  3 x 1,  one gate (RNN, projections, the backward's)  1 x 4
// so that a block of rows keeps a panel's sums in registers over all of k, and the weights are read in one stream.
//   panel[k][unit vector][gate][lane],  of `pair` also [two neighbours along k]
#pragma once
#include "../rnn.h"
#include "math.h"  // before the cells, which call it

#include "../gates.h"

#include "gemm.h"
#include "parallel.h"
#include "philox.h"
#include "scratch.h"

namespace handtuned::HANDTUNED_ISA {

// Element type E of the products' operands: float or double, or pair for bf16 where the ISA multiplies pairs. A row of
// operands is stored as numbers of type Operand, an even count of them.
template <class E>
struct OperandOf {
  using type = E;
};
template <>
struct OperandOf<pair> {
  using type = bf16;
};
template <class E>
using Operand = typename OperandOf<E>::type;
// Numbers in whole elements.
template <class E>
HT_INLINE int64_t whole(int64_t numbers) {
  return round_up(numbers, kPack<E>);
}
// A vector of elements from one of numbers, or from two neighbours along what is summed.
template <class E>
HT_INLINE void store_elements(E* to, vec<Accumulate<E>> first, vec<Accumulate<E>> second) {
  if constexpr (std::is_same_v<E, pair>) {
    const u32 pairs = narrow_pair(first, second);
    __builtin_memcpy(to, &pairs, sizeof pairs);
  } else {
    store(to, first);
  }
}

// Of one matrix [gates * out, in].
struct PanelShape {
  int64_t gates, out, in;
  int64_t unit_vectors() const { return gates == 1 ? 4 : 1; }
  int64_t vectors() const { return gates * unit_vectors(); }
};

template <class A>
HT_INLINE int64_t units_of(const PanelShape& m) {
  return m.unit_vectors() * kLanes<A>;
}
template <class A>
HT_INLINE int64_t panels_of(const PanelShape& m) {
  return (m.out + units_of<A>(m) - 1) / units_of<A>(m);
}
template <class A>
HT_INLINE int64_t panel_numbers(const PanelShape& m) {
  return round_up(m.in, 2) * m.vectors() * kLanes<A>;
}

// ---- products ---------------------------------------------------------------------------------------------------

// What a product reads the weights of a tensor of T as.
template <class E, class T>
using Weight = std::conditional_t<std::is_same_v<E, pair>, pair, T>;

// C[v] = base[v] + sum_k b[k] * panel[k][v] of one row. It waits for the loads of the panel; chains of sums for kChains
// neighbours along k keep up with them, as many as registers hold. Lines are asked for kAhead bytes before: a core's
// own look-ahead reads a cache that is shared at four fifths of the speed.
template <class E, int MV, class W>
__attribute__((noinline)) void multiply_row(const E* b, const W* panel, int64_t depth, Accumulate<E>* c,
                                            const Accumulate<E>* base) {
  using A = Accumulate<E>;
  constexpr int L = kLanes<A>, Step = MV * L, kAhead = 2048, kChains = kVectorBytes == 64 ? 4 : 2;
  vec<A> sum[kChains][MV];
#pragma GCC unroll 4
  for (int j = 0; j < kChains; ++j)
#pragma GCC unroll 4
    for (int v = 0; v < MV; ++v) sum[j][v] = vec<A>{};
  int64_t k = 0;
  for (; k + kChains <= depth; k += kChains, panel += kChains * Step) {
#pragma GCC unroll 16
    for (int at = 0; at < int(kChains * Step * sizeof(W)); at += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(panel) + kAhead + at);
#pragma GCC unroll 4
    for (int j = 0; j < kChains; ++j) {
      const vec<E> element = broadcast(b[k + j]);
#pragma GCC unroll 4
      for (int v = 0; v < MV; ++v) sum[j][v] = multiply_add(element, load(panel + j * Step + v * L), sum[j][v]);
    }
  }
  for (; k < depth; ++k, panel += Step)
#pragma GCC unroll 4
    for (int v = 0; v < MV; ++v) sum[0][v] = multiply_add(vec<E>(broadcast(b[k])), load(panel + v * L), sum[0][v]);
#pragma GCC unroll 4
  for (int v = 0; v < MV; ++v) {
    vec<A> all = sum[0][v] + sum[1][v];
    if constexpr (kChains == 4) all += sum[2][v] + sum[3][v];
    store(c + v * L, load(base + v * L) + all);
  }
}

// All rows with a part of a panel that stays in the nearest caches, in blocks of rows as equal as can be.
template <class E, int MV, class W>
inline void multiply_rows_of_panel(int64_t rows, Broadcast<E> b, const W* panel, int64_t depth, Accumulate<E>* c,
                                   const Accumulate<E>* base, int64_t base_row) {
  constexpr int64_t kStep = MV * kLanes<Accumulate<E>>, kDepth = 128, kRows = kBlockRows<MV>;
  if (rows == 1) return multiply_row<E, MV>(b.data, panel, depth, c, base);
  const int64_t blocks = (rows + kRows - 1) / kRows;
  for (int64_t k = 0; k == 0 || k < depth; k += kDepth, base = c, base_row = kStep) {
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t from = rows * block / blocks, to = rows * (block + 1) / blocks;
      const Broadcast<E> part{b.data + from * b.row + k * b.step, b.row, b.step};
      multiply_rows_onto<E, MV>(to - from, part, panel + k * kStep, kStep, least(kDepth, depth - k), c + from * kStep,
                                kStep, base + from * base_row, base_row);
    }
  }
}

// A base of one row: zeros.
template <class A>
inline constexpr A kZeros[4 * kLanes<A>] = {};

// C[rows][vectors * L] = base + B[rows][depth] * panel, base with its rows base_row apart
template <class E, class W>
inline void multiply_panel(int64_t rows, Broadcast<E> b, const W* panel, int64_t vectors, int64_t depth,
                           Accumulate<E>* c, const Accumulate<E>* base, int64_t base_row) {
  if (vectors == 3) return multiply_rows_of_panel<E, 3>(rows, b, panel, depth, c, base, base_row);
  multiply_rows_of_panel<E, 4>(rows, b, panel, depth, c, base, base_row);
}

// ---- rows -------------------------------------------------------------------------------------------------------

// A row of operands from numbers of another type, times `factor` unless that is nullptr.
template <class O, class S>
HT_INLINE void copy_row(O* to, const S* from, int64_t width, const Accumulate<S>* factor) {
  using A = Accumulate<S>;
  constexpr int L = kLanes<A>;
  for (int64_t k = 0; k < width; k += L) {
    const vec<A> v = load_first(from + k, width - k);
    store_first(to + k, factor ? v * load_first(factor + k, width - k) : v, width - k);
  }
}

template <class A>
HT_INLINE void fill_row(A* to, const A* from, int64_t n) {  // n in whole vectors
  for (int64_t i = 0; i < n; i += kLanes<A>) store(to + i, load(from + i));
}

// ---- where rows are ---------------------------------------------------------------------------------------------

HT_INLINE int64_t length_of(const Rnn& p, int64_t place) { return p.lengths ? p.lengths[place] : p.steps; }
HT_INLINE int64_t active_at(const Rnn& p, int64_t step) { return p.active ? p.active[step] : p.batch; }
HT_INLINE int64_t first_row(const Rnn& p, int64_t time) { return p.first ? p.first[time] : time * p.batch; }
HT_INLINE int64_t caller_of(const Rnn& p, int64_t place) { return p.order ? p.order[place] : place; }
// When a direction takes the time that is its `step`.
HT_INLINE int64_t time_of(const Rnn& p, int64_t direction, int64_t step, int64_t place) {
  return direction ? length_of(p, place) - 1 - step : step;
}
HT_INLINE int64_t row_of(const Rnn& p, int64_t direction, int64_t step, int64_t place) {
  return first_row(p, time_of(p, direction, step, place)) + place;
}
// Of a tensor of the caller.
template <class T>
HT_INLINE T* caller_row(const Rnn& p, const RnnTensor& t, int64_t time, int64_t place) {
  T* data = static_cast<T*>(t.data);
  return data + (p.packed ? (first_row(p, time) + place) * t.batch : time * t.step + caller_of(p, place) * t.batch);
}
// Zeros in the rows, `width` numbers each, of a tensor of the caller that lie past a place's length.
template <class T>
void clear_padding(const Rnn& p, const RnnTensor& t, int64_t width) {
  if (p.packed || !p.lengths || !t.data) return;
  parallel_for(p.batch, 1 + (64 << 10) / (1 + p.steps * width), [&](int64_t begin, int64_t end) {
    for (int64_t place = begin; place < end; ++place)
      for (int64_t time = length_of(p, place); time < p.steps; ++time)
        __builtin_memset(caller_row<T>(p, t, time, place), 0, width * sizeof(T));
  });
}

// Where saved has a layer's parts.
template <class A>
struct SavedLayer {
  A *output, *keep[2], *normed[2];
};
template <class A, class S>
HT_INLINE SavedLayer<A> saved_layer(const Rnn& p, S* saved, int64_t layer) {
  A* at = const_cast<A*>(static_cast<const A*>(saved)) + layer * rnn_saved_of_layer(p);
  A* keep = at + p.rows * p.directions * p.state;
  A* normed = keep + p.rows * p.directions * rnn_kept(p) * p.hidden;
  return {at, {keep, keep + p.rows * rnn_kept(p) * p.hidden}, {normed, normed + p.rows * rnn_normed(p)}};
}

}  // namespace handtuned::HANDTUNED_ISA
