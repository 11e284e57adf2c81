// Attention backward (Dao, "FlashAttention-2", 2023), scores recomputed from q, k and the saved lse.
//
//   P  = e^(S - lse),   dP[j][lane] = sum_c V[j][c] dO^T[c][lane],   delta = sum_c dO O - dlse
//   dS = P * (dP * keep - delta), through the derivative of the softcap where there is one
//   dV[j][c] += sum_lane P keep[j][lane] dO[lane][c]        dK[j][d] += sum_lane dS[j][lane] Q[lane][d],  Q scaled
//   dQ^T[d][lane] += scale sum_j K[j][d] dS[j][lane]
// Plan: a piece is (batch, kv head, run of chunks of keys) and owns dK and dV of its keys, in float scratch that stays
// in L2. Tiles of 64 query rows pass outside, blocks of 128 keys inside; P and dS of a block stand as [key][64 rows],
// so that dK and dV contract over the whole tile at once. Each chunk makes its own dQ^T of a tile, and those of all
// chunks are added in order. So results depend on the chunks, which shapes alone decide, and not on the runs: few
// threads take long ones, for which a tile is packed once. There are 8 chunks at most, so scratch grows with the length
// of the sequences and not with its square.
#pragma once
#include "attention_mask.h"
#include "attention_tile.h"
#include "parallel.h"

namespace handtuned::HANDTUNED_ISA {

struct BackwardCut {
  int64_t tiles, chunks, chunk_keys;
  int64_t run, runs;        // chunks that a piece takes, pieces of a head
  int64_t entries, groups;  // batch entries that a piece takes, groups of them
  BackwardCut(const AttentionBackward& p, int64_t threads) {
    constexpr int64_t kRunElements = 1 << 16, kPiecesOfThread = 4;  // dK and dV in L2; work for all to the end
    tiles = (p.heads / p.kv_heads * p.query_rows + kAttentionTile - 1) / kAttentionTile;
    const int64_t heads = most(1, p.batch * p.kv_heads), wanted = least((kPieces + heads - 1) / heads, 8);
    // Dropout factors come in blocks of kKeyBlock keys; fewer than 64 keys are not worth packing a tile for.
    const int64_t unit = p.dropout.p > 0 ? kKeyBlock : 64;
    chunk_keys = most(1, p.key_rows / (wanted * unit)) * unit;
    chunks = most(1, (p.key_rows + chunk_keys - 1) / chunk_keys);
    entries = mask_entries(p, chunks);
    groups = (p.batch + entries - 1) / entries;
    const int64_t fit = most(1, kRunElements / (chunk_keys * (p.width + p.value_width)));
    const int64_t spare = most(1, groups * p.kv_heads * chunks / (kPiecesOfThread * threads));
    runs = (chunks - 1) / least(fit, spare) + 1;
    run = (chunks - 1) / runs + 1;
    runs = (chunks - 1) / run + 1;
  }
};

// dQ = scale * dQ^T of a tile, [panel][width][W], into its rows.
template <class A>
void write_grad_query(const AttentionBackward& p, int64_t b, int64_t kv_head, int64_t first_row, const A* grad) {
  constexpr int W = kPanel<A>;
  const AttentionEntry e = attention_entry(p, b);
  const int64_t group = p.heads / p.kv_heads, end = least(first_row + kAttentionTile, group * e.query_rows);
  const int64_t pitch = padded<A>(p.width);
  Scratch<A> rows(W * pitch);
  alignas(64) A factor[W];
  for (A& x : factor) x = A(p.scale);
  for (int64_t row = first_row; row < end; row += W, grad += p.width * W) {
    const int64_t n = least(W, end - row);
    unpack_transposed(p.width, int(n), grad, factor, rows.data, pitch);
    for (int64_t lane = 0; lane < n; ++lane) {
      const int64_t h = kv_head * group + (row + lane) / e.query_rows, i = (row + lane) % e.query_rows;
      write_row(p.dtype, query_row(p, p.grad_query, e, b, h, i), p.width, rows.data + lane * pitch, A(1));
    }
  }
}

// to += from, of a tile's dQ^T.
template <class A>
HT_INLINE void add_tile(const Attention& p, const A* from, A* to) {
  for (int64_t i = 0; i < kAttentionTile * p.width; i += kLanes<A>) store(to + i, load(to + i) + load(from + i));
}

// A run of chunks of keys of (b, kv head). parts: dQ^T of each chunk and tile of the head, [chunk][tile][64 * width],
// to be added later; nullptr where the run is the whole head and adds its own. mask_sum: of the head, or nullptr.
template <class E>
class BackwardPiece {
  using A = Accumulate<E>;
  using Tile = BackwardTile<E>;
  static constexpr int W = Tile::W, L = Tile::L;

