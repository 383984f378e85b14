# SPDX-License-Identifier: Apache-2.0
"""Do the NPU kernels compute what the CPU computes, and how fast? One command for whoever has an Ascend NPU.

The kernels were written without one: they ran under a host emulation only. This verifies attention (decode, prompt),
append and head scores against the CPU, then measures decode, and prints what to report back. Without --run it only
says what is missing; torch_npu is imported with --run alone.

Example: python -m razor_attention.bench.ascend --run
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from razor_attention import FULL, LayerCache, head_scores, ops
from razor_attention._native import load_npu_ops, npu_library

from .cases import CONTEXTS, LLAMA3_8B, Layer, plans, rows_read
from .harness import Timing, commit, interleave, table

NOMINAL_GB_S = 1600.0  # of a 910B; a share of it, not a measurement
# head_dim, group, page_size, dtype, tokens before, new tokens, (sink, window, compensate) of each kv head
CHECKS = (
    (128, 4, 64, torch.bfloat16, 700, 1, ((0, FULL, False), (4, 200, True))),
    (128, 8, 64, torch.float16, 700, 3, ((0, FULL, False), (4, 200, True))),
    (64, 1, 16, torch.float16, 90, 16, ((1, 5, True), (0, 30, False), (0, FULL, False))),
    (80, 7, 128, torch.bfloat16, 300, 1, ((17, 64, True), (0, 1, True))),
    (192, 4, 64, torch.bfloat16, 40, 1, ((0, FULL, False), (4, 0, True))),
    (256, 8, 64, torch.float16, 5000, 2, ((0, FULL, False), (4, 1000, True))),
    (128, 4, 64, torch.bfloat16, 0, 400, ((0, FULL, False), (4, 100, True))),
    (128, 4, 64, torch.bfloat16, 130, 70, ((0, FULL, False), (64, 50, True))),
    (128, 4, 64, torch.bfloat16, 700, 1, tuple((i, 30 + 77 * i, i % 2 == 0) for i in range(8))),  # a window for each
)


def tolerance(dtype: torch.dtype) -> float:
    """Largest difference of two results of one call, values about 1: each has its own rounding."""
    return 2.0**-8 if dtype == torch.float16 else 2.0**-6


def check_attention(device: str, check: tuple[Any, ...]) -> tuple[str, float, bool]:
    """One prompt and one call on both devices, then what the caches hold: name, largest difference, within bounds."""
    head_dim, group, page_size, dtype, before, new, policy = check
    draw = torch.Generator().manual_seed(before + new)

    def tokens(count: int) -> list[Tensor]:
        heads = (group * len(policy), len(policy), len(policy))
        return [torch.randn(2, n, count, head_dim, generator=draw).to(dtype) for n in heads]

    shape: dict[str, Any] = {"batch_size": 2, "head_dim": head_dim, "dtype": dtype, "page_size": page_size}
    here, there = (
        LayerCache(*map(torch.tensor, zip(*policy, strict=True)), **shape, device=d) for d in ("cpu", device)
    )
    difference = 0.0
    for count in (before, new, 1):
        given = tokens(count)
        expected, actual = here.attend(*given), there.attend(*(t.to(device) for t in given))
        if count:
            difference = max(difference, float((actual.cpu().float() - expected.float()).abs().max()))
    for name in ("key_sum", "value_sum"):
        a, b = getattr(here, name), getattr(there, name).cpu()
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-3)
    name = f"attention D{head_dim} G{group} P{page_size} {str(dtype).removeprefix('torch.')} {before}+{new}"
    return name, difference, difference <= tolerance(dtype)


def check_head_scores(device: str) -> tuple[str, float, bool]:
    """Echo and induction scores on both devices."""
    draw = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, 1 + 150 * 3, 128, generator=draw).to(torch.float16) for heads in (8, 2))
    expected, actual = head_scores(query, key, 150), head_scores(query.to(device), key.to(device), 150)
    difference = max(float((b.cpu() - a).abs().max() / a.abs().max()) for a, b in zip(expected, actual, strict=True))
    return "head_scores, relative", difference, difference <= 1e-3


def verify(device: str) -> list[tuple[str, float, bool]]:
    """All checks: name, largest difference, within bounds."""
    return [*(check_attention(device, check) for check in CHECKS), check_head_scores(device)]


def filled(layer: Layer, plan: Any, context: int, device: str) -> LayerCache:
    """A cache with `context` random tokens."""
    cache = LayerCache(
        *plan.layer(0),
        batch_size=1,
        head_dim=layer.head_dim,
        dtype=layer.dtype,
        page_size=layer.page_size,
        device=device,
    )
    for begin in range(0, context, 4096):
        _, key, value = layer.tokens(min(4096, context - begin), begin)
        cache.append(key.to(device), value.to(device))
    return cache


def measure(
    device: str, contexts: list[str], wait: Callable[[], None], rounds: int = 9
) -> list[tuple[str, str, Timing, float]]:
    """Decode of one token: context, plan, time of one attention call, GB/s of the rows it has to read."""
    rows = []
    for dtype in (torch.bfloat16, torch.float16):
        layer = replace(LLAMA3_8B, dtype=dtype)
        for name in contexts:
            for plan_name, plan in plans(layer).items():
                cache = filled(layer, plan, CONTEXTS[name], device)
                given = [t.to(device) for t in layer.tokens(1, 1)]

                def call(cache: LayerCache = cache, given: list[Tensor] = given) -> None:
                    for _ in range(10):
                        ops.attention(*given, *cache._tensors())
                    wait()

                ten = interleave({plan_name: call}, rounds=rounds)[plan_name]
                time = Timing(ten.median_us / 10, ten.iqr_us / 10)
                read = rows_read(plan, CONTEXTS[name] + 1) * layer.row_bytes
                case = f"decode {name} {str(dtype).removeprefix('torch.')}"
                rows.append((case, plan_name, time, read / time.median_us / 1e3))
                del cache
    return rows


def missing() -> str | None:
    """What keeps the NPU kernels from running here, without importing torch_npu; None: nothing that can be seen so."""
    if importlib.util.find_spec("torch_npu") is None:
        return f"torch_npu is not installed: it needs the release for torch {torch.__version__} and its CANN toolkit"
    if not npu_library().is_file():
        return (
            f"the package was built without NPU kernels ({npu_library().name} is missing): set ASCEND_HOME_PATH (the "
            "toolkit's set_env script does) and install it again beside torch_npu"
        )
    return None


def main(argv: list[str] | None = None) -> None:
    """Run the bench; see the module's help.

    Raises:
        SystemExit: nothing to run on, or a result that is wrong.
    """
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.prog = "python -m razor_attention.bench.ascend"
    made.add_argument("--run", action="store_true", help="import torch_npu, verify, measure")
    made.add_argument("--context", nargs="+", default=["8k", "32k", "128k"], choices=list(CONTEXTS))
    flags = made.parse_args(argv)
    reason = missing()
    if reason is not None:
        raise SystemExit(f"ascend: {reason}")
    if not flags.run:
        print("ascend: torch_npu and the NPU kernels are there; --run uses them. They never ran on an NPU before.")
        return
    load_npu_ops()  # imports torch_npu
    npu = torch.npu  # type: ignore[attr-defined]
    checks = verify("npu")
    print("\n## Report this back, all of it\n")
    versions = {n: importlib.import_module(n).__version__ for n in ("torch", "torch_npu", "razor_attention")}
    print(f"{npu.get_device_name(0)}, {platform.machine()}, {versions}, commit {commit()}\n")
    print(table(("check", "largest difference", "ok"), ((n, f"{d:.2e}", str(ok)) for n, d, ok in checks), left=1))
    if not all(ok for *_, ok in checks):
        raise SystemExit("ascend: results are wrong; times would mean nothing")
    rows = measure("npu", flags.context, npu.synchronize)
    header = ("case", "plan", "median us", "iqr us", "GB/s", "of nominal")
    print(table(header, ((c, p, t.median_us, t.iqr_us, g, g / NOMINAL_GB_S) for c, p, t, g in rows)))


if __name__ == "__main__":
    main()
