# SPDX-License-Identifier: Apache-2.0
"""The attention op against the oracle and the reference."""

import numpy as np
import pytest
import torch
from cases import CASES, Case, assert_close, case_id, random_cases, reference_attend, to_numpy
from hypothesis import given, settings


@given(random_cases())
def test_any_plan_any_cut_matches_oracle_and_reference(case: Case) -> None:
    cache, expected = case.cache(), case.expected()
    for tokens, by_oracle in zip(case.tokens, expected, strict=True):
        by_reference = reference_attend(case, cache, tokens)
        out = cache.attend(tokens.query, tokens.key, tokens.value, scale=case.scale, pad=tokens.pad, dense=tokens.dense)
        assert_close(out, by_oracle, case.magnitude())
        assert_close(out, to_numpy(by_reference), case.magnitude())
