from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from real_openrlhf.checkpoint.compat import (
    RunIdentity,
    Severity,
    check,
    model_config_sha256,
    tokenizer_sha256,
)
from real_openrlhf.checkpoint.errors import CheckpointError, IncompatibleCheckpointError, LayoutError
from tests.unit.checkpoint.helpers import identity

SAVED = identity()


def test_json_there_and_back() -> None:
    back = RunIdentity.from_json(json.loads(json.dumps(SAVED.to_json())))
    assert back == SAVED and back.scale == SAVED.scale and back.anchors == SAVED.anchors
    assert SAVED.diff(back) == [] and check(SAVED, back, force=False) == []


REFUSED: list[tuple[str, Any, str]] = [
    ("model_sha256", "1" * 64, "model config (sha256): aaaaaaaaaaaa in the checkpoint, 111111111111 now"),
    ("tokenizer_sha256", "1" * 64, "tokenizer (sha256): bbbbbbbbbbbb in the checkpoint, 111111111111 now"),
    ("data_sha256", "1" * 64, "data set (sha256): cccccccccccc in the checkpoint, 111111111111 now"),
    ("template_sha256", "1" * 64, "prompt template (sha256): dddddddddddd in the checkpoint, 111111111111 now"),
    (
        "scale",
        ((0.0, "A"), (1.0, "B")),
        'score scale: [[1.0, "1"], [2.0, "2"], [3.0, "3"]] in the checkpoint, [[0.0, "A"], [1.0, "B"]] now',
    ),
    ("adapters", "rank 8", "LoRA adapters: none in the checkpoint, rank 8 now"),
    ("anchors", ("Rating:",), 'answer anchors: ["Score: "] in the checkpoint, ["Rating:"] now'),
]


@pytest.mark.parametrize("name, value, message", REFUSED)
def test_another_run_is_refused_unless_forced(
    name: str, value: Any, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    now = replace(SAVED, **{name: value})
    with pytest.raises(IncompatibleCheckpointError) as caught:
        check(SAVED, now, force=False)
    assert message in str(caught.value)
    assert str(caught.value).count("in the checkpoint") == 1
    (let_through,) = check(SAVED, now, force=True)
    assert (let_through.name, let_through.severity) == (name, Severity.REFUSE)
    assert "(forced)" in caplog.text and message in caplog.text


def test_all_mismatches_are_named_at_once() -> None:
    now = replace(SAVED, **{name: value for name, value, _ in REFUSED})
    with pytest.raises(IncompatibleCheckpointError) as caught:
        check(SAVED, now, force=False)
    assert all(message in str(caught.value) for *_, message in REFUSED)


def test_another_number_of_ranks_is_let_through_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    (let_through,) = check(SAVED, identity(ranks=4), force=False)
    assert (let_through.name, let_through.severity) == ("ranks", Severity.RESHARD)
    assert "(the shards are converted): policy ranks: 2 in the checkpoint, 4 now" in caplog.text


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    "saved, now, says",
    [
        ({}, {"zero_stage": 2}, "ZeRO stage: 3 in the checkpoint, 2 now"),
        ({}, {"zero_stage": 2, "ranks": 4}, "ZeRO stage: 3 in the checkpoint, 2 now"),
        # Without ZeRO there are no shards that could be converted.
        ({"zero_stage": 0}, {"zero_stage": 0, "ranks": 4}, "policy ranks: 2 in the checkpoint, 4 now"),
    ],
)
def test_another_layout_is_refused(force: bool, saved: dict[str, int], now: dict[str, int], says: str) -> None:
    with pytest.raises(LayoutError, match="on 2 policy ranks") as caught:
        check(identity(**saved), identity(**now), force=force)
    assert says in str(caught.value) and str(caught.value).count("in the checkpoint") == 1
    assert not isinstance(caught.value, IncompatibleCheckpointError)


def test_settings_may_change_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    now = replace(SAVED, seed=1, preset="own", settings={"actor.adam.lr": 2e-6, "new.flag": True})
    found = check(SAVED, now, force=False)
    assert [str(m) for m in found] == [
        "preset: paper in the checkpoint, own now",
        "seed: 42 in the checkpoint, 1 now",
        "settings.actor.adam.lr: 1e-06 in the checkpoint, 2e-06 now",
        "settings.new.flag: not set in the checkpoint, true now",
    ]
    assert {m.severity for m in found} == {Severity.WARN}
    assert len([r for r in caplog.records if r.levelname == "WARNING"]) == 4


