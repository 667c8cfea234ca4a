"""Rows to prompts: labels, prompts, lengths; bad rows stop the load or are listed."""

from __future__ import annotations

import json
import logging
from collections import Counter
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.data.dataset import JudgeDataset, content_hash, read_label
from real_openrlhf.data.prompt import Prompt
from real_openrlhf.data.row import DataError
from real_openrlhf.data.template import PromptTemplate, TemplateError
from tests.helpers.tokenizers import CHAT_TEMPLATE, word_tokenizer

SCALE = ScoreScale.parse("1-5")


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def load(source, **change):
    options = {
        "input_key": "input",
        "label_key": "label",
        "scale": SCALE,
        "tokenizer": word_tokenizer(),
        "template": PromptTemplate(),
        "max_prompt_tokens": 5,
    }
    return JudgeDataset.load(source, **(options | change))


def row(label=3, text="rate this"):
    return {"input": text, "label": label}


def test_good_rows(tmp_path):
    source = write(tmp_path / "d.jsonl", [row(1), row("4.5", "a b c"), row(5.0)])
    data = load(source)
    tokenizer = word_tokenizer()
    ids = tuple(tokenizer.encode("a b c", add_special_tokens=False))
    assert data.prompts[1] == Prompt(token_ids=ids, label=4.5, row=1, text="a b c")
    assert [p.label for p in data.prompts] == [1.0, 4.5, 5.0]
    assert (len(data), data.skipped, data.source) == (3, (), source)


def test_the_response_that_is_judged(tmp_path):
    """Of a built file's column, or the one that is named; what is named must be there and be text."""
    tokenizer = word_tokenizer()
    ids = tuple(tokenizer.encode("b c", add_special_tokens=False))
    rows = [row() | {"judged": {"response": "b c"}, "answer": "c"}, row() | {"judged": None, "answer": ""}, row()]
    source = write(tmp_path / "d.jsonl", rows)
    assert [p.judged_ids for p in load(source).prompts] == [ids, None, None]
    data = load(source, judged_key="answer", skip_bad_rows=True)
    assert [p.judged_ids for p in data.prompts] == [ids[1:], ()]
    assert [(bad.row, bad.column) for bad in data.skipped] == [(3, "answer")]
    with pytest.raises(DataError, match=r"line 2, column 'judged': the response that is judged is text, got None"):
        load(write(tmp_path / "e.jsonl", [row() | {"judged": "b"}, row() | {"judged": None}]), judged_key="judged")
    # It is for watches alone: the data are the same.
    assert load(source).sha256 == load(write(tmp_path / "f.jsonl", [row()] * 3)).sha256


@pytest.mark.parametrize(
    ("value", "expected"),
    [(3, 3.0), (2.25, 2.25), ("4", 4.0), (" 1.5 ", 1.5), ("5e0", 5.0), (Decimal("2.5"), 2.5), (1, 1.0)],
)
def test_labels_read(value, expected):
    label = read_label(value, SCALE)
    assert label == expected and type(label) is float


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("good", "'good' is not a number"),
        ("1_0", "'1_0' is not a number"),
        (True, "True is not a number"),
        (False, "False is not a number"),
        ([3], "is not a number"),
        ({"a": 3}, "is not a number"),
        (10**400, "is not a number"),
        (float("nan"), "nan is not a finite number"),
        ("nan", "'nan' is not a finite number"),
        (float("inf"), "inf is not a finite number"),
        ("-inf", "is not a finite number"),
        (None, "the label is missing"),
        ("", "the label is missing"),
        ("  ", "the label is missing"),
        (0, "0.0 is off the scale"),
        (5.01, "5.01 is off the scale"),
        ("-3", "-3.0 is off the scale"),
    ],
)
def test_bad_labels_name_file_row_column_and_scale(tmp_path, value, reason):
    source = write(tmp_path / "d.jsonl", [row(), row(value)])
    with pytest.raises(DataError) as caught:
        load(source)
    message = str(caught.value)
    assert message.startswith(f"{source}, line 2, column 'label': ")
    assert reason in message
    assert "from 1 to 5 (scale 1,2,3,4,5)" in message and "--data.skip_bad_rows" in message


