"Splits and shots over many seeds: whole units, every class, nested draws; the released folds; published splits."
import json
import warnings

import numpy as np
import pandas as pd
import pytest

from kdnb.core import BadInput
from kdnb.data import LARGE, TASKS, slides
from kdnb.protocols import (
    EVA,
    FOLDS,
    PROTOCOLS,
    SHOTS,
    VALID,
    catalogue,
    check_split,
    choose_validation,
    cover,
    deal,
    draw_shots,
    leakage,
    load_split,
    open_split,
    protocol_digest,
    save_split,
    shot_choice,
    shot_facts,
    slide_sides,
    split_digest,
    split_images,
)

TRIALS = [(p.name, task, f) for p in PROTOCOLS.values() for task, n in zip(TASKS, p.folds, strict=True) for f in range(n)]
IMPOSSIBLE = [("official5-repaired", "subtype", 3)]  # both accessions of adenosis are tested: none would train
TRIALS = [t for t in TRIALS if t not in IMPOSSIBLE]
GROUPED = [t for t in TRIALS if PROTOCOLS[t[0]].test]


def named(task="binary", double="auto", mag="n400"):
    "The catalogue as an image table without files."
    rows = catalogue(task, double).loc[lambda t: t.index.repeat(t[mag])]
    names = rows.slide + "-" + rows.groupby("slide").cumcount().astype(str).str.zfill(3)
    return rows.assign(image=names, path=names, patient=rows.accession).reset_index(drop=True)


def own(seed, patients=16, classes=2):
    "A table of other images: patients of very different size, some with two labels."
    rng = np.random.default_rng(seed)
    rows = [(f"{p}-{i}", f"p{p}", f"c{(p + (rng.random() < .2)) % classes}")
            for p in range(patients) for i in range(rng.integers(2, 30))]
    return pd.DataFrame(rows, columns=["image", "patient", "label"]).assign(path=lambda t: t.image)


def split(table, *args, **more):
    with warnings.catch_warnings(action="ignore"): return split_images(table, *args, **more)


# ---- every trial of every protocol

@pytest.mark.parametrize("protocol, task, fold", GROUPED)
def test_every_trial_keeps_its_units_whole(protocol, task, fold):
    s, unit = slide_sides(protocol, task, fold), PROTOCOLS[protocol].unit
    assert (s.groupby(unit).split.nunique() == 1).all(), "a unit on two sides"
    chosen = s[s.split != "test"].groupby("accession").split.nunique()
    assert (chosen == 1).all(), "validation and training share an accession"
    assert set(s.label[s.split == "train"]) == set(s.label), "every class trains"
    if task == "binary": assert all(set(s.label[s.split == side]) == {"benign", "malignant"} for side in set(s.split))
    assert s[s.split == "valid"].label.nunique() >= 2 and s[s.split == "test"].label.nunique() >= 2
    for mag in ("n40", "n100", "n200", "n400"):
        if task == "binary": assert (s.groupby(["split", "label"])[mag].sum() > 0).all(), "no magnification lacks a class"


@pytest.mark.parametrize("task", TASKS)
def test_accession_cv_tests_every_patient_once(task):
    n = PROTOCOLS["accession-cv"].trials(task)
    tested = pd.concat([slide_sides("accession-cv", task, f).query("split == 'test'") for f in range(n)])
    assert sorted(tested.slide) == sorted(catalogue(task).slide)
    if task == "binary":
        spread = [slide_sides("accession-cv", task, f).query("split == 'test'").groupby("label").accession.nunique()
                  for f in range(n)]
        assert min(s["benign"] for s in spread) >= 3 and max(s["benign"] for s in spread) <= 4
    else: assert all(set(g.label) == set(catalogue(task).label) for _, g in tested.groupby(tested.index*0))


@pytest.mark.parametrize("protocol, task, fold", IMPOSSIBLE)
def test_a_trial_in_which_a_class_never_trains_is_refused(protocol, task, fold):
    with pytest.raises(BadInput, match="the train side holds no patient of class 'A'"): split(named(task), protocol, fold, task)


def test_the_released_folds_are_as_released():
    sizes = {1: [(255, 490), (261, 499), (255, 489), (237, 418)], 2: [(192, 440), (195, 425), (168, 429), (169, 385)],
             3: [(202, 455), (204, 465), (193, 466), (179, 413)], 4: [(241, 459), (245, 453), (225, 454), (224, 397)],
             5: [(270, 505), (277, 544), (273, 497), (250, 467)]}  # R Spanhol 2016, from the fold files
    for fold in range(5):
        test = slide_sides("official5", fold=fold).query("split == 'test'")
        counts = test.groupby("cls")[["n40", "n100", "n200", "n400"]].sum()
        assert [tuple(counts[m]) for m in counts] == sizes[fold + 1]
        assert test.groupby("cls").slide.nunique().tolist() == [9, 19]
        always = counts.loc["malignant"].sum()/counts.to_numpy().sum()
        assert round(always, 3) == [.653, .699, .698, .653, .653][fold], "always malignant, image by image"


