# SPDX-License-Identifier: Apache-2.0
"""files.py: atomic writing, both foreign formats, and what is refused."""

import json
import os
import pickle
import re
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from razor_attention import files

LAYERS = st.dictionaries(st.integers(0, 80), st.lists(st.integers(0, 63), min_size=1, unique=True), max_size=6)


def exactly(message):
    return f"^{re.escape(message)}\\Z"


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def canonical(layers):
    return {layer: sorted(layers[layer]) for layer in sorted(layers)}


# --- atomic writing


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("old", [b"old", None])
def test_a_crash_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing, error, old):
    path = tmp_path / "plan.json"
    if old is not None:
        path.write_bytes(old)

    def crash(*_):
        raise error

    def write(file):
        file.write(b"half of ")
        if failing == "write":
            crash()

    if failing == "fsync":
        monkeypatch.setattr(os, "fsync", crash)
    if failing == "replace":
        monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(error):
        files.write_atomic(path, write)
    assert [file.name for file in tmp_path.iterdir()] == ([] if old is None else ["plan.json"])
    assert old is None or path.read_bytes() == old


def test_the_file_is_synced_in_its_own_folder_before_it_gets_its_name(tmp_path, monkeypatch):
    seen = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(os.fstat(fd).st_size), sync(fd)))
    monkeypatch.setattr(Path, "replace", lambda self, to: (seen.append(self.parent), replace(self, to)))
    files.write_atomic(tmp_path / "a", lambda file: file.write(b"12345"))
    assert seen == [5, tmp_path]
    assert (tmp_path / "a").read_bytes() == b"12345"


def test_an_unwritable_old_file_is_replaced_and_modes_are_as_asked(tmp_path):
    path = tmp_path / "win.pt"
    path.write_bytes(b"old")
    path.chmod(0o400)
    files.write_atomic(path, lambda file: file.write(b"new"), mode=0o640)
    assert (path.read_bytes(), mode(path)) == (b"new", 0o640)
    umask = os.umask(0o027)
    try:
        files.write_atomic(path, lambda file: file.write(b"new"))
    finally:
        os.umask(umask)
    assert mode(path) == 0o640
    files.write_atomic(path, lambda file: file.write(b"new"))
    assert mode(path) == 0o666 & ~umask


def test_where_a_file_cannot_be(tmp_path):
    missing = tmp_path / "runs" / "plan.json"
    for path in (missing, tmp_path):
        with pytest.raises(ValueError, match=exactly(f"path: expected a file in an existing folder, got {path}")):
            files.write_atomic(path, lambda file: file.write(b""))
    assert list(tmp_path.iterdir()) == []


# --- JSON

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.text(), VALUES, max_size=4))
def test_json_comes_back_as_it_went(tmp_path_factory, obj):
    path = tmp_path_factory.mktemp("json") / "a.json"
    files.write_json(path, obj)
    assert files.read_json(path) == obj == json.loads(path.read_text())


@pytest.mark.parametrize(
    ("value", "got"),
    [
        ({1}, "Object of type set is not JSON serializable"),
        (float("nan"), "Out of range float values are not JSON compliant"),
    ],
)
def test_what_json_cannot_hold_leaves_no_file(tmp_path, value, got):
    with pytest.raises(TypeError, match=f"^obj: expected JSON values, got {got}"):
        files.write_json(tmp_path / "a.json", {"a": value})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("", "expected JSON, got Expecting value: line 1 column 1 (char 0)"),
        ('{"1": [2], "1": [3]}', "expected JSON, got a key given twice"),
        ("[1]", "expected a dict, got list"),
        ("[" * 100_000, "expected JSON, got maximum recursion depth exceeded"),
        ("{}", "expected format 'razor-attention plan', got None"),
        (
            '{"format": "razor-attention scores"}',
            "expected format 'razor-attention plan', got 'razor-attention scores'",
        ),
        ('{"format": "razor-attention plan", "version": 2}', "expected version 1, got 2"),
        ('{"format": "razor-attention plan"}', "expected version 1, got None"),
        ('{"format": "razor-attention plan", "version": 1}', "expected the key 'seed', got a file without it"),
    ],
)
def test_json_that_is_not_ours(tmp_path, text, got):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: {got}')}"):
        files.read_json(path, "plan", ("seed",))


