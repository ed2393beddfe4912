"""data.py against Hugging Face's tokenizers, the published files, and a server on 127.0.0.1."""
import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from decimal import Decimal as D
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from make_task import BYTE_TO_CHAR, BYTES, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

import data
from data import Example, Tokenizer

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
SMOLLM2 = Path(os.environ.get("SMOLLM2_DIR", "absent"))
LLAMA3 = Path(os.environ.get("LLAMA3_DIR", "absent"))
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the published data files are not here")
has_smollm2 = (SMOLLM2 / "tokenizer.json").is_file()
needs_smollm2 = pytest.mark.skipif(not has_smollm2, reason="SMOLLM2_DIR is not set")
has_llama3 = (LLAMA3 / "original/tokenizer.model").is_file()
needs_llama3 = pytest.mark.skipif(not has_llama3, reason="LLAMA3_DIR is not set")


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(call, *parts):
    """`call` raises a ValueError whose text is one line that holds all `parts`."""
    with pytest.raises(ValueError) as error:
        call()
    text = str(error.value)
    assert text.isprintable() and len(text) < 1000 and all(str(part) in text for part in parts), text


# --- numbers and answers ---

@pytest.mark.parametrize("text, value", [
    ("72", "72"), (" 1,000 ", "1000"), ("$72", "72"), ("72%", "72"), ("-3.5", "-3.5"), (".5", "0.5"), ("72.",
    "72"),
    ("-$5", "-5"), ("$-5", "-5"), ("+7", "7"), ("1,234,567.89", "1234567.89"), ("007", "7"), ("12%.", "12"),
    ("1,00", None), ("1,0000", None), ("1000,000", None), (",100", None), ("", None), (".", None),
    ("-", None),
    ("$", None), ("1e5", None), ("1e999999999", None), ("nan", None), ("inf", None), ("--5", None),
    ("-$-5", None),
    ("1.2.3", None), ("5 6", None), ("3/4", None), ("٣", None), ("1_000", None), ("9" * 65, None),
    ("0x10", None),
    ("72 dollars", None)])
def test_parse_number(text, value):
    assert data.parse_number(text) == (None if value is None else D(value))


@given(st.decimals(-10**12, 10**12, places=4))
def test_number_round_trip(number):
    text = data.format_number(number)
    assert data.parse_number(text) == number and data.parse_number(f"{number:,f}") == number
    assert text == str(int(number)) if number == int(number) else text[-1] != "0"


@pytest.mark.parametrize("a, b, equal", [
    ("72", "72.0", True), ("72", "73", False), ("1" + "0" * 30, "1" + "0" * 29 + "1", False), ("-2",
    "2", False),
    ("0.3333", "0.33333333", True), ("0.5", "0.501", False), ("0.5", "0.50099", True), ("5", "5.0009", True)])
def test_numbers_equal(a, b, equal):
    assert data.numbers_equal(D(a), D(b)) == data.numbers_equal(D(b), D(a)) == equal


@pytest.mark.parametrize("text, answer, formed", [
    ("### 72", "72", True), (" ### 72\n", "72", True), ("#### 72", "72", False), ("### 72.0", "72", True),
    ("<<48/2=24>>\n### 24", "24", False), ("### 1,000", "1000", True), ("### 18 ### 5", "5", False),
    ("### 72 dollars", "72", False), ("###72", "72", False), ("###  72", "72", False), ("### 7\n2",
    "7", False),
    ("### 72, in total", "72", False), ("### $ 72", "72", False), ("### €5", "5", False), ("### £5",
    "5", False),
    ("### −7", "-7", False), ("### \\boxed{72}", "72", False), ("### **72**", "72", False), ("### -$1,000%",
    "-1000", True),
    ("### **$7.50**.", "7.5", False), ("72", None, False), ("###", None, False), ("### x", None, False),
    ("### 72x", None, False), ("## 72", None, False), ("### ", None, False), ("### 1,00", None, False),
    ("### 1.2.3", None, False), ("### 3:30", None, False), ("### 3/4", None, False), ("### --5", None, False),
    ("### 1e5", None, False), ("### " + "9" * 65, None, False), ("### 18 ###", None, False),
    ("", None, False),
    # words that change the number before them
    ("### 7 1/2", None, False), ("### 7 ½", None, False), ("### 7 and a half", None, False),
    ("### $7 \\frac{1}{2}$", None, False), ("### 5 million", None, False), ("### $5 Billion.", None, False),
    ("### 5 dozen eggs", None, False), ("### 3 or 4", None, False), ("### 3, or 4", None, False),
    ("### 3 to 4", None, False), ("### 3 - 4", None, False), ("### 3 * 10^5", None, False),
    ("### 3 × 10", None, False), ("### **3** or 4", None, False), ("### 1 000", None, False),
    ("### 3 \\times 4", None, False), ("### 3 or\n4", None, False),
    # and words that do not
    ("### 72 in total", "72", False), ("### $ 72, in total", "72", False), ("### 72 - in total", "72", False),
    ("### 72 orders", "72", False), ("### 72 halfway", "72", False), ("### 72 x-rays", "72", False),
    ("### 72 and no more", "72", False), ("### 72 to spare", "72", False), ("### 72\nor 3", "72", False),
    ("### 72 kg", "72", False), ("### 72 millionaires", "72", False), ("### 72 percent", "72", False),
    # LaTeX and units
    ("### \\$72", "72", False), ("### \\boxed{\\$72}", "72", False), ("### 72\\%", "72", False),
    ("### $72$", "72", False), ("### $\\boxed{72}$.", "72", False), ("### 72€", "72", False),
    ("### -$72", "-72", True), ("### $-72$", "-72", False), ("### 72 €", "72", False),
    ("### 72£.", "72", False),
    ("### 72\\frac12", None, False), ("### 72$/hour", None, False), ("### $x$", None, False)])
def test_extract_and_well_formed(text, answer, formed):
    assert data.extract_answer(text) == answer and data.well_formed(text) == formed


def test_is_correct():
    example = Example("q", (), "1080", "x:1")
    assert data.is_correct("### 1,080", example) and data.is_correct("#### $1080.00.", example)
    for text in ("### 1081", "1080", "### 10801", "### 108"):
        assert not data.is_correct(text, example)


@pytest.mark.parametrize("text, operands, result", [
    ("<<48/2=24>>", "48 2", "24"), ("<<2/.5=4>>", "2 .5", "4"), ("<<30/100*2,000=600>>", "30 100 2000",
    "600"),
    ("<<-3+5=2>>", "-3 5", "2"), ("<<5--3=8>>", "5 -3", "8"), ("<<2*(-3+4)=2>>", "2 -3 4", "2"),
    ("<<-(3+4)=-7>>", "3 4", "-7"), ("<<200*50%=100>>", "200 50", "100"), ("<<3 x 4 ÷ 2 = 6>>", "3 4 2", "6"),
    ("<<1+2=3>> <<3*4=12>>\n", "1 2 3 4", "12"), ("<<1+2=3>><<3×4=12>>", "1 2 3 4", "12"), ("<<5=5>>", "5",
    "5"),
    ("<<( (1 + 2) ) * - 3=-9>>", "1 2 -3", "-9"), ("<<10*.4=$4>>", "10 .4", "4"), ("<<$5*3=15>>", "5 3",
    "15"),
    ("<<560//10=56>>", "560 10", "56"), ("<<20−13=7>>", "20 13", "7"), ("<<-(-3)=3>>", "-3", "3")])
def test_parse_step(text, operands, result):
    assert data.parse_step(text) == ([D(x) for x in operands.split()], D(result))


