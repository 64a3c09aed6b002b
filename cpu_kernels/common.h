// What all CPU kernels share: number types, vectors of the machine's width, parallel loops. The only file with intrinsics.
//
// Kernels are written once, with vectors of LANES floats: 16 with AVX-512, 8 with AVX2, 4 elsewhere (NEON, SSE).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

using i64 = int64_t;
using i32 = int32_t;
using u32 = uint32_t;
using u16 = uint16_t;
using s16 = int16_t;
using s8 = int8_t;
using u8 = uint8_t;
using f32 = float;
using f64 = double;

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
constexpr int LANES = 16;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr bool MANY_REGISTERS = LANES != 8;  // 32 vector registers; AVX2 has 16

typedef f32 vf __attribute__((vector_size(LANES * 4)));
typedef i32 vi __attribute__((vector_size(LANES * 4)));
typedef u32 vu __attribute__((vector_size(LANES * 4)));
typedef u16 vh __attribute__((vector_size(LANES * 2)));
typedef s16 vs2 __attribute__((vector_size(LANES * 4)));
typedef s8 vb __attribute__((vector_size(LANES)));
typedef s8 vb2 __attribute__((vector_size(LANES * 2)));

#define INLINE static inline __attribute__((always_inline))

template <class V>
INLINE V load_bits(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class To, class From>
INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
INLINE vf all(f32 x) { return x - vf{}; }
INLINE vi all(i32 x) { return x - vi{}; }
INLINE vi lanes() {
  vi v;
  for (int i = 0; i < LANES; i++) v[i] = i;
  return v;
}
// Read numbers wider than they are stored. One instruction: of __builtin_convertvector g++ makes five, and of bytes that
// become 32 bits 35, which move one number each.
INLINE vu widened(const u16* p) {
#if defined(__AVX512F__)
  if constexpr (LANES == 16) return bits_as<vu>(_mm512_cvtepu16_epi32(load_bits<__m256i>(p)));
#endif
#if defined(__AVX2__)
  if constexpr (LANES == 8) return bits_as<vu>(_mm256_cvtepu16_epi32(load_bits<__m128i>(p)));
#endif
  return __builtin_convertvector(load_bits<vh>(p), vu);
}
INLINE vi widened(const s8* p) {
#if defined(__AVX512F__)
  if constexpr (LANES == 16) return bits_as<vi>(_mm512_cvtepi8_epi32(load_bits<__m128i>(p)));
#endif
#if defined(__AVX2__)
  if constexpr (LANES == 8) return bits_as<vi>(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#endif
  return __builtin_convertvector(load_bits<vb>(p), vi);
}
// Two numbers of 16 bits in each lane.
INLINE vi widened_pairs(const u8* p) {
#if defined(__AVX512BW__)
  if constexpr (LANES == 16) return bits_as<vi>(_mm512_cvtepi8_epi16(load_bits<__m256i>(p)));
#endif
#if defined(__AVX2__)
  if constexpr (LANES == 8) return bits_as<vi>(_mm256_cvtepi8_epi16(load_bits<__m128i>(p)));
#endif
  return bits_as<vi>(__builtin_convertvector(load_bits<vb2>(p), vs2));
}

INLINE vf larger(vf a, vf b) { return a > b ? a : b; }

// The same value, which the compiler now has to keep in a register: it would load it again for every use.
template <class V>
INLINE V in_register(V v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

// For lane i the lane index(i) of a, or of b where that is LANES and more. Indices are constants of the compiler: of a
// loop over 16 lanes, clang makes no shuffle.
template <class F, int... LANE>
INLINE vf pick(vf a, vf b, F index, std::integer_sequence<int, LANE...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, index(LANE)...);
#else
  return __builtin_shuffle(a, b, vi{index(LANE)...});
#endif
}
template <class F>
INLINE vf pick(vf a, vf b, F index) {
  return pick(a, b, index, std::make_integer_sequence<int, LANES>{});
}

// Lanes in another order, so that each meets the one `half` away.
template <int HALF>
INLINE vf turned(vf v) {
  return pick(v, v, [](int i) { return i ^ HALF; });
}
template <int HALF = LANES / 2>
INLINE f32 sum(vf v) {
  if constexpr (HALF == 0) return v[0];
  else return sum<HALF / 2>(v + turned<HALF>(v));
}
// Whether a lane is set of what a comparison returned, or several or-ed.
INLINE bool any(vi mask) { return sum(mask < 0 ? all(1.f) : vf{}) > 0; }
template <int HALF = LANES / 2>
INLINE f32 largest(vf v) {
  if constexpr (HALF == 0) return v[0];
  else return largest<HALF / 2>(larger(v, turned<HALF>(v)));
}

// Number types of activations and weights, by the codes that the wrappers pass. B4 and B8 are blocks (panels.h). S8 is for
// products with activations of 8 bits, S8_EXACT for products with the activations as they are.
enum { F32 = 0, BF16 = 1, F16 = 2, S8 = 3, B4 = 4, B8 = 5, S8_EXACT = 6 };

struct Float32 {
  using type = f32;
  INLINE vf load(const type* p) { return load_bits<vf>(p); }
  INLINE void store(type* p, vf v) { memcpy(p, &v, sizeof v); }
};

struct BFloat16 {
  using type = u16;
  INLINE vf load(const type* p) { return bits_as<vf>(widened(p) << 16); }
  INLINE void store(type* p, vf v) {
    const vu bits = bits_as<vu>(v);
    const vu rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const vh out = __builtin_convertvector(v == v ? rounded : (vu{} + 0x7fc0), vh);
    memcpy(p, &out, sizeof out);
  }
};

struct Float16 {
  using type = u16;
#if defined(__x86_64__) && defined(__F16C__)
  INLINE vf load(const type* p) {
    if constexpr (LANES == 4) {
      return bits_as<vf>(_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)p)));
    } else {
#if defined(__AVX512F__)
      if constexpr (LANES == 16) return bits_as<vf>(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)));
