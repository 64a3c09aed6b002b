// out [rows, N] = x [rows, K] times the transpose of a weight [N, K], for a few rows: a stream of weights, read once.
// A warp computes OUTPUTS neighbouring outputs for all rows (at most M); a lane reads 16 bytes of each weight row at a
// time. x stays in the L1 cache. Weights are io_t, or int8 with a scale per output (-DINT8=1).
// -DGATED=1: the weight is [2 N, K], gate first; out = act(gate) * up, silu or (-DGELU=1) gelu with tanh.
// -DNORM=1: x is RMSNorm(x + residual) * norm [K], computed by every block into its shared memory [M, K]; the first one
// writes the sum to `total` [rows, K]. `residual` [rows, K] may be null, then nothing is added and no sum is written.
// bias [N] (of the products, [2 N] where gated) may be null.
// Compile-time: M, INT8, GATED, GELU, NORM. Grid: N / (WARPS * OUTPUTS).
#include "common.cuh"

#define WARPS 4
#define OUTPUTS 2
#define PRODUCTS (GATED ? 2 * OUTPUTS : OUTPUTS)  // weight rows of a warp
#define STEP (INT8 ? 16 : 8)                      // weights of 16 bytes
#define STRIDE (32 * STEP)                        // weights of a row that a warp takes in a step
#define DEPTH (8 / PRODUCTS)                      // loads ahead of their use: 4 KB of a warp are in flight
#define BLOCKS (M * PRODUCTS <= 8 ? 4 : 2)        // that share a multiprocessor's registers

#if INT8
typedef s8 weight_t;
DEV void widen(const vec16& v, float* out) {
#pragma unroll
  for (int i = 0; i < 4; i++) bytes_to_floats(v.x[i], out + 4 * i);
}
#else
typedef io_t weight_t;
DEV void widen(const vec16& v, float* out) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    out[2 * i] = io_low(v.x[i]);
    out[2 * i + 1] = io_high(v.x[i]);
  }
}
#endif

DEV void load_weights(vec16* raw, const weight_t* const* weights, int at) {
#pragma unroll
  for (int j = 0; j < PRODUCTS; j++) raw[j] = load16(weights[j] + at);
}

DEV void widen_all(const vec16* raw, float (*w)[STEP]) {
#pragma unroll
  for (int j = 0; j < PRODUCTS; j++) widen(raw[j], w[j]);
}

// Add the products of STEP inputs of every row.
DEV void multiply(float (*sums)[PRODUCTS], const float (*w)[STEP], const io_t* const* x, int at) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int part = 0; part < STEP / 8; part++) {
      const vec16 v = *reinterpret_cast<const vec16*>(x[m] + at + part * 8);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float low = io_low(v.x[i]), high = io_high(v.x[i]);
#pragma unroll
        for (int j = 0; j < PRODUCTS; j++) {
          sums[m][j] = __fmaf_rn(low, w[j][part * 8 + 2 * i], sums[m][j]);
          sums[m][j] = __fmaf_rn(high, w[j][part * 8 + 2 * i + 1], sums[m][j]);
        }
      }
    }
}

DEV float activate(float v) { return GELU ? gelu_tanh(v) : silu(v); }

