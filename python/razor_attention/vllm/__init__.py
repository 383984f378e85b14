# SPDX-License-Identifier: Apache-2.0
"""A plan inside vLLM: `RAZOR_PLAN=plan.json vllm serve MODEL`. vLLM calls `register` in each of its processes.

layout.py says which blocks of a request hold what; spec.py tells vLLM's scheduler how many a request needs;
backend.py attends. Scheduling, preemption, admission and the block pool stay vLLM's. docs/serving.md has the limits.
"""

from __future__ import annotations

import os

PLAN_VARIABLE = "RAZOR_PLAN"


def register() -> None:
    """Entry point of `vllm.general_plugins`: our backend in the place of vLLM's, if RAZOR_PLAN names a plan.

    Raises:
        ValueError: RAZOR_PLAN: expected a plan with final windows, got window_fraction 0.2; ...
        NotImplementedError: RAZOR_PLAN: expected vLLM on a CPU, got cuda
    """
    if os.environ.get(PLAN_VARIABLE):
        from .backend import replace_attention

        replace_attention()
