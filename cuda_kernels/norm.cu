// RMSNorm, alone or after adding to the residual stream. One block per row, the row kept in registers: one read, one
// write. x [S, HIDDEN] with a row stride; residual, total and out [S, HIDDEN]; weight [HIDDEN] or null for none.
// Compile-time: HIDDEN (a multiple of 8), THREADS.
#include "common.cuh"

#define CHUNKS ((HIDDEN / 8 + THREADS - 1) / THREADS)  // 16-byte pieces of the row per thread

// Scale the row held in `row` and write it. Every thread of the block must call it.
DEV void normalise(float (*row)[8], const io_t* weight, io_t* out, float eps) {
  DYN_SMEM(float, scratch);
  float squares = 0.f;
#pragma unroll
  for (int c = 0; c < CHUNKS; c++)
#pragma unroll
    for (int i = 0; i < 8; i++) squares += row[c][i] * row[c][i];
  const float scale = rsqrt_fast(block_sum<THREADS / 32>(squares, scratch) * (1.f / HIDDEN) + eps);
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const int at = (c * THREADS + threadIdx.x) * 8;
    if (at >= HIDDEN) continue;
    vec16 w, y;
    if (weight) w = *reinterpret_cast<const vec16*>(weight + at);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float low = weight ? io_low(w.x[i]) : 1.f, high = weight ? io_high(w.x[i]) : 1.f;
      y.x[i] = pack_io(row[c][2 * i] * scale * low, row[c][2 * i + 1] * scale * high);
    }
    *reinterpret_cast<vec16*>(out + at) = y;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm(const io_t* __restrict__ x, const io_t* __restrict__ weight, io_t* __restrict__ out, int row_stride,
             float eps) {
  wait_for_kernels_before();
  float row[CHUNKS][8];
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const int at = (c * THREADS + threadIdx.x) * 8;
    vec16 v = {};
    if (at < HIDDEN) v = load16(x + (s64)blockIdx.x * row_stride + at);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      row[c][2 * i] = io_low(v.x[i]);
      row[c][2 * i + 1] = io_high(v.x[i]);
    }
  }
  normalise(row, weight, out + (s64)blockIdx.x * HIDDEN, eps);
}

// total = x + residual, rounded as it is stored; out = the norm of that.
extern "C" __global__ void __launch_bounds__(THREADS)
    add_rms_norm(const io_t* __restrict__ x, const io_t* __restrict__ residual, const io_t* __restrict__ weight,
                 io_t* __restrict__ total, io_t* __restrict__ out, int row_stride, float eps) {
  wait_for_kernels_before();
  float row[CHUNKS][8];
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const int at = (c * THREADS + threadIdx.x) * 8;
    vec16 sum = {};
    if (at < HIDDEN) {
      const s64 place = (s64)blockIdx.x * HIDDEN + at;
      const vec16 v = load16(x + (s64)blockIdx.x * row_stride + at), r = load16(residual + place);
#pragma unroll
      for (int i = 0; i < 4; i++)
        sum.x[i] = pack_io(io_low(v.x[i]) + io_low(r.x[i]), io_high(v.x[i]) + io_high(r.x[i]));
      *reinterpret_cast<vec16*>(total + place) = sum;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      row[c][2 * i] = io_low(sum.x[i]);
      row[c][2 * i + 1] = io_high(sum.x[i]);
    }
  }
  normalise(row, weight, out + (s64)blockIdx.x * HIDDEN, eps);
}
