"What folders of every layout hold, and that `kdnb_data verify` finds what is wrong with them."
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from kdnb import audit
from kdnb.archive import main
from kdnb.audit import check_folds, contradiction, fold_sizes, index, look, read_folds, read_manifest, report, verify
from kdnb.core import MAGS, BadInput
from kdnb.data import image_path, parse_name, slides

LISTEN = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background hears none
SHARED = Path(__file__).resolve().parent.parent.parent/"shared"/"data"
SAMPLES, FOLDS, GLAS = SHARED/"breakhis_samples", SHARED/"breakhis_folds", SHARED/"glas"
A, B, C = "SOB_B_A-14-22549AB-40-001.png", "SOB_B_F-14-14134E-400-007.png", "SOB_M_DC-14-2523-400-010.png"
GRADES = "name,patient ID,grade (GlaS), grade (Sirinukunwattana et al. 2015)"  # first line of GlaS's own Grade.csv
THREE = "3 images, 3 slides, 3 accessions, 2 benign, 1 malignant"
TEST_SIZES = {  # benign, malignant at each magnification, as published facts about the fold files
    1: [(255, 490), (261, 499), (255, 489), (237, 418)], 2: [(192, 440), (195, 425), (168, 429), (169, 385)],
    3: [(202, 455), (204, 465), (193, 466), (179, 413)], 4: [(241, 459), (245, 453), (225, 454), (224, 397)],
    5: [(270, 505), (277, 544), (273, 497), (250, 467)]}


def there(folder): return pytest.mark.skipif(not folder.is_dir(), reason=f"{folder.name} is not on this machine")


def picture(path, colour=0, size=(8, 8), **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, 90, 160)).save(path, "PNG", **how)
    return path


def official(root, name):
    f = parse_name(name)
    return image_path(root, f["slide"], f["mag"], f["seq"])


def run(*argv):
    "Exit status of the command."
    try: main(list(map(str, argv)))
    except SystemExit as e: return e.code
    return 0


@pytest.fixture
def glas(tmp_path):
    "GlaS as it is unpacked, four pictures of it."
    rows = [("testA_1", 5, " benign"), ("testA_2", 5, " malignant"), ("train_1", 1, " benign"),
            ("train_10", 2, " malignant")]
    for i, (name, *_) in enumerate(rows): picture(tmp_path/"Warwick"/f"{name}.bmp", i)
    for name, *_ in rows: picture(tmp_path/"Warwick"/f"{name}_anno.bmp")
    text = "".join(f"{n}, {p},{g},{g}\n" for n, p, g in rows)
    (tmp_path/"Warwick"/"Grade.csv").write_text(GRADES + "\n" + text)
    return tmp_path/"Warwick"


# ---- index

@pytest.mark.parametrize("layout,place", [
    ("official tree", official),
    ("Kaggle's copy of the official tree", lambda root, n: official(root/"BreaKHis_v1", n)),
    ("train and test folders, as Kaggle's 400X set has them",
     lambda root, n: root/"BreaKHis 400X"/("train" if n == A else "test")/{"B": "benign", "M": "malignant"}[n[4]]/n),
    ("a folder for each class", lambda root, n: root/{"B": "benign", "M": "malignant"}[n[4]]/n),
    ("flat folder", lambda root, n: root/n), ("folders of no known layout", lambda root, n: root/n[:12]/n)],
    ids=["official", "kaggle", "400X", "classes", "flat", "other"])
