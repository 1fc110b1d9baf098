"""Places: folders and object stores alike, whole or nothing, with errors that tell what to do."""

from __future__ import annotations

import hashlib
import socket
import time
from pathlib import Path

import pytest

from distpc.artifacts import place as places
from distpc.artifacts.place import Place
from distpc.config import parse_config
from distpc.errors import ConfigError, PlaceError


@pytest.fixture(params=["folder", "object store"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "folder":
        return Place.of(tmp_path / "place")
    return Place.of(request.getfixturevalue("bucket") + "/deep/prefix/")


def test_files_of_a_place(place: Place, tmp_path: Path) -> None:
    assert place.list() == {} and place.size("a") is None
    source = tmp_path / "source"
    source.write_bytes(b"12345")
    place.put("sub/a", source)
    place.write("b", b"old")
    before = place.list()["b"]
    place.write("b", b"new")
    assert {name: facts.bytes for name, facts in place.list().items()} == {"b": 3, "sub/a": 5}
    assert place.is_local or place.list()["b"].stamp != before.stamp
    assert place.child("sub").list().keys() == {"a"}
    assert place.child("su").list() == {}, "a prefix of a name is no folder"
    assert (place.size("sub/a"), place.read("b")) == (5, b"new")
    assert place.digest("sub/a") == hashlib.sha256(b"12345").hexdigest()
    place.fetch("sub/a", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"12345"
    for missing in (place.read, place.digest):
        with pytest.raises(PlaceError, match="missing") as caught:
            missing("sub/none")
        assert caught.value.where == place.at("sub/none")


def test_an_upload_that_was_broken_off_is_not_there(bucket: str, tmp_path: Path) -> None:
    name = bucket.removeprefix("s3://")
    call = places._filesystem(False).call_s3
    begun = call("create_multipart_upload", Bucket=name, Key="x/big")
    upload = {"Bucket": name, "Key": "x/big", "UploadId": begun["UploadId"]}
    call("upload_part", **upload, PartNumber=1, Body=bytes(5 * 2**20))
    assert len(call("list_parts", **upload)["Parts"]) == 1
    place = Place.of(f"{bucket}/x")
    assert place.list() == {} and place.size("big") is None
    with pytest.raises(PlaceError):
        place.read("big")


def test_a_bucket_that_is_not_there(bucket: str) -> None:
    place = Place.of(f"{bucket}-other/x")
    for call in (place.list, lambda: place.size("a"), lambda: place.write("a", b"")):
        with pytest.raises(PlaceError, match="the bucket does not exist") as caught:
            call()
        assert "-other/x" in str(caught.value.where)


def test_no_credentials(bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(PlaceError, match="no credentials") as caught:
        Place.of(bucket).list()
    assert "AWS_ACCESS_KEY_ID" in (caught.value.fix or "")


@pytest.mark.parametrize("kind", ["closed", "mute"])
def test_a_server_that_does_not_answer(
    bucket: str, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(places, "ANSWER_SECONDS", 1)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if kind == "mute":
            listener.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        begun = time.monotonic()
        with pytest.raises(PlaceError, match="does not answer") as caught:
            Place.of(bucket).list()
        assert time.monotonic() - begun < 60
    assert "AWS_ENDPOINT_URL" in (caught.value.fix or "")
    assert "secret" not in str(caught.value) and "an-access-key" not in str(caught.value)


def test_secrets_are_taken_out_of_what_servers_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abc/def")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "")
    said = places.without_secrets("signed with abc/def, refused")
    assert said == "signed with <AWS_SECRET_ACCESS_KEY>, refused"
    said = places.without_secrets("http://host/bucket?token=abc%2Fdef&list")
    assert said == "http://host/bucket?token=<AWS_SECRET_ACCESS_KEY>&list"


def test_short_credentials_are_no_parts_of_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a")
    said = places.without_secrets("the latest tests: a key 'test' (test/2026) is not known")
    masked = "<AWS_ACCESS_KEY_ID>"
    assert said == f"the latest tests: a key '{masked}' ({masked}/2026) is not known"
    # As long as real ones are: wherever it stands, and no part of it is left.
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIA0123456789EX")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "AKIA0123456789EX.and.more+")
    said = places.without_secrets("xAKIA0123456789EX%2F, AKIA0123456789EX.and.more+x")
    assert said == f"x{masked}%2F, <AWS_SECRET_ACCESS_KEY>x"


@pytest.mark.parametrize("url", ["s3://key:pass@bucket/x", "s3:///x", "ftp://host/x"])
def test_urls_that_are_no_places(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Place.of(url)
    assert "key" not in str(caught.value).replace("AWS_ACCESS_KEY", "")
    for section in (
        {"data": {"source": {"kind": "shards", "url": url}}},
        {"data": {"source": {"kind": "digits"}}, "artifacts": {"url": url}},
        {"data": {"source": {"kind": "digits"}}, "artifacts": {"reuse": [url]}},
    ):
        with pytest.raises(ConfigError) as caught:
            parse_config({"name": "x", **section}, "test")
        assert "pass" not in str(caught.value)
