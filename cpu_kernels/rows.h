// How activations are laid out for a product: in rows that the inner loops read, a tile of rows at a time. 8-bit weights
// and blocks meet activations quantised on the spot, with a scale for each row and BLOCK inputs.
#pragma once
#include "panels.h"

// Rows of a tile: as many as there are registers for, and fewer, so that a few tiles of both make up almost any number.
constexpr int MOST_ROWS = LANES == 16 ? 12 : 6, FEWER_ROWS = LANES == 16 ? 8 : 4;

// Rows of activations as the inner loops read them: float32; bfloat16 where the processor multiplies it; or integers,
// quantised. A sum of integers is over `piece` inputs: BLOCK, or the group of blocks if that is smaller.
struct Rows {
  const u8* data;    // rows of `stride` bytes
  i64 stride;
  const f32* scale;  // quantised: [rows][blocks]
  const i32* start;  // quantised: [rows][pieces], what the sums start from
  const f32* total;  // quantised: [rows][pieces], the sum of the integers
  i64 blocks, pieces;
  INLINE const u8* row(const Rows& x, i64 r) { return x.data + r * x.stride; }
};

// Call f with the number of rows of a tile as a constant.
template <class F>
INLINE void with_rows(i64 rows, F&& f) {
  using std::integral_constant;
  switch (rows) {
    case 1: return f(integral_constant<int, 1>{});
    case 2: return f(integral_constant<int, 2>{});
    case 3: return f(integral_constant<int, 3>{});
    case 4: return f(integral_constant<int, 4>{});
    case 6: return f(integral_constant<int, 6>{});
    case 8: return f(integral_constant<int, FEWER_ROWS>{});
    default: return f(integral_constant<int, MOST_ROWS>{});
  }
}
INLINE i64 tile_rows(i64 rows) {
  for (i64 size : {1, 2, 3, 4, 6, 8})
    if (size >= rows && size <= MOST_ROWS) return size;
  return MOST_ROWS;
}


// How the rows of x are divided into tiles, `large` of MOST_ROWS and then smaller ones, and where they are. Blocks need
// registers for their scales, too: their tiles are small.
struct Layout {
  i64 tiles, large, small_rows, inputs, input_bytes, stride, blocks, piece, pieces;
  u8* memory = nullptr;
  explicit Layout(const Product& p) {
    const i64 most = is_blocks(p.kind) ? FEWER_ROWS : MOST_ROWS;
    tiles = (p.rows + most - 1) / most;
    small_rows = tiles == 1 ? tile_rows(p.rows) : FEWER_ROWS;
    large = 0;
    if (tiles > 1 && most > FEWER_ROWS)
      large = std::max<i64>(0, tiles - (tiles * MOST_ROWS - p.rows) / (MOST_ROWS - FEWER_ROWS));
    inputs = padded_inputs(p.kind, p.inputs);
    blocks = is_quantised(p.kind) ? (inputs + BLOCK - 1) / BLOCK : 0;
    piece = is_blocks(p.kind) ? Scaling(p.kind).piece() : BLOCK;
    pieces = blocks * (BLOCK / piece);
    input_bytes = type_of(p.kind) == B4 ? 1 : blocks ? 4 / DOT : p.kind == BF16 && BF16_DOT ? 2 : 4;
    // An odd number of cache lines, so that the rows of a tile do not share a set of the cache.
    stride = (((blocks ? blocks * BLOCK : inputs) * input_bytes + 63) / 64 | 1) * 64;
  }
  i64 tile_size(i64 tile) const { return tile < large ? MOST_ROWS : small_rows; }
  i64 first_row(i64 tile) const {
    return std::min(tile, large) * MOST_ROWS + std::max<i64>(0, tile - large) * small_rows;
  }
  i64 rows() const { return first_row(tiles); }
  i64 bytes() const { return rows() * (stride + blocks * 4 + pieces * 8); }
  // Rows from `row` on, their inputs from `input` on.
  Rows from(i64 row, i64 input) const {
    const f32 *scale = (const f32*)(memory + rows() * stride), *start = scale + rows() * blocks;
    const f32* total = start + rows() * pieces;
    return {memory + row * stride + input * input_bytes, stride, scale + row * blocks, (const i32*)start + row * pieces,
            total + row * pieces, blocks, pieces};
  }
};

// Quantise BLOCK inputs of a row. A number that is not finite makes the scale NaN, and so the row's outputs.
static void quantise(const f32* values, i64 block, const Layout& layout, const Rows& out) {
  vf most = {}, check = {};
  for (int i = 0; i < BLOCK; i += LANES) {
    const vf v = Float32::load(values + i);
    most = larger(most, larger(v, -v));
    check += v * 0.f;
  }
  const f32 scale = largest(most) / 127.f, inverse = scale > 0 ? 1.f / scale : 0.f;
  ((f32*)out.scale)[block] = scale + sum(check);
  alignas(64) i32 whole[BLOCK];
  for (int i = 0; i < BLOCK; i += LANES) {
    vf v = Float32::load(values + i) * inverse;
    v = v > 127.f ? all(127.f) : v < -127.f ? all(-127.f) : v == v ? v : vf{};
    const vf magic = all(12582912.f);
    const vi numbers = bits_as<vi>(v + magic) - bits_as<vi>(magic);
    memcpy(whole + i, &numbers, sizeof numbers);
  }
  u8* to = (u8*)out.data + block * BLOCK * layout.input_bytes;
  for (int i = 0; i < BLOCK; i++) {
    if (layout.input_bytes == 1) ((s8*)to)[i] = (s8)whole[i];
    else ((s16*)to)[i] = (s16)whole[i];
  }
  for (i64 first = 0; first < BLOCK; first += layout.piece) {
    i32 total = 0;
    for (i64 i = first; i < first + layout.piece; i++) total += whole[i];
    const i64 at = (block * BLOCK + first) / layout.piece;
    ((i32*)out.start)[at] = -DOT_OFFSET * total;
    ((f32*)out.total)[at] = (f32)total;
  }
}

// Bring one row of activations into the form that the inner loops read.
template <class T>
void lay_row(const Product& p, const Layout& layout, i64 row) {
  const Rows out = layout.from(row, 0);
  const auto* x = (const typename T::type*)p.x + (p.index ? p.index[row] : row) * p.x_stride;
  if (layout.blocks) {
    f32 values[BLOCK];
    for (i64 block = 0; block < layout.blocks; block++) {
      for (i64 i = 0, left = p.inputs - block * BLOCK; i < BLOCK; i += LANES, left -= LANES)
        Float32::store(values + i, load<T>(x + (left > 0 ? block * BLOCK + i : 0), std::max<i64>(0, left)));
      quantise(values, block, layout, out);
    }
  } else if (p.kind == BF16 && BF16_DOT) {
    memcpy((u8*)out.data, x, p.inputs * 2);
    memset((u8*)out.data + p.inputs * 2, 0, (layout.inputs - p.inputs) * 2);
  } else {
    for (i64 k = 0, left = p.inputs; k < layout.inputs; k += LANES, left -= LANES)
      store<Float32>((f32*)out.data + k, load<T>(x + (left > 0 ? k : 0), std::max<i64>(0, left)), layout.inputs - k);
  }
}