@pytest.mark.parametrize("case", [str, str.lower, str.upper], ids=["as is", "lower", "upper"])
def test_every_layout(tmp_path, capsys, layout, place, case):
    for i, name in enumerate((A, B, C)): picture(tmp_path/case(str(place(tmp_path, name).relative_to(tmp_path))), i)
    if "Kaggle's copy" in layout: (tmp_path/"Folds.csv").write_text("mag,grp,fold,filename\n")
    assert run("index", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"layout: {layout}" and lines[-1] == THREE
    assert ("3 names are not spelled as the authors do" in lines[1]) == (case is not str)


def test_counts_by_class_type_and_magnification(tmp_path):
    for name in (A, A.replace("001", "002"), A.replace("-40-", "-200-"), B, C): picture(tmp_path/name)
    table = index(tmp_path)[1]
    rows = {tuple(line.split()[-5:]) for line in table.splitlines()[2:]}
    assert rows == {("A", "2", "1", "0", "3"), ("F", "0", "0", "1", "1"), ("all", "2", "1", "1", "4"),
                    ("DC", "0", "0", "1", "1"), ("all", "0", "0", "1", "1")}
    assert table.split()[:4] == ["40X", "200X", "400X", "all"]


def test_copies_are_counted_once(tmp_path):
    for name in (A, f"copy/{A}", B, C): picture(tmp_path/name)
    lines = index(tmp_path)
    assert "1 files are further copies, counted once" in lines and lines[-1] == THREE


def test_layouts_may_be_mixed(tmp_path):
    for name in (A, f"test/benign/{B}", f"train/malignant/{C}"): picture(tmp_path/name)
    first = index(tmp_path)[0]
    assert first.startswith("layout: train and test folders") and "no known layout (1)" in first


def test_index_of_glas(glas, capsys):
    assert run("index", glas) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "GlaS" in lines[0] and lines[-1] == "4 images, 3 patients, 2 benign, 2 malignant"


def all_of_glas(csv):
    "The real set as it is unpacked: its grades in `csv`, its pictures in `images` beside it."
    table = pd.read_csv(GLAS/"labels.csv", dtype=str)
    rows = [f"{Path(r.image).stem},{r.patient}, {r.label}, {r.grade}" for r in table.itertuples()]
    csv.write_text("\n".join([GRADES, *rows]))
    (csv.parent/"images").symlink_to(GLAS/"images")


@there(GLAS)
def test_index_of_all_glas(tmp_path):
    all_of_glas(tmp_path/"grade.CSV")
    assert index(tmp_path)[-1] == "165 images, 16 patients, 74 benign, 91 malignant"


@there(SAMPLES)
def test_the_true_samples(tmp_path, capsys):
    assert run("index", SAMPLES, "--manifest", tmp_path/"m.csv") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "38 images, 23 slides, 21 accessions, 22 benign, 16 malignant"
    manifest = read_manifest(tmp_path/"m.csv")
    assert len(manifest) == 38 and set(manifest.width) == {"700"} and set(manifest.height) == {"460"}
    assert list(manifest)[:-1] == audit.COLUMNS and manifest.pixels.nunique() == 38


@pytest.mark.parametrize("command", ["index", "verify"])
def test_folders_that_are_none(tmp_path, command):
    (tmp_path/"file").write_text("x")
    (tmp_path/"empty").mkdir()
    picture(tmp_path/"cats"/"cat.png")
    for name, says in {"gone": "is not a folder", "file": "is a file; pass the folder", "empty": "is empty",
                       "cats": "no BreakHis images under"}.items():
        code = run(command, tmp_path/name)
        assert code.startswith(f"kdnb_data: {'no' if name == 'cats' else tmp_path/name}") and says in code


# ---- the manifest

def test_look(tmp_path):
    a, b = picture(tmp_path/"a.png"), picture(tmp_path/"b.png", compress_level=0)
    c, d = picture(tmp_path/"c.png", size=(16, 4)), picture(tmp_path/"d.png", 1)
    Image.open(a).quantize(2).save(tmp_path/"p.png")
    a, b, c, d, p = (look(tmp_path/f"{n}.png") for n in "abcdp")
    assert a["pixels"] == b["pixels"] == p["pixels"] and a["sha256"] != b["sha256"] != p["sha256"]
    assert len({a["pixels"], c["pixels"], d["pixels"]}) == 3, "width and height count, not only the order of the bytes"
    assert (c["width"], c["height"], c["damage"]) == (16, 4, "")


@pytest.mark.parametrize("content,says", [
    (b"", "zero bytes"), (b"no picture", "cannot identify"), (None, "No such file")])
def test_look_at_what_is_no_picture(tmp_path, content, says):
    if content is not None: (tmp_path/"a.png").write_bytes(content)
    seen = look(tmp_path/"a.png")
    assert says in seen["damage"] and seen["pixels"] == "" and seen["bytes"] == len(content or b"")


def test_every_truncation_and_every_flipped_bit_is_damage(tmp_path):
    raw = picture(tmp_path/"a.png").read_bytes()
    ihdr = raw.index(b"IDAT") - 4
    for i in range(0, len(raw) - 12, 3):
        (tmp_path/"a.png").write_bytes(raw[:i])
        assert look(tmp_path/"a.png")["damage"], i
    for i in range(ihdr, len(raw) - 12):
        (tmp_path/"a.png").write_bytes(raw[:i] + bytes([raw[i] ^ 4]) + raw[i + 1:])
        assert look(tmp_path/"a.png")["damage"], i


@pytest.mark.parametrize("change,says", [
    (lambda t: "", "cannot be read as a manifest"), (lambda t: b"\xff\xfe\x00", "cannot be read as a manifest"),
    (lambda t: t.replace("sha256", "sha", 1), "lacks the column 'sha256'"),
    (lambda t: t.splitlines()[0], "has no rows"), (lambda t: t + '\n"', "cannot be read"),
    (lambda t: re.sub(r"[0-9a-f]{64}", "beef", t, count=1), "line 2: sha256 is 'beef'"),
    (lambda t: re.sub(r"png,\d+,", "png,many,", t), "line 2: bytes is 'many'")],
    ids=range(7))
def test_manifests_that_are_none(tmp_path, change, says):
    picture(tmp_path/A)
    file = audit.write_csv(audit.gather(tmp_path)[audit.COLUMNS], tmp_path/"m.csv")
    text = change(file.read_text())
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadInput, match=f"{file}.*{says}"): read_manifest(file)
    assert says in run("verify", tmp_path, "--manifest", file)


