from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from real_openrlhf.algo.bound_scale import bind_scale
from real_openrlhf.algo.score_position import ScoreReader
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.data.dataset import JudgeDataset
from real_openrlhf.data.given import GivenDataset, encode_response, given_group, with_responses
from real_openrlhf.data.row import DataError
from real_openrlhf.data.template import PromptError, PromptTemplate
from tests.helpers.tokenizers import word_tokenizer

ANCHOR = "So the overall score is "
GOOD = {"prompt": "rate this", "label": 4, "response": f"good text . {ANCHOR}4"}
TOKENIZER = word_tokenizer()


def reader(scale: str = "1-5") -> ScoreReader:
    bound = bind_scale(ScoreScale.parse(scale), TOKENIZER, [ANCHOR])
    return ScoreReader.build(bound, TOKENIZER, {TOKENIZER.eos_token_id})


def load(tmp_path: Path, *rows: Any, **more: Any) -> GivenDataset:
    path = tmp_path / "sft.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings: dict[str, Any] = {
        "input_key": "prompt",
        "label_key": "label",
        "response_key": "response",
        "tokenizer": TOKENIZER,
        "template": PromptTemplate(),
        "reader": reader(),
        "max_len": 32,
        "max_prompt_tokens": 8,
    }
    return GivenDataset.load(str(path), **{**settings, **more})


def words(ids: tuple[int, ...]) -> str:
    return " ".join(TOKENIZER.convert_ids_to_tokens(list(ids)))


def test_a_response_is_its_text_and_one_end_of_text(tmp_path: Path) -> None:
    data = load(tmp_path, GOOD, {**GOOD, "response": f"{ANCHOR}4<eos>"})
    assert words(data.dataset.prompts[0].token_ids) == "rate this"
    assert words(data.responses[0]) == "good text . So the overall score is 4 <eos>"
    assert words(data.responses[1]) == "So the overall score is 4 <eos>"
    assert data.without == () and len(data.dataset) == 2
    with pytest.raises(PromptError, match="a response is text, not 4"):
        encode_response(TOKENIZER, 4)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "label": 4}, r"line 2, column 'response': no such column.*--warmup.feedback missing"),
        ({**GOOD, "response": None}, r"column 'response': there is no response. .*--warmup.feedback missing"),
        ({**GOOD, "response": " "}, r"column 'response': there is no response"),
        ({**GOOD, "response": 4}, r"column 'response': a response is text, not 4"),
        ({**GOOD, "response": "zebra"}, r"column 'response': the tokenizer has no token for a part of"),
        (
            {**GOOD, "response": "good text"},
            r"no score of the scale 1,2,3,4,5 after 'So the overall score is ' \(no_anchor\)",
        ),
        ({**GOOD, "response": f"{ANCHOR}7"}, r"\(off_scale\); --real.anchor names .* --real.scale the labels"),
        ({**GOOD, "response": f"{ANCHOR}3"}, r"says 3, but the label is 4"),
        ({**GOOD, "label": 3.5, "response": f"{ANCHOR}2"}, r"says 2, but the label is 3.5"),
        ({**GOOD, "label": 9}, r"column 'label': 9.0 is off the scale"),
        ({"prompt": "a", "response": f"{ANCHOR}4"}, r"column 'label': no such column"),
        ({**GOOD, "response": "good " * 30 + f"{ANCHOR}4"}, r"have 39 tokens; raise --data.max_len 32"),
        ({**GOOD, "prompt": "good " * 40}, r"column 'prompt': the prompt has 40 tokens"),
        (["a"], r"line 2: a row must be an object"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(tmp_path, GOOD, row)
    kept = load(tmp_path, GOOD, row, skip_bad_rows=True)
    assert len(kept.dataset) == 1 and len(kept.dataset.skipped) == 1


def test_a_label_between_two_scores_may_be_written_as_either(tmp_path: Path) -> None:
    rows = [{**GOOD, "label": 3.5, "response": f"{ANCHOR}{n}"} for n in (3, 4)]
    assert len(load(tmp_path, *rows).responses) == 2
    # Half a point's share decides nothing: 3.2 is written as 3 or, now and then, as 4.
    assert len(load(tmp_path, {**GOOD, "label": 3.2}).responses) == 1


def test_rows_without_a_response_are_kept_where_a_model_will_write_it(tmp_path: Path) -> None:
    rows = [GOOD, {"prompt": "rate", "label": 2}, {**GOOD, "response": ""}]
    data = load(tmp_path, *rows, response_may_lack=True)
    assert data.without == (1, 2) and set(data.responses) == {0}
    # Its feedback needs room: a longer prompt is a bad row, though it would fit with a given response.
    with pytest.raises(DataError, match="the prompt has 9 tokens, but 8 are left"):
        load(tmp_path, {"prompt": "good " * 9, "label": 2}, response_may_lack=True)
    full = with_responses(data, {1: (5, 6), 2: (7,)})
    assert full.without == () and full.responses[1] == (5, 6)
    assert len({data.dataset.sha256, full.dataset.sha256, with_responses(data, {1: (5,)}).dataset.sha256}) == 3


def test_the_hash_is_of_prompts_labels_and_responses(tmp_path: Path) -> None:
    rows = [GOOD, {**GOOD, "prompt": "rate"}, {**GOOD, "response": f"{ANCHOR}4"}, {**GOOD, "label": 3.5}]
    assert len({load(tmp_path, row).dataset.sha256 for row in rows}) == 4


def test_max_samples_draws_the_rows_that_reinforcement_would_train_on(tmp_path: Path) -> None:
    rows = [{**GOOD, "label": n % 2 + 4, "response": f"{ANCHOR}{n % 2 + 4}"} for n in range(12)]
    rows[3] = {"prompt": "a"}
    given = load(tmp_path, *rows, max_samples=5, seed=6, skip_bad_rows=True)
    same = JudgeDataset.load(
        str(tmp_path / "sft.jsonl"),
        input_key="prompt",
        label_key="label",
        scale=reader().bound.scale,
        tokenizer=TOKENIZER,
        template=PromptTemplate(),
        max_prompt_tokens=8,
        max_samples=5,
        seed=6,
        skip_bad_rows=True,
    )
    drawn = [prompt.row for prompt in given.dataset.prompts]
    assert drawn == [prompt.row for prompt in same.prompts] == sorted(given.responses) != [0, 1, 2, 4, 5]
    assert [words(given.responses[row]).split()[-2] for row in drawn] == [str(row % 2 + 4) for row in drawn]
    others = [load(tmp_path, *rows, max_samples=5, seed=seed, skip_bad_rows=True) for seed in range(7, 10)]
    assert any([prompt.row for prompt in other.dataset.prompts] != drawn for other in others)


def test_no_end_of_text_is_an_error(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="eos_token"):
        load(tmp_path, GOOD, tokenizer=tokenizer)


def test_the_group_of_a_given_response(tmp_path: Path) -> None:
    data = load(tmp_path, GOOD)
    (prompt,) = data.dataset.prompts
    group = given_group(prompt, data.responses[0], reader())
    (rollout,) = group.rollouts
    assert (group.label, group.row, group.prompt_ids.tolist()) == (4.0, 0, list(prompt.token_ids))
    assert rollout.logprobs is None and rollout.reading.position == 8 and rollout.reading.label_index == 3
    assert rollout.feedback_mask.tolist() == [True] * 8 + [False, True]
    assert rollout.score_rows.position.tolist() == [8]
    assert all(math.isnan(x) for x in rollout.score_logprobs.flatten().tolist())
