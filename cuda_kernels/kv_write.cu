// Between the qkv projection and attention, in one launch: RMS norm of q and k heads, rotation, RMS norm of values, and
// the write of keys and values into their slots of the paged cache, quantised where the cache is int8 or (-DKV_FP8=1, with KV_8BIT) e4m3.
// qkv [S, heads, HEAD_DIM] with a row stride: num_heads of q, then kv_heads of k, then (unless values are the raw keys)
// kv_heads of v. Caches [slots, kv_heads, HEAD_DIM] with a slot stride, scales [slots, kv_heads] with another.
// Compile-time: HEAD_DIM (64, 80, 96, 128, 256, 512), KV_8BIT, KV_FP8. One warp per head of a token; grid (S, heads / WARPS).
#include "common.cuh"

#define WARPS 8
#define N ((HEAD_DIM + 63) / 64)  // a lane holds elements [lane N, (lane + 1) N) of each half: rotation pairs stay in a lane
#define HALF (HEAD_DIM / 2)
#define LANES (HALF / N)  // that hold any: of head size 80 twenty, of 96 twenty-four

#if KV_FP8
typedef u8 kv_t;
#define LARGEST 448.f
#elif KV_8BIT
typedef s8 kv_t;
#define LARGEST 127.f
#else
typedef io_t kv_t;
#endif

// Move N neighbours at once: 2, 4, 8 or 16 bytes.
template <int BYTES> struct Piece;
template <> struct Piece<1> { typedef u8 type; };
template <> struct Piece<2> { typedef u16 type; };
template <> struct Piece<4> { typedef u32 type; };
template <> struct Piece<8> { typedef u64 type; };
template <> struct Piece<16> { typedef vec16 type; };

DEV void load_half(const io_t* p, float* x) {
  alignas(16) io_t held[N];
  *reinterpret_cast<Piece<2 * N>::type*>(held) = *reinterpret_cast<const Piece<2 * N>::type*>(p);
#pragma unroll
  for (int i = 0; i < N; i++) x[i] = to_float(held[i]);
}
DEV void load_floats(const float* p, float* x) {
  typedef Piece<(4 * N < 16 ? 4 * N : 16)>::type piece;
#pragma unroll
  for (int i = 0; i < 4 * N / (int)sizeof(piece); i++)
    reinterpret_cast<piece*>(x)[i] = reinterpret_cast<const piece*>(p)[i];
}
DEV void store_half(io_t* p, const float* x, float) {
  alignas(16) io_t held[N];
#pragma unroll
  for (int i = 0; i < N; i++) held[i] = to_io(x[i]);
  *reinterpret_cast<Piece<2 * N>::type*>(p) = *reinterpret_cast<Piece<2 * N>::type*>(held);
}
DEV void store_half(s8* p, const float* x, float scale) {
  alignas(8) s8 held[N];
#pragma unroll
  for (int i = 0; i < N; i++) held[i] = (s8)round_to_int(x[i] / scale);
  *reinterpret_cast<Piece<N>::type*>(p) = *reinterpret_cast<Piece<N>::type*>(held);
}
DEV void store_half(u8* p, const float* x, float scale) {
  alignas(8) u8 held[N];
#pragma unroll
  for (int i = 0; i < N; i++) held[i] = to_fp8(x[i] / scale);
  *reinterpret_cast<Piece<N>::type*>(p) = *reinterpret_cast<Piece<N>::type*>(held);
}

// x *= 1 / rms(x), times the head's weights where it has some. x: [first half, second half] of this lane.
DEV void normalise(float (*x)[N], const float* weight, int at, float eps) {
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < N; i++) squares += x[0][i] * x[0][i] + x[1][i] * x[1][i];
  const float scale = rsqrt_fast(warp_sum(squares) * (1.f / HEAD_DIM) + eps);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    alignas(16) float w[N];
    if (weight) load_floats(weight + h * HALF + at, w);
