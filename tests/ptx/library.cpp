// What tests call through ctypes.
#include <dlfcn.h>

#include <map>
#include <memory>
#include <string>

#include "machine.h"

namespace {

std::string error_text;

// Runs f; 0, or 1 with the words of the error.
template <class F>
int attempt(F f) {
  error_text.clear();
  try {
    f();
    return 0;
  } catch (const std::exception& error) {
    error_text = error.what();
    return 1;
  }
}

ptx::Program* served = nullptr;                // whose kernels ptx_serve() launches
std::map<std::string, ptx::Counts> counts_of;  // of each kernel, since the last reset

void add(ptx::Counts& to, const ptx::Counts& more) {
  to.launches += more.launches, to.blocks += more.blocks, to.instructions += more.instructions;
  to.products += more.products, to.bytes_loaded += more.bytes_loaded, to.bytes_stored += more.bytes_stored;
  to.arithmetic += more.arithmetic, to.memory += more.memory, to.exchanges += more.exchanges;
}

}  // namespace

extern "C" {

const char* ptx_error() { return error_text.c_str(); }

// A module, or nullptr.
void* ptx_load(const char* text) {
  ptx::Program* program = nullptr;
  attempt([&] { program = new ptx::Program(text); });
  return program;
}
void ptx_unload(void* program) { delete static_cast<ptx::Program*>(program); }

int ptx_parameters(void* program, const char* kernel, int* count) {
  return attempt([&] { *count = int(static_cast<ptx::Program*>(program)->kernel(kernel).parameters.size()); });
}

// arguments: a pointer to the value of each parameter.
int ptx_launch(void* program, const char* kernel, const unsigned* grid, const unsigned* block, size_t shared_bytes,
               int cooperative, const void* const* arguments) {
  return attempt([&] {
    ptx::Kernel& found = static_cast<ptx::Program*>(program)->kernel(kernel);
    ptx::decode(found);
    ptx::set_variables(static_cast<ptx::Program*>(program)->variables());
    const ptx::Launch launch{
        {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared_bytes, cooperative != 0};
    ptx::counts = {};
    ptx::Machine(found, launch, arguments).run();
    add(counts_of[kernel], ptx::counts);
  });
}

void ptx_configure(unsigned long long seed, int junk) { ptx::config = {seed, junk != 0}; }
// Of the kernels in whose (mangled) names this occurs.
ptx::Counts ptx_counts(const char* part) {
  ptx::Counts all{};
  for (const auto& [kernel, counts] : counts_of)
    if (kernel.find(part) != std::string::npos) add(all, counts);
  return all;
}
void ptx_reset_counts() { counts_of.clear(); }

void ptx_map(const void* begin, size_t bytes, int written) {
  ptx::map_region(reinterpret_cast<uint64_t>(begin), bytes, written != 0);
}
void ptx_unmap(const void* begin) { ptx::unmap_region(reinterpret_cast<uint64_t>(begin)); }
void ptx_forget() { ptx::forget_regions(); }

// For the emulator, which has the launchers: from now on ptx_serve() runs kernels of this module.
void ptx_choose(void* program) { served = static_cast<ptx::Program*>(program); }
const char* ptx_serve(const void* kernel, const unsigned* grid, const unsigned* block, size_t shared_bytes,
                      int cooperative, const void* const* arguments) {
  Dl_info info;
  if (!dladdr(kernel, &info) || !info.dli_sname) return "a kernel without a name in the library of the launchers";
  return ptx_launch(served, info.dli_sname, grid, block, shared_bytes, cooperative, arguments) ? ptx_error() : nullptr;
}

}  // extern "C"
