// From logits to tokens without sorting. Blocks (r, 0), (r, 1) and so on share row r, `span` tokens each; the last of them to
// end says what all have found. Block size THREADS (compile-time).
//
// Noise decides: token i's lot is score_i - log(E_i), E_i exponential and a hash of (key of the row, token), and the
// largest lot wins with probability softmax(score) (Gumbel-max; Maddison et al. 2014, arXiv:1411.0030). A filter
// (min_p, top_k, top_p) keeps scores at or above a threshold. A histogram of the row says in which bucket it lies. The
// winner is known bucket by bucket: only where the best lot is in that very bucket are its tokens told apart, by three
// sweeps of the row. Tokens race that their own block's part of the histogram cannot rule out.
//
// The grid waits once: scores are relative to the largest logit, so one launch (likeliest) finds it, after the edits, and
// where a row is greedy is all; the next (draw) does the rest. Lots are compared, counts and masses added as whole
// numbers: the token is the same however many blocks share the row.
//
// logits [R, vocab] float, edited in place; params [R, 4], of 16 aligned bytes: temperature (0: greedy), top_k, top_p, min_p; keys [R, 2];
// hashes [vocab]. Out: ids [R], NOT_FINITE or NOTHING_LEFT where the row failed. For rows that several blocks share: parts
// [R, blocks, 2], histograms [R, HISTOGRAM_WORDS] (cleared by likeliest), tickets [R], 0 between launches.
// Edits come first, or are null: starts [4, R + 1], where each row's begin in the lists of masked entries (set to
// -inf), biased ones (bias is added), tokens seen (penalties [4, seen]: count in the output, repetition, presence,
// frequency) and masks [masks, words], a bit per token that may be chosen. Entries are row * vocab + token, each at
// most once a list (masked ones may come twice).
#include "sample_histogram.cuh"

#define NOT_FINITE (-1)
#define NOTHING_LEFT (-2)

// The largest logit of a part and its token; a NaN is above all.
DEV u64 likeliest_of(const Row& row, const Part& part, u64* scratch) {
  u32 best = 0;
  int id = 0;
  each_logit(row, part, [&](int i, float x) {
    const u32 key = __float_as_uint(x) << 1 > 0xff000000u ? 0xffffffffu : ordered(x);
    if (key > best) best = key, id = i;
  });
  return block_max(best ? (u64)best << 32 | (0xffffffffu - (u32)id) : 0, scratch);
}

// Row r's mask, if it has one.
DEV const u32* mask_of(const int* starts, const u32* masks, int words, int r) {
  const int* of_masks = starts + 3 * (gridDim.x + 1) + r;
  return of_masks[1] > of_masks[0] ? masks + (s64)of_masks[0] * words : nullptr;
}

