// SPDX-License-Identifier: Apache-2.0
#define RAZOR_ISA_NAMESPACE avx2
#include "razor/cpu/vec_avx2.h"
// After Vec, which they are written against.
#include "razor/cpu/attention_tile-inl.h"
#include "razor/cpu/kv_codes-inl.h"
#include "razor/cpu/kv_rows-inl.h"
#include "razor/cpu/products-inl.h"
// After the panels of products, and codes.
#include "razor/cpu/attention-inl.h"
#include "razor/cpu/decode-inl.h"

namespace razor::cpu {
const Kernels kernels_avx2 = {.attention_block = avx2::attention_block,
                              .score_block = avx2::score_block,
                              .pack_queries = avx2::pack_queries,
                              .decode_runs = avx2::decode_runs,
                              .add_rows = avx2::add_rows,
                              .load_row = avx2::load_row,
                              .store_row = avx2::store_row,
                              .dot = avx2::dot,
                              .largest_product = avx2::largest_product,
                              .encode_rows = avx2::encode_rows,
                              .decode_rows = avx2::decode_rows};
}  // namespace razor::cpu
