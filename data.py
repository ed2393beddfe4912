"""Questions, answers and tokens: answer check, readers, tokenizer, encoding, downloads.

    python data.py gsm8k svamp [--from DIR]     download these and check their SHA-256 (copy what DIR has)
"""
import argparse
import gzip
import hashlib
import json
import re
import sys
import urllib.request
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
    """The Decimal that `text` is ("1,000", "$72", "72%", ".5", "72."), else None."""
    text = text.strip()
    match = NUMBER.fullmatch(text) if len(text) <= MAX_NUMBER else None
    return Decimal(re.sub("[$,]", "", match[1])) if match else None


def format_number(number):
    """The shortest plain form: 51.0 -> "51"."""
    text = f"{number:f}"
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
    match = re.fullmatch(r"\s*### (\S+)\s*", text)
    return bool(match) and parse_number(match[1]) is not None


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

ASSETS = Path(__file__).with_name("assets") / "builtin"  # the built-in task, made by tests/builtin_task.py
TEST_SETS = ("in_dist", "hard", "reworded", "easy")  # like the paper's GSM8K, GSM-Hard, SVAMP, MultiArith
BUILTIN = {"builtin": ("train", "valid"), "chain": ("train", "valid", "test"),
           **dict.fromkeys(TEST_SETS, ("test",))}
# name -> split -> [file, SHA-256, address]
DATASETS = json.loads(ASSETS.with_name("datasets.json").read_text())
HELD_OUT = 500  # items at the end of "train" that are "valid" where a dataset has none
FORMS = [  # keys of an item; the last is the answer
    ("question", "answer"),  # GSM8K; with "steps" Coconut, ATP-Latent; with "cot" GSM8K-Aug on hubs
    ("problem", "answer"), ("input", "target"),  # the latter: PAL's GSM-Hard and MultiArith
    ("Body", "Question", "Equation", "Answer")]  # SVAMP
_json = json.JSONDecoder(parse_float=Decimal).decode


