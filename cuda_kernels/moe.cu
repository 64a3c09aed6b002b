// Mixture of experts: choose experts, sort the (token, choice) pairs by expert, multiply each expert's tokens by its
// weights on tensor cores, and add each token's outputs up. Nothing here depends on the order in which blocks run.
// A pair is numbered token * top_k + choice. `order` lists pairs expert by expert, each expert's padded with -1 to
// whole tiles of BM rows; tile t belongs to expert tile_expert[t], -1 past the last.
// Compile-time: BM (16 or 64), GATED, GELU; NUM_EXPERTS and TOP_K for `route` and `sort_pairs`.
#include "common.cuh"

// ---- choice: softmax over the experts in float, the TOP_K of it, renormalised. One warp per token.
// logits [S, NUM_EXPERTS]; weights [S, TOP_K], ids [S, TOP_K], likeliest first, the lowest id among equals.
#define HELD ((NUM_EXPERTS + 31) / 32)

extern "C" __global__ void __launch_bounds__(128)
    route(const io_t* __restrict__ logits, float* __restrict__ weights, s64* __restrict__ ids, int tokens) {
  const int token = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (token >= tokens) return;
  float x[HELD];
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    const int expert = i * 32 + lane;
    x[i] = expert < NUM_EXPERTS ? to_float(logits[(s64)token * NUM_EXPERTS + expert]) : NEG_INF;
  }
  float top = 0.f, total = 0.f, mine = 0.f;
  int my_expert = 0;
#pragma unroll
  for (int k = 0; k < TOP_K; k++) {
    float best = NEG_INF;
    int place = 0;  // of the lane's best; the first among equals
#pragma unroll
    for (int i = HELD - 1; i >= 0; i--)
      if (x[i] >= best) best = x[i], place = i;
    const float most = warp_max(best);
    int expert = best == most ? place * 32 + lane : 1 << 30;
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) expert = min(expert, __shfl_xor_sync(FULL_WARP, expert, offset));
    if (k == 0) top = most;
    const float p = exp2_fast((most - top) * LOG2E);  // the softmax's own sum cancels in the renormalisation
    total += p;
    if (lane == k) mine = p, my_expert = expert;
#pragma unroll
    for (int i = 0; i < HELD; i++)
      if (i * 32 + lane == expert) x[i] = NEG_INF;
  }
  if (lane < TOP_K) {
    weights[(s64)token * TOP_K + lane] = mine / total;
    ids[(s64)token * TOP_K + lane] = my_expert;
  }
}

// ---- sort, stable: one block; a warp counts and places the pairs of its experts.
// ids [pairs]; order [max_tiles * BM], tile_expert [max_tiles]; load [NUM_EXPERTS] is added to.
#define SORT_WARPS 32

extern "C" __global__ void __launch_bounds__(SORT_WARPS * 32)
    sort_pairs(const s64* __restrict__ ids, int* __restrict__ order, int* __restrict__ tile_expert,
               s64* __restrict__ load, int pairs, int max_tiles) {
  DYN_SMEM(int, counts);  // [NUM_EXPERTS], then first tiles [NUM_EXPERTS + 1]
  int* first_tile = counts + NUM_EXPERTS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int expert = warp; expert < NUM_EXPERTS; expert += SORT_WARPS) {
    int count = 0;
    for (int base = 0; base < pairs; base += 32) {
      const bool mine = base + lane < pairs && ids[min(base + lane, pairs - 1)] == expert;
      count += __popc(__ballot_sync(FULL_WARP, mine));
    }
    if (lane == 0) {
      counts[expert] = count;
      load[expert] += count;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int tile = 0;
    for (int expert = 0; expert < NUM_EXPERTS; expert++) {
      first_tile[expert] = tile;
      tile += (counts[expert] + BM - 1) / BM;
    }
    first_tile[NUM_EXPERTS] = tile;
  }
  __syncthreads();
  for (int expert = warp; expert < NUM_EXPERTS; expert += SORT_WARPS) {
    int at = first_tile[expert] * BM;
    for (int base = 0; base < pairs; base += 32) {
      const bool mine = base + lane < pairs && ids[min(base + lane, pairs - 1)] == expert;
      const u32 votes = __ballot_sync(FULL_WARP, mine);
      if (mine) order[at + __popc(votes & ((1u << lane) - 1))] = base + lane;
      at += __popc(votes);
    }
    for (int i = at + lane; i < first_tile[expert + 1] * BM; i += 32) order[i] = -1;
    for (int i = first_tile[expert] + lane; i < first_tile[expert + 1]; i += 32) tile_expert[i] = expert;
  }
  for (int i = first_tile[NUM_EXPERTS] + threadIdx.x; i < max_tiles; i += SORT_WARPS * 32) tile_expert[i] = -1;
}

// ---- products: out [pairs, n] = x times the transpose of the expert's weight [E, n or 2 n, k], for a tile of pairs.
// GATED: x [S, k] by token, the weight holds gate then up, act(gate) * up comes out. Else x [pairs, k].
// k is a multiple of BK. Grid: (columns of out / COLUMNS, max_tiles).
#define WARPS 4
#define BN 64
#define BK 64
#define STAGES 3
#define COLUMNS (GATED ? BN / 2 : BN)
#define A_BYTES (BM * BK * 2)
#define STAGE_BYTES ((BM + BN) * BK * 2)
#define MTILES (BM / 16)

