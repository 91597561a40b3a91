"""Each stage of an experiment: what decides its output, what it needs, how it is computed."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from moesaic.app.schema import MoesaicConfig
from moesaic.backbones.base import Backbone
from moesaic.backbones.pretrain import PretrainHere
from moesaic.backbones.source import load_backbone
from moesaic.bench.anatomy import masked_anatomy, read_anatomy
from moesaic.bench.config import prompt_rows
from moesaic.bench.cost import cost_record
from moesaic.bench.point import BenchRequest, bench_point
from moesaic.bench.worker import run_fresh
from moesaic.data.corpus import Corpus, Split
from moesaic.data.tokenizer import train_bpe
from moesaic.data.tokens import TokenSplit, tokenise
from moesaic.evaluate.cett import as_one_block, cett_sparsity
from moesaic.evaluate.harness import run_tasks
from moesaic.evaluate.items import summarise
from moesaic.evaluate.perplexity import perplexity
from moesaic.methods.allocate import AllocationJob
from moesaic.methods.base import AdaptJob, ConvertJob, Phase, SparseMethod, select_blocks
from moesaic.methods.calibration import Calibration, calibrate
from moesaic.methods.controls import Arm, apply_arm
from moesaic.methods.lm import calibration_loss
from moesaic.runs.atomic import write_json_atomic
from moesaic.runs.stage import Stage
from moesaic.sparse.channels import count_channels
from moesaic.sparse.layer import sparse_layers
from moesaic.sparse.model import load_model
from moesaic.sparse.trace import count_routing
from moesaic.training.progress import ProgressLine

__all__ = [
    "adapt",
    "allocate",
    "convert",
    "evaluate",
    "fetch_backbone",
    "prepare",
    "pretrain_backbone",
    "run_calibration",
    "time",
    "tokenise_split",
    "train_tokenizer",
]

FACTS_FILE = "facts.json"  # what a phase reports beside the model
QUALITY_FILE = "quality.json"
SPEED_FILE = "speed.json"
SHARES_FILE = "shares.json"
DOCUMENTS_FILE = "documents.parquet"
ITEMS_FILE = "items.parquet"

Folders = tuple[Path, ...]


def train_tokenizer(corpus: Corpus, backbone: PretrainHere) -> Stage:
    """A byte-level BPE of the training split."""
    masks = backbone.auto_class == "masked_lm"

    def compute(folder: Path, _: Folders) -> None:
        texts = (document.text for document in corpus.documents("train"))
        train_bpe(texts, backbone.vocab_size, masks=masks).save_pretrained(folder)

    config = {"corpus": corpus, "content": corpus.fingerprint(), "vocab_size": backbone.vocab_size, "masks": masks}
    return Stage(name="tokenizer", label=corpus.name, config=config, compute=compute)


def tokenise_split(corpus: Corpus, split: Split, tokenizer: Stage, max_tokens: int | None) -> Stage:
    """A corpus split as tokens of the tokenizer that the stage `tokenizer` holds (a backbone holds its own)."""

    def compute(folder: Path, parents: Folders) -> None:
        tokenise(corpus, split, load_tokenizer(parents[0]), folder, max_tokens=max_tokens)

    config = {"corpus": corpus, "content": corpus.fingerprint(), "split": split, "max_tokens": max_tokens}
    return Stage(name="tokens", label=f"{corpus.name}-{split}", config=config, parents=(tokenizer,), compute=compute)


def fetch_backbone(backbone: Backbone) -> Stage:
    """A dense model that exists: a local folder, a hub name, an imported file."""

    def compute(folder: Path, _: Folders) -> None:
        backbone.materialise(folder, tokens=None, tokenizer=None, seed=0)

    config = {"backbone": backbone, "content": backbone.fingerprint()}
    return Stage(name="backbone", label=backbone.name, config=config, compute=compute)


def pretrain_backbone(backbone: Backbone, tokenizer: Stage, tokens: Stage) -> Stage:
    """A dense model pretrained here. Its seed is its own, so that all seeds of an experiment share it."""

    def compute(folder: Path, parents: Folders) -> None:
        backbone.materialise(
            folder, tokens=TokenSplit.load(parents[1]), tokenizer=cast(Any, load_tokenizer(parents[0])), seed=0
        )

    config = {"backbone": backbone, "content": backbone.fingerprint()}
    return Stage(name="backbone", label=backbone.name, config=config, parents=(tokenizer, tokens), compute=compute)


def prepare(config: MoesaicConfig, backbone: Stage, tokens: Stage) -> Stage:
    """The dense model as the method's `prepare` leaves it."""
    change = config.method.prepare
    assert change is not None

    def compute(folder: Path, parents: Folders) -> None:
        model, tokenizer = load_backbone(parents[0])
        dtype = model.dtype
        job = _adapt_job(config, model.float(), parents[1], None, folder, f"prepare {config.method.name}")
        facts = change.run(job)
        torch.nn.Module.to(job.model, dtype)
        save_model(job.model, tokenizer, folder, facts)

    counted = {"prepare": change, "context": config.adapt.context, "seed": config.seed}
    parents = (backbone, tokens)
    return Stage(name="prepare", label=config.method.name, config=counted, parents=parents, compute=compute)


