// Paged attention: every token attends to its row's cached keys and values through the block table.
//
// One kernel serves decodes, drafts and prefills. Its unit is a tile: up to TILE pairs of a token and a query head
// that share a KV head. Keys pass in pieces of KEYS under an online softmax. A tile of few pairs reads them in place;
// for more, each piece is first copied to float32, keys transposed, so that both products are multiply-adds in order.
// Where there are fewer tiles than the threads need, the contexts are divided too, and what the parts found is put
// together at the end.
// Source: Kwon et al. 2023 (arXiv:2309.06180); online softmax, Milakov and Gimelshein 2018 (arXiv:1805.02867).
#include <vector>

#include "common.h"

struct AttentionArgs {
  const void* q;        // [tokens, heads, dim], tokens q_stride apart
  const void* k;        // [slots, kv_heads, dim], slots slot_stride apart, in q's type or s8
  const void* v;        // as k
  const f32* k_scale;   // [slots, kv_heads], slots scale_stride apart; null unless s8
  const f32* v_scale;   // as k_scale
  const i32* tables;    // [rows, *], rows table_stride apart
  const i32* contexts;  // [rows], tokens a row sees, its last token included
  const i32* cu_q;      // [rows + 1], where each row's tokens begin
  void* out;            // [tokens, heads, dim], dense
  i64 dtype, kv_dtype, q_stride, slot_stride, scale_stride, table_stride;
  i64 rows, heads, kv_heads, dim, block_size, window;  // window 0: all
  f64 scale, softcap;   // softcap 0: none
};

namespace {

constexpr int TILE = 128, KEYS = 64;
constexpr i64 FEWEST_TO_COPY = 12;                  // pairs of a tile for which a copy of its keys costs nothing
constexpr int GROUP = 4;                            // rows that share a loaded key
constexpr int CHUNK = MANY_REGISTERS ? 4 : 2;       // vectors of a value that stay in registers
constexpr i64 FETCH_AHEAD = 16;                     // keys or values; 8 and 32 do as well
constexpr i64 LEAST_SPLIT = 128;                    // keys below which dividing a context costs more than it saves

// One tile's keys from `begin` to `end`; `part` of `parts`.
struct Item {
  i64 row, kv_head, first, count, begin, end, part, parts, result;
};

// What a part found, for each of a tile's pairs: weighted values, the largest score, the sum of weights.
struct Found {
  f32 *value, *most, *sum;  // [TILE][room], [TILE], [TILE]
  static i64 size(i64 room) { return TILE * (room + 2); }
  Found(f32* memory, i64 room) : value(memory), most(memory + TILE * room), sum(most + TILE) {}
};

// A piece: where its keys and values are, in elements, and their scales where they are integers. After the last one
// stands the null block, whose scores nobody uses.
struct Keys {
  i64 count;
  i64 at[KEYS];
  alignas(64) f32 k_scale[KEYS], v_scale[KEYS];
};

Keys find_keys(const AttentionArgs& a, const Item& item, i64 first) {
  Keys keys = {std::clamp<i64>(item.end - first, 0, KEYS)};
  const i32* block = a.tables + item.row * a.table_stride + first / a.block_size;
  i64 offset = first % a.block_size;
  for (i64 j = 0; j < keys.count; j++, offset++) {
    if (offset == a.block_size) block++, offset = 0;
    const i64 slot = *block * a.block_size + offset;
    keys.at[j] = slot * a.slot_stride + item.kv_head * a.dim;
    if (!a.k_scale) continue;
    keys.k_scale[j] = a.k_scale[slot * a.scale_stride + item.kv_head];
    keys.v_scale[j] = a.v_scale[slot * a.scale_stride + item.kv_head];
  }
  return keys;
}

// What is read in order, and what follows it: the values after a piece's keys, then the next piece's keys. Each is a few
// lines far from the others, so the processor does not see it coming, and it is fetched some places ahead.
template <class KV>
struct Reads {
  const typename KV::type *base, *base_after;
  const Keys &keys, &after;
  i64 bytes;  // of a key
  INLINE void fetch(const Reads& reads, i64 j) {
    j += FETCH_AHEAD;
    const bool own = j < reads.keys.count;
    if (!own && (j -= reads.keys.count) >= reads.after.count) return;
    const auto* from = (const u8*)(own ? reads.base + reads.keys.at[j] : reads.base_after + reads.after.at[j]);
    for (i64 i = 0; i < reads.bytes; i += 64) __builtin_prefetch(from + i);
  }
};

// Copies of pieces: while rows `begin` to `end` of a tile are multiplied, their share of the next piece comes nearer.
template <class KV>
INLINE void fetch_share(const typename KV::type* base, const Keys& keys, i64 bytes, i64 begin, i64 end, i64 rows) {
  for (i64 j = keys.count * begin / rows; j < keys.count * end / rows; j++)
    for (i64 i = 0; i < bytes; i += 64) __builtin_prefetch((const u8*)(base + keys.at[j]) + i, 0, 2);
}

template <class KV, int ROWS>
INLINE void score_rows(const Reads<KV>& reads, bool fetch, i64 dim, const f32* q, i64 room, f32* out) {
  constexpr int TOGETHER = MANY_REGISTERS || ROWS < 3 ? 4 : 2;  // keys that share a loaded row
  const i64 whole = dim / LANES * LANES;
  for (i64 j = 0; j < reads.keys.count; j += LANES) {
    vf part[ROWS][LANES];
    for (i64 i = 0; i < LANES; i += TOGETHER) {
      const typename KV::type* k[TOGETHER];
      for (int t = 0; t < TOGETHER; t++) {
        k[t] = reads.base + reads.keys.at[j + i + t];
        if (fetch) Reads<KV>::fetch(reads, j + i + t);
      }
      vf total[ROWS][TOGETHER] = {};
      const auto add = [&](i64 d, i64 count) __attribute__((always_inline)) {
        vf row[ROWS];
        for (int r = 0; r < ROWS; r++) row[r] = in_register(Float32::load(q + r * room + d));
        for (int t = 0; t < TOGETHER; t++) {
          const vf key = count < LANES ? load<KV>(k[t] + d, count) : KV::load(k[t] + d);
          for (int r = 0; r < ROWS; r++) total[r][t] += key * row[r];
        }
      };
      for (i64 d = 0; d < whole; d += LANES) add(d, LANES);
      if (whole < dim) add(whole, dim - whole);
      for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < TOGETHER; t++) part[r][i + t] = total[r][t];
    }
    for (int r = 0; r < ROWS; r++) Float32::store(out + r * KEYS + j, sums(part[r]));
  }
}

