"""Judge prompts from template files: the paper's own text, optional parts, and values that are never template text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from real_openrlhf.data.judge_prompt import FOLDER, JudgeTemplate, Rubric, template_names
from real_openrlhf.data.template import PromptError, TemplateError

VICUNA = Path(__file__).parents[3].parent / "shared" / "data" / "vicuna_eval.json"
RUBRIC = Rubric(criteria="Is it kind?", descriptions={"1": "No.", "5": "Yes."})
# The sections of a Prometheus prompt, cut apart without the template.
SECTIONS = re.compile(
    r"###The instruction to evaluate:\n(.*?)\n\n###Response to evaluate:\n(.*)\n\n"
    r"###Reference Answer \(Score 5\):\n(.*)\n\n###Score Rubrics:\n\[(.*?)\]\n(.*)\n\n###Feedback: $",
    re.DOTALL,
)


@pytest.mark.skipif(not VICUNA.is_file(), reason="vicuna_eval.json is not at ../shared/data beside the checkout")
def test_the_papers_template_writes_the_papers_prompts() -> None:
    template = JudgeTemplate.load("paper")
    rows = json.loads(VICUNA.read_text(encoding="utf-8"))
    for row in rows:
        match = SECTIONS.search(row["instruction"])
        assert match is not None
        instruction, response, reference, criteria, scores = match.groups()
        rubric = Rubric(criteria=criteria, descriptions=dict(re.findall(r"Score (\d): (.*)", scores)))
        written = template.render(instruction=instruction, response=response, reference=reference, rubric=rubric)
        assert written == row["instruction"]
    assert len(rows) == 320


def test_without_a_reference_its_section_and_its_mention_go() -> None:
    text = JudgeTemplate.load("paper").render(instruction="Say hello.", response="Hello.", rubric=RUBRIC)
    assert "eference" not in text.replace("refer to the score rubric", "")
    assert text.endswith(
        "###The instruction to evaluate:\nSay hello.\n\n###Response to evaluate:\nHello.\n\n"
        "###Score Rubrics:\n[Is it kind?]\nScore 1: No.\nScore 5: Yes.\n\n###Feedback: "
    )


@pytest.mark.parametrize(
    "response",
    [
        "{{ rubric }}",
        "{{ instruction }}{% if true %}x{% endif %}",
        "{# gone #}",
        "{instruction} {} {0} %s $rubric",
        "{% raw %}",
        "\\1 \\g<0>",
        "<b>&amp;</b>",
    ],
)
def test_a_response_is_never_read_as_template_text(response: str) -> None:
    text = JudgeTemplate.load("paper").render(instruction=response, response=response, rubric=response)
    assert text.count(response) == 3


def test_only_the_last_newline_of_the_file_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("{{ response }}\n\n", encoding="utf-8")
    assert JudgeTemplate.load(path).render(response=" a \n") == " a \n\n"


def test_the_base_suffix_follows_after_a_space() -> None:
    plain, base = JudgeTemplate.load("paper"), JudgeTemplate.load("paper", suffix="base_suffix")
    parts = {"instruction": "i", "response": "r", "rubric": "x"}
    sentence = "Please think step by step and then output the final score with 'So the overall score is (score)'."
    assert base.render(**parts) == plain.render(**parts) + " " + sentence
    assert base.name == "paper+base_suffix" and base.scale == "1-5" and base.anchors == ("So the overall score is ",)
    assert base.sha256 != plain.sha256


def test_a_head_sets_anchors_scale_and_system(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(
        '---\n{"anchors": ["[RESULT] "],\n "scale": "0-9", "system": "You judge."}\n---\nQ: {{ instruction }}\n',
        encoding="utf-8",
    )
    template = JudgeTemplate.load(str(path))
    assert (template.name, template.anchors, template.scale) == ("mine", ("[RESULT] ",), "0-9")
    assert template.messages(instruction="why?") == [
        {"role": "system", "content": "You judge."},
        {"role": "user", "content": "Q: why?"},
    ]


def test_the_hash_sees_every_setting_but_the_name() -> None:
    base = JudgeTemplate(name="a", text="{{ response }}")
    assert base.sha256 == JudgeTemplate(name="b", text="{{ response }}").sha256
    others = [
        JudgeTemplate(name="a", text="{{ response }}."),
        JudgeTemplate(name="a", text="{{ response }}", anchors=("x ",)),
        JudgeTemplate(name="a", text="{{ response }}", scale="1-5"),
        JudgeTemplate(name="a", text="{{ response }}", system="s"),
    ]
    assert len({base.sha256, *(other.sha256 for other in others)}) == 5


def test_what_is_missing_is_named() -> None:
    template = JudgeTemplate.load("paper")
    with pytest.raises(PromptError, match="template paper needs the rubric, which is not given"):
        template.render(instruction="i", response="r")
    with pytest.raises(PromptError, match="needs the instruction"):
        template.render(instruction=" ", response="r", rubric="x")
    with pytest.raises(PromptError, match="needs the response"):
        template.render(instruction="i", rubric="x")
    assert template.render(instruction="i", response="", rubric="x")  # a model may have answered nothing


def test_a_part_without_a_place_is_refused() -> None:
    with pytest.raises(PromptError, match="no place for the reference"):
        JudgeTemplate(name="mine", text="{{ response }}").render(response="r", reference="x")


def test_parts_must_be_text() -> None:
    with pytest.raises(PromptError, match="the response is int, not text: 3"):
        JudgeTemplate.load("paper").render(instruction="i", response=3, rubric="x")  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="criteria"):
        Rubric(criteria=" ")
    with pytest.raises(PromptError, match="score 2 needs a description"):
        Rubric(criteria="c", descriptions={"2": ""})


def test_templates_of_the_package_load_and_are_packaged() -> None:
    names = template_names()
    assert {"paper", "base_suffix"} <= set(names)
    assert all(JudgeTemplate.load(name).anchors for name in names)
    setup = (FOLDER.parents[2] / "setup.py").read_text(encoding="utf-8")
    assert "data/templates/*.txt" in setup and {path.suffix for path in FOLDER.iterdir()} == {".txt"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{{ respnse }}", r"no variable 'respnse' \(did you mean 'response'\?\)"),
        ("{{ response", "line 1"),
        ("a\n{% if response %}", "line 2"),
        ("", "no text"),
        ("---\n{}\n", "no second line"),
        ("---\n{x}\n---\n{{ response }}", "not JSON"),
        ("---\n[]\n---\n{{ response }}", "must be a JSON object"),
        ('---\n{"anchor": "x"}\n---\n{{ response }}', r"no key 'anchor' \(did you mean 'anchors'\?\)"),
        ('---\n{"anchors": "x"}\n---\n{{ response }}', "list of texts"),
        ('---\n{"anchors": [" "]}\n---\n{{ response }}', "list of texts"),
        ('---\n{"scale": "5-1"}\n---\n{{ response }}', "does not ascend"),
        ('---\n{"system": 3}\n---\n{{ response }}', "system must be text"),
    ],
)
def test_faulty_templates_say_what_is_wrong(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(TemplateError, match=message):
        JudgeTemplate.load(path)


def test_unknown_templates_name_the_nearest() -> None:
    with pytest.raises(TemplateError, match=r"no template 'papr' \(did you mean 'paper'\?\)"):
        JudgeTemplate.load("papr")
