"""What all tests share: one math thread, the repository's root, an object store."""

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return Path(__file__).parent.parent


@pytest.fixture(scope="session")
def object_server() -> Iterator[str]:
    """URL of a real S3-protocol server on loopback, at a port that the system picked."""
    script = Path(__file__).parent / "object_server.py"
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        try:
            yield f"http://127.0.0.1:{int(port)}"
        finally:
            process.kill()


@pytest.fixture
def bucket(object_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """URL of a new bucket; this process has the credentials in its environment."""
    from distpc.artifacts.place import _filesystem

    for name, value in {
        "AWS_ENDPOINT_URL": object_server,
        "AWS_ACCESS_KEY_ID": "an-access-key",
        "AWS_SECRET_ACCESS_KEY": "a-very-secret-key",
        "AWS_DEFAULT_REGION": "us-east-1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{secrets.token_hex(4)}"
    _filesystem(False).call_s3("create_bucket", Bucket=name)
    return f"s3://{name}"
