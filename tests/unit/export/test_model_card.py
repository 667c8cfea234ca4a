"""The exported folder: settings that survive, a card whose code runs, and faults that are found."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.data.judge_prompt import JudgeTemplate
from real_openrlhf.data.template import PromptTemplate
from real_openrlhf.export.check import check_export
from real_openrlhf.export.model_card import CardInfo, write_model_card
from real_openrlhf.export.settings import ExportError, JudgeSettings

PROMPT = "Judge: ..."  # what the card's snippet asks, through the template below
RESPONSE = "good text. So the overall score is 3"
ANCHOR = "So the overall score is "
TEMPLATE = PromptTemplate(input_template="Judge: {}")


def make_tokenizer():
    """Byte-level BPE: " 3" is a single token, and every text survives a round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PROMPT, *(RESPONSE[:-1] + digit for digit in "12345")] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory):
    """A model of two layers that has learned to write RESPONSE after PROMPT, in several shards."""
    folder = tmp_path_factory.mktemp("judge")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
        )
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model only waits for more of them
    ids = torch.tensor([tokenizer.encode(PROMPT) + tokenizer.encode(RESPONSE) + [0]])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    torch.set_num_threads(threads)
    model.save_pretrained(folder, max_shard_size="60KB")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(judge_folder, tmp_path):
    return shutil.copytree(judge_folder, tmp_path / "judge")


def settings(**kwargs):
    return JudgeSettings(
        **{
            "scale": ScoreScale.parse("1-5"),
            "anchors": (ANCHOR,),
            "end_ids": (0,),
            "template": TEMPLATE,
            "temperature": 0.7,
            "max_new_tokens": 40,
            "preset": "reference",
            **kwargs,
        }
    )


def card(**kwargs):
    return CardInfo(
        **{
            "title": "A judge",
            "base_model": "org/base-model",
            "settings": settings(),
            "data_source": "train.parquet",
            "data_rows": 1234,
            "data_hash": "ab" * 32,
            "objective": "real",
            "objective_settings": {"lambda": 1.0, "beta": 0.01, "aggregation": "token_sum"},
            "steps": 15,
            **kwargs,
        }
    )


def test_settings_survive(tmp_path):
    for judge in (
        settings(),
        settings(
            scale=ScoreScale((-1.5, 0.0, 2.0), ("Bad", "Fair", "Gut, ä")),
            anchors=("Score: ", "Final: "),
            end_ids=(0, 7),
            template=PromptTemplate(apply_chat_template=True, enable_thinking=False),
            renormalise=True,
        ),
    ):
        path = judge.save(tmp_path)
        assert path.name == "real_openrlhf.json"
        assert JudgeSettings.load(tmp_path) == judge
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"anchors": ()}, "anchors must be"),
        ({"anchors": ("  ",)}, "anchors must be"),
        ({"end_ids": ()}, "end_ids must be"),
        ({"end_ids": (True,)}, "end_ids must be"),
        ({"temperature": 0.0}, "temperature must be a positive number"),
        ({"temperature": float("inf")}, "temperature must be a positive number"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"renormalise": 1}, "renormalise must be a bool"),
    ],
)
def test_settings_that_cannot_be(kwargs, message):
    with pytest.raises(ExportError, match=message):
        settings(**kwargs)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.pop("anchors"), "missing: anchors"),
        (lambda c: c["scale"].pop("values"), "missing: scale.values"),
        (lambda c: c.update(extra=1), "unknown: extra"),
        (lambda c: c.update(anchors="So"), "anchors must be a list, got 'So'"),
        (lambda c: c.update(scale=[1, 2]), "scale must be an object"),
        (lambda c: c["scale"].update(values=[1, 2, 3, 4, "5"]), "scale.values must be a float, got '5'"),
        (lambda c: c["scale"].update(values=[5, 4, 3, 2, 1]), "must ascend"),
        (lambda c: c["scale"].update(labels=[1, 2, 3, 4, 5]), "scale.labels must be a str, got 1"),
        (lambda c: c["template"].update(input_template="no slot"), "exactly one"),
        (lambda c: c["template"].update(apply_chat_template="yes"), "apply_chat_template must be a bool"),
        (lambda c: c.update(version=99), "version 99; this package reads"),
    ],
)
def test_settings_file_with_a_fault(tmp_path, change, message):
    path = settings().save(tmp_path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ExportError, match=message) as caught:
        JudgeSettings.load(tmp_path)
    assert "real_openrlhf.json" in str(caught.value)


