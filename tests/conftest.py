"What all tests share: a home of their own, no network, and this environment's commands on the path."
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config):
    "Before anything is imported: nothing a test does may reach the checkout's `results/` or the user's files."
    config.kdnb_home = tempfile.mkdtemp(prefix="kdnb-test-")
    os.environ.update(KDNB_HOME=config.kdnb_home, HF_HUB_OFFLINE="1", MPLBACKEND="agg",
                      PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    os.environ.pop("KDNB_DATA", None)


def pytest_unconfigure(config): shutil.rmtree(config.kdnb_home, ignore_errors=True)


@pytest.fixture(scope="session")
def root(): return ROOT


@pytest.fixture
def house(tmp_path, monkeypatch):
    "A home that only this test uses."
    monkeypatch.setenv("KDNB_HOME", str(tmp_path/"home"))
    return tmp_path/"home"


@pytest.fixture(scope="module")
def one_thread():
    "For tests that compare bits: the number of threads is fixed."
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
