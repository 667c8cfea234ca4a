"""The data sets that `python -m real_openrlhf.data` knows: one small file each; those of pairs are in `pairs`."""

from real_openrlhf.data.builders import (
    dialsummeval,
    feedback_bench,
    feedback_collection,
    flask,
    generic,
    mt_bench,
    mtbench_pool,
    real_parquet,
    sick,
    stsb,
    summeval,
    topical_chat,
    vicuna_bench,
    wmt_mqm,
)
from real_openrlhf.data.builders.base import Builder
from real_openrlhf.data.builders.pairs import PAIR_BUILDERS
from real_openrlhf.data.row import DataError, nearest

_MODULES = (
    feedback_collection,
    feedback_bench,
    flask,
    vicuna_bench,
    mt_bench,
    real_parquet,
    stsb,
    mtbench_pool,
    summeval,
    dialsummeval,
    topical_chat,
    sick,
    wmt_mqm,
    generic,
)
BUILDERS: dict[str, Builder] = {module.BUILDER.name: module.BUILDER for module in _MODULES}


def get_builder(name: str) -> Builder:
    """Raises DataError with the nearest name and all names, those of pairs included."""
    if name not in BUILDERS:
        known = [*BUILDERS, *PAIR_BUILDERS]
        raise DataError(f"there is no builder {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    return BUILDERS[name]
