"""The table of what we use of OpenRLHF, against OpenRLHF's source and ours. Nothing of OpenRLHF is imported."""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

import pytest

import real_openrlhf
from real_openrlhf.actors.openrlhf_internals import TOUCHES, Touch
from tests.unit.config.test_cli import openrlhf_flags

OURS = Path(real_openrlhf.__file__).parent
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
# Our subclass -> the class under it, as the table names it.
SUBCLASSES = {
    ("actors.policy.strategy", "PolicyStrategy"): "openrlhf.utils.deepspeed:DeepspeedStrategy",
    ("actors.policy.model", "PolicyModel"): "openrlhf.models:Actor",
    ("actors.policy.trainer", "RealTrainer"): "openrlhf.trainer.ray.ppo_actor:ActorPPOTrainer",
    ("actors.policy.policy_actor", "RealPolicyActor"): "openrlhf.trainer.ray.ppo_actor:PolicyModelActor",
    ("actors.policy.reference_actor", "ReferenceActor"): "openrlhf.trainer.ray.launcher:ReferenceModelActor",
    ("actors.engine.rollout_engine", "RolloutEngine"): "openrlhf.trainer.ray.vllm_engine:RolloutRayActor",
    ("dropin.agent", "AgentExecutor"): "openrlhf.utils.agent:SingleTurnAgentExecutor",
    ("dropin.terms_actors", "TermsTrainer"): "openrlhf.trainer.ray.ppo_actor:ActorPPOTrainer",
    ("dropin.terms_actors", "TermsPolicyActor"): "openrlhf.trainer.ray.ppo_actor:PolicyModelActor",
    ("dropin.terms_actors", "TermsEngine"): "openrlhf.trainer.ray.vllm_engine:RolloutRayActor",
    ("dropin.on_cpu", "CpuStrategy"): "openrlhf.utils.deepspeed:DeepspeedStrategy",
    ("dropin.on_cpu", "CpuReplayBuffer"): "openrlhf.trainer.ppo_utils:NaiveReplayBuffer",
    ("dropin.on_cpu", "CpuPolicyActor"): "openrlhf.trainer.ray.ppo_actor:PolicyModelActor",
    ("dropin.on_cpu", "CpuReferenceActor"): "openrlhf.trainer.ray.launcher:ReferenceModelActor",
    ("dropin.on_cpu", "CpuEngine"): "openrlhf.trainer.ray.vllm_engine:RolloutRayActor",
    ("dropin.on_cpu_worker", "CpuWorkerWrap"): "openrlhf.trainer.ray.vllm_worker_wrap:WorkerWrap",
}


@pytest.fixture(scope="module", autouse=True)
def _installed() -> None:
    if importlib.util.find_spec("openrlhf") is None:
        pytest.skip("openrlhf is not installed")


def module_file(name: str) -> Path:
    spec = importlib.util.find_spec("openrlhf")
    assert spec is not None and spec.submodule_search_locations is not None
    path = Path(next(iter(spec.submodule_search_locations))).joinpath(*name.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def our_file(by: str) -> Path:
    return OURS.joinpath(*by.split(".")).with_suffix(".py")


def top_level(module: str, name: str) -> tuple[str, Definition] | None:
    """Where `name` is defined, through re-exports: (module, node)."""
    path = module_file(module)
    if not path.is_file():
        return None
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in tree(path).body:
        if isinstance(node, Definition) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom) and any((a.asname or a.name) == name for a in node.names):
            base = package
            for _ in range(node.level - 1):
                base = base.rpartition(".")[0]
            source = f"{base}.{node.module}" if node.level else str(node.module)
            return top_level(source, name) if source.startswith("openrlhf") else None
    return None


def methods(where: str) -> dict[str, tuple[str, Definition]]:
    """Methods of a class and of its bases within OpenRLHF: name -> ("module:Class", node)."""
    module, _, name = where.partition(":")
    found = top_level(module, name)
    assert found is not None and isinstance(found[1], ast.ClassDef), where
    defined, node = found
    result: dict[str, tuple[str, Definition]] = {}
    for base in node.bases:
        if isinstance(base, ast.Name) and top_level(defined, base.id) is not None:
            result |= methods(f"{defined}:{base.id}")
    result |= {item.name: (where, item) for item in node.body if isinstance(item, ast.FunctionDef)}
    result |= {item.name: (where, item) for item in node.body if isinstance(item, ast.AsyncFunctionDef)}
    return result


def resolve(where: str) -> Definition | None:
    module, _, qualified = where.partition(":")
    head, _, method = qualified.partition(".")
    found = top_level(module, head)
    if found is None or not method:
        return None if found is None else found[1]
    body = found[1].body
    return next((n for n in body if isinstance(n, Definition) and n.name == method), None)


def argument_names(node: Definition) -> set[str]:
    assert not isinstance(node, ast.ClassDef)
    return {a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}


def self_attributes(node: ast.AST) -> set[str]:
    return {
        n.attr
        for n in ast.walk(node)
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "self"
    }


def keys_read(node: ast.AST, name: str) -> set[str]:
    """cfg["x"] and cfg.get("x", ...)."""
    found = set()
    for n in ast.walk(node):
        if isinstance(n, ast.Subscript) and isinstance(n.value, ast.Name) and n.value.id == name:
            found |= {n.slice.value} if isinstance(n.slice, ast.Constant) else set()
        if isinstance(n, ast.Call) and ast.unparse(n.func) == f"{name}.get":
            found |= {n.args[0].value} if isinstance(n.args[0], ast.Constant) else set()
    return found


