// From logits to tokens by the Gumbel-max trick: the largest of score + noise is a sample from softmax(score).
//
// Whether a filter cuts a token off is not looked for. The winner among all stands if what is likelier leaves room for it;
// if not, all scores up to its own are cut off too, and the next winner is looked for among the others.
// Noise is computed to about 1e-5 and probabilities to about 1e-6. No result depends on that: the id is -1 where the two
// largest noisy scores, or a sum of probabilities and its limit, are too close to tell.
#include <limits>

#include "scores.h"

struct DrawArgs {
  const f32* logits;  // [rows, vocab], dense
  const f32* params;  // [rows, 4]: temperature, top_k (vocab for all), top_p (infinity for all), min_p
  const f32* least;   // [rows], the least score that min_p keeps
  const i32* keys;    // [rows, 2]
  const i32* hashes;  // [vocab]
  i64* ids;           // [rows]
  i64 rows, vocab;
};

namespace {

constexpr f32 MARGIN = 1e-3f;
constexpr f64 MASS_MARGIN = 1e-5;  // relative

// log x for normal x > 0: Cephes' polynomial.
INLINE vf log(vf x) {
  const vu bits = bits_as<vu>(x);
  vf e = __builtin_convertvector(bits_as<vi>(bits >> 23) - 126, vf);
  vf m = bits_as<vf>((bits & 0x007fffffu) | 0x3f000000u);  // [0.5, 1)
  const auto small = m < 0.70710678f;
  e = small ? e - 1.f : e;
  m = (small ? m + m : m) - 1.f;
  vf p = all(7.0376836292e-2f);
  for (f32 c : {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f,
                2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f})
    p = p * m + c;
  const vf square = m * m;
  return m + (p * m * square - 0.5f * square) + e * 0.69314718f;
}

// A number of 31 bits for each token, evenly spread.
INLINE vi spread(vu h, u32 offset, u32 factor) {
  h = (h ^ offset) * factor;
  h = (h ^ h >> 15) * 0x2c1b3c6du;
  h = (h ^ h >> 12) * 0x297a2d39u;
  h ^= h >> 15;
  return bits_as<vi>(h & 0x7fffffffu);
}

// The noise of such numbers: -log(-log(1 - u)), u the uniform number in (0, 1) of each. The smaller, the more noise.
INLINE vf gumbel(vi h) {
  vf u = (__builtin_convertvector(h, vf) + 0.5f) * 0x1p-31f;
  u = u > 1.f - 0x1p-24f ? all(1.f - 0x1p-24f) : u;
  const vf rest = 1.f - u;
  // Where u is small, 1 - u has lost its digits: what is lost is put back in proportion.
  const vf exponential = rest == 1.f ? u : -log(rest) * (u / (1.f - rest));
  return -log(exponential);
}
// The largest number whose noise is at least `noise`; -1 where there is none.
i64 limit_of(f64 noise) { return (i64)std::floor(-std::expm1(-std::exp(-noise)) * 0x1p31 + 0.5) - 1; }

// The token of the largest noisy score among the scores above `floor`; -1 where it is not MARGIN ahead.
i64 winner(const Scores& row, f32 floor, const i32* hashes, i64 vocab, u32 offset, u32 factor) {
  f32 best = -INFINITY, second = -INFINITY;
  i64 winner = -1;
  for (i64 part = 0; part < (i64)row.tops.size(); part++) {
    if (!(row.tops[part] > floor)) continue;
    // Most parts have no token whose noise could lift it to the best so far: numbers tell, without their logarithms.
    const i64 limit = best == -INFINITY ? INT32_MAX : limit_of(best - 2 * MARGIN - row.tops[part]);
    if (limit < 0) continue;
    vi numbers[PART / LANES], hit = {};
    for (i64 i = 0; i < PART; i += LANES) {
      const i64 at = part * PART + i, left = vocab - at;
      vu own = {};
      if (left >= LANES) own = load_bits<vu>(hashes + at);
      else if (left > 0) memcpy(&own, hashes + at, left * 4);
      numbers[i / LANES] = spread(own, offset, factor);
      hit |= (numbers[i / LANES] <= all((i32)std::min<i64>(limit, INT32_MAX))) & (Float32::load(&row.scores[at]) > floor);
    }
    if (!any(hit)) continue;
    for (i64 i = 0; i < PART; i += LANES) {
      const vf score = Float32::load(&row.scores[part * PART + i]), noisy = score + gumbel(numbers[i / LANES]);
      for (int lane = 0; lane < LANES; lane++) {
        if (!(score[lane] > floor && noisy[lane] > second)) continue;
        second = std::min(best, noisy[lane]);
        if (noisy[lane] <= best) continue;
        best = noisy[lane];
        winner = part * PART + i + lane;
      }
    }
  }
  return best - second > MARGIN ? winner : -1;
}

i64 draw_row(const DrawArgs& a, i64 r) {
  static thread_local Scores row;
  const f32 *logits = a.logits + r * a.vocab, *params = a.params + 4 * r;
  row.fill(logits, a.vocab, params[0]);
  if (!std::isfinite(row.top)) return 0;  // such a row fails, whatever is drawn
  f32 cut = std::max(a.least[r], -std::numeric_limits<f32>::max());  // what is masked stays out
  if (params[1] < a.vocab) cut = std::max(cut, row.kth_largest((i64)params[1]));
  f32 floor = std::nextafter(cut, -INFINITY);
  const f64 limit = std::isinf(params[2]) ? INFINITY : params[2] * row.mass(floor);
  while (true) {
    const i64 id = winner(row, floor, a.hashes, a.vocab, (u32)a.keys[2 * r], (u32)a.keys[2 * r + 1]);
    if (id < 0 || std::isinf(limit)) return id;
    floor = row.scores[id];
    const f64 likelier = row.mass(floor);
    if (likelier < limit * (1 - MASS_MARGIN)) return id;
    if (likelier < limit * (1 + MASS_MARGIN)) return -1;
  }
}

}  // namespace

extern "C" void draw(const DrawArgs* a) {
  parallel(a->rows, [&](i64 row) { a->ids[row] = draw_row(*a, row); });
}
