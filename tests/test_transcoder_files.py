"""Files of transcoders: every published format read as it is meant, saved and loaded again, mapped,
fetched, and refused when broken.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import psutil
import pytest
import torch
import yaml
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

import circuits
from circuits.transcoders.activations import BatchTopK, JumpReLU, ReLU, TopK
from circuits.transcoders.io import load as loading
from circuits.transcoders.io.load import load_transcoders
from circuits.transcoders.io.save import save_transcoders
from circuits.transcoders.transcoder import Encoder, Transcoders

LAYERS, FEATURES, WIDTH = 3, 12, 5
THRESHOLD, SKIP = "activation_function.threshold", "affine_skip_connection"


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(hash((shape, seed)) % 2**31))


@pytest.fixture
def inputs() -> dict[int, torch.Tensor]:
    return {layer: random(2, 4, WIDTH, seed=100 + layer) for layer in range(LAYERS)}


def configure(folder: Path, **settings) -> Path:
    """A config.yaml with some settings."""
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def per_layer(
    folder: Path, *, threshold=False, skip=False, extra=None, dtype=torch.float32
) -> list[dict[str, torch.Tensor]]:
    """layer_{i}.safetensors, and their tensors."""
    layers = []
    for layer in range(LAYERS):
        tensors = {
            "W_enc": random(FEATURES, WIDTH, seed=layer),
            "W_dec": random(FEATURES, WIDTH, seed=10 + layer),
            "b_enc": random(FEATURES, seed=layer),
            "b_dec": random(WIDTH, seed=layer),
        }
        if threshold:
            tensors[THRESHOLD] = random(FEATURES, seed=20 + layer).abs()
        if skip:
            tensors["W_skip"] = random(WIDTH, WIDTH, seed=layer)
        layers.append(
            {name: tensor.to(dtype) for name, tensor in (tensors | (extra or {})).items()}
        )
        save_file(layers[-1], folder / f"layer_{layer}.safetensors")
    return layers


def cross_layer(folder: Path, *, threshold=False, skip=False) -> list[dict[str, torch.Tensor]]:
    """W_enc_{i}.safetensors and W_dec_{i}.safetensors, and their tensors without the numbers."""
    layers = []
    for layer in range(LAYERS):
        tensors = {
            "W_enc": random(FEATURES, WIDTH, seed=layer),
            "b_enc": random(FEATURES, seed=layer),
            "b_dec": random(WIDTH, seed=layer),
        }
        if threshold:
            tensors["threshold"] = random(FEATURES, seed=20 + layer).abs()
        if skip:
            tensors["W_skip"] = random(WIDTH, WIDTH, seed=layer)
        decoder = random(FEATURES, LAYERS - layer, WIDTH, seed=layer)
        save_file(
            {f"{name}_{layer}": tensor for name, tensor in tensors.items()},
            folder / f"W_enc_{layer}.safetensors",
        )
        save_file({f"W_dec_{layer}": decoder}, folder / f"W_dec_{layer}.safetensors")
        layers.append(tensors | {"W_dec": decoder})
    return layers


def gemma_scope(
    folder: Path, layer: int, variant: str = "width_12/average_l0_7"
) -> dict[str, torch.Tensor]:
    """params.npz of one layer, and its tensors."""
    tensors = {
        "W_enc": random(WIDTH, FEATURES, seed=layer),
        "W_dec": random(FEATURES, WIDTH, seed=10 + layer),
        "b_enc": random(FEATURES, seed=layer),
        "b_dec": random(WIDTH, seed=layer),
        "threshold": random(FEATURES, seed=20 + layer).abs(),
    }
    file = folder / f"layer_{layer}" / variant / "params.npz"
    file.parent.mkdir(parents=True)
    np.savez(file, **{name: tensor.numpy() for name, tensor in tensors.items()})
    return tensors


def gemma_scope_2(
    file: Path, layer: int, *, cross_layer: bool, skip: bool
) -> dict[str, torch.Tensor]:
    """A safetensors file of GemmaScope-2, and its tensors."""
    decoder = (
        random(FEATURES, LAYERS, WIDTH, seed=10 + layer)
        if cross_layer
        else random(FEATURES, WIDTH, seed=10 + layer)
    )
    tensors = {
        "w_enc": random(WIDTH, FEATURES, seed=layer),
        "w_dec": decoder,
        "b_enc": random(FEATURES, seed=layer),
        "b_dec": random(WIDTH, seed=layer),
        "threshold": random(FEATURES, seed=20 + layer).abs(),
    }
    if skip:
        tensors[SKIP] = random(WIDTH, WIDTH, seed=layer)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file)
    return tensors


def jump(pre: torch.Tensor, threshold: torch.Tensor | None) -> torch.Tensor:
    return pre.relu() if threshold is None else pre * (pre > threshold)


def assert_reconstructs(transcoders: Transcoders, inputs, expected) -> None:
    for layer, written in transcoders.reconstruct(inputs).items():
        torch.testing.assert_close(written, expected(layer))


# Formats


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("threshold", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_per_layer_files_are_read_as_their_formula_says(tmp_path, inputs, threshold, skip, mapped):
    layers = per_layer(tmp_path, threshold=threshold, skip=skip)
    transcoders = load_transcoders(tmp_path, mapped=mapped)

    def expected(layer):
        t, x = layers[layer], inputs[layer]
        acts = jump(x @ t["W_enc"].T + t["b_enc"], t.get(THRESHOLD))
        return acts @ t["W_dec"] + t["b_dec"] + (x @ t["W_skip"].T if skip else 0)

    assert_reconstructs(transcoders, inputs, expected)
    assert transcoders.kind == ("PLT with skip" if skip else "PLT")
    assert (transcoders.reads, transcoders.writes) == ("mlp_input", "mlp")
    assert (transcoders.name, transcoders.source) == (tmp_path.name, str(tmp_path))


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("name", ["W_enc", "W_dec"])
def test_a_per_layer_matrix_that_is_stored_transposed_is_turned(tmp_path, name, mapped):
    layers = per_layer(tmp_path)
    for layer, tensors in enumerate(layers):
        save_file(
            tensors | {name: tensors[name].T.contiguous()},
            tmp_path / f"layer_{layer}.safetensors",
        )
    transcoders = load_transcoders(tmp_path, mapped=mapped)
    for layer, tensors in enumerate(layers):
        assert torch.equal(transcoders.encoders[layer].weight, tensors["W_enc"])
        assert torch.equal(transcoders.decoders[layer][:, 0], tensors["W_dec"])


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("threshold", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_cross_layer_files_are_read_as_their_formula_says(
    tmp_path, inputs, threshold, skip, mapped
):
    layers = cross_layer(tmp_path, threshold=threshold, skip=skip)
    transcoders = load_transcoders(tmp_path, mapped=mapped)
    acts = [
        jump(inputs[layer] @ t["W_enc"].T + t["b_enc"], t.get("threshold"))
        for layer, t in enumerate(layers)
    ]

    def expected(layer):
        features = sum(
            acts[source] @ layers[source]["W_dec"][:, layer - source] for source in range(layer + 1)
        )
        return (
            features
            + layers[layer]["b_dec"]
            + (inputs[layer] @ layers[layer]["W_skip"] if skip else 0)
        )

    assert_reconstructs(transcoders, inputs, expected)
    assert transcoders.kind == ("CLT with skip" if skip else "CLT")
    assert (transcoders.reads, transcoders.writes) == ("residual", "residual")


@pytest.mark.parametrize("listed", [False, True])
def test_gemma_scope_files_are_read_as_their_formula_says(tmp_path, inputs, listed):
    layers = [gemma_scope(tmp_path, layer) for layer in range(LAYERS)]
    if listed:
        configure(
            tmp_path,
            transcoders=[
                f"layer_{layer}/width_12/average_l0_7/params.npz" for layer in range(LAYERS)
            ],
        )
    transcoders = load_transcoders(tmp_path)

    def expected(layer):
        t = layers[layer]
        return (
            jump(inputs[layer] @ t["W_enc"] + t["b_enc"], t["threshold"]) @ t["W_dec"] + t["b_dec"]
        )

    assert_reconstructs(transcoders, inputs, expected)
    assert (transcoders.reads, transcoders.writes) == ("normalized", "residual")


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_gemma_scope_2_files_per_layer_are_read_as_their_formula_says(
    tmp_path, inputs, skip, mapped
):
    files = [
        tmp_path / f"layer_{layer}_width_12_l0_small" / "params.safetensors"
        for layer in range(LAYERS)
    ]
    layers = [
        gemma_scope_2(file, layer, cross_layer=False, skip=skip) for layer, file in enumerate(files)
    ]
    transcoders = load_transcoders(tmp_path, mapped=mapped)

    def expected(layer):
        t, x = layers[layer], inputs[layer]
        return (
            jump(x @ t["w_enc"] + t["b_enc"], t["threshold"]) @ t["w_dec"]
            + t["b_dec"]
            + (x @ t[SKIP] if skip else 0)
        )

    assert_reconstructs(transcoders, inputs, expected)
    assert transcoders.kind == ("PLT with skip" if skip else "PLT")
    assert (transcoders.reads, transcoders.writes) == ("mlp_input", "residual")


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_gemma_scope_2_files_across_layers_are_read_to_the_last_layer(
    tmp_path, inputs, skip, mapped
):
    files = [tmp_path / f"params_layer_{layer}.safetensors" for layer in range(LAYERS)]
    layers = [
        gemma_scope_2(file, layer, cross_layer=True, skip=skip) for layer, file in enumerate(files)
    ]
    transcoders = load_transcoders(tmp_path, mapped=mapped)
    acts = [
        jump(inputs[layer] @ t["w_enc"] + t["b_enc"], t["threshold"])
        for layer, t in enumerate(layers)
    ]

    def expected(layer):
        features = sum(
            acts[source] @ layers[source]["w_dec"][:, layer] for source in range(layer + 1)
        )
        return (
            features + layers[layer]["b_dec"] + (inputs[layer] @ layers[layer][SKIP] if skip else 0)
        )

    assert_reconstructs(transcoders, inputs, expected)
    assert transcoders.n_layers == LAYERS
    assert [transcoders.written_by(layer) for layer in range(LAYERS)] == [
        range(layer, LAYERS) for layer in range(LAYERS)
    ]
    assert (transcoders.reads, transcoders.writes) == ("mlp_input", "residual")


def test_layers_may_be_listed_in_any_order_with_their_numbers(tmp_path, inputs):
    layers = per_layer(tmp_path)
    for layer in range(LAYERS):
        (tmp_path / f"layer_{layer}.safetensors").rename(tmp_path / f"of_{layer}.safetensors")
    entries = [
        {"id": f"set-{layer}", "layer": layer, "filepath": f"of_{layer}.safetensors"}
        for layer in reversed(range(LAYERS))
    ]
    configure(
        tmp_path,
        model_name="gpt2",
        transcoders=entries,
        feature_input_hook="hook_resid_mid",
        feature_output_hook="hook_mlp_out",
    )
    transcoders = load_transcoders(tmp_path)
    for layer, tensors in enumerate(layers):
        assert torch.equal(transcoders.encoders[layer].weight, tensors["W_enc"])
    assert (transcoders.reads, transcoders.writes) == ("residual", "residual")


HOOKS = {
    "hook_resid_mid": "residual",
    "hook_resid_pre": "residual",
    "hook_mlp_in": "residual",
    "ln2.hook_normalized": "normalized",
    "mlp.hook_in": "mlp_input",
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize(
    ("output", "writes"), [("hook_mlp_out", "residual"), ("mlp.hook_out", "mlp")]
)
def test_hooks_in_the_configuration_say_where_features_read_and_write(
    tmp_path, hook, output, writes
):
    per_layer(tmp_path)
    transcoders = load_transcoders(
        configure(tmp_path, feature_input_hook=hook, feature_output_hook=output)
    )
    assert (transcoders.reads, transcoders.writes) == (HOOKS[hook], writes)


@pytest.mark.parametrize(
    ("spelled", "kind"),
    [("topk", TopK), ("TopK", TopK), ("batch_topk", BatchTopK), ("BatchTopK", BatchTopK)],
)
def test_top_k_comes_from_the_configuration(tmp_path, spelled, kind):
    per_layer(tmp_path)
    transcoders = load_transcoders(configure(tmp_path, activation=spelled, k=3))
    assert [encoder.activation for encoder in transcoders.encoders] == [kind(3)] * LAYERS


def test_top_k_comes_from_the_files_where_they_hold_it(tmp_path):
    for layer, tensors in enumerate(per_layer(tmp_path)):
        save_file(tensors | {"k": torch.tensor(4)}, tmp_path / f"layer_{layer}.safetensors")
    assert load_transcoders(tmp_path).encoders[0].activation == TopK(4)


def test_a_path_to_the_configuration_is_a_path_to_its_folder(tmp_path):
    per_layer(tmp_path)
    configure(tmp_path, model_kind="transcoder_set")
    assert (
        load_transcoders(tmp_path / "config.yaml").identity
        == load_transcoders(str(tmp_path)).identity
    )


def test_where_two_kinds_lie_in_a_folder_the_configuration_chooses(tmp_path):
    per_layer(tmp_path)
    cross_layer(tmp_path)
    with pytest.raises(
        circuits.InputError,
        match=r"both layer_\*.safetensors and W_enc_\*.safetensors; add model_kind",
    ):
        load_transcoders(tmp_path)
    assert load_transcoders(configure(tmp_path, model_kind="transcoder_set")).kind == "PLT"
    assert load_transcoders(configure(tmp_path, model_kind="cross_layer_transcoder")).kind == "CLT"


# Precision, memory and names


def test_weights_are_brought_to_float32_or_to_what_is_asked_for_and_stay_as_stored_when_mapped(
    tmp_path,
):
    layers = per_layer(tmp_path, threshold=True, dtype=torch.bfloat16)
    for options, dtype in (
        ({}, torch.float32),
        ({"dtype": torch.float16}, torch.float16),
        ({"mapped": True}, torch.bfloat16),
    ):
        encoder = load_transcoders(tmp_path, **options).encoders[1]
        assert {encoder.weight.dtype, encoder.bias.dtype, encoder.activation.threshold.dtype} == {
            dtype
        }
        torch.testing.assert_close(encoder.weight, layers[1]["W_enc"].to(dtype))


def test_mapped_weights_are_read_row_by_row(tmp_path):
    features, width = 16384, 1024  # each matrix has 64 MiB
    small = {"b_enc": torch.zeros(features), "b_dec": torch.zeros(width)}
    save_file(
        {"W_enc": torch.ones(features, width), "W_dec": torch.ones(features, width), **small},
        tmp_path / "layer_0.safetensors",
    )
    process = psutil.Process()
    before = process.memory_info().rss
    transcoders = load_transcoders(tmp_path, mapped=True)
    rows, like = torch.tensor([5, 9000]), torch.zeros(1)
    assert (
        transcoders.encoder_rows(0, rows, like).sum()
        == transcoders.decoder_rows(0, rows, 0, like).sum()
        == 2 * width
    )
    assert process.memory_info().rss - before < 16 << 20
    assert transcoders.encoders[0].weight.sum() == features * width
    assert process.memory_info().rss - before > 16 << 20  # what is read shows in this measure


@pytest.mark.parametrize("kind", ["PLT", "GemmaScope-2"])
def test_weights_that_are_not_mapped_do_not_hold_on_to_their_files(tmp_path, kind):
    if kind == "PLT":
        per_layer(tmp_path)
    else:
        for layer in range(LAYERS):
            gemma_scope_2(
                tmp_path / f"params_layer_{layer}.safetensors", layer, cross_layer=True, skip=True
            )
    transcoders = load_transcoders(tmp_path)
    before = transcoders.identity
    for file in tmp_path.glob("*.safetensors"):
        with file.open("r+b") as handle:
            handle.write(bytes(file.stat().st_size))
    del transcoders.__dict__["identity"]
    assert transcoders.identity == before
    assert all(
        tensor.is_contiguous()
        for tensor in (transcoders.encoders[1].weight, transcoders.decoders[1])
    )


def test_sets_that_ship_with_the_package_are_loaded_by_name(tmp_path, monkeypatch):
    folder = tmp_path / "assets" / "transcoders" / "toy-world-plt"
    folder.mkdir(parents=True)
    per_layer(folder)
    configure(
        folder,
        model_kind="transcoder_set",
        feature_input_hook="hook_resid_mid",
        feature_output_hook="hook_mlp_out",
    )
    monkeypatch.setattr(loading.resources, "files", lambda package: tmp_path)
    transcoders = load_transcoders("toy-world-plt")
    assert (transcoders.name, transcoders.source, transcoders.n_layers) == (
        "toy-world-plt",
        "toy-world-plt",
        LAYERS,
    )
    with pytest.raises(
        circuits.InputError,
        match=r"no transcoders 'toy-world-ptl'; .*\(toy-world-plt\) or an address hf://owner/repo\.$",
    ):
        load_transcoders("toy-world-ptl")


# Saving


def assert_same(first: Transcoders, second: Transcoders) -> None:
    for layer in range(first.n_layers):
        one, other = first.encoders[layer], second.encoders[layer]
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(one.bias, other.bias)
        if isinstance(one.activation, JumpReLU):
            assert torch.equal(one.activation.threshold, other.activation.threshold)
        else:
            assert one.activation == other.activation
        assert torch.equal(first.decoders[layer], second.decoders[layer])
        assert torch.equal(first.decoder_biases[layer], second.decoder_biases[layer])
        if first.skips is not None:
            assert torch.equal(first.skips[layer], second.skips[layer])
    assert (first.kind, first.reads, first.writes) == (second.kind, second.reads, second.writes)


ACTIVATIONS = {
    "relu": lambda layer: ReLU(),
    "jump_relu": lambda layer: JumpReLU(random(FEATURES, seed=layer).abs()),
    "topk": lambda layer: TopK(3),
    "batch_topk": lambda layer: BatchTopK(2),
}


def some_transcoders(
    *, cross_layer=False, skip=False, activation="relu", reads="residual", writes="residual"
) -> Transcoders:
    layers = range(LAYERS)
    return Transcoders(
        [
            Encoder(
                random(FEATURES, WIDTH, seed=layer),
                random(FEATURES, seed=layer),
                ACTIVATIONS[activation](layer),
            )
            for layer in layers
        ],
        [
            random(FEATURES, LAYERS - layer if cross_layer else 1, WIDTH, seed=layer)
            for layer in layers
        ],
        [random(WIDTH, seed=layer) for layer in layers],
        [random(WIDTH, WIDTH, seed=layer) for layer in layers] if skip else None,
        reads,
        writes,
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("across", [False, True])
def test_transcoders_saved_and_loaded_are_the_same(tmp_path, across, skip, activation):
    transcoders = some_transcoders(cross_layer=across, skip=skip, activation=activation)
    folder = save_transcoders(transcoders, tmp_path / "saved", model_name="gpt2")
    for mapped in (False, True):
        assert_same(load_transcoders(folder, mapped=mapped), transcoders)
    assert yaml.safe_load((folder / "config.yaml").read_text())["model_name"] == "gpt2"
    assert not [file for file in folder.iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize("reads", ["residual", "normalized", "mlp_input"])
@pytest.mark.parametrize("writes", ["residual", "mlp"])
def test_where_features_read_and_write_is_saved(tmp_path, reads, writes):
    transcoders = some_transcoders(reads=reads, writes=writes)
    assert_same(load_transcoders(save_transcoders(transcoders, tmp_path)), transcoders)


def test_a_cross_layer_skip_is_saved_in_the_orientation_of_its_format(tmp_path):
    transcoders = some_transcoders(cross_layer=True, skip=True)
    save_transcoders(transcoders, tmp_path)
    stored, x = load_file(tmp_path / "W_enc_1.safetensors")["W_skip_1"], random(4, WIDTH)
    torch.testing.assert_close(x @ stored, transcoders.skip(1, x))


def test_saved_weights_have_the_type_that_is_asked_for(tmp_path):
    transcoders = some_transcoders(activation="jump_relu", skip=True)
    save_transcoders(transcoders, tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "layer_0.safetensors").values()} == {
        torch.bfloat16
    }
    assert_same(
        load_transcoders(tmp_path), transcoders.to(dtype=torch.bfloat16).to(dtype=torch.float32)
    )


def test_tensors_that_share_memory_can_be_saved(tmp_path):
    transcoders = some_transcoders()
    tied = replace(
        transcoders, decoders=[encoder.weight[:, None] for encoder in transcoders.encoders]
    )
    assert_same(load_transcoders(save_transcoders(tied, tmp_path)), tied)


def test_a_set_of_as_many_layers_is_replaced_even_while_it_is_mapped(tmp_path):
    save_transcoders(some_transcoders(), tmp_path)
    mapped = load_transcoders(tmp_path, mapped=True)
    turned = replace(mapped, decoders=[-decoder for decoder in mapped.decoders])
    save_transcoders(turned, tmp_path)
    assert_same(load_transcoders(tmp_path), turned)


def test_saving_that_is_interrupted_leaves_a_folder_that_says_so(tmp_path, monkeypatch):
    save_transcoders(some_transcoders(), tmp_path)
    written = []

    def interrupted(path, content):
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt
        path.write_bytes(content)

    monkeypatch.setattr("circuits.transcoders.io.save.write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_transcoders(some_transcoders(activation="jump_relu"), tmp_path)
    with pytest.raises(
        circuits.InputError, match=r"saving into this folder was interrupted.*save it again"
    ):
        load_transcoders(tmp_path)


def test_saving_refuses_what_the_formats_cannot_say(tmp_path):
    transcoders = some_transcoders(activation="topk")
    encoders = [*transcoders.encoders[:-1], replace(transcoders.encoders[-1], activation=TopK(5))]
    with pytest.raises(
        circuits.InputError,
        match=r"layer 0 fire by TopK\(k=3\) and those of layer 2 by TopK\(k=5\)",
    ):
        save_transcoders(replace(transcoders, encoders=encoders), tmp_path)
    with pytest.raises(circuits.InputError, match=r"dtype=torch.int8: choose torch.float32"):
        save_transcoders(transcoders, tmp_path, dtype=torch.int8)
    (tmp_path / "layer_3.safetensors").touch()
    with pytest.raises(
        circuits.InputError,
        match=r"holds layer_3.safetensors, which is not of this set; give an empty folder",
    ):
        save_transcoders(transcoders, tmp_path)
    with pytest.raises(circuits.InputError, match=r"layer_3.safetensors is a file; give a folder"):
        save_transcoders(transcoders, tmp_path / "layer_3.safetensors")


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder whose sub-folders owner/repo are the hub, and a list of what is fetched from it, as
    (repository@revision, file).
    """
    root, fetched = tmp_path / "hub", []

    def download(repo_id, *, revision=None, allow_patterns=None, ignore_patterns=None):
        source, target = root / repo_id, tmp_path / "cache" / repo_id / (revision or "main")
        if not source.is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError(
                f"no connection to {repo_id}\nand a second line"
            )
        target.mkdir(parents=True, exist_ok=True)
        names = [str(file.relative_to(source)) for file in source.rglob("*.*") if file.is_file()]
        for name in filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, target / name)
            fetched.append((f"{repo_id}@{revision}", name))
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    root.mkdir()
    return root, fetched


