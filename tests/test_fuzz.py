"""Every format that is read, broken at random: it is read, or refused in one line that names the file.

    FUZZ=2000 python -m pytest -q tests/test_fuzz.py       so many mutations a format (the suite: 60)

Bounds: 10 s a mutation, and 300 MB of memory over all mutations of a format.
"""

import base64
import json
import os
import resource
import shutil
import time
from pathlib import Path

import naive
import pytest
from data import Tokenizer, builtin_tokenizer, read_file
from eval import read_state
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model import LLaMA
from vae import LatentReasoner

SPLICES = [b"\0", b"\xef\xbb\xbf", b"\r\n", b"\n", b"\xff\xfe", b"\xed\xa0\x80", b"\\ud800", b"null", b"-1", b"0", b"NaN",
           b"1e999", b"1e-999", b"9" * 30, b"9" * 5000, b"1" + b"0" * 12, b"[" * 3000, b"{" * 3000, b"]", b"}", b'"', b",",
           b"<<", b">>", b"####", b"||", b"((", b"a" * 70_000, "\u0660\u00b2\U0001d7d8".encode(), b"../", b"true", b"{}"]
VALUES = [None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**30, 1e300, -0.5, float("nan"), float("inf"), "", "x", "../x",
          "\0", "9" * 400, [], {}, [None], {"a": 1}, [[1]], [[[[[]]]]]]
place = st.floats(0, 1, exclude_max=True)
byte_edit = st.tuples(st.sampled_from(["flip", "cut", "delete", "double", "splice", "crlf"]), place, place,
                      st.integers(0, 7), st.sampled_from(SPLICES))
json_edit = st.tuples(st.just("value"), place, place, st.integers(0, 2), st.sampled_from(VALUES))


