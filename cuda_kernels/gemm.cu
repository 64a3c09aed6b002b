// out = x times the transpose of a weight on tensor cores, in tiles of BM rows by BN weights; sums in float.
// Weights are io_t, or int8 with a scale per output (-DINT8=1): widened in registers, so that memory sees a byte each.
// -DGATED=1: a weight is [2 n, k], gate first; act(gate) * up comes out, silu or (-DGELU=1) gelu with tanh.
// One weight: x [rows, k] with a row stride, out [rows, n]; `order` and `tile_expert` are null.
// Experts (see moe.cu): weights [E, n or 2 n, k], scales [E, n or 2 n]. Tile t multiplies the pairs order[t * BM ...]
// by the weight of tile_expert[t], and out is [pairs, n]. GATED: x is by token; else by pair.
// -DSPLIT=1, of one weight: blocks share k. Each has `span` steps of BK; the last of a tile to end adds up `partial`
// [splits, rows, n or 2 n] (`tickets` [tiles * columns / COLUMNS] start and end as 0).
// Compile-time: BM (16, 32 or 64), INT8, GATED, GELU, STAGES, SPLIT. k is a multiple of BK.
// Grid: (columns / COLUMNS, tiles, splits).
#include "common.cuh"

#define WARPS 4
#define BN 64
#define BK 64
#define PARTS (GATED ? 2 : 1)  // sums that an output has
#define COLUMNS (BN / PARTS)
#define X_BYTES (BM * BK * 2)
#define WEIGHT_CHUNKS (INT8 ? BK / 16 : BK / 8)  // 16-byte pieces of a weight row in a stage
#define STAGE_BYTES (X_BYTES + BN * WEIGHT_CHUNKS * 16)
#define MTILES (BM / 16)
#define BLOCKS (STAGES * STAGE_BYTES > 49152 ? 2 : INT8 ? 3 : 4)  // that share a multiprocessor's registers

#if INT8
typedef s8 weight_t;
#else
typedef io_t weight_t;
#endif

// Where a 16-byte piece of a row stands in its part of a stage. x: ldmatrix reads a piece of each of eight rows at
// once, or (INT8) half a warp two neighbouring pieces of each of four. Weights: a piece of each of eight rows.
DEV int x_place(int row, int chunk) { return (row * 8 + (chunk ^ (INT8 ? row % 4 * 2 : row % 8))) * 16; }
DEV int weight_place(int row, int chunk) {
  return (row * WEIGHT_CHUNKS + (chunk ^ (INT8 ? row / 2 % 4 : row % 8))) * 16;
}

// Row of a tile's weights -> row of the matrix; past the end any row, whose product is never stored.
DEV int weight_row(int row, int first, int n) {
  return GATED ? min(first + row % COLUMNS, n - 1) + row / COLUMNS * n : min(first + row, n - 1);
}

// The 16-byte pieces that this thread copies of each stage: where they come from, and where the first of x and of the
// weights goes. The others lie ROWS rows apart, which does not change their place in a row.
#define X_PIECES (BM * 8 / (WARPS * 32))
#define X_ROWS (WARPS * 32 / 8)
#define W_PIECES (BN * WEIGHT_CHUNKS / (WARPS * 32))
#define W_ROWS (WARPS * 32 / WEIGHT_CHUNKS)
struct Pieces {
  const io_t* x[X_PIECES];  // null: no row, zeros
  const weight_t* weights[W_PIECES];
  int x_to, weights_to;
};

DEV Pieces own_pieces(const io_t* x, const weight_t* weight, const int* rows, int first, int n, int k, int row_stride) {
  Pieces own;
  const int x_row = threadIdx.x / 8, x_chunk = threadIdx.x % 8;
  const int w_row = threadIdx.x / WEIGHT_CHUNKS, w_chunk = threadIdx.x % WEIGHT_CHUNKS;
#pragma unroll
  for (int i = 0; i < X_PIECES; i++) {
    const int from = rows[x_row + i * X_ROWS];
    own.x[i] = from >= 0 ? x + (s64)from * row_stride + x_chunk * 8 : nullptr;
  }
#pragma unroll
  for (int i = 0; i < W_PIECES; i++)
    own.weights[i] = weight + (s64)weight_row(w_row + i * W_ROWS, first, n) * k + w_chunk * (INT8 ? 16 : 8);
  own.x_to = x_place(x_row, x_chunk);
  own.weights_to = X_BYTES + weight_place(w_row, w_chunk);
  return own;
}

