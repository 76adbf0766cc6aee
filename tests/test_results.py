"Records are written whole or not at all, read only if they are whole, and tables never mix what must not be mixed."
import errno
import json
import math
import shutil
import subprocess
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kdnb import results
from kdnb.core import BadInput, resolve_preset
from kdnb.metrics import score_rows
from kdnb.results import (
    COLUMNS,
    FIRST,
    KEYS,
    LATER,
    Meter,
    barred,
    by_method,
    latest_rows,
    load_predictions,
    load_record,
    load_records,
    load_rows,
    modified,
    new_record,
    plain,
    prediction_table,
    preset_said,
    provenance,
    record_rows,
    save_record,
    score_table,
    write_tables,
)


def record(seed=0, **fields):
    score = lambda method, value: dict(method=method, split="test", level="image", metric="auroc", value=value, n=90)
    asked = dict(mag="40X", fold=0, seed=seed, k=10)
    return new_record("run_toy.ipynb", **dict(
        parameters=asked, resolved=asked, protocol="patients", source="own", data="d", split="s", code="c",
        commit="1" * 40, dirty=False, device="cpu", seconds=1.5, rows=[score("graft", .8), score("hard", .7)]) | fields)


def predictions(classes=("benign", "malignant"), seed=0, methods=("graft", "hard"), n=12):
    rng, y = np.random.default_rng(seed), np.arange(n) % len(classes)
    made = [prediction_table(y, rng.dirichlet(np.ones(len(classes)), n), [f"p{i//3}" for i in range(n)],
                             [f"{i}.png" for i in range(n)], classes, m) for m in methods]
    return pd.concat(made, ignore_index=True)


def spoil(tmp_path, **changes):
    "The path of a record of which some keys were changed, or taken out with `...`."
    path = save_record(record(), tmp_path)
    new = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in new.items() if v is not ...}))
    return path


def test_what_is_saved_is_loaded(tmp_path):
    path = save_record(record(), tmp_path)
    assert path == tmp_path/"runs"/f"{record()['run']}.json"
    assert path.read_text() == (tmp_path/"latest.json").read_text()
    assert load_record(path)["rows"] == record()["rows"]
    assert set(KEYS) <= load_record(path).keys()


def test_default_folder_is_the_home(house):
    assert save_record(record()).is_relative_to(house/"results"/"runs")
    assert len(load_rows()) == 2


def test_a_score_that_does_not_exist(tmp_path):
    row = record()["rows"][0]
    path = save_record(record(rows=[row | {"value": float("nan")}]), tmp_path)
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["rows"][0]["value"] is None
    assert math.isnan(record_rows(load_record(path)).value[0])


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_key_is_named(tmp_path, key):
    path = spoil(tmp_path, **{key: ...})
    with pytest.raises(BadInput, match="missing.*" + key if key not in ("schema", "run", "rows") else "not a kdnb"):
        load_record(path)


@pytest.mark.parametrize("changes, reason", [
    ({"schema": 0}, "schema 0, but this kdnb reads schema 1 and 2"), ({"schema": 3}, "schema 3"), ({"schema": "1"}, "'1'"),
    ({"schema": True}, "schema True"), ({"schema": None}, "schema None"),
    ({"run": "../x"}, "cannot be the name of a file"), ({"source": "camelyon"}, "accepted are breakhis"),
    ({"synthetic": True}, "contradict"), ({"rows": {}}, "not a list"), ({"rows": [3]}, "a row is 3"),
    ({"rows": [{"method": "graft", "split": "test", "level": "image", "metric": "auroc", "value": 1}]}, "lacks n"),
    ({"rows": [dict.fromkeys(["method", "split", "level", "metric", "value", "n", "accurracy"])]}, "unknown column 'accurracy'"),
    ({"data": "other"}, "it was edited"), ({"resolved": {"mag": "400X"}}, "it was edited"), ({"run": "0123456789"}, "edited"),
])
def test_what_is_wrong_is_said(tmp_path, changes, reason):
    path = spoil(tmp_path, **changes)
    with pytest.raises(BadInput, match=reason) as e: load_record(path)
    assert str(path) in str(e.value)


