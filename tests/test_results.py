"""The results page says what the stored results say, and the quick ones come out again."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distpc.errors import ArtifactError, ConfigError

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO / "tools"))

from results_page import render, store  # noqa: E402

QUICK = {
    "digits": "configs/digits.yaml",
    "digits_hclt": "configs/digits_hclt.yaml",
}


@pytest.fixture()
def copy(tmp_path: Path) -> Path:
    shutil.copytree(REPO / "docs", tmp_path / "docs")
    shutil.copy(REPO / "README.md", tmp_path)
    return tmp_path


def test_every_figure_is_that_of_a_stored_result() -> None:
    done = subprocess.run(
        [sys.executable, REPO / "tools" / "results.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all figures hold" in done.stdout


def test_a_changed_figure_is_named(copy: Path) -> None:
    path = copy / store.FOLDER / "digits.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"test_bpd": stored["test_bpd"] + 0.5}))
    wrong = render.differences(copy)
    assert {line.split(":")[0] for line in wrong} == {
        str(copy / "README.md"),
        str(copy / "docs" / "results.md"),
    }
    assert any(f"{stored['test_bpd']:.4f}" in line for line in wrong)
    assert set(render.write(copy)) >= {copy / "README.md", copy / "docs" / "results.md"}
    assert render.differences(copy) == []


def test_what_is_no_result_is_refused(copy: Path) -> None:
    with pytest.raises(ArtifactError, match="nothing was reported there"):
        store.add(copy, "none", copy / "docs", title="none", command="none")
    (copy / store.FOLDER / "odd.json").write_text('{"kind": "guess"}')
    with pytest.raises(ArtifactError, match=r"odd\.json"):
        render.differences(copy)
    (copy / store.FOLDER / "odd.json").unlink()
    (copy / store.FOLDER / "digits.json").unlink()
    with pytest.raises(ConfigError, match="names a result that is not stored"):
        render.differences(copy)


def test_a_run_and_a_table_are_added(copy: Path) -> None:
    report: dict[str, Any] = {
        "test_bpd": 2.5,
        "valid_bpd": 2.25,
        "num_parameters": 1234,
        "dataset": {"name": "x"},
        "stages": {"finetune": {"seconds": 3.5}, "evaluate": {"seconds": 1.0}},
    }
    (copy / "run").mkdir()
    (copy / "run" / "report.json").write_text(json.dumps(report))
    path = store.add(copy, "new", copy / "run", title="a new one", command="distpc run x.yaml")
    table = {**json.loads(path.read_text()), "kind": "table", "summary": "fine",
             "columns": ["states", "bpd"], "rows": [[32, "1.25"]]}  # fmt: skip
    (path.parent / "table.json").write_text(json.dumps(table))
    render.write(copy)
    page = (copy / "docs" / "results.md").read_text()
    assert "| 1,234 | 2.5000 | 2.2500 |" in page and "4 s; commit" in page
    assert "| 32 | 1.25 |" in page
    assert "All figures" not in page
    report["dataset"]["caveat"] = "of lossy colours"
    (copy / "run" / "report.json").write_text(json.dumps(report))
    store.add(copy, "new", copy / "run", title="a new one", command="distpc run x.yaml")
    render.write(copy)
    assert "All figures are of lossy colours." in (copy / "docs" / "results.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_quick_results_come_out_again(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "distpc", "run", str(REPO / QUICK[name])]
    subprocess.run([*command, "--out", str(tmp_path / "run")], check=True)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    stored = store.load(REPO)[name]
    assert report["test_bpd"] == pytest.approx(stored["test_bpd"], abs=1e-3)
    assert report["num_parameters"] == stored["num_parameters"]