def test_repaired_folds_differ_only_in_torn_accessions():
    for fold in range(5):
        a, b = (slide_sides(p, fold=fold).set_index("slide").split.eq("test") for p in ("official5", "official5-repaired"))
        moved = a.index[(a != b.reindex(a.index, fill_value=False))]
        s = slides().set_index("slide_id")
        torn = s.groupby("accession")[f"fold{fold + 1}"].nunique().loc[lambda n: n > 1].index
        assert len(torn) and set(s.accession[moved]) <= set(torn) | {"13412"}


def test_eva4_is_the_leaderboards_split():
    s = slide_sides("eva4", "subtype4")
    assert set(s.label) == set(LARGE) and set(s.slide[s.split == "test"].str.split("-").str[2]) == EVA
    assert (s.n40.sum(), s.n40[s.split == "test"].sum(), s.n40[s.split != "test"].sum()) == (1471, 339, 1132)
    with pytest.raises(BadInput, match="eva4 is only defined for subtype4"): slide_sides("eva4", "binary")


def test_digests_name_protocols_apart():
    every = [protocol_digest(p.name, t) for p in PROTOCOLS.values() for t, n in zip(TASKS, p.folds, strict=True) if n]
    assert len(set(every)) == len(every)


def test_the_partition_has_not_drifted():
    "A split that changes silently makes old and new records incomparable."
    assert protocol_digest("accession-cv") == GOLDEN["accession-cv"] and protocol_digest("official5") == GOLDEN["official5"]


GOLDEN = {"accession-cv": "72096c498bdc1b76", "official5": "ca2fae34052d52fc"}


# ---- images

@pytest.mark.parametrize("protocol, task, fold", TRIALS)
def test_images_follow_their_slides(protocol, task, fold):
    p = PROTOCOLS[protocol]
    table = named(task, p.double, "n40")
    shuffled = table.sample(frac=1, random_state=fold)
    a, b = split(table, protocol, fold, task), split(shuffled, protocol, fold, task)
    assert split_digest(a) == split_digest(b) and a.split.equals(b.split.sort_index()), "the order of files matters"
    some = table[table.index % 2 == 0] if p.test else table
    assert split(some, protocol, fold, task).split.equals(a.split[some.index]), "a missing file moves another"
    shares = a.split.value_counts(normalize=True)
    assert .1 < shares["test"] < .6 and shares["train"] > .25 and shares["valid"] > .05


def test_image_random_warns_and_leaks():
    with pytest.warns(UserWarning, match="image-random leaks images of the same slides"):
        table = split_images(named(), "image-random")
    assert leakage(table)["slide"] > .99
    tested = [split(named(), "image-random", f).query("split == 'test'").image for f in range(FOLDS)]
    assert pd.concat(tested).is_unique and len(pd.concat(tested)) == len(named())


def test_leakage_counts_duplicates():
    table = pd.DataFrame({"path": list("abcd"), "label": list("xyxy"), "patient": list("pqrs"),
                          "split": ["train", "valid", "test", "test"]})
    assert leakage(table, ["1", "2", "1", "3"]) == {"patient": 0., "duplicate": .5}
    assert leakage(table, ["1", "2", "2", "1"])["duplicate"] == 1


# ---- splitters over many seeds

@pytest.mark.parametrize("seed", range(40))
def test_deal_is_whole_even_and_its_own_order(seed):
    rng = np.random.default_rng(seed)
    n, parts = int(rng.integers(8, 60)), int(rng.integers(2, 6))
    units = pd.DataFrame({"unit": [f"u{i}" for i in range(n)], "stratum": rng.integers(0, 5, n).astype(str),
                          "n": rng.integers(1, 200, n)}).assign(label=lambda t: t.stratum.isin(["0", "1"]).astype(str))
    part = deal(units, parts, seed)
    assert set(part.index) == set(units.unit) and set(part) == set(range(parts))
    assert part.sort_index().equals(deal(units.sample(frac=1, random_state=seed), parts, seed).sort_index())
    spread = units.assign(part=units.unit.map(part)).groupby(["stratum", "part"]).size().unstack(fill_value=0)
    spread = spread.reindex(columns=range(parts), fill_value=0)
    assert (spread.max(axis=1) - spread.min(axis=1) <= 1).all(), "a stratum is spread as evenly as whole units allow"
    valid = choose_validation(units, seed) if n >= VALID else set()
    assert set(units.label[~units.unit.isin(valid)]) == set(units.label)


