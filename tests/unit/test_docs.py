"""What README, the examples and the Slurm script say is true: commands parse, code runs, names and paths exist."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch

from real_openrlhf.algo.loss import LossOptions, policy_loss
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.algo.types import Denominators
from real_openrlhf.config.cli import parse_args
from real_openrlhf.config.convert import flags_by_name, get_value
from real_openrlhf.config.flag_table import flag_table
from real_openrlhf.config.presets import PRESETS
from real_openrlhf.config.validate import validate
from real_openrlhf.controller.rollout_stats import rollout_metrics
from real_openrlhf.data.__main__ import main as build_data
from real_openrlhf.evals.results import metric_names
from real_openrlhf.evaluate import parse_args as evaluate_args
from real_openrlhf.export.model_card import SNIPPET
from real_openrlhf.judge.cli_args import parse_args as judge_args
from tests.helpers.algo_factory import make_group, make_inputs, make_rollout, make_train_group
from tests.unit.config.test_cli import openrlhf_flags

ROOT = Path(__file__).parents[2]
FOLDERS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "real_openrlhf").glob("*/README.md"))
# The front page, and what it sends its reader to.
MANUAL = ("README.md", *FOLDERS)
DOCUMENTS = (*MANUAL, "CONTRIBUTING.md", "slurm/README.md", "examples/README.md")
README = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in MANUAL)
MODULE = "-m real_openrlhf.train_real"


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    match = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{2,6}} |\Z)", README, flags=re.MULTILINE | re.DOTALL)
    assert match, title
    return match[2]


def rows(text: str) -> list[list[str]]:
    """The cells of every table row, heads and rules left out."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# -- commands ------------------------------------------------------------------------------------------


def commands(text: str, module: str = MODULE) -> Iterator[list[str]]:
    """Arguments of each command of a module (train_real unless another is named), shell variables replaced by "1",
    which every type takes."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if line.lstrip().startswith("#") or module not in line:
            continue
        tail = line.partition(module)[2]
        tail = re.sub(r'"\$(@|\{\w+\[@\]\})"', " ", tail)  # arrays of further arguments
        tail = re.sub(r'"?\$(\{[^}]*\}|\w+)"?', "1", tail)
        words = shlex.split(tail, comments=True)
        yield words[: words.index("&")] if "&" in words else words


def test_the_commands_of_readme_and_slurm_parse() -> None:
    found = [argv for block in blocks(README, "bash") for argv in commands(block)]
    assert len(found) >= 2 and all(argv for argv in found)
    for argv in found:
        config = parse_args(argv)
        assert config.actor.model_name_or_path and config.data.prompt_dataset and config.ckpt.output_dir
    script = (ROOT / "slurm/train_real.sbatch").read_text(encoding="utf-8")
    (batch,) = commands(script, "own_flags train_real")
    batch = batch[: batch.index("--")]
    assert parse_args(batch).ds.zero_stage == 3
    submit, by_settings = blocks((ROOT / "slurm/README.md").read_text(encoding="utf-8"), "bash")
    words = shlex.split(submit.replace("\\\n", " "))
    user = words[words.index("slurm/train_real.sbatch") + 1 :]
    config = parse_args([*batch, *user])
    # Both commands give the same paths.
    settings = dict(re.findall(r"(REAL_\w+)=(\S+)", by_settings))
    flag_of = {name: flag for flag, name in re.findall(r'^flag --(\S+) "\$\{(\w+):-\}"', script, flags=re.MULTILINE)}
    assert set(settings) == set(flag_of)
    assert all(get_value(config, flag_of[name]) == value for name, value in settings.items())


@pytest.mark.parametrize("document", ["README.md", "examples/own_data/README.md"])
def test_the_commands_from_a_csv_to_a_judge_fit_together(
    document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data set is built of a CSV as the page says; the flags of what follows name its files and each other's."""
    monkeypatch.chdir(tmp_path)
    text = "\n".join(blocks((ROOT / document).read_text(encoding="utf-8"), "bash")).replace(" /data/", " data/")
    text = text.replace("=/data/", "=data/")
    Path("mine.csv").write_text("question,answer,score\n" + "".join(f"Q{n}?,yes,{1 + n % 5}\n" for n in range(60)))
    (built,) = commands(text, "-m real_openrlhf.data")
    assert build_data(built) == 0
    (words,) = commands(text, "-m real_openrlhf.train_warmup")
    warmup = parse_args(words, warmup=True)
    (real,) = map(parse_args, commands(text))
    validate(warmup)
    validate(real)
    for source in (warmup.data.prompt_dataset, warmup.eval.dataset, real.data.prompt_dataset, real.eval.dataset):
        assert Path(str(source)).is_file(), source
    assert real.actor.model_name_or_path == f"{warmup.ckpt.output_dir}/model"
    model = f"{real.ckpt.output_dir}/model"
    evaluations = [evaluate_args(words) for words in commands(text, "-m real_openrlhf.evaluate")]
    judged = [args for args in evaluations if args.model]
    assert model in [args.model for args in judged]
    assert all(Path(name.removeprefix("test=")).is_file() for args in judged for name in args.benchmark)
    serves = [judge_args(words) for words in commands(text, "-m real_openrlhf.judge")]
    assert len(serves) >= 2 and {args.model for args in serves} == {model}


