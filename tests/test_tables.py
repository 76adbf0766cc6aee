"What is committed as a result says what the report beside it says, and all of it is made again from records."
import json
import random
import re
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t

from kdnb import reports, results
from kdnb.core import BadInput, resolve_preset
from kdnb.grids import load_grid, values_of
from kdnb.reports import (
    ARTEFACTS,
    BEGIN,
    DRAWN,
    END,
    GRIDS,
    asked,
    draw,
    gather,
    main,
    published,
    readme_block,
    report,
    report_files,
    wanted,
    widely,
    write_all,
    write_readme,
)
from kdnb.results import load_record, new_record, prediction_table, save_record

ROOT = Path(__file__).resolve().parent.parent
SCORES = {"image_accuracy": "image", "balanced_accuracy": "image", "auroc": "image", "patient_recognition_rate": "patient"}
LEVELS = {"teacher a": .6, "teacher b": .62, "ensemble": .75, "graft": .7, "hard": .5, "kd": .6, "copied_kd": .72}
FAMILIES = {"graft": "own weights", "hard": "own weights", "kd": "own weights", "copied_kd": "inherits"}
IMAGES = [f"SOB_B_A-14-22549AB-400-{i:03}.png" for i in range(1, 5)] + [f"SOB_M_DC-14-2980-400-{i:03}.png" for i in range(1, 5)]


KNOWN = dict(versions={"kdnb": "0"}, platform="p", processor="c", commit="1" * 40, dirty=False, modified=[], code="c")


@pytest.fixture(scope="module", autouse=True)
def quick():
    "Provenance asks git each time; made-up records need no answer."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "provenance", lambda notebook=None: KNOWN)
        yield


def made_up(point, folder, rng, **fields):
    "The record of a point, with scores out of a hat, and its predictions."
    given, level = point.given, lambda m: min(.99, LEVELS[m] + .02*np.log2(point.given["k"]) + rng.normal(0, .03))
    rows = [dict(method=m, split="test", level=at, metric=s, value=round(level(m), 4), n=40 if at == "image" else 8)
            for m in LEVELS for s, at in SCORES.items()]
    y, p = np.repeat([0, 1], 4), {m: np.clip(rng.normal(level(m), .3, 8), .02, .98) for m in LEVELS}
    table = [prediction_table(y, np.stack([np.where(y == 0, q, 1 - q), np.where(y == 1, q, 1 - q)], 1), [f"p{i//2}" for i in range(8)],
                              IMAGES, ["benign", "malignant"], m) for m, q in p.items()]
    life = [{"graft": f"stage {s} block {b}", "divergence": .3/(s + b), "agreement": .8} for s in (1, 2) for b in (1, 2)]
    known = dict(parameters=given, resolved=given, source="synthetic", protocol="accession-cv", data="d", split="s", device="cpu",
                 seconds=1., rows=rows, families=FAMILIES, shares=[.6, .4], teachers=[{"net": "a"}, {"net": "b"}], life=life)
    record = new_record(point.notebook, **known | fields)
    save_record(record, folder, pd.concat(table))
    return record


def cost(folder, source="synthetic"):
    point = wanted("cost", source)[0]
    rows = [dict(method=m, split="cost", level="network", metric=c, value=v*(i + 1), n=1)
            for i, m in enumerate(("student s", "teacher a", "ensemble")) for c, v in dict.fromkeys(reports.COSTS, 100.).items()]
    save_record(new_record(point.notebook, parameters=point.given, resolved=point.given, source=source, protocol="none", data="n",
                           split="n", device="cpu", seconds=1., rows=rows), folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, quick):
    "Records of a part of the small grid: two magnifications, three folds, and Table 2's."
    place, rng = tmp_path_factory.mktemp("made"), np.random.default_rng(0)
    some = [p for p in wanted("methods", "synthetic") if p.given["mag"] in ("40X", "400X")
            and (p.given["mag"] == "40X" or p.given["seed"] == 0)]
    for p in some + [p for p in wanted("fusion", "synthetic") if "fusion" in p.axes]: made_up(p, place, rng)
    cost(place)
    return place


def tree(folder): return {p.name: p.read_bytes() for p in (folder/"tables").iterdir()}


# ---- what is committed