DEV int swizzled(int row, int chunk) { return (row * 8 + (chunk ^ (row & 7))) * 16; }

// Row of a tile's weights -> row of the expert's matrix.
DEV int weight_row(int row, int first, int n) {
  return GATED ? min(first + row % COLUMNS, n - 1) + row / COLUMNS * n : min(first + row, n - 1);
}

DEV void load_stage(unsigned char* stage, const io_t* x, const io_t* weight, const int* rows, int first, int n, int k,
                    int at) {
  for (int i = threadIdx.x; i < (BM + BN) * 8; i += WARPS * 32) {
    const int row = i / 8, chunk = i % 8;
    if (row < BM) {
      const int from = rows[row];
      copy16_async(stage + swizzled(row, chunk), x + (from >= 0 ? (s64)from * k + at + chunk * 8 : 0), from >= 0);
    } else {
      const io_t* source = weight + (s64)weight_row(row - BM, first, n) * k + at + chunk * 8;
      copy16_async(stage + A_BYTES + swizzled(row - BM, chunk), source, true);
    }
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 4)
    expert_linear(const io_t* __restrict__ x, const io_t* __restrict__ weights, const int* __restrict__ order,
                  const int* __restrict__ tile_expert, io_t* __restrict__ out, int n, int k, int top_k) {
  DYN_SMEM(unsigned char, shared);  // stages, then the rows of x
  int* rows = reinterpret_cast<int*>(shared + STAGES * STAGE_BYTES);
  const int expert = tile_expert[blockIdx.y], first = blockIdx.x * COLUMNS;
  if (expert < 0) return;
  const int* pairs = order + blockIdx.y * BM;
  for (int i = threadIdx.x; i < BM; i += WARPS * 32) rows[i] = pairs[i] < 0 ? -1 : GATED ? pairs[i] / top_k : pairs[i];
  __syncthreads();
  const io_t* weight = weights + (s64)expert * n * (GATED ? 2 : 1) * k;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, steps = k / BK;

  float c[MTILES][2][4] = {};
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
    if (s < steps) load_stage(shared + s * STAGE_BYTES, x, weight, rows, first, n, k, s * BK);
    copies_commit();
  }
  for (int step = 0; step < steps; step++) {
    copies_wait<STAGES - 2>();
    __syncthreads();  // this stage is there for all, and all have left the one before
    const int ahead = step + STAGES - 1;
    if (ahead < steps) load_stage(shared + ahead % STAGES * STAGE_BYTES, x, weight, rows, first, n, k, ahead * BK);
    copies_commit();
    const unsigned char* a = shared + step % STAGES * STAGE_BYTES;
#pragma unroll
    for (int part = 0; part < BK / 32; part++) {
      u32 b[2][4];  // two column tiles of eight: GATED: of gate and of up; 32 of k
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int row = (GATED ? j * COLUMNS + warp * 8 : warp * 16 + j * 8) + lane % 8;
        load_matrices(b[j], a + A_BYTES + swizzled(row, part * 4 + lane / 8));
      }
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int m = 0; m < MTILES; m++) {
          u32 f[4];
          load_matrices(f, a + swizzled(m * 16 + lane % 16, part * 4 + half * 2 + lane / 16));
#pragma unroll
          for (int j = 0; j < 2; j++) mma_io(c[m][j], f, b[j] + 2 * half);
        }
    }
  }
  copies_wait<0>();
#pragma unroll
  for (int m = 0; m < MTILES; m++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int pair = pairs[m * 16 + g + 8 * i];
      if (pair < 0) continue;
#pragma unroll
      for (int j = 0; j < (GATED ? 1 : 2); j++) {
        const int column = first + (GATED ? warp * 8 : warp * 16 + j * 8) + 2 * t;
        if (column >= n) continue;
        float low = c[m][j][2 * i], high = c[m][j][2 * i + 1];
        if (GATED) {
          low = (GELU ? gelu_tanh(low) : silu(low)) * c[m][1][2 * i];
          high = (GELU ? gelu_tanh(high) : silu(high)) * c[m][1][2 * i + 1];
        }
        *reinterpret_cast<u32*>(out + (s64)pair * n + column) = pack_io(low, high);
      }
    }
}

// ---- out [S, n] = the sum over choices of weights [S, top_k] times y [pairs, n]. Grid: (S, pieces of 8 * 128 columns).
extern "C" __global__ void __launch_bounds__(128)
    combine(const io_t* __restrict__ y, const float* __restrict__ weights, io_t* __restrict__ out, int n, int top_k) {
  const int at = (blockIdx.y * 128 + threadIdx.x) * 8;
  if (at >= n) return;
  float sums[8] = {};
  for (int j = 0; j < top_k; j++) {
    const s64 pair = (s64)blockIdx.x * top_k + j;
    const float weight = weights[pair];
    const vec16 v = load16(y + pair * n + at);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      sums[2 * i] += weight * io_low(v.x[i]);
      sums[2 * i + 1] += weight * io_high(v.x[i]);
    }
  }
  vec16 r;
#pragma unroll
  for (int i = 0; i < 4; i++) r.x[i] = pack_io(sums[2 * i], sums[2 * i + 1]);
  *reinterpret_cast<vec16*>(out + (s64)blockIdx.x * n + at) = r;
}
