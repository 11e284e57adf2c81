// Attention backward (Dao, "FlashAttention-2", 2023), scores recomputed from q, k and the saved lse.
//
//   P  = e^(S - lse),   dP[j][lane] = sum_c V[j][c] dO^T[c][lane],   delta = sum_c dO O - dlse
//   dS = P * (dP * keep - delta), through the derivative of the softcap where there is one
//   dV[j][c] += sum_lane P keep[j][lane] dO[lane][c]        dK[j][d] += sum_lane dS[j][lane] Q[lane][d],  Q scaled
//   dQ^T[d][lane] += scale sum_j K[j][d] dS[j][lane]
// Plan: a piece is (batch, kv head, chunk of keys) and owns dK and dV of its chunk, in float scratch that stays in L2.
// Tiles of 64 query rows pass outside, blocks of 128 keys inside; P and dS of a block stand as [key][64 rows], so that
// dK and dV contract over the whole tile at once. dQ of one tile and one chunk is finished in one go: with one chunk it
// is the result, else the chunks' dQ are added in order. Shapes alone decide the number of chunks, about 8 at most, so
// the scratch grows with the length of the sequences and not with its square.
#pragma once
#include "attention_mask.h"
#include "attention_tile.h"
#include "parallel.h"

namespace handtuned::HANDTUNED_ISA {

struct BackwardCut {
  int64_t tiles, chunks, chunk_keys;
  explicit BackwardCut(const Attention& p) {
    tiles = (p.heads / p.kv_heads * p.query_rows + kAttentionTile - 1) / kAttentionTile;
    const int64_t heads = most(1, p.batch * p.kv_heads), wanted = least((kPieces + heads - 1) / heads, 8);
    // Dropout factors come in blocks of kKeyBlock keys; fewer than 64 keys are not worth packing a tile for.
    const int64_t unit = p.dropout.p > 0 ? kKeyBlock : 64;
    chunk_keys = most(1, p.key_rows / (wanted * unit)) * unit;
    chunks = most(1, (p.key_rows + chunk_keys - 1) / chunk_keys);
  }
};

// One chunk of keys of (b, kv head). grad_query_part: dQ of this chunk [row][width] of float, or nullptr where it goes
// straight to the result.
template <class E>
class BackwardPiece {
  using A = Accumulate<E>;
  using Tile = BackwardTile<E>;
  static constexpr int W = Tile::W, L = Tile::L;

 public:
  BackwardPiece(const AttentionBackward& p, int64_t b, int64_t kv_head, KeyRange chunk, const A* delta)
      : p_(p),
        e_(attention_entry(p, b)),
        b_(b),
        kv_head_(kv_head),
        chunk_{chunk.begin, least(chunk.end, e_.key_rows)},
        delta_(delta),
        arena_(bytes(p, chunk.end - chunk.begin)),
        tile_(p, arena_) {
    const int64_t keys = most(0, chunk_.end - chunk_.begin);
    grad_key_ = arena_.template take<A>(keys * padded<A>(p.width));
    grad_value_ = arena_.template take<A>(keys * padded<A>(p.value_width));
    grad_query_ = arena_.template take<A>(Tile::kPanels * p.width * W);
    query_rows_ = arena_.template take<A>(W * padded<A>(p.width));
    key_scratch_ = arena_.template take<A>(kBackwardBlock * padded<A>(p.width));
    column_scratch_ = arena_.template take<A>(kPack<E> == 2 ? kBackwardBlock * padded<A>(p.width) : 0);
    value_scratch_ = arena_.template take<A>(kBackwardBlock * padded<A>(p.value_width));
    __builtin_memset(grad_key_, 0, keys * padded<A>(p.width) * sizeof(A));
    __builtin_memset(grad_value_, 0, keys * padded<A>(p.value_width) * sizeof(A));
  }

  void run(A* grad_query_part) {
    const int64_t total = p_.heads / p_.kv_heads * e_.query_rows;
    for (int64_t row = 0; row < total; row += kAttentionTile) {
      tile_.load(e_, b_, kv_head_, row, total, delta_);
      __builtin_memset(grad_query_, 0, Tile::kPanels * p_.width * W * sizeof(A));
      const int64_t begin = most(tile_.any.begin, chunk_.begin), end = least(tile_.any.end, chunk_.end);
      const int64_t from = chunk_.begin + most(0, begin - chunk_.begin) / kBackwardBlock * kBackwardBlock;
      for (int64_t first = from; first < end; first += kBackwardBlock)
        add_block(first, least(kBackwardBlock, chunk_.end - first));
      write_grad_query(grad_query_part ? grad_query_part + row * p_.width : nullptr);
    }
    for (int64_t j = chunk_.begin; j < chunk_.end; ++j) {
      const int64_t at = j - chunk_.begin;
      if (p_.grad_key.data)
        write_row(p_.dtype, key_row(p_, p_.grad_key, e_, b_, kv_head_, j), p_.width,
                  grad_key_ + at * padded<A>(p_.width), tile_.scale.rest);
      if (p_.grad_value.data)
        write_row(p_.dtype, key_row(p_, p_.grad_value, e_, b_, kv_head_, j), p_.value_width,
                  grad_value_ + at * padded<A>(p_.value_width), A(1));
    }
  }

