"""How the ranks of a launcher find each other, and see that they were started alike."""

from __future__ import annotations

import hashlib
import json
import secrets
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from distpc.errors import ConfigError, DistpcError, TrainingError
from distpc.parallel.failures import from_json, to_json
from distpc.parallel.mesh import Launch

POLL_SECONDS = 0.1
_ROUND_SECONDS = 2.0
_SHOWN = 5


class Refused(Exception):
    """Rank 0 refused the ranks, for the reason in `error`, and tells it itself."""

    def __init__(self, error: DistpcError) -> None:
        super().__init__(str(error))
        self.error = error


def open_store(launch: Launch, seconds: float) -> dist.TCPStore:
    """The store through which the ranks speak; rank 0 opens it unless the launcher did.

    Raises:
        TrainingError: nobody answers within `seconds`, or rank 0 cannot listen there.
    """
    try:
        return dist.TCPStore(
            launch.host,
            launch.port,
            is_master=launch.rank == 0 and not launch.has_store,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
        )
    except (RuntimeError, OSError) as error:
        raise TrainingError(
            f"rank {launch.rank} of {launch.world_size} cannot join the others",
            where=f"{launch.host}:{launch.port}",
            found=" ".join(str(error).split())[:200],
            expected=f"the ranks' store, within parallel.join_seconds={seconds:g}",
            fix="check that the first machine's launcher runs, that its address and port can be "
            "reached from here, and that the port is free there",
        ) from error


def greet(store: dist.Store, launch: Launch, facts: dict[str, Any], seconds: float) -> str:
    """Wait until all ranks are here and were started alike.

    A launcher that restarts its ranks may keep the store, with what dead ranks said in it: each
    rank says a random word of its own, and a session counts only with the words of the living.

    Args:
        store: of `open_store`.
        launch: this process's place.
        facts: nested JSON values that must be the same on all ranks.
        seconds: to wait for the others.

    Returns:
        A name that only these ranks, alive now, share; prefix of all that they say.

    Raises:
        TrainingError: a rank did not come in time.
        ConfigError: a rank was started with other facts.
        Refused: on ranks above 0, when rank 0 raised one of these.
    """
    word = secrets.token_hex(8)
    deadline = time.monotonic() + seconds
    if launch.rank > 0:
        hello = {"word": word, "facts": facts, "host": socket.gethostname()}
        store.set(f"hello/{launch.rank}", json.dumps(hello))
        return _wait_for_session(store, launch, word, deadline, seconds)
    while True:
        hellos = _hellos(store, launch.world_size, deadline)
        missing = [rank for rank in range(1, launch.world_size) if rank not in hellos]
        error: DistpcError | None = None
        error = _missing(missing, launch, seconds) if missing else _difference(facts, hellos)
        words = {str(rank): hello["word"] for rank, hello in hellos.items()}
        session = {"id": word, "words": words, "failure": error and to_json(error)}
        store.set(f"{word}/beat/0", "0")
        store.set("session", json.dumps(session))
        answers = [f"{word}/here/{rank}" for rank in hellos]
        answered = _wait_for(store, answers, min(_ROUND_SECONDS, seconds))
        if error is not None:
            raise error
        if answered:
            return word
        if time.monotonic() > deadline:
            silent = [rank for rank in hellos if not store.check([f"{word}/here/{rank}"])]
            raise _missing(silent, launch, seconds)


def code_fingerprint() -> str:
    """A hash of the package's own source files."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _wait_for_session(
    store: dist.Store, launch: Launch, word: str, deadline: float, seconds: float
) -> str:
    while time.monotonic() < deadline + _ROUND_SECONDS:
        if store.check(["session"]):
            session = json.loads(store.get("session"))
            if session["words"].get(str(launch.rank)) == word:
                name = str(session["id"])
                store.set(f"{name}/beat/{launch.rank}", "0")
                store.set(f"{name}/here/{launch.rank}", "1")
                if session["failure"]:
                    error = from_json(session["failure"]).error
                    raise Refused(error or DistpcError(session["failure"]["summary"]))
                return name
        time.sleep(POLL_SECONDS)
    raise _missing([0], launch, seconds)


def _hellos(store: dist.Store, world_size: int, deadline: float) -> dict[int, dict[str, Any]]:
    """What the ranks above 0 said, once all did or the time is over."""
    keys = [f"hello/{rank}" for rank in range(1, world_size)]
    _wait_for(store, keys, max(0.0, deadline - time.monotonic()))
    return {
        rank: json.loads(store.get(f"hello/{rank}"))
        for rank in range(1, world_size)
        if store.check([f"hello/{rank}"])
    }


def _wait_for(store: dist.Store, keys: list[str], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (not keys or store.check(keys)):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _missing(ranks: list[int], launch: Launch, seconds: float) -> TrainingError:
    shown = ", ".join(str(rank) for rank in ranks[:_SHOWN]) + (", ..." * (len(ranks) > _SHOWN))
    return TrainingError(
        f"rank {shown} never joined" if len(ranks) == 1 else f"ranks {shown} never joined",
        where=f"the ranks' store at {launch.host}:{launch.port}",
        found=f"{launch.world_size - len(ranks)} of {launch.world_size} ranks after {seconds:g} s",
        expected="all ranks within parallel.join_seconds",
        fix="look at those ranks' machines for an earlier error or a launcher that was not "
        "started; start all again with the same command, with another number of machines if "
        "need be, or raise parallel.join_seconds",
    )


def _difference(own: dict[str, Any], hellos: dict[int, dict[str, Any]]) -> ConfigError | None:
    """The error for the first rank whose facts are not rank 0's."""
    expected = dict(_flat(own))
    for rank in sorted(hellos):
        found = dict(_flat(hellos[rank]["facts"]))
        names = [
            name
            for name in dict.fromkeys([*expected, *found])
            if expected.get(name) != found.get(name)
        ]
        if names:
            return ConfigError(
                f"rank {rank} was started differently from rank 0",
                where=f"rank {rank} on {hellos[rank]['host']}: {', '.join(names[:_SHOWN])}"
                + ", ..." * (len(names) > _SHOWN),
                found="; ".join(f"{name}={found.get(name)}" for name in names[:_SHOWN]),
                expected="; ".join(f"{name}={expected.get(name)}" for name in names[:_SHOWN]),
                fix="start every rank with the same command, the same config file and the same "
                "installation of distpc",
            )
    return None


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, entry in value.items():
            yield from _flat(entry, f"{name}.{key}" if name else str(key))
    else:
        yield name, value
