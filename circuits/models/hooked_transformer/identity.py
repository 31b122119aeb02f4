"""What a HookedTransformer computes, for digests, and the first version of its fingerprint."""

from __future__ import annotations

import hashlib
from typing import Any

from transformer_lens import HookedTransformer

from circuits.models.identity import architecture, checksum, values_and_hooks


def computed_by(model: HookedTransformer) -> dict[str, Any]:
    """All that is in and on its modules, but for their parameters."""
    return {name: values_and_hooks(module) for name, module in model.named_modules()}


def first_fingerprint(model: HookedTransformer) -> str:
    """Return the fingerprint that the first version of this package wrote to files."""
    digest = hashlib.blake2b(architecture(model.cfg).encode(), digest_size=16)
    # Sorted, so that the order of parameters does not matter.
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(checksum(parameter.detach()))
    return digest.hexdigest()
