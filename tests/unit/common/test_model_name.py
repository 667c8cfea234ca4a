"""A model that is not there is said so at once, by every command; no library asks the hub again and again."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from real_openrlhf import evaluate, train_real, train_warmup
from real_openrlhf.common import model_name
from real_openrlhf.common.errors import one_line
from real_openrlhf.common.model_name import ModelNameError, check_model
from real_openrlhf.data.tokenizer import load_tokenizer
from real_openrlhf.judge import cli as judge

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> str:
    """The hub's address is one of this machine where nobody listens. Returns it."""
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    # Set, so that it is put back: the check itself may set it.
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", url)
    return url


def folder(path: Path, *files: str) -> str:
    path.mkdir(parents=True)
    for file in files:
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / file).write_text("{}")
    return str(path)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ((), "the folder is empty"),
        (("notes.txt",), "has no config.json, so it is not a model of Hugging Face"),
        (("adapter_config.json",), "but LoRA adapters; merge them"),
        (("metrics.jsonl", "model/config.json"), "but '{}/model' has; give that one"),
    ],
)
def test_a_folder_that_holds_no_model(tmp_path: Path, files: tuple[str, ...], says: str) -> None:
    path = folder(tmp_path / "m", *files)
    with pytest.raises(ModelNameError) as error:
        check_model(path, "--model")
    assert str(error.value).startswith(f"--model {path!r}: ") and says.format(path) in str(error.value)
    check_model(path, "--model", needs_config=False)
    (Path(path) / "config.json").touch()
    check_model(path, "--model")


def test_paths_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "runs/judge-1")
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    for text in ("./no/such/model", "/no/such/model", "a/b/c", "runs/", "two words", "../x", "-x"):
        if not Path(text).is_dir():
            with pytest.raises(ModelNameError, match=r"^--model .*: there is no such folder"):
                check_model(text, "--model")
    with pytest.raises(ModelNameError, match=r"there is no such folder \(did you mean 'runs/judge-1'\?\)"):
        check_model("./runs/judge1", "--model")
    with pytest.raises(ModelNameError, match=r"'./file' is a file; give the folder"):
        check_model("./file", "--model")


@pytest.mark.parametrize("name", ["owner/name", "name", "runs/judge1"])
def test_a_hub_id_without_hub_and_cache_is_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "runs/judge-1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNameError) as error:
        check_model(name, "--model")
    text = str(error.value)
    assert text.startswith(f"--model {name!r}: there is no such folder") and "\n" not in text
    assert "not in the cache, and the hub cannot be asked (127.0.0.1: Connection refused)" in text
    assert ("did you mean 'runs/judge-1'?" in text) == (name == "runs/judge1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNameError, match=r"cannot be asked \(HF_HUB_OFFLINE is set\)"):
        check_model(name, "--model")


def test_a_hub_that_answers_is_left_to_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        check_model("owner/name", "--model")
    assert os.environ["HF_HUB_OFFLINE"] == "0"
    # Behind a proxy the address need not answer here.
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    check_model("owner/name", "--model")
    assert os.environ["HF_HUB_OFFLINE"] == "0"


def test_a_model_in_the_cache_loads_without_hub(tmp_path: Path) -> None:
    """In a process of its own: the libraries look at the variable once."""
    cached = tmp_path / "hub/models--owner--name"
    commit = "0" * 40
    snapshot = Path(folder(cached / "snapshots" / commit))
    folder(cached / "refs")
    (cached / "refs/main").write_text(commit)
    (snapshot / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 77}))
    code = (
        "import os, socket, sys\n"
        "from real_openrlhf.common.model_name import check_model\n"
        "check_model('owner/name', '--model')\n"
        "assert 'transformers' not in sys.modules\n"
        "from transformers import AutoConfig\n"
        # Were the hub asked, this would be an error, and not the retries of a minute.
        "def refuse(*a, **k): raise AssertionError('asked the hub')\n"
        "socket.socket.connect = refuse\n"
        "print(AutoConfig.from_pretrained('owner/name').vocab_size)\n"
    )
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub")}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["77"] and "--model owner/name comes from the cache" in result.stderr


def test_every_command_names_its_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = folder(tmp_path / "empty")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "label": 1}\n')
    out = str(tmp_path / "out")
    for model, says in ((empty, "the folder is empty"), ("owner/name", "the hub cannot be asked")):
        run = ["--actor.model_name_or_path", model, "--data.prompt_dataset", str(rows), "--ckpt.output_dir", out]
        calls = {
            "--actor.model_name_or_path": (train_real.main, run),
            "--actor.model_name_or_path ": (train_warmup.main, run),
            "--model": (evaluate.main, ["--model", model, "--benchmark", f"t={rows}", "--output_dir", out]),
            "--model ": (judge.main, ["--model", model, "--input", str(rows)]),
            "--model  ": (judge.main, ["serve", "--model", model]),
        }
        for flag, (main, words) in calls.items():
            assert main(words) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and f"error: {flag.strip()} {model!r}: " in error and says in error
    assert not Path(out).exists()


def test_errors_of_libraries_are_one_line(tmp_path: Path) -> None:
    assert one_line(ValueError("a\n  b\n\nc")) == "a b c" and one_line(KeyError()) == "KeyError"
    with pytest.raises(ValueError, match=r"--model .*: the tokenizer does not load: .") as error:
        load_tokenizer(folder(tmp_path / "m", "config.json"), name="--model")
    assert "\n" not in str(error.value)
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    (tmp_path / "m" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ValueError, match=r"--model .*: the tokenizer does not load: ."):
        load_tokenizer(str(tmp_path / "m"), name="--model")


def test_what_is_waited_for_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def connect(address: tuple[str, int], timeout: float) -> None:
        seen.append((address, timeout))
        raise TimeoutError("timed out")

    monkeypatch.setattr(model_name.socket, "create_connection", connect)
    monkeypatch.delenv("HF_ENDPOINT")
    with pytest.raises(ModelNameError, match=r"huggingface.co: timed out"):
        check_model("owner/name", "--model")
    assert seen == [(("huggingface.co", 443), model_name.PATIENCE)]
