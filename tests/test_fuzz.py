"""Every file that is read, broken at random: nothing but the documented errors, in one line that names the
file; no hang, no memory beyond MEMORY, nothing written. What is read all the same must also run.

    python -m pytest tests/test_fuzz.py                 FUZZ mutations of each format, always the same ones
    FUZZ=2000 python -m pytest tests/test_fuzz.py       as many as are promised
"""

import copy
import ctypes
import json
import os
import resource
import signal
from collections import Counter

import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import data
from make_task import tokenizer_of
from data import Tokenizer
from eval import read_state
from model import LLaMA, write_json
from vae import LatentReasoner

FUZZ = int(os.environ.get("FUZZ", 120))
MEMORY = 2**29  # bytes of address space that reading one file may add
SECONDS = 10    # for one file

VALUES = [None, True, False, 0, 1, -1, 2, 3, 7, 2**24, 2**31, 2**63, 2**64, 10**20, 10**400, 0.0, 0.5, -0.0,
          1e-300, 1e30, 1e308, float("nan"), float("inf"), "", "a", "5", "\n", "\0", "\ud800", "../x", "/x",
          "é" * 300, "x" * 10**5, [], {}, [[]], [None], [0], [1, 2], [2**62, 2**62], ["a", "b"], {"a": 1},
          {"": None}, "llama3", "default", "F32", "BF16", "I64", "BOOL", "F8_E4M3", "F4", "####", "<<1/0=1>>",
          "(" * 1000, "||", "-1e5", "(?=(a+))+\\1x"]
NAMES = ["", "a", "\n", "\0", "__metadata__", "dtype", "rope_scaling", "rope_type", "head_dim", "unk_token",
         "input", "target", "add_bos_token", "byte_fallback", "post_processor", "special"]
JUNK = [b"\0", b"\xef\xbb\xbf", b"\r\n", b"\r", b"\n", b"\xff", b"\xed\xa0\x80", b"\x85", b"{", b"}", b"[",
        b"]", b'"', b",", b":", b"[" * 5000, b'{"a":' * 5000, b"9" * 5000, b"1e999999999", b"NaN",
        b"\\ud800", b"\\u0000", b"-", b"#", b"<<", b">>", b"||", b" " * 5000, b"\n" * 5000, b"(" * 5000,
        b"null", b"\xff" * 8, (2**62).to_bytes(8, "little"), b"\xe2\x80\xa8", b"version https://git-lfs"]
place = st.floats(0, 1, exclude_max=True)
BYTES = st.tuples(
    st.sampled_from(["flip", "cut", "drop", "double", "insert", "overwrite", "crlf", "head"]), place, place,
    st.integers(0, 7), st.sampled_from(JUNK))
JSON = st.tuples(
    st.sampled_from(["set", "set", "set", "delete", "rename", "wrap", "deep"]),
    st.lists(st.integers(0, 999), min_size=1, max_size=6), st.sampled_from(VALUES), st.sampled_from(NAMES),
    st.integers(1, 990))


def mutate_bytes(raw, how):
    kind, a, b, bit, junk = how
    if kind == "head":  # a flip where the structure is, not in the bulk of the tensors
        kind, a = "flip", a * min(1, 64 / max(1, len(raw)))
    i = int(a * len(raw))
    j = i + 1 + int(b ** 4 * (len(raw) - i))  # mostly short slices
    if kind == "flip":
        return raw[:i] + bytes([raw[i] ^ 1 << bit]) + raw[i + 1:] if raw else raw
    return {"cut": raw[:i], "drop": raw[:i] + raw[j:], "double": raw[:j] + raw[i:],
            "insert": raw[:i] + junk + raw[i:], "overwrite": raw[:i] + junk + raw[i + len(junk):],
            "crlf": raw.replace(b"\n", b"\r\n")}[kind]


