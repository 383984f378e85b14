// SPDX-License-Identifier: Apache-2.0
// Compares every kernel of the instruction set in use (the best, or the one RAZOR_ISA names) with the scalar kernels,
// on random data with NaN and infinities, odd sizes and memory that ends where the data does. For machines without
// Python, such as an emulated one, and for sanitizers. Prints the number of results compared of each kernel; the first
// result that differs ends the program with 1.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "razor/cpu/isa.h"
#include "razor/cpu/kernels.h"
#include "razor/float16.h"
#include "razor/floats.h"

namespace razor::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kTolerance = 2e-5f;  // of the largest value: float32 in another order, probabilities as bf16 pairs
constexpr KvFormat kFormats[] = {KvFormat::kF32, KvFormat::kBF16, KvFormat::kF16};
constexpr int64_t kHeadDims[] = {1, 7, 32, 64, 80, 96, 128, 160};

std::mt19937 generator(1);
std::map<std::string, int64_t> compared;

float normal() { return std::normal_distribution<float>()(generator); }
int64_t below(int64_t n) { return std::uniform_int_distribution<int64_t>(0, n - 1)(generator); }

// actual is expected, up to `allowed`; NaN where NaN is expected and nowhere else.
void expect(const char* kernel, const std::string& at, float actual, float expected, float allowed) {
  ++compared[kernel];
  if (std::isnan(expected) ? std::isnan(actual) : actual == expected || std::abs(actual - expected) <= allowed) return;
  std::printf("%s %s, %s: expected %.9g +- %.2g, got %.9g\n", isa(), kernel, at.c_str(), expected, allowed, actual);
  std::exit(1);
}

// Elements of a format, in memory of exactly that size.
class Elements {
 public:
  Elements(int64_t count, KvFormat format) : format_(format), bytes_(count * element_size(format)) {
    for (int64_t i = 0; i < count; ++i) set(i, normal());
  }
  void set(int64_t i, float x) {
    if (format_ == KvFormat::kF32) from_float(x, reinterpret_cast<float*>(bytes_.data()) + i);
    if (format_ == KvFormat::kBF16) from_float(x, reinterpret_cast<BFloat16*>(bytes_.data()) + i);
    if (format_ == KvFormat::kF16) from_float(x, reinterpret_cast<Float16*>(bytes_.data()) + i);
  }
  [[nodiscard]] float get(int64_t i) const {
    if (format_ == KvFormat::kF32) return reinterpret_cast<const float*>(bytes_.data())[i];
    if (format_ == KvFormat::kBF16) return to_float(reinterpret_cast<const BFloat16*>(bytes_.data())[i]);
    return to_float(reinterpret_cast<const Float16*>(bytes_.data())[i]);
  }
  [[nodiscard]] const void* at(int64_t i) const { return bytes_.data() + i * element_size(format_); }
  [[nodiscard]] void* data() { return bytes_.data(); }

 private:
  KvFormat format_;
  std::vector<char> bytes_;
};

struct State {
  std::vector<float> maximum, sum, weighted;
  State(int64_t rows, int64_t head_dim) : maximum(rows, -kInfinity), sum(rows), weighted(rows * head_dim) {}
};

// Two states of the same softmax; their maxima may differ, or be lost to a NaN.
void expect_state(const char* kernel, const std::string& at, const State& actual, const State& expected,
                  int64_t head_dim) {
  for (size_t r = 0; r < expected.sum.size(); ++r) {
    const std::string row = at + " row " + std::to_string(r);
    const bool some = expected.sum[r] > 0;  // neither empty nor NaN
    const float factor = some ? std::exp(actual.maximum[r] - expected.maximum[r]) : 1.0f;
    expect(kernel, row + " sum", actual.sum[r] * factor, expected.sum[r], kTolerance * expected.sum[r]);
    for (int64_t d = 0; some && d < head_dim; ++d) {
      const size_t i = r * head_dim + d;
      expect(kernel, row + " element " + std::to_string(d), actual.weighted[i] * factor, expected.weighted[i],
             kTolerance * 4 * expected.sum[r]);
    }
  }
}

// Queries, keys and values; some keys NaN, or such that their logits are -inf for every query.
struct Input {
  int64_t rows, columns, head_dim, stride;
  Elements query, key, value;
  Input(int64_t rows, int64_t columns, int64_t head_dim, KvFormat format)
      : rows(rows),
        columns(columns),
        head_dim(head_dim),
        stride(head_dim + below(2) * 24),
        query(rows * head_dim, format),
        key((columns - 1) * stride + head_dim, format),
        value((columns - 1) * stride + head_dim, format) {
    for (int64_t r = 0; r < rows; ++r) query.set(r * head_dim, 1.0f);
    if (below(3) == 0) key.set(below(columns) * stride, kNan);
    if (below(3) == 0) key.set(below(columns) * stride, -kInfinity);
    const int64_t weightless = below(6) == 0 ? columns : 0;
    for (int64_t c = 0; c < weightless; ++c) key.set(c * stride, -kInfinity);
  }
  [[nodiscard]] std::string name() const {
    return std::to_string(rows) + " x " + std::to_string(columns) + " x " + std::to_string(head_dim);
  }
};

