# SPDX-License-Identifier: Apache-2.0
"""The command `razor`: arguments and exit codes. What a sub-command does stands in command.py.

Bad input ends with exit code 2 and one line, `razor: <argument>: expected <what>, got <actual>`; other failures with 1.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import __version__, command
from .alibi import RULES

_FORM = re.compile(r"[^\n]+?: expected .*, got ", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: without the program's name; None: this process's.
    Returns:
        The exit code: 0, 1 failure, 2 bad input, 130 interrupted.
    """
    arguments = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"razor: warning: {message}", file=sys.stderr)
            arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("razor: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if getattr(arguments, "traceback", False):
            raise
        formed = _FORM.match(str(error))
        print(f"razor: {error}" if formed else f"razor: {type(error).__name__}: {error}", file=sys.stderr)
        return 2 if formed and isinstance(error, ValueError | TypeError | NotImplementedError) else 1
    return 0


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors have our form."""

    def error(self, message: str) -> NoReturn:
        if choice := re.fullmatch(r"argument (.*): invalid choice: (.*) \(choose from (.*)\)", message):
            known = choice[3].replace("'", "")  # quoted in some versions of Python
            self.exit(2, f"razor: {choice[1]}: expected one of {known}, got {choice[2]}\n")
        for pattern, form in (
            (r"the following arguments are required: (.*)", r"\1: expected a value, got none"),
            (r"one of the arguments (.*) is required", r"\1: expected one of them, got none"),
            (r"unrecognized arguments: (.*)", r"arguments: expected those that --help shows, got \1"),
            (r"argument (.*): not allowed with argument (.*)", r"\1: expected to stand without \2, got both"),
            (r"argument (.*): (expected [^,]*)", r"\1: \2, got none"),
            (r"argument (.*)", r"\1"),
        ):
            if re.fullmatch(pattern, message):
                self.exit(2, f"razor: {re.sub(pattern, form, message)}\n")
        self.exit(2, f"razor: {message}\n")


def _integer(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"-?\d+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected an integer >= {least}, got {text!r}")
        return int(text)

    return parse


def _share(text: str) -> float:
    if not re.fullmatch(r"[01](\.0*)?|0?\.\d+", text):
        raise argparse.ArgumentTypeError(f"expected a number in 0..1, got {text!r}")
    return float(text)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number >= 0, got {text!r}")
    return int(value) if value.is_integer() else value


def _positive_share(text: str) -> float:
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number in (0, 1], got {text!r}")
    return value


def _source(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"expected a file, got {text!r}")
    return Path(text)


def _target(text: str) -> Path:  # checked before the work, not after it
    if Path(text).is_dir() or not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in an existing folder, got {text!r}")
    return Path(text)


def _place(text: str) -> Path:
    if not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file or folder in an existing folder, got {text!r}")
    return Path(text)


def _pattern(text: str) -> Path:
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(
            f"expected DuoAttention's folder or its full_attention_heads.tsv, got {text!r}"
        )
    return Path(text)


def _folder(text: str) -> Path:
    if Path(text).exists() and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, got the file {text!r}")
    return Path(text)


def _checkpoint(text: str) -> Path:
    if not (Path(text) / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"expected a folder with a transformers checkpoint, got {text!r}")
    return Path(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="razor", description="Head-wise KV-cache compression for LLMs.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"razor-attention {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], None], text: str, example: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example:\n  razor {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        made.add_argument("--traceback", action="store_true", help="show where an error comes from")
        made.set_defaults(run=run)
        return made

    model: dict[str, Any] = {"type": _checkpoint, "metavar": "MODEL", "help": "folder with a transformers checkpoint"}
    made = add(
        "heads", command.heads, "find the retrieval heads of a model", "my-model --out heads.pt --plot heads.png"
    )
    made.add_argument("model", **model)
    made.add_argument(
        "--out", type=_target, default=Path("heads.pt"), help="heads file, msmodelslim's format (default: heads.pt)"
    )
    made.add_argument("--scores", type=_target, help="also write the scores of all heads, JSON")
    made.add_argument("--plot", type=_target, help="also draw the scores, PNG")
    text = "random tokens of the probe (default: 2500, or what fits the model's positions)"
    made.add_argument("--period", type=_integer(1), help=text)
    made.add_argument("--repeats", type=_integer(2), default=4, help="how often they are repeated (default: 4)")
    made.add_argument("--seed", type=_integer(0), default=0, help="of the random tokens (default: 0)")
    made.add_argument(
        "--induction-ratio", type=_share, default=0.14, help="share of kv heads chosen by induction (default: 0.14)"
    )
    made.add_argument(
        "--echo-ratio", type=_share, default=0.01, help="share of kv heads chosen by echo (default: 0.01)"
    )
    made.add_argument(
        "--dtype", choices=command.DTYPES, default="auto", help="of the weights (default: auto, as stored)"
    )

    made = add(
        "windows",
        command.windows,
        "find how far back the heads of an ALiBi model read",
        "my-model --method calibrated --theta 1e-3 --per-layer --text book.txt --out win.pt",
    )
    made.add_argument("model", **model)
    made.add_argument(
        "--out", type=_target, default=Path("win.pt"), help="windows file, msmodelslim's format (default: win.pt)"
    )
    made.add_argument("--plot", type=_target, help="also draw the windows, PNG")
    text = "rule: calibrated (recommended) reads a text, the others weights (default: msmodelslim, its integers)"
    made.add_argument("--method", choices=(*RULES, "calibrated"), default="msmodelslim", help=text)
    text = "attention beyond a window: of one token, for calibrated of all together (default: 1e-5)"
    made.add_argument("--theta", type=_positive_share, default=1e-5, help=text)
    text = "margin on the logits; msmodelslim and per_head only (default: 100)"
    made.add_argument("--alpha", type=_number, default=100, help=text)
    made.add_argument("--per-layer", action="store_true", help="windows of each layer; not with msmodelslim")
    text = "text that the model reads: calibrated takes its windows from it; others are told what they drop of it"
    made.add_argument("--text", type=_source, metavar="FILE", help=text)
    made.add_argument("--tokens", type=_integer(2), default=4096, help="most of them that are read (default: 4096)")
    made.add_argument("--dtype", choices=command.DTYPES, default="auto", help="in which the text is read")

    made = add(
        "gates", command.gates, "train DuoAttention's gates, a choice of heads", "my-model --text book.txt --out gates"
    )
    made.add_argument("model", **model)
    made.add_argument("--out", type=_folder, default=Path("gates"), help="DuoAttention's folder (default: gates)")
    group = made.add_mutually_exclusive_group(required=True)
    group.add_argument("--text", type=_source, metavar="FILE", help="text that passkeys are hidden in")
    text = 'JSON lines {"prompt": ..., "answer": ...} that need far tokens, one a step'
    group.add_argument("--samples", type=_source, metavar="FILE", help=text)
    made.add_argument("--sink-size", type=_integer(0), default=128, help="of the compressed half (default: 128)")
    made.add_argument("--window-size", type=_integer(1), default=256, help="likewise (default: 256)")
    made.add_argument("--steps", type=_integer(1), default=2000, help="optimiser steps (default: 2000)")
    made.add_argument("--learning-rate", type=_number, default=0.02, help="highest one (default: 0.02)")
    made.add_argument("--l1", type=_number, default=0.05, help="weight of the mean gate in the loss (default: 0.05)")
    made.add_argument("--seed", type=_integer(0), default=0, help="of the passkeys (default: 0)")
    made.add_argument("--checkpoint", type=_target, help="state of training; where it exists training goes on")
    made.add_argument("--recompute", action="store_true", help="less memory, more time: for large models")
    made.add_argument("--dtype", choices=command.DTYPES, default="auto", help="of the weights (default: auto)")

    made = add("plan", command.plan, "make a plan", "--heads heads.pt --model my-model --out plan.json")
    group = made.add_mutually_exclusive_group(required=True)
    group.add_argument("--heads", type=_source, help="retrieval heads, .pt, .json or MindIE's .py: these are full")
    text = "scores of all heads (razor heads --scores): the highest that --budget pays for are full"
    group.add_argument("--scores", type=_source, help=text)
    group.add_argument("--windows", type=_source, help="window of each head of an ALiBi model, .pt")
    text = "DuoAttention's folder, or its full_attention_heads.tsv: the highest gates are full"
    group.add_argument("--gates", type=_pattern, help=text)
    group.add_argument("--streaming", action="store_true", help="no head is full (StreamingLLM)")
    group.add_argument("--full", action="store_true", help="every head is full")
    made.add_argument("--out", type=_target, default=Path("plan.json"), help="plan file (default: plan.json)")
    made.add_argument("--model", **model)
    made.add_argument("--budget", type=_share, help="share of the full cache's bytes to stay within; scores only")
    made.add_argument("--length", type=_integer(1), help="tokens at which the budget holds; scores only")
    made.add_argument("--layers", type=_integer(1), help="layers of the model, if it is not given")
    made.add_argument("--kv-heads", type=_integer(1), help="kv heads of each layer, likewise")
    made.add_argument(
        "--sink-size", type=_integer(0), help="first tokens kept (default: 4; gates: their folder's, else 64)"
    )
    text = "last tokens kept (default: 4000; gates: their folder's, else 256)"
    made.add_argument("--window-size", "--min-window", type=_integer(0), help=text)
    made.add_argument(
        "--window-fraction", type=_share, help="of the prompt, if that is more; heads and scores (default: 0.2)"
    )
    text = "do without the row that stands for dropped tokens; heads and scores"
    made.add_argument("--no-compensation", action="store_const", const=True, help=text)
    made.add_argument(
        "--sparsity",
        type=_share,
        help="share of compressed heads; gates only (default: what gates of 0 and 1 say, else 0.5)",
    )

    made = add("inspect", command.inspect, "tell what a file of ours holds", "plan.json --length 4096 32768")
    made.add_argument("file", type=_source, metavar="FILE", help="plan, scores, heads or windows")
    made.add_argument(
        "--length", type=_integer(1), nargs="+", default=command.LENGTHS, help="tokens at which sizes are shown"
    )

    made = add(
        "export",
        command.export,
        "write a plan in the form of another runtime",
        "plan.json --to atb --length 32768 --head-dim 128 --out atb.pt",
    )
    made.add_argument("plan", type=_source, metavar="PLAN", help="plan file")
    text = "ATB's tensors, MindIE-LLM's head table, Golden Stick's heads or DuoAttention's folder"
    made.add_argument("--to", choices=command.TARGETS, required=True, help=text)
    made.add_argument("--out", type=_place, required=True, help="file to write: .pt, .py, .json; duo: a folder")
    text = "prompt lengths, tokens; for golden-stick and duo one, where the plan has a length rule"
    made.add_argument("--length", type=_integer(1), nargs="+", help=text)
    made.add_argument("--model-type", metavar="NAME", help="mindie: of the model's config.json")
    made.add_argument("--head-dim", type=_integer(1), help="atb: elements of a key")
    made.add_argument("--scale", type=_number, help="atb: factor on q.k (default: head_dim ** -0.5)")
    made.add_argument("--block-size", type=_integer(16), help="atb: tokens in a block (default: 128)")
    made.add_argument("--max-new-tokens", type=_integer(0), help="atb: room behind each prompt (default: 256)")
    text = "atb: what gives a mean its weight: atb (default) as the paper has it, mindie and none as these do"
    made.add_argument("--offset", choices=command.OFFSETS, help=text)
    made.add_argument("--alibi", action="store_const", const=True, help="atb: an ALiBi model, windows alone")

    made = add(
        "generate", command.generate, "generate text with a compressed cache", "my-model --plan plan.json --prompt Hi"
    )
    made.add_argument("model", **model)
    made.add_argument("--plan", type=_source, required=True, help="plan file")
    group = made.add_mutually_exclusive_group(required=True)
    group.add_argument("--prompt", metavar="TEXT", help="the prompt")
    group.add_argument("--prompt-file", type=_source, metavar="FILE", help="file with the prompt")
    group.add_argument("stdin", nargs="?", choices=("-",), metavar="-", help="read the prompt from standard input")
    made.add_argument("--max-new-tokens", type=_integer(1), default=64, help="tokens to generate (default: 64)")
    text = (
        "dense (default): the prompt reads itself in full; streaming: by the plan, faster, any chunking gives the same"
    )
    made.add_argument("--prefill", choices=("dense", "streaming"), default="dense", help=text)
    text = "how keys and values are stored: about half or a quarter of 16-bit floats (default: as the model computes)"
    made.add_argument("--kv", choices=("int8", "int4"), help=text)
    text = "with --kv: first and newest tokens that are also kept as the model computes them (default: 0 0)"
    made.add_argument("--exact", nargs=2, type=_integer(0), default=(0, 0), metavar=("SINK", "WINDOW"), help=text)
    made.add_argument("--chunk", type=_integer(1), help="tokens of the prompt in one call (default: all)")
    made.add_argument("--compare", action="store_true", help="also generate with the full cache")

    made = add(
        "eval",
        command.evaluate,
        "ask a model what it still finds with caches of the same size",
        "my-model --tasks needle multikey --lengths 4096 --budget 0.2 0.3 --out results",
    )
    made.add_argument("model", **model)
    made.add_argument("--out", type=_folder, default=Path("razor-eval"), help="folder of results (default: razor-eval)")
    text = "of needle, multikey, tracking, copy, multiturn, perplexity (default: needle multikey)"
    made.add_argument("--tasks", nargs="+", default=["needle", "multikey"], metavar="TASK", help=text)
    text = "tokens of the prompts (default: 4096)"
    made.add_argument("--lengths", type=_integer(64), nargs="+", default=[4096], metavar="N", help=text)
    text = "shares of the full cache's bytes (default: 0.2 0.3)"
    made.add_argument("--budget", type=_positive_share, nargs="+", default=[0.2, 0.3], metavar="SHARE", help=text)
    text = (
        "full, streaming, random, razor, razor-echo, razor-induction, the last three also with -uncompensated, "
        "duo=FOLDER, plan=FILE; of kvpress, if installed, snapkv, expected-attention, both also with -asked: dropping "
        "tokens when the question is known (default: full streaming random razor razor-uncompensated)"
    )
    names = ["full", "streaming", "random", "razor", "razor-uncompensated"]
    made.add_argument("--methods", nargs="+", default=names, metavar="METHOD", help=text)
    text = (
        "formats of the cached rows, of model, int8, int4: each method keeps its plan in all of them (default: model)"
    )
    made.add_argument("--kv", nargs="+", default=["model"], metavar="FORMAT", help=text)
    made.add_argument("--samples", type=_integer(1), default=20, help="of each task, length and depth (default: 20)")
    made.add_argument("--seed", type=_integer(0), default=0, help="of the samples (default: 0)")
    made.add_argument("--depths", type=_integer(1), default=5, help="places of the needle (default: 5)")
    made.add_argument("--text", type=_source, metavar="FILE", help="what perplexity reads")
    made.add_argument(
        "--task-file", type=_source, metavar="FILE", help="sentences of the tasks, JSON (default: English)"
    )
    text = "scores of all heads, JSON (default: find them, as razor heads does)"
    made.add_argument("--scores", type=_source, metavar="FILE", help=text)
    made.add_argument("--sink-size", type=_integer(0), default=4, help="first tokens kept (default: 4)")
    text = "least window of heads that are not full; what a budget leaves widens it (default: 60)"
    made.add_argument("--window-size", type=_integer(1), default=60, help=text)
    made.add_argument("--prefill", choices=("dense", "streaming"), default="dense", help="as of generate")
    made.add_argument("--dtype", choices=command.DTYPES, default="auto", help="of the weights (default: auto)")

    made = add("demo", command.demo, "try two small models with full and compressed caches", "--length 4096 8192")
    made.add_argument(
        "--out", type=_folder, default=Path("razor-demo"), help="folder for its files (default: razor-demo)"
    )
    text = "tokens of the prompts, of ALiBi's texts up to 4096 (default: 4096 8192)"
    made.add_argument("--length", type=_integer(1), nargs="+", default=[4096, 8192], help=text)
    made.add_argument("--questions", type=_integer(1), default=20, help="of each length (default: 20)")
    made.add_argument("--model", type=_checkpoint, help="folder of another model made by bench/train_model.py")

    made = add("bench", command.bench, "time attention and head scores on this machine, in a minute", "--threads 1")
    made.add_argument("--threads", type=_integer(1), default=0, help="threads of torch (default: its own choice)")
    return parser
