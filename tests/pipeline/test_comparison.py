"""`distpc compare`: which runs it plans, what it refuses, what it reports, and a whole one."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distpc.config import RunConfig, load_config
from distpc.errors import ConfigError, TrainingError
from distpc.pipeline.comparison.command import describe_runs
from distpc.pipeline.comparison.table import rows_of, table_text
from distpc.pipeline.comparison.variants import Run, plan_runs, standard_variants
from distpc.pipeline.describe import summarize

CONFIG = Path(__file__).parents[2] / "configs" / "digits_compare.yaml"
EM = "{group: em, set: {finetune.initialization: random, teacher.kind: none}}"


def config(*overrides: str) -> RunConfig:
    return load_config(CONFIG, overrides)


def test_runs_are_variants_by_sizes_by_seeds(tmp_path: Path) -> None:
    runs = plan_runs(config("compare.sizes=[4, 8]", "compare.seeds=[3, 5]"), tmp_path)
    assert len(runs) == 9 * 2 * 2
    assert len({run.folder for run in runs}) == len(runs)
    assert {run.config.latents.num_clusters for run in runs} == {4, 8}
    assert {run.config.seed for run in runs} == {3, 5}
    # All are measured on the same samples, and learn the same tree.
    assert {run.config.split_seed for run in runs} == {0}
    fast = next(run for run in runs if run.variant == "em_fast")
    assert (fast.group, fast.config.finetune.step_size, fast.size) == ("em", 0.3, 4)
    assert "size 4 seed 3" in fast.name


def test_some_variants_can_be_asked_for(tmp_path: Path) -> None:
    runs = plan_runs(config("compare.only=[pixels, em_fast]"), tmp_path)
    assert [run.variant for run in runs] == ["pixels", "pixels", "em_fast", "em_fast"]


@pytest.mark.parametrize(
    ("kind", "own"), [("pixels", {"pixels"}), ("mae", {"pixels", "mae"}), ("random", {"pixels"})]
)
def test_standard_variants_have_every_control(kind: str, own: set[str], tmp_path: Path) -> None:
    asked = config(f"teacher.kind={kind}", "compare.variants={}")
    variants = standard_variants(asked)
    controls = {"shuffled", "random_features", "random_patches"}
    assert {name for name, v in variants.items() if v.group is None} == controls | own
    assert sum(variant.group == "em" for variant in variants.values()) == 3
    assert len(plan_runs(asked, tmp_path)) == 2 * len(variants)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("compare.variants={a: {set: {structure.leaf: hclt}}}", "structure.leaf"),
        ("compare.variants={a: {set: {data.split.train: 0.5}}}", "data.split.train"),
        ("compare.variants={a: {set: {finetune.num_epochs: 3}}}", "finetune.num_epochs"),
        ("compare.variants={a: {set: {seed: 3}}}", "seed"),
        ("compare.variants={a: {set: {latents.num_clusters: 8}}, b: {}}", "latents.num_clusters"),
        ("compare.variants={a: {set: {nothing.here: 8}}}", "nothing.here"),
        ("compare.variants={a: {set: {finetune.step_sise: 0.1}}}", "step_size"),
        ("compare.variants={../a: {}}", "compare.variants"),
        ("compare.only=[pixels, none_such]", "none_such"),
        ("structure.tree_of=latents", "tree_of"),
        ("compare.seeds=[]", "compare.seeds"),
    ],
)
def test_unequal_comparisons_are_refused(override: str, named: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_runs(config(override), tmp_path)
    assert named in str(caught.value)


def facts(test: float, valid: float, **others: Any) -> dict[str, Any]:
    return {
        "test_bpd": test, "valid_bpd": valid, "num_parameters": 10, "num_visits": 100,
        "distillation_visits": 0, "dead_states": 1, "num_states": 8, "training_seconds": 2.0,
        "curve": [[0, 8.0], [100, valid]], **others,
    }  # fmt: skip


def planned(tmp_path: Path) -> list[Run]:
    em = "compare.variants={a: " + EM + ", b: " + EM + ", pixels: {}}"
    return plan_runs(config(em), tmp_path)


def test_the_best_of_a_group_is_chosen_on_validation(tmp_path: Path) -> None:
    found = [facts(2.0, 2.2), facts(2.2, 2.4), facts(2.5, 2.1), facts(2.5, 2.1), facts(1, 3),
             facts(1.5, 3)]  # fmt: skip
    rows = rows_of(planned(tmp_path), found, batch=10)
    assert rows["a"]["test_bpd"] == pytest.approx(2.1)
    assert rows["a"]["spread"] == pytest.approx(0.2)
    # b is better on the validation split, though not on the test split.
    assert rows["em (best)"]["chosen"] == "b"
    assert rows["em (best)"]["test_bpd"] == 2.5
    assert set(rows["pixels"]["seeds"]) == {0, 1}
    lines = table_text(rows, "bpd").splitlines()
    assert "pixels" in lines[2]
    assert "em (best): b" in lines[4] + lines[5]


@pytest.mark.parametrize("other", [{"num_parameters": 11}, {"num_visits": 120}])
def test_unequal_results_are_refused(other: dict[str, int], tmp_path: Path) -> None:
    found = [facts(2.0, 2.0)] * 5 + [facts(2.0, 2.0, **other)]
    with pytest.raises(TrainingError, match="nothing to compare") as caught:
        rows_of(planned(tmp_path), found, batch=10)
    assert "pixels seed 1" in str(caught.value)


def test_sizes_are_rows_of_their_own(tmp_path: Path) -> None:
    runs = planned(tmp_path)
    larger = [replace(run, size=16) for run in runs]
    smaller = [replace(run, size=8) for run in runs]
    found = [facts(2.0, 2.0)] * 6 + [facts(1.0, 1.0, num_parameters=99)] * 6
    rows = rows_of([*smaller, *larger], found, batch=10)
    assert rows["a@16"]["num_parameters"] == 99
    assert rows["em (best)@8"]["test_bpd"] == 2.0


def test_a_teacher_with_a_likelihood_stands_beside_its_student(tmp_path: Path) -> None:
    runs = plan_runs(config("compare.only=[pixels, vae]"), tmp_path)
    found = [facts(2.0, 2.1)] * 2 + [facts(1.9, 2.0, teacher_valid_bpd=bits) for bits in (2.5, 2.7)]
    rows = rows_of(runs, found, batch=10)
    assert rows["vae"]["teacher_valid_bpd"] == pytest.approx(2.6)
    head, _, vae, pixels = (line.split("|") for line in table_text(rows, "bpd").splitlines())
    assert head[-2].strip() == "the teacher's own valid bpd"
    assert (vae[-2].strip(), pixels[-2].strip()) == ("2.6000", "")
    without = table_text({"pixels": rows["pixels"]}, "bpd")
    assert "teacher" not in without


def test_a_whole_comparison(tmp_path: Path) -> None:
    """EM and distillation on digits, then the same command again: nothing is run twice."""
    variants = "compare.variants={em: " + EM + ", pixels: {}}"
    overrides = [variants, "compare.seeds=[0]", "compare.sizes=[4, 8]", "finetune.num_epochs=3",
                 "evaluate.num_pictures=4", "compare.num_parallel=2"]  # fmt: skip
    command = [sys.executable, "-m", "distpc", "compare", str(CONFIG), *overrides]
    command += ["--out", str(tmp_path)]
    environment = {name: of for name, of in os.environ.items() if name != "OMP_NUM_THREADS"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    report = json.loads((tmp_path / "report.json").read_text())
    rows = report["variants"]
    assert set(rows) == {
        f"{name}@{size}" for name in ("em", "em (best)", "pixels") for size in (4, 8)
    }
    num_train = report["dataset"]["num_samples"]["train"]
    pixels, em = rows["pixels@8"], rows["em@8"]
    assert pixels["num_parameters"] == em["num_parameters"] > rows["em@4"]["num_parameters"]
    assert pixels["distillation_visits"] == num_train
    assert abs(pixels["num_visits"] - 3 * num_train) < 250
    assert 1.5 < pixels["test_bpd"] < em["test_bpd"] < 3.5
    # One set of shards and one tree a size for all runs.
    shared = sorted(path.name.split("-")[0] for path in (tmp_path / "stages").iterdir())
    assert shared == ["features", "index", "shards", "structure", "structure", "teacher"]
    for name in ("table.md", "curves.png", "sizes.png"):
        assert (tmp_path / name).stat().st_size > 100
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*/*/report.json")}
    assert len(made) == 4
    # Jobs side by side share the cores.
    cores = len(os.sched_getaffinity(0))
    for log in tmp_path.glob("runs/*/*/*/log.txt"):
        assert f"[distpc] {max(1, cores // 2)} threads in the job" in log.read_text()
    again = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr[-4000:]
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert again.stdout == result.stdout
    # A folder with other settings holds reports, but nothing is done there.
    for other, state in (([], "done"), (["finetune.batch_size=99"], "to run")):
        told = describe_runs(config(*overrides, *other), tmp_path).splitlines()[1:]
        assert [line.startswith(f"  {state}") for line in told] == [True] * 4


def test_figures_of_lossy_colours_say_so(tmp_path: Path) -> None:
    """Wherever a figure is printed: while it trains, at the end, in tables and stored results."""
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in range(60):
        pixels = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "c.yaml").write_text(
        "name: lossy\n"
        f"data: {{source: {{kind: image_folder, path: {tmp_path / 'images'}}},\n"
        "       color: ycocg_lossy}\n"
        "teacher: {kind: none}\n"
        "structure: {kind: hclt, num_states: 2}\n"
        "finetune: {initialization: random, num_epochs: 1, batch_size: 16}\n"
        "evaluate: {num_pictures: 4}\n"
        "parallel: {num_ranks: 1, num_workers: 1}\n"
        "compare: {variants: {em: {}}}\n"
    )
    command = [sys.executable, "-m", "distpc", "compare", tmp_path / "c.yaml", "--out"]
    result = subprocess.run(
        [*command, tmp_path / "out"], capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr[-4000:]
    caveat = "of lossy colours (YCoCg, rounded): not comparable with figures of RGB"
    assert f"All figures are {caveat}." in result.stdout
    run = tmp_path / "out" / "runs" / "em" / "seed-0"
    trained = [line for line in (run / "log.txt").read_text().splitlines() if " valid " in line]
    assert trained and all(caveat in line for line in trained)
    report = json.loads((run / "report.json").read_text())
    assert report["dataset"]["caveat"] == caveat
    figures = [line for line in summarize(report, run).splitlines() if "_bpd" in line]
    assert len(figures) == 3 and all(line.endswith(caveat) for line in figures)
    assert report["dataset"]["caveat"] not in table_text({}, "bpd")
