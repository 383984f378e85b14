// SPDX-License-Identifier: Apache-2.0
// The table of CPU kernels, one per instruction set. Kernels see flat tiles, never a cache, a page table or a plan.
#pragma once

#include <stdint.h>

#include "razor/kv_format.h"

namespace razor::cpu {

inline constexpr int64_t kTileColumns = 64;    // most keys in one run
inline constexpr int64_t kMostPanelRows = 64;  // rows that a kernel packs together

// At most kTileColumns consecutive keys, evenly spaced in memory.
struct DecodeRun {
  const void* key;                   // [count, head_dim] of the task's format, or the task's codes
  const void* value;                 // likewise
  const void* key_numbers;           // of codes (kv_format.h), row after row; nullable (no codes)
  const void* value_numbers;         // likewise
  int64_t key_stride, value_stride;  // elements; not for codes, whose rows follow one another
  int64_t count;                     // tokens
  int64_t begin;                     // tokens between the task's base and the first one
};

// A few query rows against runs of keys. Row r = i * group + g is query token i on head g;
//     logit[r][token] = scale * query_r . key - slope[r] * (last[r] - 1 - token)
// for the visible tokens first[r] <= token < last[r], counted from the base; the softmax state of each row takes them
// in. While one run is worked on, the next one is fetched.
struct DecodeTask {
  const void* query;        // [rows / group, group, head_dim] of format
  const DecodeRun* runs;    // [num_runs]; those without numbers are of format
  const int64_t* first;     // [rows]
  const int64_t* last;      // [rows]; the query's own token comes before it
  const float* slope;       // [rows], nullable (no ALiBi)
  float* maximum;           // [rows] state, as in AttentionBlock
  float* sum;               // [rows]
  float* weighted;          // [rows, head_dim]
  float* scratch;           // [decode_scratch(rows, head_dim)], at a multiple of 64 bytes
  int64_t query_stride[2];  // elements: token, head
  int64_t num_runs, rows, group, head_dim;
  KvFormat format;
  KvCodes codes;  // of the runs with numbers
  float scale;
};

// Elements of scratch that are enough for every kernel: queries and logits, and a copy of a run, decoded or for tiles.
constexpr int64_t decode_scratch(int64_t rows, int64_t head_dim) {
  return (rows + 16) * (head_dim + kTileColumns + 8) + 2 * kTileColumns * (head_dim + 64);
}

// Many query rows against any number of keys in any places. logit[r][c] = scale * key_scale[c] * query_r . key_c +
// slope[r] * (c - origin[r]) for the visible columns first[r] <= c < last[r]; the softmax state takes them in, with
// value_scale[c] * value_c as values.
struct AttentionBlock {
  const float* query;             // what pack_queries has made of [rows, head_dim]
  const void* const* key_rows;    // [columns] addresses of [head_dim] of format
  const void* const* value_rows;  // [columns]; not read by score_block
  const float* key_scale;         // [columns], nullable (1)
  const float* value_scale;       // [columns], nullable (1); not read by score_block
  const int32_t* first;           // [rows] first visible column
  const int32_t* last;            // [rows] one past the last visible column, at most `columns`
  const float* slope;             // [rows] logit per column, nullable (none)
  const float* origin;            // [rows] column, not read without a slope
  float* maximum;                 // [rows] state: largest logit so far, -inf at the start
  float* sum;                     // [rows] state: sum of exp(logit - maximum)
  float* weighted;                // [rows, head_dim] state: sum of exp(logit - maximum) * value; not for score_block
  float* scratch;                 // [block_scratch(head_dim)], at a multiple of 64 bytes
  int64_t rows, columns, head_dim;
  KvFormat format;
  float scale;
};

// Elements that are enough for every kernel: packed queries; packed keys and values, the logits of some rows, products.
constexpr int64_t packed_queries(int64_t rows, int64_t head_dim) { return (rows + kMostPanelRows) * (head_dim + 32); }
constexpr int64_t block_scratch(int64_t head_dim) {
  return 256 * (2 * head_dim + kMostPanelRows) + kMostPanelRows * (256 + 16);
}

// Left rows against right rows, for the largest of their products.
struct ProductBlock {
  const void* left;                         // [left_rows, cols] of format
  const void* right;                        // [right_rows, cols] of format
  float* scratch;                           // [product_scratch(...)], at a multiple of 64 bytes
  int64_t left_stride[2], right_stride[2];  // elements: row, column
  int64_t left_rows, right_rows, cols;      // at least 1 each
  KvFormat format;
};

// Elements of scratch that are enough for every kernel: packed left rows, some panels of right rows, and a number for
// each block of 32 by 32 rows.
constexpr int64_t product_scratch(int64_t left_rows, int64_t right_rows, int64_t cols) {
  return (left_rows + 5 * kMostPanelRows) * (cols + 32) + (left_rows / 32 + 1) * (right_rows / 32 + 1);
}

struct Kernels {
  void (*attention_block)(const AttentionBlock& block);
  void (*score_block)(const AttentionBlock& block);  // maximum and sum only
  // Query rows at `rows` [count] as the two above take them; packed: [packed_queries(count, head_dim)], at a multiple
  // of 64 bytes.
  void (*pack_queries)(const void* const* rows, int64_t count, int64_t head_dim, KvFormat format, float* packed);
  void (*decode_runs)(const DecodeTask& task);
  // sum[i] += sum over rows of row[i]; blocks of rows are summed by themselves and added once.
  void (*add_rows)(const void* rows, int64_t stride, int64_t count, int64_t head_dim, KvFormat format, float* sum);
  // out[i] = factor * row[i]
  void (*load_row)(const void* row, int64_t head_dim, KvFormat format, float factor, float* out);
  // row[i] = factor * in[i], rounded to nearest even
  void (*store_row)(const float* in, int64_t head_dim, KvFormat format, float factor, void* row);
  float (*dot)(const float* query, const void* key, int64_t head_dim, KvFormat format);
  // max over i, j of left_i . right_j in float32, NaN if one of them is
  float (*largest_product)(const ProductBlock& block);
  // Rows of format, `stride` elements apart, to codes and numbers (kv_format.h) that follow one another.
  void (*encode_rows)(const void* rows, int64_t stride, int64_t count, int64_t head_dim, KvFormat format, KvCodes to,
                      void* codes, void* numbers);
  // And back: rows [count, head_dim] of `to`, kF32 or kBF16, for some values of int4 are no kF16. With `scales` [count]
  // a stored row is scale * row, exactly: int8 rows are the codes, int4 rows the values with scales of 1. Without, rows
  // come multiplied; kF32 only.
  void (*decode_rows)(const void* codes, const void* numbers, int64_t count, int64_t head_dim, KvCodes from,
                      KvFormat to, void* rows, float* scales);
};

extern const Kernels kernels_scalar;
extern const Kernels kernels_neon;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;
extern const Kernels kernels_amx;

// The table of chosen_isa().
[[nodiscard]] const Kernels& kernels();

}  // namespace razor::cpu