@pytest.mark.parametrize("script", sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("examples/*/run.sh")))
def test_the_commands_of_the_examples_parse(script: str, tmp_path: Path) -> None:
    """The script runs in a copy, with an installation that does nothing and a python that notes its arguments."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / "examples/install/cpu.sh").write_text("exit 0\n")
    recorder = tmp_path / "venv/bin/python"
    recorder.parent.mkdir(parents=True)
    code = "import json, sys; open(sys.argv[1], 'a').write(json.dumps(sys.argv[2:]) + chr(10))"
    recorder.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -c "{code}" "{tmp_path}/calls" "$@"\n')
    recorder.chmod(0o755)
    keep = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG")}
    env = {**keep, "VENV": str(tmp_path / "venv")}
    result = subprocess.run(["bash", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    runs = [call[2:] for call in calls if call[:2] == MODULE.split()]
    # These run other programs of the examples.
    assert runs or script.split("/")[1] in ("benchmark", "facts", "mtbench", "paper_tables", "stsb")
    for argv in runs:
        assert parse_args(argv).ckpt.output_dir
    for argv in (call[2:] for call in calls if call[:2] == ["-m", "real_openrlhf.train_warmup"]):
        assert validate(parse_args(argv, warmup=True)) is not None
    for call in calls:
        if call[0] == "-m":
            module = ROOT.joinpath(*call[1].split("."))
            assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file(), call[1]
        else:
            assert (tmp_path / call[0]).is_file(), call[0]


@pytest.mark.parametrize(
    "script",
    sorted(
        p.relative_to(ROOT).as_posix() for top in ("examples", "slurm", "tests") for p in (ROOT / top).rglob("*.s[hb]*")
    ),
)
def test_shell_scripts_have_no_syntax_errors(script: str) -> None:
    subprocess.run(["bash", "-n", ROOT / script], check=True)


# -- names ---------------------------------------------------------------------------------------------


# Pages about a stock OpenRLHF.
ABOUT_OPENRLHF = (
    "real_openrlhf/dropin/README.md",
    "real_openrlhf/judge/README.md",
    "examples/judge_as_reward/README.md",
)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_flag_that_is_mentioned_exists(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    mentioned = set(re.findall(r"(?<![\w-])--((?:no-)?[a-z_]+(?:\.[a-z0-9_]+)+)", text))
    assert document != "real_openrlhf/config/README.md" or len(mentioned) > 100
    known = set(flags_by_name())
    if document in ABOUT_OPENRLHF:  # some of it by whole sections
        known |= openrlhf_flags() | {"actor.muon"}
    assert {name for name in mentioned if name.removeprefix("no-") not in known} == set()


def test_the_front_page_is_short_and_leads_to_every_folder() -> None:
    front = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(front.splitlines()) <= 150
    assert [name for name in FOLDERS if f"({name})" not in front] == []


def test_the_table_of_all_flags_is_the_schemas() -> None:
    assert flag_table() in (ROOT / "real_openrlhf/config/README.md").read_text(encoding="utf-8")


def test_every_example_is_in_the_index() -> None:
    index = (ROOT / "examples/README.md").read_text(encoding="utf-8")
    names = sorted(path.parent.name for path in (ROOT / "examples").glob("*/README.md"))
    assert len(names) >= 5 and [name for name in names if f"({name}/README.md)" not in index] == []


def test_the_judgement_on_the_front_page_is_that_of_the_quickstarts_report() -> None:
    front = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(
        r"```\nprompt  (.*\n {8}.*)\nbefore  (.*?) {2,}E\[score\] (.*)\nafter   (.*?) {2,}E\[score\] (.*)\n", front
    )
    assert shown is not None
    report = (ROOT / "examples/quickstart/results/seed_0.md").read_text(encoding="utf-8")
    judged = r"(.*?) </s>    E\[score\] (.*)\n"
    found = re.search(rf"prompt: (.*)\n    label:  1\n    start:  {judged}    after:  {judged}", report)
    # The prompt is broken into two lines.
    assert found is not None and [" ".join(text.split()) for text in shown.groups()] == list(found.groups())


def test_the_table_of_presets_is_the_presets() -> None:
    table = rows(section("Presets"))
    assert len(table) >= 10
    for flag, *cells in table:
        name = flag.strip("`").removeprefix("--")
        assert cells == [str(PRESETS[p][name]) for p in ("exact", "paper", "reference")], name
    # What they differ in is all there.
    differ = {name for name in PRESETS["paper"] if len({str(preset[name]) for preset in PRESETS.values()}) > 1}
    assert differ <= {flag.strip("`").removeprefix("--") for flag, *_ in table}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_local_path_that_is_mentioned_exists(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    folder = (ROOT / document).parent
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    tops = "real_openrlhf|examples|slurm|tests"
    inline = re.findall(rf"(?<![\w./-])((?:{tops})/[\w./-]*\w)", re.sub(r"\]\([^)]*\)", "]", text))
    assert [link for link in links if not (folder / link).exists()] == []
    assert [path for path in inline if not (ROOT / path).exists()] == []


# -- metrics -------------------------------------------------------------------------------------------


def documented_metrics() -> set[str]:
    names = set()
    for first, *_ in rows(section("What is logged")):
        for text in re.findall(r"`([^`]+)`", first):
            parts = [part.split(",") for part in re.split(r"\{([^}]*)\}", text)]
            names |= {"".join(choice) for choice in product(*parts)}
    return names


def literals(path: str) -> set[str]:
    """Metric names that stand in a module: "a/b" as it is, "seconds/x" for each timed phase x."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value} if re.fullmatch(r"[a-z_]+/[a-z_0-9]+", node.value) else set()
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "phase":
            found |= {f"seconds/{node.args[0].value}"} if isinstance(node.args[0], ast.Constant) else set()
    return found