def test_the_leak_is_there_over_ten_seeds():
    rows = pd.read_csv(ROOT/"results/tables/leakage-synthetic.csv")
    gap = rows[rows.metric == "auroc"].set_index("seed").gap
    assert sorted(gap.index) == list(range(10)) and np.allclose(rows["image-random"] - rows["accession-cv"], rows.gap, atol=2e-4)
    low = gap.mean() - t.ppf(.975, 9)*gap.std()/10**.5
    assert low > 0
    cells = json.loads((ROOT/"nbs/paper/leakage.ipynb").read_text(encoding="utf-8"))["cells"]
    said = json.dumps([c.get("outputs") for c in cells])
    assert "20 runs expected, 20 found, 0 missing" in said and f"{low:.3f}" in said and f"{gap.mean():.3f}" in said


@pytest.mark.parametrize("name", ARTEFACTS)
def test_committed_files_and_notebooks_say_what_the_committed_records_say(name):
    made = [report(name, s, ROOT/"results") for s in GRIDS]
    files = {n: c.encode() for r in made for n, c in report_files(r).items()}
    there = {p.name: p.read_bytes() for s in GRIDS for p in (ROOT/"results"/"tables").glob(f"{name}-{s}.*")}
    assert there == files, "run make tables"
    shown, cells = report(name, "auto", ROOT/"results"), json.loads((ROOT/f"nbs/paper/{name}.ipynb").read_text("utf-8"))["cells"]
    said = ["".join(o["data"]["text/markdown"]) for c in cells for o in c.get("outputs", ()) if "text/markdown" in o.get("data", {})]
    assert said[0] == shown._repr_markdown_(), "run the report again"


def test_the_block_of_the_readme_is_fresh():
    text = (ROOT/"README.md").read_text(encoding="utf-8")
    if BEGIN not in text: pytest.skip("the README has no block of results yet")
    assert text.partition(BEGIN)[2].partition(END)[0].lstrip("\n") == readme_block(ROOT/"results"), "run make tables"


# ---- byte for byte

def test_everything_is_made_again_byte_for_byte(folder, tmp_path):
    runs = sorted((folder/"runs").iterdir(), key=lambda p: random.Random(p.name).random())
    stale, other = (tmp_path/"b"/"tables"/n for n in ("table1_teachers-glas.csv", "mine.csv"))
    for copy in ("a", "b"):
        for part in ("runs", "predictions", "tables"): (tmp_path/copy/part).mkdir(parents=True)
        for p in runs if copy == "a" else reversed(runs): shutil.copyfile(p, tmp_path/copy/"runs"/p.name)
        for p in (folder/"predictions").iterdir(): shutil.copyfile(p, tmp_path/copy/"predictions"/p.name)
    for p in (stale, other): p.write_text("x")
    for copy in ("a", "b"): write_all(tmp_path/copy)
    assert not stale.exists() and tree(tmp_path/"b") == tree(tmp_path/"a") | {"mine.csv": b"x"}
    assert {f"{n}-synthetic.csv" for n in ARTEFACTS} | {"table3_distillers-synthetic.md"} <= tree(tmp_path/"a").keys()


def test_a_call_from_a_shell_ends_in_one_line(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path/"r", ignore=shutil.ignore_patterns("tables", "predictions"))
    (tmp_path/"README.md").write_text(f"{BEGIN}\n{END}\n")
    main(["--folder", str(tmp_path/"r"), "--readme", str(tmp_path/"README.md")])
    said = capsys.readouterr().out.splitlines()
    assert {Path(p).name for p in said[1:]} == {*tree(tmp_path/"r"), "README.md"}
    before = tree(tmp_path/"r")
    for breaks, call in ((lambda: None, ["--readme", str(tmp_path/"no.md")]), (lambda: (tmp_path/"r"/"runs"/"x.json").write_text("{"), [])):
        breaks()
        with pytest.raises(SystemExit, match=r"^make tables: .*(x\.json: broken JSON|no\.md)") as e: main(["--folder", str(tmp_path/"r"), *call])
        assert isinstance(e.value.code, str) and "\n" not in e.value.code
    assert tree(tmp_path/"r") == before


def test_make_calls_it():
    line = next(x for x in (ROOT/"Makefile").read_text().splitlines() if "kdnb.reports" in x)
    assert line.endswith("-c 'from kdnb.reports import main; main()' --readme README.md")


def test_nothing_outside_the_marks_of_a_readme_is_touched(folder, tmp_path):
    path = tmp_path/"README.md"
    path.write_text(f"# head\n\n{BEGIN}\nold\n{END}\n\ntail\n")
    for _ in range(2): write_readme(path, folder)
    text = path.read_text()
    assert text == f"# head\n\n{BEGIN}\n{readme_block(folder)}{END}\n\ntail\n"
    assert "No result on real images is recorded yet. BreakHis: 400 runs expected, 0 found" in text and "SYNTHETIC" not in text
    path.write_text("# head\n")
    assert write_readme(path, folder) is None and path.read_text() == "# head\n"


