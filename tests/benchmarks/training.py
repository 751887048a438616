"""LoRA, QLoRA, LoRAM and QLoRAM on one model and the same packed rows, side by side.

python -m tests.benchmarks.training [--steps 8]

SmolLM2-135M; LoRAM is pruned as in the paper (0.65, the first 4 and last 2 layers whole; Rand,
which gives the shapes of Stru). The methods take turns step by step, each in a process of its own,
so that what else the machine does falls on all alike; a ratio is the median of the rounds' ratios.

FLOPs of training LoRA, a token, forward and backward; a multiplication and an addition are two:

    4 n          n weights of every frozen linear: its output, the gradient of its input
    6 r (i + o)  LoRA factors of a linear from i to o: outputs, gradients of inputs and of factors
    12 T q       attention of a layer, rows of T tokens, heads of q dimensions together: two
                 products forward, four backward; what the mask hides is computed, too
    4 V h t      output head, h to V, at the share t of tokens that are trained

Turning NF4 into bf16 counts as nothing: QLoRA has the FLOPs of LoRA. Memory is the peak while
training, once all of the process (`peak_gb`) and once without its libraries (`memory_gb`).
"""

import argparse
import ctypes
import json
import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import NamedTuple

from transformers import PreTrainedConfig

from loram.adapter import AdapterConfig, attach
from loram.data import Document, encode_chat, load_tokenizer
from loram.model import load, read_config
from loram.packing import Packed, batches, best_fit, order, write_packed
from loram.plan import lora_parameters, meta_model, size
from loram.prune import PruneConfig, choose, prune
from loram.taylor import random_scores
from loram.train import TrainConfig, train
from pipelines.assets import MODEL, home
from tests.benchmarks import keep

BASE = home() / "assets" / MODEL
SEQ_LEN, MICRO_BATCH = 512, 2  # positions of a row, rows of an optimiser step


class Turn(NamedTuple):
    """One optimiser step. tokens: without padding. peak: bytes, the highest so far in training."""

    tokens: int
    positions: int
    seconds: float
    peak: int


Done = Callable[[int, int], None]  # a step is done, of so many tokens and positions


def main() -> None:
    """Compare the four methods."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=8, help="timed optimiser steps a method")
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        rows = list(best_fit(conversations(), SEQ_LEN))
        info = write_packed(root / "packed", rows, seq_len=SEQ_LEN, pad_id=0)
        config = read_config(BASE)
        kept = choose(random_scores(config, 0), config, PruneConfig(method="rand", ratio=0.65))
        prune(BASE, root / "pruned", kept)
        methods = {
            f"{'q' * nf4}{method}": (optimise, model, nf4, root / "packed", 1 + steps)
            for nf4 in (False, True)
            for method, model in (("lora", BASE), ("loram", root / "pruned"))
        }
        turns, libraries = side_by_side(methods)
        share = info["trained_tokens"] / (info["rows"] * SEQ_LEN)
        pruned = flops(read_config(root / "pruned"), share) / flops(config, share)
    memory = {method: turns[method][-1].peak - libraries[method] for method in methods}
    for method in methods:
        work = pruned if method.endswith("loram") else 1.0
        full = "lora" if method in ("lora", "loram") else "qlora"  # the same without pruning
        speed = ratio(turns[method], turns["lora"])
        keep(
            "training",
            method=method,
            steps=steps,
            tokens_per_s=round(rate(turns[method]), 1),
            speed_ratio=round(speed, 3),
            flop_ratio=round(work, 3),
            speed_by_flops=round(speed * work, 3),
            speed_by_flops_of_unpruned=round(ratio(turns[method], turns[full]) * work, 3),
            peak_gb=round(turns[method][-1].peak / 1e9, 3),
            memory_gb=round(memory[method] / 1e9, 3),
            memory_ratio=round(memory[method] / memory["lora"], 3),
        )


def conversations(limit: int = 1000) -> list[Document]:
    """Real word problems with their answers, as the model's chat template writes them."""
    tokenizer = load_tokenizer(BASE)
    with (home() / "assets" / "gsm_train.jsonl").open() as file:
        chats = [json.loads(line)["messages"] for _, line in zip(range(limit), file, strict=False)]
    return [encode_chat(chat, tokenizer, SEQ_LEN) for chat in chats]


