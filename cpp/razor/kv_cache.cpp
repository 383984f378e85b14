// SPDX-License-Identifier: Apache-2.0
#include "razor/kv_cache.h"

#include <algorithm>
#include <cstring>

#include "razor/cpu/kernels.h"
#include "razor/floats.h"

namespace razor {
namespace {

constexpr int64_t kDecodedTokens = 64;  // at once, on their way to the sums

int64_t row_of_token(const CacheRow& row, int64_t position) {
  return position < row.sink ? position : row.sink + (position - row.sink) % row.window;
}

// Bytes from the start of key_pages or value_pages to the codes (or elements) and to the numbers of a kept token.
RowBytes page_offset(const KvCacheView& cache, const CacheRow& row, int64_t cache_row_index) {
  const int64_t page = cache.page_table[row.table_row * cache.max_pages + cache_row_index / cache.page_size];
  const int64_t index = cache_row_index % cache.page_size, start = page * cache.page_size * cache.row().all();
  return {.codes = start + index * cache.row().codes,
          .numbers = start + cache.page_size * cache.row().codes + index * cache.row().numbers};
}

// Tokens from `position` on that lie in one page without crossing the end of the sinks or the turn of the ring.
int64_t contiguous_tokens(const KvCacheView& cache, const CacheRow& row, int64_t position) {
  const int64_t index = row_of_token(row, position);
  const int64_t in_page = cache.page_size - index % cache.page_size;
  const int64_t in_part = position < row.sink ? row.sink - position : row.sink + row.window - index;
  return std::min(in_page, in_part);
}

void copy_rows(const void* rows, int64_t stride, int64_t count, int64_t row_bytes, int64_t element_bytes,
               char* target) {
  if (stride * element_bytes == row_bytes) {
    std::memcpy(target, rows, row_bytes * count);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(target + i * row_bytes, static_cast<const char*>(rows) + i * stride * element_bytes, row_bytes);
  }
}

// Tokens from `position` on whose exact rows follow one another, and the first of these. The rows are laid out like a
// head's: sinks, then a ring.
struct ExactRun {
  int64_t index, count;

  ExactRun(const KvCacheView& cache, int64_t position) {
    const int64_t ring = cache.exact_rows - cache.exact_sink, sink = cache.exact_sink;
    index = position < sink ? position : sink + (position - sink) % ring;
    count = (position < sink ? sink : cache.exact_rows) - index;
  }

