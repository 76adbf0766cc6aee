"A grid is right before it starts, goes on past a failure, and repeats nothing that is done, whatever is killed."
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque

import nbformat
import pandas as pd
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from kdnb import grids, results
from kdnb.core import BadInput, file_digest, shared
from kdnb.grids import load_grid, prepare, recorded, run_grid, settle, share_cores, values_of, write_note
from kdnb.results import load_records, new_record, save_record

CELL = 'mag: str = "400X"  # magnification\nk: int = 10  # shots\ntau: float = 4.  # temperature'
CHECK = "from kdnb.run import check_parameters\np = check_parameters(globals(), k=[5, 10, 20])"
RECORD = """
from kdnb.results import new_record, save_record
rows = [dict(method="graft", split="test", level="image", metric="auroc", value=.8, n=40)]
save_record(new_record("run_toy.ipynb", parameters={n: globals()[n] for n in vars(p)}, resolved=vars(p), data="d",
                       protocol="patients", source="synthetic", split="s", device="cpu", seconds=1., rows=rows))
"""
LOG = """
import os, pathlib, time
def log(what):
    with open("log.txt", "a") as f: f.write(f"{what} {k} {os.getppid()}\\n")
log("begin")
"""
HANG = 'if k == 10 and not pathlib.Path("killed").exists(): time.sleep(120)'  # the first time only


def toy(folder, *more, check=CHECK):
    first = new_code_cell(CELL, metadata={"tags": ["parameters"]})
    spec = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    cells = [first, *map(new_code_cell, (check, *more))]
    nbformat.write(new_notebook(cells=cells, metadata=spec), folder/"run_toy.ipynb")


def grid(folder, text="", *more, **options):
    toy(folder, *more, **options)
    (folder/"grid.toml").write_text('notebook = "run_toy.ipynb"\n' + text)
    return folder/"grid.toml"


def log(folder, what):
    "The points that have begun, or ended, in order: k and the process that runs the point."
    lines = (folder/"log.txt").read_text().splitlines() if (folder/"log.txt").exists() else []
    return [(int(k), int(pid)) for word, k, pid in map(str.split, lines) if word == what]


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(.05)


def left_over(folder):
    "Processes that still stand in a folder."
    def here(p):
        try: return p.cwd() == str(folder) and p.status() != psutil.STATUS_ZOMBIE
        except psutil.Error: return False
    return [p.pid for p in psutil.process_iter() if here(p)]


def kdnb_run(folder, *words):
    "The command, as a user starts it; one thread each on this machine, however many cores it has."
    code = "import os, kdnb.grids as g; g.cores = lambda: 2; g.main()"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, words)], cwd=folder, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)


# ---- which points

@pytest.mark.parametrize("text, message", [
    ("notebook = ", "cannot be read as TOML"), ("[axes]\nk = [5]", "`notebook` is missing"),
    ('notebook = "run_toi.ipynb"', "does not exist"), ('notebook = "run_toy.ipynb"\nfix = 3', "Did you mean"),
    ('notebook = "run_toy.ipynb"\n[axes]\nk = 5', "axis k must be a list"),
    ('notebook = "run_toy.ipynb"\n[axes]\nk = []', "axis k must be a list"),
    ('notebook = "run_toy.ipynb"\n[axes]\nk = [5]\n[fixed]\nk = 5', "both fixed and an axis"),
    ('notebook = "run_toy.ipynb"\n[axes]\nk = [5]\n[fixed]\nmagg = "40X"', "Did you mean 'mag'"),
    ('notebook = "run_toy.ipynb"\n[axes]\nk = [5, "ten"]', "accepted is int"),
    ('notebook = "run_toy.ipynb"\n[[grid]]\nnotebook = "run_toy.ipynb"', "only be `home`"),
    ('notebook = "run_toy.ipynb"\nthreads = 0', "whole numbers from 1 up"),
    ('notebook = "run_toy.ipynb"\nthreads = true', "whole numbers from 1 up"),
    ('notebook = "run_toy.ipynb"\nexclude = [{kk = 5}]\naxes = {k = [5]}', "Did you mean 'k'"),
    ('notebook = "run_toy.ipynb"\nexclude = [{k = 50}]\naxes = {k = [5]}', "k=50 is not accepted"),
    ('notebook = "run_toy.ipynb"\nexclude = [{k = 5}]\naxes = {k = [5]}', "leaves no point"),
    ('notebook = "run_toy.ipynb"\nexclude = ["k"]\naxes = {k = [5]}', "list of tables"),
    ('notebook = "run_toy.ipynb"\nexclude = [{}]\naxes = {k = [5]}', "list of tables"),
])
def test_a_wrong_grid_starts_nothing(tmp_path, house, text, message):
    toy(tmp_path)
    (tmp_path/"grid.toml").write_text(text)
    with pytest.raises(BadInput, match=message): run_grid(tmp_path/"grid.toml")
    assert not house.exists()


