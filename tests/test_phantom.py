"The phantom: bytes that do not depend on processes, a kill and a resume, refusals, and colour that tells no class."
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdnb.core import MAGS, BadInput
from kdnb.data import breakhis_table, image_path, parse_name, scan, slides
from kdnb.phantom import (
    LOW,
    VERSION,
    dyes,
    field_width,
    make_scene,
    patients,
    phantom_home,
    planned,
    signature,
    write_phantom,
)

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
    one, two = ([(r.mag, r.seq, Path(r.path).read_bytes()) for r in scan(small).itertuples() if r.slide == s]
                for s in FEW[1:3])
    assert one == two and len(one) == 8


def test_never_more_images_than_breakhis(tmp_path):
    root = write_phantom(tmp_path/"p", images=4, size=(48, 32), slides=["DC-14-4364"], jobs=1, progress=False)
    table = breakhis_table(root, "40X")
    assert len(table) == 1 and len(breakhis_table(root, "400X")) == 4


@pytest.fixture(scope="module")
def catalogue():
    "What a phantom with all images holds, without a picture drawn."
    return planned("/phantom", images=None)


def test_the_whole_catalogue(catalogue):
    "82 ids with their true counts, 7,909 names, every one read back as what it was made from."
    counts = catalogue.groupby(["slide", "mag"]).size().unstack()
    wanted = slides().set_index("slide_id").loc[counts.index]
    assert len(counts) == 82 and len(catalogue) == catalogue.path.nunique() == 7909
    for mag in MAGS: assert (counts[mag] == wanted[f"n{mag[:-1]}"]).all()
    fields = [parse_name(p.name) for p in catalogue.path]
    for k in ("slide", "accession", "mag", "seq"): assert [f[k] for f in fields] == catalogue[k].tolist()
    assert [image_path("/phantom", f["slide"], f["mag"], f["seq"]) for f in fields] == catalogue.path.tolist()


def test_numbers_have_gaps(catalogue):
    cells = catalogue.groupby(["slide", "mag"]).seq.agg(["size", "max", "nunique"])
    assert (cells["size"] == cells["nunique"]).all() and not (catalogue.seq % 7 == 5).any()
    assert (cells["max"] > cells["size"])[cells["size"] > 4].all() and cells["max"].max() <= 999


def test_twins_have_one_plan(catalogue):
    one, two = (catalogue[catalogue.slide == s].drop(columns=["slide", "path"]) for s in FEW[1:3])
    assert len(one) == 123 and np.array_equal(one, two)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_some_malignant_pictures_are_lower(seed):
    plan = planned("/phantom", images=None, seed=seed, size=(700, 460)).merge(slides(), left_on="slide", right_on="slide_id")
    low = plan.height < 460
    assert set(plan.height) == {456, 460} and set(plan["class"][low]) == {"malignant"}
    assert .5*LOW < low.sum()/(plan["class"] == "malignant").sum() < 1.5*LOW


def test_low_pictures_are_the_same_in_every_plan(catalogue):
    part = planned("/phantom", images=9, mags="200", slides=FEW[1:], size=(50, 40))
    both = part.merge(catalogue, on=["slide", "mag", "seq"])
    assert len(both) == len(part) and ((both.height_x < 40) == (both.height_y < 115)).all()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "Four slides with all their images, very small."
    return write_phantom(tmp_path_factory.mktemp("phantom")/"whole", images=None, size=(36, 24), jobs=1, progress=False,
                         slides=["DC-14-8168", "DC-14-4364", "PC-15-190EF", "A-14-29960CD"])


def test_what_is_drawn_is_what_was_planned(whole):
    there = scan(whole)
    plan = planned(whole, images=None, size=(36, 24), slides=there.slide.unique()).set_index("path")
    assert set(there.path) == {str(p) for p in plan.index} and len(there) == 38 + 44 + 65 + 61
    assert all(Image.open(p).size == (w, h) for p, w, h in plan[["width", "height"]].itertuples())
    assert set(plan.height) == {23, 24}


def test_low_pictures_are_cut_not_stretched(whole, monkeypatch, tmp_path):
    plan = planned(whole, images=None, size=(36, 24), slides=scan(whole).slide.unique())
    low = plan[plan.height < 24].iloc[0]
    monkeypatch.setattr("kdnb.phantom.LOW", 0)
    full = write_phantom(tmp_path/"full", low.mag, low.scene + 1, (36, 24), slides=[low.slide], jobs=1, progress=False)
    one, two = (np.asarray(Image.open(image_path(r, low.slide, low.mag, low.seq))) for r in (whole, full))
    assert one.shape == (23, 36, 3) and np.array_equal(one, two[:23])


def test_pictures_carry_no_metadata(whole):
    for path in list(whole.rglob("*.png"))[:50]:
        data, at, kinds = path.read_bytes(), 8, set()
        while at < len(data):
            kinds.add(data[at + 4:at + 8])
            at += 12 + int.from_bytes(data[at:at + 4])
        assert kinds == {b"IHDR", b"IDAT", b"IEND"} and not Image.open(path).info


def test_progress_counts_images(tmp_path, capsys):
    some = {"images": None, "size": (36, 24), "slides": ["DC-14-8168"], "mags": "400"}
    root = write_phantom(tmp_path/"p", jobs=1, **some)
    assert "/9 " in capsys.readouterr().err
    planned(root, **some).path[4].unlink()
    marker = root/"phantom.json"
    marker.write_text(marker.read_text().replace('"complete": true', '"complete": false'))
    write_phantom(root, jobs=1, **some)
    assert "8/9 " in capsys.readouterr().err and len(tree(root)) == 9


def test_a_phantom_of_another_version_is_refused(tmp_path):
    some = {"images": 1, "size": (36, 24), "slides": FEW[:1], "mags": "40"}
    marker = write_phantom(tmp_path/"p", jobs=1, progress=False, **some)/"phantom.json"
    marker.write_text(marker.read_text().replace(f'"version": {VERSION}', f'"version": {VERSION - 1}'))
    with pytest.raises(BadInput, match=f"version is {VERSION - 1} there and {VERSION} here"):
        write_phantom(tmp_path/"p", jobs=1, progress=False, **some)


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
    ({"images": "all"}, ["images='all'"]),
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
    assert phantom_home() == phantom_home(mags=["400", "200x", 100, "40X"])
    assert len({phantom_home(), phantom_home(seed=1), phantom_home(images=None), phantom_home(images=66)}) == 4


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
