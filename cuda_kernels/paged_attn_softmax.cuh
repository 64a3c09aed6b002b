// Paged attention, between the products: the online softmax, of a fragment at a time. A lane holds two rows, g (index 0)
// and g + 8 (index 1) of its sixteen, and of each the columns 2t and 2t + 1 of every eight keys.
#pragma once
#include "paged_attn_tile.cuh"

struct Mask {  // what each row sees, and how scores become powers of two
  int position[FRAGMENTS][2];
  int before, window;
  int all_from, all_to;  // keys that every row of the tile sees
  float inside, to_log2;
};

// Raise `top` to the largest score that this lane holds of each row, of keys from `at`; those that a row does not see are
// no more than any.
template <bool MASKED>
DEV void mask_scores(float (*s)[4], float* top, const unsigned char* keys, int at, const Mask& mask, int f,
                     int warp_n) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int column = warp_n * KEYS + n * 8 + 2 * t + e % 2, key = at + column, row = e / 2;
      float x = s[n][e];
#if KV_8BIT
      x *= reinterpret_cast<const float*>(keys + 2 * TILE_BYTES)[column];
#endif
      if (SOFTCAP) x = tanh_fast(x * mask.inside);
      const int position = mask.position[f][row];
      if (MASKED && (key > position || (WINDOW && key <= position - mask.window))) x = -INF;
      s[n][e] = x;
      top[row] = fmaxf(top[row], x);
    }
}

// Make `top` the maxima of whole rows: over the four lanes that share them, then over the warps.
DEV void join_maxima(float* top, unsigned char* shared, int fragment, int warp_n) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    top[i] = fmaxf(top[i], __shfl_xor_sync(FULL_WARP, top[i], 1));
    top[i] = fmaxf(top[i], __shfl_xor_sync(FULL_WARP, top[i], 2));
  }
#if WARPS_N > 1
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  float* tops = reinterpret_cast<float*>(shared + MAXIMA_AT) + fragment * 16;  // [WARPS_N][BM]
  if (t == 0)
    for (int i = 0; i < 2; i++) tops[warp_n * BM + g + 8 * i] = top[i];
  __syncthreads();
#pragma unroll
  for (int w = 0; w < WARPS_N; w++)
    for (int i = 0; i < 2; i++) top[i] = fmaxf(top[i], tops[w * BM + g + 8 * i]);
#endif
}

// Refer sums and outputs so far to the new maxima.
DEV void rescale_to(const float* top, float* m, float* l, float (*o)[4], float to_log2) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const float rescale = exp2_fast((m[i] - top[i]) * to_log2);
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
DEV void exponentiate(float (*s)[4], const float* m, float* l, const unsigned char* keys, float to_log2, int warp_n) {
  const int t = threadIdx.x % 4;
  const float below[2] = {m[0] * to_log2, m[1] * to_log2};
#pragma unroll
  for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      float p = exp2_fast(__fmaf_rn(s[n][e], to_log2, -below[e / 2]));
      l[e / 2] += p;
#if KV_8BIT
      p *= reinterpret_cast<const float*>(keys + 2 * TILE_BYTES)[BN + warp_n * KEYS + n * 8 + 2 * t + e % 2];
#endif
      s[n][e] = p;
    }
}

// Make `l` the sums of whole rows.
DEV void join_sums(float* l, unsigned char* shared, int fragment, int warp_n) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    l[i] += __shfl_xor_sync(FULL_WARP, l[i], 1);
    l[i] += __shfl_xor_sync(FULL_WARP, l[i], 2);
  }
#if WARPS_N > 1
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  float* sums = reinterpret_cast<float*>(shared + MAXIMA_AT) + fragment * 16;
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