def test_points_are_the_product_of_the_axes(tmp_path):
    path = grid(tmp_path, 'threads = 2\n[axes]\nk = [5, 10]\nmag = ["40X", "100X", "400X"]\n[fixed]\ntau = 2.0')
    points, home, threads = load_grid(path)
    assert (len(points), home, threads) == (6, None, 2)
    assert points[0][1:] == (dict(tau=2., k=5, mag="40X"), ("k", "mag"))
    twice = "".join(f'[[grid]]\nnotebook = "run_toy.ipynb"\n[grid.axes]\nk = [{k}]\n' for k in (5, 10))
    path.write_text(twice)
    assert len(load_grid(path).points) == 2


def test_excluded_are_the_combinations_that_agree_with_a_whole_rule():
    axes = {"k": [5, 10], "m": ["a", "b", "c"]}
    every = [dict(k=k, m=m) for k in axes["k"] for m in axes["m"]]
    left = grids.without(every, [dict(k=5, m=["a", "b"]), dict(m="c")], axes, "g")
    assert left == [dict(k=10, m="a"), dict(k=10, m="b")]


def test_grids_that_came_with_kdnb_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert grids.find_grid("smoke.toml").is_file() and grids.find_grid("x/smoke.toml") == tmp_path/"x"/"smoke.toml"


# ---- values, before anything starts

def test_a_value_the_notebook_refuses_starts_nothing(tmp_path, house):
    path = grid(tmp_path, '[axes]\nk = [5, 7]\nmag = ["40X", "300X"]')
    with pytest.raises(BadInput) as e: run_grid(path)
    said = str(e.value)
    assert "nothing was started" in said and "k=7 is not accepted; accepted are 5, 10, 20" in said
    assert "'40X', '100X', '200X', '400X'" in said and not house.exists()