#endif
      if constexpr (LANES == 8) return bits_as<vf>(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
    }
  }
  INLINE void store(type* p, vf v) {
    if constexpr (LANES == 4) {
      const __m128i half = _mm_cvtps_ph(bits_as<__m128>(v), _MM_FROUND_TO_NEAREST_INT);
      memcpy(p, &half, 8);
    } else {
#if defined(__AVX512F__)
      if constexpr (LANES == 16)
        _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(bits_as<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#endif
      if constexpr (LANES == 8)
        _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(bits_as<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
    }
  }
#else
  INLINE vf load(const type* p) {
    vf v;
    for (int i = 0; i < LANES; i++) v[i] = (f32)load_bits<_Float16>(p + i);
    return v;
  }
  INLINE void store(type* p, vf v) {
    for (int i = 0; i < LANES; i++) p[i] = bits_as<u16>((_Float16)v[i]);
  }
#endif
};

struct Int8 {
  using type = s8;
  INLINE vf load(const type* p) { return __builtin_convertvector(widened(p), vf); }
};

// Load or store the first `n` lanes; a row's last piece may be shorter than a vector. Lanes beyond are zero.
template <class T>
INLINE vf load(const typename T::type* p, i64 n) {
  if (__builtin_expect(n >= LANES, 1)) return T::load(p);
  typename T::type part[LANES] = {};
  memcpy(part, p, n * sizeof part[0]);
  return T::load(part);
}
template <class T>
INLINE void store(typename T::type* p, vf v, i64 n) {
  if (__builtin_expect(n >= LANES, 1)) return T::store(p, v);
  typename T::type part[LANES];
  T::store(part, v);
  memcpy(p, part, n * sizeof part[0]);
}
// The value as it is after being stored.
template <class T>
INLINE vf rounded(vf v) {
  typename T::type stored[LANES];
  T::store(stored, v);
  return T::load(stored);
}

// Call f with the type of a code.
template <class F>
INLINE void with_type(i64 code, F&& f) {
  if (code == F32) f(Float32{});
  else if (code == BF16) f(BFloat16{});
  else f(Float16{});
}

// e^x as a number near 1 and a power of two: Cephes' polynomial, two units in the last place.
INLINE vf exp_parts(vf x, vi& power) {
  const vf magic = all(12582912.f);  // 1.5 * 2^23: adding it rounds to a whole number, which the low bits then hold
  const vf shifted = x * 1.44269504f + magic;
  const vf n = shifted - magic;
  const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vf p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  power = bits_as<vi>(bits_as<vu>(shifted) - bits_as<vu>(magic));
  return p * (r * r) + r + 1.f;
}
// e^x. Below -87.3 it stays at e^-87.3; NaN stays NaN.
INLINE vf exp(vf x) {
  x = x < -87.3f ? all(-87.3f) : x;
  x = x > 88.7f ? all(88.7f) : x;
  vi power;
  const vf p = exp_parts(x, power);
  // In two steps: 2^128 is no float, and halves of the exponent are.
  const vi half = power >> 1;
  const vi rest = power - half;
  return p * bits_as<vf>((half + 127) << 23) * bits_as<vf>((rest + 127) << 23);
}
// The same for x up to 0.
INLINE vf exp_negative(vf x) {
  vi power;
  const vf p = exp_parts(larger(all(-87.3f), x), power);  // NaN is not smaller
  return p * bits_as<vf>((power + 127) << 23);
}
INLINE vf silu(vf x) { return x / (1.f + exp(-x)); }
// To an absolute error of some 1e-7.
INLINE vf tanh(vf x) { return 1.f - 2.f / (1.f + exp(2.f * x)); }
// 0.5 x (1 + tanh(u)) is x / (1 + e^-2u), which does not lose its digits where tanh is near -1.
INLINE vf gelu_tanh(vf x) { return x / (1.f + exp(-1.59576912160f * (x + 0.044715f * x * x * x))); }
enum { NO_ACTIVATION = 0, SILU = 1, GELU_TANH = 2 };
INLINE vf activate(vf x, i64 kind) { return kind == SILU ? silu(x) : gelu_tanh(x); }

// Turn LANES vectors, the rows of a matrix, into its columns. Each round turns the bits of a number's place by one.
INLINE void transpose(vf (&rows)[LANES]) {
  const auto low = [](int i) { return i / 2 + i % 2 * LANES; };
  const auto high = [](int i) { return i / 2 + i % 2 * LANES + LANES / 2; };
  for (int round = 1; round < LANES; round *= 2) {
    vf turned[LANES];
    for (int i = 0; i < LANES / 2; i++) {
      turned[2 * i] = pick(rows[i], rows[i + LANES / 2], low);
      turned[2 * i + 1] = pick(rows[i], rows[i + LANES / 2], high);
    }
    for (int i = 0; i < LANES; i++) rows[i] = turned[i];
  }
}

// Sums of LANES vectors, one a lane. Halves are added pairwise, so vectors are taken in bit-reversed order.
template <int HALF>
INLINE vf add_halves(vf a, vf b) {
  const auto first = [](int i) { return i / (2 * HALF) * 2 * HALF + i % HALF + (i % (2 * HALF) < HALF ? 0 : LANES); };
  const auto second = [first](int i) { return first(i) + HALF; };
  return pick(a, b, first) + pick(a, b, second);
}
INLINE vf sums(const vf* v) {
  if constexpr (LANES == 4) {
    return add_halves<1>(add_halves<2>(v[0], v[2]), add_halves<2>(v[1], v[3]));
  } else if constexpr (LANES == 8) {
    const vf even = add_halves<2>(add_halves<4>(v[0], v[4]), add_halves<4>(v[2], v[6]));
    const vf odd = add_halves<2>(add_halves<4>(v[1], v[5]), add_halves<4>(v[3], v[7]));
    return add_halves<1>(even, odd);
  } else {
    vf quarter[4];
    for (int i = 0; i < 4; i++)
      quarter[i] = add_halves<4>(add_halves<8>(v[i], v[i + 8]), add_halves<8>(v[i + 4], v[i + 12]));
    return add_halves<1>(add_halves<2>(quarter[0], quarter[2]), add_halves<2>(quarter[1], quarter[3]));
  }
}

// The sum plus both products of each lane's two numbers with the two of x. Numbers of 8 bits cannot overflow it.
INLINE vi dot_pairs(vi sum, vi pairs, u32 x) {
#if defined(__AVX2__)
  if constexpr (LANES == 8)
    return sum + bits_as<vi>(_mm256_madd_epi16(bits_as<__m256i>(pairs), _mm256_set1_epi32((int)x)));
#if defined(__AVX512BW__)
  if constexpr (LANES == 16)
    return sum + bits_as<vi>(_mm512_madd_epi16(bits_as<__m512i>(pairs), _mm512_set1_epi32((int)x)));
#endif
#endif
  return sum + (pairs << 16 >> 16) * (i32)(s16)(x & 0xffff) + (pairs >> 16) * (i32)(s16)(x >> 16);
}

// Integer dot products. A vector of weights holds, for each lane, DOT consecutive inputs of one output; `x` holds the
// same inputs of one row. With VNNI weights are stored plus 128, as the instruction wants them unsigned: the sum is
// then too large by 128 times the sum of x, which the caller starts from (DOT_OFFSET).
#if (defined(__AVX512VNNI__) && defined(__AVX512VL__)) || defined(__AVXVNNI__)
constexpr int DOT = 4, DOT_OFFSET = 128;
INLINE vi dot(vi sum, const u8* w, u32 x) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  if constexpr (LANES == 16)
    return bits_as<vi>(_mm512_dpbusd_epi32(bits_as<__m512i>(sum), _mm512_loadu_si512(w), _mm512_set1_epi32((int)x)));
  else
    return bits_as<vi>(
        _mm256_dpbusd_epi32(bits_as<__m256i>(sum), _mm256_loadu_si256((const __m256i*)w), _mm256_set1_epi32((int)x)));
#else
  return bits_as<vi>(_mm256_dpbusd_avx_epi32(
      bits_as<__m256i>(sum), _mm256_loadu_si256((const __m256i*)w), _mm256_set1_epi32((int)x)));
#endif
}
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int DOT = 4, DOT_OFFSET = 0;
INLINE vi dot(vi sum, const u8* w, u32 x) {
  return bits_as<vi>(vdotq_s32(bits_as<int32x4_t>(sum), vld1q_s8((const s8*)w), vreinterpretq_s8_u32(vdupq_n_u32(x))));
}
#else
// Without such an instruction two inputs are widened to 16 bits, and so is x by whoever quantises it.
constexpr int DOT = 2, DOT_OFFSET = 0;
INLINE vi dot(vi sum, const u8* w, u32 x) { return dot_pairs(sum, widened_pairs(w), x); }
#endif

