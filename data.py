"""Questions, answers and tokens: datasets, answer check, tokenizer, encoding, downloads.

    python data.py                      the datasets, and which of them are here
    python data.py gsm8k svamp          download (resumes; every file is checked against a pinned SHA-256)
    python data.py all --from DIR       take the files from DIR where it has them

Bad input is a ValueError or FileNotFoundError of one line that names the file, the line and the mend.
"""
import argparse
import base64
import functools
import hashlib
import http.client
import itertools
import json
import os
import random
import re
import shutil
import sys
import urllib.error
import urllib.parse
import urllib.request
import zlib
from dataclasses import dataclass
from decimal import Decimal
from itertools import groupby
from pathlib import Path
from reprlib import repr as short

import tiktoken
from tqdm import tqdm


# --- examples and the answer check ---

@dataclass(frozen=True)
class Example:
    question: str
    steps: tuple[str, ...]  # "<<48/2=24>>" each; () where the source gives none
    answer: str             # a plain decimal number: "72", "-3.5"
    id: str                 # "gsm8k_test.jsonl:17", file name and 1-based line (or item), for messages and logs


MAX_NUMBER = 64  # characters; longer "numbers" are noise, and arithmetic on them is not free
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"  # thousands commas only where they belong
_NUMBER = re.compile(rf"([-+]?)\$?([-+]?)({_DIGITS})%?\.?")


def parse_number(text: str) -> Decimal | None:
    """The number that `text` is ("1,000", "$72", "72%", "-3.5", ".5", "72."), else None. No exponents."""
    text = text.strip()
    match = _NUMBER.fullmatch(text) if len(text) <= MAX_NUMBER else None
    if match is None or (match[1] and match[2]):
        return None
    return Decimal((match[1] or match[2]) + match[3].replace(",", ""))