struct Visible {
  std::vector<int32_t> first, last;
  Visible(int64_t rows, int64_t columns) {
    for (int64_t r = 0; r < rows; ++r) {
      first.push_back(static_cast<int32_t>(below(3) == 0 ? below(columns) : 0));
      last.push_back(static_cast<int32_t>(below(3) == 0 ? below(columns + 1) : columns));
    }
  }
};

std::vector<float> some_floats(int64_t count, float scale) {
  std::vector<float> x(count);
  for (float& y : x) y = scale * normal();
  return x;
}

// Of keys and values of a block, or none.
struct Scales {
  std::vector<float> key, value;
  explicit Scales(int64_t columns) {
    if (below(3) > 0) key = some_scales(columns);
    if (!key.empty() && below(4) == 0) key[below(columns)] = kNan;
    if (below(3) > 0) value = some_scales(columns);
  }
  static std::vector<float> some_scales(int64_t count) {
    std::vector<float> x = some_floats(count, 0.3f);  // large logits would lose digits
    for (float& y : x) y = below(16) == 0 ? 0.0f : std::exp(y);
    return x;
  }
  static const float* of(const std::vector<float>& x) { return x.empty() ? nullptr : x.data(); }
};

State run_blocks(const Input& in, const Visible& visible, const Scales& scales, const float* slope, const float* origin,
                 KvFormat format, const Kernels& kernels, void (*kernel)(const AttentionBlock&)) {
  State state(in.rows, in.head_dim);
  std::vector<const void*> queries, keys, values;
  for (int64_t r = 0; r < in.rows; ++r) queries.push_back(in.query.at(r * in.head_dim));
  for (int64_t c = 0; c < in.columns; ++c) {
    keys.push_back(in.key.at(c * in.stride));
    values.push_back(in.value.at(c * in.stride));
  }
  const Floats scratch(block_scratch(in.head_dim)), query(packed_queries(in.rows, in.head_dim));
  kernels.pack_queries(queries.data(), in.rows, in.head_dim, format, query.get());
  kernel({.query = query.get(),
          .key_rows = keys.data(),
          .value_rows = values.data(),
          .key_scale = Scales::of(scales.key),
          .value_scale = Scales::of(scales.value),
          .first = visible.first.data(),
          .last = visible.last.data(),
          .slope = slope,
          .origin = origin,
          .maximum = state.maximum.data(),
          .sum = state.sum.data(),
          .weighted = state.weighted.data(),
          .scratch = scratch.get(),
          .rows = in.rows,
          .columns = in.columns,
          .head_dim = in.head_dim,
          .format = format,
          .scale = 0.3f});
  return state;
}

void compare_blocks(KvFormat format, int64_t head_dim) {
  const Kernels &mine = kernels(), &scalar = kernels_scalar;
  for (int64_t rows : {1, 33, 70}) {
    const Input in(rows, 1 + below(600), head_dim, format);
    const Visible visible(rows, in.columns);
    const Scales scales(in.columns);
    const std::vector<float> origin = some_floats(rows, 100), slopes = some_floats(rows, 0.01f);
    const float* slope = below(2) == 0 ? slopes.data() : nullptr;
    const auto run = [&](const Kernels& k, auto* kernel) {
      return run_blocks(in, visible, scales, slope, origin.data(), format, k, kernel);
    };
    expect_state("attention_block", in.name(), run(mine, mine.attention_block), run(scalar, scalar.attention_block),
                 head_dim);
    expect_state("score_block", in.name(), run(mine, mine.score_block), run(scalar, scalar.score_block),
                 /*head_dim=*/0);
  }
}

// Keys and values of an input as a cache holds them: runs of pages of codes and numbers, in memory of exactly that
// size.
struct CodedRuns {
  std::vector<std::vector<float>> numbers;  // of a run's keys or values; floats for their alignment
  std::vector<std::vector<uint8_t>> codes;

  void add(const Input& in, KvFormat format, KvCodes to, DecodeRun& run) {
    if (to == KvCodes::kNone) return;
    const RowBytes bytes = row_bytes(format, to, in.head_dim);
    for (const Elements* rows : {&in.key, &in.value}) {
      codes.emplace_back(run.count * bytes.codes);
      numbers.emplace_back((run.count * bytes.numbers + 3) / 4);
      kernels_scalar.encode_rows(rows->at(run.begin * in.stride), in.stride, run.count, in.head_dim, format, to,
                                 codes.back().data(), numbers.back().data());
      (rows == &in.key ? run.key : run.value) = codes.back().data();
      (rows == &in.key ? run.key_numbers : run.value_numbers) = numbers.back().data();
    }
  }
};

