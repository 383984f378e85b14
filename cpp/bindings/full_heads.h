// SPDX-License-Identifier: Apache-2.0
// Attention of a prompt on heads that keep every token, by the framework's fused attention: with nothing dropped the
// definition is causal attention over all tokens so far. For devices whose own kernels would be slow at it.
#pragma once

#include <ATen/ATen.h>

#include <vector>

namespace razor::bindings {

struct FullHeads {
  at::Tensor query, key, value;       // [batch, num_heads | num_kv_heads, q_len, head_dim]
  at::Tensor key_pages, value_pages;  // [num_pages, page_size, head_dim]
  at::Tensor page_table;              // [batch * num_kv_heads, max_pages]
  std::optional<at::Tensor> slopes;   // [num_heads] float32
  std::vector<int64_t> seen, pad;     // [batch]
  std::vector<int64_t> heads;         // kv heads that keep every token
  double scale;
};

// Stored tokens of a page-table row, then this call's: [tokens, head_dim].
inline at::Tensor all_tokens(const at::Tensor& pages, const at::Tensor& table_row, int64_t seen,
                             const at::Tensor& rows) {
  const int64_t used = (seen + pages.size(1) - 1) / pages.size(1);
  const at::Tensor stored = pages.index_select(0, table_row.slice(0, 0, used)).flatten(0, 1).slice(0, 0, seen);
  return at::cat({stored, rows});
}

// Writes the rows of these heads in out [batch, num_heads, q_len, head_dim], but padding.
inline void attend_full_heads(const FullHeads& call, const at::Tensor& out) {
  const int64_t num_kv_heads = call.key.size(1), q_len = call.query.size(2), group = call.query.size(1) / num_kv_heads;
  for (int64_t b = 0; b < call.query.size(0); ++b) {
    const int64_t past = call.seen[b], pad = call.pad[b], tokens = q_len - pad;
    if (tokens == 0) continue;
    for (const int64_t h : call.heads) {
      const auto group_of = [&](const at::Tensor& t) { return t[b].slice(0, h * group, (h + 1) * group); };
      const at::Tensor table_row = call.page_table[b * num_kv_heads + h];
      at::Tensor query = group_of(call.query).slice(1, pad).unsqueeze(0);
      at::Tensor key = all_tokens(call.key_pages, table_row, past, call.key[b][h].slice(0, pad));
      at::Tensor value = all_tokens(call.value_pages, table_row, past, call.value[b][h].slice(0, pad));
      std::optional<at::Tensor> mask;
      if (call.slopes || past > 0) {
        const auto whole = call.slopes ? call.slopes->options() : query.options().dtype(at::kFloat);
        const at::Tensor distance = (at::arange(tokens, whole) + past).unsqueeze(1) - at::arange(past + tokens, whole);
        mask = distance >= 0;
        if (call.slopes) {  // in float32: 16 bits would round long distances
          const at::Tensor slope = call.slopes->slice(0, h * group, (h + 1) * group).view({1, group, 1, 1});
          mask = (-slope * distance).masked_fill(mask->logical_not(), -INFINITY);
          query = query.to(at::kFloat), key = key.to(at::kFloat), value = value.to(at::kFloat);
        }
      }
      const std::vector<int64_t> shared = {1, group, past + tokens, key.size(1)};
      const at::Tensor result =
          at::scaled_dot_product_attention(query, key.expand(shared), value.expand(shared), mask, /*dropout_p=*/0.0,
                                           /*is_causal=*/!mask.has_value(), call.scale);
      group_of(out).slice(1, pad).copy_(result[0]);
    }
  }
}

}  // namespace razor::bindings
