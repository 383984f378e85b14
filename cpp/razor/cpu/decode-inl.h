// SPDX-License-Identifier: Apache-2.0
// A few queries against long runs of keys, written once against Vec. With few queries the memory sets the pace, so the
// next run is fetched in small portions all the while: the hardware's own prefetchers end at every 4 KiB, and rest
// during the softmax. Uses attention_tile-inl.h.
//
// Tried, of one thread's 15 GB/s: no fetching ahead 6.9; into L1 11.5, into L2 12.3; every second line, hoping for the
// neighbour, 8.3 to 10.4; loads instead of prefetches 9.5 to 11.8; values during the keys and the next keys during the
// values 11.3; keys and values in turns from 1, 2 or 4 places each 12.8, 12.8, 13.1 (bench/LOG.md).

namespace razor::cpu::RAZOR_ISA_NAMESPACE {
namespace {

constexpr int64_t kLineBytes = 64;

// What is left to fetch of the next run: its keys, then its values, each with their numbers.
struct Ahead {
  struct Piece {
    const char *begin, *end;
  };
  Piece pieces[4];
  int64_t at = 0;

  void some(int64_t lines) {
    for (; lines > 0 && at < 4; --lines) {
      Piece& piece = pieces[at];
      if (piece.begin >= piece.end) {
        ++at;
        continue;
      }
      __builtin_prefetch(piece.begin, /*rw=*/0, /*locality=*/2);  // L2: L1 is full of this run
      piece.begin += kLineBytes;
    }
  }
};

inline Ahead ahead_of(const DecodeTask& task, int64_t run) {
  if (run + 1 >= task.num_runs) return {};
  const DecodeRun& next = task.runs[run + 1];
  const bool coded = next.key_numbers != nullptr;
  if (!coded && (next.key_stride != task.head_dim || next.value_stride != task.head_dim)) return {};  // of this call
  const RowBytes bytes = row_bytes(task.format, coded ? task.codes : KvCodes::kNone, task.head_dim);
  const auto piece = [&](const void* rows, int64_t row) {
    const char* begin = static_cast<const char*>(rows);
    return Ahead::Piece{begin, begin + next.count * row};
  };
  return {.pieces = {piece(next.key, bytes.codes), piece(next.key_numbers, bytes.numbers),
                     piece(next.value, bytes.codes), piece(next.value_numbers, bytes.numbers)}};
}

template <int kRows, class T>
inline void decode_logits(const AttentionTile& tile, int64_t row, int64_t lines, Ahead& ahead) {
  const float* query = tile.query + row * tile.head_dim;
  const T* key = static_cast<const T*>(tile.key);
  float* logits = tile.logits + row * kTileColumns;
  int64_t c = 0;
  for (; c + Vec::kColumnBlock <= tile.columns; c += Vec::kColumnBlock) {
    ahead.some(lines);
    block_logits<kRows, Vec::kColumnBlock>(query, key + c * tile.key_stride, tile.key_stride, tile.head_dim,
                                           logits + c);
  }
  for (; c < tile.columns; ++c) {
    block_logits<kRows, 1>(query, key + c * tile.key_stride, tile.key_stride, tile.head_dim, logits + c);
  }
}

// weighted[r] = shrink[r] * weighted[r] + sum over columns of p[r][c] * value_c, for kRows rows and kVecs vectors at d.
// The sum is added once, so that one heavy row does not dictate the rounding of all others.
template <int kRows, int kVecs, class T>
inline void add_values(const AttentionTile& tile, int64_t row, int64_t d, const float* shrink, int64_t lines,
                       Ahead& ahead) {
  const T* value = static_cast<const T*>(tile.value) + d;
  const float* p = tile.logits + row * kTileColumns;
  // Known to be whole vectors when there are several; one vector may be the partial last.
  const int64_t width = kVecs > 1 ? kVecs * Vec::kLanes : tile.head_dim - d;
  Vec total[kRows][kVecs];
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kVecs; ++i) total[r][i] = Vec::zero();
  }
  for (int64_t c = 0; c < tile.columns; ++c) {
    if (c % Vec::kColumnBlock == 0) ahead.some(lines);
    const T* v = value + c * tile.value_stride;
    Vec x[kVecs];
    for (int i = 0; i < kVecs; ++i) x[i] = load_upto(v + i * Vec::kLanes, width - i * Vec::kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = Vec::fill(p[r * kTileColumns + c]);
      for (int i = 0; i < kVecs; ++i) total[r][i] = fma(weight, x[i], total[r][i]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    float* out = tile.weighted + (row + r) * tile.head_dim + d;
    const Vec factor = Vec::fill(shrink[r]);
    for (int i = 0; i < kVecs; ++i) {
      const int64_t lane = i * Vec::kLanes;
      store_upto(fma(factor, load_upto(out + lane, width - lane), total[r][i]), out + lane, width - lane);
    }
  }
}

// What an int8 column stands for is its scale times what its codes give.
inline void scale_columns(const AttentionTile& tile, int64_t row, const float* scales) {
  float* x = tile.logits + row * kTileColumns;
  for (int64_t c = 0; c < tile.columns; c += Vec::kLanes) {
    const int64_t width = tile.columns - c;
    store_upto(mul(load_upto(x + c, width), load_upto(scales + c, width)), x + c, width);
  }
}

// Probabilities of the rows: see row_softmax. shrink: [rows]; scales: [columns], nullable (none).
template <int kRows, class T>
inline void decode_keys(const AttentionTile& tile, int64_t row, const float* scales, int64_t lines, float* shrink,
                        Ahead& ahead) {
  decode_logits<kRows, T>(tile, row, lines, ahead);
  for (int64_t r = row; r < row + kRows; ++r) {
    if (scales != nullptr) scale_columns(tile, r, scales);
    shrink[r] = row_softmax(tile, r);
  }
}

template <int kRows, class T>
inline void decode_values(const AttentionTile& tile, int64_t row, const float* scales, int64_t lines,
                          const float* shrink, Ahead& ahead) {
  for (int64_t r = row; scales != nullptr && r < row + kRows; ++r) scale_columns(tile, r, scales);
  constexpr int64_t kWide = Vec::kColumnBlock * Vec::kLanes;
  int64_t d = 0;
  for (; d + kWide <= tile.head_dim; d += kWide) {
    add_values<kRows, Vec::kColumnBlock, T>(tile, row, d, shrink + row, lines, ahead);
  }
  for (; d < tile.head_dim; d += Vec::kLanes) add_values<kRows, 1, T>(tile, row, d, shrink + row, lines, ahead);
}

// Query rows as floats, scaled: [rows, head_dim].
template <class T>
inline void scale_typed_queries(const DecodeTask& task, float* out) {
  const Vec scale = Vec::fill(task.scale);
  for (int64_t r = 0; r < task.rows; ++r) {
    const T* query = static_cast<const T*>(task.query) + r / task.group * task.query_stride[0] +
                     r % task.group * task.query_stride[1];
    for (int64_t d = 0; d < task.head_dim; d += Vec::kLanes) {
      const int64_t width = task.head_dim - d;
      store_upto(mul(load_upto(query + d, width), scale), out + r * task.head_dim + d, width);
    }
  }
}

inline void scale_queries(const DecodeTask& task, float* out) {
  switch (task.format) {
    case KvFormat::kF32:
      return scale_typed_queries<float>(task, out);
    case KvFormat::kBF16:
      return scale_typed_queries<BFloat16>(task, out);
    case KvFormat::kF16:
      return scale_typed_queries<Float16>(task, out);
  }
}

inline int32_t column_of(int64_t token, const DecodeRun& run) {
  const int64_t column = token - run.begin;
  return static_cast<int32_t>(column < 0 ? 0 : column > run.count ? run.count : column);
}

// A block of rows goes over keys or values in portions of kColumnBlock columns; each fetches as much of the next run.
inline int64_t lines_of_portion(const DecodeTask& task, const DecodeRun& run) {
  const int64_t row_blocks = task.rows / Vec::kRowBlock + task.rows % Vec::kRowBlock;
  const int64_t portions =
      row_blocks * (kTileColumns / Vec::kColumnBlock) * (1 + task.head_dim / (Vec::kColumnBlock * Vec::kLanes));
  const KvCodes codes = run.key_numbers == nullptr ? KvCodes::kNone : task.codes;
  const int64_t bytes = 2 * kTileColumns * row_bytes(task.format, codes, task.head_dim).all();
  return bytes / kLineBytes / portions + 1;
}

// The keys of a run, then its values, are `tile.key` and `tile.value` of T; `turn` is called in between.
template <class T, class Turn>
inline void decode_run(AttentionTile& tile, const float* key_scales, const float* value_scales, int64_t lines,
                       float* shrink, Ahead& ahead, const Turn& turn) {
  const int64_t rows = tile.rows;
  int64_t row = 0;
  for (; row + Vec::kRowBlock <= rows; row += Vec::kRowBlock) {
    decode_keys<Vec::kRowBlock, T>(tile, row, key_scales, lines, shrink, ahead);
  }
  for (; row < rows; ++row) decode_keys<1, T>(tile, row, key_scales, lines, shrink, ahead);
  turn();
  row = 0;
  for (; row + Vec::kRowBlock <= rows; row += Vec::kRowBlock) {
    decode_values<Vec::kRowBlock, T>(tile, row, value_scales, lines, shrink, ahead);
  }
  for (; row < rows; ++row) decode_values<1, T>(tile, row, value_scales, lines, shrink, ahead);
}

// Codes of int8 become floats in registers, and scales are left to logits and probabilities; those of int4 become
// floats in the scratch, keys and values in turns: both would not fit the L1 cache.
inline void decode_codes(const DecodeTask& task, const DecodeRun& run, AttentionTile& tile, float* decoded,
                         int64_t lines, float* shrink, Ahead& ahead) {
  tile.key_stride = tile.value_stride = task.head_dim;
  if (task.codes == KvCodes::kInt8) {
    return decode_run<int8_t>(tile, static_cast<const float*>(run.key_numbers),
                              static_cast<const float*>(run.value_numbers), lines, shrink, ahead, [] {});
  }
  const auto decode = [&](const void* codes, const void* numbers) {
    decode_rows(codes, numbers, run.count, task.head_dim, task.codes, KvFormat::kF32, decoded, /*scales=*/nullptr);
  };
  tile.key = tile.value = decoded;
  decode(run.key, run.key_numbers);
  decode_run<float>(tile, nullptr, nullptr, lines, shrink, ahead, [&] { decode(run.value, run.value_numbers); });
}

void decode_runs(const DecodeTask& task) {
  const int64_t rows = task.rows;
  float* query = task.scratch;
  float* logits = query + rows * task.head_dim;
  float* decoded = logits + rows * kTileColumns;
  float* bias = decoded + kTileColumns * task.head_dim;
  float* slope = bias + rows;
  float* shrink = slope + rows;
  auto* first = reinterpret_cast<int32_t*>(shrink + rows);
  int32_t* last = first + rows;
  scale_queries(task, query);
  for (int64_t i = 0; i < task.num_runs; ++i) {
    const DecodeRun& run = task.runs[i];
    for (int64_t r = 0; r < rows; ++r) {
      first[r] = column_of(task.first[r], run);
      last[r] = column_of(task.last[r], run);
      slope[r] = task.slope == nullptr ? 0.0f : task.slope[r];
      bias[r] = -slope[r] * static_cast<float>(task.last[r] - 1 - run.begin);
    }
    AttentionTile tile = {.query = query,
                          .key = run.key,
                          .value = run.value,
                          .first = first,
                          .last = last,
                          .bias = bias,
                          .slope = slope,
                          .maximum = task.maximum,
                          .sum = task.sum,
                          .weighted = task.weighted,
                          .logits = logits,
                          .rows = rows,
                          .columns = run.count,
                          .head_dim = task.head_dim,
                          .key_stride = run.key_stride,
                          .value_stride = run.value_stride};
    Ahead ahead = ahead_of(task, i);
    const int64_t lines = lines_of_portion(task, run);
    const auto plain = [] {};
    if (run.key_numbers != nullptr) {
      decode_codes(task, run, tile, decoded, lines, shrink, ahead);
    } else if (task.format == KvFormat::kF32) {
      decode_run<float>(tile, nullptr, nullptr, lines, shrink, ahead, plain);
    } else if (task.format == KvFormat::kBF16) {
      decode_run<BFloat16>(tile, nullptr, nullptr, lines, shrink, ahead, plain);
    } else {
      decode_run<Float16>(tile, nullptr, nullptr, lines, shrink, ahead, plain);
    }
  }
}

}  // namespace
}  // namespace razor::cpu::RAZOR_ISA_NAMESPACE
