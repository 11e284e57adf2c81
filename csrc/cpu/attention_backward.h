// Attention backward (Dao, "FlashAttention-2", 2023), scores recomputed from q, k and the saved lse.
//
//   P  = 2^(S - lse / ln 2),   dP[j][lane] = sum_c V[j][c] dO^T[c][lane],   delta = sum_c dO O - dlse
//   dS = P * (dP * keep - delta), through the derivative of the softcap where there is one
//   dV[j][c] += sum_lane P keep[j][lane] dO[lane][c]        dK[j][d] += scale sum_lane dS[j][lane] Q[lane][d]
//   dQ^T[d][lane] += scale sum_j K[j][d] dS[j][lane]
// Plan: a piece is (batch, kv head, chunk of keys) and owns dK and dV of its chunk, in float scratch that stays in L2.
// Tiles of 64 query rows pass outside, blocks of 64 keys inside; P and dS of a block stand as [key][64 rows], so that
// dK and dV contract over the whole tile at once. dQ of one tile and one chunk is finished in one go: with one chunk it
// is the result, else the chunks' dQ are added in order. Shapes alone decide the number of chunks, at most 8, so the
// scratch grows with the length of the sequences and not with its square.
#pragma once
#include "attention.h"

namespace handtuned::HANDTUNED_ISA {

inline constexpr int64_t kBackwardBlock = 64;  // keys
static_assert(kKeyBlock % kBackwardBlock == 0);

struct BackwardCut {
  int64_t tiles, chunks, chunk_keys;
  explicit BackwardCut(const Attention& p) {
    tiles = (p.heads / p.kv_heads * p.query_rows + kAttentionTile - 1) / kAttentionTile;
    const int64_t heads = most(1, p.batch * p.kv_heads), blocks = (p.key_rows + kBackwardBlock - 1) / kBackwardBlock;
    chunks = most(1, least(least((kPieces + heads - 1) / heads, 8), blocks));
    // Dropout factors come in blocks of kKeyBlock keys.
    const int64_t unit = p.dropout.p > 0 ? kKeyBlock : kBackwardBlock;
    chunk_keys = (p.key_rows + chunks * unit - 1) / (chunks * unit) * unit;
  }
};

// A tile of query rows and what stays the same for all keys: panels, Q and dO in both orders, lse and delta.
template <class T>
class BackwardTile {
  using A = Accumulate<T>;

 public:
  static constexpr int W = kPanel<A>, L = kLanes<A>, kPanels = int(kAttentionTile) / W;
  static constexpr int64_t kRows = kAttentionTile;

  BackwardTile(const AttentionBackward& p, Arena& arena) : p_(p) {
    query_t = arena.take<A>(kPanels * p.width * W);
    grad_t = arena.take<A>(kPanels * p.value_width * W);
    query = arena.take<A>(kRows * padded<A>(p.width));
    grad = arena.take<A>(kRows * padded<A>(p.value_width));
    weight = arena.take<A>(kBackwardBlock * kRows);
    dropped = p.dropout.p > 0 ? arena.take<A>(kBackwardBlock * kRows) : weight;
    score_grad = arena.take<A>(kBackwardBlock * kRows);
    bias_ = arena.take<A>(kKeyBlock * W);
    factor_ = arena.take<A>(kKeyBlock * W);
    factor_row_ = arena.take<A>(kKeyBlock * W);
    derivative_ = arena.take<A>(kBackwardBlock * W);
  }

  static size_t bytes(const Attention& p) {
    return Arena::bytes_of<A>(kPanels * p.width * W) + Arena::bytes_of<A>(kPanels * p.value_width * W) +
           Arena::bytes_of<A>(kRows * padded<A>(p.width)) + Arena::bytes_of<A>(kRows * padded<A>(p.value_width)) +
           4 * Arena::bytes_of<A>(kBackwardBlock * kRows) + 3 * Arena::bytes_of<A>(kKeyBlock * W);
  }

