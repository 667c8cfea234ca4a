"""The flags of a batch script, as far as the command that it starts leaves them open.

    python -m real_openrlhf.config.script_flags train_real GPUS FLAG ... -- ARGUMENT ...

Prints those of the script's flags that count, a word per line. ARGUMENT: what the user gives to the command, with
--config files. GPUS: how many the job has; 0 for a run on CPUs. Exit code 2: the arguments are wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from real_openrlhf.config.cli import given_values, parse_args
from real_openrlhf.config.convert import flags_by_name
from real_openrlhf.config.flags import ConfigError
from real_openrlhf.config.schema import Config

# Who is on how many GPUs. A file that gives one of them was written for a layout, so it gives all: what it leaves out
# has its default, as without the script.
LAYOUT = (
    "actor.num_nodes",
    "actor.num_gpus_per_node",
    "vllm.num_engines",
    "vllm.tensor_parallel_size",
    "train.colocate_all",
)
# They mean something on shared GPUs only.
_SHARING = ("vllm.enable_sleep", "ds.enable_sleep")


def flags_that_count(own: Sequence[str], user: Sequence[str], *, warmup: bool = False) -> list[str]:
    """The words of `own` without the flags that `user` gives, on the command line or in --config files.

    Raises ConfigError for arguments that `parse_args` refuses.
    """
    explicit, from_files = given_values(user, warmup=warmup)
    settled = {*explicit, *from_files}
    if any(name in from_files for name in LAYOUT):
        settled.update((*LAYOUT, *_SHARING))
    elif explicit.get("train.colocate_all") is False:
        settled.update(_SHARING)
    return [word for flag in _flags(own) if _name(flag[0]) not in settled for word in flag]


def _flags(words: Sequence[str]) -> list[list[str]]:
    """Each flag with its values."""
    found: list[list[str]] = []
    for word in words:
        if word.startswith("--"):
            found.append([])
        found[-1].append(word)
    return found


def _name(word: str) -> str:
    name = word.removeprefix("--")
    return name if name in flags_by_name() else name.removeprefix("no-")


def gpus_of(config: Config) -> int:
    """GPUs that the actors of a run take."""
    width = config.vllm.tensor_parallel_size
    engines = 0 if config.train.colocate_all or not config.uses_engines else config.vllm.num_engines * width
    evaluator = width if config.eval.dataset and config.eval.engine == "own" else 0
    return config.ranks + config.reference_ranks + engines + evaluator


def main(argv: Sequence[str]) -> int:
    command, gpus, *rest = argv
    own, user, warmup = rest[: rest.index("--")], rest[rest.index("--") + 1 :], command == "train_warmup"
    if {"-h", "--help"}.isdisjoint(user):  # the command itself prints its help
        try:
            own = flags_that_count(own, user, warmup=warmup)
            used = gpus_of(parse_args([*own, *user], warmup=warmup))
        except ConfigError as error:
            sys.stderr.write(f"error: {error}\n")
            return 2
        if used < int(gpus):
            sys.stderr.write(f"warning: the flags take {used} of the job's {gpus} GPUs\n")
    sys.stdout.writelines(f"{word}\n" for word in own)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
