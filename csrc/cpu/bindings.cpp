// fastshift._cpu: candidate ops on the CPU, for Python. No arithmetic lives here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "block.hpp"
#include "isa.hpp"
#include "memory.hpp"
#include "packed.hpp"

namespace py = pybind11;
using namespace fastshift::cpu;

using Address = std::uintptr_t;
// depthwise, in, out, kernel, stride, relu
using UnitTuple = std::tuple<bool, std::int64_t, std::int64_t, int, int, bool>;
using ImagesTuple = std::tuple<std::int64_t, std::int64_t, std::int64_t>;

template <class T = float>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

const Kernels& kernels_of(const std::string& name) {
  static const std::vector<Level> found = levels();
  for (const Level& level : found) {
    if (level.kernels && level.name == name) return *level.kernels;
  }
  throw std::invalid_argument("instruction set: '" + name + "' cannot run here");
}

Block make_block(const std::vector<UnitTuple>& units, int main_units, const std::string& frame,
                 std::int64_t in_channels, std::int64_t out_channels) {
  std::vector<Unit> made;
  for (const auto& [depthwise, in, out, kernel, stride, relu] : units) {
    made.push_back({depthwise, in, out, kernel, stride, relu});
  }
  const std::map<std::string, Frame> frames{
      {"plain", Frame::plain}, {"residual", Frame::residual}, {"shuffle", Frame::shuffle}};
  const auto kind = frames.find(frame);
  if (kind == frames.end()) throw std::invalid_argument("frame: '" + frame + "' is not built in");
  return Block(std::move(made), main_units, kind->second, in_channels, out_channels);
}

void expect(std::size_t got, std::size_t wanted, const char* what) {
  if (got != wanted) throw std::invalid_argument(std::string(what) + ": wrong number of entries");
}

std::vector<Weights> weights_of(const Block& block, const std::vector<Address>& parameters,
                                const std::vector<double>& eps) {
  const std::size_t units = static_cast<std::size_t>(block.num_units());
  expect(parameters.size(), 3 * units, "parameters");
  expect(eps.size(), units, "eps");
  std::vector<Weights> found;
  for (std::size_t i = 0; i < units; ++i) {
    found.push_back({at(parameters[3 * i]), at(parameters[3 * i + 1]), at(parameters[3 * i + 2]),
                     eps[i]});
  }
  return found;
}

PackedWeights* packed_of(const Block& block, PackedWeights* packed) {
  if (packed && !packed->is_of(block)) throw std::invalid_argument("packed: of another block");
  return packed;
}

// Floats that go back to the pool with the array.
py::array_t<float> make_buffer(std::int64_t floats) {
  void* data = take_memory(static_cast<std::size_t>(floats) * sizeof(float));
  const py::capsule owner(data, [](void* given) { give_memory(given); });
  return py::array_t<float>({floats}, {sizeof(float)}, static_cast<float*>(data), owner);
}

