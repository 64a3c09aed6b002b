// Attention over the paged cache on tensor cores: prefill, chunked prefill, draft verification and decode alike.
//
// The query heads that share a key head are packed with the tokens of a sequence: row r of a block's tile is token
// r / GQA, head r % GQA of the group, so keys are read once for all of them and a decode fills a tile of 16 rows. The
// context may be split over blocks; `combine` then joins the partial results. Keys and values pass through shared
// memory by cp.async in a ring of STAGES tiles, swizzled so that ldmatrix reads eight rows from eight bank groups.
//
// Warps: WARPS_M by rows, WARPS_N by columns: of the scores a warp of a group of WARPS_N computes BN / WARPS_N keys,
// of the output HEAD_DIM / WARPS_N dimensions; probabilities and maxima then pass through shared memory. With
// WARPS_N = 1 all stays in the warp's registers. Splitting the output dimensions is what makes HEAD_DIM 512 fit.
//
// int8 caches: a 16-byte chunk holds 16 dimensions. An 8x8 matrix of 16-bit elements gives lane (g, t) the bytes
// 4t..4t+3 of row g, or transposed bytes 2g, 2g+1 of rows 2t, 2t+1. So dimension 16c + 4t + j plays the part of mma's
// k-index 16c + {2t, 2t+1, 2t+8, 2t+9}[j], and q is stored in that order too (`load_queries`); output column g of the
// two products over a chunk is dimension 2g and 2g + 1. A key's scale multiplies its column of scores, a value's
// its probabilities; these products are of bfloat16 whatever io_t is, as a scaled probability may be too small for
// float16.
//
// q, out [S, Hq, HEAD_DIM]; k, v [slots, Hkv, HEAD_DIM] with a slot stride; scales [slots, Hkv] with a stride;
// tables [B, max_blocks]; cu_q [B + 1], context [B]; partial [S, Hq, splits, HEAD_DIM], maxima [S, Hq, splits, 2].
// Grid (tiles of rows, Hkv * splits, B). Compile-time: HEAD_DIM, GQA, BM, BN, WARPS_N, STAGES, KV_INT8.
// Sources: online softmax, Milakov and Gimelshein 2018 (arXiv:1805.02867); FlashAttention-2, Dao 2023
// (arXiv:2307.08691); flash decoding, Dao et al. 2023; paging, Kwon et al. 2023 (arXiv:2309.06180).
#include "common.cuh"

#define WARPS_M (BM / 16)
#define WARPS (WARPS_M * WARPS_N)
#define THREADS (WARPS * 32)
#define KEYS (BN / WARPS_N)         // keys of a warp's scores
#define DIMS (HEAD_DIM / WARPS_N)   // dimensions of a warp's output
#define KV_BYTES (KV_INT8 ? 1 : 2)
#define KV_CHUNKS (HEAD_DIM * KV_BYTES / 16)  // 16-byte chunks of a cached row
#define Q_CHUNKS (HEAD_DIM / 8)
#define P_CHUNKS (BN / 8)
#define LOADED (BN / WARPS)         // cached rows that a warp loads

#if KV_INT8
typedef s8 kv_t;
#else
typedef io_t kv_t;
#endif

// ---- shared memory, in bytes
#define TILE_BYTES (BN * HEAD_DIM * KV_BYTES)
#define SCALES_BYTES (KV_INT8 ? 2 * BN * 4 : 0)
#define STAGE_BYTES (2 * TILE_BYTES + SCALES_BYTES)
#define Q_AT (STAGES * STAGE_BYTES)
#define P_AT (Q_AT + BM * HEAD_DIM * 2)
#define MAXIMA_AT (P_AT + (WARPS_N > 1 ? BM * BN * 2 : 0))

// Where chunk `chunk` of row `row` lies, in chunks: any eight neighbouring rows of one chunk column are in eight
// different groups of four banks.
template <int CHUNKS>
DEV int swizzled(int row, int chunk) {
  constexpr int rows_a_line = CHUNKS >= 8 ? 1 : 8 / CHUNKS, mask = CHUNKS >= 8 ? 7 : CHUNKS - 1;
  return row * CHUNKS + (chunk ^ (row / rows_a_line & mask));
}

struct Context {  // what loading a tile needs to know
  const kv_t *k, *v;
  const float *k_scales, *v_scales;
  const int* table;
  int first, end;  // tokens that some row of this block sees
  int block_shift, slot_stride, scale_stride;
};

