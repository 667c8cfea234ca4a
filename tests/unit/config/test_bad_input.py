"""Configurations as people write them, with one fault each: the command stops, and names file or flag, and fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from real_openrlhf import train_real, train_warmup

# what is wrong, name of the file, its content, what the message says after "--config"
FILES: list[tuple[str, str, bytes, str]] = [
    ("empty JSON", "c.json", b"", "is not JSON"),
    ("empty YAML", "c.yaml", b"", "must hold one mapping of flags to values"),
    ("cut off", "c.json", b'{"real": {"beta": 1', "is not JSON"),
    ("a comma at the end", "c.json", b'{"real.beta": 1,}', "is not JSON"),
    ("comments in JSON", "c.json", b'{"real.beta": 1} // low', "is not JSON"),
    ("a list", "c.json", b"[1]", "must hold one mapping"),
    ("text", "c.yaml", b"hello", "must hold one mapping"),
    ("not UTF-8", "c.yaml", b"data.input_key: caf\xe9", "cannot read"),
    ("UTF-16", "c.json", '{"real.beta": 1}'.encode("utf-16"), "cannot read"),
    ("NUL", "c.yaml", b"real.beta: 1\0", "is not YAML"),
    ("tabs", "c.yaml", b"real:\n\tbeta: 1\n", "is not YAML"),
    ("two documents", "c.yaml", b"real.beta: 1\n---\nreal.beta: 2\n", "is not YAML"),
    ("a key twice in YAML", "c.yaml", b"real.beta: 1\nreal.beta: 2\n", "gives 'real.beta' twice, in lines 1 and 2"),
    ("a key twice in JSON", "c.json", b'{"real": {"beta": 1, "beta": 2}}', "gives 'beta' twice"),
    ("a key nested and dotted", "c.json", b'{"real": {"beta": 1}, "real.beta": 2}', "gives real.beta twice"),
    ("an object of Python", "c.yaml", b"real.beta: !!python/object/apply:os.system [ls]\n", "line 1: has the tag"),
    ("an alias", "c.yaml", b"a: &x 1\nb: *x\n", "line 1: has the anchor or alias 'x'"),
    ("a merge key", "c.yaml", b"real:\n  <<: {beta: 1}\n", "line 2: has a merge key"),
    ("a list as key", "c.yaml", b"? [a]\n: 1\n", "line 1: a key is the name of a flag"),
    ("unknown", "c.yaml", b"real.bta: 1\n", "unknown key 'real.bta'; did you mean real.beta"),
    ("unknown section", "c.yaml", b"rael:\n  beta: 1\n", "unknown key 'rael'; did you mean real"),
    ("a section with a value", "c.yaml", b"real: 3\n", "real is a section, it needs keys below it, got 3"),
    ("a section with a list", "c.yaml", b"real: [beta]\n", "real is a section"),
    ("a flag with keys", "c.yaml", b"real.beta: {value: 1}\n", "--real.beta must be a number >= 0, got {'value': 1}"),
    ("a number key", "c.yaml", b"7: 1\n", "unknown key '7'"),
    ("the name of another library", "c.yaml", b"learning_rate: 1\n", "here this is --actor.adam.lr"),
    ("no value", "c.yaml", b"real.beta:\n", "line 1: real.beta: has no value"),
    ("null", "c.json", b'{"train.seed": null}', "--train.seed must be a whole number >= 0 and <= 2147483647, got None"),
    ("yes", "c.yaml", b"real.refill: yes\n", "line 1: real.refill: 'yes': write true or false"),
    ("true for a number", "c.json", b'{"real.beta": true}', "--real.beta must be a number >= 0, got True"),
    ("a number for true", "c.json", b'{"real.refill": 1}', "--real.refill must be true or false, got 1"),
    ("a fraction for a whole number", "c.json", b'{"train.seed": 1.5}', "--train.seed must be a whole number"),
    ("octal", "c.yaml", b"train.seed: 010\n", "line 1: train.seed: '010': write it as a plain decimal number"),
    ("NaN", "c.json", b'{"actor.adam.lr": NaN}', "--actor.adam.lr must be a number >= 0, got nan"),
    ("infinite", "c.json", b'{"actor.adam.lr": Infinity}', "--actor.adam.lr must be a number >= 0, got inf"),
    ("too large", "c.json", b'{"actor.adam.lr": 1e999}', "--actor.adam.lr must be a number >= 0, got inf"),
    ("negative", "c.json", b'{"actor.adam.lr": -1}', "--actor.adam.lr must be a number >= 0, got -1"),
    ("400 digits", "c.json", b'{"actor.adam.lr": ' + b"9" * 400 + b"}", "--actor.adam.lr must be a number"),
    ("5,000 digits", "c.json", b'{"train.seed": ' + b"9" * 5000 + b"}", "is not JSON"),
    ("deeply nested", "c.json", b'{"real": ' * 20_000, "is not JSON"),
    ("a pair of one", "c.json", b'{"actor.adam.betas": [0.9]}', "--actor.adam.betas must be 2 values"),
    ("an empty list", "c.json", b'{"real.anchor": []}', "--real.anchor must be one or more values"),
    ("no such choice", "c.json", b'{"real.objective": "dpo"}', "--real.objective must be one of real"),
    ("no such preset", "c.json", b'{"real.preset": "papers"}', "--real.preset must be one of exact, paper"),
    ("a scale that descends", "c.json", b'{"real.scale": "5-1"}', "--real.scale cannot be used: the scale '5-1'"),
    ("a scale as a list", "c.json", b'{"real.scale": [1, 5]}', "--real.scale must be text, got [1, 5]"),
    ("a scale as a number", "c.json", b'{"real.scale": 5}', "--real.scale must be text, got 5; put it in quotes"),
    ("two faults", "c.json", b'{"real.bta": 1, "train.seed": -1}', "--train.seed must be"),
]  # fmt: skip
SILENT = ("--real.scale cannot be used",)  # checked with all sections together, when it is known no more who said it


@pytest.mark.parametrize("command", [train_real.main, train_warmup.main], ids=["real", "warmup"])
@pytest.mark.parametrize(("name", "content", "says"), [c[1:] for c in FILES], ids=[c[0] for c in FILES])
def test_a_file_with_a_fault(
    tmp_path: Path,
    name: str,
    content: bytes,
    says: str,
    command: Callable[[list[str]], int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert command(["--config", str(path)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and says in told, told
    assert str(path) in told or says.startswith(SILENT), told
    assert "Traceback" not in told and len(told) < 700 + 2 * len(str(path)), told


# what is wrong, flags beside those of a run that is right so far, what the message says
FLAGS: list[tuple[str, list[str], str]] = [
    ("no such file of flags", ["--config", "nowhere.yaml"], "--config: cannot read nowhere.yaml"),
    ("a folder of flags", ["--config", "."], "--config: cannot read ."),
    ("no model", ["--actor.model_name_or_path", ""], "--actor.model_name_or_path is required"),
    ("no such model", ["--actor.model_name_or_path", "./nope"], "--actor.model_name_or_path './nope': there is no"),
    ("a file as model", ["--actor.model_name_or_path", "train.jsonl"], "'train.jsonl' is a file"),
    ("no such data", ["--data.prompt_dataset", "trian.jsonl"], "--data.prompt_dataset trian.jsonl: there is no"),
    ("a URL as data", ["--data.prompt_dataset", "https://x.org/a.jsonl"], "--data.prompt_dataset https:"),
    ("no such held-out data", ["--eval.dataset", "dev=nope.jsonl"], "--eval.dataset nope.jsonl: there is no"),
    ("a benchmark twice", ["--eval.dataset", "a=train.jsonl,a=train.jsonl"], "--eval.dataset"),
    ("no output", ["--ckpt.output_dir", ""], "--ckpt.output_dir is required"),
    ("no such metric", ["--eval.dataset", "train.jsonl", "--ckpt.best_metric_key", "f1"], "--ckpt.best_metric_key"),
    ("a blank anchor", ["--real.anchor", " "], "--real.anchor is blank"),
    ("a billion scores", ["--real.scale", "1-1000000000"], "--real.scale cannot be used: the scale '1-1000000000' has"),
    ("a score of letters", ["--real.scale", "a-e"], "--real.scale cannot be used: cannot read 'a-e'"),
    ("one score", ["--real.scale", "3"], "--real.scale cannot be used: a scale needs at least two values"),
    ("a score twice", ["--real.scale", "1,2,2"], "--real.scale cannot be used: the scale's values must ascend"),
    ("a template without a place", ["--data.input_template", "Judge this."], "--data.input_template needs exactly one"),
    ("a template with two places", ["--data.input_template", "{} {}"], "--data.input_template needs exactly one"),
    ("no room for a prompt", ["--data.max_len", "64", "--rollout.max_new_tokens", "64"], "--data.max_len 64"),
    ("a seed too large", ["--train.seed", "2147483648"], "--train.seed must be a whole number >= 0 and <= 2147483647"),
    ("a negative step", ["--train.max_steps", "-1"], "--train.max_steps must be a whole number >= 0, or none"),
    ("no ranks", ["--actor.num_gpus_per_node", "0"], "--actor.num_gpus_per_node must be a whole number >= 1"),
    ("ranks that do not divide", ["--actor.num_gpus_per_node", "3"], "must be a multiple of the 3 policy ranks"),
    ("text for a number", ["--actor.adam.lr", "1e-6,"], "--actor.adam.lr must be a number >= 0, got '1e-6,'"),
    ("a value in a shell's quotes", ["--actor.adam.lr", "'1e-6'"], "--actor.adam.lr must be a number >= 0"),
    ("a dash of a word processor", ["\u2013\u2013actor.adam.lr", "1e-6"], "long dash; write --actor.adam.lr"),
    ("a value too many", ["--train.seed", "1", "2"], "unexpected 2 after --train.seed"),
    ("no value", ["--train.seed"], "--train.seed has no value"),
    ("OpenRLHF's critic", ["--critic.adam.lr", "1"], "--critic.adam.lr is a flag of OpenRLHF that is not used here"),
    ("resume from nothing", ["--ckpt.load", ""], "--ckpt.load is empty"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "says"), [c[1:] for c in FLAGS], ids=[c[0] for c in FLAGS])
def test_a_flag_with_a_fault(
    tmp_path: Path, flags: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text('{"prompt": "p", "label": 3}\n')
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    right = ["--actor.model_name_or_path", "model", "--data.prompt_dataset", "train.jsonl", "--ckpt.output_dir", "out"]
    assert train_real.main([*right, *flags]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and says in told, told
    assert "Traceback" not in told and len(told) < 700, told
    assert not Path("out").exists()
