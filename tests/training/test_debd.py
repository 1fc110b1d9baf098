"""HCLTs on binary data sets reach the published level (papers.md E.3: HCLT-100, EM)."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

REPO = Path(__file__).parents[2]
DATA = Path(os.environ.get("DISTPC_DEBD", REPO.parent / "shared" / "data" / "debd"))

needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"no binary data sets in {DATA}; DISTPC_DEBD names their folder"
)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_debd", REPO / "tools" / "train_debd.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_debd"] = module
    spec.loader.exec_module(module)
    return module


def write_split(folder: Path, name: str, split: str, rows: np.ndarray) -> None:
    np.savetxt(folder / f"{name}.{split}.data.gz", rows, fmt="%d", delimiter=",")


def test_two_clusters_are_learnt(tool: ModuleType, tmp_path: Path) -> None:
    # Eight copies of one fair coin, each flipped in a tenth of the cases.
    rng = np.random.default_rng(0)
    for split, size in (("train", 2000), ("valid", 200), ("test", 1000)):
        coin = rng.integers(0, 2, (size, 1))
        write_split(tmp_path, "coins", split, coin ^ (rng.random((size, 8)) < 0.1))
    settings = tool.parser().parse_args([str(tmp_path), "--states", "4", "--epochs", "8"])
    row = tool.train(tmp_path, "coins", settings)
    flips = np.arange(9)
    share = 0.5 * (0.1**flips * 0.9 ** (8 - flips) + 0.9**flips * 0.1 ** (8 - flips))
    test = tool.read(tmp_path, "coins", "test").sum(1)
    assert row["test"] == pytest.approx(np.log(share)[test].mean(), abs=0.03)


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize(
    ("name", "at_least"), [("nltcs", -6.01), ("plants", -12.80), ("bnetflix", -56.6)]
)
def test_published_level(tool: ModuleType, name: str, at_least: float) -> None:
    row = tool.train(DATA, name, tool.parser().parse_args([str(DATA)]))
    assert row["test"] >= at_least
