// out = x times the transpose of a 4-bit weight on tensor cores; sums in float. A weight is scale * number + offset, of its
// output and group of inputs. Numbers 0 to 15 become floats of 16 bits in registers, exactly, and scales multiply float
// sums of 32 inputs: nothing is rounded but the result.
// weight: u32 [N / 32, K / 32, 32, 4], tiles of 32 outputs by 32 inputs. Of a tile lane l = 4 g + t holds 16 bytes; word
// 2 i + s holds, of inputs 16 s, the fragment of outputs 16 i: halves of a pair of inputs are 16 bits apart, and pair p is
// output 16 i + 8 (p % 2) + g, inputs 16 s + 8 (p / 2) + 2 t and the next one.
// scales [N / 32, groups, 8, 4], scale_t half or (-DWIDE_SCALES=1) float: of output 32 i + 8 j + g at [i, group, g, j].
// offsets, laid out like scales. -DOFFSET=0: null, numbers less 8. 1: less a zero point, s8. 2: plus a minimum, scale_t.
// -DGATED=1: a weight is [2 N, K], gate first; act(gate) * up comes out, silu or (-DGELU=1) gelu with tanh.
// -DSPLIT=1: block z of `splits` takes `span` stages of inputs and leaves its sums in `partial` [splits, rows, N or 2 N];
// the last one of a tile (by `tickets`, 0 between launches) adds them up in their order.
// Compile-time: BM (8, 16, 32, or 64 if not GATED), STAGES, the above. Grid: (N / OUTPUTS, rows / BM, splits). bias [N or 2 N] or null.
#include "common.cuh"

#define WARPS 4
#define OUTPUTS (WARPS * 32)
#define BK 128             // inputs of a stage
#define TILES (BK / 32)    // tiles of a warp in a stage
#define PARTS (1 + GATED)  // matrices
#define COLUMNS (BM / 8)   // fragments of x: it is the second factor, whose fragments have eight rows
#define X_BYTES (BM * BK * 2)
#define STAGE_BYTES (X_BYTES + PARTS * WARPS * TILES * 512)
#define BLOCKS (BM == 8 ? 4 : BM == 16 ? 4 - GATED : 2)  // that share a multiprocessor's registers

// A number's bits in the mantissa of 16.0, where the last of them counts 1.
#if IO_FP16
#define BIT 6
#define SIXTEENS 0x4c004c00u
#define ONES 0x3c003c00u
#else
#define BIT 3
#define SIXTEENS 0x41804180u
#define ONES 0x3f803f80u
#endif

#if WIDE_SCALES
typedef float scale_t;
typedef vec16 scales_t;
DEV void widen_scales(const scales_t& raw, float* out) {
#pragma unroll
  for (int i = 0; i < 4; i++) out[i] = __uint_as_float(raw.x[i]);
}
#else
typedef u16 scale_t;
typedef uint2 scales_t;
DEV void widen_scales(const scales_t& raw, float* out) {
  out[0] = half_to_float((u16)(raw.x & 0xffffu));
  out[1] = half_to_float((u16)(raw.x >> 16));
  out[2] = half_to_float((u16)(raw.y & 0xffffu));
  out[3] = half_to_float((u16)(raw.y >> 16));
}
#endif
#if OFFSET == 1
typedef s8 offset_t;
typedef u32 offsets_t;
#else
typedef scale_t offset_t;
typedef scales_t offsets_t;
#endif

// What a lane needs of a group, as loaded: its four outputs' scales and offsets.
struct Group {
  scales_t scales;
  offsets_t offsets;
};

DEV Group load_group(const scale_t* scales, const offset_t* offsets, s64 group) {
  const s64 at = (group * 8 + threadIdx.x % 32 / 4) * 4;
  Group r;
  r.scales = *reinterpret_cast<const scales_t*>(scales + at);
  if (OFFSET) r.offsets = *reinterpret_cast<const offsets_t*>(offsets + at);
  return r;
}

// The same as floats; the offset takes back the 16 that each number has too much.
DEV void widen_group(const Group& group, float* scale, float* offset) {
  widen_scales(group.scales, scale);
#if OFFSET == 1
  float zeros[4];
  bytes_to_floats(group.offsets, zeros);
#pragma unroll
  for (int i = 0; i < 4; i++) offset[i] = -scale[i] * (16.f + zeros[i]);
#elif OFFSET == 2
  widen_scales(group.offsets, offset);
#pragma unroll
  for (int i = 0; i < 4; i++) offset[i] -= 16.f * scale[i];
#else
#pragma unroll
  for (int i = 0; i < 4; i++) offset[i] = -24.f * scale[i];
#endif
}

