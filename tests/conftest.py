# SPDX-License-Identifier: Apache-2.0
"""Settings that hold for every test file."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# Examples are the same on every run; `--hypothesis-profile=thorough` (CI) takes more, `explore` looks for new ones.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("repeatable", derandomize=True, max_examples=15, **_COMMON)
settings.register_profile("thorough", derandomize=True, max_examples=50, **_COMMON)
settings.register_profile("explore", max_examples=1000, print_blob=True, **_COMMON)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors here are tiny: waiting for a second thread costs more than it brings. `test_attention` tests threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
