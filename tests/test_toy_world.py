"""The embedded model does what its model card says, on prompts it was not trained on."""

import copy
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open

import circuits
from circuits.models import Model
from circuits.models.loading.saved import parts_of
from circuits.running.run import model_logits
from circuits.tasks.task import Task

# What is found, and not its types, is in question here; checking them takes most of the time.
pytestmark = pytest.mark.usefixtures("unchecked_types")

FOLDER = Path(circuits.__file__).parent / "assets" / "toy-world"
EXPERIMENTS = Path(__file__).parents[1] / "experiments"
N = 250
LEAST_ACCURACY = {
    "ioi": 0.99,
    "gendered_pronoun": 0.99,
    "two_hop": 0.99,
    "induction": 0.95,
    "docstring": 0.95,
}


@pytest.fixture(scope="module")
def model() -> Model:
    return circuits.load_model("toy-world", device="cpu")


@pytest.fixture(scope="module")
def training() -> ModuleType:
    """The training script, as a module."""
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        import train_toy_world
    finally:
        sys.path.remove(str(EXPERIMENTS))
    return train_toy_world


def answer_probability(model: Model, task: Task) -> float:
    """The probability of the answers together, mean over prompts."""
    assert task.row_answers is not None
    probabilities = model_logits(model, task).softmax(-1).gather(-1, task.row_answers.clamp(min=0))
    return probabilities.masked_fill(task.row_answers < 0, 0).sum(-1).mean().item()


@pytest.mark.parametrize("name", LEAST_ACCURACY)
def test_held_out_prompts_are_completed_right(name: str, model: Model) -> None:
    task = circuits.load_task(name, model, n=N, seed=100)
    logits = model_logits(model, task)
    assert circuits.METRICS["accuracy"](logits, logits, task).mean() >= LEAST_ACCURACY[name]


def test_ioi_is_completed_right_for_both_corruptions_prompts_in_either_order(model: Model) -> None:
    task = circuits.load_task("ioi", model, n=N, seed=101, corruption="swapped")
    clean, corrupted = model_logits(model, task), model_logits(model, task, "corrupted")
    assert circuits.METRICS["accuracy"](clean, clean, task).mean() >= 0.99
    # S2 replaced by the IO name: now the former subject is the one that is not repeated.
    assert task.row_wrong_answers is not None
    assert (corrupted.argmax(-1) == task.row_wrong_answers[:, 0]).float().mean() >= 0.99


def test_nine_tenths_of_the_probability_is_on_valid_years(model: Model) -> None:
    assert (
        answer_probability(model, circuits.load_task("greater_than", model, n=N, seed=100)) >= 0.9
    )


def test_the_corrupted_prompts_take_the_answers_away(model: Model) -> None:
    for name in ("ioi", "gendered_pronoun", "two_hop", "induction", "docstring"):
        task = circuits.load_task(name, model, n=50)
        logits, clean = model_logits(model, task, "corrupted"), model_logits(model, task)
        assert circuits.METRICS["logit_difference"](logits, clean, task).mean() < 0.5, name
        assert circuits.METRICS["kl"](logits, clean, task).mean() > 1, name


def test_the_files_are_small_and_hold_the_size_the_card_says(model: Model) -> None:
    assert (
        model.cfg.n_layers,
        model.cfg.n_heads,
        model.cfg.d_model,
        model.cfg.d_mlp,
        model.cfg.d_head,
    ) == (4, 4, 128, 512, 32)
    assert model.cfg.normalization_type == "LN" and model.cfg.default_prepend_bos
    assert 0.8e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.0e6
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 4e6
    with safe_open(FOLDER / "model.safetensors", framework="pt") as file:
        assert not any(name.endswith((".mask", ".IGNORE")) for name in file.keys())
    assert json.loads((FOLDER / "config.json").read_text())["format"] == "circuits.model"


def test_the_training_script_makes_the_shipped_tokenizer(
    model: Model, training: ModuleType
) -> None:
    assert training.make_tokenizer().get_vocab() == model.tokenizer.get_vocab()


def test_training_interrupted_and_resumed_equals_training_without_a_break(
    training: ModuleType, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(name: str) -> object:
        settings = {
            "steps": 2,
            "refining_steps": 2,
            "batch": 2,
            "length": 24,
            "checkpoint_every": 1,
            "threads": torch.get_num_threads(),
        }
        return training.Config(
            out=tmp_path / name, checkpoint=tmp_path / f"{name}.safetensors", **settings
        )

    # Making it takes most of the time; it is checked above.
    monkeypatch.setattr(training, "make_tokenizer", lambda: copy.deepcopy(model.tokenizer))

    def make_batch_until_killed(tokenizer: object, config: object, step: int) -> object:
        if step == 2:
            raise KeyboardInterrupt
        return make_batch(tokenizer, config, step)

    training.main(config("whole"))
    make_batch = training.make_batch
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "make_batch", make_batch_until_killed)
        training.main(config("parts"))
    training.main(config("parts"))
    whole, parts = (
        parts_of(circuits.load_model(tmp_path / name, device="cpu"))[1]
        for name in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_training_text_holds_no_held_out_prompt(training: ModuleType, model: Model) -> None:
    """As words: the tokenizer does not see spaces, so neither does this."""
    held_out = {
        " ".join(model.tokenizer.tokenize(pair.clean))
        for name in (*LEAST_ACCURACY, "greater_than")
        for pair in circuits.load_task(name, model, n=N, seed=100).prompts or ()
    }
    random = training.Random("a sample of the training text")
    sequences = [
        draw(random, length)
        for draw, length in ((training.chunks, 64), (training.induction_first, 32))
        for _ in range(200)
    ]
    chunks = [chunk for sequence in sequences for chunk in sequence]
    assert not held_out & {
        " ".join(chunk.words[: chunk.predictable[-1]]) for chunk in chunks if chunk.predictable
    }
