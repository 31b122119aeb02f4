"""Find, run and compare circuits in transformer language models.

>>> import circuits
>>> model = circuits.load_model("toy-world")
>>> task = circuits.load_task("ioi", model, n=8, split="train")
>>> circuit = circuits.ACDC(threshold=0.1).discover(model, task)
>>> circuits.evaluate(model, circuit, task).faithfulness("logit_difference") > 0
True

The public names are listed in `__init__.pyi`. They are imported when first used, so that
`circuits --help` does not wait for torch.
"""

from importlib.metadata import PackageNotFoundError, version

import lazy_loader

try:
    __version__ = version("transformer-circuits")
except PackageNotFoundError:  # a checkout that is on the path but not installed
    __version__ = "unknown"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