def load(name, split, data_dir="data"):
    """The examples of one split ("train", "valid", "test") of a dataset, or of a user's file: "test" is all
    of it, "valid" the last 5 % (1 to HELD_OUT), "train" the rest."""
    files = {s: [ASSETS / f"{name}_{s}.txt.gz"] for s in BUILTIN.get(name, ())}
    files = files or DATASETS.get(name, {"train": [name], "test": [name]})
    source = "train" if split == "valid" and "valid" not in files else split
    if source not in files:
        raise ValueError(f"{name} has no split '{split}'")
    path = Path(data_dir if name in DATASETS else "", files[source][0])
    if not path.is_file():
        raise FileNotFoundError(f"no dataset and no file '{path}'; run `python data.py {name} --data_dir "
                                f"{data_dir}` for a dataset: {', '.join(DATASETS)}")
    examples = read_file(path, skip_bad=name == "gsm8k_aug" and split == "train")
    if split == "test" or "valid" in files:
        return examples
    held_out = HELD_OUT if name in DATASETS else max(1, min(HELD_OUT, len(examples) // 20))
    return examples[-held_out:] if split == "valid" else examples[:-held_out]


def read_file(path, skip_bad=False):
    """The examples of a JSON array or of lines, packed if built in. Errors are "file:line: what is wrong"."""
    examples, unpack = [], gzip.open if path.resolve().parent == ASSETS.resolve() else open
    with unpack(path, "rt", encoding="utf-8-sig", errors="surrogateescape") as file:
        try:
            text = file.read()  # with \n for \r\n and \r
            items = _json(text) if text.lstrip().startswith("[") else text.split("\n")
        except Exception as error:
            raise ValueError(f"{path}: broken ({error})") from None
    for number, item in enumerate(items, 1):
        if isinstance(item, str) and not item.strip():
            continue
        try:
            examples.append(Example(*parse(item), f"{path.name.removesuffix('.gz')}:{number}"))
        except Exception as error:
            if not skip_bad:
                raise ValueError(f"{path}:{number}: {error}") from None
            print(f"note: left out {path}:{number}: {error}", file=sys.stderr)
    if not examples:
        raise ValueError(f"{path} is empty")
    return examples


def parse(item):
    """A line (JSON, or "question||<<48/2=24>> #### 24") or a dict of FORMS -> (question, steps, answer)."""
    if isinstance(item, str):
        question, _, answer = item.rpartition("||")
        item = _json(item) if item.lstrip().startswith("{") else {"question": question, "answer": answer}
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
    "".join([question, *steps]).encode()  # ValueError: a lone surrogate, as of bytes that are no UTF-8
    return question, tuple(steps), answer


# --- tokenizer ---

# How text is cut before bytes are merged. DIGITS_PATTERN also cuts at every digit.
GPT2_PATTERN = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS_PATTERN = GPT2_PATTERN.replace(r" ?\p{N}+", r"\p{N}").replace(r"(?!\S)", r"(?![^\s\p{N}])")
EOS_NAMES = ("<|end_of_text|>", "<|im_end|>", "<|endoftext|>", "<eos>")
MAX_TEXT = 250_000  # characters; millions of blanks overflow the stack of tiktoken's regex engine
MAX_ID = 2**24
# tokenizer.json writes a printable byte as that character, the others as those from 256 on (GPT-2's table)
CHAR_TO_BYTE = dict(enumerate((b for b in range(256) if not chr(b).isprintable() or b == ord(" ")), 256))


class Tokenizer:
    """Byte-level BPE by tiktoken, whose ranks are the ids of `file`, the content of a tokenizer.json.
    special: {name: id}; vocab_size: highest id + 1; bos_id, eos_id: int or None."""

    def __init__(self, file):
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
        ranks = {bytes([b]): MAX_ID + b for b in range(256)} | tokens
        pattern = _pattern(file["pre_tokenizer"])
        self._bpe = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.vocab_size = ids[-1] + 1
        self.bos_id = self.special.get("<|begin_of_text|>")
        self.eos_id = next((self.special[name] for name in EOS_NAMES if name in self.special), None)

    @classmethod
    def from_pretrained(cls, directory):
        """eos is tokenizer_config.json's, else the first of config.json, else one of EOS_NAMES."""
        path = Path(directory, "tokenizer.json")
        if not path.is_file():
            raise FileNotFoundError(f"{directory} has no tokenizer.json (a model's folder on a hub has one)")
        try:
            self = cls(json.loads(path.read_bytes()))
            path = path.with_name("tokenizer_config.json")
            stated = json.loads(path.read_bytes()) if path.is_file() else {}
            for key in ("bos_token", "eos_token"):
                if name := stated.get(key):
                    name = name["content"] if isinstance(name, dict) else name
                    setattr(self, key.replace("token", "id"), self.special[name])
            path = path.with_name("config.json")
            config = json.loads(path.read_bytes()) if path.is_file() else {}
            rows, ends = config.get("vocab_size", MAX_ID), config.get("eos_token_id")
            if self.vocab_size > rows:
                raise ValueError(f"its tokenizer has {self.vocab_size} ids, its weights have rows for {rows}")
            if ends is not None and not stated.get("eos_token"):
                self.eos_id = ends[0] if isinstance(ends, list) else ends
                if self.eos_id not in self.special.values():
                    raise ValueError(f"eos_token_id {self.eos_id} is no special token")
        except Exception as error:
            raise ValueError(f"{path} is broken or not supported: {error!r:.300}") from None
        return self

    def save_pretrained(self, directory):
        """Write tokenizer.json and tokenizer_config.json, for transformers as well."""
        names = {id: name for name, id in self.special.items()}
        stated = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": names.get(self.bos_id),
                  "eos_token": names.get(self.eos_id)}
        Path(directory).mkdir(parents=True, exist_ok=True)
        Path(directory, "tokenizer.json").write_text(json.dumps(self.file))
        Path(directory, "tokenizer_config.json").write_text(json.dumps(stated))

    def encode_ordinary(self, text):
        """Text -> ids, never a special token's: data cannot inject one."""
        try:
            return [id for id in self._bpe.encode_ordinary(text) if id < MAX_ID]
        except (Exception, KeyboardInterrupt):
            raise
        except BaseException:  # a panic of Rust's at a bad pattern
            raise ValueError(f"the tokenizer's pattern fails on {text!r:.40}") from None

    def decode(self, ids):
        """Ids -> text, with U+FFFD for broken UTF-8 and unknown ids."""
        return b"".join(self._bytes.get(int(id), b"\xff") for id in ids).decode(errors="replace")

    def end_id(self):
        """eos_id, or a ValueError."""
        if self.eos_id is None:
            raise ValueError("the tokenizer has no end token: tokenizer_config.json needs an eos_token")
        return self.eos_id

    def add_special(self, *names):
        """The ids of these special tokens; unknown ones are appended."""
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


# --- encoding ---

@dataclass
class Encoded:
    """Ids, with bos (if any) and eos. Each part is tokenized alone, so that no stage of the curriculum moves
    the border between latents and text."""
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
    encoded = (encode_example(e, tokenizer) for e in examples
               if len(e.question) + sum(map(len, e.steps)) < MAX_TEXT)
    kept = [item for item in encoded if len(item) + len(item.answer) + 2 <= max_len]
    return kept, len(examples) - len(kept)


# --- downloads and the command line ---

TIMEOUT = 30  # seconds without a byte


def download(file, digest, address, data_dir, source_dir=None):
    """Put a file into data_dir, from source_dir where that has it, unless it is there. Returns its path."""
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
    """Bad usage is one line and exit status 2. Flags are never abbreviated."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        self.exit(2, f"error: {message} (see --help)\n")


def cli(main):
    """Run main(). An error is one line, its exit status 2 if the user can mend it, else 1; 130: Ctrl-C."""
    try:
        sys.exit(main())
    except (ValueError, OSError, FloatingPointError) as error:
        # one write, or the lines of several processes could mix
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.exit(2 if isinstance(error, (ValueError, FileNotFoundError)) else 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def main():
    parser = Parser(description="Download datasets and check their SHA-256.")
    parser.add_argument("names", nargs="+", choices=["all", *DATASETS])
    parser.add_argument("--from", dest="source_dir", metavar="DIR", help="copy the files that DIR has")
    parser.add_argument("--data_dir", default="data", help="where the files go (default: data)")
    args = parser.parse_args()
    for name in DATASETS if "all" in args.names else args.names:
        for source in DATASETS[name].values():
            print(f"{download(*source, args.data_dir, args.source_dir)}: ok")


if __name__ == "__main__":
    cli(main)
