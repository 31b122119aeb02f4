"""Errors and questions of other libraries while models are loaded, told in one line."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

import transformers
from transformers import dynamic_module_utils as remote_code

from circuits.models.backend import HAS_HOOKED_TRANSFORMER
from circuits.system.errors import InputError
from circuits.system.messages import warnings_passed_on

if HAS_HOOKED_TRANSFORMER:
    from transformer_lens import loading_from_pretrained as conversion

LONGEST_REASON = 200  # characters of another library's message
TRUST = "trust_remote_code"
NO_CODE: dict[str, Any] = {TRUST: False}
# Seconds that transformers waits for an answer to its question; with 0 it does not ask.
TIME_TO_ANSWER = "TIME_OUT_REMOTE_CODE"
# These settings are global, so models are loaded one at a time.
_LOADING = threading.RLock()


class NoProcessor:
    """Stands for what reads images and sounds, which are not asked for here."""

    @staticmethod
    def from_pretrained(*args: Any, **kwargs: Any) -> None:
        """Return none."""


@contextlib.contextmanager
def running_no_code() -> Iterator[None]:
    """Run no code that comes with a model, ask nobody whether it should be, and fail by no warning.

    `trust_remote_code=False` is not enough: TransformerLens loads a tokenizer a second time without
    it, in which case transformers asks on the terminal, and takes it for true for some names.
    Where a model also reads images, TransformerLens looks for what prepares them, and installs
    packages with pip if that cannot be read.
    """
    changed: list[tuple[Any, str, Any]] = [
        (remote_code, TIME_TO_ANSWER, 0),
        (transformers, "AutoProcessor", NoProcessor),
    ]
    if HAS_HOOKED_TRANSFORMER:
        changed.append((conversion, "NEED_REMOTE_CODE_MODELS", ()))
    with _LOADING, warnings_passed_on(), contextlib.ExitStack() as stack:
        for module, name, value in changed:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        # TransformerLens prints, but a program may read our standard output.
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


@contextlib.contextmanager
def refusals(problem: str) -> Iterator[None]:
    """Tell in one line what transformers or TransformerLens cannot load."""
    try:
        yield
    except InputError:
        raise
    # They raise errors of every type.
    except Exception as error:
        if TRUST in str(error):
            raise InputError(
                f"{problem}: it needs Python code that comes with it (auto_map in its JSON files), "
                "and code of models is never run; give a checkpoint whose architecture "
                "transformers itself has."
            ) from error
        raise InputError(
            f"{problem} ({reason(error)}); give a complete folder of a decoder-only model that "
            "TransformerLens supports."
        ) from error


def reason(error: BaseException) -> str:
    """Tell an error of another library in a few words."""
    words = str(error).split()
    told = " ".join([type(error).__name__, *words])
    return told[:LONGEST_REASON]


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