def test_a_manifest_that_is_not_there_or_cannot_be_written(tmp_path):
    picture(tmp_path/A)
    assert "gone.csv" in run("verify", tmp_path, "--manifest", tmp_path/"gone.csv")
    assert "is a folder; pass the name of a CSV" in run("index", tmp_path, "--manifest", tmp_path)


# ---- findings

def kinds(folder, *argv):
    findings, _ = verify(folder, *argv)
    return dict(tuple(findings[findings.kind != "missing"].groupby("kind")))


@pytest.fixture
def right(monkeypatch):
    "Pictures of 8x8 pass for 700x460, so that only what a test is about is found."
    real, full = audit.look, {"width": 700, "height": 460}
    monkeypatch.setattr(audit, "look", lambda p: (s := real(p)) | (full if s["width"] == 8 else {}))


def test_nothing_but_what_is_missing(tmp_path, right):
    for i, name in enumerate((A, B, C)): picture(official(tmp_path, name), i)
    findings, files = verify(tmp_path)
    assert len(files) == 3 and set(findings.kind) == {"missing"} and findings["count"].sum() == 7906
    assert set(findings[findings.slide == "DC-14-2523"].detail) == {"0 of 10 are here", "0 of 23 are here",
                                                                    "0 of 18 are here", "1 of 24 are here"}


def test_damaged(tmp_path, right):
    bad = {B: b"", C: picture(tmp_path/A).read_bytes()[:50], "SOB_M_DC-14-2523-400-011.png": b"text"}
    for name, content in bad.items(): (tmp_path/name).write_bytes(content)
    found = kinds(tmp_path)["damaged"]
    assert sorted(found.path) == sorted(bad) and found.fault.all()
    assert found.set_index("path").detail[B] == "zero bytes"


def test_sizes(tmp_path):
    picture(tmp_path/A, 1, (700, 456)), picture(tmp_path/B, 2, (700, 460)), picture(tmp_path/C, 3, (700, 456))
    picture(tmp_path/"SOB_M_DC-14-2523-400-011.png", 4, (350, 230))
    found = kinds(tmp_path)
    assert found.keys() == {"odd size", "700x456"} and not found["700x456"].fault.any()
    assert found["700x456"].path.tolist() == [C], "known of malignant pictures only"
    assert set(found["odd size"].detail) == {"700x456", "350x230"}


def test_duplicates(tmp_path, right):
    d, e = "SOB_M_DC-14-2523-400-011.png", "SOB_M_DC-14-2773-400-001.png"
    picture(tmp_path/A, 1), picture(tmp_path/"again"/A, 1), picture(tmp_path/"other"/A, 2, compress_level=0)
    picture(tmp_path/C, 3), picture(tmp_path/d, 3), picture(tmp_path/B, 4), picture(tmp_path/e, 4, compress_level=0)
    found = kinds(tmp_path)
    assert found.keys() == {"duplicate", "equal pixels"}
    twice, equal = found["duplicate"], found["equal pixels"]
    assert set(twice.detail) == {f"{A} is here 3 times, different pictures", "the same bytes, within DC-14-2523"}
    assert twice["count"].tolist() == [2, 1] and equal.path.tolist() == [f"{B} | {e}"]
    assert equal.detail.tolist() == ["other bytes, the same pixels, across the slides DC-14-2773, F-14-14134E"]


