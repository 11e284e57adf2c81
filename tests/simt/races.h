// What runs under ThreadSanitizer (races.cpp): the kernels of each family on small shapes. 0, or a cudaError_t.
#pragma once
#include <cstdint>
#include <vector>

// Device memory: what is never written stays what it was.
struct Buffer {
  std::vector<double> words;  // aligned to 16 bytes by malloc
  explicit Buffer(int64_t bytes) : words(size_t(bytes / 8 + 1), 0.5) {}
  void* data() { return words.data(); }
};

int norms();
int rnns();
int attentions();           // forward and backward
int attention_in_chunks();  // decoding: keys cut into chunks, which a second kernel merges
// Races: every head writes the same output, or the same gradient of the keys.
int attention_with_one_output();
int attention_with_one_gradient();