 private:
  static size_t bytes(const Attention& p, int64_t keys) {
    const int64_t width = padded<A>(p.width), value_width = padded<A>(p.value_width);
    return Tile::bytes(p) + Arena::bytes_of<A>(keys * width) + Arena::bytes_of<A>(keys * value_width) +
           Arena::bytes_of<A>(Tile::kPanels * p.width * W) + Arena::bytes_of<A>(W * width) +
           kPack<E> * Arena::bytes_of<A>(kBackwardBlock * width) + Arena::bytes_of<A>(kBackwardBlock * value_width);
  }

  void add_block(int64_t first, int64_t n) {
    const int64_t width = padded<A>(p_.width), value_width = padded<A>(p_.value_width);
    const auto keys = key_block<E>(p_, p_.key, e_, b_, kv_head_, first, n, p_.width, key_scratch_);
    const auto values = key_block<E>(p_, p_.value, e_, b_, kv_head_, first, n, p_.value_width, value_scratch_);
    const bool hides = tile_.scores(first, n, keys, values);
    const bool guarded = hides && !(tile_.finite && all_finite<A>(p_, p_.key, e_, b_, kv_head_, first, n, p_.width));
    const int64_t at = first - chunk_.begin, depth = elements<E>(tile_.rows);
    auto add_rows = guarded ? &multiply_visible<E, true> : &multiply<E, true>;
    add_rows(n, value_width / L, {tile_.dropped, Tile::kPitch, 1}, tile_.grad, value_width, depth,
             grad_value_ + at * value_width, value_width);
    add_rows(n, width / L, {tile_.score_grad, Tile::kPitch, 1}, tile_.query, width, depth, grad_key_ + at * width,
             width);
    if (!p_.grad_query.data) return;
    const auto columns = kPack<E> == 1
                             ? Broadcast<E>{keys.data, keys.step, keys.row}
                             : key_columns<E>(p_, p_.key, e_, b_, kv_head_, first, n, p_.width, column_scratch_);
    auto add_lanes = guarded ? &multiply_visible<E, false> : &multiply<E, true>;
    for (int i = 0; i < tile_.panels; ++i) {
      const PanelBlock part = visible_part(p_, tile_.panel[i], first, n);
      if (!tile_.seen[i]) continue;
      const int64_t skipped = part.first - first;
      add_lanes(p_.width, tile_.panel[i].vectors, skip_columns(columns, skipped),
                tile_.grad_by_key + skipped / kPack<E> * Tile::kRows + i * W, Tile::kRows, elements<E>(part.n),
                grad_query_ + i * p_.width * W, W);
    }
  }

  void write_grad_query(A* part) {
    if (!p_.grad_query.data) return;
    alignas(64) A factor[W];
    for (A& x : factor) x = A(p_.scale);
    for (int i = 0; i < tile_.panels; ++i) {
      const Panel<A>& panel = tile_.panel[i];
      const int64_t pitch = padded<A>(p_.width);
      unpack_transposed(p_.width, panel.rows, grad_query_ + i * p_.width * W, factor, query_rows_, pitch);
      for (int lane = 0; lane < panel.rows; ++lane) {
        const A* sums = query_rows_ + lane * pitch;
        if (part)
          write_row(kDType<A>, part + (i * W + lane) * p_.width, p_.width, sums, A(1));
        else
          write_row(p_.dtype, query_row(p_, p_.grad_query, e_, b_, panel.head[lane], panel.query[lane]), p_.width, sums,
                    A(1));
      }
    }
  }