@pytest.mark.parametrize("text", [
    "", " ", "48/2=24", "<<48/2>>", "<<48/2=>>", "<<=24>>", "<<48/2=24", "<<48/2=24>> so", "a <<48/2=24>>",
    "<<48/2=24=24>>", "<<x=24>>", "<<48/=24>>", "<</2=24>>", "<<4 8=12>>", "<<(4+8=12>>", "<<4+8)=12>>",
    "<<()=12>>",
    "<<2(3)=6>>", "<<2**3=8>>", "<<1e3=1000>>", "<<3/4=3/4>>", "<<a+b=c>>", "<<__import__('os')=1>>",
    "<<1)+(2=3>>",
    "<<2,00+1=201>>", "<<1.2.3=1>>", "<<5---3=2>>", "<<" + "9" * 65 + "=1>>", "<<1+2=3>> <<3*4>>",
    "<<1<2=3>>",
    "<<5%5=0>>", "<<5///2=2>>", "<<--5=5>>", "<<//5=5>>", "<<5+=5>>"])
def test_parse_step_refuses(text):
    assert data.parse_step(text) is None


TERMS = st.tuples(st.integers(0, 10**6), st.sampled_from([*"+-*/x×÷", "//"]))


@given(st.lists(TERMS, min_size=1, max_size=6), st.integers(-99, 99))
def test_parse_step_finds_what_was_written(terms, result):
    expression = "".join(f"{number}{sign}" for number, sign in terms).rstrip("+-*/x×÷")
    assert data.parse_step(f"<<{expression}={result}>>") == ([D(number) for number, _ in terms], D(result))


@settings(max_examples=300)
@given(st.text(alphabet="<>=#1234567890.,%$+-*/()x \n{}\\€−", max_size=60))
def test_answer_functions_never_raise(text):
    data.parse_step(text), data.parse_number(text), data.well_formed(text)
    answer = data.extract_answer(text)
    assert answer is None or data.parse_number(answer) is not None


@pytest.mark.parametrize("text", [
    "<<" + "1" * 10**6, "<<" + "1," * 10**6 + "=1>>", "<<" * 10**6, " " * 10**6 + "x",
    "<<1=1>>" * 10**5 + "x",
    "<<" + "(" * 10**6 + "=1>>", "<<1" + " " * 10**6 + "x=1>>",
    "###" * 10**6, "1," * 10**6, "### $" + " " * 10**6, "### " + "$" * 10**6, "### 7 " + "($" * 10**6,
    "### 7" + " " * 10**6 + "x", "### " + "\\boxed{" * 10**6, "### 7" + "*" * 10**6,
    "<<" + "-(" * 10**5 + "=1>>", "<<1" + "-1" * 10**5 + "(=1>>", "### " + "1" * 10**6])
def test_linear_time(text):
    """In time that is no more than linear: with 10**12 operations this would not end."""
    data.parse_step(text), data.parse_number(text), data.extract_answer(text), data.well_formed(text)


# --- readers ---

GSM = '{"question": "How many?", "answer": "It is 4/2=<<4/2=2>>2.\\nThen <<2*540=1080>>1,080\\n#### 1,080"}'
PAL = '{"input": "How many?", "code": "x", "target": %s}'
SVAMP = {"Body": "If he has 3 left", "Question": "How many?", "Equation": "( ( 8.0 + 2.5 ) - 3.0 )",
         "Answer": 7.5}
STEPS = ("<<4/2=2>>", "<<2*540=1080>>")
FORMS = [  # an item, and what it says
    (json.loads(GSM), ("How many?", STEPS, "1080")),
    ({"question": " q ", "steps": ["<<4/2=2>>", "<<2 *",
    "540=1080>>"], "answer": "1,080"},  # Coconut cuts at blanks
     ("q", ("<<4/2=2>>", "<<2 * 540=1080>>"), "1080")),
    ({"question": "q", "steps": [], "answer": "1.0"}, ("q", (), "1")),
    ({"question": "q", "steps": [""], "answer": 1080}, ("q", (), "1080")),
    ({"question": "q", "cot": "<<4/2=2>> <<2*540=1080>>", "answer": "1080"}, ("q", STEPS, "1080")),
    ({"problem": "q", "answer": -3.50}, ("q", (), "-3.5")),
    ({"problem": "q", "answer": "72"}, ("q", (), "72")),
    ({"input": "q", "code": "x", "target": 39}, ("q", (), "39")),
    (SVAMP, ("If he has 3 left How many?", ("<<((8+2.5)-3)=7.5>>",), "7.5")),
    (SVAMP | {"Body": "He ran.", "Equation": "8.0", "Answer": 8.0, "Question": " How many? "},
     ("He ran. How many?", ("<<8=8>>",), "8"))]


def read(path, content):
    return data.read_file(write(path, content))


def test_every_form_in_an_array_and_in_lines(tmp_path):
    items = [item for item, _ in FORMS]
    array = read(tmp_path / "a.json", json.dumps(items, indent=1))
    assert array == [Example(*values, f"a.json:{i}") for i, (_, values) in enumerate(FORMS, 1)]
    lines = b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(item).encode() for item in items)
    lines = read(tmp_path / "a.jsonl", lines)  # blank lines count, but are no items
    assert lines == [Example(*values, f"a.jsonl:{i}") for i, (_, values) in zip(range(1, 99, 2), FORMS)]


def test_read_text_lines(tmp_path):
    content = b"x || y?||<<16-3=13>> <<13*2=26>> #### 5,026\r\nq||#### -3.50\n"
    items = read(tmp_path / "a.txt", content)
    assert items == [Example("x || y?", ("<<16-3=13>>", "<<13*2=26>>"), "5026", "a.txt:1"),
                     Example("q", (), "-3.5", "a.txt:2")]


@pytest.mark.parametrize("target, answer", [
    ("39", "39"), ("-9867630.0", "-9867630"), ("2.0107e-06", "0.0000020107"), ("1e3", "1000"),
    ('"1,200"', "1200"),
    ("3244047.0999999996", "3244047.0999999996"), ("1e63", "1" + "0" * 63)])
def test_numbers_of_json_are_exact(tmp_path, target, answer):
    assert read(tmp_path / "a.jsonl", PAL % target) == [Example("How many?", (), answer, "a.jsonl:1")]


