"The study of grafting: splits and draws fixed in files, one point on real images, and what the report says of its table."
import json
import os
import subprocess
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent/"shared"/"data"
SPLITS, DRAWS = (pd.read_csv(ROOT/"data"/f"study_{n}.csv", dtype=str) for n in ("splits", "draws"))
real = pytest.mark.skipif(not (SHARED/"glas").exists(), reason="the GlaS images are not here")


def test_every_patient_is_tested_once():
    assert SPLITS.groupby("split").patient.nunique().tolist() == [16, 16, 16]
    tests = SPLITS[SPLITS.side == "test"].patient
    assert tests.is_unique and len(tests) == 16
    assert (SPLITS.groupby(["split", "side"]).size() >= 4).all()


def test_shots_are_of_training_patients_and_spread():
    side = DRAWS.merge(SPLITS, on=["split", "patient"]).side
    assert len(side) == len(DRAWS) == 600 and (side == "train").all()
    each = DRAWS.groupby(["split", "draw", "label"])
    assert (each.image.nunique() == 20).all() and each["rank"].agg(lambda r: sorted(map(int, r)) == list(range(20))).all()
    assert DRAWS.groupby(["split", "draw", "label", "patient"]).size().max() <= 10
    assert DRAWS[DRAWS["rank"].astype(int) < 10].groupby(["split", "draw"]).image.agg(frozenset).is_unique


@real
def test_the_files_agree_with_the_images():
    table = pd.read_csv(SHARED/"glas"/"labels.csv", dtype=str)
    both = table.merge(SPLITS, on="patient").groupby(["split", "side"]).label.nunique()
    assert (both == 2).all() and len(both) == 9
    drawn = DRAWS.merge(table, on="image", suffixes=("", "_real"))
    assert len(drawn) == 600 and (drawn.label == drawn.label_real).all() and (drawn.patient == drawn.patient_real).all()


@real
def test_one_point_on_real_images(tmp_path):
    out = tmp_path/"out.ipynb"
    done = subprocess.run(
        ["papermill", str(ROOT/"nbs"/"run_study.ipynb"), str(out), "--no-progress-bar", "-p", "data", str(SHARED/"glas"/"labels.csv"),
         "-p", "weights", str(SHARED/"weights"), "-p", "size", "32", "-p", "steps", "40", "-p", "teacher_steps", "2", "-p", "k", "2",
         "-p", "teachers", "kdnb_mobilenetv1_075,kdnb_mobilenetv2_035", "-p", "methods", "kd; graft_head: positions=3,4"],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "KDNB_HOME": str(tmp_path/"home")})
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path/"home"/"results"/"latest.json").read_text())
    assert record["source"] == "glas" and record["protocol"] == "study"
    assert {(r["method"], r["split"]) for r in record["rows"]} >= {("kd", "valid"), ("kd", "test"), ("ensemble", "test")}
    assert record["families"] == {"kd": "inherits", "graft_head: positions=3,4": "inherits"}
