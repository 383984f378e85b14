// SPDX-License-Identifier: Apache-2.0
// The core starts no threads: callers pass a ParallelFor (torch's own from the torch ops, serial_for from numpy).
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace razor {

using RangeFn = void (*)(int64_t begin, int64_t end, void* context);
// Runs body on disjoint ranges that cover [begin, end), each of at least `grain` indices, in any order.
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, RangeFn body, void* context);

inline void serial_for(int64_t begin, int64_t end, int64_t /*grain*/, RangeFn body, void* context) {
  if (begin < end) body(begin, end, context);
}

// Calls body(i) once for each i in [0, count). Threads take the next index when they are free, so that items of very
// different cost (a full head beside a window) still finish together; put the dear ones first.
template <class Body>
void for_each_item(ParallelFor parallel_for, int64_t count, const Body& body) {
  struct Context {
    const Body* body;
    std::atomic<int64_t> next;
    int64_t count;
  } context{&body, 0, count};
  constexpr int64_t kMaxThreads = 256;
  const RangeFn drain = [](int64_t, int64_t, void* opaque) {
    auto& shared = *static_cast<Context*>(opaque);
    for (int64_t i; (i = shared.next.fetch_add(1, std::memory_order_relaxed)) < shared.count;) (*shared.body)(i);
  };
  parallel_for(0, std::min(count, kMaxThreads), /*grain=*/1, drain, &context);
}

}  // namespace razor
