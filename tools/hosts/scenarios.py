"""What tools/hosts.sh runs inside its namespaces: scenarios.py FOLDER [--quick RUN]"""

from __future__ import annotations

import argparse
import resource
import sys
from pathlib import Path

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
    parser.add_argument(
        "--quick",
        metavar="RUN",
        type=Path,
        help="two hosts and training only, compared with the finished run in this folder",
    )
    options = parser.parse_args(sys.argv[2:])
    try:
        quick(folder, options.quick.absolute()) if options.quick else full(folder)
    except Failed as failed:
        print(f"[hosts] FAILED: {failed}", file=sys.stderr)
        for log in sorted((folder / "logs").glob("*.log")):
            print(f"--- {log.name}\n{log.read_text()[-_TAIL_CHARACTERS:]}", file=sys.stderr)
        return 1
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"[hosts] all held; {usage.ru_utime + usage.ru_stime:.0f} s of processor time")
    return 0


def quick(folder: Path, whole: Path) -> None:
    """Two hosts train, one is cut off, the other finishes."""
    hosts = make_hosts(2, folder / "logs")
    trainings = Trainings([str(whole / "resolved_config.yaml")], folder / "runs")
    trainings.cut_off(hosts, "cut", whole)


def full(folder: Path) -> None:
    """A Ray cluster and trainings over two hosts, then three, whole and cut off."""
    hosts = make_hosts(3, folder / "logs")
    compare_traffic(hosts[:2], folder / "traffic")

    clusters = Clusters(_DIGITS, folder)
    whole = clusters.undisturbed(hosts[:2], "ray-2")
    for number in (2, 3):
        clusters.cut_off(hosts[:number], f"ray-{number}-cut", whole)
    clusters.lose(hosts[:2], "ray-2-lost", whole)

    trainings = Trainings(_HCLT, folder / "runs")
    alone = trainings.undisturbed(hosts[:1], "alone")
    same_result(trainings.undisturbed(hosts[:2], "torchrun-2"), alone)
    for number in (2, 3):
        trainings.cut_off(hosts[:number], f"torchrun-{number}-cut", alone)
    trainings.goes_on(hosts, "torchrun-elastic", alone)


if __name__ == "__main__":
    end_with_parent()
    sys.exit(main(Path(sys.argv[1])))
