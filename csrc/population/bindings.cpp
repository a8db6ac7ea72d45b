// fastshift._core: the population core for Python. No algorithm lives here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "trie.hpp"

namespace py = pybind11;
using namespace fastshift;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// An array that owns the moved vector through a capsule.
template <typename T>
Array<T> adopt(std::vector<T>&& values, std::vector<py::ssize_t> shape = {}) {
  if (shape.empty()) shape = {static_cast<py::ssize_t>(values.size())};
  auto owned = std::make_unique<std::vector<T>>(std::move(values));
  T* data = owned->data();
  py::capsule owner(owned.get(), [](void* p) { delete static_cast<std::vector<T>*>(p); });
  owned.release();
  return Array<T>(std::move(shape), data, owner);
}

py::tuple build_trie(const Array<std::uint8_t>& archs, std::int64_t subtrie_size) {
  if (archs.ndim() != 2) throw std::invalid_argument("archs: two dimensions [P, L] expected");
  const auto* rows = archs.data();
  const auto num_archs = static_cast<std::size_t>(archs.shape(0));
  const auto num_blocks = static_cast<std::size_t>(archs.shape(1));
  TriePlan plan;
  {
    py::gil_scoped_release release;
    plan = TrieBuilder(rows, num_archs, num_blocks, subtrie_size).build();
  }
  py::list parent, choice, leaves;
  for (TrieLevel& level : plan.levels) {
    parent.append(adopt(std::move(level.parent)));
    choice.append(adopt(std::move(level.choice)));
    leaves.append(adopt(std::move(level.leaves)));
  }
  std::vector<std::int32_t> segments;
  for (const TrieSegment& row : plan.segments) segments.insert(segments.end(), row.begin(), row.end());
  const auto count = static_cast<py::ssize_t>(plan.segments.size());
  return py::make_tuple(parent, choice, leaves, adopt(std::move(segments), {count, 5}));
}

PYBIND11_MODULE(_core, m) {
  m.doc() = "The compiled population core; see fastshift.population and fastshift.trie.";
  m.def("build_trie", &build_trie, py::arg("archs").noconvert(), py::arg("subtrie_size"),
        "Nodes of every level and the cut into segments, of strictly increasing rows.");
}
