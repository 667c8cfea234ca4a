"""Actor classes whose module is imported in the actor, not in the driver.

Ray needs a class to know an actor's methods, but importing the engine's class imports vLLM too: some 10 s in the driver
before anything starts. A lazy class has only the methods' names.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from real_openrlhf.common.home import use_writable_caches
from real_openrlhf.run.library_log import mark_own_lines


def lazy_actor(where: str, *, methods: Sequence[str], coroutines: Sequence[str] = ()) -> type:
    """A class whose instance imports `where` ("module:Class"), makes an instance of it, and forwards calls to that.

    methods, coroutines: names of the plain and of the async methods there. Ray runs actors with async methods on an
    event loop, so these must be async here too.
    """
    module, _, name = where.partition(":")

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        mark_own_lines()
        # Before DeepSpeed and vLLM are imported. This node's home folder may be another than the driver's.
        use_writable_caches(tell=False)
        self.actor = getattr(importlib.import_module(module), name)(*args, **kwargs)

    members: dict[str, Any] = {"__init__": init, "__module__": __name__, "__doc__": f"{where}, imported when made."}
    members |= {method: _method(method) for method in methods}
    members |= {method: _coroutine(method) for method in coroutines}
    for member in (*methods, *coroutines):
        members[member].__name__ = member
    return type(name, (), members)


def _method(name: str) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.actor, name)(*args, **kwargs)

    return call


def _coroutine(name: str) -> Any:
    async def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return await getattr(self.actor, name)(*args, **kwargs)

    return call
