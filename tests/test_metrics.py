"""Metrics against scikit-learn and by hand; what they refuse; what the bootstrap draws."""
import math
import subprocess
import sys
import time

import numpy as np
import pytest
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    brier_score_loss,
    f1_score,
    log_loss,
    matthews_corrcoef,
    precision_recall_fscore_support,
    roc_auc_score,
)

from kdnb.core import BadInput
from kdnb.metrics import (
    BY_PATIENT,
    DEFINITIONS,
    DRAWN,
    METRICS,
    ONE_CLASS,
    agreement,
    auroc,
    balanced_accuracy,
    brier,
    by_class,
    check_patients,
    draw_counts,
    draw_patients,
    drawn,
    ece,
    image_accuracy,
    interval,
    nll,
    patient_recognition_rate,
    patient_vote,
    patient_votes,
    reliability,
    score,
    score_rows,
)


@pytest.fixture
def case():
    rng = np.random.default_rng(1)
    y = np.repeat(np.arange(24) % 3, 5)
    return y, rng.dirichlet(np.ones(3), 120) + .3 * np.eye(3)[y], np.repeat([f"p{i}" for i in range(24)], 5)


def normed(p): return p / p.sum(1, keepdims=True)


def test_against_scikit_learn(case):
    y, p, _ = case
    p = normed(p)
    assert auroc(y, p) == pytest.approx(roc_auc_score(y, p, multi_class="ovr", average="macro"))
    assert balanced_accuracy(y, p) == pytest.approx(balanced_accuracy_score(y, p.argmax(1)))
    two = normed(p[:, :2])
    assert auroc(y % 2, two) == pytest.approx(roc_auc_score(y % 2, two[:, 1]))


def test_the_others_against_scikit_learn(case):
    y, p, _ = case
    p, said = normed(p), normed(p).argmax(1)
    got, one = score(y, p), np.eye(3)[y]
    assert got["macro_f1"] == pytest.approx(f1_score(y, said, average="macro"))
    assert got["mcc"] == pytest.approx(matthews_corrcoef(y, said)) and got["nll"] == pytest.approx(log_loss(y, p))
    assert got["brier"] == pytest.approx(brier_score_loss(y, p, scale_by_half=False))
    assert got["auprc"] == pytest.approx(average_precision_score(one, p, average="macro"))
    assert got["sensitivity"] == pytest.approx(got["balanced_accuracy"])
    _, recall, f1, support = precision_recall_fscore_support(y, said)
    table = by_class(y, p, classes=list("ABC"))
    assert table.sensitivity.tolist() == pytest.approx(recall.tolist()) and table.f1.tolist() == pytest.approx(f1.tolist())
    assert table.images.tolist() == support.tolist() and table.index.tolist() == list("ABC")
    spec = [((said != c) & (y != c)).sum()/(y != c).sum() for c in range(3)]
    assert table.specificity.tolist() == pytest.approx(spec) and got["specificity"] == pytest.approx(np.mean(spec))


def test_two_classes_against_scikit_learn(case):
    y, p, _ = case
    y, p = y % 2, normed(normed(p)[:, :2])
    got, said = score(y, p), p.argmax(1)
    assert got["auprc"] == pytest.approx(average_precision_score(y, p[:, 1]))
    assert got["brier"] == pytest.approx(brier_score_loss(y, p[:, 1])) and got["nll"] == pytest.approx(log_loss(y, p))
    assert got["sensitivity"] == pytest.approx(said[y == 1].mean())
    assert got["specificity"] == pytest.approx(1 - said[y == 0].mean())
    assert got["balanced_accuracy"] == pytest.approx((got["sensitivity"] + got["specificity"])/2)


def test_no_name_means_two_things():
    assert METRICS.keys() == DEFINITIONS.keys() == DRAWN.keys() and BY_PATIENT < METRICS.keys()
    assert len(set(DEFINITIONS.values())) == len(DEFINITIONS)


