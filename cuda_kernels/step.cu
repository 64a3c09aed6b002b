// What the layers of a decode step read, from its rows and positions [B]: of each row its block table, the slot of its
// token, how much it sees, whether it only pads the batch, and the cosines and sines of its position.
// tables [R, *] with a row stride -> table [B, num_blocks], slots [B]; inv_freq [half] -> cos, sin [B, half], times
// factor; context and padding [B], cu_q [B + 1]. `table`, `context` and `cos` may be null: with what belongs to them they
// are then left out. Grid: B.
#include "common.cuh"

#define THREADS 128

extern "C" __global__ void __launch_bounds__(THREADS)
    prepare_step(const s64* __restrict__ rows, const s64* __restrict__ positions, const int* __restrict__ tables,
                 const float* __restrict__ inv_freq, int* __restrict__ table, s64* __restrict__ slots,
                 int* __restrict__ context, int* __restrict__ cu_q, u8* __restrict__ padding, float* __restrict__ cos,
                 float* __restrict__ sin, int num_blocks, int row_stride, int block_size, int half, int padding_row,
                 float factor) {
  wait_for_kernels_before();
  const int b = blockIdx.x;
  const s64 row = rows[b], position = positions[b];
  if (table) {
    const int* own = tables + row * row_stride;
    for (int i = threadIdx.x; i < num_blocks; i += THREADS) table[(s64)b * num_blocks + i] = own[i];
    if (threadIdx.x == 0) slots[b] = (s64)own[position / block_size] * block_size + position % block_size;
  }
  if (context && threadIdx.x == 0) {
    if (b == 0) cu_q[0] = 0;
    cu_q[b + 1] = b + 1;
    context[b] = (int)position + 1;
    padding[b] = row == padding_row;
  }
  if (!cos) return;
  for (int i = threadIdx.x; i < half; i += THREADS) {
    float s, c;
    sine_and_cosine((float)position * inv_freq[i], &s, &c);
    cos[b * half + i] = c * factor;
    sin[b * half + i] = s * factor;
  }
}