def test_the_double_specimen_is_known(tmp_path, right, capsys):
    names = [f"SOB_M_{s}-14-13412-40-00{i}.png" for s in ("DC", "LC") for i in (1, 2)]
    for i, name in enumerate(names): picture(tmp_path/name, i % 2, compress_level=0 if i == 3 else 6)
    found = kinds(tmp_path)
    assert found.keys() == {"double specimen"} and not found["double specimen"].fault.any()
    how = sorted(d.split(", across")[0] for d in found["double specimen"].detail)
    assert how == ["other bytes, the same pixels", "the same bytes"]
    picture(tmp_path/"SOB_M_DC-14-13412-40-003.png", 1)
    assert kinds(tmp_path).keys() == {"double specimen", "equal pixels"}


def test_extra_unknown_and_stray(tmp_path, right):
    for i in range(3): picture(tmp_path/f"SOB_M_DC-14-4364-40-00{i}.png", i)  # this slide has one picture at 40X
    picture(tmp_path/"SOB_M_DC-14-99999-40-001.png", 5)
    picture(tmp_path/"thumb.PNG"), picture(tmp_path/"sub"/"SOB_B_DC-14-1-40-001.jpg")
    found = kinds(tmp_path)
    assert found.keys() == {"extra", "unknown slide", "stray"}
    assert found["extra"]["count"].tolist() == [2] and found["extra"].path.iloc[0].count("|") == 2
    assert found["extra"].detail.tolist() == ["3 are here, and the slide table has 1: 2 too many"]
    assert found["unknown slide"].slide.tolist() == ["DC-14-99999"]
    assert found["stray"].path.tolist() == ["sub/SOB_B_DC-14-1-40-001.jpg", "thumb.PNG"]


def test_spelling_and_folders_are_said_but_no_fault(tmp_path, right):
    picture(tmp_path/A.lower(), 1), picture(tmp_path/"malignant"/B, 2), picture(tmp_path/"SOB"/"DC"/"100X"/C, 3)
    found = kinds(tmp_path)
    assert found.keys() == {"spelling", "folder"} and not any(f.fault.any() for f in found.values())
    assert sorted(found["folder"].path) == sorted([f"malignant/{B}", f"SOB/DC/100X/{C}"])


def test_no_official_folder_contradicts_a_name():
    paths = [image_path("x", s, m, 7).as_posix() for s in slides().slide_id for m in MAGS]
    assert not any(map(contradiction, paths)) and not any(contradiction(p.lower()) for p in paths)
    assert contradiction(f"breast/benign/SOB/fibroadenoma/{A}") == "fibroadenoma"
    assert contradiction(f"SOB_B_A_14-22549CD/{A}") == "sob_b_a_14-22549cd"


def test_changes_against_a_manifest(tmp_path, right):
    root = tmp_path/"flat"
    for i, name in enumerate((A, B, C)): picture(root/name, i)
    main(["index", str(root), "--manifest", str(tmp_path/"m.csv")])
    other = tmp_path/"tree"  # the same pictures in another layout
    shutil.copytree(root, other/"x")
    assert kinds(other, tmp_path/"m.csv") == {}
    picture(other/"x"/A, 0, compress_level=0), picture(other/"x"/B, 99), (other/"x"/C).unlink()
    picture(other/"x"/"SOB_M_DC-14-2523-400-011.png", 7)
    findings, _ = verify(other, tmp_path/"m.csv")
    changed = findings[findings.kind == "changed"].set_index("path").detail
    assert changed.to_dict() == {f"x/{A}": "other bytes, the same pixels", f"x/{B}": "other pixels"}
    assert findings[findings.kind == "missing"].path.tolist() == [C], "named, and nothing else"
    assert findings[findings.kind == "unlisted"].path.tolist() == ["x/SOB_M_DC-14-2523-400-011.png"]


def test_names_make_extra_and_missing_exact(right):
    names = {f"SOB_M_DC-14-4364-40-00{i}.png" for i in (1,)}
    files = pd.DataFrame([{"path": n, "key": n, **parse_name(n)} for n in ("SOB_M_DC-14-4364-40-002.png",)])
    noticed = audit.against_table(files, {"a list": names})
    found = [f for f in noticed if (f["slide"], f["mag"]) == ("DC-14-4364", "40X")]
    assert [(f["kind"], f["path"], f["count"]) for f in found] == [
        ("missing", "SOB_M_DC-14-4364-40-001.png", 1), ("extra", "SOB_M_DC-14-4364-40-002.png", 1)]
    assert found[1]["detail"] == "not among the names of the 1 pictures that DC-14-4364 has at 40X"


