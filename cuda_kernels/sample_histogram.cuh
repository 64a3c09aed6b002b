// How many tokens of a row, and what mass of exp(score), lie how far below its likeliest token: a histogram by the upper
// bits of that depth, with the winner by lot of each bucket. All of it is whole numbers, so it is the same however the row
// is cut into parts and whatever comes first.
#pragma once
#include "sample_row.cuh"

#define BUCKETS 2048
#define LAST (BUCKETS - 1)
#define FIRST ((127 - 10) << 7)  // 128 buckets from each power of two to the next, 2^-10 to 2^6: upper bits of a depth
#define ONE 5.49755813888e11f    // the mass of the likeliest token, 2^39: those of 2^24 tokens are below 2^63

struct Histogram {  // in shared memory, or a row's in global memory
  u64 *winners, *masses;
  u32* counts;
};
constexpr int HISTOGRAM_WORDS = BUCKETS * 5 / 2;
DEV Histogram histogram_at(u64* memory) { return {memory, memory + BUCKETS, (u32*)(memory + 2 * BUCKETS)}; }

DEV int bucket_of(u32 depth) { return min(max((int)(depth >> 16) - FIRST, 0), LAST); }
DEV u64 mass_of(float score) { return (u64)(exp2_fast(score * LOG2E) * ONE); }

DEV void clear(const Histogram& h) {
  __syncthreads();  // all have read what was there
  for (int i = threadIdx.x; i < HISTOGRAM_WORDS; i += THREADS) h.winners[i] = 0;
  __syncthreads();
}

DEV void add(const Histogram& h, int bucket, u32 count, u64 mass) {
  atomicAdd(h.counts + bucket, count);
  if (mass == 0) return;
  // Shared memory adds 32 bits at a time: a carry goes on by hand.
  u32* halves = reinterpret_cast<u32*>(h.masses + bucket);
  const u32 low = (u32)mass, before = atomicAdd(halves, low), high = (u32)(mass >> 32) + (before + low < low);
  if (high) atomicAdd(halves + 1, high);
}

DEV void enter(const Histogram& h, int bucket, u64 lot) {
  if (lot > h.winners[bucket]) atomicMax(h.winners + bucket, lot);  // seldom: most are no record
}

// Let each bucket's count and mass be those of all up to it.
DEV void accumulate(const Histogram& h, u64* scratch) {
  constexpr int EACH = BUCKETS / THREADS;
  const int first = threadIdx.x * EACH, warp = threadIdx.x / 32;
  u32 count = 0;
  u64 mass = 0;
  __syncthreads();  // all have added
  for (int b = first; b < first + EACH; b++) count += h.counts[b], mass += h.masses[b];
  const u32 own_count = count;
  const u64 own_mass = mass;
#pragma unroll
  for (int offset = 1; offset < 32; offset <<= 1) {
    const u32 left = __shfl_up_sync(FULL_WARP, count, offset);
    const u64 left_mass = __shfl_up_sync(FULL_WARP, mass, offset);
    if (threadIdx.x % 32 >= offset) count += left, mass += left_mass;
  }
  if (threadIdx.x % 32 == 31) scratch[warp] = count, scratch[WARPS + warp] = mass;
  __syncthreads();
  for (int w = 0; w < warp; w++) count += (u32)scratch[w], mass += scratch[WARPS + w];
  count -= own_count;
  mass -= own_mass;
  for (int b = first; b < first + EACH; b++) {
    h.counts[b] = count += h.counts[b];
    h.masses[b] = mass += h.masses[b];
  }
  __syncthreads();
}

// The bucket at which accumulated counts or masses reach `target`, from 1 to all there is.
template <typename T>
DEV int locate(const T* through, u64 target, int* found) {
  __syncthreads();  // all have read what was found before
  for (int b = threadIdx.x; b < BUCKETS; b += THREADS)
    if (through[b] >= target && (b == 0 || through[b - 1] < target)) *found = b;
  __syncthreads();
  return *found;
}

// top_p of a mass, rounded up: a token is kept if less than that lies above it. At least 1: the likeliest is kept.
DEV u64 share(u64 mass, float top_p) {
  const u64 p = (u64)(top_p * 4294967296.f), low = (mass & 0xffffffffu) * p;
  return max((mass >> 32) * p + (low >> 32) + ((u32)low != 0), (u64)1);
}

// Buckets below `sure` are kept whole, none from `maybe` on, and of those in between a part.
struct Kept {
  int sure, maybe;
};

DEV Kept kept_of(const Histogram& h, u32 top_k, float top_p, int* found) {
  Kept kept = {BUCKETS, BUCKETS};
  u64 least = h.masses[LAST], most = least;  // of the mass that top_k leaves
  if (top_k < h.counts[LAST]) {
    const int last = locate(h.counts, top_k, found);
    kept = {last + (h.counts[last] == top_k), last + 1};
    least = kept.sure ? h.masses[kept.sure - 1] : 0;
    most = h.masses[last];
  }
  if (top_p < 1.f) {
    const int low = locate(h.masses, share(least, top_p), found), high = locate(h.masses, share(most, top_p), found);
    const bool whole = low == high && h.counts[low] - (low ? h.counts[low - 1] : 0) == 1;
    kept = {min(kept.sure, low + whole), min(kept.maybe, high + 1)};
  }
  return kept;
}

// The depth, exactly, at which the tokens of a row up to `limit` reach `target` in number, or (by_mass) in mass; and the
// mass of those down to it. Three sweeps: each takes the bucket that it finds apart.
DEV u32 depth_at(const Row& row, int vocab, u32 limit, bool by_mass, u64 target, u64* mass, const Histogram& h,
                 u64* scratch, int* found) {
  u32 low = 0;
  u64 above = 0;
  for (int shift = 20;; shift = max(shift - 11, 0)) {
    clear(h);
    each_score(row, {0, vocab}, min(limit, low + (((u32)BUCKETS << shift) - 1)), [&](int, float score, u32 depth) {
      if (depth >= low) add(h, (int)((depth - low) >> shift), 1, mass_of(score));
    });
    accumulate(h, scratch);
    const int b = by_mass ? locate(h.masses, target - above, found) : locate(h.counts, target, found);
    if (!by_mass) target -= b ? h.counts[b - 1] : 0;
    low += (u32)b << shift;
    if (shift == 0) {
      *mass = above + h.masses[b];
      return low;
    }
    above += b ? h.masses[b - 1] : 0;
  }
}
