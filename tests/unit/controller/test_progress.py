"""The bar on a terminal, the lines elsewhere, and the phase timer on a clock that is set by hand."""

from __future__ import annotations

import io
import logging
import subprocess
import sys

import pytest

from real_openrlhf.controller.progress import PhaseTimer, Progress

METRICS = {"reward/mean": -1.25, "score/abs_error": 0.5, "score/mass": 0.987, "invalid/rate": 0.125, "other": 3.0}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_one_line_per_step_without_a_terminal(caplog):
    caplog.set_level(logging.INFO)
    stream = io.StringIO()
    with Progress(20, stream=stream) as progress:
        progress.step(1, METRICS)
        progress.evaluated(1, {"expected/pearson": 0.71})
        progress.step(2, {"policy/grad_norm": 0.00123, "speed/generated_tokens_per_second": 456.7, "reward/mean": None})
    assert [record.message for record in caplog.records] == [
        "step 1/20  reward -1.250  |E-y| 0.500  mass 0.99  invalid 12.5%",
        "step 1/20  eval expected/pearson 0.710",
        "step 2/20  reward -  grad 1.23e-03  tok/s 457  eval pearson 0.710",
    ]
    assert stream.getvalue() == ""


def test_a_bar_on_a_terminal(caplog):
    caplog.set_level(logging.INFO)
    stream = Terminal()
    with Progress(20, initial=3, stream=stream) as progress:
        progress.evaluated(3, {"expected/pearson": None})
        progress.step(5, METRICS)
    assert "5/20" in stream.getvalue()
    assert "|E-y| 0.500" in stream.getvalue() and "eval pearson -" in stream.getvalue()
    assert caplog.records == []


def test_how_far_an_evaluation_is(caplog):
    """A line at once, then one per half minute; the rate is that since it was first seen."""
    caplog.set_level(logging.INFO)
    now = [100.0]
    with Progress(20, stream=io.StringIO(), clock=lambda: now[0]) as progress:
        for step in (1, 2):
            for done in (8, 20, 68):  # after 0, 20 and 40 seconds
                progress.judged(step, done, 80)
                now[0] += 20
            progress.evaluated(step, {})
    assert [record.message for record in caplog.records if "evaluating" in record.message] == [
        "step 1/20  evaluating 8/80",
        "step 1/20  evaluating 68/80, 1.5 judgements/s",
        "step 2/20  evaluating 8/80",
        "step 2/20  evaluating 68/80, 1.5 judgements/s",
    ]
    stream = Terminal()
    with Progress(20, stream=stream) as progress:
        progress.judged(0, 8, 80)
    assert "evaluating 8/80" in stream.getvalue()


def test_off(caplog):
    caplog.set_level(logging.INFO)
    stream = Terminal()
    with Progress(20, enabled=False, stream=stream) as progress:
        progress.step(1, METRICS)
        progress.judged(1, 1, 2)
        progress.evaluated(1, {})
    assert stream.getvalue() == "" and caplog.records == []


def test_phase_timer():
    now = [10.0]
    timer = PhaseTimer(clock=lambda: now[0])
    with timer.phase("generate"):
        now[0] += 2
    with timer.phase("train"):
        now[0] += 0.5
    with timer.phase("generate"):
        now[0] += 1
    with pytest.raises(KeyError), timer.phase("sync"):
        now[0] += 4
        raise KeyError
    assert timer.seconds("generate") == 3.0
    assert timer.pop() == {"seconds/generate": 3.0, "seconds/train": 0.5, "seconds/sync": 4.0}
    assert timer.pop() == {}


def test_seconds_since_the_process_began_have_its_imports_in_them() -> None:
    """Bounded by clocks around it; the kernel gives the time of boot in whole seconds."""
    code = """
import time
time.sleep(2.5)
from real_openrlhf.controller.progress import process_seconds
before = time.perf_counter()
print(process_seconds(), process_seconds() + time.perf_counter() - before)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert 1.5 <= float(out[0]) <= float(out[1])
