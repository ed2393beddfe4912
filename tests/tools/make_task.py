"""Make the files of the built-in task, assets/builtin: python tests/tools/make_task.py

A question is a random expression tree in words; its nodes are the steps, in any order that puts children
first. The label shows a random one. A hash of the tree, without names and wording, decides the split. Only
what changes here needs a new run of this script: training and evaluation read the files.
"""

import gzip
import random
import re
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import ASSETS, CHAR_TO_BYTE, Tokenizer  # noqa: E402

SIZES = {"builtin": dict(train=40_000, valid=1_000), "in_dist": dict(test=1_000), "hard": dict(test=1_000),
         "reworded": dict(test=1_000), "easy": dict(test=1_000),
         "chain": dict(train=40_000, valid=1_000, test=1_000)}
BYTES = [bytes([b]) for b in range(256)]
BYTE_TO_CHAR = {b: chr(b) for b in range(256)} | {b: chr(c) for c, b in CHAR_TO_BYTE.items()}
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


def line(question, steps, answer):
    """One example in GSM8K-Aug's format."""
    return f"{question}||{' '.join(steps)} #### {answer}\n"


def examples(name, split, most=10**9):
    """Lines of the first examples of a built-in set, always the same in the same order."""
    mixed = [2] * 6 + [3] * 6 + [4] * 4 + [5] * 2 + [6] * 2
    settings = {  # number of steps, and the probabilities of _problem
        "hard": ((5, 6), 1.0, 0.3, 0.0, 0.0), "reworded": (mixed, 0.0, 0.3, 1.0, 1.0),
        "easy": ((2, 3), 0.0, 0.3, 0.0, 0.0), "chain": (mixed, 0.1, 0.0, 0.0, 0.0),
    }.get(name, (mixed, 0.1, 0.3, 0.1, 0.1))
    rng, found = random.Random(f"{name} {split}"), {}
    bucket = ("test", "valid", "train").index(split)
    while len(found) < min(most, SIZES[name][split]):
        question, steps, answer = _problem(rng, bucket, *settings)
        found.setdefault(question, line(question, steps, answer))
    return list(found.values())


PIECES = r"### | ?[A-Za-z]+(?: (?=[0-9]))?|[0-9]{1,2}|<<|>>\n?|\?\n?|[\s\S]"


def tokenizer():
    """Each word and number is one token. The space before a number is the word's, so that the number is the
    same token in questions and in steps."""
    words = {"### ", "?\n", ">>", ">>\n", "<<", *map(str, range(10, LARGEST + 1)), *NAMES}
    for text in sum(WORDING.values(), ()):
        for name, item in zip(NAMES, ITEMS * 2):
            said = "Ada. " + text.format(x=name, y=name, z=name, m=1, n=1, item=item)
            words.update(re.findall(PIECES, said))
    words = [word.encode() for word in sorted(words) if len(word) > 1]
    return tokenizer_of(BYTES + words, PIECES, ["<|end_of_text|>"])


def tokenizer_of(tokens, pattern, special):
    """A Tokenizer with these tokens (bytes), then the names in `special`. Within what `pattern` cuts, any two
    tokens that spell a third are merged."""
    tokens = [token.decode("latin-1").translate(BYTE_TO_CHAR) for token in tokens]
    vocab = {token: id for id, token in enumerate(tokens)}
    merges = [(token[:i], token[i:]) for token in tokens for i in range(1, len(token))
              if token[:i] in vocab and token[i:] in vocab]
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    split = dict(type="Split", pattern={"Regex": pattern}, behavior="Isolated", invert=False)
    plain = Tokenizer({
        "version": "1.0", "model": dict(type="BPE", ignore_merges=True, vocab=vocab, merges=merges),
        "pre_tokenizer": dict(type="Sequence", pretokenizers=[split, byte_level]), "decoder": byte_level,
        "added_tokens": []})
    plain.add_special(*special)
    return Tokenizer(plain.file)


if __name__ == "__main__":
    tokenizer().save_pretrained(ASSETS)
    for name, sizes in SIZES.items():
        for split in sizes:
            packed = gzip.compress("".join(examples(name, split)).encode(), mtime=0)
            (ASSETS / f"{name}_{split}.txt.gz").write_bytes(packed)