  // Rows [first_row, first_row + 64) of (b, kv head), or those before `end_row`. delta: like the lse.
  void load(const AttentionEntry& e, int64_t b, int64_t kv_head, int64_t first_row, int64_t end_row, const A* delta) {
    e_ = e, b_ = b, rows = least(end_row - first_row, kRows);
    any = {e.key_rows, 0};
    for (panels = 0; panels < kPanels && panels * W < rows; ++panels) {
      panel[panels] = make_panel<A>(p_, e, b, kv_head, first_row + panels * W, end_row);
      any = {least(any.begin, panel[panels].any.begin), most(any.end, panel[panels].any.end)};
      load_panel(panels, delta);
    }
    finite = all_finite<A>({query, padded<A>(p_.width), 1}, rows, p_.width) &&
             all_finite<A>({grad, padded<A>(p_.value_width), 1}, rows, p_.value_width);
  }

  // weight (P), dropped (P * keep) and score_grad (dS) [key][64 rows] of keys [first, first + n), zero where not
  // visible. Returns whether a row does not see some of them.
  bool scores(int64_t first, int64_t n, Broadcast<A> keys, Broadcast<A> values) {
    bool hides = p_.mask.type != AttentionMask::Type::none;
    for (int i = 0; i < panels; ++i) {
      const PanelBlock part = visible_part(p_, panel[i], first, n);
      hides |= part.partial;
      for (A* block : {weight, dropped, score_grad}) clear(block + i * W, part, first, n);
      if (part.n > 0) panel_scores(i, part, part.first - first, keys, values);
    }
    return hides;
  }

  bool through_softcap = true;  // whether score_grad is that of q.k, or of what the mask is added to
  int panels;
  int64_t rows;
  KeyRange any;
  bool finite;
  Panel<A> panel[kPanels];
  A *query_t, *grad_t;               // [panel][width][W], [panel][value_width][W]
  A *query, *grad;                   // [64][padded width]
  A *weight, *dropped, *score_grad;  // [kBackwardBlock][64]

 private:
  void load_panel(int i, const A* delta) {
    const Panel<A>& own = panel[i];
    const T *queries[W], *grads[W];
    for (int lane = 0; lane < W; ++lane) {
      lse_[i][lane] = A(__builtin_inf()), delta_[i][lane] = 0;  // a lane without a row, or a row without keys: P = 0
      if (lane >= own.rows) continue;
      const int64_t h = own.head[lane], q = own.query[lane], at = lse_index(p_, e_, b_, h, q);
      const A lse = static_cast<const A*>(p_.lse)[at];
      if (lse != -A(__builtin_inf())) lse_[i][lane] = lse * A(kLog2e);
      delta_[i][lane] = delta[at];
      queries[lane] = query_row<const T>(p_.query, e_, b_, h, q);
      grads[lane] = query_row<const T>(p_.grad_output, e_, b_, h, q);
    }
    auto take = [&](const T** from, int64_t width, A* transposed, A* straight) {
      pack_transposed(width, own.rows, own.vectors, transposed,
                      [&](int lane, int64_t c, int64_t n) HT_LAMBDA { return load_first(from[lane] + c, n); });
      const int64_t pitch = padded<A>(width);
      for (int lane = 0; lane < own.rows; ++lane)
        for (int64_t c = 0; c < width; c += L)
          store(straight + (i * W + lane) * pitch + c, load_first(from[lane] + c, width - c));
    };
    take(queries, p_.width, query_t + i * p_.width * W, query);
    take(grads, p_.value_width, grad_t + i * p_.value_width * W, grad);
  }

  // Zeros in the lanes of one panel, for the keys outside `part`.
  static void clear(A* block, PanelBlock part, int64_t first, int64_t n) {
    for (int64_t j = 0; j < n; ++j) {
      if (part.n > 0 && first + j >= part.first && first + j < part.first + part.n) continue;
      __builtin_memset(block + j * kRows, 0, W * sizeof(A));
    }
  }

