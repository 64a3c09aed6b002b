// Paged attention, last part: results leave the registers, and the partial ones of a split context are joined.
#pragma once
#include "paged_attn_tile.cuh"

// Two neighbouring dimensions of row i (0: g, 1: g + 8) of this warp's output: pair j of 16 dimensions at 16 d.
// Returns the first one's place among the warp's dimensions.
DEV int output_pair(const float (*o)[4], int d, int j, int i, int t, float2* pair) {
#if KV_8BIT
  *pair = make_float2(o[2 * d][2 * i + j], o[2 * d + 1][2 * i + j]);
  return d * 16 + 4 * t + 2 * j;
#else
  *pair = make_float2(o[2 * d + j][2 * i], o[2 * d + j][2 * i + 1]);
  return d * 16 + 8 * j + 2 * t;
#endif
}

// Write this split's rows before they are divided by their sums, and their maxima and sums.
DEV void store_partial(float* partial, float* maxima, const float (*o)[4], const float* m, const float* l,
                       const Rows& rows, int warp_m, int warp_n, int split, int splits) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int r = warp_m * 16 + g + 8 * i;
    if (!rows.has(r)) continue;
    const s64 row = rows.place(r) * splits + split;
    if (warp_n == 0 && t == 0) {
      maxima[row * 2] = m[i];
      maxima[row * 2 + 1] = l[i];
    }
    if (l[i] == 0.f) continue;  // `combine` reads the sum first
    float* place = partial + row * HEAD_DIM + warp_n * DIMS;
#pragma unroll
    for (int d = 0; d < DIMS / 16; d++)
      for (int j = 0; j < 2; j++) {
        float2 pair;
        const int at_dimension = output_pair(o, d, j, i, t, &pair);
        *reinterpret_cast<float2*>(place + at_dimension) = pair;
      }
  }
}

// Write the finished rows, through shared memory (which nobody reads any more), so that whole sectors are written.
DEV void store_rows(io_t* out, unsigned char* result, const float (*o)[4], const float* l, const Rows& rows, int warp_m,
                    int warp_n) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const float inverse = l[i] > 0.f ? 1.f / l[i] : 0.f;
    const int row = warp_m * 16 + g + 8 * i;
#pragma unroll
    for (int d = 0; d < DIMS / 16; d++)
      for (int j = 0; j < 2; j++) {
        float2 pair;
        const int dimension = warp_n * DIMS + output_pair(o, d, j, i, t, &pair);
        const int place = swizzled<Q_CHUNKS>(row, dimension / 8) * 4 + dimension % 8 / 2;
        reinterpret_cast<u32*>(result)[place] = pack_io(pair.x * inverse, pair.y * inverse);
      }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < BM * Q_CHUNKS; i += THREADS) {
    const int row = i / Q_CHUNKS, chunk = i % Q_CHUNKS;
    if (!rows.has(row)) break;
    *reinterpret_cast<vec16*>(out + rows.place(row) * HEAD_DIM + chunk * 8) =
        *reinterpret_cast<const vec16*>(result + swizzled<Q_CHUNKS>(row, chunk) * 16);
  }
}

// Join the splits of a tile's rows, one warp a row. A lane holds what two splits of 64 count for.
DEV void combine(const float* partial, const float* maxima, io_t* out, const Rows& rows, int splits) {
  const int lane = threadIdx.x % 32;
  for (int r = threadIdx.x / 32; r < BM && rows.has(r); r += WARPS) {
    const s64 row = rows.place(r);
    float m[2], weight[2], top = NEG_INF, total = 0.f, o[HEAD_DIM / 32] = {};
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int split = lane + 32 * h;
      const float2 found = split < splits ? load_pair(maxima + (row * splits + split) * 2) : make_float2(NEG_INF, 0.f);
      m[h] = found.x;
      weight[h] = found.y;
      if (found.y > 0.f) top = fmaxf(top, found.x);  // else it had no visible key and wrote nothing
    }
    top = warp_max(top);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float own = weight[h] > 0.f ? exp2_fast(m[h] - top) : 0.f;
      total += weight[h] * own;
      weight[h] = own;
    }
    total = warp_sum(total);
    for (int s = 0; s < splits; s++) {
      const float mine = __shfl_sync(FULL_WARP, s < 32 ? weight[0] : weight[1], s % 32);
      if (mine == 0.f) continue;
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 64; i++) {
        const float2 x = load_pair(partial + (row * splits + s) * HEAD_DIM + i * 64 + lane * 2);
        o[2 * i] += x.x * mine;
        o[2 * i + 1] += x.y * mine;
      }
    }
    const float inverse = total > 0.f ? 1.f / total : 0.f;
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 64; i++)
      *reinterpret_cast<u32*>(out + row * HEAD_DIM + i * 64 + lane * 2) =
          pack_io(o[2 * i] * inverse, o[2 * i + 1] * inverse);
  }
}