def in_repository(root: Path, *parts: str) -> Path:
    folder = root.joinpath(*parts)
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("inside", ["", "clt/wide"])
def test_of_a_folder_on_the_hub_its_configuration_and_weights_are_fetched(hub, inside):
    root, fetched = hub
    folder = in_repository(root, "someone/gemma-scope-2-clt", inside)
    cross_layer(folder)
    configure(
        folder,
        model_kind="cross_layer_transcoder",
        feature_input_hook="hook_resid_mid",
        feature_output_hook="hook_mlp_out",
    )
    (folder / "features.bin").touch()
    per_layer(in_repository(folder, "another"))
    address = f"hf://someone/gemma-scope-2-clt{'/' if inside else ''}{inside}?revision=v1"
    transcoders = load_transcoders(address)
    assert (transcoders.kind, transcoders.source) == ("CLT", address)
    assert transcoders.name == ("wide" if inside else "gemma-scope-2-clt")
    names = [f"W_{part}_{layer}.safetensors" for part in ("enc", "dec") for layer in range(LAYERS)]
    expected = {str(Path(inside) / name) for name in ["config.yaml", *names]}
    assert set(fetched) == {("someone/gemma-scope-2-clt@v1", name) for name in expected}


def test_what_a_configuration_on_the_hub_lists_is_fetched_from_where_it_says(hub):
    root, fetched = hub
    scope = in_repository(root, "google/weights")
    layers = [
        gemma_scope(scope, layer, variant) for layer in range(2) for variant in ("l0_7", "l0_70")
    ][::2]
    here = in_repository(root, "someone/choice", "set")
    layers.append(gemma_scope(here, 2, "l0_7"))
    listed = [
        f"hf://google/weights/layer_{layer}/l0_7/params.npz?revision=abc" for layer in range(2)
    ] + ["layer_2/l0_7/params.npz"]
    configure(
        here,
        transcoders=listed,
        feature_input_hook="ln2.hook_normalized",
        feature_output_hook="hook_mlp_out",
    )
    transcoders = load_transcoders("hf://someone/choice/set")
    for layer, tensors in enumerate(layers):
        assert torch.equal(transcoders.encoders[layer].weight, tensors["W_enc"].T)
    assert set(fetched) == {
        ("someone/choice@None", "set/config.yaml"),
        ("google/weights@abc", "layer_0/l0_7/params.npz"),
        ("google/weights@abc", "layer_1/l0_7/params.npz"),
        ("someone/choice@None", "set/layer_2/l0_7/params.npz"),
    }


