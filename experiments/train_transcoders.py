"""Trains transcoders of the embedded model, or of any other, and says how they do on text they were
not trained on.

    python experiments/train_transcoders.py                               # the three sets that
    ship: 10 to 30 minutes each on one CPU core
    python experiments/train_transcoders.py --kind plt --k 8 --out /elsewhere
    python experiments/train_transcoders.py --model gpt2 --text corpus.txt --features 6144 --k 32
    --steps 10000 --out /elsewhere

Killed and started again with the same settings, it goes on from its last checkpoint. Expected at
the end: what the model card says.
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
    """What is trained, on what."""

    kind: Literal["all", "plt", "skip-plt", "clt"] = "all"
    """Per layer, per layer with a skip, cross-layer, or one after the other."""
    model: str = EMBEDDED
    """A name or a folder."""
    text: Path | None = None
    """A text file to train on; its last tenth is held out. Without, toy-world's own text."""
    out: Path | None = None
    """The sets go into folders there, named after model and kind.

    None: where those that ship are, or for another model runs/transcoders/trained.
    """
    checkpoints: Path = Path("runs/transcoders")
    """Where the state of training is kept."""
    features: int = 512
    """Features in each layer."""
    k: tuple[float, ...] | None = None
    """How many features fire at a token, on average: one number, or one for each layer. None: as in
    the sets that ship, for toy-world alone.
    """
    steps: int | None = None
    """None: as in the sets that ship."""
    batch: int = 24
    """Sequences in a step."""
    length: int = 64
    """Tokens in a sequence."""
    learning_rate: float = 4e-3
    """At its highest."""
    dead_after: int = 15_000
    """A feature that has not fired for so many tokens is dead.

    More for text in which features may be rarer than in toy-world's.
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
    """Print how the stored set does on held-out text, and on the tasks' held-out prompts."""
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
    """Sequences that begin with a task's prompt of the train split and go on with the text
    toy-world learned from; and held-out ones,
    prompts of the test split one after the other."""
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
    """Words as tokens after <bos>, cut at `length`: all are real."""
    rows = [
        [model.tokenizer.bos_token_id, *model.tokenizer.convert_tokens_to_ids(words)][:length]
        for words in texts
    ]
    return torch.tensor(rows), torch.ones(len(rows), length, dtype=torch.bool)


def text_of_file(model: Model, config: Config) -> tuple[Batches, tuple[Tensor, Tensor]]:
    """Stretches of the first nine tenths of a file, each after <bos> where the model expects it;
    and held-out ones, of its last tenth.
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
