// The one product of the linear family, for any number of rows:
//
//   C[r][c] = sum_d B[r][d] A[d][c],   B: rows of a tensor, or its columns;   A: panels of columns (linear.h)
//
// Plan: pieces of work are (block of rows, group of panels). A piece goes through the summed dimension in blocks; in
// each, a panel's block of A (kBlockSteps x kLinearPanel, in L1) is used for all rows of the piece, and B's
// block (in L2) for all its panels. C of the piece stays in L2 until its last block, then each row is finished and
// stored while it is in the cache. Shapes alone decide the cut, so results do not depend on the number of threads.
#pragma once
#include "gemm.h"
#include "linear_pack.h"
#include "parallel.h"
#include "scratch.h"

namespace handtuned::HANDTUNED_ISA {

// At most: of a panel 32 KB, which stay in L1 beside rows of B; a block is summed on its own, so short ones round less.
inline constexpr int64_t kBlockSteps = 128;
inline constexpr int64_t kBlockMultiple = 4;  // of steps: a block begins where four bytes of int8 weights do
inline constexpr int64_t kMostRows = 192, kMostPanels = 4;  // of a piece
inline constexpr int64_t kWantedPieces = 16;
inline constexpr int64_t kStreamRows = 64;  // up to so many, memory may be the limit

struct ProductCut {
  int64_t panels, rows, row_blocks, groups;  // of a piece: panels, rows; and how many pieces
  ProductCut(int64_t all_rows, int64_t columns) {
    const int64_t all_panels = linear_panels(columns);
    int64_t most_rows = kMostRows;
    panels = kMostPanels;
    auto cut = [&] {
      row_blocks = (all_rows + most_rows - 1) / most_rows;
      groups = (all_panels + panels - 1) / panels;
      return row_blocks * groups >= kWantedPieces;
    };
    while (!cut() && (panels > 1 || most_rows > kMostRows / 4)) panels > 1 ? panels /= 2 : most_rows /= 2;
    panels = (all_panels + groups - 1) / most(groups, 1);  // groups of equal size: threads end together
    constexpr int64_t block = kBlockRows<2>;
    rows = ((all_rows + row_blocks - 1) / most(row_blocks, 1) + block - 1) / block * block;
  }
};

// Too little work to wake other threads for.
inline bool is_small(double rows, double columns, double depth) { return 2 * rows * columns * depth < 1 << 19; }

// B from rows of a tensor: in place where they can be read as elements one row_stride apart, else copied by blocks.
template <class T>
struct LeftRows {
  using E = Factor<T>;
  const StridedRows& rows;
  int64_t depth;

  Broadcast<E> block(int64_t r, int64_t n, int64_t s, int64_t steps, E* buffer) const {
    constexpr bool same = kStep<T> == 2 || std::is_same_v<T, E>;
    if (same && rows.ndim == 1 && depth % kStep<T> == 0 && rows.stride[0] % kStep<T> == 0)
      return {reinterpret_cast<const E*>(row_of<T>(rows, r)) + s, rows.stride[0] / kStep<T>, 1};
    const int64_t numbers = least(steps * kStep<T>, depth - s * kStep<T>);
    for (int64_t i = 0; i < n; ++i) {
      const T* from = row_of<T>(rows, r + i) + s * kStep<T>;
      E* to = buffer + i * steps;
      if constexpr (same) {
        if (numbers < steps * kStep<T>) to[steps - 1] = E{};
        __builtin_memcpy(to, from, numbers * sizeof(T));
      } else {
        for (int64_t k = 0; k < numbers; k += kLanes<float>)
          store_first(to + k, load_first(from + k, numbers - k), numbers - k);
      }
    }
    return {buffer, steps, 1};
  }
};

// B from columns of a tensor: its transpose.
template <class T>
struct LeftColumns {
  using E = Factor<T>;
  const StridedRows& rows;
  int64_t depth;  // how many rows

  Broadcast<E> block(int64_t r, int64_t n, int64_t s, int64_t steps, E* buffer) const {
    constexpr int64_t L = kLanes<Accumulate<T>>;
    const int64_t pitch = (n + L - 1) / L * L, d = s * kStep<T>;
    pack_steps<E, T>([&](int64_t i) HT_LAMBDA { return row_of<T>(rows, d + i) + r; }, n,
                     least(steps * kStep<T>, depth - d), buffer, pitch);
    return {buffer, 1, pitch};
  }
};

// All columns of a panel. The fewer the rows, the more of the time panels are on their way from memory: few rows ask
// for a step further on with each step, many for lines of the next panel whenever they go through this one.
template <class E, int Ahead, class S>
HT_INLINE void multiply_panel(int64_t rows, Broadcast<E> b, const S* a, int64_t steps, Accumulate<E>* c, int64_t pitch,
                              Destination to, Upcoming next) {
  constexpr int L = kLanes<Accumulate<E>>;
  auto by = [&](auto vectors, auto ahead) HT_LAMBDA {
    constexpr int MV = vectors;
    const int64_t blocks = (rows + kBlockRows<MV> - 1) / kBlockRows<MV>, turns = blocks * (kLinearPanel / (MV * L));
    next.lines = ahead ? 0 : (next.lines + turns - 1) / turns;
    for (int64_t v = 0; v < kLinearPanel; v += MV * L, next.data += 64 * blocks * next.lines)
      multiply_rows<E, MV, true, ahead>(rows, b, a + v, kLinearPanel, steps, c + v, pitch, to.columns(v, MV * L), next);
  };
  using std::integral_constant;
  if (rows <= kBlockRows<4>)  // wide, or the multipliers would wait for sums
    by(integral_constant<int, 4>(), integral_constant<int, Ahead>());
  else if (rows <= kStreamRows)  // narrow: half a panel is asked for at a time, and twice as many rows use it
    by(integral_constant<int, 2>(), integral_constant<int, Ahead>());
  else  // as wide as registers allow: fewer loads and stores
    by(integral_constant<int, kVectorBytes == 64 ? 4 : 2>(), integral_constant<int, 0>());
}

// A as linear_pack leaves it, read in place.
template <class S>
struct PackedPanels {
  static constexpr int64_t kBuffer = 0;
  static constexpr int kAhead = 16384;  // bytes: the fewer the rows, the more of the time a panel is on its way
  const S* data;
  int64_t steps;  // of a panel

