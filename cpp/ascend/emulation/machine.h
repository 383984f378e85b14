// SPDX-License-Identifier: Apache-2.0
// Emulation of a subset of Ascend C for tests; not CANN. One vector core: its on-chip memory, four pipes, and global
// memory shared with the other blocks. Everything that the hardware leaves undefined is an error here.
//
// Order is tracked with one vector clock per pipe: knows[p][q] is the last event of pipe q that is complete for
// whatever p starts next. An access that touches what another event wrote, or writes what it read, must know it.
// Events of one pipe do not know each other either (PipeBarrier), except on the scalar pipe S, which issues all others.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace razor::emulation {

enum Pipe { kS, kV, kMTE2, kMTE3, kPipes };
inline constexpr const char* kPipeNames[] = {"S", "V", "MTE2", "MTE3"};

using Clock = std::array<int64_t, kPipes>;

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(message.str());
}

inline constexpr int64_t kGranule = 32;          // bytes: a block of the vector unit
inline constexpr int64_t kUbBytes = 192 * 1024;  // of one vector core
inline constexpr int64_t kUbBudget = 188160;     // what a kernel may count on
inline constexpr int kEventIds = 8;

// Who last touched 32 bytes.
struct Touched {
  int64_t epoch = 0;  // of the block (of the grid) that did; older records do not count
  int64_t written = 0;
  int64_t read[kPipes] = {};
  int64_t instruction = 0;  // the one that wrote, and which of its repeats
  int32_t repeat = 0;
  int8_t writer = 0;
};

// A tensor in global memory. Blocks of the grid run one after the other, as if at the same time: `owner` and `reader`
// tell for each byte which block wrote and which read it.
struct GlobalBuffer {
  std::string name;
  uint8_t* data;
  int64_t bytes;
  bool writable;
  std::vector<Touched> touched;        // [bytes / kGranule + 1]
  std::vector<int32_t> owner, reader;  // [bytes] block + 1, 0: nobody; reader -1: several
};

enum class Use { kFree, kAllocated, kQueued, kDequeued };
inline constexpr const char* kUseNames[] = {"free", "allocated", "queued", "dequeued"};

// One buffer of a queue, or a whole TBuf (always usable).
struct Buffer {
  int64_t offset, bytes;
  Use use = Use::kFree;
  int64_t generation = 0;
  bool queue = false, used = false;
  Clock released{}, filled{};  // what waits for the consumer, and what the consumer waits for
};

struct Counters {
  std::map<std::string_view, int64_t> calls;  // of each instruction
  int64_t repeats = 0;                        // of all vector instructions
  int64_t bytes_in = 0, bytes_out = 0;        // between global memory and the core
};

class Machine {
 public:
  explicit Machine(int64_t ub_bytes) : ub(ub_bytes, 0xff), ub_touched(ub_bytes / kGranule) {}

  void start_block(int64_t index, int64_t count);
  void end_block();  // checks what must be balanced

  // Issue of an instruction on a pipe; its accesses follow.
  void issue(Pipe pipe, const char* call);
  void read_ub(int64_t offset, int64_t bytes, int32_t repeat = 0, bool accumulates = false);
  void write_ub(int64_t offset, int64_t bytes, int32_t repeat = 0, bool accumulates = false);
  uint8_t* read_global(const void* data, int64_t bytes);
  uint8_t* read_global_scalar(const void* data, int64_t bytes);  // through the data cache
  uint8_t* write_global(void* data, int64_t bytes);

  void barrier(Pipe pipe);
  void barrier_all();
  void set_flag(Pipe from, Pipe to, int id);
  void wait_flag(Pipe from, Pipe to, int id);
  [[nodiscard]] Clock snapshot(Pipe pipe) const;
  void join(Pipe pipe, const Clock& clock);

  int64_t allocate(int64_t bytes, int64_t count);
  int64_t register_buffer(Buffer buffer);
  void poison(const Buffer& buffer) { std::memset(ub.data() + buffer.offset, 0xff, buffer.bytes); }
  void check_usable(int64_t buffer, int64_t generation) const;
  GlobalBuffer& global_of(const void* data, int64_t bytes);

  [[nodiscard]] std::string where() const;

  std::vector<uint8_t> ub;
  std::vector<Touched> ub_touched;
  std::vector<GlobalBuffer> globals;
  std::vector<Buffer> buffers;
  std::map<int, int> queue_buffers;  // per position
  Counters counters;
  int64_t block_index = 0, block_count = 1;
  int64_t ub_budget = kUbBudget;
  int64_t ub_used = 0, most_ub_used = 0;
  bool vector_only = false, pipe_alive = false;

 private:
  struct Flag {
    bool pending = false;
    Clock clock{};
  };

  void touch(Touched& t, bool write, int32_t repeat, bool accumulates, const char* what, int64_t granule);
  [[nodiscard]] bool complete(Pipe seen_by, Pipe pipe, int64_t event) const;

  Clock issued_{};
  std::array<Clock, kPipes> knows_{};
  std::map<std::array<int, 3>, Flag> flags_;
  int64_t epoch_ = 0, instruction_ = 0;
  Pipe pipe_ = kS;
  const char* call_ = "";
};

// The core that runs now.
Machine& machine();
void set_machine(Machine* m);

}  // namespace razor::emulation