  void panel_scores(int i, PanelBlock part, int64_t skipped, Broadcast<A> keys, Broadcast<A> values) {
    const Panel<A>& own = panel[i];
    A *s = weight + skipped * kRows + i * W, *ds = score_grad + skipped * kRows + i * W;
    keys.data += skipped * keys.row;
    values.data += skipped * values.row;
    multiply<A, false>(part.n, own.vectors, keys, query_t + i * p_.width * W, W, p_.width, s, kRows);
    multiply<A, false>(part.n, own.vectors, values, grad_t + i * p_.value_width * W, W, p_.value_width, ds, kRows);
    const A factor = finish_scores<T>(p_, own, b_, part, s, kRows, bias_, derivative_);
    const A* keep = nullptr;
    if (p_.dropout.p > 0) {
      const int64_t aligned = part.first / kKeyBlock * kKeyBlock, before = part.first - aligned;
      load_dropout(p_, e_, own, b_, aligned, before + part.n, factor_, factor_row_);
      keep = factor_ + before * W;
    }
    for (int64_t j = 0; j < part.n; ++j) {
      for (int v = 0; v < own.vectors; ++v) {
        const int64_t at = j * kRows + v * L;
        vec<A> p = exp2(HANDTUNED_ISA::load(s + at) * factor - HANDTUNED_ISA::load(lse_[i] + v * L));
        vec<A> dp = HANDTUNED_ISA::load(ds + at);
        store(s + at, p);
        if (keep) {
          const vec<A> k = HANDTUNED_ISA::load(keep + j * W + v * L);
          dp = k == A(0) ? vec<A>{} : dp * k;
          store(dropped + skipped * kRows + i * W + at, p * k);
        }
        // dS = P * (dP - delta); nothing of a hidden key enters
        vec<A> grad_of = p == A(0) ? vec<A>{} : p * (dp - HANDTUNED_ISA::load(delta_[i] + v * L));
        if (p_.softcap > 0 && through_softcap) grad_of *= HANDTUNED_ISA::load(derivative_ + j * W + v * L);
        store(ds + at, grad_of);
      }
    }
  }

  const AttentionBackward& p_;
  AttentionEntry e_;
  int64_t b_;
  alignas(64) A lse_[kPanels][W], delta_[kPanels][W];  // lse in log2
  A *bias_, *factor_, *factor_row_, *derivative_;
};

// ---- dQ, dK, dV ---------------------------------------------------------------------------------------------------

// One chunk of keys of (b, kv head). grad_query_part: dQ of this chunk [row][width] of float, or nullptr where it goes
// straight to the result.
template <class T>
class BackwardPiece {
  using A = Accumulate<T>;
  using Tile = BackwardTile<T>;
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
    key_scratch_ = arena_.template take<A>(kBackwardBlock * padded<A>(p.width));
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
      write_row(p_.grad_key, j, p_.width, grad_key_, A(p_.scale));
      write_row(p_.grad_value, j, p_.value_width, grad_value_, A(1));
    }
  }

 private:
  static size_t bytes(const Attention& p, int64_t keys) {
    const int64_t width = padded<A>(p.width), value_width = padded<A>(p.value_width);
    return Tile::bytes(p) + Arena::bytes_of<A>(keys * width) + Arena::bytes_of<A>(keys * value_width) +
           Arena::bytes_of<A>(Tile::kPanels * p.width * W) + Arena::bytes_of<A>(kBackwardBlock * width) +
           Arena::bytes_of<A>(kBackwardBlock * value_width);
  }

  void add_block(int64_t first, int64_t n) {
    const int64_t width = padded<A>(p_.width), value_width = padded<A>(p_.value_width), rows = Tile::kRows;
    const auto keys = key_block<T>(p_, p_.key, e_, b_, kv_head_, first, n, p_.width, key_scratch_);
    const auto values = key_block<T>(p_, p_.value, e_, b_, kv_head_, first, n, p_.value_width, value_scratch_);
    const bool hides = tile_.scores(first, n, keys, values);
    const bool guarded = hides && !(tile_.finite && all_finite(keys, n, p_.width));
    const int64_t at = first - chunk_.begin;
    auto add_rows = guarded ? &multiply_visible<A, true> : &multiply<A, true>;
    add_rows(n, value_width / L, {tile_.dropped, rows, 1}, tile_.grad, value_width, tile_.rows,
             grad_value_ + at * value_width, value_width);
    add_rows(n, width / L, {tile_.score_grad, rows, 1}, tile_.query, width, tile_.rows, grad_key_ + at * width, width);
    if (!p_.grad_query.data) return;
    auto add_lanes = guarded ? &multiply_visible<A, false> : &multiply<A, true>;
    for (int i = 0; i < tile_.panels; ++i) {
      const PanelBlock part = visible_part(p_, tile_.panel[i], first, n);
      if (part.n <= 0) continue;
      const int64_t skipped = part.first - first;
      add_lanes(p_.width, tile_.panel[i].vectors, {keys.data + skipped * keys.row, keys.step, keys.row},
                tile_.score_grad + skipped * rows + i * W, rows, part.n, grad_query_ + i * p_.width * W, W);
    }
  }

  void write_grad_query(A* part) {
    if (!p_.grad_query.data) return;
    for (int i = 0; i < tile_.panels; ++i) {
      const Panel<A>& panel = tile_.panel[i];
      T* rows[W];
      for (int lane = 0; lane < panel.rows; ++lane)
        rows[lane] = query_row<T>(p_.grad_query, e_, b_, panel.head[lane], panel.query[lane]);
      unpack_transposed<A>(p_.width, panel.rows, grad_query_ + i * p_.width * W,
                           [&](int lane, int64_t c, vec<A> v, int64_t n) HT_LAMBDA {
                             v *= A(p_.scale);
                             part ? store_first(part + (i * W + lane) * p_.width + c, v, n)
                                  : store_first(rows[lane] + c, v, n);
                           });
    }
  }

  void write_row(const AttentionTensor& to, int64_t j, int64_t width, const A* sums, A scale) {
    if (!to.data) return;
    T* row = key_row<T>(to, e_, b_, kv_head_, j);
    const A* from = sums + (j - chunk_.begin) * padded<A>(width);
    for (int64_t c = 0; c < width; c += L) store_first(row + c, load(from + c) * scale, width - c);
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
  A *key_scratch_, *value_scratch_;
};

