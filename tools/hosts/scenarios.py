"""What tools/hosts.sh runs inside its namespaces: scenarios.py FOLDER [OPTIONS]"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from checks import Failed, same_result
from cluster import Clusters
from network import end_with_parent, make_hosts
from traffic import compare_traffic
from training import REPO, Trainings

_TAIL_CHARACTERS = 3000
_HCLT = [
    str(REPO / "configs" / "digits_hclt.yaml"),
    *["structure.num_states=8", "finetune.num_epochs=4", "evaluate.num_pictures=4"],
]
_DIGITS = [
    str(REPO / "configs" / "digits.yaml"),
    *["data.samples_per_shard=4", "teacher.mae.num_epochs=1", "latents.num_clusters=16"],
    *["finetune.num_epochs=2", "evaluate.num_pictures=4"],
]


def main(folder: Path) -> int:
    """0 if all held, 1 if something did not."""
    parser = argparse.ArgumentParser(prog="tools/hosts.sh")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--quick",
        metavar="RUN",
        type=Path,
        help="two hosts and training only, compared with the finished run in this folder",
    )
    choice.add_argument(
        "--only",
        metavar="NAME",
        action="append",
        choices=list(Scenarios.ALL),
        help=f"this scenario and the undisturbed run it needs: {', '.join(Scenarios.ALL)}",
    )
    parser.add_argument(
        "--runs",
        metavar="FOLDER",
        type=Path,
        help="keep run folders there; undisturbed runs that are finished there are not run again",
    )
    options = parser.parse_args(sys.argv[2:])
    runs = options.runs.absolute() if options.runs else folder / "runs"
    scenarios = Scenarios(folder, runs)
    begun = time.monotonic()
    if options.quick:
        failed = scenarios.run_quick(options.quick.absolute())
    else:
        failed = scenarios.run(options.only or list(Scenarios.ALL))
    outcome = f"FAILED: {', '.join(failed)}" if failed else "all held"
    print(f"[hosts] {outcome}: {time.monotonic() - begun:.0f} s")
    return 1 if failed else 0


class Scenarios:
    """A Ray cluster and trainings over two hosts, then three, whole and cut off.

    Args:
        folder: of the clusters' own files and of all logs; new.
        runs: of run folders.
    """

    def __init__(self, folder: Path, runs: Path) -> None:
        self._folder = folder
        self._hosts = make_hosts(3, folder / "logs")
        self._clusters = Clusters(_DIGITS, folder, runs)
        self._trainings = Trainings(_HCLT, runs)

    def run(self, names: list[str]) -> list[str]:
        """Run the scenarios `names`, in this order; those that failed."""
        return [name for name in names if not self._holds(name, self.ALL[name])]

    def run_quick(self, whole: Path) -> list[str]:
        """Two hosts train as `whole` did, one is cut off, the other finishes."""
        trainings = Trainings([str(whole / "resolved_config.yaml")], self._folder / "runs")
        hosts = self._hosts[:2]
        held = self._holds("quick", lambda _: trainings.cut_off(hosts, "cut", whole))
        return [] if held else ["quick"]

    def _holds(self, name: str, scenario: Scenario) -> bool:
        begun = time.time()
        try:
            scenario(self)
        except Failed as failed:
            print(f"[hosts] FAILED: {name}: {failed}", file=sys.stderr, flush=True)
            for log in sorted(self._hosts[0].log_folder.glob("*.log")):
                if log.stat().st_mtime >= begun:
                    print(f"--- {log.name}\n{log.read_text()[-_TAIL_CHARACTERS:]}", file=sys.stderr)
            # The others begin with hosts that do nothing.
            for host in self._hosts:
                host.kill_all()
                host.plug()
            return False
        print(f"[hosts] {name} held: {time.time() - begun:.0f} s", flush=True)
        return True

    @cached_property
    def _on_ray(self) -> Path:
        """The undisturbed run on a Ray cluster over two hosts."""
        return self._clusters.undisturbed(self._hosts[:2], "ray-2")

    @cached_property
    def _alone(self) -> Path:
        """The undisturbed training on one host."""
        return self._trainings.undisturbed(self._hosts[:1], "alone")

    def _traffic(self) -> None:
        compare_traffic(self._hosts[:2], self._folder / "traffic")

    def _ray_cut(self, number: int) -> None:
        self._clusters.cut_off(self._hosts[:number], f"ray-{number}-cut", self._on_ray)

    def _ray_lost(self) -> None:
        self._clusters.lose(self._hosts[:2], "ray-2-lost", self._on_ray)

    def _torchrun(self) -> None:
        same_result(self._trainings.undisturbed(self._hosts[:2], "torchrun-2"), self._alone)

    def _torchrun_cut(self, number: int) -> None:
        self._trainings.cut_off(self._hosts[:number], f"torchrun-{number}-cut", self._alone)

    def _elastic(self) -> None:
        self._trainings.goes_on(self._hosts, "torchrun-elastic", self._alone)

    ALL: ClassVar[dict[str, Scenario]] = {
        "traffic": _traffic,
        "ray-2": lambda self: self._on_ray,
        "ray-2-cut": lambda self: self._ray_cut(2),
        "ray-3-cut": lambda self: self._ray_cut(3),
        "ray-2-lost": _ray_lost,
        "torchrun-2": _torchrun,
        "torchrun-2-cut": lambda self: self._torchrun_cut(2),
        "torchrun-3-cut": lambda self: self._torchrun_cut(3),
        "torchrun-elastic": _elastic,
    }


Scenario = Callable[[Scenarios], object]
"""Raises `Failed` if something did not hold."""


if __name__ == "__main__":
    end_with_parent()
    sys.exit(main(Path(sys.argv[1])))
