// From a product q . k to a score:
//
//   s = scale q.k   or   softcap tanh(scale q.k / softcap);   s += mask;   s -= slope |i + offset - j|
//   -infinity where window, lengths or mask hide the key
//
// Beside operands of 16 bits it is in units of log2, so that weights are powers of 2, which is what hardware computes;
// where operands are exact it is natural, as a second unit costs roundings.
#pragma once
#include "attention_dropout.cuh"
#include "attention_entry.cuh"

namespace handtuned::cuda {

enum class Units { log2, natural };

template <class A, Units U = Units::natural>
struct Scores {
  A scale;  // of the product: to the score, or into the tanh
  A cap;    // softcap; 0: none
  A from_natural, to_natural;

  explicit Scores(const Attention& p) {
    const double unit = U == Units::log2 ? 1.4426950408889634 : 1;
    scale = A(p.softcap > 0 ? p.scale / p.softcap : p.scale * unit);
    cap = A(p.softcap * unit);
    from_natural = A(unit);
    to_natural = A(1 / unit);
  }

  // e to the power of a natural x.
  __device__ static A power(A x) { return U == Units::log2 ? exp2(x) : exp(x); }
};

template <class A>
__device__ inline A hidden() {
  return -A(__builtin_huge_val());
}

// What a thread knows of one query row.
template <class A>
struct ScoreRow {
  int begin, end;  // of the visible keys; none for a row that is not there
  int centre;      // i + offset
  A slope;
  int64_t mask;   // offset of its row of the mask
  int64_t index;  // in the lse

  __device__ bool sees(int j) const { return j >= begin && j < end; }
  __device__ bool sees_all(int first, int count) const { return begin <= first && end >= first + count; }
};

template <class A, Units U>
__device__ inline ScoreRow<A> score_row(const Attention& p, const Scores<A, U>& scores, const Entry& e,
                                        const RowPlace& row) {
  ScoreRow<A> result = {};
  if (!row.there) return result;
  const KeyRange keys = keys_of_rows(p, e, row.i, row.i);
  result.index = lse_index(p, e, row.head, row.i);
  if (keys.begin >= keys.end) return result;
  result.begin = int(keys.begin);
  result.end = int(keys.end);
  result.centre = int(row.i + e.offset);
  if (p.device.slopes.data != nullptr) {
    const int64_t at = p.device.slopes_of_batch ? e.b * p.heads + row.head : row.head;
    result.slope = number_at<A>(p.device.slopes, at) * scores.from_natural;
  }
  // A packed mask may be shorter than a sequence whose length no host knows.
  const int64_t i = row.i < p.mask.rows ? row.i : p.mask.rows - 1;
  result.mask = e.b * p.mask.batch + row.head * p.mask.head + i * p.mask.row;
  return result;
}

// The mask's number for key j; -infinity where it hides the key.
template <class A, Units U>
__device__ inline A mask_at(const AttentionMask& mask, const Scores<A, U>& scores, int64_t row, int64_t j) {
  const int64_t at = row + (j < mask.keys ? j : mask.keys - 1) * mask.key;
  if (mask.boolean) {
    const bool allowed = load_global(static_cast<const uint8_t*>(mask.data) + at) != 0;
    return allowed ? A(0) : hidden<A>();
  }
  A value = 0;
  switch (mask.dtype) {
    case DType::f64: value = A(load_global(static_cast<const double*>(mask.data) + at)); break;
    case DType::f32: value = A(load_global(static_cast<const float*>(mask.data) + at)); break;
    case DType::bf16: value = A(widen(load_global(static_cast<const bf16*>(mask.data) + at))); break;
    case DType::f16: value = A(widen(load_global(static_cast<const f16*>(mask.data) + at))); break;
  }
  // The least finite number, which many masks hold, stays finite in units of log2.
  const A least = A(-0x1p125);
  return U == Units::log2 && value < least && value > hidden<A>() ? least : value * scores.from_natural;
}

// Products of rows row_of(0) .. row_of(N - 1) with keys column(0) .. column(N - 1) become scores. hides: whether window
// and lengths may hide any of them. slope_of_cap: where given, takes the derivative of the softcap.
template <int N, class A, Units U, class RowOf, class Column>
__device__ inline void finish_scores(const Attention& p, const Scores<A, U>& scores, RowOf row_of, A (&s)[N],
                                     Column column, bool hides, A* slope_of_cap = nullptr) {
  if (scores.cap > 0) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const A t = tanh(s[n] * scores.scale);
      s[n] = scores.cap * t;
      if (slope_of_cap != nullptr) slope_of_cap[n] = 1 - t * t;
    }
  } else {
#pragma unroll
    for (int n = 0; n < N; ++n) s[n] *= scores.scale;
  }
  if (p.device.slopes.data != nullptr) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const ScoreRow<A>& row = row_of(n);
      s[n] -= row.slope * A(abs(row.centre - column(n)));
    }
  }
  if (p.mask.data != nullptr) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const ScoreRow<A>& row = row_of(n);
      if (row.sees(column(n))) {
        const A added = mask_at(p.mask, scores, row.mask, column(n));
        s[n] = added > hidden<A>() ? s[n] + added : hidden<A>();
      }
    }
  }
  if (hides) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const ScoreRow<A>& row = row_of(n);
      if (!row.sees(column(n))) s[n] = hidden<A>();
    }
  }
}