def run_calibration(config: MoesaicConfig, dense: Stage, tokens: Stage) -> Stage:
    """The inputs of every FFN of the dense model on training tokens."""
    method, context = config.method, config.adapt.context

    def compute(folder: Path, parents: Folders) -> None:
        model, _ = load_backbone(parents[0])
        split = TokenSplit.load(parents[1])
        pattern = config.backbone.ffn
        calibrate(model, split, folder, pattern=pattern, num_tokens=method.calibration_tokens, context=context)

    counted = {"tokens": method.calibration_tokens, "context": context}
    label = f"{config.backbone.name}-{method.calibration_tokens}"
    return Stage(name="calibrate", label=label, config=counted, parents=(dense, tokens), version=2, compute=compute)


def allocate(config: MoesaicConfig, model: Stage, calibration: Stage, budget: float) -> Stage:
    """Each layer's share of a budget, found before anything is trained."""
    method = config.method
    rule = method.allocate
    assert rule is not None

    def compute(folder: Path, parents: Folders) -> None:
        net, _ = load_any(parents[0])
        cached = Calibration.load(parents[1])
        share = method.share(budget)
        assert share is not None
        job = ConvertJob(model=net, pattern=config.backbone.ffn, calibration=cached, budget=budget, seed=config.seed)
        probe, select = method.probe(job)
        found = rule.shares(
            AllocationJob(
                model=probe,
                calibration=cached,
                select=select,
                share=share,
                loss=partial(calibration_loss, probe, cached),
                label=f"allocate {_label(method.name, budget)}",
            )
        )
        write_json_atomic(folder / SHARES_FILE, {"share_L": found})

    counted: dict[str, Any] = {"allocate": rule, "budget": budget, "method": method.conversion(), "seed": config.seed}
    if isinstance(method, SparseMethod):
        counted |= {"oracle": method.oracle, "select": method.select}
    label = _label(method.name, budget)
    return Stage(name="allocate", label=label, config=counted, parents=(model, calibration), compute=compute)


def convert(
    config: MoesaicConfig,
    dense: Stage,
    calibration: Stage | None,
    budget: float | None,
    allocation: Stage | None = None,
) -> Stage:
    """The model after the cut: no weight is trained yet, and a routed model still runs all its blocks."""
    method = config.method

    def compute(folder: Path, parents: Folders) -> None:
        model, tokenizer = load_backbone(parents[0])
        cached = Calibration.load(parents[1]) if calibration is not None else None
        job = ConvertJob(
            model=model,
            pattern=config.backbone.ffn,
            calibration=cached,
            budget=budget,
            seed=config.seed,
            share_L=read_shares(parents, allocation),
        )
        save_model(method.convert(job), tokenizer, folder, {})

    counted = {"method": method.conversion(), "budget": budget, "seed": config.seed}
    parents = present(dense, calibration, allocation)
    return Stage(name="convert", label=_label(method.name, budget), config=counted, parents=parents, compute=compute)


