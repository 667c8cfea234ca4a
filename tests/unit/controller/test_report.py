"""The page of a run shows what was recorded, and nothing that a model or a data set writes can act in it."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.config.guard_flags import WATCHES
from real_openrlhf.config.logger_flags import WandbConfig
from real_openrlhf.controller.report import charts, page, panels
from real_openrlhf.controller.report.charts import MOST, Chart
from real_openrlhf.controller.report.records import ReportError, read_run
from real_openrlhf.controller.run_log import RunLog
from real_openrlhf.report import main
from tests.unit.test_docs import metrics_of_the_code

SCALE = ScoreScale.parse("1-3")
EVIL = '</pre><script>alert(1)</script><img src=x onerror="alert(2)">\'"&amp;$x$'


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of <style>."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._style = False
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._style = False

    def handle_data(self, data: str) -> None:
        if not self._style:
            self.words.append(data)

    def pictures(self) -> list[str]:
        """The SVG of every image."""
        sources = [attrs["src"] or "" for tag, attrs in self.tags if tag == "img"]
        assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
        return [base64.b64decode(source.partition(",")[2]).decode() for source in sources]


def lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def judged(row: int, expected: float | None, *, text: str = "fine", label: float = 2.0, **more: Any) -> dict[str, Any]:
    shares = None if expected is None else [0.2, 0.5, 0.3]
    return {"benchmark": "dev", "row": row, "label": label, "expected": expected, "decoded": 2, "mass": 1.0,
            "distribution": shares, "reason": None if shares else "no_anchor", "text": text, **more}  # fmt: skip


def all_metrics() -> dict[str, float]:
    names = [name for group in (panels.STILL_JUDGING, panels.TRAINING, panels.DRIFT, panels.SPEED) for c in group
             for name in (*c.lines, *(c.bands or {}).values())]  # fmt: skip
    return {name: 0.5 for name in [*names, *panels.PHASES]}


def make_run(folder: Path, *, evil: str = "", steps: int = 4) -> Path:
    """A run with everything that one can record; `evil` stands wherever a model or data can write."""
    name = "dev" if not evil else evil.replace("/", "")
    train = [
        {"step": n, "phase": "train", "time": 1e9 + n, **all_metrics(), "loss/cot": n} for n in range(1, steps + 1)
    ]
    held_out = dict.fromkeys((name for c in panels.HELD_OUT for name in c.lines), 0.25)
    evals = [
        {"step": n, "phase": "eval", "time": 1e9, **held_out, "eval/expected/pearson": 0.1 + 0.1 * n,
         f"eval/{name}/reward": 0.1, "eval/change/reward": 0.5, "eval/change/reward_low": 0.25,
         "eval/change/reward_high": 0.75}
        for n in (0, 2, 4)
    ]  # fmt: skip
    lines(folder / "metrics.jsonl", [{"step": 0, "phase": "sync"}, *train, *evals])
    config = {"real": {"scale": "1-3"}, "actor": {"model_name_or_path": f"m{evil}"}, "ckpt": {"best_metric_key": "x"}}
    (folder / "run_config.json").write_text(json.dumps(config | {"data": {"prompt_dataset": f"d{evil}"}}))
    warned = [{"step": n, "watch": "mass", "message": f"mass fell {n} {evil}"} for n in (2, 3)]
    lines(folder / "warnings.jsonl", [*warned, {"step": 4, "watch": f"fault{evil}", "message": "died"}])
    sample = {"prompt_tail": f"judge this {evil}", "text": f"said {evil}", "label": 2.0, "expected": 1.5, "mass": 1.0,
              "decoded": 2.0, "distribution": {"1": 0.6, "2": 0.3, "3": 0.1}, "reason": evil or None}  # fmt: skip
    lines(folder / "samples.jsonl", [{"step": n, "row": 70 + n, "reward": -0.125, **sample} for n in (1, 1, 2, 4)])
    for step in (0, 2, 4):
        rows = [judged(n, 2.0 + 0.1 * n, text=f"step {step} row {n} {evil}", prompt_tail=evil, benchmark=name)
                for n in range(8)]  # fmt: skip
        lines(folder / "eval" / f"step_{step}.jsonl", [*rows, judged(9, None, text=f"none {evil}", benchmark=name)])
    return folder


def shown(folder: Path) -> Page:
    return Page(page.render(read_run(folder)))


def test_every_chart_is_drawn_and_everything_is_inside_the_file(tmp_path: Path) -> None:
    found = shown(make_run(tmp_path / "run"))
    for chart in (*panels.HELD_OUT, *panels.STILL_JUDGING, *panels.TRAINING, *panels.DRIFT, *panels.SPEED):
        assert chart.title in found.text
    for title in ("Reward of REAL, by benchmark", "Scores on held-out prompts: dev", "Seconds of a step"):
        assert title in found.text
    for svg in found.pictures():
        assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert "script" not in {tag for tag, _ in found.tags}
    assert "link" not in {tag for tag, _ in found.tags}
    links = [attrs.get("href") or "" for tag, attrs in found.tags if tag == "a"]
    ids = {attrs.get("id") for _, attrs in found.tags}
    assert links and all(link.startswith("#") and link[1:] in ids for link in links)


def test_what_models_and_data_write_is_text(tmp_path: Path) -> None:
    found = shown(make_run(tmp_path / "run", evil=EVIL))
    tags = {tag for tag, _ in found.tags}
    assert "script" not in tags
    assert not [attrs for _, attrs in found.tags if any(name.startswith("on") for name in attrs)]
    assert found.text.count("<script>alert(1)</script>") > 20
    for svg in found.pictures():
        names = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(svg).iter()}
        assert names.isdisjoint({"script", "img", "foreignObject", "a"})
    policy = [attrs["content"] for tag, attrs in found.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_warnings_are_counted_by_watch(tmp_path: Path) -> None:
    text = shown(make_run(tmp_path / "run")).text
    assert "mass 2 step 2 step 3 mass fell 3" in text and "fault 1 step 4 step 4 died" in text
    assert text.index("died") < text.index("mass fell 3") and "mass fell 2" not in text


def test_the_table_has_the_first_the_last_and_the_best_evaluation(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    lines(
        run / "metrics.jsonl",
        [
            {"step": 0, "phase": "eval", "eval/reward": -2.0, "eval/expected/rmse": 1.0},
            {"step": 5, "phase": "eval", "eval/reward": -1.0, "eval/expected/rmse": 0.5},
            {"step": 9, "phase": "eval", "eval/reward": -1.5, "eval/expected/rmse": None, "eval/change/reward": 0.5,
             "eval/change/reward_low": 0.25, "eval/change/reward_high": 0.75},
        ],
    )  # fmt: skip
    (run / "run_config.json").write_text('{"ckpt": {"best_metric_key": "expected/rmse"}}')
    found = page.table(read_run(run))
    assert found is not None
    assert found["columns"] == ["step 0", "step 9", "best, step 5", "change [95% interval]"]
    assert found["rows"] == [
        {"title": "reward of REAL", "cells": ["-2.0000", "-1.5000", "-1.0000", "+0.500 [+0.250, +0.750]"]},
        {"title": "RMSE of E[score]", "cells": ["1.0000", "undefined", "0.5000", ""]},
    ]
    assert "by expected/rmse is that of step 5" in found["note"]


def test_the_worst_errors_come_first_beside_what_was_said_before(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    parts = {part["title"]: part["cards"] for part in page.judgements(read_run(run))}
    worst = parts["Held out: the worst errors of E[score] after step 4"]
    assert [card["facts"][0] for card in worst] == [("dev", f"row {n}") for n in (7, 6, 5, 4)]
    assert [said["text"].split(" row")[0] for said in worst[0]["said"]] == ["step 0", "step 4"]
    assert [said["facts"][0] for said in worst[0]["said"]] == [("step", "0"), ("step", "4")]
    assert worst[0]["said"][1]["facts"][1] == ("E[score]", "2.70")
    (without,) = parts["Held out: without a score after step 4"]
    assert ("no score:", "no_anchor") in without["said"][1]["facts"] and without["said"][1]["bars"] == []
    rows = [parts[f"Rollouts of the {which}"] for which in ("first step, 1", "last step, 4")]
    assert [[card["facts"][0][1] for card in cards] for cards in rows] == [["71", "71"], ["74"]]
    bars = rows[0][0]["said"][0]["bars"]
    assert [(bar["label"], bar["share"], bar["right"]) for bar in bars] == [
        ("1", "0.600", False), ("2", "0.300", True), ("3", "0.100", False)]  # fmt: skip


def test_distributions_are_means_and_labels_between_two_scores_count_for_both() -> None:
    rows = [judged(0, 2.0, label=1.0), judged(1, 2.0, label=2.25), judged(2, None, label=3.0), {"label": None}]
    rows[1]["distribution"] = [0.4, 0.1, 0.5]
    # Labels 1, 2.25 and 3: the second is three quarters of a 2 and a quarter of a 3.
    assert charts.label_shares(SCALE, rows) == pytest.approx([1 / 3, 0.75 / 3, 1.25 / 3])
    assert charts.mean_distribution(SCALE, rows) == pytest.approx([0.3, 0.3, 0.4])
    assert charts.mean_distribution(SCALE, [{"distribution": [0.5, None, 0.5]}, {"distribution": [1.0]}]) is None
    assert charts.distribution(SCALE, [(0, [{"label": 9}])]) is None


def curve(svg: str) -> str:
    """The path of a chart's first line."""
    root = ElementTree.fromstring(svg)
    (group,) = [g for g in root.iter() if g.get("id", "").startswith("line2d") and g.get("id") == first_line(root)]
    return next(p for p in group.iter() if p.tag.endswith("path")).get("d", "")


