// fastshift._core: the population core for Python. No algorithm lives here.
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "arrays.hpp"
#include "pareto.hpp"
#include "population.hpp"
#include "rng.hpp"
#include "sampler.hpp"
#include "trie.hpp"

using namespace fastshift;
using namespace py::literals;

using Bound = std::tuple<Array<double>, double, double, double>;  // costs [L, O], fixed, low, high
// Architectures and their errors, losses, flops, versions and generations.
using Kept = std::tuple<Array<std::uint8_t>, Array<double>, Array<double>, Array<std::int64_t>,
                        Array<std::int64_t>, Array<std::int64_t>>;
// Generator, generation, proposals, accepted, seen, kept.
using State = std::tuple<Rng::State, std::int64_t, std::uint64_t, std::uint64_t,
                         Array<std::uint8_t>, Kept>;

// What a function returns that runs without the interpreter's lock.
template <typename Function>
auto unlocked(Function function) {
  const py::gil_scoped_release release;
  return function();
}

std::shared_ptr<Sampler> make_sampler(const Array<std::int32_t>& num_choices,
                                      const Array<std::int32_t>& bins, std::int64_t low_bin,
                                      std::int64_t high_bin, const std::vector<Bound>& bounds) {
  rows_of(num_choices, 1, "num_choices");
  rows_of(bins, 2, "bins");
  std::vector<CostBound> copies;
  for (const auto& [costs, fixed, low, high] : bounds) {
    copies.push_back({copied(costs), fixed, low, high});
  }
  return std::make_shared<Sampler>(copied(num_choices), static_cast<std::size_t>(bins.shape(1)),
                                   copied(bins), low_bin, high_bin, std::move(copies));
}

py::object count(const Sampler& sampler) {
  py::object total = py::int_(0);
  for (auto limb = sampler.count().rbegin(); limb != sampler.count().rend(); ++limb) {
    total = (total << py::int_(64)) | py::int_(*limb);
  }
  return total;
}

// Up to `num` feasible rows, the generator after them, and the draws they took.
py::tuple sample(const Sampler& sampler, std::size_t num, const Rng::State& state) {
  Rng rng(state);
  std::uint64_t proposals = 0;
  auto archs = unlocked([&] { return sampler.sample(rng, num, proposals); });
  return py::make_tuple(adopt_rows(std::move(archs), sampler.num_blocks()), rng.state(), proposals);
}

Array<std::uint8_t> unrank(const Sampler& sampler, const Array<std::uint64_t>& ranks) {
  const std::size_t num = rows_of(ranks, 1, "ranks");
  return adopt_rows(sampler.unrank_all(ranks.data(), num), sampler.num_blocks());
}

Array<bool> is_feasible(const Sampler& sampler, const Array<std::uint8_t>& archs) {
  const std::size_t num = members(archs, sampler);
  Array<bool> result(static_cast<py::ssize_t>(num));
  for (std::size_t i = 0; i < num; ++i) {
    result.mutable_data()[i] = sampler.is_feasible(archs.data() + i * sampler.num_blocks());
  }
  return result;
}

std::unique_ptr<Population> make_population(std::shared_ptr<Sampler> sampler,
                                            std::size_t population, std::size_t parents,
                                            std::size_t mutation, std::size_t crossover,
                                            double mutation_prob, std::size_t keep, bool seen_lasts,
                                            bool loss_first, std::uint64_t seed) {
  const PopulationSettings settings{population,    parents, mutation,   crossover,
                                    mutation_prob, keep,    seen_lasts, loss_first};
  return std::make_unique<Population>(std::move(sampler), settings, seed);
}

Array<std::uint8_t> ask(Population& population) {
  return adopt_rows(unlocked([&] { return population.ask(); }), population.num_blocks());
}

using Scores = void (Population::*)(const std::uint8_t*, std::size_t, const double*, const double*,
                                    const std::int64_t*, std::int64_t);

template <Scores method>
void scores(Population& population, const Array<std::uint8_t>& archs, const Array<double>& errors,
            const Array<double>& losses, const Array<std::int64_t>& flops, std::int64_t version) {
  const std::size_t num = members(archs, population.sampler());
  const double* error = column(errors, num, "errors");
  const double* loss = column(losses, num, "losses");
  const std::int64_t* flop = column(flops, num, "flops");
  unlocked([&] { (population.*method)(archs.data(), num, error, loss, flop, version); });
}

Kept kept(const Population& population) {
  std::vector<std::uint8_t> archs;
  std::vector<double> errors, losses;
  std::vector<std::int64_t> flops, versions, generations;
  for (const Entry& entry : population.kept()) {
    archs.insert(archs.end(), entry.arch.begin(), entry.arch.end());
    errors.push_back(entry.error);
    losses.push_back(entry.loss);
    flops.push_back(entry.flops);
    versions.push_back(entry.version);
    generations.push_back(entry.generation);
  }
  return {adopt_rows(std::move(archs), population.num_blocks()), adopt(std::move(errors)),
          adopt(std::move(losses)), adopt(std::move(flops)), adopt(std::move(versions)),
          adopt(std::move(generations))};
}

