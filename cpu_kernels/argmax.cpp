// The largest logit of each row and its token; of equal ones the lowest.
#include "common.h"

struct ArgmaxArgs {
  const f32* logits;  // [rows, vocab], dense
  i64* ids;           // [rows], -1 where the largest is not finite or a logit is NaN
  f32* tops;          // [rows], NaN where a logit is
  i64 rows, vocab;
};

namespace {

constexpr i64 BLOCK = 512;
constexpr int AT_ONCE = 4;  // maxima that do not wait for each other

// The first place that holds the value; there is one.
i64 place_of(f32 value, const f32* logits, i64 vocab) {
  i64 at = 0;
  for (; at + BLOCK <= vocab; at += BLOCK) {
    vi found = {};
    for (i64 i = at; i < at + BLOCK; i += LANES) found |= Float32::load(logits + i) == value;
    if (any(found)) break;
  }
  while (logits[at] != value) at++;
  return at;
}

void choose(const ArgmaxArgs& a, i64 row) {
  const f32* logits = a.logits + row * a.vocab;
  vf most[AT_ONCE];
  for (auto& one : most) one = all(-INFINITY);
  vi nan = {};
  i64 at = 0;
  for (; at + AT_ONCE * LANES <= a.vocab; at += AT_ONCE * LANES)
    for (int i = 0; i < AT_ONCE; i++) {
      const vf own = Float32::load(logits + at + i * LANES);
      most[i] = larger(own, most[i]);
      nan |= own != own;
    }
  bool broken = any(nan);
  f32 top = largest(larger(larger(most[0], most[1]), larger(most[2], most[3])));
  for (; at < a.vocab; at++) {
    top = std::max(top, logits[at]);
    broken |= std::isnan(logits[at]);
  }
  a.tops[row] = broken ? NAN : top;
  a.ids[row] = broken || !std::isfinite(top) ? -1 : place_of(top, logits, a.vocab);
}

}  // namespace

extern "C" void argmax(const ArgmaxArgs* a) {
  parallel(a->rows, [&](i64 row) { choose(*a, row); });
}
