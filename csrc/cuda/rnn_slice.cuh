// Recurrent layers: the slice of a matrix that a block keeps for all steps, and its products with rows of states.
//
//   sum[row][i] = sum_k state[row][k] * W[row_of(i)][k]
//
// Plan: a warp takes 4 rows of W and 8 rows of states at once. A lane has the packs lane, lane + 32, ... of k, so that
// a state is read in whole lines, from the L1 that the block's warps share; its 32 sums are added over the lanes while
// they are dealt out, in 31 shuffles: lane l ends with the sum of row l / 4 and W's row l % 4. The order of additions
// follows from k alone, wherever the weights are.
#pragma once
#include <device/reduce.h>
#include <device/vector.h>

#include "rnn_plan.h"

namespace handtuned::cuda {

constexpr int kQuad = 4, kGroup = 8;  // rows of W and of states

// Numbers of k that a lane takes at once: 16 bytes of states.
template <class T>
inline constexpr int kSpan = 16 / int(sizeof(Accumulate<T>));

template <class T>
struct alignas(kSpan<T> * sizeof(T)) Span {
  T value[kSpan<T>];
};

// `count` numbers from p on, at most kSpan; the others are 0. wide: p is aligned, and a span has all numbers or none.
template <class T>
__device__ inline Span<T> load_span(const T* p, int64_t count, bool wide) {
  Span<T> span = {};
  if (wide) {
    if (count > 0) span = load_global(reinterpret_cast<const Span<T>*>(p));
  } else {
#pragma unroll
    for (int i = 0; i < kSpan<T>; ++i)
      if (i < count) span.value[i] = load_global(p + i);
  }
  return span;
}

// A matrix in device memory, and the rows of it that are a block's: of each of `groups` blocks of `height` rows those
// from `first` on, `units` of them. They are numbered group by group. The depth is cut into parts of whole
// chunks.
template <class T>
struct Slice {
  const T* data;
  int64_t depth, height, first;
  int units, groups, chunks, parts, chunks_of_part;
  bool wide;  // every row starts at a multiple of a span and ends at one

  __device__ Slice(const T* data, const MatrixShape& shape, const SlicePlan& plan)
      : data(data),
        depth(shape.depth),
        height(shape.height),
        first(int64_t(blockIdx.x) * plan.units),
        groups(plan.groups),
        chunks(plan.chunks),
        parts(plan.parts),
        chunks_of_part(plan.chunks_of_part),
        wide(shape.depth % kSpan<T> == 0) {
    const int64_t left = height - first;
    units = left < plan.units ? left < 0 ? 0 : int(left) : plan.units;
  }

  __device__ int rows() const { return units * groups; }
  __device__ int quads() const { return (rows() + kQuad - 1) / kQuad; }
  // Row i, nullptr behind the last; and its numbers from k on.
  __device__ const T* row(int i) const {
    return i < rows() ? data + (i / units * height + first + i % units) * depth : nullptr;
  }
  __device__ Span<T> load(const T* row, int64_t k) const {
    if (row == nullptr) return {};
    return load_span(row + k, depth - k, wide);
  }
};

// Where a block keeps its slice: each warp one quad of rows in registers, but for chunks that would leave too few of
// them for the sums and are in shared memory; or all rows in shared memory, or nowhere.
template <class T, bool InRegisters>
class Kept;

template <class T>
class Kept<T, true> {
  using A = Accumulate<T>;

