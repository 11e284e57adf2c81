// One table of kernels per instruction set, one choice per process.
#pragma once
#include <vector>

#include "kernels.h"

namespace handtuned {

struct IsaStatus {
  const char* name;
  const Kernels* kernels;  // nullptr: not built for this architecture
  bool supported;          // by this CPU and operating system
  const char* needs;       // the CPU features it asks for
};

const std::vector<IsaStatus>& isa_list();  // best first
const Kernels& kernels();                  // the chosen table
void select_isa(const char* name);         // throws std::invalid_argument naming what is there

}  // namespace handtuned
