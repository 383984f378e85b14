// SPDX-License-Identifier: Apache-2.0
// The kernels of AVX-512 once more, with products of bf16 in decode. Prefill keeps the tiles of float32: on the
// processor at hand one vdpbf16ps takes 2.1 cycles, the two fma that it stands for 1.1 (bench/LOG.md).
#define RAZOR_ISA_NAMESPACE avx512
#include "razor/cpu/vec_avx512.h"
// After Vec, which they are written against.
#include "razor/cpu/attention_tile-inl.h"
#include "razor/cpu/kv_codes-inl.h"
#include "razor/cpu/kv_codes_bf16-inl.h"
#include "razor/cpu/kv_rows-inl.h"
#include "razor/cpu/products-inl.h"
// After tiles and codes.
#include "razor/cpu/decode-inl.h"
#include "razor/cpu/decode_softmax-inl.h"
// After the panels of products, and the softmax.
#include "razor/cpu/attention-inl.h"
#include "razor/cpu/decode_bf16-inl.h"

namespace razor::cpu {
const Kernels kernels_avx512_bf16 = {.attention_block = avx512::attention_block,
                                     .score_block = avx512::score_block,
                                     .pack_queries = avx512::pack_queries,
                                     .decode_runs = avx512::decode_runs_bf16,
                                     .add_rows = avx512::add_rows,
                                     .load_row = avx512::load_row,
                                     .store_row = avx512::store_row,
                                     .dot = avx512::dot,
                                     .largest_product = avx512::largest_product,
                                     .encode_rows = avx512::encode_rows,
                                     .decode_rows = avx512::decode_rows_bf16};
}  // namespace razor::cpu