// Runs of `most` tokens; the last one as it came where codes hold the others.
State run_decode(const Input& in, const Visible& visible, const float* slope, int64_t group, KvFormat format,
                 KvCodes codes, int64_t most, void (*kernel)(const DecodeTask&)) {
  State state(in.rows, in.head_dim);
  CodedRuns coded;
  std::vector<DecodeRun> runs;
  for (int64_t begin = 0; begin < in.columns; begin += most) {
    runs.push_back({.key = in.key.at(begin * in.stride),
                    .value = in.value.at(begin * in.stride),
                    .key_stride = in.stride,
                    .value_stride = in.stride,
                    .count = std::min(most, in.columns - begin),
                    .begin = begin});
    if (begin == 0 || begin + most < in.columns) coded.add(in, format, codes, runs.back());
  }
  const std::vector<int64_t> first(visible.first.begin(), visible.first.end());
  const std::vector<int64_t> last(visible.last.begin(), visible.last.end());
  const Floats scratch(decode_scratch(in.rows, in.head_dim));
  kernel({.query = in.query.at(0),
          .runs = runs.data(),
          .first = first.data(),
          .last = last.data(),
          .slope = slope,
          .maximum = state.maximum.data(),
          .sum = state.sum.data(),
          .weighted = state.weighted.data(),
          .scratch = scratch.get(),
          .query_stride = {group * in.head_dim, in.head_dim},
          .num_runs = static_cast<int64_t>(runs.size()),
          .rows = in.rows,
          .group = group,
          .head_dim = in.head_dim,
          .format = format,
          .codes = codes,
          .scale = 0.3f});
  return state;
}

void compare_decode(KvFormat format, int64_t head_dim) {
  for (int64_t group : {1, 2, 3, 4, 5, 16}) {
    for (KvCodes codes : {KvCodes::kNone, KvCodes::kInt8, KvCodes::kInt4}) {
      const Input in(group * (1 + below(3)), 1 + below(200), head_dim, format);
      const Visible visible(in.rows, in.columns);
      const std::vector<float> slopes = some_floats(in.rows, 0.05f);
      const float* slope = below(2) == 0 ? slopes.data() : nullptr;
      const int64_t most = below(2) == 0 ? kTileColumns : 1 + below(kTileColumns);
      const auto run = [&](auto* kernel) { return run_decode(in, visible, slope, group, format, codes, most, kernel); };

      expect_state("decode_runs", in.name() + " codes " + std::to_string(static_cast<int>(codes)),
                   run(kernels().decode_runs), run(kernels_scalar.decode_runs), head_dim);
    }
  }
}

void compare_rows(KvFormat format, int64_t head_dim) {
  const Kernels &mine = kernels(), &scalar = kernels_scalar;
  const std::string at = std::to_string(head_dim);
  for (int64_t count : {0, 1, 5, 64, 65, 200}) {
    const Elements rows(count * head_dim, format);
    std::vector<float> actual = some_floats(head_dim, 1), expected = actual;
    mine.add_rows(rows.at(0), head_dim, count, head_dim, format, actual.data());
    scalar.add_rows(rows.at(0), head_dim, count, head_dim, format, expected.data());
    for (int64_t d = 0; d < head_dim; ++d) expect("add_rows", at, actual[d], expected[d], 1e-4f);
  }
  // Every exponent of float32, halves between two bf16 or f16 numbers, infinities and NaN.
  std::vector<float> in(head_dim), actual(head_dim), expected(head_dim);
  const float full_nan = bits_to_float(0x7fffffff);  // rounding up would leave its exponent
  for (int exponent = -160; exponent < 130; ++exponent) {
    for (float& x : in) x = std::ldexp(1.0f + static_cast<float>(below(4096)) / 2048, exponent) * (below(2) ? 1 : -1);
    in[below(head_dim)] = exponent % 3 == 0 ? full_nan : exponent % 3 == 1 ? kInfinity : -kInfinity;
    for (float factor : {1.0f, 0.3f}) {
      Elements mine_stored(head_dim, format), stored(head_dim, format);
      mine.store_row(in.data(), head_dim, format, factor, mine_stored.data());
      scalar.store_row(in.data(), head_dim, format, factor, stored.data());
      for (int64_t d = 0; d < head_dim; ++d) expect("store_row", at, mine_stored.get(d), stored.get(d), 0);
      mine.load_row(stored.data(), head_dim, format, factor, actual.data());
      scalar.load_row(stored.data(), head_dim, format, factor, expected.data());
      for (int64_t d = 0; d < head_dim; ++d) expect("load_row", at, actual[d], expected[d], 0);
    }
  }
  Elements key(head_dim, format);
  const std::vector<float> query = some_floats(head_dim, 1);
  for (float x : {1.0f, -kInfinity, kNan}) {
    key.set(head_dim - 1, x);
    expect("dot", at, mine.dot(query.data(), key.data(), head_dim, format),
           scalar.dot(query.data(), key.data(), head_dim, format), 1e-4f);
  }
}

