"""The built-in task, read back from its English by an independent solver."""

import gzip
import re
from collections import Counter

import pytest
from make_task import LARGEST, SIZES, examples
from make_task import tokenizer as make_tokenizer
from data import ASSETS, BUILTIN, Tokenizer, encode_all, load

SPLITS = [(name, split) for name, splits in BUILTIN.items() for split in splits]
HAS = r"(\w+) (?:has|owns) "
PATTERNS = [  # sentence -> sign, operands (names or numbers)
    (HAS + r"(\d+) \w+ (?:and|plus) (\d+)(?: more)?", "+"),
    (HAS + r"(\d+) \w+ (?:and loses|minus) (\d+)", "-"),
    (HAS + r"(\d+) (?:bags|boxes) of (\d+) \w+", "*"),
    (HAS + r"(?P<n>\d+) (?:more than|beyond) (?P<y>\w+)", "+"),
    (HAS + r"(?P<n>\d+) (?:fewer than|under) (?P<y>\w+)", "-"),
    (HAS + r"(?P<n>\d+) times (?:as many as|what) (?P<y>\w+)(?: owns)?", "*"),
    (r"(?:Then|Later) (?P<own>\w+) (?:gets|finds) (\d+)(?: more)?", "+"),
    (r"(?:Then|Later) (?P<own>\w+) (?:loses|drops) (\d+)", "-"),
    (r"(?:Then|Later) (?P<own>\w+) (?:makes it|owns) (\d+) times (?:as many|that)", "*"),
    (r"(\w+) has as many as (\w+) and (\w+)", "+"), (r"(\w+) owns what (\w+) and (\w+) own", "+"),
    (r"(\w+) has as many as (\w+) without (\w+)", "-"), (r"(\w+) owns what (\w+) owns less (\w+)", "-"),
]
OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def understand(question):
    """{count: (sign, operand, operand)} and the count asked for. A count is called by its owner's name, with
    a mark for each time that it has changed."""
    *said, ask = re.split(r"(?<=\.) ", question)
    facts, now = {}, {}
    for sentence in said:
        for pattern, sign in PATTERNS:
            match = re.fullmatch(pattern, sentence[:-1])
            if match:
                own = "own" in match.re.groupindex
                named = "y" in match.re.groupindex
                operands = (match["y"], match["n"]) if named else match.groups()[not own:]
                operands = [now.get(o, o) for o in operands]
                assert own == (match[1] in now)
                now[match[1]] = now[match[1]] + "'" if own else match[1]
                facts[now[match[1]]] = (sign, *operands)
                break
        else:
            raise AssertionError(sentence)
    asked = re.fullmatch(r"How many \w+ does (\w+) have\?|What number of \w+ is with (\w+)\?", ask)
    return facts, now[asked[1] or asked[2]]


def solve(facts, name, steps):
    """Value and canonical expression of a name; each step needed is put into `steps`."""
    if name.isdigit():
        return int(name), name
    sign, *operands = facts[name]
    (a, x), (b, y) = (solve(facts, o, steps) for o in operands)
    value = OPERATIONS[sign](a, b)
    steps[f"<<{a}{sign}{b}={value}>>"] += 1
    return value, (sign, *(sorted((str(x), str(y))) if sign == "+" else (str(x), str(y))))


@pytest.fixture(scope="module")
def understood():
    out = {}
    for name, split in SPLITS:
        rows = load(name, split)
        out[name, split] = []
        for e in rows if split != "train" else rows[::8]:
            facts, asked = understand(e.question)
            steps = Counter()
            value, key = solve(facts, asked, steps)
            out[name, split].append((e, facts, value, key, steps))
    return out


@pytest.mark.parametrize("name, split", SPLITS)
def test_the_script_makes_the_files(name, split):
    lines = gzip.decompress((ASSETS / f"{name}_{split}.txt.gz").read_bytes()).decode().splitlines(True)
    made = examples(name, split, 2000)
    assert made == lines[:len(made)] and len(lines) == SIZES[name][split]


