#include "cuda_library.h"

#include <dlfcn.h>

#include <atomic>
#include <map>
#include <mutex>
#include <stdexcept>

namespace handtuned {
namespace {

// The tables, once opened; libraries stay open.
const CudaKernels* open_library(const std::string& path) {
  static std::mutex mutex;
  static std::map<std::string, const CudaKernels*> opened;
  const std::lock_guard<std::mutex> lock(mutex);
  const CudaKernels*& table = opened[path];
  if (table) return table;
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) throw std::runtime_error("handtuned: the CUDA library could not be opened: " + std::string(dlerror()));
  using Tables = const CudaKernels* (*)();
  const auto tables = reinterpret_cast<Tables>(dlsym(library, "handtuned_cuda_kernels"));
  const CudaKernels* found = tables ? tables() : nullptr;
  if (!found || std::string(found->version) != HANDTUNED_VERSION)
    throw std::runtime_error("handtuned " HANDTUNED_VERSION ": " + path +
                             " is of another release; build again, both together");
  return table = found;
}

std::atomic<const CudaKernels*> cuda_table{nullptr}, emulated_table{nullptr};

// Compute capability, asked once a device.
int capability(const CudaKernels& table, int device) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  if (device < 0 || device >= kDevices) return table.capability(device);
  int found = known[device].load(std::memory_order_relaxed);
  if (!found) known[device].store(found = table.capability(device), std::memory_order_relaxed);
  return found;
}

}  // namespace

void load_cuda(const std::string& path) {
  cuda_table.store(open_library(path));
  using torch::stable::detail::StableLibrary;
  static auto* registered = [] {
    auto* library = new StableLibrary(StableLibrary::Kind::IMPL, "handtuned", "CUDA", __FILE__, __LINE__);
    register_norm(*library);
    register_attention(*library);
    register_rnn(*library);
    return library;  // for the life of the process
  }();
  (void)registered;
}

void emulate_cuda(const std::string& path) { emulated_table.store(path.empty() ? nullptr : open_library(path)); }

Place place_of(const char* op, const Tensor& main) {
  const Device device = main.device();
  if (device.is_cpu()) return {device, emulated_table.load(std::memory_order_relaxed)};
  const CudaKernels* table = cuda_table.load(std::memory_order_relaxed);
  HT_CHECK(table, op, "the CUDA library is not loaded; import handtuned first");
  const int found = capability(*table, device.index);
  HT_CHECK(found >= table->least_capability, op, to_string(device), " is sm_", found, ", the CUDA kernels need sm_",
           table->least_capability, "; use handtuned.backend('triton')");
  return {device, table};
}

// Asked of libtorch_cuda, which is loaded wherever there is a CUDA tensor but is not there in a CPU torch.
void* current_stream(const char* op, const Place& place) {
  if (place.device.is_cpu()) return nullptr;
  using Ask = AOTITorchError (*)(int32_t device, void** stream);
  static const Ask ask = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return library ? reinterpret_cast<Ask>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  HT_CHECK(ask, op, "torch's current stream cannot be asked for in this torch; use handtuned.backend('triton')");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(ask(place.device.index, &stream));
  return stream;
}

void check_launch(const char* op, const Place& place, int status) {
  HT_CHECK(status == 0, op, "CUDA error ", status, " on ", to_string(place.device), ": ", place.cuda->error(status));
}

}  // namespace handtuned