def metrics_of_the_code() -> set[str]:
    scale = ScoreScale.parse("1-3")
    group = make_group([1, 2], [make_rollout([5, 2], position=1, label=1), make_rollout([5, 6])])
    names = set(rollout_metrics([group], [make_train_group(group, scale)], scale))
    names |= {f"eval/{name}" for name in metric_names(["one"])}
    row = torch.zeros(1, 2)
    inputs = make_inputs(row, torch.zeros(1, 3), entropy=row, ref_logprobs=row)
    terms = policy_loss(
        inputs,
        options=LossOptions(entropy_coef=0.1),
        denominators=Denominators(rollouts=1, action_tokens=1, response_tokens=2),
    ).terms
    names |= {f"{prefix}/{term}" for prefix in ("loss", "logit_grad_norm") for term in terms}
    names |= {f"eval/change/{name}{end}" for name in ("reward", "expected/pearson") for end in ("", "_low", "_high")}
    for module in (
        "controller/controller.py",
        "controller/loop.py",
        "controller/warmup.py",
        "controller/step_metrics.py",
        "actors/policy/trainer.py",
        "actors/policy/term_norms.py",
        "run/start.py",
    ):
        names |= literals(f"real_openrlhf/{module}")
    return names


def test_the_metrics_of_readme_are_those_of_the_code() -> None:
    documented, real = documented_metrics(), metrics_of_the_code()
    assert len(documented) > 80
    assert documented - real == set()
    assert real - documented == set()


# -- code ----------------------------------------------------------------------------------------------


def test_the_loss_in_readme_runs_and_is_the_papers(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks(section("The loss in your own loop"), "python")
    scope: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), scope)
    shown = ast.literal_eval(capsys.readouterr().out)
    logits, ids = scope["logits"], scope["response_ids"]
    assert isinstance(logits, torch.Tensor) and isinstance(ids, torch.Tensor)

    # Eq. 8 once more, in plain numbers, for y = 3.5 between the scores 3 and 4.
    lam, beta, y = 1.0, 0.01, 3.5
    logprobs = torch.log_softmax(logits.detach().double(), -1)
    positions = [5, 6, 4, None]
    rewards, terms2, sums = [], [], []
    for i, position in enumerate(positions):
        end = 7 if position is None else position
        sums.append(sum(float(logprobs[i, t, ids[i, t]]) for t in range(end)))
        if position is None:
            rewards.append(-(3.5**2) + lam * math.log(1e-6))
            terms2.append((0.0, 0.0))
            continue
        row = logprobs[i, position, 11:16].tolist()
        expected = sum(v * math.exp(p) for v, p in zip((1, 2, 3, 4, 5), row))
        likelihood = (row[2] + row[3]) / 2
        rewards.append(-((expected - y) ** 2) + lam * likelihood)
        terms2.append(((expected - y) ** 2, likelihood))
    advantages = [r - (sum(rewards) - r) / 3 for r in rewards]
    spread = math.sqrt(sum(a * a for a in advantages) / 4)
    advantages = [min(1.0, max(-1.0, a / spread)) for a in advantages]
    assert shown["cot"] == pytest.approx(-sum(a * s for a, s in zip(advantages, sums)) / 4, rel=1e-4)
    assert shown["squared_error"] == pytest.approx(beta * sum(e for e, _ in terms2) / 4, rel=1e-4)
    assert shown["likelihood"] == pytest.approx(-beta * lam * sum(p for _, p in terms2) / 4, rel=1e-4)
    assert logits.grad is not None and bool((logits.grad.abs().sum((1, 2)) > 0).all())


def test_the_judge_snippet_of_readme_is_that_of_the_model_card() -> None:
    (code,) = blocks((ROOT / "real_openrlhf/export/README.md").read_text(encoding="utf-8"), "python")
    folder = re.compile(r'^folder = ".*$', flags=re.MULTILINE)
    assert folder.sub("folder", code).strip() == folder.sub("folder", SNIPPET).strip()


def test_every_python_block_is_python() -> None:
    for document in DOCUMENTS:
        for code in blocks((ROOT / document).read_text(encoding="utf-8"), "python"):
            ast.parse(code)
