"""Human-rated data sets with several raters, on rows written here in the forms that their own repositories document."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.data.__main__ import main
from real_openrlhf.data.builders import get_builder
from real_openrlhf.data.builders.base import FieldError, Item, Options
from real_openrlhf.data.builders.wmt_mqm import weight

ASPECTS = ("coherence", "consistency", "fluency", "relevance")
SUMMEVAL: dict[str, Any] = {
    "id": "dm-test-1",
    "model_id": "M3",
    "filepath": "dailymail/stories/1.story",
    "decoded": "a ferry sank .",
    "references": ["The ferry sank.", "It sank."],
    "expert_annotations": [dict(zip(ASPECTS, scores)) for scores in ((2, 5, 5, 3), (1, 5, 4, 3), (3, 4, 5, 2))],
    "turker_annotations": [dict.fromkeys(ASPECTS, score) for score in (3, 4, 5, 4, 2)],
    "text": "A ferry sank on Monday. Nobody was hurt.",
}
DIALSUMMEVAL: dict[str, Any] = {
    "id": "17",
    "model_id": "A",
    "dialogue": "| Ann: Hi! | Bob: Hello :|",
    "summary": "ann greets bob .",
    "annotations": [dict(zip(ASPECTS, scores)) for scores in ((5, 5, 5, 4), (4, 5, 4, 4), (3, 3, 4, 5))],
}
USR: dict[str, Any] = {
    "context": "Do you like tea ?\nYes , do you ?\n",
    "fact": "Tea is grown in Assam .\n",
    "annotators": ["ann", "bob", "cy"],
    "responses": [
        {
            "response": "I do ! Much of it is from Assam .",
            "model": "Original Ground Truth",
            "Understandable": [1, 1, 1],
            "Natural": [3, 3, 2],
            "Maintains Context": [3, 3, 3],
            "Engaging": [3, 2, 2],
            "Uses Knowledge": [1, 1, 0],
            "Overall": [5, 4, 4],
        },
        {
            "response": "i am a fan of football .",
            "model": "Argmax Decoding",
            "Understandable": [1, 0, 1],
            "Natural": [2, 2, 1],
            "Maintains Context": [1, 1, 1],
            "Engaging": [1, 2, 1],
            "Uses Knowledge": [0, 0, 0],
            "Overall": [1, 2, 1],
        },
    ],
}
SICK = {
    "pair_ID": "7",
    "sentence_A": "A boy  is running.",
    "sentence_B": "A child runs.",
    "relatedness_score": "4.4",
    "SemEval_set": "TRIAL",
}


def read(name: str, row: dict[str, Any], **options: Any) -> list[Item]:
    builder = get_builder(name)
    scale = ScoreScale.parse(options.pop("scale", builder.scale))
    chosen = options.pop("aspects", tuple(a for a, own in builder.aspects.items() if own == builder.scale))
    found = builder.read(row, Options(scale=scale, aspects=chosen, **options))
    return found if isinstance(found, list) else [found]


def build(tmp_path: Path, name: str, content: object, *flags: str, suffix: str = ".jsonl") -> int:
    source = tmp_path / f"source{suffix}"
    if suffix == ".jsonl":
        assert isinstance(content, list)
        content = "".join(json.dumps(row) + "\n" for row in content)
    source.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return main([name, "--source", str(source), "--output_dir", str(tmp_path / "out"), "--overwrite", *flags])


def built(tmp_path: Path, split: str = "test") -> list[dict[str, Any]]:
    return pq.read_table(tmp_path / "out" / f"{split}.parquet").to_pylist()


def test_summeval_has_an_item_per_aspect_with_the_mean_of_the_experts() -> None:
    items = read("summeval", SUMMEVAL)
    assert [(item.aspect, item.n) for item in items] == [(aspect, 3) for aspect in ASPECTS]
    assert [item.label for item in items] == pytest.approx([2.0, 14 / 3, 14 / 3, 8 / 3])
    assert items[0].ratings == {"rater 1": 2.0, "rater 2": 1.0, "rater 3": 3.0}
    parts = items[1].parts
    assert parts is not None and parts.instruction.endswith(SUMMEVAL["text"]) and parts.response == "a ferry sank ."
    assert "Consistency" in str(parts.rubric) and "Coherence" not in str(parts.rubric)
    assert items[0].id == "dm-test-1/M3/coherence" and len({item.group for item in items}) == 1
    crowd = read("summeval", SUMMEVAL, label_key="turker_annotations", aspects=("fluency",))
    assert [(item.label, item.n, item.meta["rated_by"]) for item in crowd] == [(3.6, 5, "turker_annotations")]


def test_summeval_without_the_articles_says_how_to_get_them() -> None:
    row = {name: value for name, value in SUMMEVAL.items() if name != "text"}
    with pytest.raises(FieldError, match=r"only its path.*pair_data\.py --data_annotations") as caught:
        read("summeval", row)
    assert caught.value.column == "text"


@pytest.mark.parametrize(
    ("annotations", "column", "message"),
    [
        (None, "expert_annotations", "expected a list"),
        ([3, 4], "expert_annotations", "expected a list with an object"),
        ([], "expert_annotations.coherence", "no rating"),
        (
            [{"coherence": 3}, {"fluency": 3}],
            "expert_annotations.coherence",
            r"rater 2 has none; there are \['fluency'",
        ),
        ([{"coherence": 6}], "expert_annotations.coherence", "rater 1: .*off the scale"),
        ([{"coherence": None}], "expert_annotations.coherence", "the label is missing"),
        ([{"coherence": True}], "expert_annotations.coherence", "not a number"),
    ],
)
def test_ratings_that_are_none(annotations: object, column: str, message: str) -> None:
    with pytest.raises(FieldError, match=message) as caught:
        read("summeval", {**SUMMEVAL, "expert_annotations": annotations}, aspects=("coherence",))
    assert caught.value.column == column


def test_dialsummeval() -> None:
    items = read("dialsummeval", DIALSUMMEVAL)
    assert {item.aspect: item.label for item in items} == pytest.approx(
        {"coherence": 4.0, "consistency": 13 / 3, "fluency": 13 / 3, "relevance": 13 / 3}
    )
    assert items[0].parts is not None and items[0].parts.instruction.endswith(DIALSUMMEVAL["dialogue"])
    other = read("dialsummeval", {**DIALSUMMEVAL, "summary": "Hi."})
    assert other[0].group == items[0].group


def test_topical_chat_has_an_item_per_response_and_aspect() -> None:
    items = read("topical_chat", USR)
    assert [(item.aspect, item.n) for item in items] == [("Overall", 3)] * 2
    assert [item.label for item in items] == pytest.approx([13 / 3, 4 / 3])
    parts = items[0].parts
    assert parts is not None and "Assam ." in parts.instruction and parts.instruction.count("tea") == 1
    assert items[0].group == items[1].group and items[1].id == "Argmax Decoding/Overall"
    several = read("topical_chat", USR, scale="1-3", aspects=("Natural", "Engaging"))
    assert [item.label for item in several] == pytest.approx([8 / 3, 7 / 3, 5 / 3, 4 / 3])
    assert items[0].ratings == {"ann": 5.0, "bob": 4.0, "cy": 4.0}
    unnamed = read("topical_chat", {k: v for k, v in USR.items() if k != "annotators"})
    assert list(unnamed[0].ratings) == ["rater 1", "rater 2", "rater 3"]
    bare = read("topical_chat", {**USR, "fact": "_nofact\n"})
    assert bare[0].parts is not None and "fact" not in bare[0].parts.instruction
    for change, column, message in (
        ({}, "responses.0.Natural", "ann: .*off the scale"),
        ({"annotators": ["ann", "bob"]}, "responses.0.Natural", "3 scores, but there are 2 raters: ann, bob"),
        ({"annotators": ["ann", "ann", "bob"]}, "annotators", "expected a list of different names"),
        ({"responses": []}, "responses", "expected a list of objects"),
        ({"responses": [{"response": "x"}]}, "responses.0.Natural", "no such column"),
    ):
        with pytest.raises(FieldError, match=message) as caught:
            read("topical_chat", {**USR, **change}, scale="0-1", aspects=("Natural",))
        assert caught.value.column == column


def test_aspects_go_with_their_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def aspects() -> list[str]:
        return [json.loads(row["meta"])["aspect"] for row in built(tmp_path)]

    assert build(tmp_path, "topical_chat", [USR], suffix=".json") == 0 and aspects() == ["Overall"] * 2
    assert build(tmp_path, "topical_chat", [USR], "--scale", "0-1", suffix=".json") == 0
    assert aspects() == ["Understandable", "Uses Knowledge"] * 2
    assert build(tmp_path, "topical_chat", [USR], "--aspect", "Natural", suffix=".json") == 0
    assert aspects() == ["Natural"] * 2
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["scale"] == "1,2,3"
    capsys.readouterr()
    for flags, message in (
        (
            ("--aspect", "Naturl"),
            "no aspect 'Naturl' (did you mean 'Natural'?); there are Overall (1-5), Natural (1-3)",
        ),
        (("--aspect", "Natural", "Overall"), "--aspect Overall: it is rated 1-5, not 1-3"),
        (("--aspect", "Natural", "--scale", "1-5"), "--aspect Natural: it is rated 1-3, not 1-5"),
        (("--scale", "1-7"), "--scale 1-7: topical_chat has no aspect that is rated on it"),
        (("--template", "paper", "--scale", "1-3"), "template paper asks for scores 1-5"),
    ):
        assert build(tmp_path, "topical_chat", [USR], *flags, suffix=".json") == 2
        assert message in capsys.readouterr().err
    assert main(["sick", "--source", "x", "--output_dir", "y", "--aspect", "z"]) == 2
    assert "sick has no aspects to choose from" in capsys.readouterr().err


def test_the_raters_and_their_agreement_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = {**SUMMEVAL, "model_id": "M5", "expert_annotations": [dict.fromkeys(ASPECTS, s) for s in (5, 4, 5)]}
    assert build(tmp_path, "summeval", [SUMMEVAL, other], "--aspect", "coherence", "fluency") == 0
    first = built(tmp_path)[0]
    meta = json.loads(first["meta"])
    assert meta["ratings"] == {"rater 1": 2.0, "rater 2": 1.0, "rater 3": 3.0} and meta["spread"] == 1.0
    assert (first["label"], first["n"]) == (2.0, 3)
    raters = json.loads((tmp_path / "out/manifest.json").read_text())["raters"]["test"]
    assert list(raters) == ["coherence", "fluency"] and raters["coherence"]["pearson"] == pytest.approx(1.0)  # 2 rows
    assert raters["coherence"]["spread"] == pytest.approx((1 + (1 / 3) ** 0.5) / 2)
    told = capsys.readouterr().out
    assert "raters, test, coherence: each against the mean of the others, Pearson 1.000" in told
    assert "test: 4 rows, 1 groups" in told


def test_sick(tmp_path: Path) -> None:
    (item,) = read("sick", SICK)
    assert (item.label, item.split, item.id) == (4.4, "dev", "7")
    assert item.parts is not None and item.parts.instruction.endswith("A boy is running.")
    (turned,) = read("sick", {**SICK, "sentence_A": SICK["sentence_B"], "sentence_B": "a BOY is running."})
    assert turned.group == item.group
    with pytest.raises(FieldError, match="expected TRAIN, TRIAL, TEST, got 'DEV'"):
        read("sick", {**SICK, "SemEval_set": "DEV"})
    rows = [SICK, {**SICK, "sentence_A": "A cow.", "SemEval_set": "TEST"}, {**SICK, "SemEval_set": "TRAIN"}]
    lines = ["\t".join(SICK), *("\t".join(row.values()) for row in rows)]
    assert build(tmp_path, "sick", "\n".join(lines) + "\n", suffix=".txt") == 0
    assert [row["source_row"] for split in ("test", "dev") for row in built(tmp_path, split)] == [3, 2]
    assert json.loads((tmp_path / "out/manifest.json").read_text())["dropped"] == {"train: its group is in dev": 1}


# -- MQM -----------------------------------------------------------------------------------------------

HEAD = "system\tdoc\tdoc_id\tseg_id\trater\tsource\ttarget\tcategory\tseverity\n"


def mark(rater: str, target: str, category: str, severity: str, *, system: str = "S1", seg: int = 1) -> str:
    return f"{system}\tnews.1\t{seg}\t{seg}\t{rater}\tEin Satz {seg}.\t{target}\t{category}\t{severity}\n"


@pytest.mark.parametrize(
    ("category", "severity", "points"),
    [
        ("No-error", "No-error", 0.0),
        ("no-error", "no-error", 0.0),
        ("Style/Awkward", "Neutral", 0.0),
        ("Accuracy/Mistranslation", "Major", -5.0),
        ("Accuracy/Mistranslation", "minor", -1.0),
        ("Fluency/Punctuation", "Minor", -0.1),
        ("Fluency/Punctuation", "Major", -5.0),
        ("Source error", "Minor", -1.0),
        ("Non-translation!", "Major", -25.0),
        ("non_translation", "Major", -25.0),
    ],
)
def test_the_weights_of_marked_errors(category: str, severity: str, points: float) -> None:
    assert weight(category, severity) == points


def test_mqm_rows_become_one_score_per_segment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marks = [
        mark("r1", "A <v>sentense</v> one.", "Fluency/Spelling", "Minor"),
        mark("r2", "A sentense one.", "No-error", "No-error"),
        mark("r1", "Sentence two.", "Non-translation!", "Major", seg=2),
        mark("r1", "A sentense <v>one</v>.", "Accuracy/Addition", "Major"),  # not beside its segment's others
        mark("r1", "A sentense one<v>.</v>", "Fluency/Punctuation", "Minor"),
        mark("r1", "A sentense one.", "Found", "HOTW-test"),
        mark("r1", "Other.", "No-error", "No-error", system="S2"),
    ]
    assert build(tmp_path, "wmt_mqm", HEAD + "".join(marks), suffix=".tsv") == 0
    rows = built(tmp_path)
    assert [row["label"] for row in rows] == pytest.approx([(-6.1 + 0) / 2, -25.0, 0.0])
    assert [row["n"] for row in rows] == [2, 1, 1] and [row["source_row"] for row in rows] == [2, 4, 8]
    assert json.loads(rows[0]["meta"])["ratings"] == {"r1": -6.1, "r2": 0.0}
    assert rows[0]["judged"]["response"] == "A sentense one." and "<v>" not in "".join(row["prompt"] for row in rows)
    assert rows[0]["group"] == rows[2]["group"] != rows[1]["group"]
    assert "(1 rows, 2 raters, mean spread 4.31)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "flags", "message"),
    [
        (mark("r1", "B.", "Other", "Critical", seg=2), (), "line 3, column 'severity': 'Critical' has no weight"),
        (mark("r2", "Another.", "Other", "Minor"), (), "line 3, column 'target': 'Another.', but line 2 has another"),
        (mark("r1", "B.", "Found", "HOTW-test", seg=2), (), "line 3, column 'severity': the segment has attention"),
        (
            "".join(mark("r1", "A.", "Other", "Major") for _ in range(6)),
            (),
            "line 2, column 'severity': r1: .*-30.*off",
        ),
        ("S1\tnews.1\n", ("--skip_bad_rows",), "line 3: 2 fields.*it may belong to any of the others"),
    ],
)
def test_bad_mqm_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str, flags: tuple[str, ...], message: str
) -> None:
    assert (
        build(tmp_path, "wmt_mqm", HEAD + mark("r3", "A.", "No-error", "No-error") + more, *flags, suffix=".tsv") == 2
    )
    assert re.search(message, capsys.readouterr().err)
    if not flags:
        code = build(
            tmp_path,
            "wmt_mqm",
            HEAD + mark("r1", "X.", "Other", "Minor", seg=9) + mark("r3", "A.", "No-error", "No-error") + more,
            "--skip_bad_rows",
            suffix=".tsv",
        )
        # The whole segment goes, and never a part of it.
        assert code == 0 and -1.0 in [row["label"] for row in built(tmp_path)]
