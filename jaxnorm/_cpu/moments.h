// Mean and squared deviations of sets of numbers, and of their unions.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace jaxnorm {

// Elements that are summed in the type of the sums before they are added up as doubles.
constexpr int64_t kBlock = 2048;
constexpr int64_t kLanes = 32;

// The means and squared deviations of many sets, all of `size` numbers.
struct Sets {
  double *mean, *squares;
  int64_t size = 0;
};

// The union of each set with another of n numbers (Chan, Golub and LeVeque, 1983).
template <class MeanOf, class SquaresOf>
inline void join(Sets& sets, int64_t count, int64_t n, const MeanOf& mean, const SquaresOf& squares) {
  if (!n) return;
  double* __restrict to = sets.mean;
  double* __restrict square = sets.squares;
  if (!sets.size)
    for (int64_t i = 0; i < count; ++i) to[i] = mean(i), square[i] = squares(i);
  const double weight = double(n) / double(sets.size + n), spread = double(sets.size) * weight;
  if (sets.size)
    for (int64_t i = 0; i < count; ++i) {
      const double away = mean(i) - to[i];
      to[i] += away * weight;
      square[i] += squares(i) + away * away * spread;
    }
  sets.size += n;
}

// Sums of f(i) and g(i) over i < n, in lanes that do not wait for each other.
template <class A, class F>
inline void sum_pair(int64_t n, const F& terms, double& first, double& second) {
  first = second = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    A a[kLanes] = {}, b[kLanes] = {};
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes)
      for (int64_t j = 0; j < kLanes; ++j) terms(i + j, a[j], b[j]);
    for (int64_t j = 0; i + j < end; ++j) terms(i + j, a[j], b[j]);
    for (int64_t half = kLanes / 2; half; half /= 2)
      for (int64_t j = 0; j < half; ++j) a[j] += a[j + half], b[j] += b[j + half];
    first += double(a[0]), second += double(b[0]);
  }
}

// About their first, which makes constants exact; then about their mean, which makes the
// squares exact however far from 0 it is.
template <class A>
inline void run_moments(const A* __restrict x, int64_t n, A& mean, double& off, double& squares) {
  const A first = x[0];
  double sum, none;
  sum_pair<A>(n, [=](int64_t i, A& a, A&) { a += x[i] - first; }, sum, none);
  const A about = mean = first + A(sum / double(n));
  sum_pair<A>(n, [=](int64_t i, A& a, A& b) {
    const A e = x[i] - about;
    a += e, b += e * e;
  }, sum, squares);
  off = sum / double(n);
  squares -= off * sum;
}

template <class A>
inline double run_square(const A* __restrict x, int64_t n) {
  double squares, none;
  sum_pair<A>(n, [=](int64_t i, A& a, A&) { a += x[i] * x[i]; }, squares, none);
  return squares;
}

}  // namespace jaxnorm