@pytest.mark.parametrize("content, where", [
    (GSM + "\n{\"question\": \"x\n", ":2: Unterminated"),
    (GSM.encode() + b"\n\n\xff\xfe||5", ":3: 'utf-8' codec"),
    (GSM.encode() + b"\n\0", ":2: neither"), ('{"question": "x"}', ":1: neither 'question||"),
    ("[5]", ":1: "), ('{"Question": "x", "Answer": 5}', "('Body', 'Question', 'Equation', 'Answer')"),
    ('{"question": 5, "answer": "#### 5"}', ":1: 'int' object"),
    ('{"question": 5, "answer": "none"}', ":1: 'int' object"),
    ('{"question": " ", "answer": "5"}', ":1: no question"), (GSM + "\n[1]", ":2: neither"),
    (GSM + '\n{"question": " ", "answer": "none"}', ":2: no question"),
    ('{"question": "\\ud800", "answer": "5"}', ":1: 'utf-8' codec"),
    (GSM + "\n{" + "[" * 10**5, ":2: Expecting"),
    (GSM + '\n{"a":' + "[" * 10**5, ":2: maximum recursion"),
    ('{"question": "x", "steps": [5], "answer": "5"}', ":1: "), ("", "is empty"), ("\n \n", "is empty"),
    ('{"question": "x", "cot": {"a": 1}, "answer": "5"}', ":1: "), ('{"input": "x"}', ":1: neither"),
    (PAL % ("1e" + "9" * 30), ":1: "), (PAL % ("9" * 5000), ":1: "), (b"\xef\xbb\xbf", "is empty"),
    ("q||#### 5\nq #### 5", ":2: neither"), ("||#### 5", ":1: no question"),
    (json.dumps([SVAMP])[:-5], "broken ("), ("[\n{},\n{]", "line 3"), ("[]", "is empty"),
    ("[" * 10**5, "broken ("), (json.dumps([SVAMP] * 3, indent=1)[:-9], "broken ("),
    (json.dumps([{"question": "a||b", "answer": "5"}], indent=1)[:-3], "broken ("),
    (json.dumps([SVAMP, {"Body": "x"}]), ":2: neither"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0a39\nsize 5\n", "Git LFS pointer")])
def test_bad_files(tmp_path, content, where):
    refused(lambda: read(tmp_path / "a.json", content), tmp_path / "a.json", where)


@pytest.mark.parametrize("content", [
    '{"question": "x", "answer": "#### five"}', '{"question": "x", "answer": "It is 5."}', PAL % "NaN",
    PAL % "1e999999999", PAL % "1e64", PAL % "true", PAL % "null", PAL % '"None"', PAL % '"3/4"',
    PAL % ("9" * 65), json.dumps({**SVAMP, "Answer": "x"}), "q||5 6", "q||#### five", "q||#### 3:30", "q||"])
def test_items_without_a_number_are_left_out(tmp_path, capsys, content):
    """They are counted, and the first is named by line in one note. A file of which nothing is left is an
    error."""
    good = "good||#### 7"
    items = read(tmp_path / "a.txt", "\n".join([good, content, content, "", good]))
    assert [x.id for x in items] == ["a.txt:1", "a.txt:5"]
    note = "2 of 4 items are left out, as their answers are no numbers; the first is a.txt:2"
    assert capsys.readouterr().err == f"note: {tmp_path}/a.txt: {note}\n"
    read(tmp_path / "b.txt", good)
    assert capsys.readouterr().err == ""
    refused(lambda: read(tmp_path / "a.txt", f"{content}\n{content}"), "a.txt is empty, or no item's")
    refused(lambda: read(tmp_path / "a.txt", f"{content}\nnonsense"), "a.txt:2: neither")  # stays an error


def test_one_rule_for_all_files(tmp_path, capsys):
    write(tmp_path / "gsm8k_aug_train.txt", "q||#### 5\nq||#### 3:30\nq||#### 7\n")
    assert [x.id[-1] for x in data.load("gsm8k_aug", "train", tmp_path)] == ["1", "3"]
    items = [{"problem": "q", "answer": a} for a in ("1", "2", "None", "4")]
    own = write(tmp_path / "own.json", json.dumps(items))
    assert [x.answer for x in data.load(str(own), "test")] == ["1", "2", "4"]
    assert "1 of 4 items" in (err := capsys.readouterr().err) and "own.json:3" in err


@pytest.mark.parametrize("content", ["[Hard] How many?||<<1+2=3>> #### 3\n", "[1]||#### 3\n", "[]||#### 3\n",
                                     '\n\n["a", {"b||#### 3\n', "[" * 10**5 + "||#### 3\n"])
def test_a_question_may_begin_with_a_bracket(tmp_path, content):
    assert [x.answer for x in read(tmp_path / "a.txt", content + "Why?||#### 5\n")] == ["3", "5"]


def test_load_own_file(tmp_path):
    path = write(tmp_path / "own.txt", "".join(f"q{i}||#### {i}\n" for i in range(60)))
    train, valid, test = (data.load(str(path), split) for split in ("train", "valid", "test"))
    assert len(valid) == 3 and train + valid == test and len(test) == 60
    many = write(tmp_path / "many.txt", "q||#### 1\n" * 12_000)
    assert len(data.load(str(many), "valid")) == 500 and len(data.load(str(many), "train")) == 11_500
    one = write(tmp_path / "one.txt", "q||#### 1\n")
    assert len(data.load(str(one), "test")) == 1
    assert data.load(str(one), "train") == []
    for name, split in ((one, "dev"), ("svamp", "train"), ("svamp", "valid"), ("gsm8k", "dev")):
        refused(lambda: data.load(str(name), split, tmp_path), name)
    with pytest.raises(FileNotFoundError, match="gsm8k_aug"):  # names the datasets
        data.load("nothing", "test", tmp_path)
    with pytest.raises(FileNotFoundError, match="run `python data.py gsm8k --data_dir"):
        data.load("gsm8k", "train", tmp_path / "nowhere")


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "own.txt", "q||#### 1\n")
    write(tmp_path / "gsm8k_test.jsonl", GSM)
    assert len(data.load("~/own.txt", "test")) == len(data.load("gsm8k", "test", "~")) == 1


@needs_shared
def test_published_files():
    sizes = {"gsm8k_train.jsonl": 7473, "gsm8k_test.jsonl": 1319, "gsm8k_aug_valid.txt": 500,
             "gsm8k_aug_test.txt": 1319, "gsm_hard.jsonl": 1319, "multiarith.jsonl": 600, "svamp.json": 1000}
    for file, size in sizes.items():
        items = data.read_file(SHARED / file)
        assert len(items) == size and len({x.id for x in items}) == size
        assert all(data.is_correct(f"### {x.answer}", x) for x in items)
        assert all(data.well_formed(f"### {x.answer}") for x in items)
        parsed = [data.parse_step(step) for x in items for step in x.steps]
        assert sum(p is None for p in parsed) <= 2
        assert bool(parsed) == (file not in ("gsm_hard.jsonl", "multiarith.jsonl"))
        digest = hashlib.sha256((SHARED / file).read_bytes()).hexdigest()
        assert [file, digest] in [pin[:2] for files in data.DATASETS.values() for pin in files.values()]
    for file in ("gsm8k_train.jsonl", "gsm8k_test.jsonl"):  # every annotation, found in another way
        for item, line in zip(data.read_file(SHARED / file), (SHARED / file).read_text().splitlines()):
            chunks = json.loads(line)["answer"].split("<<")[1:]
            assert list(item.steps) == [f"<<{chunk.split('>>')[0]}>>" for chunk in chunks]
            assert int(item.answer) == int(json.loads(line)["answer"].split("#### ")[1].replace(",", ""))
    raw_items = json.loads((SHARED / "svamp.json").read_text())
    questions = [x.question for x in data.read_file(SHARED / "svamp.json")]
    assert questions == [f"{raw['Body'].strip()} {raw['Question'].strip()}" for raw in raw_items]
    for item, raw in zip(data.read_file(SHARED / "svamp.json"), raw_items):
        operands, result = data.parse_step(item.steps[0])
        assert float(item.answer) == raw["Answer"] == result and len(item.steps) == 1
        assert [float(x) for x in operands] == [float(x) for x in re.findall(r"[\d.]+", raw["Equation"])]
    hard = [json.loads(line)["target"] for line in (SHARED / "gsm_hard.jsonl").read_text().splitlines()]
    assert [float(x.answer) for x in data.read_file(SHARED / "gsm_hard.jsonl")] == hard


@needs_shared
def test_gsm8k_splits():
    train, valid = data.load("gsm8k", "train", SHARED), data.load("gsm8k", "valid", SHARED)
    assert len(valid) == 500 and train + valid == data.read_file(SHARED / "gsm8k_train.jsonl")
    assert len(data.load("gsm8k", "test", SHARED)) == 1319
    assert len(data.load("gsm8k_aug", "valid", SHARED)) == 500


@needs_shared
def test_the_same_questions_in_three_forms(tmp_path):
    """GSM8K-Aug's lines, written as Coconut's array and as the hubs' lines, are the same examples."""
    array, lines = [], []
    for line in (SHARED / "gsm8k_aug_test.txt").read_text().splitlines():
        question, rest = line.split("||")
        steps, answer = rest.split("####")
        steps, answer = steps.strip(), answer.strip()
        array.append({"question": question, "steps": steps.split(" "), "answer": answer, "idx": 1})
        lines.append(json.dumps({"question": question, "cot": steps, "answer": answer}))
    write(tmp_path / "a", json.dumps(array))
    write(tmp_path / "b", "\n".join(lines))
    values = [[(x.question, x.steps, x.answer) for x in data.read_file(path)]
              for path in (SHARED / "gsm8k_aug_test.txt", tmp_path / "a", tmp_path / "b")]
    assert values[0] == values[1] == values[2]


# --- tokenizer ---

TEXTS = ["", " ", "Hello world", "Natalia sold 48/2 = <<48/2=24>>24 clips\n#### 24", "trailing   ", "  \n",
         "x" * 300,
         "a  b\t\tc\n\n d\r\n e \u3000x\u00a0y\u2003\u200bz\x85w\x0b\x0c", "1 22  333   4444 x5 5x ٣٤ ½ Ⅷ ²",
         "it's IT'S we'll 'sx 'S ’s don't", "日本語 中文。 한국어 हिन्दी ไทย", "   7\n  8 \n 9",
         "$1,000.50!!! ((a+b))",
         "🤔👩‍👩‍👧 e\u0301 n\u0303o \U0001F1E9\U0001F1EA", "ſ K Å ǅ", "\ufeffx\ufffd", "<<<>>>===",
         "naïve café—dash…"]
PIECES = st.one_of(
    st.sampled_from([" ", "  ", "\n", "\t", "\r\n", "1", "12", "a", "the", "'s", "<<", "é", "日", "🤔", "½"]),
    st.characters(max_codepoint=0x2FFFF, exclude_categories=("Cs", "Cn", "Cc", "Co")))
TEXT = st.lists(PIECES, max_size=40).map("".join)
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

X, END = "<|x|>", "<|endoftext|>"  # ids 1 and 0 of a trained BPE; by their names alone END is eos


def from_words(words, pattern, special):
    return tokenizer_of(BYTES + [word.encode() for word in words], pattern, special)


def hf_ids(hf, text):
    return hf.encode(text, add_special_tokens=False).ids


def both(directory):
    """The tokenizer as we and as Hugging Face read it."""
    theirs = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    return Tokenizer.from_pretrained(directory), theirs


def agree(ours, hf, text):
    ids = hf_ids(hf, text)
    assert ours.encode_ordinary(text) == ids, repr(text)
    assert ours.decode(ids) == text and ours.encode_ordinary(text) == ids


def pre_tokenizer(kind):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "llama3")
    first = {"smollm2": pre_tokenizers.Digits(individual_digits=True),
             "llama3": pre_tokenizers.Split(tokenizers.Regex(LLAMA3_PATTERN), "isolated")}
    return byte_level if kind == "gpt2" else pre_tokenizers.Sequence([first[kind], byte_level])


def train_bpe(directory, kind="gpt2", special=(END, X), ignore_merges=False, vocab_size=600):
    """A small byte-level BPE, saved as Hugging Face does."""
    hf = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    hf.pre_tokenizer, hf.decoder = pre_tokenizer(kind), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, special_tokens=list(special),
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    hf.train_from_iterator([t * 3 for t in TEXTS] + [Path(__file__).read_text()[:40_000]], trainer)
    directory.mkdir(exist_ok=True)
    hf.save(str(directory / "tokenizer.json"))
    return hf


KINDS = [("gpt2", False), ("smollm2", False), ("llama3", True), ("llama3", False)]


@pytest.fixture(scope="module", params=KINDS, ids=str)
def trained(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("bpe")
    hf = train_bpe(directory, request.param[0], ignore_merges=request.param[1])
    return Tokenizer.from_pretrained(directory), hf


def test_trained_bpe(trained):
    ours, hf = trained
    assert ours.vocab_size == hf.get_vocab_size() and ours.special == {"<|endoftext|>": 0, "<|x|>": 1}
    assert ours.eos_id == 0 and ours.bos_id is None
    for text in TEXTS:
        agree(ours, hf, text)


@settings(max_examples=150, deadline=None)
@given(text=TEXT)
def test_trained_bpe_random(trained, text):
    agree(*trained, text)


def test_special_tokens_in_text(trained):
    ours, _ = trained
    text = "a <|x|><|endoftext|> b<|x|"  # data cannot inject one
    assert not {0, 1} & set(ours.encode_ordinary(text)) and ours.decode(ours.encode_ordinary(text)) == text
    assert ours.decode([1, 0]) == "<|x|><|endoftext|>"


def table(directory, tokens, merges, ignore_merges=False):
    vocab = {token: i for i, token in enumerate(tokens)}
    hf = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=ignore_merges))
    hf.pre_tokenizer = pre_tokenizer("gpt2")
    hf.save(str(directory / "tokenizer.json"), pretty=False)
    return hf


