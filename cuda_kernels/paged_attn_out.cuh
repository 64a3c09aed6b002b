// Paged attention, last part: results leave the registers, and the partial ones of a split context are joined.
#pragma once
#include "paged_attn_tile.cuh"

#define AHEAD 8  // parts that a thread of `combine` has on their way

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

// The blocks that share a tile of rows: each has a part of its keys.
struct Parts {
  int first, last;  // blocks
  DEV int count() const { return last - first + 1; }
  // A block's last part is the first one of its tile; of the others it is the first, or only one.
  DEV int place(int block) const { return (block * gridDim.y + blockIdx.y) * 2 + (block == first); }
};

// Write this part's rows before they are divided by their sums, and their maxima and sums.
DEV void store_partial(float* partial, float* maxima, const float (*o)[4], const float* m, const float* l,
                       const Rows& rows, int fragment, int warp_n, int place) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int r = fragment * 16 + g + 8 * i;
    if (!rows.has(r)) continue;
    const s64 row = (s64)place * BM + r;
    if (warp_n == 0 && t == 0) *reinterpret_cast<float2*>(maxima + row * 2) = make_float2(m[i], l[i]);
    if (l[i] == 0.f) continue;  // `combine` reads the sum first
    float* to = partial + row * TILED + warp_n * DIMS;
#pragma unroll
    for (int d = 0; d < DIMS / 16; d++)
      for (int j = 0; j < 2; j++) {
        float2 pair;
        const int at_dimension = output_pair(o, d, j, i, t, &pair);
        *reinterpret_cast<float2*>(to + at_dimension) = pair;
      }
  }
}

// Write the finished rows, through shared memory (which nobody reads any more), so that whole sectors are written.
DEV void store_rows(io_t* out, unsigned char* result, const float (*o)[DIMS / 8][4], const float (*l)[2],
                    const Rows& rows, int warp_m, int warp_n) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2 * FRAGMENTS; i++) {
    const float sum = l[i / 2][i % 2], inverse = sum == 0.f ? 0.f : 1.f / sum;
    const int row = warp_m * WARP_ROWS + g + 8 * i;
#pragma unroll
    for (int d = 0; d < DIMS / 16; d++)
      for (int j = 0; j < 2; j++) {
        float2 pair;
        const int dimension = warp_n * DIMS + output_pair(o[i / 2], d, j, i % 2, t, &pair);
        const int place = swizzled<Q_CHUNKS>(row, dimension / 8) * 4 + dimension % 8 / 2;
        reinterpret_cast<u32*>(result)[place] = pack_io(pair.x * inverse, pair.y * inverse);
      }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < BM * Q_CHUNKS; i += THREADS) {
    const int row = i / Q_CHUNKS, chunk = i % Q_CHUNKS;
    if (!rows.has(row)) break;
    if (TILED != HEAD_DIM && chunk >= HEAD_DIM / 8) continue;
    *reinterpret_cast<vec16*>(out + rows.place(row) * HEAD_DIM + chunk * 8) =
        *reinterpret_cast<const vec16*>(result + swizzled<Q_CHUNKS>(row, chunk) * 16);
  }
}

// Join the parts of a tile's rows: what each counts for, a warp a row; then the sums, four dimensions a thread.
DEV void combine(const float* partial, const float* maxima, io_t* out, const Rows& rows, const Parts& parts,
                 unsigned char* shared) {
  const int lane = threadIdx.x % 32, count = parts.count();
  float* weights = reinterpret_cast<float*>(shared + WEIGHTS_AT);
  for (int r = threadIdx.x / 32; r < BM && rows.has(r); r += WARPS) {
    float m[2], l[2], top = NEG_INF, total = 0.f;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int part = min(lane + 32 * h, count - 1);
      const float2 found = load_pair(maxima + ((s64)parts.place(parts.first + part) * BM + r) * 2);
      m[h] = found.x;
      l[h] = lane + 32 * h < count ? found.y : 0.f;
      if (l[h] != 0.f) top = fmaxf(top, found.x);  // else it had no visible key and wrote nothing
    }
    top = warp_max(top);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      m[h] = l[h] == 0.f ? 0.f : exp2_fast(m[h] - top);
      total += l[h] * m[h];
    }
    total = warp_sum(total);
#pragma unroll
    for (int h = 0; h < 2; h++) weights[r * MAX_PARTS + lane + 32 * h] = total == 0.f ? 0.f : m[h] / total;
  }
  __syncthreads();  // all rows have their weights
  constexpr int quads = HEAD_DIM / 4;
  for (int i = threadIdx.x; i < BM * quads && rows.has(i / quads); i += THREADS) {
    const int r = i / quads, d = i % quads * 4;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int first = 0; first < count; first += AHEAD) {
      float4 x[AHEAD];
#pragma unroll
      for (int p = 0; p < AHEAD; p++) {
        const int place = parts.place(parts.first + min(first + p, count - 1));
        x[p] = load_quad(partial + ((s64)place * BM + r) * TILED + d);
      }
#pragma unroll
      for (int p = 0; p < AHEAD; p++) {
        const float weight = weights[r * MAX_PARTS + first + p];
        if (weight == 0.f) continue;
        sum.x += x[p].x * weight;
        sum.y += x[p].y * weight;
        sum.z += x[p].z * weight;
        sum.w += x[p].w * weight;
      }
    }
    *reinterpret_cast<uint2*>(out + rows.place(r) * HEAD_DIM + d) = make_uint2(pack_io(sum.x, sum.y), pack_io(sum.z, sum.w));
  }
}
