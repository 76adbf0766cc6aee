"Experiments from outside: plain papermill from another folder, bad input, a kill and a resume, real images where they are."
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import nbformat
import pytest
import torch
from safetensors.torch import load_file

from kdnb.core import BadInput, resolve_preset
from kdnb.data import ImageStore, find_images, slides
from kdnb.grafting import Lesson, checkpoint, plan
from kdnb.nets import build, normalise, timm
from kdnb.phantom import write_phantom
from kdnb.protocols import split_images
from kdnb.run import literal, parameters_of
from kdnb.students import load_student
from kdnb.teacher import decoded, load_teacher, train_teacher

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent/"shared"/"data"
TINY = "laptop,size=32,batch=8,teacher_steps=6,graft_steps=27,graft_batch=8"
QUICK = dict(preset=TINY, teachers="resnet10t,test_resnet", student="test_resnet", k=2, device="cpu")


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    "Thirty slides, three small pictures of each: enough for every side of every split."
    root = tmp_path_factory.mktemp("phantom")
    return write_phantom(root, mags=("400X",), images=3, size=(64, 42), slides=slides().slide_id[::2], progress=False)


def papermill(notebook, out, home, cwd, wait=True, **parameters):
    "The plain papermill command, as a user types it."
    command = ["papermill", str(ROOT/"nbs"/notebook), str(out), "--no-progress-bar"]
    for k, v in parameters.items(): command += ["-p", k, str(v)]
    env = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}  # Jupyter's own, which stores figures
    env |= {"KDNB_HOME": str(home), "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                           start_new_session=True)
    return (run, run.communicate()[0]) if wait else run


def record_of(home): return json.loads((home/"results"/"latest.json").read_text())


# ---- both experiments, from another working directory

@pytest.mark.smoke
def test_distill_from_another_folder(phantom, tmp_path):
    run, said = papermill("run_distill.ipynb", "out.ipynb", tmp_path/"home", tmp_path, data=phantom, mag=400, **QUICK)
    assert run.returncode == 0, said
    record = record_of(tmp_path/"home")
    assert record["synthetic"] and record["source"] == "synthetic" and record["parameters"]["mag"] == 400
    assert record["resolved"]["mag"] == "400X" and record["skipped"].keys() == {"finetune"}
    methods = {r["method"] for r in record["rows"]}
    assert methods == {"teacher resnet10t", "teacher test_resnet", "ensemble", "graft", "hard", "kd"}
    assert all(0 <= r["value"] <= 1 and r["n"] > 0 for r in record["rows"] if r["metric"] not in ("mcc", "nll"))
    text = json.dumps(nbformat.read(tmp_path/"out.ipynb", 4))
    assert "These images are synthetic" in text and text.count("image/png") >= 3


@pytest.mark.smoke
def test_the_student_is_a_plain_timm_model(phantom, tmp_path):
    run, said = papermill("run_distill.ipynb", "out.ipynb", tmp_path/"home", tmp_path, data=phantom, baselines="",
                          mag="400x", **QUICK)
    assert run.returncode == 0, said
    record = record_of(tmp_path/"home")
    path = tmp_path/"home"/record["checkpoint"]["path"]
    plain = timm.create_model("test_resnet", num_classes=2).eval()
    plain.load_state_dict(load_file(path), strict=True)
    student, x = load_student(path), torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(plain(normalise(x, student.card)), student(normalise(x, student.card)))
    assert student.card["labels"] == ["benign", "malignant"] and record["host"] in ("resnet10t", "test_resnet")
    assert record["splices"] == 0 and not (tmp_path/"home"/"cache"/"runs"/record["run"]).exists()


@pytest.mark.smoke
def test_the_smoke_grid(phantom, tmp_path):
    env = os.environ | {"KDNB_HOME": str(tmp_path/"home"), "KDNB_DATA": str(phantom), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(["kdnb_run", str(ROOT/"nbs/grids/smoke.toml"), "--out", "executed"], cwd=tmp_path, env=env,
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    executed = sorted(p.name for p in (tmp_path/"executed").glob("*.ipynb"))
    assert len(executed) == 2 and "2 of 2 points done" in run.stdout
    assert len(list((tmp_path/"home/cache/smoke/results/runs").glob("*.json"))) == 2


# ---- bad input

def refuse(notebook, **parameters):
    "Run the code cells in this process, papermill's way, and return the refusal with the number of its cell."
    cells = [c.source for c in nbformat.read(ROOT/"nbs"/notebook, 4).cells if c.cell_type == "code"]
    there = {"__name__": "__main__"}
    exec(cells[0], there)
    there |= {k: literal(str(v)) for k, v in parameters.items()}
    for i, source in enumerate(cells[1:], 2):
        try: exec(source, there)
        except BadInput as e: return str(e), i
    pytest.fail("nothing was refused")


def no_images(folder, phantom):
    (folder/"empty").mkdir()
    return dict(data=folder/"empty"), f"no BreakHis images under {folder/'empty'}"


def cut_png(folder, phantom):
    shutil.copytree(phantom, folder/"cut")
    victim = sorted((folder/"cut").rglob("*.png"))[7]
    victim.write_bytes(victim.read_bytes()[:900])
    return dict(data=folder/"cut"), f"{victim.name} cannot be decoded"


def no_column(folder, phantom):
    (folder/"t.csv").write_text("image,patient\na.png,1\n")
    return dict(data=folder/"t.csv"), "lacks the column label; it has image, patient"


def both_sides(folder, phantom):
    table = find_images(phantom).assign(split="train", image=lambda t: t.path)
    table.loc[table.index % 3 == 0, "split"] = "test"
    table[["image", "label", "patient", "split"]].to_csv(folder/"t.csv", index=False)
    return dict(data=folder/"t.csv"), "is on both sides: test and train"


def other_classes(folder, phantom):
    kept = folder/"teacher"
    kept.mkdir()
    (kept/"card.json").write_text(json.dumps({"net": "test_resnet", "classes": ["cat", "dog"], "data": "", "split": ""}))
    return dict(teachers=kept), r"knows the classes \['cat', 'dog'\], the data has \['benign', 'malignant'\]"


FILES = [no_images, cut_png, no_column, both_sides, other_classes]
VALUES = [
    (dict(magg="400X"), "magg='400X' is not a parameter. Did you mean 'mag'"), (dict(k="five"), "k='five' is of type str"),
    (dict(mag="300X"), "accepted are '40X', '100X', '200X', '400X'"), (dict(mag=40), r"holds only 400X"),
    (dict(student="resnet81"), "net='resnet81' is not known; near it are"), (dict(teachers="resnet10t,resnot"), "resnot"),
    (dict(method="graff"), "Did you mean 'graft'"), (dict(baselines="hard,kdd"), "Did you mean 'kd'"),
    (dict(k=0), "k=0 is not accepted; accepted are numbers from 1 up"), (dict(k=999), "k=999: class 'benign' offers at most"),
    (dict(fold=5), "fold=5 is not accepted"), (dict(gamma=-1), "gamma=-1"), (dict(temperature=0), "temperature=0"),
    (dict(preset="laptop,sise=3"), "Did you mean 'size'"), (dict(device="cuda:9"), "device='cuda:9' is not accepted"),
    (dict(data="nowhere"), "neither a folder nor a CSV"), (dict(method="finetune"), "needs a pretrained student"),
    (dict(host="vgg11"), "host='vgg11' is not accepted"), (dict(weights="nowhere"), "weights='nowhere'"),
    (dict(seed=-1), "seed=-1 is not accepted"), (dict(preset="laptop,size=-3"), "size=-3 is not accepted"),
    (dict(preset="laptop,lr=nan"), "lr=nan is not accepted"), (dict(preset="laptop,stain=macenka"), "Did you mean 'macenko'"),
]


@pytest.fixture
def outside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDNB_HOME", str(tmp_path/"home"))
    return tmp_path


@pytest.mark.parametrize("wrong, message", VALUES, ids=lambda v: "-".join(v) if isinstance(v, dict) else "")
def test_values_are_refused_before_any_training(phantom, outside, wrong, message):
    said, cell = refuse("run_distill.ipynb", **{**QUICK, "data": phantom, **wrong})
    assert re.search(message, said) and cell <= 5, (said, cell)
    assert not (outside/"home"/"cache"/"teachers").exists()


@pytest.mark.parametrize("make", FILES)
def test_files_are_refused_before_any_training(phantom, outside, make):
    wrong, message = make(outside, phantom)
    said, _ = refuse("run_distill.ipynb", **{**QUICK, "data": phantom, **wrong})
    assert re.search(message.replace("(", r"\("), said), said
    assert not (outside/"home"/"cache"/"teachers").exists()


@pytest.mark.smoke
@pytest.mark.parametrize("notebook", ["run_distill.ipynb", "run_teacher.ipynb"])
def test_plain_papermill_refuses_too(phantom, tmp_path, notebook):
    run, said = papermill(notebook, "out.ipynb", tmp_path/"home", tmp_path, data=phantom, sead=1)
    assert run.returncode != 0 and "sead=1 is not a parameter. Did you mean 'seed'?" in said


def test_help_shows_every_parameter():
    for name in ("run_distill.ipynb", "run_teacher.ipynb"):
        said = subprocess.run(["papermill", "--help-notebook", str(ROOT/"nbs"/name)], capture_output=True, text=True).stdout
        assert all(f"  {p}: " in said for p in parameters_of(ROOT/"nbs"/name))


# ---- a kill and a resume

@pytest.mark.smoke
def test_a_killed_run_goes_on_and_ends_the_same(phantom, tmp_path):
    args = dict(data=phantom, baselines="kd", seed=3, **QUICK)
    home = tmp_path/"killed"
    run = papermill("run_distill.ipynb", "a.ipynb", home, tmp_path, wait=False, **args)
    until = time.monotonic() + 120
    while not list(home.rglob("stage-1-block-2.pt")) and run.poll() is None and time.monotonic() < until: time.sleep(.02)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    kept = {p: p.stat().st_mtime_ns for p in (home/"cache").rglob("*") if p.name in ("weights.safetensors", "stage-1-block-1.pt")}
    assert len(kept) == 3 and not (home/"results"/"latest.json").exists()
    for path in home.rglob("*.json"): json.loads(path.read_text())  # nothing is half-written
    assert papermill("run_distill.ipynb", "a.ipynb", home, tmp_path, **args)[0].returncode == 0
    teachers = {p: t for p, t in kept.items() if p.name == "weights.safetensors"}
    assert {p: p.stat().st_mtime_ns for p in teachers} == teachers, "teachers were not trained again"
    assert papermill("run_distill.ipynb", "b.ipynb", tmp_path/"calm", tmp_path, **args)[0].returncode == 0
    assert record_of(home)["rows"] == record_of(tmp_path/"calm")["rows"]
    assert record_of(home)["run"] == record_of(tmp_path/"calm")["run"]
    both = {h: record_of(h) for h in (home, tmp_path/"calm")}  # how long a method took is not known of two processes
    assert both[home]["resumed"] == ["graft"] and both[home]["timings"]["graft"] is None and both[home]["timings"]["kd"] > 0
    assert both[tmp_path/"calm"]["resumed"] == [] and both[tmp_path/"calm"]["timings"]["graft"] > 0


# ---- real images, where they are

@pytest.mark.smoke
def test_glas_and_breakhis_samples(tmp_path):
    if not (SHARED/"glas"/"labels.csv").exists(): pytest.skip(f"real images are not at {SHARED}")
    run, said = papermill("run_distill.ipynb", "out.ipynb", tmp_path/"home", tmp_path, data=SHARED/"glas/labels.csv",
                          weights=SHARED/"weights", teachers="kdnb_mobilenetv1_075,kdnb_squeezenet1_0",
                          student="kdnb_mobilenetv1_025", preset=TINY, baselines="finetune", k=2)
    assert run.returncode == 0, said
    record = record_of(tmp_path/"home")
    assert record["source"] == "glas" and not record["synthetic"] and not record["skipped"]
    samples = find_images(SHARED/"breakhis_samples")
    assert (len(samples), samples.slide.nunique(), samples.patient.nunique()) == (38, 23, 21)
    student = load_student(tmp_path/"home"/record["checkpoint"]["path"])
    store = ImageStore(samples, student.card["size"], tmp_path/"store")
    p = student(normalise(store[:], student.card)).softmax(-1)
    assert p.shape == (38, 2) and torch.isfinite(p).all()


# ---- what fresh eyes found

def test_a_teacher_that_has_seen_test_patients_is_refused_on_other_images_too(phantom, tmp_path):
    table = find_images(phantom)
    quick = resolve_preset("laptop,size=32,batch=8,teacher_steps=2")
    half = table[table.index % 2 == 0].reset_index(drop=True)
    teacher = train_teacher("test_resnet", decoded(split_images(table), 32), quick, home=tmp_path)
    sides = {"train": "valid", "valid": "test", "test": "train"}  # as another fold would have it
    other = split_images(half).assign(split=lambda t: t.split.map(sides))
    with pytest.raises(BadInput, match="of this split's test patients"): load_teacher(teacher.folder, decoded(other, 32))


def test_steps_are_shared_out_whole_or_refused():
    assert all(sum(n for *_, n in plan(5, steps)) == steps for steps in (10, 11, 99, 700))
    with pytest.raises(BadInput, match="4 steps are too few: 2 for 5 blocks"): plan(5, 4)


def test_a_fit_is_not_resumed_under_other_options(tmp_path):
    host, make = build("test_resnet", 2, seed=0), lambda start: build("test_resnet", 2, seed=1)
    views, q = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.full((4, 2), .5)
    lessons = [Lesson(views, q, tau, host, make, 9, 1e-3, folder=tmp_path, options=o)
               for tau, o in ((4., {}), (2., {}), (4., {"batchnorm": "frozen"}))]
    assert len({checkpoint(lesson, "stage 1 block 1").identity for lesson in lessons}) == 3