def test_the_readme_shows_glas_until_breakhis_is_there(tmp_path):
    rng = np.random.default_rng(1)
    for p in wanted("methods", "glas")[:6]: made_up(p, tmp_path, rng, source="glas")
    assert readme_block(tmp_path).startswith("**Table 3. Distillers by magnification and K: GlaS** (`glas`). 18 runs expected, 6 found")
    paper = {"preset": asdict(resolve_preset("paper"))}
    for p in wanted("methods", "breakhis")[:4]: made_up(p, tmp_path, rng, source="breakhis", resolved=p.given | paper)
    assert "K: BreakHis** (`breakhis`). 400 runs expected, 4 found, 396 missing." in readme_block(tmp_path)


# ---- what is counted, and what may enter

def test_numbers_are_means_over_folds_with_corrected_intervals(folder):
    made = report("table3_distillers", folder=folder)
    assert made.source == "synthetic" and "SYNTHETIC" in made.title and made.says.startswith("39 runs expected, 21 found, 18 missing")
    at = gather("methods", "synthetic", folder).found
    values = pd.DataFrame([{"fold": r["resolved"]["fold"], "value": row["value"]} for r in at for row in r["rows"]
                           if (r["resolved"]["mag"], r["resolved"]["k"]) == ("40X", 5) and row["method"] == "kd" and row["metric"] == "auroc"])
    folds = values.groupby("fold").value.mean()
    half = t.ppf(.975, 2)*folds.std()*np.sqrt(1/3 + 1/3)
    line = made.data[(made.data.mag == "40X") & (made.data.k == 5) & (made.data.method == "kd") & (made.data.metric == "auroc")].iloc[0]
    assert np.allclose(line[["mean", "low"]].astype(float), [folds.mean(), folds.mean() - half]) and (line.folds, line.runs) == (3, 6)
    groups = made.text.reset_index().group
    assert groups[groups != groups.shift()].tolist() == ["inherits", "own weights", "teachers"]*5
    gap = made.data[made.data.metric == "auroc of graft minus this"]
    assert set(gap.method) == LEVELS.keys() - {"graft", "teacher a", "teacher b"} and len(published(gather("methods", "synthetic", folder))) == 0


def test_methods_that_need_labels_are_marked_and_what_was_left_out_is_said(tmp_path):
    points, rng = wanted("methods", "synthetic")[:2], np.random.default_rng(0)
    for p in points: made_up(p, tmp_path, rng, needs={"hard": ["labels"], "kd": []}, skipped={"finetune": "no weights"})
    made = report("table3_distillers", "synthetic", tmp_path)
    assert dict(zip(made.data.method, made.data.labels, strict=True)) == {m: "needed"*(m == "hard") for m in set(made.data.method)}
    assert "labels" in made.text.index.names and made.says.endswith("Left out: finetune in 2 (no weights).")
    assert "labels" not in report("table2_fusion", "synthetic", tmp_path).text.index.names


def test_methods_tried_at_few_points_stand_in_the_table_not_where_room_is_little(tmp_path):
    rng, points = np.random.default_rng(0), wanted("methods", "glas")
    for p in points:
        made_up(p, tmp_path, rng, source="glas")
        if p.given["seed"] == 0: continue
        path = max((tmp_path/"runs").iterdir(), key=lambda f: f.stat().st_mtime_ns)
        record = json.loads(path.read_text())
        record["rows"] = [r for r in record["rows"] if r["method"] != "copied_kd"]  # of the first draw only
        path.write_text(json.dumps(record))
    made = report("table3_distillers", "glas", tmp_path)
    runs = made.data[made.data.metric == "auroc"].groupby("method").runs.sum()
    assert (runs["graft"], runs["copied_kd"]) == (18, 6) and widely(made.data) == ["graft", "hard", "kd", "ensemble"]
    assert "| copied_kd |" in report_files(made)["table3_distillers-glas.md"] and "| copied_kd |" not in readme_block(tmp_path)
    assert "1 more, run at fewer points: `results/tables/table3_distillers-glas.md`" in readme_block(tmp_path)
    shown = {t.get_text() for t in draw(report("figure1_shots", "glas", tmp_path)).axes[0].get_legend().get_texts()}
    assert shown == {"graft", "hard", "kd", "ensemble"}


