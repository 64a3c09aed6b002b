// Rows to int8, one scale each: of weights, and of activations.
// Weights: scale = largest magnitude / 127, rounded to io_t before it divides, so that the
// product of what is stored is as near as it can be. One block per row of dense [N, k]; k is a multiple of 8.
// Activations: scale is a float, so that no entry is off by more than a half of it (and what float rounds). One block per
// row of x [S, k] with a row stride. A row with a NaN or an infinity has the scale NaN: all of its products are NaN.
#include "common.cuh"

#define THREADS 256

extern "C" __global__ void __launch_bounds__(THREADS)
    quantize_rows(const io_t* __restrict__ dense, s8* __restrict__ weight, io_t* __restrict__ scale, int k) {
  wait_for_kernels_before();
  DYN_SMEM(float, scratch);
  const io_t* row = dense + (s64)blockIdx.x * k;
  float largest = 0.f;
  for (int at = threadIdx.x * 8; at < k; at += THREADS * 8) {
    const vec16 v = *reinterpret_cast<const vec16*>(row + at);
#pragma unroll
    for (int i = 0; i < 4; i++) largest = fmaxf(largest, fmaxf(fabsf(io_low(v.x[i])), fabsf(io_high(v.x[i]))));
  }
  largest = warp_max(largest);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = largest;
  __syncthreads();
  largest = warp_max(scratch[threadIdx.x % (THREADS / 32)]);
  // The least normal number of io_t, where a row is all zeros.
  const io_t rounded = to_io(fmaxf(largest / 127.f, IO_FP16 ? 6.103515625e-05f : 1.17549435e-38f));
  const float divisor = to_float(rounded);
  if (threadIdx.x == 0) scale[blockIdx.x] = rounded;
  for (int at = threadIdx.x * 8; at < k; at += THREADS * 8) {
    const vec16 v = *reinterpret_cast<const vec16*>(row + at);
    u32 packed[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float x = (i % 2 ? io_high(v.x[i / 2]) : io_low(v.x[i / 2])) / divisor;
      const int q = max(-127, min(127, round_to_int(x)));
      packed[i / 4] |= (u32)(q & 255) << (8 * (i % 4));
    }
    *reinterpret_cast<uint2*>(weight + (s64)blockIdx.x * k + at) = make_uint2(packed[0], packed[1]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    quantize_tokens(const io_t* __restrict__ x, s8* __restrict__ out, float* __restrict__ scale, int k, int row_stride) {
  wait_for_kernels_before();
  DYN_SMEM(u32, scratch);
  const io_t* row = x + (s64)blockIdx.x * row_stride;
  // Bits without the sign are in the order of the magnitudes, infinity and then NaN above all.
  u32 largest = 0;
  for (int at = threadIdx.x * 8; at < k; at += THREADS * 8) {
    const vec16 v = *reinterpret_cast<const vec16*>(row + at);
#pragma unroll
    for (int i = 0; i < 4; i++) largest = max(largest, max(v.x[i] & 0x7fffu, v.x[i] >> 16 & 0x7fffu));
  }
  largest = warp_max(largest);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = largest;
  __syncthreads();
  largest = warp_max(scratch[threadIdx.x % (THREADS / 32)]);
  const float magnitude = io_low(largest);
  const float own = magnitude < INF ? fmaxf(magnitude / 127.f, 1.17549435e-38f) : __uint_as_float(0x7fc00000u);
  const float inverse = 1.f / own;
  if (threadIdx.x == 0) scale[blockIdx.x] = own;
  for (int at = threadIdx.x * 8; at < k; at += THREADS * 8) {
    const vec16 v = *reinterpret_cast<const vec16*>(row + at);
    u32 packed[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float entry = i % 2 ? io_high(v.x[i / 2]) : io_low(v.x[i / 2]);
      packed[i / 4] |= (u32)(round_to_int(entry * inverse) & 255) << (8 * (i % 4));
    }
    *reinterpret_cast<uint2*>(out + (s64)blockIdx.x * k + at) = make_uint2(packed[0], packed[1]);
  }
}
