"""Secrets stay out of what a run records: values under names such as "key", and those of the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

REDACTED = "<redacted>"

_SECRET_NAMES = {"key", "apikey", "api_key", "password", "secret", "token", "hf_token", "access_token", "auth_token"}
# Environment variables whose values are never recorded, such as WANDB_API_KEY, HF_TOKEN, AWS_SECRET_ACCESS_KEY.
_SECRET_VARIABLE = re.compile(r"(^|_)(API_?KEY|ACCESS_KEY|TOKEN|SECRET|PASSWORD|PASSWD)(_|$)", re.IGNORECASE)
# A shorter value is no key, and would be found in any text.
_SHORTEST_SECRET = 8


def redact(config: Any, secrets: Iterable[str] = ()) -> Any:
    """A copy without secrets: values under names such as "key" or "hf_token", and the given strings anywhere.

    Of dotted names, the last part counts ("logger.wandb.key"). Empty values stay, so that a reader
    sees that none was given. Names such as "label_key" or "max_new_tokens" are not secret.
    """
    secrets = [s for s in secrets if s]

    def clean(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): clean(str(k), v) for k, v in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            items = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
            return [clean("", v) for v in items]
        if value and isinstance(value, str):
            if name.rsplit(".", 1)[-1].lower() in _SECRET_NAMES:
                return REDACTED
            for secret in secrets:
                value = value.replace(secret, REDACTED)
        return value

    return clean("", config)


def secrets_of_environment() -> list[str]:
    return [
        value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name) and len(value) >= _SHORTEST_SECRET
    ]
