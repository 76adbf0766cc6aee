"The ablation of fusion: one point on real images, and what the report says of none, some and all of its records."
import json
import os
import subprocess
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest

from kdnb.reports import asked
from kdnb.results import new_record, save_record

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent/"shared"/"data"
POINTS = asked("fusion.toml")
real = pytest.mark.skipif(not (SHARED/"glas").exists() or not (SHARED/"weights").exists(),
                          reason="the GlaS images and ImageNet weights are not here")


def test_the_grid_is_of_its_size():
    taught = [p.given["taught"].split(",") for p in POINTS]
    assert len(POINTS) == 66 and sum(map(len, taught)) == 180
    same, of_mean = ("method", "teachers", "poor", "k", "split", "draw"), set()
    for p, t in zip(POINTS, taught, strict=True): of_mean |= {tuple(p.given[c] for c in same)} if "mean" in t else set()
    assert of_mean == {tuple(p.given[c] for c in same) for p in POINTS}  # what every difference is taken from
    assert sorted({p.given["teachers"].count(",") + 1 for p in POINTS}) == [1, 2, 3, 5]


def run(folder, **given):
    "One point through papermill, as small as it runs."
    words = [w for n, v in given.items() for w in ("-p", n, str(v))]
    return subprocess.run(
        ["papermill", str(ROOT/"nbs"/"run_fusion.ipynb"), str(folder/"out.ipynb"), "--no-progress-bar", *words],
        cwd=folder, capture_output=True, text=True, env={**os.environ, "KDNB_HOME": str(folder/"home"), "OMP_NUM_THREADS": "1"})


@real
def test_one_point_on_real_images(tmp_path):
    nets = "kdnb_mobilenetv1_025,kdnb_mobilenetv1_025"
    done = run(tmp_path, data=SHARED/"glas"/"labels.csv", weights=SHARED/"weights", size=32, steps=4, teacher_steps=2, k=2,
               teachers=nets, poor="kdnb_mobilenetv1_025", rules="mean,entropy calibrated", taught="mean,camkd calibrated", method="kd")
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path/"home"/"results"/"latest.json").read_text())
    panel = ["kdnb_mobilenetv1_025", "kdnb_mobilenetv1_025, seed 1", "kdnb_mobilenetv1_025 (poor)"]
    assert record["panel"] == panel and record["host"] == panel[0] and len({t["id"] for t in record["teachers"]}) == 3
    honest, poor = ({t["data"] for t in part} for part in (record["teachers"][:2], record["teachers"][2:]))
    assert len(honest) == 1 and not honest & poor  # wrong labels are other data
    said = {"ensemble: mean", "ensemble: entropy calibrated", "kd: mean", "kd: camkd calibrated", *(f"teacher {n}" for n in panel)}
    assert {(r["method"], r["split"]) for r in record["rows"]} == {(n, side) for n in said for side in ("valid", "test")}
    assert record["shares"].keys() == {"mean", "entropy calibrated", "camkd calibrated"}
    assert record["timings"].keys() == {"kd: mean", "kd: camkd calibrated"} and record["temperatures"].keys() == set(panel)
    assert record["needs"]["kd: camkd calibrated"] == ["labels"]
    assert all(len(w) == 3 and abs(sum(w) - 1) < 1e-4 for w in record["shares"].values())
    assert not list((tmp_path/"home"/"cache"/"runs").glob("*"))


@pytest.mark.parametrize("wrong, says", [
    (dict(rules="mean,camkd"), "rules='camkd' is not accepted"), (dict(taught="meen"), "Did you mean 'mean'"), (dict(taught="mean calm"), "'mean calibrated'"),
    (dict(poor="mobilenet_v9"), "net='mobilenet_v9' is not known"), (dict(wrong=1.5), "wrong=1.5 is not accepted"),
    (dict(teachers=""), "accepted are one or more, the host first")])