@pytest.mark.parametrize("mass", [False, True])
@pytest.mark.parametrize("bins", [1, 4, 15, 400])
def test_calibration_bin_by_bin(case, bins, mass):
    y, p, _ = case
    p = normed(p)
    sure, right = p.max(1), p.argmax(1) == y
    edges = np.quantile(sure, np.linspace(0, 1, bins + 1)) if mass else np.arange(bins + 1)/bins
    gaps = []
    for i in range(bins):
        inside = (sure > edges[i]) & (sure <= edges[i + 1]) | ((i == 0) & (sure <= edges[0]))
        if inside.any(): gaps.append(inside.mean()*abs(sure[inside].mean() - right[inside].mean()))
    assert ece(y, p, bins=bins, mass=mass) == pytest.approx(sum(gaps))
    table = reliability(y, p, bins, mass)
    assert table.images.sum() == 120 and (table.low <= table.confidence + 1e-12).all()
    assert (table.confidence <= table.high + 1e-12).all()


def test_calibration_of_the_calibrated_and_of_the_sure():
    rng = np.random.default_rng(0)
    chance = rng.uniform(size=40_000)
    y, p = (rng.random(40_000) < chance).astype(int), np.stack([1 - chance, chance], 1)
    assert ece(y, p) < .02 and ece(y, p, by_label=True) < .02 and ece(y, np.tile([0., 1.], (40_000, 1))) > .45
    assert nll([0], [[0., 1.]]) == pytest.approx(-math.log(1e-12)) and brier([0], [[0., 1.]]) == 1
    assert brier([0], [[0., 1., 0.]]) == 2
    with pytest.raises(BadInput, match="bins=0"): ece(y, p, bins=0)


def test_always_malignant():
    y, who = np.array([0]*3 + [1]*7), list("aabccddeef")
    got = score(y, np.tile([0., 1.], (10, 1)), who)
    assert got["image_accuracy"] == .7 and got["balanced_accuracy"] == got["auroc"] == .5 and got["mcc"] == 0
    assert got["patient_recognition_rate"] == got["patient_vote"] == 4/6
    assert got["sensitivity"] == 1 and got["specificity"] == 0 and got["auprc"] == .7


@pytest.mark.filterwarnings("error")
def test_classes_that_are_absent():
    p = [[.1, .8, .1], [.2, .5, .3], [.7, .2, .1]]
    assert math.isnan(auroc([1, 1, 1], p)) and balanced_accuracy([1, 1, 1], p) == pytest.approx(2 / 3)
    assert auroc([1, 1, 0], p) == 1  # class 2 is absent: the mean is over the two that are there
    got = score([1, 1, 1], p, ["a", "a", "b"])
    assert all(math.isnan(got[name]) for name in ("auroc", "auprc", "mcc", "specificity"))
    assert got["sensitivity"] == pytest.approx(2/3)
    table = by_class([1, 1, 0], p, ["a", "a", "b"])
    assert table.loc["2"].isna().sum() == 5 and table.images.tolist() == [1, 2, 0] and table.patients.tolist() == [1, 1, 0]
    with pytest.raises(BadInput, match="3 columns"): by_class([1, 1, 0], p, classes=["a", "b"])


def test_orders_do_not_matter(case):
    y, p, who = case
    p, order = normed(p), np.random.default_rng(0).permutation(len(y))
    assert score(y, p, who) == pytest.approx(score(y[order], p[order], who[order]))
    renamed = np.array([f"z{hash(w)}" for w in who])
    assert score(y, p, who) == pytest.approx(score(y, p, renamed))


def test_one_image_a_patient(case):
    y, p, _ = case
    p = normed(p)
    assert image_accuracy(y, p) == pytest.approx(patient_recognition_rate(y, p, range(120)))
    assert image_accuracy(y, p) == pytest.approx(patient_vote(y, p, range(120)))


