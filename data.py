"""Questions, answers and tokens: answer check, readers, tokenizer, built-in task, encoding, downloads.

    python data.py                  list the datasets
    python data.py gsm8k svamp      download these; each file must have its pinned SHA-256
    python data.py all --from DIR   copy the files that DIR has, download the others

Bad input is a ValueError or FileNotFoundError of one line that names the file and the line.
"""
import argparse
import base64
import functools
import hashlib
import json
import os
import random
import re
import shutil
import sys
import urllib.request
import zlib
from dataclasses import dataclass
from decimal import Decimal
from http.client import HTTPException
from pathlib import Path
from reprlib import repr as short

import tiktoken


# --- examples and the answer check ---

@dataclass(frozen=True)
class Example:
    question: str
    steps: tuple[str, ...]  # "<<48/2=24>>" each; () where the source gives none
    answer: str  # a plain decimal number: "72", "-3.5"
    id: str  # file name and line (or item) from 1: "gsm8k_test.jsonl:17"


MAX_NUMBER = 64  # characters; arithmetic on longer numbers is not free
DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
NUMBER = re.compile(rf"([-+]?)\$?([-+]?)({DIGITS})%?\.?")
ANSWER = re.compile(rf"(?:\*\*)?(?:\\boxed\{{)?([-+]?)(?:[$€£] ?)?([-+]?)({DIGITS})%?[*}}.,;:!?)]*(?!\S)")
STEP = re.compile(r"<<([^<>=\n]*)=([^<>=\n]*)>>")
TERM = re.compile(rf"(?:^|(?!^)(?://|[-+*/x×÷])) ?(?:[-+]? ?\( ?)*([-+]?) ?\$?({DIGITS})%?(?: ?\))* ?")


def parse_number(text: str) -> Decimal | None:
    """The number that `text` is ("1,000", "$72", "72%", "-3.5", ".5", "72."), else None. No exponents."""
    text = text.strip()
    match = NUMBER.fullmatch(text) if len(text) <= MAX_NUMBER else None
    if match is None or (match[1] and match[2]):
        return None
    return Decimal((match[1] or match[2]) + match[3].replace(",", ""))


