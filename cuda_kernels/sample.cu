// From logits to tokens without sorting: one block of THREADS (compile-time) per row.
//
// Noise decides: token i's lot is score_i - log(E_i), E_i exponential and a hash of (key of the row, token), and the
// largest lot wins with probability softmax(score) (Gumbel-max; Maddison et al. 2014, arXiv:1411.0030). A filter
// (min_p, top_k, top_p) keeps scores at or above a threshold. Instead of finding the threshold, the winner of a larger
// set is accepted if it would be kept itself, which one sweep over the row tells: how many, and what mass, lie above
// it. If not, all scores up to its own are out, and that same sweep already found the winner among the rest
// (rejection as in FlashInfer's sampler; as noise is fixed, the token is the very one that sorting would give).
//
// logits [R, vocab] float, edited in place; params [R, 4]: temperature (0: greedy), top_k, top_p, min_p, or null: all
// greedy; keys [R, 2]; hashes [vocab]. Out: ids [R], NOT_FINITE or NOTHING_LEFT where the row failed.
// Edits come first, or are null: starts [4, R + 1], where each row's begin in the lists of masked entries (set to
// -inf), biased ones (bias is added), tokens seen (penalties [4, seen]: count in the output, repetition, presence,
// frequency) and masks [masks, words], a bit per token that may be chosen. Entries are row * vocab + token, each at
// most once a list (masked ones may come twice).
#include "common.cuh"

#define WARPS (THREADS / 32)
#define PIVOTS 7  // looked at in one sweep
constexpr int LOADS = 8;  // a thread has in flight: a row is read by one multiprocessor
#define NOT_FINITE (-1)
#define NOTHING_LEFT (-2)

// Order floats as unsigned integers.
DEV u32 ordered(float v) {
  const u32 bits = __float_as_uint(v);
  return bits ^ ((u32)((int)bits >> 31) | 0x80000000u);
}
DEV float from_ordered(u32 key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }
// Of equal values the one with the lowest id is the largest candidate.
DEV u64 candidate(float value, int id) { return (u64)ordered(value) << 32 | (0xffffffffu - (u32)id); }
DEV int id_of(u64 c) { return (int)(0xffffffffu - (u32)c); }

struct Row {
  const float* logits;
  const int* hashes;
  const u32* allowed;
  int vocab;
  float top, inverse_temperature;
  u32 offset, factor;
};

struct Swept {  // of the tokens of a set
  u64 winner;   // by lot; 0 for an empty set
  int count;
  float mass;   // of exp(score)
};

DEV float logit(const Row& row, int i) {
  const float x = row.logits[i] + 0.f;  // -0 becomes 0: they are equals
  return row.allowed && !(row.allowed[i / 32] >> (i % 32) & 1u) ? -INF : x;
}
DEV float score(const Row& row, int i) { return (logit(row, i) - row.top) * row.inverse_temperature; }

// -log(-log1p(-u)), u the hash of (row, token) in (0, 1).
DEV float noise(const Row& row, int i) {
  u32 h = ((u32)row.hashes[i] ^ row.offset) * row.factor;
  h = (h ^ (h >> 15)) * 0x2c1b3c6du;
  h = (h ^ (h >> 12)) * 0x297a2d39u;
  h = (h ^ (h >> 15)) & 0x7fffffffu;
  const float u = fminf(((float)(int)h + 0.5f) * 4.656612873077393e-10f, 0.99999994f);
  // A small u decides who wins, and 1 - u would lose its digits: three terms more than the first of the series.
  const float e = u < 0.03f ? u * (1.f + u * (0.5f + u * (1.f / 3.f + u * 0.25f))) : -LN2 * log2_fast(1.f - u);
  return -LN2 * log2_fast(e);
}

DEV u64 block_max(u64 v, u64* scratch) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) v = max(v, __shfl_xor_sync(FULL_WARP, v, offset));
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  v = scratch[threadIdx.x % WARPS];
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) v = max(v, __shfl_xor_sync(FULL_WARP, v, offset));
  return v;
}

DEV float block_total(float v, float* scratch) {
  __syncthreads();
  return block_sum<WARPS>(v, scratch);
}

