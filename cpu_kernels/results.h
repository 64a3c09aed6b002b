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

// Results as they would be in a type of 16 bits.
INLINE vf rounded(vf v, i64 dtype) {
  u16 bits[LANES];
  if (dtype == F32) return v;
  if (dtype == F16) return Float16::store(bits, v), Float16::load(bits);
  return BFloat16::store(bits, v), BFloat16::load(bits);
}

// Panels of the outputs that those of the panels `begin` to `end` are scaled by: from `first` on, none without a gate.
// Where half of the outputs fills no panel they are shifted, so one more.
struct Partners {
  i64 first, count;
  Partners(const Product& p, i64 begin, i64 end) {
    const i64 width = p.outputs / 2;
    first = (begin * PANEL + width) / PANEL;
    count = !p.activation ? 0 : std::min(end - begin + (width % PANEL ? 1 : 0), num_panels(p.outputs) - first);
  }
};

// Finish and store the sums [num_rows][PANEL] of a panel. `up` are its partner's, `after` those of the panel behind that, if
// there is one.
static void store_rows(
    const Product& p, i64 panel, i64 first_row, i64 num_rows, const f32* sum, const f32* up, const f32* after) {
  const i64 width = p.activation ? p.outputs / 2 : p.outputs, shift = width % PANEL;
  with_type(p.y_dtype, [&](auto type) {
    using T = decltype(type);
    for (i64 r = 0; r < num_rows; r++) {
      auto* y = (typename T::type*)p.y + (first_row + r) * p.y_stride;
      alignas(64) f32 both[2 * PANEL];
      if (p.activation) memcpy(both, up + r * PANEL, PANEL * 4);
      if (p.activation && after) memcpy(both + PANEL, after + r * PANEL, PANEL * 4);
      for (i64 v = 0; v < PANEL; v += LANES) {
        const i64 at = panel * PANEL + v;
        if (at >= width) break;
        vf out = finished(p, Float32::load(sum + r * PANEL + v), at);
        if (p.activation) {
          const vf scaled = Float32::load(both + shift + v);
          out = activate(out, p.activation) * finished(p, scaled, at + width);
        }
        store<T>(y + at, rounded(out, p.rounding), width - at);
      }
    }
  });
}
