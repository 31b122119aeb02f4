"""Models: the only package that imports transformer_lens or reads a model's modules.

Everything else names nodes. This package knows the hook point at which a node writes or reads,
how a model is run so that hooks reach it, and what a block consists of. Models of TransformerLens'
two classes are behind one interface, `Backend`. A model is never changed: flags, hooks, gradients
and modes are restored.
"""

# ruff: noqa: F401  (what other rooms import from here)

import circuits.models.bridge.backend
from circuits.models.backend import (
    HAS_HOOKED_TRANSFORMER,
    Changes,
    Hook,
    Model,
    check_class,
    hook_names,
    shape_of,
    weights_of,
)
from circuits.models.changes import (
    after_embedding,
    changes,
    check_differentiable,
    check_model,
    check_unchanged,
    named,
    only_hooked,
    turn,
)
from circuits.models.hook_points import (
    FINAL_SCALE,
    NORMS,
    attention_output_hook,
    input_hook,
    mlp_output_hook,
    mlp_residual_hook,
    output_hook,
    pattern_hook,
    projection_hook,
    residual_hook,
    scale_hooks,
)
from circuits.models.identity import check_fits
from circuits.models.layers.weights import ModelWeights
from circuits.models.loading.load import load_model
from circuits.models.loading.saved import build_model, save_model
from circuits.models.loading.source import EMBEDDED
from circuits.models.overflow import cause, check_weights, count_not_finite
from circuits.models.running import (
    copies_per_head,
    counting_passes,
    frozen,
    hooked,
    plain_inputs,
    received,
    run_to_logits,
    run_to_residual,
    scored_logits,
    separate_gradients,
    separate_inputs,
    told,
    unembed,
)

if HAS_HOOKED_TRANSFORMER:
    import circuits.models.hooked_transformer.backend
