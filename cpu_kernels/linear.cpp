// Linear layers over packed weights, plain and gated, with float32 sums.
#include "results.h"
#include "tiles.h"

namespace {

constexpr int TILES_AT_ONCE = 16;  // whose rows stay in the second-level cache while panels pass (a guess)
constexpr i64 MOST_NARROW_TILES = 2;  // more of them share a widened piece
// Bytes from what few rows read to what they fetch. Zen 3 reads 1.05 times as fast with 1,024; others were not compared.
constexpr i64 AHEAD = LANES == 8 ? 1024 : 8192;

void lay_rows(const Product& p, const Layout& layout) {
  const i64 pieces = p.rows * layout.inputs < 16384 ? 1 : std::min<i64>(p.rows, num_threads() * 4);
  parallel(pieces, [&](i64 piece) {
    with_type(p.x_dtype, [&](auto type) {
      for (i64 row = p.rows * piece / pieces; row < p.rows * (piece + 1) / pieces; row++)
        lay_row<decltype(type)>(p, layout, row);
    });
  });
  memset(layout.memory + p.rows * layout.stride, 0, (layout.rows() - p.rows) * layout.stride);
}

// Add to the sums [rows][PANEL] of a tile.
template <bool FETCH>
void add_tile(const Piece& piece, const Rows& x, i64 rows, const Next& next, f32* sums) {
  if constexpr (FETCH) with_rows(rows, [&](auto size) { add_piece<decltype(size)::value, FETCH>(piece, x, next, sums); });
  // A tile behind another is never one of a few rows: what is not compiled saves seconds.
  else if (rows == MOST_ROWS) add_piece<MOST_ROWS, FETCH>(piece, x, next, sums);
  else add_piece<FEWER_ROWS, FETCH>(piece, x, next, sums);
}

// Compute sums [rows][PANEL] of the tiles from `first` to `last` with a panel. One tile reads the panel as it is; more
// read a piece of it after another, and many a widened piece. Blocks are always read as they are, group after group.
// `following` is the panel that is read next.
void add_tiles(
    i64 kind, const Layout& layout, i64 first, i64 last, const u8* panel, const u8* following, f32* sums) {
  alignas(64) u8 room[PIECE * PANEL * 4];
  const i64 bytes = is_blocks(kind) ? 1 : PANEL * size_of(kind), begin = layout.first_row(first);
  const u8* end = panel + panel_bytes(kind, layout.inputs);
  const i64 pieces = last - first > 1 && !is_blocks(kind) ? (layout.inputs + PIECE - 1) / PIECE : 1;
  const i64 most = ((layout.inputs + pieces - 1) / pieces + BLOCK - 1) / BLOCK * BLOCK;
  const bool wide = last - first > MOST_NARROW_TILES && !is_blocks(kind);
  memset(sums, 0, (layout.first_row(last) - begin) * PANEL * 4);
  for (i64 k = 0; k < layout.inputs; k += most) {
    const i64 inputs = std::min(most, layout.inputs - k);
    const u8* stored = panel + k * bytes;
    const Piece piece{wide ? widened(kind, panel, k, inputs, room) : stored, kind, k, inputs, wide};
    const Next next{stored + (wide ? inputs * bytes : AHEAD), bytes, end, following - end};
    for (i64 tile = first; tile < last; tile++) {
      const i64 row = layout.first_row(tile);
      const auto add = tile == first ? add_tile<true> : add_tile<false>;
      add(piece, layout.from(row, k), layout.tile_size(tile), next, sums + (row - begin) * PANEL);
    }
  }
}

// Multiply the tiles from `first` to `last` by the panels `begin` to `end`. Of a gated matrix, several panels are read
// before their partners: at each change from one to the other, memory has to be waited for.
void multiply_panels(const Product& p, const Layout& layout, i64 first, i64 last, i64 begin, i64 end) {
  constexpr i64 MOST = TILES_AT_ONCE * MOST_ROWS;
  alignas(64) f32 sums[MOST * PANEL], up[2 * MOST * PANEL];
  const i64 bytes = panel_bytes(p.kind, p.inputs), row = layout.first_row(first);
  const i64 size = (layout.first_row(last) - row) * PANEL, together = MOST * PANEL / size;
  const i64 rows = std::min(layout.first_row(last), p.rows) - row;
  for (i64 panel = begin; panel < end; panel += together) {
    const i64 stop = std::min(panel + together, end);
    const Partners partners(p, panel, stop);
    const u8 *own = p.weight + panel * bytes, *others = p.weight + partners.first * bytes;
    for (i64 i = 0; i < stop - panel; i++) {
      const u8* after = i + 1 < stop - panel || !partners.count ? own + (i + 1) * bytes : others;
      add_tiles(p.kind, layout, first, last, own + i * bytes, after, sums + i * size);
    }
    for (i64 i = 0; i < partners.count; i++) {
      const u8* after = i + 1 < partners.count ? others + (i + 1) * bytes : p.weight + stop * bytes;
      add_tiles(p.kind, layout, first, last, others + i * bytes, after, up + i * size);
    }
    for (i64 i = 0; i < stop - panel; i++) {
      const f32* behind = i + 1 < partners.count ? up + (i + 1) * size : nullptr;
      store_rows(p, panel + i, row, rows, sums + i * size, up + i * size, behind);
    }
  }
}

// Multiplications that are worth a thread of their own: some microseconds (a guess).
constexpr i64 LEAST_WORK = 1 << 16;

// Below so many rows tiles are mostly empty, and the weights' way from memory is what takes the time.
constexpr i64 FEWEST_FOR_TILES = 5;
constexpr i64 TILE_ROWS = 32;

// bfloat16 by matrix tiles: activations stay in rows, filled up with zeros to whole tiles.
void multiply_by_tiles(const Product& p) {
  const i64 inputs = padded_inputs(BF16, p.inputs), rows = (p.rows + 15) / 16 * 16, stride = inputs * 2;
  const i64 bytes = panel_bytes(BF16, p.inputs);
  u8* memory = (u8*)scratch(rows * stride);
  parallel_ranges(rows, 16, [&](i64 begin, i64 end) {
    for (i64 row = begin; row < end; row++) {
      const i64 from = p.index && row < p.rows ? p.index[row] : row, used = row < p.rows ? p.inputs * 2 : 0;
      if (used) memcpy(memory + row * stride, (const u16*)p.x + from * p.x_stride, used);
      memset(memory + row * stride + used, 0, stride - used);
    }
  });
  parallel_ranges(num_panels(p.activation ? p.outputs / 2 : p.outputs), 1, [&](i64 begin, i64 end) {
    alignas(64) f32 sum[TILE_ROWS * PANEL], up[2][TILE_ROWS * PANEL];
    begin_tiles();
    for (i64 panel = begin; panel < end; panel++) {
      const Partners partners(p, panel, panel + 1);
      for (i64 row = 0; row < rows; row += TILE_ROWS) {
        const u8* x = memory + row * stride;
        const i64 here = std::min(TILE_ROWS, p.rows - row);
        multiply_tiles(x, stride, here > 16, p.weight + panel * bytes, inputs / 32, sum);
        for (i64 i = 0; i < partners.count; i++)
          multiply_tiles(x, stride, here > 16, p.weight + (partners.first + i) * bytes, inputs / 32, up[i]);
        store_rows(p, panel, row, here, sum, up[0], partners.count > 1 ? up[1] : nullptr);
      }
    }
    end_tiles();
  });
}

}  // namespace

