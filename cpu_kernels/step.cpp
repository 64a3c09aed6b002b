// What the layers of a decode step read, from its rows and positions: of each row its block table, the slot of its
// token, how much it sees, and whether it only pads the batch.
#include "common.h"

struct PrepareArgs {
  const i64* rows;       // [count], which of the tables
  const i64* positions;  // [count]
  const i32* tables;     // [*, blocks], rows table_stride apart
  i32* table;            // [count, blocks]
  i64* slots;            // [count]
  i64 count, blocks, table_stride, block_size;
};

extern "C" void prepare_tables(const PrepareArgs* a) {
  for (i64 i = 0; i < a->count; i++) {
    const i32* own = a->tables + a->rows[i] * a->table_stride;
    memcpy(a->table + i * a->blocks, own, a->blocks * sizeof(i32));
    a->slots[i] = (i64)own[a->positions[i] / a->block_size] * a->block_size + a->positions[i] % a->block_size;
  }
}

struct ContextArgs {
  const i64* rows;       // [count]
  const i64* positions;  // [count]
  i32* context;          // [count]
  i32* cu_q;             // [count + 1]
  void* padding;         // [count] bool
  i64 count, padding_row;
};

extern "C" void prepare_contexts(const ContextArgs* a) {
  a->cu_q[0] = 0;
  for (i64 i = 0; i < a->count; i++) {
    a->context[i] = (i32)a->positions[i] + 1;
    a->cu_q[i + 1] = (i32)i + 1;
    ((bool*)a->padding)[i] = a->rows[i] == a->padding_row;
  }
}