def format_number(number: Decimal) -> str:
    """Shortest plain form: 51.0 -> "51", 3.50 -> "3.5"."""
    text = format(number, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def numbers_equal(a: Decimal, b: Decimal) -> bool:
    """Two integers must be equal; otherwise |a - b| < 1e-3, the tolerance of PAL's own GSM-Hard evaluation."""
    if a == a.to_integral_value() and b == b.to_integral_value():
        return a == b
    return abs(a - b) < Decimal("0.001")


def extract_answer(text: str) -> str | None:
    """The number after the last "###" (or "####") in plain form, so that equal answers vote together; else None."""
    _, marker, rest = text.rpartition("###")
    words = rest.split(maxsplit=1)
    number = parse_number(words[0]) if marker and words else None
    return None if number is None else format_number(number)


def is_correct(text: str, example: Example) -> bool:
    """Whether the generated `text` gives the example's answer."""
    answer = extract_answer(text)
    return answer is not None and numbers_equal(Decimal(answer), Decimal(example.answer))


def well_formed(text: str) -> bool:
    """Whether `text` is "### <number>" and nothing else, up to surrounding whitespace."""
    text = text.strip()
    return text.startswith("### ") and not text[4:5].isspace() and parse_number(text[4:]) is not None


_BRACKET = re.compile(r"\s*<<([^<>=]*)=([^<>=]*)>>")
_TERM = re.compile(rf" *(?:({_DIGITS})%?|([-+*/x×÷()]))")


def parse_step(text: str) -> tuple[list[Decimal], Decimal] | None:
    """"<<48/2=24>>" -> ([48, 2], 24); None unless all of `text` is such brackets.

    Of several brackets the operands are joined and the result is the last one's. Nothing is evaluated.
    """
    operands, result, end, text = [], None, 0, text.rstrip()
    while end < len(text):
        match = _BRACKET.match(text, end)
        found = _operands(match[1]) if match else None
        result = parse_number(match[2]) if match else None
        if found is None or result is None:
            return None
        operands += found
        end = match.end()
    return None if result is None else (operands, result)


def _operands(expression: str) -> list[Decimal] | None:
    """The numbers of an arithmetic expression in order, or None if it is not one."""
    numbers, depth, end, expression = [], 0, 0, expression.rstrip()
    sign, want_number = "", True  # either a number, "(" or one sign comes next, or an operator or ")"
    while end < len(expression):
        match = _TERM.match(expression, end)
        if match is None:
            return None
        number, symbol = match.groups()
        if want_number and number:
            value = parse_number(sign + number)
            if value is None:
                return None
            numbers.append(value)
            sign, want_number = "", False
        elif want_number and symbol == "(":
            depth, sign = depth + 1, ""
        elif want_number and symbol in ("+", "-") and not sign:
            sign = symbol
        elif not want_number and symbol == ")" and depth:
            depth -= 1
        elif not want_number and symbol and symbol not in "()":
            want_number = True
        else:
            return None
        end = match.end()
    return None if want_number or depth else numbers


# --- readers ---

DATASETS = {  # name -> split -> file; GSM8K has no validation split, the last HELD_OUT training items serve
    "gsm8k": {"train": "gsm8k_train.jsonl", "test": "gsm8k_test.jsonl"},
    "gsm8k_aug": {"train": "gsm8k_aug_train.txt", "valid": "gsm8k_aug_valid.txt", "test": "gsm8k_aug_test.txt"},
    "svamp": {"test": "svamp.json"},
    "gsm_hard": {"test": "gsm_hard.jsonl"},
    "multiarith": {"test": "multiarith.jsonl"},
}
HELD_OUT = 500
MAX_LINE = 10_000_000  # bytes


def load(name: str, split: str, data_dir: str | Path = "data") -> list[Example]:
    """The examples of one split ("train", "valid", "test") of a dataset, or of a file in any format of `read_file`.

    Of a user's own file "test" is all; "valid" is the last 5 % (1 to 500 items) and "train" the rest.
    """
    if name in BUILTIN:
        return builtin(name, split)
    if name in DATASETS:
        files = DATASETS[name]
        splits = ["train", "valid", "test"] if "train" in files else list(files)
        if split not in splits:
            raise ValueError(f"{name} has no split '{split}'; it has {', '.join(splits)}")
        path = Path(data_dir) / files.get(split, files.get("train"))
        if not path.is_file():
            where = "" if str(data_dir) == "data" else f" --data_dir {data_dir}"
            raise FileNotFoundError(f"{path} is not here; run `python data.py {name}{where}`")
        # a published file is not the user's to mend, and this one's answers were written by a language model
        examples = read_file(path, skip_bad=path.name == "gsm8k_aug_train.txt")
        held_out = 0 if split in files and "valid" in files else HELD_OUT
    elif Path(name).is_file():
        if split not in ("train", "valid", "test"):
            raise ValueError(f"{name} has no split '{split}'; it has train, valid, test")
        examples = read_file(name)
        held_out = max(1, min(HELD_OUT, len(examples) // 20))
    else:
        raise ValueError(f"no dataset and no file '{name}'; datasets: {', '.join([*BUILTIN, *DATASETS])}")
    if split == "test" or not held_out:
        return examples
    if len(examples) <= held_out:
        raise ValueError(f"{name} has {len(examples)} items; holding out {held_out} for 'valid' leaves none to train on")
    return examples[-held_out:] if split == "valid" else examples[:-held_out]


def read_file(path: str | Path, skip_bad: bool = False) -> list[Example]:
    """Read GSM8K or PAL (GSM-Hard, MultiArith) JSON lines, GSM8K-Aug text, or SVAMP JSON; the content tells which.

    Raises ValueError ("file:line: what is wrong") at the first bad item; with `skip_bad` items are left out
    instead and one line on stderr says how many.
    """
    path = Path(path)
    lines = _read_lines(path)
    first = next((line.lstrip()[0] for line in lines if line.strip()), "")
    if path.suffix != ".txt" and first == "[":
        parse, items = _parse_svamp, enumerate(_read_array(path, lines), 1)
        where = f"{path}: item "
    else:
        parse = _parse_json if path.suffix != ".txt" and first == "{" else _parse_aug
        items = ((i, line) for i, line in enumerate(lines, 1) if line.strip())
        where = f"{path}:"
    examples, bad = [], []
    for i, item in items:
        try:
            examples.append(Example(*parse(item), id=f"{path.name}:{i}"))
        except ValueError as error:
            bad.append(f"{where}{i}: {error}")
            if not skip_bad:
                raise ValueError(bad[0]) from None
    if not examples:
        raise ValueError(f"{path}: no items" + (f" ({bad[0]})" if bad else "; the file is empty"))
    if bad:
        print(f"note: {path}: left out {len(bad)} bad of {len(bad) + len(examples)} items, first {bad[0]}", file=sys.stderr)
    return examples


def _read_lines(path: Path) -> list[str]:
    lines = []
    with open(path, "rb") as file:
        while line := file.readline(MAX_LINE + 1):
            where = f"{path}:{len(lines) + 1}"
            if len(line) > MAX_LINE:
                raise ValueError(f"{where}: line of more than {MAX_LINE} bytes; is this a dataset?")
            if b"\0" in line:
                raise ValueError(f"{where}: NUL byte; the file must be UTF-8 text")
            try:
                lines.append(line.decode("utf-8-sig" if not lines else "utf-8").rstrip("\r\n"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 ({error.reason}); convert the file to UTF-8") from None
            if "\r" in lines[-1]:
                raise ValueError(f"{where}: a carriage return inside the line; lines must end in \\n or \\r\\n")
    return lines


def _json(text: str):
    """json.loads with exact decimals; whatever is wrong is a ValueError."""
    try:
        return json.loads(text, parse_float=Decimal)
    except json.JSONDecodeError:
        raise
    except (ValueError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"broken JSON ({type(error).__name__})") from None


def _read_array(path: Path, lines: list[str]) -> list:
    try:
        return _json("\n".join(lines))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: broken JSON ({error.msg}); download or export the file again") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _text(item: dict, key: str) -> str:
    if key not in item:
        raise ValueError(f"key '{key}' is missing")
    if not isinstance(item[key], str):
        raise ValueError(f"'{key}' must be text, not {type(item[key]).__name__}")
    return _check_text(item[key], key)


def _check_text(text: str, key: str) -> str:
    if not text.strip():
        raise ValueError(f"'{key}' is empty")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError(f"'{key}' holds a lone surrogate, which UTF-8 cannot write")
    return text.strip()


def _answer(value) -> str:
    """A reference answer (text, int or Decimal) in plain form."""
    if isinstance(value, (int, Decimal)) and not isinstance(value, bool):
        number = Decimal(value)
        # the size first: "1e999999999" must not be written out
        small = number.is_finite() and abs(number.adjusted()) < MAX_NUMBER
        value = format_number(number) if small else str(value)
    number = parse_number(value) if isinstance(value, str) else None
    if number is None:
        raise ValueError(f"the answer {str(value).strip()[:40]!r} is no number")
    return format_number(number)


_ANNOTATION = re.compile(r"<<[^<>\n]*>>")


def _parse_json(line: str) -> tuple[str, tuple[str, ...], str]:
    try:
        item = _json(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(item, dict):
        raise ValueError("must be a JSON object")
    if "input" in item or "target" in item:  # PAL's files
        if "target" not in item:
            raise ValueError("key 'target' is missing")
        return _text(item, "input"), (), _answer(item["target"])
    solution, marker, answer = _text(item, "answer").rpartition("####")
    if not marker:
        raise ValueError("'answer' has no '#### <number>'")
    return _text(item, "question"), tuple(_ANNOTATION.findall(solution)), _answer(answer)


def _parse_aug(line: str) -> tuple[str, tuple[str, ...], str]:
    question, bars, rest = line.rpartition("||")
    solution, marker, answer = rest.rpartition("####")
    if not bars or not marker:
        raise ValueError("must read 'question||<<..>> <<..>> #### answer'")
    return _check_text(question, "question"), tuple(_ANNOTATION.findall(solution)), _answer(answer)


def _parse_svamp(item) -> tuple[str, tuple[str, ...], str]:
    if not isinstance(item, dict):
        raise ValueError("must be a JSON object")
    body = _text(item, "Body")
    body += "" if body[-1] in ".?!" else "."  # as in PAL's published form of SVAMP
    if "Answer" not in item:
        raise ValueError("key 'Answer' is missing")
    answer = _answer(item["Answer"])
    equation = re.sub(r"\.0+(?![0-9])|\s+", "", _text(item, "Equation"))  # "( 76.0 - 25.0 )"
    for expression in (equation[1:-1], equation):  # without the outer parentheses, where they are a pair
        step = f"<<{expression}={answer}>>"
        if (expression is equation or equation[0] == "(") and parse_step(step):
            return f"{body} {_text(item, 'Question')}", (step,), answer
    raise ValueError(f"'Equation' is no arithmetic expression: {equation[:40]!r}")


# --- tokenizer ---

# How text is cut into pieces before byte pairs are merged. The third is the GPT-2 pattern on text that was first
# cut at every digit: whitespace then keeps its last blank before a digit, as it does at the end of the text.
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT2_PATTERN = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS_PATTERN = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
                  "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
                  "<|eot_id|>", "<|python_tag|>", *(f"<|reserved_special_token_{i}|>" for i in range(2, 247))]
EOS_NAMES = ("<|end_of_text|>", "<|im_end|>", "<|endoftext|>", "<eos>")
MAX_TEXT = 250_000  # characters; a run of millions of blanks overflows the stack of tiktoken's regex engine

# byte-level BPE files write each byte as one printable character (GPT-2's table)
_printable = [b for b in range(256) if chr(b).isprintable() and b != 0x20]
BYTE_TO_CHAR = {b: chr(b) for b in _printable}
BYTE_TO_CHAR |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in BYTE_TO_CHAR)}
CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}


class Tokenizer:
    """A byte-level BPE tokenizer: tiktoken does the merging, the file's own ids come out.

    special: {name: id} of all special tokens; vocab_size: highest id + 1; bos_id, eos_id: int or None. A byte that the
    vocabulary lacks (a control character) is dropped, after merging; Hugging Face drops it before.
    """

    def __init__(self, ranks: dict[bytes, int], ids: list[int], special: dict[str, int], pattern: str,
                 source: tuple[str, bytes]):
        """ranks: {token: merge rank 0..}; ids: id of each rank, -1 for a byte that the vocabulary lacks;
        source: (relative name, bytes) of the file this was read from, which `save_pretrained` writes back."""
        self._bpe = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self._ids = None if ids == list(range(len(ids))) else ids
        self._bytes = {i: token for token, i in zip(ranks, ids)} | {i: name.encode() for name, i in special.items()}
        self._source, self._added, self.special = source, {}, dict(special)
        self._finish()

    def _finish(self):
        self.vocab_size = max(self._bytes) + 1
        self.bos_id = self.special.get("<|begin_of_text|>")
        self.eos_id = next((self.special[name] for name in EOS_NAMES if name in self.special), None)
        longest_first = sorted(self.special, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "Tokenizer":
        """Read original/tokenizer.model, tokenizer.model (Llama 3's format) or tokenizer.json, the first there is,
        then added_tokens.json and config.json's eos_token_id where they exist."""
        directory = Path(directory)
        for name, read in (("original/tokenizer.model", _read_tokenizer_model),
                           ("tokenizer.model", _read_tokenizer_model), ("tokenizer.json", _read_tokenizer_json)):
            path = directory / name
            if path.is_file():
                break
        else:
            raise FileNotFoundError(f"{directory} has no tokenizer.json and no [original/]tokenizer.model; "
                                    "give the folder of a downloaded model")
        raw = path.read_bytes()
        ranks, ids, special, pattern = read(raw, path)
        try:
            self = cls(ranks, ids, special, pattern, (name, raw))
        except ValueError as error:
            raise ValueError(f"{path}: the pattern of the pre_tokenizer is refused: {' '.join(str(error).split())}") from None
        for name, id in _read_object(directory / "added_tokens.json").items():
            if self.special.get(name) == id:
                continue
            try:
                if type(id) is not int or name in self.special or id in self._bytes or not 0 <= id < 2**24:
                    raise ValueError
                self._add(name, id)
            except ValueError:  # an empty name, or one that is no Unicode
                raise ValueError(f"{directory / 'added_tokens.json'}: {short(name)}: id {short(id)} does not fit the "
                                 "tokenizer beside it") from None
        eos = _read_object(directory / "config.json").get("eos_token_id")
        eos = eos[0] if isinstance(eos, list) and eos else eos
        if isinstance(eos, int):
            if eos not in self._bytes:
                raise ValueError(f"{directory / 'config.json'}: eos_token_id {eos} is no token of {path.name}")
            self.eos_id = eos
        return self

    @classmethod
    def from_words(cls, words: list[str], pattern: str, special: list[str]) -> "Tokenizer":
        """A word-level vocabulary: ids are the 256 bytes, then `words`, then `special`.

        pattern: regex that cuts text into pieces; each word must be one piece. Other text falls back to bytes.
        """
        vocab = list(BYTE_TO_CHAR[b] for b in range(256))
        vocab += ("".join(BYTE_TO_CHAR[b] for b in word.encode()) for word in words)
        if len({*vocab, *special}) != len(vocab) + len(special):
            raise ValueError("words and special tokens must be unique, and words longer than one byte")
        # Only whole pieces should become words. tiktoken, though, also merges two neighbours whenever they spell a
        # word, so each such pair is written as a merge: then every reader of the file agrees on odd text, too.
        known = set(vocab)
        merges = [[w[:i], w[i:]] for w in vocab for i in range(1, len(w)) if w[:i] in known and w[i:] in known]
        flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
        split = dict(type="Split", pattern={"Regex": pattern}, behavior="Isolated", invert=False)
        raw = json.dumps({
            "version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [dict(id=len(vocab) + i, content=name, **flags) for i, name in enumerate(special)],
            "normalizer": None, "pre_tokenizer": dict(type="Sequence", pretokenizers=[split, byte_level]),
            "post_processor": None, "decoder": byte_level,
            "model": dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None,
                          end_of_word_suffix=None, fuse_unk=False, byte_fallback=False, ignore_merges=True,
                          vocab={token: i for i, token in enumerate(vocab)}, merges=merges),
        }, ensure_ascii=False, indent=1).encode()
        return cls(*_read_tokenizer_json(raw, Path("tokenizer.json")), ("tokenizer.json", raw))

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the source file byte for byte, and added_tokens.json with what `add_special` added."""
        name, raw = self._source
        for name, raw in ((name, raw), ("added_tokens.json", json.dumps(self._added, indent=1).encode() + b"\n")):
            path = Path(directory) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(path.name + ".part")
            part.write_bytes(raw)
            os.replace(part, path)  # a reader sees the old file or the new one, never half of one

    def encode_ordinary(self, text: str) -> list[int]:
        """Text -> ids, never a special token's: right for data, which must not be able to inject one."""
        if len(text) > MAX_TEXT:
            raise ValueError(f"a text of {len(text)} characters is too long to tokenize (at most {MAX_TEXT})")
        try:
            ranks = self._bpe.encode_ordinary(text)
        except BaseException as error:  # a regex that fails on this text is a panic of Rust's, no Exception
            if type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"the tokenizer's pattern fails on {short(text)}") from None
        return ranks if self._ids is None else [self._ids[r] for r in ranks if self._ids[r] >= 0]

    def encode(self, text: str) -> list[int]:
        """Text -> ids, where the name of a special token in the text is that token."""
        parts = self._split.split(text) if self.special else [text]
        return [i for part in parts for i in ([self.special[part]] if part in self.special else self.encode_ordinary(part))]

    def decode(self, ids: list[int]) -> str:
        """Ids -> text; U+FFFD stands for broken UTF-8 and for ids that no token has."""
        return b"".join(self._bytes.get(int(i), b"\xef\xbf\xbd") for i in ids).decode(errors="replace")

    def token_id(self, name: str) -> int:
        """The id of a special token. Raises ValueError if there is none of that name."""
        if name not in self.special:
            raise ValueError(f"the tokenizer has no special token '{name}'")
        return self.special[name]

    def end_id(self) -> int:
        """eos_id. Raises ValueError where there is none."""
        if self.eos_id is None:
            raise ValueError(f"the tokenizer has no end token (one of {', '.join(EOS_NAMES)}, or eos_token_id in config.json)")
        return self.eos_id

    def add_special(self, *names: str) -> list[int]:
        """The ids of these special tokens; unknown ones are appended at the end of the id space."""
        for name in names:
            if name not in self.special:
                self._add(name, self.vocab_size)
        return [self.special[name] for name in names]

    def _add(self, name: str, id: int):
        if not name:
            raise ValueError("a special token needs a name")
        eos = self.eos_id
        self.special[name] = self._added[name] = id
        self._bytes[id] = name.encode()
        self._finish()
        self.eos_id = self.eos_id if eos is None else eos  # adding a token never moves eos


def _read_object(path: Path) -> dict:
    """The JSON object in a file, {} without the file."""
    try:
        value = json.loads(path.read_bytes()) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: broken JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object")
    return value


def _read_tokenizer_model(raw: bytes, path: Path):
    """Llama 3's format, "base64 rank" lines -> (ranks, ids, special, pattern)."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(raw.splitlines(), 1):
        try:
            token, rank = line.split()
            token, rank = base64.b64decode(token, validate=True), int(rank)
        except ValueError:
            raise ValueError(f"{path}:{number}: not 'base64 rank', so no Llama-3 tokenizer.model; download it again") from None
        if rank != len(ranks) or token in ranks:
            raise ValueError(f"{path}:{number}: rank {rank} or its token is doubled or out of order; download the file again")
        ranks[token] = rank
    if any(bytes([b]) not in ranks for b in range(256)):
        raise ValueError(f"{path}: not every single byte is a token, so no Llama-3 tokenizer.model; download it again")
    special = {name: len(ranks) + i for i, name in enumerate(LLAMA3_SPECIAL)}
    return ranks, list(range(len(ranks))), special, LLAMA3_PATTERN


def _read_tokenizer_json(raw: bytes, path: Path):
    """Hugging Face's tokenizer.json -> (ranks, ids, special, pattern). Refuses by name what it cannot do exactly."""
    def check(ok, problem):
        if not ok:
            raise ValueError(f"{path}: {problem}; a byte-level BPE like Llama 3's or SmolLM2's is needed")

    try:
        file = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: broken JSON ({error}); download the file again") from None
    try:
        model, added, pre = file["model"], file.get("added_tokens") or [], file.get("pre_tokenizer") or {}
        vocab, merges, ignore_merges = model.get("vocab"), model.get("merges"), bool(model.get("ignore_merges"))
        check(model.get("type", "BPE") == "BPE", f"model.type is {short(model.get('type'))}")
        check(isinstance(vocab, dict) and isinstance(merges, list), "model.vocab or model.merges is missing")
        check(not file.get("normalizer"), f"normalizer is {short((file.get('normalizer') or {}).get('type'))}")
        for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
            check(not model.get(key), f"model.{key} is {short(model.get(key))}")
        for token in added:
            for key in ("lstrip", "rstrip", "single_word"):
                check(not token.get(key), f"added token {short(token['content'])} has {key}")
        special = {token["content"]: token["id"] for token in added}
        pattern = _pattern(pre.get("pretokenizers", [pre]), check)
        merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
        check(all(len(merge) == 2 for merge in merges), "a merge is not of two tokens")
        in_bytes = lambda text: bytes(CHAR_TO_BYTE[c] for c in text)
        tokens = {in_bytes(name): i for name, i in vocab.items() if name not in special}
        merges = [(in_bytes(a), in_bytes(b)) for a, b in merges]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: not a byte-level tokenizer.json ({type(error).__name__}: {error})") from None
    all_ids = [*tokens.values(), *special.values()]
    check(all(type(i) is int and 0 <= i < 2**24 for i in all_ids) and len(set(all_ids)) == len(all_ids),
          "ids are no integers below 2**24, or doubled")
    check(all(vocab.get(name, i) == i for name, i in special.items()), "added_tokens and model.vocab disagree on an id")
    check(all(isinstance(name, str) for name in special), "an added token is no text")
    check("" not in special and b"" not in tokens, "a token is empty")
    for a, b in merges:
        check(a in tokens and b in tokens and a + b in tokens, f"merge {short(a)} {short(b)} is of or makes no token")
    ranks = _ranks(tokens, merges, ignore_merges, check)
    return ranks, [tokens.get(token, -1) for token in ranks], special, pattern


def _pattern(pre: list[dict], check) -> str:
    """The one regex that cuts text as the listed pre-tokenizers do one after another."""
    kinds, last = [p.get("type") for p in pre], pre[-1]
    check(kinds[-1] == "ByteLevel", f"pre_tokenizer is {' + '.join(map(short, kinds))}")
    check(last.get("add_prefix_space") is False, "pre_tokenizer ByteLevel has add_prefix_space")
    if last.get("use_regex", True):
        if kinds == ["ByteLevel"]:
            return GPT2_PATTERN
        if kinds == ["Digits", "ByteLevel"] and pre[0].get("individual_digits"):
            return DIGITS_PATTERN
    elif kinds == ["Split", "ByteLevel"] and pre[0].get("behavior") == "Isolated" and not pre[0].get("invert"):
        check("Regex" in pre[0]["pattern"], "pre_tokenizer Split has no Regex")
        return pre[0]["pattern"]["Regex"] + r"|(?s:.)"  # tiktoken would drop what the pattern does not match
    check(False, f"pre_tokenizer is {' + '.join(map(short, kinds))} with options {json.dumps(pre)[:200]}")


def _merge(word: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Plain BPE: merge the lowest-ranked neighbours, leftmost first, until none is left."""
    parts = [word[i:i + 1] for i in range(len(word))]
    while len(parts) > 1:
        rank, i = min((ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
        if rank == len(ranks):
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _ranks(tokens: dict[bytes, int], merges: list[tuple[bytes, bytes]], ignore_merges: bool, check) -> dict[bytes, int]:
    """Ranks with which tiktoken, which merges any two neighbours that spell a token, does just what `merges` say.

    The two differ where a token can also be spelled by a pair that is not in `merges`, and where a whole piece is a
    token that its own merges do not reach. Neighbours in a BPE encoding stay as they are when encoded alone, so it is
    enough to look at each token alone: with the merges before it, it must come down to exactly the pair of its merge.
    A token that does not is never made by merging, and (unless ignore_merges looks it up whole) has no rank.
    """
    ranks = {bytes([b]): b for b in range(256)}  # all of them: tiktoken needs every byte, Hugging Face drops the rest
    results, pairs = [a + b for a, b in merges], set(merges)
    in_id_order = sorted(tokens, key=tokens.get)
    grouped = len(list(groupby(results))) == len(set(results))  # all merges that make one token stand together
    if ignore_merges and grouped and all((t[:i], t[i:]) in pairs for t in tokens for i in range(1, len(t))
                                         if t[:i] in tokens and t[i:] in tokens):
        # Llama 3's file, made from tiktoken's: every spelling of a token is a merge, so the order is all there is
        for token in (*results, *in_id_order):
            ranks.setdefault(token, len(ranks))
        return ranks
    early = []
    for a, b in merges:
        if a not in ranks or b not in ranks:
            early.append((a, b))  # without effect if a part is never made, out of order if it is made later
        elif a + b not in ranks and _merge(a + b, ranks) == [a, b]:
            ranks[a + b] = len(ranks)
    for a, b in early:
        check(a not in ranks or b not in ranks, f"merge {a!r} {b!r} comes before the merges that make its parts")
    for token in in_id_order if ignore_merges else ():
        if token not in ranks:
            check(len(_merge(token, ranks)) != 2, f"token {token!r} is made by no merge, yet two tokens spell it")
            ranks[token] = len(ranks)
    return ranks


# --- built-in task ---
#
# Arithmetic word problems about who has how many of something. Each question is a random expression
# tree whose inner nodes are the steps; a node may be computed as soon as its children are, so many
# questions have several equally right step orders, and the label shows one of them at random: the
# setting in which imitating one written chain of thought is a poor teacher (paper, section 1).
#
# Every question belongs to one split by the hash of its expression tree (without names, wording, distractors
# and statement order), so no test question is a training question in another disguise.

BUILTIN = {  # test sets mirror the paper's GSM8K, GSM-Hard, SVAMP and MultiArith
    "builtin": dict(train=40_000, valid=1_000),
    "in_dist": dict(test=1_000),
    "hard": dict(test=1_000),
    "reworded": dict(test=1_000),
    "easy": dict(test=1_000),
    # apart from them, a task of its own: in_dist where only one order of steps is right, in common words
    "chain": dict(train=40_000, valid=1_000, test=1_000),
}
TEST_SETS = ("in_dist", "hard", "reworded", "easy")

NAMES = "Ada Ben Cleo Dan Eve Finn Gina Hugo".split()
ITEMS = "coins cards books pens".split()
THEN = 0.9  # share of changes to one count that are said of its owner ("Then Ada loses 3."), not of another's count
LARGEST = 40  # every number of a question, a step and an answer is from 1 to LARGEST, one token each

COMMON = {  # by operation: on two given numbers, on a count and a number (another's count, then one's own), on two counts
    "n+n": "{x} has {m} {item} and {n} more.", "n-n": "{x} has {m} {item} and loses {n}.",
    "n*n": "{x} has {m} bags of {n} {item}.",
    "+n": "{x} has {n} more than {y}.", "-n": "{x} has {n} fewer than {y}.", "*n": "{x} has {n} times as many as {y}.",
    "then+n": "Then {x} gets {n} more.", "then-n": "Then {x} loses {n}.", "then*n": "Then {x} makes it {n} times as many.",
    "+": "{x} has as many as {y} and {z}.", "-": "{x} has as many as {y} without {z}.",
    "ask": "How many {item} does {x} have?",
}
RARE = {  # one question in ten in training, every question of "reworded"
    "n+n": "{x} owns {m} {item} plus {n}.", "n-n": "{x} owns {m} {item} minus {n}.", "n*n": "{x} owns {m} boxes of {n} {item}.",
    "+n": "{x} owns {n} beyond {y}.", "-n": "{x} owns {n} under {y}.", "*n": "{x} owns {n} times what {y} owns.",
    "then+n": "Later {x} finds {n}.", "then-n": "Later {x} drops {n}.", "then*n": "Later {x} owns {n} times that.",
    "+": "{x} owns what {y} and {z} own.", "-": "{x} owns what {y} owns less {z}.",
    "ask": "What number of {item} is with {x}?",
}


class _Node:
    """Somebody's count: the result of one step."""

    def __init__(self, op, value, numbers=(), children=()):
        self.op, self.value, self.numbers, self.children = op, value, numbers, children

    def key(self):
        """The expression without names, wording and order."""
        operands = [*(c.key() for c in self.children), *map(str, self.numbers)]
        return f"({self.sign} {' '.join(sorted(operands) if self.sign == '+' else operands)})"

    @property
    def sign(self):
        return self.op.strip("n")

    def step(self):
        a, b = [c.value for c in self.children] + list(self.numbers)
        return f"<<{a}{self.sign}{b}={self.value}>>"


def _tree(rng, steps, wide, branch):
    """A random expression of `steps` operations, or None where a value leaves 1..20 (wide: 1..LARGEST). `branch`:
    probability of two computed operands."""
    large = (8, 25) if wide else (2, 12)
    small = (5, 20) if wide else (1, 9)
    if steps > 2 and rng.random() < branch:  # the steps of the two operands may come in any order
        left = rng.randint(1, steps - 2)
        children = [_tree(rng, left, wide, branch), _tree(rng, steps - 1 - left, wide, branch)]
        numbers, op = (), rng.choice("++-")
    else:
        children = [_tree(rng, steps - 1, wide, branch)] if steps > 1 else []
        op = rng.choice("+-*")
        numbers = (rng.randint(2, 3) if op == "*" else rng.randint(*small),)
        if not children:
            numbers = (rng.randint(*large), *numbers)
        op = op + "n" if children else f"n{op}n"
    if None in children:
        return None
    if op == "-" and children[0].value < children[1].value:
        children.reverse()
    a, b = [c.value for c in children] + list(numbers)
    value = {"+": a + b, "-": a - b, "*": a * b}[op.strip("n")]
    return _Node(op, value, numbers, tuple(children)) if 1 <= value <= (LARGEST if wide else 20) else None


def _random_order(rng, nodes):
    """`nodes` in a random order in which each comes after its children."""
    waiting, order = list(nodes), []
    while waiting:
        ready = [n for n in waiting if not any(c in waiting for c in n.children)]
        order.append(rng.choice(ready))
        waiting.remove(order[-1])
    return order


def _problem(rng, id, bucket, lengths, wide, branch, rare, distractors):
    """One question of `bucket` (0 test, 1 validation, 2 training). `wide`, `branch`, `rare`: probability of large numbers,
    of a step on two results and of the rare wording; `distractors`: how many statements the answer does not need."""
    root, length = None, rng.choice(lengths)
    while root is None or min(zlib.crc32(root.key().encode()) % 8, 2) != bucket:
        root = _tree(rng, length, rng.random() < wide, branch)
    nodes, stack = [], [root]
    while stack:
        nodes.append(stack.pop())
        stack.extend(nodes[-1].children)
    steps = tuple(n.step() for n in _random_order(rng, nodes))
    for _ in range(distractors):
        n = rng.randint(2, 9)
        nodes.append(_Node("n+n", None, (rng.randint(2, 12), n)) if rng.random() < 0.5 else
                     _Node("+n", None, (n,), (rng.choice(nodes),)))
    same = {n for n in nodes if n.value and len(n.op) == 2 and n.numbers and n.children and rng.random() < THEN}
    names, name, item = iter(rng.sample(NAMES, len(NAMES))), {}, rng.choice(ITEMS)
    for n in reversed(nodes):  # children first: a count that changes keeps its owner
        name[n] = name[n.children[0]] if n in same else next(names)
    wording = RARE if rng.random() < rare else COMMON
    said = [wording["then" * (n in same) + n.op].format(x=name[n], item=item, **dict(zip("nm", reversed(n.numbers))),
                                 **dict(zip("yz", map(name.get, n.children))))
            for n in _random_order(rng, nodes)]
    said.append(wording["ask"].format(x=name[root], item=item))
    return Example(" ".join(said), steps, str(root.value), id)


@functools.lru_cache
def builtin(name, split):
    """The examples of a built-in set: always the same ones, in the same order. "builtin" has the splits
    train and valid, "chain" these and test, the others test. ValueError for another split."""
    if split not in BUILTIN[name]:
        raise ValueError(f"built-in set {name!r} has no split {split!r} (it has {', '.join(BUILTIN[name])})")
    mixed = (2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 6, 6)
    lengths, wide, branch, rare, distracted = {  # step counts; probabilities: see _problem
        "hard": ((5, 6), 1.0, 0.3, 0.0, 0.0), "reworded": (mixed, 0.0, 0.3, 1.0, 1.0), "easy": ((2, 3), 0.0, 0.3, 0.0, 0.0),
        "chain": (mixed, 0.1, 0.0, 0.0, 0.0),
    }.get(name, (mixed, 0.1, 0.3, 0.1, 0.1))
    rng = random.Random(f"{name} {split}")
    bucket = {"test": 0, "valid": 1, "train": 2}[split]
    examples = {}
    while len(examples) < BUILTIN[name][split]:
        example = _problem(rng, f"{name}_{split}:{len(examples) + 1}", bucket, lengths, wide, branch, rare,
                           int(rng.random() < distracted))
        examples.setdefault(example.question, example)
    return list(examples.values())


BUILTIN_PIECES = r"### | ?[A-Za-z]+(?: (?=[0-9]))?|[0-9]{1,2}|<<|>>\n?|\?\n?|[\s\S]"


def builtin_tokenizer():
    """Whole words and whole numbers up to LARGEST. A word takes the space before it, and also the one after
    it where a number follows, so that a number is the same one token in questions and in steps."""
    words = {"### ", "\n", "?\n", ">>", ">>\n", "<<", *"+-*=.?", *map(str, range(LARGEST + 1))}
    for text in (*COMMON.values(), *RARE.values()):
        for name, item in itertools.product(NAMES, ITEMS):
            said = "Ada. " + text.format(x=name, y=name, z=name, m=1, n=1, item=item)
            words.update(re.findall(BUILTIN_PIECES, said))
    words |= set(NAMES)  # as the first word
    return Tokenizer.from_words(sorted(w for w in words if len(w.encode()) > 1), BUILTIN_PIECES,
                                ["<|end_of_text|>"])


# --- encoding ---

@dataclass
class Encoded:
    """Ids of question (with bos, if any), of each step and of the answer (with eos). The parts are tokenized apart,
    so that where latents end and text begins is the same at every stage of the curriculum."""
    question: list[int]
    steps: list[list[int]]
    answer: list[int]
    example: Example


def encode_example(example: Example, tokenizer: Tokenizer) -> Encoded:
    """"question\\n", "<<48/2=24>>\\n" each, "### 72" + eos. Raises ValueError if the tokenizer has no eos."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    encode = tokenizer.encode_ordinary
    return Encoded(bos + encode(example.question.strip() + "\n"), [encode(step + "\n") for step in example.steps],
                   encode("### " + example.answer) + [tokenizer.end_id()], example)


def encode_all(examples: list[Example], tokenizer: Tokenizer, max_len: int) -> tuple[list[Encoded], int]:
    """Encode those that fit -> (encoded, skipped). Too long is question + steps + answer + 2 > max_len ids (the 2 are
    the start and end of the latents); those are skipped, never cut, for a cut question has another answer."""
    kept = []
    for example in examples:
        if len(example.question) + sum(map(len, example.steps)) >= MAX_TEXT:
            continue
        item = encode_example(example, tokenizer)
        if len(item.question) + sum(map(len, item.steps)) + len(item.answer) + 2 <= max_len:
            kept.append(item)
    return kept, len(examples) - len(kept)


# --- downloads and the command line ---

_RAW = "https://raw.githubusercontent.com"
_OPENAI = f"{_RAW}/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data"
_PAL = f"{_RAW}/reasoning-machines/pal/f81ca2a9777f002f98a6b4d0f10b61bd5c8feb02/datasets"
_AUG = "da03/Internalize_CoT_Step_by_Step/e06a32ee5e4cd117171daeb4755d2a97ece62761/data/gsm8k"
SOURCES = {  # file -> (address, SHA-256, bytes)
    "gsm8k_train.jsonl": (f"{_OPENAI}/train.jsonl", "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465", 4166206),
    "gsm8k_test.jsonl": (f"{_OPENAI}/test.jsonl", "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14", 749738),
    "gsm8k_aug_train.txt": (f"https://media.githubusercontent.com/media/{_AUG}/train.txt",  # raw has an LFS pointer
                            "0a3909a9e7d8d2f7ad6b8c7b5608aa744988d835f9bf874d4cf06ca77df6bf8c", 87805358),
    "gsm8k_aug_valid.txt": (f"{_RAW}/{_AUG}/valid.txt", "04f9bddfe8ac4846571b1e2b612b289c95770b5012fdb34cc36a597b041afb87", 143419),
    "gsm8k_aug_test.txt": (f"{_RAW}/{_AUG}/test.txt", "e464efa2713fbcf423bdbfb482c543a6a086188c3d97c294b1d19a70c2a515e8", 388019),
    "svamp.json": (f"{_RAW}/arkilpatel/SVAMP/689d7ccac74b9983a2ac7cc3b264f441b99e7c53/SVAMP.json",
                   "5be77703a6d891ae476d7c082787ad361392aa02453b132516cdd5f4e7934e3e", 339970),
    "gsm_hard.jsonl": (f"{_PAL}/gsmhardv2.jsonl", "2032b0188a49ac0ec38cbe1e695e7d62d6dddc44bbb64f920728aca710e9ddef", 1138151),
    "multiarith.jsonl": (f"{_PAL}/mawpsmultiarith.jsonl", "12e8295088364af21fb6591dbdbd1dda452aade57227f63d725677471ded2951", 109522),
}
LICENCES = {"gsm8k": "MIT", "gsm8k_aug": "MIT", "svamp": "MIT", "gsm_hard": "Apache-2.0", "multiarith": "Apache-2.0"}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def download(file: str, data_dir: str | Path, source_dir: str | Path | None = None, url: str | None = None,
             timeout: float = 30) -> Path:
    """Put one file of SOURCES into data_dir, checked, and return its path; a right one is left alone.

    It is taken from source_dir where that has it, else fetched from `url` (its own address by default) into
    <name>.part, which a later call resumes. Only a file with the right sum ever gets the final name. Raises
    ValueError for a wrong file, ConnectionError (an OSError) when the network fails.
    """
    address, digest, size = SOURCES[file]
    path = Path(data_dir) / file
    if path.is_file() and _sha256(path) == digest:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(file + ".part")
    origin = Path(source_dir) / file if source_dir else None
    if origin and origin.is_file():
        shutil.copyfile(origin, part)
    else:
        origin = url or address
        try:
            _fetch(origin, part, size, timeout)
        except (OSError, http.client.HTTPException) as error:
            reason = " ".join(str(getattr(error, "reason", "") or error or type(error).__name__).split())
            code = f"HTTP {error.code}: " if isinstance(error, urllib.error.HTTPError) else ""
            raise ConnectionError(f"{origin}: {code}{reason}; run again to resume, or use --from DIR") from None
    got = part.stat().st_size
    if got != size or _sha256(part) != digest:
        part.unlink()
        raise ValueError(f"{origin}: not the published {file} ({got} bytes, {size} expected; its SHA-256 must be {digest}); "
                         "the copy was deleted")
    os.replace(part, path)
    return path


def _fetch(url: str, part: Path, size: int, timeout: float) -> None:
    """Bring `part` up to `size` bytes from `url`, from where it stops. Raises OSError or HTTPException."""
    start = part.stat().st_size if part.exists() else 0
    if start == size:
        return  # complete, but interrupted before the check
    headers = {"User-Agent": "atp-latent", "Accept-Encoding": "identity"}
    if 0 < start < size:
        headers["Range"] = f"bytes={start}-"
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code != 416 or "Range" not in headers:
            raise
        part.unlink()
        return _fetch(url, part, size, timeout)
    with response:
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        start = start if resumed else 0
        with (open(part, "ab" if resumed else "wb") as file,
              tqdm(total=size, initial=start, desc=part.stem, unit="B", unit_scale=True, disable=None) as bar):
            try:
                while start <= size and (chunk := response.read1(1 << 16)):
                    file.write(chunk)
                    start += len(chunk)
                    bar.update(len(chunk))
            finally:  # what did arrive is worth keeping
                file.flush()
                os.fsync(file.fileno())
        # a short body that is all the server meant to send is a wrong file, and the sum will say so
        if start < size and response.length != 0:
            raise ConnectionError(f"the connection closed after {start} of {size} bytes")


class Parser(argparse.ArgumentParser):
    """Bad usage is one line and exit status 2."""

    def error(self, message):
        self.exit(2, f"error: {message} (see --help)\n")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="data.py", description="Download the datasets; without a name, list them.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all, {', '.join(DATASETS)}")
    parser.add_argument("--from", dest="source_dir", metavar="DIR", help="take files from DIR where it has them")
    parser.add_argument("--data_dir", default="data", help="where the files go (default: data)")
    parser.add_argument("--base_url", help="scheme://host of a mirror with the same paths")
    args = parser.parse_args(argv)
    try:
        if unknown := [name for name in args.names if name not in (*DATASETS, "all")]:
            raise ValueError(f"no dataset '{unknown[0]}'; choose from all, {', '.join(DATASETS)}")
        if args.base_url and not (args.base_url.lower().startswith(("http://", "https://")) and args.base_url.isprintable()):
            raise ValueError(f"--base_url {args.base_url!r}: must begin with http:// or https://")
        if args.source_dir and not Path(args.source_dir).is_dir():
            raise FileNotFoundError(f"--from {args.source_dir}: no such folder")
        if not args.names:
            for name, files in DATASETS.items():
                for file in files.values():
                    present = "present" if (Path(args.data_dir) / file).is_file() else "-"
                    print(f"{name:<12}{file:<22}{SOURCES[file][2] / 1e6:>6.1f} MB  {LICENCES[name]:<12}{present}")
        for name in DATASETS if "all" in args.names else dict.fromkeys(args.names):
            for file in DATASETS[name].values():
                path = urllib.parse.urlsplit(SOURCES[file][0]).path
                url = args.base_url.rstrip("/") + path if args.base_url else None
                print(f"{download(file, args.data_dir, args.source_dir, url)}: ok")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run again to resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
