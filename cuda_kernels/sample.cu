// From logits to tokens without sorting: one block of THREADS (compile-time) per row.
//
// Noise decides: token i's lot is score_i - log(E_i), E_i exponential and a hash of (key of the row, token), and the
// largest lot wins with probability softmax(score) (Gumbel-max; Maddison et al. 2014, arXiv:1411.0030). A filter
// (min_p, top_k, top_p) keeps scores at or above a threshold. Instead of finding the threshold, the winner of a larger
// set is accepted if it would be kept itself, which one sweep over the row tells: how many, and what mass, lie above
// it. If not, all scores up to its own are out, and that same sweep already found the winner among the rest
// (rejection as in FlashInfer's sampler; as noise is fixed, the token is the very one that sorting would give).
//
// logits [R, vocab] float; params [R, 4]: temperature (0: greedy), top_k, top_p, min_p; keys [R, 2]; hashes [vocab];
// allowed [R, words] bits, or null. Out: ids [R], tops [R], the largest allowed logit (not finite: the row failed).
#include "common.cuh"

#define WARPS (THREADS / 32)

// Order floats as unsigned integers; NaN above all.
DEV u32 ordered(float v) {
  const u32 bits = __float_as_uint(v);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
DEV float from_ordered(u32 key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }
DEV u64 candidate(float value, int id) { return (u64)ordered(value) << 32 | (0xffffffffu - (u32)id); }  // lowest id wins
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
  const bool masked = row.allowed && !(row.allowed[i / 32] >> (i % 32) & 1u);
  return masked ? __uint_as_float(0xff800000u) : row.logits[i];
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

// The largest `low` that leaves at least k tokens above it: those are the k likeliest, and their equals.
DEV u32 below_the_kth(const Row& row, u32 low, int k, u64* scratch) {
  u32 high = ordered(0.f);  // no score is above that of the likeliest, 0
  while (high - low > 1) {
    const u32 middle = low + (high - low) / 2;
    const int count = sweep<false>(row, middle, scratch).count;
    if (count == k) return middle;
    if (count > k)
      low = middle;
    else
      high = middle;
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

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    sample(const float* __restrict__ logits, const float* __restrict__ params, const int* __restrict__ keys,
           const int* __restrict__ hashes, const u32* __restrict__ allowed, s64* __restrict__ ids,
           float* __restrict__ tops, int vocab, int words) {
  DYN_SMEM(u64, scratch);  // [WARPS]
  const s64 r = blockIdx.x;
  Row row = {logits + r * vocab, hashes, allowed ? allowed + r * words : nullptr, vocab, 0.f, 1.f, 0u, 0u};
  u64 best = 0;
  for (int i = threadIdx.x; i < vocab; i += THREADS) best = max(best, candidate(logit(row, i), i));
  best = block_max(best, scratch);
  row.top = from_ordered((u32)(best >> 32));
  int id = id_of(best);
  const float temperature = params ? params[r * 4] : 0.f;
  if (temperature > 0.f && fabsf(row.top) < __uint_as_float(0x7f800000u)) {
    row.inverse_temperature = 1.f / temperature;
    row.offset = (u32)keys[r * 2];
    row.factor = (u32)keys[r * 2 + 1];
    id = draw(row, (int)params[r * 4 + 1], params[r * 4 + 2], params[r * 4 + 3], scratch);
  }
  if (threadIdx.x == 0) {
    ids[r] = id;
    tops[r] = row.top;
  }
}

// Of the tokens ids [R] at logits [R, vocab]: log-probability, and rank (1 and the number of likelier tokens).
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    token_logprobs(const float* __restrict__ logits, const s64* __restrict__ ids, float* __restrict__ logprobs,
                   s64* __restrict__ ranks, int vocab) {
  DYN_SMEM(u64, scratch);
  const s64 r = blockIdx.x;
  const Row row = {logits + r * vocab, nullptr, nullptr, vocab, 0.f, 1.f, 0u, 0u};
  u64 best = 0;
  for (int i = threadIdx.x; i < vocab; i += THREADS) best = max(best, candidate(row.logits[i], i));
  const float top = from_ordered((u32)(block_max(best, scratch) >> 32)), mine = row.logits[ids[r]];
  float mass = 0.f, above = 0.f;
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

// How many drafted tokens of each sequence stand: those before the first that differs from what was sampled there.
// sampled and drafts are laid out alike, sequence b from cu[b] to cu[b + 1]; its last place has no draft (-1).
extern "C" __global__ void verify_drafts(const s64* __restrict__ sampled, const s64* __restrict__ drafts,
                                         const int* __restrict__ cu, int* __restrict__ accepted, int sequences) {
  const int b = blockIdx.x * blockDim.x + threadIdx.x;
  if (b >= sequences) return;
  int count = 0;
  while (cu[b] + count < cu[b + 1] && sampled[cu[b] + count] == drafts[cu[b] + count]) count++;
  accepted[b] = count;
}
