"""Every attribute of `args` that OpenRLHF's classes read exists in the adapter's namespace."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from real_openrlhf.config.cli import parse_args
from real_openrlhf.config.openrlhf_args import to_openrlhf_args
from tests.unit.config.test_cli import openrlhf_flags

FILES = (
    "utils/deepspeed/deepspeed.py",
    "utils/utils.py",
    "models/actor.py",
    "trainer/ray/ppo_actor.py",
    "trainer/ray/launcher.py",
    "trainer/ppo_utils/replay_buffer.py",
)
ROOTS = ("args", "self.args", "strategy.args", "self.strategy.args")
# Chains that are not flags: path -> why.
EXCEPTIONS: dict[str, str] = {}


def args_for(*argv: str) -> SimpleNamespace:
    return to_openrlhf_args(parse_args(list(argv)), device_dtype="fp32", attn="sdpa", sync_backend="gloo")


def has(args: SimpleNamespace, path: str) -> bool:
    for part in path.split("."):
        if not hasattr(args, part):
            return False
        args = getattr(args, part)
    return True


def dotted(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = dotted(node.value)
        return None if head is None else f"{head}.{node.attr}"
    return None


def chains(source: str) -> set[str]:
    """Paths below `args` that the source reads, as attributes or by getattr(args.x, "y", default)."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        path = dotted(node) if isinstance(node, ast.Attribute) else None
        if isinstance(node, ast.Call) and dotted(node.func) == "getattr" and isinstance(node.args[1], ast.Constant):
            head = dotted(node.args[0])
            path = None if head is None else f"{head}.{node.args[1].value}"
        for root in ROOTS:
            if path is not None and path.startswith(root + "."):
                found.add(path.removeprefix(root + "."))
    return found


def test_chains_are_found() -> None:
    source = "x = self.args.a.b + strategy.args.c; y = getattr(args.d, 'e', 1); f(self.strategy.args.g.h)"
    assert chains(source) == {"a", "a.b", "c", "d", "d.e", "g", "g.h"}


@pytest.mark.parametrize("file", FILES)
def test_every_attribute_that_openrlhf_reads_is_there(file: str) -> None:
    spec = importlib.util.find_spec("openrlhf")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("openrlhf is not installed")
    read = chains((Path(next(iter(spec.submodule_search_locations))) / file).read_text())
    args = args_for()
    assert {path for path in read if not has(args, path) and path not in EXCEPTIONS} == set()
    if file.endswith("ppo_actor.py"):
        assert len(read) > 40


def test_every_flag_of_its_command_line_is_there() -> None:
    args = args_for()
    assert {name for name in openrlhf_flags() if not has(args, name)} == set()


def test_what_auto_and_none_stand_for() -> None:
    args = args_for(
        "--rollout.batch_size=8", "--rollout.n_samples_per_prompt=4", "--real.mini_batches=2", "--ckpt.output_dir=o"
    )
    assert args.train.batch_size == 16
    assert (args.ds.param_dtype, args.ds.attn_implementation, args.vllm.sync_backend) == ("fp32", "sdpa", "gloo")
    assert args.actor.eps_clip_low_high == (0.2, 0.2)
    assert args.ds.lora.target_modules == "all-linear"
    assert args.algo.advantage.is_correction_threshold == [0.0, 2.0]
    assert args.algo.dynamic_filtering_enable is True
    assert args.critic.model_name_or_path is None
    assert args.local_rank == -1
    assert args.max_norm == args.actor.max_norm == 1.0
    assert args.ckpt.path == "o/checkpoints"


def test_optimizer_sections_hold_what_openrlhf_unpacks() -> None:
    args = args_for("--actor.adam.lr", "3e-5")
    assert vars(args.actor.adam) == {"lr": 3e-5, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    assert set(vars(args.actor.muon)) == {"lr", "momentum", "ns_steps", "nesterov"}


def test_none_of_our_sections_are_handed_on() -> None:
    args = args_for()
    assert not any(hasattr(args, name) for name in ("real", "sync", "ray"))


def test_lora_targets_and_independent_copies() -> None:
    args = args_for("--ds.lora.target_modules", "q_proj", "v_proj")
    assert args.ds.lora.target_modules == ["q_proj", "v_proj"]
    args.critic.adam.lr = 7.0
    assert args_for().critic.adam.lr == 9e-6