@pytest.mark.parametrize("source, splits", [("glas", 3), ("synthetic", 3)])
def test_every_method_is_tried_and_no_point_twice(source, splits):
    from kdnb.methods import METHODS
    points = wanted("methods", source)
    asked_for = [{p.given["method"], *filter(None, p.given["baselines"].split(","))} for p in points]
    every = {f: n for n, f in METHODS.items() if n != "scratch"}  # scratch is hard
    whole = [p for p, names in zip(points, asked_for, strict=True) if names == set(every.values())]
    places = [tuple(p.given[c] for c in ("mag", "fold", "seed", "k", "fusion")) for p in points]
    assert len(every) == len(set(METHODS.values())) and len(places) == len(set(places))
    assert {5, 10} <= {p.given["k"] for p in whole} and len({p.given["fold"] for p in whole}) == splits


def test_table_2_counts_only_places_that_have_all_rules(folder, tmp_path):
    made = report("table2_fusion", folder=folder)
    assert set(made.data.fusion) == {"accuracy", "mean", "single", "entropy"} and set(made.data.runs) == {3}
    shutil.copytree(folder, tmp_path/"less")
    lost = next(r for r in gather("fusion", "synthetic", folder).found if (r["resolved"]["fusion"], r["resolved"]["fold"]) == ("mean", 1))
    (tmp_path/"less"/"runs"/f"{lost['run']}.json").unlink()
    less = report("table2_fusion", "synthetic", tmp_path/"less")
    assert set(less.data.runs) == {2} and "12 runs expected, 11 found, 1 missing" in less.says


def test_what_may_not_enter_the_papers_tables(tmp_path):
    paper, rng = {"preset": asdict(resolve_preset("paper"))}, np.random.default_rng(0)
    points = wanted("methods", "breakhis")
    kinds = [dict(source="breakhis"), dict(source="synthetic"), dict(source="breakhis", dirty=True, modified=["kdnb/fusion.py"])]
    for p, fields in zip(points, kinds, strict=False): made_up(p, tmp_path, rng, **fields, resolved=p.given | paper)
    changed = {"preset": paper["preset"] | {"size": 96}}
    made_up(points[3], tmp_path, rng, source="breakhis", resolved=points[3].given | changed)
    hotter = points[4]._replace(given=points[4].given | {"temperature": 8.})
    made_up(hotter, tmp_path, rng, source="breakhis", resolved=hotter.given | paper)  # nobody asked for this one
    there = gather("methods", "breakhis", tmp_path)
    assert there.says().startswith("400 runs expected, 1 found, 399 missing; 3 more may not enter")
    why = " ".join(sum(there.barred.values(), []))
    assert "images are synthetic, not breakhis" in why and "preset is paper,size=96, not paper" in why and "kdnb/fusion.py" in why
    assert (report("table3_distillers", "breakhis", tmp_path).data.runs == 1).all()


def test_of_two_records_of_one_point_the_later_counts(tmp_path):
    point, rng = wanted("methods", "synthetic")[0], np.random.default_rng(0)
    made_up(point, tmp_path, rng, code="new", created="2030-01-01T00:00:00+00:00")
    made_up(point, tmp_path, rng, code="old", created="2020-01-01T00:00:00+00:00")
    assert [r["code"] for r in gather("methods", "synthetic", tmp_path).found] == ["new"]


def test_predictions_that_are_gone_are_counted(folder, tmp_path):
    shutil.copytree(folder, tmp_path/"r")
    kept = sorted((tmp_path/"r"/"predictions").iterdir())
    before = report("figure4_reliability", "synthetic", tmp_path/"r")
    assert "Predictions of 21 of them are here" in before.says
    shutil.rmtree(kept[0].parent)
    after = report("figure4_reliability", "synthetic", tmp_path/"r")
    assert after.data.empty and "Predictions of 0 of them are here" in after.says and draw(after) is None


def test_where_nothing_is_recorded_reports_end_well(tmp_path):
    for name in ARTEFACTS:
        made = report(name, "auto", tmp_path)
        assert made.data.empty and re.search(r"\d+ runs? expected, 0 found", made.says) and "Nothing to show yet" in made._repr_markdown_()
        assert report_files(made) == {}
    assert write_all(tmp_path) == []
    for wrong in (("table9",), ("table4_cost", "camelyon")):
        with pytest.raises(BadInput, match="is not accepted"): report(*wrong)


# ---- notebooks and figures

