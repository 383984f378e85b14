// SPDX-License-Identifier: Apache-2.0
#define RAZOR_ISA_NAMESPACE avx512
#include "razor/cpu/vec_avx512.h"
// After Vec, which they are written against.
#include "razor/cpu/attention_tile-inl.h"
#include "razor/cpu/kv_codes-inl.h"
#include "razor/cpu/kv_rows-inl.h"
#include "razor/cpu/products-inl.h"
// After the panels of products, and codes.
#include "razor/cpu/attention-inl.h"
#include "razor/cpu/decode-inl.h"

namespace razor::cpu {
const Kernels kernels_avx512 = {.attention_block = avx512::attention_block,
                                .score_block = avx512::score_block,
                                .pack_queries = avx512::pack_queries,
                                .decode_runs = avx512::decode_runs,
                                .add_rows = avx512::add_rows,
                                .load_row = avx512::load_row,
                                .store_row = avx512::store_row,
                                .dot = avx512::dot,
                                .largest_product = avx512::largest_product,
                                .encode_rows = avx512::encode_rows,
                                .decode_rows = avx512::decode_rows};
}  // namespace razor::cpu
