// Attention family on CUDA: how the work is cut, from the shapes alone, so that neither the results nor the scratch
// depend on the device. Host code, read by the skin (scratch) and the launchers (grids).
//
// A block works on 64 query rows: the rows of all query heads that share a kv head count as one sequence of
// heads / kv_heads * query_rows "flat" rows, so that a single query, as in decoding, reads its keys once for the whole
// group. Where such tiles are few, the keys are cut into chunks, whose (O, m, l) are merged in order.
#pragma once
#include "../attention.h"

namespace handtuned::cuda {

constexpr int kTileRows = 64;
constexpr int kTileKeys = 64;
constexpr int kWantedBlocks = 256;  // about two for each multiprocessor of a large GPU
constexpr int kLeastChunkKeys = 256;
constexpr int kDropoutKeys = 128;  // a chunk begins where a call of the generator does

// Who makes outputs and dQ, dK, dV: tensor cores, where operands are of 16 bits and no width is beyond 256; the result
// is then the width of tiles, 64, 128 or 256. Else 0: multiply-add of the operands as they are.
inline int width_on_tensor_cores(const Attention& p) {
  const int64_t width = p.width > p.value_width ? p.width : p.value_width;
  if ((p.dtype != DType::bf16 && p.dtype != DType::f16) || width > 256) return 0;
  return width <= 64 ? 64 : width <= 128 ? 128 : 256;
}

// Whether every row of a tensor of 16 bits begins at a multiple of 16 bytes.
inline bool in_whole_chunks(const AttentionTensor& t) {
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.batch % 8 == 0 && t.head % 8 == 0 && t.row % 8 == 0;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct AttentionPlan {
  int64_t row_tiles;       // of one kv head, over all batch entries
  int64_t tiles_of_entry;  // dense
  int64_t chunks, chunk_keys;
};

inline AttentionPlan plan_attention(const Attention& p) {
  AttentionPlan plan = {};
  const int64_t group = p.heads / p.kv_heads;
  plan.tiles_of_entry = ceil_div(group * p.query_rows, kTileRows);
  // Packed: every sequence may end in a tile of its own, and so may the rows that belong to none.
  plan.row_tiles =
      p.device.query_starts.data ? group * p.total_rows / kTileRows + p.batch + 1 : p.batch * plan.tiles_of_entry;
  const int64_t blocks = plan.row_tiles * p.kv_heads;
  int64_t wanted = kWantedBlocks / blocks;
  if (wanted > p.key_rows / kLeastChunkKeys) wanted = p.key_rows / kLeastChunkKeys;
  if (wanted < 1) wanted = 1;
  plan.chunk_keys = ceil_div(ceil_div(p.key_rows, wanted), kDropoutKeys) * kDropoutKeys;
  if (plan.chunk_keys == 0) plan.chunk_keys = kDropoutKeys;
  plan.chunks = p.key_rows > 0 ? ceil_div(p.key_rows, plan.chunk_keys) : 1;
  return plan;
}

// Backward: tiles of kTileKeys keys of one kv head, over all batch entries.
inline int64_t key_tiles(const Attention& p) {
  return p.device.key_starts.data ? p.key_rows / kTileKeys + p.batch : p.batch * ceil_div(p.key_rows, kTileKeys);
}

// Elements of AttentionForward::partials: of every row and chunk its O [value_width], m and l. 0 for one chunk.
inline int64_t partial_elements(const Attention& p) {
  const AttentionPlan plan = plan_attention(p);
  if (plan.chunks == 1) return 0;
  const int64_t rows = p.device.query_starts.data ? p.total_rows : p.batch * p.total_rows;
  return rows * p.heads * plan.chunks * (p.value_width + 2);
}

}  // namespace handtuned::cuda
