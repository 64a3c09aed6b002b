// What the other kernels are built of, each alone: a simulator and a GPU must give the same, and `kernels check` asks
// both. Also the smallest kernels there are, which tell what a launch and a read cost on a machine.
#include "common.cuh"

extern "C" __global__ void primitives(const int* __restrict__ in, u32* __restrict__ out, float* __restrict__ floats,
                                      int* __restrict__ histogram, int n) {
  wait_for_kernels_before();
  DYN_SMEM(int, counts);
  const int i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x & 31;
  const int v = i < n ? in[i] : 0;
  if (threadIdx.x < 8) counts[threadIdx.x] = 0;
  __syncthreads();
  out[i * 10 + 0] = __shfl_down_sync(FULL_WARP, v, 3);
  out[i * 10 + 1] = __shfl_up_sync(FULL_WARP, v, 5);
  out[i * 10 + 2] = __shfl_sync(FULL_WARP, v, (lane * 7) & 31);
  out[i * 10 + 3] = __shfl_xor_sync(FULL_WARP, v, 9, 16);
  out[i * 10 + 4] = __ballot_sync(FULL_WARP, v & 1);
  out[i * 10 + 5] = __popc(v) + __clz(v | 1) * 100;
  out[i * 10 + 6] = __any_sync(FULL_WARP, v > 990) + 2 * __all_sync(FULL_WARP, v >= 0);
  out[i * 10 + 7] = __byte_perm(v, ~v, 0x3524);
  out[i * 10 + 8] = __umulhi((u32)v * 2654435761u, 0x9E3779B9u) ^ __funnelshift_l((u32)v, ~(u32)v, v & 31);
  out[i * 10 + 9] = (u32)(v / -7) * 31u + (u32)(v % 9) + ((u32)v >> 3) / 5u;
  atomicAdd(&counts[v & 7], 1);
  if (v % 3 == 0) atomicMax(histogram + 8, v);
  __syncthreads();
  if (threadIdx.x < 8) atomicAdd(&histogram[threadIdx.x], counts[threadIdx.x]);
  float a = v * 0.01f;
  for (int k = 0; k < (v & 3); k++) a = sqrtf(a + k) * rsqrt_fast(1.f + a);  // lanes leave at different times
  floats[i * 4 + 0] = (v & 16) ? a : -fabsf(a) + (float)(v % 7);
  floats[i * 4 + 1] = tanh_fast(a) + silu(a) + gelu_tanh(a) + log2_fast(1.f + a);
  float bytes[4];
  bytes_to_floats((u32)v * 2654435761u, bytes);
  floats[i * 4 + 2] = bytes[0] + 256.f * bytes[1] + 65536.f * bytes[2] + 7.f * bytes[3];
  floats[i * 4 + 3] = to_float(to_io(a * 1.001f)) + io_high(pack_io(a, 3.f * a)) + (float)round_to_int(a * 7.3f);
}

// One product of tensor cores through shared memory: out [16, 8] = a [16, 16] b [16, 8], b given as [16, 8] row-major
// (loaded with a transpose) or as its transpose [8, 16].
extern "C" __global__ void product(const io_t* __restrict__ a, const io_t* __restrict__ b, const io_t* __restrict__ bt,
                                   float* __restrict__ out, float* __restrict__ out_t) {
  wait_for_kernels_before();
  DYN_SMEM(io_t, s);  // a, b twice (so that four matrices can be loaded), bt twice
  const int lane = threadIdx.x;
  copy16_async(s + lane * 8, a + lane * 8, true);
  copy16_async(s + 256 + lane * 8, b + lane % 16 * 8, true);
  copy16_async(s + 512 + lane * 8, bt + lane % 16 * 8, true);
  copies_commit();
  copies_wait<0>();
  __syncthreads();
  u32 fa[4], fb[4];
  load_matrices(fa, s + (lane % 16) * 16 + lane / 16 * 8);
  float c[4] = {1.f, 2.f, 3.f, 4.f}, d[4] = {};
  load_matrices_transposed(fb, s + 256 + lane * 8);
  mma_io(c, fa, fb);
  load_matrices(fb, s + 512 + lane % 8 * 16 + lane / 8 % 2 * 8);
  mma_io(d, fa, fb);
  for (int e = 0; e < 4; e++) {
    const int row = lane / 4 + 8 * (e / 2), column = lane % 4 * 2 + e % 2;
    out[row * 8 + column] = c[e] - (e + 1);
    out_t[row * 8 + column] = d[e];
  }
}