@pytest.mark.parametrize("key, value", [
    ("parameters", None), ("resolved", []), ("protocol", None), ("created", 5), ("created", "yesterday"),
    ("created", "2030-01-01T00:00:00"), ("dirty", "no"), ("predictions", "x"), ("predictions", {"path": "x"}), ("notebook", 3),
    ("predictions", {"path": 1, "digest": "d"}), ("modified", "kdnb/x.py"), ("modified", [1]), ("seconds", True), ("seconds", "9"),
    ("seconds", math.inf), ("versions", []), ("energy", 3.), ("checkpoint", []), ("families", ["graft"]), ("device", 1),
    ("leaks", "\ud800"), ("life", [[math.nan]]), ("code", None),
])
def test_values_of_another_kind_are_named(tmp_path, key, value):
    path = spoil(tmp_path, **{key: value})
    with pytest.raises(BadInput, match=key) as e: load_records(tmp_path)
    assert str(path) in str(e.value)
    if key not in ("seconds", "life"):  # what is not finite is saved as null
        with pytest.raises(BadInput, match=key): save_record(json.loads(path.read_text()), tmp_path/"other")
        assert not (tmp_path/"other").exists()


@pytest.mark.parametrize("key, value", [
    ("value", "abc"), ("value", True), ("value", math.inf), ("value", math.nan), ("value", 10**400), ("value", [.8]), ("low", "x"),
    ("n", "x"), ("n", None), ("n", True), ("n", 1.5), ("n", -1), ("mag", ["40X"]), ("k", {}), ("method", None), ("label", None),
])
def test_rows_with_values_of_another_kind_are_named(tmp_path, key, value):
    path = spoil(tmp_path, rows=[record()["rows"][0] | {key: value}])
    with pytest.raises(BadInput, match=f"row says {key}=") as e: load_rows(tmp_path)
    assert str(path) in str(e.value)


@pytest.mark.parametrize("said", [dict(energy=None, seconds=None, versions=None, device=None, leaks=None), dict(dirty=None, modified=None),
                                  dict(checkpoint="a"), dict(checkpoint={"path": "a"}), dict(seconds=3, families={"graft": "x"})])
def test_what_may_be_unknown_may_be_null(tmp_path, said):
    there = load_record(save_record(record(**said), tmp_path))
    assert {k: there[k] for k in said} == said


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '{"accuracy": 0.97}', "\x00\xff", "["*100000, "NaN", "1" * 5000])
def test_files_that_are_no_records(tmp_path, text):
    path = tmp_path/"runs"/"x.json"
    path.parent.mkdir()
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(BadInput, match=r"x\.json"): load_records(tmp_path)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(BadInput, match="no.json"): load_record(tmp_path/"no.json")
    with pytest.raises(BadInput, match="holds no records"): load_rows(tmp_path/"nowhere")


def test_a_bad_record_is_not_written(tmp_path):
    with pytest.raises(BadInput, match="lacks split"): save_record(record(rows=[{"method": "x"}]), tmp_path)
    assert not list(tmp_path.rglob("*"))


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    path = save_record(record(), tmp_path)
    before = path.read_bytes()

    def half(self, content):
        with open(self, "wb") as f: f.write(content[:100])
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space left"): save_record(record(device="cuda"), tmp_path)
    assert path.read_bytes() == before
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {path.name, "latest.json"}


def test_two_files_of_one_run(tmp_path):
    path = save_record(record(), tmp_path)
    path.with_name("other.json").write_bytes(path.read_bytes())
    with pytest.raises(BadInput, match="is also in"): load_rows(tmp_path)


def test_the_name_of_a_run_is_its_identity():
    names = {record()["run"], record(1)["run"], record(data="e")["run"], record(split="t")["run"],
             record(code="x")["run"]}
    assert len(names) == 5
    assert record(seconds=9.)["run"] == record(device="cuda")["run"] == record()["run"]


