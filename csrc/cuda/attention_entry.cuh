// Where things are: batch entries, tiles of rows, rows, pages. Numbers that come from the caller in device memory are
// brought into their limits here, so that wrong ones give wrong results but touch no memory beyond the tensors.
#pragma once
#include <device/reduce.h>
#include <device/vector.h>

#include "attention_plan.h"

namespace handtuned::cuda {

__device__ inline int64_t integer_at(const Numbers& numbers, int64_t i) {
  if (numbers.type == NumberType::i32) return load_global(static_cast<const int32_t*>(numbers.data) + i);
  return load_global(static_cast<const int64_t*>(numbers.data) + i);
}

template <class A>
__device__ inline A number_at(const Numbers& numbers, int64_t i) {
  switch (numbers.type) {
    case NumberType::f64: return A(load_global(static_cast<const double*>(numbers.data) + i));
    case NumberType::bf16: return A(widen(load_global(static_cast<const bf16*>(numbers.data) + i)));
    case NumberType::f16: return A(widen(load_global(static_cast<const f16*>(numbers.data) + i)));
    default: return A(load_global(static_cast<const float*>(numbers.data) + i));
  }
}

__device__ inline int64_t within(int64_t value, int64_t least, int64_t most) {
  const int64_t below = value < most ? value : most;
  return below > least ? below : least;
}

// As AttentionEntry; number p.batch of packed tensors is the rows behind the last sequence, which see no key.
struct Entry {
  int64_t b, query_rows, key_rows, first_query, first_key, offset;
};

__device__ inline Entry entry_at(const Attention& p, int64_t b) {
  Entry e = {b, p.query_rows, p.key_rows, 0, 0, 0};
  if (p.device.query_starts.data != nullptr) {
    e.first_query = within(integer_at(p.device.query_starts, b), 0, p.total_rows);
    const int64_t end = b < p.batch ? integer_at(p.device.query_starts, b + 1) : p.total_rows;
    e.query_rows = within(end, e.first_query, p.total_rows) - e.first_query;
  }
  if (b == p.batch) {
    e.key_rows = 0;
    return e;
  }
  if (p.device.key_starts.data != nullptr) {
    e.first_key = within(integer_at(p.device.key_starts, b), 0, p.key_rows);
    e.key_rows = within(integer_at(p.device.key_starts, b + 1), e.first_key, p.key_rows) - e.first_key;
  }
  if (p.device.key_lengths.data != nullptr) e.key_rows = within(integer_at(p.device.key_lengths, b), 0, e.key_rows);
  e.offset = p.bottom_right ? e.key_rows - e.query_rows : 0;
  return e;
}

// The packed entry that tile `number` falls into, 32 entries at a time; tiles_of(b) is how many entry b has. On return
// `number` counts from the entry's first, and b is `entries` where there are not so many tiles. All lanes of a warp
// call this together.
template <class TilesOf>
__device__ inline int64_t find_entry(int64_t entries, int64_t& number, TilesOf tiles_of) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t from = 0; from < entries; from += kWarp) {
    const int64_t tiles = from + lane < entries ? tiles_of(from + lane) : 0;
    int64_t upto = tiles;  // tiles of entries from .. from + lane
    for (int step = 1; step < kWarp; step *= 2) {
      const int64_t before = __shfl_up_sync(kWholeWarp, upto, step);
      if (lane >= step) upto += before;
    }
    const int owner = __popc(__ballot_sync(kWholeWarp, upto <= number));  // entries that end before it
    const bool found = owner < kWarp;
    number -= __shfl_sync(kWholeWarp, found ? upto - tiles : upto, found ? owner : kWarp - 1);
    if (found) return from + owner;
  }
  return entries;
}