ALPHABET = list(BYTE_TO_CHAR.values())


@pytest.mark.parametrize("words, merges, problem", [
    (["ab", "bc", "abc"], [("b", "c"), ("a", "b"), ("ab", "c")], "not ascend"),
    (["ab", "abx"], [("a", "b")], r"model.merges do not make 'abx'"),  # no merge makes it
    (["ab", "bc", "abc"], [("a", "b"), ("b", "c"), ("a", "bc")], r"do not make 'abc'"),  # "ab" comes first
    (["ab", "abc"], [("a", "b"), ("a", "c")], "KeyError('ac')")])
def test_a_table_that_tiktoken_would_merge_otherwise_is_refused(tmp_path, words, merges, problem):
    file = {"model": {"vocab": {w: i for i, w in enumerate(ALPHABET + words)}, "merges": merges},
            "pre_tokenizer": PLAIN, "added_tokens": []}
    write(tmp_path / "tokenizer.json", json.dumps(file))
    refused(lambda: Tokenizer.from_pretrained(tmp_path), "tokenizer.json", problem)


def test_ignore_merges_takes_a_whole_word_that_no_merge_makes(tmp_path):
    """But not one that tiktoken would then put together in other words, too."""
    hf = table(tmp_path, ALPHABET + ["ab", "bcd"], [("a", "b")], ignore_merges=True)
    ours = Tokenizer.from_pretrained(tmp_path)
    for text in ("bcd", "bcdx", "abcd", "ab"):
        assert ours.encode_ordinary(text) == hf_ids(hf, text)
    table(tmp_path, ALPHABET + ["ab", "abc"], [("a", "b")], ignore_merges=True)
    refused(lambda: Tokenizer.from_pretrained(tmp_path), "do not make 'abc'")


@st.composite
def small_bpe(draw):
    """A tokenizer.json of random merges of a, b, c: trained ones, and such that no training would make."""
    words, merges = [], []
    for _ in range(draw(st.integers(0, 6))):
        known = ["a", "b", "c", *words]
        pair = draw(st.sampled_from(known)), draw(st.sampled_from(known))
        if len("".join(pair)) < 7 and pair not in merges:
            merges.append(pair)
            words += ["".join(pair)] if "".join(pair) not in words else []
    words += draw(st.lists(st.text("abc", min_size=2, max_size=4), max_size=1))
    added = draw(st.lists(st.text("abc ", min_size=1, max_size=3), max_size=2, unique=True))
    vocab = {word: i for i, word in enumerate(dict.fromkeys(ALPHABET + words))}
    ids, tokens = dict(vocab), []
    for name in added:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": draw(st.booleans())}
        tokens.append({"content": name, "id": ids.setdefault(name, len(ids)), "special": False, **flags})
    split = {"type": "Split", "pattern": {"Regex": draw(st.sampled_from(["[ab]+", "c", r"\\s+|[^\\s]+"]))},
             "behavior": "Isolated", "invert": False}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
             "ignore_merges": draw(st.booleans()), "vocab": vocab, "merges": merges}
    return {"version": "1.0", "truncation": None, "padding": None, "normalizer": None, "added_tokens": tokens,
            "pre_tokenizer": sequence(split, PLAIN | {"use_regex": False, "trim_offsets": True}),
            "post_processor": None, "decoder": None, "model": model}


def test_random_tables_give_the_ids_of_tokenizers_or_are_refused():
    seen = {"read": 0, "refused": 0, "words": 0}

    @settings(max_examples=600, deadline=None, derandomize=True, database=None)
    @given(small_bpe(), st.lists(st.text("abc ", max_size=12), min_size=4, max_size=8))
    def check(file, texts):
        hf = tokenizers.Tokenizer.from_str(json.dumps(file))
        try:
            ours = Tokenizer(file)
        except (ValueError, KeyError):
            seen["refused"] += 1
            return
        seen["read"] += 1
        seen["words"] += bool(file["added_tokens"])
        for text in texts:
            assert ours.encode_ordinary(text) == hf_ids(hf, text), (text, file["added_tokens"])
            assert ours.decode(ours.encode_ordinary(text)) == text

    check()
    assert min(seen.values()) > 60, seen


