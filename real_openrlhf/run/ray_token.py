"""A token for the cluster that a run starts: who connects without it is refused.

Ray has no authentication unless it is asked for, and who can connect to its ports can run code as the run's user.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

MODE, TOKEN, PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


@contextmanager
def own_token() -> Iterator[None]:
    """Ray's processes that are started meanwhile, and their children, ask for a token that only they know.

    It is in their environment, which other users cannot read: on no command line, in no file. Somebody who has set
    RAY_AUTH_MODE is taken by their word: "token" takes the token that Ray finds, "disabled" none.
    """
    chosen = os.environ.get(MODE)
    if chosen is not None:
        if chosen != "token":
            logger.warning(
                "%s=%s: whoever can connect to this machine can run code through this run's Ray cluster as you; "
                "unset it, and the run makes a token",
                MODE,
                chosen,
            )
        yield
        return
    before = {name: os.environ.pop(name, None) for name in (MODE, TOKEN, PATH)}
    os.environ.update({MODE: "token", TOKEN: secrets.token_hex(32)})
    _read_again()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        _read_again()


def _read_again() -> None:
    """Ray reads both variables when it is imported and keeps what it read."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    AuthenticationTokenLoader.instance().reset_cache()
    Config.initialize("")
