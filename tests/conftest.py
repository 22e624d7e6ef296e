"""What every test file may rely on: no network, one thread, a cache folder of its own."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch

from prefopt.process import collect_rarely

torch.set_num_threads(1)
collect_rarely()


def pytest_collection_finish() -> None:
    """Take what is there by now out of garbage collection: every run that is trained here collects its models."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Keep tests out of the user's cache."""
    folder = tmp_path_factory.getbasetemp() / "prefopt-cache"
    monkeypatch.setenv("PREFOPT_CACHE", str(folder))
    return folder
