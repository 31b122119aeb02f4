"""Damage meters from a user's arguments."""

from circuits.running.damage import DamageMeter
from circuits.running.settings import RunSettings


def damage_meter(model, graph, task, **options) -> DamageMeter:
    return DamageMeter.prepare(model, graph, task, RunSettings.parse(task, **options))
