// out [rows, N] = x [rows, K] times the transpose of a weight [N, K], for a few rows: a stream of weights, read once.
// Weights are io_t, or int8 with a scale per output (-DINT8=1). x stays in the L1 cache.
// Up to 2 rows (M): a warp computes OUTPUTS neighbouring outputs; a lane reads 16 bytes of each weight row at a time. With
// -DSHARED=1 all warps of a block compute the same ones and share K: few outputs of many inputs need more loads at once.
// Up to 8 rows: on tensor cores, as the products alone would be more instructions than there is time for. A block
// computes a tile of 16 rows of the weight, of which half are gates where it is gated; its warps share K by chunks of
// 64 bytes. Lane (g, t) reads 16 bytes of weight rows g and g + 8 and the same inputs of row g of x: mma adds over k in
// any order.
// -DGATED=1: the weight is [2 N, K], gate first; out = act(gate) * up, silu or (-DGELU=1) gelu with tanh.
// -DNORM=1: x is RMSNorm(x + residual) * norm [K], computed by every block into its shared memory [M, K]; the first one
// writes the sum to `total` [rows, K]. `residual` [rows, K] may be null, then nothing is added and no sum is written.
// bias [N] (of the products, [2 N] where gated) may be null.
// Compile-time: M (1, 2 or 8), SHARED (of 1 or 2), INT8, GATED, GELU, NORM. Grid: N / (WARPS * OUTPUTS), if SHARED
// N / OUTPUTS; of 8 rows N / TILE.
#include "common.cuh"

#define TENSOR (M > 2)
#define WARPS (TENSOR ? 8 : 4)
#define OUTPUTS 2
#define TILE (GATED ? 8 : 16)
#define PADDING (TENSOR ? 32 : 0)  // behind a normalised row: the next one begins in other banks
#define PRODUCTS (GATED ? 2 * OUTPUTS : OUTPUTS)  // weight rows of a warp
#define STEP (INT8 ? 16 : 8)                      // weights of 16 bytes
#define STRIDE (32 * STEP)                        // weights of a row that a warp takes in a step
#define SHARERS (SHARED ? WARPS : 1)              // warps that share a row's steps
#define DEPTH (8 / PRODUCTS)                      // loads ahead of their use: 4 KB of a warp are in flight
#define BLOCKS (TENSOR ? 2 : 4)                   // that share a multiprocessor's registers

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

#if !TENSOR
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

#endif

DEV float activate(float v) { return GELU ? gelu_tanh(v) : silu(v); }

#if NORM
// Put the normalised rows into `shared` [rows, k + PADDING], followed by room for WARPS sums. Every thread of the block
// must call it.
DEV void normalise(io_t* shared, const io_t* x, const io_t* residual, const io_t* norm, io_t* total, int rows, int k,
                   int row_stride, float eps) {
  const int stride = k + PADDING;
  float* scratch = reinterpret_cast<float*>(shared + rows * stride);
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
      *reinterpret_cast<vec16*>(shared + m * stride + at) = v;
    }
    const float scale = rsqrt_fast(block_sum<WARPS>(squares, scratch) / k + eps);
    for (int at = threadIdx.x * 8; at < k; at += WARPS * 32 * 8) {  // what this thread wrote
      vec16* place = reinterpret_cast<vec16*>(shared + m * stride + at);
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

#if TENSOR
// Two rows of weights by 16 bytes; past the end zeros.
DEV void load_chunk(vec16* raw, const weight_t* const* weights, int at, int k) {
  const bool ok = at + threadIdx.x % 4 * STEP < k;
#pragma unroll
  for (int i = 0; i < 2; i++) raw[i] = ok ? load16(weights[i] + at) : vec16{};
}

// c += the products of a chunk.
DEV void multiply(float* c, const vec16* raw, const io_t* x, int at, int k) {
  const bool ok = at + threadIdx.x % 4 * STEP < k;
#pragma unroll
  for (int part = 0; part < STEP / 8; part++) {
    const vec16 v = ok ? *reinterpret_cast<const vec16*>(x + at + part * 8) : vec16{};
#pragma unroll
    for (int half = 0; half < 2; half++) {
      u32 a[4];
#if INT8
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float wide[4];
        bytes_to_floats(raw[i].x[part * 2 + half], wide);
        a[i] = pack_io(wide[0], wide[1]);
        a[i + 2] = pack_io(wide[2], wide[3]);
      }
#else
      a[0] = raw[0].x[half * 2], a[1] = raw[1].x[half * 2], a[2] = raw[0].x[half * 2 + 1], a[3] = raw[1].x[half * 2 + 1];
#endif
      mma_io(c, a, v.x + half * 2);
    }
  }
}

