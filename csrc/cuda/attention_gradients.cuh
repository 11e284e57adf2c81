// What every kernel of the backward computes of a tile of rows x keys, made anew from the saved lse:
//
//   P = e^(S - lse),   dP = dO V^T,   dS = P (keep dP - delta),   delta_i = dO_i . O_i - dlse_i
//
// dS is the gradient of a score, and of the mask; that of the product q . k is dS scale (1 - tanh^2).
#pragma once
#include "attention_general.cuh"

namespace handtuned::cuda {

// Products of rows row_of(0) .. row_of(N - 1) with keys column(0) .. become weights P. hides: as of finish_scores.
// slope: becomes the derivative of the softcap, 1 where there is none, or where a NaN is not seen.
template <int N, class A, Units U, class RowOf, class LseOf, class Column>
__device__ inline void weights_of_line(const Attention& p, const Scores<A, U>& scores, RowOf row_of, LseOf lse_of,
                                       A (&s)[N], Column column, bool hides, A (&slope)[N]) {
#pragma unroll
  for (int n = 0; n < N; ++n) slope[n] = 1;
  finish_scores(p, scores, row_of, s, column, hides, slope);
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const A lse = lse_of(n);
    const bool seen = lse != hidden<A>() && s[n] != hidden<A>();
    const A weight = seen ? scores.power(s[n] - lse) : A(0);
    s[n] = weight > 1 ? A(1) : weight;  // beyond by rounding alone
    slope[n] = seen ? slope[n] : A(1);
  }
}

// P (keep dP - delta); what nobody sees may hold anything
template <class A>
__device__ inline A gradient_of_score(A weight, A dp, A delta) {
  return weight != 0 ? weight * (dp - delta) : A(0);
}

// A thread's rows y + 16 r.
template <class T>
struct GradientRows {
  using A = Accumulate<T>;
  ScoreRow<A> row[kOwn];
  A lse[kOwn], delta[kOwn];  // lse: -infinity for rows that see nothing or are not there

  // place_of(r): the row r of the tile.
  template <class PlaceOf>
  __device__ void load(const AttentionBackward& p, const Scores<A>& scores, const Entry& e, PlaceOf place_of) {
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
      const RowPlace place = place_of(int(threadIdx.x) / kSide + kSide * r);
      row[r] = score_row(p, scores, e, place);
      lse[r] = place.there ? load_global(static_cast<const A*>(p.lse) + row[r].index) : hidden<A>();
      delta[r] = place.there ? load_global(static_cast<const A*>(p.delta) + row[r].index) : A(0);
    }
  }
};

// What a kernel wants of a tile: P with dropout, dS, or the gradient of q . k without its scale.
enum class Wanted { weights, of_score, of_product };

// s[r][c] of keys first + x + 16 c, from the rows in the tables. Begins with a barrier.
template <class T, class A>
__device__ inline void gradient_tile(const AttentionBackward& p, const Scores<A>& scores, const Keep<A>& keep,
                                     uint64_t seed, const GradientRows<T>& rows, int first, Wanted wanted,
                                     A (&s)[kOwn][kOwn]) {
  const int x = threadIdx.x % kSide;
  const auto column = [&](int c) { return first + x + kSide * c; };
  product_tile<T>(s, kQueryRows, kKeyRows, int(p.width));
  const auto drop = [&](int r, A(&line)[kOwn]) {
    if (keep.seed_address == nullptr) return;
    const uint4 words = shared_call(seed, rows.row[r].index, column(0));
#pragma unroll
    for (int c = 0; c < kOwn; ++c) line[c] *= factor_of(keep, words, column(c));
  };
#pragma unroll
  for (int r = 0; r < kOwn; ++r) {
    const auto row_of = [&](int) -> const ScoreRow<A>& { return rows.row[r]; };
    A slope[kOwn];
    weights_of_line(
        p, scores, row_of, [&](int) { return rows.lse[r]; }, s[r], column, !rows.row[r].sees_all(first, kTileKeys),
        slope);
    if (wanted == Wanted::of_product) {
#pragma unroll
      for (int c = 0; c < kOwn; ++c) s[r][c] *= slope[c];
    }
    if (wanted == Wanted::weights) drop(r, s[r]);
  }
  if (wanted == Wanted::weights) return;
  A dp[kOwn][kOwn];
  product_tile<T>(dp, kGradRows, kValueRows, int(p.value_width));
#pragma unroll
  for (int r = 0; r < kOwn; ++r) {
    drop(r, dp[r]);
#pragma unroll
    for (int c = 0; c < kOwn; ++c) s[r][c] = gradient_of_score(s[r][c], dp[r][c], rows.delta[r]);
  }
}

// delta of every row: a warp takes a row. Grid: row tiles, kv heads, shares of a tile's rows.
constexpr int kDeltaWarps = 4;
template <class T>
__global__ void __launch_bounds__(kWarp* kDeltaWarps)
    attention_delta_kernel(const AttentionBackward p, const AttentionPlan plan) {
  using A = Accumulate<T>;
  const RowTile tile = row_tile(p, plan, blockIdx.x);
  if (!tile.there) return;
  const int lane = threadIdx.x % kWarp, r = int(blockIdx.z) * kDeltaWarps + int(threadIdx.x) / kWarp;
  const RowPlace place = row_place(p, tile, blockIdx.y, r);
  if (!place.there) return;
  const T* grad = query_row<const T>(p.grad_output, tile.e, place.head, place.i);
  const T* output = query_row<const T>(p.output, tile.e, place.head, place.i);
  Sums<A> sums = {0, 0};
  for (int64_t c = lane; c < p.value_width; c += kWarp)
    sums.first += A(widen(load_global(grad + c))) * A(widen(load_global(output + c)));
  sums = sum_over_lanes(sums, kWarp);
  const int64_t index = lse_index(p, tile.e, place.head, place.i);
  if (lane != 0) return;
  const A of_lse = p.grad_lse != nullptr ? load_global(static_cast<const A*>(p.grad_lse) + index) : A(0);
  store_global(static_cast<A*>(p.delta) + index, sums.first - of_lse);
}

}  // namespace handtuned::cuda