def test_lacking_bytes(tmp_path):
    train_bpe(tmp_path, vocab_size=300)
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = file["model"]["vocab"]
    del vocab[BYTE_TO_CHAR[0]]
    file["model"]["vocab"] = {token: i for i, token in enumerate(sorted(vocab, key=vocab.get))}
    write(tmp_path / "tokenizer.json", json.dumps(file))
    ours, hf = both(tmp_path)
    assert ours.vocab_size == 299 and ours.decode([299]) == "\ufffd"
    for text in TEXTS:
        agree(ours, hf, text)
    without_zero = ours.encode_ordinary(" a") + ours.encode_ordinary(" b")
    assert ours.encode_ordinary(" a\0 b") == hf_ids(hf, " a\0 b") == without_zero


@pytest.mark.parametrize("names", [["  "], ["QQ", "QQQ", "<x>"], ["(.*)", "|?"]], ids=str)
def test_added_tokens_that_are_not_special(tmp_path, names):
    """They are found in text, as in Hugging Face's library; special ones are not."""
    hf = train_bpe(tmp_path)
    hf.add_tokens(names)
    hf.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, "aQQb", "aQQQQQ <x>b", "(.*)|?x|?(.*)", "   ab  a  "]:
        assert ours.encode_ordinary(text) == hf_ids(hf, text), text
        assert ours.decode(ours.encode_ordinary(text)) == text
    assert set(ours.encode_ordinary("x".join(names))) >= {ours.special[name] for name in names}
    ours.add_special("<|start-latent|>")
    ours.save_pretrained(tmp_path / "copy")
    again, theirs = both(tmp_path / "copy")
    text = " ".join(names) + "  x"
    assert again.encode_ordinary(text) == hf_ids(theirs, text) == ours.encode_ordinary(text)
    write(tmp_path / "tokenizer_config.json", json.dumps({"eos_token": names[0]}))
    ours = Tokenizer.from_pretrained(tmp_path)  # an end token is special, whatever its flag says
    assert ours.eos_id not in ours.encode_ordinary("a" + names[0])


def test_from_words(tmp_path):
    words = ["ab", "abc", "bc", "apple", " apple", "<<", "##", "plus", "日本"]
    pattern = r" ?[a-z]+|[0-9]|[<>#=+]+|\s"
    ours = from_words(words, pattern, ["<eos>", "<|begin_of_text|>"])
    assert [ours.encode_ordinary(w) for w in words[:8]] == [[256 + i] for i in range(8)]
    assert ours.special == {"<eos>": 265, "<|begin_of_text|>": 266} and ours.vocab_size == 267
    assert (ours.eos_id, ours.bos_id) == (265, None)  # a name alone makes no token the first of a text
    ours.save_pretrained(tmp_path)
    again, hf = both(tmp_path)
    for text in ["apple plus apple", "abcab abc xabcx xab apples", "<<1+2=3>>\n### 3", "é ü", "", "ab<<<#"]:
        assert ours.encode_ordinary(text) == again.encode_ordinary(text) == hf_ids(hf, text)
        assert ours.decode(ours.encode_ordinary(text)) == text


@settings(max_examples=100, deadline=None)
@given(words=st.lists(st.text("abc", min_size=2, max_size=5), min_size=1, max_size=8, unique=True),
       texts=st.lists(st.text("abc 1", max_size=12), min_size=5))
def test_from_words_random(words, texts):
    ours = from_words(words, r"[a-z]+|\s|[0-9]", ["<eos>"])
    hf = tokenizers.Tokenizer.from_str(json.dumps(ours.file))
    for text in texts:
        assert ours.encode_ordinary(text) == hf_ids(hf, text)


def test_text_outside_the_pattern_is_kept():
    ours = from_words(["ab"], "[a-z]+", ["<eos>"])
    assert ours.decode(ours.encode_ordinary("ab 1\n!é")) == "ab 1\n!é"
    ours = from_words(["ab", "11", "1111"], "[a-z]+", ["<eos>"])  # what lies between two matches is one piece
    hf = tokenizers.Tokenizer.from_str(json.dumps(ours.file))
    for text in ("1111", "ab1111ab11", "111ab é1111\n"):
        assert ours.encode_ordinary(text) == hf_ids(hf, text)


def test_save_and_load(tmp_path):
    train_bpe(tmp_path)
    ours = Tokenizer.from_pretrained(tmp_path)
    size = ours.vocab_size
    assert ours.add_special("<|start-latent|>", "<|x|>", "<|end-latent|>") == [size, 1, size + 1]
    assert ours.add_special("<|end-latent|>") == [size + 1]
    assert ours.vocab_size == size + 2 and ours.eos_id == 0
    ours.save_pretrained(tmp_path / "new")
    folders = tmp_path, tmp_path / "new"
    old, new = (json.loads((folder / "tokenizer.json").read_text()) for folder in folders)
    assert new.pop("added_tokens")[:2] == old.pop("added_tokens") and new == old
    again = Tokenizer.from_pretrained(tmp_path / "new")
    assert again.special == ours.special and again.vocab_size == ours.vocab_size and again.eos_id == 0
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "new/tokenizer.json"))
    assert hf_ids(theirs, "a<|end-latent|>") == ours.encode_ordinary("a") + [size + 1]
    assert size + 1 not in again.encode_ordinary("a<|end-latent|>")
    assert again.decode([size]) == "<|start-latent|>" and again.decode([10**6]) == "\ufffd"
    again.save_pretrained(tmp_path / "third")  # what was added once stays added
    assert Tokenizer.from_pretrained(tmp_path / "third").special == ours.special


@pytest.mark.parametrize("name, content", [
    ("config.json", '{"eos_token_id": 99999}'), ("config.json", '{"eos_token_id": [77, 0]}'),
    ("config.json", "{"), ("config.json", "[1]"), ("tokenizer_config.json", '{"eos_token": "<|none|>"}'),
    ("tokenizer_config.json", '{"bos_token": "a"}'), ("tokenizer_config.json", '{"eos_token": 5}'),
    ("tokenizer_config.json", '{"eos_token": {"text": "<|x|>"}}'),
    ("tokenizer_config.json", '{"eos_token": ["<|x|>"]}'),
    ("tokenizer_config.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0a39\nsize 5\n")])
def test_bad_files_beside_the_tokenizer(tmp_path, name, content):
    train_bpe(tmp_path, vocab_size=270)
    write(tmp_path / name, content)
    refused(lambda: Tokenizer.from_pretrained(tmp_path), tmp_path, name)


@pytest.mark.parametrize("stated, config, eos", [
    (None, None, 0), ({}, {}, 0), (None, {"eos_token_id": 1}, 1), (None, {"eos_token_id": [1, 0, 77]}, 1),
    ({"eos_token": X}, None, 1), ({"eos_token": {"content": X, "lstrip": False}}, {"eos_token_id": [0]}, 1),
    ({"eos_token": None}, {"eos_token_id": None}, 0), ({"eos_token": X}, {"eos_token_id": 9999}, 1)])
def test_eos(tmp_path, stated, config, eos):
    """tokenizer_config.json's name, else config.json's id, else special names; a saved copy has the same."""
    train_bpe(tmp_path, vocab_size=270)
    for name, value in (("tokenizer_config.json", stated), ("config.json", config)):
        if value is not None:
            write(tmp_path / name, json.dumps(value))
    ours = Tokenizer.from_pretrained(tmp_path)
    assert ours.eos_id == eos
    ours.add_special("<|end_of_text|>", "<eos>")
    assert ours.eos_id == eos  # adding a token never moves it
    ours.save_pretrained(tmp_path / "copy")
    again = Tokenizer.from_pretrained(tmp_path / "copy")
    assert again.eos_id == again.end_id() == eos


