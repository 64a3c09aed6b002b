// Mixture of experts: choose experts, sort the (token, choice) pairs by expert, and, after gemm.cu has multiplied each
// expert's tokens by its weights, add each token's outputs up. Nothing here depends on the order in which blocks run.
// A pair is numbered token * top_k + choice. `order` lists pairs expert by expert, each expert's padded with -1 to
// whole tiles of BM rows; tile t belongs to expert tile_expert[t], -1 past the last. A pair whose id is -1, of a token
// that only pads the batch, belongs to no expert: it is in no tile, and counts in no load.
// Compile-time: BM; NUM_EXPERTS and TOP_K for `route` and `sort_pairs`.
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