// Eight numbers to the fragment of 16 outputs by 16 inputs, each more by 16.
DEV void widen(u32 numbers, u32* a) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int by = 4 * i - BIT;
    a[i] = and_or(by > 0 ? numbers >> by : numbers << -by, 0x000f000fu << BIT, SIXTEENS);
  }
}

// Where a 16-byte piece of a row of x stands: ldmatrix reads one of each of eight rows.
DEV int x_place(int row, int chunk) { return (row * (BK / 8) + (chunk ^ row % 8)) * 16; }

// Copy x of the stage that begins at `tile`, for all.
DEV void load_inputs(unsigned char* stage, const io_t* x, int rows, int row_stride, int tile, int tiles) {
  const int first = blockIdx.y * BM;
  for (int i = threadIdx.x; i < BM * (BK / 8); i += WARPS * 32) {
    const int row = i / (BK / 8), chunk = i % (BK / 8);
    const bool ok = first + row < rows && tile + chunk / 4 < tiles;
    copy16_async(stage + x_place(row, chunk), ok ? x + (s64)(first + row) * row_stride + tile * 32 + chunk * 8 : x, ok);
  }
}

// Copy the weights of that stage that this lane alone reads.
DEV void load_weights(unsigned char* stage, const u32* const* weights, int tile, int tiles) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int p = 0; p < PARTS; p++)
#pragma unroll
    for (int j = 0; j < TILES; j++) {
      const bool ok = tile + j < tiles;
      copy16_async(stage + X_BYTES + (((p * WARPS + warp) * TILES + j) * 32 + lane) * 16,
                   weights[p] + (ok ? (s64)(tile + j) * 128 + lane * 4 : 0), ok);
    }
}

// Add the products of one tile, scaled.
DEV void multiply(float (*total)[COLUMNS][4], const unsigned char* stage, int warp, int j, const float (*scale)[4],
                  const float (*offset)[4]) {
  const int lane = threadIdx.x % 32;
  const u32 ones[4] = {ONES, ONES, ONES, ONES};
  u32 a[PARTS * 2][2][4];
#pragma unroll
  for (int p = 0; p < PARTS; p++) {
    const vec16 numbers = *reinterpret_cast<const vec16*>(stage + X_BYTES + (((p * WARPS + warp) * TILES + j) * 32 + lane) * 16);
#pragma unroll
    for (int i = 0; i < 4; i++) widen(numbers.x[i], a[p * 2 + i / 2][i % 2]);
  }
#pragma unroll
  for (int n = 0; n < COLUMNS; n++) {
    u32 b[4];  // 32 inputs of eight rows
    load_matrices(b, stage + x_place(n * 8 + lane % 8, j * 4 + lane / 8));
    float sums[4] = {};  // of x, which offsets multiply
    mma_io(sums, ones, b);
    mma_io(sums, ones, b + 2);
#pragma unroll
    for (int m = 0; m < PARTS * 2; m++) {
      float c[4] = {};
      mma_io(c, a[m][0], b);
      mma_io(c, a[m][1], b + 2);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int output = m % 2 * 2 + i / 2;
        total[m][n][i] += scale[m / 2][output] * c[i];
        total[m][n][i] += offset[m / 2][output] * sums[i % 2];
      }
    }
  }
}

// The result of an output from its sum, or those of gate and up.
DEV float finish(const float* sum, const io_t* bias, int output, int n) {
  float y[PARTS];
#pragma unroll
  for (int p = 0; p < PARTS; p++) y[p] = bias ? sum[p] + to_float(bias[output + p * n]) : sum[p];
  return GATED ? (GELU ? gelu_tanh(y[0]) : silu(y[0])) * y[PARTS - 1] : y[0];
}

