// handtuned._C: what the library says about itself, and the straight way of a few modules (straight.cpp). Tensors pass
// through the ops, which register themselves with torch's dispatcher when this module is loaded.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cuda_library.h"
#include "straight.h"

namespace py = pybind11;

namespace handtuned {
namespace {

py::dict build_facts() {
  py::dict facts;
  facts["version"] = HANDTUNED_VERSION;
  facts["torch_built"] = HANDTUNED_TORCH_VERSION;
  facts["torch_minimum"] = HANDTUNED_TORCH_MINIMUM;
  facts["compiler"] = HANDTUNED_COMPILER;
  facts["cuda"] = HANDTUNED_CUDA_STATUS;
  return facts;
}

py::list isa_table() {
  py::list table;
  for (const IsaStatus& isa : isa_list()) {
    py::dict row;
    row["name"] = isa.name;
    row["built"] = isa.kernels != nullptr;
    row["supported"] = isa.supported;
    row["needs"] = isa.needs;
    row["multiplies_bf16"] = isa.kernels && isa.kernels->multiply_add_pairs;
    row["vector_bits"] = isa.kernels ? isa.kernels->vector_bytes * 8 : 0;
    table.append(row);
  }
  return table;
}

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Best of `repeats`: a limit is what the machine can do when nothing disturbs it.
template <class F>
double best_time(int repeats, F f) {
  double best = 1e30;
  for (int i = 0; i < repeats; ++i) {
    double start = seconds();
    f();
    best = std::min(best, seconds() - start);
  }
  return best;
}

// Copy bandwidth (read + write) of all of torch's threads on buffers of `megabytes` each way, in GB/s.
double copy_bandwidth(int megabytes) {
  constexpr int64_t kBlock = 1 << 20;
  const int64_t blocks = megabytes;
  if (megabytes < 1) throw std::invalid_argument("megabytes must be at least 1");
  std::unique_ptr<char, decltype(&std::free)> src(static_cast<char*>(std::aligned_alloc(4096, blocks * kBlock)),
                                                  std::free);
  std::unique_ptr<char, decltype(&std::free)> dst(static_cast<char*>(std::aligned_alloc(4096, blocks * kBlock)),
                                                  std::free);
  if (!src || !dst) throw std::bad_alloc();
  std::fill_n(src.get(), blocks * kBlock, char(1));
  std::fill_n(dst.get(), blocks * kBlock, char(1));
  struct Job {
    char *dst, *src;
  } job{dst.get(), src.get()};
  double time = best_time(7, [&] {
    parallel_range(
        blocks, 1,
        [](int64_t begin, int64_t end, void* context) {
          Job* job = static_cast<Job*>(context);
          kernels().copy(job->dst + begin * kBlock, job->src + begin * kBlock, (end - begin) * kBlock);
        },
        &job);
  });
  return 2.0 * double(blocks * kBlock) / time / 1e9;
}

// Multiply-add rate of one thread in float32, or in what bfloat16 is multiplied in, in GFLOP/s.
double multiply_add_rate(bool of_bf16) {
  const auto run = of_bf16 && kernels().multiply_add_pairs ? kernels().multiply_add_pairs : kernels().multiply_add;
  double flops = 0;
  double time = best_time(5, [&] { flops = run(1000000); });
  return flops / time / 1e9;
}

}  // namespace
}  // namespace handtuned

PYBIND11_MODULE(_C, m) {
  using namespace handtuned;
  m.doc() = "Facts about this build and machine; the ops live in torch.ops.handtuned.";
  m.def("build_facts", &build_facts);
  m.def("isa_table", &isa_table);
  m.def("isa", [] { return kernels().isa; });
  m.def("select_isa", [](const std::string& name) { select_isa(name.c_str()); }, py::arg("name"));
  m.def("load_cuda", &load_cuda, py::arg("path"));
  m.def("emulate_cuda", &emulate_cuda, py::arg("path"));
  m.def("copy_bandwidth", &copy_bandwidth, py::arg("megabytes") = 256, py::call_guard<py::gil_scoped_release>());
  m.def("multiply_add_rate", &multiply_add_rate, py::arg("of_bf16") = false, py::call_guard<py::gil_scoped_release>());
  add_straight(m.ptr());
}