def test_what_is_not_there_starts_nothing(tmp_path, house, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = grid(tmp_path, 'axes = {k = [5, 10]}\nfixed = {data = "no/glas", weights = "w"}')
    first = new_code_cell(CELL + '\ndata: str = "auto"  # -\nweights: str = ""  # -', metadata={"tags": ["parameters"]})
    nbformat.write(new_notebook(cells=[first, new_code_cell(CHECK)]), tmp_path/"run_toy.ipynb")
    with pytest.raises(BadInput) as e: run_grid(path)
    first, *said = str(e.value).splitlines()
    assert first.endswith("nothing was started") and len(said) == 2 and not house.exists()
    for line, start in zip(said, (f"data='no/glas' does not exist, looked for in {tmp_path}/no; ",
                                  f"weights='w' does not exist, looked for in {tmp_path}; "), strict=True):
        assert line.startswith(start) and line.endswith("(2 of 2 points)")
    assert grids.absent(dict(data="auto", weights="", teachers="x")) == grids.absent(dict(data=str(tmp_path))) == []
    assert grids.absent(dict(data="x" * 300)) and grids.absent(dict(data="a\0")), "names that no disk takes"


def test_values_come_back_normalised(tmp_path):
    toy(tmp_path, "raise SystemError('never reached')", check=CHECK + "\np.k = iter([])")
    said = values_of(tmp_path/"run_toy.ipynb", {"mag": 400, "tau": 2})
    assert said == dict(asked=dict(mag=400, k=10, tau=2), settled=dict(mag="400X", k=10, tau=2.)), "no object in a key"
    toy(tmp_path, check="1 / 0  # check_parameters")
    assert "ZeroDivisionError" in values_of(tmp_path/"run_toy.ipynb", {})["wrong"]
    toy(tmp_path, check="raise SystemError('not a check, not run')")
    assert values_of(tmp_path/"run_toy.ipynb", {"k": 3})["settled"]["k"] == 3


def test_equal_points_are_one(tmp_path, house):
    path = grid(tmp_path, '[axes]\nmag = [400, "400x", "40X"]')
    every = load_grid(path)
    said = settle([(str(n), given) for n, given, _ in every.points])
    assert len(prepare(every, said, 1, tmp_path)) == 2


# ---- when a point is done

@pytest.fixture
def point(tmp_path, house):
    grid(tmp_path)
    values = dict(mag="400X", k=10, tau=4.)
    at = grids.Grid([(tmp_path/"run_toy.ipynb", {}, ())])
    return lambda threads=1, **v: prepare(at, [dict(asked=values | v, settled=values | v)], threads, tmp_path)[0]


def keep_record(notebook="run_toy.ipynb", **fields):
    rows = [dict(method="graft", split="test", level="image", metric="auroc", value=.8, n=40)]
    known = dict(parameters=dict(mag="400X", k=10, tau=4.), resolved={}, protocol="p", source="own", data="d",
                 split="s", device="cpu", seconds=1., rows=rows)
    predictions = fields.pop("predictions", None)
    return save_record(new_record(notebook, **known | fields), predictions=predictions)


def test_what_makes_another_point(point, tmp_path, monkeypatch):
    key = point()["key"]
    assert key == point()["key"] and key not in (point(k=5)["key"], point(threads=2)["key"])
    toy(tmp_path, "more = 1")
    assert point()["key"] != key, "other code in the notebook"
    toy(tmp_path)
    monkeypatch.setattr(grids, "code_digest", lambda *a: "other")
    assert point()["key"] != key, "other code in kdnb"


def test_files_that_parameters_name_count(tmp_path, monkeypatch):
    monkeypatch.setenv("KDNB_DATA", str(tmp_path/"images"))
    (tmp_path/"images"/"sub").mkdir(parents=True)
    values = dict(data="auto", weights="", teachers=f"resnet10t,{tmp_path/'images'}", method="images")
    named = lambda: grids.named_files(values, {})
    seen = [named()]
    for name in ("a.png", "sub/b.png"):
        (tmp_path/"images"/name).write_bytes(b"x")
        seen.append(named())
    assert seen[0].keys() == {"auto", str(tmp_path/"images")} and seen[0] != seen[1] != seen[2]
    (tmp_path/"images"/".lock").write_bytes(b"")
    assert named() == seen[2]
    (tmp_path/"a,b.csv").write_bytes(b"x")
    assert grids.named_files(dict(data=f"{tmp_path}/a,b.csv", student=f"{tmp_path}/a,b.csv"), {}).keys() == {
        f"{tmp_path}/a,b.csv"}, "only teachers are a list"


def test_a_point_is_done_while_its_record_is_there(point):
    p = point()
    assert recorded(p) is None
    path = keep_record()
    assert recorded(p) is None, "a record alone may be of other data"
    write_note(p, "done", run=path.stem)
    assert recorded(p)["run"] == path.stem and recorded(point(k=5)) is None
    path.write_text("{")
    assert recorded(p) is None
    path.unlink()
    assert recorded(p) is None
    grids.note_path(p).write_text('{"state": "do')
    assert recorded(p) is None


def test_killed_between_record_and_note(point):
    p = point()
    keep_record(data="old")
    time.sleep(.02)
    write_note(p, "started")
    time.sleep(.02)
    keep_record(parameters=dict(mag="400X", k=5, tau=4.))
    assert recorded(p) is None, "older, or of another point"
    run = keep_record().stem
    assert recorded(p)["run"] == run and grids.read_note(grids.note_path(p))["state"] == "done"


def test_a_record_of_other_code_is_not_the_one_that_was_started(point):
    p = point()
    write_note(p, "started")
    keep_record(code="other")
    assert recorded(p) is None
    keep_record()
    assert recorded(p) is not None


def test_kdnb_changed_while_a_point_ran(point, monkeypatch):
    p = point()

    def run(*_):
        keep_record(code="other")
        monkeypatch.setattr(grids, "code_digest", lambda *a: "other")
    monkeypatch.setattr(grids, "execute", run)
    with pytest.raises(BadInput, match="changed while"): grids.perform(p)
    assert recorded(p) is None


def test_a_run_without_its_predictions_is_not_done(point, house):
    p = point()
    frame = pd.DataFrame(dict(split="test", image=["a", "b"], patient="1", label=["x", "y"], method="graft",
                              p_x=[1., 0.], p_y=[0., 1.]))
    write_note(p, "done", run=keep_record(predictions=frame).stem)
    assert recorded(p)
    kept, = (house/"results"/"predictions").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-1])
    assert recorded(p) is None
    kept.unlink()
    assert recorded(p) is None
    kept.write_bytes(whole)
    assert recorded(p)