// delta = sum_c dO O - dlse, like the lse.
template <class T>
void find_delta(const AttentionBackward& p, Accumulate<T>* delta) {
  using A = Accumulate<T>;
  parallel_pieces(p.batch * p.heads, attention_flops(p) < kSerialFlops, [&](int64_t piece) {
    const int64_t b = piece / p.heads, h = piece % p.heads;
    const AttentionEntry e = attention_entry(p, b);
    for (int64_t i = 0; i < e.query_rows; ++i) {
      const T *grad = query_row<const T>(p.grad_output, e, b, h, i), *out = query_row<const T>(p.output, e, b, h, i);
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
  parallel_pieces(p.heads, true, [&](int64_t h) {
    double sum = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      const AttentionEntry e = attention_entry(p, b);
      for (int64_t i = 0; i < e.query_rows; ++i) {
        const int64_t at = lse_index(p, e, b, h, i);
        sum -= power_of_2((p.sinks[h] - double(static_cast<const A*>(p.lse)[at])) * kLog2e) * double(delta[at]);
      }
    }
    p.grad_sinks[h] = sum;
  });
}

template <class T>
void add_query_parts(const AttentionBackward& p, const BackwardCut& cut, const Accumulate<T>* parts) {
  using A = Accumulate<T>;
  const int64_t rows = cut.tiles * kAttentionTile;
  parallel_pieces(p.batch * p.kv_heads * cut.tiles, attention_flops(p) < kSerialFlops, [&](int64_t piece) {
    const int64_t head = piece / cut.tiles, b = head / p.kv_heads, kv_head = head % p.kv_heads;
    const AttentionEntry e = attention_entry(p, b);
    const int64_t group = p.heads / p.kv_heads, first = piece % cut.tiles * kAttentionTile;
    for (int64_t flat = first; flat < least(first + kAttentionTile, group * e.query_rows); ++flat) {
      T* to = query_row<T>(p.grad_query, e, b, kv_head * group + flat / e.query_rows, flat % e.query_rows);
      for (int64_t c = 0; c < p.width; c += kLanes<A>) {
        vec<A> sum = {};
        for (int64_t k = 0; k < cut.chunks; ++k)
          sum += load_first(parts + ((head * cut.chunks + k) * rows + flat) * p.width + c, p.width - c);
        store_first(to + c, sum, p.width - c);
      }
    }
  });
}

// ---- the gradient of an additive mask -------------------------------------------------------------------------------

// dmask = dS before the softcap, summed over the dims along which the mask is broadcast. A pass of its own: a piece is
// a 64 x 64 tile of the mask (or its only row or column) and visits in order all that was added to it.
template <class T>
class MaskPiece {
  using A = Accumulate<T>;
  using Tile = BackwardTile<T>;

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
        if (m.type == AttentionMask::Type::same)
          store_first(static_cast<T*>(p_.grad_mask) + at, broadcast(total), 1);
        else
          static_cast<float*>(p_.grad_mask)[at] = float(total);
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
      const auto keys = key_block<T>(p_, p_.key, e, b, kv_head, first, n, p_.width, key_scratch_);
      const auto values = key_block<T>(p_, p_.value, e, b, kv_head, first, n, p_.value_width, value_scratch_);
      tile_.scores(first, n, keys, values);
      const int64_t columns = tile_.panels * Tile::W;
      for (int64_t j = 0; j < n; ++j)
        for (int64_t c = 0; c < columns; c += Tile::L) {
          const int64_t at = j * kAttentionTile + c;
          store(sum_ + at, load(sum_ + at) + load(tile_.score_grad + at));
        }
    }
  }

  const AttentionBackward& p_;
  const A* delta_;
  Arena arena_;
  Tile tile_;
  A *sum_, *key_scratch_, *value_scratch_;  // sum_ [key][row]
};