// The same of int8: out [16, 8] = a [16, 32] times the transpose of bt [8, 32], and c [16, 8] added.
extern "C" __global__ void product_s8(const s8* __restrict__ a, const s8* __restrict__ bt, const int* __restrict__ c,
                                      int* __restrict__ out) {
  wait_for_kernels_before();
  DYN_SMEM(unsigned char, s);  // a, then bt twice (so that four matrices can be loaded)
  const int lane = threadIdx.x;
  copy16_async(s + lane * 16, a + lane * 16, true);
  copy16_async(s + 512 + lane * 16, bt + lane % 16 * 16, true);
  copies_commit();
  copies_wait<0>();
  __syncthreads();
  u32 fa[4], fb[4];
  load_matrices(fa, s + lane % 16 * 32 + lane / 16 * 16);
  load_matrices(fb, s + 512 + lane % 8 * 32 + lane / 8 % 2 * 16);
  int sums[4];
  for (int e = 0; e < 4; e++) sums[e] = c[(lane / 4 + 8 * (e / 2)) * 8 + lane % 4 * 2 + e % 2];
  mma_s8(sums, fa, fb);
  for (int e = 0; e < 4; e++) out[(lane / 4 + 8 * (e / 2)) * 8 + lane % 4 * 2 + e % 2] = sums[e];
}

// The approximate functions, [n, 7]: ex2, lg2, rcp, rsqrt, tanh, silu, gelu of x [n] (of |x| where it must be positive).
extern "C" __global__ void approximations(const float* __restrict__ x, float* __restrict__ out, int n) {
  wait_for_kernels_before();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const float v = x[i], positive = fabsf(v);
  const float values[7] = {exp2_fast(v), log2_fast(positive), reciprocal(v), rsqrt_fast(positive),
                           tanh_fast(v), silu(v),             gelu_tanh(v)};
#pragma unroll
  for (int k = 0; k < 7; k++) out[i * 7 + k] = values[k];
}

// Roundings of x [n]: bits [n, 3] of io_t, of a packed pair (x, -x) and of a packed bfloat16 pair; back [n, 2] widened
// again; the nearest integers [n].
extern "C" __global__ void roundings(const float* __restrict__ x, u32* __restrict__ bits, float* __restrict__ back,
                                     int* __restrict__ integers, int n) {
  wait_for_kernels_before();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const u32 pair = pack_io(x[i], -x[i]);
  bits[i * 3] = to_io(x[i]).bits;
  bits[i * 3 + 1] = pair;
  bits[i * 3 + 2] = pack_bf16(x[i], -x[i]);
  back[i * 2] = io_low(pair);
  back[i * 2 + 1] = io_high(pair);
  integers[i] = round_to_int(x[i]);
}

// 32 threads copy 16 bytes each, then 4 bytes each, of which only the even threads' are there: zeros fill the rest.
extern "C" __global__ void copies(const u32* __restrict__ in, u32* __restrict__ out) {
  wait_for_kernels_before();
  DYN_SMEM(u32, s);
  const int lane = threadIdx.x;
  const bool ok = lane % 2 == 0;
  for (int i = 0; i < 5; i++) s[i * 32 + lane] = ~0u;
  __syncthreads();
  copy16_async(s + lane * 4, in + (ok ? lane * 4 : 0), ok);
  copies_commit();
  copy4_async(s + 128 + lane, in + (ok ? lane : 0), ok);
  copies_commit();
  copies_wait<1>();
  __syncthreads();
  for (int i = 0; i < 4; i++) out[i * 32 + lane] = s[i * 32 + lane];
  copies_wait<0>();
  __syncthreads();
  out[128 + lane] = s[128 + lane];
}

// Read all of x (n pieces of 16 bytes) as fast as memory gives it: the ceiling that kernels which only read are held to.
extern "C" __global__ void read_all(const vec16* __restrict__ x, u32* __restrict__ out, int n) {
  wait_for_kernels_before();
  u32 all = 0;
  const int stride = gridDim.x * blockDim.x;
#pragma unroll 4
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += stride) {
    const vec16 v = load16(x + i);
    all ^= v.x[0] ^ v.x[1] ^ v.x[2] ^ v.x[3];
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = all;
}

// What a launch costs when there is nothing to do.
extern "C" __global__ void nothing(int* x) {
  wait_for_kernels_before();
  if (x) *x = 1;
}
