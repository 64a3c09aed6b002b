// Device primitives shared by every kernel: the only file with inline PTX. No CUDA header is needed, so NVRTC's
// library alone compiles all of it. Activations are io_t: bfloat16, or float16 with -DIO_FP16=1; sums are float.
#pragma once
typedef unsigned char u8;
typedef signed char s8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long s64;

#ifndef IO_FP16
#define IO_FP16 0
#endif
struct alignas(2) io_t { u16 bits; };
struct alignas(16) vec16 { u32 x[4]; };  // what one thread moves at once

#define DEV __device__ __forceinline__
#define DYN_SMEM(T, name)                                      \
  extern __shared__ __align__(128) unsigned char name##_raw[]; \
  T* name = reinterpret_cast<T*>(name##_raw)
#define FULL_WARP 0xffffffffu
#define NEG_INF (-1e30f)  // finite: NEG_INF - NEG_INF is 0, not NaN
#define INF __uint_as_float(0x7f800000u)
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f

// ---- conversions. In a packed pair the low half is the element with the lower index.
DEV float bf16_low(u32 pair) { return __uint_as_float(pair << 16); }
DEV float bf16_high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
DEV u32 pack_bf16(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
DEV float half_to_float(u16 v) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v));
  return r;
}
#if IO_FP16
#define IO_TYPE "f16"
DEV float io_low(u32 pair) { return half_to_float((u16)(pair & 0xffffu)); }
DEV float io_high(u32 pair) { return half_to_float((u16)(pair >> 16)); }
DEV float to_float(io_t v) { return half_to_float(v.bits); }
#else
#define IO_TYPE "bf16"
DEV float io_low(u32 pair) { return bf16_low(pair); }
DEV float io_high(u32 pair) { return bf16_high(pair); }
DEV float to_float(io_t v) { return __uint_as_float((u32)v.bits << 16); }
#endif
DEV io_t to_io(float v) {
  io_t r;
  asm("cvt.rn." IO_TYPE ".f32 %0, %1;" : "=h"(r.bits) : "f"(v));
  return r;
}
DEV u32 pack_io(float low, float high) {
  u32 r;
  asm("cvt.rn." IO_TYPE "x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
// Four signed bytes to four floats, exactly: a byte (biased to unsigned) is put into the mantissa of 2^23, and the
// bias is subtracted. Twice the rate of the integer-to-float instruction.
DEV void bytes_to_floats(u32 bytes, float* out) {
  const u32 biased = bytes ^ 0x80808080u;
#pragma unroll
  for (int i = 0; i < 4; i++) out[i] = __uint_as_float(__byte_perm(biased, 0x4b000000u, 0x7440 + i)) - 8388736.f;
}
// (v & mask) | bits in one instruction.
DEV u32 and_or(u32 v, u32 mask, u32 bits) {
  u32 r;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(v), "r"(mask), "r"(bits));
  return r;
}
// Four e4m3 floats times 2^-8, exactly: their bits are those of float16 with another bias.
DEV void fp8_to_floats(u32 bytes, float* out) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const u32 pair = __byte_perm(bytes, 0u, i ? 0x3424 : 0x1404);  // in the upper halves of two float16
    const u32 halves = and_or(pair >> 1, 0x3f803f80u, pair & 0x80008000u);
    out[2 * i] = half_to_float((u16)(halves & 0xffffu));
    out[2 * i + 1] = half_to_float((u16)(halves >> 16));
  }
}
// A float of up to 464 to e4m3, to nearest, ties to even; larger ones are not caught.
DEV u8 to_fp8(float v) {
  const u32 bits = __float_as_uint(v), magnitude = bits & 0x7fffffffu;
  const u32 rounded = ((magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20) - (120u << 3);
  // Below 2^-6, a whole number of 2^-9: the last bits of a sum whose last bit counts 2^-9.
  const u32 small = __float_as_uint(__uint_as_float(magnitude) + 16384.f) & 0xfu;
  return (u8)((magnitude < 0x3c800000u ? small : rounded) | bits >> 24 & 0x80u);
}
DEV int round_to_int(float v) {
  int r;
  asm("cvt.rni.s32.f32 %0, %1;" : "=r"(r) : "f"(v));
  return r;
}

// ---- approximate functions of the special-function unit
#define APPROXIMATE(name, instruction)                         \
  DEV float name(float v) {                                    \
    float r;                                                   \
    asm(instruction ".approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v)); \
    return r;                                                  \
  }
APPROXIMATE(exp2_fast, "ex2")
APPROXIMATE(log2_fast, "lg2")
APPROXIMATE(reciprocal, "rcp")
APPROXIMATE(rsqrt_fast, "rsqrt")
#undef APPROXIMATE
// tanh.approx is off by 2^-11, which a softcap of 50 turns into 2 % of a probability: this is off by 1e-7.
DEV float tanh_fast(float v) { return 1.f - 2.f * reciprocal(1.f + exp2_fast(2.f * LOG2E * v)); }
DEV float silu(float v) { return v * reciprocal(1.f + exp2_fast(-LOG2E * v)); }
DEV float gelu_tanh(float v) { return 0.5f * v * (1.f + tanh_fast(0.7978845608028654f * (v + 0.044715f * v * v * v))); }

// Sine and cosine of an angle up to 2^20: whole quarter turns are taken off in three exact steps (Cody and Waite 1980),
// and polynomials on the rest are off by 1e-7 (Moshier's Cephes).
DEV void sine_and_cosine(float angle, float* sine, float* cosine) {
  const int quarters = round_to_int(angle * 0.636619772f);
  const float turns = -(float)quarters;
  float x = __fmaf_rn(turns, 1.57079601f, angle);
  x = __fmaf_rn(turns, 3.13916473e-7f, x);
  x = __fmaf_rn(turns, 5.39030253e-15f, x);
  const float square = x * x;
  float s = ((-1.9515295891e-4f * square + 8.3321608736e-3f) * square - 1.6666654611e-1f) * square * x + x;
  float c = ((2.443315711809948e-5f * square - 1.388731625493765e-3f) * square + 4.166664568298827e-2f) * square * square;
  c = c - 0.5f * square + 1.f;
  if (quarters & 1) {
    const float swapped = s;
    s = c;
    c = -swapped;
  }
  *sine = quarters & 2 ? -s : s;
  *cosine = quarters & 2 ? -c : c;
}

// ---- memory
DEV vec16 load16(const void* p) {  // read once, by this thread alone: not kept in L1
  vec16 r;
  asm volatile("ld.global.L1::no_allocate.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.x[0]), "=r"(r.x[1]), "=r"(r.x[2]), "=r"(r.x[3])
               : "l"(p)
               : "memory");
  return r;
}
DEV float2 load_pair(const float* p) {  // what another block may have written in this launch: not from L1
  float2 r;
  asm volatile("ld.relaxed.gpu.global.v2.f32 {%0,%1}, [%2];" : "=f"(r.x), "=f"(r.y) : "l"(p) : "memory");
  return r;
}
DEV int2 load_pair(const int* p) {  // likewise
  int2 r;
  asm volatile("ld.relaxed.gpu.global.v2.s32 {%0,%1}, [%2];" : "=r"(r.x), "=r"(r.y) : "l"(p) : "memory");
  return r;
}
DEV float4 load_quad(const float* p) {  // likewise
  float4 r;
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(r.x), "=f"(r.y), "=f"(r.z), "=f"(r.w)
               : "l"(p)
               : "memory");
  return r;
}
DEV u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
// Asynchronous copies to shared memory; where `ok` is false nothing is read and zeros land.
DEV void copy16_async(void* shared, const void* global, bool ok) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(ok ? 16 : 0)
               : "memory");
}
DEV void copy4_async(void* shared, const void* global, bool ok) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(ok ? 4 : 0)
               : "memory");
}
DEV void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
DEV void copies_wait() {  // until at most PENDING committed groups of this thread are in flight
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ---- tensor cores. Lane l holds g = l / 4 and t = l % 4.
// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8 and receives, of each
// matrix, elements (row g, columns 2t and 2t+1), or transposed (rows 2t and 2t+1, column g).
#define LOAD_MATRICES(name, transposed)                                                          \
  DEV void name(u32* r, const void* row) {                                                       \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" transposed ".shared.b16 {%0,%1,%2,%3}, [%4];"   \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                                \
                 : "r"(shared_address(row))                                                      \
                 : "memory");                                                                    \
  }
LOAD_MATRICES(load_matrices, "")
LOAD_MATRICES(load_matrices_transposed, ".trans")
#undef LOAD_MATRICES
// c [16, 8] += a [16, 16] b [16, 8]. c: rows g (0, 1) and g + 8 (2, 3), columns 2t and 2t+1.
#define MMA(name, type)                                                                                 \
  DEV void name(float* c, const u32* a, const u32* b) {                                                 \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                 \
                 ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"                              \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                   \
  }
MMA(mma_bf16, "bf16")
MMA(mma_io, IO_TYPE)
#undef MMA
// The same of int8, a [16, 32] b [32, 8], exactly: ldmatrix gives fragments of rows of bytes, of two bytes for a half.
DEV void mma_s8(int* c, const u32* a, const u32* b) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- reductions
DEV float warp_sum(float v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) v += __shfl_xor_sync(FULL_WARP, v, offset);
  return v;
}
DEV float warp_max(float v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) v = fmaxf(v, __shfl_xor_sync(FULL_WARP, v, offset));
  return v;
}
DEV u32 warp_max(u32 v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) v = max(v, __shfl_xor_sync(FULL_WARP, v, offset));
  return v;
}
// Sum over a block of WARPS warps; every thread gets it. `scratch` holds WARPS floats and is free to reuse after the
// block's next barrier.
template <int WARPS>
DEV float block_sum(float v, float* scratch) {
  v = warp_sum(v);
  if (WARPS == 1) return v;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  float total = 0.f;
#pragma unroll
  for (int w = 0; w < WARPS; w++) total += scratch[w];
  return total;
}

// ---- programmatic dependent launch (compute capability 9.0 and newer)
// In a CUDA graph a kernel may begin while the one before it runs: as soon as all blocks of that one have made this call,
// or have ended. Every thread of a kernel makes it, once. What the kernels before have written is there after it; until
// then a kernel writes nothing and reads no argument but those declared EARLY.
#define EARLY  // of a parameter: weights, which no kernel of a step writes
DEV void wait_for_kernels_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- work that is split among blocks
// Take a ticket for this block's split; whoever takes the last one of a tile finds what all of them wrote.
DEV bool is_last(int* ticket, int splits, unsigned char* shared) {
  __threadfence();
  __syncthreads();  // all have written, and nobody reads the tiles any more
  int* last = reinterpret_cast<int*>(shared);
  if (threadIdx.x == 0) {
    *last = atomicAdd(ticket, 1) == splits - 1;
    if (*last) *ticket = 0;  // for the next launch
  }
  __syncthreads();
  __threadfence();
  return *last;
}