#define CHUNK (4 * STEP)  // inputs
#define AHEAD 4           // chunks ahead of their use: 4 KB of a warp are in flight
#define BY (WARPS * CHUNK)

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
    gemv(const io_t* __restrict__ x, const io_t* __restrict__ residual, const io_t* __restrict__ norm,
         EARLY const weight_t* __restrict__ weight, const io_t* __restrict__ scales, const io_t* __restrict__ bias,
         io_t* __restrict__ total, io_t* __restrict__ out, int rows, int n, int k, int row_stride, float eps) {
  __shared__ float parts[WARPS][4][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.x * TILE;
  const weight_t* weights[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {  // past the end: any row, never stored
    const int row = GATED ? min(first + lane / 4, n - 1) + i * n : min(first + lane / 4 + i * 8, n - 1);
    weights[i] = weight + (s64)row * k + lane % 4 * STEP;
  }
  vec16 ring[AHEAD][2];
#pragma unroll
  for (int d = 0; d < AHEAD; d++) load_chunk(ring[d], weights, warp * CHUNK + d * BY, k);
  wait_for_kernels_before();
#if NORM
  DYN_SMEM(io_t, own);
  normalise(own, x, residual, norm, total, rows, k, row_stride, eps);
  row_stride = k + PADDING;
#else
  const io_t* own = x;
#endif
  own += (s64)min(lane / 4, rows - 1) * row_stride + lane % 4 * STEP;
  float c[4] = {};
  for (int at = warp * CHUNK; at < k; at += AHEAD * BY)
#pragma unroll
    for (int d = 0; d < AHEAD; d++) {  // past the end: zeros
      multiply(c, ring[d], own, at + d * BY, k);
      load_chunk(ring[d], weights, at + (d + AHEAD) * BY, k);
    }
#pragma unroll
  for (int i = 0; i < 4; i++) parts[warp][i][lane] = c[i];
  __syncthreads();  // the parts of all warps are there
  const int row = threadIdx.x / TILE, column = threadIdx.x % TILE, output = first + column;
  if (row >= rows || output >= n) return;
  float mine[2];
#pragma unroll
  for (int half = 0; half <= GATED; half++) {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += parts[w][(half + column / 8) * 2 + row % 2][column % 8 * 4 + row / 2];
    if (INT8) sum *= to_float(scales[output + half * n]);
    mine[half] = bias ? sum + to_float(bias[output + half * n]) : sum;
  }
  out[(s64)row * n + output] = to_io(GATED ? activate(mine[0]) * mine[1] : mine[0]);
}
#else
#define BY (SHARERS * STRIDE)

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
    gemv(const io_t* __restrict__ x, const io_t* __restrict__ residual, const io_t* __restrict__ norm,
         EARLY const weight_t* __restrict__ weight, const io_t* __restrict__ scales, const io_t* __restrict__ bias,
         io_t* __restrict__ total, io_t* __restrict__ out, int rows, int n, int k, int row_stride, float eps) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, own_step = warp % SHARERS;
  const int first = (blockIdx.x * WARPS + warp) / SHARERS * OUTPUTS;
  const weight_t* weights[PRODUCTS];
#pragma unroll
  for (int j = 0; j < PRODUCTS; j++) {
    const int output = min(first + j % OUTPUTS, n - 1) + j / OUTPUTS * n;  // past the end: any row, never stored
    weights[j] = weight + (s64)output * k + own_step * STRIDE + lane * STEP;
  }
  const int whole = k / STRIDE;
  int left = (whole - own_step + SHARERS - 1) / SHARERS;  // whole steps of the warp
  const bool rest = own_step == whole % SHARERS && whole * STRIDE + lane * STEP < k;
  vec16 ring[DEPTH][PRODUCTS], last[PRODUCTS];
#pragma unroll
  for (int d = 0; d < DEPTH; d++)
    if (d < left) load_weights(ring[d], weights, d * BY);
  if (rest) load_weights(last, weights, left * BY);
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
    rows_of_x[m] = own + (s64)min(m, rows - 1) * row_stride + own_step * STRIDE + lane * STEP;
  float sums[M][PRODUCTS] = {};
  for (; left > 0; left -= DEPTH) {
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      if (d >= left) break;
      float w[PRODUCTS][STEP];
      widen_all(ring[d], w);
      if (d + DEPTH < left) load_weights(ring[d], weights, (d + DEPTH) * BY);
      multiply(sums, w, rows_of_x, d * BY);
    }
#pragma unroll
    for (int j = 0; j < PRODUCTS; j++) weights[j] += DEPTH * BY;
#pragma unroll
    for (int m = 0; m < M; m++) rows_of_x[m] += DEPTH * BY;
  }
  if (rest) {
    float w[PRODUCTS][STEP];
    widen_all(last, w);
    multiply(sums, w, rows_of_x, left * BY);  // back to behind the last whole step
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
#if SHARED
  __shared__ float parts[WARPS][2][M * OUTPUTS];
#pragma unroll
  for (int half = 0; half <= GATED; half++)
    if (lane < M * OUTPUTS) parts[warp][half][lane] = mine[half];
  __syncthreads();  // the parts of the row are there
  if (warp > 0 || lane >= M * OUTPUTS) return;
#pragma unroll
  for (int half = 0; half <= GATED; half++) {
    mine[half] = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) mine[half] += parts[w][half][lane];
  }
#endif
  const int row = lane / OUTPUTS, output = first + lane % OUTPUTS;
  if (row >= min(rows, M) || output >= n) return;
#pragma unroll
  for (int half = 0; half <= GATED; half++) {
    if (INT8) mine[half] *= to_float(scales[output + half * n]);
    if (bias) mine[half] += to_float(bias[output + half * n]);
  }
  out[(s64)row * n + output] = to_io(GATED ? activate(mine[0]) * mine[1] : mine[0]);
}
#endif
