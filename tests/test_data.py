"The data room from outside: names, layouts, policies, GlaS, the store under several processes, and bad input."
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from kdnb.core import MAGS, BadInput
from kdnb.data import (
    DOUBLES,
    ImageStore,
    breakhis_table,
    decode,
    find_images,
    glas_table,
    has_breakhis,
    image_path,
    load_table,
    parse_name,
    read_store,
    read_table,
    scan,
    settle_double,
    slides,
)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RNG = np.random.default_rng(0)


def picture(path, size=(70, 46), **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path, **more)
    return path


# ---- names and the catalogue

def test_all_82_ids_go_there_and_back():
    for row in slides().itertuples():
        for mag in MAGS:
            fields = parse_name(image_path("root", row.slide_id, mag, 7))
            assert (fields["slide"], fields["mag"], fields["seq"]) == (row.slide_id, mag, 7)
            assert (fields["cls"], fields["subtype"], fields["accession"]) == (row[2], row.subtype, row.accession)
            assert fields["year"] == row.year


def test_the_catalogue_counts_what_the_data_set_holds():
    s = slides()
    n = s[["n40", "n100", "n200", "n400"]]
    assert n.sum().tolist() == [1995, 2081, 2013, 1820] and n.to_numpy().sum() == 7909
    by = s.assign(n=n.sum(axis=1)).groupby("class")
    assert by.n.sum().to_dict() == {"benign": 2480, "malignant": 5429}
    assert by.accession.nunique().to_dict() == {"benign": 16, "malignant": 54} and s.accession.nunique() == 70
    sizes = {d: s.assign(n=n.sum(axis=1)).pipe(settle_double, "binary", d).n.sum() for d in DOUBLES[1:]}
    assert sizes == {"keep-one": 7786, "drop-both": 7663, "as-released": 7909}
    malignant = s[s["class"] == "malignant"][n.columns].sum()/n.sum()  # always malignant, at each magnification
    assert (100*malignant).round(1).tolist() == [68.7, 69.1, 69.1, 67.7]
    assert round(by.get_group("malignant").query("subtype == 'DC'").n.sum()/7909, 3) == .436


@pytest.mark.parametrize("name", ["SOB_B_A-14-22549AB-100-27.png", "SOB_M_A-14-22549AB-100-027.png", "x.png", "",
                                  "SOB_B_XX-14-22549AB-100-027.png", "SOB_B_A-14-22549AB-300-027.png"])
def test_damaged_names_are_refused(name):
    with pytest.raises(BadInput, match="is no BreakHis name"): parse_name(name)


# ---- layouts

