"""Feature extraction against a loop over layers and positions in plain Python, on random data and
on models of other kinds.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import transformers
from meters import AllocationMeter
from torch.overrides import TorchFunctionMode

import circuits
from circuits.attribution.active_features import active_features
from circuits.attribution.local_model import freeze
from circuits.transcoders.activations import BatchTopK, JumpReLU, ReLU, TopK
from circuits.transcoders.extraction import extract_features, largest_columns
from circuits.transcoders.transcoder import Encoder, Transcoders

LAYERS, FEATURES, WIDTH = 3, 96, 8
ACTIVATIONS = {
    "relu": lambda n: ReLU(),
    "jump_relu": lambda n: JumpReLU(torch.linspace(0, 1.5, n)),
    "topk": lambda n: TopK(7),
    "batch_topk": lambda n: BatchTopK(5),
}


def random_transcoders(
    activation="relu",
    layers=LAYERS,
    features=FEATURES,
    width=WIDTH,
    dtype=torch.float32,
    whole_numbers=False,
):
    generator = torch.Generator().manual_seed(1)

    def random(*shape, scale=1.0):
        numbers = torch.randn(shape, generator=generator)
        return (numbers.round() if whole_numbers else numbers * scale).to(dtype)

    encoders = [
        Encoder(
            random(features, width, scale=width**-0.5),
            random(features, scale=0.3),
            ACTIVATIONS[activation](features),
        )
        for _ in range(layers)
    ]
    nothing = torch.zeros(1, 1, 1, dtype=dtype).expand(features, 1, width)
    return Transcoders(encoders, [nothing] * layers, [nothing[0, 0]] * layers)


def random_states(
    layers=range(LAYERS), batch=2, pos=5, width=WIDTH, dtype=torch.float32, whole_numbers=False
):
    generator = torch.Generator().manual_seed(2)
    states = {layer: torch.randn(batch, pos, width, generator=generator) for layer in layers}
    return {
        layer: (tensor.round() if whole_numbers else tensor).to(dtype)
        for layer, tensor in states.items()
    }


def activations_of_prompt(encoder, prompt):
    """[pos][feature], one number at a time."""
    pre = [
        (encoder.weight.double() @ token.double() + encoder.bias.double()).tolist()
        for token in prompt
    ]
    match encoder.activation:
        case JumpReLU(threshold):
            return [
                [
                    value if value > bar else 0.0
                    for value, bar in zip(row, threshold.tolist(), strict=True)
                ]
                for row in pre
            ]
        case TopK(k):
            kept = [sorted(row, reverse=True)[:k] for row in pre]
            return [
                [value if value in some else 0.0 for value in row]
                for row, some in zip(pre, kept, strict=True)
            ]
        case BatchTopK(k):
            some = sorted((value for row in pre for value in row), reverse=True)[: k * len(pre)]
            return [[value if value in some else 0.0 for value in row] for row in pre]
    return pre


def loop(states, transcoders, top_k=None, threshold=0.0):
    """(layer, batch, position, index) -> activation, as published loops have it."""
    found = {}
    for layer in sorted(states):
        for number, prompt in enumerate(states[layer]):
            for position, row in enumerate(
                activations_of_prompt(transcoders.encoders[layer], prompt)
            ):
                firing = [
                    (-value, index)
                    for index, value in enumerate(row)
                    if value > 0 and value >= threshold
                ]
                for value, index in sorted(sorted(firing)[:top_k], key=lambda pair: pair[1]):
                    found[layer, number, position, index] = -value
    return found


def assert_same(found, expected):
    columns = (found.layer, found.batch, found.position, found.index)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == list(expected)
    torch.testing.assert_close(
        found.activation.double(),
        torch.tensor(list(expected.values()), dtype=torch.double),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("threshold", [0.0, 0.7], ids="threshold {}".format)
@pytest.mark.parametrize("top_k", [None, 1, 6, 1000], ids="top {}".format)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_found_is_what_a_loop_over_layers_and_positions_finds(activation, top_k, threshold):
    transcoders, states = random_transcoders(activation), random_states()
    found = extract_features(states, transcoders, top_k, threshold)
    assert len(found) > 0
    assert_same(found, loop(states, transcoders, top_k, threshold))


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("features", [33, 40, 96, 256])
def test_of_equal_activations_those_of_lower_index_are_kept(features, dtype):
    transcoders = random_transcoders(features=features, dtype=dtype, whole_numbers=True)
    states = random_states(dtype=dtype, whole_numbers=True)
    for top_k in (1, 4, 30):
        expected = loop(states, transcoders, top_k, 1.0)
        assert len(set(expected.values())) < len(expected) / 3
        assert_same(extract_features(states, transcoders, top_k=top_k, threshold=1.0), expected)


def test_the_largest_of_long_rows_in_low_precision_are_those_of_a_stable_sort():
    values = torch.randint(
        128, 256, (3, (1 << 16) + 65), generator=torch.Generator().manual_seed(0)
    ).bfloat16()
    for k in (1, 700):
        places = values.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
        assert torch.equal(largest_columns(values, k), places)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_an_activation_equal_to_the_threshold_counts_and_one_below_it_does_not(dtype):
    numbers = [0.125, 0.01]
    weight = torch.tensor(numbers, dtype=dtype)[:, None]
    transcoders = Transcoders(
        [Encoder(weight, weight[:, 0] * 0, ReLU())], [weight[:, None]], [weight[0]]
    )
    states = {0: torch.ones(1, 1, 1, dtype=dtype)}
    stored = float(weight[1])
    for threshold in (0.125, 0.01, stored, stored * 1.0001, 0.1251):
        expected = [index for index, number in enumerate((0.125, stored)) if number >= threshold]
        for top_k in (None, 1, 2):
            assert (
                extract_features(states, transcoders, top_k, threshold).index.tolist()
                == expected[:top_k]
            )


def test_a_feature_at_its_own_threshold_does_not_fire():
    one = torch.ones(1, 1)
    transcoders = Transcoders([Encoder(one, one[0] * 0, JumpReLU(one[0]))], [one[None]], [one[0]])
    assert len(extract_features({0: torch.ones(1, 1, 1)}, transcoders)) == 0
    assert extract_features({0: torch.full((1, 1, 1), 1.5)}, transcoders).activation.tolist() == [
        1.5
    ]


@pytest.mark.parametrize("top_k", [None, 6], ids="top {}".format)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_pieces_give_what_the_whole_gives(activation, top_k):
    transcoders, states = (
        random_transcoders(activation, dtype=torch.float64),
        random_states(batch=4, dtype=torch.float64),
    )
    whole = extract_features(states, transcoders, top_k, 0.1, max_memory=1 << 30)
    for max_memory in (1, 1 << 13, 1 << 15, 3 << 14, 1 << 17):
        pieces = extract_features(states, transcoders, top_k, 0.1, max_memory=max_memory)
        for name in ("layer", "batch", "position", "index"):
            assert torch.equal(getattr(pieces, name), getattr(whole, name))
        torch.testing.assert_close(pieces.activation, whole.activation)


@pytest.mark.parametrize("top_k", [None, 10], ids="top {}".format)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["relu", "jump_relu", "topk"])
def test_it_takes_no_more_memory_than_it_may(activation, stored, top_k):
    transcoders = random_transcoders(activation, features=2048, width=64, dtype=stored)
    states = random_states(batch=4, pos=64, width=64)
    for max_memory in (1 << 20, 1 << 22):
        with AllocationMeter() as meter:
            found = extract_features(states, transcoders, top_k, 3.0, max_memory=max_memory)
        columns = 40 * len(found) + (12 * 10 * LAYERS * 256 * 3 if top_k else 0)
        assert meter.growing <= max_memory + columns
    assert meter.growing > max_memory / 8


class Waiting(TorchFunctionMode):
    """Counts what makes the host wait for a device: numbers read back, and results whose size
    depends on numbers.
    """

    NAMES = (
        "item",
        "tolist",
        "cpu",
        "numpy",
        "nonzero",
        "unique",
        "masked_select",
        "__bool__",
        "__int__",
        "__float__",
        "equal",
    )

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        by_mask = name == "__getitem__" and any(
            isinstance(one, torch.Tensor) and one.dtype == torch.bool
            for one in (args[1], *args[1:])
        )
        if name in self.NAMES or by_mask or (name == "where" and len(args) == 1):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("top_k", [None, 6], ids="top {}".format)
def test_the_host_waits_as_often_for_many_layers_as_for_one(top_k):
    counts = []
    for layers in (1, 6):
        transcoders, states = random_transcoders(layers=layers), random_states(range(layers))
        with Waiting() as waiting:
            extract_features(states, transcoders, top_k, 0.1)
        counts.append(waiting.counts)
    assert counts[0] == counts[1]
    assert counts[0]["nonzero"] == counts[0]["tolist"] == 1


def test_some_layers_may_be_given_in_any_order():
    transcoders, states = random_transcoders(), random_states()
    found = extract_features({2: states[2], 0: states[0]}, transcoders, 4)
    assert_same(found, loop({0: states[0], 2: states[2]}, transcoders, 4))
    assert (found.layers, found.shape) == ((0, 2), (2, 5))


def test_encoders_may_be_stored_in_another_precision():
    transcoders, states = random_transcoders("jump_relu", dtype=torch.bfloat16), random_states()
    found = extract_features(states, transcoders)
    assert found.activation.dtype == torch.float32
    assert_same(found, loop(states, transcoders))
    assert_same(extract_features(states, transcoders, max_memory=2000), loop(states, transcoders))


def test_hidden_states_that_require_gradients_are_taken_as_they_are():
    states = {layer: tensor.requires_grad_() for layer, tensor in random_states().items()}
    assert not extract_features(states, random_transcoders()).activation.requires_grad


def test_the_table_has_a_row_for_each():
    found = extract_features(
        random_states(dtype=torch.bfloat16), random_transcoders(dtype=torch.bfloat16), 3, 0.5
    )
    table = found.table()
    assert list(table.columns) == ["layer", "batch", "position", "index", "activation"]
    assert len(table) == len(found) > 0
    assert table["activation"].tolist() == found.activation.tolist()
    assert table["index"].tolist() == found.index.tolist()


def test_nothing_found_is_an_empty_table():
    for top_k in (None, 3):
        found = extract_features(random_states(), random_transcoders(), top_k, 1e6)
        assert len(found) == len(found.table()) == 0


def test_the_features_of_a_transformer_lens_model_are_those_of_its_attribution_graph(toy_world):
    cfg = toy_world.cfg
    transcoders = random_transcoders("jump_relu", cfg.n_layers, 64, cfg.d_model)
    local = freeze(toy_world, transcoders, [torch.arange(9)])
    (active,) = active_features(local, transcoders, leading=0)
    found = extract_features(
        {layer: frozen.feature_input[None] for layer, frozen in enumerate(local[0].layers)},
        transcoders,
    )
    for name in ("layer", "position", "index", "activation"):
        assert torch.equal(getattr(found, name), getattr(active, name))


TEXT = {
    "vocab_size": 60,
    "hidden_size": WIDTH,
    "intermediate_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
IMAGE = 59


def seeded(make):
    """A model with random weights that depend on no other test."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def mlp_inputs(model, layers, inputs):
    """What each of these layers' MLPs reads, by forward hooks."""
    states = {}
    handles = [
        layer.mlp.register_forward_pre_hook(
            lambda module, given, number=number: states.update({number: given[0]})
        )
        for number, layer in enumerate(layers)
    ]
    output = model(**inputs, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    return states, output


def pixels(seed):
    return torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["Qwen2", "Llama"])