// Start copying keys and values of tokens [at, at + BN) to a stage; what no row sees is filled with zeros, unread.
DEV void load_tile(unsigned char* stage, const Context& c, int at) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // One table entry per row, looked up by one lane and handed round.
  const int mine = at + warp * LOADED + lane;
  int slot = -1;
  if (lane < LOADED && mine >= c.first && mine < c.end)
    slot = (c.table[mine >> c.block_shift] << c.block_shift) + (mine & ((1 << c.block_shift) - 1));
#pragma unroll
  for (int i = 0; i < LOADED * KV_CHUNKS / 32; i++) {
    const int piece = i * 32 + lane, row = piece / KV_CHUNKS, chunk = piece % KV_CHUNKS;
    const int from = __shfl_sync(FULL_WARP, slot, row);
    const bool seen = from >= 0;
    const s64 offset = seen ? (s64)from * c.slot_stride + chunk * (16 / KV_BYTES) : 0;
    const int to = swizzled<KV_CHUNKS>(warp * LOADED + row, chunk) * 16;
    copy16_async(stage + to, c.k + offset, seen);
    copy16_async(stage + TILE_BYTES + to, c.v + offset, seen);
  }
#if KV_INT8
  if (lane < LOADED) {
    float* scales = reinterpret_cast<float*>(stage + 2 * TILE_BYTES) + warp * LOADED + lane;
    const s64 offset = slot >= 0 ? (s64)slot * c.scale_stride : 0;
    copy4_async(scales, c.k_scales + offset, slot >= 0);
    copy4_async(scales + BN, c.v_scales + offset, slot >= 0);
  }
#endif
  copies_commit();
}

// Queries go to shared memory as they are for 16-bit keys; for int8 each pair of dimensions goes where mma's k-index
// meets the order of the keys' bytes.
DEV void load_queries(unsigned char* to, const io_t* q, int tile, int rows, int first_token, int heads, int head) {
  for (int i = threadIdx.x; i < BM * Q_CHUNKS; i += THREADS) {
    const int row = i / Q_CHUNKS, chunk = i % Q_CHUNKS, r = tile * BM + row;
    vec16 v = {};
    if (r < rows) v = load16(q + ((s64)(first_token + r / GQA) * heads + head + r % GQA) * HEAD_DIM + chunk * 8);
#if KV_INT8
#pragma unroll
    for (int p = 0; p < 4; p++) {
      const int pair = chunk * 4 + p, place = pair / 8 * 8 + pair % 2 * 4 + pair % 8 / 2;
      reinterpret_cast<u32*>(to)[swizzled<Q_CHUNKS>(row, place / 4) * 4 + place % 4] = v.x[p];
    }
#else
    reinterpret_cast<vec16*>(to)[swizzled<Q_CHUNKS>(row, chunk)] = v;
#endif
  }
}

// s [KEYS / 8][4] += q k for this warp's 16 rows and KEYS keys.
DEV void scores(float (*s)[4], const unsigned char* q, const unsigned char* k, int warp_m, int warp_n) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int d = 0; d < HEAD_DIM; d += KV_INT8 ? 64 : 32) {
    u32 a[KV_INT8 ? 4 : 2][4];
#pragma unroll
    for (int i = 0; i < (KV_INT8 ? 4 : 2); i++)
      load_matrices(a[i], q + swizzled<Q_CHUNKS>(warp_m * 16 + lane % 16, d / 8 + i * 2 + lane / 16) * 16);
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) {  // eight keys, four chunks: 32 dimensions, or 64 of int8
      u32 b[4];
      const int row = warp_n * KEYS + n * 8 + lane % 8;
      load_matrices(b, k + swizzled<KV_CHUNKS>(row, d * KV_BYTES / 16 + lane / 8) * 16);
#if KV_INT8
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float x[4];
        bytes_to_floats(b[i], x);
        const u32 pair[2] = {pack_io(x[0], x[1]), pack_io(x[2], x[3])};
        mma_io(s[n], a[i], pair);
      }
#else
      mma_io(s[n], a[0], b);
      mma_io(s[n], a[1], b + 2);
#endif
    }
  }
}

