"""Questions, answers and tokens: answer check, readers, tokenizer, encoding, downloads.

    python data.py gsm8k svamp      download these into --data_dir; files that are there are only checked
"""
import argparse
import gzip
import hashlib
import json
import os
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
    steps: tuple[str, ...]  # "<<48/2=24>>" each; () if the source has none
    answer: str  # a plain decimal: "72", "-3.5"
    id: str  # file name and line (or item) from 1: "gsm8k_test.jsonl:17"


MAX_NUMBER = 64  # characters
DIGITS = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"  # "1,000", "12.50", "72.", ".5"
NUMBER = re.compile(rf"((?:[-+]?\$?|\$[-+]){DIGITS})%?\.?")  # nothing else: "-$5", "$-5", "72%."
# what makes another number of the one before: "7 1/2", "7 and a half", "3 to 4", "3 or 4", "5 million"
CHANGE = (r"[ \t]+(?:(?:(?:[-–+*/x×÷^=]|and|over|times|to) *)?[\\$€£(.]*[0-9¼-¾⅐-⅞]|\\d?frac|\\times"
          r"|or\b|(?:and )?(?:an? |one )?half\b|(?:hundred|thousand|[mbtr]+illion|dozen)\b)")
# bold or LaTeX, the number with its currency, then a unit, the end of bold or LaTeX, punctuation
ANSWER = re.compile(rf"(?:\*\*|\$|\\boxed\{{)*([-+]?(?:\\?[$€£] ?)?[-+]?{DIGITS})[*$€£%}}\\)\].,;:!?]*"
                    rf"(?!\S|{CHANGE})", re.IGNORECASE)
STEP_PATTERN = re.compile(r"<<([^<>=\n]*)=([^<>=\n]*)>>")
# an operand and what is around it: operator (not before the first), "-(" or "(", sign, digits, ")"
TERM = re.compile(rf"(?:^|(?!^)(?://|[-+*/x×÷])) ?(?:[-+]? ?\( ?)*([-+]?) ?\$?({DIGITS})%?(?: ?\))* ?")


def parse_number(text):
    """The Decimal that `text` is ("1,000", "$72", "72%", ".5", "72."), else None."""
    match = NUMBER.fullmatch(text.strip())
    return Decimal(re.sub("[$,]", "", match[1])) if match and len(match[0]) <= MAX_NUMBER else None


def format_number(number):
    """The shortest plain form: 51.0 -> "51"."""
    text = f"{number or Decimal():f}"  # "-0.0" is 0
    return text.rstrip("0").rstrip(".") if "." in text else text


def numbers_equal(a, b):
    """|a - b| < 1e-3, as in PAL's evaluation of GSM-Hard."""
    return abs(a - b) < Decimal("0.001")


def extract_answer(text):
    """The number after the last "###" or "####": "### $ 72, in total" -> "72". None if there is none, or if
    words change it: "### 5 million"."""
    _, marker, rest = text.rpartition("###")
    match = ANSWER.match(rest.lstrip()[:2 * MAX_NUMBER].replace("−", "-")) if marker else None
    number = parse_number(re.sub(r"[\\$€£ ]", "", match[1])) if match else None
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
    """"<<48/2=24>>" -> ([48, 2], 24), or None. Of several brackets: all operands, the last result."""
    text = " ".join(text.replace("−", "-").split())
    if STEP_PATTERN.sub("", text).strip():
        return None  # there is text outside the brackets
    operands, result = [], None
    for expression, last in STEP_PATTERN.findall(text):
        result, depth, end = parse_number(last), 0, 0
        while depth >= 0 and (term := TERM.match(expression, end)):
            depth += term[0].count("(") - term[0].count(")")
            operands.append(parse_number(term[1] + term[2]))
            end = term.end()
        if depth or not 0 < end == len(expression) or result is None:
            return None
    return None if result is None or None in operands else (operands, result)


# --- readers ---

ASSETS = Path(__file__).with_name("assets") / "builtin"  # the built-in task, made by tests/tools/make_task.py
TEST_SETS = ("in_dist", "hard", "reworded", "easy")  # like the paper's GSM8K, GSM-Hard, SVAMP, MultiArith
BUILTIN = {"builtin": ("train", "valid"), "chain": ("train", "valid", "test"),
           **dict.fromkeys(TEST_SETS, ("test",))}
# name: {split: [file, SHA-256, address]}
DATASETS = json.loads(ASSETS.with_name("datasets.json").read_text())
HELD_OUT = 500  # items at the end of "train" that are "valid" if a dataset has none
FORMS = [  # keys of an item; the last is the answer
    ("question", "answer"),  # GSM8K; with "steps" Coconut, ATP-Latent; with "cot" GSM8K-Aug on hubs
    ("problem", "answer"), ("input", "target"),  # the latter: PAL's GSM-Hard and MultiArith
    ("Body", "Question", "Equation", "Answer")]  # SVAMP