  const S* address(int64_t panel, int64_t s) const { return data + (panel * steps + s) * kLinearPanel; }
  template <class E>
  const S* block(int64_t panel, int64_t s, int64_t, E*) const {
    return address(panel, s);
  }
};

// finish(r, c, n, sums): row r of C, n columns from c on; sums may be overwritten. It will store to `to`, where
// that is known.
template <class E, class Panels, class Left, class Finish>
void product(int64_t rows, int64_t columns, int64_t steps, const Panels& panels, const Left& left, Destination to,
             const Finish& finish) {
  using A = Accumulate<E>;
  constexpr int L = kLanes<A>;
  const ProductCut cut(rows, columns);
  const int64_t all_panels = linear_panels(columns), blocks = most(1, (steps + kBlockSteps - 1) / kBlockSteps);
  const int64_t block = ((steps + blocks - 1) / blocks + kBlockMultiple - 1) / kBlockMultiple * kBlockMultiple;
  parallel_pieces(cut.row_blocks * cut.groups, is_small(rows, columns, steps * kPack<E>), [&](int64_t piece) {
    // Pieces that share a group of panels follow each other.
    const int64_t r = piece % cut.row_blocks * cut.rows, group = piece / cut.row_blocks * cut.panels;
    const int64_t n = least(cut.rows, rows - r), own = least(cut.panels, all_panels - group);
    const int64_t pitch = own * kLinearPanel;
    if (n <= 0) return;
    Arena arena(Arena::bytes_of<A>(n * pitch) + Arena::bytes_of<E>((n + L) * kBlockSteps) +
                Arena::bytes_of<E>(Panels::kBuffer));
    A* c = arena.take<A>(n * pitch);
    E* left_buffer = arena.take<E>((n + L) * kBlockSteps);
    E* buffer = arena.take<E>(Panels::kBuffer);
    __builtin_memset(c, 0, n * pitch * sizeof(A));
    for (int64_t s = 0; s < steps; s += block) {
      const int64_t now = least(block, steps - s);
      const Broadcast<E> b = left.block(r, n, s, now, left_buffer);
      for (int64_t panel = 0; panel < own; ++panel) {
        const auto* a = panels.block(group + panel, s, now, buffer);
        const int64_t column = (group + panel) * kLinearPanel;
        const bool last = s + now == steps && column + kLinearPanel <= columns;
        const auto* next = panel + 1 < own ? panels.address(group + panel + 1, s) : panels.address(group, s + now);
        const int64_t bytes = (panels.address(0, now) - panels.address(0, 0)) * int64_t(sizeof *next);
        multiply_panel<E, Panels::kAhead>(n, b, a, now, c + panel * kLinearPanel, pitch,
                                          last ? to.rows(r).columns(column, kLinearPanel) : Destination(),
                                          {reinterpret_cast<const char*>(next), bytes / 64});
      }
    }
    const int64_t first = group * kLinearPanel;
    for (int64_t i = 0; i < n; ++i) finish(r + i, first, least(pitch, columns - first), c + i * pitch);
  });
}

// With a packed matrix of T.
template <class T, class Left, class Finish>
void product_of(int64_t rows, int64_t columns, int64_t depth, const void* packed, const Left& left, Destination to,
                const Finish& finish) {
  const int64_t steps = steps_of<T>(depth);
  product<Factor<T>>(rows, columns, steps, PackedPanels<Stored<T>>{static_cast<const Stored<T>*>(packed), steps}, left,
                     to, finish);
}

// Of a contiguous [*, columns] tensor.
template <class T>
inline Destination rows_to(void* data, int64_t columns) {
  return {reinterpret_cast<uintptr_t>(data), columns * int64_t(sizeof(T)), 0, int64_t(sizeof(T))};
}

// Row r of a contiguous [*, columns] tensor from c on.
template <class T>
HT_INLINE void store_row(void* to, int64_t columns, int64_t r, int64_t c, int64_t n, const Accumulate<T>* sums) {
  T* row = static_cast<T*>(to) + r * columns + c;
  for (int64_t i = 0; i < n; i += kLanes<Accumulate<T>>) store_first(row + i, load(sums + i), n - i);
}

}  // namespace handtuned::HANDTUNED_ISA
