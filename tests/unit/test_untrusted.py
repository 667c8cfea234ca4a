"""Code that comes with data or models is not run, secrets stay out of command lines, and data name no paths."""

from __future__ import annotations

import ast
import json
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from real_openrlhf.actors.engine.limits import ModelLimits
from real_openrlhf.actors.engine.spec import EngineSpecError
from real_openrlhf.data.__main__ import main as build
from real_openrlhf.data.tokenizer import load_tokenizer
from real_openrlhf.judge import cli, serve
from real_openrlhf.judge.http_backend import ServerBackend
from real_openrlhf.judge.types import JudgeError

ROOT = Path(__file__).parents[2]
SECRET = "s3cret-0123456789"
# After `check_pickles` has seen the files.
LOADS_PICKLES = {"real_openrlhf/actors/policy/shards.py": 2}


def calls() -> Iterator[tuple[str, ast.Call, str]]:
    """(file, call, the called name) of every call in the package and the examples."""
    for top in ("real_openrlhf", "examples"):
        for path in sorted((ROOT / top).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    yield path.relative_to(ROOT).as_posix(), node, ast.unparse(node.func)


def test_code_of_models_is_never_run_unless_a_caller_says_so() -> None:
    found = 0
    for file, call, name in calls():
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        value = given.get("trust_remote_code")
        assert not (isinstance(value, ast.Constant) and value.value is not False), (file, call.lineno)
        if name.startswith("Auto") and name.endswith((".from_pretrained", ".from_config")):
            found += 1
            # Left out, transformers asks on the terminal.
            assert value is not None, (file, call.lineno)
    assert found > 10


def test_pickles_are_loaded_where_they_were_looked_through_and_nowhere_else() -> None:
    loads: dict[str, int] = {}
    for file, call, name in calls():
        assert name not in ("pickle.load", "pickle.loads", "yaml.load", "np.load", "os.system", "eval"), file
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert given.get("shell", "False") == "False", (file, call.lineno)
        if name == "torch.load" and given.get("weights_only") != "True":
            loads[file] = loads.get(file, 0) + 1
    assert loads == LOADS_PICKLES


class Marks:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def model_with_code(folder: Path, marker: Path) -> Path:
    folder.mkdir()
    code = f"import os\nos.mkdir({str(marker)!r})\nclass C: pass\n"
    for name in ("configuration_c", "modeling_c", "tokenization_c"):
        (folder / f"{name}.py").write_text(code)
    auto = {"AutoConfig": "configuration_c.C", "AutoModelForCausalLM": "modeling_c.C"}
    (folder / "config.json").write_text(json.dumps({"model_type": "never_heard_of", "auto_map": auto}))
    tokenizer = {"tokenizer_class": "C", "auto_map": {"AutoTokenizer": ["tokenization_c.C", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


def test_a_model_that_brings_code_is_refused_and_its_code_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: object) -> str:
        raise AssertionError("a question on the terminal")

    monkeypatch.setattr("builtins.input", ask)
    marker = tmp_path / "ran"
    model = model_with_code(tmp_path / "model", marker)
    with pytest.raises(ValueError, match="tokenizer does not load"):
        load_tokenizer(str(model))
    with pytest.raises(EngineSpecError, match="does not load"):
        ModelLimits.of(str(model))
    assert not marker.exists()


def test_weights_in_a_pickle_are_not_run(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    size = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    LlamaConfig(**size, num_attention_heads=1).save_pretrained(tmp_path)
    marker = tmp_path / "ran"
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": Marks(marker)}, protocol=2))
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
    assert not marker.exists()
    pickle.loads((tmp_path / "pytorch_model.bin").read_bytes())
    assert marker.exists(), "the file is harmless, and the test above showed nothing"


def test_engines_take_no_pickles() -> None:
    """vLLM's processes would load what they are sent; OpenRLHF's sync, which the benchmark compares with, needs it."""
    name = "VLLM_ALLOW_INSECURE_SERIALIZATION"
    files = [path for top in ("real_openrlhf", "examples", "slurm") for path in (ROOT / top).rglob("*")]
    using = [path for path in files if path.suffix in (".py", ".sh", ".yaml") and name in path.read_text("utf-8")]
    assert [path.relative_to(ROOT).as_posix() for path in using] == ["examples/benchmark/sync_timing.py"]


# -- secrets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", [f"--api-key={SECRET}", "--api-key", "--api_key", f"--hf-token={SECRET}"])
def test_no_key_among_the_servers_flags(tmp_path: Path, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--model", str(tmp_path), "--", word, *([] if "=" in word else [SECRET])]) == 2
    told = capsys.readouterr().err
    assert "others see what a command line holds" in told and SECRET not in told


def test_a_servers_key_goes_by_the_environment_and_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(serve.os, "execvpe", lambda file, words, env: started.append((words, env)))
    serve.serve([sys.executable, "-m", "vllm"], {"A": "b"}, api_key=SECRET)
    ((words, env),) = started
    assert env["VLLM_API_KEY"] == SECRET and env["A"] == "b"
    assert SECRET not in " ".join(words) and SECRET not in capsys.readouterr().err


@pytest.mark.parametrize("address", [f"http://me:{SECRET}@host:8000", f"https://{SECRET}@host", f"me:{SECRET}@host"])
def test_an_address_with_a_password_is_refused_without_it(address: str) -> None:
    with pytest.raises(JudgeError) as caught:
        ServerBackend(address, reader=None)  # type: ignore[arg-type]
    assert SECRET not in str(caught.value)


# -- paths ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["../../evil", "/tmp/evil", "train/../../evil", "..", "tra\0in"])
def test_a_row_cannot_choose_where_it_is_written(
    tmp_path: Path, split: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in" / "d.jsonl"
    source.parent.mkdir()
    row = {"question": "q", "answer": "a", "score": 1, "split": split, "id": "../../evil"}
    source.write_text(json.dumps(row))
    columns = ["--map", "instruction=question", "response=answer", "label=score", "split=split", "id=id"]
    words = ["generic", "--source", str(source), "--output_dir", str(tmp_path / "out"), *columns]
    assert build([*words, "--scale", "1-5", "--template", "answer"]) == 2
    assert "line 1, column 'split': there is no split" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*.parquet")] == []


def test_a_manifest_cannot_choose_what_is_removed(tmp_path: Path) -> None:
    keep, out, source = tmp_path / "keep.parquet", tmp_path / "out", tmp_path / "d.csv"
    source.write_text("q,a,s\nq,a,1\n")
    words = ["generic", "--source", str(source), "--map", "instruction=q", "response=a", "label=s", "--scale", "1-5"]
    words += ["--template", "answer", "--output_dir", str(out)]
    assert build(words) == 0
    keep.write_text("mine")
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["files"] |= {"../keep.parquet": {}, str(keep): {}}
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert build([*words, "--overwrite"]) == 0
    assert keep.read_text() == "mine"
