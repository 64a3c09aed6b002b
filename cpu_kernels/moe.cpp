// Experts: the choice of each token's, and the sum of what they say.
#include <numeric>
#include <vector>

#include "panels.h"

struct RouteArgs {
  const void* logits;  // [tokens, experts], dense
  f32* weights;        // [tokens, top_k]
  i64* ids;            // [tokens, top_k]
  i64 dtype, tokens, experts, top_k;
};

// Softmax over all experts, the largest top_k of it, renormalised.
extern "C" void route(const RouteArgs* a) {
  with_type(a->dtype, [&](auto type) {
    using T = decltype(type);
    parallel_ranges(a->tokens, 16, [&](i64 begin, i64 end) {
      std::vector<f32> logits(a->experts + LANES);
      std::vector<i64> order(a->experts);
      for (i64 t = begin; t < end; t++) {
        const auto* row = (const typename T::type*)a->logits + t * a->experts;
        for (i64 e = 0; e < a->experts; e += LANES)
          store<Float32>(&logits[e], load<T>(row + e, a->experts - e), a->experts - e);
        std::iota(order.begin(), order.end(), 0);
        // NaN is no order: a row that holds one keeps the first experts, and its weights are NaN.
        f32 check = 0;
        for (i64 e = 0; e < a->experts; e++) check += logits[e] * 0.f;
        if (check == 0)
          std::partial_sort(order.begin(), order.begin() + a->top_k, order.end(), [&](i64 x, i64 y) {
            return logits[x] > logits[y] || (logits[x] == logits[y] && x < y);
          });
        f32 total = 0;
        for (i64 i = 0; i < a->top_k; i++) {
          const f32 weight = std::exp(logits[order[i]] - logits[order[0]]) + check;
          a->weights[t * a->top_k + i] = weight;
          a->ids[t * a->top_k + i] = order[i];
          total += weight;
        }
        for (i64 i = 0; i < a->top_k; i++) a->weights[t * a->top_k + i] /= total;
      }
    });
  });
}

struct MoeArgs {
  const void* x;            // [tokens, hidden], rows x_stride apart
  const f32* weights;       // [tokens, top_k]
  const i64* ids;           // [tokens, top_k], negative for none
  const void* gate_up;      // panels of [2 * width, hidden], one matrix an expert
  const void* down;         // panels of [hidden, width]
  const f32* gate_up_scale; // [experts, 2 * width], or null
  const f32* down_scale;    // [experts, hidden], or null
  i64* load;                // [experts], tokens each has received so far
  void* inner;              // [tokens * top_k, width]: room for what is between the products
  void* outer;              // [tokens * top_k, hidden]: room for what each expert says
  void* out;                // [tokens, hidden], dense
  i64 dtype, gate_up_kind, down_kind, x_stride, tokens, top_k, experts, hidden, width, activation;
};

// Tokens are sorted by expert; each expert multiplies its own.
extern "C" void moe(const MoeArgs* a) {
  const i64 pairs = a->tokens * a->top_k, size = a->dtype == F32 ? 4 : 2;
  std::vector<i64> first(a->experts + 1, 0), tokens(pairs), places(pairs, -1);
  for (i64 i = 0; i < pairs; i++)
    if (a->ids[i] >= 0) first[a->ids[i] + 1]++, a->load[a->ids[i]]++;
  for (i64 e = 0; e < a->experts; e++) first[e + 1] += first[e];
  std::vector<i64> next(first.begin(), first.end() - 1);
  for (i64 i = 0; i < pairs; i++) {
    if (a->ids[i] < 0) continue;
    places[i] = next[a->ids[i]]++;
    tokens[places[i]] = i / a->top_k;
  }
  const i64 up_bytes = num_panels(2 * a->width) * panel_bytes(a->gate_up_kind, a->hidden);
  const i64 down_bytes = num_panels(a->hidden) * panel_bytes(a->down_kind, a->width);
  for (i64 e = 0; e < a->experts; e++) {
    const i64 begin = first[e], rows = first[e + 1] - begin;
    u8* inner = (u8*)a->inner + begin * a->width * size;
    multiply({a->x, a->dtype, a->x_stride, &tokens[begin], (const u8*)a->gate_up + e * up_bytes,
              a->gate_up_scale ? a->gate_up_scale + e * 2 * a->width : nullptr, nullptr, inner, a->dtype, a->width,
              rows, 2 * a->width, a->hidden, a->gate_up_kind, a->activation});
    multiply({inner, a->dtype, a->width, nullptr, (const u8*)a->down + e * down_bytes,
              a->down_scale ? a->down_scale + e * a->hidden : nullptr, nullptr,
              (u8*)a->outer + begin * a->hidden * size, a->dtype, a->hidden, rows, a->hidden, a->width,
              a->down_kind, NO_ACTIVATION});
  }
  with_type(a->dtype, [&](auto type) {
    using T = decltype(type);
    using number = typename T::type;
    parallel_ranges(a->tokens, 4, [&](i64 begin, i64 end) {
      for (i64 t = begin; t < end; t++) {
        for (i64 h = 0; h < a->hidden; h += LANES) {
          vf total = {};
          for (i64 i = t * a->top_k; i < (t + 1) * a->top_k; i++)
            if (places[i] >= 0)
              total += a->weights[i] * load<T>((const number*)a->outer + places[i] * a->hidden + h, a->hidden - h);
          store<T>((number*)a->out + t * a->hidden + h, total, a->hidden - h);
        }
      }
    });
  });
}