def test_what_is_refused(wrong, says):
    from kdnb.core import BadInput
    cells = json.loads((ROOT/"nbs/run_fusion.ipynb").read_text(encoding="utf-8"))["cells"]
    first, check, *_ = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    there = {"__name__": "__main__"}
    exec(first, there)
    there |= wrong
    with pytest.raises(BadInput, match=says): exec(check, there)


# ---- the report

def made_up(point, folder, gap, **fields):
    "A record of one point, of invented scores: camkd is `gap` ahead of the mean, a poor teacher costs everyone .05."
    given, rng = point.given, np.random.default_rng(point.given["split"]*10 + point.given["draw"])
    base, panel = .8 + .1*rng.random() - .05*bool(given["poor"]), given["teachers"].split(",") + ["x (poor)"]*bool(given["poor"])
    taught = {f"{given['method']}: {r}": base + gap*(r == "camkd") for r in given["taught"].split(",")}
    says = {"ensemble: mean": .9, "ensemble: entropy": .88, "teacher a": .85} | taught
    rows = [dict(method=m, split=side, level="image", metric=metric, value=value, n=50)
            for m, auroc in says.items() for side in ("valid", "test")
            for metric, value in (("auroc", auroc), ("nll", .4), ("balanced_accuracy", .7), ("brier", .1))]
    known = dict(parameters=given | {"data": "elsewhere"}, resolved=given, protocol="study", source="glas", modified=[], data="d",
                 split="s", device="cpu", seconds=1., rows=rows, timings=dict.fromkeys(taught, 20.), panel=panel,
                 shares={r: [1/len(panel)]*len(panel) for r in ("mean", "entropy", "camkd")})
    save_record(new_record("run_fusion.ipynb", **{**known, **fields}), folder/"results")


def report(house):
    "The code cells of the report, one after the other, and what they print."
    import contextlib
    import io
    cells = json.loads((ROOT/"nbs/paper/ablation.ipynb").read_text(encoding="utf-8"))["cells"]
    there, out = {}, io.StringIO()
    with contextlib.redirect_stdout(out), warnings.catch_warnings(), mock.patch("IPython.display.display"):
        warnings.simplefilter("error")
        for c in cells:
            if c["cell_type"] == "code": exec("".join(c["source"]), there)
    there["plt"].close("all")
    return there | {"printed": out.getvalue()}


def test_the_report_of_nothing(house):
    assert report(house)["printed"] == "0 of 66 points found, 0 students in the table\n"
    assert not (house/"results"/"tables").exists()


@pytest.mark.parametrize("some", [1, 7, 20, 66])
def test_the_report_of_some_and_of_all(house, some):
    for point in POINTS[:some]: made_up(point, house, .03)
    made_up(POINTS[0], house, .5, modified=["kdnb/fusion.py"], data="e")  # changed code may not enter
    there = report(house)
    assert there["printed"].startswith(f"{some} of 66 points found")
    table = pd.read_csv(house/"results"/"tables"/"fusion-glas.csv")
    assert table.run.nunique() == some
    if some < 66: return
    assert there["student"].sum() == 162 and there["plain"].sum() == 18 and there["by_rule"]["with poor"].pairs["camkd"] == 6
    assert there["by_rule"]["without"].difference["camkd"] == pytest.approx(.03, abs=1e-4)
    assert list(there["cost"].difference) == pytest.approx([-.05]*8, abs=1e-4) and there["share"]["mean"] == pytest.approx(.25)
    assert list(there["sizes"]["mean, by teachers"].index) == [1, 2, 3, 5] and list(there["sizes"]["mean, by shots"].index) == [5, 10, 20]


def test_the_table_stands_for_records_that_are_gone(house):
    for point in POINTS[:12]: made_up(point, house, .03)
    first = report(house)["printed"]
    for record in (house/"results"/"runs").iterdir(): record.unlink()
    assert report(house)["printed"] == first == "12 of 66 points found, 60 students in the table\n"