 public:
  BackwardPiece(const AttentionBackward& p, const BackwardCut& cut, int64_t b, int64_t kv_head, int64_t first_chunk,
                const A* delta, A* parts, const MaskSums<A>& masks, A* mask_sum)
      : p_(p),
        cut_(cut),
        e_(attention_entry(p, b)),
        b_(b),
        kv_head_(kv_head),
        chunks_{first_chunk, least(first_chunk + cut.run, cut.chunks)},
        keys_{chunks_.begin * cut.chunk_keys, least(chunks_.end * cut.chunk_keys, e_.key_rows)},
        delta_(delta),
        parts_(parts),
        masks_(masks),
        mask_sum_(mask_sum),
        arena_(bytes(p, cut)),
        tile_(p, arena_) {
    const int64_t keys = most(0, keys_.end - keys_.begin);
    grad_key_ = arena_.template take<A>(keys * padded<A>(p.width));
    grad_value_ = arena_.template take<A>(keys * padded<A>(p.value_width));
    sum_ = arena_.template take<A>(kAttentionTile * p.width);
    own_ = arena_.template take<A>(kAttentionTile * p.width);
    key_scratch_ = arena_.template take<A>(kBackwardBlock * padded<A>(p.width));
    column_scratch_ = arena_.template take<A>(kPack<E> == 2 ? kBackwardBlock * padded<A>(p.width) : 0);
    value_scratch_ = arena_.template take<A>(kBackwardBlock * padded<A>(p.value_width));
    __builtin_memset(grad_key_, 0, keys * padded<A>(p.width) * sizeof(A));
    __builtin_memset(grad_value_, 0, keys * padded<A>(p.value_width) * sizeof(A));
  }

  void run() {
    const int64_t total = p_.heads / p_.kv_heads * e_.query_rows, size = kAttentionTile * p_.width;
    for (int64_t t = 0; t * kAttentionTile < total; ++t) {
      tile_.load(e_, b_, kv_head_, t * kAttentionTile, total, delta_);
      for (int64_t chunk = chunks_.begin; chunk < chunks_.end; ++chunk) {
        A* grad_query = chunk == chunks_.begin ? sum_ : own_;
        if (parts_) grad_query = parts_ + (chunk * cut_.tiles + t) * size;
        add_chunk(t, chunk, grad_query);
        if (grad_query == own_) add_tile(p_, own_, sum_);
      }
      if (!parts_ && p_.grad_query.data) write_grad_query(p_, b_, kv_head_, t * kAttentionTile, sum_);
    }
    for (int64_t j = keys_.begin; j < keys_.end; ++j) {
      const int64_t at = j - keys_.begin;
      if (p_.grad_key.data)
        write_row(p_.dtype, key_row(p_, p_.grad_key, e_, b_, kv_head_, j), p_.width,
                  grad_key_ + at * padded<A>(p_.width), tile_.scale.rest);
      if (p_.grad_value.data)
        write_row(p_.dtype, key_row(p_, p_.grad_value, e_, b_, kv_head_, j), p_.value_width,
                  grad_value_ + at * padded<A>(p_.value_width), A(1));
    }
  }

 private:
  static size_t bytes(const Attention& p, const BackwardCut& cut) {
    const int64_t width = padded<A>(p.width), value_width = padded<A>(p.value_width), keys = cut.run * cut.chunk_keys;
    return Tile::bytes(p) + Arena::bytes_of<A>(keys * width) + Arena::bytes_of<A>(keys * value_width) +
           2 * Arena::bytes_of<A>(kAttentionTile * p.width) + kPack<E> * Arena::bytes_of<A>(kBackwardBlock * width) +
           Arena::bytes_of<A>(kBackwardBlock * value_width);
  }

  // Everything that tile t and a chunk give; grad_query: dQ^T of both.
  void add_chunk(int64_t t, int64_t chunk, A* grad_query) {
    __builtin_memset(grad_query, 0, kAttentionTile * p_.width * sizeof(A));
    const int64_t start = chunk * cut_.chunk_keys, stop = least(start + cut_.chunk_keys, keys_.end);
    const int64_t begin = most(tile_.any.begin, start), end = least(tile_.any.end, stop);
    for (int64_t first = start + (begin - start) / kBackwardBlock * kBackwardBlock; first < end;
         first += kBackwardBlock) {
      if (mask_sum_) tile_.mask_grad = masks_.tile(mask_sum_, t, first);
      add_block(first, least(kBackwardBlock, stop - first), grad_query);
    }
  }