// o [DIMS / 8][4] += p v over keys [32 i, 32 i + 32), p in two fragments of 16 keys.
DEV void accumulate(float (*o)[4], const u32 (*p)[4], const unsigned char* v, int i, int warp_n) {
  const int lane = threadIdx.x % 32;
#if KV_INT8
#pragma unroll
  for (int d = 0; d < DIMS / 16; d++) {  // 32 keys of one chunk: 16 dimensions
    u32 b[4];
    load_matrices_transposed(b, v + swizzled<KV_CHUNKS>(i * 32 + lane, warp_n * (DIMS / 16) + d) * 16);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float x[4], y[4];  // dimensions 2g, 2g+1 of key 2t, then of key 2t+1; y eight keys on
      bytes_to_floats(b[2 * half], x);
      bytes_to_floats(b[2 * half + 1], y);
      const u32 even[2] = {pack_bf16(x[0], x[2]), pack_bf16(y[0], y[2])};
      const u32 odd[2] = {pack_bf16(x[1], x[3]), pack_bf16(y[1], y[3])};
      mma_bf16(o[2 * d], p[half], even);
      mma_bf16(o[2 * d + 1], p[half], odd);
    }
  }
#else
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int d = 0; d < DIMS / 16; d++) {  // 16 keys, two chunks: 16 dimensions
      u32 b[4];
      const int row = i * 32 + half * 16 + lane % 16;
      load_matrices_transposed(b, v + swizzled<KV_CHUNKS>(row, warp_n * (DIMS / 8) + 2 * d + lane / 16) * 16);
      mma_io(o[2 * d], p[half], b);
      mma_io(o[2 * d + 1], p[half], b + 2);
    }
#endif
}

DEV u32 pack_probabilities(float low, float high) {
#if KV_INT8
  return pack_bf16(low, high);
#else
  return pack_io(low, high);
#endif
}

// Two neighbouring dimensions of row i (0: g, 1: g + 8) of this warp's output: pair j of 16 dimensions at 16 d.
// Returns the first one's place among the warp's dimensions.
DEV int output_pair(const float (*o)[4], int d, int j, int i, int t, float2* pair) {
#if KV_INT8
  *pair = make_float2(o[2 * d][2 * i + j], o[2 * d + 1][2 * i + j]);
  return d * 16 + 4 * t + 2 * j;
#else
  *pair = make_float2(o[2 * d + j][2 * i], o[2 * d + j][2 * i + 1]);
  return d * 16 + 8 * j + 2 * t;
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS)
    paged_attention(const io_t* __restrict__ q, const kv_t* __restrict__ k, const kv_t* __restrict__ v,
                    const float* __restrict__ k_scales, const float* __restrict__ v_scales,
                    const int* __restrict__ tables, const int* __restrict__ context, const int* __restrict__ cu_q,
                    float* __restrict__ partial, float* __restrict__ maxima, io_t* __restrict__ out, int max_blocks,
                    int block_shift, int slot_stride, int scale_stride, int kv_heads, int splits, int window,
                    float scale, float softcap) {
  DYN_SMEM(unsigned char, shared);
  // Long tiles first: the last rows of a causal prefill see the most keys.
  const int tile = gridDim.x - 1 - blockIdx.x, b = blockIdx.z;
  const int kv_head = blockIdx.y % kv_heads, split = blockIdx.y / kv_heads;
  const int first_token = cu_q[b], tokens = cu_q[b + 1] - first_token, length = context[b], rows = tokens * GQA;
  if (tile * BM >= rows) return;
  const int warp = threadIdx.x / 32, warp_m = warp / WARPS_N, warp_n = warp % WARPS_N;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;

  // Keys [first, end) are visible to some row of the tile, [all_from, all_to) to every row.
  const int before = length - tokens;  // position of the sequence's first token in this step
  const int low_position = before + tile * BM / GQA;
  const int high_position = before + min(tokens - 1, (tile * BM + BM - 1) / GQA);
  Context c = {k + (s64)kv_head * HEAD_DIM, v + (s64)kv_head * HEAD_DIM, k_scales + kv_head, v_scales + kv_head,
               tables + (s64)b * max_blocks, window > 0 ? max(0, low_position + 1 - window) : 0, high_position + 1,
               block_shift, slot_stride, scale_stride};
  const int all_from = window > 0 ? high_position + 1 - window : 0, all_to = low_position + 1;
  int at = c.first / BN * BN;
  const int tiles_a_split = ((c.end - at + BN - 1) / BN + splits - 1) / splits;
  at += split * tiles_a_split * BN;
  const int stop = min(c.end, at + tiles_a_split * BN);

  int position[2];
#pragma unroll
  for (int i = 0; i < 2; i++) position[i] = before + (tile * BM + warp_m * 16 + g + 8 * i) / GQA;
  if (at < stop) load_tile(shared, c, at);
  load_queries(shared + Q_AT, q, tile, rows, first_token, kv_heads * GQA, kv_head * GQA);

  float o[DIMS / 8][4], m[2] = {NEG_INF, NEG_INF}, l[2] = {0.f, 0.f};
#pragma unroll
  for (int n = 0; n < DIMS / 8; n++) o[n][0] = o[n][1] = o[n][2] = o[n][3] = 0.f;
  const float to_log2 = softcap > 0.f ? softcap * LOG2E : scale * LOG2E, inside = softcap > 0.f ? scale / softcap : 0.f;

  for (int stage = 0; at < stop; at += BN, stage = (stage + 1) % STAGES) {
    unsigned char* keys = shared + stage * STAGE_BYTES;
    copies_wait<0>();
    __syncthreads();  // this tile is there for all, and all have left the tile before
    if (STAGES > 1 && at + BN < stop) load_tile(shared + (stage + 1) % STAGES * STAGE_BYTES, c, at + BN);

    float s[KEYS / 8][4];
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.f;
    scores(s, shared + Q_AT, keys, warp_m, warp_n);

    const bool masked = at < all_from || at + BN > all_to;
    float top[2] = {m[0], m[1]};
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int column = warp_n * KEYS + n * 8 + 2 * t + e % 2, key = at + column, row = e / 2;
        float x = s[n][e];
#if KV_INT8
        x *= reinterpret_cast<const float*>(keys + 2 * TILE_BYTES)[column];
#endif
        if (softcap > 0.f) x = tanh_fast(x * inside);
        x *= to_log2;
        if (masked && (key > position[row] || (window > 0 && key <= position[row] - window))) x = NEG_INF;
        s[n][e] = x;
        top[row] = fmaxf(top[row], x);
      }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      top[i] = fmaxf(top[i], __shfl_xor_sync(FULL_WARP, top[i], 1));
      top[i] = fmaxf(top[i], __shfl_xor_sync(FULL_WARP, top[i], 2));
    }
