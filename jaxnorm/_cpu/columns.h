// Sums of each channel, and the line through each element.
#pragma once

#include <vector>

#include "view.h"

namespace jaxnorm {

// How many positions of few channels are taken as one of more, which fill a vector.
inline int64_t folds(int64_t channels, int64_t rows, int64_t stride) {
  if (stride != channels || channels >= 64) return 1;
  return std::max<int64_t>(1, std::min<int64_t>(64 / channels, rows));
}

// Calls each(first row, rows, lanes): rows of channels that follow each other in memory
// are taken `folds` at a time, so that the lanes of a row are the channels several times.
template <class Each>
void fold_rows(int64_t rows, int64_t channels, int64_t stride, const Each& each) {
  const int64_t fold = folds(channels, rows, stride), whole = rows / fold;
  if (whole) each(0, whole, channels * fold);
  if (const int64_t rest = rows - whole * fold) each(rows - rest, rest, channels);
}

// Rows of lanes whose sums take `bytes` in a cache at most.
inline int64_t block_rows(int64_t lanes, int64_t bytes, int64_t item) {
  const int64_t rows = bytes / std::max<int64_t>(1, lanes * item);
  return std::min<int64_t>(1024, std::max<int64_t>(16, rows));
}

// The moments of each lane of a block, added to `sets`, of which lane c is of set
// c % channels.
template <class T>
void block_moments(const T* x, int64_t rows, int64_t lanes, int64_t stride, int64_t channels,
                   std::vector<Wide<T>>& scratch, Set* sets) {
  using A = Wide<T>;
  scratch.assign(3 * lanes, A(0));
  A* __restrict about = scratch.data();
  A* __restrict sum = about + lanes;
  A* __restrict squares = sum + lanes;
  for (int64_t c = 0; c < lanes; ++c) about[c] = load(x[c]);
  for (int64_t r = 0; r < rows; ++r) {
    const T* __restrict row = x + r * stride;
    for (int64_t c = 0; c < lanes; ++c) sum[c] += load(row[c]) - about[c];
  }
  for (int64_t c = 0; c < lanes; ++c) about[c] += sum[c] / A(rows), sum[c] = 0;
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    const T *__restrict p = x + r * stride, *__restrict q = p + stride,
                *__restrict s = q + stride, *__restrict t = s + stride;
    for (int64_t c = 0; c < lanes; ++c) {
      const A m = about[c];
      const A a = load(p[c]) - m, b = load(q[c]) - m, d = load(s[c]) - m, e = load(t[c]) - m;
      sum[c] += (a + b) + (d + e);
      squares[c] += (a * a + b * b) + (d * d + e * e);
    }
  }
  for (; r < rows; ++r) {
    const T* __restrict row = x + r * stride;
    for (int64_t c = 0; c < lanes; ++c) {
      const A e = load(row[c]) - about[c];
      sum[c] += e, squares[c] += e * e;
    }
  }
  for (int64_t c = 0; c < lanes; ++c) {
    const double off = double(sum[c]) / double(rows);
    sets[c % channels].join(double(about[c]) + off, double(squares[c]) - off * sum[c], rows);
  }
}

template <class T>
void block_squares(const T* x, int64_t rows, int64_t lanes, int64_t stride, int64_t channels,
                   std::vector<Wide<T>>& scratch, Set* sets) {
  using A = Wide<T>;
  scratch.assign(lanes, A(0));
  A* __restrict squares = scratch.data();
  for (int64_t r = 0; r < rows; ++r) {
    const T* __restrict row = x + r * stride;
    for (int64_t c = 0; c < lanes; ++c) squares[c] += A(load(row[c])) * load(row[c]);
  }
  for (int64_t c = 0; c < lanes; ++c)
    sets[c % channels].join(0, double(squares[c]), rows);
}

// The moments of the channels of a task, where those of one position are neighbours.
template <class T>
void column_moments(const View& v, const T* x, const Task& task, bool center, Set* sets) {
  const int64_t channels = task.channels.size();
  const T* begin = x + (task.outer * v.length + task.lengths.begin) * v.kept + task.channels.begin;
  std::vector<Wide<T>> scratch;
  fold_rows(task.lengths.size(), channels, v.kept, [&](int64_t first, int64_t rows, int64_t lanes) {
    const int64_t stride = lanes == channels ? v.kept : lanes;
    const int64_t most = block_rows(lanes, 1 << 15, sizeof(T));
    for (int64_t r = 0; r < rows; r += most) {
      const T* block = begin + first * v.kept + r * stride;
      const int64_t n = std::min(most, rows - r);
      (center ? block_moments<T> : block_squares<T>)(block, n, lanes, stride, channels, scratch,
                                                     sets);
    }
  });
}

