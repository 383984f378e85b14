// SPDX-License-Identifier: Apache-2.0
#define RAZOR_ISA_NAMESPACE scalar
#include "razor/cpu/vec_scalar.h"
// After Vec, which they are written against.
#include "razor/cpu/attention_tile-inl.h"
#include "razor/cpu/kv_codes-inl.h"
#include "razor/cpu/kv_rows-inl.h"
#include "razor/cpu/products-inl.h"
// After the panels of products, and codes.
#include "razor/cpu/attention-inl.h"
#include "razor/cpu/decode-inl.h"

namespace razor::cpu {
const Kernels kernels_scalar = {.attention_block = scalar::attention_block,
                                .score_block = scalar::score_block,
                                .pack_queries = scalar::pack_queries,
                                .decode_runs = scalar::decode_runs,
                                .add_rows = scalar::add_rows,
                                .load_row = scalar::load_row,
                                .store_row = scalar::store_row,
                                .dot = scalar::dot,
                                .largest_product = scalar::largest_product,
                                .encode_rows = scalar::encode_rows,
                                .decode_rows = scalar::decode_rows};
}  // namespace razor::cpu
