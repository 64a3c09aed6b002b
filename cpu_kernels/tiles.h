// The inner loops of products: a few rows of activations times a panel, or times a piece of its inputs.
//
// Few rows read weights as they are stored, once, at the memory's rate. Where several tiles of rows use a panel, a piece
// of it is first widened to what the arithmetic takes, and stays in the second-level cache for all of them.
#pragma once
#include "blocks.h"

constexpr int PIECE = 1024;  // inputs that are widened at a time: 128 KiB with AVX-512

constexpr bool is_wide(i64 kind) { return kind == F32 || (kind == S8 && DOT == 4) || (kind == BF16 && BF16_DOT); }

template <class W>
INLINE void widen_numbers(const u8* from, i64 count, f32* room) {
  const auto* w = (const typename W::type*)from;
  for (i64 i = 0; i < count; i += LANES) Float32::store(room + i, W::load(w + i));
}
// Return `inputs` of a panel from `first` on, widened. `room` is for PIECE inputs.
INLINE const u8* widened(i64 kind, const u8* panel, i64 first, i64 inputs, u8* room) {
  const u8* from = panel + first * PANEL * size_of(kind);
  if (is_wide(kind)) return from;
  if (kind == F16) widen_numbers<Float16>(from, inputs * PANEL, (f32*)room);
  if (kind == S8_EXACT) widen_numbers<Int8>(from, inputs * PANEL, (f32*)room);
  if (kind == BF16) {
    for (i64 k = 0; k < inputs; k += 2)
      for (int v = 0; v < VECTORS; v++) {
        const vu pair = load_bits<vu>(from + (k * PANEL + v * 2 * LANES) * 2);
        f32* to = (f32*)room + k * PANEL + v * LANES;
        Float32::store(to, bits_as<vf>(pair << 16));
        Float32::store(to + PANEL, bits_as<vf>(pair & 0xffff0000u));
      }
  }
  if (kind == S8)
    for (i64 i = 0; i < inputs * PANEL; i += 2 * LANES) {
      const vi pairs = widened_pairs(from + i);
      memcpy(room + 2 * i, &pairs, sizeof pairs);
    }
  return room;
}

// Add sums, of which every UNROLLth input has its own, to out [ROWS][PANEL]. They are in memory, not in registers that the
// inner loops need.
template <int ROWS, int UNROLL>
INLINE void add_up(const vf (&sum)[UNROLL][ROWS][VECTORS], f32* out) {
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECTORS; v++) {
      vf total = Float32::load(out + r * PANEL + v * LANES) + sum[0][r][v];
      for (int u = 1; u < UNROLL; u++) total += sum[u][r][v];
      Float32::store(out + r * PANEL + v * LANES, total);
    }
}

// Add to the sums of ROWS rows with weights. UNROLL inputs have sums of their own: few rows would wait for their own
// additions.
template <class W, int ROWS, int UNROLL, bool FETCH>
INLINE void add_wide(const Rows& x, const u8* weights, i64 inputs, const Next& next, f32* out) {
  vf sum[UNROLL][ROWS][VECTORS] = {};
  const auto* w = (const typename W::type*)weights;
  const auto add = [&](i64 k, int u) __attribute__((always_inline)) {
    vf one[VECTORS];
    for (int v = 0; v < VECTORS; v++) one[v] = in_register(W::load(w + k * PANEL + v * LANES));
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < VECTORS; v++) sum[u][r][v] += ((const f32*)Rows::row(x, r))[k] * one[v];
    Next::fetch<FETCH>(next, k, next.bytes);
  };
  i64 k = 0;
  for (; k + UNROLL <= inputs; k += UNROLL)
    for (int u = 0; u < UNROLL; u++) add(k + u, u);
  for (; k < inputs; k++) add(k, 0);
  add_up(sum, out);
}

// The same for bfloat16, whose inputs stand in pairs.
template <int ROWS, int UNROLL, bool FETCH>
INLINE void add_pairs(const Rows& x, const u8* weights, i64 inputs, const Next& next, f32* out) {
  vf sum[UNROLL][ROWS][VECTORS] = {};
  const auto* w = (const u32*)weights;
  const auto add = [&](i64 k, int u) __attribute__((always_inline)) {
    vu pair[VECTORS];
    for (int v = 0; v < VECTORS; v++) pair[v] = load_bits<vu>(w + k * PANEL + v * LANES);
    for (int r = 0; r < ROWS; r++) {
      for (int v = 0; v < VECTORS; v++) {
        if constexpr (BF16_DOT) {
          sum[u][r][v] = dot_bf16(sum[u][r][v], pair[v], ((const u32*)Rows::row(x, r))[k]);
        } else {
          const f32* a = (const f32*)Rows::row(x, r) + 2 * k;
          sum[u][r][v] += a[0] * bits_as<vf>(pair[v] << 16);
          sum[u][r][v] += a[1] * bits_as<vf>(pair[v] & 0xffff0000u);
        }
      }
    }
    Next::fetch<FETCH>(next, 2 * k, 2 * next.bytes);
  };
  i64 k = 0;
  for (; k + UNROLL <= inputs / 2; k += UNROLL)
    for (int u = 0; u < UNROLL; u++) add(k + u, u);
  for (; k < inputs / 2; k++) add(k, 0);
  add_up(sum, out);
}

