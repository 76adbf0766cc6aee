"Several hospitals: who belongs where, what is refused, and the experiment as small as it runs."
import json

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from kdnb.core import BadInput
from kdnb.data import ImageStore
from kdnb.run import literal
from kdnb.sites import deal_sites, mislabelled, site_images
from kdnb.teacher import Images

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def csv(tmp_path_factory):
    "Twenty patients with three pictures each; dark stripes tell the classes."
    folder, rows = tmp_path_factory.mktemp("images"), []
    for i in range(60):
        who, label = divmod(i//3, 2)
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
    with pytest.raises(BadInput, match="site 1 is left without a patient of class|the centre is left without"):
        deal_sites(plain[(plain.label == "a") | (plain.split != "train") | (plain.patient == "p41")], 3)
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
    (dict(shift=1.), "strength=1.0"), (dict(k=99), "k=99"), (dict(net="resnot"), "resnot"), (dict(method="finetune"), "pretr")])
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