void multiply(const Product& p) {
  if (!p.rows) return;
  if (HAS_TILES && p.kind == BF16 && p.rows >= FEWEST_FOR_TILES && tiles_allowed()) return multiply_by_tiles(p);
  Layout layout(p);
  layout.memory = (u8*)scratch(layout.bytes());
  lay_rows(p, layout);
  // Even groups of tiles, one after another, each with all panels: threads share both, so that none waits for the last.
  const i64 panels = num_panels(p.activation ? p.outputs / 2 : p.outputs);
  const i64 groups = (layout.tiles + TILES_AT_ONCE - 1) / TILES_AT_ONCE;
  const i64 tiles = (layout.tiles + groups - 1) / groups;
  const i64 least = 1 + LEAST_WORK * groups / (layout.inputs * PANEL * layout.rows());
  parallel_ranges(groups * panels, least, [&](i64 begin, i64 end) {
    for (i64 group = begin / panels; group * panels < end; group++) {
      const i64 first = group * tiles, last = std::min(first + tiles, layout.tiles);
      const i64 at = group * panels;
      multiply_panels(p, layout, first, last, std::max(begin, at) - at, std::min(end, at + panels) - at);
    }
  });
}

struct LinearArgs {
  const void* x;       // [rows, inputs], rows x_stride apart
  const void* weight;  // panels
  const f32* scale;    // [outputs], or null
  const f32* bias;     // [outputs], or null
  void* y;             // [rows, outputs], dense; [rows, outputs / 2] where gated
  i64 x_dtype, y_dtype, rounding, x_stride, rows, outputs, inputs, kind, activation;
};

extern "C" void linear(const LinearArgs* a) {
  multiply({a->x, a->x_dtype, a->x_stride, nullptr, (const u8*)a->weight, a->scale, a->bias, a->y, a->y_dtype,
            a->activation ? a->outputs / 2 : a->outputs, a->rows, a->outputs, a->inputs, a->kind, a->activation, a->rounding});
}