def template(*names, ids=(0, 1)):
    """A post_processor that puts special tokens before and after a text, whose place is ""."""
    single = [{"SpecialToken": {"id": n, "type_id": 0}} if n else {"Sequence": {"id": "A", "type_id": 0}}
              for n in names]
    return {"type": "TemplateProcessing", "single": single, "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {n: {"id": n, "ids": [i], "tokens": [n]} for n, i in zip((END, X), ids)}}


OFFSETS = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
LLAMA_3 = {"type": "Sequence", "processors": [OFFSETS, template(X, "")]}


@pytest.mark.parametrize("post, stated, bos", [
    (None, {"bos_token": X}, None), (None, {"bos_token": X, "add_bos_token": False}, None),
    (OFFSETS, {"bos_token": X, "add_bos_token": False}, None), (template(""), {"bos_token": X}, None),
    (template(X, ""), {"bos_token": X, "add_bos_token": False}, 1),
    (LLAMA_3, {"bos_token": {"content": X, "__type": "AddedToken"}}, 1),
    (LLAMA_3, {"add_bos_token": False}, 1), (template(X, ""), {"bos_token": END}, 1), (LLAMA_3, {}, 1),
    (template(""), {"bos_token": X, "add_bos_token": True}, None), (LLAMA_3, None, 1)])
def test_bos_as_in_transformers(tmp_path, post, stated, bos):
    """The post_processor decides, here and in a saved copy, as in transformers."""
    transformers = pytest.importorskip("transformers")
    train_bpe(tmp_path, vocab_size=270)
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    write(tmp_path / "tokenizer.json", json.dumps(file | {"post_processor": post}))
    if stated is not None:
        write(tmp_path / "tokenizer_config.json", json.dumps(stated))
    ours = Tokenizer.from_pretrained(tmp_path)
    ours.save_pretrained(tmp_path / "copy")
    again = Tokenizer.from_pretrained(tmp_path / "copy")
    assert ours.bos_id == again.bos_id == bos
    ids = [bos] * (bos is not None) + ours.encode_ordinary("Hello ab")
    for folder in ([tmp_path] if stated else []) + [tmp_path / "copy"]:
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        assert theirs.encode("Hello ab") == ids


@pytest.mark.parametrize("post", [None, OFFSETS], ids=["none", "ByteLevel"])
@pytest.mark.parametrize("add", [True, False, None])
def test_add_bos_token_where_the_post_processor_says_nothing(tmp_path, post, add):
    train_bpe(tmp_path, vocab_size=270)
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    write(tmp_path / "tokenizer.json", json.dumps(file | {"post_processor": post}))
    write(tmp_path / "tokenizer_config.json", json.dumps({"bos_token": X, "add_bos_token": add}))
    ours = Tokenizer.from_pretrained(tmp_path)
    ours.save_pretrained(tmp_path / "copy")
    again = Tokenizer.from_pretrained(tmp_path / "copy")
    assert ours.bos_id == again.bos_id == (1 if add else None)
    write(tmp_path / "tokenizer_config.json", json.dumps({"add_bos_token": True}))
    assert Tokenizer.from_pretrained(tmp_path).bos_id is None


@pytest.mark.parametrize("rows, stated, special", [
    (270, None, {END: 0, X: 1}), (271, None, {END: 0, X: 1, "[PAD]": 270}),
    (270, {"bos_token": "[PAD]"}, None), (270, {"eos_token": "[PAD]"}, None), (269, None, None)])
def test_tokens_beyond_the_weights(tmp_path, rows, stated, special):
    """Special tokens without a row are dropped, but not those that are needed, and no ordinary word."""
    hf = train_bpe(tmp_path, vocab_size=270)
    hf.add_special_tokens(["[PAD]", "[MASK]"])
    hf.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path / "config.json", json.dumps({"vocab_size": rows}))
    write(tmp_path / "tokenizer_config.json", json.dumps(stated or {}))
    if special is None:
        return refused(lambda: Tokenizer.from_pretrained(tmp_path), "tokenizer.json", f"rows for {rows}")
    ours = Tokenizer.from_pretrained(tmp_path)
    assert ours.special == special and ours.vocab_size == rows and ours.add_special("<x>") == [rows]
    ours.save_pretrained(tmp_path / "copy")
    again, theirs = both(tmp_path / "copy")
    assert again.special == ours.special and theirs.token_to_id("<x>") == rows


def test_a_word_beyond_the_weights_is_refused(tmp_path):
    hf = train_bpe(tmp_path, vocab_size=270)
    hf.add_tokens(["  "])
    hf.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path / "config.json", '{"vocab_size": 270}')
    refused(lambda: Tokenizer.from_pretrained(tmp_path), "has 271 ids", "rows for 270")


def test_names_of_deepseek_and_transformers(tmp_path):
    """DeepSeek-R1-Distill's own names work, and transformers reads a saved folder as we do."""
    transformers = pytest.importorskip("transformers")
    names = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>")
    hf = train_bpe(tmp_path, "llama3", special=names)
    hf.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
    hf.save(str(tmp_path / "tokenizer.json"))
    stated = {"bos_token": {"content": names[0]}, "eos_token": names[1], "add_bos_token": True}
    write(tmp_path / "tokenizer_config.json", json.dumps(stated))
    ours = Tokenizer.from_pretrained(tmp_path)
    assert (ours.bos_id, ours.eos_id) == (0, 1)
    assert ours.special[names[2]] == hf.token_to_id(names[2]) == 2
    ours.save_pretrained(tmp_path / "copy")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (0, 1)
    for text in [*TEXTS, "<think>so</think>"]:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode_ordinary(text)


PLAIN = {"type": "ByteLevel", "add_prefix_space": False}
SPLIT = {"type": "Split", "pattern": {"Regex": "(a"}, "behavior": "Isolated", "invert": False}


def sequence(*parts):
    return {"type": "Sequence", "pretokenizers": list(parts)}


@pytest.mark.parametrize("place, value, problem", [
    ("model merges", 5, ""), ("normalizer", {"type": "NFKC"}, "normalizer"), ("pre_tokenizer", None, ""),
    ("pre_tokenizer", {"type": "Metaspace"}, "Metaspace"),
    ("pre_tokenizer add_prefix_space", True, "ByteLevel"), ("model merges 0", "a b c", ""),
    ("model merges 0", "Ġ zzz", "zzz"), ("model merges 0", "▁ t", "▁t"),
    ("model vocab a", 7, "0, 1, 2"), ("model vocab a", -1, "0, 1, 2"), ("model vocab a", "1", "0, 1, 2"),
    ("model vocab a", True, "0, 1, 2"), ("model vocab 日", 270, "model.vocab: ['日']"),
    ("model vocab a", 2**24, "0, 1, 2"), ("model vocab a", 1.5, "0, 1, 2"), ("model vocab ", 270, "empty"),
    ("model vocab " + "a" * 1001, 270, "too long"), ("model vocab a\u00a0b", 270, "ByteLevel"),
    ("added_tokens 0 id", 50, "next free id"), ("added_tokens 0 id", 9999, "next free id"),
    ("added_tokens 0", {}, "content"), ("model", None, ""), ("pre_tokenizer", sequence(), ""),
    ("added_tokens 0 content", 5, ""), ("model dropout", 0.1, "dropout (0.1)"),
    ("model unk_token", "<unk>", "unk_token"), ("model byte_fallback", True, "byte_fallback"),
    ("model continuing_subword_prefix", "##", "continuing_subword_prefix"),
    ("model end_of_word_suffix", "</w>", "end_of_word_suffix"),
    ("truncation", {"max_length": 1}, "truncation"),
    ("padding", {"strategy": {"Fixed": 9}}, "padding"), ("added_tokens 0 content", "<|y|>", "next free id"),
    ("post_processor", {"type": "RobertaProcessing"}, "post_processor 'RobertaProcessing'"),
    ("post_processor", template(X, END, ""), "post_processor"), ("post_processor", template("z", ""), "'z'"),
    ("post_processor", template(X, "", ids=(0, 7)), "post_processor"),
    ("pre_tokenizer", sequence(SPLIT | {"pattern": {"String": "a"}}, PLAIN | {"use_regex": False}), "Regex"),
    ("pre_tokenizer use_regex", False, "ByteLevel"),
    ("pre_tokenizer", sequence({"type": "Digits", "individual_digits": False}, PLAIN), "Digits"),
    ("pre_tokenizer", sequence(SPLIT, PLAIN | {"use_regex": False}), ""),
    ("pre_tokenizer", sequence(SPLIT | {"behavior": "Removed"}, PLAIN | {"use_regex": False}), "Split")])