  const AttentionBackward& p_;
  AttentionEntry e_;
  int64_t b_, kv_head_;
  KeyRange chunk_;
  const A* delta_;
  Arena arena_;
  Tile tile_;
  A *grad_key_, *grad_value_;  // [keys of the chunk][padded width]
  A* grad_query_;              // [panel][width][W]
  A *query_rows_, *key_scratch_, *column_scratch_, *value_scratch_;
};

// delta = sum_c dO O - dlse, like the lse.
template <class A>
void find_delta(const AttentionBackward& p, A* delta) {
  parallel_pieces(p.batch * p.heads, run_of(p, p.batch * p.heads), [&](int64_t piece) {
    const int64_t b = piece / p.heads, h = piece % p.heads;
    const AttentionEntry e = attention_entry(p, b);
    Scratch<A> grad_scratch(padded<A>(p.value_width)), out_scratch(padded<A>(p.value_width));
    for (int64_t i = 0; i < e.query_rows; ++i) {
      const A* grad = read_row(p.dtype, query_row(p, p.grad_output, e, b, h, i), p.value_width, grad_scratch.data);
      const A* out = read_row(p.dtype, query_row(p, p.output, e, b, h, i), p.value_width, out_scratch.data);
      vec<A> sum = {};
      for (int64_t c = 0; c < p.value_width; c += kLanes<A>)
        sum += load_first(grad + c, p.value_width - c) * load_first(out + c, p.value_width - c);
      const int64_t at = lse_index(p, e, b, h, i);
      delta[at] = sum_lanes(sum) - (p.grad_lse ? static_cast<const A*>(p.grad_lse)[at] : A(0));
    }
  });
}

// dsink_h = -sum over rows of exp(sink_h - lse) * delta, in order.
template <class A>
void find_grad_sinks(const AttentionBackward& p, const A* delta) {
  parallel_pieces(p.heads, p.heads, [&](int64_t h) {
    double sum = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      const AttentionEntry e = attention_entry(p, b);
      for (int64_t i = 0; i < e.query_rows; ++i) {
        const int64_t at = lse_index(p, e, b, h, i);
        sum -= exponential(p.sinks[h] - double(static_cast<const A*>(p.lse)[at])) * double(delta[at]);
      }
    }
    p.grad_sinks[h] = sum;
  });
}

template <class A>
void add_query_parts(const AttentionBackward& p, const BackwardCut& cut, A* parts) {
  const int64_t rows = cut.tiles * kAttentionTile;
  const int64_t pieces = p.batch * p.kv_heads * cut.tiles;
  parallel_pieces(pieces, run_of(p, pieces), [&](int64_t piece) {
    const int64_t head = piece / cut.tiles, b = head / p.kv_heads, kv_head = head % p.kv_heads;
    const AttentionEntry e = attention_entry(p, b);
    const int64_t group = p.heads / p.kv_heads, first = piece % cut.tiles * kAttentionTile;
    Scratch<A> sum(padded<A>(p.width));
    for (int64_t flat = first; flat < least(first + kAttentionTile, group * e.query_rows); ++flat) {
      for (int64_t c = 0; c < p.width; c += kLanes<A>) {
        vec<A> of_chunks = {};
        for (int64_t k = 0; k < cut.chunks; ++k)
          of_chunks += load_first(parts + ((head * cut.chunks + k) * rows + flat) * p.width + c, p.width - c);
        store(sum.data + c, of_chunks);
      }
      const int64_t h = kv_head * group + flat / e.query_rows, i = flat % e.query_rows;
      write_row(p.dtype, query_row(p, p.grad_query, e, b, h, i), p.width, sum.data, A(1));
    }
  });
}

template <class E>
void attention_backward_in(const AttentionBackward& p) {
  using A = Accumulate<E>;
  const BackwardCut cut(p);
  const int64_t heads = p.batch * p.kv_heads, rows = cut.tiles * kAttentionTile;
  Scratch<A> delta((p.query_starts ? 1 : p.batch) * p.heads * p.total_rows);
  find_delta<A>(p, delta.data);
  if (p.grad_sinks) find_grad_sinks(p, delta.data);
  if (p.grad_query.data || p.grad_key.data || p.grad_value.data) {
    const bool in_parts = cut.chunks > 1 && p.grad_query.data;
    Scratch<A> parts(in_parts ? heads * cut.chunks * rows * p.width : 0);
    // Head by head, as in the forward; under a causal window the first chunks have the most work.
    parallel_pieces(heads * cut.chunks, run_of(p, heads * cut.chunks), [&](int64_t piece) {
      const int64_t head = piece / cut.chunks, chunk = piece % cut.chunks;
      const KeyRange keys{chunk * cut.chunk_keys, least((chunk + 1) * cut.chunk_keys, p.key_rows)};
      BackwardPiece<E> work(p, head / p.kv_heads, head % p.kv_heads, keys, delta.data);
      work.run(in_parts ? parts.data + (head * cut.chunks + chunk) * rows * p.width : nullptr);
    });
    if (in_parts) add_query_parts(p, cut, parts.data);
  }
  if (p.grad_mask) find_grad_mask(p, delta.data);
}

}  // namespace handtuned::HANDTUNED_ISA
