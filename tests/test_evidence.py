"Differences on the same draws, trials that overlap, thresholds fixed elsewhere, and what abstaining buys."
import math

import numpy as np
import pytest
from scipy import stats

from kdnb.core import BadInput
from kdnb.evidence import at_threshold, aurc, corrected_t, coverage_risk, paired, spreads, threshold_for
from kdnb.metrics import METRICS, drawn, image_accuracy, patient_scores


def cases(patients=20, seed=0):
    rng = np.random.default_rng(seed)
    who = np.repeat(np.arange(patients), rng.integers(3, 9, patients))
    y = who % 2
    chance = 1/(1 + np.exp(-(2*y - 1)*(rng.normal(1, 1, patients)[who] + rng.normal(0, 1, len(y)))))
    return y, np.stack([1 - chance, chance], 1), who


def test_differences_are_taken_draw_by_draw():
    y, p, who = cases()
    worse = .5*p + .25
    for name in METRICS:
        got = paired(name, y, p, worse, who, draws=100, seed=4)
        gaps = drawn(name, y, p, who, 100, 4) - drawn(name, y, worse, who, 100, 4)
        assert (got["low"], got["high"]) == pytest.approx(tuple(np.quantile(gaps, [.025, .975])))
        assert got["difference"] == pytest.approx(METRICS[name](y, p, who) - METRICS[name](y, worse, who))
    assert (got["images"], got["patients"]) == (len(y), 20)


def test_a_predictor_against_itself_and_the_other_way_round():
    y, p, who = cases()
    same = paired("auroc", y, p, p, who, draws=50)
    assert (same["difference"], same["low"], same["high"], same["above"]) == (0, 0, 0, .5)
    q = p[:, ::-1]
    there, back = paired("auroc", y, p, q, who, draws=50), paired("auroc", y, q, p, who, draws=50)
    assert (there["low"], there["high"]) == pytest.approx((-back["high"], -back["low"]))
    assert there["above"] == pytest.approx(1 - back["above"]) and there["difference"] > 0


def test_differences_that_cannot_be_told():
    y, p, who = cases(2)
    got = paired("image_accuracy", y, p, p, who)
    assert math.isnan(got["low"]) and math.isnan(got["above"])
    with pytest.raises(BadInput, match="differ in shape"): paired("auroc", y, p, p[1:], who)
    with pytest.raises(BadInput, match="Did you mean"): paired("aurok", y, p, p, who)


def test_corrected_t_is_plain_t_without_overlap():
    five = [.02, .05, .01, .04, .03]
    got, plain = corrected_t(five, 1e12, 1), stats.ttest_1samp(five, 0)
    assert (got["t"], got["p"]) == pytest.approx((plain.statistic, plain.pvalue))
    assert (got["low"], got["high"]) == pytest.approx(tuple(plain.confidence_interval()))


def test_corrected_t_by_hand():
    got = corrected_t([.1, .3], n_train=3, n_test=1)
    error = math.sqrt(.02*(1/2 + 1/3))
    assert got["t"] == pytest.approx(.2/error) and got["trials"] == got["runs"] == 2
    assert got["high"] == pytest.approx(.2 + stats.t.ppf(.975, 1)*error)


def test_seeds_are_no_trials():
    got = corrected_t([.1, .2, .3, .4], 3, 1, trials=["a", "a", "b", "b"])
    assert got["trials"] == 2 and got["runs"] == 4
    assert got["high"] == pytest.approx(corrected_t([.15, .35], 3, 1)["high"])


def test_one_trial_settles_nothing():
    got = corrected_t([.1, .2], 3, 1, trials=[0, 0])
    assert got["trials"] == 1 and all(math.isnan(got[k]) for k in ("low", "high", "t", "p", "sd"))
    assert corrected_t([.1, .1, .1], 3, 1)["low"] == pytest.approx(.1)


def test_false_alarms_of_overlapping_trials():
    "Random splits of one collection with no true difference: plain t cries out too often, the corrected one does not."
    rng, alarms = np.random.default_rng(0), np.zeros(2)
    for _ in range(300):
        units = rng.normal(size=60)
        gaps = [units[rng.permutation(60)[:20]].mean() for _ in range(10)]
        alarms += [corrected_t(gaps, 1e12, 20)["p"] < .05, corrected_t(gaps, 40, 20)["p"] < .05]
    assert alarms[0]/300 > .25 and alarms[1]/300 < .16


