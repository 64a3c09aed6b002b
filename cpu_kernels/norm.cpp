// RMS norms, with and without the addition before them. Sums in float32.
#include "common.h"

struct NormArgs {
  const void* x;         // [rows, width], rows x_stride apart
  const void* residual;  // as x, added first; null for a plain norm
  const void* weight;    // [width] in x's type, or null
  void* out;             // [rows, width], dense
  void* total;           // [rows, width], dense: x + residual
  i64 dtype, rows, width, x_stride, residual_stride;
  f64 eps;
};

template <class T>
static void norm_row(const NormArgs& a, i64 row) {
  using type = typename T::type;
  const type* x = (const type*)a.x + row * a.x_stride;
  const type* residual = a.residual ? (const type*)a.residual + row * a.residual_stride : nullptr;
  const type* weight = (const type*)a.weight;
  type* out = (type*)a.out + row * a.width;
  type* total = (type*)a.total + row * a.width;
  vf squares = {};
  for (i64 i = 0; i < a.width; i += LANES) {
    vf v = load<T>(x + i, a.width - i);
    if (residual) {
      v = rounded<T>(v + load<T>(residual + i, a.width - i));
      store<T>(total + i, v, a.width - i);
    }
    squares += v * v;
  }
  const f32 factor = 1.f / std::sqrt(sum(squares) / (f32)a.width + (f32)a.eps);
  const type* from = residual ? total : x;
  for (i64 i = 0; i < a.width; i += LANES) {
    vf v = load<T>(from + i, a.width - i) * factor;
    if (weight) v *= load<T>(weight + i, a.width - i);
    store<T>(out + i, v, a.width - i);
  }
}

extern "C" void norm(const NormArgs* a) {
  with_type(a->dtype, [&](auto type) {
    parallel_ranges(a->rows, 1 + 8192 / a->width, [&](i64 begin, i64 end) {
      for (i64 row = begin; row < end; row++) norm_row<decltype(type)>(*a, row);
    });
  });
}