def test_a_configuration_in_a_folder_may_list_files_on_the_hub(hub, tmp_path):
    root, _ = hub
    per_layer(in_repository(root, "someone/plts"))
    here = in_repository(tmp_path, "mine")
    configure(
        here,
        transcoders=[f"hf://someone/plts/layer_{layer}.safetensors" for layer in range(LAYERS)],
    )
    assert load_transcoders(here).n_layers == LAYERS


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "hf://someone/nothing",
            r"hf://someone/nothing/config.yaml cannot be fetched: no connection to "
            r"someone/nothing\. Correct the address",
        ),
        (
            "hf://someone/plts/empty?revision=v2",
            r"hf://someone/plts/empty\?revision=v2 has no safetensors or npz files directly in it",
        ),
        (
            "hf://someone/plts/listed",
            r"there is no file hf://someone/plts/layer_7.safetensors; correct the address",
        ),
        (
            "hf://someone/plts/outside",
            r"'../../../secret.npz' lies outside of the repository someone/plts",
        ),
        (
            "hf://someone",
            r"'hf://someone' is no address of transcoders; write hf://owner/repo/folder",
        ),
        ("hf://someone/plts?rev=v2", r"is no address of transcoders"),
    ],
)
def test_what_cannot_be_fetched_is_one_clear_line(hub, address, message):
    root, _ = hub
    folder = in_repository(root, "someone/plts")
    per_layer(folder)
    in_repository(folder, "empty", "layer_0")
    configure(
        in_repository(folder, "listed"),
        transcoders=[{"layer": 0, "filepath": "hf://someone/plts/layer_7.safetensors"}],
    )
    configure(in_repository(folder, "outside"), transcoders=["../../../secret.npz"])
    with pytest.raises(circuits.InputError, match=message) as caught:
        load_transcoders(address)
    assert "\n" not in str(caught.value)


