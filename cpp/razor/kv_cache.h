// SPDX-License-Identifier: Apache-2.0
// One layer's compressed KV cache: page pool, page table, policy per kv head, compensation sums.
//
// A page-table row belongs to one (sequence, kv head): b * num_kv_heads + h. Token t (counted from 0, padding not
// counted) lives in cache row t if t < sink_size, else in row sink_size + (t - sink_size) mod window_size; the tokens
// kept after `seen` tokens are t < sink_size and t >= seen - window_size. Everything else has been dropped and lives
// on only in key_sum and value_sum. Positions, lengths and the dropped count all follow from `seen` and the policy.
#pragma once

#include <cstdint>

#include "razor/check.h"
#include "razor/kv_format.h"
#include "razor/parallel.h"

namespace razor {

inline constexpr int32_t kFull = INT32_MAX;              // window_size of a head that keeps every token
inline constexpr int64_t kMaxTokens = int64_t{1} << 48;  // of one sequence

struct KvCacheView {
  void* key_pages;             // [num_pages, page_size, head_dim] of format, or of codes and numbers as in kv_format.h
  void* value_pages;           // likewise
  const int32_t* page_table;   // [batch * num_kv_heads, max_pages] page ids; entries past a row's length are not read
  int64_t* seen;               // [batch] tokens stored so far
  const int32_t* sink_size;    // [num_kv_heads] tokens
  const int32_t* window_size;  // [num_kv_heads] tokens, kFull keeps all
  const bool* compensate;      // [num_kv_heads]
  float* key_sum;              // [batch * num_kv_heads, head_dim] sum of the dropped keys
  float* value_sum;            // [batch * num_kv_heads, head_dim]
  void* exact;                 // [2, batch * num_kv_heads, exact_rows, head_dim] of format, nullable: keys and values
                               // of the first exact_sink and of the newest tokens as they came, beside their codes
  int64_t batch, num_kv_heads, head_dim, num_pages, page_size, max_pages;
  int64_t exact_rows, exact_sink;  // tokens; the others of exact_rows are a ring of the newest
  KvFormat format;                 // of queries and new tokens, and of the pages unless these are quantised
  KvCodes codes;                   // of the pages

  [[nodiscard]] RowBytes row() const { return row_bytes(format, codes, head_dim); }
};

// Keys and values of this call's tokens, not yet in the cache. Strides in elements; the last dimension is contiguous.
struct NewTokens {
  const void* key;                         // [batch, num_kv_heads, q_len, head_dim] of the cache's format
  const void* value;                       // [batch, num_kv_heads, q_len, head_dim]
  const int64_t* pad;                      // [batch] leading tokens of this call that are padding, nullable (none)
  int64_t key_stride[3], value_stride[3];  // batch, head, token
  int64_t q_len;
};

// One (sequence, kv head) as the kernels' callers see it.
struct CacheRow {
  int64_t batch_index, head, table_row;  // table_row = batch_index * num_kv_heads + head
  int64_t sink, window;                  // tokens
  bool compensate;
  int64_t seen, pad;  // tokens stored before this call; padding tokens of this call
};

// First position beyond the sinks that a query at `position` reads exactly; dense: every row that the cache still has.
[[nodiscard]] inline int64_t oldest_kept(const CacheRow& row, int64_t position, bool dense) {
  const int64_t oldest = dense ? row.seen - row.window : position - row.window + 1;
  return oldest > row.sink ? oldest : row.sink;
}

// Consecutive tokens whose rows are evenly spaced in memory. Of a quantised cache's own tokens: codes and numbers, one
// row right after the other.
struct Run {
  const void* key;  // [count, head_dim] of format, or codes
  const void* value;
  const void* key_numbers;  // nullable (no codes)
  const void* value_numbers;
  int64_t key_stride, value_stride;  // elements; not for codes
  int64_t count;                     // tokens
  KvFormat format;                   // not for codes
};

[[nodiscard]] CacheRow cache_row(const KvCacheView& cache, const NewTokens& tokens, int64_t table_row);

// The longest run (of at most max_count tokens) that starts at token `position` and ends before `end`. The token must
// be a kept one or one of this call's.
[[nodiscard]] Run next_run(const KvCacheView& cache, const NewTokens& tokens, const CacheRow& row, int64_t position,
                           int64_t end, int64_t max_count);

// The run as it is, or if it is codes, in float32: decoded to memory [2, count, head_dim].
[[nodiscard]] Run decoded(const KvCacheView& cache, const Run& run, float* memory);

// Adds the keys and values of tokens [begin, end) to key_sum[head_dim] and value_sum[head_dim].
void add_tokens(const KvCacheView& cache, const NewTokens& tokens, const CacheRow& row, int64_t begin, int64_t end,
                float* key_sum, float* value_sum);

// Sums of the tokens that a row's queries drop, and their means, as the window moves on over its queries.
struct DroppedMeans {
  float *key_sum, *value_sum, *key_mean, *value_mean;  // [head_dim]
  int64_t head_dim;

  DroppedMeans(float* memory, int64_t head_dim)  // memory: [4, head_dim]
      : key_sum(memory),
        value_sum(memory + head_dim),
        key_mean(memory + 2 * head_dim),
        value_mean(memory + 3 * head_dim),
        head_dim(head_dim) {}
  // Takes the cache's sums, and returns the position up to which they hold tokens from the sinks on.
  int64_t start(const KvCacheView& cache, const CacheRow& row) const;
  // Adds the tokens from `summed` up to `oldest`, moves `summed` there and returns how many are dropped; means if any.
  // A window of 0 drops the query's own token too.
  int64_t move(const KvCacheView& cache, const NewTokens& tokens, const CacheRow& row, int64_t oldest,
               int64_t& summed) const;
};

// Checks values that only memory can tell: sizes, seen, pad, and that the page table holds valid ids for every row as
// it is stored, or as it will be once the new tokens are. Shapes are the bindings' business.
void check_cache(const KvCacheView& cache, const NewTokens& tokens, bool with_new_tokens);

// Stores the new tokens by policy: what leaves a window goes into the sums, then `seen` grows. All or nothing.
RAZOR_API void append(const KvCacheView& cache, const NewTokens& tokens, ParallelFor parallel_for);

}  // namespace razor
