// Chooses the kernels of the best instruction set. Compiled without ISA flags: it must run on every CPU.
#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace handtuned {

// Each is the table of one compilation of kernels.cpp.
namespace generic {
extern const Kernels table;
}
#ifdef HANDTUNED_X86
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx512bf16 {
extern const Kernels table;
}
#endif
#ifdef HANDTUNED_EMULATE
namespace emulated512 {
extern const Kernels table;
}
#endif

namespace {

#ifdef HANDTUNED_X86
// __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}
#endif

std::vector<IsaStatus> probe() {
  std::vector<IsaStatus> list;
#ifdef HANDTUNED_X86
  __builtin_cpu_init();
  list.push_back({"avx512bf16", &avx512bf16::table, has_avx512bf16(), "AVX-512 F, BW, VL, DQ, BF16 and VNNI"});
  list.push_back({"avx512", &avx512::table, has_avx512(), "AVX-512 F, BW, VL and DQ"});
  list.push_back({"avx2", &avx2::table, has_avx2(), "AVX2, FMA and F16C"});
#else
  list.push_back({"avx512bf16", nullptr, false, "an x86-64 build"});
  list.push_back({"avx512", nullptr, false, "an x86-64 build"});
  list.push_back({"avx2", nullptr, false, "an x86-64 build"});
#endif
  list.push_back({"generic", &generic::table, true, "nothing"});
#ifdef HANDTUNED_EMULATE
  // A test build: the AVX-512 source on a CPU without AVX-512. Last, so that it is never the default.
  list.push_back({"emulated512", &emulated512::table, has_avx2(), "AVX2, FMA and F16C"});
#endif
  return list;
}

const Kernels& find(const std::string& name, const char* asked_by) {
  std::string usable;
  for (const IsaStatus& isa : isa_list()) {
    if (!isa.kernels || !isa.supported) continue;
    if (name == isa.name) return *isa.kernels;
    usable += (usable.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw std::invalid_argument(std::string(asked_by) + "=" + name +
                              " is not usable on this machine; use one of: " + usable);
}

const Kernels& choose() {
  if (const char* forced = std::getenv("HANDTUNED_ISA"); forced && *forced) return find(forced, "HANDTUNED_ISA");
  for (const IsaStatus& isa : isa_list())
    if (isa.kernels && isa.supported) return *isa.kernels;
  return generic::table;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> table{&choose()};
  return table;
}

}  // namespace

const std::vector<IsaStatus>& isa_list() {
  static const std::vector<IsaStatus> list = probe();
  return list;
}

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

void select_isa(const char* name) { chosen().store(&find(name, "isa"), std::memory_order_relaxed); }

}  // namespace handtuned