# ---- a record without a note

@pytest.fixture
def ours(house, tmp_path, monkeypatch):
    "A notebook that came with kdnb, its point under some parameters, and a record of that as papermill leaves it."
    monkeypatch.setenv("KDNB_DATA", str(tmp_path/"images"))
    (tmp_path/"images").mkdir()

    class Ours:
        name = "run_teacher.ipynb"

        def point(self, notebook=None, threads=1, device="cpu", **values):
            values = dict(k=5, device="auto") | values
            said = [dict(asked=values, settled=values | dict(device=device))]
            return prepare(grids.Grid([(notebook or shared("nbs")/self.name, {}, ())]), said, threads, tmp_path)[0]

        def record(self, **fields):
            said = fields.pop("parameters", dict(k=5, device="auto"))
            return keep_record(self.name, parameters=said, resolved=said | dict(threads=fields.pop("threads", 1)),
                               **dict(source="synthetic") | fields)
    return Ours()


def test_a_record_without_a_note_is_believed_if_all_is_equal(ours, tmp_path, capsys):
    for other in (dict(parameters=dict(k=10, device="auto")), dict(threads=2), dict(code="other"), dict(device="cuda")):
        ours.record(**other)
        assert recorded(ours.point()) is None, other
    run = ours.record().stem
    copy = tmp_path/ours.name
    nb = nbformat.read(shared("nbs")/ours.name, 4)
    nb.cells.append(new_code_cell("1"))
    nbformat.write(nb, copy)
    record = results.load_record(results.results_home()/"runs"/f"{run}.json")
    assert grids.believed(record, ours.point()) and not grids.believed(record, ours.point(copy))
    assert recorded(ours.point(copy)) is None, "another notebook under the same name"
    assert grids.work_through([ours.point()], grids.Engine(1, 1, None, lambda every: []), False) == {}
    assert "1 points, 1 of them recorded (1 without a note); " in capsys.readouterr().out
    note = grids.read_note(grids.note_path(ours.point()))
    assert (note["run"], note["state"], note["by"]) == (run, "done", "record") and recorded(ours.point()) == note


def test_auto_is_believed_to_be_the_phantom_while_there_is_no_breakhis(ours, tmp_path):
    same = dict(k=5, device="auto", data="auto")
    ours.record(parameters=same, source="breakhis", data="photographs")
    (tmp_path/"images"/"SOB_B_A-14-22549AB-100-027.png").write_bytes(b"")
    assert recorded(ours.point(data="auto")) is None, "which photographs, is not known"
    ours.record(parameters=same)
    assert recorded(ours.point(data="auto")) is None, "auto is BreakHis by now"
    (tmp_path/"images"/"SOB_B_A-14-22549AB-100-027.png").unlink()
    assert recorded(ours.point(data="auto"))


