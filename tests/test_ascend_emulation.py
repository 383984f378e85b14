# SPDX-License-Identifier: Apache-2.0
"""The emulation refuses what the hardware leaves undefined, notices faults seeded into the kernels, and the kernels'
sources keep to documented names. What the emulation lets pass is only as good as these tests."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import emulated
from emulated import EmulationError
from test_ascend import Numbers, run_append, run_attention, run_head_scores

ASCEND = emulated.CPP / "ascend"
DEVICE = [*sorted((ASCEND / "op_kernel").glob("*")), ASCEND / "op_host/work_list.h"]

MISUSES = {
    "capacity": r"InitBuffer: expected at most 188160 bytes of UB, got 191744",
    "second pipe": r"TPipe: expected one at a time",
    "queue buffers": r"InitBuffer: expected at most 8 queue buffers of a position",
    "alignment": r"Adds on V: expected a 32-byte aligned destination",
    "bounds": r"Adds on V: expected lanes within the tensor, got 32 bytes past its end",
    "strided bounds": r"Add on V: expected lanes within the tensor, got 32 bytes past its end",
    "reduction bounds": r"WholeReduceSum on V: expected results within the tensor",
    "index": r"SetValue on S: expected an index below 256, got 256",
    "ragged copy": r"DataCopy on MTE2: expected a multiple of 32 bytes, got 30",
    "misaligned copy": r"DataCopy on MTE2: expected a 32-byte aligned tensor",
    "long copy": r"DataCopy on MTE2: expected at most 480 bytes of global memory, got 512",
    "beyond memory": r"DataCopy on MTE2: expected an address in global memory|past its end",
    "no size": r"SetGlobalBuffer: expected a size",
    "route": r"DataCopy on MTE3: expected a queue's tensor, got a TBuf's",
    "read only": r"DataCopy on MTE3: expected a tensor that the kernel may write, got in",
    "block length": r"DataCopyPad on MTE2: expected blocks of whole elements, got 3 bytes",
    "repeat": r"field: expected 0 to 255, got 256",
    "stride": r"field: expected 0 to 255, got 256",
    "gap": r"field: expected 0 to 4294967295, got -2",
    "mask": r"Add on V: expected a mask from 1 to 64, got 65",
    "mask bits": r"Duplicate on V: expected mask bits within 64 lanes",
    "destination block": r"Add on V: expected a destination block stride > 0",
    "rounding": r"Cast on V: expected CAST_NONE to float and CAST_RINT from it",
    "partial overlap": r"Adds on V: expected operands that are the same or apart",
    "later repeat": r"Add on V: expected no repeat to touch what an earlier one wrote",
    "widening in place": r"Cast on V: expected operands that are the same or apart",
    "spread in place": r"Brcb on V: expected no repeat to touch what an earlier one wrote",
    "no free buffer": r"AllocTensor: expected a free buffer of 2, got none",
    "foreign tensor": r"EnQue: expected a tensor of this queue",
    "depth": r"EnQue: expected at most 1 in the queue",
    "empty queue": r"DeQue: expected a tensor in the queue, got none",
    "free twice": r"FreeTensor: expected a dequeued tensor, got one free",
    "free unused": r"FreeTensor: expected a dequeued tensor, got one allocated",
    "use after free": r"Cast on V: expected a tensor in use, got a freed one",
    "use while queued": r"Duplicate on V: expected a tensor in use, got one between EnQue and DeQue",
    "leak": r"queue: expected every buffer to be free at the end, got one dequeued",
    "barrier, write then read": r"Adds on V: expected a flag, barrier or queue after V wrote UB",
    "barrier, read then write": r"Duplicate on V: expected a flag, barrier or queue after V read UB",
    "barrier, write then write": r"Duplicate on V: expected a flag, barrier or queue after V wrote UB",
    "scalar reads a vector's": r"GetValue on S: expected a flag, barrier or queue after V wrote UB",
    "scalar writes a vector's": r"SetValue on S: expected a flag, barrier or queue after V wrote UB",
    "scalar writes what a vector reads": r"SetValue on S: expected a flag, barrier or queue after V read UB",
    "vector reads a scalar's": r"Adds on V: expected a flag, barrier or queue after S wrote UB",
    "vector writes a scalar's": r"Duplicate on V: expected a flag, barrier or queue after S wrote UB",
    "vector writes what a scalar reads": r"Duplicate on V: expected a flag, barrier or queue after S read UB",
    "scalar reads a copy's": r"GetValue on S: expected a flag, barrier or queue after MTE2 wrote UB",
    "scalar reads a queue's": r"GetValue on S: expected a flag, barrier or queue after MTE2 wrote UB",
    "copy in writes a scalar's": r"DataCopy on MTE2: expected a flag, barrier or queue after S wrote UB",
    "copy in writes what a scalar reads": r"DataCopy on MTE2: expected a flag, barrier or queue after S read UB",
    "copy out reads a scalar's": r"DataCopy on MTE3: expected a flag, barrier or queue after S wrote UB",
    "scalar writes what a copy reads": r"SetValue on S: expected a flag, barrier or queue after MTE3 read UB",
    "copy out writes what a scalar reads": r"DataCopyPad on MTE3: expected a flag, barrier or queue after S read out",
    "scalar reads an output": r"GlobalTensor::GetValue on S: expected an input that this launch leaves alone, got byte",
    "vector reads a copy's": r"Cast on V: expected a flag, barrier or queue after MTE2 wrote UB",
    "copy reads a vector's": r"DataCopy on MTE3: expected a flag, barrier or queue after V wrote UB",
    "copy out, then in": r"DataCopy on MTE2: expected a flag, barrier or queue after MTE3 wrote out",
    "copy out twice": r"DataCopy on MTE3: expected a flag, barrier or queue after MTE3 wrote out",
    "set twice": r"SetFlag: expected a WaitFlag between two, got a second V_S id 0",
    "wait alone": r"WaitFlag: expected a SetFlag before, got none for V_S id 0",
    "set alone": r"events: expected a WaitFlag for every SetFlag, got none for V_S id 0",
    "event id": r"SetFlag: expected an id from 0 to 7, got 8",
    "blocks write one byte": r"DataCopyPad on MTE3: expected no two blocks to meet in one byte, got block",
    "block reads another's": r"DataCopy on MTE2: expected no block to read what another writes, got blocks 1 and 0",
    "kernel type": r"kernel type: expected KERNEL_TASK_TYPE_DEFAULT\(KERNEL_TYPE_AIV_ONLY\)",
}


def run_self_test(name: str, blocks: int = 1) -> torch.Tensor:
    given, out = torch.arange(256).half(), torch.full((256,), 777.0).half()
    emulated.launch(emulated.stock(), name, [("in", given, False), ("out", out, True)], blocks=blocks)
    return out


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_refused(name: str) -> None:
    with pytest.raises(EmulationError, match=MISUSES[name]):
        run_self_test(name, blocks=2 if "block" in name and name != "block length" else 1)


def test_every_misuse_is_run() -> None:
    names = re.findall(
        r'RAZOR_MISUSE\(\s*"([^"]+)"|\{"([^"]+)", \[\]', (ASCEND / "emulation/self_test.cpp").read_text()
    )
    assert {a or b for a, b in names} == MISUSES.keys() | {"none", "poison", "scalars", "neighbours"}


def test_what_is_allowed_passes() -> None:
    assert run_self_test("none").equal(torch.arange(256).half())
    assert run_self_test("poison").isnan().all()  # memory that nobody filled
    assert run_self_test("scalars").tolist() == [3] + [1] * 255
    assert run_self_test("neighbours", blocks=5)[:6].tolist() == [1] * 5 + [777]  # bytes of one 32-byte block


# --- faults seeded into the kernels

SMALL = Numbers(head_dim=80, group=3, page_size=16, q_len=2, dtype="float16", cores=7, alibi=True)


def run_attention_of_64(c: Numbers, library: ctypes.CDLL | None = None) -> None:
    run_attention(replace(c, head_dim=64), library)


# What was done -> (file, text, replacement, what runs it). Each must be refused, or change a result.
FAULTS: dict[str, tuple[str, str, str, Callable[..., None]]] = {
    "barrier removed: logits read before the products are there": (
        "op_kernel/tile_math.h",
        "      if (head_dim_ <= kLanes) PipeBarrier<PIPE_V>();\n",
        "",
        run_attention_of_64,
    ),
    "barrier removed: values weighted before the weights are there": (
        "op_kernel/tile_math.h",
        "BrcbRepeatParams(1, 8));\n    PipeBarrier<PIPE_V>();\n  }\n\n  // weighted_r *=",
        "BrcbRepeatParams(1, 8));\n  }\n\n  // weighted_r *=",
        run_attention,
    ),
    "barrier removed: the sum is reused while it is copied": (
        "op_kernel/append.cpp",
        "AscendC::Adds(result, sum_, 0.0f, head_dim_);\n    PipeBarrier<PIPE_V>();",
        "AscendC::Adds(result, sum_, 0.0f, head_dim_);",
        run_append,
    ),
    "wait removed: scalars written while the vector pipe reads": (
        "op_kernel/attention.cpp",
        "    scalar_waits_for_vector(pipe_);\n",
        "",
        run_attention,
    ),
    "wait removed: the vector pipe reads while scalars are written": (
        "op_kernel/attention.cpp",
        "    vector_waits_for_scalar(pipe_);\n    for (int32_t i = kBlockFloats",
        "    for (int32_t i = kBlockFloats",
        run_attention,
    ),
    "wait removed: logarithms of scalars that are still written": (
        "op_kernel/attention.cpp",
        "    vector_waits_for_scalar(pipe_);\n    AscendC::Ln",
        "    AscendC::Ln",
        run_attention,
    ),
    "wait for the wrong pipe": (
        "op_kernel/attention.cpp",
        "    scalar_waits_for_vector(pipe_);\n",
        "    vector_waits_for_scalar(pipe_);\n",
        run_attention,
    ),
    "a scalar from a tensor that a copy filled": (
        "op_kernel/append.cpp",
        "    LocalTensor<float> stored = dropped_.template DeQue<float>();\n",
        "    LocalTensor<float> stored = dropped_.template DeQue<float>();\n    (void)stored.GetValue(0);\n",
        run_append,
    ),
    "stride in elements where blocks are meant": (
        "op_kernel/cache_rows.h",
        "head_dim * sizeof(T) / 32)",
        "head_dim)",
        run_append,
    ),
    "stride in blocks where bytes are meant": (
        "op_kernel/query_rows.h",
        "skipped = (tokens - 1) * bytes;",
        "skipped = (tokens - 1) * bytes / 32;",
        run_attention,
    ),
    "tile longer than its buffer": (
        "op_kernel/attention.cpp",
        "return tile_of(part_.row, part_.window, n_, index - part_.sink_tiles);",
        "return tile_of(part_.row, part_.window, n_ + 16, index - part_.sink_tiles);",
        run_attention,
    ),
    "misaligned copy": (
        "op_kernel/attention.cpp",
        "rows_.copy_tokens(to, side, part_.row, range);",
        "rows_.copy_tokens(to[8], side, part_.row, range);",
        run_attention,
    ),
    "ragged copy": (
        "op_kernel/append.cpp",
        "DataCopy(to, held, static_cast<uint32_t>(head_dim_))",
        "DataCopy(to, held, static_cast<uint32_t>(head_dim_ - 1))",
        run_append,
    ),
    "unbalanced event": (
        "op_kernel/device.h",
        "  AscendC::WaitFlag<AscendC::HardEvent::S_V>(id);\n",
        "",
        run_attention,
    ),
    "queue left full": (
        "op_kernel/head_scores.cpp",
        "    results_.FreeTensor(ready);\n",
        "",
        run_head_scores,
    ),
    "next page": (
        "op_kernel/cache_rows.h",
        "index / tiling_.page_size);",
        "index / tiling_.page_size + 1);",
        run_attention,
    ),
    "one token beyond the page": (
        "op_host/work_list.h",
        "return smaller(page_size - index % page_size, in_part);",
        "return smaller(page_size - index % page_size + 1, in_part);",
        run_attention,
    ),
    "one token past the window": (
        "op_host/work_list.h",
        "position - row.window + 1;",
        "position - row.window;",
        run_attention,
    ),
    "dropped tokens weigh one": (
        "op_kernel/attention.cpp",
        "    AscendC::Ln(log_dropped, log_dropped, tokens);\n",
        "    AscendC::Muls(log_dropped, log_dropped, 0.0f, tokens);\n",
        run_attention,
    ),
    "a state is merged twice": (
        "op_kernel/combine.cpp",
        "load(2 * other, rows);",
        "load(share.state, rows);",
        run_attention,
    ),
    "hidden columns count": (
        "op_kernel/tile_math.h",
        "if (hidden[0] == 0 || begin == end) return;",
        "if (begin >= 0) return;",
        run_head_scores,
    ),
    "cores share a row's sums": (
        "op_kernel/append.cpp",
        "append(rows_.row(i / 2), static_cast<int32_t>(i % 2));",
        "append(rows_.row(i / 4), static_cast<int32_t>(i % 2));",
        run_append,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_seeded_fault_is_caught(fault: str) -> None:
    file, old, new, run = FAULTS[fault]
    library = emulated.build({file: (old, new)})
    with pytest.raises((EmulationError, AssertionError)):
        run(SMALL, library=library)
    run(SMALL)  # the same without the fault


# --- who includes whom


def forbidden_includes(path: str, text: str) -> list[str]:
    """Of a file under cpp/ascend. Device code sees the device and PODs; the host no CANN, but for the launches."""
    emulated_headers = "|".join(re.escape(p.name) for p in (ASCEND / "emulation").glob("*.h"))
    allowed = {
        "op_kernel": r"kernel_operator\.h|ascend/op_kernel/\w+\.h|ascend/op_host/work_list\.h",
        "op_host": r"[a-z_]+|stdint\.h|ascend/op_host/\w+\.h|razor/\w+\.h",
        "declarations": r"stdint\.h",
        "emulation": rf"[a-z_]+|{emulated_headers}|ascend/op_host/tiling\.h|razor/float16\.h",
    }[path.partition("/")[0]]
    if path == "op_host/launch.cpp":
        allowed += r"|acl/acl\.h|aclrtlaunch_razor_\w+\.h|tiling/platform/\w+\.h|ascend/op_kernel/\w+\.cpp"
    found = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', text, re.MULTILINE)
    return [include for include in found if not re.fullmatch(allowed, include)]


@pytest.mark.parametrize("path", sorted(ASCEND.glob("*/*.[hc]*")), ids=lambda p: p.name)
def test_include_direction(path: Path) -> None:
    assert forbidden_includes(path.relative_to(ASCEND).as_posix(), path.read_text()) == []


@pytest.mark.parametrize(
    ("path", "include"),
    [
        ("op_kernel/attention.cpp", "<cmath>"),
        ("op_kernel/attention.cpp", '"razor/check.h"'),
        ("op_kernel/device.h", '"machine.h"'),
        ("op_host/tiling.cpp", "<acl/acl.h>"),
        ("op_host/tiling.h", '"kernel_operator.h"'),
        ("op_host/launch.cpp", "<torch/library.h>"),
        ("emulation/harness.cpp", "<acl/acl.h>"),
        ("declarations/kernel_operator.h", "<cmath>"),
    ],
)
def test_include_check(path: str, include: str) -> None:
    assert forbidden_includes(path, f"// text\n#include {include}\n")


# --- what device code may say

LISTED = re.findall(r"`(\w+)`", (ASCEND / "README.md").read_text())
MEMBERS = set(LISTED[LISTED.index("InitBuffer") : LISTED.index("FetchEventID") + 1])
DOCUMENTED = set(LISTED[LISTED.index("GlobalTensor") : LISTED.index("InitBuffer")])
FORBIDDEN = re.compile(
    r"\b(std::|new\b|delete\b|malloc|virtual\b|throw\b|try\b|catch\b|double\b|static (?!inline|_cast)\w+ \w+ ?[=;]|"
    r"goto\b|typeid|dynamic_cast|long double|asm\b|__builtin\w*|pipe_barrier|set_flag|wait_flag|copy_\w+_to_\w+|"
    r"vadd|vmul|vconv\w*|vector_dup|get_block_idx|#\s*if(?!ndef RAZOR_FN))"
)


def code_of(path: Path) -> str:
    return re.sub(r"//[^\n]*", "", path.read_text())


@pytest.mark.parametrize("path", DEVICE, ids=lambda p: p.name)
def test_device_code_keeps_to_documented_names(path: Path) -> None:
    code = code_of(path)
    assert set(re.findall(r"AscendC::(\w+)", code)) <= DOCUMENTED
    assert set(re.findall(r"(?:\.|->)(?:template )?([A-Z]\w+)", code)) <= MEMBERS
    assert [match[0] for match in FORBIDDEN.finditer(code)] == []
    # braces would take no run-time int on the device, whose compiler refuses narrowing
    assert not re.search(r"(RepeatParams|ExtParams(<T>)?)\{", code)


@pytest.mark.parametrize("path", DEVICE, ids=lambda p: p.name)
def test_device_code_does_not_recurse(path: Path) -> None:
    """No function of a file reaches itself. Calls of members go to files below, which do not include this one."""
    text = code_of(path)
    calls: dict[str, set[str]] = {}
    for match in re.finditer(r"(?:__aicore__ inline|RAZOR_FN)[^;{}()]*?(\w+)\([^;{}]*\{", text):
        depth, at = 1, match.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        body = text[match.end() : at]
        calls.setdefault(match[1], set()).update(re.findall(r"(?<![.>:\w])(\w+)\(", body))
    assert calls
    for name in calls:
        reached, front = set(), {name}
        while front:
            front = {n for f in front for n in calls[f] & calls.keys()} - reached
            reached |= front
        assert name not in reached


def test_every_listed_name_is_used() -> None:
    """And the list is the one that was read here, not a part of it."""
    code = "\n".join(map(code_of, DEVICE))
    assert len(DOCUMENTED) == 38
    assert len(MEMBERS) == 10
    assert {name for name in DOCUMENTED | MEMBERS if not re.search(rf"\b{name}\b", code)} == set()
