// Attention over the paged cache on tensor cores: prefill, chunked prefill, draft verification and decode alike.
//
// The query heads that share a key head are packed with the tokens of a sequence: row r of a block's tile is token
// r / GQA, head r % GQA of the group, so keys are read once for all of them and a decode fills a tile of 16 rows. Keys and
// values pass through shared memory by cp.async in a ring of STAGES tiles, swizzled so that ldmatrix reads eight rows from
// eight bank groups.
//
// A block has a tile of rows and all its keys; or (-DSPLIT=1) an equal piece of all that a key head has to do
// (paged_attn_work.cuh): the end of one context, some whole ones, the beginning of another. The last block to end with a
// context joins its parts: a block's first and last part have a place in `partial`, and a context the ticket of the block
// that begins it (`tickets` [blocks, Hkv] start and end as 0).
//
// Warps: WARPS_M by rows, each with WARP_ROWS, and WARPS_N by columns: of the scores a warp of a group of WARPS_N computes
// BN / WARPS_N keys, of the output TILED / WARPS_N dimensions; probabilities and maxima then pass through shared memory. With
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
// tables [B, max_blocks]; cu_q [B + 1], context [B]; partial [blocks, Hkv, 2, BM, TILED], maxima [blocks, Hkv, 2, BM, 2].
// Grid (tiles of rows, Hkv, B), or (-DSPLIT=1) (blocks, Hkv): of each, least_tiles of keys if a context has as many.
// Compile-time: HEAD_DIM, GQA, BM, BN, WARP_ROWS (16 or 32), WARPS_N, STAGES, KV_8BIT, KV_FP8, SPLIT, WINDOW and SOFTCAP (0:
// not looked at), BLOCKS (that share a multiprocessor).
// Parts: paged_attn_tile.cuh (layout, loads), paged_attn_work.cuh, paged_attn_mma.cuh (products), paged_attn_softmax.cuh,
// paged_attn_out.cuh.
// Sources: online softmax, Milakov and Gimelshein 2018 (arXiv:1805.02867); FlashAttention-2, Dao 2023
// (arXiv:2307.08691); flash decoding, Dao et al. 2023; paging, Kwon et al. 2023 (arXiv:2309.06180).
#include "paged_attn_mma.cuh"
#include "paged_attn_out.cuh"
#include "paged_attn_softmax.cuh"
#include "paged_attn_work.cuh"

struct Inputs {
  const io_t* q;
  const kv_t *k, *v;
  const float *k_scales, *v_scales;
  const int* tables;
  float *partial, *maxima;
  int* tickets;
  io_t* out;
  int max_blocks, block_shift, slot_stride, scale_stride, window;
  float inside, to_log2;
};

DEV Rows rows_of(const Part& part) {
  return {part.tile * BM, part.own.tokens * GQA, part.own.first_token, (int)gridDim.y * GQA, (int)blockIdx.y * GQA};
}

// o [FRAGMENTS][DIMS / 8][4], and of each row its maximum m and its sum l: those of a tile of rows over keys [at, stop).
DEV void attend(float (*o)[DIMS / 8][4], float (*m)[2], float (*l)[2], unsigned char* shared, const io_t* q,
                const Rows& rows, const Context& c, Mask mask, int at, int stop) {
  const int warp = threadIdx.x / 32, warp_m = warp / WARPS_N, warp_n = warp % WARPS_N;
#pragma unroll
  for (int i = 0; i < 2 * FRAGMENTS; i++) {
    mask.position[i / 2][i % 2] = mask.before + (rows.first + warp_m * WARP_ROWS + threadIdx.x % 32 / 4 + 8 * i) / GQA;
    m[i / 2][i % 2] = NEG_INF;
    l[i / 2][i % 2] = 0.f;
  }
#pragma unroll 1
  for (int s = 0; s < (STAGES > 1 ? STAGES - 1 : 1); s++) {
    if (at + s * BN < stop) load_tile(shared + s * STAGE_BYTES, c, at + s * BN);
    copies_commit();
  }
  load_queries(shared + Q_AT, q, rows);
#pragma unroll
  for (int i = 0; i < FRAGMENTS * DIMS / 2; i++) o[i / (DIMS / 2)][i / 4 % (DIMS / 8)][i % 4] = 0.f;

  for (int stage = 0; at < stop; at += BN, stage = stage + 1 < STAGES ? stage + 1 : 0) {
    unsigned char* keys = shared + stage * STAGE_BYTES;
    copies_wait<(STAGES > 1 ? STAGES - 2 : 0)>();
    __syncthreads();  // this tile is there for all, and all have left the tile before
    if (STAGES > 1) {
      const int ahead = at + (STAGES - 1) * BN;
      if (ahead < stop) load_tile(shared + (stage ? stage - 1 : STAGES - 1) * STAGE_BYTES, c, ahead);
      copies_commit();
    }
    float s[FRAGMENTS][KEYS / 8][4] = {};
    scores(s, shared + Q_AT, keys, warp_m, warp_n);
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++) {
      float top[2] = {m[f][0], m[f][1]};
      if (at < mask.all_from || at + BN > mask.all_to)
        mask_scores<true>(s[f], top, keys, at, mask, f, warp_n);
      else
        mask_scores<false>(s[f], top, keys, at, mask, f, warp_n);
      join_maxima(top, shared, warp_m * FRAGMENTS + f, warp_n);
      rescale_to(top, m[f], l[f], o[f], mask.to_log2);
      exponentiate(s[f], m[f], l[f], keys, mask.to_log2, warp_n);
    }
    weigh_values(o, s, shared, keys + TILE_BYTES, warp_m, warp_n);
    if (STAGES == 1 && at + BN < stop) {
      __syncthreads();
      load_tile(shared, c, at + BN);
      copies_commit();
    }
  }
  copies_wait<0>();
