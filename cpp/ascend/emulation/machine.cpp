// SPDX-License-Identifier: Apache-2.0
#include "machine.h"

#include <algorithm>

namespace razor::emulation {
namespace {

Machine* current = nullptr;

bool legal_pair(Pipe from, Pipe to) { return from != to; }  // all pairs of these four pipes have an event

}  // namespace

Machine& machine() {
  if (current == nullptr) fail("kernel: expected a running emulation");
  return *current;
}

void set_machine(Machine* m) { current = m; }

std::string Machine::where() const { return std::string(call_) + " on " + kPipeNames[pipe_]; }

void Machine::start_block(int64_t index, int64_t count) {
  block_index = index;
  block_count = count;
  ++epoch_;
  std::fill(ub.begin(), ub.end(), 0xff);
  buffers.clear();
  queue_buffers.clear();
  flags_.clear();
  issued_ = {};
  knows_ = {};
  ub_used = 0;
  vector_only = pipe_alive = false;
}

void Machine::end_block() {
  call_ = "end of kernel";
  if (!vector_only) fail("kernel type: expected KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY) in the entry");
  for (const auto& [key, flag] : flags_) {
    if (flag.pending) {
      fail("events: expected a WaitFlag for every SetFlag, got none for ", kPipeNames[key[0]], "_", kPipeNames[key[1]],
           " id ", key[2]);
    }
  }
  for (const Buffer& buffer : buffers) {
    if (buffer.queue && buffer.use != Use::kFree) {
      fail("queue: expected every buffer to be free at the end, got one ", kUseNames[static_cast<int>(buffer.use)]);
    }
  }
}

bool Machine::complete(Pipe seen_by, Pipe pipe, int64_t event) const {
  return (seen_by == kS && pipe == kS) || knows_[seen_by][pipe] >= event;
}

// What S knows when it issues an instruction, the instruction knows; S's own accesses need a flag all the same.
void Machine::issue(Pipe pipe, const char* call) {
  pipe_ = pipe;
  call_ = call;
  ++instruction_;
  if (pipe != kS) {
    for (int q = 0; q < kPipes; ++q) {
      if (q != kS) knows_[pipe][q] = std::max(knows_[pipe][q], knows_[kS][q]);
    }
  }
  ++issued_[pipe];
  ++counters.calls[call];
}

void Machine::touch(Touched& t, bool write, int32_t repeat, bool accumulates, const char* what, int64_t granule) {
  if (t.epoch != epoch_) t = Touched{.epoch = epoch_};
  const bool same = t.instruction == instruction_;
  if (same && t.repeat != repeat && !accumulates) {
    fail(where(), ": expected no repeat to touch what an earlier one wrote, got repeat ", repeat, " after ", t.repeat,
         " at ", what, " byte ", granule * kGranule);
  }
  if (!same && t.written > 0 && !complete(pipe_, static_cast<Pipe>(t.writer), t.written)) {
    fail(where(), ": expected a flag, barrier or queue after ", kPipeNames[t.writer], " wrote ", what, " byte ",
         granule * kGranule);
  }
  const int64_t now = issued_[pipe_];
  if (!write) {
    t.read[pipe_] = std::max(t.read[pipe_], now);
    return;
  }
  for (int q = 0; q < kPipes; ++q) {
    const bool own = q == pipe_ && t.read[q] == now;
    if (t.read[q] > 0 && !own && !complete(pipe_, static_cast<Pipe>(q), t.read[q])) {
      fail(where(), ": expected a flag, barrier or queue after ", kPipeNames[q], " read ", what, " byte ",
           granule * kGranule);
    }
  }
  t.written = now;
  t.writer = static_cast<int8_t>(pipe_);
  t.instruction = instruction_;
  t.repeat = repeat;
}

void Machine::read_ub(int64_t offset, int64_t bytes, int32_t repeat, bool accumulates) {
  for (int64_t g = offset / kGranule; g * kGranule < offset + bytes; ++g) {
    touch(ub_touched[g], /*write=*/false, repeat, accumulates, "UB", g);
  }
}

void Machine::write_ub(int64_t offset, int64_t bytes, int32_t repeat, bool accumulates) {
  for (int64_t g = offset / kGranule; g * kGranule < offset + bytes; ++g) {
    touch(ub_touched[g], /*write=*/true, repeat, accumulates, "UB", g);
  }
}

GlobalBuffer& Machine::global_of(const void* data, int64_t bytes) {
  const auto* begin = static_cast<const uint8_t*>(data);
  for (GlobalBuffer& buffer : globals) {
    if (begin >= buffer.data && begin < buffer.data + std::max<int64_t>(buffer.bytes, 1)) {
      if (begin + bytes > buffer.data + buffer.bytes) {
        fail(where(), ": expected bytes within ", buffer.name, ", got ", begin + bytes - buffer.data - buffer.bytes,
             " past its end");
      }
      return buffer;
    }
  }
  fail(where(), ": expected an address in global memory, got one outside of all tensors");
}

uint8_t* Machine::read_global(const void* data, int64_t bytes) {
  GlobalBuffer& buffer = global_of(data, bytes);
  const int64_t offset = static_cast<const uint8_t*>(data) - buffer.data;
  const auto me = static_cast<int32_t>(block_index + 1);
  for (int64_t g = offset / kGranule; g * kGranule < offset + bytes; ++g) {
    touch(buffer.touched[g], /*write=*/false, 0, false, buffer.name.c_str(), g);
  }
  for (int64_t i = offset; i < offset + bytes; ++i) {
    if (buffer.owner[i] != 0 && buffer.owner[i] != me) {
      fail(where(), ": expected no block to read what another writes, got blocks ", block_index, " and ",
           buffer.owner[i] - 1, " at byte ", i, " of ", buffer.name);
    }
    buffer.reader[i] = buffer.reader[i] == 0 || buffer.reader[i] == me ? me : -1;
  }
  return buffer.data + offset;
}

// No flag makes the scalar pipe's data cache see what a copy wrote: what this launch writes is not for it.
uint8_t* Machine::read_global_scalar(const void* data, int64_t bytes) {
  const GlobalBuffer& buffer = global_of(data, bytes);
  const int64_t offset = static_cast<const uint8_t*>(data) - buffer.data;
  for (int64_t i = offset; i < offset + bytes; ++i) {
    if (buffer.owner[i] != 0) {
      fail(where(), ": expected an input that this launch leaves alone, got byte ", i, " of ", buffer.name);
    }
  }
  return read_global(data, bytes);
}

uint8_t* Machine::write_global(void* data, int64_t bytes) {
  GlobalBuffer& buffer = global_of(data, bytes);
  if (!buffer.writable) fail(where(), ": expected a tensor that the kernel may write, got ", buffer.name);
  const int64_t offset = static_cast<uint8_t*>(data) - buffer.data;
  const auto me = static_cast<int32_t>(block_index + 1);
  for (int64_t g = offset / kGranule; g * kGranule < offset + bytes; ++g) {
    touch(buffer.touched[g], /*write=*/true, 0, false, buffer.name.c_str(), g);
  }
  for (int64_t i = offset; i < offset + bytes; ++i) {
    if ((buffer.owner[i] != 0 && buffer.owner[i] != me) || (buffer.reader[i] != 0 && buffer.reader[i] != me)) {
      fail(where(), ": expected no two blocks to meet in one byte, got block ", block_index, " at byte ", i, " of ",
           buffer.name);
    }
    buffer.owner[i] = me;
  }
  return buffer.data + offset;
}

Clock Machine::snapshot(Pipe pipe) const {
  Clock clock = knows_[pipe];
  if (pipe != kS) {
    for (int q = 0; q < kPipes; ++q) {
      if (q != kS) clock[q] = std::max(clock[q], knows_[kS][q]);
    }
  }
  clock[pipe] = issued_[pipe];
  return clock;
}

void Machine::join(Pipe pipe, const Clock& clock) {
  for (int q = 0; q < kPipes; ++q) knows_[pipe][q] = std::max(knows_[pipe][q], clock[q]);
}

void Machine::barrier(Pipe pipe) {
  ++counters.calls["PipeBarrier"];
  knows_[pipe][pipe] = issued_[pipe];
}

void Machine::barrier_all() {
  Clock all{};
  for (int p = 0; p < kPipes; ++p) all[p] = issued_[p];
  for (int p = 0; p < kPipes; ++p) join(static_cast<Pipe>(p), all);
}

void Machine::set_flag(Pipe from, Pipe to, int id) {
  call_ = "SetFlag";
  if (!legal_pair(from, to)) fail("SetFlag: expected two pipes, got ", kPipeNames[from], " twice");
  if (id < 0 || id >= kEventIds) fail("SetFlag: expected an id from 0 to ", kEventIds - 1, ", got ", id);
  Flag& flag = flags_[{from, to, id}];
  if (flag.pending) {
    fail("SetFlag: expected a WaitFlag between two, got a second ", kPipeNames[from], "_", kPipeNames[to], " id ", id);
  }
  flag = {.pending = true, .clock = snapshot(from)};
}

void Machine::wait_flag(Pipe from, Pipe to, int id) {
  call_ = "WaitFlag";
  Flag& flag = flags_[{from, to, id}];
  if (!flag.pending) {
    fail("WaitFlag: expected a SetFlag before, got none for ", kPipeNames[from], "_", kPipeNames[to], " id ", id);
  }
  flag.pending = false;
  join(to, flag.clock);
}

int64_t Machine::allocate(int64_t bytes, int64_t count) {
  if (bytes <= 0 || count <= 0) fail("InitBuffer: expected a size > 0, got ", count, " x ", bytes, " bytes");
  const int64_t each = (bytes + kGranule - 1) / kGranule * kGranule, offset = ub_used;
  ub_used += each * count;
  most_ub_used = std::max(most_ub_used, ub_used);
  if (ub_used > std::min<int64_t>(ub_budget, static_cast<int64_t>(ub.size()))) {
    fail("InitBuffer: expected at most ", ub_budget, " bytes of UB, got ", ub_used);
  }
  if (static_cast<int64_t>(buffers.size()) + count > 64) fail("InitBuffer: expected at most 64 buffers");
  return offset;
}

int64_t Machine::register_buffer(Buffer buffer) {
  buffers.push_back(buffer);
  return static_cast<int64_t>(buffers.size()) - 1;
}

void Machine::check_usable(int64_t buffer, int64_t generation) const {
  const Buffer& b = buffers.at(buffer);
  if (!b.queue) return;
  if (b.generation != generation || b.use == Use::kFree) fail(where(), ": expected a tensor in use, got a freed one");
  if (b.use == Use::kQueued) fail(where(), ": expected a tensor in use, got one between EnQue and DeQue");
}

}  // namespace razor::emulation