__device__ inline int64_t tiles_of_rows(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

// kTileRows flat rows of one kv head's group, from `first` on.
struct RowTile {
  Entry e;
  int64_t first, rows;  // rows: of the whole group
  bool there;

  // Their number in the tile, at most kTileRows.
  __device__ int count() const { return rows - first < kTileRows ? int(rows - first) : kTileRows; }
};

// Tile `number` of a kv head. The last tiles of an entry, which see the most keys under a causal window, come first.
__device__ inline RowTile row_tile(const Attention& p, const AttentionPlan& plan, int64_t number) {
  const int64_t group = p.heads / p.kv_heads;
  int64_t b = 0;
  if (p.device.query_starts.data == nullptr) {
    b = number / plan.tiles_of_entry;
    number %= plan.tiles_of_entry;
  } else {
    const auto tiles = [&](int64_t b) { return tiles_of_rows(group * entry_at(p, b).query_rows); };
    b = find_entry(p.batch + 1, number, tiles);
    if (b > p.batch) return {{}, 0, 0, false};
  }
  const Entry e = entry_at(p, b);
  return {e, (tiles_of_rows(group * e.query_rows) - 1 - number) * kTileRows, group * e.query_rows, true};
}

// One query row.
struct RowPlace {
  int64_t head, i;
  bool there;
};

__device__ inline RowPlace row_place(const Attention& p, const RowTile& tile, int64_t kv_head, int r) {
  const int64_t flat = tile.first + r;
  if (flat >= tile.rows) return {0, 0, false};
  return {kv_head * (p.heads / p.kv_heads) + flat / tile.e.query_rows, flat % tile.e.query_rows, true};
}

// Row i of a tensor laid out like the queries.
template <class T>
__device__ inline T* query_row(const AttentionTensor& t, const Entry& e, int64_t head, int64_t i) {
  return static_cast<T*>(t.data) + e.b * t.batch + head * t.head + (e.first_query + i) * t.row;
}

// Row r of a tile of them, or nullptr where there is none.
template <class T>
__device__ inline const T* row_or_none(const Attention& p, const AttentionTensor& t, const RowTile& tile,
                                       int64_t kv_head, int r) {
  const RowPlace place = row_place(p, tile, kv_head, r);
  return place.there ? query_row<const T>(t, tile.e, place.head, place.i) : nullptr;
}

// Row j of a tensor laid out like the keys, where there are no pages, as in the backward.
template <class T>
__device__ inline T* key_row_unpaged(const AttentionTensor& t, const Entry& e, int64_t kv_head, int64_t j) {
  return static_cast<T*>(t.data) + kv_head * t.head + e.b * t.batch + (e.first_key + j) * t.row;
}

template <class T>
__device__ inline T* key_row(const Attention& p, const AttentionTensor& t, const Entry& e, int64_t kv_head, int64_t j) {
  if (p.device.pages.data == nullptr) return key_row_unpaged<T>(t, e, kv_head, j);
  const int64_t page = integer_at(p.device.pages, e.b * p.max_pages + j / p.page_size);
  T* head = static_cast<T*>(t.data) + kv_head * t.head;
  return head + within(page, 0, p.page_count - 1) * t.batch + j % p.page_size * t.row;
}

// Flat index of a row in the lse, which is also the row of the dropout mask.
__device__ inline int64_t lse_index(const Attention& p, const Entry& e, int64_t head, int64_t i) {
  return p.device.query_starts.data != nullptr ? head * p.total_rows + e.first_query + i
                                               : (e.b * p.heads + head) * p.total_rows + i;
}

// Keys [begin, end) that window and lengths leave visible to rows first_row .. last_row of an entry, any of them.
__device__ inline KeyRange keys_of_rows(const Attention& p, const Entry& e, int64_t first_row, int64_t last_row) {
  const int64_t begin = p.window_left < 0 ? 0 : first_row + e.offset - p.window_left;
  const int64_t end = p.window_right < 0 ? e.key_rows : last_row + e.offset + p.window_right + 1;
  return {begin > 0 ? begin : 0, end < e.key_rows ? end : e.key_rows};
}

// Those of a whole tile, begun at a multiple of `step`; a tile that reaches into a second head sees what any row sees.
__device__ inline KeyRange keys_of_tile(const Attention& p, const RowTile& tile, int64_t step) {
  const int64_t last = tile.first + tile.count() - 1, n = tile.e.query_rows;
  const bool one_head = tile.first / n == last / n;
  KeyRange keys = keys_of_rows(p, tile.e, one_head ? tile.first % n : 0, one_head ? last % n : n - 1);
  keys.begin = keys.begin / step * step;
  return keys;
}

// kTileKeys keys of an entry, or as many as are left.
struct KeyTile {
  Entry e;
  int64_t first, end;
  bool there;
};

__device__ inline KeyTile key_tile(const Attention& p, int64_t number) {
  const int64_t tiles = tiles_of_rows(p.key_rows);
  int64_t b = number / tiles;
  if (p.device.key_starts.data != nullptr) {
    b = find_entry(p.batch, number, [&](int64_t b) { return tiles_of_rows(entry_at(p, b).key_rows); });
  } else {
    number %= tiles;
  }
  if (b == p.batch) return {{}, 0, 0, false};
  const Entry e = entry_at(p, b);
  const int64_t first = number * kTileKeys, end = first + kTileKeys;
  return {e, first, end < e.key_rows ? end : e.key_rows, first < e.key_rows};
}

// Rows [begin, end) that the window lets see any key of a tile.
struct RowRange {
  int64_t begin, end;
};

__device__ inline RowRange rows_of_tile(const Attention& p, const KeyTile& tile) {
  RowRange rows = {0, tile.e.query_rows};
  const int64_t first = tile.first - tile.e.offset - p.window_right;
  const int64_t end = tile.end - tile.e.offset + p.window_left;
  if (p.window_right >= 0 && first > 0) rows.begin = first;
  if (p.window_left >= 0 && end < rows.end) rows.end = end;
  return rows;
}

}  // namespace handtuned::cuda
