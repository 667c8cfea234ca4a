"""REAL in an OpenRLHF run, by one line: their command, their flags, both terms.

    python -m real_openrlhf.patch openrlhf.cli.train_ppo_ray <their flags> --real.scale 1-5

What follows the module goes to it, but for the flags --real.*. With none of these, OpenRLHF runs as it is.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from real_openrlhf.algo.choices import Aggregation, Ratio
from real_openrlhf.algo.score_scale import DEFAULT_ANCHOR
from real_openrlhf.common.arguments import take_negative_values
from real_openrlhf.common.versions import warn_of_versions
from real_openrlhf.config.convert import nearest
from real_openrlhf.config.flags import ConfigError

if TYPE_CHECKING:  # it needs torch
    from real_openrlhf.dropin.terms import Terms

logger = logging.getLogger(__name__)

MODULE = "openrlhf.cli.train_ppo_ray"
AGENT_FLAG = "--train.agent_func_path"
_PREFIX = "--real."


@dataclass(frozen=True, kw_only=True)
class Command:
    """theirs: what OpenRLHF's module gets; terms: the --real.* flags that were given; on_cpu: --real.device cpu."""

    theirs: tuple[str, ...]
    terms: dict[str, Any]
    on_cpu: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: OpenRLHF's own, and 2 for flags that cannot work."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or words[0] in ("-h", "--help"):
        make_parser().print_help()
        return 0 if words else 2
    try:
        command = parse(words)
        if command.terms or command.on_cpu:
            install(command)
        theirs, sys.argv = sys.argv, [MODULE, *command.theirs]
        try:
            runpy.run_module(MODULE, run_name="__main__")
        finally:
            sys.argv = theirs
    except ValueError as error:
        if not type(error).__module__.startswith("real_openrlhf"):
            raise  # theirs
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m real_openrlhf.patch {MODULE}",
        description="REAL's two terms in an OpenRLHF run. All other flags are OpenRLHF's; without --real.* it runs as "
        "it is. `python -m real_openrlhf.patch openrlhf.cli.train_ppo_ray --help` shows its own.",
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
    )
    add = take_negative_values(parser).add_argument
    add("--real.scale", help="the score scale: 1-5 (default), 0,1,2 or 1=Bad,2=Good")
    add("--real.anchor", action="append", help=f"text right before the score, {DEFAULT_ANCHOR!r} when not given")
    add("--real.lam", type=float, help="lambda, weight of the label's likelihood in the reward (1)")
    add("--real.beta", type=float, help="weight of Term 2, the reward's own gradient (1)")
    add("--real.invalid_penalty", type=float, help="subtracted from the reward of a rollout without a score (0)")
    add("--real.renormalise", action="store_true", help="E[score] from the probabilities on the scale alone")
    add(
        "--real.aggregation",
        choices=get_args(Aggregation),
        help="Term 1: a sum over tokens per rollout (token_sum) or a mean over all tokens",
    )
    add(
        "--real.ratio",
        choices=get_args(Ratio),
        help="off-policy ratio: clip (default; bounds by --actor.eps_clip), "
        "on_policy with a single update per batch, or none",
    )
    add("--real.tis_cap", type=float, help="with on_policy: truncated importance weights against the engine")
    add("--real.device", choices=("auto", "cpu"), help="cpu: tiny models without a GPU; every override is printed")
    return parser


def parse(words: Sequence[str]) -> Command:
    """Raises ConfigError for another module and for a --real.* flag that there is not."""
    module, *rest = words
    if module != MODULE:
        raise ConfigError(f"the first word is the module to run, {MODULE}; got {module!r}")
    parser = make_parser()
    given, theirs = parser.parse_known_args(rest)
    known = [action.dest for action in parser._actions]
    for word in theirs:
        flag = word.partition("=")[0]
        if flag.startswith(_PREFIX):
            hint = nearest(flag.removeprefix("--"), known, start="--")
            raise ConfigError(f"there is no flag {flag}{hint or '; there are --' + ', --'.join(known)}")
    terms = {name.removeprefix("real."): value for name, value in vars(given).items()}
    on_cpu = terms.pop("device", "auto") == "cpu"
    if terms and AGENT_FLAG not in [word.partition("=")[0] for word in theirs]:
        from real_openrlhf.dropin.terms import AGENT_FILE

        theirs = [*theirs, AGENT_FLAG, AGENT_FILE]
    return Command(theirs=tuple(theirs), terms=terms, on_cpu=on_cpu)


def install(command: Command) -> None:
    """Put ours in the place of OpenRLHF's classes in this process, the driver; Ray ships them to the actors."""
    import ray

    from real_openrlhf.dropin.replace import replace
    from real_openrlhf.dropin.terms import check_arguments

    warn_of_versions()
    terms = _terms(command.terms) if command.terms else None
    policy: Any = None
    engine: Any = None
    attributes: dict[str, Any] = {}
    if terms is not None:
        from real_openrlhf.dropin.terms_actors import TermsEngine, TermsPolicyActor

        policy, engine, attributes = TermsPolicyActor, TermsEngine, {"settings": terms.settings}
    hierarchize = importlib.import_module("openrlhf.utils.config").hierarchize

    def arguments(flat: argparse.Namespace) -> Any:
        args = hierarchize(flat)
        if terms is not None:
            for note in check_arguments(args, terms):
                logger.warning("%s", note)
        args.real = terms
        return args

    replace("openrlhf.utils.config:hierarchize", arguments)
    if command.on_cpu:
        from real_openrlhf.dropin.on_cpu import install_on_cpu

        policy, engine = install_on_cpu(policy, engine)
    if policy is not None:
        replace("openrlhf.trainer.ray.ppo_actor:PolicyModelActor", ray.remote(num_gpus=1)(policy))
    if engine is not None:
        # Ray wants a class of its own to have an __init__.
        made = type(engine.__name__, (engine,), {"__init__": engine.__init__, **attributes})
        replace("openrlhf.trainer.ray.vllm_engine:RolloutRayActor", ray.remote(made))


def _terms(given: dict[str, Any]) -> Terms:
    from real_openrlhf.dropin.settings import RealSettings
    from real_openrlhf.dropin.terms import Terms

    scores: dict[str, Any] = {
        name: given[name] for name in ("scale", "lam", "invalid_penalty", "renormalise") if name in given
    }
    if "anchor" in given:
        scores["anchors"] = tuple(given["anchor"])
    rest: dict[str, Any] = {name: given[name] for name in ("beta", "aggregation", "ratio", "tis_cap") if name in given}
    terms = Terms(settings=RealSettings(**scores), **rest)
    terms.loss()  # what it refuses is said now
    return terms


if __name__ == "__main__":
    sys.exit(main())
