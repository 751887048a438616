"""Our training loop beside stock ones: tokens of the same conversations that are learnt a second.

python -m tests.benchmarks.loops [--steps 10]

    ours      loram.train: rows of 512, packed by best fit
    padded    transformers.Trainer, batches padded to their longest conversation
    grouped   the same, batches of conversations of alike length (`group_by_length`)
    trl       TRL's SFTTrainer, packing "bfd", which joins a micro-batch into one sequence
    trl_rows  the same, one packed row a micro-batch and as many micro-batches as ours has rows

SmolLM2-135M, LoRA on all linears from `loram.adapter.attach`, bf16 autocast, AdamW, clipping, no
gradient checkpointing, sdpa; loss on answers only. An optimiser step is about 1,024 positions: 2
rows of 512, or 4 conversations (of about 200 tokens). The loops take turns step by step as in
`training`; a ratio is the median of the rounds' ratios of tokens a second, padding not counted.

TRL is not among the project's dependencies:

    pip install --no-deps trl==1.16.0 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 \\
        xxhash==4.1.0

Its packing "wrapped" runs, too, but cuts conversations and lets them attend to one another.
"""

import argparse
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import (
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from loram.adapter import AdapterConfig, attach
from loram.data import IGNORED, load_tokenizer
from loram.model import load
from loram.packing import best_fit, write_packed
from tests.benchmarks import keep
from tests.benchmarks.training import (
    BASE,
    MICRO_BATCH,
    SEQ_LEN,
    Done,
    conversations,
    optimise,
    rate,
    ratio,
    side_by_side,
)

# The same for all trainers, and what our loop does.
SETTINGS: dict[str, Any] = {
    "bf16": True,
    "use_cpu": True,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 1.0,
    "gradient_checkpointing": False,
    "report_to": [],
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
}
CHATS_A_STEP = 4


def main() -> None:
    """Compare the loops."""
    if not find_spec("trl"):
        sys.exit(f"TRL is missing:\n{__doc__.split('dependencies:')[1].split('Its')[0]}")
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=10, help="timed optimiser steps a loop")
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as name:
        packed = Path(name) / "packed"
        write_packed(packed, best_fit(conversations(), SEQ_LEN), seq_len=SEQ_LEN, pad_id=0)
        turns, _ = side_by_side(
            {
                "ours": (optimise, BASE, False, packed, 1 + steps),
                "padded": (stock, "random", 1 + steps),
                "grouped": (stock, "group_by_length", 1 + steps),
                "trl": (trl, MICRO_BATCH, 1 + steps),
                "trl_rows": (trl, 1, 1 + steps),
            }
        )
    for loop, done in turns.items():
        tokens, positions = (sum(column) for column in list(zip(*done, strict=True))[:2])
        keep(
            "loops",
            loop=loop,
            steps=steps,
            tokens_per_s=round(rate(done), 1),
            ours_by_this=round(ratio(turns["ours"], done), 3),
            padding=round(1 - tokens / positions, 3),
            tokens_a_step=round(tokens / steps),
            peak_gb=round(done[-1].peak / 1e9, 2),
            trl=version("trl"),
        )


def stock(done: Done, sampling: str, steps: int) -> None:
    """transformers.Trainer with padded batches."""
    padded = DataCollatorForSeq2Seq(load_tokenizer(BASE), label_pad_token_id=IGNORED)
    with tempfile.TemporaryDirectory() as out:
        settings = TrainingArguments(
            out,
            max_steps=steps,
            per_device_train_batch_size=CHATS_A_STEP,
            train_sampling_strategy=sampling,
            **SETTINGS,
        )
        count = Count(done, padded)
        Trainer(
            attach(load(BASE), AdapterConfig()),
            settings,
            data_collator=count.collate,
            train_dataset=examples(),
            callbacks=[count],
        ).train()


def trl(done: Done, rows: int, steps: int) -> None:
    """TRL's SFTTrainer with packing; `rows` packed rows a micro-batch."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    with tempfile.TemporaryDirectory() as out:
        settings = SFTConfig(
            out,
            max_steps=steps,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=MICRO_BATCH // rows,
            max_length=SEQ_LEN,
            packing=True,
            packing_strategy="bfd",
            **SETTINGS,
        )
        trainer = SFTTrainer(
            attach(load(BASE), AdapterConfig()),
            settings,
            train_dataset=Dataset.from_list(examples()),
            processing_class=load_tokenizer(BASE),
        )
        count = Count(done, trainer.data_collator)
        trainer.data_collator = count.collate
        trainer.add_callback(count)
        trainer.train()


def examples() -> list[dict[str, list[int]]]:
    """The conversations as trainers take them, with the labels that our loop has."""
    found = []
    for ids, trained, _ in conversations():
        labels = [token if loss else IGNORED for token, loss in zip(ids, trained, strict=True)]
        found.append({"input_ids": ids.tolist(), "labels": [int(label) for label in labels]})
    return found


class Count(TrainerCallback):
    """Reports every optimiser step's tokens and positions, counted where batches are made."""

    def __init__(self, done: Done, collator: Any) -> None:
        self.done, self.collator = done, collator
        self.made: list[tuple[int, int]] = []

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(rows)
        self.made.append((sum(len(row["input_ids"]) for row in rows), batch["input_ids"].numel()))
        return batch

    def on_step_end(self, args: TrainingArguments, *_: object, **__: object) -> None:
        # The trainer makes batches ahead of the step that takes them.
        taken = self.made[: args.gradient_accumulation_steps]
        del self.made[: len(taken)]
        tokens, positions = (sum(column) for column in zip(*taken, strict=True))
        self.done(tokens, positions)


if __name__ == "__main__":
    main()