def holders(value):
    """Every (container, key) of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for k, v in list(items) for found in [(value, k), *holders(v)]]


def change_value(raw, edit):
    """Replace, remove or double one value of a JSON text."""
    _, at, _, how, value = edit
    try:
        tree = json.loads(raw)
    except (ValueError, RecursionError):
        return raw
    places = holders(tree)
    if not places:
        return raw
    holder, key = places[int(at * len(places))]
    if how == 0:
        holder[key] = value
    elif how == 1:
        del holder[key]
    elif isinstance(holder, list):
        holder.append(holder[key])
    else:
        holder[f"{key}x"] = holder[key]
    return json.dumps(tree).encode()


def mutate(raw, edits):
    for edit in edits:
        kind, a, b, bit, splice = edit
        i, j = sorted((int(a * (len(raw) + 1)), int(b * (len(raw) + 1))))
        if kind == "value" and raw.lstrip()[:1] in (b"{", b"["):
            raw = change_value(raw, edit)
        elif kind == "flip" and i < len(raw):
            raw = raw[:i] + bytes([raw[i] ^ 1 << bit]) + raw[i + 1:]
        elif kind == "cut":
            raw = raw[:i]
        elif kind == "delete":
            raw = raw[:i] + raw[i + (j - i) % 64:]
        elif kind == "double":
            raw = raw[:j] + raw[i:j] + raw[j:]
        elif kind == "splice":
            raw = raw[:i] + splice + raw[i:]
        elif kind == "crlf":
            raw = raw.replace(b"\n", b"\r\n")
    return raw


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with one good file of each format."""
    out = tmp_path_factory.mktemp("whole")
    model = naive.tiny()
    model.save_pretrained(out / "model")
    tokenizer = builtin_tokenizer()
    tokenizer.save_pretrained(out / "model")
    (out / "model" / "train.json").write_text(json.dumps({"config": {"method": "atp", "seed": 0}, "step": 3, "best": {}}))
    shutil.copytree(out / "model", out / "sharded")
    (out / "sharded" / "model.safetensors").rename(out / "sharded" / "shard-1.safetensors")
    names = model.policy.disk_parts()
    (out / "sharded" / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "shard-1.safetensors")}))
    (out / "tiktoken").mkdir()
    words = [bytes([i]) for i in range(256)] + [b"he", b"ll", b"hell"]
    (out / "tiktoken" / "tokenizer.model").write_bytes(
        b"".join(base64.b64encode(w) + b" %d\n" % i for i, w in enumerate(words)))
    step = {"question": "Ann has 3 pens.\nHow many?", "answer": "She has <<3+4=7>>7.\n#### 7"}
    files = {"gsm8k.jsonl": [step, {**step, "answer": "#### 1,000"}],
             "pal.jsonl": [{"input": "How many?", "target": 51.5}, {"input": "And now?", "target": -3}]}
    for name, rows in files.items():
        (out / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
    (out / "aug.txt").write_text("Ann has 3. How many?||<<3+4=7>> <<7*2=14>> #### 14\nAnd Ben?||<<1+1=2>> #### 2\n")
    svamp = {"Body": "A pack costs $ 76", "Question": "How much?", "Equation": "( 76.0 - 25.0 )", "Answer": 51.0}
    (out / "svamp.json").write_text(json.dumps([svamp, svamp], indent=1))
    return out


FORMATS = {  # the file to break, in a folder that is copied whole; who reads it
    "model/model.safetensors": (LLaMA.from_pretrained, "model"),
    "model/config.json": (LLaMA.from_pretrained, "model"),
    "sharded/model.safetensors.index.json": (LLaMA.from_pretrained, "sharded"),
    "model/heads.safetensors": (LatentReasoner.from_pretrained, "model"),
    "model/latent.json": (LatentReasoner.from_pretrained, "model"),
    "model/train.json": (read_state, "model"),
    "model/tokenizer.json": (Tokenizer.from_pretrained, "model"),
    "tiktoken/tokenizer.model": (Tokenizer.from_pretrained, "tiktoken"),
    "gsm8k.jsonl": (read_file, "gsm8k.jsonl"),
    "pal.jsonl": (read_file, "pal.jsonl"),
    "aug.txt": (read_file, "aug.txt"),
    "svamp.json": (read_file, "svamp.json"),
}


def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.parametrize("name", FORMATS)
def test_broken_files_are_read_or_refused_in_one_line(whole, tmp_path, name):
    read, path = FORMATS[name]
    shutil.copytree(whole, tmp_path / "copy")
    file = tmp_path / "copy" / name
    raw = file.read_bytes()
    read(tmp_path / "copy" / path)  # unbroken
    there = sorted(tmp_path.rglob("*"))
    counts, before = {"read": 0, "refused": 0}, peak_mb()

    @settings(max_examples=int(os.environ.get("FUZZ", 60)), derandomize=True, deadline=None, database=None,
              suppress_health_check=list(HealthCheck))
    @given(st.lists(st.one_of(byte_edit, json_edit), min_size=1, max_size=3))
    def check(edits):
        file.write_bytes(mutate(raw, edits))
        began = time.monotonic()
        try:
            read(tmp_path / "copy" / path)
            counts["read"] += 1
        except (ValueError, FileNotFoundError) as error:
            counts["refused"] += 1
            said = str(error)
            assert "\n" not in said and str(tmp_path / "copy" / path) in said and len(said) < 1000, said
        assert time.monotonic() - began < 10

    check()
    assert counts["refused"] > 5, counts
    assert peak_mb() - before < 300
    assert sorted(tmp_path.rglob("*")) == there  # nothing written


def test_mutations_change_files(whole):
    """The tool itself: each kind of edit does what it says."""
    raw = b'{"a": [1, 2], "b": "x"}\n'
    edit = lambda kind, a=0.5, b=0.6, bit=0, splice=b"\0": mutate(raw, [(kind, a, b, bit, splice)])
    assert edit("cut") == raw[:12] and edit("splice", 0.0) == b"\0" + raw and edit("crlf").endswith(b"}\r\n")
    assert len(edit("double")) > len(raw) > len(edit("delete")) and sum(x != y for x, y in zip(edit("flip"), raw)) == 1
    assert json.loads(edit("value", 0.0, bit=0, splice=None)) == {"a": None, "b": "x"}
    assert json.loads(edit("value", 0.9, bit=1)) == {"a": [1, 2]}
    assert Path(whole / "model" / "heads.safetensors").exists()
