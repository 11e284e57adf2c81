// Recurrent layers: who works on what, and how they wait for each other.
//
// A layer's panels, of both directions, are cut into slices, one for each thread wanted. A slice is owned by one task
// for all steps, so its weights stay in that core's cache, and tells by its flag how many phases it has finished. What
// a phase computes depends on the shapes alone, so the number of slices is free.
//
// The flags belong to slices, not to threads. torch's pool may give fewer threads than asked for, run tasks one after
// the other (in nested parallel regions), or keep some waiting behind another region's. So a task claims its slices,
// waits a moment until all are claimed, and then claims the rest itself: from there on every slice is served by a task
// that runs, and nobody can wait for one that does not. A task that comes too late finds nothing to do.
#pragma once
#include <sched.h>

#include "rnn_noise.h"

namespace handtuned::HANDTUNED_ISA {

inline constexpr int kMostSlices = 64;

struct alignas(64) Flag {  // two lines, since cores fetch them in pairs; scratch is aligned to one
  int64_t phases, claimed, apart[14];
};

// Until ready(): a short spin, since a step takes microseconds, then the core is offered to others.
template <class Ready>
HT_INLINE void wait_until(Ready ready) {
  for (int spins = 0; !ready();) {
    if (++spins < 100)
      relax();
    else
      sched_yield();
  }
}

struct Others {  // slices [begin, end)
  int begin, end;
};

// The slices that one task owns.
class Team {
 public:
  Team(Flag* flags, int slices) : flags_(flags), slices_(slices) {}

  // Owns slice s if nobody else does.
  void claim(int s) {
    if (!__atomic_exchange_n(&flags_[s].claimed, 1, __ATOMIC_RELAXED)) mine_[count_++] = s;
  }
  // Owns [begin, end) as far as nobody else does, and everything that is left once others have had time to come.
  void claim(int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) claim(int(s));
    constexpr int kPatience = 2000;
    for (int tries = 0; tries < kPatience && !all_claimed(); ++tries) tries < 100 ? relax() : void(sched_yield());
    for (int s = 0; s < slices_; ++s) claim(s);
  }

  int count() const { return count_; }
  int slice(int i) const { return mine_[i]; }
  int slices() const { return slices_; }

  void finish_phase() {
    ++phase_;
    for (int i = 0; i < count_; ++i) __atomic_store_n(&flags_[mine_[i]].phases, phase_, __ATOMIC_RELEASE);
  }
  // Until those slices have finished all phases that this task has.
  void wait(Others others) const {
    if (count_ == slices_) return;
    for (int s = others.begin; s < others.end; ++s)
      wait_until([&]() HT_LAMBDA { return __atomic_load_n(&flags_[s].phases, __ATOMIC_ACQUIRE) >= phase_; });
  }

 private:
  bool all_claimed() const {
    for (int s = 0; s < slices_; ++s)
      if (!__atomic_load_n(&flags_[s].claimed, __ATOMIC_RELAXED)) return false;
    return true;
  }

  Flag* flags_;
  int slices_, count_ = 0, mine_[kMostSlices];
  int64_t phase_ = 0;
};

// work(team) in as many tasks as come, each with the slices that it owns. Slices that do not meet are served one by
// one, a task's own first (its cache has the weights of the last call), then those that nobody has begun.
template <class Work>
void run_slices(int slices, bool meet, Flag* flags, Work work) {
  for (int s = 0; s < slices; ++s) flags[s].phases = flags[s].claimed = 0;
  parallel_for(slices, 1, [&](int64_t begin, int64_t end) {
    for (int i = 0; i < (meet ? 1 : slices); ++i) {
      Team team(flags, slices);
      meet ? team.claim(begin, end) : team.claim(int(begin + i) % slices);
      if (team.count()) work(team);
    }
  });
}

// ---- how many slices ----------------------------------------------------------------------------------------------

// A layer takes  region + steps * (work / slices + meet * log2(slices))  microseconds; the count with the least of it.
// A step's work is its multiplications, and reading the weights that it alone reads (W_x stays for a stretch of steps).
// With layer norms slices meet more often. The constants are those of common machines, rounded: what matters is the
// order of magnitude at which a second thread begins to pay.
inline int slices_for(const Rnn& p, int64_t input_size, int64_t panels, int threads) {
  constexpr double kFlops = 1e5, kBytes = 1e5;  // a microsecond
  constexpr double kRegion = 4, kMeet = 0.3;    // microseconds
  const double columns = double(gates_of(p.cell) * p.hidden * p.directions);
  const double read = columns * double(p.state + (p.steps == 1 ? input_size : 0)) * double(bytes_of(p.dtype));
  const double work = 2 * columns * double(input_size + p.state) * double(p.batch) / kFlops + read / kBytes;
  const int64_t most_slices = least(least(threads, panels), kMostSlices);
  int best = 1;
  double least_time = work * double(p.steps), meetings = 1;
  const int meet = p.layer_norm ? 2 + has_cell_state(p.cell) : 1;  // times a step
  for (int64_t s = 2; s <= most_slices; ++s) {
    while ((int64_t(1) << int(meetings)) < s) ++meetings;
    const double share = double((panels + s - 1) / s) / double(panels);
    const double time = kRegion + double(p.steps) * (work * share + kMeet * meet * meetings);
    if (time < least_time) best = int(s), least_time = time;
  }
  return best;
}

}  // namespace handtuned::HANDTUNED_ISA