 public:
  // offset: of the chunks beside, in shared memory. Each thread reads what it wrote itself.
  __device__ Kept(const Slice<T>& slice, int offset, bool)
      : beside_(shared<Span<T>>(offset) + threadIdx.x / kWarp * kChunksBeside * kQuad * kWarp + threadIdx.x % kWarp) {
    const int pair = threadIdx.x / kWarp, quad = pair / slice.parts, first = pair % slice.parts * slice.chunks_of_part;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      const T* row = slice.row(quad * kQuad + i);
      auto load = [&](int chunk) {
        return slice.load(row, ((first + chunk) * kWarp + threadIdx.x % kWarp) * kSpan<T>);
      };
#pragma unroll
      for (int chunk = 0; chunk < kChunksInRegisters; ++chunk) {
        Span<T> span = {};
        if (chunk < slice.chunks_of_part) span = load(chunk);
#pragma unroll
        for (int k = 0; k < kSpan<T>; ++k) held_[chunk][i][k] = widen(span.value[k]);
      }
      for (int chunk = kChunksInRegisters; chunk < slice.chunks_of_part; ++chunk)
        beside_[place(chunk, i)] = load(chunk);
    }
  }
  // chunk: of the warp's part.
  __device__ void get(A (&weight)[kQuad][kSpan<T>], const Slice<T>&, int, int, int chunk) const {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (chunk < kChunksInRegisters) {
#pragma unroll
        for (int k = 0; k < kSpan<T>; ++k) weight[i][k] = held_[chunk][i][k];
      } else {
        const Span<T> span = beside_[place(chunk, i)];
#pragma unroll
        for (int k = 0; k < kSpan<T>; ++k) weight[i][k] = widen(span.value[k]);
      }
    }
  }

 private:
  __device__ static int place(int chunk, int i) { return ((chunk - kChunksInRegisters) * kQuad + i) * kWarp; }

  A held_[kChunksInRegisters][kQuad][kSpan<T>];
  Shared<Span<T>> beside_;  // [chunk][kQuad][kWarp] of the warp, this lane's
};

template <class T>
class Kept<T, false> {
  using A = Accumulate<T>;

 public:
  // offset: of its place in shared memory, [rows, chunks, kWarp] spans. The caller's next barrier ends the filling.
  __device__ Kept(const Slice<T>& slice, int offset, bool in_shared)
      : held_(shared<Span<T>>(offset)), in_shared_(in_shared) {
    if (!in_shared) return;
    const int spans = slice.chunks * kWarp;
    for (int at = threadIdx.x; at < slice.rows() * spans; at += blockDim.x)
      held_[at] = slice.load(slice.row(at / spans), at % spans * kSpan<T>);
  }
  __device__ void get(A (&weight)[kQuad][kSpan<T>], const Slice<T>& slice, int quad, int first, int chunk) const {
    const int at = (first + chunk) * kWarp + threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      const int row = quad * kQuad + i;
      Span<T> span = {};
      if (!in_shared_) {
        span = slice.load(slice.row(row), int64_t(at) * kSpan<T>);
      } else if (row < slice.rows()) {
        span = held_[row * slice.chunks * kWarp + at];
      }
#pragma unroll
      for (int k = 0; k < kSpan<T>; ++k) weight[i][k] = widen(span.value[k]);
    }
  }

 private:
  Shared<Span<T>> held_;
  bool in_shared_;
};

// Adds 32 values up over the lanes: lane l gets the sum of value l. Of 2 * Half values that are left, a lane keeps half
// and gives half to the lane whose number differs in that bit.
template <int Half = kWarp / 2, class A>
__device__ inline A deal_out_sums(A (&value)[kWarp]) {
  const bool upper = (threadIdx.x & Half) != 0;
#pragma unroll
  for (int i = 0; i < Half; ++i) {
    const A own = upper ? value[i + Half] : value[i], other = upper ? value[i] : value[i + Half];
    value[i] = own + __shfl_xor_sync(kWholeWarp, other, Half);
  }
  if constexpr (Half > 1) return deal_out_sums<Half / 2>(value);
  return value[0];
}

