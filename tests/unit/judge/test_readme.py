"""README's part on judges runs as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.export.settings import JudgeSettings
from real_openrlhf.judge import cli, judge
from tests.helpers.fake_backend import FakeBackend
from tests.helpers.tokenizers import CHAT_TEMPLATE, word_tokenizer

SECTION = (Path(__file__).parents[3] / "real_openrlhf/judge/README.md").read_text(encoding="utf-8")
COMMANDS = [line for line in re.findall(r"```bash\n(.*?)```", SECTION, re.DOTALL) for line in line.splitlines()]


def test_the_snippet_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    settings = JudgeSettings.load(folder)
    JudgeSettings(**{**vars(settings), "scale": ScoreScale.parse("1-5")}).save(folder)
    (folder / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 4096}')
    tokenizer = word_tokenizer(["<e", "os>"], chat_template=CHAT_TEMPLATE)

    def backend(self: judge.Judge) -> FakeBackend:
        def say(prompt, k):
            label = "1" if "5, you fool." in prompt.text else "4"
            return f"text . So the overall score is {label} <eos>", [0.1, 0.1, 0.1, 0.5, 0.1]

        made = FakeBackend(reader=self.reader, tokenizer=tokenizer, script=say)
        made.close = lambda: None  # type: ignore[attr-defined]
        return made

    monkeypatch.setattr(judge.Judge, "_make_backend", backend)
    (code,) = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
    assert "/runs/real-1/model" in code
    exec(compile(code.replace("/runs/real-1/model", str(folder)), "README.md", "exec"), {"__name__": "__main__"})
    first, *others = capsys.readouterr().out.splitlines()
    assert float(first.split()[0]) == pytest.approx(0.1 + 0.2 + 0.3 + 2.0 + 0.5, abs=1e-6) and first.endswith("text .")
    assert "'facts'" in others[0] and others[-2:] == ["tie", "tie False"]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_parse(command: str) -> None:
    words = shlex.split(command.split(" <")[0])
    assert words[:3] == ["python", "-m", "real_openrlhf.judge"]
    # A flag that does not exist would raise SystemExit.
    assert cli.parse_args(words[3:]).model.startswith("/")


def test_all_commands_are_seen() -> None:
    assert len(COMMANDS) == 9
