// SPDX-License-Identifier: Apache-2.0
// Emulation of a subset of Ascend C for tests; not CANN. Small kernels that misuse it, one for each rule.
#pragma once

#include <cstdint>
#include <string_view>

namespace razor::emulation {

// The kernel of this name, nullptr if there is none. Arguments: in [256] half, out [256] half.
void (*self_test(std::string_view name))(uint8_t** arguments);

}  // namespace razor::emulation