@pytest.mark.parametrize("seed", range(30))
def test_any_table_is_split_by_patients(seed):
    table = own(seed)
    for fold in range(FOLDS):
        t = split_images(table, fold=fold)
        assert (t.groupby("patient").split.nunique() == 1).all() and set(t.split) == {"train", "valid", "test"}
        assert t.split.sort_index().equals(split_images(table.sample(frac=1, random_state=seed), fold=fold).split.sort_index())
    assert pd.concat([split_images(table, fold=f).query("split == 'test'") for f in range(FOLDS)]).image.is_unique


def test_official_protocols_are_refused_for_other_images():
    for name in ("official5", "official5-repaired", "eva4"):
        with pytest.raises(BadInput, match="is defined by slides of BreakHis"): split(own(0), name)
    with pytest.raises(BadInput, match="3 patients cannot be dealt into 5 parts"): split(own(0, patients=3))
    with pytest.raises(BadInput, match="Did you mean 'official5'"): split(own(0), "oficial5")
    with pytest.raises(BadInput, match="fold=2 is not accepted"): split(named("subtype"), fold=2, task="subtype")
    strange = named().assign(slide="DC-14-1")
    with pytest.raises(BadInput, match="slide 'DC-14-1' has no side"): split(strange)


def test_a_class_that_never_trains_is_refused():
    table = pd.DataFrame({"path": range(6), "label": list("xyzxyz"), "patient": list("abcdef")})
    sides = lambda *s: check_split(table.assign(split=s))
    with pytest.raises(BadInput, match="the train side holds no patient of class 'z'"):
        sides("train", "train", "valid", "valid", "test", "test")
    with pytest.raises(BadInput, match="the valid side holds no patient of class 'x'"):
        sides("train", "train", "train", "test", "test", "valid")
    with pytest.raises(BadInput, match="Did you mean 'test'"): sides("train", "train", "train", "tst", "tst", "valid")


def test_a_published_split_comes_back(tmp_path):
    table = named()
    there = split(table, "official5", 0).drop(columns="patient").assign(patient=table.slide)
    file = save_split(there, tmp_path/"s.json", protocol="official5", fold=0)
    assert load_split(table, file).split.equals(there.split)
    with pytest.raises(BadInput, match="gives no side to slide 'DC-14-1'"): load_split(table.assign(slide="DC-14-1"), file)
    with pytest.raises(BadInput, match="gives sides to 'slide', which the table lacks"): load_split(own(0), file)
    random = split(table, "image-random")
    assert load_split(table, save_split(random, tmp_path/"r.json")).split.equals(random.split)
    content = json.loads(file.read_text())
    for harm, said in ((lambda c: c["sides"].update({"A-14-22549AB": "test"}), "was changed after"),
                       (lambda c: c.pop("sides"), "has no `sides`")):
        harm(content)
        file.write_text(json.dumps(content))
        with pytest.raises(BadInput, match=said): load_split(table, file)
    file.write_text("{")
    with pytest.raises(BadInput, match="cannot be read as a split"): load_split(table, file)
    with pytest.raises(BadInput, match="is on both sides"):
        save_split(table.assign(split=np.where(table.index % 2, "train", "test")), tmp_path/"t.json")
    assert not (tmp_path/"t.json").exists()


# ---- shots over many seeds

@pytest.fixture(scope="module")
def train(): return split_images(named())


@pytest.fixture(scope="module")
def features(train): return np.random.default_rng(0).normal(size=(len(train), 8)).astype(np.float32)


@pytest.mark.parametrize("how", SHOTS)
@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_shots_are_nested_capped_and_repeatable(train, features, how, labels, seed):
    draw = lambda k, table=train, **more: draw_shots(table, k, seed, how=how, labels=labels, features=features, **more)
    big, small = draw(12), draw(5)
    assert len(big) == 24 and len(small) == 10 and not big.path.duplicated().any()
    assert big.groupby(["label", "patient"]).size().max() <= 5 and draw(4, cap=1).groupby("label").patient.nunique().min() >= 4
    taken = set(zip(small.label, small.path, strict=True))
    assert taken <= set(zip(big.label, big.path, strict=True)), "nested in K"
    assert set(big.path) <= set(train.path[train.split == "train"]) and draw(12).equals(big)
    assert (set(big.label) == {""}) == (not labels)
    assert shot_facts(big)["images"] == 24 and shot_facts(big)["patients"] == big.patient.nunique()
    if how != "coverage":
        mixed = train.sample(frac=1, random_state=seed)
        assert draw(5, mixed).path.tolist() == small.path.tolist(), "the order of the table matters"


