"""Training transcoders: all kinds learn on every architecture, resuming changes nothing, and the
model stays as it was.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pandas.testing
import pytest
import torch
from architectures import VOCAB, random_model

from circuits.models import Model, weights_of
from circuits.system.errors import InputError
from circuits.transcoders.activations import JumpReLU, ReLU
from circuits.transcoders.training import train as training
from circuits.transcoders.training.parameters import (
    Normalization,
    TranscoderKind,
    TranscoderParameters,
)
from circuits.transcoders.training.quality import quality, record
from circuits.transcoders.training.train import Training, train_transcoders
from circuits.transcoders.transcoder import Transcoders

KINDS: tuple[TranscoderKind, ...] = ("plt", "skip-plt", "clt")
SMALL = Training(n_features=48, k=(6,), steps=40, learning_rate=2e-2)


def batches(step: int, prompts: int = 24, length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens, from the step alone; every third prompt is shorter."""
    tokens = torch.randint(VOCAB, (prompts, length), generator=torch.Generator().manual_seed(step))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[::3, length - 3 :] = False
    return tokens, mask


def tensors(transcoders: Transcoders) -> list[torch.Tensor]:
    """Every number of a set."""
    parts = [part for encoder in transcoders.encoders for part in (encoder.weight, encoder.bias)]
    thresholds = [
        encoder.activation.threshold
        for encoder in transcoders.encoders
        if isinstance(encoder.activation, JumpReLU)
    ]
    return [
        *parts,
        *thresholds,
        *transcoders.decoders,
        *transcoders.decoder_biases,
        *(transcoders.skips or ()),
    ]


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model("gpt2")


@pytest.fixture(scope="module")
def trained(model: Model) -> dict[TranscoderKind, Transcoders]:
    return {kind: train_transcoders(model, batches, replace(SMALL, kind=kind)) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_explained_variance_rises_with_training(
    kind: TranscoderKind, model: Model, trained: dict[TranscoderKind, Transcoders]
) -> None:
    early, late = (
        quality(model, made, *batches(999))
        for made in (
            train_transcoders(model, batches, replace(SMALL, kind=kind, steps=3)),
            trained[kind],
        )
    )
    assert (late.explained_variance > early.explained_variance + 0.05).all()
    assert (late.explained_variance > 0.4).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "pythia", "no_norms"])
def test_all_kinds_learn_on_other_architectures(architecture: str, kind: TranscoderKind) -> None:
    model = random_model(architecture)
    made = train_transcoders(model, batches, replace(SMALL, kind=kind, steps=20))
    assert (quality(model, made, *batches(999)).explained_variance > 0.15).all()
    assert made.kind == {"plt": "PLT", "skip-plt": "PLT with skip", "clt": "CLT"}[kind]
    assert (made.reads, made.writes) == (
        ("residual", "residual") if kind == "clt" else ("mlp_input", "mlp")
    )


@pytest.mark.parametrize("sparsity", ["l1", "tanh"])
def test_a_higher_price_leaves_fewer_features_that_fire(sparsity: str, model: Model) -> None:
    cheap, dear = (
        train_transcoders(
            model, batches, replace(SMALL, sparsity=sparsity, penalty=(price,), steps=25)
        )
        for price in (1e-4, 0.1)
    )  # type: ignore[arg-type]
    assert all(isinstance(encoder.activation, ReLU) for encoder in cheap.encoders)
    cheap_quality, dear_quality = (quality(model, one, *batches(999)) for one in (cheap, dear))
    assert (dear_quality.l0 < 0.8 * cheap_quality.l0).all()
    assert (cheap_quality.explained_variance > 0.3).all()