def test_the_features_of_a_language_model_from_hugging_face(kind):
    config = getattr(transformers, f"{kind}Config")(**TEXT)
    model = seeded(lambda: getattr(transformers, f"{kind}ForCausalLM")(config))
    states, output = mlp_inputs(
        model, model.model.layers, {"input_ids": torch.arange(3, 13).view(2, 5)}
    )
    transcoders = random_transcoders("jump_relu")
    assert_same(
        extract_features(states, transcoders, 10, 0.01), loop(states, transcoders, 10, 0.01)
    )
    # Of hidden states as the model returns them, the first is the embedding and the others follow a
    # layer each.
    residuals = dict(enumerate(output.hidden_states[1:]))
    assert_same(
        extract_features(residuals, transcoders, 10, 0.01), loop(residuals, transcoders, 10, 0.01)
    )


def test_the_features_of_a_vision_transformer():
    model = seeded(lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)))
    images = torch.cat([pixels(0), pixels(1)])
    states, _ = mlp_inputs(model, model.encoder.layers, {"pixel_values": images})
    found = extract_features(states, random_transcoders("topk"), 5)
    assert_same(found, loop(states, random_transcoders("topk"), 5))
    assert found.shape == (2, 1 + 4)


def llava():
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_seq_length=4,
    )
    tokens = torch.tensor([[3, 4, *[IMAGE] * 4, 5, 6]])
    return seeded(lambda: transformers.LlavaForConditionalGeneration(config)), lambda seed: {
        "input_ids": tokens,
        "pixel_values": pixels(seed),
    }


