// Paged attention, which block does what. All tiles of keys that the rows of all sequences see stand in one line, sequence
// after sequence and in each tile of rows after tile of rows. Every block of a key head takes as long a piece of the
// line: a long context is shared by many blocks, and several short ones are one block's. The grid is fixed, contexts are
// read here, so a CUDA graph divides the contexts of its replay. (Stream-K: Osama et al. 2023, arXiv:2301.03598.)
#pragma once
#include "paged_attn_out.cuh"

struct Sequence {
  int first_token, tokens;  // of this step
  int before;               // the position of the first of them
  DEV int row_tiles() const { return (tokens * GQA + BM - 1) / BM; }
  DEV int first_tile(int window) const { return WINDOW ? max(0, before + 1 - window) / BN : 0; }
  DEV int key_tiles(int window) const {  // of each tile of rows; at least one, which writes zeros
    return max(1, (before + tokens + BN - 1) / BN - first_tile(window));
  }
};
DEV Sequence sequence_of(const int* cu_q, const int* context, int b) {
  const int first_token = cu_q[b], tokens = cu_q[b + 1] - first_token;
  return {first_token, tokens, context[b] - tokens};
}

DEV int cost(const int* cu_q, const int* context, int b, int window) {
  const Sequence s = sequence_of(cu_q, context, b);
  return s.row_tiles() * s.key_tiles(window);
}

// What a block does at a time: a tile of rows of sequence b over `take` tiles of keys, from the one numbered `from` that
// the sequence sees.
struct Part {
  Sequence own;
  int b, tile, from, take;
  Parts parts;
};

struct Piece {
  int at, end, span;    // this block's part of the line, and the length of every block's
  int sequence, start;  // of what stands at `at`, and where it begins

  DEV Part part(const int* cu_q, const int* context, int window) const {
    const Sequence own = sequence_of(cu_q, context, sequence);
    const int keys = own.key_tiles(window), from = (at - start) % keys, whole = at - from;
    return {own, sequence, (at - start) / keys, from, min(keys - from, end - at),
            {whole / span, (whole + keys - 1) / span}};
  }
  DEV void advance(int take, const int* cu_q, const int* context, int window) {
    at += take;
    while (at < end && at == start + cost(cu_q, context, sequence, window)) start = at, sequence++;
  }
};

// Every warp finds the same: lane i looks at sequences i, i + 32 and so on.
DEV Piece own_piece(const int* cu_q, const int* context, int sequences, int window, int least_tiles) {
  const int lane = threadIdx.x % 32;
  int total = 0, longest = 0;
  for (int b = lane; b < sequences; b += 32) {
    const Sequence s = sequence_of(cu_q, context, b);
    const int keys = s.key_tiles(window);
    total += s.row_tiles() * keys;
    longest = max(longest, keys);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) {
    total += __shfl_xor_sync(FULL_WARP, total, offset);
    longest = max(longest, __shfl_xor_sync(FULL_WARP, longest, offset));
  }
  // A part costs as much as a few tiles, unless it is whole; and one context has MAX_PARTS at most.
  const int even = (total + gridDim.x - 1) / gridDim.x, parts = (longest + MAX_PARTS - 2) / (MAX_PARTS - 1);
  const int span = max(max(even, parts), min(least_tiles, longest));
  Piece piece = {(int)blockIdx.x * span, min(total, (int)(blockIdx.x + 1) * span), span, 0, 0};
  if (piece.at >= piece.end) return piece;
  for (int first = 0;; first += 32) {
    const int own = first + lane < sequences ? cost(cu_q, context, first + lane, window) : 0;
    int until = own;  // with the sequences before it among these 32
#pragma unroll
    for (int offset = 1; offset < 32; offset <<= 1) {
      const int left = __shfl_up_sync(FULL_WARP, until, offset);
      if (lane >= offset) until += left;
    }
    const u32 later = __ballot_sync(FULL_WARP, piece.start + until > piece.at);
    if (later) {
      const int found = 32 - __popc(later);  // the first of those, as the rest are later still
      piece.sequence = first + found;
      piece.start += __shfl_sync(FULL_WARP, until - own, found);
      return piece;
    }
    piece.start += __shfl_sync(FULL_WARP, until, 31);
  }
}
