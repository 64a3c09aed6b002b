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
  wait_for_kernels_before();
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

// ---- sort, stable: one block; a warp counts and places the pairs of its experts, all in one pass over the ids each.
// ids [pairs]; order [max_tiles * BM], tile_expert [max_tiles]; load [NUM_EXPERTS] is added to.
#define SORT_WARPS 32
#define AHEAD 4  // times 32 ids that a warp has in flight: every warp reads all of them

// Expert `i` of a warp. The last ones may be beyond NUM_EXPERTS, where no id is.
DEV int expert_of(int warp, int i) { return i * SORT_WARPS + warp; }

DEV void load_ids(int* held, const s64* ids, int base, int pairs) {
#pragma unroll
  for (int j = 0; j < AHEAD; j++) {
    const int pair = base + j * 32 + threadIdx.x % 32;
    held[j] = pair < pairs ? (int)ids[pair] : -1;
  }
}

DEV void find_first_tiles(const int* counts, int* first_tile) {
  int tile = 0;
  for (int expert = 0; expert < NUM_EXPERTS; expert++) {
    first_tile[expert] = tile;
    tile += (counts[expert] + BM - 1) / BM;
  }
  first_tile[NUM_EXPERTS] = tile;
}

extern "C" __global__ void __launch_bounds__(SORT_WARPS * 32)
    sort_pairs(const s64* __restrict__ ids, int* __restrict__ order, int* __restrict__ tile_expert,
               s64* __restrict__ load, int pairs, int max_tiles) {
  wait_for_kernels_before();
  DYN_SMEM(int, counts);  // [NUM_EXPERTS], then first tiles [NUM_EXPERTS + 1]
  int *first_tile = counts + NUM_EXPERTS, held[AHEAD], places[HELD] = {};
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int base = 0; base < pairs; base += AHEAD * 32) {
    load_ids(held, ids, base, pairs);
#pragma unroll
    for (int j = 0; j < AHEAD; j++)
#pragma unroll
      for (int i = 0; i < HELD; i++) places[i] += __popc(__ballot_sync(FULL_WARP, held[j] == expert_of(warp, i)));
  }
#pragma unroll
  for (int i = 0; i < HELD; i++)
    if (const int expert = expert_of(warp, i); lane == 0 && expert < NUM_EXPERTS) {
      counts[expert] = places[i];
      load[expert] += places[i];
    }
  __syncthreads();
  if (threadIdx.x == 0) find_first_tiles(counts, first_tile);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < HELD; i++) places[i] = first_tile[min(expert_of(warp, i), NUM_EXPERTS)] * BM;
  for (int base = 0; base < pairs; base += AHEAD * 32) {
    load_ids(held, ids, base, pairs);
#pragma unroll
    for (int j = 0; j < AHEAD; j++)
#pragma unroll
      for (int i = 0; i < HELD; i++) {
        const bool mine = held[j] == expert_of(warp, i);
        const u32 votes = __ballot_sync(FULL_WARP, mine);
        if (mine) order[places[i] + __popc(votes & ((1u << lane) - 1))] = base + j * 32 + lane;
        places[i] += __popc(votes);
      }
  }
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    const int expert = expert_of(warp, i);
    if (expert >= NUM_EXPERTS) break;
    for (int at = places[i] + lane; at < first_tile[expert + 1] * BM; at += 32) order[at] = -1;
    for (int t = first_tile[expert] + lane; t < first_tile[expert + 1]; t += 32) tile_expert[t] = expert;
  }
  for (int t = first_tile[NUM_EXPERTS] + threadIdx.x; t < max_tiles; t += SORT_WARPS * 32) tile_expert[t] = -1;
}

// ---- out [S, n] = the sum over choices of weights [S, top_k] times y [pairs, n]. Grid: (S, pieces of 8 * 128 columns).
extern "C" __global__ void __launch_bounds__(128)
    combine(const io_t* __restrict__ y, const float* __restrict__ weights, io_t* __restrict__ out, int n, int top_k) {
  wait_for_kernels_before();
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