  void add_block(int64_t first, int64_t n, A* grad_query) {
    const int64_t width = padded<A>(p_.width), value_width = padded<A>(p_.value_width);
    const auto keys = key_block<E>(p_, p_.key, e_, b_, kv_head_, first, n, p_.width, key_scratch_);
    const auto values = key_block<E>(p_, p_.value, e_, b_, kv_head_, first, n, p_.value_width, value_scratch_);
    const bool hides = tile_.scores(first, n, keys, values);
    const bool guarded = hides && !(tile_.finite && all_finite<A>(p_, p_.key, e_, b_, kv_head_, first, n, p_.width));
    const int64_t at = first - keys_.begin, depth = elements<E>(tile_.rows);
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
                grad_query + i * p_.width * W, W);
    }
  }

  const AttentionBackward& p_;
  const BackwardCut& cut_;
  AttentionEntry e_;
  int64_t b_, kv_head_;
  KeyRange chunks_, keys_;
  const A* delta_;
  A* parts_;
  const MaskSums<A>& masks_;
  A* mask_sum_;
  Arena arena_;
  Tile tile_;
  A *grad_key_, *grad_value_;  // [key][padded width]
  A *sum_, *own_;              // dQ^T of a tile, [panel][width][W]: of the chunks so far, of one
  A *key_scratch_, *column_scratch_, *value_scratch_;
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

// dQ of all tiles from their chunks' parts [head][chunk][tile], in order.
template <class A>
void add_query_parts(const AttentionBackward& p, const BackwardCut& cut, A* parts) {
  const int64_t pieces = p.batch * p.kv_heads * cut.tiles, size = kAttentionTile * p.width;
  parallel_pieces(pieces, run_of(p, pieces), [&](int64_t piece) {
    const int64_t head = piece / cut.tiles, tile = piece % cut.tiles;
    A* sum = parts + (head * cut.chunks * cut.tiles + tile) * size;  // into the first
    for (int64_t k = 1; k < cut.chunks; ++k) add_tile(p, sum + k * cut.tiles * size, sum);
    write_grad_query(p, head / p.kv_heads, head % p.kv_heads, tile * kAttentionTile, sum);
  });
}

template <class E>
void attention_backward_in(const AttentionBackward& p) {
  using A = Accumulate<E>;
  const BackwardCut cut(p, thread_count());
  Scratch<A> delta((p.query_starts ? 1 : p.batch) * p.heads * p.total_rows);
  find_delta<A>(p, delta.data);
  if (p.grad_sinks) find_grad_sinks(p, delta.data);
  if (p.grad_query.data || p.grad_key.data || p.grad_value.data) {
    MaskSums<A> masks(p, cut.groups);
    const int64_t pieces = cut.groups * p.kv_heads * cut.runs,
                  head_size = cut.chunks * cut.tiles * kAttentionTile * p.width;
    const bool in_parts = cut.runs > 1 && p.grad_query.data;
    Scratch<A> parts(in_parts ? p.batch * p.kv_heads * head_size : 0);
    // Head by head, as in the forward; under a causal window the first chunks have the most work.
    parallel_pieces(pieces, run_of(p, pieces), [&](int64_t piece) {
      const int64_t group = piece / cut.runs / p.kv_heads, kv_head = piece / cut.runs % p.kv_heads;
      const int64_t first_chunk = piece % cut.runs * cut.run;
      const int64_t first_key = first_chunk * cut.chunk_keys;
      A* mask_sum = masks.start(group, kv_head, {first_key, least(first_key + cut.run * cut.chunk_keys, p.key_rows)});
      for (int64_t b = group * cut.entries; b < least((group + 1) * cut.entries, p.batch); ++b)
        BackwardPiece<E>(p, cut, b, kv_head, first_chunk, delta.data,
                         in_parts ? parts.data + (b * p.kv_heads + kv_head) * head_size : nullptr, masks, mask_sum)
            .run();
    });
    if (in_parts) add_query_parts(p, cut, parts.data);
    masks.write();
  }
  if (p.grad_mask && !sums_mask_beside(p)) find_grad_mask(p, delta.data);
}

}  // namespace handtuned::HANDTUNED_ISA
