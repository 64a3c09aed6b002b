// Rotary angles, and what stands between the fused projection and attention: norms of q, k and v, rotation of q and k,
// and the writes of k and v into their slots of the paged cache.
#include "common.h"

struct AnglesArgs {
  const i64* positions;   // [tokens]
  const f32* inv_freq;    // [half]
  f32* cos;               // [tokens, half]
  f32* sin;               // [tokens, half]
  i64 tokens, half;
  f64 factor;
};

extern "C" void rope_angles(const AnglesArgs* a) {
  parallel_ranges(a->tokens, 16, [&](i64 begin, i64 end) {
    for (i64 t = begin; t < end; t++) {
      for (i64 i = 0; i < a->half; i++) {
        const f32 angle = (f32)a->positions[t] * a->inv_freq[i];
        a->cos[t * a->half + i] = std::cos(angle) * (f32)a->factor;
        a->sin[t * a->half + i] = std::sin(angle) * (f32)a->factor;
      }
    }
  });
}

struct WriteArgs {
  const void* qkv;      // [tokens, columns], rows `stride` apart: heads of q, then of k, then of v
  const f32* cos;       // [tokens, dim / 2]
  const f32* sin;       // [tokens, dim / 2]
  const f32* qk_norm;   // [heads + kv_heads, dim], or null
  const i64* slots;     // [tokens], negative for a token that is not written
  void* q;              // [tokens, heads, dim], dense
  void* k;              // [slots, kv_heads, dim], slots slot_stride apart, in qkv's type or s8
  void* v;              // as k
  f32* k_scale;         // [slots, kv_heads], slots scale_stride apart; null unless s8
  f32* v_scale;         // as k_scale
  i64 dtype, kv_dtype, tokens, stride, heads, kv_heads, dim, slot_stride, scale_stride;
  i64 writes;           // 0 where there are heads of q only
  i64 has_values;       // 0 where the raw keys are the values
  i64 v_norm;           // 1 to divide values by their root mean square
  f64 eps;
};

static void normalise(f32* head, i64 dim, f64 eps) {
  vf squares = {};
  for (i64 i = 0; i < dim; i += LANES) {
    const vf v = load<Float32>(head + i, dim - i);
    squares += v * v;
  }
  const f32 factor = 1.f / std::sqrt(sum(squares) / (f32)dim + (f32)eps);
  for (i64 i = 0; i < dim; i += LANES) store<Float32>(head + i, load<Float32>(head + i, dim - i) * factor, dim - i);
}

static void rotate(f32* head, i64 half, const f32* cos, const f32* sin) {
  for (i64 i = 0; i < half; i += LANES) {
    const i64 left = half - i;
    const vf first = load<Float32>(head + i, left), second = load<Float32>(head + half + i, left);
    const vf c = load<Float32>(cos + i, left), s = load<Float32>(sin + i, left);
    store<Float32>(head + i, first * c - second * s, left);
    store<Float32>(head + half + i, second * c + first * s, left);
  }
}

template <class T>
static void write_head(const WriteArgs& a, void* cache, f32* scales, i64 slot, i64 head, const f32* values) {
  const i64 at = slot * a.slot_stride + head * a.dim;
  if (a.kv_dtype != S8) {
    auto* out = (typename T::type*)cache + at;
    for (i64 i = 0; i < a.dim; i += LANES) store<T>(out + i, load<Float32>(values + i, a.dim - i), a.dim - i);
    return;
  }
  f32 most = 0, check = 0;
  for (i64 i = 0; i < a.dim; i++) {
    most = std::max(most, std::fabs(values[i]));
    check += values[i] * 0.f;  // NaN where a value is not finite, and so is the scale
  }
  const f32 scale = std::max(most / 127.f, 1.17549435e-38f) + check;
  scales[slot * a.scale_stride + head] = scale;
  s8* out = (s8*)cache + at;
  const bool finite = check == 0;
  for (i64 i = 0; i < a.dim; i++) out[i] = finite ? (s8)std::nearbyint(values[i] / scale) : 0;
}

template <class T>
static void write_token(const WriteArgs& a, i64 t, f32* head) {
  using type = typename T::type;
  const type* row = (const type*)a.qkv + t * a.stride;
  const f32 *cos = a.cos + t * (a.dim / 2), *sin = a.sin + t * (a.dim / 2);
  const i64 slot = a.writes ? a.slots[t] : -1;
  const auto read = [&](i64 index) {
    for (i64 i = 0; i < a.dim; i += LANES)
      store<Float32>(head + i, load<T>(row + index * a.dim + i, a.dim - i), a.dim - i);
  };
  for (i64 h = 0; h < a.heads + (slot >= 0 ? a.kv_heads : 0); h++) {
    read(h);
    if (a.qk_norm) {
      normalise(head, a.dim, a.eps);
      for (i64 i = 0; i < a.dim; i++) head[i] *= a.qk_norm[h * a.dim + i];
    }
    rotate(head, a.dim / 2, cos, sin);
    if (h >= a.heads) {
      write_head<T>(a, a.k, a.k_scale, slot, h - a.heads, head);
      continue;
    }
    type* out = (type*)a.q + (t * a.heads + h) * a.dim;
    for (i64 i = 0; i < a.dim; i += LANES) store<T>(out + i, load<Float32>(head + i, a.dim - i), a.dim - i);
  }
  for (i64 h = 0; slot >= 0 && h < a.kv_heads; h++) {
    read(a.heads + h + (a.has_values ? a.kv_heads : 0));
    if (a.v_norm) {
      normalise(head, a.dim, a.eps);
      for (i64 i = 0; i < a.dim; i += LANES)
        store<Float32>(head + i, rounded<T>(load<Float32>(head + i, a.dim - i)), a.dim - i);
    }
    write_head<T>(a, a.v, a.v_scale, slot, h, head);
  }
}

extern "C" void write_kv(const WriteArgs* a) {
  with_type(a->dtype, [&](auto type) {
    parallel_ranges(a->tokens, 2, [&](i64 begin, i64 end) {
      alignas(64) f32 head[1024];
      for (i64 t = begin; t < end; t++) write_token<decltype(type)>(*a, t, head);
    });
  });
}