def adapt(
    config: MoesaicConfig,
    name: str,
    phase: Phase,
    budget: float | None,
    model: Stage,
    tokens: Stage,
    calibration: Stage | None,
    allocation: Stage | None = None,
) -> Stage:
    """The model after one phase of the recipe; resumed from its checkpoint when it was killed."""
    method = config.method

    def compute(folder: Path, parents: Folders) -> None:
        net, tokenizer = load_any(parents[0])
        if isinstance(method, SparseMethod):
            select_blocks(net, method.selections_at(budget, read_shares(parents, allocation)))
            select_blocks(net, [layer.select.training_form() for layer in sparse_layers(net)])
        cached = Calibration.load(parents[2]) if calibration is not None else None
        label = f"{_label(method.name, budget)} {name}"
        dtype = net.dtype
        # Training moves float32 weights; what is saved has the backbone's dtype again, routers excepted.
        job = _adapt_job(config, net.float(), parents[1], cached, folder, label)
        facts = phase.run(job)
        cast_weights(net, dtype)
        save_model(net, tokenizer, folder, facts)

    counted: dict[str, Any] = {"phase": phase, "budget": budget, "context": config.adapt.context, "seed": config.seed}
    if isinstance(method, SparseMethod) and phase.uses_selection:
        counted["select"] = method.select.training_form()
    content = phase.content()
    if content is not None:
        counted["content"] = content
    parents = present(model, tokens, calibration, allocation)
    label = f"{_label(method.name, budget)}-{name}"
    return Stage(name="adapt", label=label, config=counted, parents=parents, compute=compute)


def evaluate(
    config: MoesaicConfig,
    arm: Arm,
    budget: float | None,
    model: Stage,
    heldout: Stage,
    calibration: Stage | None,
    *,
    matched: Stage | None = None,
    allocation: Stage | None = None,
) -> Stage:
    """Quality, cost and routing statistics of one arm at one budget.

    `matched` is the evaluation of the adapted model whose active shares a control is given.
    """
    method, settings = config.method, config.evaluate
    whole = arm in ("adapted", "dense")  # controls get perplexity alone
    tasks, cett = (settings.tasks, settings.cett) if whole else ({}, None)

    def compute(folder: Path, parents: Folders) -> None:
        net, tokenizer = load_any(parents[0])
        if isinstance(method, SparseMethod) and sparse_layers(net):
            cached = Calibration.load(parents[2]) if calibration is not None else None
            own_L = read_json(parents[3] / QUALITY_FILE)["routing"]["active_frac_L"] if matched is not None else None
            share_L = read_shares(parents, allocation)
            apply_arm(net, arm, method, cast(float, budget), cached, config.seed, share_L=share_L, active_frac_L=own_L)
        split = TokenSplit.load(parents[1])
        label = f"{arm} {_label(method.name, budget)}"
        result: dict[str, Any] = {}
        progress = ProgressLine(f"perplexity {label}", None)
        with progress as line, count_routing(net) as counts, count_channels(net) as channels:
            loss = perplexity(net, split, **asdict(settings.perplexity), progress=lambda done, _: line.update(done))
        pattern = config.backbone.ffn
        if sparse_layers(net):
            own, blocks_L = read_anatomy(net, pattern), counts.mean_blocks_L()
            result["routing"] = counts.summary()
        else:
            own, blocks_L = masked_anatomy(net, pattern, channels.active_frac())
        result["cost"] = cost_record(read_anatomy(config.backbone.skeleton(), pattern), own, blocks_L=blocks_L)
        result["quality"], result["protocol"] = loss.summary(), {"perplexity": loss.protocol}
        pd.DataFrame(loss.rows()).to_parquet(folder / DOCUMENTS_FILE)
        rows: list[dict[str, Any]] = []
        if loss.items:  # a classifier's, which has no other tasks
            result["tasks"] = {config.data.name: summarise(loss.items)}
            rows = [{"task": config.data.name, **item.row()} for item in loss.items]
        if tasks:
            documents = list(config.data.documents("heldout"))
            with ProgressLine(f"lm-eval {label}", None, unit="requests") as line:
                answers = run_tasks(
                    net,
                    tokenizer,
                    tasks,
                    documents=documents,
                    batch_size=settings.batch_size,
                    limit=settings.limit,
                    seed=0,
                    progress=lambda done, _: line.update(done),
                )
            result["tasks"] = {name: answer.summary() for name, answer in answers.items()}
            result["protocol"]["tasks"] = {name: answer.protocol for name, answer in answers.items()}
            rows = [row for answer in answers.values() for row in answer.rows()]
        pd.DataFrame(rows).to_parquet(folder / ITEMS_FILE)
        if cett is not None and not channels.active_frac():
            probed = net if sparse_layers(net) else as_one_block(net, pattern)
            with ProgressLine(f"cett {label}", None) as line:
                result["cett"] = cett_sparsity(
                    probed, split, cett, context=settings.perplexity.context, progress=lambda done, _: line.update(done)
                )
        write_json_atomic(folder / QUALITY_FILE, result)

    counted: dict[str, Any] = {"arm": arm, "budget": budget, "perplexity": settings.perplexity, "tasks": tasks}
    if cett is not None:
        counted["cett"] = cett
    if tasks:
        counted |= {"batch_size": settings.batch_size, "limit": settings.limit}
    if isinstance(method, SparseMethod) and arm != "dense":
        counted |= {"select": method.select, "seed": config.seed}
        counted |= {"oracle": method.oracle} if arm == "oracle_router" else {}
        counted |= {"random": method.random} if arm == "random_router" else {}
    parents = present(model, heldout, calibration, matched, allocation)
    label = "dense" if arm == "dense" else f"{_label(method.name, budget)}-{arm}"
    return Stage(name="evaluate", label=label, config=counted, parents=parents, version=2, compute=compute)