@pytest.mark.parametrize(
    ("bad", "column", "reason"),
    [
        ({"input": "a", "lable": 3}, "label", r"the columns are ['input', 'lable'] (did you mean 'lable'?)"),
        ({"label": 3}, "input", "no such column"),
        (row(text=""), "input", "the prompt is empty"),
        (row(text=None), "input", "not null None"),
        (row(text="half \ud800"), "input", "not valid Unicode: half of a surrogate pair"),
        (row(text="a b c a b c"), "input", "the prompt has 6 tokens, but 5 are left"),
        (row(text=[{"role": "user", "content": "a"}]), "input", "pass --data.apply_chat_template"),
        ("{broken", None, "broken JSON"),
        ("[]", None, "a row must be an object"),
    ],
)
def test_bad_rows_stop_or_are_listed(tmp_path, caplog, bad, column, reason):
    source = write(tmp_path / "d.jsonl", [row(1), bad, row(2)])
    with pytest.raises(DataError) as caught:
        load(source)
    where = f"{source}, line 2" + (f", column {column!r}" if column else "")
    assert str(caught.value).startswith(f"{where}: ") and reason in str(caught.value)

    with caplog.at_level(logging.WARNING):
        data = load(source, skip_bad_rows=True)
    assert [(p.row, p.label) for p in data.prompts] == [(0, 1.0), (2, 2.0)]
    (skipped,) = data.skipped
    assert (skipped.row, skipped.column) == (2, column) and reason in skipped.reason
    assert "skipped 1 bad rows, kept 2" in caplog.text and where in caplog.text


def test_too_long_names_both_flags_and_the_limit_is_inclusive(tmp_path):
    source = write(tmp_path / "d.jsonl", [row(text="a b c a b")])
    assert len(load(source)) == 1
    with pytest.raises(DataError, match=r"has 5 tokens, but 4 .*--data.max_len .*--rollout.max_new_tokens"):
        load(source, max_prompt_tokens=4)


def test_the_log_lists_ten_and_the_total(tmp_path, caplog):
    source = write(tmp_path / "d.jsonl", [row(), *[row(9)] * 25])
    with caplog.at_level(logging.WARNING):
        data = load(source, skip_bad_rows=True)
    assert len(data.skipped) == 25
    assert "skipped 25 bad rows, kept 1" in caplog.text
    assert caplog.text.count("off the scale") == 10 and "and 15 more" in caplog.text


def test_nothing_left(tmp_path):
    source = write(tmp_path / "d.jsonl", [row(9)] * 12)
    with pytest.raises(DataError, match=r"no usable row is left; all 12 are bad:\n.*line 1, column 'label'"):
        load(source, skip_bad_rows=True)