// Edit a part of row r of the logits in vLLM's order, in the reference's very roundings.
DEV void edit(float* logits, const Part& part, const int* starts, const s64* masked, const s64* biased, const float* bias,
              const s64* seen, const float* penalties, int vocab, int r) {
  const int rows = gridDim.x, *of_masked = starts + r, *of_biased = of_masked + rows + 1;
  const int *of_seen = of_biased + rows + 1, num_seen = of_seen[rows - r];
  const s64 from = (s64)r * vocab + part.from, to = (s64)r * vocab + part.to;
  const auto mine = [&](s64 entry) { return from <= entry && entry < to; };
  for (int i = of_masked[0] + threadIdx.x; i < of_masked[1]; i += THREADS)
    if (mine(masked[i])) logits[masked[i]] = -INF;
  __syncthreads();  // an entry may be in several lists
  for (int i = of_biased[0] + threadIdx.x; i < of_biased[1]; i += THREADS)
    if (mine(biased[i])) logits[biased[i]] += bias[i];
  __syncthreads();
  for (int i = of_seen[0] + threadIdx.x; i < of_seen[1]; i += THREADS) {
    if (!mine(seen[i])) continue;
    const float count = penalties[i], repetition = penalties[num_seen + i], presence = penalties[2 * num_seen + i];
    float x = logits[seen[i]];
    x = x > 0.f ? x / repetition : x * repetition;
    x = __fsub_rn(x, __fmul_rn(penalties[3 * num_seen + i], count));
    logits[seen[i]] = __fsub_rn(x, count > 0.f ? presence : 0.f);
  }
  __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    likeliest(float* __restrict__ logits, const int* __restrict__ starts, const s64* __restrict__ masked,
              const s64* __restrict__ biased, const float* __restrict__ bias, const s64* __restrict__ seen,
              const float* __restrict__ penalties, const u32* __restrict__ masks, u64* parts, u64* histograms,
              int* tickets, s64* __restrict__ ids, int vocab, int words, int span) {
  wait_for_kernels_before();
  DYN_SMEM(u64, scratch);  // [WARPS]
  const int r = blockIdx.x, blocks = gridDim.y;
  const Part part = own_part(vocab, span);
  Row row = {logits + (s64)r * vocab};
  u64 best = likeliest_of(row, part, scratch), before = best;
  if (starts) {
    edit(logits, part, starts, masked, biased, bias, seen, penalties, vocab, r);
    row.allowed = mask_of(starts, masks, words, r);
    best = likeliest_of(row, part, scratch);
  }
  if (blocks > 1) {
    if (histograms)
      for (int i = blockIdx.y * THREADS + threadIdx.x; i < HISTOGRAM_WORDS; i += blocks * THREADS)
        histograms[(s64)r * HISTOGRAM_WORDS + i] = 0;
    u64* own = parts + (s64)r * blocks * 2;
    if (threadIdx.x == 0) own[blockIdx.y * 2] = before, own[blockIdx.y * 2 + 1] = best;
    if (!is_last(tickets + r, blocks, reinterpret_cast<unsigned char*>(scratch))) return;
    before = best = 0;
    for (int b = threadIdx.x; b < blocks; b += THREADS) before = max(before, own[b * 2]), best = max(best, own[b * 2 + 1]);
    before = block_max(before, scratch);
    best = block_max(best, scratch);
  }
  // Looked at before the edits: a mask could hide a NaN, an infinity turn into one.
  const bool finite = fabsf(from_ordered((u32)(before >> 32))) < INF;
  const float top = from_ordered((u32)(best >> 32));
  if (threadIdx.x == 0) ids[r] = !finite ? NOT_FINITE : top == -INF ? NOTHING_LEFT : id_of(best);
}

struct Filters {
  u32 top_k;
  float top_p;
  u32 deepest, hopeless;  // depths: the last one that min_p keeps, and one from which on no token can be drawn
};

DEV Filters filters_of(float top_k, float top_p, float min_p, int vocab) {
  const float lowest = fmaxf(min_p > 0.f ? log2_fast(min_p) * LN2 : -3.4028234e38f, -3.4028234e38f);
  // Tokens so deep that each has less than a vocab-th part of 1 - top_p have together less than that.
  const float useless = top_p < 1.f ? 1.f + LN2 * log2_fast((float)vocab / (1.f - top_p)) : BEYOND_NOISE;
  return {(u32)top_k, top_p, depth_of(lowest), depth_of(fminf(useless, BEYOND_NOISE))};
}

// Count the tokens of a part, and weigh them if there is a top_p. Hopeless ones are not told apart.
DEV void count_part(const Row& row, const Part& part, const Filters& want, const Histogram& h) {
  const bool weigh = want.top_p < 1.f;
  u32 count = 0;
  u64 mass = 0;
  each_score(row, part, want.deepest, [&](int, float score, u32 depth) {
    const u64 own = weigh ? mass_of(score) : 0;
    if (depth >= want.hopeless)
      count++, mass += own;
    else
      add(h, bucket_of(depth), 1, own);
  });
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) {
    count += __shfl_xor_sync(FULL_WARP, count, offset);
    mass += __shfl_xor_sync(FULL_WARP, mass, offset);
  }
  if (threadIdx.x % 32 == 0 && count) add(h, LAST, count, mass);
}

// The winners by lot of the buckets before `end`.
DEV void race_buckets(const Row& row, const Part& part, const Filters& want, int end, const Histogram& h) {
  each_score(row, part, min(want.deepest, want.hopeless - 1), [&](int i, float score, u32 depth) {
    const int bucket = bucket_of(depth);
    if (bucket < end) enter(h, bucket, lot(row, i, score));
  });
}

// Add what a block has counted to its row's histogram, or (WINNERS) what has won there.
template <bool WINNERS>
DEV void contribute(const Histogram& own, const Histogram& all) {
  for (int b = threadIdx.x; b < BUCKETS; b += THREADS) {
    if (WINNERS) {
      if (own.winners[b]) atomicMax(all.winners + b, own.winners[b]);
    } else if (own.counts[b]) {
      atomicAdd(all.counts + b, own.counts[b]);
      if (own.masses[b]) atomicAdd(all.masses + b, own.masses[b]);
    }
  }
}

DEV u64 best_of(const Histogram& h, int from, int to, u64* scratch) {
  u64 best = 0;
  for (int b = from + threadIdx.x; b < to; b += THREADS) best = max(best, h.winners[b]);
  return block_max(best, scratch);
}

