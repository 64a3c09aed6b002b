// Attention over the paged cache on tensor cores: prefill, chunked prefill, draft verification and decode alike.
//
// The query heads that share a key head are packed with the tokens of a sequence: row r of a block's tile is token
// r / GQA, head r % GQA of the group, so keys are read once for all of them and a decode fills a tile of 16 rows. The
// context may be split over blocks; the last of a tile to end joins the partial results (`tickets` [B, Hkv, tiles] start
// and end as 0). Keys and values pass through shared
// memory by cp.async in a ring of STAGES tiles, swizzled so that ldmatrix reads eight rows from eight bank groups.
//
// Warps: WARPS_M by rows, WARPS_N by columns: of the scores a warp of a group of WARPS_N computes BN / WARPS_N keys,
// of the output HEAD_DIM / WARPS_N dimensions; probabilities and maxima then pass through shared memory. With
// WARPS_N = 1 all stays in the warp's registers. Splitting the output dimensions is what makes HEAD_DIM 512 fit.
//
// int8 and e4m3 (-DKV_FP8=1, with KV_8BIT) caches: a 16-byte chunk holds 16 dimensions. An 8x8 matrix of 16-bit elements gives lane (g, t) the bytes
// 4t..4t+3 of row g, or transposed bytes 2g, 2g+1 of rows 2t, 2t+1. So dimension 16c + 4t + j plays the part of mma's
// k-index 16c + {2t, 2t+1, 2t+8, 2t+9}[j], and q is stored in that order too (`load_queries`); output column g of the
// two products over a chunk is dimension 2g and 2g + 1. A key's scale multiplies its column of scores, a value's
// its probabilities; these products are of bfloat16 whatever io_t is, as a scaled probability may be too small for
// float16.
//
// q, out [S, Hq, HEAD_DIM]; k, v [slots, Hkv, HEAD_DIM] with a slot stride; scales [slots, Hkv] with a stride;
// tables [B, max_blocks]; cu_q [B + 1], context [B]; partial [S, Hq, splits, HEAD_DIM], maxima [S, Hq, splits, 2].
// Grid (tiles of rows, Hkv * splits, B). Compile-time: HEAD_DIM, GQA, BM, BN, WARPS_N, STAGES, KV_8BIT, KV_FP8, SPLIT (0:
// `splits` is 1).
// Parts: paged_attn_tile.cuh (layout, loads), paged_attn_mma.cuh (products), paged_attn_softmax.cuh, paged_attn_out.cuh.
// Sources: online softmax, Milakov and Gimelshein 2018 (arXiv:1805.02867); FlashAttention-2, Dao 2023
// (arXiv:2307.08691); flash decoding, Dao et al. 2023; paging, Kwon et al. 2023 (arXiv:2309.06180).
#include "paged_attn_mma.cuh"
#include "paged_attn_out.cuh"
#include "paged_attn_softmax.cuh"

// Tiles of 128 rows and splits are said to be alone: ptxas would rather spill than let two of them have 134 registers
// (sm_80), or eight more than 64.
extern "C" __global__ void __launch_bounds__(THREADS, BM == 128 || SPLIT ? 1 : 0)
    paged_attention(const io_t* __restrict__ q, const kv_t* __restrict__ k, const kv_t* __restrict__ v,
                    const float* __restrict__ k_scales, const float* __restrict__ v_scales,
                    const int* __restrict__ tables, const int* __restrict__ context, const int* __restrict__ cu_q,
                    float* partial, float* maxima, int* tickets, io_t* __restrict__ out, int max_blocks,
                    int block_shift, int slot_stride, int scale_stride, int kv_heads, int splits, int window,
                    float scale, float softcap) {
  wait_for_kernels_before();
  DYN_SMEM(unsigned char, shared);
  // Long tiles first: the last rows of a causal prefill see the most keys.
  const int tile = gridDim.x - 1 - blockIdx.x, b = blockIdx.z;
  const int kv_head = blockIdx.y % kv_heads, split = blockIdx.y / kv_heads;
  const int first_token = cu_q[b], tokens = cu_q[b + 1] - first_token, length = context[b];
  const Rows rows = {tile * BM, tokens * GQA, first_token, kv_heads * GQA, kv_head * GQA};
  if (!rows.has(0)) return;
  const int warp = threadIdx.x / 32, warp_m = warp / WARPS_N, warp_n = warp % WARPS_N;

  // Keys [first, end) are visible to some row of the tile.
  const int before = length - tokens;  // position of the sequence's first token in this step
  const int low_position = before + tile * BM / GQA;
  const int high_position = before + min(tokens - 1, (tile * BM + BM - 1) / GQA);
  const Context c = {k + (s64)kv_head * HEAD_DIM, v + (s64)kv_head * HEAD_DIM, k_scales + kv_head, v_scales + kv_head,
                     tables + (s64)b * max_blocks, window > 0 ? max(0, low_position + 1 - window) : 0,
                     high_position + 1, block_shift, slot_stride, scale_stride};
  int at = c.first / BN * BN;
  const int tiles_a_split = ((c.end - at + BN - 1) / BN + splits - 1) / splits;
  at += split * tiles_a_split * BN;
  const int stop = min(c.end, at + tiles_a_split * BN);

  scale /= NUMBER;
  Mask mask = {{}, window, window > 0 ? high_position + 1 - window : 0, low_position + 1, 0.f, scale * LOG2E, softcap};
  if (softcap > 0.f) mask.inside = scale / softcap, mask.to_log2 = softcap * LOG2E;
#pragma unroll
  for (int i = 0; i < 2; i++)
    mask.position[i] = before + (tile * BM + warp_m * 16 + threadIdx.x % 32 / 4 + 8 * i) / GQA;
  if (at < stop) load_tile(shared, c, at);
  load_queries(shared + Q_AT, q, rows);

  float o[DIMS / 8][4], m[2] = {NEG_INF, NEG_INF}, l[2] = {0.f, 0.f};
#pragma unroll
  for (int n = 0; n < DIMS / 8; n++) o[n][0] = o[n][1] = o[n][2] = o[n][3] = 0.f;

  for (int stage = 0; at < stop; at += BN, stage = (stage + 1) % STAGES) {
    unsigned char* keys = shared + stage * STAGE_BYTES;
    copies_wait<0>();
    __syncthreads();  // this tile is there for all, and all have left the tile before
    if (STAGES > 1 && at + BN < stop) load_tile(shared + (stage + 1) % STAGES * STAGE_BYTES, c, at + BN);

    float s[KEYS / 8][4];
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.f;
    scores(s, shared + Q_AT, keys, warp_m, warp_n);
    float top[2] = {m[0], m[1]};
    mask_scores(s, top, keys, at, mask, warp_n);
    join_maxima(top, shared, warp_m, warp_n);
    rescale_to(top, m, l, o);
    exponentiate(s, m, l, keys, warp_n);
    weigh_values(o, s, shared, keys + TILE_BYTES, warp_m, warp_n);
    if (STAGES == 1 && at + BN < stop) {
      __syncthreads();
      load_tile(shared, c, at + BN);
    }
  }
  join_sums(l, shared, warp_m, warp_n);
#pragma unroll
  for (int i = 0; i < 2; i++) l[i] *= NUMBER;
#if SPLIT
  store_partial(partial, maxima, o, m, l, rows, warp_m, warp_n, split, splits);
  if (is_last(tickets + (b * kv_heads + kv_head) * gridDim.x + tile, splits, shared))
    combine(partial, maxima, out, rows, splits);
#else
  store_rows(out, shared + Q_AT, o, l, rows, warp_m, warp_n);
#endif
}
