// The online softmax (Milakov and Gimelshein, 2018) of a block of scores that stand as [key][lane].
//
//   m' = max(m, max_j S),   P = e^(S - m'),   a = e^(m - m'),   l = a l + sum_j P
#pragma once
#include "attention_scores.h"

namespace handtuned::HANDTUNED_ISA {

// What rows of a panel have seen so far: m and l.
template <class A>
struct Running {
  alignas(64) A max[kPanel<A>], sum[kPanel<A>];

  // A sink takes part in the first chunk of keys.
  void start(const Attention& p, const Panel<A>& panel, bool with_sink) {
    const bool sink = p.sinks && with_sink;
    for (int lane = 0; lane < kPanel<A>; ++lane) {
      max[lane] = sink ? A(p.sinks[panel.head[lane]]) : -A(__builtin_inf());
      sum[lane] = sink ? A(1) : A(0);
    }
  }
};

// S[j][lane], n keys, becomes P, of elements E [j / kPack][lane] at the same place; m and l are brought up to date.
// keep: dropout factors like S, or nullptr. Returns whether O must be scaled by a[lane] first.
template <class E, class A = Accumulate<E>>
HT_INLINE bool softmax_block(int vectors, Running<A>& run, int64_t n, A* s, int64_t pitch, const A* keep, A* a) {
  constexpr int W = kPanel<A>, L = kLanes<A>, C = kVectorBytes == 64 ? 4 : 2;  // keys side by side
  const vec<A> hidden = broadcast(-A(__builtin_inf()));
  ints<A> moved{};
  for (int v = 0; v < vectors; ++v) {
    A* column = s + v * L;
    vec<A> top[4] = {load(run.max + v * L), hidden, hidden, hidden};
    int64_t j = 0;
    for (; j + 4 <= n; j += 4)
      for (int u = 0; u < 4; ++u) top[u] = larger(load(column + (j + u) * pitch), top[u]);
    for (; j < n; ++j) top[0] = larger(load(column + j * pitch), top[0]);
    const vec<A> before = load(run.max + v * L), max = larger(larger(top[0], top[1]), larger(top[2], top[3]));
    const vec<A> from = max == hidden ? vec<A>{} : max;  // nothing seen yet: -inf - -inf would be NaN
    const vec<A> scale = exponential(before - from);
    vec<A> sum[C] = {};
    auto weigh = [&](auto whole) HT_LAMBDA {
      vec<A> w[C];
      // P = e^(S - m)
#pragma GCC unroll 4
      for (int u = 0; u < C; ++u) w[u] = whole || j + u < n ? load(column + (j + u) * pitch) - from : hidden;
      exponential(w);
#pragma GCC unroll 4
      for (int u = 0; u < C; ++u) {
        sum[u] += w[u];
        if (keep && (whole || j + u < n)) w[u] *= load(keep + (j + u) * W + v * L);
      }
#pragma GCC unroll 4
      for (int u = 0; u < C; u += kPack<E>) {
        if (!whole && j + u >= n) break;
        if constexpr (kPack<E> == 1)
          store(column + (j + u) * pitch, w[u]);
        else
          store(column + (j + u) / 2 * pitch, (f32)narrow_pair(w[u], w[u + 1]));
      }
    };
    for (j = 0; j + C <= n; j += C) weigh(std::true_type());
    if (j < n) weigh(std::false_type());
    for (int u = 1; u < C; ++u) sum[0] += sum[u];
    store(run.sum + v * L, load(run.sum + v * L) * scale + sum[0]);
    store(run.max + v * L, max);
    store(a + v * L, scale);
    moved |= scale != A(1);
  }
  return any(moved);
}

// lse = m + ln l and 1 / l of each lane; a row that saw nothing: -infinity and 0.
template <class A>
HT_INLINE void finish_softmax(const Running<A>& run, int vectors, A* lse, A* inverse) {
  for (int i = 0; i < vectors * kLanes<A>; i += kLanes<A>) {
    const vec<A> sum = load(run.sum + i);
    store(lse + i, load(run.max + i) + logarithm(sum));
    store(inverse + i, sum == vec<A>{} ? vec<A>{} : A(1) / sum);
  }
}

}  // namespace handtuned::HANDTUNED_ISA
