// The Python module _cpu: raw addresses and sizes in, nothing of torch. The caller has validated every
// argument and keeps the memory alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "combine.h"
#include "elementwise.h"
#include "gram.h"
#include "kernels.h"
#include "solve.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

std::vector<mtl::DType> dtypes_of(const std::vector<int>& codes) {
  std::vector<mtl::DType> dtypes;
  for (int code : codes) {
    if (code < 0 || code > 3) throw std::invalid_argument("unknown dtype code " + std::to_string(code));
    dtypes.push_back(static_cast<mtl::DType>(code));
  }
  return dtypes;
}

// Owns the table that the kernels see.
class Table {
 public:
  Table(std::vector<Address> pointers, std::vector<std::int64_t> numels, const std::vector<int>& codes,
        std::vector<std::int32_t> groups, int num_tasks)
      : pointers_(std::move(pointers)),
        numels_(std::move(numels)),
        dtypes_(dtypes_of(codes)),
        groups_(std::move(groups)) {
    if (num_tasks < 1 || num_tasks > mtl::kMaxTasks)
      throw std::invalid_argument("number of tasks out of range");
    if (pointers_.size() != num_tasks * numels_.size() || codes.size() != numels_.size() ||
        groups_.size() != numels_.size())
      throw std::invalid_argument("pointers, sizes, dtypes and groups do not fit together");
    rows_ = {num_tasks,        static_cast<std::int64_t>(numels_.size()),
             pointers_.data(), numels_.data(),
             dtypes_.data(),   groups_.data()};
  }
  Table(const Table&) = delete;

  const mtl::RowTable& rows() const { return rows_; }

 private:
  std::vector<Address> pointers_;
  std::vector<std::int64_t> numels_;
  std::vector<mtl::DType> dtypes_;
  std::vector<std::int32_t> groups_;
  mtl::RowTable rows_;
};

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void gram(std::vector<Address> pointers, std::vector<std::int64_t> numels, const std::vector<int>& codes,
          std::vector<std::int32_t> groups, int num_tasks, int num_groups, Address out, int threads) {
  const Table table(std::move(pointers), std::move(numels), codes, std::move(groups), num_tasks);
  py::gil_scoped_release release;
  mtl::cpu::gram(table.rows(), num_groups, at<double>(out), threads);
}

void combine(std::vector<Address> pointers, std::vector<std::int64_t> numels, const std::vector<int>& codes,
             std::vector<std::int32_t> groups, int num_tasks, Address weights,
             const std::vector<Address>& out, const std::vector<int>& out_codes, bool accumulate,
             int threads) {
  const Table table(std::move(pointers), std::move(numels), codes, std::move(groups), num_tasks);
  const std::vector<mtl::DType> out_dtypes = dtypes_of(out_codes);
  if (static_cast<std::int64_t>(out.size()) != table.rows().num_params || out.size() != out_dtypes.size())
    throw std::invalid_argument("one output per parameter expected");
  py::gil_scoped_release release;
  mtl::cpu::combine(table.rows(), at<const double>(weights), {out.data(), out_dtypes.data(), accumulate},
                    threads);
}

void reduce_columns(std::vector<Address> pointers, std::vector<std::int64_t> numels,
                    const std::vector<int>& codes, int num_tasks, int operation, int trim, Address leak,
                    Address rng, const std::vector<Address>& out, int threads) {
  std::vector<std::int32_t> groups(numels.size());
  const Table table(std::move(pointers), std::move(numels), codes, std::move(groups), num_tasks);
  if (static_cast<std::int64_t>(out.size()) != table.rows().num_params)
    throw std::invalid_argument("one output per parameter expected");
  const mtl::ColumnCall call{static_cast<mtl::ColumnOperation>(operation), trim, at<const double>(leak),
                             at<const std::int64_t>(rng)};
  py::gil_scoped_release release;
  mtl::cpu::reduce_columns(table.rows(), call, out.data(), threads);
}

void update_state(std::vector<Address> states, std::vector<std::int64_t> numels,
                  const std::vector<int>& codes, const std::vector<Address>& rows,
                  const std::vector<int>& row_codes, std::vector<std::int32_t> groups, int num_tasks,
                  int num_groups, int operation, Address keep, Address gain, double epsilon, Address sums,
                  int threads) {
  const Table table(std::move(states), std::move(numels), codes, std::move(groups), num_tasks);
  const std::vector<mtl::DType> row_dtypes = dtypes_of(row_codes);
  if (rows.size() != num_tasks * codes.size() || row_dtypes.size() != codes.size())
    throw std::invalid_argument("rows and state do not fit together");
  const mtl::StateCall call{static_cast<mtl::StateOperation>(operation), at<const double>(keep),
                            at<const double>(gain), epsilon};
  py::gil_scoped_release release;
  mtl::cpu::update_state(table.rows(), rows.data(), row_dtypes.data(), num_groups, call, at<double>(sums),
                         threads);
}

void solve(const std::string& solver, std::int64_t batch, int num_tasks, Address gram, Address active,
           std::int64_t active_stride, Address rng, const std::vector<double>& options, Address inputs,
           std::int64_t inputs_stride, Address state, std::int64_t state_doubles, Address weights,
           Address certificate, int threads) {
  py::gil_scoped_release release;
  mtl::cpu::solve(solver, batch, num_tasks, at<const double>(gram), at<const unsigned char>(active),
                  active_stride, at<const std::int64_t>(rng), options, at<const double>(inputs),
                  inputs_stride, at<double>(state), state_doubles, at<double>(weights),
                  at<double>(certificate), threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Compiled CPU kernels of mtl_kernels; addresses and sizes in, see csrc/cpu.";
  m.def("gram", &gram);
  m.def("combine", &combine);
  m.def("reduce_columns", &reduce_columns);
  m.def("update_state", &update_state);
  m.def("solve", &solve);
  m.def("instruction_set", [] { return mtl::cpu::kernels().name; });
  m.def("use_instruction_set", [](const std::string& name) {
    if (!mtl::cpu::use_isa(name.c_str()))
      throw std::invalid_argument("instruction set " + name + " is unknown or this processor lacks it");
  });
}