@pytest.fixture
def complete(tmp_path, monkeypatch):
    "All 7,909 names, without their pixels."
    rows = [(s.slide_id, m, i) for s in slides().iloc for m in MAGS for i in range(1, s[f"n{m[:-1]}"] + 1)]
    paths = [image_path("", *row).as_posix() for row in rows]
    files = pd.DataFrame([{"path": p, "key": Path(p).name, **parse_name(p)} for p in paths]).assign(
        bytes=1, sha256=paths, pixels=paths, width=700, height=460, damage="")
    twin = files.slide.str.endswith("-13412")
    files.loc[twin, ["sha256", "pixels"]] = files.key[twin].str.replace(r"SOB_M_..", "", regex=True)
    there = {"files": files}
    pick = lambda mags: there["files"][there["files"].mag.isin(mags)].reset_index(drop=True)
    monkeypatch.setattr(audit, "gather", lambda root, mags: pick(mags))
    (tmp_path/"x").write_text("")
    return there


def test_a_complete_collection_has_no_finding(tmp_path, complete, capsys):
    assert run("verify", tmp_path) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "7909 files: nothing wrong; noted: 123 double specimen"
    cells = audit.cells(complete["files"])
    assert (cells.expected == cells.found).all()


def test_one_magnification(tmp_path, complete, capsys):
    files = complete["files"]
    complete["files"] = files.drop(files.index[files.mag == "100X"][0])  # what others lack does not matter
    for mag in (["400X"], [" 400x"], ["400", "400X"]):
        assert run("verify", tmp_path, *(word for m in mag for word in ("--mag", m))) == 0
        out = capsys.readouterr().out.splitlines()
        assert out[0] == "1,820 of 1,820 images of BreakHis at 400X" and "1820 files: nothing wrong" in out[-1]
    assert run("verify", tmp_path, "--mag", "40X,100", "--mag", "400") == 1
    assert "5895 files: 1 finding (1 missing)" in capsys.readouterr().out
    for wrong in ("300X", "400X,", ""):
        assert "'40X', '100X', '200X', '400X'" in run("verify", tmp_path, "--mag", wrong)


def test_a_slide_that_lacks_one_magnification_whole(tmp_path, complete, capsys):
    complete["files"] = complete["files"].query("slide != 'DC-14-2523' or mag != '400X'")
    assert run("verify", tmp_path, "--mag", "400X") == 1
    assert "1 slide whole: 24 images" in capsys.readouterr().out


def test_a_magnification_that_is_not_there(tmp_path):
    picture(tmp_path/A), picture(tmp_path/B)
    assert "holds no picture at 100X, only at 40X, 400X" in run("verify", tmp_path, "--mag", "100X")


# ---- a manifest says what belongs here

@pytest.fixture
def part(tmp_path, right):
    "Three pictures and their manifest."
    for i, name in enumerate((A, B, C)): picture(tmp_path/"part"/name, i)
    main(["index", str(tmp_path/"part"), "--manifest", str(tmp_path/"m.csv")])
    return tmp_path/"part"


def test_a_part_of_breakhis_is_right_by_its_manifest(part, tmp_path, capsys):
    capsys.readouterr()
    assert run("verify", part, "--manifest", tmp_path/"m.csv") == 0
    assert capsys.readouterr().out.splitlines() == ["3 of 7,909 images of BreakHis", "3 files: nothing wrong"]
    (part/C).unlink()
    assert run("verify", part, "--manifest", tmp_path/"m.csv") == 1
    out = capsys.readouterr().out
    assert f"  {C}: named by the manifest" in out and out.splitlines()[-1] == "2 files: 1 finding (1 missing)"
    assert run("verify", part, "--manifest", tmp_path/"m.csv", "--mag", "40X") == 0
    assert capsys.readouterr().out.splitlines() == ["1 of 1,995 images of BreakHis at 40X", "1 file: nothing wrong"]
    picture(part/"SOB_M_DC-14-2523-400-011.png", 9)  # something that the manifest does not have
    (part/A).unlink()
    assert run("verify", part, "--manifest", tmp_path/"m.csv") == 1
    assert "2 findings (2 missing); noted: 1 unlisted" in capsys.readouterr().out


