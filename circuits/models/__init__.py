"""Models: the only package that imports transformer_lens or reads a model's modules.

Everything else names nodes. This package knows the hook point at which a node writes or reads,
which flags those hook points need, and what a block consists of. It never changes a model: flags,
hooks, gradients and modes are restored.
"""

# ruff: noqa: F401  (what other rooms import from here)

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
    hook_names,
    input_hook,
    mlp_output_hook,
    mlp_residual_hook,
    output_hook,
    pattern_hook,
    projection_hook,
    residual_hook,
    scale_hooks,
)
from circuits.models.hooked_run import (
    Hook,
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
from circuits.models.identity import check_fits
from circuits.models.loading import (
    EMBEDDED,
    Model,
    build_model,
    check_class,
    load_model,
    save_model,
)
from circuits.models.overflow import cause, check_weights, count_not_finite
from circuits.models.weights import ModelWeights