def test_bytes_that_are_not_text(tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: expected JSON, got "):
        files.read_json(path)


# --- retrieval heads


@settings(max_examples=50, deadline=None)
@given(LAYERS, LAYERS)
def test_heads_files_are_plain_dicts_in_foreign_words(tmp_path_factory, induction, echo):
    path = tmp_path_factory.mktemp("heads") / "heads.pt"
    files.save_heads({"induction": induction, "echo": echo}, path)
    foreign = torch.load(path, weights_only=True)
    assert type(foreign) is dict
    assert foreign == {"prefix_matching": canonical(induction), "copying": canonical(echo)}
    assert list(foreign["copying"]) == sorted(echo)
    assert mode(path) == 0o640
    assert files.load_heads(path) == {"induction": canonical(induction), "echo": canonical(echo)}
    assert files.merge_heads(foreign) == files.merge_heads({"induction": induction, "echo": echo})


@settings(max_examples=50, deadline=None)
@given(LAYERS, LAYERS)
def test_the_union_of_two_lists(induction, echo):
    pairs = {(layer, head) for part in (induction, echo) for layer, row in part.items() for head in row}
    union = files.merge_heads({"induction": induction, "echo": echo})
    assert [(layer, head) for layer, row in union.items() for head in row] == sorted(pairs)
    assert all(union.values())
    assert files.merge_heads(union) == union
    assert files.merge_heads({"copying": echo, "prefix_matching": induction}) == union


def test_heads_written_elsewhere_in_any_order(tmp_path):
    path = tmp_path / "win.pt"  # upstream's examples use this name for both kinds
    torch.save({"copying": {}, "prefix_matching": {7: [3, 1], 2: [0], 5: []}}, path)
    assert files.load_heads(path) == {"induction": {2: [0], 7: [1, 3]}, "echo": {}}
    torch.save({"copying": {}, "prefix_matching": {}}, path, _use_new_zipfile_serialization=False)
    assert files.load_heads(path) == {"induction": {}, "echo": {}}


def test_golden_stick_files(tmp_path):
    path = tmp_path / "heads.json"
    path.write_text(json.dumps({"10": [3, 1], "2": [0], "3": []}, indent=3))
    assert files.load_heads(path) == {2: [0], 10: [1, 3]}
    files.save_heads({"induction": {10: [3], 2: [0]}, "echo": {10: [1]}}, path)
    assert json.loads(path.read_text()) == {"2": [0], "10": [1, 3]}
    assert mode(path) == 0o640
    files.save_heads(files.load_heads(path), path)
    assert files.load_heads(path) == {2: [0], 10: [1, 3]}


@pytest.mark.parametrize("key", ["-1", "01", "1.0", " 1", "", "a", "1e3", "٣", "9" * 5000])
def test_golden_stick_keys_are_layers(tmp_path, key):
    path = tmp_path / "heads.json"
    path.write_text(json.dumps({key: [0]}))
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: expected layer numbers as keys, got "):
        files.load_heads(path)


BAD_HEADS = [
    ([1], TypeError, "heads: expected a dict of layers, got list"),
    (None, TypeError, "heads: expected a dict of layers, got NoneType"),
    ({True: [1]}, ValueError, "heads: expected layers that are integers >= 0, got True"),
    ({-1: [1]}, ValueError, "heads: expected layers that are integers >= 0, got -1"),
    ({1.0: [1]}, ValueError, "heads: expected layers that are integers >= 0, got 1.0"),
    ({"1": [1]}, ValueError, "heads: expected layers that are integers >= 0, got '1'"),
    ({"induction": {}}, ValueError, "heads: expected layers that are integers >= 0, got 'induction'"),
    ({"induction": {}, "copying": {}}, ValueError, "heads: expected layers that are integers >= 0, got 'induction'"),
    ({"induction": {}, "echo": [1]}, TypeError, "heads['echo']: expected a dict of layers, got list"),
    (
        {"copying": {}, "prefix_matching": {-2: [1]}},
        ValueError,
        "heads['prefix_matching']: expected layers that are integers >= 0, got -2",
    ),
    ({3: (1, 2)}, ValueError, "heads[3]: expected a list of different kv heads >= 0, got (1, 2)"),
    ({3: 1}, ValueError, "heads[3]: expected a list of different kv heads >= 0, got 1"),
    ({3: [5, 1, 5]}, ValueError, "heads[3]: expected a list of different kv heads >= 0, got [5, 1, 5]"),
    ({3: [-1]}, ValueError, "heads[3]: expected a list of different kv heads >= 0, got [-1]"),
    ({3: [False]}, ValueError, "heads[3]: expected a list of different kv heads >= 0, got [False]"),
    ({3: [1.0]}, ValueError, "heads[3]: expected a list of different kv heads >= 0, got [1.0]"),
    ({3: [[1]]}, ValueError, "heads[3]: expected a list of different kv heads >= 0, got [[1]]"),
]


@pytest.mark.parametrize(("heads", "error", "message"), BAD_HEADS)
def test_heads_that_are_refused(tmp_path, heads, error, message):
    with pytest.raises(error, match=exactly(message)):
        files.merge_heads(heads)
    for name in ("heads.pt", "heads.json"):
        with pytest.raises(error, match=exactly(message)):
            files.save_heads(heads, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("row", [(1, 2), [1, 1], [-1], [True], [1.5], "12", None, {1}])
def test_files_are_checked_as_strictly(tmp_path, row):
    path = tmp_path / "heads.pt"
    torch.save({"prefix_matching": {}, "copying": {4: row}}, path)
    message = f"{path}['copying'][4]: expected a list of different kv heads >= 0, got {row!r}"
    with pytest.raises(ValueError, match=exactly(message)):
        files.load_heads(path)


def test_one_list_is_no_pair(tmp_path):
    message = "heads: expected the keys 'induction' and 'echo', got {0: [1]}"
    with pytest.raises(ValueError, match=exactly(message)):
        files.save_heads({0: [1]}, tmp_path / "heads.pt")


@pytest.mark.parametrize(
    "content", [{"prefix_matching": {}}, {"prefix_matching": {}, "copying": {}, "x": 1}, {0: [1]}, {}, [1], 3]
)
def test_files_without_the_two_keys(tmp_path, content):
    path = tmp_path / "heads.pt"
    torch.save(content, path)
    message = f"{path}: expected the keys 'prefix_matching' and 'copying', got "
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        files.load_heads(path)


# --- windows


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=12), st.booleans())
def test_windows_come_back_bit_for_bit(tmp_path_factory, values, per_layer):
    path = tmp_path_factory.mktemp("windows") / "win.pt"
    windows = torch.tensor([values, values[::-1]] if per_layer else values)
    files.save_windows(windows, path)
    stored = torch.load(path, weights_only=True)
    assert type(stored) is torch.Tensor
    for tensor in (stored, files.load_windows(path)):
        assert tensor.dtype == torch.int64
        assert torch.equal(tensor, windows)
    assert mode(path) == 0o640