DEV void load_stage(unsigned char* stage, const Pieces& own, const void* any, int at) {
#pragma unroll
  for (int i = 0; i < X_PIECES; i++) {
    const void* from = own.x[i] ? own.x[i] + at : any;
    copy16_async(stage + own.x_to + i * X_ROWS * 128, from, own.x[i] != nullptr);
  }
#pragma unroll
  for (int i = 0; i < W_PIECES; i++)
    copy16_async(stage + own.weights_to + i * W_ROWS * WEIGHT_CHUNKS * 16, own.weights[i] + at, true);
}

// First row of a warp's two tiles of eight weights: of GATED, gate and up of the same outputs.
DEV int weight_tile(int warp, int j) { return GATED ? j * COLUMNS + warp * 8 : warp * 16 + j * 8; }

// The products of one stage.
DEV void multiply(float (*c)[2][4], const unsigned char* stage, int warp, int lane) {
  const unsigned char* weights = stage + X_BYTES;
#if INT8
  const int g = lane / 4, t = lane % 4;
  u32 bytes[2][4];  // of lane t bytes 4 t to 4 t + 3 of each 16
#pragma unroll
  for (int j = 0; j < 2; j++)
    load_matrices(bytes[j], weights + weight_place(weight_tile(warp, j) + lane % 8, lane / 8));
#pragma unroll
  for (int part = 0; part < BK / 16; part++) {
    u32 b[2][2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      float wide[4];
      bytes_to_floats(bytes[j][part], wide);
      b[j][0] = pack_io(wide[0], wide[1]);
      b[j][1] = pack_io(wide[2], wide[3]);
    }
#pragma unroll
    for (int m = 0; m < MTILES; m++) {
      // The tensor core adds over k in any order: x is read in the order that the weights' bytes come in.
      const int chunk = part * 2 + t / 2, offset = t % 2 * 8;
      const uint2 low = *reinterpret_cast<const uint2*>(stage + x_place(m * 16 + g, chunk) + offset);
      const uint2 high = *reinterpret_cast<const uint2*>(stage + x_place(m * 16 + g + 8, chunk) + offset);
      const u32 a[4] = {low.x, high.x, low.y, high.y};
#pragma unroll
      for (int j = 0; j < 2; j++) mma_io(c[m][j], a, b[j]);
    }
  }
#else
#pragma unroll
  for (int part = 0; part < BK / 32; part++) {
    u32 b[2][4];  // 32 of k
#pragma unroll
    for (int j = 0; j < 2; j++)
      load_matrices(b[j], weights + weight_place(weight_tile(warp, j) + lane % 8, part * 4 + lane / 8));
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int m = 0; m < MTILES; m++) {
        u32 a[4];
        load_matrices(a, stage + x_place(m * 16 + lane % 16, part * 4 + half * 2 + lane / 16));
#pragma unroll
        for (int j = 0; j < 2; j++) mma_io(c[m][j], a, b[j] + 2 * half);
      }
  }
#endif
}

// Scale and bias of a product, which is output `column` of its matrix (of GATED, of gate and of up).
DEV float finish(float sum, const io_t* scales, const io_t* bias, int column) {
  if (INT8) sum *= to_float(scales[column]);
  return bias ? sum + to_float(bias[column]) : sum;
}

// The result of an output from its sum, or those of gate and up.
DEV float result(const float* sum, const io_t* scales, const io_t* bias, int output, int n) {
  const float y = finish(sum[0], scales, bias, output);
  if (!GATED) return y;
  return (GELU ? gelu_tanh(y) : silu(y)) * finish(sum[PARTS - 1], scales, bias, n + output);
}