#if WARPS_N > 1
    float* tops = reinterpret_cast<float*>(shared + MAXIMA_AT) + warp_m * 16;  // [WARPS_N][BM]
    if (t == 0)
      for (int i = 0; i < 2; i++) tops[warp_n * BM + g + 8 * i] = top[i];
    __syncthreads();
#pragma unroll
    for (int w = 0; w < WARPS_N; w++)
      for (int i = 0; i < 2; i++) top[i] = fmaxf(top[i], tops[w * BM + g + 8 * i]);
#endif
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float rescale = exp2_fast(m[i] - top[i]);
      m[i] = top[i];
      l[i] *= rescale;
#pragma unroll
      for (int n = 0; n < DIMS / 8; n++) {
        o[n][2 * i] *= rescale;
        o[n][2 * i + 1] *= rescale;
      }
    }
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        float p = s[n][e] <= NEG_INF ? 0.f : exp2_fast(s[n][e] - m[e / 2]);
        l[e / 2] += p;
#if KV_INT8
        p *= reinterpret_cast<const float*>(keys + 2 * TILE_BYTES)[BN + warp_n * KEYS + n * 8 + 2 * t + e % 2];
#endif
        s[n][e] = p;
      }

#if WARPS_N > 1
    unsigned char* probabilities = shared + P_AT;
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
      for (int i = 0; i < 2; i++) {
        const int chunk = swizzled<P_CHUNKS>(warp_m * 16 + g + 8 * i, (warp_n * KEYS) / 8 + n);
        reinterpret_cast<u32*>(probabilities)[chunk * 4 + t] = pack_probabilities(s[n][2 * i], s[n][2 * i + 1]);
      }
    __syncthreads();
#endif
#pragma unroll
    for (int i = 0; i < BN / 32; i++) {
      u32 p[2][4];
#pragma unroll
      for (int half = 0; half < 2; half++) {
#if WARPS_N > 1
        const int chunk = i * 4 + half * 2 + lane / 16;
        load_matrices(p[half], probabilities + swizzled<P_CHUNKS>(warp_m * 16 + lane % 16, chunk) * 16);
#else
        const int n = i * 4 + half * 2;
        p[half][0] = pack_probabilities(s[n][0], s[n][1]);
        p[half][1] = pack_probabilities(s[n][2], s[n][3]);
        p[half][2] = pack_probabilities(s[n + 1][0], s[n + 1][1]);
        p[half][3] = pack_probabilities(s[n + 1][2], s[n + 1][3]);
#endif
      }
      accumulate(o, p, keys + TILE_BYTES, i, warp_n);
    }
    if (STAGES == 1 && at + BN < stop) {
      __syncthreads();
      load_tile(shared, c, at + BN);
    }
  }

