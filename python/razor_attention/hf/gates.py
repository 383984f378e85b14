# SPDX-License-Identifier: Apache-2.0
"""train_gates: DuoAttention's way to full heads, one trained gate for each kv head of a frozen model.

    out  = gate * full attention + (1 - gate) * attention to sinks and window
    loss = mean over asked tokens of |h_full - h_mixed|^2 / hidden_size + l1 * mean |gate|      (h: last hidden states)

Plain SDPA on any device; the windowed half goes block by block, so its time and memory are linear in the length.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, PreTrainedTokenizerBase

from .. import files
from ..checks import check_int
from .alibi import model_slopes
from .masks import plain_mask
from .models import geometry, refuse_unsupported, text_config
from .names import GradientCheckpointingLayer
from .parallel import kv_shard
from .passkeys import passkey_samples
from .switch import AttentionSwitch

_BLOCK = 256  # queries at a time in the windowed half, or a window of them where that is more
_SAVE_EVERY = 50  # steps


@dataclass(frozen=True)
class TrainedGates:
    """What `train_gates` found.

    Args:
        gates: (num_layers, num_kv_heads), float32, in [0, 1]; 1 is full.
        sink_size, window_size: first and last tokens that the compressed half of every head saw.
        losses: (steps, 2), float32: the distillation's part and the mean gate, before each step.
        provenance: model, method, parameters and package version.
    """

    gates: Tensor
    sink_size: int
    window_size: int
    losses: Tensor
    provenance: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: files.PathLike) -> None:
        """Write DuoAttention's pattern folder.

        Args:
            folder: to write, made if needed.
        """
        sizes = {"sink_size": self.sink_size, "window_size": self.window_size}
        files.save_gates(self.gates, folder, **sizes, provenance=self.provenance)


def train_gates(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    text: str | None = None,
    samples: Iterable[tuple[Sequence[int], Sequence[bool]]] | None = None,
    sink_size: int = 128,
    window_size: int = 256,
    steps: int = 2000,
    learning_rate: float = 0.02,
    l1: float = 0.05,
    seed: int = 0,
    checkpoint: files.PathLike | None = None,
    recompute: bool = False,
    progress: bool = True,
) -> TrainedGates:
    """Train one gate for each kv head; the model's weights stay as they are, and the model is as before afterwards.

    Adam, one sample a step. The rate rises over the first fifth of the steps and falls over the last one, never below
    a tenth; gates start at 1 and are clipped to [0, 1] after each step.

    Args:
        model: a decoder model that uses AttentionInterface, with rotary positions; any device and dtype.
        tokenizer: with `text`: the model's.
        text: haystack of `passkey_samples` with its defaults, as long as the model allows. Or `samples`, not both.
        samples: one (ids, asked) a step: token ids, and for each whether its last hidden state is compared.
        sink_size, window_size: first and last tokens that the compressed half sees; the window holds the query's own.
        steps: optimiser steps.
        learning_rate: highest rate.
        l1: weight of the mean gate in the loss.
        seed: of the passkeys.
        checkpoint: file for the state of training, every 50 steps; where it exists training goes on from it, and
            `samples` must yield the same ones again, of which those done are skipped.
        recompute: keep no activations inside layers and compute them again when they are needed: slower, for long
            samples of large models.
        progress: show a progress bar.
    Returns:
        The gates.
    Raises:
        ValueError: text, samples: expected exactly one of the two, got neither
        NotImplementedError: model: expected one with rotary positions, got bloom, which uses ALiBi
    """
    check_int("steps", steps, 1)
    settings: dict[str, Any] = {
        "sink_size": check_int("sink_size", sink_size, 0),
        "window_size": check_int("window_size", window_size, 1),
        "steps": steps,
        "learning_rate": _positive("learning_rate", learning_rate),
        "l1": _positive("l1", l1, zero=True),
    }
    if checkpoint is not None and not Path(checkpoint).parent.is_dir():
        raise ValueError(f"checkpoint: expected a file in an existing folder, got {checkpoint}")
    if (text is None) == (samples is None):
        got = "neither" if text is None else "both"
        raise ValueError(f"text, samples: expected exactly one of the two, got {got}")
    if text is not None:
        settings["seed"] = check_int("seed", seed, 0)
    switch = AttentionSwitch(model, "razor_gates")
    sizes, config = geometry(model.config), text_config(model.config)
    if model_slopes(config) is not None:
        raise NotImplementedError(
            f"model: expected one with rotary positions, got {config.model_type}, which uses ALiBi"
        )
    if kv_shard(model.config) != (0, 1):
        raise NotImplementedError(
            "model: expected all kv heads in one process to train their gates, got a tensor-parallel model; train "
            "without torchrun: a plan made from the gates is cut for every rank"
        )
    state = _State.begin(torch.ones(sizes.num_layers, sizes.num_kv_heads), settings)
    if checkpoint is not None and Path(checkpoint).exists():
        state.load(checkpoint)
    if text is not None:
        if tokenizer is None:
            raise TypeError("tokenizer: expected one with a text, got None")
        source: Iterator[Any] = passkey_samples(
            tokenizer, text, limit=getattr(config, "max_position_embeddings", None), seed=seed, start=state.step
        )
    else:
        source = itertools.islice(iter(samples or ()), state.step, None)

    run = _Run(state.gates, sink_size, window_size)
    with _frozen(model, run, recompute), switch, tqdm(total=steps, unit="step", disable=not progress) as bar:
        bar.set_description("train_gates")
        bar.update(state.step)
        while state.step < steps:
            ids, asked = _checked(next(source, None), state.step, int(config.vocab_size))
            distilled = _distillation(model, run, ids.to(model.device), asked)
            if len(run.layers) != sizes.num_layers:
                raise NotImplementedError(f"model: expected {sizes.num_layers} attention layers, got {len(run.layers)}")
            state.descend(distilled)
            bar.update()
            last = state.losses[state.step - 1].tolist()
            bar.set_postfix(tokens=len(ids), distilled=f"{last[0]:.3g}", mean_gate=f"{last[1]:.3f}", refresh=False)
            if checkpoint is not None and (state.step % _SAVE_EVERY == 0 or state.step == steps):
                state.save(checkpoint)
    return TrainedGates(
        gates=state.gates.detach().clone(),
        sink_size=sink_size,
        window_size=window_size,
        losses=state.losses,
        provenance={
            "model": Path(config.name_or_path or "").name or type(model).__name__,  # a path means nothing elsewhere
            "method": "trained gates",
            **settings,
            "samples": "passkeys" if text is not None else "given",
            "version": version("razor-attention"),
        },
    )


@dataclass
class _State:
    """What training changes, and all that a checkpoint holds."""

    gates: Tensor  # (num_layers, num_kv_heads), float32, on the CPU: layers may be on several devices
    optimizer: torch.optim.Optimizer
    losses: Tensor  # (steps, 2), float32
    settings: dict[str, Any]
    step: int = 0  # steps done

    @classmethod
    def begin(cls, gates: Tensor, settings: dict[str, Any]) -> _State:
        gates.requires_grad_(True)
        optimizer = torch.optim.Adam([gates], lr=settings["learning_rate"])
        return cls(gates, optimizer, torch.zeros(settings["steps"], 2), dict(settings))

    def descend(self, distilled: Tensor) -> None:
        """One step along the gradient of the loss, of which `distilled` is a part; a sample that fails changes nothing.

        Args:
            distilled: (), float32.
        """
        steps, l1 = self.settings["steps"], self.settings["l1"]
        size = self.gates.abs().mean()
        fifth = max(1, steps // 5)
        share = min(1.0, max((self.step + 1) / fifth, 0.1), max((steps - self.step) / fifth, 0.1))
        self.optimizer.param_groups[0]["lr"] = self.settings["learning_rate"] * share
        self.optimizer.zero_grad()
        loss = distilled.to(size.device) + l1 * size
        if not loss.isfinite():
            raise ValueError(f"samples: expected a finite loss, got {loss.item()} at step {self.step}")
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.gates.clamp_(0, 1)
        self.losses[self.step] = torch.stack([distilled.detach().to(size.device), size.detach()])
        self.step += 1

    def save(self, path: files.PathLike) -> None:
        """Write all of it, atomically."""
        content = {
            "format": "razor-attention gate training",
            "settings": self.settings,
            "step": self.step,
            "gates": self.gates.detach(),
            "losses": self.losses,
            "optimizer": self.optimizer.state_dict(),
        }
        files.write_atomic(path, lambda file: torch.save(content, file))

    def load(self, path: files.PathLike) -> None:
        """Go on from a file; refuses that of another run.

        Raises:
            ValueError: checkpoint: expected one of this run with steps 200, got 2000
        """
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            if content["format"] != "razor-attention gate training":
                raise KeyError("format")
            settings, shape = content["settings"], list(content["gates"].shape)
        except (RuntimeError, EOFError, KeyError, TypeError, AttributeError, pickle.UnpicklingError) as error:
            got = f"{type(error).__name__} from {path}"
            raise ValueError(f"checkpoint: expected a file that train_gates wrote, got {got}") from error
        for name, value in self.settings.items():
            if settings.get(name) != value:
                raise ValueError(f"checkpoint: expected one of this run with {name} {value}, got {settings.get(name)}")
        if shape != list(self.gates.shape):
            raise ValueError(f"checkpoint: expected gates of shape {list(self.gates.shape)}, got {shape}")
        with torch.no_grad():
            self.gates.copy_(content["gates"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.losses, self.step = content["losses"], content["step"]


@dataclass
class _Run:
    """What the attention function below needs; it hangs on the attention layers while gates are trained.

    No ContextVar: with `recompute` autograd calls the layers again from threads of its own.
    """

    gates: Tensor  # (num_layers, num_kv_heads), float32
    sink_size: int
    window_size: int
    mixed: bool = False  # else full attention alone
    layers: set[int] = field(default_factory=set)  # that have attended


def gated_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function registered as "razor_gates": causal attention mixed with that to sinks and window."""
    refuse_unsupported(module, dropout, kwargs, attention_mask, query.shape[2])
    run: _Run | None = vars(module).get("_razor_run")
    if run is None:
        raise ValueError(
            "attn_implementation: expected 'razor_gates' inside train_gates alone, got a forward pass of its own"
        )
    layer, group = cast(int, module.layer_idx), query.shape[1] // key.shape[1]
    run.layers.add(layer)
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=group > 1
    )
    if run.mixed:
        gate = run.gates[layer].to(query.device).repeat_interleave(group)[:, None, None]  # [num_heads, 1, 1]
        near = windowed_attention(query, key, value, run.sink_size, run.window_size, scaling)
        out = (gate * out + (1 - gate) * near).to(query.dtype)
    return out.transpose(1, 2), None


