"""From a model of transformers to a HookedTransformer, by TransformerLens 3."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformer_lens import (
    HookedTransformer,
    HookedTransformerConfig,
    loading_from_pretrained as conversion,
)

from circuits.models.bridge.shape import context
from circuits.models.loading.placement import Placement
from circuits.models.loading.refusals import NO_CODE, TRUST
from circuits.models.loading.source import Source

# TransformerLens wants this setting, which transformers no longer writes.
CONTEXT = "n_ctx"


def to_hooked_transformer(source: Source, placement: Placement) -> HookedTransformer:
    """Convert a model. It shares its weights' memory with the source, where types are the same.

    Raises errors of every type where TransformerLens does not know the model.
    """
    with tempfile.TemporaryDirectory() as parent:
        # TransformerLens guesses the architecture from words in the path, such as "llama". Under
        # a neutral path it reads config.json instead.
        neutral = Path(parent, "checkpoint")
        settings = source.model.config
        stated = settings.to_dict()
        if not hasattr(settings, CONTEXT) and hasattr(settings, "n_positions"):
            settings = type(settings)(**stated, n_ctx=settings.n_positions)
        settings.save_pretrained(neutral)
        path = str(neutral)
        options = placement.of_lens | NO_CODE
        config = conversion.get_pretrained_model_config(path, **options)
        config.init_weights = False
        stated = context(source.model.config)
        if stated is not None and config.positional_embedding_type != "standard":
            # TransformerLens has numbers of its own for some architectures.
            config.n_ctx = min(config.n_ctx, stated)
        weights = conversion.get_pretrained_state_dict(
            path, config, source.model, dtype=placement.dtype, **NO_CODE
        )
        model = HookedTransformer(config, source.tokenizer, move_to_device=False)
    for name, empty in model.state_dict().items():
        # Biases that a conversion leaves out are zero.
        if ".W_" not in name or name in weights:
            continue
        if _is_read(name, config):
            raise ValueError(f"its conversion has no {name}")
        weights[name] = torch.zeros_like(empty)
    state = model.fill_missing_keys(weights)
    own = _with_memory_of_its_own(state)
    # Assigned, not copied: the files are mapped into memory, and stay there once.
    model.load_state_dict(own, strict=False, assign=True)
    model.cfg.model_name = source.name
    model.move_model_modules_to_device()
    return model.eval()


def by_name(name: str, placement: Placement) -> HookedTransformer:
    """Load a model that is published in TransformerLens' own format."""
    options = placement.of_lens | NO_CODE
    config = conversion.get_pretrained_model_config(name, **options)
    if config.trust_remote_code:
        raise ValueError(f"TransformerLens would load it with {TRUST}")
    model = HookedTransformer.from_pretrained_no_processing(name, **options)
    return model.eval()


def _is_read(name: str, config: HookedTransformerConfig) -> bool:
    """Whether a run reads this weight."""
    return name != "pos_embed.W_pos" or config.positional_embedding_type == "standard"


def _with_memory_of_its_own(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give every weight memory that no other has, such as of an embedding that is used twice."""
    seen: set[tuple[Any, ...]] = set()
    separate = {}
    for name, tensor in state.items():
        place = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
        is_shared = place in seen and tensor.numel() > 0
        seen.add(place)
        separate[name] = tensor.detach().clone() if is_shared else tensor.detach()
    return separate
