// Mean and squared deviations of sets of numbers, and of their unions.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace jaxnorm {

// Elements that are summed in the type of the sums before they are added up as doubles.
constexpr int64_t kBlock = 8192;
constexpr int64_t kLanes = 32;

// Of `size` numbers; the sum of squares is that of their deviations from the mean.
struct Set {
  double mean = 0, squares = 0;
  int64_t size = 0;

  // Chan, Golub and LeVeque (1983).
  void join(double other_mean, double other_squares, int64_t n) {
    if (!n) return;
    const double weight = double(n) / double(size + n), away = other_mean - mean;
    squares = size ? squares + other_squares + away * away * double(size) * weight
                   : other_squares;
    mean = size ? mean + away * weight : other_mean;
    size += n;
  }
  void join(const Set& other) { join(other.mean, other.squares, other.size); }
};

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
