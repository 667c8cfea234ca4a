"""Imports flow one way: what CONTRIBUTING's table allows each folder, and no circle between modules."""

from __future__ import annotations

import ast
import json
import pkgutil
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import real_openrlhf.algo

ROOT = Path(__file__).parents[2]
PACKAGE = "real_openrlhf"
HEAVY = ["ray", "vllm", "deepspeed", "openrlhf", "transformers", "datasets", "scipy"]


def modules() -> dict[str, Path]:
    found = {}
    for path in (ROOT / PACKAGE).rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, names: set[str]) -> set[str]:
    """Modules of the package that a file imports anywhere, also inside functions and for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & names) or {node.module}
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in names}
    return found


def graph() -> dict[str, set[str]]:
    found = modules()
    return {name: imported(path, set(found)) - {name} for name, path in found.items()}


def folder_of(module: str) -> str:
    """The folder of a module; "" for those at the top, the entry points."""
    parts = module.split(".")
    return parts[1] if len(parts) > 2 or (len(parts) == 2 and (ROOT / PACKAGE / parts[1]).is_dir()) else ""


def allowed() -> dict[str, set[str]]:
    """CONTRIBUTING's table: folder -> folders."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `real_openrlhf/(\w*)`? *\|[^|]*\| ([^|]*) \|$", text, flags=re.MULTILINE)
    return {folder: set(re.findall(r"`(\w+)`", cell)) for folder, cell in rows}


def test_every_folder_has_its_row() -> None:
    folders = {folder_of(name) for name in modules()} - {""}
    assert set(allowed()) == folders
    assert set().union(*allowed().values()) <= folders


def test_folders_import_what_contributing_allows() -> None:
    table = allowed()
    wrong = sorted(
        f"{module} imports {other}"
        for module, others in graph().items()
        for other in others
        if (mine := folder_of(module)) and folder_of(other) not in table[mine] | {mine}
    )
    assert wrong == []


def test_the_table_itself_has_no_circle() -> None:
    assert set(TopologicalSorter(allowed()).static_order()) == set(allowed())


def test_no_module_imports_itself_by_a_detour() -> None:
    # graphlib raises CycleError and names the circle. A package's __init__ may hold names of its own modules.
    TopologicalSorter(graph()).prepare()


COMMANDS = {
    "real_openrlhf.train_real": [["--help"], ["--actor.lr", "1"]],
    "real_openrlhf.train_warmup": [["--help"], ["--actor.lr", "1"]],
    "real_openrlhf.evaluate": [
        ["--help"],
        ["--no_such_flag"],
        ["--n", "0"],
        ["--model", "m"],
        ["--tie_margin", "-1"],
        ["--model", "m", "--pairs", "p", "--output_dir", "o", "--rubric", "nowhere.txt"],
    ],
    "real_openrlhf.report": [["--help"], ["--no_such_flag"]],
    "real_openrlhf.judge.cli": [
        ["--help"],
        ["serve", "--help"],
        ["calibration", "fit", "--help"],
        ["calibrate"],
        ["--model", "m", "--input", "i", "--n", "0"],
        ["serve", "--model", "m", "--no_such_flag"],
        ["serve", "--rewards", "--help"],
        ["serve", "--rewards", "--model", "m", "--max_queue", "0"],
    ],
}


@pytest.mark.parametrize(("command", "words"), [(name, words) for name, all_ in COMMANDS.items() for words in all_])
def test_help_and_mistakes_in_flags_need_nothing_heavy(command: str, words: list[str]) -> None:
    code = (
        f"import json, sys\nfrom {command} import main\n"
        f"try: code = main({words!r})\nexcept SystemExit as end: code = end.code\n"
        f"print()\nprint(json.dumps([code, [name for name in {['torch', *HEAVY]!r} if name in sys.modules]]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout.splitlines()[-1]) == [0 if "--help" in words else 2, []]


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("real_openrlhf.config.cli", ["--actor.model_name_or_path", "m", "--data.prompt_dataset", "d"]),
        ("real_openrlhf.evaluate", ["--model", "m", "--benchmark", "t=d", "--output_dir", "o"]),
        ("real_openrlhf.evaluate", ["--model", "m", "--pairs", "t=d", "--output_dir", "o", "--rubric", "Is it?"]),
        ("real_openrlhf.judge.cli_args", ["--model", "m", "--input", "d"]),
        ("real_openrlhf.judge.cli_args", ["serve", "--model", "m"]),
        ("real_openrlhf.judge.cli_args", ["serve", "--rewards", "--model", "m"]),
        ("real_openrlhf.judge.cli_args", ["calibration", "fit", "--model", "m", "--data", "d"]),
    ],
)
def test_flags_are_parsed_before_anything_heavy_is_imported(module: str, words: list[str]) -> None:
    code = (
        f"import json, sys\nfrom {module} import parse_args\nassert parse_args({words!r})\n"
        f"print(json.dumps([name for name in {['torch', *HEAVY]!r} if name in sys.modules]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == []


def test_algo_drags_in_none_of_the_stack() -> None:
    names = [m.name for m in pkgutil.walk_packages(real_openrlhf.algo.__path__, "real_openrlhf.algo.")]
    assert "real_openrlhf.algo.loss" in names and "real_openrlhf.algo.objectives.real" in names
    code = (
        "import importlib, json, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout.splitlines()[-1]) == []
