// Recurrent layers: what a task serves of a layer, and what forward and backward have in common of both.
#pragma once
#include "rnn_normalise.h"
#include "rnn_team.h"

namespace handtuned::HANDTUNED_ISA {

// What all slices know of a layer; Params: RnnForward or RnnBackward.
template <class A, class Params>
struct LayerOf {
  const Params& p;
  int64_t layer = 0;
  int64_t steps = 0;         // in which some row runs
  const A* masks = nullptr;  // [direction][batch][pitch] on h for W_h, nullptr: none

  bool projects() const { return p.state != p.hidden; }
  const A* mask(int64_t direction, int64_t place) const {
    return masks ? masks + (direction * p.batch + place) * rnn_mask_pitch(p) : nullptr;
  }
};

// The panels of a slice that lie in one direction: of the hidden units, of the projection, and of the state, which are
// the projection's where there is one.
struct Part {
  int64_t direction, begin, end, r_begin, r_end, state_begin, state_end;

  int64_t panels() const { return end - begin; }
  int64_t state_panels() const { return state_end - state_begin; }
};

// The parts P (a Part and what belongs to it) that a task serves, in phases between which it may wait for others.
template <class P>
class Parts {
 public:
  // r_panels: of the projection, 0: there is none.
  Parts(Team& team, int64_t directions, int64_t panels, int64_t r_panels) : team_(team) {
    int64_t first = directions - 1, last = 0;
    for (int i = 0; i < team.count(); ++i)
      for (int64_t d = 0; d < directions; ++d) {
        const Part part = part_of(team.slice(i), team.slices(), directions, d, panels, r_panels);
        if (part.begin == part.end && part.r_begin == part.r_end) continue;
        static_cast<Part&>(parts_[count_++]) = part;
        first = least(first, d), last = most(last, d);
      }
    others_ = {int(team.slices() * first / directions),
               int((team.slices() * (last + 1) + directions - 1) / directions)};
  }

  P* begin() { return parts_; }
  P* end() { return parts_ + count_; }
  const P* begin() const { return parts_; }
  const P* end() const { return parts_ + count_; }

  void finish_phase() { team_.finish_phase(); }
  // For the slices that may have a part in one of the directions of these, which a task claimed in any order.
  void wait() const { team_.wait(others_); }
  void meet() {
    finish_phase();
    wait();
  }

 private:
  // Of slice s of `slices`: the directions' panels, one after the other, are cut in equal shares.
  static Part part_of(int s, int slices, int64_t directions, int64_t d, int64_t panels, int64_t r_panels) {
    auto share = [&](int64_t n, int64_t end) { return most(0, least(n, directions * n * (s + end) / slices - d * n)); };
    const int64_t begin = share(panels, 0), end = share(panels, 1);
    const int64_t r_begin = share(r_panels, 0), r_end = share(r_panels, 1);
    return {d, begin, end, r_begin, r_end, r_panels ? r_begin : begin, r_panels ? r_end : end};
  }

  Team& team_;
  Others others_;
  int count_ = 0;
  P parts_[2 * kMostSlices];
};

}  // namespace handtuned::HANDTUNED_ISA
