"Several hospitals: who belongs where, what is refused, the experiment as small as it runs, and what its report says."
import contextlib
import io
import json
import warnings

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from kdnb.core import BadInput
from kdnb.data import ImageStore
from kdnb.reports import asked
from kdnb.results import new_record, save_record
from kdnb.run import literal
from kdnb.sites import deal_sites, mislabelled, site_images
from kdnb.teacher import Images

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def csv(tmp_path_factory):
    "Twenty patients with five pictures each; dark stripes tell the classes."
    folder, rows = tmp_path_factory.mktemp("images"), []
    for i in range(100):
        who, label = divmod(i//5, 2)
        shade = np.random.default_rng(i).integers(120, 220, (32, 32, 3))
        shade[::4] -= 100*label
        Image.fromarray(shade.astype(np.uint8)).save(folder/f"{i}.png")
        side = "test" if who < 2 else "valid" if who < 4 else "train"
        rows.append({"image": f"{i}.png", "label": "ab"[label], "patient": f"p{who}{label}", "split": side})
    pd.DataFrame(rows).to_csv(folder/"labels.csv", index=False)
    return folder/"labels.csv"


@pytest.fixture(scope="module")
def images(csv):
    table = deal_sites(pd.read_csv(csv).assign(path=lambda t: [str(csv.parent/i) for i in t.image]), 3)
    return Images(table, ImageStore(table, 32, csv.parent/"store"), ("a", "b"))


def test_every_training_patient_is_somewhere_and_no_patient_is_torn(images):
    t = images.table
    assert set(t.site[t.split != "train"]) == {0} and set(t.site[t.split == "train"]) == {0, 1, 2, 3}
    assert t.groupby("patient").site.nunique().max() == 1
    assert t.equals(deal_sites(t.drop(columns="site"), 3)) and not t.equals(deal_sites(t.drop(columns="site"), 3, seed=1))


def test_what_is_refused(images):
    plain = images.table.drop(columns="site")
    with pytest.raises(BadInput, match=r"(site 1|the centre) is left with 0 images of class 'b'; accepted are 5"):
        deal_sites(plain[(plain.label == "a") | (plain.split != "train") | (plain.patient == "p41")], 3)
    few = plain[(plain.split != "train") | (plain.label == "a") | plain.path.str.contains("[05].png")]
    with pytest.raises(BadInput, match="left with [12] images of class 'b'; accepted are 5 or more .*another seed"):
        deal_sites(few, 3)
    assert deal_sites(few, 3, least=1).site.max() == 3
    with pytest.raises(BadInput, match="cannot be dealt into 40 parts"): deal_sites(plain, 39)
    with pytest.raises(BadInput, match=r"accepted are some of \[0, 1, 2, 3\]"): site_images(images, 4)
    with pytest.raises(BadInput, match="accepted are some of"): site_images(images)


def test_the_stain_of_a_site_is_its_own_and_always_the_same(images):
    one, again, other = (site_images(images, i).side("train")[0] for i in (1, 1, 2))
    plain = site_images(images, 1, shift=0.).side("train")[0]
    assert torch.equal(one, again) and not torch.equal(one, plain)
    assert torch.equal(plain, images.store[np.flatnonzero((images.table.site == 1) & (images.table.split == "train"))])
    change = lambda x, i: (x.float() - site_images(images, i, shift=0.).side("train")[0].float()).mean((0, 2, 3))
    assert (change(one, 1) - change(other, 2)).abs().max() > 1
    ids = {json.dumps(site_images(images, 1, **o).identity) for o in ({}, {"seed": 1}, {"shift": 0.}, {"wrong": .5})}
    assert len(ids) == 4


def test_wrong_labels_are_counted(images):
    t = images.table
    for share in (0., .25, 1.): assert (mislabelled(t, ("a", "b"), share) != t.label).mean() == share


@pytest.mark.parametrize("wrong, message", [
    (dict(sites=1), "sites=1 is not accepted"), (dict(poor=4), "poor=4 is not accepted"), (dict(sites=15), "dealt into 16 parts"),
    (dict(shift=1.), "strength=1.0"), (dict(k=99), "k=99"), (dict(net="resnot"), "resnot"), (dict(method="finetune"), "pretr"), (dict(fusion="entropy calm"), "entropy calibrated")])
def test_the_experiment_refuses(root, csv, house, wrong, message):
    with pytest.raises(BadInput, match=message): execute(root, data=csv, **{**TINY, **wrong})
    assert not (house/"cache"/"teachers").exists()


TINY = dict(preset="laptop,size=32,batch=8,teacher_steps=4,graft_steps=20,graft_batch=8", net="test_resnet", sites=2, k=2,
            device="cpu", student="test_resnet")


def execute(root, **parameters):
    "The code cells of the experiment in this process, papermill's way."
    cells = [c.source for c in nbformat.read(root/"nbs"/"run_sites.ipynb", 4).cells if c.cell_type == "code"]
    there = {"__name__": "__main__"}
    exec(cells[0], there)
    there |= {k: literal(str(v)) for k, v in parameters.items()}
    for source in cells[1:]: exec(source, there)


@pytest.mark.smoke
def test_the_experiment(root, csv, house):
    execute(root, data=csv, method="kd", **TINY)
    record = json.loads((house/"results"/"latest.json").read_text())
    assert {r["method"] for r in record["rows"]} == {
        "teacher site 1 (poor)", "teacher site 2", "teacher all sites", "ensemble of sites", "kd: sites by accuracy",
        "kd: mean of sites", f"kd: {record['best_site']} alone", "kd: all images"}
    assert record["shares"]["kd: mean of sites"] == [.5, .5] and len(record["teachers"]) == 3
    assert len(list((house/"cache"/"teachers").iterdir())) == 3


def test_calibrated_teachers_are_asked_for_by_the_rule(root, csv, house):
    execute(root, data=csv, method="kd", **{**TINY, "sites": 2, "fusion": "entropy calibrated"})
    record = json.loads((house/"results"/"latest.json").read_text())
    assert record["resolved"]["fusion"] == "entropy calibrated" and "kd: sites by entropy calibrated" in record["shares"]


# ---- the report

POINTS = asked("sites.toml")


def made_up(point, house, **fields):
    "A record of one point: all sites are .05 ahead of their mean, which is .02 behind the best site."
    given, n = point.given, point.given["sites"]
    source, poor = "glas" if given["data"] == "glas" else "synthetic", given["poor"]
    names, m, base = [f"site {i}" + " (poor)"*(i == poor) for i in range(1, n + 1)], given["method"], .7 - .1*bool(poor)
    says = {f"teacher {s}": .6 for s in names} | {
        "teacher all sites": .9, "ensemble of sites": .75, f"{m}: sites by {given['fusion']}": base + .05,
        f"{m}: mean of sites": base, f"{m}: {names[-1]} alone": base + .02, f"{m}: all images": base + .1}
    rows = [dict(method=w, split="test", level="image", metric=k, value=v, n=9) for w, v in says.items()
            for k in ("auroc", "nll", "balanced_accuracy", "brier")]
    shares = {f"{m}: sites by {given['fusion']}": [.2] + [.8/(n - 1)]*(n - 1), f"{m}: mean of sites": [1/n]*n}
    known = dict(parameters=given | {"data": "elsewhere"}, resolved=given, protocol="accession-cv", source=source, modified=[],
                 data="d", split="s", device="cpu", seconds=1., rows=rows, shares=shares, best_site=names[-1])
    save_record(new_record("run_sites.ipynb", **{**known, **fields}), house/"results")


def report(root):
    "The code cells of the report, one after the other, and what they print."
    there, out = {}, io.StringIO()
    with contextlib.redirect_stdout(out), warnings.catch_warnings():
        warnings.simplefilter("error")
        for c in nbformat.read(root/"nbs"/"paper"/"sites.ipynb", 4).cells:
            if c.cell_type == "code": exec(c.source, there)
    there["plt"].close("all")
    return there | {"printed": out.getvalue()}


def test_the_report_of_nothing(root, house):
    assert report(root)["printed"] == "0 of 12 points found, 0 students in the table\n"
    assert not (house/"results"/"tables").exists()


@pytest.mark.parametrize("some", [1, 3, 5, 12])
def test_the_report_of_some_and_of_all(root, house, some):
    for point in POINTS[:some]: made_up(point, house)
    made_up(POINTS[0], house, modified=["kdnb/sites.py"], data="e")  # changed code may not enter
    first = report(root)
    assert first["printed"] == f"{some} of 12 points found, {4*some} students in the table\n"
    for record in (house/"results"/"runs").iterdir(): record.unlink()
    again = report(root)  # the tables stand for records that are gone
    assert again["printed"] == first["printed"] and again["gaps"].equals(first["gaps"])
    if some < 12: return
    assert again["gaps"].points.tolist() == [2]*18 and set(again["share"].poor_share.dropna()) == {.2}
    for name, gap in (("plain mean", .05), ("best site", .03), ("all images", -.05)):
        assert again["gaps"].xs(name, level=3).difference.to_numpy() == pytest.approx(gap, abs=1e-4)