# Refusals


def broken(**changes):
    """Layer 1 of a PLT with some tensors changed, or left out where the change is None."""

    def write(folder: Path) -> None:
        tensors = per_layer(folder)[1] | changes
        save_file(
            {name: tensor for name, tensor in tensors.items() if tensor is not None},
            folder / "layer_1.safetensors",
        )

    return write


def with_config(content: str, write=per_layer):
    def both(folder: Path) -> None:
        write(folder)
        (folder / "config.yaml").write_text(content)

    return both


def without(name: str, write=per_layer):
    def removed(folder: Path) -> None:
        write(folder)
        (folder / name).unlink()

    return removed


def pickles(folder: Path) -> None:
    (folder / "sae.pt").touch()
    (folder / "README.md").touch()


def truncated(folder: Path) -> None:
    per_layer(folder)
    file = folder / "layer_2.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def truncated_npz(folder: Path) -> None:
    gemma_scope(folder, 0)
    (file,) = folder.rglob("*.npz")
    file.write_bytes(file.read_bytes()[:300])


def pickled_npz(folder: Path) -> None:
    tensors = gemma_scope(folder, 0)
    (file,) = folder.rglob("*.npz")
    np.savez(
        file,
        **{name: tensor.numpy() for name, tensor in tensors.items()}
        | {"threshold": np.array([{}], dtype=object)},
    )