// Look at all tokens whose score is above `low` (in `ordered`).
template <bool RACE>
DEV Swept sweep(const Row& row, u32 low, u64* scratch) {
  Swept s = {0, 0, 0.f};
#pragma unroll LOADS
  for (int i = threadIdx.x; i < row.vocab; i += THREADS) {
    const float x = score(row, i);
    if (ordered(x) <= low) continue;
    s.count++;
    s.mass += exp2_fast(x * LOG2E);
    if (RACE) s.winner = max(s.winner, candidate(x + noise(row, i), i));
  }
  float* floats = reinterpret_cast<float*>(scratch);
  if (RACE) s.winner = block_max(s.winner, scratch);
  s.mass = block_total(s.mass, floats);
  s.count = (int)block_total((float)s.count, floats);  // exact: a vocabulary is below 2^24
  return s;
}

// A `low` that leaves the k likeliest tokens above it, and those that equal the last of them; more than k are above the
// one given. Each sweep counts above PIVOTS values in between and leaves an eighth of the range.
DEV u32 below_the_kth(const Row& row, u32 low, int k, u64* scratch) {
  u32 high = ordered(0.f);  // no score is above that of the likeliest, 0
  while (high - low > 1) {
    const u32 step = max((high - low) / (PIVOTS + 1), 1u);
    int above[PIVOTS] = {};
#pragma unroll LOADS
    for (int i = threadIdx.x; i < row.vocab; i += THREADS) {
      const u32 key = ordered(score(row, i));
#pragma unroll
      for (int j = 0; j < PIVOTS; j++) above[j] += key > low + (j + 1) * step;
    }
    const u32 from = low;
#pragma unroll
    for (int j = 0; j < PIVOTS; j++) {
      const u32 pivot = from + (j + 1) * step;
      const int count = (int)block_total((float)above[j], reinterpret_cast<float*>(scratch));
      if (count == k) return pivot;
      if (count > k) low = pivot;
      else high = min(high, pivot);
    }
  }
  return low;
}

DEV int draw(const Row& row, int top_k, float top_p, float min_p, u64* scratch) {
  // What is masked is at -inf and never in a set.
  u32 low = ordered(fmaxf(min_p > 0.f ? log2_fast(min_p) * LN2 : -3.4028234e38f, -3.4028234e38f)) - 1;
  Swept all = sweep<true>(row, low, scratch);
  if (top_k < all.count && top_p < 1.f) {  // top_p is of the mass that top_k leaves
    all = sweep<true>(row, below_the_kth(row, low, top_k, scratch), scratch);
    top_k = row.vocab;
  }
  if (top_k >= all.count && top_p >= 1.f) return id_of(all.winner);
  u64 winner = all.winner;
  while (true) {
    const int id = id_of(winner);
    const Swept above = sweep<true>(row, ordered(score(row, id)), scratch);
    if (above.count == 0 || (above.count < top_k && above.mass < top_p * all.mass)) return id;
    winner = above.winner;
  }
}

// The largest logit and its token; a NaN is above all.
DEV u64 likeliest(const Row& row, u64* scratch) {
  u32 best = 0;
  int id = 0;
#pragma unroll LOADS
  for (int i = threadIdx.x; i < row.vocab; i += THREADS) {
    const float x = logit(row, i);
    const u32 key = __float_as_uint(x) << 1 > 0xff000000u ? 0xffffffffu : ordered(x);
    if (key > best) best = key, id = i;
  }
  return block_max(best ? (u64)best << 32 | (0xffffffffu - (u32)id) : 0, scratch);
}

