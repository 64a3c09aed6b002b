// Paged attention, between the products: the online softmax. A lane holds two rows, g (index 0) and g + 8 (index 1) of
// its warp's sixteen, and of each the columns 2t and 2t + 1 of every eight keys.
#pragma once
#include "paged_attn_tile.cuh"

struct Mask {  // what each row sees, and how scores become powers of two
  int position[2], window;
  int all_from, all_to;  // keys that every row of the tile sees
  float inside, to_log2, softcap;
};

// Scale and mask the scores of keys from `at`, and raise `top` to the largest that this lane holds of each row.
DEV void mask_scores(float (*s)[4], float* top, const unsigned char* keys, int at, const Mask& mask, int warp_n) {
  const int t = threadIdx.x % 4;
  const bool masked = at < mask.all_from || at + BN > mask.all_to;
#pragma unroll
  for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int column = warp_n * KEYS + n * 8 + 2 * t + e % 2, key = at + column, row = e / 2;
      float x = s[n][e];
#if KV_8BIT
      x *= reinterpret_cast<const float*>(keys + 2 * TILE_BYTES)[column];
#endif
      if (mask.softcap > 0.f) x = tanh_fast(x * mask.inside);
      x *= mask.to_log2;
      const int position = mask.position[row];
      if (masked && (key > position || (mask.window > 0 && key <= position - mask.window))) x = NEG_INF;
      s[n][e] = x;
      top[row] = fmaxf(top[row], x);
    }
}

// Make `top` the maxima of whole rows: over the four lanes that share them, then over the warps.
DEV void join_maxima(float* top, unsigned char* shared, int warp_m, int warp_n) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    top[i] = fmaxf(top[i], __shfl_xor_sync(FULL_WARP, top[i], 1));
    top[i] = fmaxf(top[i], __shfl_xor_sync(FULL_WARP, top[i], 2));
  }
#if WARPS_N > 1
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  float* tops = reinterpret_cast<float*>(shared + MAXIMA_AT) + warp_m * 16;  // [WARPS_N][BM]
  if (t == 0)
    for (int i = 0; i < 2; i++) tops[warp_n * BM + g + 8 * i] = top[i];
  __syncthreads();
#pragma unroll
  for (int w = 0; w < WARPS_N; w++)
    for (int i = 0; i < 2; i++) top[i] = fmaxf(top[i], tops[w * BM + g + 8 * i]);
#endif
}

// Refer sums and outputs so far to the new maxima.
DEV void rescale_to(const float* top, float* m, float* l, float (*o)[4]) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const float rescale = exp2_fast(m[i] - top[i]);
    m[i] = top[i];
    l[i] *= rescale;
#pragma unroll
    for (int n = 0; n < DIMS / 8; n++) {
      o[n][2 * i] *= rescale;
      o[n][2 * i + 1] *= rescale;
    }
  }
}

// Turn scores into probabilities (times the values' scales, for 8-bit ones) and add them to the sums of this lane.
DEV void exponentiate(float (*s)[4], const float* m, float* l, const unsigned char* keys, int warp_n) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      float p = s[n][e] <= NEG_INF ? 0.f : exp2_fast(s[n][e] - m[e / 2]);
      l[e / 2] += p;
#if KV_8BIT
      p *= reinterpret_cast<const float*>(keys + 2 * TILE_BYTES)[BN + warp_n * KEYS + n * 8 + 2 * t + e % 2];
#endif
      s[n][e] = p;
    }
}

// Make `l` the sums of whole rows.
DEV void join_sums(float* l, unsigned char* shared, int warp_m, int warp_n) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    l[i] += __shfl_xor_sync(FULL_WARP, l[i], 1);
    l[i] += __shfl_xor_sync(FULL_WARP, l[i], 2);
  }
#if WARPS_N > 1
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  float* sums = reinterpret_cast<float*>(shared + MAXIMA_AT) + warp_m * 16;
  __syncthreads();  // the last maxima have been read
  if (t == 0)
    for (int i = 0; i < 2; i++) sums[warp_n * BM + g + 8 * i] = l[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; i++) {
    l[i] = 0.f;
    for (int w = 0; w < WARPS_N; w++) l[i] += sums[w * BM + g + 8 * i];
  }
#endif
}
