// An array as (outer, length, kept, inner), of which length and inner are reduced, and
// how its work is shared out: always alike, whatever the threads.
#pragma once

#include "moments.h"
#include "pool.h"

namespace jaxnorm {

struct View {
  int64_t outer, length, kept, inner;

  // The place of the first element of a set.
  int64_t first(int64_t set) const {
    return (set / kept * length * kept + set % kept) * inner;
  }
  // Short runs cost more each than their elements: many of them are taken as columns.
  bool of_short_runs() const { return inner > 1 && inner < 256 && length >= 16; }
  View flat() const { return {outer, length, kept * inner, 1}; }
  int64_t sets() const { return outer * kept; }
  int64_t size() const { return sets() * length * inner; }
};

// Work on `channels` of one outer index, along `lengths`.
struct Task {
  int64_t outer, index;  // which part along the length this is
  Range lengths, channels;
};

class Tasks {
 public:
  explicit Tasks(const View& view) : view_(view) {
    const int64_t least = 4096, wanted = 32;  // elements in a task, and tasks
    const int64_t most = std::max<int64_t>(1, view.size() / least);
    const int64_t each = ceil_div(std::min(wanted, most), std::max<int64_t>(1, view.outer));
    // A set in several parts has to be pooled, so channels are shared out first where
    // they lie far apart.
    const bool apart = view.inner > 1;
    const int64_t widest = apart ? 1 : kWidth;
    const int64_t groups = std::max<int64_t>(1, view.kept / widest);
    channels_ = std::min(each, groups);
    if (!apart) channels_ = ceil_div(view.kept, kWidth);
    lengths_ = std::min(std::max<int64_t>(1, view.length), ceil_div(each, channels_));
  }

  int64_t count() const { return view_.outer * lengths_ * channels_; }
  int64_t lengths() const { return lengths_; }
  Range part_of_length(int64_t i) const { return part(view_.length, lengths_, i); }

  Task operator[](int64_t i) const {
    const int64_t channel = i % channels_, rest = i / channels_, index = rest % lengths_;
    return {rest / lengths_, index, part_of_length(index), part(view_.kept, channels_, channel)};
  }

  static constexpr int64_t kWidth = 256;  // channels whose sums stay in the first cache

 private:
  View view_;
  int64_t channels_, lengths_;
};

}  // namespace jaxnorm