#if NORM
// Put the normalised rows into `shared`, followed by room for WARPS sums. Every thread of the block must call it.
DEV void normalise(io_t* shared, const io_t* x, const io_t* residual, const io_t* norm, io_t* total, int rows, int k,
                   int row_stride, float eps) {
  float* scratch = reinterpret_cast<float*>(shared + M * k);
  for (int m = 0; m < rows; m++) {
    float squares = 0.f;
    for (int at = threadIdx.x * 8; at < k; at += WARPS * 32 * 8) {
      vec16 v = *reinterpret_cast<const vec16*>(x + (s64)m * row_stride + at);
      if (residual) {
        const vec16 r = *reinterpret_cast<const vec16*>(residual + (s64)m * k + at);
#pragma unroll
        for (int i = 0; i < 4; i++)
          v.x[i] = pack_io(io_low(v.x[i]) + io_low(r.x[i]), io_high(v.x[i]) + io_high(r.x[i]));
        if (blockIdx.x == 0) *reinterpret_cast<vec16*>(total + (s64)m * k + at) = v;
      }
#pragma unroll
      for (int i = 0; i < 4; i++) squares += io_low(v.x[i]) * io_low(v.x[i]) + io_high(v.x[i]) * io_high(v.x[i]);
      *reinterpret_cast<vec16*>(shared + m * k + at) = v;
    }
    const float scale = rsqrt_fast(block_sum<WARPS>(squares, scratch) / k + eps);
    for (int at = threadIdx.x * 8; at < k; at += WARPS * 32 * 8) {  // what this thread wrote
      vec16* place = reinterpret_cast<vec16*>(shared + m * k + at);
      const vec16 v = *place, w = *reinterpret_cast<const vec16*>(norm + at);
      vec16 y;
#pragma unroll
      for (int i = 0; i < 4; i++)
        y.x[i] = pack_io(io_low(v.x[i]) * scale * io_low(w.x[i]), io_high(v.x[i]) * scale * io_high(w.x[i]));
      *place = y;
    }
    __syncthreads();  // the row is there for all, and the sums have been read
  }
}
#endif

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
    gemv(const io_t* __restrict__ x, const io_t* __restrict__ residual, const io_t* __restrict__ norm,
         EARLY const weight_t* __restrict__ weight, const io_t* __restrict__ scales, const io_t* __restrict__ bias,
         io_t* __restrict__ total, io_t* __restrict__ out, int rows, int n, int k, int row_stride, float eps) {
  const int lane = threadIdx.x % 32, first = (blockIdx.x * WARPS + threadIdx.x / 32) * OUTPUTS;
  const weight_t* weights[PRODUCTS];
#pragma unroll
  for (int j = 0; j < PRODUCTS; j++) {
    const int output = min(first + j % OUTPUTS, n - 1) + j / OUTPUTS * n;  // past the end: any row, never stored
    weights[j] = weight + (s64)output * k + lane * STEP;
  }
  int left = k / STRIDE;  // whole steps of the warp
  const bool rest = left * STRIDE + lane * STEP < k;
  vec16 ring[DEPTH][PRODUCTS], last[PRODUCTS];
#pragma unroll
  for (int d = 0; d < DEPTH; d++)
    if (d < left) load_weights(ring[d], weights, d * STRIDE);
  if (rest) load_weights(last, weights, left * STRIDE);
  wait_for_kernels_before();
#if NORM
  DYN_SMEM(io_t, own);
  normalise(own, x, residual, norm, total, rows, k, row_stride, eps);
  row_stride = k;
#else
  const io_t* own = x;
#endif
  if (first >= n) return;
  const io_t* rows_of_x[M];
#pragma unroll
  for (int m = 0; m < M; m++)  // past the end: any row, never stored
    rows_of_x[m] = own + (s64)min(m, rows - 1) * row_stride + lane * STEP;
  float sums[M][PRODUCTS] = {};
  for (; left > 0; left -= DEPTH) {
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      if (d >= left) break;
      float w[PRODUCTS][STEP];
      widen_all(ring[d], w);
      if (d + DEPTH < left) load_weights(ring[d], weights, (d + DEPTH) * STRIDE);
      multiply(sums, w, rows_of_x, d * STRIDE);
    }
#pragma unroll
    for (int j = 0; j < PRODUCTS; j++) weights[j] += DEPTH * STRIDE;
#pragma unroll
    for (int m = 0; m < M; m++) rows_of_x[m] += DEPTH * STRIDE;
  }
  if (rest) {
    float w[PRODUCTS][STEP];
    widen_all(last, w);
    multiply(sums, w, rows_of_x, left * STRIDE);  // back to behind the last whole step
  }
  // Every lane gets every sum; lane m * OUTPUTS + j stores output j of row m.
  float mine[2] = {0.f, 0.f};
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int j = 0; j < PRODUCTS; j++) {
      const float sum = warp_sum(sums[m][j]);
      if (lane == m * OUTPUTS + j % OUTPUTS) mine[j / OUTPUTS] = sum;
    }
  const int row = lane / OUTPUTS, output = first + lane % OUTPUTS;
  if (row >= min(rows, M) || output >= n) return;
#pragma unroll
  for (int half = 0; half <= GATED; half++) {
    if (INT8) mine[half] *= to_float(scales[output + half * n]);
    if (bias) mine[half] += to_float(bias[output + half * n]);
  }
  out[(s64)row * n + output] = to_io(GATED ? activate(mine[0]) * mine[1] : mine[0]);
}