def mutate_json(value, how):
    """A place of a JSON value, found by a walk from the root, is set anew, deleted, renamed or nested."""
    kind, walk, new, name, depth = how
    box = [copy.deepcopy(value)]
    parent, key = box, 0
    for step in walk:
        child = parent[key]
        if not isinstance(child, (dict, list)) or not child:
            break
        parent, key = child, step % len(child) if isinstance(child, list) else list(child)[step % len(child)]
    if kind == "delete" and parent is not box:
        del parent[key]
    elif kind == "rename" and isinstance(parent, dict):
        parent[name] = parent.pop(key)
    elif kind == "wrap":
        parent[key] = [parent[key]]
    elif kind == "deep":
        for _ in range(depth):
            parent[key] = [parent[key]]
    else:
        parent[key] = new
    return box[0]


def as_json(raw, how):
    return json.dumps(mutate_json(json.loads(raw), how)).encode()


def as_lines(raw, how):
    """One line of a jsonl file."""
    lines = raw.splitlines()
    i = how[1][-1] % len(lines)
    lines[i] = as_json(lines[i], how)
    return b"\n".join(lines)


def as_header(raw, how):
    """The header of a safetensors file, its length put right."""
    n = 8 + int.from_bytes(raw[:8], "little")
    header = as_json(raw[8:n], how)
    return len(header).to_bytes(8, "little") + header + raw[n:]


# --- the formats: what makes a valid folder, and what reads it ---

def llama(folder):
    net = oracle.tiny("nocot").policy
    net.config.rope_scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    net.save_pretrained(folder)
    return net


def sharded(folder):
    tensors = {k: v.contiguous() for k, v in llama(folder).disk_parts().items()}
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, part in shards.items():
        save_file({n: tensors[n] for n in part}, folder / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": {n: s for s, part in shards.items() for n in part}}
    write_json(folder / "model.safetensors.index.json", index)


def checkpoint(folder):
    oracle.tiny().save_pretrained(folder)
    state = {"config": {"method": "atp", "seed": 0}, "step": 3, "logged": 0}
    write_json(folder / "train.json", state)


def bpe(folder):
    words = [*(bytes([b]) for b in range(256)), b"ab", b"abc", b" ab"]
    tokenizer = tokenizer_of(words, r" ?[a-z]+|\s+(?!\S)|[0-9]", ["<eos>", "<x>"])
    tokenizer.add_special("<|start-latent|>")
    tokenizer.file["added_tokens"].append({"id": tokenizer.vocab_size, "content": "  ", "special": False})
    tokenizer.file["post_processor"] = {
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<x>"}}, {"Sequence": {"id": "A"}}],
        "special_tokens": {"<x>": {"id": "<x>", "ids": [tokenizer.special["<x>"]], "tokens": ["<x>"]}}}
    tokenizer.save_pretrained(folder)


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def lines(name, *items):
    return text(name, "".join(json.dumps(item) + "\n" for item in items))


def read_llama(folder):
    net = LLaMA.from_pretrained(folder)
    net(torch.tensor([[1, 2, 3]]) % net.config.vocab_size)


def read_tokenizer(folder):
    tokenizer = Tokenizer.from_pretrained(folder)
    tokenizer.add_special("<|end-latent|>")
    tokenizer.decode(tokenizer.encode_ordinary("hello ab 12\n<x>"))
    assert tokenizer.vocab_size <= 2**24 + 1  # the embedding grows to it; one token was added


def read_reasoner(folder):
    LatentReasoner.from_pretrained(folder).rollout([[1, 2], [3]], max_tokens=3)


GSM = [{"question": f"How many {i}?", "answer": f"It is {i}+2=<<{i}+2={i + 2}>>{i + 2}.\n#### {i + 2},000"}
       for i in range(3)]
COCONUT = [{"question": " How many?", "steps": ["<<5*3=15>>", "<<15+$2=17>>"], "answer": "1,017.0"},
           {"question": "Why?", "steps": [], "answer": 5}]
COT = [{"question": "How many?", "cot": "<<5*3=15>> <<15+2=17>>", "answer": "17"},
       {"problem": "Why?", "answer": "5"}]
HARD = [{"input": "How many?", "code": "x", "target": 2.5e-06}, {"input": "q", "target": 5}]
ARITH = [{"input": "How many?", "target": "5"}, {"input": "q", "target": 7.0}]
SVAMP = [{"Body": "He had 3.", "Question": "How many?", "Equation": "( ( 8.0 + 2.5 ) - 3.0 )",
          "Answer": 7.5}] * 2
AUG = "How many?||<<600*30/100=180>> <<600-180=420>> #### 420\nWhy?||<<1+2=3>> #### -3.50\n"
FORMATS = {  # file -> (valid folder, structure, reader)
    "model.safetensors": (llama, as_header, read_llama),
    "a.safetensors": (sharded, as_header, read_llama),
    "model.safetensors.index.json": (sharded, as_json, read_llama),
    "config.json": (llama, as_json, read_llama),
    "heads.safetensors": (checkpoint, as_header, read_reasoner),
    "latent.json": (checkpoint, as_json, read_reasoner),
    "./config.json": (checkpoint, as_json, read_reasoner),
    "train.json": (checkpoint, as_json, read_state),
    "tokenizer.json": (bpe, as_json, read_tokenizer),
    "tokenizer_config.json": (bpe, as_json, read_tokenizer),
    "gsm8k.jsonl": (lines("gsm8k.jsonl", *GSM), as_lines, None),
    "gsm_hard.jsonl": (lines("gsm_hard.jsonl", *HARD), as_lines, None),
    "multiarith.jsonl": (lines("multiarith.jsonl", *ARITH), as_lines, None),
    "gsm_coconut.json": (text("gsm_coconut.json", json.dumps(COCONUT, indent=1)), as_json, None),
    "gsm_cot.jsonl": (lines("gsm_cot.jsonl", *COT), as_lines, None),
    "svamp.json": (text("svamp.json", json.dumps(SVAMP, indent=1)), as_json, None),
    "gsm8k_aug.txt": (text("gsm8k_aug.txt", AUG), None, None),
}


# --- the bounds ---

@pytest.fixture
def bounds():
    """Within, address space may grow by MEMORY and each call of the returned function starts SECONDS anew."""
    def late(*_):
        pytest.fail(f"took more than {SECONDS} s")
    lines = open("/proc/self/status").read().splitlines()
    size = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmSize"))
    limits, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, limits[1]))
    yield lambda: signal.setitimer(signal.ITIMER_REAL, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, handler)
    resource.setrlimit(resource.RLIMIT_AS, limits)