template <class KV, int ROWS>
INLINE void add_values(const Reads<KV>& reads, bool fetch, i64 dim, const f32* weights, const f32* factor, f32* out,
                       i64 room) {
  constexpr int MOST = MANY_REGISTERS || ROWS < 4 ? 4 : 2;  // vectors of a value that stay in registers
  for (i64 d = 0; d < dim; d += MOST * LANES) {
    const i64 left = dim - d;
    vf sum[ROWS][MOST] = {};
    for (int r = 0; r < ROWS; r++)
      for (int c = 0; c < MOST && c * LANES < left; c++)
        sum[r][c] = Float32::load(out + r * room + d + c * LANES) * factor[r];
    const auto add = [&](bool full) __attribute__((always_inline)) {
      for (i64 j = 0; j < reads.keys.count; j++) {
        const auto* v = reads.base + reads.keys.at[j] + d;
        if (fetch && d == 0) Reads<KV>::fetch(reads, j);
        for (int c = 0; c < MOST; c++) {
          if (!full && c * LANES >= left) break;
          const vf value = full ? KV::load(v + c * LANES) : load<KV>(v + c * LANES, left - c * LANES);
          for (int r = 0; r < ROWS; r++) sum[r][c] += weights[r * KEYS + j] * value;
        }
      }
    };
    if (left >= MOST * LANES) add(true);
    else add(false);
    for (int r = 0; r < ROWS; r++)
      for (int c = 0; c < MOST && c * LANES < left; c++) Float32::store(out + r * room + d + c * LANES, sum[r][c]);
  }
}

