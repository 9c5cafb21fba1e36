#include "rows.h"

#include "ffi.h"

namespace jaxnorm {
namespace {

// Consecutive rows of one task; as many tasks for any number of threads.
int64_t norm_tasks(const Rows& r) {
  const int64_t each = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, r.features));
  return std::min<int64_t>(64, ceil_div(r.count(), each));
}

template <class T>
struct Norm {
  using A = Wide<T>;
  const T* x;
  A epsilon;
  const A *scale, *bias;
  T* y;
  A *mean, *var, *residue;

  void row(const Rows& r, int64_t i, bool center, std::vector<A>& scratch) const {
    const int64_t n = r.features, at = i / r.sharing() * n;
    const A* wide = widened(x + i * n, n, scratch.data());
    const RowMoments<A> m = moments_of_row(wide, n, center);
    write_row(wide, n, m, rstd_of(m.var, epsilon), scale ? scale + at : nullptr,
              bias ? bias + at : nullptr, y + i * n);
    mean[i] = m.mean, var[i] = m.var, residue[i] = m.residue;
  }
};

Error RowNorm(ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t outer,
              int64_t rows, int64_t features, int64_t param_outer, bool center, bool has_scale,
              bool has_bias) {
  const Rows r{outer, rows, features, param_outer};
  if (!r.count()) return Error::Success();
  const AnyBuffer x = *args.get<AnyBuffer>(0);
  return of_type(x.element_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Wide<T>;
    const A* scale = has_scale ? data<A>(*args.get<AnyBuffer>(2)) : nullptr;
    const A* bias = has_bias ? data<A>(*args.get<AnyBuffer>(2 + has_scale)) : nullptr;
    const Norm<T> norm{data<T>(x),
                       *data<A>(*args.get<AnyBuffer>(1)),
                       scale,
                       bias,
                       data<T>(*rets.get<AnyBuffer>(0)),
                       data<A>(*rets.get<AnyBuffer>(1)),
                       data<A>(*rets.get<AnyBuffer>(2)),
                       data<A>(*rets.get<AnyBuffer>(3))};
    const int64_t tasks = norm_tasks(r);
    parallel(pool, tasks, r.size(), [&](int64_t t) {
      std::vector<A> scratch(std::is_same_v<T, A> ? 0 : features);
      const Range range = part(r.count(), tasks, t);
      for (int64_t i = range.begin; i < range.end; ++i) norm.row(r, i, center, scratch);
    });
    return Error::Success();
  });
}

template <class T, class G>
struct Gradient {
  using A = Wide<T>;
  const T* x;
  const G* dy;
  A epsilon;
  const A *mean, *var, *residue, *scale, *dmean, *dvar;
  T* dx;

  // The row's gradient; adds to those of the parameters.
  void row(const Rows& r, int64_t i, bool center, std::vector<A>& scratch, A* dscale,
           A* dbias) const {
    const int64_t n = r.features;
    const A* wide = widened(x + i * n, n, scratch.data());
    const A* along = widened(dy + i * n, n, scratch.data() + n);
    const A* gain = scale ? scale + i / r.sharing() * n : nullptr;
    const RowMoments<A> m{mean[i], var[i], residue[i]};
    const A rstd = rstd_of(m.var, epsilon);
    double level, tilt;
    sums_of_row(wide, along, gain, n, m, rstd, level, tilt);
    RowSlopes<A> s{A(level / double(n)), A(tilt / double(n)), 0, 0};
    if (!center) s.level = 0;
    if (dmean) s.dmean = center ? dmean[i] / A(n) : A(0), s.dvar = 2 * dvar[i] / A(n);
    add_to_params(wide, along, n, m, rstd, dscale, dbias);
    write_gradient(wide, along, gain, n, m, rstd, s, dx + i * n);
  }
};

// Sums over rows, in floats for a few rows and then in doubles, of one task.
template <class A>
class ParamSums {
 public:
  ParamSums(bool wanted, int64_t n) : few_(wanted ? n : 0), all_(wanted ? n : 0) {}
  A* few() { return few_.empty() ? nullptr : few_.data(); }
  void flush() {
    for (size_t c = 0; c < few_.size(); ++c) all_[c] += double(few_[c]), few_[c] = 0;
  }
  const std::vector<double>& all() const { return all_; }

 private:
  std::vector<A> few_;
  std::vector<double> all_;
};