@there(FOLDS)
def test_which_list_names_what_is_lost(part, tmp_path, capsys):
    argv = ["verify", part, "--manifest", tmp_path/"m.csv", "--folds", FOLDS, "--out", tmp_path/"f.csv"]
    assert run(*argv) == 0
    assert "nothing wrong; noted: 7906 absent" in capsys.readouterr().out
    (part/C).unlink()
    assert run(*argv) == 1
    out, found = capsys.readouterr().out, pd.read_csv(tmp_path/"f.csv", keep_default_na=False)
    assert out.splitlines()[-1] == "2 files: 1 finding (1 missing); noted: 7906 absent" and f"  {C}: named" in out
    assert found.groupby("kind").detail.unique().map(list).to_dict() == {
        "absent": ["named by the fold files"], "missing": ["named by the manifest and the fold files"]}
    assert found.path[found.kind == "missing"].tolist() == [C]


@there(FOLDS)
def test_a_missing_fold_file_is_said(tmp_path, right, capsys):
    for i in (1, 2, 4, 5): shutil.copy(FOLDS/f"dsfold{i}.txt", tmp_path)
    picture(tmp_path/"data"/A)
    assert run("verify", tmp_path/"data", "--folds", tmp_path) == 1
    out = capsys.readouterr().out
    assert "dsfold3.txt is not there, so fold 3 is not checked" in out and "noted: 1 fold file" in out


@there(FOLDS)
def test_a_number_outside_the_lists(tmp_path, right):
    picture(tmp_path/"SOB_M_DC-14-2523-400-999.png")
    found = kinds(tmp_path, None, FOLDS)["extra"]
    assert found.detail.tolist() == ["not among the names of the 24 pictures that DC-14-2523 has at 400X"]


# ---- names that contradict themselves, and pictures that are none

def test_a_name_that_contradicts_itself_is_a_stray(tmp_path, right, capsys):
    wrong = "SOB_M_A-14-22549AB-40-002.png"
    picture(tmp_path/A), picture(tmp_path/wrong, 7), picture(tmp_path/"sob_b_dc-14-2523-40-001.PNG", 9)
    assert run("index", tmp_path, "--manifest", tmp_path/"m.csv") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 images, 1 slides, 1 accessions, 1 benign, 0 malignant"
    assert run("verify", tmp_path, "--manifest", tmp_path/"m.csv") == 1
    out = capsys.readouterr().out
    assert f"  {wrong}: class M and subtype A contradict: A is adenosis, benign" in out
    assert "class B and subtype DC contradict: DC is ductal carcinoma, malignant" in out
    assert out.splitlines()[-1] == "1 file: 2 findings (2 stray)"


@pytest.mark.parametrize("place", [".", "..", "../..", "BreaKHis_v1"])
def test_a_phantom_is_called_one(tmp_path, right, capsys, place):
    root = tmp_path/"x"/"y"
    picture(root/"BreaKHis_v1"/A)
    (root/place/"phantom.json").write_text("{}")
    for command in ("index", "verify"):
        run(command, root)
        assert [line for line in capsys.readouterr().out.splitlines() if "SYNTHETIC" in line] == [audit.SYNTHETIC]
    assert index(root)[-1] == "1 images, 1 slides, 1 accessions, 1 benign, 0 malignant"
    (root/place/"phantom.json").unlink()
    run("index", root), run("verify", root)
    assert "SYNTHETIC" not in capsys.readouterr().out


def test_a_stray_folder_leaves_a_flat_folder_flat(tmp_path):
    for i, name in enumerate((A, B, C)): picture(tmp_path/name, i)
    picture(tmp_path/"again"/A)
    assert index(tmp_path)[0] == "layout: flat folder (3), folders of no known layout (1)"


# ---- what is printed and written

@there(SAMPLES)
def test_the_true_samples_lack_7871(tmp_path, capsys):
    assert run("verify", SAMPLES, "--out", tmp_path/"f.csv") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "38 files: 7871 findings (7871 missing)" and len(lines) < 20
    written = pd.read_csv(tmp_path/"f.csv", keep_default_na=False)
    assert written["count"].sum() == 7871
    assert list(written) == ["kind", "fault", "slide", "mag", "count", "path", "detail"]
    assert run("verify", SAMPLES, "--all") == 1
    assert len(capsys.readouterr().out.splitlines()) == 82 + 3


@there(SAMPLES)
def test_the_true_samples_are_right_by_their_manifest(tmp_path, capsys):
    main(["index", str(SAMPLES), "--manifest", str(tmp_path/"m.csv")])
    capsys.readouterr()
    assert run("verify", SAMPLES, "--manifest", tmp_path/"m.csv") == 0
    assert capsys.readouterr().out.splitlines() == ["38 of 7,909 images of BreakHis", "38 files: nothing wrong"]