def test_provenance_names_torch_without_importing_it():
    assert {"versions", "platform", "processor", "commit", "dirty", "modified", "code"} == provenance().keys()
    assert provenance()["versions"]["torch"]


def test_rows_are_filled_in_from_the_record():
    frame = record_rows(record(resolved={"mag": "400X", "preset": asdict(resolve_preset("paper")), "student": "resnet18"}))
    assert list(frame.columns) == COLUMNS
    assert set(frame.mag) == {"400X"} and set(frame.preset) == {"paper"} and set(frame.k) == {10}
    assert set(frame.student) == {"resnet18"} and frame.low.isna().all() and set(frame.label) == {""}


def test_what_a_record_says_twice_is_taken_from_where_it_is_one_word():
    "`shots` is a text among the parameters, and a dict of facts in the record; a recipe is told by its digest."
    said = record_rows(record(shots={"how": "random", "images": 20}, resolved={"shots": "random", "recipe": {"lr": .1}}))
    assert set(said.shots) == {"random"} and said.recipe.str.fullmatch("[0-9a-f]{6}").all()
    score_table(said)


def test_several_networks_are_one_word():
    assert set(record_rows(record(resolved={"student": ["a", "b"]})).student) == {"a+b"}


def test_a_row_that_says_it_itself_is_believed():
    rows = [r | {"mag": "200X"} for r in record()["rows"]]
    assert set(record_rows(record(rows=rows)).mag) == {"200X"}


@pytest.mark.parametrize("column", ["source", "protocol", "task", "preset", "mag", "k", "fusion", "student", "temperature"])
def test_different_questions_are_not_averaged(column):
    a = record_rows(record())
    b = a.assign(run="other", **{column: "another"})
    with pytest.raises(BadInput, match=f"mix {column}="): score_table(pd.concat([a, b]))


def test_seeds_are_averaged_and_counted():
    frames = [record_rows(record(s)).assign(value=v) for s, v in enumerate([.7, .8, .9])]
    table = score_table(pd.concat(frames))
    assert table.loc["graft"].tolist() == ["0.800 ± 0.100", "90", "3"]


def test_the_same_score_twice_is_refused():
    with pytest.raises(BadInput, match="more than once"): score_table(record_rows(record(rows=record()["rows"] * 2)))


def test_one_metric_at_two_levels_stays_two_columns():
    rows = record()["rows"]
    rows = rows + [r | {"level": "patient", "n": 9, "value": .5} for r in rows]
    table = score_table(record_rows(record(rows=rows)))
    assert list(table) == ["image auroc", "patient auroc", "images", "patients", "runs"]


def test_a_missing_score_is_a_dash():
    rows = record()["rows"]
    table = score_table(record_rows(record(rows=[*rows, rows[0] | {"metric": "mcc", "value": .4}])), metrics=None)
    assert table.mcc.tolist() == ["0.400", "–"]


def test_columns_and_sides_that_are_not_there():
    with pytest.raises(BadInput, match="valid.*no rows"): score_table(record_rows(record()), split="valid")
    with pytest.raises(BadInput, match="lack the columns.*metric"): score_table(record_rows(record()).drop(columns="metric"))
    with pytest.raises(BadInput, match="by='magg'.*'mag'"): score_table(record_rows(record()), by=("magg",))


def test_which_scores_are_shown():
    rows = record()["rows"]
    rows += [r | {"metric": m, "value": .4} for r in rows for m in ("mcc", "brier")]
    rows += [r | {"metric": "sensitivity", "label": "benign"} for r in rows[:2]]
    frame = record_rows(record(rows=rows))
    scores = lambda **k: [c for c in score_table(frame, **k) if c not in ("images", "runs")]
    assert scores() == ["auroc"] and scores(metrics=None) == ["auroc", "mcc", "brier"] and scores(metrics=("mcc",)) == ["mcc"]
    assert list(score_table(frame[frame.metric == "brier"])) == ["brier", "images", "runs"]