  // Of keys (side 0) or values (1).
  [[nodiscard]] char* row(const KvCacheView& cache, const CacheRow& row, int64_t side) const {
    const int64_t rows = (side * cache.batch * cache.num_kv_heads + row.table_row) * cache.exact_rows + index;
    return static_cast<char*>(cache.exact) + rows * cache.head_dim * element_size(cache.format);
  }
};

// The first token beyond the sinks that has an exact row once `seen` are stored.
int64_t oldest_exact(const KvCacheView& cache, int64_t seen) {
  return std::max(cache.exact_sink, seen - (cache.exact_rows - cache.exact_sink));
}

// Rows of format into a page.
void store_rows(const KvCacheView& cache, const void* rows, int64_t stride, int64_t count, void* pages,
                const RowBytes& offset) {
  char* target = static_cast<char*>(pages) + offset.codes;
  if (cache.codes != KvCodes::kNone) {
    return cpu::kernels().encode_rows(rows, stride, count, cache.head_dim, cache.format, cache.codes, target,
                                      static_cast<char*>(pages) + offset.numbers);
  }
  copy_rows(rows, stride, count, cache.row().codes, element_size(cache.format), target);
}

void store_tokens(const KvCacheView& cache, const NewTokens& tokens, const CacheRow& row, int64_t begin, int64_t end) {
  while (begin < end) {
    const Run run = next_run(cache, tokens, row, begin, end, contiguous_tokens(cache, row, begin));
    const RowBytes offset = page_offset(cache, row, row_of_token(row, begin));
    store_rows(cache, run.key, run.key_stride, run.count, cache.key_pages, offset);
    store_rows(cache, run.value, run.value_stride, run.count, cache.value_pages, offset);
    begin += run.count;
  }
}

void store_exact(const KvCacheView& cache, const NewTokens& tokens, const CacheRow& row, int64_t begin, int64_t end) {
  const int64_t size = element_size(cache.format), row_bytes = cache.head_dim * size;
  while (begin < end) {
    const ExactRun exact(cache, begin);
    const Run run = next_run(cache, tokens, row, begin, end, exact.count);
    copy_rows(run.key, run.key_stride, run.count, row_bytes, size, exact.row(cache, row, 0));
    copy_rows(run.value, run.value_stride, run.count, row_bytes, size, exact.row(cache, row, 1));
    begin += run.count;
  }
}

}  // namespace

CacheRow cache_row(const KvCacheView& cache, const NewTokens& tokens, int64_t table_row) {
  const int64_t b = table_row / cache.num_kv_heads, h = table_row % cache.num_kv_heads;
  return {.batch_index = b,
          .head = h,
          .table_row = table_row,
          .sink = cache.sink_size[h],
          .window = cache.window_size[h],
          .compensate = cache.compensate[h] && cache.window_size[h] != kFull,
          .seen = cache.seen[b],
          .pad = tokens.pad ? tokens.pad[b] : 0};
}

Run next_run(const KvCacheView& cache, const NewTokens& tokens, const CacheRow& row, int64_t position, int64_t end,
             int64_t max_count) {
  if (position >= row.seen) {
    const int64_t token = position - row.seen + row.pad;
    const auto start = [&](const void* base, const int64_t (&stride)[3]) {
      const int64_t elements = row.batch_index * stride[0] + row.head * stride[1] + token * stride[2];
      return static_cast<const char*>(base) + elements * element_size(cache.format);
    };
    return {.key = start(tokens.key, tokens.key_stride),
            .value = start(tokens.value, tokens.value_stride),
            .key_stride = tokens.key_stride[2],
            .value_stride = tokens.value_stride[2],
            .count = std::min(end - position, max_count),
            .format = cache.format};
  }
  int64_t coded_end = end;
  if (cache.exact != nullptr) {
    const int64_t oldest = oldest_exact(cache, row.seen);
    if (position < cache.exact_sink || position >= oldest) {
      const ExactRun exact(cache, position);
      return {.key = exact.row(cache, row, 0),
              .value = exact.row(cache, row, 1),
              .key_stride = cache.head_dim,
              .value_stride = cache.head_dim,
              .count = std::min({end - position, row.seen - position, max_count, exact.count}),
              .format = cache.format};
    }
    coded_end = std::min(end, oldest);
  }
  const RowBytes offset = page_offset(cache, row, row_of_token(row, position));
  const char *keys = static_cast<const char*>(cache.key_pages), *values = static_cast<const char*>(cache.value_pages);
  const bool coded = cache.codes != KvCodes::kNone;
  return {.key = keys + offset.codes,
          .value = values + offset.codes,
          .key_numbers = coded ? keys + offset.numbers : nullptr,
          .value_numbers = coded ? values + offset.numbers : nullptr,
          .key_stride = cache.head_dim,
          .value_stride = cache.head_dim,
          .count =
              std::min({coded_end - position, row.seen - position, max_count, contiguous_tokens(cache, row, position)}),
          .format = cache.format};
}

Run decoded(const KvCacheView& cache, const Run& run, float* memory) {
  if (run.key_numbers == nullptr) return run;
  const auto& kernels = cpu::kernels();
  float* value = memory + run.count * cache.head_dim;
  kernels.decode_rows(run.key, run.key_numbers, run.count, cache.head_dim, cache.codes, KvFormat::kF32, memory,
                      /*scales=*/nullptr);
  kernels.decode_rows(run.value, run.value_numbers, run.count, cache.head_dim, cache.codes, KvFormat::kF32, value,
                      /*scales=*/nullptr);
  return {.key = memory,
          .value = value,
          .key_stride = cache.head_dim,
          .value_stride = cache.head_dim,
          .count = run.count,
          .format = KvFormat::kF32};
}

void add_tokens(const KvCacheView& cache, const NewTokens& tokens, const CacheRow& row, int64_t begin, int64_t end,
                float* key_sum, float* value_sum) {
  const auto& kernels = cpu::kernels();
  static thread_local KeptFloats rows;
  while (begin < end) {
    const bool coded = cache.codes != KvCodes::kNone && begin < row.seen;
    const int64_t most = coded ? kDecodedTokens : end - begin;
    Run run = next_run(cache, tokens, row, begin, end, most);
    if (coded) run = decoded(cache, run, rows.get(2 * kDecodedTokens * cache.head_dim));
    kernels.add_rows(run.key, run.key_stride, run.count, cache.head_dim, run.format, key_sum);
    kernels.add_rows(run.value, run.value_stride, run.count, cache.head_dim, run.format, value_sum);
    begin += run.count;
  }
}

int64_t DroppedMeans::start(const KvCacheView& cache, const CacheRow& row) const {
  std::copy_n(cache.key_sum + row.table_row * head_dim, head_dim, key_sum);
  std::copy_n(cache.value_sum + row.table_row * head_dim, head_dim, value_sum);
  return std::max(row.sink, row.seen - row.window);
}

int64_t DroppedMeans::move(const KvCacheView& cache, const NewTokens& tokens, const CacheRow& row, int64_t oldest,
                           int64_t& summed) const {
  add_tokens(cache, tokens, row, summed, oldest, key_sum, value_sum);
  summed = std::max(summed, oldest);
  const int64_t dropped = summed - row.sink;
  if (dropped == 0) return 0;
  const auto& kernels = cpu::kernels();
  kernels.load_row(key_sum, head_dim, KvFormat::kF32, 1.0f / static_cast<float>(dropped), key_mean);
  kernels.load_row(value_sum, head_dim, KvFormat::kF32, 1.0f / static_cast<float>(dropped), value_mean);
  return dropped;
}

void check_cache(const KvCacheView& cache, const NewTokens& tokens, bool with_new_tokens) {
  for (int64_t h = 0; h < cache.num_kv_heads; ++h) {
    RAZOR_CHECK(cache.sink_size[h] >= 0, "sink_size: expected values >= 0, got ", cache.sink_size[h], " for kv head ",
                h);
    RAZOR_CHECK(cache.window_size[h] >= 0, "window_size: expected values >= 0, got ", cache.window_size[h],
                " for kv head ", h);
  }
  for (int64_t b = 0; b < cache.batch; ++b) {
    RAZOR_CHECK(cache.seen[b] >= 0 && cache.seen[b] <= kMaxTokens, "seen: expected values from 0 to ", kMaxTokens,
                ", got ", cache.seen[b], " for sequence ", b);
    const int64_t pad = tokens.pad ? tokens.pad[b] : 0;
    RAZOR_CHECK(pad >= 0 && pad <= tokens.q_len, "pad: expected values from 0 to ", tokens.q_len, ", got ", pad,
                " for sequence ", b);
  }
  for (int64_t r = 0; r < cache.batch * cache.num_kv_heads; ++r) {
    const CacheRow row = cache_row(cache, tokens, r);
    const int64_t tokens_after = row.seen + (with_new_tokens ? tokens.q_len - row.pad : 0);
    const int64_t pages = (std::min(tokens_after, row.sink + row.window) + cache.page_size - 1) / cache.page_size;
    RAZOR_CHECK(pages <= cache.max_pages, "page_table: expected at least ", pages, " pages for sequence ",
                row.batch_index, ", kv head ", row.head, ", got ", cache.max_pages);
    for (int64_t i = 0; i < pages; ++i) {
      const int32_t page = cache.page_table[r * cache.max_pages + i];
      RAZOR_CHECK(page >= 0 && page < cache.num_pages, "page_table: expected page ids from 0 to ", cache.num_pages - 1,
                  ", got ", page, " for sequence ", row.batch_index, ", kv head ", row.head);
    }
  }
}

void append(const KvCacheView& cache, const NewTokens& tokens, ParallelFor parallel_for) {
  (void)cpu::kernels();  // refuses a wrong RAZOR_ISA before anything runs in parallel
  check_cache(cache, tokens, /*with_new_tokens=*/true);
  const int64_t rows = cache.batch * cache.num_kv_heads;
  const int64_t bytes = 2 * rows * tokens.q_len * cache.head_dim * element_size(cache.format);
  if (bytes < kSerialBytes) parallel_for = serial_for;
  for_each_item(parallel_for, rows, [&](int64_t r) {
    const CacheRow row = cache_row(cache, tokens, r);
    const int64_t end = row.seen + tokens.q_len - row.pad;
    // Tokens in [sink, end - window) are dropped afterwards; those before seen - window already were.
    const int64_t dropped_end = std::max(row.sink, end - row.window);
    if (row.compensate) {
      add_tokens(cache, tokens, row, std::max(row.sink, row.seen - row.window), dropped_end,
                 cache.key_sum + r * cache.head_dim, cache.value_sum + r * cache.head_dim);
    }
    store_tokens(cache, tokens, row, row.seen, std::min(row.sink, end));
    store_tokens(cache, tokens, row, std::max(row.seen, dropped_end), end);
    if (cache.exact != nullptr) {
      store_exact(cache, tokens, row, row.seen, std::min(cache.exact_sink, end));
      store_exact(cache, tokens, row, std::max(row.seen, oldest_exact(cache, end)), end);
    }
  });
  for (int64_t b = 0; b < cache.batch; ++b) cache.seen[b] += tokens.q_len - (tokens.pad ? tokens.pad[b] : 0);
}

}  // namespace razor
