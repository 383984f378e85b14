// SPDX-License-Identifier: Apache-2.0
// Who works on what, and how on-chip memory is spent: plain arithmetic that the host, its tests and the vector cores
// share. Lengths live on the device and nobody waits for them: each core walks the rows and finds its own share.
//
// A part is one page-table row with a block of its query rows. Its work is counted in units: one for each tile of
// tokens, one for the compensation row. With few queries (decode) all units of all parts are laid end to end and cut
// into equal shares, so that rows of any length keep all cores busy; a part that crosses a cut leaves softmax states,
// merged by combine.cpp. A share lies in a row: it holds at most two cut parts, hence two states for each worker. With
// many queries there are many parts, and worker i takes parts i, i + workers and so on, none of them cut.
#pragma once

#include <stdint.h>

#ifndef RAZOR_FN  // what a function that also runs on the device is marked with
#define RAZOR_FN inline
#endif

namespace razor::ascend {

constexpr int64_t kFull = 2147483647;      // window_size of a head that keeps every token
constexpr int64_t kLanes = 64;             // float32 numbers that one repeat of the vector unit takes
constexpr int64_t kMostBlockRows = 16;     // query rows that share each loaded tile
constexpr int64_t kMostDecodeTokens = 16;  // new tokens up to which parts are cut
constexpr int64_t kLeastUnits = 4;         // of a share: less is not worth another core
constexpr int64_t kUbBudget = 188160;      // bytes of 192 KiB that a kernel may count on

RAZOR_FN int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
RAZOR_FN int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
RAZOR_FN int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
RAZOR_FN int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// A layer's cache and the new tokens of a call. Strides in elements: batch, head, token; the last one is 1.
struct CacheTiling {
  int64_t batch, num_kv_heads, head_dim, num_pages, page_size, max_pages;
  int64_t q_len;
  int64_t key_stride[3], value_stride[3];
  int64_t key_elements, value_elements;  // from the first new key to the last
  int64_t tile_tokens;                   // most tokens of a tile, a multiple of 16 up to kLanes
  int64_t has_pad;
  int64_t workers;
};

struct AttentionTiling {
  CacheTiling cache;
  int64_t num_heads, group;
  int64_t query_stride[3], query_elements;
  int64_t block_rows, blocks_per_row;  // query rows of a part; parts of a page-table row
  int64_t has_slopes, dense;
  int64_t skip_full;  // heads that keep every token are attended elsewhere
  float scale, reserved;
};

struct HeadScoresTiling {
  int64_t batch, num_heads, num_kv_heads, group, tokens, head_dim, period;
  int64_t query_stride[3], key_stride[3];
  int64_t query_elements, key_elements;
  int64_t tile_tokens, block_rows, blocks_per_row;
  int64_t workers;
  float scale, reserved;
};

// One (sequence, kv head).
struct CacheRow {
  int64_t batch_index, head, table_row;
  int64_t sink, window;  // tokens
  int64_t seen, pad;     // tokens stored before this call; padding tokens of this call
  bool compensate;
};

// First position beyond the sinks that a query at `position` reads exactly; dense: every row that the cache still has.
RAZOR_FN int64_t oldest_kept(const CacheRow& row, int64_t position, bool dense) {
  const int64_t oldest = dense ? row.seen - row.window : position - row.window + 1;
  return larger(oldest, row.sink);
}

RAZOR_FN int64_t row_of_token(const CacheRow& row, int64_t position) {
  return position < row.sink ? position : row.sink + (position - row.sink) % row.window;
}

// Tokens from `position` on that lie in one page without crossing the end of the sinks or the turn of the ring.
RAZOR_FN int64_t contiguous_tokens(const CacheRow& row, int64_t position, int64_t page_size) {
  const int64_t index = row_of_token(row, position);
  const int64_t in_part = position < row.sink ? row.sink - position : row.sink + row.window - index;
  return smaller(page_size - index % page_size, in_part);
}

struct TokenRange {
  int64_t begin, end;
};

// Tiles of a range of tokens: the first one ends where the cache row is a multiple of a tile, so that the others do not
// straddle pages.
RAZOR_FN int64_t first_tile(const CacheRow& row, int64_t begin, int64_t tile_tokens) {
  return begin < row.seen ? tile_tokens - row_of_token(row, begin) % tile_tokens : tile_tokens;
}

RAZOR_FN int64_t count_tiles(const CacheRow& row, TokenRange range, int64_t tile_tokens) {
  if (range.begin >= range.end) return 0;
  const int64_t rest = range.end - range.begin - first_tile(row, range.begin, tile_tokens);
  return 1 + (rest > 0 ? divide_up(rest, tile_tokens) : 0);
}

RAZOR_FN TokenRange tile_of(const CacheRow& row, TokenRange range, int64_t tile_tokens, int64_t index) {
  const int64_t start = range.begin + first_tile(row, range.begin, tile_tokens) + (index - 1) * tile_tokens;
  return {index == 0 ? range.begin : start, smaller(start + tile_tokens, range.end)};
}

// Query rows [first_row, end_row) of a page-table row, row r being token r / group beyond the padding on head r %
// group, with the tokens that any of them sees: the sinks, and everything from the oldest window on.
struct Part {
  CacheRow row;
  int64_t first_row, end_row;
  TokenRange sinks, window;
  int64_t sink_tiles, tiles;  // of both
  int64_t units;              // 0: nobody asks; else at least 1, for a query that sees nothing gets zeros
  bool drops;                 // some query needs the compensation row; it is the last unit
};

RAZOR_FN Part make_part(const AttentionTiling& tiling, const CacheRow& row, int64_t block) {
  Part part;
  part.row = row;
  part.first_row = block * tiling.block_rows;
  part.end_row = smaller(part.first_row + tiling.block_rows, (tiling.cache.q_len - row.pad) * tiling.group);
  part.units = part.tiles = part.sink_tiles = 0;
  part.drops = false;
  if (part.first_row >= part.end_row || (tiling.skip_full != 0 && row.window == kFull)) return part;
  const int64_t last = row.seen + (part.end_row - 1) / tiling.group;
  const int64_t first = row.seen + part.first_row / tiling.group;
  part.sinks = {0, smaller(row.sink, last + 1)};
  part.window = {smaller(oldest_kept(row, first, tiling.dense != 0), last + 1), last + 1};
  part.sink_tiles = count_tiles(row, part.sinks, tiling.cache.tile_tokens);
  part.tiles = part.sink_tiles + count_tiles(row, part.window, tiling.cache.tile_tokens);
  part.drops = row.compensate && oldest_kept(row, last, tiling.dense != 0) > row.sink;
  part.units = larger(part.tiles + (part.drops ? 1 : 0), 1);
  return part;
}

// Units [begin, end) of a part; `state`: where its softmax state goes, -1: the part is whole and goes to the output.
struct Share {
  Part part;
  int64_t begin, end, state;
  int64_t last_worker;  // of the part
};

// The shares of one worker, in order. Rows: has row(table_row).
template <class Rows>
class WorkList {
 public:
  RAZOR_FN WorkList(const AttentionTiling& tiling, const Rows& rows, int64_t worker)
      : tiling_(tiling), rows_(rows), worker_(worker) {
    const CacheTiling& cache = tiling.cache;
    num_parts_ = cache.batch * cache.num_kv_heads * tiling.blocks_per_row;
    cuts_ = cache.q_len <= kMostDecodeTokens;
    if (!cuts_) {
      next_ = worker;
      return;
    }
    int64_t total = 0;
    for (int64_t i = 0; i < num_parts_; ++i) total += part(i).units;
    quantum_ = larger(divide_up(total, cache.workers), kLeastUnits);
  }