// The online softmax of one row (Milakov and Gimelshein, 2018), in each of the lanes that share the row:
//   m' = max(m, max_j s_j);   w_j = e^(s_j - m');   a = e^(m - m');   l = a l + sum_j w_j
// where l sums a lane's own keys alone, until finish().
template <class A>
struct RunningRow {
  A max, sum;

  // A sink takes part in the first chunk of keys; `first_lane`: it is added in one lane of the row.
  template <Units U>
  __device__ void start(const Attention& p, const Scores<A, U>& scores, const Entry& e, const RowPlace& row, bool sink,
                        bool first_lane) {
    const bool takes = sink && row.there && e.b < p.batch && p.device.sinks.data != nullptr;
    max = takes ? number_at<A>(p.device.sinks, row.head) * scores.from_natural : hidden<A>();
    sum = takes && first_lane ? A(1) : A(0);
  }

  // Scores become weights; returns a. Lanes: how many neighbours share the row.
  template <int Lanes, int N, Units U>
  __device__ A weigh(const Scores<A, U>& scores, A (&s)[N]) {
    A top = max;
#pragma unroll
    for (int n = 0; n < N; ++n) top = s[n] > top ? s[n] : top;
#pragma unroll
    for (int step = Lanes / 2; step > 0; step /= 2) {
      const A other = __shfl_xor_sync(kWholeWarp, top, step);
      top = other > top ? other : top;
    }
    const A from = top == hidden<A>() ? A(0) : top;  // nothing seen yet: -inf - -inf would be NaN
    const A scale = scores.power(max - from);
    max = top;
    sum *= scale;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      s[n] = scores.power(s[n] - from);
      sum += s[n];
    }
    return scale;
  }

  template <int Lanes>
  __device__ void finish() {
#pragma unroll
    for (int step = Lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, step);
  }

  __device__ A inverse() const { return sum > 0 ? 1 / sum : A(0); }
  template <Units U>
  __device__ A lse(const Scores<A, U>& scores) const {
    return max * scores.to_natural + log(sum);
  }
};

// Keys that a row does not see have a weight of 0 and may hold anything, but 0 times infinity or NaN is NaN. That is
// rare, so a block goes on as if it could not be, and starts again with care where what it found is not finite. True
// for the whole block if it has to; `careful` is then set.
__device__ inline bool starts_again(bool& careful, bool finite) {
  if (careful) return false;
  careful = __syncthreads_or(!finite) != 0;
  return careful;
}

// Where the (O, m, l) of a row and a chunk of keys go: O first.
template <class A>
__device__ inline A* partial_row(const AttentionForward& p, const AttentionPlan& plan, int64_t index, int64_t chunk) {
  return static_cast<A*>(p.partials) + (index * plan.chunks + chunk) * (p.value_width + 2);
}

}  // namespace handtuned::cuda