def test_tables_keep_sources_apart_and_repeat_byte_for_byte(tmp_path):
    for source in ("own", "synthetic", "glas"): save_record(record(source=source, code=source), tmp_path)
    save_record(record(3, dirty=True, code="changed"), tmp_path)
    first = {p: Path(p).read_bytes() for p in write_tables(tmp_path)}
    assert [p.name for p in first] == [f"{s}-toy-patients.{e}" for s in ("glas", "own", "synthetic") for e in ("csv", "md")]
    assert {p: Path(p).read_bytes() for p in write_tables(tmp_path)} == first
    titled = [t for p, t in first.items() if p.suffix == ".md"]
    assert [b"SYNTHETIC" in t for t in titled] == [False, False, True]


def points(*said):
    "Records of one point, each later than the one before: its code, and the value of each method."
    return [record(code=code, created=f"20{i + 30}-01-01T00:00:00+00:00", parameters=dict(mag="40X", fold=0, seed=0, k=10, **asked),
                   rows=[dict(method=m, split="test", level="image", metric="auroc", value=v, n=90) for m, v in values.items()])
            for i, (code, asked, values) in enumerate(said)]


def test_of_several_records_of_one_point_the_latest_counts(tmp_path):
    again = points(("old", {}, {"graft": .6, "hard": .5}), ("new", {}, {"graft": .7}),
                   ("new2", {"baselines": "kd", "data": "elsewhere"}, {"graft": .8, "kd": .4}))
    for r in again: save_record(r, tmp_path)
    text = write_tables(tmp_path)[1].read_text()
    assert "| graft | 0.800 | 90 | 1 |" in text.replace("| 40X | 10 ", "") and "| hard | 0.500 |" in text and "| kd | 0.400 |" in text
    assert "count once, by the latest: 2 earlier left out." in text
    save_record(record(1, code="new2"), tmp_path)  # another seed is another point
    assert "| graft | 0.800 ± 0.000 | 90 | 2 |" in write_tables(tmp_path)[1].read_text()
    assert latest_rows(again[::-1])[1] == 2 and latest_rows(again[2:])[1] == 0


def test_other_parameters_are_other_points():
    rows, earlier = latest_rows(points(*[("c", {"poor": p, "weights": w}, {"graft": .6}) for p, w in (("", ""), ("x", ""), ("x", "w"))]))
    assert (len(rows), earlier) == (3, 0)


def test_tables_that_no_record_supports_any_more_are_removed(tmp_path):
    first = save_record(record(), tmp_path)
    old = write_tables(tmp_path)
    others = [tmp_path/"tables"/n for n in ("study-glas.csv", "leakage-synthetic.csv", "fusion-glas.csv", "sites-own.csv", "own.md",
                                            "table1_teachers-glas.csv", "own-notes.txt")]
    for p in others: p.write_text("x")
    first.unlink()
    save_record(record(source="glas"), tmp_path)
    new = write_tables(tmp_path)
    assert {p.name for p in (tmp_path/"tables").iterdir()} == {p.name for p in (*new, *others)} and not set(old) & set(new)


def test_where_tables_cannot_be_made_the_old_ones_stay(tmp_path):
    save_record(record(), tmp_path)
    old = write_tables(tmp_path)
    save_record(record(source="glas", rows=record()["rows"]*2), tmp_path)
    with pytest.raises(BadInput, match="more than once"): write_tables(tmp_path)
    assert all(p.exists() for p in old)


def test_no_records_no_tables(tmp_path, capsys):
    assert write_tables(tmp_path) == []
    assert "0 runs recorded" in capsys.readouterr().out


def test_fusions_stay_apart_in_the_tables(tmp_path):
    for fusion in ("mean", "accuracy"): save_record(record(resolved={"mag": "40X", "k": 5, "fusion": fusion}), tmp_path)
    table = pd.read_csv(write_tables(tmp_path)[0])
    assert table.fusion.tolist() == ["accuracy"]*2 + ["mean"]*2 and set(table.runs) == {1}


