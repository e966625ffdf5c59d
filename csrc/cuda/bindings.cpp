// The Python module _cuda: raw addresses, sizes and a stream in, nothing of torch. The caller has validated
// every argument and keeps the memory alive. Loads on machines without a driver, and says what is missing.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "combine.h"
#include "gram.h"
#include "gram_kernels.h"
#include "solve.h"
#include "state.h"
#include "upload.h"

#ifndef MTL_CUDA_MODULE
#define MTL_CUDA_MODULE _cuda
#endif

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using mtl::cuda::CombineCall;
using mtl::cuda::CombinePlan;
using mtl::cuda::DeviceCopy;
using mtl::cuda::GramCall;
using mtl::cuda::GramPlan;
using mtl::cuda::SolvePlans;
using mtl::cuda::SolverArguments;
using mtl::cuda::StatePlan;
using mtl::cuda::StateUpdate;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

cudaStream_t stream_at(Address stream) { return reinterpret_cast<cudaStream_t>(stream); }

std::vector<mtl::DType> dtypes_of(const std::vector<int>& codes) {
  std::vector<mtl::DType> dtypes;
  for (int code : codes) {
    if (code < 0 || code > 3) throw std::invalid_argument("unknown dtype code " + std::to_string(code));
    dtypes.push_back(static_cast<mtl::DType>(code));
  }
  return dtypes;
}

// What of a row table does not need the addresses.
struct Sizes {
  std::vector<std::int64_t> numels;
  std::vector<mtl::DType> dtypes;
  std::vector<std::int32_t> groups;
  mtl::RowTable rows;

  Sizes(int num_tasks, std::vector<std::int64_t> numels_, const std::vector<int>& codes,
        std::vector<std::int32_t> groups_, int num_groups)
      : numels(std::move(numels_)), groups(std::move(groups_)), rows{} {
    if (num_tasks < 1 || num_tasks > mtl::kMaxTasks)
      throw std::invalid_argument("number of tasks out of range");
    if (codes.size() != numels.size() || groups.size() != numels.size())
      throw std::invalid_argument("sizes, dtypes and groups do not fit together");
    dtypes = dtypes_of(codes);
    for (std::int32_t group : groups)
      if (group < 0 || group >= num_groups) throw std::invalid_argument("group out of range");
    rows = {num_tasks,    static_cast<std::int64_t>(numels.size()), nullptr, numels.data(), dtypes.data(),
            groups.data()};
  }
  Sizes(const Sizes&) = delete;
};

// Refuses a table of addresses, [rows, P] or, `of_outputs`, [P], if one of them is no multiple of the size of
// its elements, where a GPU cannot read them. `codes`: the dtype of each parameter; none has the address 0.
void check_aligned(const py::bytes& addresses, const std::vector<int>& codes, bool of_outputs) {
  const std::string_view bytes = addresses;
  for (std::size_t n = 0; n < bytes.size() / sizeof(Address); ++n) {
    const std::size_t param = n % codes.size();
    Address address;
    std::memcpy(&address, bytes.data() + n * sizeof(Address), sizeof(Address));
    const std::int64_t size = mtl::item_size(static_cast<mtl::DType>(codes[param]));
    if (address % static_cast<Address>(size) == 0) continue;
    throw std::invalid_argument((of_outputs ? "out" : "row " + std::to_string(n / codes.size())) +
                                ", parameter " + std::to_string(param) +
                                " lies at an address that its element size " + std::to_string(size) +
                                " does not divide; a GPU cannot read it there: clone the tensor");
  }
}

py::bytes as_bytes(const std::vector<std::int64_t>& words) {
  return py::bytes(reinterpret_cast<const char*>(words.data()), words.size() * sizeof(std::int64_t));
}

// Why no kernel can run here at all, or nothing.
std::optional<std::string> missing() {
  int devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  if (status == cudaSuccess && devices > 0) return std::nullopt;
  static_cast<void>(cudaGetLastError());
  if (status == cudaErrorInsufficientDriver) {
    int driver = 0, runtime = 0;
    static_cast<void>(cudaDriverGetVersion(&driver));
    static_cast<void>(cudaRuntimeGetVersion(&runtime));
    if (driver == 0) return "no NVIDIA driver was found; install one, or use another backend";
    return "the NVIDIA driver supports CUDA " + std::to_string(driver / 1000) + "." +
           std::to_string(driver % 1000 / 10) + ", this build needs " + std::to_string(runtime / 1000) + "." +
           std::to_string(runtime % 1000 / 10) + "; update the driver";
  }
  if (status == cudaSuccess || status == cudaErrorNoDevice) return "no CUDA device was found";
  return std::string("CUDA does not start: ") + cudaGetErrorString(status);
}