def variants(folder: Path) -> None:
    gemma_scope(folder, 0, "l0_7")
    gemma_scope(folder, 0, "l0_70")


def without_last_layer(folder: Path) -> None:
    cross_layer(folder)
    for part in ("enc", "dec"):
        (folder / f"W_{part}_{LAYERS - 1}.safetensors").unlink()


def without_last_layer_of_gemma_scope_2(folder: Path) -> None:
    for layer in range(LAYERS - 1):
        gemma_scope_2(
            folder / f"params_layer_{layer}.safetensors", layer, cross_layer=True, skip=False
        )


def wrong_decoder(folder: Path) -> None:
    cross_layer(folder)
    save_file({"W_dec_1": random(FEATURES, 3, WIDTH)}, folder / "W_dec_1.safetensors")


def one_of_gemma_scope(folder: Path) -> None:
    gemma_scope(folder, 0, "l0_7")


def one_of_gemma_scope_2(folder: Path) -> None:
    gemma_scope_2(folder / "params_layer_0.safetensors", 0, cross_layer=False, skip=False)


def with_tensors(write, name: str, **changes):
    """A set in which some tensors of one file are others, or new."""

    def changed(folder: Path) -> None:
        write(folder)
        file = folder / name
        if file.suffix == ".npz":
            arrays = {tensor: value.numpy() for tensor, value in changes.items()}
            np.savez(file, **{**np.load(file), **arrays})
        else:
            save_file(load_file(file) | changes, file)

    return changed