// Copy a piece to keys [dim][KEYS], with zeros after the last one, and values [KEYS][room].
template <class KV>
void copy_piece(const AttentionArgs& a, const Keys& from, i64 room, f32* keys, f32* values) {
  const auto *k = (const typename KV::type*)a.k, *v = (const typename KV::type*)a.v;
  for (i64 j = 0; j < KEYS; j += LANES)
    for (i64 d = 0; d < room; d += LANES) {
      vf square[LANES] = {};
      const i64 left = a.dim - d;
      for (i64 i = 0; i < LANES && left > 0 && j + i < from.count; i++) {
        square[i] = load<KV>(k + from.at[j + i] + d, left);
        Float32::store(values + (j + i) * room + d, load<KV>(v + from.at[j + i] + d, left));
      }
      transpose(square);
      for (i64 i = 0; i < LANES; i++) Float32::store(keys + (d + i) * KEYS + j, square[i]);
    }
}

// out[r] = out[r] * factor[r] plus the sum of x[r][i] * matrix[i] over `inner`, or that sum alone without a factor.
// Rows of `matrix` and `out` have `columns` numbers, in whole chunks.
template <int ROWS>
void multiply_add(const f32* x, i64 x_stride, const f32* matrix, i64 inner, i64 columns, const f32* factor, f32* out) {
  for (i64 at = 0; at < columns; at += CHUNK * LANES) {
    vf sum[ROWS][CHUNK] = {};
    for (i64 i = 0; i < inner; i++)
      for (int c = 0; c < CHUNK; c++) {
        const vf one = in_register(Float32::load(matrix + i * columns + at + c * LANES));
        for (int r = 0; r < ROWS; r++) sum[r][c] += x[r * x_stride + i] * one;
      }
    for (int r = 0; r < ROWS; r++)
      for (int c = 0; c < CHUNK; c++) {
        f32* to = out + r * columns + at + c * LANES;
        Float32::store(to, factor ? Float32::load(to) * factor[r] + sum[r][c] : sum[r][c]);
      }
  }
}

template <class F>
INLINE void in_groups(i64 count, F&& f) {
  i64 r = 0;
  for (; r + GROUP <= count; r += GROUP) f(r, std::integral_constant<int, GROUP>{});
  if (count - r == 3) f(r, std::integral_constant<int, 3>{});
  else if (count - r == 2) f(r, std::integral_constant<int, 2>{});
  else if (count - r == 1) f(r, std::integral_constant<int, 1>{});
}

// Scores to weights: scale, softcap, mask, online softmax. Keys outside [low, high) are not the row's. WHOLE: all are, and
// neither scale nor softcap. Return by what earlier values are multiplied.
template <bool WHOLE>
INLINE f32 weigh(const AttentionArgs& a, f32* scores, const f32* k_scale, const f32* v_scale, i64 low, i64 high,
                 f32* most, f32* total) {
  vf peaks = all(*most), sums = {};
  for (i64 j = 0; j < KEYS; j += LANES) {
    vf score = Float32::load(scores + j);
    if constexpr (!WHOLE) {
      if (k_scale) score *= Float32::load(k_scale + j);
      if (a.softcap > 0) score = (f32)a.softcap * tanh(score / (f32)a.softcap);
      const vi key = lanes() + (i32)j;
      score = (key >= (i32)low) & (key < (i32)high) ? score : all(-INFINITY);
      Float32::store(scores + j, score);
    }
    peaks = larger(score, peaks);  // NaN is not larger
  }
  const f32 peak = largest(peaks);
  for (i64 j = 0; j < KEYS; j += LANES) {
    const vf score = Float32::load(scores + j);
    vf weight = exp_negative(score - peak);
    if constexpr (!WHOLE) weight = score == all(-INFINITY) ? vf{} : weight;
    sums += weight;
    Float32::store(scores + j, !WHOLE && v_scale ? weight * Float32::load(v_scale + j) : weight);
  }
  const f32 factor = *most == -INFINITY ? 0.f : exp_negative(all(*most - peak))[0];
  *total = *total * factor + sum(sums);
  *most = peak;
  return factor;
}
INLINE f32 weigh(const AttentionArgs& a, f32* scores, const f32* k_scale, const f32* v_scale, i64 low, i64 high,
                 f32* most, f32* total) {
  low = std::max<i64>(low, 0);
  if (low >= high) {
    std::fill(scores, scores + KEYS, 0.f);
    return 1.f;
  }
  const bool whole = low == 0 && high == KEYS && !k_scale && a.softcap == 0;
  return whole ? weigh<true>(a, scores, k_scale, v_scale, low, high, most, total)
               : weigh<false>(a, scores, k_scale, v_scale, low, high, most, total);
}

