// SPDX-License-Identifier: Apache-2.0
// What attention_block and score_block need besides softmax states: one thread's memory while it works on one block.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "razor/cpu/kernels.h"
#include "razor/floats.h"

namespace razor {

struct TiledScratch {
  std::vector<const void*> keys, values;  // [columns] addresses of rows
  Floats memory;
  float* packed;  // [block_scratch(head_dim)] at a multiple of 64 bytes
  float* query;   // bf16 [rows, head_dim], both rounded up to block_multiple, columns by zeros
  int64_t head_dim;

  TiledScratch(int64_t rows, int64_t head_dim, int64_t columns)
      : keys(columns),
        values(columns),
        memory(cpu::block_scratch(head_dim) + query_floats(rows, head_dim)),
        packed(memory.get()),
        query(packed + cpu::block_scratch(head_dim)),
        head_dim(head_dim) {
    std::fill_n(query, query_floats(rows, head_dim), 0.0f);
  }

  static int64_t query_floats(int64_t rows, int64_t head_dim) {
    return cpu::block_multiple(rows) * cpu::block_multiple(head_dim) / 2;
  }

  void load_query(int64_t row, const void* source) {
    constexpr int64_t kBytes = 2;
    std::memcpy(reinterpret_cast<char*>(query) + row * cpu::block_multiple(head_dim) * kBytes, source,
                head_dim * kBytes);
  }
};

}  // namespace razor
