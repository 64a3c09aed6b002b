// Products with blocks: weights of 4 or 8 bits in groups of inputs that share a scale, times 8-bit activations.
#pragma once
#include "rows.h"

// Integer dot products of 4-bit weights, 0 to 15: of each lane four consecutive inputs of one output. With AVX2 sums have
// 16 bits, which hold BLOCK inputs; `nibbles_sum` widens them.
INLINE vi nibbles_dot(vi sum, vu w, u32 x) {
#if defined(__AVX2__)
  if constexpr (LANES == 16) {
#if defined(__AVX512VNNI__)
    return bits_as<vi>(_mm512_dpbusd_epi32(bits_as<__m512i>(sum), bits_as<__m512i>(w), _mm512_set1_epi32((int)x)));
#elif defined(__AVX512BW__)
    const __m512i pairs = _mm512_maddubs_epi16(bits_as<__m512i>(w), _mm512_set1_epi32((int)x));
    return bits_as<vi>(_mm512_add_epi16(bits_as<__m512i>(sum), pairs));
#endif
  } else if constexpr (LANES == 8) {
#if defined(__AVXVNNI__)
    return bits_as<vi>(
        _mm256_dpbusd_avx_epi32(bits_as<__m256i>(sum), bits_as<__m256i>(w), _mm256_set1_epi32((int)x)));
#else
    const __m256i pairs = _mm256_maddubs_epi16(bits_as<__m256i>(w), _mm256_set1_epi32((int)x));
    // Kept in its register: else g++ adds up in another order, for which there are not enough of them.
    return in_register(bits_as<vi>(_mm256_add_epi16(bits_as<__m256i>(sum), pairs)));
#endif
  }
#elif defined(__ARM_FEATURE_DOTPROD)
  return bits_as<vi>(
      vdotq_s32(bits_as<int32x4_t>(sum), bits_as<int8x16_t>(w), vreinterpretq_s8_u32(vdupq_n_u32(x))));
#endif
  for (int i = 0; i < 4; i++) sum += bits_as<vi>(w >> 8 * i & 0xff) * (i32)(s8)(x >> 8 * i);
  return sum;
}
INLINE vi nibbles_sum(vi sum) {
#if defined(__AVX512BW__) && !defined(__AVX512VNNI__)
  if constexpr (LANES == 16)
    return bits_as<vi>(_mm512_madd_epi16(bits_as<__m512i>(sum), _mm512_set1_epi16(1)));
#elif defined(__AVX2__) && !defined(__AVXVNNI__)
  if constexpr (LANES == 8)
    return bits_as<vi>(_mm256_madd_epi16(bits_as<__m256i>(sum), _mm256_set1_epi16(1)));
#endif
  return sum;
}

// What scales a group of a panel: weight = scale * number + offset.
struct GroupScales {
  vf scale[VECTORS], offset[VECTORS];
  vf outer[2][VECTORS];

  // Read what stands before the weights of the group that begins at `input`; return where those are.
  INLINE const u8* read(GroupScales& to, const Scaling& s, const u8* at, i64 input) {
    if (const i64 count = s.outer_numbers(); count && input % OUTER == 0)
      for (i64 i = 0; i < count; i++, at += PANEL * 2) vectors<Float16>(to.outer[i], at);
    at = numbers(to.scale, s, at, 0, to);
    if (s.offset == MINIMUM) return numbers(to.offset, s, at, 1, to);
    if (s.offset == ZERO) {
      vectors<Int8>(to.offset, at);
      for (int v = 0; v < VECTORS; v++) to.offset[v] *= -to.scale[v];
      return at + PANEL;
    }
    for (int v = 0; v < VECTORS; v++) to.offset[v] = s.type == B4 ? -8.f * to.scale[v] : vf{};
    return at;
  }

 private:
  template <class T>
  INLINE void vectors(vf (&to)[VECTORS], const u8* at) {
    for (int v = 0; v < VECTORS; v++) to[v] = T::load((const typename T::type*)at + v * LANES);
  }
  INLINE const u8* numbers(vf (&to)[VECTORS], const Scaling& s, const u8* at, int which, const GroupScales& all) {
    if (s.scale == F32) vectors<Float32>(to, at);
    else if (s.scale == F16) vectors<Float16>(to, at);
    else {
      vectors<Int8>(to, at);
      for (int v = 0; v < VECTORS; v++) to[v] *= all.outer[which][v];
    }
    return at + PANEL * s.scale_bytes();
  }
};

// Add to the sums out [ROWS][PANEL] of rows with one panel. PIECE inputs are added up as integers.
template <int TYPE, int PIECE, int ROWS, bool FETCH>
INLINE void add_blocks(const Scaling& s, const Rows& x, const u8* panel, i64 inputs, const Next& next, f32* out) {
  constexpr int HALF = VECTORS / 2;
  const u8* const begin = panel;
  GroupScales scales;
  i64 piece = 0;
  for (i64 k = 0; k < inputs; k += s.group) {
    panel = GroupScales::read(scales, s, panel, k);
    for (const i64 end = (k + s.group) / PIECE; piece < end; piece++) {
      vi whole[ROWS][VECTORS] = {};
      if constexpr (TYPE == B4) {
#pragma GCC unroll 8
        for (int step = 0; step < PIECE / 4; step++, panel += PANEL * 2) {
          if (step * PANEL * 2 % 64 == 0) Next::fetch<FETCH>(next, panel - begin, PANEL * 2);
          for (int v = 0; v < HALF; v++) {
            const vu both = load_bits<vu>(panel + v * LANES * 4);
            const vu low = in_register(both & 0x0f0f0f0fu), high = in_register(both >> 4 & 0x0f0f0f0fu);
            for (int r = 0; r < ROWS; r++) {
              const u32 a = ((const u32*)Rows::row(x, r))[piece * (PIECE / 4) + step];
              whole[r][v] = nibbles_dot(whole[r][v], low, a);
              whole[r][v + HALF] = nibbles_dot(whole[r][v + HALF], high, a);
            }
          }
        }
      } else {
        for (int r = 0; r < ROWS; r++)
          for (int v = 0; v < VECTORS; v++) whole[r][v] = all(x.start[r * x.pieces + piece]);
#pragma GCC unroll 4
        for (int step = 0; step < PIECE / DOT; step++, panel += PANEL * DOT) {
          Next::fetch<FETCH>(next, panel - begin, PANEL * DOT);
          for (int r = 0; r < ROWS; r++) {
            const u32 a = ((const u32*)Rows::row(x, r))[piece * (PIECE / DOT) + step];
            for (int v = 0; v < VECTORS; v++) whole[r][v] = dot(whole[r][v], panel + v * LANES * DOT, a);
          }
        }
      }
      for (int r = 0; r < ROWS; r++) {
        const f32 row_scale = x.scale[r * x.blocks + piece * PIECE / BLOCK];
        for (int v = 0; v < VECTORS; v++) {
          const vi number = TYPE == B4 ? nibbles_sum(whole[r][v]) : whole[r][v];
          const vf part = scales.scale[v] * __builtin_convertvector(number, vf);
          f32* to = out + r * PANEL + v * LANES;
          const vf scaled = row_scale * (part + scales.offset[v] * x.total[r * x.pieces + piece]);
          Float32::store(to, Float32::load(to) + scaled);
        }
      }
    }
  }
}
