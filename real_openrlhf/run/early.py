"""What can be seen of wrong flags before the rest of the stack is imported, which takes seconds."""

from __future__ import annotations

from real_openrlhf.common.model_name import check_model
from real_openrlhf.config.flags import ConfigError
from real_openrlhf.config.sampling import evaluation_sampling, rollout_sampling
from real_openrlhf.config.schema import Config
from real_openrlhf.config.validate import validate
from real_openrlhf.data.row import DataError, nearest
from real_openrlhf.data.sources import locate
from real_openrlhf.run.assumed_gpus import AssumedGpus


def check_early(config: Config) -> None:
    """ValueError for flags that contradict each other, and for a model or data at a path that leads nowhere.

    `load_inputs` finds the same and more, and has the warnings: the device is known then. Here, what needs nothing
    comes first, then what needs SciPy, then what needs torch.
    """
    validate(config)
    if config.assume_gpus is not None:
        AssumedGpus.parse(config.assume_gpus)
    check_model(config.actor.model_name_or_path, "--actor.model_name_or_path")
    sources = [("--data.prompt_dataset", config.data.prompt_dataset)]
    sources += [("--eval.dataset", source) for source in benchmark_sources(config).values()]
    for flag, source in sources:
        try:
            locate(source)
        except DataError as error:
            raise ConfigError(f"{flag} {error}") from error
    check_samplings(config)


def benchmark_sources(config: Config) -> dict[str, str]:
    """Benchmark -> its source, of --eval.dataset; none without it. Checks that the best checkpoint's metric exists."""
    if config.eval.dataset is None:
        return {}
    from real_openrlhf.evals.benchmarks import parse_benchmarks
    from real_openrlhf.evals.results import metric_names

    sources = parse_benchmarks([config.eval.dataset], "--eval.dataset")
    metric, names = config.ckpt.best_metric, metric_names(list(sources))
    if metric is not None and metric not in names:
        raise ConfigError(
            f"--ckpt.best_metric_key: there is no evaluation metric {metric!r}{nearest(metric, names)}; the benchmarks "
            f"are {', '.join(sources)}, their metrics stand in README"
        )
    return sources


def check_samplings(config: Config) -> None:
    """ConfigError for rollouts or evaluation that draw from another distribution than the engines give log-probs of."""
    from real_openrlhf.actors.engine.spec import EngineSpecError, check_sampling, logprobs_mode_for

    try:
        mode = logprobs_mode_for(config.rollout.temperature, config.rollout.top_p)
        check_sampling(rollout_sampling(config), mode)
    except EngineSpecError as error:
        raise ConfigError(f"--rollout.temperature, --rollout.top_p: {error}") from error
    if config.eval.dataset is None:
        return
    try:
        check_sampling(evaluation_sampling(config), mode)
    except EngineSpecError as error:
        raise ConfigError(
            f"--eval.temperature {config.eval.temperature:g} with --eval.top_p {config.eval.top_p:g} cannot be "
            f"combined with --rollout.temperature {config.rollout.temperature:g}: {error}"
        ) from error