// Why the kernels of this build cannot run on a device, or nothing.
std::optional<std::string> unsupported(int device) {
  const mtl::cuda::DeviceGuard guard(device);
  const mtl::cuda::RelaxedCapture relaxed;
  cudaFuncAttributes attributes;
  const auto kernel = mtl::cuda::gram_kernel(mtl::DType::kFloat32, 2, false).run;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  if (status == cudaSuccess) return std::nullopt;
  static_cast<void>(cudaGetLastError());
  int major = 0, minor = 0;
  static_cast<void>(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  static_cast<void>(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  const std::string arch = std::to_string(major) + std::to_string(minor);
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction) {
    return "mtl_kernels._cuda was built for the architectures " MTL_CUDA_ARCHS ", this GPU is sm_" + arch +
           "; reinstall from source with MTL_KERNELS_CUDA_ARCHS=" + arch;
  }
  return std::string("its kernels do not load: ") + cudaGetErrorString(status);
}

// The parts of a solver call that Python names; an empty name is no solver.
SolverArguments solver_arguments(const std::string& name, int num_tasks, Address active,
                                 std::int64_t active_stride, Address rng, bool advance_rng,
                                 const std::vector<double>& options, Address inputs,
                                 std::int64_t inputs_stride, Address state, std::int64_t state_doubles,
                                 Address weights, Address certificate) {
  SolverArguments arguments;
  arguments.name = name;
  arguments.num_tasks = num_tasks;
  arguments.active = at<const unsigned char>(active);
  arguments.active_stride = active_stride;
  arguments.rng = at<std::int64_t>(rng);
  arguments.advance_rng = advance_rng;
  arguments.options = options;
  arguments.inputs = at<const double>(inputs);
  arguments.inputs_stride = inputs_stride;
  arguments.state = at<double>(state);
  arguments.state_doubles = state_doubles;
  arguments.weights = at<double>(weights);
  arguments.certificate = at<double>(certificate);
  return arguments;
}

void gram(const GramPlan& plan, Address pointers, Address words, Address sums, Address counters, Address gram,
          Address norms, Address cosines, const SolverArguments* solver, Address scratch, Address stream) {
  py::gil_scoped_release release;
  GramCall{plan,
           at<const Address>(pointers),
           at<const std::int64_t>(words),
           at<double>(sums),
           at<unsigned>(counters),
           at<double>(gram),
           at<double>(norms),
           at<double>(cosines),
           solver,
           at<double>(scratch)}
      .run(stream_at(stream));
}

void combine(const CombinePlan& plan, Address pointers, Address outputs, Address words, Address weights,
             Address scale, Address found_inf, bool accumulate, Address rng, int trim, Address stream) {
  py::gil_scoped_release release;
  CombineCall{plan,
              at<const Address>(pointers),
              at<const Address>(outputs),
              at<const std::int64_t>(words),
              at<const double>(weights),
              at<const double>(scale),
              at<float>(found_inf),
              accumulate,
              at<const std::int64_t>(rng),
              trim}
      .run(stream_at(stream));
}

void update_state(const StatePlan& plan, Address rows, Address states, Address words, Address workspace,
                  Address counters, int operation, Address keep, Address gain, double epsilon, Address sums,
                  Address stream) {
  py::gil_scoped_release release;
  StateUpdate{
      plan,
      at<const Address>(rows),
      at<const Address>(states),
      at<const std::int64_t>(words),
      at<double>(workspace),
      at<unsigned>(counters),
      {static_cast<mtl::StateOperation>(operation), at<const double>(keep), at<const double>(gain), epsilon},
      at<double>(sums)}
      .run(stream_at(stream));
}

SolvePlans& solve_plans() {
  static SolvePlans plans;
  return plans;
}

void solve(int device, SolverArguments& arguments, Address gram, std::int64_t batch, Address scratch,
           Address stream) {
  arguments.gram = at<const double>(gram);
  py::gil_scoped_release release;
  solve_plans().solve(device, arguments, batch, at<double>(scratch), stream_at(stream));
}

std::int64_t solve_scratch(int device, const SolverArguments& arguments, std::int64_t batch) {
  return solve_plans().scratch_doubles(device, arguments, batch);
}

template <class... Solvers>
std::vector<std::string> names_of(mtl::SolverList<Solvers...>) {
  return {Solvers::name...};
}

}  // namespace