// The winner of a row of which all is known but which tokens of some buckets are kept.
DEV u64 decide(const Row& row, const Kept& kept, const Filters& want, int vocab, const Histogram& h, u64* scratch,
               int* found) {
  const u64 winner = best_of(h, 0, kept.sure, scratch);
  if (winner > best_of(h, kept.sure, kept.maybe, scratch)) return winner;
  u64 mass = h.masses[LAST];
  u32 deepest = want.deepest;
  const bool by_number = want.top_k < h.counts[LAST];
#pragma unroll 1
  for (int by_mass = 0; by_mass < 2; by_mass++) {
    if (by_mass ? want.top_p >= 1.f : !by_number) continue;
    const u64 target = by_mass ? share(mass, want.top_p) : want.top_k;
    deepest = depth_at(row, vocab, deepest, by_mass, target, &mass, h, scratch, found);
  }
  return race(row, {0, vocab}, deepest, scratch);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    draw(const float* __restrict__ logits, const float* __restrict__ params, const int* __restrict__ keys,
         const int* __restrict__ hashes, const int* __restrict__ starts, const u32* __restrict__ masks, u64* histograms,
         int* tickets, s64* ids, int vocab, int words, int span) {
  wait_for_kernels_before();
  DYN_SMEM(u64, shared);  // a histogram, then scratch [2 * WARPS] and what is found
  u64* scratch = shared + HISTOGRAM_WORDS;
  int* found = reinterpret_cast<int*>(scratch + 2 * WARPS);
  const int r = blockIdx.x, blocks = gridDim.y;
  const s64 likeliest = ids[r];
  const float4 own_params = reinterpret_cast<const float4*>(params)[r];
  const float temperature = own_params.x;
  if (!(temperature > 0.f) || likeliest < 0) return;
  Row row = {logits + (s64)r * vocab, hashes, starts ? mask_of(starts, masks, words, r) : nullptr, 0.f,
             1.f / temperature, (u32)keys[r * 2], (u32)keys[r * 2 + 1]};
  row.top = logit(row, (int)likeliest);
  if (!(row.top < INF)) return;  // a penalty has made an infinity: that token wins
  const Filters want = filters_of(own_params.y, own_params.z, own_params.w, vocab);
  const Part part = own_part(vocab, span);
  const Histogram own = histogram_at(shared), all = histogram_at(histograms + (s64)r * HISTOGRAM_WORDS);
  u64 winner;
  if (want.top_k >= vocab && want.top_p >= 1.f) {
    winner = race(row, part, want.deepest, scratch);
    if (blocks > 1) {
      if (threadIdx.x == 0) atomicMax(all.winners, winner);
      if (!is_last(tickets + r, blocks, reinterpret_cast<unsigned char*>(found))) return;
      winner = *all.winners;
    }
  } else {
    clear(own);
    count_part(row, part, want, own);
    __syncthreads();  // all have counted
    if (blocks > 1) contribute<false>(own, all);
    accumulate(own, scratch);
    // Of several parts, one's masses say nothing: it does not know the others'.
    Kept kept = kept_of(own, want.top_k, blocks > 1 ? 1.f : want.top_p, found);
    race_buckets(row, part, want, kept.maybe, own);
    __syncthreads();  // all have raced
    if (blocks > 1) {
      contribute<true>(own, all);
      if (!is_last(tickets + r, blocks, reinterpret_cast<unsigned char*>(found))) return;
      for (int i = threadIdx.x; i < HISTOGRAM_WORDS; i += THREADS) shared[i] = all.winners[i];
      accumulate(own, scratch);
      kept = kept_of(own, want.top_k, want.top_p, found);
    }
    winner = decide(row, kept, want, vocab, own, scratch, found);
  }
  if (threadIdx.x == 0) ids[r] = id_of(winner);
}

// Of the tokens ids [R] at logits [R, vocab]: log-probability, and rank (1 and the number of likelier tokens). What is
// said of a row that failed, with a negative id, means nothing. parts [R, blocks, 4], for rows that blocks share.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    token_logprobs(const float* __restrict__ logits, const s64* __restrict__ ids, float* parts, int* tickets,
                   float* __restrict__ logprobs, s64* __restrict__ ranks, int vocab, int span) {
  wait_for_kernels_before();
  DYN_SMEM(u64, scratch);  // [WARPS]
  float* floats = reinterpret_cast<float*>(scratch);
  const int r = blockIdx.x, blocks = gridDim.y;
  const Part part = own_part(vocab, span);
  const Row row = {logits + (s64)r * vocab};
  const float mine = row.logits[max(ids[r], 0ll)];
  // Finite, so that a part of nothing but -inf has a mass of 0.
  float top = fmaxf(from_ordered((u32)(likeliest_of(row, part, scratch) >> 32)), -3.4028234e38f), mass = 0.f, above = 0.f;
  each_logit(row, part, [&](int, float x) {
    mass += exp2_fast((x - top) * LOG2E);
    above += x > mine ? 1.f : 0.f;
  });
  mass = block_total(mass, floats);
  above = block_total(above, floats);  // exact: a vocabulary is below 2^24
  if (blocks > 1) {
    float* own = parts + (s64)r * blocks * 4;
    if (threadIdx.x == 0) *reinterpret_cast<float4*>(own + blockIdx.y * 4) = make_float4(top, mass, above, 0.f);
    if (!is_last(tickets + r, blocks, reinterpret_cast<unsigned char*>(scratch))) return;
    u64 highest = 0;
    for (int b = threadIdx.x; b < blocks; b += THREADS) highest = max(highest, candidate(own[b * 4], b));
    top = from_ordered((u32)(block_max(highest, scratch) >> 32));
    mass = above = 0.f;
    for (int b = threadIdx.x; b < blocks; b += THREADS) {
      mass += own[b * 4 + 1] * exp2_fast((own[b * 4] - top) * LOG2E);
      above += own[b * 4 + 2];
    }
    mass = block_total(mass, floats);
    above = block_total(above, floats);
  }
  if (threadIdx.x == 0) {
    logprobs[r] = mine - top - LN2 * log2_fast(mass);
    ranks[r] = (s64)above + 1;
  }
}
