// Bank conflicts of shared memory.
#include <algorithm>

#include "state.h"

namespace simt {
namespace {

// Cycles beyond the first that an access takes. Of 4 bytes the whole warp is served at once, of 8 halves, of 16
// quarters; each takes as many cycles as there are different words in the fullest bank.
uint64_t conflicts(const BankAccess& access) {
  const int at_once = access.bytes <= 4 ? kWarp : access.bytes == 8 ? kWarp / 2 : kWarp / 4;
  uint64_t total = 0;
  for (int first = 0; first < kWarp; first += at_once) {
    uint32_t words[kWarp], last[32], used = 0;
    bool clean = true;  // as most accesses are: no bank has two words
    int n = 0;
    for (int lane = first; lane < first + at_once; ++lane)
      if (access.lanes >> lane & 1)
        for (uint32_t w = 0; w < (access.bytes + 3) / 4; ++w) {
          const uint32_t word = access.offset[lane] / 4 + w, bank = word % 32;
          clean = clean && (!(used >> bank & 1) || last[bank] == word);
          used |= 1u << bank;
          last[bank] = word;
          words[n++] = word;
        }
    if (clean) continue;
    std::sort(words, words + n);
    const int different = int(std::unique(words, words + n) - words);
    int of_bank[32] = {}, most = 0;
    for (int i = 0; i < different; ++i) most = std::max(most, ++of_bank[words[i] % 32]);
    total += most > 1 ? most - 1 : 0;
  }
  return total;
}

}  // namespace

void settle_banks(Warp& warp) {
  if (warp.accesses.empty()) return;
  for (const BankAccess& access : warp.accesses) {
    ++counts.shared_accesses;
    counts.bank_conflicts += conflicts(access);
  }
  warp.accesses.clear();
  for (Lane* lane : warp.lanes) lane->accesses = 0;
}

void note_bank_access(size_t offset, size_t bytes) {
  const Ignored ours;
  Lane* lane = self();
  auto& accesses = lane->warp->accesses;
  const size_t number = lane->accesses++;
  if (number >= accesses.size()) accesses.resize(number + 1);
  BankAccess& access = accesses[number];
  access.lanes |= 1u << lane->lane;
  access.bytes = std::max(access.bytes, uint32_t(bytes));
  access.offset[lane->lane] = uint32_t(offset);
}

}  // namespace simt
