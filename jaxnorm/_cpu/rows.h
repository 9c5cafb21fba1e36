// Rows that are normalized by their own moments while the first cache holds them.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "view.h"

namespace jaxnorm {

struct Rows {
  int64_t outer, rows, features, param_outer;

  int64_t count() const { return outer * rows; }
  int64_t size() const { return count() * features; }
  // Consecutive rows that share their parameters: those of all, or of one outer index.
  int64_t sharing() const { return param_outer > 1 ? rows : count(); }
};

// 1 / sqrt(var + epsilon), and NaN where that is infinite: a finite number divided by it
// would be 0, and look like a result.
template <class A>
A rstd_of(A var, A epsilon) {
  const A square = var + epsilon;
  return square <= std::numeric_limits<A>::max() ? A(1) / std::sqrt(square)
                                                 : std::numeric_limits<A>::quiet_NaN();
}

template <class A>
struct RowMoments {
  A mean = 0, var = 0, residue = 0;
};

template <class A>
RowMoments<A> moments_of_row(const A* x, int64_t n, bool center) {
  RowMoments<A> m;
  if (!n) return m;
  double off = 0, squares;
  if (center) run_moments(x, n, m.mean, off, squares);
  else squares = run_square(x, n);
  const A var = A(squares / double(n));
  m.var = var < 0 ? A(0) : var;
  m.residue = A(off);
  return m;
}

// y = ((x - mean) - residue) * rstd * scale + bias, for one row.
template <class T, class A>
void write_row(const A* __restrict x, int64_t n, RowMoments<A> m, A rstd, const A* __restrict scale,
               const A* __restrict bias, T* __restrict y) {
  const A mean = m.mean, residue = m.residue;
  for (int64_t c = 0; c < n; ++c) {
    A v = ((x[c] - mean) - residue) * rstd;
    if (scale) v *= scale[c];
    if (bias) v += bias[c];
    store(v, y[c]);
  }
}

// What the gradient of a row is made of: dx = rstd * (d - level - x_hat * tilt) + more,
// where d = dy * scale.
template <class A>
struct RowSlopes {
  A level, tilt, dmean, dvar;
};

// The sums of d and of d * x_hat.
template <class A>
void sums_of_row(const A* __restrict x, const A* __restrict dy, const A* __restrict scale, int64_t n,
                 RowMoments<A> m, A rstd, double& level, double& tilt) {
  const A mean = m.mean, residue = m.residue;
  sum_pair<A>(n, [=](int64_t c, A& a, A& b) {
    const A d = scale ? dy[c] * scale[c] : dy[c];
    a += d, b += d * (((x[c] - mean) - residue) * rstd);
  }, level, tilt);
}

template <class T, class A>
void write_gradient(const A* __restrict x, const A* __restrict dy, const A* __restrict scale,
                    int64_t n, RowMoments<A> m, A rstd, RowSlopes<A> s, T* __restrict dx) {
  const A mean = m.mean, residue = m.residue, level = s.level * rstd - s.dmean;
  const A tilt = s.tilt * rstd * rstd - s.dvar;
  for (int64_t c = 0; c < n; ++c) {
    const A d = scale ? dy[c] * scale[c] : dy[c];
    store(d * rstd - level - ((x[c] - mean) - residue) * tilt, dx[c]);
  }
}

// Adds a row's part of the gradients of scale and bias.
template <class A>
void add_to_params(const A* __restrict x, const A* __restrict dy, int64_t n, RowMoments<A> m,
                   A rstd, A* __restrict dscale, A* __restrict dbias) {
  const A mean = m.mean, residue = m.residue;
  for (int64_t c = 0; c < n; ++c) {
    if (dscale) dscale[c] += dy[c] * (((x[c] - mean) - residue) * rstd);
    if (dbias) dbias[c] += dy[c];
  }
}

}  // namespace jaxnorm