// Edit row r of the logits in vLLM's order, and return its mask, if it has one. In the reference's very roundings.
DEV const u32* edit(float* logits, const int* starts, const s64* masked, const s64* biased, const float* bias,
                    const s64* seen, const float* penalties, const u32* masks, int words, int r) {
  const int rows = gridDim.x, *of_masked = starts + r, *of_biased = of_masked + rows + 1;
  const int *of_seen = of_biased + rows + 1, *of_masks = of_seen + rows + 1;
  const int num_seen = of_seen[rows - r];
  for (int i = of_masked[0] + threadIdx.x; i < of_masked[1]; i += THREADS) logits[masked[i]] = -INF;
  __syncthreads();  // an entry may be in several lists
  for (int i = of_biased[0] + threadIdx.x; i < of_biased[1]; i += THREADS) logits[biased[i]] += bias[i];
  __syncthreads();
  for (int i = of_seen[0] + threadIdx.x; i < of_seen[1]; i += THREADS) {
    const float count = penalties[i], repetition = penalties[num_seen + i], presence = penalties[2 * num_seen + i];
    float x = logits[seen[i]];
    x = x > 0.f ? x / repetition : x * repetition;
    x = __fsub_rn(x, __fmul_rn(penalties[3 * num_seen + i], count));
    logits[seen[i]] = __fsub_rn(x, count > 0.f ? presence : 0.f);
  }
  __syncthreads();
  return of_masks[1] > of_masks[0] ? masks + (s64)of_masks[0] * words : nullptr;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    sample(float* __restrict__ logits, const float* __restrict__ params, const int* __restrict__ keys,
           const int* __restrict__ hashes, const int* __restrict__ starts, const s64* __restrict__ masked,
           const s64* __restrict__ biased, const float* __restrict__ bias, const s64* __restrict__ seen,
           const float* __restrict__ penalties, const u32* __restrict__ masks, s64* __restrict__ ids, int vocab,
           int words) {
  wait_for_kernels_before();
  DYN_SMEM(u64, scratch);  // [WARPS]
  const int r = blockIdx.x;
  Row row = {logits + (s64)r * vocab, hashes, nullptr, vocab, 0.f, 1.f, 0u, 0u};
  u64 best = likeliest(row, scratch);
  // Looked at before the edits: a mask could hide a NaN, an infinity turn into one.
  const bool finite = fabsf(from_ordered((u32)(best >> 32))) < INF;
  if (starts) {
    row.allowed = edit(logits, starts, masked, biased, bias, seen, penalties, masks, words, r);
    best = likeliest(row, scratch);
  }
  row.top = from_ordered((u32)(best >> 32));
  int id = !finite ? NOT_FINITE : row.top == -INF ? NOTHING_LEFT : id_of(best);
  const float temperature = params ? params[r * 4] : 0.f;
  if (temperature > 0.f && id >= 0 && row.top < INF) {  // a penalty may have made an infinity: that token wins
    row.inverse_temperature = 1.f / temperature;
    row.offset = (u32)keys[r * 2];
    row.factor = (u32)keys[r * 2 + 1];
    id = draw(row, (int)params[r * 4 + 1], params[r * 4 + 2], params[r * 4 + 3], scratch);
  }
  if (threadIdx.x == 0) ids[r] = id;
}

// Of the tokens ids [R] at logits [R, vocab]: log-probability, and rank (1 and the number of likelier tokens). What is
// said of a row that failed, with a negative id, means nothing.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    token_logprobs(const float* __restrict__ logits, const s64* __restrict__ ids, float* __restrict__ logprobs,
                   s64* __restrict__ ranks, int vocab) {
  wait_for_kernels_before();
  DYN_SMEM(u64, scratch);
  const s64 r = blockIdx.x;
  const Row row = {logits + r * vocab, nullptr, nullptr, vocab, 0.f, 1.f, 0u, 0u};
  const float top = from_ordered((u32)(likeliest(row, scratch) >> 32)), mine = row.logits[max(ids[r], 0ll)];
  float mass = 0.f, above = 0.f;
#pragma unroll LOADS
  for (int i = threadIdx.x; i < vocab; i += THREADS) {
    mass += exp2_fast((row.logits[i] - top) * LOG2E);
    above += row.logits[i] > mine ? 1.f : 0.f;
  }
  mass = block_total(mass, reinterpret_cast<float*>(scratch));
  above = block_total(above, reinterpret_cast<float*>(scratch));
  if (threadIdx.x == 0) {
    logprobs[r] = mine - top - LN2 * log2_fast(mass);
    ranks[r] = (s64)above + 1;
  }
}