@there(FOLDS)
@there(SAMPLES)
def test_the_true_samples_by_name(capsys):
    findings, _ = verify(SAMPLES, folds=FOLDS)
    assert set(findings.kind) == {"missing"} and len(findings) == findings.path.nunique() == 7871
    assert set(findings["count"]) == {1} and "SOB_M_PC-15-190EF-400-015.png" in set(findings.path)
    assert len(report(findings, 38, True).splitlines()) == 7871 + 82 + 3


def test_long_lists_are_cut(tmp_path, right):
    for i in range(12): picture(tmp_path/f"junk{i}.png")
    picture(tmp_path/A)
    findings, files = verify(tmp_path)
    short, long = report(findings, len(files)), report(findings, len(files), True)
    assert short.count("junk") == audit.FEW and "and 4 more lines; --all prints them" in short
    assert long.count("junk") == 12
    assert short.splitlines()[-1] == "1 file: 7920 findings (7908 missing, 12 stray)"


def test_every_kind_is_explained():
    assert all(isinstance(fault, bool) and text for fault, text in audit.FINDINGS.values())


def test_glas_is_decoded_and_compared_with_its_manifest(glas, tmp_path, capsys):
    assert run("index", glas, "--manifest", tmp_path/"m.csv") == 0
    assert run("verify", glas, "--manifest", tmp_path/"m.csv") == 0
    out = capsys.readouterr().out
    assert f"GlaS, compared with its Grade.csv and with {tmp_path/'m.csv'}" in out
    assert out.splitlines()[-1] == "4 files: nothing wrong"
    assert run("verify", glas) == 0 and "Grade.csv only: it has no catalogue" in capsys.readouterr().out
    (glas/"testA_1.bmp").write_bytes(b"BM")
    picture(glas/"testA_2.bmp", 77)
    assert run("verify", glas, "--manifest", tmp_path/"m.csv") == 1
    assert capsys.readouterr().out.splitlines()[-1] == "4 files: 2 findings (1 damaged, 1 changed)"


def test_glas_that_lacks_pictures(glas, tmp_path, capsys):
    main(["index", str(glas), "--manifest", str(tmp_path/"m.csv")])
    for name in ("testA_1", "train_10"): (glas/f"{name}.bmp").unlink()
    capsys.readouterr()
    assert run("verify", glas) == 1
    out = capsys.readouterr().out
    assert "  testA_1: named by Grade.csv\n  train_10: named by Grade.csv" in out
    assert out.splitlines()[-1] == "2 files: 2 findings (2 missing)"
    assert run("verify", glas, "--manifest", tmp_path/"m.csv") == 1
    out = capsys.readouterr().out
    assert "  testA_1.bmp: named by the manifest and Grade.csv" in out and "2 findings (2 missing)" in out
    for path in glas.glob("t*.bmp"): path.unlink()
    assert "none of the 4 pictures that Grade.csv names is here" in run("verify", glas)
    (glas/"Grade.csv").write_text("name,grade\n")
    assert "Grade.csv lacks the column 'patient id'" in run("verify", glas)


def test_pictures_that_glas_holds_twice(glas, capsys):
    shutil.copy(glas/"testA_1.bmp", glas/"testA_2.bmp"), picture(glas/"train_1.bmp", 3, compress_level=0)
    assert run("verify", glas) == 1
    out = capsys.readouterr().out
    assert "testA_1.bmp | testA_2.bmp: the same bytes, within patient 5" in out
    assert "train_1.bmp | train_10.bmp: other bytes, the same pixels, across the patients 1, 2" in out
    assert out.splitlines()[-1] == "4 files: 2 findings (1 duplicate, 1 equal pixels)"


@pytest.mark.parametrize("option", [("--folds", "."), ("--mag", "400X")])
def test_glas_knows_neither_folds_nor_magnifications(glas, option):
    says = run("verify", glas, *option)
    assert f"is GlaS, and {option[0]} is for BreakHis: GlaS has neither fold files nor magnifications" in says


@there(GLAS)
def test_all_of_glas_is_right(tmp_path):
    all_of_glas(tmp_path/"Grade.csv")
    findings, files = verify(tmp_path)
    assert len(files) == 165 and not len(findings)


# ---- fold files

def test_fold_sizes_are_the_published_ones():
    sizes = fold_sizes()
    assert {f: [tuple(sizes.loc[f][m][["benign", "malignant"]]) for m in MAGS] for f in TEST_SIZES} == TEST_SIZES