def windowed_attention(
    query: Tensor, key: Tensor, value: Tensor, sink_size: int, window_size: int, scale: float | None
) -> Tensor:
    """Causal attention to the first and the last tokens, differentiable, block by block of queries.

    Args:
        query: (batch, num_heads, tokens, head_dim).
        key: (batch, num_kv_heads, tokens, head_dim), dtype of query.
        value: (batch, num_kv_heads, tokens, head_dim), dtype of query.
        sink_size, window_size: first and last tokens seen, the query's own included in the window, at least 1.
        scale: factor on q.k; None: head_dim ** -0.5.
    Returns:
        (batch, num_heads, tokens, head_dim), dtype of query.
    """
    group, parts = query.shape[1] // key.shape[1], []
    for start in range(0, query.shape[2], size := max(window_size, _BLOCK)):
        end = min(start + size, query.shape[2])
        first = max(0, start - window_size + 1)
        sinks = min(sink_size, first)  # that are not in reach of the window anyway
        at = torch.cat([torch.arange(sinks), torch.arange(first, end)]).to(query.device)  # positions of the keys
        here = torch.arange(start, end, device=query.device)[:, None]
        seen = (at <= here) & ((here - at < window_size) | (at < sink_size))  # [queries, keys]
        # Repeated, since no fused kernel of CUDA takes both a mask and groups.
        k, v = (torch.cat([x[:, :, :sinks], x[:, :, first:end]], 2).repeat_interleave(group, 1) for x in (key, value))
        parts.append(
            nn.functional.scaled_dot_product_attention(query[:, :, start:end], k, v, attn_mask=seen, scale=scale)
        )
    return torch.cat(parts, 2)


