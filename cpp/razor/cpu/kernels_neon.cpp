// SPDX-License-Identifier: Apache-2.0
#define RAZOR_ISA_NAMESPACE neon
#include "razor/cpu/vec_neon.h"
// After Vec, which they are written against.
#include "razor/cpu/attention_tile-inl.h"
#include "razor/cpu/kv_codes-inl.h"
#include "razor/cpu/kv_rows-inl.h"
#include "razor/cpu/products-inl.h"
// After the panels of products, and codes.
#include "razor/cpu/attention-inl.h"
#include "razor/cpu/decode-inl.h"

namespace razor::cpu {
const Kernels kernels_neon = {.attention_block = neon::attention_block,
                              .score_block = neon::score_block,
                              .pack_queries = neon::pack_queries,
                              .decode_runs = neon::decode_runs,
                              .add_rows = neon::add_rows,
                              .load_row = neon::load_row,
                              .store_row = neon::store_row,
                              .dot = neon::dot,
                              .largest_product = neon::largest_product,
                              .encode_rows = neon::encode_rows,
                              .decode_rows = neon::decode_rows};
}  // namespace razor::cpu
