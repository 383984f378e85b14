// SPDX-License-Identifier: Apache-2.0
// Single cache rows, written once against Vec: decode, encode, dot product, sum of consecutive rows.
// Uses load_upto and store_upto of attention_tile-inl.h.

namespace razor::cpu::RAZOR_ISA_NAMESPACE {
namespace {

constexpr int64_t kSummedRows = 64;  // added up before they join the sum; they fit the L1 cache

template <int kVecs, class T>
inline void add_block(const T* rows, int64_t stride, int64_t count, int64_t width, float* sum) {
  Vec total[kVecs];
  for (Vec& x : total) x = Vec::zero();
  for (int64_t i = 0; i < count; ++i) {
    for (int v = 0; v < kVecs; ++v) {
      total[v] = add(total[v], load_upto(rows + i * stride + v * Vec::kLanes, width - v * Vec::kLanes));
    }
  }
  for (int v = 0; v < kVecs; ++v) {
    float* out = sum + v * Vec::kLanes;
    store_upto(add(load_upto(out, width - v * Vec::kLanes), total[v]), out, width - v * Vec::kLanes);
  }
}

// Tried: all rows for one vector after the other. Every cache line of a long prompt then came from memory several
// times: a 32K prompt with 4000-token windows took three times as long (bench/LOG.md).
template <class T>
inline void add_typed_rows(const T* rows, int64_t stride, int64_t count, int64_t head_dim, float* sum) {
  constexpr int kVecs = 8;
  for (; count > 0; count -= kSummedRows, rows += kSummedRows * stride) {
    const int64_t held = count < kSummedRows ? count : kSummedRows;
    int64_t d = 0;
    for (; d + kVecs * Vec::kLanes <= head_dim; d += kVecs * Vec::kLanes) {
      add_block<kVecs>(rows + d, stride, held, kVecs * Vec::kLanes, sum + d);
    }
    for (; d < head_dim; d += Vec::kLanes) add_block<1>(rows + d, stride, held, head_dim - d, sum + d);
  }
}

template <class From, class To>
inline void scale_row(const From* in, int64_t head_dim, float factor, To* out) {
  const Vec f = Vec::fill(factor);
  for (int64_t d = 0; d < head_dim; d += Vec::kLanes) {
    store_upto(mul(load_upto(in + d, head_dim - d), f), out + d, head_dim - d);
  }
}

template <class T>
inline float typed_dot(const float* query, const T* key, int64_t head_dim) {
  float logits[kTileColumns];
  block_logits<1, 1>(query, key, /*key_stride=*/0, head_dim, logits);
  return logits[0];
}

void add_rows(const void* rows, int64_t stride, int64_t count, int64_t head_dim, KvFormat format, float* sum) {
  switch (format) {
    case KvFormat::kF32:
      return add_typed_rows(static_cast<const float*>(rows), stride, count, head_dim, sum);
    case KvFormat::kBF16:
      return add_typed_rows(static_cast<const BFloat16*>(rows), stride, count, head_dim, sum);
    case KvFormat::kF16:
      return add_typed_rows(static_cast<const Float16*>(rows), stride, count, head_dim, sum);
  }
}

void load_row(const void* row, int64_t head_dim, KvFormat format, float factor, float* out) {
  switch (format) {
    case KvFormat::kF32:
      return scale_row(static_cast<const float*>(row), head_dim, factor, out);
    case KvFormat::kBF16:
      return scale_row(static_cast<const BFloat16*>(row), head_dim, factor, out);
    case KvFormat::kF16:
      return scale_row(static_cast<const Float16*>(row), head_dim, factor, out);
  }
}

void store_row(const float* in, int64_t head_dim, KvFormat format, float factor, void* row) {
  switch (format) {
    case KvFormat::kF32:
      return scale_row(in, head_dim, factor, static_cast<float*>(row));
    case KvFormat::kBF16:
      return scale_row(in, head_dim, factor, static_cast<BFloat16*>(row));
    case KvFormat::kF16:
      return scale_row(in, head_dim, factor, static_cast<Float16*>(row));
  }
}

float dot(const float* query, const void* key, int64_t head_dim, KvFormat format) {
  switch (format) {
    case KvFormat::kF32:
      return typed_dot(query, static_cast<const float*>(key), head_dim);
    case KvFormat::kBF16:
      return typed_dot(query, static_cast<const BFloat16*>(key), head_dim);
    case KvFormat::kF16:
      return typed_dot(query, static_cast<const Float16*>(key), head_dim);
  }
  return 0.0f;
}

}  // namespace
}  // namespace razor::cpu::RAZOR_ISA_NAMESPACE
