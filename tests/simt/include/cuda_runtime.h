// CUDA's names for the emulator: qualifiers, built-in variables, synchronisation, warp functions, and the part of the
// runtime API that launchers use. As in CUDA, device code finds them without a namespace.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "simt.h"

// ---- language ----------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

namespace simt {

template <Index Thread::* which, unsigned Index::* dim>
struct Component {
  operator unsigned() const { return current->*which.*dim; }
};
template <Index Thread::* which>
struct BuiltIn {
  Component<which, &Index::x> x;
  Component<which, &Index::y> y;
  Component<which, &Index::z> z;
};

}  // namespace simt

inline constexpr simt::BuiltIn<&simt::Thread::thread> threadIdx{};
inline constexpr simt::BuiltIn<&simt::Thread::block> blockIdx{};
inline constexpr simt::BuiltIn<&simt::Thread::block_size> blockDim{};
inline constexpr simt::BuiltIn<&simt::Thread::grid_size> gridDim{};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---- synchronisation and warps -----------------------------------------------------------------------------------

inline void __syncthreads() { simt::block_barrier(); }
inline int __syncthreads_or(int vote) { return simt::block_any(vote != 0); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  simt::warp_meet(simt::kSyncWarp, mask, nullptr, [](void**, unsigned) {});
}

namespace simt {

// Every lane brings a value and the lane it wants the value of.
template <class T>
T shuffle(const char* name, unsigned mask, T value, int from) {
  struct Lane {
    T value, result;
    int from;
    bool missing;
  } mine{value, value, from, false};
  warp_meet(name, mask, &mine, [](void** lanes, unsigned mask) {
    for (int l = 0; l < kWarp; ++l) {
      if (!(mask >> l & 1)) continue;
      Lane& to = *static_cast<Lane*>(lanes[l]);
      to.missing = !(mask >> to.from & 1);
      if (!to.missing) to.result = static_cast<Lane*>(lanes[to.from])->value;
    }
  });
  if (mine.missing) fail(std::string(name) + ": reads lane " + std::to_string(from) + ", which is not in the mask");
  return mine.result;
}

inline int segment(int width) { return current->lane & ~(width - 1); }

}  // namespace simt

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  return simt::shuffle("__shfl_sync", mask, value, simt::segment(width) | (from & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int change, int width = 32) {
  const int from = simt::current->lane ^ change;
  return simt::shuffle("__shfl_xor_sync", mask, value,
                       from < simt::segment(width) + width ? from : simt::current->lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const int from = simt::current->lane - int(distance);
  return simt::shuffle("__shfl_up_sync", mask, value, from >= simt::segment(width) ? from : simt::current->lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const int from = simt::current->lane + int(distance);
  return simt::shuffle("__shfl_down_sync", mask, value,
                       from < simt::segment(width) + width ? from : simt::current->lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  struct Lane {
    bool predicate;
    unsigned result;
  } mine{predicate != 0, 0};
  simt::warp_meet("__ballot_sync", mask, &mine, [](void** lanes, unsigned mask) {
    unsigned ballot = 0;
    for (int l = 0; l < simt::kWarp; ++l)
      if ((mask >> l & 1) && static_cast<Lane*>(lanes[l])->predicate) ballot |= 1u << l;
    for (int l = 0; l < simt::kWarp; ++l)
      if (mask >> l & 1) static_cast<Lane*>(lanes[l])->result = ballot;
  });
  return mine.result;
}

// ---- arithmetic --------------------------------------------------------------------------------------------------

using std::abs;
using std::exp;
using std::exp2;
using std::fma;
using std::isfinite;
using std::log;
using std::sqrt;
using std::tanh;
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// ---- the runtime API ---------------------------------------------------------------------------------------------

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;
using cudaStream_t = struct CUstream_st*;

inline const char* cudaGetErrorString(cudaError_t) { return simt::last_error().c_str(); }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = 8; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMultiProcessorCount: *value = simt::device.multiprocessors; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = simt::device.shared_bytes; break;
  }
  return cudaSuccess;
}

enum cudaMemcpyKind { cudaMemcpyHostToDevice };
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

struct cudaDeviceProp {
  char name[256];
  int major, minor, multiProcessorCount;
  size_t totalGlobalMem;
};
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 0; }
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp*, int) { return cudaErrorInvalidValue; }

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);

enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace simt {
size_t shared_granted(const void* kernel);  // by cudaFuncSetAttribute, at least kSharedWithoutAsking
}  // namespace simt

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  const dim3 g = config->gridDim, b = config->blockDim;
  const void* address = reinterpret_cast<const void*>(kernel);
  if (config->dynamicSmemBytes > simt::shared_granted(address))
    return simt::refuse(std::to_string(config->dynamicSmemBytes) + " bytes of shared memory were not asked for");
  bool cooperative = false;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == cudaLaunchAttributeCooperative) cooperative = config->attrs[i].val.cooperative != 0;
  if (simt::elsewhere) {
    const std::tuple<Params...> values(args...);
    return std::apply(
        [&](const Params&... value) {
          const void* const arguments[] = {&value...};
          const char* wrong = simt::elsewhere(address, &g.x, &b.x, config->dynamicSmemBytes, cooperative, arguments);
          return wrong ? simt::refuse(wrong) : cudaSuccess;
        },
        values);
  }
  return simt::launch({{g.x, g.y, g.z}, {b.x, b.y, b.z}, config->dynamicSmemBytes, cooperative},
                      [&] { kernel(Params(args)...); });
}
