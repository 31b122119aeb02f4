"""Train transcoders of toy-world, or of another model, and evaluate them on held-out text.

    python experiments/train_transcoders.py
    python experiments/train_transcoders.py --kind plt --k 8 --out /elsewhere
    python experiments/train_transcoders.py --model gpt2 --text corpus.txt --features 6144 \\
        --k 32 --steps 10000 --out /elsewhere

The first command trains the three sets that ship with the package, in 10 to 30 minutes each on one
core. An interrupted run resumes from its last checkpoint if it is started with the same settings.
The model card says what to expect at the end.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

import torch
import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from toy_world_text import PIECE, chunks

import circuits
from circuits.models import EMBEDDED, Model
from circuits.tasks.families.docstring import Docstring
from circuits.tasks.families.gendered_pronoun import GenderedPronoun
from circuits.tasks.families.greater_than import GreaterThan
from circuits.tasks.families.induction import Induction
from circuits.tasks.families.ioi import IOI
from circuits.tasks.families.two_hop import TwoHop
from circuits.tasks.prompts import Split, split_of
from circuits.transcoders.io.load import load_transcoders
from circuits.transcoders.io.save import save_transcoders
from circuits.transcoders.training.parameters import TranscoderKind
from circuits.transcoders.training.quality import quality
from circuits.transcoders.training.train import Batches, Training, train_transcoders

FAMILIES = (IOI(), GenderedPronoun(), TwoHop(), Docstring(), Induction(), GreaterThan())
SHIPPED: dict[TranscoderKind, tuple[tuple[float, ...], int]] = {
    "plt": ((11, 11, 12, 5), 3500),
    "skip-plt": ((4, 6, 10, 5), 3500),
    "clt": ((11, 8, 10, 5), 2500),
}
"""k by layer and steps of the sets that ship with the package."""
HELD_OUT = 256
"""Sequences of held-out text."""


@dataclass(frozen=True)
class Config:
    """Model, text and settings."""

    kind: Literal["all", "plt", "skip-plt", "clt"] = "all"
    """Per layer, per layer with a skip, cross-layer, or all three."""
    model: str = EMBEDDED
    """Model name or folder."""
    text: Path | None = None
    """Text file to train on; its last tenth is held out. None takes toy-world's text."""
    out: Path | None = None
    """Output folder; each set gets a folder named after model and kind.

    None writes over the sets that ship, or for another model into runs/transcoders/trained.
    """
    checkpoints: Path = Path("runs/transcoders")
    """Folder of the checkpoint."""
    features: int = 512
    """Features in each layer."""
    k: tuple[float, ...] | None = None
    """Mean number of active features per token: one number, or one per layer.

    None takes that of the sets that ship, for toy-world only.
    """
    steps: int | None = None
    """None takes that of the sets that ship."""
    batch: int = 24
    """Sequences per step."""
    length: int = 64
    """Tokens per sequence."""
    learning_rate: float = 4e-3
    """Peak learning rate."""
    dead_after: int = 15_000
    """A feature that has not fired for this many tokens counts as dead.

    Raise it for text with rarer features than toy-world's.
    """
    seed: int = 0
    device: str = "cpu"
    threads: int = 1
    """CPU threads."""


def main(config: Config) -> None:
    if config.model != EMBEDDED and config.k is None:
        raise circuits.InputError(
            f"how many features should fire at a token in {config.model}? Give --k, one number or "
            f"one for each layer."
        )
    torch.set_num_threads(config.threads)
    out = config.out or Path(
        "circuits/assets/transcoders" if config.model == EMBEDDED else "runs/transcoders/trained"
    )
    model = circuits.load_model(config.model, device=config.device)
    learn, held_out = (
        toy_world_text(model, config) if config.text is None else text_of_file(model, config)
    )
    for kind in SHIPPED if config.kind == "all" else (config.kind,):
        (k, steps), name = SHIPPED[kind], f"{Path(config.model).name}-{kind}"
        same = {
            "learning_rate": config.learning_rate,
            "dead_after": config.dead_after,
            "seed": config.seed,
        }
        settings = Training(
            kind, config.features, k=config.k or k, steps=config.steps or steps, **same
        )
        with Progress(
            TextColumn(name),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
        ) as bars:
            bar = bars.add_task("train", total=settings.steps, loss="")
            checkpoint = config.checkpoints / f"{name}.safetensors"
            show = lambda done, loss: bars.update(bar, completed=done, loss=f"loss {loss:.3f}")  # noqa: B023, E731
            trained = train_transcoders(
                model, learn, settings, checkpoint=checkpoint, progress=show
            )
        save_transcoders(trained, out / name, model_name=config.model, dtype=torch.bfloat16)
        report(model, config, out / name, held_out)