def test_own_images_are_confirmed_by_a_point_that_was_done_on_them(ours, tmp_path):
    folder = str(tmp_path/"images")
    of = lambda k, data: ours.record(parameters=dict(k=k, device="auto", data=folder), source="own", data=data).stem
    at = lambda k: ours.point(k=k, data=folder)
    of(5, "digest")
    assert recorded(at(5)) is None
    write_note(at(10), "done", run=of(10, "other digest"))
    assert recorded(at(5)) is None, "of other images"
    write_note(at(20), "done", run=of(20, "digest"))
    (tmp_path/"images"/"a.png").write_bytes(b"x")
    assert recorded(at(5)) is None, "of the images that were there before"
    (tmp_path/"images"/"a.png").unlink()
    assert recorded(at(5))["by"] == "record"


def test_weights_are_confirmed_by_the_teachers(ours, tmp_path):
    net = tmp_path/"weights"/"net.pth"
    net.parent.mkdir()
    net.write_bytes(b"x")
    same = dict(k=5, device="auto", weights=str(net.parent))
    for cards in (None, ["foreign"], [dict(start="random")], [dict(start=file_digest(net)), dict(start="other")]):
        ours.record(parameters=same, teachers=cards)
        assert recorded(ours.point(weights=str(net.parent))) is None, cards
    ours.record(parameters=same, teachers=[dict(start=file_digest(net))])
    assert recorded(ours.point(weights=str(net.parent), teachers=str(tmp_path/"images"))) is None, "other parameters"
    assert recorded(ours.point(weights=str(net.parent)))
    ours.record(parameters=same | dict(teachers=str(tmp_path/"images")), teachers=[dict(start=file_digest(net))])
    kept = ours.point(weights=str(net.parent), teachers=str(tmp_path/"images"))
    assert recorded(kept) is None, "kept teachers are not known"
    assert recorded(kept | dict(files={})), "for no other reason"


def test_a_record_that_a_note_speaks_of_is_of_that_point_only(ours):
    write_note(ours.point() | dict(key="another"), "done", run=ours.record().stem)
    assert recorded(ours.point()) is None


# ---- the local engine

