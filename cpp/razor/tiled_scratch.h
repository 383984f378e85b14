// SPDX-License-Identifier: Apache-2.0
// What attention_block and score_block need besides softmax states: one thread's memory while it works on one block.
#pragma once

#include <cstdint>
#include <vector>

#include "razor/cpu/kernels.h"
#include "razor/floats.h"

namespace razor {

inline constexpr int64_t kTiledColumns = 4096;  // tokens per call of attention_block and score_block

struct TiledScratch {
  std::vector<const void*> queries;       // [rows] addresses of rows
  std::vector<const void*> keys, values;  // [kTiledColumns]
  std::vector<int32_t> first, last;       // [rows] visible columns of a call
  Floats memory;
  float* packed;  // [block_scratch(head_dim)] at a multiple of 64 bytes
  float* query;   // [packed_queries(rows, head_dim)] likewise

  TiledScratch(int64_t rows, int64_t head_dim)
      : queries(rows),
        keys(kTiledColumns),
        values(kTiledColumns),
        first(rows),
        last(rows),
        memory(rounded(cpu::block_scratch(head_dim)) + cpu::packed_queries(rows, head_dim)),
        packed(memory.get()),
        query(packed + rounded(cpu::block_scratch(head_dim))) {}

  static int64_t rounded(int64_t floats) { return (floats + 15) / 16 * 16; }
};

}  // namespace razor