PYBIND11_MODULE(MTL_CUDA_MODULE, m) {
  m.doc() = "Compiled CUDA kernels of mtl_kernels; addresses and sizes in, see csrc/cuda.";
  m.attr("architectures") = MTL_CUDA_ARCHS;
  m.attr("fused_solvers") = names_of(mtl::FusedSolvers{});
  m.def("missing", &missing);
  m.def("unsupported", &unsupported);

  // Local to the module: the tests load this code a second time, compiled for the host.
  py::class_<SolverArguments>(m, "SolverArguments", py::module_local()).def(py::init(&solver_arguments));

  py::class_<GramPlan>(m, "GramPlan", py::module_local())
      .def(py::init([](int device, int num_tasks, std::vector<std::int64_t> numels,
                       const std::vector<int>& codes, std::vector<std::int32_t> groups, int num_groups) {
        const Sizes sizes(num_tasks, std::move(numels), codes, std::move(groups), num_groups);
        return GramPlan(device, sizes.rows, num_groups);
      }))
      .def_property_readonly("words", [](const GramPlan& plan) { return as_bytes(plan.words()); })
      .def_property_readonly("sum_doubles", &GramPlan::sum_doubles)
      .def_property_readonly("num_counters", &GramPlan::num_counters)
      .def("scratch_doubles", &GramPlan::scratch_doubles);

  py::class_<CombinePlan>(m, "CombinePlan", py::module_local())
      .def(py::init([](int device, int num_tasks, std::vector<std::int64_t> numels,
                       const std::vector<int>& codes, std::vector<std::int32_t> groups, int num_groups,
                       const std::vector<int>& outputs, int combination) {
        const Sizes sizes(num_tasks, std::move(numels), codes, std::move(groups), num_groups);
        if (outputs.size() != sizes.numels.size())
          throw std::invalid_argument("one output per parameter expected");
        return CombinePlan(device, sizes.rows, num_groups, outputs,
                           static_cast<mtl::cuda::Combination>(combination));
      }))
      .def_property_readonly("words", [](const CombinePlan& plan) { return as_bytes(plan.words()); });

  py::class_<StatePlan>(m, "StatePlan", py::module_local())
      .def(py::init([](int device, int num_tasks, std::vector<std::int64_t> numels,
                       const std::vector<int>& codes, std::vector<std::int32_t> groups, int num_groups,
                       const std::vector<int>& row_codes, int operation) {
        const Sizes sizes(num_tasks, std::move(numels), codes, std::move(groups), num_groups);
        const std::vector<mtl::DType> row_dtypes = dtypes_of(row_codes);
        if (row_dtypes.size() != sizes.numels.size())
          throw std::invalid_argument("one dtype of rows per parameter expected");
        return StatePlan(device, sizes.rows, row_dtypes, num_groups,
                         static_cast<mtl::StateOperation>(operation));
      }))
      .def_property_readonly("words", [](const StatePlan& plan) { return as_bytes(plan.words()); })
      .def_property_readonly("sum_doubles", &StatePlan::sum_doubles)
      .def_property_readonly("num_counters", &StatePlan::num_counters);

  m.def("check_aligned", &check_aligned, py::arg("addresses"), py::arg("codes"),
        py::arg("of_outputs") = false);
  m.def("gram", &gram, py::arg("plan"), py::arg("pointers"), py::arg("words"), py::arg("sums"),
        py::arg("counters"), py::arg("gram"), py::arg("norms"), py::arg("cosines"),
        py::arg("solver").none(true), py::arg("scratch"), py::arg("stream"));
  m.def("combine", &combine);
  m.def("update_state", &update_state);
  m.def("solve_scratch", &solve_scratch);
  m.def("solve", &solve);

  py::class_<DeviceCopy>(m, "DeviceCopy", py::module_local())
      .def(py::init([](int device, Address from, std::size_t bytes) {
        return std::make_unique<DeviceCopy>(device, at<const void>(from), bytes);
      }))
      .def_property_readonly("address", &DeviceCopy::address);
}
