// The gradient of attention's additive mask.
//
// dmask = dS before the softcap, summed over the dims along which the mask is broadcast. A pass of its own: a piece is
// 64 rows of the mask by up to 8 blocks of 128 keys (or its only row or column) and visits in order all that was added
// to it. A tile of queries is packed once for all the blocks, so pieces are as wide as their number allows.
#pragma once
#include "attention_tile.h"
#include "parallel.h"

namespace handtuned::HANDTUNED_ISA {

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
  static constexpr int64_t L = Tile::L;

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
    Scratch<A> lines(L * padded<A>(keys));
    for (int64_t i = 0; i < rows; i += L) {
      for (int64_t j = 0; j < keys; j += L) {
        vec<A> square[L];
        for (int64_t jj = 0; jj < L; ++jj) square[jj] = load(sum_ + least(j + jj, keys - 1) * kAttentionTile + i);
        transpose<A>(square);
        for (int64_t ii = 0; ii < L; ++ii) store(lines.data + ii * padded<A>(keys) + j, square[ii]);
      }
      for (int64_t ii = 0; ii < least(L, rows - i); ++ii) {
        const int64_t at = ((batch * m.heads + head) * m.rows + row + i + ii) * m.keys + key;
        write_row(m.dtype, static_cast<char*>(p_.grad_mask) + at * bytes_of(m.dtype), keys,
                  lines.data + ii * padded<A>(keys), A(1));
      }
    }
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
