// Attention forward (Dao et al., "FlashAttention", 2022): how the work is cut, and the parts put together.
//
// Pieces of work are (batch, kv head, tile of 64 query rows): attention_lanes.h, or attention_rows.h where a tile has
// few rows. Where pieces are few, as in decoding, the keys are cut into chunks whose (O, m, l) are merged in order.
// Shapes alone decide, so results do not depend on the number of threads.
#pragma once
#include "attention_lanes.h"
#include "attention_rows.h"
#include "parallel.h"

namespace handtuned::HANDTUNED_ISA {

inline constexpr int64_t kLeastChunk = 512;  // keys

struct ForwardCut {
  int64_t tiles, chunks, chunk_keys;
  explicit ForwardCut(const Attention& p) {
    tiles = (p.heads / p.kv_heads * p.query_rows + kAttentionTile - 1) / kAttentionTile;
    const int64_t pieces = most(1, p.batch * p.kv_heads * tiles);
    const int64_t wanted = most(1, least((kPieces + pieces - 1) / pieces, p.key_rows / kLeastChunk));
    chunk_keys = most(1, (p.key_rows + wanted * kKeyBlock - 1) / (wanted * kKeyBlock)) * kKeyBlock;
    chunks = most(1, (p.key_rows + chunk_keys - 1) / chunk_keys);
  }
};

// out and lse of row `flat` of (b, kv head) from its chunks' (O, m, l), in order.
template <class A>
void merge_chunks(const AttentionForward& p, int64_t chunks, int64_t b, int64_t kv_head, int64_t flat, A* partial,
                  int64_t pitch, int64_t chunk_pitch) {
  const AttentionEntry e = attention_entry(p, b);
  const int64_t h = kv_head * (p.heads / p.kv_heads) + flat / e.query_rows, i = flat % e.query_rows;
  A max = -A(__builtin_inf()), sum = 0;
  for (int64_t k = 0; k < chunks; ++k) {
    const A m = partial[k * chunk_pitch + pitch - 2];
    if (m > max) max = m;
  }
  const A from = max == -A(__builtin_inf()) ? A(0) : max;
  for (int64_t k = 0; k < chunks; ++k) {
    const A* own = partial + k * chunk_pitch;
    const A scale = exponential(own[pitch - 2] - from);
    sum += own[pitch - 1] * scale;
    for (int64_t c = 0; c < p.value_width; c += kLanes<A>)  // into the first
      store(partial + c, (k ? load(partial + c) : vec<A>{}) + load(own + c) * scale);
  }
  write_row(p.dtype, query_row(p, p.output, e, b, h, i), p.value_width, partial, sum == 0 ? A(0) : A(1) / sum);
  static_cast<A*>(p.lse)[lse_index(p, e, b, h, i)] = max + logarithm(sum);
}

// Runs use(piece) on the piece of work that suits the tile's rows.
template <class E, class Use>
void with_piece(const AttentionForward& p, int64_t b, int64_t kv_head, int64_t first_row, KeyRange keys, Use use) {
  using A = Accumulate<E>;
  const int64_t rows = p.heads / p.kv_heads * attention_entry(p, b).query_rows - first_row;
  if (!RowsPiece<A>::suits(p, rows)) {
    LanesPiece<E> piece(p, b, kv_head, first_row, keys);
    return use(piece);
  }
  with_type<A>(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_same_v<Accumulate<T>, A>) {
      RowsPiece<T> piece(p, b, kv_head, first_row, keys);
      use(piece);
    }
  });
}

// Which piece of work is the i-th. Head by head, so that its keys and values stay in the cache for all its tiles. The
// last tiles have the most work under a causal window, so they come first.
struct ForwardPiece {
  int64_t head, tile, chunk;
  ForwardPiece(const ForwardCut& cut, int64_t i)
      : head(i / cut.chunks / cut.tiles), tile(cut.tiles - 1 - i / cut.chunks % cut.tiles), chunk(i % cut.chunks) {}
};

// Asks for what a piece will read first: its queries and, where it is the first of its head, keys and values.
template <class A>
void prefetch_piece(const AttentionForward& p, const ForwardCut& cut, int64_t i) {
  const ForwardPiece piece(cut, i);
  const int64_t b = piece.head / p.kv_heads, kv_head = piece.head % p.kv_heads, group = p.heads / p.kv_heads;
  const AttentionEntry e = attention_entry(p, b);
  const int64_t first = piece.tile * kAttentionTile, end = least(first + kAttentionTile, group * e.query_rows);
  for (int64_t flat = first; flat < end; ++flat)
    prefetch_row(query_row(p, p.query, e, b, kv_head * group + flat / e.query_rows, flat % e.query_rows),
                 p.width * bytes_of(p.dtype));
  if (piece.tile < cut.tiles - 1 || piece.chunk > 0 || RowsPiece<A>::suits(p, end - first)) return;
  prefetch_rows(p, p.key, e, b, kv_head, 0, least(kKeyBlock, e.key_rows), p.width);
  prefetch_rows(p, p.value, e, b, kv_head, 0, least(kKeyBlock, e.key_rows), p.value_width);
}

template <class E>
void attention_forward_in(const AttentionForward& p) {
  using A = Accumulate<E>;
  const ForwardCut cut(p);
  const int64_t pitch = padded<A>(p.value_width) + 2, tile_pitch = kAttentionTile * pitch;
  const int64_t heads = p.batch * p.kv_heads;
  Scratch<A> partials(cut.chunks > 1 ? heads * cut.tiles * cut.chunks * tile_pitch : 0);
  const int64_t pieces = heads * cut.tiles * cut.chunks;
  parallel_pieces(pieces, run_of(p, pieces), [&](int64_t i) {
    const auto [head, tile, chunk] = ForwardPiece(cut, i);
    const KeyRange keys{chunk * cut.chunk_keys, least((chunk + 1) * cut.chunk_keys, p.key_rows)};
    A* partial = partials.data + ((head * cut.tiles + tile) * cut.chunks + chunk) * tile_pitch;
    if (i + 1 < pieces) prefetch_piece<A>(p, cut, i + 1);
    with_piece<E>(p, head / p.kv_heads, head % p.kv_heads, tile * kAttentionTile, keys, [&](auto& work) {
      work.run();
      cut.chunks == 1 ? work.write() : work.write_partial(partial, pitch);
    });
  });
  if (cut.chunks == 1) return;
  parallel_pieces(heads, run_of(p, heads), [&](int64_t head) {
    const int64_t rows = p.heads / p.kv_heads * attention_entry(p, head / p.kv_heads).query_rows;
    for (int64_t flat = 0; flat < rows; ++flat) {
      const int64_t tile = flat / kAttentionTile, row = flat % kAttentionTile;
      merge_chunks(p, cut.chunks, head / p.kv_heads, head % p.kv_heads, flat,
                   partials.data + (head * cut.tiles + tile) * cut.chunks * tile_pitch + row * pitch, pitch,
                   tile_pitch);
    }
  });
}

}  // namespace handtuned::HANDTUNED_ISA