LAYOUTS = {
    "official": lambda s, m, i: image_path("", s, m, i),
    "kaggle": lambda s, m, i: "BreaKHis_v1"/image_path("", s, m, i),
    "flat": lambda s, m, i: image_path("", s, m, i).name,
    "lower": lambda s, m, i: str(image_path("", s, m, i)).lower(),
    "upper": lambda s, m, i: image_path("", s, m, i).name.upper(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reads_the_same(tmp_path, layout):
    some = [(s, m, i) for s in ("A-14-22549AB", "DC-14-2523", "PC-15-190EF") for m in ("40X", "400X") for i in (1, 12)]
    for s, m, i in some: picture(tmp_path/layout/LAYOUTS[layout](s, m, i), (8, 6), format="PNG")
    table = find_images(tmp_path/layout)
    assert table.image.tolist() == sorted(image_path("", *t).name.upper().replace(".PNG", ".png") for t in some)
    assert sorted(zip(table.slide, table.mag, table.seq, strict=True)) == sorted(some)


def test_two_copies_are_refused_and_scan_shows_them(tmp_path):
    for folder in ("a", "b"): picture(tmp_path/folder/"SOB_B_A-14-22549AB-40-001.png")
    with pytest.raises(BadInput, match="which are the same picture"): find_images(tmp_path)
    assert len(scan(tmp_path)) == 2


def test_hidden_folders_are_passed_over(tmp_path):
    picture(tmp_path/".unpacking-x"/"SOB_B_A-14-22549AB-40-001.png")
    assert not has_breakhis(tmp_path)
    with pytest.raises(BadInput, match="no BreakHis images under"): scan(tmp_path)


def test_a_linked_tree_is_found_and_a_contradictory_name_is_not(tmp_path):
    picture(tmp_path/"there"/"SOB_B_A-14-22549AB-40-001.png")
    picture(tmp_path/"there"/"SOB_M_A-14-22549AB-40-002.png")
    (tmp_path/"here").mkdir()
    (tmp_path/"here"/"BreaKHis_v1").symlink_to(tmp_path/"there", target_is_directory=True)
    assert has_breakhis(tmp_path/"here") and len(scan(tmp_path/"here")) == 1


def test_a_picture_is_no_table_and_deep_greys_are_refused(tmp_path):
    with pytest.raises(BadInput, match="cannot be read as a CSV"): load_table(picture(tmp_path/"a.png"))
    Image.fromarray(RNG.integers(0, 2**16, (9, 9)).astype(np.uint16)).save(tmp_path/"deep.png")
    with pytest.raises(BadInput, match="its mode is I;16"): decode(tmp_path/"deep.png", 8)


def test_policies_of_the_double_specimen(tmp_path):
    for s in ("A-14-22549AB", "DC-14-13412", "LC-14-13412", "F-14-9133"): picture(tmp_path/image_path("", s, "400X", 1))
    kept = lambda **k: breakhis_table(tmp_path, "400X", **k).slide.tolist()
    assert kept() == kept(double="keep-one") == ["A-14-22549AB", "F-14-9133", "DC-14-13412"]
    assert kept(task="subtype") == kept(double="drop-both") == ["A-14-22549AB", "F-14-9133"]
    assert len(kept(double="as-released")) == 4 and kept(task="subtype4") == ["F-14-9133"]
    with pytest.raises(BadInput, match="Did you mean 'drop-both'"): kept(double="drop_both")
    with pytest.raises(BadInput, match="patient='case'"): kept(patient="case")
    with pytest.raises(BadInput, match="holds only 400X"): breakhis_table(tmp_path, "40X")


@pytest.mark.parametrize("text, said", [
    ("name,patient ID\ntrain_1,5\n", r"lacks the column 'grade \(glas\)'"),
    ("name, patient ID, grade (GlaS)\ntrain_1, 5, unclear\n", "neither benign nor malignant but 'unclear'"),
    ("name, patient ID, grade (GlaS)\ntrain_2, 5, benign\n", "names the image 'train_2'"),
])
def test_a_damaged_grade_csv_is_refused(tmp_path, text, said):
    picture(tmp_path/"train_1.bmp")
    (tmp_path/"Grade.csv").write_text(text)
    with pytest.raises(BadInput, match=said): glas_table(tmp_path)


def test_glas_is_known_by_its_grades_and_by_its_names(tmp_path):
    for name in ("train_1.bmp", "train_1_anno.bmp", "testB_2.bmp"): picture(tmp_path/name)
    (tmp_path/"GRADE.CSV").write_text("name, patient ID, grade (GlaS)\ntrain_1, 5, benign\ntestB_2, 6, malignant\n")
    table, source = load_table(tmp_path)
    assert source == "glas" and table.image.tolist() == ["testB_2", "train_1"] and table.patient.tolist() == ["6", "5"]
    (tmp_path/"labels.csv").write_text("image,label,patient\ntrain_1.bmp,benign,5\ntestB_2.bmp,malignant,6\n")
    assert load_table(tmp_path/"labels.csv")[1] == load_table(tmp_path)[1] == "glas"
    os.rename(tmp_path/"train_1.bmp", tmp_path/"mine.bmp")
    (tmp_path/"labels.csv").write_text("image,label,patient\nmine.bmp,benign,5\ntestB_2.bmp,malignant,6\n")
    assert load_table(tmp_path/"labels.csv")[1] == "own"


def test_a_csv_with_holes_is_refused(tmp_path):
    picture(tmp_path/"a.png")
    (tmp_path/"t.csv").write_text("image,label,patient\na.png,x,1\na.png,,2\n")
    with pytest.raises(BadInput, match="line 3: image, label and patient must not be empty"): read_table(tmp_path/"t.csv")


# ---- pixels

def test_text_chunks_never_reach_a_learner(tmp_path):
    pixels, said = Image.fromarray(RNG.integers(0, 256, (46, 70, 3), dtype=np.uint8)), PngImagePlugin.PngInfo()
    said.add_text("date:create", "2014-01-01")
    pixels.save(tmp_path/"SOB_B_A-14-22549AB-40-001.png", pnginfo=said)
    pixels.save(tmp_path/"SOB_B_A-14-22549AB-40-002.png")
    assert Image.open(tmp_path/"SOB_B_A-14-22549AB-40-001.png").text, "the chunk is in the file"
    store = ImageStore(find_images(tmp_path), 32, tmp_path/"store")
    assert torch.equal(store[0], store[1]) and len(set(store.fingerprints)) == 1 and len(set(store.digests)) == 2


@pytest.mark.parametrize("size", [(700, 460), (700, 456), (460, 700), (300, 300), (64, 50), (30, 20)])
def test_nothing_is_stretched(tmp_path, size):
    "A disc stays a disc: its height and width in the decoded square differ by a pixel at most."
    y, x = np.mgrid[:size[1], :size[0]]
    disc = (x - size[0]/2 + .5)**2 + (y - size[1]/2 + .5)**2 < (min(size)*.4)**2
    Image.fromarray(np.where(disc, 0, 255).astype(np.uint8)).save(tmp_path/"disc.png")
    dark = decode(tmp_path/"disc.png", 48)[0] < 128
    h, w = dark.any(1).sum(), dark.any(0).sum()
    assert abs(int(h) - int(w)) <= 1 and abs(int(h) - .8*48) <= 2, (h, w)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"<!DOCTYPE html>"])