# ---- the layout

def test_a_record_says_everything_and_one_row_a_line(tmp_path):
    text = save_record(record(), tmp_path).read_text()
    assert set(json.loads(text)) == set(KEYS)
    assert len([line for line in text.splitlines() if '"metric"' in line]) == 2
    assert json.loads(text) == json.loads(json.dumps(plain(record() | {"created": json.loads(text)["created"]})))


def test_schema_1_is_brought_up(tmp_path):
    old = {k: v for k, v in record().items() if k in FIRST} | {"schema": 1, "shots": {"images": 20}}
    path = tmp_path/"runs"/f"{old['run']}.json"
    path.parent.mkdir()
    path.write_text(json.dumps(old))
    new = load_record(path)
    assert (new["schema"], new["migrated_from"], new["energy"], new["shots"]) == (2, 1, None, {"images": 20})
    assert new["rows"] == old["rows"] and set(LATER) <= new.keys() and len(load_rows(tmp_path)) == 2
    assert load_record(save_record(new, tmp_path)) == new
    path.write_text(json.dumps({k: v for k, v in old.items() if k != "protocol"}))
    with pytest.raises(BadInput, match="missing: protocol"): load_record(path)


def test_what_numpy_and_paths_say_gives_the_same_name(tmp_path):
    asked = {"k": np.int64(5), "gamma": np.float64(.5), "weights": Path("a/b"), "sizes": (1, 2)}
    assert load_record(save_record(record(resolved=asked), tmp_path))["resolved"]["weights"] == "a/b"


def test_what_was_modified_is_named(tmp_path, monkeypatch):
    "A checkout of its own: only the package and the notebook that ran count."
    git = lambda *a: subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *a], cwd=tmp_path, check=True,
                                    capture_output=True)
    for name in ("kdnb/core.py", "kdnb/losses.py", "nbs/run_a.ipynb", "nbs/run_b.ipynb", "README.md"):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_text("1")
    git("init"), git("add", "."), git("commit", "-m", "one")
    monkeypatch.setattr(results, "checkout", lambda: tmp_path)
    monkeypatch.setattr(results, "travels", lambda notebook: notebook)
    for name in ("README.md", "nbs/run_b.ipynb"): (tmp_path/name).write_text("2")
    assert modified("run_a.ipynb") == [] and modified("run_b.ipynb") == ["nbs/run_b.ipynb"]
    (tmp_path/"kdnb/losses.py").write_text("2"), (tmp_path/"kdnb/new.py").write_text("1")
    assert modified("run_a.ipynb") == ["kdnb/losses.py", "kdnb/new.py"]
    shutil.rmtree(tmp_path/".git")
    assert modified("run_a.ipynb") is None


# ---- presets

def test_a_preset_is_itself_only_as_a_whole():
    whole = asdict(resolve_preset("paper"))
    assert preset_said(whole) == preset_said(plain(whole)) == "paper" and preset_said("paper") == "paper"
    assert preset_said(whole | {"graft_steps": 12}) == "paper,graft_steps=12"
    assert preset_said(whole | {"teachers": ["a", "b"]}) == "paper,teachers=a+b"
    assert preset_said({k: v for k, v in whole.items() if k != "lr"}) == "paper,lr=?"
    assert preset_said(whole | {"new": 1}) == "paper,new=1" and preset_said({"name": "mine", "lr": 1}) == "mine,lr=1"


@pytest.mark.parametrize("fields, preset, why", [
    ({}, "paper", ""), ({"source": "synthetic"}, "paper", "images are synthetic"),
    ({"dirty": True, "modified": ["kdnb/x.py"]}, "paper", "kdnb/x.py"), ({"dirty": None}, "paper", ""),
    ({}, "paper,batch=2", "preset is paper,batch=2, not paper"), ({}, "laptop", "preset is laptop"),
])
def test_who_may_enter_the_papers_tables(fields, preset, why):
    asked = {"preset": asdict(resolve_preset(preset))}
    said = barred(record(**{"source": "breakhis", "resolved": asked, **fields}))
    assert bool(said) == bool(why) and why in "".join(said)
    assert barred(record(source="glas", resolved=asked), source="glas", preset=None) == []