// Add up what the splits of this tile have left, two outputs a thread.
DEV void join(const float* partial, const io_t* bias, io_t* out, int rows, int n, int splits) {
  for (int i = threadIdx.x; i < BM * OUTPUTS / 2; i += WARPS * 32) {
    const int row = blockIdx.y * BM + i / (OUTPUTS / 2), output = blockIdx.x * OUTPUTS + i % (OUTPUTS / 2) * 2;
    if (row >= rows || output >= n) continue;
    float low[PARTS] = {}, high[PARTS] = {};
    for (int s = 0; s < splits; s++)
#pragma unroll
      for (int p = 0; p < PARTS; p++) {
        const float2 found = load_pair(partial + (((s64)s * rows + row) * PARTS + p) * n + output);
        low[p] += found.x;
        high[p] += found.y;
      }
    *reinterpret_cast<u32*>(out + (s64)row * n + output) =
        pack_io(finish(low, bias, output, n), finish(high, bias, output + 1, n));
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
    gemm_w4(const io_t* __restrict__ x, EARLY const u32* __restrict__ weight, EARLY const scale_t* __restrict__ scales,
            EARLY const offset_t* __restrict__ offsets, const io_t* __restrict__ bias, float* __restrict__ partial,
            int* __restrict__ tickets, io_t* __restrict__ out, int rows, int n, int tiles, int groups, int span,
            int splits, int row_stride) {
  DYN_SMEM(unsigned char, shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = blockIdx.x * WARPS + warp;
  const int first = blockIdx.z * span, last = min(first + span, (tiles + TILES - 1) / TILES), of_group = tiles / groups;
  const u32* weights[PARTS];
  s64 group[PARTS];
#pragma unroll
  for (int p = 0; p < PARTS; p++) {
    const s64 own = min(column, n / 32 - 1) + p * (n / 32);  // past the end: any outputs, never stored
    weights[p] = weight + own * tiles * 128;
    group[p] = own * groups;
  }
  float total[PARTS * 2][COLUMNS][4] = {}, scale[PARTS][4], offset[PARTS][4];
  int at = first * TILES / of_group, left = 0;  // the group that is loaded, and tiles until it is used
  Group next[PARTS];
#pragma unroll
  for (int p = 0; p < PARTS; p++) next[p] = load_group(scales, offsets, group[p] + min(at, groups - 1));

#pragma unroll
  for (int s = 0; s < STAGES - 1; s++)
    if (first + s < last) load_weights(shared + s * STAGE_BYTES, weights, (first + s) * TILES, tiles);
  wait_for_kernels_before();
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {  // the first group holds the weights of all these stages
    if (first + s < last) load_inputs(shared + s * STAGE_BYTES, x, rows, row_stride, (first + s) * TILES, tiles);
    copies_commit();
  }
  for (int step = first; step < last; step++) {
    copies_wait<STAGES - 2>();
    __syncthreads();  // this stage is there for all, and all have left the one before
    const int ahead = step + STAGES - 1;
    if (ahead < last) {
      unsigned char* stage = shared + (ahead - first) % STAGES * STAGE_BYTES;
      load_weights(stage, weights, ahead * TILES, tiles);
      load_inputs(stage, x, rows, row_stride, ahead * TILES, tiles);
    }
    copies_commit();
    const unsigned char* stage = shared + (step - first) % STAGES * STAGE_BYTES;
    constexpr int UNROLLED = BM == 64 ? 1 : TILES;
#pragma unroll UNROLLED
    for (int j = 0; j < TILES; j++) {
      const int tile = step * TILES + j;
      if (tile >= tiles) break;
      if (left == 0) {
        left = ++at * of_group - tile;
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
          widen_group(next[p], scale[p], offset[p]);
          next[p] = load_group(scales, offsets, group[p] + min(at, groups - 1));
        }
      }
      left--;
      multiply(total, stage, warp, j, scale, offset);
    }
  }
  copies_wait<0>();

#pragma unroll
  for (int n8 = 0; n8 < COLUMNS; n8++)
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int row = blockIdx.y * BM + n8 * 8 + lane % 4 * 2 + i % 2;
      const int output = column * 32 + i / 2 * 8 + lane / 4;
      if (row >= rows || output >= n) continue;
      float sum[PARTS];
#pragma unroll
      for (int p = 0; p < PARTS; p++) {
        sum[p] = total[p * 2 + i / 4][n8][i % 4];
        if (SPLIT) partial[(((s64)blockIdx.z * rows + row) * PARTS + p) * n + output] = sum[p];
      }
      if (!SPLIT) out[(s64)row * n + output] = to_io(finish(sum, bias, output, n));
    }
  if (SPLIT && is_last(tickets + blockIdx.y * gridDim.x + blockIdx.x, splits, shared))
    join(partial, bias, out, rows, n, splits);
}
