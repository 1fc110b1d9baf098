"""Members, montages, snippets, the plane of features, and the elbow, on data that are known."""

from __future__ import annotations

import numpy as np
import pytest

from distpc.data.spec import MISSING, DatasetSpec
from distpc.data.tokenizers import Bytes, Characters
from distpc.latents.elbow import elbow, sizes_around
from distpc.latents.members import draw_members, spread_clusters
from distpc.latents.montage import patch_montage, snippet
from distpc.latents.projection import colours, project, scatter_picture

from .jobs import blob_shards


def test_clusters_are_spread_over_their_use():
    usage = np.array([5, 0, 90, 10, 40, 1])
    assert spread_clusters(usage, 3) == [2, 3, 5]
    assert spread_clusters(usage, 100) == [2, 4, 3, 0, 5]


def test_members_are_of_the_cluster_and_of_different_samples():
    rng = np.random.default_rng(0)
    shards = [
        (f"s{number}", [f"{number}-{row}" for row in range(50)], rng.integers(4, size=(50, 9)))
        for number in range(3)
    ]
    latents = {name: values for name, _, values in shards}
    found = draw_members(iter(shards), [2, 0, 7], 60, 30)
    assert [len(found[cluster]) for cluster in (2, 0, 7)] == [60, 60, 0]
    for cluster, members in found.items():
        assert len({member.key for member in members}) == len(members)
        for member in members:
            assert latents[member.shard][member.row, member.unit] == cluster
            assert member.key == f"{member.shard[1:]}-{member.row}"
    assert len({member.unit for member in found[2]}) == 9
    assert [member.shard for member in found[2]].count("s0") == 30


def test_a_montage_shows_the_patch_in_its_surroundings():
    spec = DatasetSpec("grey", "image", 64, (256,) * 64, image_shape=(8, 8, 1))
    x = np.full((2, 8, 8), 100)
    x[0, 2:4, 4:6] = 200
    x[1, 0:2, 0:2] = 250
    sheet = patch_montage({7: x.reshape(2, 64)}, {7: [1 * 4 + 2, 0]}, spec, 2)
    assert sheet.shape == (2 + 80 + 2, 2 + 2 * 82, 3) and sheet.dtype == np.uint8
    first, second = sheet[2:82, 2:82, 0], sheet[2:82, 84:164, 0]
    # 8 screen pixels a pixel: the patch is in the middle, what is around is dimmed.
    assert (first[32:48, 32:48] == 200).all() and (first[16:31] == 60).all()
    assert (second[32:48, 32:48] == 250).all() and (second[49:, 32:] == 60).all()
    assert (second[:31] == 60).all(), "beyond the picture"
    assert (sheet[2 + 31, 2 + 31 : 2 + 49] == (255, 220, 0)).all(), "the frame"


def test_a_snippet_marks_its_token():
    x = np.frombuffer(b"the cat\nsat", np.uint8).astype(int)
    assert snippet(x, 4, Bytes()) == "the [c]at\u23cesat"
    assert snippet(x, 4, Bytes(), units=2) == "e [c]at"


def test_a_snippet_is_text_whatever_the_tokens_are():
    characters = Characters("act eh\u00e9")
    x = np.array([*characters.encode("the cah\u00e9"), characters.size, MISSING])
    assert snippet(x, 7, characters, characters.size) == "the cah[\u00e9]\u23f9"
    assert snippet(x, 8, characters, characters.size, 2) == "h\u00e9[\u23f9]"
    assert snippet(x, 9, characters, characters.size, 2) == "\u00e9\u23f9[]"


def test_the_plane_holds_the_largest_variances():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(4000, 5)) * [1, 9, 1, 3, 1]
    plane = project(features, np.zeros(4000, int), features[:3])
    assert plane.explained == pytest.approx((81 / 93, 9 / 93), abs=0.02)
    assert np.allclose(np.abs(plane.points[:, 0]), np.abs(features[:, 1]), atol=1.0)
    assert np.allclose(plane.centroids, plane.points[:3], atol=1e-5)
    flat = project(features[:, :1], np.zeros(4000, int), features[:3, :1])
    assert flat.explained == (1.0, 0.0) and not flat.points[:, 1].any()


def test_a_picture_of_the_plane_has_points_and_crosses():
    features = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    picture = scatter_picture(project(features, np.array([0, 1, 2]), features[:1]))
    assert picture.shape == (512, 512, 3)
    shades = colours(np.array([0, 1, 2]))
    assert len({tuple(shade) for shade in shades}) == 3
    for shade in shades[1:]:
        assert (picture == shade).all(axis=2).sum() == 4
    assert (picture == 0).all(axis=2).sum() == 13


def test_the_elbow_bends_at_the_number_of_blobs():
    shards, _ = blob_shards()
    assert sizes_around(8, 1000) == [2, 4, 8, 16, 32]
    assert sizes_around(100, 1000) == [2, 4, 8, 16, 32]
    assert sizes_around(5, 1000) == [2, 4, 5, 8, 16]
    found = elbow(np.concatenate(shards), [2, 4, 8, 16])
    held_out = [entry["held_out"] for entry in found]
    assert [entry["num_clusters"] for entry in found] == [2, 4, 8, 16]
    assert held_out[1] > 5 * held_out[2] and held_out[3] > held_out[2] / 2
    assert all(entry["fitted"] <= entry["held_out"] * 1.1 for entry in found)