@pytest.mark.parametrize("workers, threads, have, gives", [
    (None, None, 8, (1, 8)), (2, None, 8, (2, 4)), (3, None, 8, (3, 2)), (8, 1, 8, (8, 1)), (2, 3, 8, (2, 3)),
])
def test_cores_are_shared_out(workers, threads, have, gives, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert share_cores(workers, threads, have) == gives
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert share_cores(workers, threads, have)[1] == (threads or 1)


@pytest.mark.parametrize("workers, threads", [(3, 3), (9, None), (1, 9), (0, 1), (1, 0), (-1, None)])
def test_never_more_threads_than_cores(workers, threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(BadInput): share_cores(workers, threads, 8)


def test_one_run_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen, go = [], threading.Event()

    def run():
        with grids.one_gpu("cuda") as gpu:
            seen.append(gpu)
            go.wait(20)
    monkeypatch.setattr(grids, "gpus", lambda: ["0", "MIG-a/1"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,MIG-a/1")
    runs = [threading.Thread(target=run) for _ in range(3)]
    for r in runs: r.start()
    wait_for(lambda: len(seen) == 2)
    time.sleep(.6)
    assert sorted(seen) == ["0", "MIG-a/1"], "the third waits"
    go.set()
    for r in runs: r.join()
    assert len(seen) == 3 and os.environ["CUDA_VISIBLE_DEVICES"] in seen
    for device in ("cpu", "cuda:1", "mps"):
        with grids.one_gpu(device) as gpu: assert gpu is None


def test_gpus_are_found_without_torch(tmp_path, monkeypatch):
    (tmp_path/"nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: H (UUID: GPU-a)'\necho 'GPU 1: H (UUID: GPU-b)'\n")
    (tmp_path/"nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert grids.gpus() == ["0", "1"] and share_cores(None, None, 8)[0] == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert grids.gpus() == ["1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert grids.gpus() == []


def test_killed_and_started_again(tmp_path, house):
    "Two at a time: 5 ends, 10 hangs and is killed with the rest, 20 fails; then the same command again."
    path = grid(tmp_path, 'home = "trial"\n[axes]\nk = [5, 10, 20]', LOG, HANG, "1 / (k - 20)", RECORD, "log('end')")
    words = (path, "--workers", "2", "--out", "executed")
    first = kdnb_run(tmp_path, *words)
    wait_for(lambda: len(log(tmp_path, "begin")) == 3 and len(log(tmp_path, "end")) == 1)
    wait_for(lambda: any('"done"' in p.read_text() for p in (house/"trial/results/points").glob("*.json")))
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    wait_for(lambda: not left_over(tmp_path), 5)
    assert not [p for p in house.rglob("*.json") if not json.loads(p.read_text())], "nothing is half-written"
    (tmp_path/"killed").touch()
    again = kdnb_run(tmp_path, *words)
    said, wrong = again.communicate(timeout=60)
    assert again.returncode == 1 and wrong.startswith("kdnb_run: 1 points failed\nrun_toy-20-")
    assert "ZeroDivisionError" in wrong and "Traceback" not in wrong
    assert "3 points, 1 of them recorded; 2 at a time, threads: 1, about" in said
    assert "2 of 3 points done, 1 of them before" in said and "[2/3] " in said and "[3/3] " in said
    assert sorted(k for k, _ in log(tmp_path, "end")) == [5, 10]
    assert [k for k, _ in log(tmp_path, "begin")].count(5) == 1
    assert len(list((tmp_path/"executed").glob("run_toy-*.ipynb"))) == 3 and not (house/"results").exists()
    assert {r["parameters"]["k"] for r in load_records(house/"trial"/"results")} == {5, 10}
    wait_for(lambda: not left_over(tmp_path), 5)


def test_a_full_disk_is_told_as_the_reason(tmp_path, house):
    "No note can be written: the reason comes by stderr."
    path = grid(tmp_path, "threads = 1\n[axes]\nk = [5, 10]", check="")
    house.mkdir()
    (house/"results").write_text("no folder can be made here")
    failed = run_grid(path, tmp_path/"executed")
    assert len(failed) == 2
    for why in failed.values():
        assert why.startswith("its process ended with code 1; last it said: NotADirectoryError: ")
        assert str(house/"results") in why and "no note of it" in why


def test_what_a_process_says_last_is_kept_and_shown(capfd):
    say = "import sys; sys.stderr.write('x'*200_000 + 'the end'); sys.stderr.flush()"
    for show in (False, True):
        child = subprocess.Popen([sys.executable, "-c", say], stderr=subprocess.PIPE)
        tail = deque(maxlen=10)
        thread = grids.listen(child.stderr, tail, show)
        assert child.wait(30) == 0
        thread.join(30)
        assert bytes(tail) == b"xxxthe end" and capfd.readouterr().err.endswith("the end") == show


def test_time_left_goes_by_notebook():
    assert grids.time_left([], ["a"], 1) is None and grids.time_left([("a", 2.)], [], 1) is None
    assert grids.time_left([("a", 10.), ("b", 100.)], ["a", "b", "c"], 2) == (10 + 100 + 55) / 2


# ---- the Dask engine

def test_a_killed_dask_worker_loses_nothing(tmp_path, house):
    "Two worker processes; the one that hangs in the middle of its point is killed."
    path = grid(tmp_path, "threads = 1\n[axes]\nk = [5, 10, 20]", LOG, HANG, "log('end')", check="")
    with grids.connect(2, None, str(tmp_path/"room")) as client:
        started = kdnb_run(tmp_path, path, "--engine", "dask", "--address", client.scheduler.address)
        wait_for(lambda: 10 in dict(log(tmp_path, "begin")) and len(log(tmp_path, "end")) == 2)
        runner = psutil.Process(dict(log(tmp_path, "begin"))[10])
        (tmp_path/"killed").touch()
        assert runner.ppid() in client.run(os.getpid).values()
        os.kill(runner.ppid(), signal.SIGKILL)
        said, wrong = started.communicate(timeout=60)
    assert started.returncode == 0, wrong
    assert "3 of 3 points done, 0 of them before" in said and "2 at a time, threads: 1" in said
    assert sorted(k for k, _ in log(tmp_path, "end")) == [5, 10, 20]
    assert sorted(k for k, _ in log(tmp_path, "begin")) == [5, 10, 10, 20]
    wait_for(lambda: not left_over(tmp_path), 5)


def test_workers_that_would_fight_for_cores_are_refused():
    nodes = {"a": ("n1", 4), "b": ("n1", 4), "c": ("n2", 2)}
    grids.check_room({"a": 1, "b": 1, "c": 1}, nodes, 2)
    with pytest.raises(BadInput, match="on n1 run 3 points"): grids.check_room({"a": 1, "b": 2, "c": 1}, nodes, 2)


def test_what_the_extra_brings_is_told():
    with pytest.raises(BadInput, match=r'pip install "kdnb\[grid\]"'): grids.extra("no_such_module")


def test_the_job_script_for_slurm():
    with grids.slurm(threads=8, gpus=1, queue="gpu", account="me") as cluster: script = cluster.job_script()
    for line in ("#SBATCH --cpus-per-task=8", "#SBATCH -p gpu", "#SBATCH -A me", "#SBATCH --gres=gpu:1",
                 "#SBATCH -t 04:00:00", "#SBATCH -n 1"): assert line in script.splitlines()
    assert "--nthreads 1 " in script and "dask_worker tcp://" in script
    with pytest.raises(BadInput, match="gpus=2"): grids.slurm(gpus=2)


def test_the_manifest_for_kubernetes():
    text = grids.kubernetes("paper.toml", "kdnb:1", "results", workers=3, threads=8, gpus=1, name="night")
    spec = json.loads(text)["spec"]
    job, cluster = spec["job"]["spec"], spec["cluster"]["spec"]
    pods = [job, cluster["worker"]["spec"], cluster["scheduler"]["spec"]]
    assert job["containers"][0]["args"] == ["kdnb_run", "paper.toml", "--engine", "dask", "--threads", "8"]
    assert cluster["worker"]["replicas"] == 3
    assert cluster["worker"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert cluster["scheduler"]["service"]["selector"]["dask.org/cluster-name"] == "night"
    for p in pods:
        assert p["volumes"] == [{"name": "home", "persistentVolumeClaim": {"claimName": "results"}}]
        container, = p["containers"]
        assert container["image"] == "kdnb:1"
        assert container["env"] == [{"name": "KDNB_HOME", "value": container["volumeMounts"][0]["mountPath"]}]


# ---- the command

@pytest.mark.parametrize("argv, message", [
    (["x.ipynb", "--out", "d"], "--out is for grids"), (["x.ipynb", "--workers", "2"], "--workers is for grids"),
    (["g.toml", "o.ipynb"], "it takes --out"), (["g.toml", "-p", "k", "5"], "it takes --out"),
    (["g.toml"], "cannot be read"), (["no.ipynb"], "does not exist"),
    (["smoke.toml", "--engine", "dusk"], "Did you mean 'dask'"),
    (["smoke.toml", "--address", "x"], "for the engine dask"),
    (["smoke.toml", "--workers", "999"], "are more than the"), (["smoke.toml", "--workers", "0"], "from 1 up"),
    (["smoke.toml", "--engine", "dask", "--address", "x:1", "--workers", "2"], "has the workers that it has"),
    (["smoke.toml", "--engine", "dask", "--address", "nothing://x"], "no scheduler answers"),
    (["smoke.toml", "--engine", "dask", "--address", "no.json"], "is no scheduler file"),
])
def test_commands_that_make_no_sense(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e: grids.main(argv)
    assert str(e.value.code).startswith("kdnb_run: ") and message in e.value.code


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    toy(tmp_path)
    (tmp_path/"file").write_text("")
    with pytest.raises(SystemExit) as e: grids.main([str(tmp_path/"run_toy.ipynb"), str(tmp_path/"file"/"out.ipynb")])
    assert e.value.code.startswith("kdnb_run: ") and str(tmp_path/"file") in e.value.code
    assert len(e.value.code.splitlines()) == 1


def test_grids_import_without_torch_and_dask():
    heavy = ("torch", "torchvision", "timm", "papermill", "nbformat", "dask", "distributed")
    code = f"import sys\nfor m in {heavy!r}: sys.modules[m] = None\nimport kdnb.grids"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