// A thread's memory for a tile, after what it finds.
struct Workspace {
  f32 *q, *scores, *keys, *values;  // scaled [TILE][room], [TILE][KEYS], [dim][KEYS], [KEYS][room]
  static i64 size(i64 room) { return TILE * (room + KEYS) + 2 * KEYS * room; }
  Workspace(f32* memory, i64 room)
      : q(memory), scores(q + TILE * room), keys(scores + TILE * KEYS), values(keys + KEYS * room) {}
};

INLINE i64 room_of(i64 dim) { return (dim + CHUNK * LANES - 1) / (CHUNK * LANES) * (CHUNK * LANES); }

template <class T, class KV>
void attend(const AttentionArgs& a, const Item& item, const Workspace& work, const Found& found) {
  const i64 group = a.heads / a.kv_heads, begin = a.cu_q[item.row], room = room_of(a.dim);
  const i64 position = a.contexts[item.row] - (a.cu_q[item.row + 1] - begin);  // of the row's first token
  const bool copies = item.count >= FEWEST_TO_COPY;
  f32 factor[TILE];
  for (i64 r = 0; r < item.count; r++) {
    const i64 token = begin + (item.first + r) / group, head = item.kv_head * group + (item.first + r) % group;
    const auto* from = (const typename T::type*)a.q + token * a.q_stride + head * a.dim;
    for (i64 d = 0; d < room; d += LANES)
      Float32::store(work.q + r * room + d, d < a.dim ? load<T>(from + d, a.dim - d) * (f32)a.scale : vf{});
    std::fill(found.value + r * room, found.value + (r + 1) * room, 0.f);
    found.most[r] = -INFINITY, found.sum[r] = 0;
  }
  Keys keys = find_keys(a, item, item.begin);
  const auto *k = (const typename KV::type*)a.k, *v = (const typename KV::type*)a.v;
  const i64 bytes = a.dim * (i64)sizeof *k;
  for (i64 first = item.begin; first < item.end; first += KEYS) {
    const Keys next = find_keys(a, item, first + KEYS);
    if (copies) copy_piece<KV>(a, keys, room, work.keys, work.values);
    in_groups(item.count, [&](i64 r, auto rows) {
      constexpr int ROWS = decltype(rows)::value;
      const f32* q = work.q + r * room;
      f32* out = work.scores + r * KEYS;
      if (copies) {
        fetch_share<KV>(k, next, bytes, r, r + ROWS, item.count);
        multiply_add<ROWS>(q, room, work.keys, a.dim, KEYS, nullptr, out);
      } else score_rows<KV, ROWS>(Reads<KV>{k, v, keys, keys, bytes}, r == 0, a.dim, q, room, out);
    });
    for (i64 r = 0; r < item.count; r++) {
      const i64 own = position + (item.first + r) / group, high = std::min(own + 1 - first, keys.count);
      const i64 low = a.window ? own - a.window + 1 - first : 0;
      factor[r] = weigh(a, work.scores + r * KEYS, a.k_scale ? keys.k_scale : nullptr, a.k_scale ? keys.v_scale : nullptr,
                        low, high, &found.most[r], &found.sum[r]);
    }
    in_groups(item.count, [&](i64 r, auto rows) {
      constexpr int ROWS = decltype(rows)::value;
      const f32* weights = work.scores + r * KEYS;
      f32* out = found.value + r * room;
      if (copies) {
        fetch_share<KV>(v, next, bytes, r, r + ROWS, item.count);
        multiply_add<ROWS>(weights, KEYS, work.values, keys.count, room, factor + r, out);
      } else add_values<KV, ROWS>(Reads<KV>{v, k, keys, next, bytes}, r == 0, a.dim, weights, factor + r, out, room);
    });
    keys = next;
  }
}