def flops(config: PreTrainedConfig, trained: float) -> float:
    """Of training LoRA, a token (the formula is above); trained: share of tokens with a loss."""
    adapter = AdapterConfig()
    heads = sum(layer.self_attn.q_proj.out_features for layer in meta_model(config).model.layers)
    return (
        4 * (size(config).linears + size(config).stand_ins)
        + 6 * lora_parameters(config, adapter)
        + 12 * SEQ_LEN * heads
        + 4 * config.vocab_size * config.hidden_size * trained
    )


def optimise(done: Done, model: Path, nf4: bool, rows: Path, steps: int) -> None:
    """Our loop, `steps` optimiser steps of one micro-batch."""
    packed = Packed(rows)
    lengths = used(packed)
    config = TrainConfig(steps, lr=1e-3, global_batch=MICRO_BATCH, seq_len=SEQ_LEN)
    ids = order(packed.rows, steps * MICRO_BATCH, seed=0)
    adapted = attach(load(model, nf4=nf4), AdapterConfig())
    for log in train(adapted, batches(packed, ids, MICRO_BATCH), config):
        done(sum(lengths[row] for row in log.rows), log.tokens)


def used(packed: Packed) -> list[int]:
    """Tokens of every row that are not padding, which is the row's last document, id 0."""
    ids = packed.fetch(range(packed.rows))["input_ids"]
    return [int(row.nonzero()[0].max()) + 1 for row in ids]


def side_by_side(methods: dict[str, tuple]) -> tuple[dict[str, list[Turn]], dict[str, int]]:
    """Run the methods, each in a process, so that one at a time does one optimiser step.

    Args:
        methods: by name a function and its arguments, both picklable. It is called with `done`
            before them, and calls that after every step; all take equally many steps.

    Returns:
        Every method's steps but the first, which warms up; bytes resident before its call.
    """
    fresh = multiprocessing.get_context("spawn")
    turns: dict[str, list[Turn]] = {name: [] for name in methods}
    libraries, pipes, running = {}, {}, dict.fromkeys(methods)
    for name, call in methods.items():
        pipes[name], end = fresh.Pipe()
        process = fresh.Process(target=_take_turns, args=(end, *call), daemon=True)
        process.start()
        end.close()
        libraries[name] = pipes[name].recv()
        pipes[name].recv()
    while running:
        for name in list(running):
            pipes[name].send("go")
            try:
                turns[name].append(pipes[name].recv())
            except EOFError:  # all its steps are done
                del running[name]
    return turns, libraries


def _take_turns(pipe: Connection, method: Callable, *arguments: object) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    pipe.send(_resident("VmRSS"))
    began = time.perf_counter()

    def done(tokens: int, positions: int) -> None:
        nonlocal began
        seconds = time.perf_counter() - began
        peak = _resident("VmHWM")
        ctypes.CDLL(None).malloc_trim(0)  # who waits holds no more than the model
        pipe.send(Turn(tokens, positions, seconds, peak))
        pipe.recv()
        began = time.perf_counter()

    method(done, *arguments)


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", status)[1])


def rate(turns: list[Turn]) -> float:
    """Tokens a second, the median of the steps."""
    return median(turn.tokens / turn.seconds for turn in turns)


def ratio(ours: list[Turn], other: list[Turn]) -> float:
    """Of tokens a second, the median over the rounds."""
    return median(
        a.tokens / a.seconds / (b.tokens / b.seconds) for a, b in zip(ours, other, strict=True)
    )


if __name__ == "__main__":
    main()