def autoencoder(folder: Path) -> None:
    save_file(
        {"encoder.weight": random(FEATURES, WIDTH), "encoder.bias": random(FEATURES)},
        folder / "layer_0.safetensors",
    )


BROKEN = {
    "an empty folder": (
        lambda folder: None,
        r"holds no transcoders; expected layer_0.safetensors \.\.\., W_enc_0.safetensors with",
    ),
    "pickles": (
        pickles,
        r"sae.pt may be a pickle, which can run code .* convert it with torch.load\(..., "
        r"weights_only=True\)",
    ),
    "a listed pickle": (with_config("transcoders: [sae.pt]"), r"sae.pt may be a pickle"),
    "an unknown file type": (
        with_config("transcoders: [sae.h5]"),
        r"sae.h5 is neither a safetensors nor an npz file",
    ),
    "a missing file": (
        with_config("transcoders: [a.npz]"),
        r"there is no file .*a.npz; restore it, or correct the list",
    ),
    "a missing layer": (
        without("layer_1.safetensors"),
        r"layer_1.safetensors is missing, and all layers from 0 must be there",
    ),
    "a missing encoder": (
        without("W_enc_1.safetensors", cross_layer),
        r"W_enc_1.safetensors is missing",
    ),
    "a missing decoder": (
        without("W_dec_2.safetensors", cross_layer),
        r"W_dec_2.safetensors is missing",
    ),
    "a missing last layer": (without_last_layer, r"layer 2 is missing"),
    "a missing last layer of GemmaScope-2": (
        without_last_layer_of_gemma_scope_2,
        r"layer 2 is missing",
    ),
    "a truncated file": (truncated, r"layer_2.safetensors is truncated or not what its name says"),
    "a truncated npz": (truncated_npz, r"params.npz is truncated or not what its name says"),
    "a pickle in an npz": (
        pickled_npz,
        r"params.npz is truncated or not what its name says \(Object arrays cannot be loaded",
    ),
    "a missing tensor": (
        broken(b_dec=None),
        r"layer_1.safetensors: there is no tensor b_dec; there are W_dec, W_enc, b_enc\. Restore",
    ),
    "an unknown tensor": (
        broken(log_threshold=random(3)),
        r"layer_1.safetensors: it is not known what log_threshold does",
    ),
    "a wrong shape": (
        broken(W_enc=random(FEATURES, WIDTH + 1)),
        r"layer_1.safetensors: W_enc has shape \(12, 6\), expected \(12, 5\) \(features, d_model\)",
    ),
    "a vector that is a matrix": (
        broken(b_dec=random(WIDTH, 1)),
        r"b_dec has shape \(5, 1\), expected \(5,\) \(d_model\); .*as in layer 0",
    ),
    "other features": (
        broken(b_enc=random(FEATURES + 1)),
        r"b_enc has shape \(13,\), expected \(12,\) \(features\); .*as in layer 0",
    ),
    "numbers that are not finite": (
        broken(b_enc=torch.full((FEATURES,), torch.nan)),
        r"12 of 12 numbers of the bias are NaN or infinite; restore the file",
    ),
    "fewer layers than config.yaml says": (
        with_config("n_layers: 7"),
        r"says n_layers: 7, but there are files of \d layers; restore the others",
    ),
    "a config.yaml that would take minutes to read": (
        with_config("[" * 100_000),
        r"config.yaml cannot be read as YAML \(it has more than 65,536 bytes\)",
    ),
    "integers": (
        broken(W_dec=torch.ones(FEATURES, WIDTH, dtype=torch.int8)),
        r"W_dec holds torch.int8, not floating-point numbers",
    ),
    "a skip in one layer": (
        broken(W_skip=random(WIDTH, WIDTH)),
        r"layers 0 and 1 are of different sets \(skip: False and True\)",
    ),
    "thresholds in one layer": (
        broken(threshold=random(FEATURES)),
        r"layers 0 and 1 are of different sets \(threshold: False and True\)",
    ),
    "a k of several numbers": (
        broken(k=torch.tensor([1, 2])),
        r"k has shape \(2,\) .* expected one positive integer",
    ),
    "a k of a cross-layer transcoder": (
        with_tensors(cross_layer, "W_enc_0.safetensors", k=torch.tensor(4)),
        r"W_enc_0.safetensors and .*W_dec_0.safetensors: it is not known what k does",
    ),
    "a k of GemmaScope": (
        with_tensors(one_of_gemma_scope, "layer_0/l0_7/params.npz", k=torch.tensor(4)),
        r"params.npz: it is not known what k does",
    ),
    "a k of GemmaScope-2": (
        with_tensors(one_of_gemma_scope_2, "params_layer_0.safetensors", k=torch.tensor(4)),
        r"params_layer_0.safetensors: it is not known what k does",
    ),
    "a skip of GemmaScope": (
        with_tensors(one_of_gemma_scope, "layer_0/l0_7/params.npz", W_skip=random(WIDTH, WIDTH)),
        r"params.npz: it is not known what W_skip does",
    ),
    "a transposed encoder of a cross-layer transcoder": (
        with_tensors(cross_layer, "W_enc_0.safetensors", W_enc_0=random(WIDTH, FEATURES)),
        r"W_enc_0 has shape \(5, 12\), expected \(12, 5\) \(features, d_model\)",
    ),
    "an encoder of GemmaScope that is not transposed": (
        with_tensors(one_of_gemma_scope, "layer_0/l0_7/params.npz", W_enc=random(FEATURES, WIDTH)),
        r"W_enc has shape \(12, 5\), expected \(5, 12\) \(d_model, features\)",
    ),
    "a transposed decoder of GemmaScope-2": (
        with_tensors(
            one_of_gemma_scope_2, "params_layer_0.safetensors", w_dec=random(WIDTH, FEATURES)
        ),
        r"w_dec has shape \(5, 12\), expected \(12, 5\) \(features, d_model\)",
    ),
    "a wrong decoder": (
        wrong_decoder,
        r"W_dec_1 has shape \(12, 3, 5\), expected \(12, 2, 5\) \(features, layers written to, "
        r"d_model\)",
    ),
    "another library's names": (
        autoencoder,
        r"there is no encoder, only encoder.bias, encoder.weight; name it W_enc",
    ),
    "variants": (
        variants,
        r"there are 2 files for layer 0 \(layer_0/l0_7/params.npz, layer_0/l0_70/params.npz\); "
        r"list the one",
    ),
    "no YAML": (with_config("a: [1"), r"config.yaml cannot be read as YAML"),
    "no settings": (with_config("- 1"), r"config.yaml holds list and no settings"),
    "code in YAML": (
        with_config("a: !!python/object/apply:os.getcwd []"),
        r"config.yaml cannot be read as YAML",
    ),
    "an unknown hook": (
        with_config("feature_input_hook: hook_q"),
        r"feature_input_hook is 'hook_q', which is not known; use one of hook_resid_mid, "
        r"hook_resid_pre, hook_mlp_in, ln2.hook_normalized, mlp",
    ),
    "a hook in capitals": (
        with_config("feature_input_hook: Hook_Resid_Mid"),
        r"feature_input_hook is 'Hook_Resid_Mid', which is not known; use one of hook_resid_mid",
    ),
    "a kind with a hyphen": (
        with_config("model_kind: transcoder-set"),
        r"model_kind is 'transcoder-set', which is not known; use one of transcoder_set",
    ),
    "a list of activations": (
        with_config("activation: [relu]"),
        r"activation is \['relu'\], which is not known; use one of relu",
    ),
    "an unknown output hook": (
        with_config("feature_output_hook: hook_z"),
        r"'hook_z', .* use one of hook_mlp_out, mlp.hook_out",
    ),
    "an unknown kind": (
        with_config("model_kind: lorsa"),
        r"model_kind is 'lorsa', which is not known; use one of transcoder_set, cross",
    ),
    "another kind": (
        with_config("model_kind: cross_layer_transcoder"),
        r"says model_kind: cross_layer_transcoder, but the files are of a tran",
    ),
    "an unknown activation": (
        with_config("activation: gelu"),
        r"activation is 'gelu', which is not known; use one of relu, jump_relu, topk",
    ),
    "top-k without k": (
        with_config("activation: topk"),
        r"activation is topk, but k is not given; add k",
    ),
    "k without top-k": (
        with_config("k: 3"),
        r"activation is missing, and k: 3 is given; add activation: topk or batch_topk",
    ),
    "a k of zero": (
        with_config("activation: topk\nk: 0"),
        r"k is 0; give the number of features that may fire",
    ),
    "jump_relu without thresholds": (
        with_config("activation: jump_relu"),
        r"activation is jump_relu, but the files hold no thresholds",
    ),
    "relu with thresholds": (
        with_config("activation: relu", lambda folder: per_layer(folder, threshold=True)),
        r"activation is relu, but the files hold thresholds; write jump_relu",
    ),
    "no list": (with_config("transcoders: layer_0"), r"transcoders is 'layer_0'; give a list"),
    "a strange entry": (
        with_config("transcoders: [{layer: 0}]"),
        r"entry 0 of transcoders is {'layer': 0}; give a path, an hf:// address",
    ),
    "a layer that is no number": (
        with_config(
            "transcoders: [{layer: false, filepath: layer_0.safetensors}, "
            "{layer: true, filepath: layer_1.safetensors}]"
        ),
        r"entry 0 of transcoders is {'layer': False, .*; give a path, an hf:// address, or layer",
    ),
    "a layer twice": (
        with_config("transcoders: [{layer: 0, filepath: a.npz}, {layer: 0, filepath: b.npz}]"),
        r"config.yaml lists several files for layer 0; list one",
    ),
    "a listed layer that is missing": (
        with_config("transcoders: [{layer: 1, filepath: layer_1.safetensors}]"),
        r"layer 0 is missing",
    ),
    "a list from another layer on": (
        with_config("transcoders: [hf://google/weights/layer_6/l0_7/params.npz]"),
        r"entry 0 of transcoders is .*, so layer 0 would be read from a file of layer 6; list all "
        r"layers in order from 0",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_loaded_is_one_clear_line(tmp_path, case):
    write, message = BROKEN[case]
    write(tmp_path)
    with pytest.raises(circuits.InputError, match=message) as caught:
        load_transcoders(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"device": "cuda:0" if not torch.cuda.is_available() else "nonsense"},
            r"finds no CUDA here; use device='cpu'|there is no device",
        ),
        ({"device": "abacus"}, r"there is no device 'abacus'; use 'cpu', 'cuda' or 'cuda:1'"),
        ({"dtype": torch.int64}, r"dtype=torch.int64: choose torch.float32"),
        (
            {"dtype": torch.float16, "mapped": True},
            r"mapped=True leaves weights in their files.*leave both out",
        ),
        ({"device": "meta", "mapped": True}, r"device 'meta' cannot be used"),
    ],
)
def test_options_that_cannot_be_had_are_one_clear_line(tmp_path, options, message):
    per_layer(tmp_path)
    with pytest.raises(circuits.InputError, match=message):
        load_transcoders(tmp_path, **options)


@pytest.mark.parametrize("where", ["no-such-set", "some/where/else", "owner/repo"])
def test_a_place_that_is_not_there_is_one_clear_line(where):
    with pytest.raises(
        circuits.InputError,
        match=rf"there are no transcoders '{where}'; give a folder.* or an address hf://owner/repo\.$",
    ):
        load_transcoders(where)


def test_a_single_weight_file_is_not_taken_for_a_set(tmp_path):
    per_layer(tmp_path)
    with pytest.raises(circuits.InputError, match="give a folder"):
        load_transcoders(tmp_path / "layer_0.safetensors")
