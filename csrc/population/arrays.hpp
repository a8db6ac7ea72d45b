// numpy arrays in and out of the bindings: shapes are checked, nothing is converted.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "sampler.hpp"

namespace fastshift {

namespace py = pybind11;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// An array that owns the moved vector through a capsule.
template <typename T>
Array<T> adopt(std::vector<T>&& values, std::vector<py::ssize_t> shape) {
  auto owned = std::make_unique<std::vector<T>>(std::move(values));
  T* data = owned->data();
  py::capsule owner(owned.get(), [](void* p) { delete static_cast<std::vector<T>*>(p); });
  owned.release();
  return Array<T>(std::move(shape), data, owner);
}

template <typename T>
Array<T> adopt(std::vector<T>&& values) {
  const auto size = static_cast<py::ssize_t>(values.size());
  return adopt(std::move(values), {size});
}

template <typename T>
Array<T> adopt_rows(std::vector<T>&& values, std::size_t width) {
  const auto num_rows = static_cast<py::ssize_t>(values.size() / width);
  return adopt(std::move(values), {num_rows, static_cast<py::ssize_t>(width)});
}

template <typename T>
std::vector<T> copied(const Array<T>& array) {
  return {array.data(), array.data() + array.size()};
}

template <typename T>
std::size_t rows_of(const Array<T>& array, int num_dims, const char* name) {
  if (array.ndim() != num_dims) {
    throw std::invalid_argument(std::string(name) + ": " + std::to_string(num_dims) +
                                " dimensions expected, got " + std::to_string(array.ndim()));
  }
  return static_cast<std::size_t>(array.shape(0));
}

template <typename T>
const T* column(const Array<T>& values, std::size_t size, const char* name) {
  if (rows_of(values, 1, name) != size) {
    throw std::invalid_argument(std::string(name) + ": " + std::to_string(size) +
                                " values expected, got " + std::to_string(values.size()));
  }
  return values.data();
}

// The number of rows of `archs`, all of which are in the sampler's space.
inline std::size_t members(const Array<std::uint8_t>& archs, const Sampler& sampler) {
  const std::size_t num = rows_of(archs, 2, "archs");
  const std::size_t num_blocks = sampler.num_blocks();
  if (static_cast<std::size_t>(archs.shape(1)) != num_blocks) {
    throw std::invalid_argument("archs: " + std::to_string(num_blocks) +
                                " columns expected, got " + std::to_string(archs.shape(1)));
  }
  for (std::size_t i = 0; i < num; ++i) {
    if (!sampler.is_member(archs.data() + i * num_blocks)) {
      throw std::invalid_argument("archs: row " + std::to_string(i) + " is not in the space");
    }
  }
  return num;
}

}  // namespace fastshift