def first_line(root: ElementTree.Element) -> str:
    """Lines of the axes come after its ticks, which are lines within groups of their own."""
    axes = next(g for g in root.iter() if g.get("id") == "axes_1")
    return next(g.get("id", "") for g in axes if g.get("id", "").startswith("line2d"))


def test_what_is_not_finite_is_left_out_and_long_runs_become_means() -> None:
    records = [{"step": n, "a": value} for n, value in enumerate([1.0, None, float("nan"), True, 3.0])]
    assert charts.points(records, "a") == [(0, 1.0), (4, 3.0)]
    chart = Chart(title="t", lines={"a": "a"})
    assert charts.curves(chart, [{"step": 1}], []) is None
    long = [{"step": n, "a": float(n % 2)} for n in range(2 * MOST)]
    parts = charts._bins(charts.points(long, "a"))
    assert len(parts) == MOST and [part[0][0] for part in parts[:3]] == [0, 2, 4]
    svg = charts.curves(chart, long, [])
    assert svg is not None and len(svg) < 60_000
    # The mean of every two values is one half: a level line. All of them: a zigzag of 600 points.
    heights = {point.split()[1] for point in curve(svg).replace("M ", "").split("L ") if point.strip()}
    assert len(heights) == 1


def test_steps_that_a_watch_warned_of_are_marked() -> None:
    records = [{"step": n, "score/mass": 1 - 0.1 * n} for n in range(5)]
    chart = Chart(title="t", lines={"score/mass": "m"}, watches=("mass",))
    plain = charts.curves(chart, records, [{"step": 2, "watch": "gap"}])
    marked = charts.curves(chart, records, [{"step": n, "watch": "mass"} for n in (2, 3)])
    assert plain is not None and marked is not None
    assert marked.count("#b3261e") == plain.count("#b3261e") + 2


