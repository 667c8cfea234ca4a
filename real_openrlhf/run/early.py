"""What can be seen of wrong flags before torch, transformers and Ray are imported, which takes seconds."""

from __future__ import annotations

from real_openrlhf.common.model_name import check_model
from real_openrlhf.config.schema import Config
from real_openrlhf.config.validate import validate
from real_openrlhf.data.sources import locate
from real_openrlhf.run.assumed_gpus import AssumedGpus


def check_early(config: Config) -> None:
    """ValueError for flags that contradict each other, a model that is not there, and prompts at a path without any.

    `load_inputs` finds the same and more, and has the warnings: the device is known then.
    """
    validate(config)
    if config.assume_gpus is not None:
        AssumedGpus.parse(config.assume_gpus)
    check_model(config.actor.model_name_or_path, "--actor.model_name_or_path")
    locate(config.data.prompt_dataset)
