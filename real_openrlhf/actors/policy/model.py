"""The policy's model: one forward pass over packed groups computes what the loss needs, without keeping all logits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
from deepspeed import DeepSpeedEngine
from openrlhf.models import Actor
from openrlhf.models.actor import _patch_zero3_weight_mapping
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from real_openrlhf.actors.policy.logprob_head import LogprobHead, Request
from real_openrlhf.actors.policy.prompt_attention import PROMPT_ATTENTION
from real_openrlhf.algo.batch import RealBatch, pack
from real_openrlhf.common.device import Device
from real_openrlhf.common.errors import RunError

logger = logging.getLogger(__name__)

# Numbers of tokens in the check of packed rows: enough that bf16's noise does not decide the mean.
CHECKED_PROMPT, CHECKED_RESPONSES = 16, (40, 29)


@dataclass(frozen=True, kw_only=True)
class PolicyOutputs:
    """
    token_logprobs      [N, T] float32 with grad, 0 at padding
    candidate_logprobs  [R, C] float32 with grad: log-probs of the score rows' candidate tokens, -inf at padding
    label_logprobs      [N, S] float32 with grad, 0 where the score cannot be read
    entropy             [N, T] float32, 0 at padding
    moments             [4, M] float32: entropy and moments of the needed rows, see `LogprobHead`; None unless asked for
    """

    token_logprobs: Tensor
    candidate_logprobs: Tensor
    label_logprobs: Tensor
    entropy: Tensor
    moments: Tensor | None = None


class PolicyModel(Actor):
    """OpenRLHF's Actor, with a forward that takes a RealBatch.

    The model is built here and handed to Actor, because Actor's own loading supports only bf16 and fp16
    and trusts remote code. `model` stays a transformers model (PEFT and DeepSpeed wrap it later) with
    its parameter names and its own forward; in addition, it accepts packed rows.

    max_logit_bytes   most bytes that logits may take at a time, see `Request`
    use_liger_kernel  replace the model's layers by Liger's, see `_with_liger`; None: on GPUs, if Liger has them
    """

    def __init__(
        self,
        path: str,
        *,
        device: Device,
        attn_implementation: str,
        ds_config: dict[str, Any],
        temperature: float,
        max_logit_bytes: int,
        use_liger_kernel: bool | None = False,
    ) -> None:
        zero3 = ds_config["zero_optimization"]["stage"] == 3
        if zero3:
            _patch_zero3_weight_mapping()
        # It must be alive while from_pretrained runs: that is how transformers knows of ZeRO-3.
        hf_config = HfDeepSpeedConfig(ds_config) if zero3 else None
        if use_liger_kernel is None:
            use_liger_kernel = device.is_cuda and _liger_knows(path)
        self.use_liger_kernel = use_liger_kernel
        load = _with_liger(path) if use_liger_kernel else AutoModelForCausalLM.from_pretrained
        model = load(path, dtype=device.torch_dtype, attn_implementation=attn_implementation, trust_remote_code=False)
        del hf_config
        model.config.use_cache = False
        accept_packed_rows(model)
        super().__init__(model, temperature=temperature)
        self.packing_samples = False
        self.is_vlm = False
        self.device = device
        self.max_logit_bytes = max_logit_bytes
        self.model_type = model.config.model_type
        self.vocabulary = model.config.get_text_config().vocab_size

    def forward(self, batch: RealBatch, *, entropy_grad: bool = False, moments: bool = False) -> PolicyOutputs:
        """One forward of the network. entropy_grad: the entropy bonus needs a gradient."""
        return outputs_of(
            self.model,
            batch,
            temperature=self.temperature,
            max_bytes=self.max_logit_bytes,
            entropy_grad=entropy_grad,
            moments=moments,
        )

    @contextmanager
    def without_deepspeed(self) -> Iterator[None]:
        """Inside, forward and backward passes bypass DeepSpeed's engine and its hooks."""
        engine = cast(Any, self).model  # the base class has no annotations
        self.model = engine.module if isinstance(engine, DeepSpeedEngine) else engine
        try:
            yield
        finally:
            self.model = engine

    @torch.no_grad()
    def check_packed_rows(self, text: Sequence[int] = ()) -> float:
        """Compare a packed group with the model's own logits on separate rows; RunError where they differ.

        They differ for a model that does more than a linear output layer (scales or caps its logits), or whose
        attention is not plain causal attention.

        text: tokens to check on, followed by random ones if there are too few. Real text is better: a model is
        far surer of it, so its bf16 noise is smaller there.
        Returns the mean absolute difference of the log-probs, over the tokens of both responses.
        """
        generator = torch.Generator().manual_seed(0)
        lengths = (CHECKED_PROMPT, *CHECKED_RESPONSES)
        tokens = torch.randint(0, self.vocabulary, (sum(lengths),), generator=generator)
        known = torch.tensor(list(text[: len(tokens)]), dtype=torch.int64)
        tokens[: len(known)] = known
        prompt, *responses = tokens.split(list(lengths))
        was_training = self.model.training
        self.model.eval()
        wanted = []
        for response in responses:
            ids = torch.cat([prompt, response])[None].to(self.device.current())
            logits = self.model(ids, attention_mask=torch.ones_like(ids), use_cache=False)["logits"]
            logprobs = (logits[0, len(prompt) - 1 : -1].float() / self.temperature).log_softmax(-1)
            wanted.append(logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0])
        packed = pack([(prompt, responses)])
        picks, _, _ = self.model(
            input_ids=packed.token_ids[None].to(self.device.current()),
            position_ids=packed.position_ids[None].to(self.device.current()),
            request=Request(
                layout=packed.layout,
                logit_index=torch.cat([p[:-1] for p in packed.predictors]).to(self.device.current()),
                row=torch.arange(sum(CHECKED_RESPONSES), device=self.device.current()),
                token=torch.cat(responses).to(self.device.current()),
                temperature=self.temperature,
                max_bytes=self.max_logit_bytes,
            ),
        )
        self.model.train(was_training)
        difference = float((torch.cat(wanted) - picks).abs().mean())
        if not difference <= self.device.sync_tolerance:  # a NaN must fail too
            raise RunError(
                f"--actor.model_name_or_path: this model ({self.model_type}) cannot be trained with shared prompts: "
                f"log-probs of packed rollouts differ from its own by {difference:.2g} on average, so its output "
                "layer or its attention does something unsupported; Llama, Mistral, Qwen2 and Qwen3 work"
            )
        return difference


