// Tokens that a row may not choose are set to -infinity: 32 to a word of its mask.
#include "common.h"

struct MaskArgs {
  f32* logits;       // [rows, vocab], dense
  const i32* masks;  // [bound, words], little-endian; a bit per token that may be chosen
  const i64* rows;   // [bound], whose masks these are
  i64 bound, vocab, words;
};

namespace {

void forbid(f32* logits, i64 vocab, const i32* mask) {
  vi lane;
  for (int i = 0; i < LANES; i++) lane[i] = i;
  for (i64 at = 0; at < vocab; at += LANES) {
    const i32 word = mask[at / 32] >> (at % 32);
    const i64 left = vocab - at;
    if (word == -1) continue;
    const vf kept = word ? load<Float32>(logits + at, left) : vf{};
    store<Float32>(logits + at, (all(word) >> lane & 1) ? kept : all(-INFINITY), left);
  }
}

}  // namespace

extern "C" void mask(const MaskArgs* a) {
  parallel(a->bound, [&](i64 i) { forbid(a->logits + a->rows[i] * a->vocab, a->vocab, a->masks + i * a->words); });
}