def format_number(number: Decimal) -> str:
    """Shortest plain form: 51.0 -> "51", 3.50 -> "3.5"."""
    text = format(number, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def numbers_equal(a: Decimal, b: Decimal) -> bool:
    """Two integers must be equal; otherwise |a - b| < 1e-3, as in PAL's evaluation of GSM-Hard."""
    if a == a.to_integral_value() and b == b.to_integral_value():
        return a == b
    return abs(a - b) < Decimal("0.001")


def extract_answer(text: str) -> str | None:
    """The number after the LAST "###" (or GSM8K's "####") in plain form, so that equal answers vote together.

    "### $ 72, in total" and "### \\boxed{72}" are "72", "### 18 ### 5" is "5". None where no number follows.
    """
    _, marker, rest = text.rpartition("###")
    match = ANSWER.match(rest.lstrip()[:2 * MAX_NUMBER].replace("−", "-")) if marker else None
    number = parse_number(match[1] + match[2] + match[3]) if match else None
    return None if number is None else format_number(number)


def is_correct(text: str, example: Example) -> bool:
    """Whether the generated `text` gives the example's answer."""
    answer = extract_answer(text)
    return answer is not None and numbers_equal(Decimal(answer), Decimal(example.answer))


def well_formed(text: str) -> bool:
    """Whether `text` is "### <number>" and nothing else, up to surrounding whitespace."""
    text = text.strip()
    return text.startswith("### ") and not text[4:5].isspace() and parse_number(text[4:]) is not None


def parse_step(text: str) -> tuple[list[Decimal], Decimal] | None:
    """"<<48/2=24>>" -> ([48, 2], 24); None unless all of `text` is such brackets. Nothing is evaluated.

    Several brackets give the operands of all and the result of the last.
    """
    operands, result, text = [], None, " ".join(text.replace("−", "-").split())
    if STEP.sub("", text).strip():
        return None
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

DATASETS = {  # name -> split -> file; GSM8K's validation split is the last HELD_OUT training items
    "gsm8k": {"train": "gsm8k_train.jsonl", "test": "gsm8k_test.jsonl"},
    "gsm8k_aug": {split: f"gsm8k_aug_{split}.txt" for split in ("train", "valid", "test")},
    "svamp": {"test": "svamp.json"}, "gsm_hard": {"test": "gsm_hard.jsonl"},
    "multiarith": {"test": "multiarith.jsonl"},
}
HELD_OUT = 500
FORMS = [("question", "answer"), ("problem", "answer"), ("input", "target"),
         ("Body", "Question", "Equation", "Answer")]


def load(name: str, split: str, data_dir: str | Path = "data") -> list[Example]:
    """The examples of one split ("train", "valid", "test") of a dataset, or of a file that `read_file` reads.

    Of a user's file "test" is all, "valid" the last 5 % (1 to 500 items), "train" the rest. Bad items are
    left out, with a note, of GSM8K-Aug's training file alone: it is not the user's to mend.
    """
    if name in BUILTIN:
        return builtin(name, split)
    is_own = name not in DATASETS
    if is_own and not Path(name).is_file():
        raise ValueError(f"no dataset and no file '{name}'; datasets: {', '.join([*BUILTIN, *DATASETS])}")
    files = {"train": name, "test": name} if is_own else DATASETS[name]
    if split not in files and (split, "train" in files) != ("valid", True):
        raise ValueError(f"{name} has no split '{split}'")
    path = Path("" if is_own else data_dir) / files.get(split, files.get("train"))
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not here; run `python data.py {name} --data_dir {data_dir}`")
    examples = read_file(path, skip_bad=not is_own and path.name == "gsm8k_aug_train.txt")
    if split == "test" or "valid" in files:
        return examples
    held_out = max(1, min(HELD_OUT, len(examples) // 20)) if is_own else HELD_OUT
    if len(examples) <= held_out:
        raise ValueError(f"{name} has {len(examples)} items; holding {held_out} out for 'valid' leaves none")
    return examples[-held_out:] if split == "valid" else examples[:-held_out]


def read_file(path: str | Path, skip_bad: bool = False) -> list[Example]:
    """The examples of a JSON array, of JSON lines or of text lines in the forms that `parse` knows.

    Raises ValueError ("file:line: what is wrong") at the first bad item; with `skip_bad` a note counts them.
    """
    path, examples, bad = Path(path), [], []
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        items = _json(raw) if raw.lstrip().startswith(b"[") else raw.split(b"\n")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for number, item in enumerate(items, 1):
        if isinstance(item, bytes) and not item.strip():
            continue
        try:
            examples.append(Example(*parse(item), f"{path.name}:{number}"))
        except ValueError as error:
            bad.append(f"{path}:{number}: {error}")
            if not skip_bad:
                raise ValueError(bad[0]) from None
    if not examples:
        raise ValueError(bad[0] if bad else f"{path} is empty")
    if bad:
        print(f"note: left out {len(bad)} bad of {len(items)} items, first {bad[0]}", file=sys.stderr)
    return examples


def parse(item) -> tuple[str, tuple[str, ...], str]:
    """A line, or an item of an array -> (question, steps, answer). ValueError if it has none of these forms:

        question||<<48/2=24>> <<48+24=72>> #### 72              GSM8K-Aug's lines of text
        {"question", "answer": "... <<48/2=24>> ... #### 72"}   GSM8K
        {"question", "steps": ["<<48/2=24>>", ...], "answer"}   Coconut, ATP-Latent
        {"question", "cot": "<<48/2=24>> ...", "answer"}        GSM8K-Aug on model hubs
        {"problem", "answer"} or {"input", "target"}            the latter: PAL's GSM-Hard and MultiArith
        {"Body", "Question", "Equation", "Answer"}              SVAMP
    """
    if isinstance(item, bytes):
        line = item.decode().strip()
        question, bars, rest = line.rpartition("||")
        if line.startswith("{"):
            item = _json(line)
        elif bars and "####" in rest and "\r" not in line:
            item = {"question": question, "answer": rest}
    keys = next((form for form in FORMS if isinstance(item, dict) and item.keys() >= set(form)), None)
    if keys is None:
        forms = ", ".join(map("+".join, FORMS))
        raise ValueError(f"neither 'question||<<..>> #### answer' nor an object with the keys {forms}")
    for key in keys[:-1]:
        if not isinstance(item[key], str) or not item[key].strip():
            raise ValueError(f"'{key}' must be text, not {short(item[key])}")
    question, answer = item[keys[0]].strip(), item[keys[-1]]
    solution = item.get("steps") or item.get("cot") or ""
    if isinstance(answer, str):
        text, _, answer = answer.rpartition("####")
        solution = solution or text
    answer = _answer(answer)
    if keys[0] == "Body":  # as in PAL's copy
        question += ("" if question[-1] in ".?!" else ".") + " " + item["Question"].strip()
        solution = "<<" + re.sub(r"\.0+(?![0-9])|\s+", "", item["Equation"]) + f"={answer}>>"
    if isinstance(solution, list) and all(isinstance(step, str) for step in solution):
        solution = " ".join(solution)  # Coconut's files cut "<<5 * 3=15>>" at its blanks
    if not isinstance(solution, str):
        raise ValueError("'steps' must be a list of text, 'cot' text")
    steps = re.findall(r"<<[^<>\n]*>>", solution)
    "".join([question, *steps]).encode()  # a lone surrogate is a ValueError
    return question, tuple(steps), answer


def _answer(value) -> str:
    """A reference answer (text, int or Decimal) in plain form."""
    is_number = isinstance(value, (int, Decimal)) and not isinstance(value, bool)
    if is_number and abs(Decimal(value).adjusted()) < MAX_NUMBER:  # "1e999999999" must not be written out
        value = format_number(Decimal(value))
    number = parse_number(value) if isinstance(value, str) else None
    if number is None:
        raise ValueError(f"the answer {short(value)} is no number")
    return format_number(number)


def _json(text: str | bytes):
    """json.loads with exact decimals. Whatever is wrong is a ValueError of one line."""
    try:
        return json.loads(text, parse_float=Decimal)
    except (ValueError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"broken JSON ({error})") from None


# --- tokenizer ---

# These cut text into pieces, within which byte pairs are merged. The third is GPT-2's on text that was first
# cut at every digit: the last blank before a digit stands alone, as at the end of a text.
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT2_PATTERN = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS_PATTERN = GPT2_PATTERN.replace(r" ?\p{N}+", r"\p{N}").replace(r"(?!\S)", r"(?![^\s\p{N}])")
_RESERVED = [f"reserved_special_token_{i}" for i in range(247)]
LLAMA3_SPECIAL = [f"<|{name}|>" for name in [
    "begin_of_text", "end_of_text", *_RESERVED[:2], "finetune_right_pad_id", "step_id", "start_header_id",
    "end_header_id", "eom_id", "eot_id", "python_tag", *_RESERVED[2:]]]
EOS_NAMES = ("<|end_of_text|>", "<|im_end|>", "<|endoftext|>", "<eos>")
MAX_TEXT = 250_000  # characters; a run of millions of blanks overflows the stack of tiktoken's regex engine
MAX_ID = 2**24
# tokenizer.json writes each byte as one printable character, by GPT-2's table
_printable = [b for b in range(256) if chr(b).isprintable() and b != 0x20]
_others = [b for b in range(256) if b not in _printable]
BYTE_TO_CHAR = {b: chr(b) for b in _printable} | {b: chr(256 + i) for i, b in enumerate(_others)}
CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}


class Tokenizer:
    """A byte-level BPE tokenizer: tiktoken merges, with the file's own ids as ranks.

    special: {name: id}; vocab_size: highest id + 1; bos_id, eos_id: int or None; end_ids: eos_id and the
    special tokens among config.json's eos_token_id.
    """

    def __init__(self, tokens: dict[bytes, int], special: dict[str, int], pattern: str, source):
        """tokens: {bytes: id}, where lower ids merge first; source: relative name and content of the file."""
        self._source, self._added, self._ends = source, {}, []
        self.special, self.bos_id, self.eos_id = {}, None, None
        self._bytes = {id: token for token, id in tokens.items()}
        if len(self._bytes) < len(tokens) or not all(map(_is_id, self._bytes)):
            raise ValueError("ids are doubled, or no integers below 2**24")
        # tiktoken needs every byte; those that the vocabulary lacks get ids that encode_ordinary drops
        ranks = {bytes([b]): MAX_ID + b for b in range(256)} | tokens
        self._bpe = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self._register(special)

    def _register(self, special: dict[str, int]):
        for name, id in special.items():
            is_known = name in self.special or id in self._bytes
            if is_known or not name or not name.isprintable() or not _is_id(id):
                raise ValueError(f"special token {short(name)}: its name or its id {short(id)} does not fit")
            self.special[name], self._bytes[id] = id, name.encode()
        self.vocab_size = max(self._bytes) + 1
        longest_first = sorted(self.special, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        if self.bos_id is None:
            self.bos_id = self.special.get("<|begin_of_text|>")
        if self.eos_id is None:
            self.eos_id = next((self.special[name] for name in EOS_NAMES if name in self.special), None)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "Tokenizer":
        """Read [original/]tokenizer.model (Llama 3's format), else tokenizer.json; and added_tokens.json.

        eos is tokenizer_config.json's eos_token, else the first of config.json's eos_token_id, else one of
        EOS_NAMES; bos is tokenizer_config.json's bos_token, else <|begin_of_text|>.
        """
        folder = Path(directory)
        names = ("original/tokenizer.model", "tokenizer.model", "tokenizer.json")
        file = next((name for name in names if (folder / name).is_file()), None)
        if file is None:
            raise FileNotFoundError(f"{folder} is no folder of a model: it has none of {', '.join(names)}")
        raw = (folder / file).read_bytes()
        read = lambda: _json((folder / file).read_bytes()) if (folder / file).is_file() else {}
        try:
            parts = _read_tokenizer_json(raw) if file.endswith(".json") else _read_tokenizer_model(raw)
            self = cls(*parts, (file, raw))
            file = "added_tokens.json"
            self._added = {name: id for name, id in read().items() if self.special.get(name) != id}
            self._register(self._added)
            file = "tokenizer_config.json"
            values = read()
            stated = {key: values[key] for key in ("bos_token", "eos_token") if values.get(key)}
            for key, value in stated.items():
                name = value["content"] if isinstance(value, dict) else value
                setattr(self, key.replace("token", "id"), self.token_id(name))
            file = "config.json"
            self._set_ends(read().get("eos_token_id"), "eos_token" in stated)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            reason = str(error) if isinstance(error, ValueError) else f"not of the expected form, {error!r}"
            raise ValueError(f"{folder / file}: {' '.join(reason.split())[:300]}") from None
        return self

    def _set_ends(self, ends, has_eos: bool):
        ends = [id for id in (ends if isinstance(ends, list) else [ends]) if type(id) is int]
        self._ends = [id for id in ends if id in self.special.values()]
        if ends and not has_eos:
            self.eos_id = ends[0]
            if self.eos_id not in self._ends:
                raise ValueError(f"eos_token_id {self.eos_id} is no special token of the tokenizer")

    @classmethod
    def from_words(cls, words: list[str], pattern: str, special: list[str]) -> "Tokenizer":
        """A vocabulary of 256 bytes, `words` and `special`, with ids in this order.

        pattern: regex that cuts text into pieces; each word must be one piece. Other text becomes bytes.
        """
        vocab = [BYTE_TO_CHAR[b] for b in range(256)]
        vocab += ["".join(BYTE_TO_CHAR[b] for b in word.encode()) for word in words]
        if len({*vocab, *special}) != len(vocab) + len(special):
            raise ValueError("words and special tokens must be unique, and words longer than one byte")
        known = set(vocab)  # tiktoken merges any two that spell a word, so each two are a merge
        merges = [[word[:i], word[i:]] for word in vocab for i in range(1, len(word))
                  if word[:i] in known and word[i:] in known]
        flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
        split = dict(type="Split", pattern={"Regex": pattern}, behavior="Isolated", invert=False)
        model = dict(type="BPE", ignore_merges=True, vocab={t: i for i, t in enumerate(vocab)}, merges=merges)
        raw = json.dumps({
            "version": "1.0", "model": model, "decoder": byte_level,
            "pre_tokenizer": dict(type="Sequence", pretokenizers=[split, byte_level]),
            "added_tokens": [dict(id=i, content=name, **flags) for i, name in enumerate(special, len(vocab))],
        }, ensure_ascii=False, indent=1).encode()
        return cls(*_read_tokenizer_json(raw), ("tokenizer.json", raw))

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the file that was read byte for byte, added_tokens.json and tokenizer_config.json."""
        names = {id: name for name, id in self.special.items()}
        stated = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": names.get(self.bos_id),
                  "eos_token": names.get(self.eos_id)}
        files = {self._source[0]: self._source[1], "added_tokens.json": json.dumps(self._added).encode(),
                 "tokenizer_config.json": json.dumps(stated).encode()}
        for name, content in files.items():
            path = Path(directory) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def encode_ordinary(self, text: str) -> list[int]:
        """Text -> ids, never a special token's: data must not be able to inject one."""
        if len(text) > MAX_TEXT:
            raise ValueError(f"a text of {len(text)} characters is too long to tokenize (at most {MAX_TEXT})")
        try:
            return [id for id in self._bpe.encode_ordinary(text) if id < MAX_ID]
        except BaseException as error:  # a pattern that fails on a text is a panic of Rust's, no Exception
            if type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"the tokenizer's pattern fails on {short(text)}") from None

    def encode(self, text: str) -> list[int]:
        """Text -> ids, where the name of a special token in the text is that token."""
        parts = self._split.split(text) if self.special else [text]
        ids = [[self.special[part]] if part in self.special else self.encode_ordinary(part) for part in parts]
        return [id for part in ids for id in part]

    def decode(self, ids: list[int]) -> str:
        """Ids -> text; U+FFFD stands for broken UTF-8 and for ids that no token has."""
        return b"".join(self._bytes.get(int(id), b"\xef\xbf\xbd") for id in ids).decode(errors="replace")

    def token_id(self, name: str) -> int:
        """The id of a special token. Raises ValueError if there is none of that name."""
        if name not in self.special:
            raise ValueError(f"the tokenizer has no special token {short(name)}")
        return self.special[name]

    def end_id(self) -> int:
        """eos_id. Raises ValueError where there is none."""
        if self.eos_id is None:
            raise ValueError("the tokenizer has no end token; tokenizer_config.json can name an eos_token")
        return self.eos_id

    @property
    def end_ids(self) -> list[int]:
        return sorted({*self._ends, self.eos_id} - {None})

    def add_special(self, *names: str) -> list[int]:
        """The ids of these special tokens; unknown ones are appended at the end of the id space."""
        for name in names:
            if name not in self.special:
                new = {name: self.vocab_size}
                self._register(new)
                self._added |= new
        return [self.special[name] for name in names]


def _is_id(id) -> bool:
    return type(id) is int and 0 <= id < MAX_ID


def _read_tokenizer_model(raw: bytes):
    """Llama 3's format, "base64 rank" lines -> (tokens, special, pattern)."""
    tokens = {}
    for number, line in enumerate(raw.splitlines()):
        token, _, rank = line.partition(b" ")
        if rank != b"%d" % number:
            raise ValueError(f"line {number + 1} must be 'base64 {number}'; download the file again")
        tokens[base64.b64decode(token, validate=True)] = number
    if any(bytes([b]) not in tokens for b in range(256)):
        raise ValueError("not every single byte is a token; download the file again")
    return tokens, {name: len(tokens) + i for i, name in enumerate(LLAMA3_SPECIAL)}, LLAMA3_PATTERN


def _read_tokenizer_json(raw: bytes):
    """Hugging Face's tokenizer.json -> (tokens, special, pattern). Refuses what tiktoken cannot do."""
    file = _json(raw)
    model, added, pre = file["model"], file.get("added_tokens") or [], file["pre_tokenizer"]
    usual = {"type", "vocab", "merges", "ignore_merges", "fuse_unk", "id", "content", "special", "normalized"}
    normalizer = file.get("normalizer") or {}
    for part in ({"normalizer": normalizer.get("normalizers", normalizer)}, model, *added):
        for key, value in part.items():
            if value and key not in usual or key == "type" and value != "BPE":
                raise ValueError(f"{key} {short(value)} is not supported")
    in_bytes = lambda text: bytes(CHAR_TO_BYTE[c] for c in text)
    special = {token["content"]: token["id"] for token in added}
    if any(model["vocab"].get(name, id) != id for name, id in special.items()):
        raise ValueError("added_tokens and vocab disagree on an id")
    tokens = {in_bytes(name): id for name, id in model["vocab"].items() if name not in special}
    merges = [tuple(map(in_bytes, m.split(" ") if isinstance(m, str) else m)) for m in model["merges"]]
    _check_merges(tokens, merges, model.get("ignore_merges"))
    return tokens, special, _pattern(pre.get("pretokenizers", [pre]))


def _pattern(pre: list[dict]) -> str:
    """The one regex that cuts text as these pre-tokenizers do one after another."""
    kinds, first, last = [p["type"] for p in pre], pre[0], pre[-1]
    by_regex, is_isolated = last.get("use_regex", True), first.get("behavior") == "Isolated"
    if last.get("add_prefix_space") is False:
        if by_regex and kinds == ["ByteLevel"]:
            return GPT2_PATTERN
        if by_regex and kinds == ["Digits", "ByteLevel"] and first["individual_digits"]:
            return DIGITS_PATTERN
        if not by_regex and kinds == ["Split", "ByteLevel"] and is_isolated and not first.get("invert"):
            return first["pattern"]["Regex"] + r"|(?s:.)"  # tiktoken drops what no alternative matches
    raise ValueError(f"pre_tokenizer {short(pre)} is not supported")


def _check_merges(tokens: dict[bytes, int], merges: list[tuple[bytes, bytes]], ignore_merges: bool):
    """Refuse a table by which tiktoken would not merge as Hugging Face does.

    Hugging Face merges the listed pairs in order; tiktoken any two that spell a token, lowest id first. A
    part of a text merges as it does alone. So both agree on every text if ids ascend along the list and each
    token, merged alone, comes to a listed pair.
    """
    ids, pairs = [tokens[a + b] for a, b in merges], set(merges)
    if ids != sorted(ids):
        raise ValueError("the ids do not ascend in the order of the merges, which is not supported")
    for token in tokens:
        parts = [token[i:i + 1] for i in range(len(token))]
        if not 0 < len(parts) <= 256:  # what follows takes quadratic time
            raise ValueError(f"a token of {len(parts)} bytes is not supported")
        while len(parts) > 2:
            id, i = min((tokens.get(a + b, MAX_ID), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
            if id == MAX_ID:
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        # a token that no merges reach: both readers find it if ignore_merges looks whole pieces up
        if len(parts) > 1 and tuple(parts) not in pairs and not (len(parts) > 2 and ignore_merges):
            raise ValueError(f"the merges do not make the token {short(token)}, which is not supported")


# --- built-in task ---
#
# Word problems about who has how many of something. A question is a random expression tree; its nodes are the
# steps. A node may be computed once its children are, so many questions have several right orders of steps.
# The label shows a random one: imitating it is a poor teacher (paper, section 1). A hash of the tree, without
# names and wording, decides the split: no test question is a training question in disguise.

TEST_SETS = ("in_dist", "hard", "reworded", "easy")  # like the paper's GSM8K, GSM-Hard, SVAMP, MultiArith
BUILTIN = {"builtin": dict(train=40_000, valid=1_000), **{name: dict(test=1_000) for name in TEST_SETS},
           "chain": dict(train=40_000, valid=1_000, test=1_000)}  # in_dist where one order of steps is right
NAMES = "Ada Ben Cleo Dan Eve Finn Gina Hugo".split()
ITEMS = "coins cards books pens".split()
THEN = 0.9  # share of changes to one count that are told of its owner ("Then Ada loses 3.")
LARGEST = 40  # every number of a question, a step and an answer is from 1 to LARGEST, one token each

# operation -> common and rare wording; "n" is a given number, so "n+n" adds two of them, "+n" a count and one
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

    def __init__(self, op, value, numbers=(), children=()):
        self.op, self.value, self.numbers, self.children = op, value, numbers, children
        sign = op.strip("n")
        operands = [*(child.value for child in children), *numbers]
        self.step = f"<<{sign.join(map(str, operands))}={value}>>"
        keys = [*(child.key for child in children), *map(str, numbers)]
        self.key = f"({sign} {' '.join(sorted(keys) if sign == '+' else keys)})"


def _tree(rng, steps, wide, branch):
    """A random expression of `steps` operations, or None where a value leaves 1..20 (wide: 1..LARGEST).

    branch: probability that both operands are computed, so that their steps may come in any order.
    """
    if steps > 2 and rng.random() < branch:
        left = rng.randint(1, steps - 2)
        children = [_tree(rng, left, wide, branch), _tree(rng, steps - 1 - left, wide, branch)]
        numbers, op = (), rng.choice("++-")
    else:
        children = [_tree(rng, steps - 1, wide, branch)] if steps > 1 else []
        op = rng.choice("+-*")
        numbers = (rng.randint(2, 3) if op == "*" else rng.randint(*((5, 20) if wide else (1, 9))),)
        if not children:
            numbers = (rng.randint(*((8, 25) if wide else (2, 12))), *numbers)
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
        order.append(rng.choice([n for n in waiting if not any(c in waiting for c in n.children)]))
        waiting.remove(order[-1])
    return order


def _problem(rng, id, bucket, lengths, wide, branch, rare, distractors):
    """One question whose tree hashes to `bucket` (0 test, 1 validation, 2 training).

    wide, branch, rare: probability of large numbers, of a step on two results and of the rare wording;
    distractors: how many statements the answer does not need.
    """
    root, length = None, rng.choice(lengths)
    while root is None or min(zlib.crc32(root.key.encode()) % 8, 2) != bucket:
        root = _tree(rng, length, rng.random() < wide, branch)
    nodes, stack = [], [root]
    while stack:
        nodes.append(stack.pop())
        stack.extend(nodes[-1].children)
    steps = tuple(n.step for n in _random_order(rng, nodes))
    for _ in range(distractors):
        n = rng.randint(2, 9)
        nodes.append(_Node("n+n", None, (rng.randint(2, 12), n)) if rng.random() < 0.5 else
                     _Node("+n", None, (n,), (rng.choice(nodes),)))
    same_owner = {n for n in nodes if n.value and n.numbers and n.children and rng.random() < THEN}
    names, name, item = iter(rng.sample(NAMES, len(NAMES))), {}, rng.choice(ITEMS)
    for n in reversed(nodes):  # children first: a count that changes keeps its owner
        name[n] = name[n.children[0]] if n in same_owner else next(names)
    wording, said = int(rng.random() < rare), []
    for n in _random_order(rng, nodes):
        operands = dict(zip("nm", reversed(n.numbers))) | dict(zip("yz", map(name.get, n.children)))
        sentence = WORDING["then" * (n in same_owner) + n.op][wording]
        said.append(sentence.format(x=name[n], item=item, **operands))
    said.append(WORDING["ask"][wording].format(x=name[root], item=item))
    return Example(" ".join(said), steps, str(root.value), id)


@functools.lru_cache
def builtin(name: str, split: str) -> list[Example]:
    """The examples of a built-in set, always the same in the same order. ValueError for a split it lacks."""
    if split not in BUILTIN[name]:
        raise ValueError(f"built-in set {name!r} has no split {split!r} (it has {', '.join(BUILTIN[name])})")
    mixed = [2] * 6 + [3] * 6 + [4] * 4 + [5] * 2 + [6] * 2
    settings = {  # step counts; wide, branch, rare and the probability of a distractor: see _problem
        "hard": ((5, 6), 1.0, 0.3, 0.0, 0.0), "reworded": (mixed, 0.0, 0.3, 1.0, 1.0),
        "easy": ((2, 3), 0.0, 0.3, 0.0, 0.0), "chain": (mixed, 0.1, 0.0, 0.0, 0.0),
    }
    *how, distracted = settings.get(name, (mixed, 0.1, 0.3, 0.1, 0.1))
    rng, examples = random.Random(f"{name} {split}"), {}
    bucket = ("test", "valid", "train").index(split)
    while len(examples) < BUILTIN[name][split]:
        id = f"{name}_{split}:{len(examples) + 1}"
        example = _problem(rng, id, bucket, *how, int(rng.random() < distracted))
        examples.setdefault(example.question, example)
    return list(examples.values())


BUILTIN_PIECES = r"### | ?[A-Za-z]+(?: (?=[0-9]))?|[0-9]{1,2}|<<|>>\n?|\?\n?|[\s\S]"


def builtin_tokenizer() -> Tokenizer:
    """Each word and each number up to LARGEST is one token. A word takes the space before it and
    the one after it before a number, so that a number is the same token in questions and in steps."""
    words = {"### ", "\n", "?\n", ">>", ">>\n", "<<", *"+-*=.?", *map(str, range(LARGEST + 1)), *NAMES}
    for text in [text for pair in WORDING.values() for text in pair]:
        for name in NAMES:
            for item in ITEMS:
                said = "Ada. " + text.format(x=name, y=name, z=name, m=1, n=1, item=item)
                words.update(re.findall(BUILTIN_PIECES, said))
    return Tokenizer.from_words(sorted(w for w in words if len(w) > 1), BUILTIN_PIECES, ["<|end_of_text|>"])


# --- encoding ---

@dataclass
class Encoded:
    """Ids of question (with bos, if any), of each step and of the answer (with eos). Each part is tokenized
    alone: the border between latents and text is then the same at every stage of the curriculum."""
    question: list[int]
    steps: list[list[int]]
    answer: list[int]
    example: Example


def encode_example(example: Example, tokenizer: Tokenizer) -> Encoded:
    """"question\\n", "<<48/2=24>>\\n" each, "### 72" + eos. Raises ValueError if the tokenizer has no eos."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    question, *steps, answer = map(tokenizer.encode_ordinary, [
        example.question.strip() + "\n", *(step + "\n" for step in example.steps), "### " + example.answer])
    return Encoded(bos + question, steps, answer + [tokenizer.end_id()], example)


def encode_all(examples: list[Example], tokenizer: Tokenizer, max_len: int) -> tuple[list[Encoded], int]:
    """Encode those of at most max_len ids, start and end of latents included -> (encoded, number skipped).
    A long question is never cut: it would have another answer."""
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
SOURCES = {  # file -> (address, SHA-256, bytes); raw has only a Git LFS pointer of gsm8k_aug_train.txt
    "gsm8k_train.jsonl": (f"{_OPENAI}/train.jsonl",
                          "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465", 4166206),
    "gsm8k_test.jsonl": (f"{_OPENAI}/test.jsonl",
                         "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14", 749738),
    "gsm8k_aug_train.txt": (f"https://media.githubusercontent.com/media/{_AUG}/train.txt",
                            "0a3909a9e7d8d2f7ad6b8c7b5608aa744988d835f9bf874d4cf06ca77df6bf8c", 87805358),
    "gsm8k_aug_valid.txt": (f"{_RAW}/{_AUG}/valid.txt",
                            "04f9bddfe8ac4846571b1e2b612b289c95770b5012fdb34cc36a597b041afb87", 143419),
    "gsm8k_aug_test.txt": (f"{_RAW}/{_AUG}/test.txt",
                           "e464efa2713fbcf423bdbfb482c543a6a086188c3d97c294b1d19a70c2a515e8", 388019),
    "svamp.json": (f"{_RAW}/arkilpatel/SVAMP/689d7ccac74b9983a2ac7cc3b264f441b99e7c53/SVAMP.json",
                   "5be77703a6d891ae476d7c082787ad361392aa02453b132516cdd5f4e7934e3e", 339970),
    "gsm_hard.jsonl": (f"{_PAL}/gsmhardv2.jsonl",
                       "2032b0188a49ac0ec38cbe1e695e7d62d6dddc44bbb64f920728aca710e9ddef", 1138151),
    "multiarith.jsonl": (f"{_PAL}/mawpsmultiarith.jsonl",
                         "12e8295088364af21fb6591dbdbd1dda452aade57227f63d725677471ded2951", 109522),
}
TIMEOUT = 30  # seconds without a byte


def download(file: str, data_dir: str | Path, source_dir: str | Path | None = None) -> Path:
    """Put one file of SOURCES into data_dir, from source_dir where that has it, and return its path.

    A right file is left alone, and only a file with the pinned sum gets the final name. ValueError for a
    wrong file, ConnectionError when the network fails.
    """
    origin, digest, _ = SOURCES[file]
    path = Path(data_dir) / file
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(file + ".part")
    if source_dir and (Path(source_dir) / file).is_file():
        origin = (Path(source_dir) / file).resolve().as_uri()
    try:
        with urllib.request.urlopen(origin, timeout=TIMEOUT) as response, open(part, "wb") as copy:
            shutil.copyfileobj(response, copy)
    except (OSError, HTTPException) as error:
        reason = " ".join(str(error).split())
        raise ConnectionError(f"{origin}: {reason}; run again, or use --from DIR") from None
    if hashlib.sha256(part.read_bytes()).hexdigest() != digest:
        part.unlink()
        raise ValueError(f"{origin} is not the published {file}, whose SHA-256 is {digest}")
    os.replace(part, path)
    return path


class Parser(argparse.ArgumentParser):
    """Bad usage is one line and exit status 2."""

    def error(self, message):
        self.exit(2, f"error: {message} (see --help)\n")


def cli(main):
    """Run main(). An error is one line on stderr; the exit status is 2 for what the user can mend, 1 for what
    the machine or a non-finite number ended, 130 for Ctrl-C."""
    try:
        sys.exit(main())
    except (ValueError, OSError, FloatingPointError) as error:
        # one write, or the lines of several processes could mix
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.exit(2 if isinstance(error, (ValueError, FileNotFoundError)) else 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def main(argv: list[str] | None = None):
    parser = Parser(prog="data.py", description="Download the datasets; without a name, list them.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all, {', '.join(DATASETS)}")
    parser.add_argument("--from", dest="source_dir", metavar="DIR", help="copy the files that DIR has")
    parser.add_argument("--data_dir", default="data", help="where the files go (default: data)")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in DATASETS and name != "all":
            raise ValueError(f"no dataset '{name}'; choose from all, {', '.join(DATASETS)}")
    if args.source_dir and not Path(args.source_dir).is_dir():
        raise FileNotFoundError(f"--from {args.source_dir}: no such folder")
    for name, files in DATASETS.items():
        for file in files.values():
            if name in args.names or "all" in args.names:
                print(f"{download(file, args.data_dir, args.source_dir)}: ok")
            elif not args.names:
                here = "present" if (Path(args.data_dir) / file).is_file() else "-"
                print(f"{name:<12}{file:<22}{SOURCES[file][2] / 1e6:>6.1f} MB  {here}")


if __name__ == "__main__":
    cli(main)
