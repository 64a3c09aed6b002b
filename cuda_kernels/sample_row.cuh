// A row of logits, as the sampler's kernels see it: scores, noise, and sweeps over a part of it.
#pragma once
#include "common.cuh"

#define WARPS (THREADS / 32)
constexpr int LOADS = 8;  // a thread has in flight

// Order floats as unsigned integers.
DEV u32 ordered(float v) {
  const u32 bits = __float_as_uint(v);
  return bits ^ ((u32)((int)bits >> 31) | 0x80000000u);
}
DEV float from_ordered(u32 key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }
// Of equal values the one with the lowest id is the largest candidate.
DEV u64 candidate(float value, int id) { return (u64)ordered(value) << 32 | (0xffffffffu - (u32)id); }
DEV int id_of(u64 c) { return (int)(0xffffffffu - (u32)c); }

struct Row {
  const float* logits;
  const int* hashes;
  const u32* allowed;
  float top, inverse_temperature;
  u32 offset, factor;
};
struct Part {  // of a row: tokens [from, to)
  int from, to;
};
DEV Part own_part(int vocab, int span) { return {(int)blockIdx.y * span, min(vocab, (int)(blockIdx.y + 1) * span)}; }

DEV float logit(const Row& row, int i) {
  const float x = row.logits[i] + 0.f;  // -0 becomes 0: they are equals
  return row.allowed && !(row.allowed[i / 32] >> (i % 32) & 1u) ? -INF : x;
}

// Call use(token, logit) for a part; a thread may get tokens past the end too, at -inf.
template <typename Use>
DEV void each_logit(const Row& row, const Part& part, Use use) {
  for (int first = part.from + threadIdx.x; first < part.to; first += THREADS * LOADS) {
    float x[LOADS];
    if (first + (LOADS - 1) * THREADS < part.to)
#pragma unroll
      for (int j = 0; j < LOADS; j++) x[j] = logit(row, first + j * THREADS);
    else
#pragma unroll
      for (int j = 0; j < LOADS; j++) x[j] = first + j * THREADS < part.to ? logit(row, first + j * THREADS) : -INF;
#pragma unroll
    for (int j = 0; j < LOADS; j++) use(first + j * THREADS, x[j]);
  }
}

// How far a score is below the likeliest token's, which is 0: a float's bits are in its order.
DEV u32 depth_of(float score) { return __float_as_uint(score) & 0x7fffffffu; }

// Call use(token, score, depth) for the tokens of a part down to a depth. What is masked is at -inf and never there.
template <typename Use>
DEV void each_score(const Row& row, const Part& part, u32 limit, Use use) {
  each_logit(row, part, [&](int i, float x) {
    const float score = (x - row.top) * row.inverse_temperature;
    const u32 depth = depth_of(score);
    if (depth <= limit) use(i, score, depth);
  });
}

// -log(-log1p(-u)), u the hash of (row, token) in (0, 1).
DEV float noise(const Row& row, int i) {
  u32 h = ((u32)row.hashes[i] ^ row.offset) * row.factor;
  h = (h ^ (h >> 15)) * 0x2c1b3c6du;
  h = (h ^ (h >> 12)) * 0x297a2d39u;
  h = (h ^ (h >> 15)) & 0x7fffffffu;
  const float u = fminf(((float)(int)h + 0.5f) * 4.656612873077393e-10f, 0.99999994f);
  // A small u decides who wins, and 1 - u would lose its digits: three terms more than the first of the series.
  const float e = u < 0.03f ? u * (1.f + u * (0.5f + u * (1.f / 3.f + u * 0.25f))) : -LN2 * log2_fast(1.f - u);
  return -LN2 * log2_fast(e);
}
#define BEYOND_NOISE 25.1f  // from -2.82 to 22.19: what is deeper than this never beats the likeliest token
DEV u64 lot(const Row& row, int i, float score) { return candidate(score + noise(row, i), i); }

DEV u64 block_max(u64 v, u64* scratch) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) v = max(v, __shfl_xor_sync(FULL_WARP, v, offset));
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  v = scratch[threadIdx.x % WARPS];
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) v = max(v, __shfl_xor_sync(FULL_WARP, v, offset));
  return v;
}

DEV float block_total(float v, float* scratch) {
  __syncthreads();
  return block_sum<WARPS>(v, scratch);
}

// The winner by lot of the tokens of a part that are at most `limit` below the likeliest; 0 if there is none.
DEV u64 race(const Row& row, const Part& part, u32 limit, u64* scratch) {
  u64 winner = 0;
  each_score(row, part, min(limit, depth_of(BEYOND_NOISE)),
             [&](int i, float score, u32) { winner = max(winner, lot(row, i, score)); });
  return block_max(winner, scratch);
}
