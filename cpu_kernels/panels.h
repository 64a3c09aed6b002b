// How weights are laid out: panels of PANEL outputs, inputs one after another, so that a product streams through them.
//
// An input of a panel is PANEL numbers side by side. Where the processor adds up several inputs in one instruction they
// stand together: STEP inputs of an output, then those of the next output. The last panel is filled up with zeros, and
// so are the inputs, to whole steps (INT8 to blocks of BLOCK, which share one scale of the activations, and bfloat16 to matrix tiles).
//
// A panel of blocks (weights of 4 or 8 bits in groups of inputs that share a scale) is group after group: the scales of
// its outputs, their offsets, then the group's weights. Before every OUTER inputs stand the outer scales, if there are any.
#pragma once
#include "common.h"

constexpr int VECTORS = LANES == 4 ? 4 : 2;
constexpr int PANEL = VECTORS * LANES;
constexpr int BLOCK = 32;
constexpr i64 OUTER = 256;

// The kind of a matrix is the code of its numbers. That of blocks also says how they are scaled (Scaling).
INLINE i64 type_of(i64 kind) { return kind & 7; }
INLINE bool is_blocks(i64 kind) { return type_of(kind) == B4 || type_of(kind) == B8; }
// Whether activations are rounded to 8 bits.
INLINE bool is_quantised(i64 kind) { return kind == S8 || is_blocks(kind); }

// How blocks are scaled: a weight is scale * number + offset, where the number is 0 to 15 or -128 to 127.
enum { NO_OFFSET = 0, ZERO = 1, MINIMUM = 2 };
struct Scaling {
  i64 type, scale, offset, group;
  explicit Scaling(i64 kind) : type(kind & 7), scale(kind >> 3 & 3), offset(kind >> 5 & 3), group(kind >> 8) {}
  i64 scale_bytes() const { return scale == F32 ? 4 : scale == F16 ? 2 : 1; }  // 1: integers times an outer scale
  i64 offset_bytes() const { return offset == NO_OFFSET ? 0 : offset == ZERO ? 1 : scale_bytes(); }
  i64 outer_numbers() const { return scale != S8 ? 0 : offset == MINIMUM ? 2 : 1; }
  i64 weight_bytes() const { return type == B4 ? group / 2 : group; }
  // Inputs that are added up as integers.
  i64 piece() const { return std::min<i64>(group, BLOCK); }
};

INLINE i64 step_of(i64 kind) { return kind == BF16 ? 2 : kind == S8 ? DOT : 1; }
INLINE i64 size_of(i64 kind) { return kind == F32 ? 4 : kind == S8 || kind == S8_EXACT ? 1 : 2; }
INLINE i64 padded_inputs(i64 kind, i64 inputs) {
  const i64 multiple = kind == S8 || (kind == BF16 && HAS_TILES) ? BLOCK : is_blocks(kind) ? 1 : step_of(kind);
  return (inputs + multiple - 1) / multiple * multiple;
}
INLINE i64 num_panels(i64 outputs) { return (outputs + PANEL - 1) / PANEL; }
INLINE i64 panel_bytes(i64 kind, i64 inputs) {
  if (!is_blocks(kind)) return padded_inputs(kind, inputs) * PANEL * size_of(kind);
  const Scaling s(kind);
  const i64 groups = inputs / s.group * (s.weight_bytes() + s.scale_bytes() + s.offset_bytes());
  return PANEL * (groups + (s.outer_numbers() ? inputs / OUTER * s.outer_numbers() * 2 : 0));
}

// Where in its panel a weight stands, in elements.
INLINE i64 place(i64 kind, i64 output, i64 input) {
  const i64 step = step_of(kind);
  return (input / step * PANEL + output % PANEL) * step + input % step;
}

// What is fetched from memory while a panel, or a piece of its inputs, is computed. Behind the panel's end that is not
// its neighbour where a gate's panel is followed by its partner's.
struct Next {
  const u8* from;  // what is fetched with the first input
  i64 bytes;       // of an input; 1 where blocks count in bytes
  const u8* end;   // of the panel
  i64 jump;        // from there to the panel that is read next
  // Fetch `count` bytes, those that belong to the input `at`.
  template <bool FETCH>
  INLINE void fetch(const Next& next, i64 at, i64 count) {
    if (!FETCH) return;
    const u8* line = next.from + at * next.bytes;
    if (line >= next.end) line += next.jump;
    __builtin_prefetch(line);
    if (count > 64) __builtin_prefetch(line + 64);
  }
};

// One product with a matrix of panels. `rows` of x are chosen by `index` where it is given.
struct Product {
  const void* x;        // [*, inputs], rows x_stride apart
  i64 x_dtype, x_stride;
  const i64* index;     // [rows], which rows of x; null for the first ones
  const u8* weight;     // panels
  const f32* scale;     // [outputs], INT8 only
  const f32* bias;      // [outputs], or null
  void* y;              // [rows, outputs], rows y_stride apart; half the outputs where gated
  i64 y_dtype, y_stride;
  i64 rows, outputs, inputs, kind;
  i64 activation;       // gated where it is not NO_ACTIVATION: act(first half) * second half
  i64 rounding = F32;   // the type to which results are rounded before they are stored as float32
};
void multiply(const Product& p);