template <class T>
void find_grad_mask(const AttentionBackward& p, const Accumulate<T>* delta) {
  const AttentionMask& m = p.mask;
  const int64_t row_tiles = (m.rows + kAttentionTile - 1) / kAttentionTile;
  const int64_t key_blocks = (m.keys + kBackwardBlock - 1) / kBackwardBlock, tiles = row_tiles * key_blocks;
  const bool serial = attention_flops(p) < kSerialFlops;
  parallel_pieces(m.batches * m.heads * tiles, serial, [&](int64_t piece) {
    const int64_t batch = piece / tiles / m.heads, head = piece / tiles % m.heads;
    const int64_t row = piece % tiles / key_blocks * kAttentionTile, key = piece % key_blocks * kBackwardBlock;
    MaskPiece<T> work(p, delta);
    work.run(batch, head, row, key);
    work.write(batch, head, row, key);
  });
}

template <class T>
void attention_backward_of(const AttentionBackward& p) {
  using A = Accumulate<T>;
  const BackwardCut cut(p);
  const int64_t heads = p.batch * p.kv_heads, rows = cut.tiles * kAttentionTile;
  Scratch<A> delta((p.query_starts ? 1 : p.batch) * p.heads * p.total_rows);
  find_delta<T>(p, delta.data);
  if (p.grad_sinks) find_grad_sinks(p, delta.data);
  if (p.grad_query.data || p.grad_key.data || p.grad_value.data) {
    const bool in_parts = cut.chunks > 1 && p.grad_query.data;
    Scratch<A> parts(in_parts ? heads * cut.chunks * rows * p.width : 0);
    // Under a causal window the first chunks have the most work, so they come first.
    parallel_pieces(heads * cut.chunks, attention_flops(p) < kSerialFlops, [&](int64_t piece) {
      const int64_t head = piece % heads, chunk = piece / heads;
      const KeyRange keys{chunk * cut.chunk_keys, least((chunk + 1) * cut.chunk_keys, p.key_rows)};
      BackwardPiece<T> work(p, head / p.kv_heads, head % p.kv_heads, keys, delta.data);
      work.run(in_parts ? parts.data + (head * cut.chunks + chunk) * rows * p.width : nullptr);
    });
    if (in_parts) add_query_parts<T>(p, cut, parts.data);
  }
  if (p.grad_mask) find_grad_mask<T>(p, delta.data);
}

inline void attention_backward(const AttentionBackward& p) {
  switch (p.dtype) {
    case DType::f32: return attention_backward_of<float>(p);
    case DType::f64: return attention_backward_of<double>(p);
    case DType::bf16: return attention_backward_of<bf16>(p);
    case DType::f16: return attention_backward_of<f16>(p);
  }
}

}  // namespace handtuned::HANDTUNED_ISA
