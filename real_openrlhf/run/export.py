"""Writes settings and model card of an exported judge, from a run's plan."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from real_openrlhf.algo.objectives import objective_class
from real_openrlhf.config.schema import Config
from real_openrlhf.controller.judge_export import Chosen
from real_openrlhf.export.check import check_export
from real_openrlhf.export.model_card import CardInfo, write_model_card
from real_openrlhf.export.settings import ExportError, JudgeSettings
from real_openrlhf.run.plan import RunPlan


def exported_step(folder: Path) -> int | None:
    """The training step whose weights an exported judge has; None without an export, or if its settings do not say."""
    try:
        return JudgeSettings.load(folder).step
    except ExportError:
        return None


def complete_export(plan: RunPlan, folder: Path, chosen: Chosen) -> None:
    """Add model card and judge settings to the folder with the weights, then check it. Raises ExportError."""
    config, inputs = plan.config, plan.inputs
    read = [field.name for field in fields(objective_class(config.real.objective))]
    settings = JudgeSettings(
        scale=config.real.score_scale,
        anchors=config.real.anchor,
        end_ids=tuple(sorted(inputs.end_ids)),
        max_new_tokens=config.rollout.max_new_tokens,
        template=inputs.template,
        temperature=config.rollout.temperature,
        renormalise=config.real.renormalise,
        preset=config.real.preset,
        step=chosen.step,
        judge_template=inputs.judge_template,
    )
    info = CardInfo(
        title=Path(config.ckpt.output_dir).resolve().name,
        base_model=config.actor.model_name_or_path,
        settings=settings,
        data_source=config.data.prompt_dataset,
        data_rows=len(inputs.train_set),
        data_hash=inputs.train_set.sha256,
        objective=config.real.objective,
        objective_settings={
            **{name: getattr(plan.objective, name) for name in read},
            f"aggregation of {'the cross-entropy' if config.supervised else 'Term 1'}": config.real.aggregation,
        },
        steps=chosen.step,
        chosen=chosen.why,
        training={
            "learning rate": config.actor.adam.lr,
            **(_given(config) if config.supervised else _sampled(config)),
            "LoRA adapters": str(config.ds.lora),
            "differs from the preset in": ", ".join(config.overridden) or "nothing",
        },
        evaluation=split_metrics(dict(chosen.evaluation)) if chosen.evaluation else None,
        evaluation_data=config.eval.dataset,
    )
    write_model_card(folder, info=info)
    check_export(folder)


def _sampled(config: Config) -> dict[str, Any]:
    return {
        "rollouts per prompt": config.rollout.n_samples_per_prompt,
        "prompts per step": config.rollout.batch_size,
        "groups kept": config.real.keep_groups,
        "weight of the KL to the start": config.algo.kl.init_coef,
    }


def _given(config: Config) -> dict[str, Any]:
    return {
        "method": config.warmup.method,
        "feedback": config.warmup.feedback,
        "rows per update": config.rollout.batch_size,
    }


def split_metrics(metrics: dict[str, float | None]) -> dict[str, dict[str, float | None]]:
    """Metrics as a table: "flask/expected/pearson" -> column "flask/expected", row "pearson"."""
    columns: dict[str, dict[str, float | None]] = {}
    for name, value in metrics.items():
        column, slash, row = name.rpartition("/")
        columns.setdefault(column if slash else "all", {})[row if slash else name] = value
    return columns