def test_bad_tokenizer_json(tmp_path, place, value, problem):
    train_bpe(tmp_path, vocab_size=270)
    path = tmp_path / "tokenizer.json"
    file = json.loads(path.read_text())
    merges = file["model"]["merges"]
    file["model"]["merges"] = [" ".join(merge) for merge in merges]  # the older way to write them
    file["normalizer"] = {"type": "Sequence", "normalizers": []}  # DeepSeek's way to write none
    write(path, json.dumps(file))
    assert Tokenizer.from_pretrained(tmp_path).vocab_size == 270  # good until changed
    *keys, last = [int(key) if key.isdigit() else key for key in place.split(" ")]
    part = file
    for key in keys:
        part = part[key]
    part[last] = value
    write(path, json.dumps(file))
    refused(lambda: Tokenizer.from_pretrained(tmp_path), path, problem)


@pytest.mark.parametrize("flag", ["single_word", "lstrip", "rstrip", "normalized"])
def test_flags_of_added_tokens(tmp_path, flag):
    """They change ids where a token is looked for in text, so not those of special tokens."""
    train_bpe(tmp_path, vocab_size=270)
    path = tmp_path / "tokenizer.json"
    file = json.loads(path.read_text())
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    file["added_tokens"][0][flag] = True
    file["added_tokens"] += [{"content": name, "id": id, "special": False} | flags
                             for name, id in (("QQ", 270), ("QQQ", 271))]
    write(path, json.dumps(file))
    Tokenizer.from_pretrained(tmp_path)
    file["added_tokens"][-1][flag] = True
    write(path, json.dumps(file))
    refused(lambda: Tokenizer.from_pretrained(tmp_path), path, flag)


def test_a_sentencepiece_vocabulary_is_refused_by_name(tmp_path):
    """As a LLaMA 2 or Mistral folder has it; without the fields that tell, by its words."""
    vocab = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "▁", "t", "▁t"])}
    file = {"added_tokens": [], "normalizer": {"type": "Prepend", "prepend": "▁"}, "pre_tokenizer": None,
            "model": {"vocab": vocab, "merges": ["▁ t"], "unk_token": "<unk>", "byte_fallback": True}}
    model = file["model"]
    for name, cleared in (("normalizer", file), ("unk_token", model), ("byte_fallback", model)):
        write(tmp_path / "tokenizer.json", json.dumps(file))
        refused(lambda: Tokenizer.from_pretrained(tmp_path), "tokenizer.json", name)
        cleared[name] = None
    write(tmp_path / "tokenizer.json", json.dumps(file))
    refused(lambda: Tokenizer.from_pretrained(tmp_path), "model.vocab: ['▁']")


def test_missing_and_truncated_tokenizer(tmp_path):
    write(tmp_path / "tokenizer.json", "version https://git-lfs.github.com/spec/v1\nsize 5\n")
    refused(lambda: Tokenizer.from_pretrained(tmp_path), "tokenizer.json", "Git LFS pointer", "git lfs pull")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        Tokenizer.from_pretrained(tmp_path)
    for raw in (b"", b'{"model": {"type": "BPE", "voc', b"[]", b"5", b"\xff", b"[" * 10**5):
        write(tmp_path / "tokenizer.json", raw)
        refused(lambda: Tokenizer.from_pretrained(tmp_path), tmp_path / "tokenizer.json")


def test_a_pattern_that_fails_on_a_text_is_an_error_of_ours():
    """Not a panic of the library's, which no `except Exception` sees."""
    tokenizer = from_words([], r"\b", [])
    refused(lambda: tokenizer.encode_ordinary("a" * 40 + "!"), "pattern fails on")


def test_long_text_is_skipped_not_a_crash():
    ours = from_words(["ab"], data.GPT2_PATTERN, ["<eos>"])
    assert ours.decode(ours.encode_ordinary(" " * data.MAX_TEXT)) == " " * data.MAX_TEXT
    examples = [Example(" x" * 10**6, (), "1", "a:1"), Example("ab", (), "1", "a:2")]
    kept, skipped = data.encode_all(examples, ours, 10**9)
    assert [e.example.id for e in kept] == ["a:2"] and skipped == 1


@pytest.fixture(scope="module")
def smollm2():
    return both(SMOLLM2)


@needs_smollm2
def test_smollm2(smollm2):
    ours, hf = smollm2
    assert ours.vocab_size == 49152 and ours.eos_id == ours.special["<|im_end|>"] == 2
    for text in TEXTS:
        if "\x0b" not in text:  # sic: bytes that the vocabulary lacks are dropped
            agree(ours, hf, text)
        assert ours.encode_ordinary(text) == hf_ids(hf, text)
    text = "<|im_start|>user\n<|im_end|> <repo_name>x<|endoftext|>"
    assert not set(ours.encode_ordinary(text)) & set(ours.special.values())
    for point in (*range(0x3100), *range(0xFE00, 0x10000), *range(0x1F000, 0x1FB00)):  # by blanks and digits
        text = f"a{chr(point)} {chr(point)}1 {chr(point) * 2}b'{chr(point)}  7"
        assert ours.encode_ordinary(text) == hf_ids(hf, text), hex(point)


@needs_smollm2
@settings(max_examples=400, deadline=None)
@given(text=TEXT)
def test_smollm2_random(smollm2, text):
    assert smollm2[0].encode_ordinary(text) == hf_ids(smollm2[1], text)


@needs_smollm2
@needs_shared
def test_smollm2_on_data(smollm2):
    for example in data.read_file(SHARED / "gsm8k_test.jsonl"):
        agree(*smollm2, example.question + "\n" + "\n".join(example.steps))


@needs_llama3
def test_llama3(tmp_path):
    """Meta's ranks by tiktoken equal tokenizer.json made of them as Hugging Face does: any spelling of a
    token is a merge."""
    lines = (LLAMA3 / "original/tokenizer.model").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    meta = tiktoken.Encoding("meta", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})
    chars = {token: "".join(BYTE_TO_CHAR[b] for b in token) for token in ranks}
    merges = [(chars[t[:i]], chars[t[i:]]) for t in ranks for i in range(1, len(t))
              if t[:i] in ranks and t[i:] in ranks]
    hf = tokenizers.Tokenizer(models.BPE({chars[t]: r for t, r in ranks.items()}, merges, ignore_merges=True))
    hf.pre_tokenizer = pre_tokenizer("llama3")
    hf.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    hf.post_processor = processors.TemplateProcessing(single="<|begin_of_text|> $A",
                                                      special_tokens=[("<|begin_of_text|>", 128000)])
    hf.save(str(tmp_path / "tokenizer.json"))
    # as the Instruct models' files have it
    write(tmp_path / "tokenizer_config.json", '{"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}')
    ours = Tokenizer.from_pretrained(tmp_path)
    assert ours.encode_ordinary("Hello world") == [9906, 1917] and ours.vocab_size == 128003
    assert (ours.bos_id, ours.eos_id) == (128000, 128002)
    corpus = TEXTS + [line for line in Path(data.__file__).read_text().splitlines() if "<|" not in line]
    if SHARED.is_dir():
        corpus += [x.question for x in data.read_file(SHARED / "gsm8k_test.jsonl")[:500]]
    for text in corpus:
        assert ours.encode_ordinary(text) == meta.encode_ordinary(text) == hf_ids(hf, text), repr(text)