// Put the parts of a tile together and store it.
template <class T>
void finish(const AttentionArgs& a, const Item& item, const Found* parts) {
  const i64 group = a.heads / a.kv_heads, room = room_of(a.dim);
  for (i64 r = 0; r < item.count; r++) {
    f32 most = -INFINITY, total = 0;
    for (i64 p = 0; p < item.parts; p++) most = std::max(most, parts[p].most[r]);
    std::vector<f32> factor(item.parts);
    for (i64 p = 0; p < item.parts; p++) {
      factor[p] = parts[p].most[r] == -INFINITY ? 0.f : std::exp(parts[p].most[r] - most);
      total += parts[p].sum[r] * factor[p];
    }
    const i64 token = a.cu_q[item.row] + (item.first + r) / group;
    const i64 head = item.kv_head * group + (item.first + r) % group;
    auto* out = (typename T::type*)a.out + (token * a.heads + head) * a.dim;
    for (i64 d = 0; d < a.dim; d += LANES) {
      vf value = {};
      for (i64 p = 0; p < item.parts; p++) value += Float32::load(parts[p].value + r * room + d) * factor[p];
      store<T>(out + d, value / total, a.dim - d);
    }
  }
}

// Divide the work. Long contexts come first, so that the last thread to finish is not far behind.
std::vector<Item> divide(const AttentionArgs& a, i64* num_results) {
  const i64 group = a.heads / a.kv_heads;
  i64 tiles = 0;
  for (i64 row = 0; row < a.rows; row++)
    tiles += ((a.cu_q[row + 1] - a.cu_q[row]) * group + TILE - 1) / TILE * a.kv_heads;
  const i64 wanted = num_threads() > 1 ? (num_threads() * 4 + tiles - 1) / std::max<i64>(1, tiles) : 1;
  std::vector<Item> items;
  *num_results = 0;
  for (i64 row = 0; row < a.rows; row++) {
    const i64 tokens = a.cu_q[row + 1] - a.cu_q[row], position = a.contexts[row] - tokens;
    for (i64 first = 0; first < tokens * group; first += TILE) {
      const i64 count = std::min<i64>(TILE, tokens * group - first);
      const i64 low = a.window ? std::max<i64>(0, position + first / group - a.window + 1) : 0;
      const i64 high = position + (first + count - 1) / group + 1;
      const i64 parts = std::max<i64>(1, std::min(wanted, (high - low) / LEAST_SPLIT));
      for (i64 head = 0; head < a.kv_heads; head++) {
        for (i64 part = 0; part < parts; part++) {
          const i64 begin = low + (high - low) * part / parts, end = low + (high - low) * (part + 1) / parts;
          items.push_back({row, head, first, count, begin, end, part, parts, *num_results});
        }
        *num_results += parts > 1 ? parts : 0;
      }
    }
  }
  std::stable_sort(items.begin(), items.end(),
                   [](const Item& x, const Item& y) { return x.end - x.begin > y.end - y.begin; });
  return items;
}

template <class T, class KV>
void run(const AttentionArgs& a) {
  i64 num_results = 0;
  const i64 room = room_of(a.dim), size = Found::size(room);
  const std::vector<Item> items = divide(a, &num_results);
  f32* memory = (f32*)scratch(num_results * size * sizeof(f32));
  std::vector<Found> results;
  for (i64 i = 0; i < num_results; i++) results.emplace_back(memory + i * size, room);
  parallel((i64)items.size(), [&](i64 i) {
    const Item& item = items[i];
    f32* own = (f32*)scratch((size + Workspace::size(room)) * sizeof(f32), 1);
    const Found found(own, room);
    attend<T, KV>(a, item, Workspace(own + size, room), item.parts > 1 ? results[item.result + item.part] : found);
    if (item.parts == 1) finish<T>(a, item, &found);
  });
  for (const Item& item : items)
    if (item.parts > 1 && item.part == 0) finish<T>(a, item, &results[item.result]);
}

}  // namespace

extern "C" void paged_attention(const AttentionArgs* a) {
  with_type(a->dtype, [&](auto type) {
    using T = decltype(type);
    if (a->kv_dtype == S8) run<T, Int8>(*a);
    else run<T, T>(*a);
  });
}
