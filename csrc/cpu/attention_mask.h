// The gradient of attention's additive mask.
//
// dmask = dS before the softcap, summed over the dims along which the mask is broadcast. A pass of its own: a piece is
// a 64 x 128 tile of the mask (or its only row or column) and visits in order all that was added to it.
#pragma once
#include "attention_tile.h"
#include "parallel.h"

namespace handtuned::HANDTUNED_ISA {

template <class A>
class MaskPiece {
  using Tile = BackwardTile<A>;

 public:
  MaskPiece(const AttentionBackward& p, const A* delta) : p_(p), delta_(delta), arena_(bytes(p)), tile_(p, arena_) {
    tile_.through_softcap = false;
    sum_ = arena_.template take<A>(kBackwardBlock * kAttentionTile);
    key_scratch_ = arena_.template take<A>(kBackwardBlock * padded<A>(p.width));
    value_scratch_ = arena_.template take<A>(kBackwardBlock * padded<A>(p.value_width));
    __builtin_memset(sum_, 0, kBackwardBlock * kAttentionTile * sizeof(A));
  }

  // Everything added to rows [row, ...) and keys [key, ...) of mask [batch, head].
  void run(int64_t batch, int64_t head, int64_t row, int64_t key) {
    const AttentionMask& m = p_.mask;
    const int64_t b_end = m.batches > 1 ? batch + 1 : p_.batch, h_end = m.heads > 1 ? head + 1 : p_.heads;
    for (int64_t b = batch; b < b_end; ++b) {
      const AttentionEntry e = attention_entry(p_, b);
      const int64_t row_end = m.rows > 1 ? least(row + kAttentionTile, e.query_rows) : e.query_rows;
      const int64_t key_end = m.keys > 1 ? least(key + kBackwardBlock, e.key_rows) : e.key_rows;
      for (int64_t h = head; h < h_end; ++h)
        for (int64_t i = row; i < row_end; i += kAttentionTile) add_rows(e, b, h, i, key, key_end);
    }
  }

  void write(int64_t batch, int64_t head, int64_t row, int64_t key) {
    const AttentionMask& m = p_.mask;
    const int64_t rows = m.rows > 1 ? least(m.rows - row, kAttentionTile) : 1;
    const int64_t keys = m.keys > 1 ? least(m.keys - key, kBackwardBlock) : 1;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < keys; ++j) {
        A total = 0;
        for (int64_t jj = j; jj < (m.keys > 1 ? j + 1 : kBackwardBlock); ++jj)
          for (int64_t ii = i; ii < (m.rows > 1 ? i + 1 : kAttentionTile); ++ii)
            total += sum_[jj * kAttentionTile + ii];
        const int64_t at = ((batch * m.heads + head) * m.rows + row + i) * m.keys + key + j;
        alignas(64) A one[Tile::L] = {total};
        write_row(m.dtype, static_cast<char*>(p_.grad_mask) + at * bytes_of(m.dtype), 1, one, A(1));
      }
    }
  }

 private:
  static size_t bytes(const Attention& p) {
    return Tile::bytes(p) + Arena::bytes_of<A>(kBackwardBlock * kAttentionTile) +
           Arena::bytes_of<A>(kBackwardBlock * padded<A>(p.width)) +
           Arena::bytes_of<A>(kBackwardBlock * padded<A>(p.value_width));
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
      // Lanes past the last row are left out: against a NaN key their scores are NaN.
      for (int64_t j = 0; j < n; ++j)
        for (int64_t c = 0; c < padded<A>(tile_.rows); c += Tile::L) {
          const int64_t at = j * kAttentionTile + c;
          store(sum_ + at, load(sum_ + at) + load_first(tile_.score_grad + at, tile_.rows - c));
        }
    }
  }

  const AttentionBackward& p_;
  const A* delta_;
  Arena arena_;
  Tile tile_;
  A *sum_, *key_scratch_, *value_scratch_;  // sum_ [key][row]
};

template <class A>
void find_grad_mask(const AttentionBackward& p, const A* delta) {
  const AttentionMask& m = p.mask;
  const int64_t row_tiles = (m.rows + kAttentionTile - 1) / kAttentionTile;
  const int64_t key_blocks = (m.keys + kBackwardBlock - 1) / kBackwardBlock, tiles = row_tiles * key_blocks;
  const int64_t pieces = m.batches * m.heads * tiles;
  parallel_pieces(pieces, run_of(p, pieces), [&](int64_t piece) {
    const int64_t batch = piece / tiles / m.heads, head = piece / tiles % m.heads;
    const int64_t row = piece % tiles / key_blocks * kAttentionTile, key = piece % key_blocks * kBackwardBlock;
    MaskPiece<A> work(p, delta);
    work.run(batch, head, row, key);
    work.write(batch, head, row, key);
  });
}

}  // namespace handtuned::HANDTUNED_ISA
