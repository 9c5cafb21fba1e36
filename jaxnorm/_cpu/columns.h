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

// Each lane's sum of x - about over a block.
template <class T, class A>
void sum_about(const T* __restrict x, int64_t rows, int64_t lanes, int64_t stride,
               const A* __restrict about, A* __restrict sum) {
  for (; rows >= 4; rows -= 4, x += 4 * stride)
    for (int64_t c = 0; c < lanes; ++c) {
      const A m = about[c];
      sum[c] += ((load(x[c]) - m) + (load(x[c + stride]) - m)) +
                ((load(x[c + 2 * stride]) - m) + (load(x[c + 3 * stride]) - m));
    }
  for (; rows; --rows, x += stride)
    for (int64_t c = 0; c < lanes; ++c) sum[c] += load(x[c]) - about[c];
}

// And that of its square.
template <class T, class A>
void squares_about(const T* __restrict x, int64_t rows, int64_t lanes, int64_t stride,
                   const A* __restrict about, A* __restrict sum, A* __restrict squares) {
  for (; rows >= 4; rows -= 4, x += 4 * stride)
    for (int64_t c = 0; c < lanes; ++c) {
      const A m = about[c], a = load(x[c]) - m, b = load(x[c + stride]) - m;
      const A d = load(x[c + 2 * stride]) - m, e = load(x[c + 3 * stride]) - m;
      sum[c] += (a + b) + (d + e);
      squares[c] += (a * a + b * b) + (d * d + e * e);
    }
  for (; rows; --rows, x += stride)
    for (int64_t c = 0; c < lanes; ++c) {
      const A e = load(x[c]) - about[c];
      sum[c] += e, squares[c] += e * e;
    }
}

// The moments of each lane of a block, joined to `sets`: the lanes are these in turn. Means
// are those of x - pivot, which doubles hold exactly also where x is one.
template <class T>
void block_moments(const T* x, const T* pivot, int64_t rows, int64_t lanes, int64_t stride,
                   int64_t channels, bool center, std::vector<Wide<T>>& scratch, Sets& sets) {
  using A = Wide<T>;
  scratch.assign(3 * lanes, A(0));
  A *about = scratch.data(), *sum = about + lanes, *squares = sum + lanes;
  if (center) {
    for (int64_t c = 0; c < lanes; ++c) about[c] = load(x[c]);
    sum_about(x, rows, lanes, stride, about, sum);
    for (int64_t c = 0; c < lanes; ++c) about[c] += sum[c] / A(rows), sum[c] = 0;
  }
  squares_about(x, rows, lanes, stride, about, sum, squares);
  const double each = center ? 1 / double(rows) : 0;
  for (int64_t fold = 0; fold < lanes; fold += channels)
    join(sets, channels, rows,
         [=](int64_t c) {
           const double from = center ? double(load(pivot[c])) : 0;
           return (double(about[fold + c]) - from) + double(sum[fold + c]) * each;
         },
         [=](int64_t c) {
           const double off = sum[fold + c];
           return double(squares[fold + c]) - off * off * each;
         });
}

// The moments of the channels of a task, where those of one position are neighbours.
template <class T>
void column_moments(const View& v, const T* x, const Task& task, bool center, Sets sets) {
  const int64_t channels = task.channels.size();
  const T* begin = x + (task.outer * v.length + task.lengths.begin) * v.kept + task.channels.begin;
  const T* pivot = x + v.first(task.outer * v.kept + task.channels.begin);
  std::vector<Wide<T>> scratch;
  fold_rows(task.lengths.size(), channels, v.kept, [&](int64_t first, int64_t rows, int64_t lanes) {
    const int64_t stride = lanes == channels ? v.kept : lanes;
    const int64_t most = block_rows(lanes, 1 << 16, sizeof(T));
    for (int64_t r = 0; r < rows; r += most)
      block_moments(begin + first * v.kept + r * stride, pivot, std::min(most, rows - r), lanes,
                    stride, channels, center, scratch, sets);
  });
}