def names_used(path: Path) -> set[str]:
    """Every identifier, attribute, keyword and text in one of our files."""
    found: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.keyword) and node.arg:
            found.add(node.arg)
        elif isinstance(node, Definition | ast.alias):
            found.add(node.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


def row_id(touch: Touch) -> str:
    return f"{touch.where.rpartition('.')[2]}-{touch.how}"


@pytest.mark.parametrize("touch", [t for t in TOUCHES if t.how != "namespace"], ids=row_id)
def test_the_row_still_holds_in_openrlhf(touch: Touch) -> None:
    node = resolve(touch.where)
    assert node is not None, f"{touch.where} is gone from the installed OpenRLHF"
    if touch.how in ("subclass", "unwrap", "attributes"):
        assert isinstance(node, ast.ClassDef)
    if touch.how in ("subclass", "unwrap"):
        wrapped = any("remote" in ast.unparse(d) for d in node.decorator_list)
        assert wrapped == (touch.how == "unwrap")
    if touch.how in ("override", "call"):
        assert set(touch.names) <= argument_names(node)
    if touch.how == "attributes":
        assert set(touch.names) <= self_attributes(node)
    if touch.how == "keys":
        assert set(touch.names) == keys_read(node, "cfg") - {"muon"}


@pytest.mark.parametrize("touch", [t for t in TOUCHES if t.how != "skip"], ids=row_id)
def test_our_module_does_what_the_row_says(touch: Touch) -> None:
    used = names_used(our_file(touch.by))
    if touch.how == "replace":
        assert touch.where in used
    elif touch.how != "namespace":
        name = touch.where.rpartition(":")[2].rpartition(".")[2]
        # prepare's keys are handed to a private method by way of prepare; __init__ is called by way of super().
        assert name in used or touch.how in ("keys", "attributes") or touch.where.endswith(_BY_ANOTHER_NAME)
    if touch.how in ("attributes", "keys", "namespace"):
        assert set(touch.names) <= used


_BY_ANOTHER_NAME = ("BaseDistributedActor.__init__",)


def test_the_namespace_row_names_flags_of_openrlhf() -> None:
    rows = [t for t in TOUCHES if t.how == "namespace"]
    assert rows and rows[0].names
    for row in rows:
        assert module_file(row.where).is_file()
        assert set(row.names) <= openrlhf_flags()


def test_every_import_of_openrlhf_has_a_row() -> None:
    known = {t.where for t in TOUCHES}
    imported = set()
    for path in sorted(OURS.rglob("*.py")):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "openrlhf":
                imported |= {(path.relative_to(OURS), f"{node.module}:{alias.name}") for alias in node.names}
            if isinstance(node, ast.Import):
                bad = [a.name for a in node.names if a.name.split(".")[0] == "openrlhf"]
                assert not bad, f"{path}: import names from {bad}, so that the table can list them"
    assert len(imported) >= 5
    assert {(str(p), where) for p, where in imported if where not in known} == set()
    # And each is imported by a module that the table knows.
    by = {(our_file(t.by).relative_to(OURS), t.where) for t in TOUCHES}
    assert imported <= by


@pytest.mark.parametrize(("ours", "theirs"), SUBCLASSES.items(), ids=lambda v: v[1] if isinstance(v, tuple) else "")
def test_every_method_that_shadows_one_of_openrlhf_has_a_row(ours: tuple[str, str], theirs: str) -> None:
    by, name = ours
    cls = next(n for n in tree(our_file(by)).body if isinstance(n, ast.ClassDef) and n.name == name)
    mine = {n.name for n in cls.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
    inherited = methods(theirs)
    listed = {t.where for t in TOUCHES if t.how in ("override", "skip")}
    shadowed = {f"{where}.{method}" for method, (where, _) in inherited.items() if method in mine}
    assert shadowed and shadowed - listed == set()
    # The other way round: an "override" row is about a method that we do have.
    claimed = {t.where.rpartition(".")[2] for t in TOUCHES if t.how == "override" and t.by == by}
    assert claimed <= {
        method.name
        for other in tree(our_file(by)).body
        if isinstance(other, ast.ClassDef) and (by, other.name) in SUBCLASSES
        for method in other.body
        if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def test_everything_that_is_replaced_has_a_row() -> None:
    listed = {(t.by, t.where) for t in TOUCHES if t.how == "replace"}
    found = set()
    for path in sorted(OURS.rglob("*.py")):
        by = ".".join(path.relative_to(OURS).with_suffix("").parts)
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "replace" and len(node.args) == 2:
                where = node.args[0]
                if isinstance(where, ast.Constant) and str(where.value).startswith("openrlhf"):
                    found.add((by, where.value))
    assert found == listed and len(found) >= 5


def test_every_subclass_is_listed_and_tested() -> None:
    rows = {(t.by, t.where) for t in TOUCHES if t.how in ("subclass", "unwrap")}
    assert rows == {(by, theirs) for (by, _), theirs in SUBCLASSES.items()}


def test_what_is_skipped_is_not_called() -> None:
    """Ours never calls the parent's version of a skipped method; skipped names of ours stand in its place."""
    for touch in TOUCHES:
        if touch.how != "skip":
            continue
        method = touch.where.rpartition(".")[2]
        for node in ast.walk(tree(our_file(touch.by))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == method:
                assert not ast.unparse(node.func).startswith(("super()", "self.strategy", "strategy.")), touch.where