def _distillation(model: PreTrainedModel, run: _Run, ids: Tensor, asked: Tensor) -> Tensor:
    """Mean squared distance of the last hidden states of full and mixed heads. ids, asked: (tokens); result ()."""
    decoder: Any = model.base_model

    def hidden() -> Tensor:
        states: Tensor = decoder(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        return states[asked.to(states.device)].float()

    run.mixed = False
    with torch.no_grad():
        wanted = hidden()
    run.mixed = True
    with torch.enable_grad():
        return (hidden() - wanted).square().mean()


@contextmanager
def _frozen(model: PreTrainedModel, run: _Run, recompute: bool) -> Iterator[None]:
    """Inside this context no weight wants a gradient, no dropout is active, and the layers know their run."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if recompute and not layers:
        raise NotImplementedError(f"recompute: expected a model with layers of its kind, got {type(model).__name__}")
    with ExitStack() as undo:

        def put(module: nn.Module, **values: Any) -> None:
            own = vars(module)
            for name, value in values.items():
                undo.callback(*((own.update, {name: own[name]}) if name in own else (own.pop, name, None)))
                own[name] = value

        for weight in model.parameters():
            undo.callback(weight.requires_grad_, weight.requires_grad)
            weight.requires_grad_(False)
        for module in model.modules():
            put(module, training=False)
            if hasattr(module, "layer_idx"):
                put(module, _razor_run=run)
        for layer in layers:  # training here alone, which is what it asks for: dropout in its children stays off
            again = partial(torch_checkpoint, use_reentrant=False)
            put(layer, gradient_checkpointing=recompute, _gradient_checkpointing_func=again, training=recompute)
        yield


def _checked(sample: Any, step: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """One sample as (tokens) int64 and (tokens) bool, checked."""
    if sample is None:
        raise ValueError(f"samples: expected one for each step, got {step}")
    try:
        ids, asked = (torch.as_tensor(part) for part in sample)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"samples[{step}]: expected token ids and bools, got {type(sample).__name__}") from error
    if ids.dim() != 1 or ids.shape != asked.shape or ids.dtype != torch.int64 or asked.dtype != torch.bool:
        got = f"{list(ids.shape)} {ids.dtype} and {list(asked.shape)} {asked.dtype}"
        raise ValueError(f"samples[{step}]: expected (tokens) int64 and (tokens) bool, got {got}")
    if not asked.any():
        raise ValueError(f"samples[{step}]: expected at least one asked token, got none")
    if not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(f"samples[{step}]: expected ids from 0 to {vocab_size - 1}, got {ids.min()} to {ids.max()}")
    return ids, asked


def _positive(name: str, value: Any, *, zero: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not (0 < value < float("inf") or (zero and value == 0)):
        raise ValueError(f"{name}: expected a number {'>=' if zero else '>'} 0, got {value}")
    return float(value)


AttentionInterface.register("razor_gates", gated_attention)
AttentionMaskInterface.register("razor_gates", plain_mask)  # samples have no padding