def test_votes():
    single = np.float32([[.3, .7], [.7, .3], [.1, .9]])
    assert patient_votes(single, ["a", "a", "b"]) == {"a": None, "b": 1}
    assert patient_vote([1, 1, 1], single, ["a", "a", "b"]) == .5
    assert math.isnan(patient_vote([0, 1, 1], single, ["a", "a", "b"]))
    assert patient_recognition_rate([0, 1, 1], single, ["a", "a", "b"]) == .5


def test_interval(case):
    y, p, who = case
    p = normed(p)
    for name, value in score(y, p, who).items():
        low, high = interval(name, y, p, who, draws=100)
        assert low < value < high or value == high, name
        assert (low, high) == interval(METRICS[name], y, p, who, draws=100)
    wide, narrow = (interval("auroc", y, p, who, draws=100, level=level) for level in (.95, .5))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_draws_keep_patients_whole_and_classes_present(case):
    y, p, who = case
    drawn = [(y[rows], who[rows], number) for rows, number in draw_patients(y, who, 20)]
    for labels, names, number in drawn:
        assert np.bincount(labels).tolist() == [40, 40, 40] and len(np.unique(number)) == 24
        assert all(len(set(names[number == n])) == 1 and (number == n).sum() == 5 for n in range(24))
    assert any(len(set(names)) < 24 for _, names, _ in drawn)
    again = [rows for rows, _ in draw_patients(y, who, 20)]
    assert all((a == b).all() for a, (b, _) in zip(again, draw_patients(y, who, 20), strict=True))
    assert [r.tolist() for r in again] != [r.tolist() for r, _ in draw_patients(y, who, 20, seed=1)]


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("kind", ["apart", "tied", "mixed patients", "one class"])
@pytest.mark.filterwarnings("error")
def test_quick_draws_are_the_plain_ones(classes, kind):
    "Every metric in every draw, over ties, patients of two labels, and absent classes."
    rng = np.random.default_rng(classes)
    who = np.repeat(np.arange(12), rng.integers(2, 6, 12))
    names = np.char.add("p", np.char.zfill(who.astype(str), 2))
    y = np.minimum(who, 1) if kind == "one class" else who % (2 if classes == 3 else classes)
    if kind == "one class": y[:] = 1
    if kind == "mixed patients": y = rng.integers(0, classes, len(who))
    p = normed(rng.dirichlet(np.ones(classes), len(who)) + .3*np.eye(classes)[y])
    if kind == "tied": p = normed(np.round(p, 1) + 1e-9)
    for name, f in METRICS.items():
        plain = [f(y[rows], p[rows], number) for rows, number in draw_patients(y, names, 8)]
        assert drawn(name, y, p, names, 8) == pytest.approx(plain, nan_ok=True), name


def test_chunks_change_nothing(case, monkeypatch):
    y, p, who = case
    whole = drawn("auprc", y, normed(p), who, 50)
    monkeypatch.setattr("kdnb.metrics.CHUNK", 300)
    assert (drawn("auprc", y, normed(p), who, 50) == whole).all()


def test_ones_own_metric_of_a_known_name(case, monkeypatch):
    y, p, who = case
    def auroc(y, p, patients=None): return .25
    monkeypatch.setitem(METRICS, "auroc", auroc)
    assert interval("auroc", y, normed(p), who, 5) == (.25, .25)


def test_two_thousand_draws_of_sixteen_patients_take_less_than_a_second():
    rng = np.random.default_rng(0)
    who = np.repeat(np.arange(16), 100)  # the whole test side of a fold, four magnifications
    y, p = who % 2, rng.dirichlet([1, 1], 1600)
    interval("auroc", y, p, who, 10)
    for name in METRICS:
        began = time.process_time()
        interval(name, y, p, who, 2000)
        assert time.process_time() - began < 1, name


def test_intervals_cover():
    "Ninety-five in a hundred intervals over patients hold the truth, about; those over images far fewer."
    rng, held = np.random.default_rng(0), np.zeros(2)
    for i in range(120):
        who = np.repeat(np.arange(30), 12)
        right = rng.random(360) < rng.beta(2, 1, 30)[who]
        p = np.stack([right, ~right], 1).astype(float)
        for j, units in enumerate((who, np.arange(360))):
            low, high = interval("image_accuracy", np.zeros(360, int), p, units, 200, seed=i)
            held[j] += low <= 2/3 <= high
    assert .86 <= held[0]/120 <= .99 and held[1]/120 < .75


