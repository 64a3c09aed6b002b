// A row of logits as scores: (logit - the largest) / temperature, in parts whose largest one is known.
#pragma once
#include <functional>
#include <iterator>
#include <vector>

#include "common.h"

namespace {

constexpr i64 PART = 64;  // tokens that are skipped together (a guess)

f32 largest_of(const f32* values, i64 count) {
  vf most = all(-INFINITY);
  for (i64 i = 0; i + LANES <= count; i += LANES) most = larger(most, Float32::load(values + i));
  f32 top = largest(most);
  for (i64 i = count / LANES * LANES; i < count; i++) top = std::max(top, values[i]);
  return top;
}

// Kept from row to row by a thread: fresh memory of this size costs a fault a page.
struct Scores {
  std::vector<f32> scores, tops;  // whole parts, -infinity beyond the vocabulary and where a logit is NaN; each part's top
  f32 top;                        // the largest logit
  bool has_nan;

  void fill(const f32* logits, i64 vocab, f32 temperature) {
    const i64 parts = (vocab + PART - 1) / PART;
    top = largest_of(logits, vocab);
    scores.resize(parts * PART);
    std::fill(scores.begin() + vocab, scores.end(), -INFINITY);
    tops.resize(parts);
    vi nan = {};
    for (i64 i = 0; i < vocab; i += LANES) {
      const vf score = (load<Float32>(logits + i, vocab - i) - top) / temperature;
      nan |= score != score;
      store<Float32>(&scores[i], score == score ? score : all(-INFINITY), vocab - i);
    }
    for (i64 part = 0; part < parts; part++) tops[part] = largest_of(&scores[part * PART], PART);
    has_nan = any(nan);
  }

  // The k-th largest; k is at most the number of scores.
  f32 kth_largest(i64 k) const {
    std::vector<f32> some;
    if (k <= (i64)tops.size()) {
      // k parts hold a score at or above the k-th of their largest ones: only such scores matter.
      std::vector<f32> order = tops;
      std::nth_element(order.begin(), order.begin() + (k - 1), order.end(), std::greater<f32>());
      const f32 bound = order[k - 1];
      for (i64 part = 0; part < (i64)tops.size(); part++) {
        const auto from = scores.begin() + part * PART;
        if (tops[part] >= bound)
          std::copy_if(from, from + PART, std::back_inserter(some), [&](f32 score) { return score >= bound; });
      }
    } else {
      some = scores;
    }
    std::nth_element(some.begin(), some.begin() + (k - 1), some.end(), std::greater<f32>());
    return some[k - 1];
  }

  // The sum of exp(score) over the scores above `floor`.
  f64 mass(f32 floor) const {
    f64 total = 0;
    for (i64 part = 0; part < (i64)tops.size(); part++) {
      if (!(tops[part] > floor)) continue;
      vf mass = {};
      for (i64 i = part * PART; i < (part + 1) * PART; i += LANES) {
        const vf score = Float32::load(&scores[i]);
        mass += score > floor ? exp(score) : vf{};
      }
      total += sum(mass);
    }
    return total;
  }
};

}  // namespace
