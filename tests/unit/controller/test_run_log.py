"""The records of a run: what is written, what is refused, and that no secret is in any of it."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from real_openrlhf.config.flags import ConfigError
from real_openrlhf.config.logger_flags import WandbConfig
from real_openrlhf.controller.output_folder import RunLogError
from real_openrlhf.controller.redaction import REDACTED, redact
from real_openrlhf.controller.run_log import RunLog

OFF = WandbConfig()
KEY = "0123456789abcdef0123456789abcdef01234567"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_log(path, **kwargs):
    return RunLog(path, **{"tensorboard_dir": None, "wandb": OFF, "config": {"seed": 1}, **kwargs})


def test_metrics_are_flat_lines_in_the_file_at_once(tmp_path):
    log = run_log(tmp_path / "out")
    log.log(1, "train", {"reward/mean": torch.tensor(0.5), "n": np.int64(3), "undefined": None})
    # Read before close: every line is flushed.
    (line,) = lines(tmp_path / "out" / "metrics.jsonl")
    assert line.pop("time") > 1e9
    assert line == {"step": 1, "phase": "train", "reward/mean": 0.5, "n": 3, "undefined": None}
    log.close()
    log.close()
    with pytest.raises(ValueError, match="closed"):
        log.log(2, "train", {})


def test_numbers_that_are_not_finite(tmp_path, caplog):
    with run_log(tmp_path) as log:
        log.log(3, "eval", {"a": float("nan"), "b": np.float32("inf"), "c": 1.0, "d": None})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert (line["a"], line["b"], line["c"], line["d"]) == (None, None, 1.0, None)
    assert line["not_finite"] == ["a", "b"]
    assert "step 3, eval: not finite, recorded as null: a, b" in caplog.text


def test_metrics_that_are_no_numbers(tmp_path):
    with run_log(tmp_path) as log:
        with pytest.raises(TypeError, match="'x' is the text 'high'"):
            log.log(1, "train", {"x": "high"})
        with pytest.raises(TypeError, match="'x' is a list"):
            log.log(1, "train", {"x": [1, 2]})
        with pytest.raises(ValueError, match="cannot be named 'time'"):
            log.log(1, "train", {"time": 1.0})
        with pytest.raises(ValueError, match="'test' is not one of"):
            log.log(1, "test", {})  # type: ignore[arg-type]
    assert lines(tmp_path / "metrics.jsonl") == []


def test_samples(tmp_path):
    with run_log(tmp_path) as log:
        log.log_samples(
            2, [{"text": "gut \ud800 ä", "distribution": {"1": float("nan"), "2": 0.5}, "reward": -1.0}, {"text": "b"}]
        )
    first, second = lines(tmp_path / "samples.jsonl")
    assert first["distribution"] == {"1": None, "2": 0.5}
    assert first["not_finite"] == ["distribution.1"]
    assert first["text"].startswith("gut ") and first["text"].endswith("ä")
    assert second == {"step": 2, "text": "b"}


def test_an_evaluation_needs_no_record_that_shows_pictures(tmp_path):
    with run_log(tmp_path) as log:
        log.log_evaluation(1, [{"row": 1}], {"scatter": "missing.png"})
    assert lines(tmp_path / "metrics.jsonl") == []


def test_redact():
    config = {
        "logger.wandb.key": "abc",
        "hub": {"hf_token": "def", "token": ""},
        "data": {"label_key": "score", "max_new_tokens": 5},
        "argv": ["--key", "abc", "x=abc"],
        "nothing": None,
    }
    assert redact(config, ["abc", ""]) == {
        "logger.wandb.key": REDACTED,
        "hub": {"hf_token": REDACTED, "token": ""},
        "data": {"label_key": "score", "max_new_tokens": 5},
        "argv": ["--key", REDACTED, f"x={REDACTED}"],
        "nothing": None,
    }
    assert config["logger.wandb.key"] == "abc"


def test_config_is_written_without_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with run_log(tmp_path, config={"seed": 1, "wandb": {"key": "k"}, "note": "uses hf_secret"}):
        pass
    assert json.loads((tmp_path / "run_config.json").read_text()) == {
        "seed": 1,
        "wandb": {"key": REDACTED},
        "note": f"uses {REDACTED}",
    }


def test_a_second_log_beside_a_live_one(tmp_path):
    with run_log(tmp_path) as first:
        first.log(1, "train", {"x": 1.0})
        before = (tmp_path / "metrics.jsonl").read_text()
        for how in ({}, {"append": True}, {"overwrite": True}):
            with pytest.raises(RunLogError, match=r"--ckpt.output_dir .* is in use"):
                run_log(tmp_path, **how)
        assert (tmp_path / "metrics.jsonl").read_text() == before
    run_log(tmp_path, overwrite=True).close()
    # One that cannot start lets go.
    with pytest.raises(RunLogError, match="is not empty"):
        run_log(tmp_path)
    run_log(tmp_path, append=True).close()


def test_bad_output_directories(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunLogError, match=r"--ckpt.output_dir .*file is a file; give a folder"):
        run_log(tmp_path / "file")
    with pytest.raises(RunLogError, match=r"--ckpt.output_dir .* cannot be written: Not a directory"):
        run_log(tmp_path / "file" / "below")
    with pytest.raises(RunLogError, match="is not empty \\(file\\)"):
        run_log(tmp_path)
    with pytest.raises(RunLogError, match="not both"):
        run_log(tmp_path / "new", append=True, overwrite=True)
    with pytest.raises(RunLogError, match=r"--logger.tensorboard_dir .*is a file"):
        run_log(tmp_path / "new", tensorboard_dir=str(tmp_path / "file"))


def test_directory_without_permission(tmp_path, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    # Root may write anywhere, so the refusal of the system is played.
    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    with pytest.raises(RunLogError, match="cannot be written: Permission denied"):
        run_log(tmp_path)


def test_overwrite_starts_anew(tmp_path):
    with run_log(tmp_path) as log:
        log.log(1, "train", {"a": 1})
    with run_log(tmp_path, overwrite=True) as log:
        log.log(1, "train", {"a": 2})
    assert [line["a"] for line in lines(tmp_path / "metrics.jsonl")] == [2]


def test_append_goes_on_and_drops_what_comes_again(tmp_path, caplog):
    with run_log(tmp_path) as log:
        for step in (1, 2, 3):
            log.log(step, "train", {"a": step})
            log.log_samples(step, [{"text": str(step)}])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "pha')  # killed while writing
    with run_log(tmp_path, append=True, resume_step=2, config={"seed": 2}) as log:
        log.log(3, "train", {"a": 30})
    assert [(line["step"], line["a"]) for line in lines(tmp_path / "metrics.jsonl")] == [(1, 1), (2, 2), (3, 30)]
    assert [line["text"] for line in lines(tmp_path / "samples.jsonl")] == ["1", "2"]
    assert "the last line is incomplete" in caplog.text
    # Both configurations are kept: each made a part of the run.
    assert json.loads((tmp_path / "run_config.1.json").read_text()) == {"seed": 1}
    assert json.loads((tmp_path / "run_config.json").read_text()) == {"seed": 2}
    assert not list(tmp_path.glob("*.partial"))


def test_append_refuses_what_is_no_record(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nhello\n{"step": 2}\n')
    with pytest.raises(RunLogError, match="line 2 is not a record"):
        run_log(tmp_path, append=True)
    with pytest.raises(RunLogError, match="needs append"):
        run_log(tmp_path / "new", resume_step=3)


def test_a_full_disk_costs_lines_not_the_run(tmp_path, caplog):
    log = run_log(tmp_path)
    log.log(1, "train", {"a": 1})
    real = log._metrics._file

    class Full:
        closed = False

        def write(self, data):
            real.write(data[:7])
            raise OSError(errno.ENOSPC, "No space left on device")

        def __getattr__(self, name):
            return getattr(real, name)

    log._metrics._file = Full()  # type: ignore[assignment]
    log.log(2, "train", {"a": 2})
    log._metrics._file = real
    log.log(3, "train", {"a": 3})
    log.close()
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 3]
    assert "a line of" in caplog.text and "No space left" in caplog.text


def test_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with run_log(tmp_path / "out", tensorboard_dir=str(tmp_path / "tb")) as log:
        log.log(1, "train", {"reward/mean": 0.25, "bad": float("nan"), "none": None})
        log.log(2, "train", {"reward/mean": 0.5})
        log.log(2, "eval", {"eval/expected/pearson": 0.75})
    events = accumulator.EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["eval/expected/pearson", "train/reward/mean"]
    assert [(e.step, e.value) for e in events.Scalars("train/reward/mean")] == [(1, 0.25), (2, 0.5)]
    assert [(e.step, e.value) for e in events.Scalars("eval/expected/pearson")] == [(2, 0.75)]


def test_a_failing_sink_warns_once_and_the_run_goes_on(tmp_path, caplog):
    class Broken:
        name = "W&B"
        calls = 0

        def log(self, step, values):
            self.calls += 1
            raise ConnectionError("gone")

        def close(self):
            pass

    sink = Broken()
    with run_log(tmp_path) as log:
        log._sinks.append(sink)  # type: ignore[arg-type]
        log.log(1, "train", {"a": 1})
        log.log(2, "train", {"a": 2})
    assert sink.calls == 1
    assert caplog.text.count("W&B stopped recording at step 1: gone") == 1
    assert len(lines(tmp_path / "metrics.jsonl")) == 2


def test_wandb_is_not_imported_unless_used(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises ImportError
    with run_log(tmp_path / "a") as log:
        log.log(1, "train", {"a": 1})
    with pytest.raises(RunLogError, match="needs the package wandb"):
        run_log(tmp_path / "b", wandb=WandbConfig(mode="offline"))


def test_wandb_settings():
    with pytest.raises(ConfigError, match=r"--logger\.wandb\.mode must be one of disabled, online, offline, got 'on'"):
        WandbConfig(mode="on")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"--logger\.wandb\.project is empty"):
        WandbConfig(mode="offline", project="")


def test_wandb_that_does_not_start_is_a_clear_error_without_the_key(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def refuse(**kwargs):
        raise RuntimeError(f"the server refused {KEY}")

    monkeypatch.setattr(wandb, "init", refuse)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with pytest.raises(RunLogError, match=r"W&B cannot start with --logger.wandb.mode online") as caught:
        run_log(tmp_path, wandb=WandbConfig(mode="online"))
    assert KEY not in str(caught.value) and REDACTED in str(caught.value)
    assert caught.value.__suppress_context__


def test_wandb_online_without_a_key(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(type(wandb.api), "api_key", property(lambda self: None))
    with pytest.raises(RunLogError, match=r"no key was found; set WANDB_API_KEY"):
        run_log(tmp_path, wandb=WandbConfig(mode="online"))


def test_wandb_offline_keeps_no_key(tmp_path, monkeypatch, caplog):
    pytest.importorskip("wandb")
    caplog.set_level(logging.DEBUG)
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(sys, "argv", ["train", "--some.key", KEY])
    settings = WandbConfig(mode="offline", project="p", run_name="r")
    try:
        log = run_log(tmp_path / "out", wandb=settings, config={"logger": {"wandb": {"key": KEY}}, "argv": sys.argv})
    except RunLogError as error:
        pytest.skip(f"the wandb service cannot start here: {error}")
    log.log(1, "train", {"reward/mean": 0.5})
    Image.new("RGB", (2, 2)).save(tmp_path / "plot.png")
    samples = [{"row": 3, "text": "fine", "distribution": [0.5, 0.5]}, {"row": 4, "text": "", "distribution": None}]
    log.log_evaluation(1, samples, {"flask_scatter": str(tmp_path / "plot.png")})
    log.close()
    assert "stopped recording" not in caplog.text
    media = [p.relative_to(tmp_path).as_posix() for p in (tmp_path / "out" / "wandb").rglob("media/**/*.*")]
    assert [p.suffix for p in map(Path, media) if "eval/plots/flask_scatter" in str(p)] == [".png"]
    (table,) = (p for p in media if p.endswith(".table.json"))
    assert json.loads((tmp_path / table).read_text()) == {
        "columns": ["row", "text", "distribution"],
        "data": [[3, "fine", "[0.5, 0.5]"], [4, "", None]],
    }
    (record,) = (tmp_path / "out" / "wandb").glob("offline-run-*/run-*.wandb")
    # The service of wandb writes its last block a moment after finish() has returned.
    deadline = time.monotonic() + 60
    while b"train/reward/mean" not in record.read_bytes():
        assert time.monotonic() < deadline, "the offline record never got the metric"
        time.sleep(0.05)
    assert (tmp_path / "out" / "wandb_id").read_text() in record.name
    holding = [p for p in tmp_path.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]
    assert holding == []
    assert KEY not in caplog.text


# -- a W&B that goes away. In a process of its own: wandb keeps the address that it was first used with ------------


OUTAGE = """
import logging, subprocess, sys
from pathlib import Path
from real_openrlhf.config.logger_flags import WandbConfig
from real_openrlhf.controller import log_sinks as module
from real_openrlhf.controller.output_folder import RunLogError
from real_openrlhf.controller.run_log import RunLog

