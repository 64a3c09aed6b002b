// Paged attention, first part: how a block's shared memory is laid out, and how queries, keys and values get there.
#pragma once
#include "common.cuh"

#define FRAGMENTS (WARP_ROWS / 16)  // sixteen rows each, that a warp has: what it reads of keys and values serves all of them
#define WARPS_M (BM / WARP_ROWS)
#define WARPS (WARPS_M * WARPS_N)
#define THREADS (WARPS * 32)
#define KEYS (BN / WARPS_N)         // keys of a warp's scores
// Dimensions of a row in shared memory: a power of two, as swizzling needs; those past HEAD_DIM (80 or 96) are zeros.
#define TILED (HEAD_DIM > 64 && HEAD_DIM < 128 ? 128 : HEAD_DIM)
#define DIMS (WARPS_N == 1 ? HEAD_DIM : TILED / WARPS_N)  // dimensions of a warp's output
#define KV_BYTES (KV_8BIT ? 1 : 2)
#define KV_CHUNKS (TILED * KV_BYTES / 16)  // 16-byte chunks of a row of keys
#define Q_CHUNKS (TILED / 8)
#define P_CHUNKS (BN / 8)
#define LOADED (BN / WARPS)         // cached rows that a warp loads
#define MAX_PARTS 64                // of a context: two for each lane of a warp that joins them

#if KV_FP8
typedef u8 kv_t;
#define NUMBER 0x1p-8f  // what a number's float is times
DEV void widen_numbers(u32 bytes, float* out) { fp8_to_floats(bytes, out); }
#elif KV_8BIT
typedef s8 kv_t;
#define NUMBER 1.f
DEV void widen_numbers(u32 bytes, float* out) { bytes_to_floats(bytes, out); }
#else
typedef io_t kv_t;
#define NUMBER 1.f
#endif

// ---- shared memory, in bytes
#define TILE_BYTES (BN * TILED * KV_BYTES)
#define SCALES_BYTES (KV_8BIT ? 2 * BN * 4 : 0)
#define STAGE_BYTES (2 * TILE_BYTES + SCALES_BYTES)
#define Q_AT (STAGES * STAGE_BYTES)
#define P_AT (Q_AT + BM * TILED * 2)
#define MAXIMA_AT (P_AT + (WARPS_N > 1 ? BM * BN * 2 : 0))
#define PART_AT (MAXIMA_AT + (WARPS_N > 1 ? WARPS_N * BM * 4 : 0))
#define PIECE_AT (PART_AT + 64)
// Once a tile's rows are done, what their parts count for: [BM][MAX_PARTS], behind the word of `is_last`.
#define WEIGHTS_AT 128
static_assert(!SPLIT || WEIGHTS_AT + BM * MAX_PARTS * 4 <= P_AT, "shared memory holds the weights of the parts");

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
    const bool seen = from >= 0 && (TILED == HEAD_DIM || chunk < HEAD_DIM * KV_BYTES / 16);
    const s64 offset = seen ? (s64)from * c.slot_stride + chunk * (16 / KV_BYTES) : 0;
    const int to = swizzled<KV_CHUNKS>(warp * LOADED + row, chunk) * 16;
    copy16_async(stage + to, c.k + offset, seen);
    copy16_async(stage + TILE_BYTES + to, c.v + offset, seen);
  }
#if KV_8BIT
  if (lane < LOADED) {
    float* scales = reinterpret_cast<float*>(stage + 2 * TILE_BYTES) + warp * LOADED + lane;
    const s64 offset = slot >= 0 ? (s64)slot * c.scale_stride : 0;
    copy4_async(scales, c.k_scales + offset, slot >= 0);
    copy4_async(scales + BN, c.v_scales + offset, slot >= 0);
  }
#endif
}

// The rows of a block's tile: row r is a token and a query head of the group, places are in units of HEAD_DIM.
struct Rows {
  int first, count;  // of the sequence's tokens times GQA
  int first_token, heads, head;
  DEV bool has(int r) const { return first + r < count; }
  DEV s64 place(int r) const { return (s64)(first_token + (first + r) / GQA) * heads + head + (first + r) % GQA; }
};

// Queries go to shared memory as they are for 16-bit keys; for 8-bit ones each pair of dimensions goes where mma's k-index
// meets the order of the keys' bytes.
DEV void load_queries(unsigned char* to, const io_t* q, const Rows& rows) {
  for (int i = threadIdx.x; i < BM * Q_CHUNKS; i += THREADS) {
    const int row = i / Q_CHUNKS, chunk = i % Q_CHUNKS;
    vec16 v = {};
    if (rows.has(row) && (TILED == HEAD_DIM || chunk < HEAD_DIM / 8)) v = load16(q + rows.place(row) * HEAD_DIM + chunk * 8);
#if KV_8BIT
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