// The same where the elements of one channel are neighbours: runs of `inner`.
template <class T>
void run_of_moments(const View& v, const T* x, const Task& task, bool center, Sets sets) {
  using A = Wide<T>;
  std::vector<A> scratch(std::is_same_v<T, A> ? 0 : std::min(v.inner, kBlock));
  const int64_t before = sets.size;
  for (int64_t c = task.channels.begin; c < task.channels.end; ++c) {
    Sets set{sets.mean + c - task.channels.begin, sets.squares + c - task.channels.begin, before};
    const double pivot = center ? double(load(x[v.first(task.outer * v.kept + c)])) : 0;
    for (int64_t n = task.lengths.begin; n < task.lengths.end; ++n) {
      const T* run = x + ((task.outer * v.length + n) * v.kept + c) * v.inner;
      for (int64_t i = 0; i < v.inner; i += kBlock) {
        const int64_t m = std::min(kBlock, v.inner - i);
        const A* wide = widened(run + i, m, scratch.data());
        A mean = 0;
        double off = 0, squares;
        if (center) run_moments(wide, m, mean, off, squares);
        else squares = run_square(wide, m);
        join(set, 1, m, [=](int64_t) { return (double(mean) - pivot) + off; },
             [=](int64_t) { return squares; });
      }
    }
  }
}

// Sums of g, and of g * (x - mean).
struct Totals {
  double *plain, *tilted;
};

// These sums over the rows of a block, of each lane.
template <class T, class G, class A>
void sums_about(const T* __restrict x, const G* __restrict g, const A* __restrict about,
                int64_t rows, int64_t lanes, int64_t stride, A* __restrict plain,
                A* __restrict tilted) {
  for (; rows >= 4; rows -= 4, x += 4 * stride, g += 4 * stride)
    for (int64_t c = 0; c < lanes; ++c) {
      const A m = about[c], a = load(g[c]), b = load(g[c + stride]);
      const A d = load(g[c + 2 * stride]), e = load(g[c + 3 * stride]);
      plain[c] += (a + b) + (d + e);
      tilted[c] += (a * (load(x[c]) - m) + b * (load(x[c + stride]) - m)) +
                   (d * (load(x[c + 2 * stride]) - m) + e * (load(x[c + 3 * stride]) - m));
    }
  for (; rows; --rows, x += stride, g += stride)
    for (int64_t c = 0; c < lanes; ++c) {
      const A a = load(g[c]);
      plain[c] += a, tilted[c] += a * (load(x[c]) - about[c]);
    }
}

// And added to doubles: the lanes are the channels in turn.
template <class T, class G>
void block_sums(const T* x, const G* g, const Wide<T>* mean, int64_t rows, int64_t lanes,
                int64_t stride, int64_t channels, std::vector<Wide<T>>& scratch, Totals sums) {
  using A = Wide<T>;
  scratch.assign(2 * lanes, A(0));
  const A *plain = scratch.data(), *tilted = plain + lanes;
  sums_about(x, g, mean, rows, lanes, stride, scratch.data(), scratch.data() + lanes);
  for (int64_t fold = 0; fold < lanes; fold += channels)
    for (int64_t c = 0; c < channels; ++c) {
      sums.plain[c] += double(plain[fold + c]);
      sums.tilted[c] += double(tilted[fold + c]);
    }
}

template <class T, class G>
void column_sums(const View& v, const T* x, const G* g, const Wide<T>* means, const Task& task,
                 Totals sums) {
  using A = Wide<T>;
  const int64_t channels = task.channels.size();
  const int64_t begin = (task.outer * v.length + task.lengths.begin) * v.kept + task.channels.begin;
  const A* mean = means + task.outer * v.kept + task.channels.begin;
  std::vector<A> scratch, again;
  fold_rows(task.lengths.size(), channels, v.kept, [&](int64_t first, int64_t rows, int64_t lanes) {
    const int64_t stride = lanes == channels ? v.kept : lanes;
    again.resize(lanes);
    for (int64_t fold = 0; fold < lanes; fold += channels)
      std::copy(mean, mean + channels, again.begin() + fold);
    for (int64_t r = 0; r < rows; r += 512) {
      const int64_t at = begin + first * v.kept + r * stride;
      block_sums(x + at, g + at, again.data(), std::min<int64_t>(512, rows - r), lanes, stride,
                 channels, scratch, sums);
    }
  });
}

template <class T, class G>
void run_of_sums(const View& v, const T* x, const G* g, const Wide<T>* means, const Task& task,
                 Totals sums) {
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
      sums.plain[c - task.channels.begin] += plain;
      sums.tilted[c - task.channels.begin] += tilted;
    }
}

}  // namespace jaxnorm
