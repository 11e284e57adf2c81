// Recurrent layers, forward: a step of a task where rows are normalised.
#pragma once
#include "rnn_forward.h"

namespace handtuned::HANDTUNED_ISA {

// A step of all parts where rows are normalised.
template <class E, class T>
void ForwardTask<E, T>::step_normalised(int64_t s) {
  const int64_t n = active_at(p_, s);
  for (Slice& part : parts_) multiply_and_leave(part, s, n);
  parts_.meet();
  for (Slice& part : parts_) normalise_and_step(part, s, n);
  if (has_cell_state(p_.cell)) parts_.meet();
  for (Slice& part : parts_) {
    find_rows(part.direction, s, n);
    if (has_cell_state(p_.cell)) bend(part, n);
    give(part, s, n);
  }
}

template <class E, class T>
void ForwardTask<E, T>::multiply_and_leave(Slice& part, int64_t s, int64_t n) {
  const int64_t d = part.direction,
                rows = s % y_.stretch ? 0 : first_row(p_, least(s + y_.stretch, y_.steps)) - first_row(p_, s);
  const Broadcast<E> input = y_.steps == 1 ? take_input(d, 0, 1) : Broadcast<E>{};
  for (int64_t own = 0; own < part.panels(); ++own) {
    A *sums = part.s + own * p_.batch * columns_, *x = part.x + own * stretch_rows() * columns_;
    multiply_state(part, s, n, own, sums, input);
    leave_moments(y_.left_of(d, 1), gate_rows(), part.begin + own, sums, n, columns_);
    leave_moments(y_.left_of(d, 0), gate_rows(), part.begin + own, x, rows, columns_);
  }
}

template <class E, class T>
void ForwardTask<E, T>::normalise_and_step(Slice& part, int64_t s, int64_t n) {
  const int64_t d = part.direction, own = part.panels(), state = p_.batch * units();
  const int64_t start = s - s % y_.stretch, before = first_row(p_, s) - first_row(p_, start);
  A* normed = y_.normed[d];
  find_rows(d, s, n);
  draw_zoneout(part, s, n);
  if (s == start) join(part, 0, gate_rows(), first_row(p_, least(s + y_.stretch, y_.steps)) - first_row(p_, s));
  join(part, 1, gate_rows(), n);
  for (int which = 0; which < 2 && moments_to(part); ++which)
    keep_moment(p_, which, n, part.rstd[which] + (which ? 0 : before), normed, row_);
  const int64_t x_panel = stretch_rows() * columns_, s_panel = p_.batch * columns_;
  A* x = part.x + before * columns_;
  for (int64_t i = 0; i < own; ++i) {
    auto rows = [&](int which, A* v, int64_t from) {
      normalise_rows(p_, y_.wh, weights(d).gains, which, part.begin + i, v, n, part.mean[which] + from,
                     part.rstd[which] + from, normed, row_);
    };
    rows(0, x + i * x_panel, before);
    rows(1, part.s + i * s_panel, 0);
  }
  const bool cell = has_cell_state(p_.cell);
  y_.gates({p_, own, n, x, part.s, x_panel, s_panel, part.h, part.c, state, y_.keep[d], row_, weights(d).peepholes,
            cell ? Shares<A>{} : part.zone_h, part.zone_c, part.begin * units()});
  for (int64_t i = 0; i < own && cell; ++i)
    leave_moments(y_.left_of(d, 2), cells(), part.begin + i, part.s + i * s_panel + L, n, columns_);
}

template <class E, class T>
void ForwardTask<E, T>::join(Slice& part, int which, const SplitRow& m, int64_t rows) {
  join_moments(y_.left_of(part.direction, which), m, rows, part.mean[which], part.rstd[which]);
}

// h of own panels from o and c'.
template <class E, class T>
void ForwardTask<E, T>::bend(Slice& part, int64_t n) {
  const int64_t d = part.direction;
  join(part, 2, cells(), n);
  if (A* to = moments_to(part))
    keep_moment(p_, 2, n, part.mean[2], to, row_), keep_moment(p_, 3, n, part.rstd[2], to, row_);
  for (int64_t i = 0; i < part.panels(); ++i)
    bend_cells(p_, y_.wh, weights(d).gains, part.begin + i, part.s + i * p_.batch * columns_, n, part.mean[2],
               part.rstd[2], y_.projects() ? Shares<A>{} : part.zone_h, part.h + i * p_.batch * units());
}

}  // namespace handtuned::HANDTUNED_ISA
