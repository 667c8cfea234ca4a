from __future__ import annotations

from pathlib import Path

import pytest

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.data.template import PromptTemplate
from real_openrlhf.export.settings import JudgeSettings
from tests.helpers.tokenizers import CHAT_TEMPLATE, word_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An export without weights: a tokenizer with a chat template, and the settings of a judge on 1 to 3."""
    tokenizer = word_tokenizer(["<e", "os>"], chat_template=CHAT_TEMPLATE)
    path = tmp_path / "model"
    path.mkdir()
    tokenizer.save_pretrained(path)
    JudgeSettings(
        scale=ScoreScale.parse("1-3"),
        anchors=("So the overall score is ",),
        end_ids=(tokenizer.eos_token_id,),
        template=PromptTemplate(apply_chat_template=True),
        max_new_tokens=20,
    ).save(path)
    return path
