// Rotary family: the contract between the skin (rotary.cpp) and the kernels (cpu/rotary.h).
//
// Of a row of `width` features the first 2 * angles are turned, pair by pair, the others are passed on. Tables are of
// dtype, or f32 beside 16 bits.
#pragma once
#include "params.h"

namespace handtuned {

struct Turn {
  DType dtype, table;
  int64_t width, angles;
  bool interleaved;  // pairs are features (2 i, 2 i + 1), else (i, i + angles)
  bool inverse;      // turned back
};

struct Rotary : Turn {
  int64_t rows;
  StridedRows input, output;  // [rows, width]; output does not alias input
  StridedRows cos, sin;       // [rows, angles]
};

// A tensor [batch, heads, rows, width] with strides in elements; the last is 1.
struct HeadRows {
  void* data;
  int64_t batch, head, row;
};

// New keys and values go behind the old ones of their sequence; queries and keys are turned at their positions.
struct AppendKv : Turn {  // angles 0: nothing is turned
  int64_t batch, heads, kv_heads, query_rows, new_rows, value_width;
  HeadRows query, output;  // [batch, heads, query_rows, width]; output absent without angles
  HeadRows key, value;     // [batch, kv_heads, new_rows, width] and [.., value_width]
  // [batch, kv_heads, rows, width], with `pages` [pages, kv_heads, page_size, width]. Written in place; no two rows
  // of key or value may go to one place.
  HeadRows key_cache, value_cache;
  const int64_t* lengths;  // [batch] keys before the new ones
  const int64_t* pages;    // [batch, max_pages] or nullptr
  int64_t max_pages, page_size;
  const void *cos, *sin;  // [positions, angles] contiguous; every position that is used is below `positions`
  bool in_order;          // query t of a sequence stands at lengths + t, else all at lengths
};

}  // namespace handtuned
