"""Files as people have them, with one fault each: the command that reads them names file, place and fault, or does what
is written here. Every case is a file of question, answer and score, built by `data generic`."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from real_openrlhf.data.__main__ import main

HEAD = b"question,answer,score\n"
GOOD = b"What is 1 + 1?,2,5\n"
OBJECT = {"question": "What is 1 + 1?", "answer": "2", "score": 5}


def lines(*rows: bytes) -> bytes:
    """A CSV whose second line is good, and these after it."""
    return HEAD + GOOD + b"".join(row + b"\n" for row in rows)


def objects(*rows: bytes) -> bytes:
    """JSONL whose first line is good, and these after it."""
    return b"\n".join([json.dumps(OBJECT).encode(), *rows]) + b"\n"


def parquet(**columns: Any) -> Callable[[Path], None]:
    given = {"question": ["What?", "Why?"], "answer": ["2", "3"], "score": [5.0, 4.0], **columns}
    return lambda path: pq.write_table(pa.table({k: v for k, v in given.items() if v is not None}), path)


def cut_parquet(path: Path) -> None:
    parquet()(path)
    path.write_bytes(path.read_bytes()[:-40])


def folder(**files: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.mkdir()
        for name, content in files.items():
            (path / name.replace("_", ".")).write_bytes(content)

    return make


def dangling(path: Path) -> None:
    path.symlink_to(path.with_name("gone"))


NUMBER = "is not a number; a label is a number from 1 to 5"
# what is wrong, name of the file, its content, where the message says it is, what it says
BAD: list[tuple[str, str, bytes | Callable[[Path], None], str, str]] = [
    # -- files as a whole
    ("nothing in it", "d.csv", b"", "", "the file is empty"),
    ("spaces only", "d.jsonl", b"  \n \n", "", "the file is empty: it has no rows"),
    ("a header only", "d.csv", HEAD, "", "the file is empty: it has no rows"),
    ("an empty list", "d.json", b"[]", "", "the file is empty: it has no rows"),
    ("a spreadsheet", "d.xlsx", b"PK\3\4", "", "extension '.xlsx'"),
    ("no extension", "d", GOOD, "", "cannot tell the format"),
    ("a spreadsheet called CSV", "d.csv", b"PK\x03\x04\x14\x00\xfc\xff\n\xfe,\n", ", line 1", "header is not UTF-8"),
    ("a web page called JSONL", "d.jsonl", b"<!DOCTYPE html>\n", ", line 1", "broken JSON"),
    ("JSON lines called JSON", "d.json", objects(b"{}"), "", "one object per line is called .jsonl"),
    ("an object instead of a list", "d.json", json.dumps(OBJECT).encode(), "", "must hold a list of objects"),
    ("a list cut off", "d.json", b'[{"question": "a"', "", "broken JSON"),
    ("not gzip", "d.csv.gz", HEAD + GOOD, "", "broken gzip after 0 rows"),
    ("gzip cut off", "d.csv.gz", gzip.compress(lines(GOOD * 4000))[:-20], "", "broken gzip after"),
    ("parquet in gzip", "d.parquet.gz", b"x", "", "cannot tell the format"),
    ("not parquet", "d.parquet", HEAD + GOOD, "", "broken parquet"),
    ("parquet cut off", "d.parquet", cut_parquet, "", "broken parquet"),
    ("parquet without rows", "d.parquet", parquet(question=[], answer=[], score=[]), "", "it has no rows"),
    ("an empty folder", "d", folder(), "", "the folder has no file that ends in .jsonl"),
    ("a folder of other files", "d", folder(notes_txt=b"hello"), "", "the folder has no file that ends in .jsonl"),
    ("a link to nothing", "d.csv", dangling, "", "there is no such file or folder"),
    # -- the form of a CSV
    ("UTF-16", "d.csv", (HEAD + GOOD).decode().encode("utf-16"), ", line 1", "the header is not UTF-8"),
    ("a blank first line", "d.csv", b"\n" + HEAD + GOOD, ", line 1", "there is no header"),
    ("a column twice", "d.csv", b"question,answer,score,score\na,b,1,2\n", ", line 1", "occur more than once"),
    ("semicolons", "d.csv", b"question;answer;score\na;b;1\n", ", line 2", "the columns are ['question;"),
    ("tabs", "d.csv", b"question\tanswer\tscore\na\tb\t1\n", ", line 2", "the columns are ['question\\t"),
    ("no header", "d.csv", GOOD * 2, ", line 2", "no such column"),
    ("another column name", "d.csv", b"Question,answer,score\na,b,1\n", ", line 2", "did you mean 'Question'?"),
    ("a comma too many", "d.csv", lines(b"Why, then?,2,5"), ", line 3", "4 fields, but the header has 3"),
    ("a field too few", "d.csv", lines(b"Why?,2"), ", line 3", "2 fields, but the header has 3"),
    ("a quote that does not end", "d.csv", lines(b'"Why?,2,5'), ", line 3", "broken CSV"),
    ("text behind a quote", "d.csv", lines(b'"Why?" he said,2,5'), ", line 3", "broken CSV"),
    ("Latin-1", "d.csv", lines(b"caf\xe9?,2,5"), ", line 3, column 'question'", "not UTF-8; save the file as UTF-8"),
    # -- the form of JSON lines
    ("a line cut off", "d.jsonl", objects(b'{"question": "a", "ans'), ", line 2", "broken JSON"),
    ("two objects in a line", "d.jsonl", objects(b"{} {}"), ", line 2", "broken JSON: Extra data"),
    ("a comma at the end", "d.jsonl", objects(b'{"question": "a",}'), ", line 2", "broken JSON"),
    ("a list", "d.jsonl", objects(b'["a", "b", 5]'), ", line 2", "a row must be an object"),
    ("null", "d.jsonl", objects(b"null"), ", line 2", "a row must be an object"),
    ("deeply nested", "d.jsonl", objects(b"[" * 200_000), ", line 2", "broken JSON"),
    ("a key twice", "d.jsonl", objects(b'{"question": "a", "answer": "b", "score": 1, "score": 5}'), ", line 2",
     "the key 'score' occurs twice"),
    ("a key twice, inside", "d.json", b'[{"question": "a", "answer": "b", "score": 1, "m": {"k": 1, "k": 2}}]',
     ", row 0 (counted from 0)", "the key 'k' occurs twice"),
    ("half a character", "d.jsonl", objects(b'{"question": "a\\ud800", "answer": "b", "score": 1}'),
     ", line 2, column 'question'", "half of a surrogate pair is missing"),
    # -- scores
    ("no score", "d.csv", lines(b"Why?,2,"), ", line 3, column 'score'", "the label is missing"),
    ("a score of blanks", "d.csv", lines(b"Why?,2,  "), ", line 3, column 'score'", "the label is missing"),
    ("null as score", "d.jsonl", objects(b'{"question": "a", "answer": "b", "score": null}'),
     ", line 2, column 'score'", "the label is missing"),
    ("no key of the score", "d.jsonl", objects(b'{"question": "a", "answer": "b"}'), ", line 2, column 'score'",
     "no such column; the columns are ['question', 'answer']"),
    ("a word", "d.csv", lines(b"Why?,2,four"), ", line 3, column 'score'", f"'four' {NUMBER}"),
    ("a fraction", "d.csv", lines(b"Why?,2,4/5"), ", line 3, column 'score'", f"'4/5' {NUMBER}"),
    ("a comma as point", "d.csv", lines(b'Why?,2,"4,5"'), ", line 3, column 'score'", f"'4,5' {NUMBER}"),
    ("percent", "d.csv", lines(b"Why?,2,80%"), ", line 3, column 'score'", f"'80%' {NUMBER}"),
    ("stars", "d.csv", lines("Why?,2,★★★".encode()), ", line 3, column 'score'", f"'★★★' {NUMBER}"),
    ("an underscore", "d.csv", lines(b"Why?,2,1_0"), ", line 3, column 'score'", NUMBER),
    ("not a number", "d.csv", lines(b"Why?,2,nan"), ", line 3, column 'score'", "is not a finite number"),
    ("NaN in JSON", "d.jsonl", objects(b'{"question": "a", "answer": "b", "score": NaN}'),
     ", line 2, column 'score'", "is not a finite number"),
    ("infinite", "d.csv", lines(b"Why?,2,1e400"), ", line 3, column 'score'", "is not a finite number"),
    ("above the scale", "d.csv", lines(b"Why?,2,6"), ", line 3, column 'score'", "6.0 is off the scale [1, 5]"),
    ("below the scale", "d.csv", lines(b"Why?,2,-1"), ", line 3, column 'score'", "-1.0 is off the scale [1, 5]"),
    ("just below the scale", "d.csv", lines(b"Why?,2,0.9999999"), ", line 3, column 'score'", "is off the scale"),
    ("true", "d.jsonl", objects(b'{"question": "a", "answer": "b", "score": true}'),
     ", line 2, column 'score'", f"True {NUMBER}"),
    ("a list of scores", "d.jsonl", objects(b'{"question": "a", "answer": "b", "score": [4]}'),
     ", line 2, column 'score'", f"[4] {NUMBER}"),
    ("a number of 5,000 digits", "d.jsonl", objects(b'{"question": "a", "answer": "b", "score": ' + b"9" * 5000 + b"}"),
     ", line 2", "broken JSON"),
    ("text in parquet", "d.parquet", parquet(score=["5", "good"]), ", row 1 (counted from 0), column 'score'", NUMBER),
    ("null in parquet", "d.parquet", parquet(score=[5.0, None]), ", row 1 (counted from 0), column 'score'",
     "the label is missing"),
    ("a date in parquet", "d.parquet", parquet(score=pa.array([0, 1], pa.timestamp("s"))),
     ", row 0 (counted from 0), column 'score'", NUMBER),
    ("no such column in parquet", "d.parquet", parquet(score=None), ", row 0 (counted from 0), column 'score'",
     "no such column"),
    # -- texts
    ("no question", "d.csv", lines(b",2,5"), ", line 3, column 'question'", "expected text, got ''"),
    ("a question of blanks", "d.csv", lines(b'" \t",2,5'), ", line 3, column 'question'", "expected text, got"),
    ("a number as question", "d.jsonl", objects(b'{"question": 7, "answer": "b", "score": 1}'),
     ", line 2, column 'question'", "expected text, got 7"),
    ("null as answer", "d.jsonl", objects(b'{"question": "a", "answer": null, "score": 1}'),
     ", line 2, column 'answer'", "expected text, got None"),
    ("a list as answer", "d.jsonl", objects(b'{"question": "a", "answer": ["b"], "score": 1}'),
     ", line 2, column 'answer'", "expected text, got ['b']"),
    ("bytes in parquet", "d.parquet", parquet(answer=[b"2", b"3"]), ", row 0 (counted from 0), column 'answer'",
     "expected text, got b'2'"),
]  # fmt: skip


def build(source: Path, target: Path, *more: str) -> int:
    columns = ["--map", "instruction=question", "response=answer", "label=score"]
    words = ["generic", "--source", str(source), "--output_dir", str(target), *columns, "--scale", "1-5"]
    return main([*words, "--template", "answer", "--sft", *more])


def put(path: Path, content: bytes | Callable[[Path], None]) -> Path:
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    return path


@pytest.mark.parametrize(("name", "content", "where", "says"), [c[1:] for c in BAD], ids=[c[0] for c in BAD])
def test_a_fault_is_named_with_its_place(
    tmp_path: Path,
    name: str,
    content: bytes | Callable[[Path], None],
    where: str,
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = put(tmp_path / name, content)
    assert build(path, tmp_path / "out") == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"error: {path}{where}"), told.err
    assert says in told.err
    assert "Traceback" not in told.err and len(told.err) < 600 + 2 * len(str(path))
    assert not (tmp_path / "out" / "manifest.json").exists()


# what is odd, name, content, the labels that are read
FINE: list[tuple[str, str, bytes | Callable[[Path], None], list[float]]] = [
    ("a byte order mark", "d.csv", b"\xef\xbb\xbf" + lines(), [5]),
    ("Windows' ends of lines", "d.csv", lines().replace(b"\n", b"\r\n"), [5]),
    ("old Macs' ends of lines", "d.csv", lines().replace(b"\n", b"\r"), [5]),
    ("no end of the last line", "d.csv", lines().rstrip(b"\n"), [5]),
    ("blank lines", "d.csv", lines(b"", b"Why?,3,4", b""), [5, 4]),
    ("a line break in a field", "d.csv", lines(b'"Why,\nthen?",3,4'), [5, 4]),
    ("a field of a million characters", "d.csv", lines(b"Why?," + b"x" * 1_000_000 + b",4"), [5, 4]),
    ("an empty answer", "d.csv", lines(b"Why?,,1"), [5, 1]),
    ("blanks around a score", "d.csv", lines(b"Why?,3, 4.5 "), [5, 4.5]),
    ("a score in full-width digits", "d.csv", lines("Why?,3,４".encode()), [5, 4]),
    ("an exponent", "d.csv", lines(b"Why?,3,4.5e0"), [5, 4.5]),
    ("a score as text in JSON", "d.jsonl", objects(b'{"question": "a", "answer": "b", "score": "4"}'), [5, 4]),
    ("more columns", "d.jsonl", objects(b'{"question": "a", "answer": "b", "score": 4, "x": {"y": [1]}}'), [5, 4]),
    ("a decimal in parquet", "d.parquet", parquet(score=pa.array(["4.5", "3"]).cast(pa.decimal128(3, 1))), [4.5, 3]),
    ("an answer with chat tokens", "d.csv", lines(b"Why?,<|im_end|> {{ question }},2"), [5, 2]),
    ("NUL within a text", "d.csv", lines(b"Wh\0y?,3,2"), [5, 2]),
]


@pytest.mark.parametrize(("name", "content", "labels"), [c[1:] for c in FINE], ids=[c[0] for c in FINE])
def test_what_is_merely_odd_is_read(
    tmp_path: Path, name: str, content: bytes | Callable[[Path], None], labels: list[float]
) -> None:
    path = put(tmp_path / name, content)
    assert build(path, tmp_path / "out") == 0
    assert pq.read_table(tmp_path / "out/train.parquet")["label"].to_pylist() == labels


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--source", "nothere.csv"], "nothere.csv: there is no such file or folder"),
        (["--source", "d.csv@test"], "d.csv is a file and has no splits; drop '@test'"),
        (["--source", "train=d.csv", "d.csv"], "--source: either every source names its split"),
        (["--source", "tran=d.csv"], "there is no split 'tran' (did you mean 'train'?)"),
        (["--scale", ""], "generic needs --scale"),
        (["--scale", "5-1"], "the scale '5-1' does not ascend"),
        (["--scale", "1-1000000000"], "more than 1000 values"),
        (["--scale", "1-" + "9" * 5000], "more than 1000 values"),
        (["--scale", "low,high"], "cannot read 'low' in the scale"),
        (["--scale", "1,nan"], "must be finite"),
        (["--split", "train=0.5,dev=0.2"], "--split 'train=0.5,dev=0.2': the shares must be above 0 and sum to 1"),
        (["--split", "train=all"], "'all' is not a number"),
        (["--template", "nope"], "there is no template 'nope'"),
        (["--template", "paper", "--scale", "0-5"], "template paper asks for scores 1-5"),
        (["--map", "label"], "--map 'label': write FIELD=COLUMN"),
        (["--map", "label=score", "label=score"], "--map: label is given twice"),
        (["--map", "lable=score"], "--map: there is no field 'lable' (did you mean 'label'?)"),
        (["--map", "label=score", "response=answer"], "--map: name the column of the whole prompt"),
        (["--output_dir", "d.csv"], "--output_dir"),
    ],
)
def test_a_wrong_flag_is_named(
    tmp_path: Path, words: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d.csv").write_bytes(lines())
    assert build(Path("d.csv"), Path("out"), *words) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and says in told, told
    assert "Traceback" not in told and len(told) < 800
    assert not Path("out/manifest.json").exists()
