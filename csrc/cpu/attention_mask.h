// The gradient of attention's additive mask.
//
// dmask = dS before the softcap, summed over the dims along which the mask is broadcast.
//
// A mask with a row for each query, of each head, has its gradient where the backward passes anyway: every piece adds
// what it finds to sums of its own (MaskSums), [key][64 rows], over the batch entries that share the mask. Other masks
// would make pieces wait for each other, so they have a pass that computes dS again: a piece of it is 64 rows of the
// mask by up to 8 blocks of 128 keys (or its only row or column) and visits in order all that was added to it. A tile
// of queries is packed once for all the blocks, so pieces are as wide as their number allows.
#pragma once
#include "attention_tile.h"
#include "parallel.h"

namespace handtuned::HANDTUNED_ISA {

// Rows [row, row + rows), counted through all heads and batch entries, and keys [key, key + keys) of the gradient; sum
// [key][64 rows].
template <class A>
void write_mask_rows(const AttentionBackward& p, int64_t row, int64_t rows, int64_t key, int64_t keys, const A* sum) {
  constexpr int64_t L = kLanes<A>;
  const AttentionMask& m = p.mask;
  Scratch<A> lines(L * padded<A>(keys));
  for (int64_t i = 0; i < rows; i += L) {
    for (int64_t j = 0; j < keys; j += L) {
      vec<A> square[L];
      for (int64_t jj = 0; jj < L; ++jj) square[jj] = load(sum + least(j + jj, keys - 1) * kAttentionTile + i);
      transpose<A>(square);
      for (int64_t ii = 0; ii < L; ++ii) store(lines.data + ii * padded<A>(keys) + j, square[ii]);
    }
    for (int64_t ii = 0; ii < least(L, rows - i); ++ii)
      write_row(m.dtype, static_cast<char*>(p.grad_mask) + ((row + i + ii) * m.keys + key) * bytes_of(m.dtype), keys,
                lines.data + ii * padded<A>(keys), A(1));
  }
}

// ---- sums beside the other gradients -----------------------------------------------------------------------------

// Whether the mask's gradient is made so.
inline bool sums_mask_beside(const AttentionBackward& p) {
  const bool others = p.grad_query.data || p.grad_key.data || p.grad_value.data;
  const AttentionMask& m = p.mask;
  return p.grad_mask && others && !p.query_starts && p.batch > 0 && m.heads == p.heads && m.rows == p.query_rows &&
         m.keys == p.key_rows;
}

// Elements of a kv head's sums: [tile][key][64 rows].
inline int64_t mask_sum_size(const AttentionBackward& p) {
  const int64_t tiles = (p.heads / p.kv_heads * p.query_rows + kAttentionTile - 1) / kAttentionTile;
  return tiles * p.key_rows * kAttentionTile;
}

// How many batch entries a piece takes one after the other: all that share the mask, or a group of them where pieces
// would be too few; then the sums of the groups are added in order.
inline int64_t mask_entries(const AttentionBackward& p, int64_t chunks) {
  constexpr int64_t kMostElements = 1 << 24;  // of all sums
  if (!sums_mask_beside(p) || p.mask.batches == p.batch) return 1;
  const int64_t wanted = (kPieces - 1) / most(1, p.kv_heads * chunks) + 1;
  const int64_t room = most(1, kMostElements / most(1, p.kv_heads * mask_sum_size(p)));
  return (p.batch - 1) / least(least(wanted, room), p.batch) + 1;
}

template <class A>
class MaskSums {
 public:
  MaskSums(const AttentionBackward& p, int64_t groups)
      : wanted_(sums_mask_beside(p)),
        p_(p),
        groups_(groups),
        size_(mask_sum_size(p)),
        sums_(wanted_ ? groups * p.kv_heads * size_ : 0) {}

