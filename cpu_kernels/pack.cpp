// Weights to panels, and rows of weights back out of them.
#include "blocks.h"

struct PackArgs {
  const void* weight;  // [outputs, inputs], dense, of `kind`
  void* panels;
  i64 outputs, inputs, kind;
};

extern "C" void pack(const PackArgs* a) {
  const i64 size = size_of(a->kind), bytes = panel_bytes(a->kind, a->inputs);
  parallel(num_panels(a->outputs), [&](i64 panel) {
    u8* out = (u8*)a->panels + panel * bytes;
    memset(out, 0, bytes);
    for (i64 n = panel * PANEL; n < std::min(a->outputs, (panel + 1) * PANEL); n++) {
      const u8* row = (const u8*)a->weight + n * a->inputs * size;
      for (i64 k = 0; k < a->inputs; k++) memcpy(out + place(a->kind, n, k) * size, row + k * size, size);
    }
    if (a->kind == S8 && DOT_OFFSET)
      for (i64 i = 0; i < bytes; i++) out[i] ^= 0x80;
  });
}

// Bytes of packed weights.
extern "C" i64 packed_bytes(i64 outputs, i64 inputs, i64 kind) {
  return num_panels(outputs) * panel_bytes(kind, inputs);
}

struct PackBlocksArgs {
  const void* weight;  // [outputs, inputs]: bytes of two 4-bit numbers, input j of 32 in the low half of byte j of 16,
                       // input j + 16 in its high half; or int8
  const void* scale;   // [outputs, groups], of the kind's scale
  const void* offset;  // [outputs, groups], int8 zero points or minima like scale; or null
  const void* outer;   // [outputs, inputs / OUTER, 1 or 2] float16, what integer scales (and minima) are times; or null
  void* panels;
  i64 outputs, inputs, kind;
};

namespace {

// Where number `input` of a group stands, in bytes.
INLINE i64 block_place(i64 type, i64 output, i64 input) {
  if (type == B8) return place(S8, output, input);
  const i64 v = output % PANEL / LANES, lane = output % LANES;
  return ((input / 4 * (VECTORS / 2) + v % (VECTORS / 2)) * LANES + lane) * 4 + input % 4;
}
// Whether it is in the high half of its byte.
INLINE bool is_high(i64 type, i64 output) { return type == B4 && output % PANEL / LANES >= VECTORS / 2; }

void pack_output(const PackBlocksArgs& a, const Scaling& s, i64 n, u8* to) {
  const i64 groups = a.inputs / s.group, outer = s.outer_numbers(), size = s.scale_bytes(), at = n % PANEL;
  const i64 offset_size = s.offset_bytes();
  const u8* row = (const u8*)a.weight + n * a.inputs / (s.type == B4 ? 2 : 1);
  for (i64 g = 0; g < groups; g++) {
    if (outer && g * s.group % OUTER == 0)
      for (i64 i = 0; i < outer; i++, to += PANEL * 2)
        memcpy(to + at * 2, (const u16*)a.outer + (n * (a.inputs / OUTER) + g * s.group / OUTER) * outer + i, 2);
    memcpy(to + at * size, (const u8*)a.scale + (n * groups + g) * size, size);
    to += PANEL * size;
    if (offset_size) memcpy(to + at * offset_size, (const u8*)a.offset + (n * groups + g) * offset_size, offset_size);
    to += PANEL * offset_size;
    for (i64 j = 0; j < s.group; j++) {
      const i64 k = g * s.group + j;
      u8* place = to + block_place(s.type, n, j);
      if (s.type == B8) *place = row[k] ^ (DOT_OFFSET ? 0x80 : 0);
      else *place |= (row[k / BLOCK * 16 + k % 16] >> k % BLOCK / 16 * 4 & 0xf) << (is_high(s.type, n) ? 4 : 0);
    }
    to += PANEL * s.weight_bytes();
  }
}

// Read an output's weights out of its panel.
template <class T>
void unpack_output(i64 kind, const u8* panel, i64 n, i64 inputs, typename T::type* out) {
  const Scaling s(kind);
  GroupScales scales;
  const u8 offset = DOT_OFFSET ? 0x80 : 0;
  for (i64 k = 0; k < inputs; k += s.group, panel += PANEL * s.weight_bytes()) {
    panel = GroupScales::read(scales, s, panel, k);
    const f32 scale = scales.scale[n % PANEL / LANES][n % LANES], add = scales.offset[n % PANEL / LANES][n % LANES];
    for (i64 j = 0; j < s.group; j++) {
      const u8 byte = panel[block_place(s.type, n, j)];
      const i32 number = s.type == B8 ? (s8)(byte ^ offset) : is_high(s.type, n) ? byte >> 4 : byte & 0xf;
      store<T>(out + k + j, all(scale * number + add), 1);
    }
  }
}

}  // namespace

extern "C" void pack_blocks(const PackBlocksArgs* a) {
  const i64 bytes = panel_bytes(a->kind, a->inputs);
  const Scaling s(a->kind);
  parallel(num_panels(a->outputs), [&](i64 panel) {
    u8* out = (u8*)a->panels + panel * bytes;
    memset(out, 0, bytes);
    for (i64 n = panel * PANEL; n < std::min(a->outputs, (panel + 1) * PANEL); n++) pack_output(*a, s, n, out);
  });
}

struct EmbedArgs {
  const i64* ids;      // [rows]
  const void* weight;  // panels
  const f32* scale;    // [outputs], or null
  void* out;           // [rows, inputs], dense
  i64 rows, outputs, inputs, kind, dtype;
};

// An id that the table does not have gives a row of NaN, which fails its sequence and no other.
extern "C" void embed(const EmbedArgs* a) {
  const i64 bytes = panel_bytes(a->kind, a->inputs), size = size_of(a->kind);
  const i64 out_size = a->dtype == F32 ? 4 : 2;
  parallel_ranges(a->rows, 4, [&](i64 begin, i64 end) {
    for (i64 row = begin; row < end; row++) {
      const i64 n = a->ids[row];
      const u8* panel = (const u8*)a->weight + n / PANEL * bytes;
      u8* out = (u8*)a->out + row * a->inputs * out_size;
      if (n < 0 || n >= a->outputs) {
        memset(out, 0xff, a->inputs * out_size);
        continue;
      }
      if (is_blocks(a->kind)) {
        with_type(a->dtype, [&](auto type) {
          using T = decltype(type);
          unpack_output<T>(a->kind, panel, n, a->inputs, (typename T::type*)out);
        });
        continue;
      }
      if (size > 1) {
        for (i64 k = 0; k < a->inputs; k++) memcpy(out + k * size, panel + place(a->kind, n, k) * size, size);
        continue;
      }
      const u8 offset = a->kind == S8 && DOT_OFFSET ? 0x80 : 0;
      with_type(a->dtype, [&](auto type) {
        using T = decltype(type);
        for (i64 k = 0; k < a->inputs; k++) {
          const f32 value = (f32)(s8)(panel[place(a->kind, n, k)] ^ offset) * a->scale[n];
          store<T>((typename T::type*)out + k, all(value), 1);
        }
      });
    }
  });
}
