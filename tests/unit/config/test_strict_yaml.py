"""YAML means what the same JSON means, or is refused with key and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from real_openrlhf.config.cli import parse_args, read_config_file
from real_openrlhf.config.flags import ConfigError
from real_openrlhf.config.strict_yaml import load_yaml

pytest.importorskip("yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((word, json.loads(word)) for word in ("1", "-2", "0", "0.5", "1e-6", "1.5e3", "1E5")),
        *((word, json.loads(word)) for word in ("true", "false", "null")),
        *((f"'{word}'", word) for word in ("1", "no", "off", "~", "null", "1:30", "2024-01-01", "a ", "")),
        ("+1", 1),
        (".5", 0.5),
        ("2.", 2.0),
        ("True", True),
        ("1-5", "1-5"),
        ("0,1,2", "0,1,2"),
        ("1=Bad,2=Good", "1=Bad,2=Good"),
        ("~/runs/x", "~/runs/x"),
        ("/données/a b.jsonl", "/données/a b.jsonl"),
        ("none", "none"),
        ("bf16", "bf16"),
        ("0b", "0b"),
        ("1e", "1e"),
        ("[1, a, 1e-3]", [1, "a", 1e-3]),
        ('["a ", "b "]', ["a ", "b "]),
        ("|\n    two\n    lines\n", "two\nlines\n"),
        ("1   # said behind a number", 1),
        ("text   # said behind text", "text"),
        ("1  ", 1),
    ],
)
def test_what_is_read(text: str, value: object) -> None:
    found = load_yaml(f"a:\n  b: {text}", "f")
    assert found == {"a": {"b": value}} and type(found["a"]["b"]) is type(value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        *((word, "true or false") for word in ("yes", "no", "on", "Off", "NO", "y", "n")),
        *((word, "plain decimal") for word in ("010", "0o17", "0x1f", "0b11", "1:30", "12:30:45.5", "1_000", "1_0.5")),
        *((word, "plain decimal") for word in (".inf", "-.Inf", ".nan", "00", "-08", "01.5")),
        *((word, "for a date") for word in ("2024-01-01", "2024-1-1 10:00:00", "2001-12-14t21:59:43.10-05:00")),
        ("~", "write null"),
        ("", "has no value; write null"),
        ("score \n", "drops the blanks"),
        ("score ", "drops the blanks"),
    ],
)
def test_what_readers_differ_on_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=rf"^f, line 3: a\.b:.*{says}"):
        load_yaml(f"\na:\n  b: {text}", "f")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3\n", "^f gives 'a' twice, in lines 1 and 3$"),
        ("a:\n  b:\n    c: 1\n    c: 1\n", "^f gives 'a.b.c' twice, in lines 3 and 4$"),
        ("a: {b: 1, 'b': 2}", "'a.b' twice"),
        ("a: [{b: 1, b: 2}]", "'a.b' twice"),
        ("a: &x {b: 1}\nc: *x\n", "line 1: has the anchor or alias 'x'"),
        ("a: {b: 1}\nc:\n  <<: {b: 2}\n", "line 3: has a merge key"),
        ("a: !!str 5", "line 1: has the tag"),
        ("a: !!python/object:os.system x", "line 1: has the tag"),
        ("? [1, 2]\n: 3", "line 1: a key is the name of a flag"),
    ],
)
def test_what_json_cannot_say_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_yaml(text, "f")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.yaml", "actor:\n  adam:\n    lr: 1e-6\nreal:\n  scale: 1-5\nactor:\n  adam:\n    lr: 1e-3\n"),
        ("run.json", '{"actor": {"adam": {"lr": 1e-6}}, "actor": {"adam": {"lr": 1e-3}}}'),
    ],
)
def test_a_section_that_comes_twice(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match="gives 'actor' twice"):
        read_config_file(tmp_path / name)


def test_a_flag_by_yaml_and_by_json_is_the_same(tmp_path: Path) -> None:
    values = {"actor": {"adam": {"lr": 1e-6}}, "real": {"anchor": ["score "], "refill": False}, "train.max_steps": None}
    (tmp_path / "a.json").write_text(json.dumps(values))
    (tmp_path / "a.yaml").write_text(
        "actor:\n  adam: {lr: 1e-6}\nreal:\n  anchor: ['score ']\n  refill: false\ntrain.max_steps: null\n"
    )
    assert parse_args(["--config", str(tmp_path / "a.json")]) == parse_args(["--config", str(tmp_path / "a.yaml")])


@pytest.mark.parametrize("name", ["run.yaml", "run.json"])
@pytest.mark.parametrize("value", ["9" * 5000, "[" * 20000])
def test_files_that_no_reader_can_take(name: str, value: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(f'{{"train.seed": {value}')
    with pytest.raises(ConfigError, match=r"is not JSON|nested more than 50 deep|is not YAML"):
        read_config_file(tmp_path / name)
    (tmp_path / name).write_text(f'{{"train.seed": {"9" * 5000}}}')
    with pytest.raises(ConfigError, match=r"is not (YAML|JSON)"):
        read_config_file(tmp_path / name)
