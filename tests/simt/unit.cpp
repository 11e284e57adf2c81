// Kernels that do one thing each, right or wrong, for the tests of the emulator itself (test_simt.py).
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <device/cp_async.h>
#include <device/grid.h>
#include <device/intrinsics.h>
#include <device/ldmatrix.h>
#include <device/mma.h>

namespace {

using handtuned::cuda::BlockGroup;
using handtuned::cuda::load_global;
using handtuned::cuda::shared;
using handtuned::cuda::store_global;

constexpr unsigned kAll = 0xffffffffu;

// out[t] = in[threads - 1 - t], through shared memory.
void reverse(const float* in, float* out) {
  const auto words = shared<float>(0);
  words[threadIdx.x] = load_global(in + threadIdx.x);
  __syncthreads();
  store_global(out + threadIdx.x, float(words[blockDim.x - 1 - threadIdx.x]));
}

void reverse_without_barrier(const float* in, float* out) {
  const auto words = shared<float>(0);
  words[threadIdx.x] = load_global(in + threadIdx.x);
  store_global(out + threadIdx.x, float(words[blockDim.x - 1 - threadIdx.x]));
}

// Each warp for itself: __syncwarp is enough.
void reverse_in_warps(const float* in, float* out) {
  const auto words = shared<float>(0);
  const unsigned warp = threadIdx.x / 32 * 32, lane = threadIdx.x % 32;
  words[threadIdx.x] = load_global(in + threadIdx.x);
  __syncwarp();
  store_global(out + threadIdx.x, float(words[warp + 31 - lane]));
}

void all_write_one_word(const float* in, float*) { shared<float>(0)[0] = load_global(in); }

// Nobody wrote: NaN.
void read_unwritten(const float*, float* out) { store_global(out + threadIdx.x, float(shared<float>(0)[threadIdx.x])); }

void beyond_shared(const float* in, float*) { shared<float>(1024)[threadIdx.x] = load_global(in); }

void misaligned(const float* in, float* out) {
  const uint4 four = load_global(reinterpret_cast<const uint4*>(in + 1));
  store_global(out + threadIdx.x, __uint_as_float(four.x));
}

void half_at_the_barrier(const float*, float* out) {
  if (threadIdx.x < 32) __shfl_sync(kAll, 1.0f, 0);
  if (threadIdx.x == 40) __shfl_sync(kAll, 1.0f, 0);  // alone in its warp
  store_global(out + threadIdx.x, 1.0f);
}

void diverged(const float*, float* out) {
  const float value = threadIdx.x % 2 ? __shfl_sync(kAll, 1.0f, 0) : float(__ballot_sync(kAll, 1));
  store_global(out + threadIdx.x, value);
}

void outside_the_mask(const float*, float* out) { store_global(out + threadIdx.x, __shfl_sync(1u, 1.0f, 0)); }

void lane_that_is_missing(const float*, float* out) {
  if (threadIdx.x < 4) store_global(out + threadIdx.x, __shfl_sync(0xfu, 1.0f, 9));
}

// 32 lanes, `stride` words apart.
template <int stride>
void strided_words(const float*, float*) {
  shared<float>(0)[threadIdx.x % 32 * stride] = 1.0f;
}

void shuffles(const float* in, float* out) {
  const float v = load_global(in + threadIdx.x);
  float* o = out + 5 * threadIdx.x;
  store_global(o, __shfl_xor_sync(kAll, v, 5));
  store_global(o + 1, __shfl_up_sync(kAll, v, 3));
  store_global(o + 2, __shfl_down_sync(kAll, v, 3));
  store_global(o + 3, __shfl_sync(kAll, v, 6, 8));
  store_global(o + 4, float(__ballot_sync(kAll, v > 7.5f) & 0xffffu));
}

// A sum over blocks that needs every block to be there: out[b] = sum of in over the grid.
void through_the_grid(const float* in, float* out) {
  float* partial = out + gridDim.x;
  if (threadIdx.x == 0) store_global(partial + blockIdx.x, load_global(in + blockIdx.x));
  BlockGroup blocks{reinterpret_cast<unsigned*>(out + 1000), gridDim.x};
  blocks.meet();
  __syncthreads();
  float sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += load_global(partial + b);
  if (threadIdx.x == 0) store_global(out + blockIdx.x, sum);
}

// The same without a barrier, and with a barrier of each block alone.
void through_the_grid_at_once(const float* in, float* out) {
  if (threadIdx.x == 0) store_global(out + blockIdx.x, load_global(in + blockIdx.x));
  load_global(out + (blockIdx.x + 1) % gridDim.x);
}
void a_signal_before_the_barrier(const float* in, float* out) {
  unsigned* word = reinterpret_cast<unsigned*>(out + 1000);
  if (threadIdx.x == 1) store_global(out + blockIdx.x, load_global(in + blockIdx.x));
  if (threadIdx.x == 0) handtuned::cuda::signal(word);
  if (threadIdx.x == 0) handtuned::cuda::wait_for(word, gridDim.x);
  __syncthreads();
  load_global(out + (blockIdx.x + 1) % gridDim.x);
}
void no_barrier_after_the_wait(const float* in, float* out) {
  unsigned* word = reinterpret_cast<unsigned*>(out + 1000);
  BlockGroup blocks{word, gridDim.x};
  if (threadIdx.x == 1) store_global(out + blockIdx.x, load_global(in + blockIdx.x));
  blocks.meet();
  load_global(out + (blockIdx.x + 1) % gridDim.x);
}
void one_block_does_not_come(const float*, float* out) {
  BlockGroup blocks{reinterpret_cast<unsigned*>(out + 1000), gridDim.x};
  if (blockIdx.x != 0) blocks.meet();
}

// One product of a warp from raw registers. in: of each lane a[4], b[2], d[4]; out: its d[4].
template <class T>
void mma(const float* in, float* out) {
  const float* own = in + 10 * threadIdx.x;
  uint32_t a[4];
  float d[4];
  for (int i = 0; i < 4; ++i) a[i] = __float_as_uint(load_global(own + i)), d[i] = load_global(own + 6 + i);
  const uint32_t b0 = __float_as_uint(load_global(own + 4)), b1 = __float_as_uint(load_global(own + 5));
  handtuned::cuda::mma_16x8x16<T>(d, a, b0, b1);
  for (int i = 0; i < 4; ++i) store_global(out + 4 * threadIdx.x + i, d[i]);
}

template <class T>
void pairs(const float* in, float* out) {
  const float low = load_global(in + 2 * threadIdx.x), high = load_global(in + 2 * threadIdx.x + 1);
  store_global(out + threadIdx.x, __uint_as_float(handtuned::cuda::narrow_pair<T>(low, high)));
}

// Row l of 16 bytes comes to shared memory, `pitch` bytes after the one before; out: of each lane r[4].
template <bool transposed, int pitch>
void fragments(const float* in, float* out) {
  const auto row = shared<uint4>(pitch * int(threadIdx.x));
  row[0] = load_global(reinterpret_cast<const uint4*>(in) + threadIdx.x);
  __syncwarp();
  uint32_t r[4];
  transposed ? handtuned::cuda::ldmatrix_x4_trans(r, row) : handtuned::cuda::ldmatrix_x4(r, row);
  for (int i = 0; i < 4; ++i) store_global(out + 4 * threadIdx.x + i, __uint_as_float(r[i]));
}

// out[t] = what thread t of the block sees of the 16 bytes that its neighbour copied, `bytes` of them.
enum class Copies { right, not_waited, not_committed, no_barrier, second_pending };
template <Copies how, int bytes>
void copies(const float* in, float* out) {
  const auto words = shared<uint4>(0);
  handtuned::cuda::cp_async(words + threadIdx.x, in + 4 * threadIdx.x, bytes);
  if (how != Copies::not_committed) handtuned::cuda::cp_async_commit();
  if (how == Copies::second_pending) {
    handtuned::cuda::cp_async(words + (blockDim.x + threadIdx.x), in, 16);
    handtuned::cuda::cp_async_commit();
    handtuned::cuda::cp_async_wait<1>();
  } else if (how != Copies::not_waited) {
    handtuned::cuda::cp_async_wait<0>();
  }
  if (how != Copies::no_barrier) __syncthreads();
  const uint4 seen = words[threadIdx.x ^ 1];
  const uint4 second = how == Copies::second_pending ? words[blockDim.x + threadIdx.x] : seen;
  const unsigned values[5] = {seen.x, seen.y, seen.z, seen.w, second.x};
  for (int i = 0; i < 5; ++i) store_global(out + 5 * threadIdx.x + i, __uint_as_float(values[i]));
  if (how == Copies::second_pending) handtuned::cuda::cp_async_wait<0>();
}

void copy_misaligned(const float* in, float*) {
  handtuned::cuda::cp_async(shared<uint4>(0) + threadIdx.x, in + 1 + 4 * threadIdx.x, 16);
}

struct Unit {
  const char* name;
  void (*kernel)(const float*, float*);
};
const Unit units[] = {
    {"reverse", reverse},
    {"reverse_without_barrier", reverse_without_barrier},
    {"reverse_in_warps", reverse_in_warps},
    {"all_write_one_word", all_write_one_word},
    {"read_unwritten", read_unwritten},
    {"beyond_shared", beyond_shared},
    {"misaligned", misaligned},
    {"half_at_the_barrier", half_at_the_barrier},
    {"diverged", diverged},
    {"outside_the_mask", outside_the_mask},
    {"lane_that_is_missing", lane_that_is_missing},
    {"strided_words_1", strided_words<1>},
    {"strided_words_2", strided_words<2>},
    {"strided_words_32", strided_words<32>},
    {"strided_words_33", strided_words<33>},
    {"shuffles", shuffles},
    {"through_the_grid", through_the_grid},
    {"through_the_grid_at_once", through_the_grid_at_once},
    {"a_signal_before_the_barrier", a_signal_before_the_barrier},
    {"no_barrier_after_the_wait", no_barrier_after_the_wait},
    {"one_block_does_not_come", one_block_does_not_come},
    {"mma_bf16", mma<handtuned::bf16>},
    {"mma_f16", mma<handtuned::f16>},
    {"pairs_bf16", pairs<handtuned::bf16>},
    {"pairs_f16", pairs<handtuned::f16>},
    {"ldmatrix", fragments<false, 16>},
    {"ldmatrix_trans", fragments<true, 16>},
    {"ldmatrix_32_bytes_apart", fragments<false, 32>},
    {"ldmatrix_128_bytes_apart", fragments<false, 128>},
    {"ldmatrix_144_bytes_apart", fragments<false, 144>},
    {"copies", copies<Copies::right, 16>},
    {"copies_of_8_bytes", copies<Copies::right, 8>},
    {"copies_of_nothing", copies<Copies::right, 0>},
    {"copies_second_pending", copies<Copies::second_pending, 16>},
    {"copies_not_waited", copies<Copies::not_waited, 16>},
    {"copies_not_committed", copies<Copies::not_committed, 16>},
    {"copies_no_barrier", copies<Copies::no_barrier, 16>},
    {"copy_misaligned", copy_misaligned},
};

}  // namespace

extern "C" {

// Launches the kernel of that name; the status, or -1 for a name that is none.
int simt_unit(const char* name, int blocks, int threads, int shared_bytes, int cooperative, const float* in,
              float* out) {
  for (const Unit& unit : units) {
    if (std::string(unit.name) != name) continue;
    cudaLaunchAttribute attribute = {cudaLaunchAttributeCooperative, {cooperative}};
    cudaLaunchConfig_t config = {dim3(blocks), dim3(threads), size_t(shared_bytes), nullptr, &attribute, 1};
    return cudaLaunchKernelEx(&config, unit.kernel, in, out);
  }
  return -1;
}

const char* simt_error() { return simt::last_error().c_str(); }

unsigned short simt_float_to_half(float value) { return __half_as_ushort(__float2half_rn(value)); }
float simt_half_to_float(unsigned short bits) { return __half2float(__ushort_as_half(bits)); }
unsigned short simt_float_to_bfloat(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
}
