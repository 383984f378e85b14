# SPDX-License-Identifier: Apache-2.0
"""`razor eval`: what a model still answers when its cache is kept in different ways of the same size.

tasks.py writes questions, methods.py turns a budget into a way to keep the cache, reader.py runs it, results.py keeps
the rows, evaluate.py goes through them all.
"""

from __future__ import annotations

from .evaluate import Settings, evaluate
from .methods import Method, make_methods
from .results import FIELDS, Row, read_rows, summary, wilson
from .tasks import TASKS, TaskFile

__all__ = [
    "FIELDS",
    "TASKS",
    "Method",
    "Row",
    "Settings",
    "TaskFile",
    "evaluate",
    "make_methods",
    "read_rows",
    "summary",
    "wilson",
]