def test_parquet_rows_count_from_zero_and_dotted_keys_reach_inside(tmp_path):
    path = tmp_path / "d.parquet"
    rows = [
        {"prompt": [{"role": "user", "content": "a"}], "reward_model": {"ground_truth": "3"}},
        {"prompt": [{"role": "user", "content": "b"}], "reward_model": {"ground_truth": "7"}},
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    options = {
        "input_key": "prompt",
        "label_key": "reward_model.ground_truth",
        "tokenizer": word_tokenizer(chat_template=CHAT_TEMPLATE),
        "template": PromptTemplate(apply_chat_template=True),
    }
    data = load(str(path), skip_bad_rows=True, **options)
    assert data.prompts[0].text == "<bos><user> a <eos><assistant>" and data.prompts[0].label == 3.0
    with pytest.raises(DataError) as caught:
        load(str(path), **options)
    assert str(caught.value).startswith(
        f"{path}, row 1 (counted from 0), column 'reward_model.ground_truth': 7.0 is off"
    )


def test_csv(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("input,label\na,3\nb,\n")
    with pytest.raises(DataError, match=r"line 3, column 'label': the label is missing"):
        load(str(path))
    assert [p.label for p in load(str(path), skip_bad_rows=True).prompts] == [3.0]


def drawn(source, n, seed, **change):
    return [p.row for p in load(source, max_samples=n, seed=seed, **change).prompts]


def test_max_samples_is_a_sample_by_the_seed_in_the_sources_order(tmp_path):
    source = write(tmp_path / "d.jsonl", [row(1 + i / 10) for i in range(40)])
    first = load(source, max_samples=10, seed=3)
    assert drawn(source, 10, 3) == [p.row for p in first.prompts] == sorted(p.row for p in first.prompts)
    # A prompt's row is where it stands in the file, and what belongs to it comes along.
    assert [p.label for p in first.prompts] == [1 + p.row / 10 for p in first.prompts]
    assert drawn(source, 10, 4) != drawn(source, 10, 3) != list(range(10))
    assert set(drawn(source, 10, 3)) < set(drawn(source, 20, 3))
    assert drawn(source, 40, 3) == drawn(source, 99, 3) == list(range(40))


def test_every_row_is_drawn_as_often_as_any_other(tmp_path):
    source = write(tmp_path / "d.jsonl", [row(1)] * 6)
    counts = Counter(index for seed in range(600) for index in drawn(source, 2, seed))
    # 200 expected each; chi-square with 5 degrees of freedom is below 20.5 in 999 of 1000.
    assert sum(counts.values()) == 1200 and sum((counts[i] - 200) ** 2 / 200 for i in range(6)) < 20.5


def test_a_sample_skips_bad_rows_and_fills_up(tmp_path):
    source = write(tmp_path / "d.jsonl", [row(1) if i % 2 else row("bad") for i in range(20)])
    data = load(source, max_samples=7, seed=0, skip_bad_rows=True)
    rows = [p.row for p in data.prompts]
    assert len(rows) == 7 and all(index % 2 for index in rows) and rows == sorted(rows)
    places = [bad.place.index for bad in data.skipped]
    assert places and places == sorted(places)
    assert len(drawn(source, 15, 0, skip_bad_rows=True)) == 10


def test_a_bad_row_that_is_not_drawn_is_not_looked_at(tmp_path):
    rows = [row(1) for _ in range(10)]
    good = drawn(write(tmp_path / "a.jsonl", rows), 4, 0)
    rows[next(i for i in range(10) if i not in good)] = "{broken"
    assert drawn(write(tmp_path / "b.jsonl", rows), 4, 0) == good
    rows[good[1]] = row("bad")
    with pytest.raises(DataError, match=rf"line {good[1] + 1}, column 'label'"):
        drawn(write(tmp_path / "c.jsonl", rows), 4, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_samples": 0}, r"--data.max_samples must be at least 1"),
        ({"max_prompt_tokens": 0}, r"0 tokens are left for the prompt; raise --data.max_len"),
        ({"template": PromptTemplate(apply_chat_template=True)}, "no chat template"),
    ],
)
def test_impossible_options_stop_even_when_rows_may_be_skipped(tmp_path, change, message):
    source = write(tmp_path / "d.jsonl", [row()])
    with pytest.raises(DataError, match=message):
        load(source, skip_bad_rows=True, **change)
    assert issubclass(TemplateError, DataError)


def test_a_file_that_cannot_be_read_stops_even_when_rows_may_be_skipped(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load(str(tmp_path / "d.jsonl"), skip_bad_rows=True)


def test_the_hash_sees_ids_labels_and_order_and_nothing_else():
    def prompt(ids=(1, 2), label=3.0, row=0, text="a"):
        return Prompt(token_ids=ids, label=label, row=row, text=text)

    base = content_hash([prompt(), prompt(label=4.0)])
    assert base == content_hash([prompt(row=5, text="z"), prompt(label=4.0)])
    others = [
        [prompt(label=4.0), prompt()],
        [prompt(ids=(1, 3)), prompt(label=4.0)],
        [prompt(label=3.5), prompt(label=4.0)],
        [prompt()],
        [prompt(ids=(1,)), prompt(ids=(2,), label=4.0)],
    ]
    assert len({base, *map(content_hash, others)}) == 6


def test_the_hash_is_the_same_across_formats(tmp_path):
    jsonl = load(write(tmp_path / "d.jsonl", [row(3)]))
    (tmp_path / "d.csv").write_text("input,label\nrate this,3.0\n")
    assert load(str(tmp_path / "d.csv")).sha256 == jsonl.sha256
