"""The names of metrics, which commands know before torch is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from circuits.system.errors import InputError
from circuits.system.messages import suggestion
from circuits.system.numbers import shown

if TYPE_CHECKING:
    from circuits.tasks.metrics import Metric

# The metrics that ship with this package, which `circuits.tasks.metrics` defines.
SHIPPED_METRICS = (
    *("kl", "logit_difference", "probability_difference"),
    *("negative_log_probability", "accuracy", "squared_error"),
)
# By name, what `circuits.tasks.metrics` adds, and users.
METRICS: dict[str, Metric] = {}
# Other names of metrics, as other programs have them.
ALIASES = {"logit_diff": "logit_difference", "prob_diff": "probability_difference"}


def metric_names() -> list[str]:
    """The names that metrics go by, but for their aliases."""
    return list(dict.fromkeys((*SHIPPED_METRICS, *METRICS)))


def checked_metric(metric: Any) -> Any:
    """The name of a metric as `METRICS` has it, or a metric of the user's own."""
    if not isinstance(metric, str):
        # Made by `Metric`, which is defined above this room's tasks.
        if hasattr(metric, "damage") and not isinstance(metric, type):
            return metric
        raise InputError(f"metric={shown(metric)}: give the name of a metric, or a Metric.")
    known = metric_names()
    name = metric if metric in known else ALIASES.get(metric)
    if name is None:
        raise InputError(f"there is no metric {shown(metric)}; {suggestion(metric, known)}")
    return name