State get_state(const Population& population) {
  PopulationState state = population.state();
  return {state.rng, state.generation, state.proposals, state.accepted,
          adopt_rows(std::move(state.seen), population.num_blocks()), kept(population)};
}

void set_state(Population& population, const State& columns) {
  const auto& [rng, generation, proposals, accepted, seen, kept] = columns;
  const auto& [archs, errors, losses, flops, versions, generations] = kept;
  members(seen, population.sampler());
  const std::size_t num = members(archs, population.sampler());
  const double* error = column(errors, num, "errors");
  const double* loss = column(losses, num, "losses");
  const std::int64_t* flop = column(flops, num, "flops");
  const std::int64_t* version = column(versions, num, "versions");
  const std::int64_t* born = column(generations, num, "generations");
  PopulationState state{rng, generation, proposals, accepted, copied(seen), {}};
  for (std::size_t i = 0; i < num; ++i) {
    const std::uint8_t* arch = archs.data() + i * population.num_blocks();
    state.kept.push_back({{arch, arch + population.num_blocks()},
                          error[i], loss[i], flop[i], version[i], born[i]});
  }
  population.set_state(state);
}

py::dict last_ask(const Population& population) {
  const AskReport& report = population.last_ask();
  return py::dict("parents"_a = report.parents, "mutants"_a = report.mutants,
                  "children"_a = report.children, "random"_a = report.random,
                  "tries"_a = report.tries, "is_exhausted"_a = report.is_exhausted);
}

Objectives objectives(const Array<double>& values) {
  const std::size_t num = rows_of(values, 2, "objectives");
  return {values.data(), num, static_cast<std::size_t>(values.shape(1))};
}

Array<std::int32_t> sort_fronts(const Array<double>& values) {
  return adopt(non_dominated_sort(objectives(values)));
}

Array<double> crowding(const Array<double>& values, const Array<std::int32_t>& ranks) {
  const Objectives table = objectives(values);
  return adopt(crowding_distance(table, column(ranks, table.num_rows, "ranks")));
}

py::tuple build_trie(const Array<std::uint8_t>& archs, std::int64_t subtrie_size) {
  const std::size_t num = rows_of(archs, 2, "archs");
  const auto num_blocks = static_cast<std::size_t>(archs.shape(1));
  TriePlan plan = unlocked(
      [&] { return TrieBuilder(archs.data(), num, num_blocks, subtrie_size).build(); });
  py::list parent, choice, leaves;
  for (TrieLevel& level : plan.levels) {
    parent.append(adopt(std::move(level.parent)));
    choice.append(adopt(std::move(level.choice)));
    leaves.append(adopt(std::move(level.leaves)));
  }
  return py::make_tuple(parent, choice, leaves, adopt_rows(std::move(plan.segments), 5));
}

PYBIND11_MODULE(_core, m) {
  m.doc() = "The compiled population core; see fastshift.population and fastshift.trie.";
  const auto arr = [](const char* name) { return py::arg(name).noconvert(); };

  py::class_<Sampler, std::shared_ptr<Sampler>>(m, "Sampler")
      .def(py::init(&make_sampler), arr("num_choices"), py::kw_only(), arr("bins"),
           py::arg("low_bin"), py::arg("high_bin"), arr("bounds"))
      .def_property_readonly("count", &count)
      .def("sample", &sample, py::arg("num"), py::kw_only(), py::arg("rng"))
      .def("unrank", &unrank, arr("ranks"))
      .def("is_feasible", &is_feasible, arr("archs"));

  py::class_<Population>(m, "Population")
      .def(py::init(&make_population), py::arg("sampler"), py::kw_only(), py::arg("population"),
           py::arg("parents"), py::arg("mutation"), py::arg("crossover"), py::arg("mutation_prob"),
           py::arg("keep"), py::arg("seen_lasts"), py::arg("loss_first"), py::arg("seed"))
      .def("ask", &ask)
      .def("tell", &scores<&Population::tell>, arr("archs"), arr("errors"), arr("losses"),
           arr("flops"), py::arg("version"))
      .def("replace_scores", &scores<&Population::replace_scores>, arr("archs"), arr("errors"),
           arr("losses"), arr("flops"), py::arg("version"))
      .def_property_readonly("generation", &Population::generation)
      .def_property_readonly("proposals", &Population::proposals)
      .def_property_readonly("accepted", &Population::accepted)
      .def_property_readonly("kept", &kept)
      .def_property_readonly("last_ask", &last_ask)
      .def("state", &get_state)
      .def("set_state", &set_state, arr("state"));

  m.def("seeded", [](std::uint64_t seed) { return Rng(seed).state(); }, py::arg("seed"));
  m.def("non_dominated_sort", &sort_fronts, arr("objectives"));
  m.def("crowding_distance", &crowding, arr("objectives"), arr("ranks"));
  m.def("build_trie", &build_trie, arr("archs"), py::arg("subtrie_size"));
}
