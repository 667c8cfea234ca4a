"""An actor that says where it runs. In its own module: Ray's workers import it, and nothing heavy with it."""

from __future__ import annotations

import ray


class Probe:
    """In the place of a policy rank, an engine or one of its workers."""

    def where(self) -> tuple[str, tuple[int, ...]]:
        """Node, and the GPUs that Ray gave."""
        return ray.get_runtime_context().get_node_id(), tuple(int(i) for i in ray.get_gpu_ids())
