# SPDX-License-Identifier: Apache-2.0
"""Loads the package's native libraries, once, with an error that says what to do when one cannot be loaded."""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.resources import files
from pathlib import Path

import torch

try:
    from ._core import isa as isa  # first, because an editable install rebuilds both libraries on this import
except ImportError as error:
    raise ImportError(
        f"razor_attention: expected its compiled part _core in {files(__package__)}, got: {error}; build it with "
        "`pip install .` in the source tree (torch first)"
    ) from error

MIN_TORCH = (2, 10)


def load_torch_ops() -> None:
    """Register `torch.ops.razor.*`, unless another copy of the package already has.

    Raises:
        ImportError: torch: expected >= 2.10, got 2.9.1
    """
    if hasattr(torch.ops.razor, "attention"):  # a second registration would end the process
        return
    version = torch.__version__.split("+")[0]
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_TORCH:
        raise ImportError(f"torch: expected >= {MIN_TORCH[0]}.{MIN_TORCH[1]}, got {version}")
    library = files(__package__) / "_torch_ops.so"
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ImportError(
            f"razor_attention: expected a loadable {library}, got: {error}; reinstall with `pip install .` after torch"
        ) from error
    _load_npu_ops_if_there()


def npu_library() -> Path:
    """Where the NPU kernels are, if the package was built where CANN is."""
    return Path(str(files(__package__))) / "_torch_npu_ops.so"


def _load_npu_ops_if_there() -> None:
    """The NPU kernels too, if the user has imported torch_npu and we have them; a warning if they cannot be loaded."""
    if hasattr(torch, "npu") and npu_library().is_file():
        try:
            load_npu_ops()
        except ImportError as error:
            warnings.warn(f"{error}; NPU tensors take the reference", stacklevel=2)


def load_npu_ops() -> None:
    """Import torch_npu, register the NPU kernels on `torch.ops.razor.*`; without them NPU tensors take the reference.

    The kernels ran under a host emulation only, never on an NPU: `python -m razor_attention.bench.ascend --run` checks.

    Raises:
        ImportError: torch_npu: expected the release for torch 2.13.0, got: No module named 'torch_npu'
    """
    try:
        import_module("torch_npu")
    except (ImportError, RuntimeError) as error:  # RuntimeError: installed without its CANN libraries
        raise ImportError(f"torch_npu: expected the release for torch {torch.__version__}, got: {error}") from error
    try:
        torch.ops.load_library(str(npu_library()))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ImportError(
            f"razor_attention: expected a loadable {npu_library()}, got: {error}; reinstall where CANN is"
        ) from error