# ---- predictions

def test_scores_come_back_from_predictions_to_the_last_digit(tmp_path):
    for classes in (("benign", "malignant"), ("a", "b", "c")):
        made = predictions(classes)
        rows = [r for y, p, who, said in by_method(made) for r in score_rows(y, p, who, draws=20, **said)]
        path = save_record(record(rows=rows, data="".join(classes)), tmp_path, made)
        back = load_record(path)
        frame = load_predictions(back, tmp_path)
        again = [r for y, p, who, said in by_method(frame) for r in score_rows(y, p, who, draws=20, **said)]
        assert plain(again) == back["rows"] and (frame == made).all(axis=None)
        assert back["predictions"]["rows"] == 24 and back["predictions"]["classes"] == list(classes)


def test_predictions_of_a_run_replace_their_own_only(tmp_path):
    save_record(record(1), tmp_path, predictions(seed=1))
    save_record(record(), tmp_path, predictions(seed=2))
    save_record(record(), tmp_path, predictions(seed=3))
    assert len(list((tmp_path/"predictions").iterdir())) == 2
    kept = {r["run"]: load_predictions(r, tmp_path) for r in load_records(tmp_path)}
    assert kept[record()["run"]].equals(load_predictions(load_record(tmp_path/"latest.json"), tmp_path))


@pytest.mark.parametrize("given", [None, predictions(seed=4)])
def test_a_rerun_that_keeps_no_predictions_loses_none(tmp_path, monkeypatch, given):
    path = save_record(record(), tmp_path, made := predictions())
    before = load_record(path)["predictions"]
    if given is not None: monkeypatch.setattr(results, "find_spec", lambda name: None)
    with warnings.catch_warnings(record=True): save_record(record(device="cuda"), tmp_path, given)
    monkeypatch.undo()
    there = load_record(path)
    assert (there["device"], there["predictions"]) == ("cuda", before) and load_predictions(there, tmp_path).equals(made)
    (tmp_path/before["path"]).unlink()
    assert load_record(save_record(record(), tmp_path))["predictions"] is None


@pytest.mark.parametrize("change, says", [
    (lambda f: f.drop(columns="patient"), "missing: patient"), (lambda f: f.assign(fold=1), "'fold' is unknown"),
    (lambda f: f.drop(columns="p_benign"), "fewer than two"), (lambda f: f[:0], "no rows"),
    (lambda f: pd.concat([f, f[:1]]), "'0.png' stands twice under 'graft'"),
    (lambda f: f.assign(p_benign=np.nan), "'p_benign' has holes"), (lambda f: f.assign(label="normal"), "no column p_normal"),
])
def test_predictions_that_are_refused(tmp_path, change, says):
    with pytest.raises(BadInput, match=says): save_record(record(), tmp_path, change(predictions()))
    assert not list(tmp_path.rglob("*.json"))


def test_predictions_that_do_not_fit():
    with pytest.raises(BadInput, match="one column a class"): prediction_table([0], [[.5, .5]], ["a"], ["b"], "abc", "m")
    with pytest.raises(BadInput, match="'images': 2"): prediction_table([0], [[.5, .5]], ["a"], ["b", "c"], "ab", "m")


def test_predictions_that_are_not_there(tmp_path):
    bare = load_record(save_record(record(), tmp_path))
    with pytest.raises(BadInput, match=f"run {bare['run']} kept no predictions"): load_predictions(bare, tmp_path)
    full = load_record(save_record(record(), tmp_path, predictions()))
    path = tmp_path/full["predictions"]["path"]
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(BadInput, match="not the predictions that run"): load_predictions(full, tmp_path)
    path.unlink()
    with pytest.raises(BadInput, match="are not there"): load_predictions(full, tmp_path)