// Bytes and floats of quantised rows, small, large, constant and not finite ones.
void compare_codes(KvFormat format, int64_t head_dim) {
  const Kernels &mine = kernels(), &scalar = kernels_scalar;
  for (KvCodes to : {KvCodes::kInt8, KvCodes::kInt4}) {
    const RowBytes bytes = row_bytes(format, to, head_dim);
    const std::string at = std::to_string(head_dim);
    for (float size : {1.0f, 1e-3f, 1e-8f, 1e-38f, 1e4f, 1e37f, 0.0f, kInfinity, kNan}) {
      constexpr int64_t kCount = 5;
      const float factor = std::isfinite(size) ? size : 1.0f;
      Elements rows(kCount * head_dim, format);
      for (int64_t i = 0; i < kCount * head_dim; ++i) rows.set(i, factor * normal());
      if (!std::isfinite(size)) rows.set(below(kCount * head_dim), size);
      std::vector<uint8_t> actual(kCount * bytes.all()), expected(actual);
      uint8_t *numbers = actual.data() + kCount * bytes.codes, *right = expected.data() + kCount * bytes.codes;
      mine.encode_rows(rows.at(0), head_dim, kCount, head_dim, format, to, actual.data(), numbers);
      scalar.encode_rows(rows.at(0), head_dim, kCount, head_dim, format, to, expected.data(), right);
      for (size_t i = 0; i < actual.size(); ++i) expect("encode_rows", at, actual[i], expected[i], 0);
      for (KvFormat rows_of : {KvFormat::kF32, KvFormat::kBF16}) {
        for (bool with_scales : {false, true}) {
          if (rows_of == KvFormat::kBF16 && !with_scales) continue;
          Elements decoded(kCount * head_dim, rows_of), wanted(kCount * head_dim, rows_of);
          std::vector<float> scales(kCount), right_scales(kCount);
          mine.decode_rows(actual.data(), numbers, kCount, head_dim, to, rows_of, decoded.data(),
                           with_scales ? scales.data() : nullptr);
          scalar.decode_rows(actual.data(), numbers, kCount, head_dim, to, rows_of, wanted.data(),
                             with_scales ? right_scales.data() : nullptr);
          for (int64_t i = 0; i < kCount * head_dim; ++i) expect("decode_rows", at, decoded.get(i), wanted.get(i), 0);
          for (int64_t i = 0; i < kCount; ++i) expect("decode_rows", at + " scale", scales[i], right_scales[i], 0);
        }
      }
    }
  }
}

void compare_products(KvFormat format, int64_t cols) {
  for (int64_t left_rows : {1, 33, 70}) {
    const int64_t right_rows = 1 + below(100);
    Elements left(left_rows * cols, format), right(right_rows * cols, format);
    const auto run = [&](const Kernels& table) {
      const Floats scratch(product_scratch(left_rows, right_rows, cols));
      return table.largest_product({.left = left.data(),
                                    .right = right.data(),
                                    .scratch = scratch.get(),
                                    .left_stride = {1, left_rows},  // transposed
                                    .right_stride = {cols, 1},
                                    .left_rows = left_rows,
                                    .right_rows = right_rows,
                                    .cols = cols,
                                    .format = format});
    };
    const std::string at = std::to_string(left_rows) + " x " + std::to_string(right_rows);
    expect("largest_product", at, run(kernels()), run(kernels_scalar), 1e-4f);
    left.set(below(left_rows * cols), kNan);
    expect("largest_product", at + " with NaN", run(kernels()), kNan, 0);
  }
}

void compare_all() {
  for (int64_t head_dim : kHeadDims) {
    for (KvFormat format : kFormats) {
      compare_blocks(format, head_dim);
      compare_decode(format, head_dim);
      compare_rows(format, head_dim);
      compare_codes(format, head_dim);
      compare_products(format, head_dim);
    }
  }
}

}  // namespace
}  // namespace razor::cpu

int main() {
  for (int round = 0; round < 3; ++round) razor::cpu::compare_all();
  for (const auto& [kernel, count] : razor::cpu::compared) {
    std::printf("%s %s %lld\n", razor::isa(), kernel.c_str(), static_cast<long long>(count));
  }
}
