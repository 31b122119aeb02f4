"""Shared by all tests: one thread each (the suite runs one process per core), and the embedded model loaded once."""

import pytest
import torch

import circuits

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy_world():
    return circuits.load_model("toy-world", device="cpu")