@pytest.mark.parametrize("name", ARTEFACTS)
def test_report_notebooks_run(folder, house, name):
    for source, there in (("synthetic", run_report(folder, house, name, "synthetic")), ("glas", run_report(folder, house, name, "glas"))):
        assert there["made"].source == source and ("SYNTHETIC" in there["made"].title) == (source == "synthetic")
    assert all("-synthetic." in p.name for p in (house/"results"/"tables").iterdir())


def run_report(folder, house, name, source):
    "The code cells of a report, one after the other, for one source; a few seconds at most, and no torch."
    if not (house/"results").exists(): shutil.copytree(folder, house/"results")
    cells, there, began = json.loads((ROOT/f"nbs/paper/{name}.ipynb").read_text(encoding="utf-8"))["cells"], {}, time.perf_counter()
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    exec(code[0], there)
    there["source"] = source
    for text in code[1:]: exec(text, there)
    assert "torch" not in "".join(code) and time.perf_counter() - began < 20
    return there


@pytest.mark.parametrize("name", DRAWN)
def test_figures_say_synthetic(folder, house, name):
    made = report(name, "synthetic", folder)
    few = made._replace(data=made.data.head(2)) if "disagreement" in name else made
    fig = draw(few)
    assert "SYNTHETIC" in fig._suptitle.get_text() and len(fig.axes) >= 1
    if "disagreement" in name: assert sum(bool(ax.images) for ax in fig.axes) == 2 and (house/"cache"/"phantom").is_dir()


def test_no_image_but_a_phantoms_is_committed():
    cells = json.loads((ROOT/"nbs/paper/figure5_disagreement.ipynb").read_text("utf-8"))["cells"]
    shown = [c for c in cells if any("image/png" in o.get("data", {}) for o in c.get("outputs", ()))]
    assert all("draw(drawn" in "".join(c["source"]) for c in shown)
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    assert 'images: str = ""' in code[0] and 'drawn = made if images else report("figure5_disagreement", "synthetic")' in "".join(code)


# ---- grids

@pytest.mark.parametrize("grid", GRIDS.values())
def test_reports_and_kdnb_run_expand_a_grid_alike(grid):
    theirs = [(n.name, given, axes) for n, given, axes in load_grid(ROOT/"nbs/grids"/grid).points]
    ours = asked(grid)
    assert [(p.notebook, p.axes) for p in ours] == [(n, axes) for n, _, axes in theirs]
    assert all(p.given | given == p.given for p, (_, given, _) in zip(ours, theirs, strict=True))


def test_excluded_points_are_not_expected(tmp_path):
    path = tmp_path/"g.toml"
    path.write_text('notebook = "run_distill.ipynb"\nexclude = [{k = 5, seed = [1, 2]}]\n[axes]\nk = [5, 10]\nseed = [0, 1, 2]\n')
    assert [(p.given["k"], p.given["seed"]) for p in asked(path)] == [(5, 0), (10, 0), (10, 1), (10, 2)]


@pytest.mark.parametrize("grid, most", [("paper.toml", 2000), ("laptop.toml", 60), ("glas.toml", 90)])
def test_grids_are_of_their_size_and_their_values_are_accepted(grid, most):
    made = load_grid(ROOT/"nbs/grids"/grid)
    assert len(made.points) <= most and (grid == "paper.toml" or made.threads == 1)
    one_each = {(notebook, axes): given for notebook, given, axes in made.points}  # the last of each block
    for (notebook, _), given in one_each.items():
        if given.get("weights"): given = given | {"weights": ""}
        assert "wrong" not in values_of(str(notebook), given), values_of(str(notebook), given)


# ---- the experiment behind Table 4

def test_what_networks_cost_is_recorded_side_by_side(house, one_thread):
    cells = json.loads((ROOT/"nbs/run_cost.ipynb").read_text(encoding="utf-8"))["cells"]
    code, there = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"], {"__name__": "__main__"}
    exec(code[0], there)
    there |= dict(teachers="test_resnet,resnet10t", student="test_vit", preset="laptop,size=32", rounds=2, batch=2)
    for text in code[1:]: exec(text, there)
    record = load_record(house/"results"/"latest.json")
    value = {(r["method"], r["metric"]): r["value"] for r in record["rows"]}
    assert {m for m, _ in value} == {"student test_vit", "teacher test_resnet", "teacher resnet10t", "ensemble"}
    for what in ("params", "macs", "bytes"):
        assert value["ensemble", what] == value["teacher test_resnet", what] + value["teacher resnet10t", what] > 0
    assert all(v > 0 for v in value.values()) and record["rows"][-1]["n"] == 2