template <class A>
void add_up(const std::vector<ParamSums<A>>& parts, int64_t first, int64_t n, A* to) {
  for (size_t c = 0; c < parts[first].all().size(); ++c) {
    double sum = 0;
    for (int64_t p = first; p < first + n; ++p) sum += parts[p].all()[c];
    to[c] = A(sum);
  }
}

template <class T, class G>
void row_gradient(ThreadPool& pool, const Rows& r, const Gradient<T, G>& gradient, bool center,
                  Wide<T>* dscale, Wide<T>* dbias) {
  using A = Wide<T>;
  const int64_t n = r.features, sharing = r.sharing();
  const int64_t sets = sharing ? r.count() / sharing : 0;
  const int64_t fit = std::max<int64_t>(1, sharing * n / (1 << 14));
  const int64_t wanted = std::max<int64_t>(1, 32 / std::max<int64_t>(1, sets));
  const int64_t each = std::min({fit, wanted, sharing});
  std::vector<ParamSums<A>> scales(sets * each, ParamSums<A>(dscale, n));
  std::vector<ParamSums<A>> biases(sets * each, ParamSums<A>(dbias, n));
  parallel(pool, sets * each, r.size(), [&](int64_t t) {
    std::vector<A> scratch(2 * n);
    const Range range = part(sharing, each, t % each);
    for (int64_t i = range.begin; i < range.end; ++i) {
      const int64_t row = t / each * sharing + i;
      gradient.row(r, row, center, scratch, scales[t].few(), biases[t].few());
      if ((i - range.begin) % 256 == 255) scales[t].flush(), biases[t].flush();
    }
    scales[t].flush(), biases[t].flush();
  });
  for (int64_t s = 0; s < sets; ++s) {
    if (dscale) add_up(scales, s * each, each, dscale + s * n);
    if (dbias) add_up(biases, s * each, each, dbias + s * n);
  }
}

Error RowGradient(ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t outer,
                  int64_t rows, int64_t features, int64_t param_outer, bool center,
                  bool has_scale, bool has_bias, bool has_moments) {
  const Rows r{outer, rows, features, param_outer};
  const AnyBuffer x = *args.get<AnyBuffer>(0), dy = *args.get<AnyBuffer>(1);
  return of_type(x.element_type(), [&](auto of_x) {
    return of_type(dy.element_type(), [&](auto of_dy) {
      using T = typename decltype(of_x)::type;
      using G = typename decltype(of_dy)::type;
      using A = Wide<T>;
      if constexpr (!std::is_same_v<T, G> && !std::is_same_v<G, A>) {
        return unknown("a cotangent has the type of x, or that of its sums");
      } else {
        const auto small = [&](bool given, int64_t i) {
          return given ? data<A>(*args.get<AnyBuffer>(i)) : nullptr;
        };
        const Gradient<T, G> gradient{data<T>(x),
                                      data<G>(dy),
                                      *small(true, 2),
                                      small(true, 3),
                                      small(true, 4),
                                      small(true, 5),
                                      small(has_scale, 6),
                                      small(has_moments, 6 + has_scale),
                                      small(has_moments, 7 + has_scale),
                                      data<T>(*rets.get<AnyBuffer>(0))};
        A* dscale = has_scale ? data<A>(*rets.get<AnyBuffer>(1)) : nullptr;
        A* dbias = has_bias ? data<A>(*rets.get<AnyBuffer>(1 + has_scale)) : nullptr;
        if (r.count()) {
          row_gradient(pool, r, gradient, center, dscale, dbias);
        } else {
          for (A* to : {dscale, dbias})
            if (to) std::fill(to, to + param_outer * features, A(0));
        }
        return Error::Success();
      }
    });
  });
}

// What both handlers are given, in this order.
auto rows_and_flags() {
  return ffi::Ffi::Bind()
      .Ctx<ThreadPool>()
      .RemainingArgs()
      .RemainingRets()
      .Attr<int64_t>("outer")
      .Attr<int64_t>("rows")
      .Attr<int64_t>("features")
      .Attr<int64_t>("param_outer")
      .Attr<bool>("center")
      .Attr<bool>("has_scale")
      .Attr<bool>("has_bias");
}

}  // namespace
}  // namespace jaxnorm

using namespace jaxnorm;

#pragma GCC visibility push(default)  // all that is seen from outside

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxnorm_row_norm, RowNorm, rows_and_flags());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxnorm_row_gradient, RowGradient,
                              rows_and_flags().Attr<bool>("has_moments"));

#pragma GCC visibility pop