  RAZOR_FN bool next(Share& share) {
    const int64_t low = worker_ * quantum_, high = low + quantum_;
    while (next_ < num_parts_ && (!cuts_ || offset_ < high)) {
      share.part = part(next_);
      const int64_t start = offset_, units = share.part.units;
      next_ += cuts_ ? 1 : tiling_.cache.workers;
      offset_ += cuts_ ? units : 0;
      if (units == 0 || (cuts_ && start + units <= low)) continue;
      share.begin = cuts_ ? larger(low - start, 0) : 0;
      share.end = cuts_ ? smaller(high - start, units) : units;
      const bool whole = share.begin == 0 && share.end == units;
      share.state = whole ? -1 : 2 * worker_ + (share.begin == 0 ? 1 : 0);
      share.last_worker = cuts_ ? (start + units - 1) / quantum_ : worker_;
      return true;
    }
    return false;
  }

 private:
  RAZOR_FN Part part(int64_t index) const {
    return make_part(tiling_, rows_.row(index / tiling_.blocks_per_row), index % tiling_.blocks_per_row);
  }

  const AttentionTiling& tiling_;
  const Rows& rows_;
  int64_t worker_, num_parts_, next_ = 0;
  int64_t quantum_ = 0, offset_ = 0;  // units
  bool cuts_;
};

// --- on-chip memory

// Of a part's softmax states: maximum and sum [block_rows rounded up to 8], weighted values [block_rows, head_dim].
RAZOR_FN int64_t state_floats(int64_t block_rows, int64_t head_dim) {
  return 2 * round_up(block_rows, 8) + block_rows * head_dim;
}

// Bytes of tile_math.h's buffers; `weighs`: with values, not logits alone.
RAZOR_FN int64_t tile_math_bytes(int64_t tile_tokens, int64_t rows, int64_t head_dim, bool weighs) {
  const int64_t rows8 = round_up(rows, 8), n = tile_tokens;
  const int64_t logits = n * head_dim + 2 * n * kLanes + rows * head_dim + rows * n + 5 * rows8 + 8 * rows8;
  return 4 * (logits + (weighs ? rows * head_dim + 16 * n : 0));
}

RAZOR_FN int64_t attention_ub_bytes(int64_t tile_tokens, int64_t rows, int64_t head_dim) {
  const int64_t queues = 4 * tile_tokens * head_dim * 2 + 4 * state_floats(rows, head_dim);
  const int64_t own = 4 * (2 * tile_tokens + head_dim);  // distances, log(dropped), sum
  return queues + own + tile_math_bytes(tile_tokens, rows, head_dim, true);
}

RAZOR_FN int64_t combine_ub_bytes(int64_t rows, int64_t head_dim) {
  return 4 * (2 * state_floats(rows, head_dim) + rows * head_dim + 13 * round_up(rows, 8) + rows * head_dim) +
         2 * rows * head_dim;
}

RAZOR_FN int64_t append_ub_bytes(int64_t tile_tokens, int64_t head_dim) {
  return 4 * tile_tokens * head_dim * 2 + 4 * (tile_tokens * kLanes + 2 * head_dim);
}

RAZOR_FN int64_t head_scores_ub_bytes(int64_t tile_tokens, int64_t rows, int64_t head_dim) {
  const int64_t rows8 = round_up(rows, 8);
  return 2 * tile_tokens * head_dim * 2 + 4 * 2 * rows8 + 4 * (rows * tile_tokens + 3 * rows8) +
         tile_math_bytes(tile_tokens, rows, head_dim, false);
}

}  // namespace razor::ascend