// The sums of `count` rows of states (pitch apart, zeros after the depth) and one quad over a part of the depth, which
// begins at chunk `first`.
template <class T, bool InRegisters>
__device__ inline Accumulate<T> multiply(const Slice<T>& slice, const Kept<T, InRegisters>& kept, int quad, int first,
                                         const Accumulate<T>* states, int pitch, int count) {
  using A = Accumulate<T>;
  constexpr int kChunk = kWarp * kSpan<T>, kAtOnce = kGroup / 2;
  const int column = (first * kWarp + threadIdx.x % kWarp) * kSpan<T>;
  const A* const own = states + column;
  A sum[kGroup * kQuad] = {};
  auto add = [&](int chunk) {
    A weight[kQuad][kSpan<T>];
    kept.get(weight, slice, quad, first, chunk);
    const int left = pitch - column - chunk * kChunk;
#pragma unroll
    for (int from = 0; from < kGroup; from += kAtOnce) {
      Span<A> state[kAtOnce];
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r)
        state[r] = load_span(own + int64_t(from + r) * pitch + chunk * kChunk, from + r < count ? left : 0, true);
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
        if (count > from + r) {
#pragma unroll
          for (int i = 0; i < kQuad; ++i)
#pragma unroll
            for (int j = 0; j < kSpan<T>; ++j) sum[(from + r) * kQuad + i] += state[r].value[j] * weight[i][j];
        }
      }
    }
  };
  const int chunks = slice.chunks - first < slice.chunks_of_part ? slice.chunks - first : slice.chunks_of_part;
  if constexpr (InRegisters) {
#pragma unroll
    for (int nth = 0; nth < kChunksHeld; ++nth)
      if (nth < chunks) add(nth);
  } else {
    for (int chunk = 0; chunk < chunks; ++chunk) add(chunk);
  }
  return deal_out_sums(sum);
}

// All rows of a slice with `count` rows of states, into sums [count][pitch]: of each row [parts][quads][kQuad]. The
// caller's barriers are around it.
template <class T, bool InRegisters>
__device__ inline void multiply_slice(const Slice<T>& slice, const Kept<T, InRegisters>& kept,
                                      const Accumulate<T>* states, int pitch, int count, Shared<Accumulate<T>> sums,
                                      int sums_pitch) {
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp, pairs = slice.quads() * slice.parts;
  for (int pair = threadIdx.x / kWarp; pair < pairs; pair += warps) {
    const int quad = pair / slice.parts, part = pair % slice.parts;
    for (int from = 0; from < count; from += kGroup) {
      const Accumulate<T> sum =
          multiply(slice, kept, quad, part * slice.chunks_of_part, states + int64_t(from) * pitch, pitch, count - from);
      const int row = from + lane / kQuad;  // of a whole group, for which there is room
      sums[row * sums_pitch + (part * slice.quads() + quad) * kQuad + lane % kQuad] = sum;
    }
  }
}

// The sum of row i of a slice, of its parts in their order.
template <class T>
__device__ inline Accumulate<T> sum_of(const Slice<T>& slice, Shared<Accumulate<T>> sums, int i) {
  Accumulate<T> sum = sums[i];
  for (int part = 1; part < slice.parts; ++part) sum += sums[part * slice.quads() * kQuad + i];
  return sum;
}

// finish(place, i, sums) for `places` rows of states and every unit of the slice, with the sums of that place's row.
template <class T, bool InRegisters, class Finish>
__device__ inline void multiply_states(const Slice<T>& slice, const Kept<T, InRegisters>& kept, const RnnPlan& plan,
                                       const Accumulate<T>* states, int pitch, int places, Finish finish) {
  const Shared<Accumulate<T>> sums = shared<Accumulate<T>>(0);
  for (int from = 0; from < places; from += plan.turn) {
    const int count = places - from < plan.turn ? places - from : plan.turn;
    __syncthreads();  // the sums of the turn before were read; other blocks were met
    multiply_slice(slice, kept, states + int64_t(from) * pitch, pitch, count, sums, plan.pitch);
    __syncthreads();
    for (int i = threadIdx.x; i < count * slice.units; i += blockDim.x)
      finish(from + i / slice.units, i % slice.units, sums + i / slice.units * plan.pitch);
  }
}

}  // namespace handtuned::cuda