def qwen_vl():
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "patch_size": 4,
    }
    vision |= {
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    rope = {"rope_type": "default", "mrope_section": [1, 1], "rope_theta": 10000.0}
    special = {
        "image_token_id": IMAGE,
        "video_token_id": 58,
        "vision_start_token_id": 57,
        "vision_end_token_id": 56,
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, **special
    )
    tokens = torch.tensor([[3, 57, *[IMAGE] * 4, 56, 5, 6]])

    def inputs(seed):
        patches = (
            pixels(seed).flatten().repeat(8).view(16, 3 * 2 * 4 * 4)
            + torch.arange(16)[:, None] / 16
        )
        return {
            "input_ids": tokens,
            "pixel_values": patches,
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
            "mm_token_type_ids": (tokens == IMAGE).int(),
        }

    return seeded(lambda: transformers.Qwen2_5_VLForConditionalGeneration(config)), inputs


@pytest.mark.parametrize("make", [llava, qwen_vl])
def test_the_features_of_a_vision_language_model_depend_on_the_image_from_where_it_stands(make):
    model, inputs = make()
    transcoders, image = random_transcoders(), inputs(0)["input_ids"][0].tolist().index(IMAGE)
    tables = []
    for seed in (0, 1):
        states, _ = mlp_inputs(model, model.model.language_model.layers, inputs(seed))
        found = extract_features(states, transcoders, 10, 0.01)
        assert_same(found, loop(states, transcoders, 10, 0.01))
        tables.append(found.table())
    before, after = (
        [table[(table["position"] < image) == early].to_numpy().tolist() for table in tables]
        for early in (True, False)
    )
    assert before[0] == before[1]
    assert after[0] != after[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda states: states.clear(), "there are no hidden states"),
        (
            lambda states: states.update({3: states[0]}),
            "layer 3 is none of those of 'transcoders'; give hidden states of layers 0 to 2",
        ),
        (
            lambda states: states.update({1: states[1][..., :7]}),
            r"layer 1 have shape \(2, 5, 7\); 'transcoders' reads \[batch, pos, 8\]",
        ),
        (lambda states: states.update({1: states[1][0]}), r"layer 1 have shape \(5, 8\)"),
        (lambda states: states.update({1: states[1][:, :0]}), r"layer 1 have shape \(2, 0, 8\)"),
        (
            lambda states: states.update({2: states[2][:, :4]}),
            r"layer 2 are \(2, 4, 8\) .* those of layer 0 \(2, 5, 8\) .* same prompts",
        ),
        (
            lambda states: states.update({2: states[2].double()}),
            "layer 2 are .* in torch.float64, .* in one precision",
        ),
        (lambda states: states.update({1: states[1].int()}), "layer 1 are of type torch.int32"),
        (lambda states: states[1][1, 2].fill_(torch.nan), "layer 1 are not finite"),
        (lambda states: states[2][0, 0, :1].fill_(torch.inf), "layer 2 are not finite"),
        (lambda states: states[0].fill_(3e38), "pre-activations of layer 0 are not finite"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hidden_states_that_do_not_fit_are_refused_in_one_line(change, message, unchecked_types):
    states = random_states()
    change(states)
    with pytest.raises(circuits.InputError, match=message) as raised:
        extract_features(states, random_transcoders())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "top_k=0: give a whole number, 1 or more"),
        ({"threshold": -0.5}, "threshold=-0.5: give a number from 0 up"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"max_memory": 0}, "max_memory=0 must be a positive number"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(circuits.InputError, match=message):
        extract_features(random_states(), random_transcoders(), **settings)


def test_a_mapped_encoder_is_read_where_it_lies(tmp_path):
    transcoders, states = random_transcoders(), random_states()
    mapped = []
    for layer, encoder in enumerate(transcoders.encoders):
        path = tmp_path / f"{layer}.bin"
        encoder.weight.half().numpy().tofile(path)
        weight = torch.from_file(str(path), size=encoder.weight.numel(), dtype=torch.float16).view(
            encoder.weight.shape
        )
        mapped.append(Encoder(weight, encoder.bias, encoder.activation))
    transcoders = replace(transcoders, encoders=mapped)
    assert_same(extract_features(states, transcoders, 5), loop(states, transcoders, 5))
