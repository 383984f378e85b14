// SPDX-License-Identifier: Apache-2.0
// Emulation of a subset of Ascend C for tests; not CANN. Written from the public documentation of the calls; its only
// worth is to refuse more than the hardware does. Kernels include this header by its plain name: the include path
// gives CANN's on a device build and this one on a host build.
#pragma once

#include "copies.h"
#include "tensors.h"
#include "vectors.h"