// Two bfloat16 inputs of each lane's output times the same inputs of one row.
#if defined(__AVX512BF16__) && !defined(SLOW_BF16_DOT)  // compile.py says where
constexpr bool BF16_DOT = LANES == 16;
INLINE vf dot_bf16(vf sum, vu w, u32 x) {
  return bits_as<vf>(
      _mm512_dpbf16_ps(bits_as<__m512>(sum), bits_as<__m512bh>(w), bits_as<__m512bh>(_mm512_set1_epi32((int)x))));
}
#else
constexpr bool BF16_DOT = false;
INLINE vf dot_bf16(vf sum, vu, u32) { return sum; }
#endif

// Matrix tiles: 16 or 32 rows of bfloat16 times 32 outputs of a panel, which stand in pairs as the tiles want them.
#if defined(__AMX_TILE__) && defined(__AMX_BF16__)
constexpr bool HAS_TILES = LANES == 16;
INLINE void begin_tiles() {
  struct alignas(64) {
    u8 palette = 1, start_row = 0, reserved[14] = {};
    u16 row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    u8 rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  _tile_loadconfig(&config);
}
INLINE void end_tiles() { _tile_release(); }
// out [32][32] = x [16 or 32][steps * 32], rows x_stride bytes apart, times a panel of as many inputs.
INLINE void multiply_tiles(const u8* x, i64 x_stride, bool more_rows, const u8* panel, i64 steps, f32* out) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (i64 i = 0; i < steps; i++, x += 64, panel += 2048) {
    _tile_loadd(4, x, x_stride);
    _tile_loadd(6, panel, 128);
    _tile_loadd(7, panel + 64, 128);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (!more_rows) continue;
    _tile_loadd(5, x + 16 * x_stride, x_stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, 128);
  _tile_stored(1, out + 16, 128);
  _tile_stored(2, out + 16 * 32, 128);
  _tile_stored(3, out + 16 * 32 + 16, 128);
}
#else
constexpr bool HAS_TILES = false;
INLINE void begin_tiles() {}
INLINE void end_tiles() {}
INLINE void multiply_tiles(const u8*, i64, bool, const u8*, i64, f32*) {}
#endif
// Whether the system lets this process use tiles, which it has to be asked for (pool.cpp).
bool tiles_allowed();

// Run f(0) .. f(count - 1), each once, on the pool's threads and this one; return when all are done (pool.cpp).
extern "C" void run_parallel(i64 count, void (*work)(void*, i64), void* context);
extern "C" i64 num_threads();
template <class F>
void parallel(i64 count, F&& f) {
  run_parallel(count, [](void* context, i64 index) { (*(F*)context)(index); }, (void*)&f);
}
// The same in pieces of neighbours: f(begin, end). In each round every thread gets half of its share of what is left, so
// pieces are long streams at first and short at the end, and a late thread gets less.
template <class F>
void parallel_ranges(i64 count, i64 least, F&& f) {
  constexpr i64 MOST_ROUNDS = 5;
  const i64 threads = num_threads(), most = std::max<i64>(1, count / std::max<i64>(1, least));
  if (most < threads) return parallel(most, [&](i64 i) { f(count * i / most, count * (i + 1) / most); });
  i64 rounds = 1;
  while (rounds < MOST_ROUNDS && threads << rounds <= most) rounds++;
  const auto bound = [&](i64 i) {
    const i64 round = std::min(i / threads, rounds - 1), left = i64(1) << (rounds - 1 - round);
    const i64 done = threads * ((i64(1) << (rounds - 1)) - left) + (i - round * threads) * std::max<i64>(1, left / 2);
    return count * done / (threads << (rounds - 1));
  };
  parallel(rounds * threads, [&](i64 i) { f(bound(i), bound(i + 1)); });
}
// Memory of the calling thread, good until its next call of this function for the same use, 0 or 1.
void* scratch(size_t num_bytes, int use = 0);