def test_settings_file_that_is_none(tmp_path):
    with pytest.raises(ExportError, match=r"real_openrlhf.json is missing"):
        JudgeSettings.load(tmp_path)
    for text, message in (('{"format": ', "cannot be read as JSON"), ("[]", "must hold a JSON object")):
        (tmp_path / "real_openrlhf.json").write_text(text)
        with pytest.raises(ExportError, match=message):
            JudgeSettings.load(tmp_path)


def test_card(tmp_path):
    evaluation = {"before": {"expected/pearson": 0.41234, "n": 1000.0}, "after | 15": {"expected/pearson": None}}
    info = card(evaluation=evaluation, evaluation_data="test.parquet, 1000 rows", training={"learning rate": 1e-6})
    text = write_model_card(tmp_path, info=info).read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "transformers"
    assert front["base_model"] == "org/base-model"
    assert "llm-as-a-judge" in front["tags"]
    for part in (
        "| preset | reference |",
        "| lambda | 1 |",
        "| beta | 0.01 |",
        "| learning rate | 1e-06 |",
        "15 steps. Data: `train.parquet`, 1234 rows, sha256 `" + "ab" * 32,
        "| 5 | 5 |",
        f'`"{ANCHOR}"`',
        "temperature 0.7",
        "```\nJudge: {}\n```",
        "Measured on test.parquet, 1000 rows.",
        "| metric | before | after \\| 15 |",
        "| expected/pearson | 0.4123 | undefined |",
        "| n | 1000 |  |",
        f"torch {torch.__version__}",
    ):
        assert part in text, part
    assert JudgeSettings.load(tmp_path) == info.settings


def test_card_without_evaluation_or_hub_model(tmp_path):
    base = tmp_path / "models" / "warm"
    base.mkdir(parents=True)
    template = PromptTemplate(input_template="```\n{}\n```")
    info = card(base_model=str(base), data_source=str(tmp_path / "d.jsonl"), settings=settings(template=template))
    text = write_model_card(tmp_path, info=info).read_text()
    assert "Not evaluated." in text
    assert "base_model" not in yaml.safe_load(text.split("---")[1])
    # Only the last part of a path on this machine is published.
    assert "`warm`" in text and "`d.jsonl`" in text and str(tmp_path) not in text
    assert "````\n```\n{}\n```\n````" in text
    with pytest.raises(ExportError, match="save the model first"):
        write_model_card(tmp_path / "none", info=info)


def test_the_cards_code_runs(folder, monkeypatch, capsys):
    text = write_model_card(folder, info=card()).read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(code, names)

    # Independently: teacher-force the response that the model was taught, and look before its "3".
    tokenizer, model = make_tokenizer(), AutoModelForCausalLM.from_pretrained(folder)
    before = tokenizer.encode(PROMPT) + tokenizer.encode(RESPONSE)[:-1]
    with torch.no_grad():
        probs = (model(torch.tensor([before])).logits[0, -1] / 0.7).softmax(-1)
    expected = sum(value * float(probs[tokenizer.convert_tokens_to_ids(f"Ġ{value}")]) for value in range(1, 6))
    assert names["score"] == pytest.approx(expected, abs=1e-4)
    assert names["score"] == pytest.approx(3, abs=0.5)
    assert RESPONSE in capsys.readouterr().out


def test_the_cards_code_with_labels_of_several_tokens(folder, monkeypatch):
    """This tokenizer knows " 1" .. " 5", but writes " 6" .. " 9" as " ", "6" and " 10" as " 1", "0"."""
    text = write_model_card(folder, info=card(settings=settings(scale=ScoreScale.parse("1-10")))).read_text()
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1), names)

    tokenizer, model = make_tokenizer(), AutoModelForCausalLM.from_pretrained(folder)
    before = tokenizer.encode(PROMPT) + tokenizer.encode(RESPONSE)[:-1]
    ids = {piece: tokenizer.convert_tokens_to_ids(piece) for piece in ["Ġ", *"06789", *(f"Ġ{v}" for v in range(1, 6))]}

    @torch.no_grad()
    def p(token, *after):
        logits = model(torch.tensor([[*before, *(ids[t] for t in after)]])).logits[0, -1]
        return float((logits / 0.7).softmax(-1)[ids[token]])

    one, ten = p("Ġ1") * (1 - p("0", "Ġ1")), p("Ġ1") * p("0", "Ġ1")
    expected = one + 10 * ten + sum(v * p(f"Ġ{v}") for v in range(2, 6))
    expected += sum(v * p("Ġ") * p(str(v), "Ġ") for v in range(6, 10))
    assert names["score"] == pytest.approx(expected, abs=1e-4)