#pragma unroll
    for (int i = 0; i < N; i++) x[h][i] *= scale * (weight ? w[i] : 1.f);
  }
}

DEV void rotate(float (*x)[N], const float* cos_at, const float* sin_at) {
  alignas(16) float cos[N], sin[N];
  load_floats(cos_at, cos);
  load_floats(sin_at, sin);
#pragma unroll
  for (int i = 0; i < N; i++) {
    const float first = x[0][i], second = x[1][i];
    x[0][i] = first * cos[i] - second * sin[i];
    x[1][i] = second * cos[i] + first * sin[i];
  }
}

// Write one head; of 8 bits, with one scale per token and head, its largest magnitude being LARGEST.
DEV void write(kv_t* cache, float* scales, float (*x)[N], int lane, bool holds) {
  float scale = 1.f;
#if KV_8BIT
  u32 largest = 0;  // the bits of magnitudes, among which NaN is the largest
#pragma unroll
  for (int i = 0; i < 2 * N; i++) largest = max(largest, __float_as_uint(fabsf(x[i / N][i % N])));
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) largest = max(largest, __shfl_xor_sync(FULL_WARP, largest, offset));
  scale = __uint_as_float(largest) / LARGEST;
  if (scale < 1.17549435e-38f) scale = 1.17549435e-38f;
  if (holds && lane == 0) *scales = scale;
#endif
  if (!holds) return;
  store_half(cache + lane * N, x[0], scale);
  store_half(cache + HALF + lane * N, x[1], scale);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 4)
    kv_write(const io_t* __restrict__ qkv, const float* __restrict__ cos, const float* __restrict__ sin,
             const s64* __restrict__ slots, const float* __restrict__ qk_norm, io_t* __restrict__ q_out,
             kv_t* __restrict__ k_cache, kv_t* __restrict__ v_cache, float* __restrict__ k_scales,
             float* __restrict__ v_scales, int row_stride, int num_heads, int kv_heads, int values_at, int slot_stride,
             int scale_stride, int v_norm, float eps) {
  wait_for_kernels_before();
  const bool holds = LANES == 32 || threadIdx.x % 32 < LANES;
  const int lane = holds ? threadIdx.x % 32 : 0;  // the others read what the first does, and hold zeros
  const int head = blockIdx.y * WARPS + threadIdx.x / 32;
  if (head >= num_heads + 2 * kv_heads) return;
  const bool is_value = head >= num_heads + kv_heads;
  const int kv_head = is_value ? head - num_heads - kv_heads : head - num_heads;
  const s64 token = blockIdx.x;
  const io_t* source = qkv + token * row_stride + (is_value ? values_at + kv_head : head) * HEAD_DIM + lane * N;
  float x[2][N];
  load_half(source, x[0]);
  load_half(source + HALF, x[1]);
#pragma unroll
  for (int i = 0; i < 2 * N; i++) x[i / N][i % N] = holds ? x[i / N][i % N] : 0.f;
  if (!is_value) {
    if (qk_norm) normalise(x, qk_norm + head * HEAD_DIM, lane * N, eps);
    rotate(x, cos + token * HALF + lane * N, sin + token * HALF + lane * N);
  } else if (v_norm) {
    normalise(x, nullptr, 0, eps);
  }
  if (head < num_heads) {
    if (!holds) return;
    io_t* q = q_out + (token * num_heads + head) * HEAD_DIM + lane * N;
    store_half(q, x[0], 1.f);
    store_half(q + HALF, x[1], 1.f);
    return;
  }
  const s64 slot = slots[token];
  if (slot < 0) return;  // a row that pads the batch
  const s64 at = slot * slot_stride + kv_head * HEAD_DIM, scale_at = slot * scale_stride + kv_head;
  if (is_value)
    write(v_cache + at, v_scales + scale_at, x, lane, holds);
  else
    write(k_cache + at, k_scales + scale_at, x, lane, holds);
}
