// Paged attention, second part: the two products on tensor cores, q k and p v, from shared memory into registers.
#pragma once
#include "paged_attn_tile.cuh"

DEV u32 pack_probabilities(float low, float high) {
#if KV_8BIT
  return pack_bf16(low, high);
#else
  return pack_io(low, high);
#endif
}

// s [FRAGMENTS][KEYS / 8][4] += q k for this warp's rows and KEYS keys.
DEV void scores(float (*s)[KEYS / 8][4], const unsigned char* q, const unsigned char* k, int warp_m, int warp_n) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int d = 0; d < HEAD_DIM; d += KV_8BIT ? 64 : 32) {
    u32 a[FRAGMENTS][KV_8BIT ? 4 : 2][4];
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++)
#pragma unroll
      for (int i = 0; i < (KV_8BIT ? 4 : 2); i++) {
        const int row = warp_m * WARP_ROWS + f * 16 + lane % 16;
        load_matrices(a[f][i], q + swizzled<Q_CHUNKS>(row, d / 8 + i * 2 + lane / 16) * 16);
      }
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) {  // eight keys, four chunks: 32 dimensions, or 64 of 8 bits
      u32 b[4];
      const int row = warp_n * KEYS + n * 8 + lane % 8;
      load_matrices(b, k + swizzled<KV_CHUNKS>(row, d * KV_BYTES / 16 + lane / 8) * 16);
#if KV_8BIT
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float x[4];
        widen_numbers(b[i], x);
        const u32 pair[2] = {pack_io(x[0], x[1]), pack_io(x[2], x[3])};
#pragma unroll
        for (int f = 0; f < FRAGMENTS; f++) mma_io(s[f][n], a[f][i], pair);
      }
#else
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int f = 0; f < FRAGMENTS; f++) mma_io(s[f][n], a[f][i], b + 2 * i);
#endif
    }
  }
}

// o [FRAGMENTS][DIMS / 8][4] += p v over keys [32 i, 32 i + 32), p in two halves of 16 keys.
DEV void accumulate(float (*o)[DIMS / 8][4], const u32 (*p)[2][4], const unsigned char* v, int i, int warp_n) {
  const int lane = threadIdx.x % 32;
#if KV_8BIT
#pragma unroll
  for (int d = 0; d < DIMS / 16; d++) {  // 32 keys of one chunk: 16 dimensions
    u32 b[4];
    load_matrices_transposed(b, v + swizzled<KV_CHUNKS>(i * 32 + lane, warp_n * (DIMS / 16) + d) * 16);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float x[4], y[4];  // dimensions 2g, 2g+1 of key 2t, then of key 2t+1; y eight keys on
      widen_numbers(b[2 * half], x);
      widen_numbers(b[2 * half + 1], y);
      const u32 even[2] = {pack_bf16(x[0], x[2]), pack_bf16(y[0], y[2])};
      const u32 odd[2] = {pack_bf16(x[1], x[3]), pack_bf16(y[1], y[3])};
#pragma unroll
      for (int f = 0; f < FRAGMENTS; f++) {
        mma_bf16(o[f][2 * d], p[f][half], even);
        mma_bf16(o[f][2 * d + 1], p[f][half], odd);
      }
    }
  }
#else
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int d = 0; d < DIMS / 16; d++) {  // 16 keys, two chunks: 16 dimensions
      u32 b[4];
      const int row = i * 32 + half * 16 + lane % 16;
      load_matrices_transposed(b, v + swizzled<KV_CHUNKS>(row, warp_n * (DIMS / 8) + 2 * d + lane / 16) * 16);
#pragma unroll
      for (int f = 0; f < FRAGMENTS; f++) {
        mma_io(o[f][2 * d], p[f][half], b);
        mma_io(o[f][2 * d + 1], p[f][half], b + 2);
      }
    }
#endif
}

// o += p v over a tile: probabilities s come from this warp's registers, or from all warps through shared memory.
DEV void weigh_values(float (*o)[DIMS / 8][4], const float (*s)[KEYS / 8][4], unsigned char* shared,
                      const unsigned char* values, int warp_m, int warp_n) {
#if WARPS_N > 1
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  unsigned char* probabilities = shared + P_AT;
#pragma unroll
  for (int n = 0; n < KEYS / 8; n++)
    for (int i = 0; i < 2 * FRAGMENTS; i++) {
      const int chunk = swizzled<P_CHUNKS>(warp_m * WARP_ROWS + g + 8 * i, (warp_n * KEYS) / 8 + n);
      const float* pair = s[i / 2][n] + i % 2 * 2;
      reinterpret_cast<u32*>(probabilities)[chunk * 4 + t] = pack_probabilities(pair[0], pair[1]);
    }
  __syncthreads();
#endif
#pragma unroll
  for (int i = 0; i < BN / 32; i++) {
    u32 p[FRAGMENTS][2][4];
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
#if WARPS_N > 1
        const int row = warp_m * WARP_ROWS + f * 16 + lane % 16, chunk = i * 4 + half * 2 + lane / 16;
        load_matrices(p[f][half], probabilities + swizzled<P_CHUNKS>(row, chunk) * 16);
#else
        const int n = i * 4 + half * 2;
        p[f][half][0] = pack_probabilities(s[f][n][0], s[f][n][1]);
        p[f][half][1] = pack_probabilities(s[f][n][2], s[f][n][3]);
        p[f][half][2] = pack_probabilities(s[f][n + 1][0], s[f][n + 1][1]);
        p[f][half][3] = pack_probabilities(s[f][n + 1][2], s[f][n + 1][3]);
#endif
      }
    accumulate(o, p, values, i, warp_n);
  }
}
