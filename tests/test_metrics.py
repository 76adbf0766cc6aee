"""Metrics against scikit-learn and by hand; what they refuse; what the bootstrap draws."""
import math
import subprocess
import sys

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from kdnb.core import BadInput
from kdnb.metrics import (
    METRICS,
    agreement,
    auroc,
    balanced_accuracy,
    check_patients,
    draw_patients,
    image_accuracy,
    interval,
    patient_recognition_rate,
    patient_vote,
    patient_votes,
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


@pytest.mark.filterwarnings("error")
def test_classes_that_are_absent():
    p = [[.1, .8, .1], [.2, .5, .3], [.7, .2, .1]]
    assert math.isnan(auroc([1, 1, 1], p)) and balanced_accuracy([1, 1, 1], p) == pytest.approx(2 / 3)
    assert auroc([1, 1, 0], p) == 1  # class 2 is absent: the mean is over the two that are there
    assert math.isnan(score([1, 1, 1], p, ["a", "a", "b"])["auroc"])


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


def test_nothing_to_vary():
    p = [[.9, .1], [.2, .8]]
    assert all(map(math.isnan, interval("image_accuracy", [0, 1], p, ["a", "b"])))


def test_rows(case):
    y, p, who = case
    rows = score_rows(y, normed(p), who, split="test", fold=2)
    assert [row["metric"] for row in rows] == list(METRICS) and {row["split"] for row in rows} == {"test"}
    assert {row["level"]: row["n"] for row in rows} == {"image": 120, "patient": 24}
    assert all(type(row["value"]) is float and type(row["n"]) is int for row in rows)


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
    with pytest.raises(BadInput, match=r"patients\[1\]"): check_patients([1, math.nan], 2)


def test_no_torch():
    code = "import sys, kdnb.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