def free_heap():
    """Bytes of address space that malloc holds for reuse: train.main keeps freed blocks, in whatever test ran it."""
    class Mallinfo2(ctypes.Structure):
        _fields_ = [(f"field{i}", ctypes.c_size_t) for i in range(10)]

    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Mallinfo2
    return libc.mallinfo2().field8  # fordblks


def test_the_memory_bound_holds(bounds):
    with pytest.raises(RuntimeError):
        torch.empty(2 * MEMORY + free_heap(), dtype=torch.uint8)
    torch.empty(MEMORY // 4, dtype=torch.uint8)


def state(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


@pytest.mark.parametrize("file", FORMATS)
def test_fuzz(file, tmp_path, request):
    make, structure, read = FORMATS[file]
    make(tmp_path)
    path, seen = tmp_path / file, Counter()
    raw = path.read_bytes()
    read = read or (lambda folder: data.read_file(path))
    read(tmp_path)  # a valid one is read; and what a first use costs is not counted
    start_clock = request.getfixturevalue("bounds")

    @settings(max_examples=FUZZ, derandomize=True, deadline=None, database=None,
              suppress_health_check=list(HealthCheck))
    @given(st.lists(JSON, max_size=2) if structure else st.just([]), st.lists(BYTES, max_size=3))
    def broken(structured, raw_changes):
        content = raw
        for how in structured:
            content = structure(content, how)
        # after two changes of the bytes most files would never reach the structure
        for how in raw_changes if not structured else raw_changes[2:]:
            content = mutate_bytes(content, how)
        path.write_bytes(content)
        before = state(tmp_path)
        start_clock()
        try:
            read(tmp_path)
            seen["read"] += 1
        except (ValueError, FileNotFoundError) as error:
            message = str(error)
            assert message.isprintable() and str(tmp_path) in message and len(message) < 1000, message[:1000]
            seen["refused"] += 1
        assert state(tmp_path) == before

    broken()
    assert sum(seen.values()) >= FUZZ and seen["refused"] > FUZZ / 4 and seen["read"], seen