def test_without_pyarrow_the_record_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="recorded without them.*pip install pyarrow"):
        path = save_record(record(), tmp_path, predictions())
    bare = load_record(path)
    assert bare["predictions"] is None and not (tmp_path/"predictions").exists()
    with pytest.raises(BadInput, match="pip install pyarrow"): load_predictions(bare | {"predictions": {"path": "x"}}, tmp_path)


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_disk_that_fills_between_the_files_loses_nothing(tmp_path, monkeypatch, fails_at):
    "Predictions, record, latest: whichever cannot be written, the last whole run can be read with its own predictions."
    path = save_record(record(), tmp_path, predictions())
    write, calls = Path.write_bytes, []

    def full(self, content):
        calls.append(self)
        if len(calls) < fails_at: return write(self, content)
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"): save_record(record(device="cuda"), tmp_path, predictions(seed=1))
    there = load_record(path)
    assert there["device"] == ("cpu" if fails_at < 3 else "cuda") and len(load_predictions(there, tmp_path)) == 24
    assert len(load_predictions(load_record(tmp_path/"latest.json"), tmp_path)) == 24
    assert not list(tmp_path.rglob("*.tmp")) and len(list((tmp_path/"predictions").iterdir())) == 1 + (fails_at == 3)


def test_a_disk_that_fills_leaves_no_predictions_without_a_record(tmp_path, monkeypatch):
    def full(path, content, write=results.write_whole):
        if path.suffix == ".json": raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)
    monkeypatch.setattr(results, "write_whole", full)
    with pytest.raises(OSError, match="No space left"): save_record(record(), tmp_path, predictions())
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    monkeypatch.undo()
    path = save_record(record(), tmp_path, predictions())
    path.write_text("{")  # what cannot be read may name any of them
    monkeypatch.setattr(results, "write_whole", full)
    with pytest.raises(OSError, match="No space left"): save_record(record(), tmp_path, predictions(seed=1))
    assert len(list((tmp_path/"predictions").iterdir())) == 2


# ---- what it cost

def counters(folder, **packages):
    for i, (name, (joules, ceiling)) in enumerate(packages.items()):
        zone = folder/f"intel-rapl:{i}"
        zone.mkdir(parents=True, exist_ok=True)
        for file, text in (("name", name.replace("_", "-")), ("energy_uj", joules*10**6), ("max_energy_range_uj", ceiling*10**6)):
            (zone/file).write_text(f"{text}\n")


def test_energy_is_summed_over_packages_and_overflows(tmp_path):
    counters(tmp_path, package_0=(10, 100), package_1=(95, 100), psys=(0, 100))
    meter = Meter(tmp_path)
    counters(tmp_path, package_0=(30, 100), package_1=(5, 100), psys=(90, 100))
    assert meter.read()["energy"] == {"joules": 30., "of": ["package-0", "package-1"]}
    counters(tmp_path, package_0=(31, 100), package_1=(5, 100))
    assert meter.read()["energy"]["joules"] == 31


def test_energy_is_read_while_the_run_goes_on(tmp_path):
    counters(tmp_path, package_0=(0, 100))
    meter = Meter(tmp_path, every=.01)
    for joules in (60, 20):  # an overflow that two readings alone would not show
        counters(tmp_path, package_0=(joules, 100))
        until = time.monotonic() + 5
        while meter.last["package-0"] != str(joules*10**6) and time.monotonic() < until: time.sleep(.01)
    assert meter.read()["energy"]["joules"] == 120
    meter.over.set()


def test_where_energy_is_not_told(tmp_path):
    assert Meter(tmp_path/"nowhere").read()["energy"] is None
    counters(tmp_path, package_0=(1, 100))
    (tmp_path/"intel-rapl:0"/"energy_uj").unlink()
    assert Meter(tmp_path).read()["energy"] is None and Meter(tmp_path).read()["seconds"] >= 0