@pytest.mark.parametrize("how", SHOTS)
def test_the_cap_holds_for_accessions_where_slides_are_the_patients(how):
    table = split(named("binary", "as-released"), "official5", 2).assign(patient=lambda t: t.slide)
    shots = [draw_shots(table, 20, s, how=how, features=np.random.default_rng(s).normal(size=(len(table), 4))) for s in range(3)]
    assert max(s.groupby(["label", "accession"]).size().max() for s in shots) <= 5
    assert [shot_facts(s)["patients"] for s in shots] == [s.accession.nunique() for s in shots]


def test_ways_of_choosing_differ_as_they_should(train, features):
    patients = {how: np.mean([draw_shots(train, 10, s, how=how, features=features).patient.nunique() for s in range(20)])
                for how in SHOTS}
    assert patients["patients"] == 20 and patients["random"] < 18, "spread over patients first"
    f = features/np.linalg.norm(features, axis=1, keepdims=True)
    def reach(how):
        one = []
        for s in range(10):
            shots = draw_shots(train, 10, s, how=how, features=features, labels=False)
            near = f[train.split == "train"] @ f[train.path.isin(shots.path)].T
            one.append(near.max(1).mean())
        return np.mean(one)
    assert reach("coverage") > reach("random") + .02, "coverage covers"


@pytest.mark.parametrize("seed", range(10))
def test_cover_is_greedy_and_complete(seed):
    rng = np.random.default_rng(seed)
    f = rng.normal(size=(15, 3))
    order = cover(f, 15, 4)
    assert sorted(order) == list(range(15)) and order[0] == 4
    g = f/np.linalg.norm(f, axis=1, keepdims=True)
    value = lambda s: (g @ g[s].T).max(1).sum()
    for i in range(1, 5):
        assert value(order[:i + 1]) == pytest.approx(max(value([*order[:i], r]) for r in range(15) if r not in order[:i]))


def test_bad_shots_are_refused(train):
    with pytest.raises(BadInput, match="class 'benign' offers at most 50 train images"): draw_shots(train, 100)
    with pytest.raises(BadInput, match="k=0 is not accepted"): draw_shots(train, 0)
    for features in (None, [0], np.full(len(train), np.nan)):
        with pytest.raises(BadInput, match="needs features"): draw_shots(train, 2, how="coverage", features=features)
    for wrong in (dict(k=2.5), dict(seed=-1), dict(cap=0), dict(k=True)):
        with pytest.raises(BadInput, match="is not accepted; a whole number from"): draw_shots(train, **{"k": 2, **wrong})
    with pytest.raises(BadInput, match="has no column split"): draw_shots(train.drop(columns="split"), 2)
    with pytest.raises(BadInput, match="Did you mean 'patients'"): draw_shots(train, 2, how="patient")
    with pytest.raises(BadInput, match="only 'unlabelled' may stand"): shot_choice("random,blind")


# ---- from a folder

def test_open_split_says_what_a_record_needs(tmp_path):
    from PIL import Image

    from kdnb.data import image_path
    for row in slides().itertuples():
        for i in (1, 2):
            path = image_path(tmp_path, row.slide_id, "40X", i)
            path.parent.mkdir(parents=True)  if not path.parent.exists() else None
            Image.new("RGB", (7, 5)).save(path)
    table, facts = open_split(tmp_path, "40", "binary")
    assert facts == {"source": "breakhis", "protocol": "accession-cv", "leaks": "",
                     "protocol_digest": protocol_digest("accession-cv")} and len(table) == 162
    with pytest.warns(UserWarning, match="official5 leaks"): table, facts = open_split(tmp_path, "40X", protocol="official5")
    assert len(table) == 164 and table.patient.nunique() == 82 and facts["leaks"]
    with pytest.warns(UserWarning): table, _ = open_split(tmp_path, "40X", "subtype4", "eva4")
    assert set(table.label) == set(LARGE)
    with pytest.raises(BadInput, match="eva4 is defined for 40X only"), warnings.catch_warnings(action="ignore"):
        Image.new("RGB", (7, 5)).save(tmp_path/"SOB_M_DC-14-2523-400-001.png")
        open_split(tmp_path, "400X", "subtype4", "eva4")
