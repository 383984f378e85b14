// SPDX-License-Identifier: Apache-2.0
// The one file that talks ACL. The toolkit generates a launch function for each kernel: blocks, stream, the kernel's
// arguments; it returns a status.
#include "ascend/op_host/launch.h"

#include "acl/acl.h"
#include "aclrtlaunch_razor_append_bf16.h"
#include "aclrtlaunch_razor_append_f16.h"
#include "aclrtlaunch_razor_attention_bf16.h"
#include "aclrtlaunch_razor_attention_f16.h"
#include "aclrtlaunch_razor_combine_bf16.h"
#include "aclrtlaunch_razor_combine_f16.h"
#include "aclrtlaunch_razor_head_scores_bf16.h"
#include "aclrtlaunch_razor_head_scores_f16.h"
#include "razor/check.h"
#include "tiling/platform/platform_ascendc.h"

// The status of the launch of this format's kernel: bf16 or f16, nothing else reaches a launch.
#define RAZOR_LAUNCH(format, name, blocks, stream, ...)                                        \
  ((format) == KvFormat::kBF16 ? ACLRT_LAUNCH_KERNEL(name##_bf16)(blocks, stream, __VA_ARGS__) \
                               : ACLRT_LAUNCH_KERNEL(name##_f16)(blocks, stream, __VA_ARGS__))

namespace razor::ascend {
namespace {

constexpr int64_t kReservedUbBytes = 192 * 1024 - kUbBudget;

// Kernels take addresses of bytes, and write where their own headers say.
uint8_t* bytes(const void* address) { return static_cast<uint8_t*>(const_cast<void*>(address)); }

}  // namespace

Device current_device() {
  auto* platform = platform_ascendc::PlatformAscendCManager::GetInstance();
  RAZOR_CHECK(platform != nullptr, "device: expected an NPU that CANN knows, got none");
  uint64_t ub_bytes = 0;
  platform->GetCoreMemSize(platform_ascendc::CoreMemType::UB, ub_bytes);
  return {.vector_cores = static_cast<int64_t>(platform->GetCoreNumAiv()),
          .ub_bytes = smaller(kUbBudget, static_cast<int64_t>(ub_bytes) - kReservedUbBytes)};
}

uint32_t launch_attention(const AttentionParams& params, int64_t workers, float* states, const void* tiling,
                          void* stream) {
  const KvCacheView& cache = params.cache;
  const auto blocks = static_cast<uint32_t>(workers);
  auto* on = static_cast<aclrtStream>(stream);
  const uint32_t status =
      RAZOR_LAUNCH(cache.format, razor_attention, blocks, on, bytes(params.query), bytes(params.tokens.key),
                   bytes(params.tokens.value), bytes(cache.key_pages), bytes(cache.value_pages),
                   bytes(cache.page_table), bytes(cache.seen), bytes(cache.sink_size), bytes(cache.window_size),
                   bytes(cache.compensate), bytes(cache.key_sum), bytes(cache.value_sum), bytes(params.alibi_slopes),
                   bytes(params.tokens.pad), bytes(params.out), bytes(states), bytes(tiling));
  if (status != 0 || params.tokens.q_len > kMostDecodeTokens) return status;  // of a prompt nothing was cut
  return RAZOR_LAUNCH(cache.format, razor_combine, blocks, on, bytes(cache.seen), bytes(cache.sink_size),
                      bytes(cache.window_size), bytes(cache.compensate), bytes(params.tokens.pad), bytes(states),
                      bytes(params.out), bytes(tiling));
}

uint32_t launch_append(const KvCacheView& cache, const NewTokens& tokens, int64_t workers, const void* tiling,
                       void* stream) {
  return RAZOR_LAUNCH(cache.format, razor_append, static_cast<uint32_t>(workers), static_cast<aclrtStream>(stream),
                      bytes(tokens.key), bytes(tokens.value), bytes(cache.key_pages), bytes(cache.value_pages),
                      bytes(cache.page_table), bytes(cache.seen), bytes(cache.sink_size), bytes(cache.window_size),
                      bytes(cache.compensate), bytes(cache.key_sum), bytes(cache.value_sum), bytes(tokens.pad),
                      bytes(tiling));
}

uint32_t launch_head_scores(const HeadScoresParams& params, int64_t workers, float* scores, const void* tiling,
                            void* stream) {
  return RAZOR_LAUNCH(params.format, razor_head_scores, static_cast<uint32_t>(workers),
                      static_cast<aclrtStream>(stream), bytes(params.query), bytes(params.key), bytes(scores),
                      bytes(tiling));
}

}  // namespace razor::ascend