def test_every_field_is_compared() -> None:
    """A field that is added later cannot be forgotten in the comparison."""
    other = RunIdentity(
        model_sha256="x",
        tokenizer_sha256="x",
        data_sha256="x",
        template_sha256="x",
        scale=((9.0, "9"),),
        anchors=("x",),
        preset="x",
        seed=9,
        ranks=9,
        zero_stage=0,
        adapters="x",
        settings={"actor.adam.lr": 9},
    )
    found = {m.name for m in SAVED.diff(other)}
    assert found == (set(SAVED.to_json()) - {"settings"}) | {"settings.actor.adam.lr"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ranks": None}, "another type than expected in ranks"),
        ({"ranks": True}, "another type than expected in ranks"),
        ({"data_sha256": 5}, "another type than expected in data_sha256"),
        ({"scale": [1, 2]}, "malformed"),
        ({"anchors": None}, "malformed"),
        ({"settings": 3}, "malformed"),
        ({"extra": 1}, r"has unknown \['extra'\]"),
    ],
)
def test_malformed_json(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        RunIdentity.from_json({**SAVED.to_json(), **change})


def test_missing_fields() -> None:
    content = SAVED.to_json()
    del content["seed"]
    with pytest.raises(CheckpointError, match=r"lacks \['seed'\]"):
        RunIdentity.from_json(content)
    with pytest.raises(CheckpointError, match="not a JSON object"):
        RunIdentity.from_json([])


def test_the_model_hash_is_of_what_the_model_is() -> None:
    config = {"hidden_size": 8, "rope": {"theta": 1.0, "dtype": "x"}, "_name_or_path": "a", "torch_dtype": "bfloat16"}
    moved = {"_name_or_path": "b", "rope": {"theta": 1.0}, "hidden_size": 8, "transformers_version": "9"}
    assert model_config_sha256(config) == model_config_sha256(moved)
    assert model_config_sha256(config) != model_config_sha256({**config, "hidden_size": 9})
    assert model_config_sha256(config) != model_config_sha256({**config, "rope": {"theta": 2.0}})


def _tokenizer(**changes: Any) -> Any:
    backend = changes.pop("backend", {"model": {"merges": ["a b"]}, "padding": None, "truncation": None})
    base = {
        "get_vocab": lambda: {"a": 0, "b": 1},
        "special_tokens_map": {"eos_token": "</s>"},
        "chat_template": "{{ m }}",
        "backend_tokenizer": SimpleNamespace(to_str=lambda: json.dumps(backend)),
    }
    return SimpleNamespace(**{**base, **changes})


def test_the_tokenizer_hash() -> None:
    same = tokenizer_sha256(_tokenizer())
    padded = {"model": {"merges": ["a b"]}, "padding": {"length": 4}, "truncation": {"max": 3}}
    assert tokenizer_sha256(_tokenizer(backend=padded)) == same
    changed: list[dict[str, Any]] = [
        {"get_vocab": lambda: {"a": 1, "b": 0}},
        {"special_tokens_map": {"eos_token": "<end>"}},
        {"chat_template": "{{ x }}"},
        {"chat_template": None},
        {"backend": {"model": {"merges": ["b a"]}}},
        {"backend_tokenizer": None},
    ]
    hashes = {tokenizer_sha256(_tokenizer(**change)) for change in changed}
    assert len(hashes) == len(changed) and same not in hashes


def test_the_tokenizer_hash_of_a_real_one() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    def build(**changes: Any) -> PreTrainedTokenizerFast:
        backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
        return PreTrainedTokenizerFast(tokenizer_object=backend, **{"eos_token": "</s>", **changes})

    used = build(pad_token="</s>")
    before = tokenizer_sha256(used)
    used(["a a", "a"], padding=True, truncation=True, max_length=1)
    assert tokenizer_sha256(used) == before == tokenizer_sha256(build(pad_token="</s>"))
    assert tokenizer_sha256(build(pad_token="<pad>")) != before
