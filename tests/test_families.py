# SPDX-License-Identifier: Apache-2.0
"""hf/: every family in transformers' causal-LM table is equal to stock, or refused before it says a word.

tests/data/families.json says which: {"name": ["equal"]}, ["refused", part of the message] or ["not buildable tiny",
reason]; "since 5.23" at the end: with an older transformers any of the three will do, as far as has been looked.
"""

import json
import os
import re
from pathlib import Path

import pytest
import transformers
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from families import outcome, tiny_config
from razor_attention.hf.models import geometry

TABLE = json.loads((Path(__file__).parent / "data" / "families.json").read_text())
OUTCOMES = {"equal": 0, "refused": 1, "not buildable tiny": 1}  # and the texts that go with each
QUICK = {
    *("bert", "deepseek_v3", "gemma4_text", "gpt2", "gpt_bigcode", "jetmoe", "llama", "mamba", "mistral", "mixtral"),
    *("phi3", "qwen2_moe", "qwen3_moe"),
}
ENCODERS = [name for name in TABLE if TABLE[name][0] == "equal" and name in ("bert", "roberta", "electra", "xmod")]


LATEST = os.environ.get("RAZOR_LATEST") == "1"  # the newest release: families that the table does not know are news
LOCK = (Path(__file__).parents[1] / "requirements/lock.txt").read_text()
WALK = LATEST and f"transformers=={transformers.__version__}\n" not in LOCK  # the slow tests walk the lock's


def version(text):
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK or WALK or name not in TABLE else pytest.param(name, marks=pytest.mark.slow)
        for name in sorted(TABLE | dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    ],
)
def test_family(name):
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    if name not in TABLE:
        if LATEST:
            pytest.fail(f"new family, add it to the table: {name}: {outcome(name)}")
        pytest.skip("not in the table")
    expected, *texts = TABLE[name]
    since = texts[-1] if texts and texts[-1].startswith("since ") else ""
    found, *words = outcome(name)
    if since and version(transformers.__version__) < version(since):
        return  # equal, refused or a stock model that fails: `outcome` raises for anything else
    assert found == expected, words
    if expected == "refused":
        assert texts[0] in words[0]
        assert re.match(r"\w+: expected .+, got .+", words[0])


def test_the_table():
    assert list(TABLE) == sorted(TABLE)
    for name, (kind, *texts) in TABLE.items():
        texts = [text for text in texts if not text.startswith("since ")]
        assert len(texts) == OUTCOMES[kind], name
    assert sum(kind == "equal" for kind, *_ in TABLE.values()) >= 66
    assert TABLE.keys() >= QUICK


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_refused(name):
    config = tiny_config(name)
    config.is_decoder = False
    with pytest.raises(NotImplementedError, match=r"^config: expected is_decoder True, got False"):
        geometry(config)
    with pytest.raises(NotImplementedError, match=r"^config: expected is_decoder True, got False"):
        geometry(AutoConfig.for_model(name))