// The same for whole numbers: exact sums of BLOCK inputs, which are then scaled. `first` is the first input.
template <int ROWS, bool WIDENED, bool FETCH>
INLINE void add_int8(const Rows& x, const u8* w, i64 first, i64 inputs, const Next& next, f32* out) {
  constexpr int BYTES = LANES * DOT * (WIDENED ? 2 : 1);  // of a vector of weights
  for (i64 k = 0; k < inputs; k += BLOCK) {
    const i64 block = (first + k) / BLOCK;
    vi whole[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < VECTORS; v++) whole[r][v] = all(x.start[r * x.pieces + block]);
#pragma GCC unroll 4
    for (int step = 0; step < BLOCK / DOT; step++, w += VECTORS * BYTES) {
      vi pairs[VECTORS];
      if constexpr (DOT == 2)
        for (int v = 0; v < VECTORS; v++) pairs[v] = in_register(WIDENED ? load_bits<vi>(w + v * BYTES) : widened_pairs(w + v * BYTES));
      for (int r = 0; r < ROWS; r++) {
        const u32 a = ((const u32*)Rows::row(x, r))[k / DOT + step];
        for (int v = 0; v < VECTORS; v++) {
          if constexpr (DOT == 2) whole[r][v] = dot_pairs(whole[r][v], pairs[v], a);
          else whole[r][v] = dot(whole[r][v], w + v * BYTES, a);
        }
      }
      Next::fetch<FETCH>(next, k + step * DOT, DOT * next.bytes);
    }
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < VECTORS; v++) {
        f32* to = out + r * PANEL + v * LANES;
        const vf scaled = x.scale[r * x.blocks + block] * __builtin_convertvector(whole[r][v], vf);
        Float32::store(to, Float32::load(to) + scaled);
      }
  }
}

// Inputs of a panel: as they are stored or widened, of a kind, from the input `first` on.
struct Piece {
  const u8* weights;
  i64 kind, first, inputs;
  bool wide;
};

// Call f with the inputs that are added up as integers, as a constant.
template <class F>
INLINE void with_piece(i64 kind, F&& f) {
  if (Scaling(kind).piece() == BLOCK) f(std::integral_constant<int, BLOCK>{});
  else f(std::integral_constant<int, BLOCK / 2>{});
}

// Add to the sums out [ROWS][PANEL] of rows, of which x has the same inputs. Of blocks, they are all.
template <int ROWS, bool FETCH>
INLINE void add_piece(const Piece& piece, const Rows& x, const Next& next, f32* out) {
  constexpr int UNROLL = ROWS == 1 ? 4 : ROWS <= 3 ? 2 : 1;
  const u8* w = piece.weights;
  const i64 kind = piece.kind, first = piece.first, inputs = piece.inputs;
  const bool wide = piece.wide;
  if (is_blocks(kind)) {
    if constexpr (ROWS <= FEWER_ROWS) with_piece(kind, [&](auto size) __attribute__((always_inline)) {
      if (type_of(kind) == B4) add_blocks<B4, decltype(size)::value, ROWS, FETCH>(Scaling(kind), x, w, inputs, next, out);
      else add_blocks<B8, decltype(size)::value, ROWS, FETCH>(Scaling(kind), x, w, inputs, next, out);
    });
  } else if (kind == BF16 && (BF16_DOT || !wide)) add_pairs<ROWS, UNROLL, FETCH>(x, w, inputs, next, out);
  else if (kind == S8 && wide && DOT == 2) add_int8<ROWS, true, FETCH>(x, w, first, inputs, next, out);
  else if (kind == S8) add_int8<ROWS, false, FETCH>(x, w, first, inputs, next, out);
  else if (kind == F32 || wide) add_wide<Float32, ROWS, UNROLL, FETCH>(x, w, inputs, next, out);
  else if (kind == F16) add_wide<Float16, ROWS, UNROLL, FETCH>(x, w, inputs, next, out);
  else add_wide<Int8, ROWS, UNROLL, FETCH>(x, w, inputs, next, out);
}
