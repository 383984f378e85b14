// SPDX-License-Identifier: Apache-2.0
// The core starts no threads: callers pass a ParallelFor (torch's own from the torch ops, serial_for from numpy).
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace razor {

// A call that reads less than this gains nothing from other threads: waking them takes as long.
inline constexpr int64_t kSerialBytes = 192 << 10;

using RangeFn = void (*)(int64_t begin, int64_t end, void* context);
// Runs body on disjoint ranges that cover [begin, end), each of at least `grain` indices, in any order.
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, RangeFn body, void* context);

inline void serial_for(int64_t begin, int64_t end, int64_t /*grain*/, RangeFn body, void* context) {
  if (begin < end) body(begin, end, context);
}

// Calls body(i, scratch) once for each i in [0, count). Threads take the next index when they are free, so that items
// of very different cost (a full head beside a window) still finish together; put the dear ones first. A thread calls
// make_scratch() before its first item and keeps what it returns for all of its items.
template <class MakeScratch, class Body>
void for_each_item(ParallelFor parallel_for, int64_t count, const MakeScratch& make_scratch, const Body& body) {
  struct Context {
    const MakeScratch* make_scratch;
    const Body* body;
    std::atomic<int64_t> next;
    int64_t count;
  } context{&make_scratch, &body, 0, count};
  constexpr int64_t kMaxThreads = 256;
  const RangeFn drain = [](int64_t, int64_t, void* opaque) {
    auto& shared = *static_cast<Context*>(opaque);
    int64_t i = shared.next.fetch_add(1, std::memory_order_relaxed);
    if (i >= shared.count) return;
    auto scratch = (*shared.make_scratch)();
    for (; i < shared.count; i = shared.next.fetch_add(1, std::memory_order_relaxed)) (*shared.body)(i, scratch);
  };
  parallel_for(0, std::min(count, kMaxThreads), /*grain=*/1, drain, &context);
}

// Calls body(i) once for each i in [0, count), in the same way.
template <class Body>
void for_each_item(ParallelFor parallel_for, int64_t count, const Body& body) {
  for_each_item(parallel_for, count, [] { return 0; }, [&body](int64_t i, int) { body(i); });
}

}  // namespace razor
