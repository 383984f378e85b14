# SPDX-License-Identifier: Apache-2.0
"""Loads the package's native libraries, once, with an error that says what to do when one cannot be loaded."""

from __future__ import annotations

from importlib.resources import files

import torch

from ._core import isa as isa  # first, because an editable install rebuilds both libraries on this import

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
