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

// Calls body(worker, i) once for each i in [0, count), every thread with a worker of its own from make_worker().
// Threads take the next index when they are free, so that items of very different cost (a full head beside a window)
// still finish together; put the dear ones first.
template <class MakeWorker, class Body>
void for_each_item_with(ParallelFor parallel_for, int64_t count, const MakeWorker& make_worker, const Body& body) {
  struct Context {
    const MakeWorker* make_worker;
    const Body* body;
    std::atomic<int64_t> next;
    int64_t count;
  } context{&make_worker, &body, 0, count};
  constexpr int64_t kMaxThreads = 256;
  const RangeFn drain = [](int64_t, int64_t, void* opaque) {
    auto& shared = *static_cast<Context*>(opaque);
    auto worker = (*shared.make_worker)();
    for (int64_t i; (i = shared.next.fetch_add(1, std::memory_order_relaxed)) < shared.count;) {
      (*shared.body)(worker, i);
    }
  };
  parallel_for(0, std::min(count, kMaxThreads), /*grain=*/1, drain, &context);
}

// The same where body(i) needs no worker.
template <class Body>
void for_each_item(ParallelFor parallel_for, int64_t count, const Body& body) {
  for_each_item_with(parallel_for, count, [] { return 0; }, [&](int, int64_t i) { body(i); });
}

}  // namespace razor