def time(
    config: MoesaicConfig,
    arm: Arm,
    budget: float | None,
    dense: Stage,
    model: Stage,
    heldout: Stage,
    allocation: Stage | None = None,
) -> Stage:
    """Time of the model beside the dense backbone's, interleaved in a fresh process, on real tokens."""
    method, settings = config.method, config.bench

    def compute(folder: Path, parents: Folders) -> None:
        tokens_NC = TokenSplit.load(parents[2]).blocks(settings.prompt_tokens)
        select = None
        if isinstance(method, SparseMethod):
            select = method.selections_at(budget, read_shares(parents, allocation))
        request = BenchRequest(
            dense=parents[0],
            sparse=parents[1],
            select=select,
            prompts=prompt_rows(np.asarray(tokens_NC), settings),
            config=settings,
            pattern=config.backbone.ffn,
            samples=folder / "samples.parquet",
        )
        outcome = run_fresh(bench_point, request, timeout_seconds=settings.timeout_seconds)
        if outcome.failure is not None:
            raise RuntimeError(f"timing {arm} {method.name}: {outcome.failure.reason}: {outcome.failure.message}")
        write_json_atomic(folder / SPEED_FILE, outcome.result)

    counted = {"budget": budget, "bench": settings, "select": method.selection_at(budget)}
    parents = present(dense, model, heldout, allocation)
    return Stage(name="bench", label=_label(method.name, budget), config=counted, parents=parents, compute=compute)


def present(*stages: Stage | None) -> tuple[Stage, ...]:
    """Those stages that there are, in order: an optional parent comes after those that are always there."""
    return tuple(stage for stage in stages if stage is not None)


def read_shares(parents: Folders, allocation: Stage | None) -> list[float] | None:
    """Each layer's share of the budget where the last parent is an allocation."""
    return None if allocation is None else read_json(parents[-1] / SHARES_FILE)["share_L"]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model, or alone in the folder of a tokenizer stage."""
    if (folder / "tokenizer_config.json").exists():
        return AutoTokenizer.from_pretrained(folder)
    return load_backbone(folder)[1]


def load_any(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that any stage left in `folder`, dense or sparse, with its tokenizer."""
    if (folder / "modeling_moesaic.py").exists():
        return load_model(folder), load_tokenizer(folder)
    return load_backbone(folder)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, facts: dict[str, Any]) -> None:
    """Leave an ordinary Hugging Face folder, and what was found out on the way; a finished fit's checkpoint goes."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json_atomic(folder / FACTS_FILE, facts)
    (folder / "last.ckpt").unlink(missing_ok=True)


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give every weight `dtype` but those that routing depends on: they stay float32, bit for bit."""
    kept = [
        part
        for layer in sparse_layers(model)
        for part in (layer.score, layer.select_state, layer.combine)
        if part is not None
    ]
    exact = [{name: tensor.clone() for name, tensor in part.state_dict().items()} for part in kept]
    torch.nn.Module.to(model, dtype)
    for part, state in zip(kept, exact, strict=True):
        part.float().load_state_dict(state)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that a stage wrote."""
    return cast(dict[str, Any], json.loads(path.read_text()))


def _adapt_job(
    config: MoesaicConfig,
    model: PreTrainedModel,
    tokens: Path,
    calibration: Calibration | None,
    folder: Path,
    label: str,
) -> AdaptJob:
    # The one thing every fit draws from the global generators is dropout; a phase starts the same whatever ran before.
    torch.manual_seed(config.seed)
    return AdaptJob(
        model=model,
        pattern=config.backbone.ffn,
        calibration=calibration,
        tokens=TokenSplit.load(tokens),
        context=config.adapt.context,
        seed=config.seed,
        folder=folder,
        label=label,
    )


def _label(name: str, budget: float | None) -> str:
    return name if budget is None else f"{name}@{budget:g}"
