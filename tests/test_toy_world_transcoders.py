"""The transcoders that ship do what the model card says, on text and prompts they were not trained
on.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import circuits
from circuits.models import Model
from circuits.tasks.task import Task
from circuits.transcoders.io.load import load_transcoders
from circuits.transcoders.training.quality import quality

# What is found, and not its types, is in question here; checking them takes most of the time.
pytestmark = pytest.mark.usefixtures("unchecked_types")

FOLDER = Path(circuits.__file__).parent / "assets" / "transcoders"
EXPERIMENTS = Path(__file__).parents[1] / "experiments"
L0 = {
    "toy-world-plt": (9.2, 8.3, 11.2, 5.1),
    "toy-world-skip-plt": (3.8, 4.8, 9.2, 5.1),
    "toy-world-clt": (9.4, 5.5, 9.9, 4.4),
}
"""Features that fire at a token, by layer, as the model card says."""
TASKS = ("ioi", "gendered_pronoun", "two_hop", "docstring", "induction", "greater_than")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The training script, as a module."""
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        import train_transcoders
    finally:
        sys.path.remove(str(EXPERIMENTS))
    return train_transcoders


@pytest.fixture(scope="module")
def held_out(toy_world: Model) -> dict[str, Task]:
    """Prompts of each task that are not trained on."""
    return {
        name: circuits.load_task(name, toy_world, n=50, seed=100, split="test") for name in TASKS
    }


@pytest.mark.parametrize("name", L0)
def test_they_explain_nine_tenths_of_held_out_text_with_as_few_features_as_the_card_says(
    name: str, script: ModuleType, toy_world: Model
) -> None:
    tokens, mask = script.toy_world_text(toy_world, script.Config())[1]
    found = quality(toy_world, load_transcoders(name), tokens[:64], mask[:64])
    assert (found.explained_variance >= 0.9).all(), found
    assert found.l0.tolist() == pytest.approx(L0[name], rel=0.05)


@pytest.mark.parametrize("name", L0)
def test_they_explain_nine_tenths_in_every_task_s_held_out_prompts(
    name: str, held_out: dict[str, Task], toy_world: Model
) -> None:
    transcoders = load_transcoders(name)
    for task in held_out.values():
        found = quality(toy_world, transcoders, task.clean, task.mask)
        assert (found.explained_variance >= 0.9).all(), (task.name, found)


def test_they_are_small_and_read_and_write_where_the_card_says(toy_world: Model) -> None:
    size = 0
    for name in L0:
        made = load_transcoders(name, mapped=True)
        size += sum(file.stat().st_size for file in (FOLDER / name).iterdir())
        assert (made.n_layers, made.n_features, made.d_model) == (4, 512, 128)
        assert (
            made.kind
            == {"plt": "PLT", "skip-plt": "PLT with skip", "clt": "CLT"}[
                name.removeprefix("toy-world-")
            ]
        )
        assert (made.reads, made.writes) == (
            ("residual", "residual") if name.endswith("clt") else ("mlp_input", "mlp")
        )
        assert all(
            encoder.weight.dtype == torch.bfloat16 and encoder.activation.name == "jump_relu"
            for encoder in made.encoders
        )
    assert size < 4.5e6


def test_no_prompt_that_is_trained_on_is_held_out(
    script: ModuleType, held_out: dict[str, Task], toy_world: Model
) -> None:
    """As token ids: prompts after <bos>, and anywhere in the training text."""
    learn, _ = script.toy_world_text(toy_world, script.Config())
    text = [" ".join(map(str, row.tolist())) for step in range(4) for row in learn(step)[0]]
    for task in held_out.values():
        for row, keep in zip(task.clean, task.mask, strict=True):
            assert not any(" ".join(map(str, row[keep][1:].tolist())) in one for one in text)


def test_the_script_trains_stores_and_goes_on(
    script: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(script, "HELD_OUT", 4)
    monkeypatch.setattr(script, "FAMILIES", script.FAMILIES[:1])
    settings = {
        "features": 32,
        "k": (4.0,),
        "steps": 2,
        "batch": 2,
        "threads": torch.get_num_threads(),
    }
    config = script.Config(
        kind="skip-plt", out=tmp_path, checkpoints=tmp_path / "state", **settings
    )
    script.main(config)
    first = load_transcoders(tmp_path / "toy-world-skip-plt")
    assert (
        first.kind == "PLT with skip"
        and (tmp_path / "state" / "toy-world-skip-plt.safetensors").is_file()
    )
    script.main(config)
    assert (
        load_transcoders(tmp_path / "toy-world-skip-plt").identity.weights == first.identity.weights
    )
    assert "explained_variance" in capsys.readouterr().out


def test_the_script_learns_from_a_text_file(
    script: ModuleType, tmp_path: Path, toy_world: Model
) -> None:
    (tmp_path / "text.txt").write_text(
        "The bag is near the tree. Mary saw the dog and the cat at the house. " * 60
    )
    config = script.Config(text=tmp_path / "text.txt", length=16, batch=3)
    learn, (tokens, mask) = script.text_of_file(toy_world, config)
    assert (
        tokens.shape == (script.HELD_OUT, 16)
        and mask.all()
        and (tokens[:, 0] == toy_world.tokenizer.bos_token_id).all()
    )
    assert learn(3)[0].shape == (3, 16) and torch.equal(learn(3)[0], learn(3)[0])
    with pytest.raises(circuits.InputError, match="give a longer text"):
        script.text_of_file(toy_world, script.Config(text=tmp_path / "text.txt", length=1000))