// Add up what the splits of this tile have left, two outputs a thread.
DEV void join(const float* partial, const io_t* scales, const io_t* bias, io_t* out, int num_rows, int n, int splits) {
  for (int i = threadIdx.x; i < BM * COLUMNS / 2; i += WARPS * 32) {
    const int row = blockIdx.y * BM + i / (COLUMNS / 2), output = blockIdx.x * COLUMNS + i % (COLUMNS / 2) * 2;
    if (row >= num_rows || output >= n) continue;
    float low[PARTS] = {}, high[PARTS] = {};
#pragma unroll 4
    for (int s = 0; s < splits; s++)
#pragma unroll
      for (int p = 0; p < PARTS; p++) {
        const float2 found = load_pair(partial + (((s64)s * num_rows + row) * PARTS + p) * n + output);
        low[p] += found.x;
        high[p] += found.y;
      }
    *reinterpret_cast<u32*>(out + (s64)row * n + output) =
        pack_io(result(low, scales, bias, output, n), result(high, scales, bias, output + 1, n));
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
    grouped_linear(const io_t* __restrict__ x, const weight_t* __restrict__ weights, const io_t* __restrict__ scales,
                   const io_t* __restrict__ bias, const int* __restrict__ order, const int* __restrict__ tile_expert,
                   float* partial, int* tickets, io_t* __restrict__ out, int num_rows, int n, int k, int row_stride,
                   int top_k, int span) {
  wait_for_kernels_before();
  DYN_SMEM(unsigned char, shared);  // stages, then rows of x [BM] and of out [BM]
  int *rows = reinterpret_cast<int*>(shared + STAGES * STAGE_BYTES), *results = rows + BM;
  const int expert = tile_expert ? tile_expert[blockIdx.y] : 0, first = blockIdx.x * COLUMNS;
  if (expert < 0) return;
  for (int i = threadIdx.x; i < BM; i += WARPS * 32) {
    const int at = blockIdx.y * BM + i, row = order ? order[at] : at < num_rows ? at : -1;
    results[i] = row;
    rows[i] = row >= 0 && order && GATED ? row / top_k : row;
  }
  __syncthreads();
  const weight_t* weight = weights + (s64)expert * n * PARTS * k;
  if (INT8) scales += (s64)expert * n * PARTS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int begin = blockIdx.z * span, steps = min(span, k / BK - begin);
  const Pieces own = own_pieces(x + begin * BK, weight + begin * BK, rows, first, n, k, row_stride);

  float c[MTILES][2][4] = {};
#pragma unroll 1
  for (int s = 0; s < STAGES - 1; s++) {
    if (s < steps) load_stage(shared + s * STAGE_BYTES, own, x, s * BK);
    copies_commit();
  }
  for (int step = 0, stage = 0; step < steps; step++, stage = stage + 1 < STAGES ? stage + 1 : 0) {
    copies_wait<STAGES - 2>();
    __syncthreads();  // this stage is there for all, and all have left the one before
    const int ahead = step + STAGES - 1;
    if (ahead < steps) load_stage(shared + (stage ? stage - 1 : STAGES - 1) * STAGE_BYTES, own, x, ahead * BK);
    copies_commit();
    multiply(c, shared + stage * STAGE_BYTES, warp, lane);
  }
  copies_wait<0>();
#pragma unroll
  for (int m = 0; m < MTILES; m++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int row = results[m * 16 + lane / 4 + 8 * i];
      if (row < 0) continue;
#pragma unroll
      for (int j = 0; j < (GATED ? 1 : 2); j++) {
        const int column = first + (GATED ? warp * 8 : warp * 16 + j * 8) + lane % 4 * 2;
        if (column >= n) continue;
        float y[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const float sum[2] = {c[m][j][2 * i + h], c[m][1][2 * i + h]};
          if (!SPLIT) y[h] = result(sum, scales, bias, column + h, n);
#pragma unroll
          for (int p = 0; p < (SPLIT ? PARTS : 0); p++)
            partial[(((s64)blockIdx.z * num_rows + row) * PARTS + p) * n + column + h] = sum[p];
        }
        if (!SPLIT) *reinterpret_cast<u32*>(out + (s64)row * n + column) = pack_io(y[0], y[1]);
      }
    }
  if (SPLIT && is_last(tickets + blockIdx.y * gridDim.x + blockIdx.x, gridDim.z, shared))
    join(partial, scales, bias, out, num_rows, n, gridDim.z);
}
