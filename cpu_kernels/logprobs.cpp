// Log-probabilities: of each row's own token with its rank, of the likeliest ones, and of those that the row names.
#include "scores.h"

struct LogprobsArgs {
  const f32* logits;  // [rows, vocab], dense
  const i64* tokens;  // [rows]
  const i64* named;   // [rows, names], or null
  f32* values;        // [rows]
  i32* ranks;         // [rows], 1 for the likeliest
  i64* top_ids;       // [rows, most], in no order
  f32* top_values;    // [rows, most]
  f32* named_values;  // [rows, names]
  i64 rows, vocab, most, names;
};

namespace {

// The ids of the `most` largest scores. Of equal ones the lowest.
void likeliest(const Scores& row, i64 most, i64* ids) {
  const f32 bound = row.kth_largest(most);
  std::vector<i64> equal;
  i64 count = 0;
  for (i64 part = 0; part < (i64)row.tops.size(); part++) {
    if (row.tops[part] < bound) continue;
    for (i64 i = part * PART; i < (part + 1) * PART; i++) {
      if (row.scores[i] > bound) ids[count++] = i;
      else if (row.scores[i] == bound && (i64)equal.size() < most) equal.push_back(i);
    }
  }
  std::copy(equal.begin(), equal.begin() + (most - count), ids + count);
}

void describe(const LogprobsArgs& a, i64 r) {
  static thread_local Scores row;
  const f32* logits = a.logits + r * a.vocab;
  row.fill(logits, a.vocab, 1.f);
  const bool broken = row.has_nan || !std::isfinite(row.top);
  const f32 log_mass = broken ? NAN : (f32)std::log(row.mass(-INFINITY));
  const auto value = [&](i64 token) { return logits[token] - row.top - log_mass; };
  const f32 own = logits[a.tokens[r]];
  i64 rank = 1;
  for (i64 i = 0; i < a.vocab; i++) rank += logits[i] > own;
  a.values[r] = value(a.tokens[r]);
  a.ranks[r] = (i32)rank;
  if (a.most) likeliest(row, a.most, a.top_ids + r * a.most);
  for (i64 i = r * a.most; i < (r + 1) * a.most; i++) a.top_values[i] = value(a.top_ids[i]);
  for (i64 i = r * a.names; i < (r + 1) * a.names; i++) a.named_values[i] = value(a.named[i]);
}

}  // namespace

extern "C" void logprobs(const LogprobsArgs* a) {
  parallel(a->rows, [&](i64 row) { describe(*a, row); });
}