#pragma unroll
  for (int i = 0; i < 2; i++) {
    l[i] += __shfl_xor_sync(FULL_WARP, l[i], 1);
    l[i] += __shfl_xor_sync(FULL_WARP, l[i], 2);
  }
#if WARPS_N > 1
  float* sums = reinterpret_cast<float*>(shared + MAXIMA_AT) + warp_m * 16;
  __syncthreads();  // the last maxima have been read
  if (t == 0)
    for (int i = 0; i < 2; i++) sums[warp_n * BM + g + 8 * i] = l[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; i++) {
    l[i] = 0.f;
    for (int w = 0; w < WARPS_N; w++) l[i] += sums[w * BM + g + 8 * i];
  }
#endif

  if (splits > 1) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int r = tile * BM + warp_m * 16 + g + 8 * i;
      if (r >= rows) continue;
      const s64 row = ((s64)(first_token + r / GQA) * kv_heads * GQA + kv_head * GQA + r % GQA) * splits + split;
      if (warp_n == 0 && t == 0) {
        maxima[row * 2] = m[i];
        maxima[row * 2 + 1] = l[i];
      }
      if (l[i] == 0.f) continue;  // `combine` reads the sum first
      float* place = partial + row * HEAD_DIM + warp_n * DIMS;
#pragma unroll
      for (int d = 0; d < DIMS / 16; d++)
        for (int j = 0; j < 2; j++) {
          float2 pair;
          const int at_dimension = output_pair(o, d, j, i, t, &pair);
          *reinterpret_cast<float2*>(place + at_dimension) = pair;
        }
    }
    return;
  }
  // Through the queries' place in shared memory, so that whole sectors are written.
  unsigned char* result = shared + Q_AT;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const float inverse = l[i] > 0.f ? 1.f / l[i] : 0.f;
    const int row = warp_m * 16 + g + 8 * i;
#pragma unroll
    for (int d = 0; d < DIMS / 16; d++)
      for (int j = 0; j < 2; j++) {
        float2 pair;
        const int dimension = warp_n * DIMS + output_pair(o, d, j, i, t, &pair);
        const int place = swizzled<Q_CHUNKS>(row, dimension / 8) * 4 + dimension % 8 / 2;
        reinterpret_cast<u32*>(result)[place] = pack_io(pair.x * inverse, pair.y * inverse);
      }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < BM * Q_CHUNKS; i += THREADS) {
    const int row = i / Q_CHUNKS, chunk = i % Q_CHUNKS, r = tile * BM + row;
    if (r >= rows) break;
    const s64 place = (s64)(first_token + r / GQA) * kv_heads * GQA + kv_head * GQA + r % GQA;
    *reinterpret_cast<vec16*>(out + place * HEAD_DIM + chunk * 8) =
        *reinterpret_cast<const vec16*>(result + swizzled<Q_CHUNKS>(row, chunk) * 16);
  }
}

// Join the splits of each (token, head): one warp a row. Grid: rows.
extern "C" __global__ void __launch_bounds__(32)
    combine(const float* __restrict__ partial, const float* __restrict__ maxima, io_t* __restrict__ out, int splits) {
  const s64 row = blockIdx.x;
  const int lane = threadIdx.x;
  float top = NEG_INF, total = 0.f, o[HEAD_DIM / 32] = {};
  for (int s = 0; s < splits; s++) {
    const float m = maxima[(row * splits + s) * 2], l = maxima[(row * splits + s) * 2 + 1];
    if (l == 0.f) continue;  // this split had no visible key and wrote nothing
    const float higher = fmaxf(top, m), mine = exp2_fast(m - higher), rest = exp2_fast(top - higher);
    top = higher;
    total = total * rest + l * mine;
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 64; i++) {
      const float2 x = *reinterpret_cast<const float2*>(partial + (row * splits + s) * HEAD_DIM + i * 64 + lane * 2);
      o[2 * i] = o[2 * i] * rest + x.x * mine;
      o[2 * i + 1] = o[2 * i + 1] * rest + x.y * mine;
    }
  }
  const float inverse = total > 0.f ? 1.f / total : 0.f;
#pragma unroll
  for (int i = 0; i < HEAD_DIM / 64; i++)
    *reinterpret_cast<u32*>(out + row * HEAD_DIM + i * 64 + lane * 2) =
        pack_io(o[2 * i] * inverse, o[2 * i + 1] * inverse);
}
