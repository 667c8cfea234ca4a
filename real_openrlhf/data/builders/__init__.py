"""The data sets that `python -m real_openrlhf.data` can build: one small file each."""

from real_openrlhf.data.builders import (
    feedback_bench,
    feedback_collection,
    flask,
    generic,
    mt_bench,
    mtbench_pool,
    real_parquet,
    stsb,
    vicuna_bench,
)
from real_openrlhf.data.builders.base import Builder
from real_openrlhf.data.sources import DataError, nearest

_MODULES = (
    feedback_collection,
    feedback_bench,
    flask,
    vicuna_bench,
    mt_bench,
    real_parquet,
    stsb,
    mtbench_pool,
    generic,
)
BUILDERS: dict[str, Builder] = {module.BUILDER.name: module.BUILDER for module in _MODULES}


def get_builder(name: str) -> Builder:
    """The builder of this name. DataError, with the nearest name and all names, if there is none."""
    if name not in BUILDERS:
        known = list(BUILDERS)
        raise DataError(f"there is no builder {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    return BUILDERS[name]
