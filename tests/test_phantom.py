"The phantom: bytes that do not depend on processes, a kill and a resume, refusals, and colour that tells no class."
import json
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from kdnb.core import BadInput
from kdnb.data import breakhis_table, image_path, slides
from kdnb.phantom import dyes, field_width, make_scene, patients, phantom_home, signature, write_phantom

FEW = ["A-14-22549AB", "DC-14-13412", "LC-14-13412", "MC-14-18842"]


def tree(root):
    "Every picture under a root with its bytes."
    return {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*.png"))}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "A small phantom drawn by one process."
    return write_phantom(tmp_path_factory.mktemp("phantom")/"one", images=2, slides=FEW, jobs=1, progress=False)


def test_same_bytes_whatever_the_processes(small, tmp_path):
    two = write_phantom(tmp_path/"two", images=2, slides=FEW, jobs=2, progress=False)
    part = write_phantom(tmp_path/"part", mags="400", images=1, slides=FEW[::3], jobs=1, progress=False)
    assert tree(two) == tree(small) and len(tree(small)) == len(FEW)*2*4
    assert tree(part).items() <= tree(small).items() and len(tree(part)) == 2


def test_tree_reads_as_breakhis(small):
    table = breakhis_table(small, "100X")
    assert set(table.slide) == {"A-14-22549AB", "DC-14-13412", "MC-14-18842"}  # the copy is settled
    assert set(table.patient) == {"22549", "13412", "18842"}
    assert Image.open(table.path[0]).size == (175, 115)


def test_double_specimen_is_copied(small):
    a, b = (image_path(small, s, "200X", 1).read_bytes() for s in FEW[1:3])
    assert a == b


def test_never_more_images_than_breakhis(tmp_path):
    root = write_phantom(tmp_path/"p", images=4, size=(48, 32), slides=["DC-14-4364"], jobs=1, progress=False)
    table = breakhis_table(root, "40X")
    assert len(table) == 1 and len(breakhis_table(root, "400X")) == 4


def test_killed_and_resumed(small, tmp_path):
    root = tmp_path/"killed"
    code = f"from kdnb.phantom import write_phantom; write_phantom({str(root)!r}, images=2, slides={FEW!r}, jobs=1)"
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    until = time.time() + 20
    while len(tree(root)) < 5 and time.time() < until: time.sleep(.02)
    child.kill()
    child.wait()
    there = tree(root)
    assert 5 <= len(there) < 32 and there.items() <= tree(small).items()
    assert not json.loads((root/"phantom.json").read_text())["complete"]
    write_phantom(root, images=2, slides=FEW, jobs=1, progress=False)
    assert tree(root) == tree(small) and json.loads((root/"phantom.json").read_text())["complete"]


def test_complete_set_returns_at_once(small):
    start = time.time()
    assert write_phantom(small, images=2, slides=FEW[::-1]) == small
    assert time.time() - start < .5


@pytest.mark.parametrize("params, words", [
    ({"seed": 3}, ["seed is 0 there and 3 here", "phantom"]),
    ({"mags": ("300X",)}, ["'300X'", "'400X'"]),
    ({"images": 0}, ["images=0"]),
    ({"images": 2.5}, ["images=2.5"]),
    ({"size": (10, 10)}, ["size=10", "24"]),
    ({"size": 64}, ["size=64"]),
    ({"overlap": 2}, ["overlap=2", "0 to 1"]),
    ({"jobs": 0}, ["jobs=0"]),
    ({"slides": ["DC-14-13413"]}, ["'DC-14-13413'", "'DC-14-13412'"]),
])
def test_bad_parameters(small, params, words):
    with pytest.raises(BadInput) as e: write_phantom(small, **{"images": 2, "slides": FEW, **params})
    assert all(w in str(e.value) for w in words)


def test_refuses_a_real_tree(tmp_path):
    (tmp_path/"BreaKHis_v1").mkdir()
    with pytest.raises(BadInput, match="no phantom"): write_phantom(tmp_path, images=1)


def test_home_names_the_parameters():
    assert phantom_home() == phantom_home(mags=["400", "200x", 100, "40X"]) != phantom_home(seed=1)


def test_windows_are_nested_and_fit():
    for i in range(20):
        scene = make_scene("F-14-9133", "9133", i)
        boxes = [scene.windows[m] for m in ("40X", "100X", "200X", "400X")]
        for (a, b, c, d), (e, f, g, h) in zip(boxes[:3], boxes[1:], strict=True):
            assert a - 1e-3 <= e and b - 1e-3 <= f and g <= c + 1e-3 and h <= d + 1e-3
        assert np.isclose(boxes[3][2] - boxes[3][0], field_width("400X"))


def test_any_shape_can_be_drawn():
    scene = make_scene("DC-14-2523", "2523", 0, 64/64)
    he = dyes(scene, "40X", (64, 64))
    assert he.shape == (2, 64, 64) and np.isfinite(he).all() and he.min() >= 0


def test_slides_of_an_accession_look_alike():
    one, two, other = (signature(*s)["dyes"] for s in (("A-14-22549AB", "22549"), ("A-14-22549CD", "22549"),
                                                       ("DC-14-2523", "2523")))
    assert np.abs(one - two).max() < np.abs(one - other).max()


@pytest.mark.parametrize("seed", [0, 1])
def test_signatures_are_the_same_for_both_classes(seed):
    cls, look = slides().groupby("accession")["class"].first(), patients(seed)
    mean = {c: np.mean([look[a]["look"] for a in cls.index[cls == c]], 0) for c in ("benign", "malignant")}
    assert np.abs(mean["benign"] - mean["malignant"]).max() < .12