def test_a_view_is_stored_without_what_it_views(tmp_path):
    files.save_windows(torch.arange(1_000_000)[::250_000], tmp_path / "win.pt")
    assert files.load_windows(tmp_path / "win.pt").tolist() == [0, 250_000, 500_000, 750_000]
    assert (tmp_path / "win.pt").stat().st_size < 4096


@pytest.mark.parametrize(
    ("windows", "got"),
    [
        (torch.ones(8), "torch.float32 [8]"),
        (torch.ones(8, dtype=torch.int32), "torch.int32 [8]"),
        (torch.ones(8, dtype=torch.bool), "torch.bool [8]"),
        (torch.tensor(3), "torch.int64 []"),
        (torch.ones(1, 2, 3, dtype=torch.int64), "torch.int64 [1, 2, 3]"),
        (torch.ones(0, dtype=torch.int64), "torch.int64 [0]"),
    ],
)
def test_windows_that_are_refused(tmp_path, windows, got):
    path = tmp_path / "win.pt"
    message = f"expected an int64 tensor [heads] or [layers, heads], got {got}"
    with pytest.raises(ValueError, match=exactly(f"windows: {message}")):
        files.save_windows(windows, path)
    assert list(tmp_path.iterdir()) == []
    torch.save(windows, path)
    with pytest.raises(ValueError, match=exactly(f"{path}: {message}")):
        files.load_windows(path)


def test_windows_must_be_a_tensor(tmp_path):
    with pytest.raises(TypeError, match=exactly("windows: expected an int64 tensor, got list")):
        files.save_windows([1, 2], tmp_path / "win.pt")
    torch.save([1, 2], tmp_path / "win.pt")
    with pytest.raises(TypeError, match=exactly(f"{tmp_path / 'win.pt'}: expected an int64 tensor, got list")):
        files.load_windows(tmp_path / "win.pt")


# --- told apart by content, and nothing is executed


def test_each_loader_names_the_other(tmp_path):
    path = tmp_path / "win.pt"
    files.save_windows(torch.tensor([3, 4]), path)
    message = f"{path}: expected retrieval heads, got a tensor; read windows with load_windows"
    with pytest.raises(ValueError, match=exactly(message)):
        files.load_heads(path)
    files.save_heads({"induction": {}, "echo": {}}, path)
    message = f"{path}: expected windows, got a dict; read retrieval heads with load_heads"
    with pytest.raises(ValueError, match=exactly(message)):
        files.load_windows(path)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("load", [files.load_heads, files.load_windows])
@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
def test_a_malicious_file_is_refused_before_it_does_anything(tmp_path, load, form):
    path, trace = tmp_path / "heads.pt", tmp_path / "executed"
    content = {"prefix_matching": {}, "copying": Malicious(trace)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    message = f"{path}: expected a torch file of plain values, got UnpicklingError"
    with pytest.raises(ValueError, match=exactly(message)):
        load(path)
    assert not trace.exists()


@pytest.mark.parametrize("load", [files.load_heads, files.load_windows])
@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04 cut off", b"\x80\x02."])
def test_corrupt_files(tmp_path, load, content):
    path = tmp_path / "heads.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: expected a torch file of plain values, got "):
        load(path)


def test_every_truncation_of_a_file_is_refused(tmp_path):
    path = tmp_path / "heads.pt"
    files.save_heads({"induction": {0: [1]}, "echo": {}}, path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="expected a torch file of plain values"):
            files.load_heads(path)


@pytest.mark.parametrize("load", [files.load_heads, files.load_windows, files.read_json])
def test_a_missing_file_is_an_os_error(tmp_path, load):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "missing.pt")
