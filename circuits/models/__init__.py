"""Models: the only package that imports transformer_lens or reads a model's modules.

Everything else names nodes. This package knows the hook point at which a node writes or reads,
which flags those hook points need, and what a block consists of. It never changes a model: flags,
hooks, gradients and modes are restored.
"""

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
from circuits.models.hooked_run import (
    Hook,
    copies_per_head,
    frozen,
    hooked,
    plain_inputs,
    run_to_residual,
    separate_gradients,
    separate_inputs,
    unembed,
)
from circuits.models.loading import EMBEDDED, Model, build_model, load_model, save_model
from circuits.models.weights import ModelWeights

__all__ = [
    "EMBEDDED", "FINAL_SCALE", "NORMS", "Hook", "Model", "ModelWeights",
    "attention_output_hook", "build_model", "copies_per_head", "frozen", "hooked", "input_hook",
    "load_model", "mlp_output_hook", "mlp_residual_hook", "output_hook", "pattern_hook",
    "plain_inputs", "projection_hook", "residual_hook", "run_to_residual", "save_model",
    "scale_hooks", "separate_gradients", "separate_inputs", "unembed",
]  # fmt: skip