  // The sum of keys [begin, end) of a group and kv head, zero at first.
  A* start(int64_t group, int64_t kv_head, KeyRange keys) {
    if (!wanted_) return nullptr;
    A* head = sums_.data + (group * p_.kv_heads + kv_head) * size_;
    for (int64_t t = 0; t * kAttentionTile < group_rows() && keys.begin < keys.end; ++t)
      __builtin_memset(tile(head, t, keys.begin), 0, (keys.end - keys.begin) * kAttentionTile * sizeof(A));
    return head;
  }

  // Where a tile's sums for keys `key` and after are.
  HT_INLINE A* tile(A* head, int64_t t, int64_t key) const { return head + (t * p_.key_rows + key) * kAttentionTile; }

  void write() {
    constexpr int64_t kSpan = 1024;
    if (!wanted_) return;
    const int64_t total = group_rows(), tiles = (total + kAttentionTile - 1) / kAttentionTile;
    const int64_t batches = p_.mask.batches, parts = groups_ / batches;
    parallel_pieces(batches * p_.kv_heads * tiles, int64_t(1), [&](int64_t piece) {
      const int64_t head = piece / tiles, t = piece % tiles, row = t * kAttentionTile;
      for (int64_t key = 0; key < p_.key_rows; key += kSpan) {
        const int64_t keys = least(kSpan, p_.key_rows - key);
        A* sum = tile(sums_.data + head * size_, t, key);
        for (int64_t k = 1; k < parts; ++k) {
          const A* part = sum + k * p_.kv_heads * size_;
          for (int64_t i = 0; i < keys * kAttentionTile; i += kLanes<A>) store(sum + i, load(sum + i) + load(part + i));
        }
        write_mask_rows(p_, head * total + row, least(kAttentionTile, total - row), key, keys, sum);
      }
    });
  }

 private:
  int64_t group_rows() const { return p_.heads / p_.kv_heads * p_.query_rows; }

  bool wanted_;
  const AttentionBackward& p_;
  int64_t groups_, size_;
  Scratch<A> sums_;  // [group][kv head][tile][key][64]
};

// ---- a pass of its own -------------------------------------------------------------------------------------------

struct MaskCut {
  int64_t row_tiles, spans, span;  // span: keys of a piece
  explicit MaskCut(const AttentionMask& m) {
    const int64_t blocks = (m.keys + kBackwardBlock - 1) / kBackwardBlock;
    row_tiles = (m.rows + kAttentionTile - 1) / kAttentionTile;
    span = most(1, least(8, m.batches * m.heads * row_tiles * blocks / kPieces)) * kBackwardBlock;
    spans = (m.keys + span - 1) / span;
  }
};

template <class A>
class MaskPiece {
  using Tile = BackwardTile<A>;

 public:
  MaskPiece(const AttentionBackward& p, const MaskCut& cut, const A* delta)
      : p_(p), span_(cut.span), delta_(delta), arena_(bytes(p, cut)), tile_(p, arena_) {
    tile_.through_softcap = false;
    sum_ = arena_.template take<A>(span_ * kAttentionTile);
    key_scratch_ = arena_.template take<A>(kBackwardBlock * padded<A>(p.width));
    value_scratch_ = arena_.template take<A>(kBackwardBlock * padded<A>(p.value_width));
    __builtin_memset(sum_, 0, span_ * kAttentionTile * sizeof(A));
  }

  // Everything added to rows [row, ...) and keys [key, ...) of mask [batch, head].
  void run(int64_t batch, int64_t head, int64_t row, int64_t key) {
    const AttentionMask& m = p_.mask;
    const int64_t b_end = m.batches > 1 ? batch + 1 : p_.batch, h_end = m.heads > 1 ? head + 1 : p_.heads;
    for (int64_t b = batch; b < b_end; ++b) {
      const AttentionEntry e = attention_entry(p_, b);
      const int64_t row_end = m.rows > 1 ? least(row + kAttentionTile, e.query_rows) : e.query_rows;
      const int64_t key_end = m.keys > 1 ? least(key + span_, e.key_rows) : e.key_rows;
      for (int64_t h = head; h < h_end; ++h)
        for (int64_t i = row; i < row_end; i += kAttentionTile) add_rows(e, b, h, i, key, key_end);
    }
  }