def test_charts_name_metrics_and_watches_that_there_are() -> None:
    every = (*panels.HELD_OUT, *panels.STILL_JUDGING, *panels.TRAINING, *panels.DRIFT, *panels.SPEED)
    names = {name for chart in every for name in (*chart.lines, *(chart.bands or {}), *(chart.bands or {}).values())}
    assert (names | set(panels.PHASES)) - metrics_of_the_code() == set()
    assert {watch for chart in every for watch in chart.watches} == {*WATCHES, "finite"}


@pytest.mark.parametrize("what", ["nothing", "no evaluation", "no configuration", "a warm-up"])
def test_a_run_that_has_only_begun(tmp_path: Path, what: str) -> None:
    records = [{"step": 0, "phase": "sync"}]
    if what == "a warm-up":
        records += [{"step": 1, "phase": "train", "loss/cross_entropy": 0.5}]
    lines(tmp_path / "metrics.jsonl", records)
    if what == "no configuration":
        (tmp_path / "run_config.json").write_text("{")
    found = shown(tmp_path)
    assert "No evaluation." in found.text and "None was recorded." in found.text
    assert ("Loss terms" in found.text) == (what == "a warm-up")


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for name in ("metrics.jsonl", "samples.jsonl", "warnings.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": 99, "phase": "tr')
    found = read_run(run)
    assert found.train[-1]["step"] == 4 and found.last[-1]["step"] == 4 and len(found.warnings) == 3


def test_the_end_of_a_long_file_of_judgements_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    lines(run / "samples.jsonl", [{"step": n // 2, "row": n} for n in range(40)])
    monkeypatch.setattr("real_openrlhf.controller.report.records._TAIL", 100)
    found = read_run(run)
    assert [line["row"] for line in found.first] == [0, 1] and [line["row"] for line in found.last] == [38, 39]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    first = (run / "report.html").read_bytes()
    assert main([str(run), "--output", str(tmp_path / "r.html")]) == 0
    # The same records, the same page.
    assert (tmp_path / "r.html").read_bytes() == first
    assert main([str(tmp_path)]) == 2
    assert "holds no metrics.jsonl; give the --ckpt.output_dir of a run" in capsys.readouterr().err
    assert main([str(run), "--output", str(tmp_path / "nowhere" / "r.html")]) == 2
    (run / "metrics.jsonl").write_text("not JSON\n")
    assert main([str(run)]) == 2
    assert "metrics.jsonl, line 1 is not a record" in capsys.readouterr().err
    with pytest.raises(ReportError):
        read_run(tmp_path)


def test_a_run_writes_its_page_not_too_often_and_never_fails_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    written: list[Path] = []
    monkeypatch.setattr(page, "write_report", written.append)
    clock = [0.0]
    monkeypatch.setattr("real_openrlhf.controller.run_log.time.monotonic", lambda: clock[0])
    with RunLog(tmp_path / "run", tensorboard_dir=None, wandb=WandbConfig(), config={}) as log:
        log.log(0, "eval", {"eval/reward": 1.0})
        log.page()
        assert written == []  # nothing was trained
        log.log(1, "train", {"loss/total": 1.0})
        log.page()
        assert written == [tmp_path / "run"]

        def slow(folder: Path) -> None:
            clock[0] += 3.0
            raise ValueError("no space")

        monkeypatch.setattr(page, "write_report", slow)
        clock[0] = 100.0
        log.page()
        assert clock[0] == 103.0 and "the page of the run could not be written: no space" in caplog.text
        clock[0] = 159.0
        log.page()
        assert clock[0] == 159.0
        clock[0] = 161.0
        log.page()
        assert clock[0] == 164.0
        log.page(last=True)
        assert clock[0] == 167.0