def report(model: Model, config: Config, folder: Path, held_out: tuple[Tensor, Tensor]) -> None:
    """Print how a stored set does on held-out text and on the tasks' held-out prompts."""
    transcoders = load_transcoders(folder, device=config.device)
    print(
        f"{folder}, held-out text:\n{quality(model, transcoders, *held_out).round(3).to_string()}"
    )
    for family in FAMILIES if config.text is None else ():
        task = circuits.load_task(family.name, model, n=250, seed=100, split="test")
        columns = quality(model, transcoders, task.clean, task.mask).round(3).to_dict("list")
        print(
            f"{family.name:17s}",
            *(f"{name} {columns[name]}" for name in ("explained_variance", "l0")),
        )


def toy_world_text(model: Model, config: Config) -> tuple[Batches, tuple[Tensor, Tensor]]:
    """Training sequences and held-out sequences.

    The former begin with a task's prompt of the train split and continue with toy-world's training
    text. The latter are prompts of the test split, one after the other.
    """
    if config.model != EMBEDDED:
        raise circuits.InputError(
            f"this text is {EMBEDDED}'s; give one for {config.model} with --text."
        )

    def learn(step: int) -> tuple[Tensor, Tensor]:
        random = Random(f"transcoders-{config.seed}-{step}")
        rest = (
            [word for chunk in chunks(random, config.length) for word in chunk.words]
            for _ in range(config.batch)
        )
        return encoded(model, [[*prompt(random, "train"), *words] for words in rest], config.length)

    random = Random("held-out text for transcoders")
    held_out = [
        [word for _ in range(config.length // 8) for word in prompt(random, "test")]
        for _ in range(HELD_OUT)
    ]
    return learn, encoded(model, held_out, config.length)


def prompt(random: Random, split: Split) -> list[str]:
    """The words of a task's prompt, corrupted one time in three, and of its answer."""
    family = random.choice(FAMILIES)
    while {split_of((pair := family.draw(random)).clean), split_of(pair.corrupted)} != {split}:
        pass
    return re.findall(
        PIECE,
        f"{random.choice((pair.clean, pair.clean, pair.corrupted))} {random.choice(pair.answers)} "
        f".",
    )


def encoded(model: Model, texts: list[list[str]], length: int) -> tuple[Tensor, Tensor]:
    """Words as tokens after <bos>, cut at `length`, and a mask that is true everywhere."""
    rows = [
        [model.tokenizer.bos_token_id, *model.tokenizer.convert_tokens_to_ids(words)][:length]
        for words in texts
    ]
    return torch.tensor(rows), torch.ones(len(rows), length, dtype=torch.bool)


def text_of_file(model: Model, config: Config) -> tuple[Batches, tuple[Tensor, Tensor]]:
    """Training sequences from the first nine tenths of a file, and held-out ones from its last
    tenth.

    Each begins with <bos> if the model expects it.
    """
    ids = torch.tensor(
        model.tokenizer(config.text.read_text(encoding="utf-8"), add_special_tokens=False)[
            "input_ids"
        ]
    )
    bos = torch.tensor(
        [model.tokenizer.bos_token_id] if model.cfg.default_prepend_bos else [], dtype=torch.long
    )
    width, cut = config.length - len(bos), len(ids) * 9 // 10
    if len(ids) - cut <= width:
        raise circuits.InputError(
            f"{config.text} has {len(ids)} tokens; give a longer text or a smaller --length."
        )

    def draw(random: Random, part: range, n: int) -> tuple[Tensor, Tensor]:
        tokens = torch.stack(
            [torch.cat([bos, ids[start : start + width]]) for start in random.choices(part, k=n)]
        )
        return tokens, torch.ones_like(tokens, dtype=torch.bool)

    held_out = draw(Random("held-out text for transcoders"), range(cut, len(ids) - width), HELD_OUT)
    return lambda step: draw(
        Random(f"transcoders-{config.seed}-{step}"), range(cut - width), config.batch
    ), held_out


if __name__ == "__main__":
    main(tyro.cli(Config))