  void write(int64_t batch, int64_t head, int64_t row, int64_t key) {
    const AttentionMask& m = p_.mask;
    const int64_t rows = m.rows > 1 ? least(m.rows - row, kAttentionTile) : 1;
    const int64_t keys = m.keys > 1 ? least(m.keys - key, span_) : 1;
    if (m.keys == 1 || m.rows == 1) add_up(m.rows > 1, m.keys > 1);
    write_mask_rows(p_, (batch * m.heads + head) * m.rows + row, rows, key, keys, sum_);
  }

 private:
  static size_t bytes(const Attention& p, const MaskCut& cut) {
    return Tile::bytes(p) + Arena::bytes_of<A>(cut.span * kAttentionTile) +
           Arena::bytes_of<A>(kBackwardBlock * padded<A>(p.width)) +
           Arena::bytes_of<A>(kBackwardBlock * padded<A>(p.value_width));
  }

  // Leaves the sum over the keys, or over the rows, of a block in its first key or row.
  void add_up(bool by_row, bool by_key) {
    for (int64_t j = 0; j < (by_key ? span_ : kBackwardBlock); ++j)
      for (int64_t i = 0; i < kAttentionTile; ++i) {
        A* to = sum_ + (by_key ? j : 0) * kAttentionTile + (by_row ? i : 0);
        const A* from = sum_ + j * kAttentionTile + i;
        if (to != from) *to += *from;
      }
  }

  void add_rows(const AttentionEntry& e, int64_t b, int64_t h, int64_t row, int64_t key, int64_t key_end) {
    const int64_t group = p_.heads / p_.kv_heads, kv_head = h / group, before = h % group * e.query_rows;
    const int64_t end = before + least(row + kAttentionTile, e.query_rows);
    tile_.load(e, b, kv_head, before + row, end, delta_);
    for (int64_t first = key; first < least(key_end, tile_.any.end); first += kBackwardBlock) {
      const int64_t n = least(kBackwardBlock, key_end - first);
      const auto keys = key_block<A>(p_, p_.key, e, b, kv_head, first, n, p_.width, key_scratch_);
      const auto values = key_block<A>(p_, p_.value, e, b, kv_head, first, n, p_.value_width, value_scratch_);
      tile_.scores(first, n, keys, values);
      A* sum = sum_ + (p_.mask.keys > 1 ? first - key : 0) * kAttentionTile;
      // Lanes past the last row are left out: against a NaN key their scores are NaN.
      for (int64_t j = 0; j < n; ++j)
        for (int64_t c = 0; c < padded<A>(tile_.rows); c += Tile::L) {
          const int64_t at = j * kAttentionTile + c;
          store(sum + at, load(sum + at) + load_first(tile_.score_grad + at, tile_.rows - c));
        }
    }
  }

  const AttentionBackward& p_;
  int64_t span_;
  const A* delta_;
  Arena arena_;
  Tile tile_;
  A *sum_, *key_scratch_, *value_scratch_;  // sum_ [key][row]
};

template <class A>
void find_grad_mask(const AttentionBackward& p, const A* delta) {
  const AttentionMask& m = p.mask;
  const MaskCut cut(m);
  const int64_t tiles = cut.row_tiles * cut.spans;
  const int64_t pieces = m.batches * m.heads * tiles;
  parallel_pieces(pieces, run_of(p, pieces), [&](int64_t piece) {
    const int64_t batch = piece / tiles / m.heads, head = piece / tiles % m.heads;
    const int64_t row = piece % tiles / cut.spans * kAttentionTile, key = piece % cut.spans * cut.span;
    MaskPiece<A> work(p, cut, delta);
    work.run(batch, head, row, key);
    work.write(batch, head, row, key);
  });
}

}  // namespace handtuned::HANDTUNED_ISA