// The same where the elements of one channel are neighbours: runs of `inner`.
template <class T>
void run_of_moments(const View& v, const T* x, const Task& task, bool center, Set* sets) {
  using A = Wide<T>;
  std::vector<A> scratch(std::is_same_v<T, A> ? 0 : std::min(v.inner, kBlock));
  for (int64_t n = task.lengths.begin; n < task.lengths.end; ++n)
    for (int64_t c = task.channels.begin; c < task.channels.end; ++c) {
      const T* run = x + ((task.outer * v.length + n) * v.kept + c) * v.inner;
      Set& set = sets[c - task.channels.begin];
      for (int64_t i = 0; i < v.inner; i += kBlock) {
        const int64_t m = std::min(kBlock, v.inner - i);
        const A* wide = widened(run + i, m, scratch.data());
        A mean = 0;
        double off = 0, squares;
        if (center) run_moments(wide, m, mean, off, squares);
        else squares = run_square(wide, m);
        set.join(double(mean) + off, squares, m);
      }
    }
}

// Sums of g and of g * (x - mean) over the rows of a block, added to doubles.
template <class T, class G>
void block_sums(const T* x, const G* g, const Wide<T>* mean, int64_t rows, int64_t lanes,
                int64_t stride, int64_t channels, std::vector<Wide<T>>& scratch, double* sums) {
  using A = Wide<T>;
  scratch.assign(2 * lanes, A(0));
  A* __restrict plain = scratch.data();
  A* __restrict tilted = plain + lanes;
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    const T *__restrict p = x + r * stride, *__restrict q = p + stride,
                *__restrict s = q + stride, *__restrict t = s + stride;
    const G *__restrict h = g + r * stride, *__restrict i = h + stride,
                *__restrict j = i + stride, *__restrict k = j + stride;
    for (int64_t c = 0; c < lanes; ++c) {
      const A m = mean[c], a = load(h[c]), b = load(i[c]), d = load(j[c]), e = load(k[c]);
      plain[c] += (a + b) + (d + e);
      tilted[c] += (a * (load(p[c]) - m) + b * (load(q[c]) - m)) +
                   (d * (load(s[c]) - m) + e * (load(t[c]) - m));
    }
  }
  for (; r < rows; ++r) {
    const T* __restrict row = x + r * stride;
    const G* __restrict along = g + r * stride;
    for (int64_t c = 0; c < lanes; ++c) {
      const A a = load(along[c]);
      plain[c] += a, tilted[c] += a * (load(row[c]) - mean[c]);
    }
  }
  for (int64_t c = 0; c < lanes; ++c)
    sums[2 * (c % channels)] += plain[c], sums[2 * (c % channels) + 1] += tilted[c];
}

template <class T, class G>
void column_sums(const View& v, const T* x, const G* g, const Wide<T>* means, const Task& task,
                 double* sums) {
  using A = Wide<T>;
  const int64_t channels = task.channels.size();
  const int64_t begin = (task.outer * v.length + task.lengths.begin) * v.kept + task.channels.begin;
  const A* mean = means + task.outer * v.kept + task.channels.begin;
  std::vector<A> scratch, again;
  fold_rows(task.lengths.size(), channels, v.kept, [&](int64_t first, int64_t rows, int64_t lanes) {
    const int64_t stride = lanes == channels ? v.kept : lanes;
    again.resize(lanes);
    for (int64_t c = 0; c < lanes; ++c) again[c] = mean[c % channels];
    for (int64_t r = 0; r < rows; r += 512) {
      const int64_t at = begin + first * v.kept + r * stride;
      block_sums(x + at, g + at, again.data(), std::min<int64_t>(512, rows - r), lanes, stride,
                 channels, scratch, sums);
    }
  });
}

template <class T, class G>
void run_of_sums(const View& v, const T* x, const G* g, const Wide<T>* means, const Task& task,
                 double* sums) {
  using A = Wide<T>;
  for (int64_t n = task.lengths.begin; n < task.lengths.end; ++n)
    for (int64_t c = task.channels.begin; c < task.channels.end; ++c) {
      const int64_t at = ((task.outer * v.length + n) * v.kept + c) * v.inner;
      const T* __restrict run = x + at;
      const G* __restrict along = g + at;
      const A mean = means[task.outer * v.kept + c];
      double plain, tilted;
      sum_pair<A>(v.inner, [=](int64_t i, A& a, A& b) {
        const A d = load(along[i]);
        a += d, b += d * (load(run[i]) - mean);
      }, plain, tilted);
      double* to = sums + 2 * (c - task.channels.begin);
      to[0] += plain, to[1] += tilted;
    }
}

}  // namespace jaxnorm
