#include "columns.h"

#include "ffi.h"

namespace jaxnorm {
namespace {

// The moments of each set, as `Sets` of x - pivot: means in `means`, and so on.
template <class T>
int64_t sets_of(ThreadPool& pool, const View& v, bool center, const T* x,
                std::vector<double>& means, std::vector<double>& squares) {
  const Tasks tasks(v);
  const int64_t sets = v.sets(), lengths = tasks.lengths();
  means.resize(lengths * sets), squares.resize(lengths * sets);
  parallel(pool, tasks.count(), v.size(), [&](int64_t i) {
    const Task task = tasks[i];
    const int64_t at = task.index * sets + task.outer * v.kept + task.channels.begin;
    (v.inner > 1 ? run_of_moments<T> : column_moments<T>)(v, x, task, center,
                                                          {&means[at], &squares[at]});
  });
  Sets whole{means.data(), squares.data(), tasks.part_of_length(0).size() * v.inner};
  for (int64_t p = 1; p < lengths; ++p) {
    const double *mean_of = &means[p * sets], *square_of = &squares[p * sets];
    join(whole, sets, tasks.part_of_length(p).size() * v.inner,
         [=](int64_t s) { return mean_of[s]; }, [=](int64_t s) { return square_of[s]; });
  }
  return whole.size;
}

// Those of short runs, from those of each position in them.
template <class T>
int64_t sets_of_positions(ThreadPool& pool, const View& v, bool center, const T* x,
                          std::vector<double>& means, std::vector<double>& squares) {
  const int64_t each = sets_of(pool, v.flat(), center, x, means, squares);
  for (int64_t s = 0; s < v.sets(); ++s) {
    const int64_t first = v.first(s), at = s * v.inner;
    const double pivot = center ? double(load(x[first])) : 0;
    double mean = 0, square = 0;
    Sets set{&mean, &square};
    for (int64_t i = 0; i < v.inner; ++i) {
      const double from = center ? double(load(x[first + i])) : 0;
      join(set, 1, each, [&](int64_t) { return (from - pivot) + means[at + i]; },
           [&](int64_t) { return squares[at + i]; });
    }
    means[s] = mean, squares[s] = square;
  }
  return each * v.inner;
}

template <class T>
void moments(ThreadPool& pool, const View& v, bool center, const T* x, Wide<T>* mean,
             Wide<T>* var, Wide<T>* residue) {
  using A = Wide<T>;
  if (!v.size()) {
    for (A* to : {mean, var, residue}) std::fill(to, to + v.sets(), A(0));
    return;
  }
  std::vector<double> means, squares;
  const int64_t size = (v.of_short_runs() ? sets_of_positions<T> : sets_of<T>)(
      pool, v, center, x, means, squares);
  for (int64_t s = 0; s < v.sets(); ++s) {
    const double pivot = center ? double(load(x[v.first(s)])) : 0;
    mean[s] = A(pivot + means[s]);
    residue[s] = A((pivot - double(mean[s])) + means[s]);
    var[s] = A(squares[s] / double(size));
    if (var[s] < 0) var[s] = 0;  // NaN stays
  }
}

Error Moments(ThreadPool pool, AnyBuffer x, Result mean, Result var, Result residue, int64_t outer,
              int64_t length, int64_t kept, int64_t inner, bool center) {
  const View view{outer, length, kept, inner};
  if (!view.sets()) return Error::Success();
  return of_type(x.element_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Wide<T>;
    moments(pool, view, center, data<T>(x), data<A>(mean), data<A>(var), data<A>(residue));
    return Error::Success();
  });
}

template <class T, class G>
void sums(ThreadPool& pool, const View& v, const T* x, const G* g, const Wide<T>* mean,
          std::vector<double>& plains, std::vector<double>& tilts) {
  const Tasks tasks(v);
  const int64_t sets = v.sets(), lengths = tasks.lengths();
  plains.assign(lengths * sets, 0.0), tilts.assign(lengths * sets, 0.0);
  parallel(pool, tasks.count(), v.size(), [&](int64_t i) {
    const Task task = tasks[i];
    const int64_t at = task.index * sets + task.outer * v.kept + task.channels.begin;
    (v.inner > 1 ? run_of_sums<T, G> : column_sums<T, G>)(v, x, g, mean, task,
                                                          {&plains[at], &tilts[at]});
  });
  for (int64_t p = 1; p < lengths; ++p)
    for (int64_t s = 0; s < sets; ++s)
      plains[s] += plains[p * sets + s], tilts[s] += tilts[p * sets + s];
}

// Those of short runs, from those of each position in them.
template <class T, class G>
void sums_of_positions(ThreadPool& pool, const View& v, const T* x, const G* g,
                       const Wide<T>* mean, std::vector<double>& plains,
                       std::vector<double>& tilts) {
  std::vector<Wide<T>> means(v.sets() * v.inner);
  for (size_t i = 0; i < means.size(); ++i) means[i] = mean[i / v.inner];
  sums(pool, v.flat(), x, g, means.data(), plains, tilts);
  for (int64_t s = 0; s < v.sets(); ++s) {
    double plain = 0, tilted = 0;
    for (int64_t i = s * v.inner; i < (s + 1) * v.inner; ++i)
      plain += plains[i], tilted += tilts[i];
    plains[s] = plain, tilts[s] = tilted;
  }
}

template <class T, class G>
void all_sums(ThreadPool& pool, const View& v, const T* x, const G* g, const Wide<T>* mean,
              Wide<T>* plain, Wide<T>* tilted) {
  std::vector<double> plains(v.sets(), 0.0), tilts(v.sets(), 0.0);
  if (v.size())
    (v.of_short_runs() ? sums_of_positions<T, G> : sums<T, G>)(pool, v, x, g, mean, plains,
                                                               tilts);
  for (int64_t s = 0; s < v.sets(); ++s)
    plain[s] = Wide<T>(plains[s]), tilted[s] = Wide<T>(tilts[s]);
}

Error Sums(ThreadPool pool, AnyBuffer x, AnyBuffer g, AnyBuffer mean, Result plain, Result tilted,
           int64_t outer, int64_t length, int64_t kept, int64_t inner) {
  const View view{outer, length, kept, inner};
  if (!view.sets()) return Error::Success();
  return of_type(x.element_type(), [&](auto of_x) {
    return of_type(g.element_type(), [&](auto of_g) {
      using T = typename decltype(of_x)::type;
      using G = typename decltype(of_g)::type;
      using A = Wide<T>;
      if constexpr (!std::is_same_v<A, Wide<G>>) {
        return unknown("float64 does not mix with other types");
      } else {
        all_sums(pool, view, data<T>(x), data<G>(g), data<A>(mean), data<A>(plain),
                 data<A>(tilted));
        return Error::Success();
      }
    });
  });
}

}  // namespace
}  // namespace jaxnorm

using namespace jaxnorm;

#pragma GCC visibility push(default)  // all that is seen from outside

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxnorm_moments, Moments,
                              ffi::Ffi::Bind()
                                  .Ctx<ThreadPool>()
                                  .Arg<AnyBuffer>()
                                  .Ret<AnyBuffer>()
                                  .Ret<AnyBuffer>()
                                  .Ret<AnyBuffer>()
                                  .Attr<int64_t>("outer")
                                  .Attr<int64_t>("length")
                                  .Attr<int64_t>("kept")
                                  .Attr<int64_t>("inner")
                                  .Attr<bool>("center"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxnorm_sums, Sums,
                              ffi::Ffi::Bind()
                                  .Ctx<ThreadPool>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Ret<AnyBuffer>()
                                  .Ret<AnyBuffer>()
                                  .Attr<int64_t>("outer")
                                  .Attr<int64_t>("length")
                                  .Attr<int64_t>("kept")
                                  .Attr<int64_t>("inner"));

#pragma GCC visibility pop