def test_spreads():
    got = spreads([1., 3., 5., 7.], [0, 0, 1, 1])
    assert got == {"mean": 4, "sd_folds": pytest.approx(math.sqrt(8)), "sd_seeds": pytest.approx(math.sqrt(2)), "folds": 2,
                   "runs": 4}
    assert math.isnan(spreads([1., 2.], [0, 1])["sd_seeds"]) and math.isnan(spreads([1., 2.], [0, 0])["sd_folds"])
    with pytest.raises(BadInput, match="one fold a value"): spreads([1., 2.], [0])


@pytest.mark.parametrize("target", [.5, .9, .95, 1.])
def test_the_threshold_is_the_highest_that_reaches_its_target(target):
    y, p, who = cases(40)
    got = threshold_for(y, p, who, target)
    assert got["sensitivity"] == (p[y == 1, 1] >= got["threshold"]).mean() >= target
    assert (p[y == 1, 1] > got["threshold"]).mean() < target
    assert got["specificity"] == (p[y == 0, 1] < got["threshold"]).mean() and got["n"] == (y == 1).sum()


def test_a_threshold_by_patients():
    y, p, who = cases(40)
    got = threshold_for(y, p, who, .8, level="patient")
    means = {w: p[who == w, 1].mean() for w in np.unique(who) if w % 2}
    assert got["n"] == 20 and sum(m >= got["threshold"] for m in means.values()) == 16
    table = at_threshold(y, p, who, got, draws=100)
    assert table.value["sensitivity"] == .8 and table.n.tolist() == [20, 20, 40]


def test_a_fixed_threshold_on_other_patients():
    y, p, who = cases(40)
    fixed = threshold_for(*cases(40, seed=1), target=.9)
    table = at_threshold(y, p, who, fixed, draws=200)
    assert table.value["sensitivity"] == pytest.approx((p[y == 1, 1] >= fixed["threshold"]).mean())
    assert ((table.low <= table.value) & (table.value <= table.high)).all()
    half = at_threshold(y, p, who, fixed | {"threshold": .5}, draws=50)
    assert half.value["balanced_accuracy"] == pytest.approx(METRICS["balanced_accuracy"](y, p))


@pytest.mark.parametrize("change, says", [
    ({"target": 0}, "target=0"), ({"target": 1.2}, "target=1.2"), ({"level": "slide"}, "level='slide'"),
    ({"y": [0, 0]}, "no validation image is of class 1"), ({"p": [[.2, .3, .5]]*2}, "3 columns"),
    ({"patients": ["a", "a"], "level": "patient"}, "bears both labels"),
])
def test_thresholds_that_are_refused(change, says):
    with pytest.raises(BadInput, match=says):
        threshold_for(**{"y": [0, 1], "p": [[.6, .4], [.2, .8]], "patients": ["a", "b"], **change})


def test_coverage_and_risk_by_hand():
    y, p = [0, 0, 1, 1], [[.9, .1], [.8, .2], [.8, .2], [.4, .6]]
    curve = coverage_risk(y, p)
    assert curve.coverage.tolist() == [.25, .75, 1] and curve.risk.tolist() == pytest.approx([0, 1/3, 1/4])
    assert curve.images.tolist() == [1, 3, 4] and aurc(curve) == pytest.approx(.5/3 + .25/4)


def test_coverage_does_not_depend_on_order():
    y, p, _ = cases()
    p, order = p.round(1), np.random.default_rng(0).permutation(len(y))
    assert np.allclose(coverage_risk(y, p), coverage_risk(y[order], p[order]))
    assert coverage_risk(y, p).risk.iloc[-1] == pytest.approx(1 - image_accuracy(y, p))
    with pytest.raises(BadInput, match="confidence has shape"): coverage_risk(y, p, confidence=[1.])


def test_bootstrap_of_a_metric_of_ones_own():
    y, p, who = cases()
    lowest = lambda y, p, patients: min(patient_scores(y, p, patients).values())
    assert paired(lowest, y, p, p, who, draws=20)["low"] == 0
