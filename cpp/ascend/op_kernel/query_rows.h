// SPDX-License-Identifier: Apache-2.0
// Query rows of one (sequence, kv head) in global memory: row r is token first_token + r / group on head r % group of
// the group, so that the rows of one token are evenly spaced.
#pragma once

#include "ascend/op_kernel/device.h"

namespace razor::ascend {

struct QueryRows {
  int64_t batch_index, kv_head, group;
  int64_t first_token;  // of row 0
  int64_t first_row, end_row;
  int64_t head_dim;

  __aicore__ inline int64_t head(int64_t r) const { return kv_head * group + r % group; }
  __aicore__ inline int64_t token(int64_t r) const { return first_token + r / group; }
};

// The longest run of rows from r on, up to `end`, that belong to one token.
__aicore__ inline int64_t rows_of_token(int64_t r, int64_t end, int64_t group) {
  return smaller(group - r % group, end - r);
}

// to [rows, head_dim] receives rows of `from` [batch, num_heads, tokens, head_dim], strided.
template <class T>
__aicore__ inline void load_rows(const LocalTensor<T>& to, const GlobalTensor<T>& from, const int64_t (&stride)[3],
                                 const QueryRows& rows) {
  const int64_t bytes = rows.head_dim * static_cast<int64_t>(sizeof(T));
  const int64_t skipped = stride[1] * static_cast<int64_t>(sizeof(T)) - bytes;
  for (int64_t r = rows.first_row; r < rows.end_row;) {
    const int64_t count = rows_of_token(r, rows.end_row, rows.group);
    const int64_t at = rows.batch_index * stride[0] + rows.head(r) * stride[1] + rows.token(r) * stride[2];
    AscendC::DataCopyPad(to[(r - rows.first_row) * rows.head_dim], from[at],
                         AscendC::DataCopyExtParams(count, bytes, count > 1 ? skipped : 0, 0, 0),
                         AscendC::DataCopyPadExtParams<T>(false, 0, 0, T{}));
    r += count;
  }
}

// `to` [batch, num_heads, tokens, head_dim], contiguous, receives the rows of `from` [rows, head_dim].
template <class T>
__aicore__ inline void store_rows(const GlobalTensor<T>& to, int64_t num_heads, int64_t tokens,
                                  const LocalTensor<T>& from, const QueryRows& rows) {
  const int64_t bytes = rows.head_dim * static_cast<int64_t>(sizeof(T)), skipped = (tokens - 1) * bytes;
  for (int64_t r = rows.first_row; r < rows.end_row;) {
    const int64_t count = rows_of_token(r, rows.end_row, rows.group);
    const int64_t at = ((rows.batch_index * num_heads + rows.head(r)) * tokens + rows.token(r)) * rows.head_dim;
    AscendC::DataCopyPad(to[at], from[(r - rows.first_row) * rows.head_dim],
                         AscendC::DataCopyExtParams(count, bytes, 0, count > 1 ? skipped : 0, 0));
    r += count;
  }
}

__aicore__ inline QueryRows rows_of_part(const AttentionTiling& tiling, const Part& part) {
  return {part.row.batch_index, part.row.head, tiling.group,         part.row.pad,
          part.first_row,       part.end_row,  tiling.cache.head_dim};
}

}  // namespace razor::ascend