def test_the_jump_relu_keeps_as_many_features_as_were_trained(model: Model) -> None:
    made = train_transcoders(model, batches, replace(SMALL, k=(3, 7.5)))
    assert all(isinstance(encoder.activation, JumpReLU) for encoder in made.encoders)
    assert quality(model, made, *batches(999, prompts=200)).l0.tolist() == pytest.approx(
        [3, 7.5], rel=0.1
    )


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_training_resumed_equals_an_uninterrupted_one(
    kind: TranscoderKind, model: Model, tmp_path: Path
) -> None:
    config = replace(SMALL, kind=kind, steps=12, checkpoint_every=2, dead_after=300)
    whole = train_transcoders(model, batches, config)

    def until_killed(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        if step == 7:
            raise KeyboardInterrupt
        return batches(step)

    checkpoint = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train_transcoders(model, until_killed, config, checkpoint=checkpoint)
    seen: list[int] = []
    parts = train_transcoders(
        model, batches, config, checkpoint=checkpoint, progress=lambda done, loss: seen.append(done)
    )
    assert seen == list(range(7, 13))
    assert all(
        torch.equal(one, other) for one, other in zip(tensors(whole), tensors(parts), strict=True)
    )


def test_a_finished_training_is_not_repeated(model: Model, tmp_path: Path) -> None:
    config, steps = replace(SMALL, steps=3, dead_after=100), []
    parts = [
        train_transcoders(
            model,
            batches,
            config,
            checkpoint=tmp_path / "state.safetensors",
            progress=lambda done, loss: steps.append(done),
        )
        for _ in range(2)
    ]
    assert steps == [1, 2, 3]
    assert all(torch.equal(one, other) for one, other in zip(*map(tensors, parts), strict=True))


@pytest.mark.parametrize("across", [False, True])
def test_dead_features_alone_learn_to_leave_less_of_what_was_missed(across: bool) -> None:
    inputs, missed = torch.randn(
        2, 2, 30, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    weights = TranscoderParameters.initial("clt" if across else "plt", 10, inputs, seed=0)
    dead = torch.zeros(2, 10, dtype=torch.bool)
    assert training.auxiliary_loss(weights, inputs, missed, dead) == 0
    dead[:, 7:] = True
    before = training.auxiliary_loss(weights, inputs, missed, dead)
    gradients = torch.autograd.grad(before, [weights.encoder, *weights.decoders])
    assert all((gradient[..., :7, :] == 0).all() for gradient in gradients[:1]) and all(
        (part[:7] == 0).all() for part in gradients[1:]
    )
    assert (gradients[0][:, 7:] != 0).any() and all((part[7:] != 0).any() for part in gradients[1:])
    with torch.no_grad():
        for tensor, gradient in zip([weights.encoder, *weights.decoders], gradients, strict=True):
            tensor -= 0.1 * gradient
    assert training.auxiliary_loss(weights, inputs, missed, dead) < before


def test_a_checkpoint_of_other_settings_is_refused(model: Model, tmp_path: Path) -> None:
    train_transcoders(
        model, batches, replace(SMALL, steps=1), checkpoint=tmp_path / "state.safetensors"
    )
    with pytest.raises(InputError, match="written with other settings"):
        train_transcoders(
            model,
            batches,
            replace(SMALL, steps=1, seed=1),
            checkpoint=tmp_path / "state.safetensors",
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (1.0, 2.0, 3.0)}, "one for each of the 2 layers"),
        (
            {"k": (49.0,)},
            r"^k=\(49.0,\), and n_features=48: give k at most n_features\.$",
        ),
        ({"k": (math.nan, 1.0)}, r"^k=nan must be a number"),
        ({"penalty": (math.inf,)}, r"^penalty=\(inf,\): give one positive number"),
        ({"kind": "other"}, r"^kind='other': choose 'plt', 'skip-plt' or 'clt'\.$"),
        ({"dtype": "int8"}, r"^dtype='int8': choose 'float32' or 'float64'\.$"),
        ({"steps": 0}, r"^steps=0: give 1 or more\.$"),
        ({"checkpoint_every": -3}, r"^checkpoint_every=-3: give 1 or more\.$"),
        ({"dead_after": -1}, r"^dead_after=-1: give 0 or more\.$"),
        ({"learning_rate": -1.0}, r"^learning_rate=-1.0: give a finite number, 0 or more\.$"),
        ({"learning_rate": math.nan}, r"^learning_rate=nan must be a number\.$"),
        ({"learning_rate": math.inf}, r"^learning_rate=inf: give a finite number, 0 or more\.$"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    change: dict, message: str, model: Model, unchecked_types: None
) -> None:
    with pytest.raises(InputError, match=message):
        train_transcoders(model, batches, replace(SMALL, **change))


def test_models_without_mlps_and_prompts_of_one_token_are_refused(model: Model) -> None:
    with pytest.raises(InputError, match="has no MLPs"):
        train_transcoders(random_model("attention_only"), batches, SMALL)
    with pytest.raises(InputError, match="no token after the first"):
        train_transcoders(model, lambda step: batches(step, length=1), SMALL)


def test_padding_of_the_text_may_be_on_either_side(
    model: Model, trained: dict[TranscoderKind, Transcoders]
) -> None:
    def padded_left(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What a tokenizer gives, whose masks are integers."""
        tokens, mask = batches(step)
        n_pads = (~mask).sum(1)
        rows = [row.roll(int(n)) for row, n in zip(tokens, n_pads, strict=True)]
        return torch.stack(rows), mask.flip(1).long()

    settings = replace(SMALL, steps=3)
    right, left = [train_transcoders(model, text, settings) for text in (batches, padded_left)]
    for one, other in zip(tensors(right), tensors(left), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    made, (tokens, mask) = trained["plt"], padded_left(999)
    # A prompt that is padding alone is none.
    rows = torch.cat([torch.zeros_like(tokens[:1]), tokens])
    real = torch.cat([torch.zeros_like(mask[:1]), mask])
    expected = quality(model, made, *batches(999), prompts_at_once=1)
    found = quality(model, made, rows, real, prompts_at_once=1)
    pandas.testing.assert_frame_equal(found, expected)
    for one, other in zip(
        record(model, made.reads, made.writes, *batches(999)),
        record(model, made.reads, made.writes, rows, real),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_text_of_another_model_is_refused(model: Model) -> None:
    for change, told in ((VOCAB, "knows 0 to"), (-VOCAB, "holds -")):

        def other(step: int, change: int = change) -> tuple[torch.Tensor, torch.Tensor]:
            tokens, mask = batches(step)
            return tokens + change, mask

        with pytest.raises(InputError, match=told):
            train_transcoders(model, other, SMALL)


def test_the_model_is_left_as_it_was(model: Model) -> None:
    model.cfg.use_hook_mlp_in = True
    state, generator, threads = (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        torch.get_rng_state(),
        torch.get_num_threads(),
    )
    try:
        train_transcoders(model, batches, replace(SMALL, steps=3))
        assert model.cfg.use_hook_mlp_in
    finally:
        model.cfg.use_hook_mlp_in = False
    assert (
        torch.equal(torch.get_rng_state(), generator)
        and torch.is_grad_enabled()
        and torch.get_num_threads() == threads
    )
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(
        parameter.requires_grad and parameter.grad is None for parameter in model.parameters()
    )
    assert not any(point.fwd_hooks or point.bwd_hooks for point in model.hook_dict.values())


def test_it_trains_where_gradients_are_switched_off(model: Model) -> None:
    with torch.no_grad():
        made = train_transcoders(model, batches, replace(SMALL, steps=3))
    assert not any(tensor.requires_grad for tensor in tensors(made))


def test_decoder_rows_have_length_one(trained: dict[TranscoderKind, Transcoders]) -> None:
    for made in trained.values():
        for decoder in made.decoders:
            torch.testing.assert_close(
                decoder.flatten(1).norm(dim=1), torch.ones(48), rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_learned_and_what_is_given_are_the_same_function(kind: TranscoderKind) -> None:
    """In the units of training and in the model's."""
    generator = torch.Generator().manual_seed(1)
    inputs, outputs = torch.randn(2, 2, 30, 8, generator=generator, dtype=torch.float64) * 3 + 1
    weights = TranscoderParameters.initial(kind, 20, inputs, seed=0)
    with torch.no_grad():
        for tensor in weights.tensors():
            tensor += torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.1
    input_units, output_units = Normalization.of(inputs), Normalization.of(outputs)
    thresholds = torch.tensor([0.02, 0.05], dtype=torch.float64)
    normalized = input_units.apply(inputs)
    pre = weights.preactivations(normalized)
    fires = pre * weights.decoder_lengths() > thresholds[:, None, None]
    expected = weights.reconstruct(normalized, torch.where(fires, pre, 0))
    expected = expected * output_units.scale + output_units.mean
    made = weights.to_transcoders(input_units, output_units, thresholds)
    found = made.reconstruct({layer: inputs[layer][None] for layer in range(2)})
    torch.testing.assert_close(torch.cat([found[layer] for layer in range(2)]), expected.detach())


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "pythia"])
def test_what_is_recorded_is_what_the_mlp_reads_and_writes(architecture: str) -> None:
    """Against the model's own cache, by names written out here."""
    model, (tokens, mask) = random_model(architecture), batches(5)
    cache = model.run_with_cache(tokens)[1]
    kept = mask.clone()
    kept[:, 0] = False
    before = "hook_resid_pre" if architecture == "pythia" else "hook_resid_mid"
    for reads, name in (
        ("residual", before),
        ("normalized", "ln2.hook_normalized"),
        ("mlp_input", None),
    ):
        inputs, outputs = record(model, reads, "mlp", tokens, mask)  # type: ignore[arg-type]
        for layer in range(2):
            residual = cache[f"blocks.{layer}.{before}"]
            expected = (
                weights_of(model).mlp_input(layer, residual)
                if name is None
                else cache[f"blocks.{layer}.{name}"]
            )
            torch.testing.assert_close(inputs[layer], expected[kept].detach(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                outputs[layer],
                cache[f"blocks.{layer}.hook_mlp_out"][kept].detach(),
                rtol=1e-4,
                atol=1e-5,
            )


def test_quality_agrees_with_its_definition(
    model: Model, trained: dict[TranscoderKind, Transcoders]
) -> None:
    made, (tokens, mask) = trained["plt"], batches(999)
    found = quality(model, made, tokens, mask, prompts_at_once=7)
    inputs, outputs = record(model, made.reads, made.writes, tokens, mask)
    for layer in range(2):
        activations = made.encode(layer, inputs[layer][None])[0]
        errors = (
            outputs[layer] - activations @ made.decoders[layer][:, 0] - made.decoder_biases[layer]
        )
        assert found.explained_variance[layer] == pytest.approx(
            float(
                1 - errors.square().sum() / (outputs[layer] - outputs[layer].mean(0)).square().sum()
            ),
            abs=1e-4,
        )
        assert found.l0[layer] == pytest.approx(
            float((activations > 0).float().sum(1).mean()), rel=1e-3
        )
        assert found.dead[layer] == pytest.approx(
            float((activations == 0).all(0).float().mean()), abs=0.03
        )


def test_batches_may_be_lists_and_integers(model: Model) -> None:
    def listed(step: int) -> tuple[list, list]:
        tokens, mask = batches(step)
        return tokens.tolist(), mask.int().tolist()

    config = replace(SMALL, steps=2)
    both = [train_transcoders(model, each, config) for each in (batches, listed)]
    assert all(torch.equal(one, other) for one, other in zip(*map(tensors, both), strict=True))


TOKENS = torch.arange(24).view(4, 6)
REAL = torch.ones(4, 6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((TOKENS, REAL[:3]), r"tokens of shape \(4, 6\) and a mask of shape \(3, 6\)"),
        ((TOKENS, REAL[:, :5]), r"tokens of shape \(4, 6\) and a mask of shape \(4, 5\)"),
        ((TOKENS[0], REAL[0]), r"tokens of shape \(6,\).* must be \[prompt, position\]"),
        ((TOKENS, True), r"a mask of shape \(1,\)"),
        ((TOKENS, ~REAL), r"^batches\(0\) returned a mask of \(4, 6\) without any real tokens"),
        ((TOKENS[:0], REAL[:0]), "without any real tokens"),
        ((TOKENS, "all"), r"^the mask of batches\(0\)='all' must hold numbers"),
        ((TOKENS, None), r"^the mask of batches\(0\)=None must hold numbers"),
        ((TOKENS + 0.5, REAL), "integers"),
    ],
)
def test_batches_that_are_no_tokens_and_mask_are_refused(
    given: tuple, message: str, model: Model, unchecked_types: None
) -> None:
    with pytest.raises(InputError, match=message):
        train_transcoders(model, lambda step: given, SMALL)