def test_what_cannot_be_decoded_is_named(tmp_path, content):
    (tmp_path/"SOB_B_A-14-22549AB-40-001.png").write_bytes(content)
    with pytest.raises(BadInput, match="22549AB-40-001.png cannot be decoded"): ImageStore(scan(tmp_path), 8, tmp_path/"s")
    assert not list((tmp_path/"s").glob("*.npy")), "nothing half-made is kept"


# ---- the store

@pytest.fixture
def twelve(tmp_path):
    for i in range(12): picture(tmp_path/"images"/f"SOB_B_A-14-22549AB-40-{i:03d}.png")
    return find_images(tmp_path/"images")


def test_a_store_follows_its_files(twelve, tmp_path):
    make = lambda table=twelve, size=16: ImageStore(table, size, tmp_path/"s")
    first = make()
    assert make().path == first.path and make(size=17).path != first.path and make(twelve[::-1]).path != first.path
    picture(tmp_path/"images"/"SOB_B_A-14-22549AB-40-003.png")
    changed = make()
    assert changed.path != first.path and not torch.equal(changed[3], first[3]) and torch.equal(changed[4], first[4])


@pytest.mark.parametrize("harm", ["cut", "flip", "grow", "empty", "other", "seal"])
def test_a_damaged_store_is_built_anew(twelve, tmp_path, harm):
    store = ImageStore(twelve, 16, tmp_path/"s")
    good, pixels = store.path.read_bytes(), store[:].clone()
    bad = {"cut": good[:-100], "flip": good[:700] + bytes([good[700] ^ 1]) + good[701:], "grow": good + b"x", "empty": b"",
           "other": ImageStore(twelve[:5], 16, tmp_path/"t").path.read_bytes(), "seal": good[:-1] + bytes([good[-1] ^ 1])}
    store.path.unlink()
    store.path.write_bytes(bad[harm])
    assert read_store(store.path, (12, 3, 16, 16)) is None
    assert torch.equal(ImageStore(twelve, 16, tmp_path/"s")[:], pixels) and store.path.read_bytes() == good


def test_what_a_killed_build_leaves_is_cleared(twelve, tmp_path):
    store = ImageStore(twelve, 16, tmp_path/"s")
    store.path.unlink()
    left = store.path.parent/f".{store.path.name}.abc.tmp"
    left.write_bytes(b"half")
    ImageStore(twelve, 16, tmp_path/"s")
    assert not left.exists()


def test_several_processes_build_one_store_once(twelve, tmp_path):
    code = f"""
import kdnb.data as d
build, built = d.write_store, []
d.write_store = lambda *a: (built.append(1), build(*a))
store = d.ImageStore(d.find_images({str(tmp_path/'images')!r}), 24, {str(tmp_path/'s')!r})
print(len(built), int(store.array.sum()))"""
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
            for _ in range(3)]
    said = [r.communicate(timeout=120) for r in runs]
    assert all(r.returncode == 0 for r in runs), said
    built, sums = zip(*(out.split() for out, _ in said), strict=True)
    assert sorted(built) == ["0", "0", "1"] and len(set(sums)) == 1


def test_an_empty_table_and_a_senseless_size_are_refused(twelve, tmp_path):
    with pytest.raises(BadInput, match="nothing to decode"): ImageStore(twelve[:0], 16, tmp_path)
    with pytest.raises(BadInput, match="size=0"): ImageStore(twelve, 0, tmp_path)