# --- encoding ---

def test_encode_example():
    ours = from_words(["ab"], r"[a-z]+|\s|.", ["<eos>"])
    example = Example(" ab <eos>? ", ("<<1+2=3>>", "<<3*4=12>>"), "12", "x:1")
    item = data.encode_example(example, ours)
    assert ours.decode(item.question) == "ab <eos>?\n"
    assert [ours.decode(s) for s in item.steps] == ["<<1+2=3>>\n", "<<3*4=12>>\n"]
    assert ours.decode(item.answer) == "### 12<eos>" and item.answer[-1] == ours.eos_id
    assert item.example is example
    assert ours.eos_id not in item.question  # the question cannot inject a token
    length = len(item.question) + sum(map(len, item.steps)) + len(item.answer) + 2
    assert len(item) == length - 2  # the answer counts
    assert data.encode_all([example, example], ours, length) == ([item, item], 0)
    assert data.encode_all([example, example], ours, length - 1) == ([], 2)
    with_bos = from_words(["ab"], r"[a-z]+|\s|.", ["<|begin_of_text|>", "<eos>"])
    with_bos.bos_id = with_bos.special["<|begin_of_text|>"]
    assert data.encode_example(example, with_bos).question == [with_bos.bos_id] + item.question
    without_eos = from_words(["ab"], r"[a-z]+|\s|.", [])
    refused(lambda: data.encode_example(example, without_eos), "end token")


# --- downloads and the command line ---

BODY = bytes(range(256)) * 4000


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        server.requests += 1
        if server.mode == "redirect":
            self.send_response(302)
            self.send_header("Location", self.path)
            return self.end_headers()
        if server.mode == "500":
            return self.send_error(500)
        body = {"wrong": BODY[::-1], "html": b"<html></html>", "long": BODY + b"x"}.get(server.mode, BODY)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:300_000] if server.mode in ("short", "stall") else body)
        self.wfile.flush()
        if server.mode == "stall":
            server.release.wait(10)


@pytest.fixture
def server(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.mode, server.requests, server.release = "ok", 0, threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/a/svamp.json"
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(data, "TIMEOUT", 0.5)
    server.pin = ["svamp.json", hashlib.sha256(BODY).hexdigest(), server.url]
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()


def test_download(server, tmp_path):
    path = data.download(*server.pin, tmp_path / "new")
    assert path.read_bytes() == BODY and os.listdir(tmp_path / "new") == ["svamp.json"]
    data.download(*server.pin, tmp_path / "new")
    assert server.requests == 1  # a right file is left alone
    write(path, "wrong")
    write(tmp_path / "new/svamp.json.part", BODY[:1000])  # of an interrupted download, which starts again
    assert data.download(*server.pin, tmp_path / "new").read_bytes() == BODY and server.requests == 2
    assert os.listdir(tmp_path / "new") == ["svamp.json"]


@pytest.mark.parametrize("mode", ["wrong", "html", "long", "short"])
def test_a_wrong_file_never_gets_the_name(server, tmp_path, mode):
    server.mode = mode
    write(tmp_path / "svamp.json", "old")
    with pytest.raises((ValueError, ConnectionError), match="svamp.json"):
        data.download(*server.pin, tmp_path)
    assert (tmp_path / "svamp.json").read_text() == "old"
    server.mode = "ok"
    assert data.download(*server.pin, tmp_path).read_bytes() == BODY
    assert os.listdir(tmp_path) == ["svamp.json"]


@pytest.mark.parametrize("mode, text", [
    ("500", "500"), ("redirect", "infinite loop"), ("stall", "timed out"), ("offline", "refused")])
def test_network_failures(server, tmp_path, mode, text):
    server.mode = mode
    if mode == "offline":
        server.pin[2] = "http://127.0.0.1:9/svamp.json"
    with pytest.raises(ConnectionError, match=f"(?s)svamp.json: .*{text}.*run again"):
        data.download(*server.pin, tmp_path)
    assert not (tmp_path / "svamp.json").exists()


def test_a_copied_file_is_checked_and_kept(server, tmp_path):
    write(tmp_path / "svamp.json", BODY)
    assert data.download(*server.pin, tmp_path).read_bytes() == BODY and server.requests == 0
    write(tmp_path / "svamp.json", BODY[:-1])
    assert data.download(*server.pin, tmp_path).read_bytes() == BODY and server.requests == 1


def test_addresses_are_pinned():
    for file, digest, url in [pin for files in data.DATASETS.values() for pin in files.values()]:
        host = r"https://(raw|media)\.githubusercontent\.com"
        assert re.fullmatch(host + r"/[\w./-]+/[0-9a-f]{40}/[\w./-]+", url)
        assert re.fullmatch("[0-9a-f]{64}", digest) and Path(file).name == file


@pytest.mark.parametrize("error, status, text", [
    (ValueError("a\nb"), 2, "error: a b\n"),
    (FileNotFoundError("x is not here"), 2, "error: x is not here\n"),
    (OSError(28, "No space"), 1, "error: [Errno 28] No space\n"),
    (FloatingPointError("nan"), 1, "error: nan\n"),
    (KeyboardInterrupt(), 130, "interrupted\n"), (None, None, "")])
def test_cli(capsys, error, status, text):
    def main():
        if error:
            raise error
    with pytest.raises(SystemExit) as exit:
        data.cli(main)
    assert exit.value.code == status and capsys.readouterr().err == text
    with pytest.raises(KeyError):  # a mistake of ours is no one-line error
        data.cli(lambda: {}["x"])


def run_cli(*args, cwd):
    command = [sys.executable, str(ROOT / "data.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=60)


def test_command_line(tmp_path):
    table = run_cli("--help", cwd=tmp_path)
    assert table.returncode == 0 and all(name in table.stdout for name in data.DATASETS)
    write(tmp_path / "file", "x")
    for args, status in ((["nothing"], 2), ([], 2), (["svamp", "--nonsense"], 2),
                         (["svamp", "--data_dir", "file"], 1)):
        bad = run_cli(*args, cwd=tmp_path)
        assert bad.returncode == status and bad.stderr.startswith("error: "), bad
        assert bad.stderr.count("\n") == 1
        assert bad.stdout == "" and not (tmp_path / "data").exists()


@needs_shared
def test_command_line_with_copied_files(tmp_path, monkeypatch):
    (tmp_path / "published").symlink_to(SHARED)
    monkeypatch.setenv("HOME", str(tmp_path))
    done = run_cli("gsm8k", "svamp", "gsm_hard", "multiarith", "--data_dir=~/published", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count("ok") == 5
    old = run_cli("svamp", "--from", str(SHARED), cwd=tmp_path)
    assert old.returncode == 2 and "unrecognized" in old.stderr


def test_flags_are_not_abbreviated(tmp_path):
    bad = run_cli("svamp", "--data", "d", cwd=tmp_path)
    assert bad.returncode == 2 and bad.stderr.startswith("error: unrecognized arguments: --data"), bad


@pytest.mark.parametrize("body, status", [
    ("print('x', flush=True)", 141), ("print('x')", 141), ("print('x' * 10**6)", 141), ("return 3", 3),
    ("print('x'); return 3", 141), ("print('x'); raise SystemExit", 141), ("raise BrokenPipeError", 141),
    ("print('x'); raise ValueError('bad')", 141), ("raise ValueError('bad')", 2)])
def test_a_reader_that_has_gone(tmp_path, body, status):
    """As in `| head`: no traceback, no "Exception ignored", the status of a command that SIGPIPE ends."""
    code = f"import data\ndef main():\n    {body}\ndata.cli(main)"
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run([sys.executable, "-c", code], stdout=write_end, stderr=subprocess.PIPE, text=True,
                          cwd=ROOT, timeout=60, env=os.environ | {"PYTHONUNBUFFERED": ""})
    os.close(write_end)
    assert done.returncode == status and done.stderr == ("error: bad\n" if "bad" in body else ""), done
