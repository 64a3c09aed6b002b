// From the sums of a product to its result: scale, bias, the gate, and the type of the output.
#pragma once
#include "panels.h"

// Scale and bias: what makes sums a result.
INLINE vf finished(const Product& p, vf sum, i64 output) {
  const i64 left = p.outputs - output;
  if (left <= 0) return sum;
  if (p.scale) sum *= load<Float32>(p.scale + output, left);
  if (p.bias) sum += load<Float32>(p.bias + output, left);
  return sum;
}

// Where the outputs that a gated panel's are scaled by begin: in the panel `first`, at `shift`, so maybe in two panels.
struct Partner {
  i64 first, shift, count;
  Partner(const Product& p, i64 panel) {
    const i64 width = p.outputs / 2;
    first = (panel * PANEL + width) / PANEL, shift = width % PANEL;
    count = !p.activation ? 0 : std::min<i64>(shift ? 2 : 1, num_panels(p.outputs) - first);
  }
};

// Finish and store the sums [num_rows][PANEL] of a panel; up [num_rows][2 * PANEL] are its partner's.
static void store_rows(const Product& p, i64 panel, i64 first_row, i64 num_rows, const f32* sum, const f32* up) {
  const i64 width = p.activation ? p.outputs / 2 : p.outputs, shift = width % PANEL;
  with_type(p.y_dtype, [&](auto type) {
    using T = decltype(type);
    for (i64 r = 0; r < num_rows; r++) {
      auto* y = (typename T::type*)p.y + (first_row + r) * p.y_stride;
      for (i64 v = 0; v < PANEL; v += LANES) {
        const i64 at = panel * PANEL + v;
        if (at >= width) break;
        vf out = finished(p, Float32::load(sum + r * PANEL + v), at);
        if (p.activation) {
          const vf scaled = Float32::load(up + r * 2 * PANEL + shift + v);
          out = activate(out, p.activation) * finished(p, scaled, at + width);
        }
        store<T>(y + at, out, width - at);
      }
    }
  });
}
