// out = x times the transpose of an int8 weight on int8 tensor cores, for x rounded to int8 (quantize_tokens in quant.cu).
// Sums are exact integers, k being at most 131,072: no order of adding and no other row of a batch changes a result.
// x [rows, k] with scales x_scales [rows]; weight [n, k] with scales [n]; bias [n] or null; out [rows, n].
// -DGATED=1: a weight is [2 n, k], gate first; act(gate) * up comes out, silu or (-DGELU=1) gelu with tanh.
// -DSPLIT=1: blocks share k. Each has `span` steps of BK; the last of a tile to end adds up `partial` [splits, rows, n or
// 2 n] (`tickets` [blocks of one split] start and end as 0).
// Compile-time: GATED, GELU, STAGES, SPLIT. k is a multiple of BK. Grid: (rows / BM, columns / COLUMNS, splits): blocks that
// run side by side read the same weights.
#include "common.cuh"

#define WARPS 4  // two by two, each with 64 rows by 64 weights
#define BM 128
#define BN 128
#define BK 64
#define PARTS (GATED ? 2 : 1)  // sums that an output has
#define COLUMNS (BN / PARTS)
#define X_BYTES (BM * BK)
#define STAGE_BYTES (X_BYTES + BN * BK)
#define MTILES 4  // of 16 rows
#define NTILES 8  // of 8 weights; GATED: four of the gate, then four of what it is multiplied by
#define PIECES (BM / 32)  // 16-byte pieces of x, and as many of the weights, that a thread copies of a stage

// Where a 16-byte piece of a row stands in its part of a stage: ldmatrix reads one of each of eight rows.
DEV int place(int row, int chunk) { return (row * 4 + (chunk ^ row / 2 % 4)) * 16; }

// Row of a tile's weights -> row of the matrix; past the end any row, whose product is never stored.
DEV int weight_row(int row, int first, int n) { return min(first + row % COLUMNS, n - 1) + row / COLUMNS * n; }

// What this thread copies of each stage: piece threadIdx.x % 4 of every 32nd row.
struct Pieces {
  const s8 *x, *weights[PIECES];
  int row_step, rows_left, to;
};

DEV Pieces own_pieces(const s8* x, const s8* weight, int num_rows, int first_row, int first, int n, int k) {
  Pieces own;
  const int row = threadIdx.x / 4, chunk = threadIdx.x % 4;
  own.x = x + (s64)(first_row + row) * k + chunk * 16;
  own.row_step = 32 * k;
  own.rows_left = num_rows - first_row - row;
#pragma unroll
  for (int i = 0; i < PIECES; i++)
    own.weights[i] = weight + (s64)weight_row(row + i * 32, first, n) * k + chunk * 16;
  own.to = place(row, chunk);
  return own;
}

DEV void load_stage(unsigned char* stage, const Pieces& own, const void* any, int at) {
#pragma unroll
  for (int i = 0; i < PIECES; i++) {
    const bool ok = i * 32 < own.rows_left;
    copy16_async(stage + own.to + i * 32 * BK, ok ? own.x + (s64)i * own.row_step + at : any, ok);
  }
#pragma unroll
  for (int i = 0; i < PIECES; i++) copy16_async(stage + X_BYTES + own.to + i * 32 * BK, own.weights[i] + at, true);
}

// First row, in a stage, of a warp's tile of eight weights.
DEV int weight_tile(int half, int j) {
  return GATED ? j / 4 * COLUMNS + half * 32 + j % 4 * 8 : half * 64 + j * 8;
}