#pragma unroll
  for (int f = 0; f < FRAGMENTS; f++) {
    join_sums(l[f], shared, warp_m * FRAGMENTS + f, warp_n);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      m[f][i] *= mask.to_log2;
      l[f][i] *= NUMBER;
    }
  }
}

// `part` may be in shared memory, and what `in` holds are the kernel's arguments: a tile needs all registers.
DEV void attend_to_part(unsigned char* shared, const Inputs& in, const Part& part) {
  const int kv_head = blockIdx.y;
  float o[FRAGMENTS][DIMS / 8][4], m[FRAGMENTS][2], l[FRAGMENTS][2];
  {
    const Rows rows = rows_of(part);
    // Keys [first, end) are visible to some row of the tile.
    const int before = part.own.before, low = before + rows.first / GQA;
    const int high = before + min(part.own.tokens - 1, (rows.first + BM - 1) / GQA);
    const Context c = {in.k + (s64)kv_head * HEAD_DIM, in.v + (s64)kv_head * HEAD_DIM, in.k_scales + kv_head,
                       in.v_scales + kv_head, in.tables + (s64)part.b * in.max_blocks,
                       WINDOW ? max(0, low + 1 - in.window) : 0, high + 1, in.block_shift, in.slot_stride,
                       in.scale_stride};
    const Mask mask = {{}, before, in.window, WINDOW ? high + 1 - in.window : 0, low + 1, in.inside, in.to_log2};
    const int at = (part.own.first_tile(in.window) + part.from) * BN, stop = min(c.end, at + part.take * BN);
    attend(o, m, l, shared, in.q, rows, c, mask, max(at, c.first / BN * BN), stop);
  }
  const Rows rows = rows_of(part);
  const int warp_m = threadIdx.x / 32 / WARPS_N, warp_n = threadIdx.x / 32 % WARPS_N;
  if (SPLIT && part.parts.count() > 1) {
    const Parts parts = part.parts;
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++)
      store_partial(in.partial, in.maxima, o[f], m[f], l[f], rows, warp_m * FRAGMENTS + f, warp_n,
                    parts.place(blockIdx.x));
    if (is_last(in.tickets + parts.place(parts.first) / 2, parts.count(), shared))
      combine(in.partial, in.maxima, in.out, rows, parts, shared);
  } else {
    store_rows(in.out, shared + Q_AT, o, l, rows, warp_m, warp_n);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    paged_attention(const io_t* __restrict__ q, const kv_t* __restrict__ k, const kv_t* __restrict__ v,
                    const float* __restrict__ k_scales, const float* __restrict__ v_scales,
                    const int* __restrict__ tables, const int* __restrict__ context, const int* __restrict__ cu_q,
                    float* partial, float* maxima, int* tickets, io_t* __restrict__ out, int sequences, int max_blocks,
                    int block_shift, int slot_stride, int scale_stride, int least_tiles, int window, float scale,
                    float softcap) {
  wait_for_kernels_before();
  DYN_SMEM(unsigned char, shared);
  scale /= NUMBER;
  const Inputs in = {q, k, v, k_scales, v_scales, tables, partial, maxima, tickets, out,
                     max_blocks, block_shift, slot_stride, scale_stride, window,
                     SOFTCAP ? scale / softcap : 0.f, (SOFTCAP ? softcap : scale) * LOG2E};
#if SPLIT
  Piece* piece = reinterpret_cast<Piece*>(shared + PIECE_AT);
  Part* part = reinterpret_cast<Part*>(shared + PART_AT);
  const Piece whole = own_piece(cu_q, context, sequences, window, least_tiles);
  if (whole.at >= whole.end) return;
  if (threadIdx.x == 0) {
    *piece = whole;
    *part = whole.part(cu_q, context, window);
  }
  __syncthreads();
  while (true) {
    attend_to_part(shared, in, *part);
    if (threadIdx.x == 0) {  // all have read this part: `store_rows` and `is_last` waited for that
      piece->advance(part->take, cu_q, context, window);
      if (piece->at < piece->end) *part = piece->part(cu_q, context, window);
    }
    __syncthreads();  // the next part is there for all
    if (piece->at >= piece->end) break;
  }
#else
  // Long tiles first: the last rows of a causal prefill see the most keys.
  const Sequence own = sequence_of(cu_q, context, blockIdx.z);
  const int tile = gridDim.x - 1 - blockIdx.x;
  if (tile < own.row_tiles())
    attend_to_part(shared, in, {own, (int)blockIdx.z, tile, 0, own.key_tiles(window), {0, 0}});
#endif
}