@there(FOLDS)
def test_the_true_fold_files_agree_with_the_slide_table():
    folds = read_folds(FOLDS)
    assert len(folds) == 5 * 7909 and check_folds(folds) == []
    tested = folds[folds.side == "test"].assign(cls=lambda t: t.name.str[4]).groupby(["fold", "mag", "cls"]).size()
    assert {f: [tuple(tested[f, m][["B", "M"]]) for m in MAGS] for f in TEST_SIZES} == TEST_SIZES


@there(FOLDS)
@pytest.mark.parametrize("change,says", [
    (lambda t: t.replace("22549AB-100-001.png|100|2|train", "22549AB-100-001.png|100|2|test"),
     ["fold 2: A-14-22549AB is on the side test and train, the slide table says train",
      "fold 2: tests 196 benign images at 100X, 195 belong there"]),
    (lambda t: t.split("\n", 1)[1], ["fold 2: A-14-22549AB at 100X has 29 pictures, 30 belong there"]),
    (lambda t: t + t.split("\n", 1)[0], ["fold 2: SOB_B_A-14-22549AB-100-001.png stands in it more than once"]),
    (lambda t: t.replace("22549AB", "22549X"),
     ["fold 2: A-14-22549X is on the side train, the slide table says no slide of that name"])], ids=range(4))
def test_fold_files_that_contradict(tmp_path, change, says):
    (tmp_path/"DSFOLD2.TXT").write_text(change((FOLDS/"dsfold2.txt").read_text()))
    assert set(says) <= {f["detail"] for f in check_folds(read_folds(tmp_path))}


@pytest.mark.parametrize("line", [
    "SOB_B_A-14-22549AB-40-001.png|40|1", "SOB_B_A-14-22549AB-40-001.png|100|1|train", "cat.png|40|1|train",
    "SOB_B_A-14-22549AB-40-001.png|40|6|train", "SOB_B_A-14-22549AB-40-001.png|40|1|both", "rubbish", "|||",
    "SOB_B_A-14-22549AB-40-001.png|40|1|train|"])
def test_broken_lines_of_fold_files(tmp_path, line):
    (tmp_path/"dsfold1.txt").write_text(f"{A}|40|1|train\r\n\r\n{line}\r\n")
    with pytest.raises(BadInput, match="dsfold1.txt, line 3: .*is not 'name"): read_folds(tmp_path)


def test_folders_without_fold_files(tmp_path):
    (tmp_path/"data").mkdir()
    picture(tmp_path/"data"/A)
    assert "holds no dsfold1.txt" in run("verify", tmp_path/"data", "--folds", tmp_path)
    (tmp_path/"dsfold1.txt").write_text("\n")
    assert "dsfold1.txt has no rows" in run("verify", tmp_path/"data", "--folds", tmp_path)
    (tmp_path/"dsfold1.txt").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as text" in run("verify", tmp_path/"data", "--folds", tmp_path)


# ---- interrupted

@pytest.mark.parametrize("lines", [0, 3000], ids=["short", "more than a pipe holds"])
def test_a_reader_that_has_enough(tmp_path, lines):
    "`kdnb_data ... | head` says nothing on stderr."
    for i in range(lines): (tmp_path/f"a_picture_that_has_quite_a_long_name_{i}.png").write_bytes(b"")
    picture(tmp_path/A)
    code = f"from kdnb import archive\ninput()\narchive.main(['verify', {str(tmp_path)!r}, '--all'])"
    p = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
    p.stdout.close()
    p.stdin.write("\n"), p.stdin.close()
    said = p.stderr.read()
    assert p.wait(20) == 141 and not any(word in said for word in ("Errno", "Broken pipe", "Traceback", "ignored"))


def test_interrupted_by_the_user(tmp_path):
    for i in range(40): picture(tmp_path/f"SOB_M_DC-14-2523-400-{i:03d}.png", i)
    code = ("import time\nfrom kdnb import archive, audit\n"
            "real = audit.look\naudit.look = lambda p: (print('.', flush=True), time.sleep(.2), real(p))[2]\n"
            f"archive.main(['verify', {str(tmp_path)!r}])")
    p = subprocess.Popen([sys.executable, "-c", LISTEN + code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    p.stdout.readline()
    p.send_signal(signal.SIGINT)
    begun = time.monotonic()
    err = p.communicate(timeout=20)[1]
    assert p.returncode == 1 and "Traceback" not in err and "kdnb_data: interrupted" in err
    assert time.monotonic() - begun < 3, "what is not begun is not begun any more"