def _with_liger(path: str) -> Callable[..., PreTrainedModel]:
    """A function that loads a model with Liger's RMSNorm, rotary embedding and SwiGLU, as OpenRLHF's Actor does
    (models/actor.py).

    Its fused output layers stay off: they return a loss, or the log-prob of one token per row. But score rows need
    log-probs of several tokens, and the log needs the entropy. `LogprobHead` bounds memory instead, on every device.
    RunError without the package, and for models that Liger would silently leave as they are.
    """
    try:
        from liger_kernel.transformers import AutoLigerKernelForCausalLM
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise RunError(f"--ds.use_liger_kernel: {error}; pip install liger-kernel") from error
    kind = AutoConfig.from_pretrained(path, trust_remote_code=False).model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise RunError(f"--ds.use_liger_kernel: Liger has no kernels for {kind} models; leave the flag out")
    return partial(AutoLigerKernelForCausalLM.from_pretrained, fused_linear_cross_entropy=False)


def _liger_knows(path: str) -> bool:
    try:
        _with_liger(path)
    except RunError as reason:
        logger.info("the model's own layers are used: %s", reason)
        return False
    return True


def outputs_of(
    network: Callable[..., tuple[Tensor, Tensor, Tensor]],
    batch: RealBatch,
    *,
    temperature: float,
    max_bytes: int,
    entropy_grad: bool = False,
    moments: bool = False,
) -> PolicyOutputs:
    """A forward pass of a network that accepts packed rows, with its results as [N, T] tensors."""
    mask, rows = batch.response_mask, batch.score_rows
    n_candidates = rows.token_ids.shape[1]
    request = Request(
        layout=batch.layout,
        logit_index=batch.logit_index,
        row=torch.cat([batch.logit_row[mask], batch.score_row.repeat_interleave(n_candidates)]),
        token=torch.cat([batch.response_ids[mask], rows.token_ids.clamp(min=0).flatten()]),
        temperature=temperature,
        max_bytes=max_bytes,
        entropy_grad=entropy_grad,
        moments=moments,
    )
    picks, entropy, row_moments = network(
        input_ids=batch.token_ids[None], position_ids=batch.position_ids[None], request=request
    )
    of_tokens, of_rows = picks.split([len(picks) - rows.token_ids.numel(), rows.token_ids.numel()])
    tokens = picks.new_zeros(mask.shape).masked_scatter(mask, of_tokens)
    candidates = of_rows.view(rows.token_ids.shape).masked_fill(rows.token_ids < 0, float("-inf"))
    spread = entropy.new_zeros(mask.shape).masked_scatter(mask, entropy[batch.logit_row[mask]])
    return PolicyOutputs(
        token_logprobs=tokens,
        candidate_logprobs=candidates,
        label_logprobs=rows.label_logprobs(candidates),
        entropy=spread,
        moments=torch.cat([entropy.detach()[None], row_moments]) if moments else None,
    )


def accept_packed_rows(model: PreTrainedModel) -> None:
    """Add `forward(input_ids=, position_ids=, request=Request)` to a transformers model, next to its own forward.

    Its class, its parameters and their names stay as they are. Everything happens inside its forward and
    its output layer's, where DeepSpeed has its hooks; a PEFT model around it passes the arguments on.
    RunError for a model that cannot work this way.
    """
    name = model.config.model_type
    text = model.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds or not getattr(model, "_supports_attention_backend", False):
        raise RunError(
            f"--actor.model_name_or_path: {name} models have {', '.join(sorted(kinds)) or 'their own attention'}, "
            "with which prompts cannot be shared in training; Llama, Mistral, Qwen2 and Qwen3 work"
        )
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise RunError(f"--actor.model_name_or_path: {name} models have an output layer of the type {type(head)}")
    head.__class__ = LogprobHead
    model.own_attention = model.config._attn_implementation
    # Not only during a forward pass: gradient checkpointing computes layers again in the backward pass.
    model.config._attn_implementation = PROMPT_ATTENTION
    model.forward = MethodType(_forward, model)


def _forward(model: Any, *args: Any, request: Request | None = None, **kwargs: Any) -> Any:
    """The forward of a model that accepts packed rows."""
    if request is None:
        with _own_attention(model):
            return type(model).forward(model, *args, **kwargs)
    head = model.get_output_embeddings()
    if not isinstance(head, LogprobHead):
        raise RunError("the output layer was replaced; leave it out of --ds.lora.target_modules")
    output = getattr(model, model.base_model_prefix)(
        input_ids=kwargs["input_ids"],
        position_ids=kwargs["position_ids"],
        use_cache=False,
        layout=request.layout,
        exact=model.own_attention == "eager",
    )
    return head(output.last_hidden_state[0].index_select(0, request.logit_index), request)


@contextmanager
def _own_attention(model: Any) -> Iterator[None]:
    model.config._attn_implementation = model.own_attention
    try:
        yield
    finally:
        model.config._attn_implementation = PROMPT_ATTENTION
