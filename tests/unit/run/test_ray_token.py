"""The token of an own cluster: who has it, and when."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
from ray._raylet import AuthenticationMode, AuthenticationTokenLoader, get_authentication_mode

from real_openrlhf.run.ray_token import MODE, PATH, TOKEN, own_token


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (MODE, TOKEN, PATH):
        # Set first: what a test sets is taken back.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_ray_asks_for_a_fresh_token_until_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PATH, "/somewhere/else")
    tokens = []
    for _ in range(2):
        with own_token():
            # Ray itself, which read its environment when it was imported.
            assert get_authentication_mode() == AuthenticationMode.TOKEN
            assert AuthenticationTokenLoader.instance().has_token()
            assert os.environ[MODE] == "token" and PATH not in os.environ
            tokens.append(os.environ[TOKEN])
        assert get_authentication_mode() == AuthenticationMode.DISABLED
        assert MODE not in os.environ and TOKEN not in os.environ and os.environ[PATH] == "/somewhere/else"
    assert len(set(tokens)) == 2 and all(len(token) == 64 for token in tokens)


def test_it_ends_with_an_error_too() -> None:
    with pytest.raises(KeyError), own_token():
        raise KeyError
    assert get_authentication_mode() == AuthenticationMode.DISABLED and TOKEN not in os.environ


@pytest.mark.parametrize(("mode", "warns"), [("token", False), ("disabled", True)])
def test_what_the_user_has_set_counts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, mode: str, warns: bool
) -> None:
    monkeypatch.setenv(MODE, mode)
    monkeypatch.setenv(PATH, "/my/token")
    with caplog.at_level(logging.WARNING), own_token():
        assert (os.environ[MODE], os.environ[PATH], TOKEN in os.environ) == (mode, "/my/token", False)
    assert ("can run code" in caplog.text) is warns


def test_children_have_it_on_no_command_line() -> None:
    with own_token():
        code = "import os, sys; print(os.environ['RAY_AUTH_TOKEN'], sys.argv)"
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert said == f"{os.environ[TOKEN]} ['-c']\n"
