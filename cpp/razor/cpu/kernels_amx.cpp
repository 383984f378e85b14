// SPDX-License-Identifier: Apache-2.0
// The kernels of AVX-512 once more, with tiles of bf16 where they help.
#define RAZOR_ISA_NAMESPACE avx512
#include "razor/cpu/vec_avx512.h"
// After Vec, which they are written against.
#include "razor/cpu/attention_tile-inl.h"
#include "razor/cpu/kv_codes-inl.h"
#include "razor/cpu/kv_codes_bf16-inl.h"
#include "razor/cpu/kv_rows-inl.h"
#include "razor/cpu/products-inl.h"
#include "razor/cpu/products_amx-inl.h"
// After tiles and codes.
#include "razor/cpu/decode-inl.h"
#include "razor/cpu/decode_softmax-inl.h"
// After the panels and tiles of products, and the softmax.
#include "razor/cpu/attention-inl.h"
#include "razor/cpu/attention_amx-inl.h"
#include "razor/cpu/decode_amx-inl.h"

namespace razor::cpu {
const Kernels kernels_amx = {.attention_block = avx512::attention_block_amx,
                             .score_block = avx512::score_block_amx,
                             .pack_queries = avx512::pack_queries_amx,
                             .decode_runs = avx512::decode_runs_amx,
                             .add_rows = avx512::add_rows,
                             .load_row = avx512::load_row,
                             .store_row = avx512::store_row,
                             .dot = avx512::dot,
                             .largest_product = avx512::largest_product_amx,
                             .encode_rows = avx512::encode_rows,
                             .decode_rows = avx512::decode_rows_bf16};
}  // namespace razor::cpu