def test_check_export_of_a_whole_folder(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    report = check_export(folder)
    assert report.n_shards == len(list(folder.glob("*.safetensors"))) > 1
    # The tied head may or may not be stored in addition to the embeddings.
    stored = report.n_parameters - model.num_parameters()
    assert stored in (0, model.lm_head.weight.numel())
    assert sum(report.dtypes.values()) == report.n_tensors
    assert set(report.dtypes) == {"F32"}


def test_check_export_of_one_file_in_half_precision(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    make_tokenizer().save_pretrained(tmp_path / "half")
    model.save_pretrained(tmp_path / "half")
    report = check_export(tmp_path / "half")
    assert report.n_shards == 1 and set(report.dtypes) == {"BF16"}


def rewrite(folder, change):
    """Apply change(tensors) to the last shard."""
    path = sorted(folder.glob("*.safetensors"))[-1]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def poison(tensors):
    next(iter(tensors.values())).view(-1)[3] = float("nan")


def test_check_export_finds_nan(folder):
    rewrite(folder, poison)
    with pytest.raises(ExportError, match=r"1 of .* numbers of .* are NaN or infinite"):
        check_export(folder)
    check_export(folder, finite=False)


def test_check_export_finds_names_that_differ_from_the_index(folder):
    def rename(tensors):
        tensors["model.bogus.weight"] = tensors.pop(next(iter(tensors)))

    rewrite(folder, rename)
    with pytest.raises(ExportError, match=r"does not fit the index: missing \['model.*not listed \['model.bogus"):
        check_export(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("model.norm.weight"), "1 weights are missing: model.norm.weight"),
        (lambda t: t.update(bogus=torch.ones(2)), "1 weights do not belong to the model: bogus"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(5)}),
            "another shape than config.json says: model.norm.weight",
        ),
    ],
)
def test_check_export_compares_with_the_model(folder, tmp_path, change, message):
    single = tmp_path / "single"
    make_tokenizer().save_pretrained(single)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(single)
    rewrite(single, change)
    with pytest.raises(ExportError, match=message):
        check_export(single)


def test_check_export_finds_missing_cut_and_stray_shards(folder):
    shards = sorted(folder.glob("*.safetensors"))
    content = shards[-1].read_bytes()
    shards[-1].write_bytes(content[: len(content) // 2])
    with pytest.raises(ExportError, match=f"{shards[-1].name} cannot be read, perhaps it was copied only in part"):
        check_export(folder)
    shards[-1].unlink()
    with pytest.raises(ExportError, match=f"lacks 1 of {len(shards)} weight files: {shards[-1].name}"):
        check_export(folder)
    shards[-1].write_bytes(content)
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ExportError, match=r"weights of another save: model.safetensors"):
        check_export(folder)


def test_check_export_finds_missing_files(folder, tmp_path):
    with pytest.raises(ExportError, match="is not a folder"):
        check_export(tmp_path / "none")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ExportError, match="the tokenizer does not load"):
        check_export(folder)
    for path in folder.glob("model*"):
        path.unlink()
    with pytest.raises(ExportError, match="has no weights"):
        check_export(folder)
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ExportError, match=r"has no config.json; it holds a LoRA adapter only, merge it first"):
        check_export(folder)


def test_check_export_finds_a_tokenizer_of_another_model(folder):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<extra{i}>" for i in range(3)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ExportError, match=r"the tokenizer has \d+ tokens, the model only \d+ embeddings"):
        check_export(folder)


def test_absent_fields_have_their_defaults(tmp_path):
    """As in exports of earlier versions; what has no default must be there."""
    whole = JudgeSettings(scale=ScoreScale.parse("1-3"), anchors=("score ",), end_ids=(1,))
    path = whole.save(tmp_path)
    content = json.loads(path.read_text())
    needed = {name: content[name] for name in ("format", "version", "scale", "anchors", "end_ids")}
    path.write_text(json.dumps(needed))
    assert JudgeSettings.load(tmp_path) == whole
    path.write_text(json.dumps({name: value for name, value in needed.items() if name != "end_ids"}))
    with pytest.raises(ExportError, match="missing: end_ids"):
        JudgeSettings.load(tmp_path)


def test_the_judges_template_survives(tmp_path):
    template = JudgeTemplate(name="mine", text="{{ response }}", anchors=("a ", "b "), scale="1-3", system="Be fair.")
    kept = JudgeSettings(scale=ScoreScale.parse("1-3"), anchors=("a ",), end_ids=(1,), judge_template=template)
    path = kept.save(tmp_path)
    assert JudgeSettings.load(tmp_path) == kept
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "judge_template": {"name": "mine"}}))
    with pytest.raises(ExportError, match="a template has the fields"):
        JudgeSettings.load(tmp_path)
