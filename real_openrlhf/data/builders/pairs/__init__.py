"""The data sets of pairs of responses: one small file each."""

from real_openrlhf.data.builders.pairs import judgebench, llmbar, mt_bench_human, pandalm, reward_bench
from real_openrlhf.data.builders.pairs.base import PairBuilder

_MODULES = (judgebench, llmbar, pandalm, mt_bench_human, reward_bench)
PAIR_BUILDERS: dict[str, PairBuilder] = {module.BUILDER.name: module.BUILDER for module in _MODULES}
