// Non-dominated ranks and crowding distances; every objective is minimised.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

namespace fastshift {

// A table of objectives, [P, M], that the caller owns.
struct Objectives {
  const double* values;
  std::size_t num_rows;
  std::size_t num_objectives;

  const double* row(std::size_t i) const { return values + i * num_objectives; }
  bool has_nan(std::size_t i) const {
    return std::any_of(row(i), row(i) + num_objectives, [](double x) { return std::isnan(x); });
  }
  std::vector<std::size_t> valid_rows() const {
    std::vector<std::size_t> rows;
    for (std::size_t i = 0; i < num_rows; ++i) {
      if (!has_nan(i)) rows.push_back(i);
    }
    return rows;
  }
};

// The front of each row, 0 being the best; rows with a NaN share the front after the last.
// Efficient non-dominated sort with binary search (Zhang, Tian, Cheng, Jin, 2015): rows come in
// lexicographic order, so only an earlier one can dominate.
inline std::vector<std::int32_t> non_dominated_sort(const Objectives& table) {
  const std::size_t width = table.num_objectives;
  std::vector<std::size_t> order = table.valid_rows();
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    const auto where = std::mismatch(table.row(a), table.row(a) + width, table.row(b));
    return where.first == table.row(a) + width ? a < b : *where.first < *where.second;
  });
  const auto is_dominated = [&](std::size_t i, std::size_t by) {
    bool is_equal = true;
    for (std::size_t m = 0; m < width; ++m) {
      if (table.row(by)[m] > table.row(i)[m]) return false;
      is_equal = is_equal && table.row(by)[m] == table.row(i)[m];
    }
    return !is_equal;
  };
  std::vector<std::vector<std::size_t>> fronts;
  std::vector<std::int32_t> ranks(table.num_rows, 0);
  for (const std::size_t i : order) {
    const auto front = std::partition_point(fronts.begin(), fronts.end(), [&](const auto& members) {
      // With two objectives the member that came last has the least second objective of its front.
      const auto stop = width <= 2 ? members.rbegin() + 1 : members.rend();
      return std::any_of(members.rbegin(), stop,
                         [&](std::size_t by) { return is_dominated(i, by); });
    });
    ranks[i] = static_cast<std::int32_t>(front - fronts.begin());
    if (front == fronts.end()) {
      fronts.push_back({i});
    } else {
      front->push_back(i);
    }
  }
  for (std::size_t i = 0; i < table.num_rows; ++i) {
    if (table.has_nan(i)) ranks[i] = static_cast<std::int32_t>(fronts.size());
  }
  return ranks;
}

// Crowding distance (NSGA-II: Deb, Pratap, Agarwal, Meyarivan, 2002): over the objectives, the gap
// between a row's two neighbours in its front over the front's span; infinite at the ends. Rows
// with a NaN get 0; an objective whose span is 0 or infinite adds nothing between the ends.
inline std::vector<double> crowding_distance(const Objectives& table,
                                             const std::int32_t* ranks) {
  std::vector<double> distance(table.num_rows, 0.0);
  std::vector<std::size_t> order = table.valid_rows();
  for (std::size_t m = 0; m < table.num_objectives; ++m) {
    const auto value = [&](std::size_t i) { return table.row(i)[m]; };
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
      if (ranks[a] != ranks[b]) return ranks[a] < ranks[b];
      return value(a) != value(b) ? value(a) < value(b) : a < b;
    });
    for (auto first = order.begin(), stop = first; first != order.end(); first = stop) {
      stop = std::find_if(first, order.end(),
                          [&](std::size_t i) { return ranks[i] != ranks[*first]; });
      const auto last = stop - 1;
      const double span = value(*last) - value(*first);
      distance[*first] = std::numeric_limits<double>::infinity();
      distance[*last] = std::numeric_limits<double>::infinity();
      if (!(span > 0.0) || std::isinf(span)) continue;
      for (auto i = first + 1; i < last; ++i) {
        distance[*i] += (value(*(i + 1)) - value(*(i - 1))) / span;
      }
    }
  }
  return distance;
}

}  // namespace fastshift