// The products of one stage, for the 64 rows of `upper` and the 64 weights of `half`.
DEV void multiply(int (*c)[NTILES][4], const unsigned char* stage, int upper, int half, int lane) {
  const int x_at = place(upper * 64 + lane % 16, lane / 16);
  const int weights_at = place(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
  for (int part = 0; part < BK / 32; part++) {
    u32 a[MTILES][4];
#pragma unroll
    for (int m = 0; m < MTILES; m++) load_matrices(a[m], stage + (x_at ^ part * 32) + m * 16 * BK);
#pragma unroll
    for (int j = 0; j < NTILES; j += 2) {
      u32 b[4];
      load_matrices(b, stage + X_BYTES + (weights_at ^ part * 32) + weight_tile(half, j) * BK);
#pragma unroll
      for (int m = 0; m < MTILES; m++) {
        mma_s8(c[m][j], a[m], b);
        mma_s8(c[m][j + 1], a[m], b + 2);
      }
    }
  }
}

// Scales and bias of a product, which is output `column` of its matrix (of GATED, of gate and of up).
DEV float finish(int sum, float x_scale, const io_t* scales, const io_t* bias, int column) {
  const float y = (float)sum * (x_scale * to_float(scales[column]));
  return bias ? y + to_float(bias[column]) : y;
}

// The result of an output from its sum, or those of gate and up.
DEV float result(const int* sum, float x_scale, const io_t* scales, const io_t* bias, int output, int n) {
  const float y = finish(sum[0], x_scale, scales, bias, output);
  if (!GATED) return y;
  return (GELU ? gelu_tanh(y) : silu(y)) * finish(sum[PARTS - 1], x_scale, scales, bias, n + output);
}

// Add up what the splits of this tile have left, two outputs a thread.
DEV void join(const int* partial, const float* x_scales, const io_t* scales, const io_t* bias, io_t* out, int num_rows,
              int n, int splits) {
  for (int i = threadIdx.x; i < BM * COLUMNS / 2; i += WARPS * 32) {
    const int row = blockIdx.x * BM + i / (COLUMNS / 2), output = blockIdx.y * COLUMNS + i % (COLUMNS / 2) * 2;
    if (row >= num_rows || output >= n) continue;
    int low[PARTS] = {}, high[PARTS] = {};
#pragma unroll 4
    for (int s = 0; s < splits; s++)
#pragma unroll
      for (int p = 0; p < PARTS; p++) {
        const int2 found = load_pair(partial + (((s64)s * num_rows + row) * PARTS + p) * n + output);
        low[p] += found.x;
        high[p] += found.y;
      }
    const float x_scale = x_scales[row];
    *reinterpret_cast<u32*>(out + (s64)row * n + output) = pack_io(
        result(low, x_scale, scales, bias, output, n), result(high, x_scale, scales, bias, output + 1, n));
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)
    gemm_s8(const s8* __restrict__ x, const float* __restrict__ x_scales, const s8* __restrict__ weight,
            const io_t* __restrict__ scales, const io_t* __restrict__ bias, int* partial, int* tickets,
            io_t* __restrict__ out, int num_rows, int n, int k, int span) {
  wait_for_kernels_before();
  DYN_SMEM(unsigned char, shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, upper = warp / 2, half = warp % 2;
  const int first_row = blockIdx.x * BM, first = blockIdx.y * COLUMNS;
  const int begin = blockIdx.z * span, steps = min(span, k / BK - begin);
  const Pieces own = own_pieces(x + begin * BK, weight + begin * BK, num_rows, first_row, first, n, k);

  int c[MTILES][NTILES][4] = {};
#pragma unroll 1
  for (int s = 0; s < STAGES - 1; s++) {
    if (s < steps) load_stage(shared + s * STAGE_BYTES, own, x, s * BK);
    copies_commit();
  }
#pragma unroll 1
  for (int step = 0, stage = 0; step < steps; step++, stage = stage + 1 < STAGES ? stage + 1 : 0) {
    copies_wait<STAGES - 2>();
    __syncthreads();  // this stage is there for all, and all have left the one before
    const int ahead = step + STAGES - 1;
    if (ahead < steps) load_stage(shared + (stage ? stage - 1 : STAGES - 1) * STAGE_BYTES, own, x, ahead * BK);
    copies_commit();
    multiply(c, shared + stage * STAGE_BYTES, upper, half, lane);
  }
  copies_wait<0>();
#pragma unroll
  for (int j = 0; j < NTILES / PARTS; j++) {
    const int column = first + half * (COLUMNS / 2) + j * 8 + lane % 4 * 2;
    if (column >= n) continue;
#pragma unroll
    for (int i = 0; i < MTILES * 2; i++) {
      const int row = first_row + upper * 64 + i / 2 * 16 + i % 2 * 8 + lane / 4, at = i % 2 * 2;
      if (row >= num_rows) continue;
      const int *own_sums = c[i / 2][j] + at, *others = c[i / 2][j + NTILES / 2 * GATED] + at;
      if (SPLIT) {
        int* to = partial + ((s64)blockIdx.z * num_rows + row) * PARTS * n + column;
        *reinterpret_cast<int2*>(to) = make_int2(own_sums[0], own_sums[1]);
        if (GATED) *reinterpret_cast<int2*>(to + n) = make_int2(others[0], others[1]);
      } else {
        const int low[2] = {own_sums[0], others[0]}, high[2] = {own_sums[1], others[1]};
        const float x_scale = x_scales[row];
        *reinterpret_cast<u32*>(out + (s64)row * n + column) = pack_io(
            result(low, x_scale, scales, bias, column, n), result(high, x_scale, scales, bias, column + 1, n));
      }
    }
  }
  if (SPLIT && is_last(tickets + blockIdx.y * gridDim.x + blockIdx.x, gridDim.z, shared))
    join(partial, x_scales, scales, bias, out, num_rows, n, gridDim.z);
}
