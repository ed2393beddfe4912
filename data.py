"""Questions, answers and tokens: answer check, readers, tokenizer, built-in task, encoding, downloads.

    python data.py gsm8k svamp [--from DIR]     download these and check their SHA-256 (copy what DIR has)
"""
import argparse
import base64
import functools
import hashlib
import json
import random
import re
import sys
import urllib.request
import zlib
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import tiktoken


# --- examples and the answer check ---

@dataclass(frozen=True)
class Example:
    question: str
    steps: tuple[str, ...]  # "<<48/2=24>>" each; () where the source gives none
    answer: str  # a plain decimal number: "72", "-3.5"
    id: str  # file name and line (or item) from 1: "gsm8k_test.jsonl:17"


MAX_NUMBER = 64  # characters
DIGITS = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
NUMBER = re.compile(rf"((?:[-+]?\$?|\$[-+]){DIGITS})%?\.?")
ANSWER = re.compile(rf"(?:\*\*)?(?:\\boxed\{{)?([-+]?(?:[$€£] ?)?[-+]?{DIGITS})%?[*}}.,;:!?)]*(?!\S)")
STEP = re.compile(r"<<([^<>=\n]*)=([^<>=\n]*)>>")
TERM = re.compile(rf"(?:^|(?!^)(?://|[-+*/x×÷])) ?(?:[-+]? ?\( ?)*([-+]?) ?\$?({DIGITS})%?(?: ?\))* ?")


def parse_number(text):
    """The Decimal that `text` is ("1,000", "$72", "72%", "-3.5", ".5", "72."), else None."""
    text = text.strip()
    match = NUMBER.fullmatch(text) if len(text) <= MAX_NUMBER else None
    return Decimal(re.sub("[$,]", "", match[1])) if match else None