def test_counts_and_images_are_the_same_draws(case):
    y, _, who = case
    counts = draw_counts(y, who, 10)
    names = np.unique(who)
    for times, (rows, _) in zip(counts, draw_patients(y, who, 10), strict=True):
        assert [(who[rows] == n).sum()//5 for n in names] == times.tolist()


def test_nothing_to_vary():
    p = [[.9, .1], [.2, .8]]
    assert all(map(math.isnan, interval("image_accuracy", [0, 1], p, ["a", "b"])))


def test_rows(case):
    y, p, who = case
    rows = score_rows(y, normed(p), who, split="test", fold=2)
    whole, ones = [r for r in rows if "label" not in r], [r for r in rows if "label" in r]
    assert [row["metric"] for row in whole] == list(METRICS) and {row["split"] for row in rows} == {"test"}
    assert {row["level"]: row["n"] for row in whole} == {"image": 120, "patient": 24}
    assert {r["label"] for r in ones} == set("012") and {r["metric"] for r in ones} == set(ONE_CLASS)
    assert {r["n"] for r in ones} == {40}
    assert all(type(row["value"]) is float and type(row["n"]) is int for row in rows)


def test_rows_with_intervals(case):
    y, p, who = case
    y, p = y % 2, normed(normed(p)[:, :2])
    assert len(score_rows(y, p, who)) == len(METRICS)  # of two classes none has rows of its own
    for row in score_rows(y, p, who, draws=60, seed=3):
        assert (row["low"], row["high"]) == interval(row["metric"], y, p, who, draws=60, seed=3)


@pytest.mark.parametrize(("y", "p", "patients", "says"), [
    ([0, 1], [[.5, .5]], None, r"y has shape \(2,\)"),
    ([0, 2], [[.5, .5], [.5, .5]], None, "y holds 2"),
    ([0, -1], [[.5, .5], [.5, .5]], None, "y holds -1"),
    ([0., 1.], [[.5, .5], [.5, .5]], None, "y holds 0.0 of type float64"),
    (["benign"], [[.5, .5]], None, "'benign'"),
    ([0], [[math.nan, .5]], None, r"p\[0\]=\[nan, 0.5\]"),
    ([0, 1], [[.5, .5], [2., -1.]], None, r"p\[1\]=\[2.0, -1.0\]"),
    ([0], [[.5, .4]], None, "sum to 1"),
    ([0], [.5], None, r"p has shape \(1,\)"),
    ([], np.zeros((0, 2)), None, r"p has shape \(0, 2\)"),
    ([0], [[1.]], None, r"p has shape \(1, 1\)"),
    ([0], [[.5, "x"]], None, "not a table of numbers"),
    ([0, 1], [[.5, .5], [.5, .5]], ["a"], r"patients has shape \(1,\)"),
    ([0, 1], [[.5, .5], [.5, .5]], ["a", None], r"patients\[1\]=None"),
])
def test_refused(y, p, patients, says):
    with pytest.raises(BadInput, match=says): score(y, p, patients)


def test_refused_elsewhere():
    with pytest.raises(BadInput, match="differ in shape"): agreement([[.5, .5]], [[.2, .3, .5]])
    with pytest.raises(BadInput, match="Did you mean 'auroc'"): interval("aurocc", [0], [[.5, .5]], ["a"])
    with pytest.raises(BadInput, match="level=95"): interval("auroc", [0], [[.5, .5]], ["a"], level=95)
    with pytest.raises(BadInput, match="draws=0"): interval("auroc", [0], [[.5, .5]], ["a"], draws=0)
    with pytest.raises(BadInput, match=r"patients\[1\]"): check_patients([1, math.nan], 2)


def test_no_torch():
    code = "import sys, kdnb.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