folder, server, when = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(message)s")
module._WANDB_END_S = 1.0

def start(name, **more):
    settings = WandbConfig(mode="online", project="p")
    return RunLog(folder / name, tensorboard_dir=None, wandb=settings, config={}, **more)

run = start("run")
run.log(1, "train", {"a": 1.0})
if when == "resumed":
    run.close()
subprocess.run(["kill", "-9", str(server)], check=True)
if when == "lasts":
    for step in range(2, 30):
        run.log(step, "train", {"a": float(step)})
    run.close()  # would wait for ever
    sys.exit()
module._WANDB_START_S = 10.0
try:
    start("new")
    print("a new run was not refused")
except RunLogError as error:
    print("REFUSED", error)
with start("run", append=True, goes_on=True) as log:
    log.log(2, "train", {"a": 2.0})
"""


def outage(folder, when):
    """What a run says whose W&B goes away."""
    pytest.importorskip("wandb")
    command = [sys.executable, "-m", "tests.helpers.wandb_server"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        environment = {**os.environ, "WANDB_BASE_URL": url, "WANDB_API_KEY": f"local-{KEY}"}
        words = [sys.executable, "-c", OUTAGE, str(folder), str(server.pid), when]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=environment)
    finally:
        server.kill()
        server.wait()
    assert done.returncode == 0, done.stdout + done.stderr
    assert KEY not in done.stdout + done.stderr
    return done.stdout


@pytest.mark.faults
def test_wandb_goes_away_while_a_run_lasts(tmp_path):
    said = outage(tmp_path, "lasts")
    assert [line["a"] for line in lines(tmp_path / "run" / "metrics.jsonl")] == [float(i) for i in range(1, 30)]
    assert "W&B has not taken everything within 1 s; the rest is on this disk: wandb sync --append" in said


@pytest.mark.faults
def test_wandb_is_away_when_a_run_goes_on(tmp_path):
    """A first start is refused, since somebody is there to see it; a run that goes on records offline."""
    said = outage(tmp_path, "resumed")
    assert "REFUSED W&B cannot start with --logger.wandb.mode online" in said
    assert "the run goes on, and records for W&B offline" in said and "without W&B" not in said
    assert [line["a"] for line in lines(tmp_path / "run" / "metrics.jsonl")] == [1.0, 2.0]
    run_id = (tmp_path / "run" / "wandb_id").read_text()
    (record,) = (tmp_path / "run" / "wandb").glob(f"offline-run-*-{run_id}/run-*.wandb")
    assert record.stat().st_size > 0
