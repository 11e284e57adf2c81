// Recurrent layers, backward: what a task does more where rows are normalised.
#pragma once
#include "rnn_backward.h"

namespace handtuned::HANDTUNED_ISA {

// What a part with normalised rows has besides.
template <class E, class T>
int64_t BackwardTask<E, T>::normed_bytes(int64_t own) const {
  using N = NormedBack<A>;
  const int64_t each = Arena::bytes_of<A>(own * p_.batch * W);
  return p_.layer_norm
             ? Arena::bytes_of<A>(own * N::numbers_of_gains(p_)) + Arena::bytes_of<A>(own * N::numbers_of_sums(p_)) +
                   Arena::bytes_of<A>(p_.batch * 4 * own * W) + 4 * each
             : 0;
}

template <class E, class T>
void BackwardTask<E, T>::take_normed(Slice& part) {
  using N = NormedBack<A>;
  const int64_t own = part.panels(), d = part.direction, gates = gates_of(p_.cell);
  N& to = part.normed;
  to.gains = arena_.template take<A>(own * N::numbers_of_gains(p_));
  to.sums = arena_.template take<A>(own * N::numbers_of_sums(p_));
  to.d = arena_.template take<A>(p_.batch * 4 * own * W);
  to.cell = arena_.template take<A>(own * p_.batch * W);
  to.bent = arena_.template take<A>(own * p_.batch * W);
  to.gradient = arena_.template take<A>(own * p_.batch * W);
  part.m = arena_.template take<A>(own * p_.batch * W);
  __builtin_memset(to.sums, 0, own * N::numbers_of_sums(p_) * sizeof(A));
  __builtin_memset(to.d, 0, p_.batch * 4 * own * W * sizeof(A));  // units past the last stay 0
  const bool cell = has_cell_state(p_.cell);
  for (int64_t i = part.begin; i < part.end; ++i)
    for (int64_t k = 0; k < 2 * gates + 2; ++k) {
      const int64_t which = k < 2 * gates ? k / gates : k - 2 * gates + 2;
      const bool given = which < 2 || (cell && which < 3 + p_.bias);
      const T* from = given ? static_cast<const T*>(y_.gains[d][which]) : nullptr;
      A* row = to.gains + ((i - part.begin) * (2 * gates + 2) + k) * W;
      for (int v = 0; v < 4; ++v) store(row + v * L, vec<A>{});
      each_vector(i, p_.hidden, [&](int64_t v, int64_t unit, int64_t n) {
        if (from) store(row + v * L, load_first(from + (which < 2 ? k % gates * p_.hidden : 0) + unit, n));
      });
    }
}

// The sums of own panels, as gradients of the weights that they are of.
template <class E, class T>
void BackwardTask<E, T>::give_sums(const Slice& part) {
  const int64_t gates = gates_of(p_.cell), kinds = NormedBack<A>::kinds(p_), d = part.direction;
  const int64_t gains = rnn_weights_each(p_, p_.bias) - rnn_gains_each(p_, p_.bias);
  auto give = [&](int64_t weight, int64_t from, int64_t count) {
    for (int64_t i = part.begin; i < part.end; ++i)
      for (int64_t k = 0; k < count; ++k)
        each_vector(i, p_.hidden, [&](int64_t v, int64_t unit, int64_t n) {
          const A* sum = part.normed.sums + ((2 * (i - part.begin) + 1) * kinds + from + k) * W + v * L;
          store_first(static_cast<T*>(y_.grads[d][weight]) + k * p_.hidden + unit, load(sum), n);
        });
  };
  for (int64_t which = 0; which < 2; ++which) {
    give(gains + which, which * gates, gates);
    if (p_.bias) give(2 + which, (2 + which) * gates, gates);
    if (has_cell_state(p_.cell) && (which == 0 || p_.bias)) give(gains + 2 + which, 4 * gates + which, 1);
  }
  if (p_.peepholes) give(gains - 1, 4 * gates + 2, rnn_peepholes(p_));
}

// A step of all parts where rows are normalised.
template <class E, class T>
void BackwardTask<E, T>::step_normalised(int64_t s) {
  const int64_t n = active_at(p_, s);
  for (Slice& part : parts_) begin_normalised(part, s, n);
  if (has_cell_state(p_.cell)) parts_.meet();
  for (Slice& part : parts_) back_normalised(part, s, n);
  parts_.meet();
  for (Slice& part : parts_) give_normalised(part, s, n);
}

template <class E, class T>
void BackwardTask<E, T>::begin_normalised(Slice& part, int64_t s, int64_t n) {
  const int64_t d = part.direction;
  find_rows(part, s, n);
  for (int64_t i = part.begin; i < part.end; ++i) {
    const BackCall<A, A> call = call_of<A>(part, n, i, gradient_of_h(part, n, i, room_of(part, i)));
    for (int64_t place = 0; place < n; ++place) take_state(d, s, place, i);
    if (has_cell_state(p_.cell))
      with_cell_state<A>(p_.cell, [&](auto cell) {
        unbend_panel<decltype(cell)>(call, part.normed, i - part.begin, y_.normed[d], y_.left_of(d, true), i);
      });
  }
}

template <class E, class T>
void BackwardTask<E, T>::back_normalised(Slice& part, int64_t s, int64_t n) {
  const int64_t d = part.direction, panels = part.panels();
  const NormedBack<A>& normed = part.normed;
  find_rows(part, s, n);
  for (int k = 0; k < 2 && has_cell_state(p_.cell); ++k) join_sums(y_.left_of(d, true), k, p_.hidden, n, means_[k]);
  for (int64_t i = part.begin; i < part.end; ++i) {
    const int64_t own = i - part.begin, at = own * p_.batch * W;
    BackCall<A, A> call = call_of<A>(part, n, i, y_.projects() ? room_of(part, i) : part.dh + at);
    if (has_cell_state(p_.cell)) {
      gradient_of_cells(p_, normed, own, n, y_.normed[d], row_, means_[0], means_[1]);
      call.bent = normed.bent + at, call.unbent = normed.gradient + at;
    }
    call.gates = normed.d - part.begin * W, call.to = place_, call.pitch = panels * W;
    go_back(part, s, i, y_.normed_back, call);
    with_cell<A>(p_.cell, [&](auto cell) {
      leave_gradients<decltype(cell)>(p_, normed, own, panels, n, y_.normed[d], row_, state_, y_.left_of(d, false), i);
    });
  }
  if (s % most(1, 32 / n) == 0) flush_sums(p_, normed, panels);  // of 32 rows
}

template <class E, class T>
void BackwardTask<E, T>::give_normalised(Slice& part, int64_t s, int64_t n) {
  const int64_t d = part.direction;
  find_rows(part, s, n);
  for (int k = 0; k < 4; ++k) join_sums(y_.left_of(d, false), k, gates_of(p_.cell) * p_.hidden, n, means_[k]);
  for (int64_t i = part.begin; i < part.end; ++i) {
    with_cell<A>(p_.cell, [&](auto cell) {
      gradients_of_rows<decltype(cell)>(p_, part.normed, i - part.begin, part.panels(), n, y_.normed[d], row_, means_,
                                        i, y_.gates[d], y_.pitch());
    });
    for (int64_t place = 0; place < n && y_.scatters(d); ++place) bring_together(d, s, place, i);
  }
}

}  // namespace handtuned::HANDTUNED_ISA