ARRAY = re.compile(r"\s*\[(\s*\{|(?!.*\|\|))")  # how JSON begins, and not "[Hard] How many?||..."
decode_json = json.JSONDecoder(parse_float=Decimal).decode  # numbers stay exact


def load(name, split, data_dir="data"):
    """The examples of one split ("train", "valid", "test") of a dataset, or of a user's file: "test" is all
    of it, "valid" the last 5 % (1 to HELD_OUT), "train" the rest."""
    if name in BUILTIN:
        files = {s: ASSETS / f"{name}_{s}.txt.gz" for s in BUILTIN[name]}
    elif name in DATASETS:
        files = {s: Path(data_dir, file) for s, (file, *_) in DATASETS[name].items()}
    else:
        files = dict.fromkeys(("train", "test"), Path(name))
    source = "train" if split == "valid" and "valid" not in files else split
    if source not in files:
        raise ValueError(f"{name} has no split '{split}'")
    path = files[source].expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no dataset and no file '{path}'; run `python data.py {name} --data_dir "
                                f"{data_dir}` for a dataset: {', '.join(DATASETS)}")
    examples = read_file(path)
    if split == "test" or "valid" in files:
        return examples
    held_out = HELD_OUT if name in DATASETS else max(1, min(HELD_OUT, len(examples) // 20))
    return examples[-held_out:] if split == "valid" else examples[:-held_out]


def read_file(path):
    """The examples of a JSON array or of lines. Items whose answer is no number are left out, with one note.
    Any other fault is a ValueError "file:line: what is wrong"."""
    try:
        text = read_text(path)
        items = decode_json(text) if ARRAY.match(text) else text.split("\n")
    except Exception as error:
        raise ValueError(f"{path}: broken ({error})") from None
    examples, left_out = [], []
    for number, item in enumerate(items, 1):
        try:
            if not isinstance(item, str) or item.strip():
                example = Example(*parse_item(item), f"{path.name.removesuffix('.gz')}:{number}")
                (left_out if example.answer is None else examples).append(example)
        except Exception as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    if not examples:
        raise ValueError(f"{path} is empty, or no item's answer is a number")
    if left_out:
        print(f"note: {path}: {len(left_out)} of {len(left_out + examples)} items are left out, as their "
              f"answers are no numbers; the first is {left_out[0].id}", file=sys.stderr)
    return examples


def read_text(path):
    """A file's text, unpacked if it is a .gz, with \\n as line end."""
    unpack = gzip.open if path.suffix == ".gz" else open
    with unpack(path, "rt", encoding="utf-8-sig", errors="surrogateescape") as file:
        text = file.read()
    if text.startswith("version https://git-lfs"):
        raise ValueError("it is a Git LFS pointer; `git lfs pull` fetches the file")
    return text


def parse_item(item):
    """A line (JSON, or "question||<<48/2=24>> #### 24") or a dict of FORMS -> (question, steps, answer);
    the answer is None if it is no number."""
    if isinstance(item, str):
        is_json = item.lstrip().startswith("{")
        item = decode_json(item) if is_json else dict(zip(("question", "answer"), item.rsplit("||", 1)))
    keys = next((form for form in FORMS if {*form} <= {*item}), None)
    if keys is None:
        raise ValueError(f"neither 'question||<<..>> #### answer' nor an object with keys as {FORMS}")
    question, answer = item[keys[0]].strip(), item[keys[-1]]
    if not question:
        raise ValueError("no question")
    if isinstance(answer, Decimal) and abs(answer.adjusted()) < MAX_NUMBER:
        answer = f"{answer:f}"  # no exponent; "1e999999999" would fill the memory
    text, _, answer = str(answer).rpartition("####")
    number = parse_number(answer)
    answer = None if number is None else format_number(number)
    solution = item.get("steps") or item.get("cot") or text
    if keys[0] == "Body":  # SVAMP: joined as in the released code
        question += " " + item["Question"].strip()
        solution = "<<" + re.sub(r"\.0+(?![0-9])|\s+", "", item["Equation"]) + f"={answer}>>"  # 8.0 -> 8
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
# fields of tokenizer.json that are handled or change no ids; any other must be empty
HANDLED = {"version", "model", "type", "vocab", "merges", "ignore_merges", "fuse_unk", "added_tokens", "id",
           "content", "special", "normalized", "pre_tokenizer", "post_processor", "decoder"}
LACKING = 2**30  # ids from here on stand for bytes that a vocabulary lacks
# tokenizer.json writes a printable byte as that character, the others as those from 256 on (GPT-2's table)
PRINTABLE = [b for b in range(256) if chr(b).isprintable() and b != ord(" ")]
CHAR_TO_BYTE = {b: b for b in PRINTABLE} | dict(enumerate(sorted({*range(256)} - {*PRINTABLE}), 256))


class Tokenizer:
    """Byte-level BPE by tiktoken with the ids of Hugging Face's library for `file`, the content of a
    tokenizer.json; what would change them is refused by name. special: {name: id} of added tokens."""

    def __init__(self, file):
        self.file, model, added = file, file["model"], file["added_tokens"]
        ids = dict(model["vocab"])
        for token in added:  # they count on from the vocabulary
            if ids.setdefault(token["content"], len(ids)) != token["id"]:
                raise ValueError(f"added_tokens: {token['content']!r:.40} has not the next free id")
        if {*map(type, ids.values())} != {int} or sorted(ids.values()) != [*range(len(ids))] or "" in ids:
            raise ValueError("the ids of model.vocab and added_tokens are not 0, 1, 2, ..., or one is empty")
        self.vocab_size, self.special = len(ids), {token["content"]: token["id"] for token in added}
        words = {word: id for word, id in model["vocab"].items() if word not in self.special}
        plain = [token for token in added if not token.get("special")]
        _check(file, plain, words)
        names = sorted((re.escape(token["content"]) for token in plain), reverse=True)  # the longest first
        self._plain = re.compile(f"({'|'.join(names) or '(?!)'})")
        self._bytes = {id: word.translate(CHAR_TO_BYTE).encode("latin-1") for word, id in words.items()}
        # tiktoken needs every byte; encode_ordinary drops those that the vocabulary lacks
        ranks = {bytes([b]): LACKING + b for b in range(256)} | {word: id for id, word in self._bytes.items()}
        self._bytes |= {id: name.encode() for name, id in self.special.items()}
        pattern = _pattern(file["pre_tokenizer"])
        self._bpe = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.bos_id, *more = _begin(file) or [None]
        if more or self.bos_id not in {None, *self.special.values()}:
            raise ValueError("post_processor: what it puts before a text is not one special token")
        self.eos_id = next((self.special[name] for name in EOS_NAMES if name in self.special), None)

    @classmethod
    def from_pretrained(cls, directory):
        """bos begins a text if the post_processor says so, or add_bos_token if it says nothing. eos is
        tokenizer_config.json's, else the first of config.json, else of EOS_NAMES. Other special tokens are
        dropped if the weights have no row for them."""
        path = Path(directory, "tokenizer.json")
        if not path.is_file():
            raise FileNotFoundError(f"{directory} has no tokenizer.json (a model's folder on a hub has one)")
        try:
            file = json.loads(read_text(path))
            added = {token["content"]: token for token in file["added_tokens"]}
            path = path.with_name("tokenizer_config.json")
            stated = json.loads(read_text(path)) if path.is_file() else {}
            names = [stated.get("bos_token"), stated.get("eos_token")]  # a name, or an object with it
            bos, eos = (added[n["content"] if isinstance(n, dict) else n] if n else None for n in names)
            path = path.with_name("config.json")
            config = json.loads(read_text(path)) if path.is_file() else {}
            rows, end = config.get("vocab_size", LACKING), config.get("eos_token_id")
            if not eos and end is not None:
                by_id = {token["id"]: token for token in added.values()}
                eos = by_id[end[0] if isinstance(end, list) else end]
            path = path.with_name("tokenizer.json")
            for token in filter(None, (bos, eos)):
                token["special"] = True  # so that data cannot inject it
            file["added_tokens"] = [token for token in added.values() if token["id"] < rows
                                    or token in (bos, eos) or not token.get("special")]
            self = cls(file)
            if self.vocab_size > rows:
                raise ValueError(f"its tokenizer has {self.vocab_size} ids, its weights have rows for {rows}")
            if bos and stated.get("add_bos_token") and _begin(file) is None:
                self.bos_id = bos["id"]
            self.eos_id = eos["id"] if eos else self.eos_id
            return self
        except Exception as error:
            raise ValueError(f"{path} is broken or not supported: {error!r:.300}") from None

    def save_pretrained(self, directory):
        """Write tokenizer.json and tokenizer_config.json, for transformers as well."""
        names = {id: name for name, id in self.special.items()}
        stated = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": self.bos_id is not None,
                  "bos_token": names.get(self.bos_id), "eos_token": names.get(self.eos_id)}
        Path(directory).mkdir(parents=True, exist_ok=True)
        Path(directory, "tokenizer.json").write_text(json.dumps(self.file))
        Path(directory, "tokenizer_config.json").write_text(json.dumps(stated))

    def encode_ordinary(self, text):
        """Text -> ids, never a special token's: data cannot inject one."""
        ids = []
        try:
            for i, part in enumerate(self._plain.split(text)):  # text, token, text, ...
                ids += [self.special[part]] if i % 2 else self._bpe.encode_ordinary(part)
            return [id for id in ids if id < LACKING]
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


def _check(file, plain, words):
    """ValueError for what might change ids. plain: the added tokens that are not special.

    Hugging Face merges listed pairs in their order, tiktoken any two neighbours that make a word, by id. They
    agree if each word, merged from its bytes, ends in a listed pair. With ignore_merges, both find words that
    no merging reaches where text is cut to exactly these."""
    model = file["model"]
    for name, value in (item for part in (file, model, *plain) for item in part.items()):
        if value and name not in HANDLED and value != {"type": "Sequence", "normalizers": []}:
            raise ValueError(f"{name} ({value!r:.60}) is not supported")
    if len({token.get("normalized") for token in plain}) > 1:
        raise ValueError("added_tokens of which some are normalized are not supported")
    odd = {*"".join(words)} - {*map(chr, CHAR_TO_BYTE)}
    if odd or max(map(len, words)) > 1_000:
        raise ValueError(f"model.vocab: {[*odd][:1]} is not of ByteLevel, or a word is too long")
    pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    made = [words[a + b] for a, b in pairs]
    if made != sorted(made):
        raise ValueError("model.merges whose ids do not ascend are not supported")
    pairs = {*pairs}
    for word in words:
        parts = [*word]
        while len(parts) > 2:
            i = min(range(len(parts) - 1), key=lambda i: words.get(parts[i] + parts[i + 1], LACKING))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        agree = tuple(parts) in pairs if words.keys() >= {*parts} else model.get("ignore_merges")
        if len(parts) == 2 and not agree:
            raise ValueError(f"model.merges do not make {word!r:.40} of model.vocab")


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
        pattern = parts[0]["pattern"]["Regex"]
        return rf"{pattern}|(?:(?!{pattern})(?s:.))+"  # tiktoken drops what no alternative matches
    raise ValueError(f"pre_tokenizer {kind} is not supported")


def _begin(file):
    """The ids that a post_processor puts before a text; None where it has no template, which would tell."""
    post, found = file.get("post_processor") or {"type": "ByteLevel"}, None
    for part in post.get("processors", [post]):
        if part["type"] not in ("TemplateProcessing", "ByteLevel"):  # the latter moves offsets only
            raise ValueError(f"post_processor {part['type']!r:.40} is not supported")
        if part["type"] == "TemplateProcessing":
            before = part["single"][:["Sequence" in item for item in part["single"]].index(True)]
            names = [item["SpecialToken"]["id"] for item in before]
            found = [id for name in names for id in part["special_tokens"][name]["ids"]] + (found or [])
    return found


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
        """All ids, those of the answer included."""
        return len(self.question) + sum(map(len, self.steps)) + len(self.answer)


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
    kept = [item for item in encoded if len(item) + 2 <= max_len]
    return kept, len(examples) - len(kept)


# --- downloads and the command line ---

TIMEOUT = 30  # seconds without a byte


def download(file, digest, address, data_dir):
    """Put a file into data_dir unless it is there. Returns its path."""
    path, part = Path(data_dir, file), Path(data_dir, file + ".part")
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT) as response:
            content = response.read()
    except Exception as error:
        raise ConnectionError(f"{address}: {error}; run again, or copy {file} into {data_dir}") from None
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
    """Run main(). An error is one line, its exit status 2 if the user can mend it, else 1; 130: Ctrl-C; 141:
    nobody reads the output any more, as in `| head -1`."""
    try:
        sys.exit(main())
    except BrokenPipeError:
        sys.exit(141)
    except (ValueError, OSError, FloatingPointError) as error:
        # one write, or the lines of several processes could mix
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.exit(2 if isinstance(error, (ValueError, FileNotFoundError)) else 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        try:
            print(end="", flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter would complain at its end
            sys.exit(141)


def main():
    parser = Parser(description="Download datasets and check their SHA-256.")
    parser.add_argument("names", nargs="+", choices=["all", *DATASETS])
    parser.add_argument("--data_dir", default="data", type=os.path.expanduser, help="default: data")
    args = parser.parse_args()
    for name in DATASETS if "all" in args.names else args.names:
        for source in DATASETS[name].values():
            print(f"{download(*source, args.data_dir)}: ok")


if __name__ == "__main__":
    cli(main)
