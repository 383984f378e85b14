// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace razor {

// Floats at a multiple of 64 bytes, not initialised.
class Floats {
 public:
  explicit Floats(int64_t count)
      : data_(static_cast<float*>(::operator new(count * sizeof(float), std::align_val_t{64}))) {}
  [[nodiscard]] float* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<float, Free> data_;
};

// Floats that a thread keeps between calls, since a short call takes less time than allocating them.
class KeptFloats {
 public:
  // At least `count` of them, with any contents.
  [[nodiscard]] float* get(int64_t count) {
    if (size_ < count) {
      kept_ = std::make_unique<Floats>(count);
      size_ = count;
    }
    return kept_->get();
  }

 private:
  std::unique_ptr<Floats> kept_;
  int64_t size_ = 0;
};

}  // namespace razor