Images images_of(const ImagesTuple& images, bool bf16) {
  if (std::get<1>(images) < 1 || std::get<2>(images) < 1) {
    throw std::invalid_argument("images: no pixels");
  }
  return {std::get<0>(images), std::get<1>(images), std::get<2>(images),
          bf16 ? kBfloat16 : kFloat32};
}

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Candidate ops on the CPU: chains of convolution, batch norm and ReLU in their frames.";
  m.def(
      "instruction_sets",
      [] {
        py::dict found;
        for (const Level& level : levels()) found[py::str(level.name)] = level.reason;
        return found;
      },
      "Every instruction set, best first, and why it cannot run here; empty where it can.");
  m.def("buffer", &make_buffer, py::arg("floats"),
        "Uninitialised float32 memory, aligned for any vector, which is kept when it is let go.");
  m.def("release_memory", [] { release_memory(); }, "Hand the memory that is kept to the system.");
  m.def("memory_use", [] {
    const MemoryUse use = memory_use();
    return py::dict(py::arg("in_use") = use.in_use, py::arg("kept") = use.kept,
                    py::arg("peak") = use.peak);
  }, "Bytes of `buffer`'s and the kernels' large memory: handed out, kept, most ever handed out.");
  py::class_<Block>(m, "Block")
      .def(py::init(&make_block), py::arg("units"), py::arg("main_units"), py::arg("frame"),
           py::arg("in_channels"), py::arg("out_channels"))
      .def("inference_lines", [](const Block& block, const ImagesTuple& images, bool bf16) {
             return block.inference_lines(images_of(images, bf16));
           },
           py::arg("images"), py::arg("bf16") = false)
      .def("saved_floats", [](const Block& block, const ImagesTuple& images, bool bf16) {
             return block.saved_floats(images_of(images, bf16));
           },
           py::arg("images"), py::arg("bf16") = false)
      .def("statistics_floats", &Block::statistics_floats)
      .def("forward",
           [](const Block& block, const std::string& isa, const ImagesTuple& images, Address x,
              const std::vector<Address>& parameters, const std::vector<double>& eps,
              Address saved, Address statistics, Address y, int threads, bool bf16,
              PackedWeights* given) {
             const Kernels& kernels = kernels_of(isa);
             PackedWeights* packed = packed_of(block, given);
             const auto weights = weights_of(block, parameters, eps);
             const py::gil_scoped_release release;
             block.forward(kernels, images_of(images, bf16), at(x), weights, at(saved), at(statistics),
                           at(y), threads, packed);
           },
           py::arg("isa"), py::arg("images"), py::arg("x"), py::arg("parameters"), py::arg("eps"),
           py::arg("saved"), py::arg("statistics"), py::arg("y"), py::arg("threads"),
           py::arg("bf16") = false, py::arg("packed") = nullptr)
      .def("backward",
           [](const Block& block, const std::string& isa, const ImagesTuple& images, Address x,
              const std::vector<Address>& parameters, const std::vector<double>& eps,
              Address saved, Address statistics, Address dy, Address dx,
              const std::vector<Address>& gradients, int threads, bool bf16,
              PackedWeights* given, bool add) {
             const Kernels& kernels = kernels_of(isa);
             PackedWeights* packed = packed_of(block, given);
             const auto weights = weights_of(block, parameters, eps);
             expect(gradients.size(), 3 * weights.size(), "gradients");
             std::vector<Gradients> to;
             for (std::size_t i = 0; i < weights.size(); ++i) {
               to.push_back({at(gradients[3 * i]), at(gradients[3 * i + 1]),
                             at(gradients[3 * i + 2])});
             }
             const py::gil_scoped_release release;
             block.backward(kernels, images_of(images, bf16), at(x), weights, at(saved), at(statistics),
                            at(dy), at(dx), to, add, threads, packed);
           },
           py::arg("isa"), py::arg("images"), py::arg("x"), py::arg("parameters"), py::arg("eps"),
           py::arg("saved"), py::arg("statistics"), py::arg("dy"), py::arg("dx"),
           py::arg("gradients"), py::arg("threads"), py::arg("bf16") = false,
           py::arg("packed") = nullptr, py::arg("add") = false)
      .def("infer", [](const Block& block, const std::string& isa, const ImagesTuple& images,
                       Address x, const std::vector<Address>& parameters,
                       const std::vector<double>& eps, const std::vector<Address>& moments,
                       Address y, bool pooled, int threads, bool bf16, PackedWeights* given) {
        const Kernels& kernels = kernels_of(isa);
        PackedWeights* packed = packed_of(block, given);
        const auto weights = weights_of(block, parameters, eps);
        expect(moments.size(), 2 * weights.size(), "moments");
        std::vector<Moments> fixed;
        for (std::size_t i = 0; i < weights.size(); ++i) {
          fixed.push_back({at(moments[2 * i]), at(moments[2 * i + 1])});
        }
        const py::gil_scoped_release release;
        block.infer(kernels, images_of(images, bf16), at(x), weights, fixed, at(y), pooled,
                    threads, packed);
      }, py::arg("isa"), py::arg("images"), py::arg("x"), py::arg("parameters"), py::arg("eps"),
           py::arg("moments"), py::arg("y"), py::arg("pooled"), py::arg("threads"),
           py::arg("bf16") = false, py::arg("packed") = nullptr);
  py::class_<PackedWeights>(
      m, "PackedWeights",
      "A block's weights as the kernels read them: packed at first use, for the calls that get this.\n\n"
      "For one thread at a time, and for as long as no weight changes.")
      .def(py::init<const Block&>(), py::arg("block"), py::keep_alive<1, 2>());
}