def test_labels_are_right(understood):
    """The steps are those of the question, each once and after those of its operands; so is the answer."""
    for rows in understood.values():
        for e, _, value, _, steps in rows:
            assert Counter(e.steps) == steps and e.answer == str(value)
            results = set(re.findall(r"\d+", e.question))
            for step in e.steps:
                a, b, result = re.fullmatch(r"<<(\d+)[-+*](\d+)=(\d+)>>", step).groups()
                assert {a, b} <= results and 1 <= int(result) <= LARGEST
                results.add(result)


def test_splits_are_disjoint(understood):
    """No expression of a test or validation set occurs in training, whatever the names and the wording."""
    def keys(split):
        return {str(key) for of in SPLITS if of[1] == split for _, _, _, key, _ in understood[of]}

    valid, tests = keys("valid"), keys("test")
    assert not valid & tests
    for name in [name for name, split in SPLITS if split == "train"]:
        trained = {str(solve(*understand(e.question), Counter())[1]) for e in load(name, "train")}
        assert not (valid | tests) & trained and len(trained) > 20_000


def test_sizes_and_character_of_the_sets(understood):
    for name, split in SPLITS:
        assert len(load(name, split)) == SIZES[name][split]
    lengths = lambda name: {len(e.steps) for e in load(name, "test")}
    assert lengths("in_dist") == lengths("reworded") == lengths("chain") == {2, 3, 4, 5, 6}
    assert lengths("hard") == {5, 6} and lengths("easy") == {2, 3}
    distracted = lambda name: sum(len(facts) > len(e.steps) for e, facts, *_ in understood[name, "test"])
    assert distracted("hard") == distracted("easy") == distracted("chain") == 0
    assert distracted("reworded") == 1000 and 70 < distracted("in_dist") < 130
    assert all(" owns " in e.question for e in load("reworded", "test"))
    several = lambda *of: [any(a in facts and b in facts for _, a, b in facts.values())
                           for _, facts, *_ in understood[of]]
    train = several("builtin", "train")
    assert sum(train) > 0.3 * len(train)  # two computed operands: their steps may be taken in either order
    assert not any(any(several("chain", split)) for split in BUILTIN["chain"])


def test_several_orders_are_right_and_any_is_shown(understood):
    """Of two independent steps the label shows the one that the question tells first about half the time."""
    several = followed = 0
    for e, facts, _, _, steps in understood["builtin", "train"]:
        told = list(facts.values())
        independent = all(operand.isdigit() for fact in told[:2] for operand in fact[1:])
        if len(facts) == len(e.steps) == len(steps) == 3 and independent:
            sign, a, b = told[0]
            several += 1
            followed += e.steps[0].startswith(f"<<{a}{sign}{b}=")
    assert several > 200 and abs(followed / several - 0.5) < 5 * 0.5 / several**0.5


def test_tokenizer(tmp_path):
    """One token a number, no byte fallback in the task, and Hugging Face tokenizers gives the same ids."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    from tokenizers import Tokenizer as Theirs
    theirs, again = Theirs.from_file(str(tmp_path / "tokenizer.json")), Tokenizer.from_pretrained(ASSETS)
    assert (ASSETS / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    number = {tokenizer.encode_ordinary(str(i))[0] for i in range(LARGEST + 1)}
    assert len(number) == LARGEST + 1
    for name, split in SPLITS:
        for e in load(name, split)[:300]:
            for text in (e.question + "\n", *(s + "\n" for s in e.steps), "### " + e.answer):
                ids = tokenizer.encode_ordinary(text)
                assert ids == theirs.encode(text, add_special_tokens=False).ids == again.encode_ordinary(text)
                assert tokenizer.decode(ids) == text
                assert sum(i in number for i in ids) == len(re.findall(r"\d+", text))
    assert max(len(e.question) for e in encode_all(load("hard", "test"), tokenizer, 256)[0]) < 80


def test_unknown_split():
    with pytest.raises(ValueError, match="easy has no split 'train'"):
        load("easy", "train")
