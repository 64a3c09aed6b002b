// out [S, I] = act(gate) * up, for gate_up [S, 2 I] with a row stride, gate first. 16 bytes a thread.
// Compile-time: GELU (1: gelu with tanh, 0: silu). Grid: (S, pieces of 8 * THREADS columns).
#include "common.cuh"

#define THREADS 256

extern "C" __global__ void __launch_bounds__(THREADS)
    act_and_mul(const io_t* __restrict__ gate_up, io_t* __restrict__ out, int width, int row_stride) {
  wait_for_kernels_before();
  const int at = (blockIdx.y * THREADS + threadIdx.x) * 8;
  if (at >= width) return;
  const io_t* row = gate_up + (s64)blockIdx.x * row_stride + at;
  const vec16 gate = load16(row), up = load16(row + width);
  vec16 y;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float low = io_low(gate.x[i]), high = io_high(gate.x[i]);
    y.x[i] = pack_io((GELU ? gelu_tanh(low) : silu(low)) * io_low(up.x[i]),
                     (GELU ? gelu_tanh(high) : silu(high)) * io_high(up.x[i]));
  }
  *reinterpret_cast<vec16*>(out + (s64)blockIdx.x * width + at) = y;
}