def format_number(number):
    """The shortest plain form: 51.0 -> "51"."""
    text = format(number, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def numbers_equal(a, b):
    """|a - b| < 1e-3, as in PAL's evaluation of GSM-Hard."""
    return abs(a - b) < Decimal("0.001")


def extract_answer(text):
    """The number after the last "###" or "####" in plain form, or None: "### $ 72, in total" -> "72"."""
    _, marker, rest = text.rpartition("###")
    match = ANSWER.match(rest.lstrip()[:2 * MAX_NUMBER].replace("−", "-")) if marker else None
    number = parse_number(re.sub("[$€£ ]", "", match[1])) if match else None
    return None if number is None else format_number(number)


def is_correct(text, example):
    """Whether the generated `text` gives the example's answer."""
    answer = extract_answer(text)
    return answer is not None and numbers_equal(Decimal(answer), Decimal(example.answer))


def well_formed(text):
    """Whether `text` is "### <number>" and nothing else."""
    marker, _, number = text.strip().partition(" ")
    return marker == "###" and number == number.lstrip() and parse_number(number) is not None


def parse_step(text):
    """"<<48/2=24>>" -> ([48, 2], 24), or None. Several brackets give all operands and the last result."""
    text = " ".join(text.replace("−", "-").split())
    if STEP.sub("", text).strip():
        return None
    operands, result = [], None
    for expression, last in STEP.findall(text):
        result, depth, end = parse_number(last), 0, 0
        while depth >= 0 and (term := TERM.match(expression, end)):
            depth += term[0].count("(") - term[0].count(")")
            operands.append(parse_number(term[1] + term[2]))
            end = term.end()
        if depth or not end or end < len(expression) or result is None or None in operands:
            return None
    return None if result is None else (operands, result)


# --- readers ---

# name -> split -> [file, SHA-256, address]
DATASETS = json.loads(Path(__file__).with_name("assets").joinpath("datasets.json").read_text())
HELD_OUT = 500  # items at the end of "train" that are "valid" where a dataset has none
FORMS = [  # keys of an item; the last is the answer
    ("question", "answer"),  # GSM8K; with "steps" Coconut, ATP-Latent; with "cot" GSM8K-Aug on hubs
    ("problem", "answer"), ("input", "target"),  # the latter: PAL's GSM-Hard and MultiArith
    ("Body", "Question", "Equation", "Answer")]  # SVAMP
_json = functools.partial(json.loads, parse_float=Decimal)


def load(name, split, data_dir="data"):
    """The examples of one split ("train", "valid", "test") of a dataset, or of a user's file: "test" is all
    of it, "valid" the last 5 % (1 to HELD_OUT items), "train" the rest."""
    if name in BUILTIN:
        return builtin(name, split)
    is_own = name not in DATASETS
    files = {"train": [name], "test": [name]} if is_own else DATASETS[name]
    source = "train" if split == "valid" and "valid" not in files else split
    if source not in files:
        raise ValueError(f"{name} has no split '{split}'")
    path = Path("" if is_own else data_dir, files[source][0])
    if not path.is_file():
        raise FileNotFoundError(f"no dataset and no file '{path}'; run `python data.py {name} --data_dir "
                                f"{data_dir}` for a dataset: {', '.join(DATASETS)}")
    examples = read_file(path, skip_bad=name == "gsm8k_aug" and split == "train")
    if split == "test" or "valid" in files:
        return examples
    held_out = max(1, min(HELD_OUT, len(examples) // 20)) if is_own else HELD_OUT
    return examples[-held_out:] if split == "valid" else examples[:-held_out]


def read_file(path, skip_bad=False):
    """The examples of a JSON array or of lines. ValueError "file:line: what is wrong" at a bad item."""
    path, examples = Path(path), []
    text = path.read_text("utf-8-sig", "surrogateescape")  # `parse` refuses what is no UTF-8
    try:
        items = _json(text) if text.lstrip().startswith("[") else text.split("\n")
    except Exception as error:
        raise ValueError(f"{path}: broken JSON ({error})") from None
    for number, item in enumerate(items, 1):
        if isinstance(item, str) and not item.strip():
            continue
        try:
            examples.append(Example(*parse(item), f"{path.name}:{number}"))
        except Exception as error:
            if not skip_bad:
                raise ValueError(f"{path}:{number}: {error}") from None
            print(f"note: left out {path}:{number}: {error}", file=sys.stderr)
    if not examples:
        raise ValueError(f"{path} is empty")
    return examples


def parse(item):
    """A line (JSON, or "question||<<48/2=24>> #### 24") or a dict of FORMS -> (question, steps, answer)."""
    if isinstance(item, str) and item.lstrip().startswith("{"):
        item = _json(item)
    elif isinstance(item, str):
        question, _, answer = item.rpartition("||")
        item = {"question": question, "answer": answer}
    keys = next((form for form in FORMS if isinstance(item, dict) and item.keys() >= set(form)), None)
    if keys is None:
        raise ValueError(f"neither 'question||<<..>> #### answer' nor an object with keys as {FORMS}")
    question, answer = item[keys[0]].strip(), item[keys[-1]]
    if isinstance(answer, Decimal) and abs(answer.adjusted()) < MAX_NUMBER:
        answer = format(answer, "f")  # no exponent; "1e999999999" would fill the memory
    text, _, answer = str(answer).rpartition("####")
    number = parse_number(answer)
    if number is None or not question:
        raise ValueError(f"no question, or its answer {answer!r:.40} is no number")
    answer, solution = format_number(number), item.get("steps") or item.get("cot") or text
    if keys[0] == "Body":  # as in PAL's copy
        question += ("" if question[-1] in ".?!" else ".") + " " + item["Question"].strip()
        solution = "<<" + re.sub(r"\.0+(?![0-9])|\s+", "", item["Equation"]) + f"={answer}>>"
    if isinstance(solution, list):
        solution = " ".join(solution)  # Coconut's files cut "<<5 * 3=15>>" at its blanks
    steps = re.findall(r"<<[^<>\n]*>>", solution)
    "".join([question, *steps]).encode()  # a lone surrogate is a ValueError
    return question, tuple(steps), answer


# --- tokenizer ---

# How text is cut into pieces, within which bytes are merged. DIGITS_PATTERN also cuts at every digit.
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT2_PATTERN = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS_PATTERN = GPT2_PATTERN.replace(r" ?\p{N}+", r"\p{N}").replace(r"(?!\S)", r"(?![^\s\p{N}])")
LLAMA3_SPECIAL = [f"<|{name}|>" for name in [
    "begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
    "finetune_right_pad_id", "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag",
    *(f"reserved_special_token_{i}" for i in range(2, 247))]]
EOS_NAMES = ("<|end_of_text|>", "<|im_end|>", "<|endoftext|>", "<eos>")
MAX_TEXT = 250_000  # characters; millions of blanks overflow the stack of tiktoken's regex engine
MAX_ID = 2**24
BYTES = [bytes([b]) for b in range(256)]
# tokenizer.json writes each byte as one printable character, by GPT-2's table
_others = [b for b in range(256) if not chr(b).isprintable() or b == 0x20]
BYTE_TO_CHAR = {b: chr(256 + _others.index(b) if b in _others else b) for b in range(256)}
CHAR_TO_BYTE = {ord(c): b for b, c in BYTE_TO_CHAR.items()}


class Tokenizer:
    """Byte-level BPE by tiktoken, whose ranks are the ids of a tokenizer.json.

    special: {name: id}; vocab_size: highest id + 1; bos_id, eos_id: int or None.
    """

    def __init__(self, file, special=()):
        """file: the content of a tokenizer.json; special: names of tokens to add."""
        self.file, vocab, merges = file, file["model"]["vocab"], file["model"]["merges"]
        self.special = {token["content"]: token["id"] for token in file["added_tokens"]}
        ids = sorted((vocab | self.special).values())
        if {*map(type, ids)} != {int} or ids != sorted({*ids}) or not 0 <= ids[0] <= ids[-1] < MAX_ID:
            raise ValueError("ids are doubled, or no integers below 2**24")
        tokens = {name.translate(CHAR_TO_BYTE).encode("latin-1"): id for name, id in vocab.items()
                  if name not in self.special}
        self._bytes = {id: token for token, id in tokens.items()}
        self._bytes |= {id: name.encode() for name, id in self.special.items()}
        made = [vocab[a + b] for a, b in (m.split(" ") if isinstance(m, str) else m for m in merges)]
        if made != sorted(made):  # Hugging Face merges in their order, tiktoken by id
            raise ValueError("merges whose ids do not ascend are not supported")
        if file.get("normalizer") and file["normalizer"].get("normalizers") != []:
            raise ValueError("a normalizer is not supported")
        # tiktoken needs every byte; encode_ordinary drops those that the vocabulary lacks
        ranks = {byte: MAX_ID + byte[0] for byte in BYTES} | tokens
        pattern = _pattern(file["pre_tokenizer"])
        self._bpe = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.vocab_size = ids[-1] + 1
        self.add_special(*special)
        self.bos_id = self.special.get("<|begin_of_text|>")
        self.eos_id = next((self.special[name] for name in EOS_NAMES if name in self.special), None)

    @classmethod
    def from_pretrained(cls, directory):
        """Read [original/]tokenizer.model (Llama 3's), else tokenizer.json.

        eos is tokenizer_config.json's, else the first of config.json, else one of EOS_NAMES.
        """
        names = ("original/tokenizer.model", "tokenizer.model", "tokenizer.json")
        path = next((path for name in names if (path := Path(directory, name)).is_file()), None)
        if path is None:
            raise FileNotFoundError(f"{directory} has none of {', '.join(names)}")

        def read(name):
            nonlocal path
            path = Path(directory, name)
            return json.loads(path.read_bytes()) if path.is_file() else {}

        try:
            self = cls(read(path.name)) if path.suffix == ".json" else cls._from_llama3(path)
            stated = read("tokenizer_config.json")
            for key in ("bos_token", "eos_token"):
                if name := stated.get(key):
                    name = name["content"] if isinstance(name, dict) else name
                    setattr(self, key.replace("token", "id"), self.special[name])
            ends = read("config.json").get("eos_token_id")
            if ends is not None and not stated.get("eos_token"):
                self.eos_id = ends[0] if isinstance(ends, list) else ends
                if self.eos_id not in self.special.values():
                    raise ValueError(f"eos_token_id {self.eos_id} is no special token")
        except Exception as error:
            raise ValueError(f"{path} is broken or not supported: {error!r:.300}") from None
        return self

    @classmethod
    def _from_llama3(cls, path):
        """Read lines of "base64 rank"."""
        pairs = [line.split(b" ") for line in path.read_bytes().splitlines()]
        tokens = [base64.b64decode(token, validate=True) for token, _ in pairs]
        if [int(rank) for _, rank in pairs] != list(range(len(tokens))) or not {*BYTES} <= {*tokens}:
            raise ValueError("a rank or a single byte is missing; download the file again")
        return cls.from_tokens(tokens, LLAMA3_PATTERN, LLAMA3_SPECIAL)

    @classmethod
    def from_tokens(cls, tokens, pattern, special):
        """tokens: bytes, each single byte among them. Ids are in order, those of `special` (names) last.
        pattern: regex that cuts text into pieces, within which any two that spell a token are merged."""
        tokens = [token.decode("latin-1").translate(BYTE_TO_CHAR) for token in tokens]
        vocab = {token: id for id, token in enumerate(tokens)}
        merges = [(token[:i], token[i:]) for token in tokens for i in range(1, len(token))
                  if token[:i] in vocab and token[i:] in vocab]
        byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
        split = dict(type="Split", pattern={"Regex": pattern}, behavior="Isolated", invert=False)
        return cls({
            "version": "1.0", "model": dict(type="BPE", ignore_merges=True, vocab=vocab, merges=merges),
            "pre_tokenizer": dict(type="Sequence", pretokenizers=[split, byte_level]), "decoder": byte_level,
            "added_tokens": []}, special)

    def save_pretrained(self, directory):
        """Write tokenizer.json and tokenizer_config.json, which transformers reads as well."""
        names = {id: name for name, id in self.special.items()}
        stated = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": names.get(self.bos_id),
                  "eos_token": names.get(self.eos_id)}
        Path(directory).mkdir(parents=True, exist_ok=True)
        Path(directory, "tokenizer.json").write_text(json.dumps(self.file))
        Path(directory, "tokenizer_config.json").write_text(json.dumps(stated))

    def encode_ordinary(self, text):
        """Text -> ids, never a special token's: data must not be able to inject one."""
        try:
            return [id for id in self._bpe.encode_ordinary(text) if id < MAX_ID]
        except BaseException as error:  # a panic of Rust's at a bad pattern is no Exception
            if isinstance(error, (Exception, KeyboardInterrupt)):
                raise
            raise ValueError(f"the tokenizer's pattern fails on {text!r:.40}") from None

    def decode(self, ids):
        """Ids -> text; U+FFFD stands for broken UTF-8 and for ids that no token has."""
        return b"".join(self._bytes.get(int(id), b"\xff") for id in ids).decode(errors="replace")

    def end_id(self):
        """eos_id. Raises ValueError where there is none."""
        if self.eos_id is None:
            raise ValueError("the tokenizer has no end token; name an eos_token in tokenizer_config.json")
        return self.eos_id

    def add_special(self, *names):
        """The ids of these special tokens; unknown ones are appended at the end of the id space."""
        flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
        for name in names:
            if name not in self.special:
                id = self.special[name] = self.vocab_size
                self.file["added_tokens"].append({"id": id, "content": name, "special": True, **flags})
                self._bytes[id] = name.encode()
                self.vocab_size += 1
        return [self.special[name] for name in names]


def _pattern(pre):
    """The one regex that cuts text as the pre-tokenizers of a tokenizer.json do one after another."""
    parts = pre.get("pretokenizers", [pre])
    keys = ("type", "behavior", "individual_digits", "add_prefix_space")
    kind = [part[key] for part in parts for key in keys if key in part] + [parts[-1].get("use_regex", True)]
    if kind == ["ByteLevel", False, True]:
        return GPT2_PATTERN
    if kind == ["Digits", True, "ByteLevel", False, True]:
        return DIGITS_PATTERN
    if kind == ["Split", "Isolated", "ByteLevel", False, False]:
        return parts[0]["pattern"]["Regex"] + r"|(?s:.)"  # tiktoken drops what no alternative matches
    raise ValueError(f"pre_tokenizer {kind} is not supported")


# --- built-in task ---

# A question is a random expression tree in words; its nodes are the steps, in any order that puts children
# first. The label shows a random one. A hash of the tree, without names and wording, decides the split.

TEST_SETS = ("in_dist", "hard", "reworded", "easy")  # like the paper's GSM8K, GSM-Hard, SVAMP, MultiArith
BUILTIN = {"builtin": dict(train=40_000, valid=1_000), **{name: dict(test=1_000) for name in TEST_SETS},
           "chain": dict(train=40_000, valid=1_000, test=1_000)}  # in_dist where one order of steps is right
NAMES = "Ada Ben Cleo Dan Eve Finn Gina Hugo".split()
ITEMS = "coins cards books pens".split()
THEN = 0.9  # share of changes to one count that are told of its owner ("Then Ada loses 3.")
LARGEST = 40  # every number is from 1 to LARGEST, one token each

# operation -> common and rare wording; "n" is a given number: "n+n" adds two of them, "+n" a count and one
WORDING = {
    "n+n": ("{x} has {m} {item} and {n} more.", "{x} owns {m} {item} plus {n}."),
    "n-n": ("{x} has {m} {item} and loses {n}.", "{x} owns {m} {item} minus {n}."),
    "n*n": ("{x} has {m} bags of {n} {item}.", "{x} owns {m} boxes of {n} {item}."),
    "+n": ("{x} has {n} more than {y}.", "{x} owns {n} beyond {y}."),
    "-n": ("{x} has {n} fewer than {y}.", "{x} owns {n} under {y}."),
    "*n": ("{x} has {n} times as many as {y}.", "{x} owns {n} times what {y} owns."),
    "then+n": ("Then {x} gets {n} more.", "Later {x} finds {n}."),
    "then-n": ("Then {x} loses {n}.", "Later {x} drops {n}."),
    "then*n": ("Then {x} makes it {n} times as many.", "Later {x} owns {n} times that."),
    "+": ("{x} has as many as {y} and {z}.", "{x} owns what {y} and {z} own."),
    "-": ("{x} has as many as {y} without {z}.", "{x} owns what {y} owns less {z}."),
    "ask": ("How many {item} does {x} have?", "What number of {item} is with {x}?"),
}


class _Node:
    """Somebody's count: the result of one step. `key` is its expression without names, wording and order."""

    def __init__(self, sign, value, numbers, children):
        self.value, self.numbers, self.children = value, numbers, children
        self.op = "n" * (not children) + sign + "n" * bool(numbers)
        operands = [*(child.value for child in children), *numbers]
        self.step = f"<<{sign.join(map(str, operands))}={value}>>"
        keys = [*(child.key for child in children), *map(str, numbers)]
        self.key = f"({sign} {' '.join(sorted(keys) if sign == '+' else keys)})"
        self.nodes = [self, *(node for child in reversed(children) for node in child.nodes)]


def _tree(rng, steps, wide, branch):
    """A random expression of `steps` operations, or None where a value leaves 1..20 (wide: 1..LARGEST)."""
    first, second, largest = ((8, 25), (5, 20), LARGEST) if wide else ((2, 12), (1, 9), 20)
    if steps > 2 and rng.random() < branch:
        left = rng.randint(1, steps - 2)
        children = [_tree(rng, n, wide, branch) for n in (left, steps - 1 - left)]
        sign, numbers = rng.choice("++-"), []
    else:
        children = [_tree(rng, steps - 1, wide, branch)] if steps > 1 else []
        sign = rng.choice("+-*")
        numbers = [rng.randint(*((2, 3) if sign == "*" else second))]
        if not children:
            numbers.insert(0, rng.randint(*first))
    if None in children:
        return None
    if sign == "-" and not numbers:
        children.sort(key=lambda child: -child.value)
    a, b = [child.value for child in children] + numbers
    value = {"+": a + b, "-": a - b, "*": a * b}[sign]
    return _Node(sign, value, numbers, children) if 1 <= value <= largest else None


def _random_order(rng, nodes):
    """`nodes` in a random order in which each comes after its children."""
    order = []
    while len(order) < len(nodes):
        ready = [n for n in nodes if n not in order and all(c in order for c in n.children)]
        order.append(rng.choice(ready))
    return order


def _problem(rng, bucket, lengths, wide, branch, rare, distracted):
    """(question, steps, answer), whose tree hashes to `bucket` (0 test, 1 validation, 2 training).

    Probabilities: wide (large numbers), branch (a step on two results, in any order), rare (the rare
    wording), distracted (a statement that the answer does not need).
    """
    distracted = rng.random() < distracted
    root, length = None, rng.choice(lengths)
    while root is None or min(zlib.crc32(root.key.encode()) % 8, 2) != bucket:
        root = _tree(rng, length, rng.random() < wide, branch)
    nodes = list(root.nodes)
    steps = tuple(n.step for n in _random_order(rng, nodes))
    if distracted:
        number, is_first = rng.randint(2, 9), rng.random() < 0.5
        nodes.append(_Node("+", None, [rng.randint(2, 12), number], []) if is_first else
                     _Node("+", None, [number], [rng.choice(nodes)]))
    same_owner = {n for n in nodes if n.value and n.numbers and n.children and rng.random() < THEN}
    names, owner = iter(rng.sample(NAMES, len(NAMES))), {}
    for n in reversed(nodes):  # children first: a count that changes keeps its owner
        owner[n] = owner[n.children[0]] if n in same_owner else next(names)
    item, wording, said = rng.choice(ITEMS), int(rng.random() < rare), []
    for n in _random_order(rng, nodes):
        operands = dict(zip("nm", reversed(n.numbers))) | dict(zip("yz", map(owner.get, n.children)))
        sentence = WORDING["then" * (n in same_owner) + n.op][wording]
        said.append(sentence.format(x=owner[n], item=item, **operands))
    said.append(WORDING["ask"][wording].format(x=owner[root], item=item))
    return " ".join(said), steps, str(root.value)


@functools.cache
def builtin(name, split):
    """The examples of a built-in set, always the same in the same order."""
    if split not in BUILTIN[name]:
        raise ValueError(f"built-in set '{name}' has no split '{split}'")
    mixed = [2] * 6 + [3] * 6 + [4] * 4 + [5] * 2 + [6] * 2
    settings = {  # number of steps, and the probabilities of _problem
        "hard": ((5, 6), 1.0, 0.3, 0.0, 0.0), "reworded": (mixed, 0.0, 0.3, 1.0, 1.0),
        "easy": ((2, 3), 0.0, 0.3, 0.0, 0.0), "chain": (mixed, 0.1, 0.0, 0.0, 0.0),
    }.get(name, (mixed, 0.1, 0.3, 0.1, 0.1))
    rng, examples = random.Random(f"{name} {split}"), {}
    bucket = ("test", "valid", "train").index(split)
    while len(examples) < BUILTIN[name][split]:
        problem = _problem(rng, bucket, *settings)
        examples.setdefault(problem[0], Example(*problem, f"{name}_{split}:{len(examples) + 1}"))
    return list(examples.values())


BUILTIN_PIECES = r"### | ?[A-Za-z]+(?: (?=[0-9]))?|[0-9]{1,2}|<<|>>\n?|\?\n?|[\s\S]"


def builtin_tokenizer():
    """Each word and number is one token. The space before a number is the word's, so that the number is the
    same token in questions and in steps."""
    words = {"### ", "?\n", ">>", ">>\n", "<<", *map(str, range(10, LARGEST + 1)), *NAMES}
    for text in sum(WORDING.values(), ()):
        for name, item in zip(NAMES, ITEMS * 2):
            said = "Ada. " + text.format(x=name, y=name, z=name, m=1, n=1, item=item)
            words.update(re.findall(BUILTIN_PIECES, said))
    tokens = BYTES + [word.encode() for word in sorted(words) if len(word) > 1]
    return Tokenizer.from_tokens(tokens, BUILTIN_PIECES, ["<|end_of_text|>"])


# --- encoding ---

@dataclass
class Encoded:
    """Ids, with bos (if any) and eos. Each part is tokenized alone: the border between latents and text is
    then the same at every stage of the curriculum."""
    question: list[int]
    steps: list[list[int]]
    answer: list[int]
    example: Example

    def __len__(self):
        return len(self.question) + sum(map(len, self.steps))


def encode_example(example, tokenizer):
    """"question\\n", "<<48/2=24>>\\n" each, "### 72" + eos."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    question = bos + tokenizer.encode_ordinary(example.question.strip() + "\n")
    steps = [tokenizer.encode_ordinary(step + "\n") for step in example.steps]
    answer = tokenizer.encode_ordinary("### " + example.answer) + [tokenizer.end_id()]
    return Encoded(question, steps, answer, example)


def encode_all(examples, tokenizer, max_len):
    """Encode those of at most max_len ids, start and end of latents included -> (encoded, number skipped)."""
    kept = []
    for example in examples:
        if len(example.question) + sum(map(len, example.steps)) < MAX_TEXT:
            item = encode_example(example, tokenizer)
            if len(item) + len(item.answer) + 2 <= max_len:
                kept.append(item)
    return kept, len(examples) - len(kept)


# --- downloads and the command line ---

TIMEOUT = 30  # seconds without a byte


def download(file, digest, address, data_dir, source_dir=None):
    """Put a file into data_dir, from source_dir where that has it, and return its path. A right file is left
    alone. ValueError for a wrong one, ConnectionError when the network fails."""
    path, part = Path(data_dir, file), Path(data_dir, file + ".part")
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    if source_dir and Path(source_dir, file).is_file():
        address = Path(source_dir, file).resolve().as_uri()
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT) as response:
            content = response.read()
    except Exception as error:
        raise ConnectionError(f"{address}: {error}; run again, or use --from DIR") from None
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(f"{address} is not the published {file}, whose SHA-256 is {digest}")
    part.write_bytes(content)
    return part.replace(path)


class Parser(argparse.ArgumentParser):
    """Bad usage is one line and exit status 2."""

    def error(self, message):
        self.exit(2, f"error: {message} (see --help)\n")


def cli(main):
    """Run main(). An error is one line, its exit status 2 if the user can mend it, 130 for Ctrl-C, else 1."""
    try:
        sys.exit(main())
    except (ValueError, OSError, FloatingPointError) as error:
        # one write, or the lines of several processes could mix
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.exit(2 if isinstance(error, (ValueError, FileNotFoundError)) else 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def main(argv=None):
    parser = Parser(prog="data.py", description="Download datasets and check their SHA-256.")
    parser.add_argument("names", nargs="+", choices=["all", *DATASETS])
    parser.add_argument("--from", dest="source_dir", metavar="DIR", help="copy the files that DIR has")
    parser.add_argument("--data_dir", default="data", help="where the files go (default: data)")
    args = parser.parse_args(argv)
    for name, files in DATASETS.items():
        for source in files.values():
            if name in args.names or "all" in args.names:
                print(f"{download(*source, args.data_dir, args.source_dir)}: ok")


if __name__ == "__main__":
    cli(main)
