// The emulator's version of csrc/cuda/device/signal.h.
#pragma once
#include "simt.h"

namespace handtuned::cuda {

inline void signal(unsigned* word) { simt::signal(word); }
inline void wait_for(const unsigned* word, unsigned least) { simt::wait_for(word, least); }

}  // namespace handtuned::cuda
