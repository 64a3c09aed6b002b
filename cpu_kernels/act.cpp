// Gated activations: act(gate) * up.
#include "common.h"

struct ActArgs {
  const void* gate_up;  // [rows, 2 * width], gate first, rows `stride` apart
  void* out;            // [rows, width], dense
  i64 dtype, rows, width, stride, activation;
};

extern "C" void act(const ActArgs* a) {
  with_type(a->dtype, [&](auto type) {
    using T = decltype(type);
    parallel_ranges(a->rows, 1 + 2048 / a->width, [&](i64 begin, i64 end) {
      for (i64 row = begin; row < end; row++) {
        const auto* gate = (const typename T::type*)a->gate_up + row * a->stride;
        auto* out = (typename T::type*)a->out + row * a->width;
        for (i64 i = 0; i < a->width; i += LANES) {
          const i64 left = a->width - i;
          store<T>(out + i, activate(load<T>(gate + i, left), a->activation) * load<T>(gate + a->width + i, left), left);
        }
      }
    });
  });
}
