"Published numbers are facts with a source, and are compared with ours only where that means something."
import math
from functools import cache

import numpy as np
import pandas as pd
import pytest

from kdnb.core import MAGS, BadInput
from kdnb.data import TASKS
from kdnb.metrics import METRICS
from kdnb.protocols import PROTOCOLS
from kdnb.reported import EVIDENCE, FACTS, check_reported, compare, fitting, over_folds, reported, z_score
from kdnb.results import new_record, record_rows

PRR = "patient_recognition_rate"


@cache
def one_row():
    asked = dict(mag="40X", task="binary", fold=0, seed=0)
    row = dict(method="graft", split="test", level="patient", metric=PRR, value=.8, n=26)
    return record_rows(new_record("run_toy.ipynb", parameters=asked, resolved=asked, rows=[row], source="breakhis", data="d",
                                  protocol="official5", split="s", code="c", device="cpu", seconds=1.))


def ours(values=(.80, .84, .88), metric=PRR, seeds=1, **fields):
    "Rows of a run for every fold and seed."
    many = enumerate(np.repeat(values, seeds))
    return pd.concat([one_row().assign(run=f"{metric}{fields}{i}", fold=i//seeds, seed=i % seeds, value=v, metric=metric, **fields)
                      for i, v in many])


@pytest.fixture(scope="module")
def facts(): return reported(recalled=True)


# ---- the file

def test_the_file_is_sound(facts):
    assert len(facts) > 300 and list(facts) == FACTS and set(facts.evidence) == set(EVIDENCE)
    ours = facts[facts.data == "breakhis"]
    assert set(ours.task) <= set(TASKS) and set(ours.mag) <= {*MAGS, "all", "mean", "range"}
    assert set(ours.protocol) <= {*PROTOCOLS, "patient-own", "unclear"} and "accession-cv" not in set(facts.protocol)
    assert (facts.to.isna() | (facts.to > facts.value)).all()
    assert not facts.isin(["X", "I"]).any(axis=None)


def test_names_of_ours_are_used_only_where_they_mean_ours(facts):
    known = set(METRICS) & set(facts.metric)
    assert known == {"image_accuracy", PRR, "patient_vote", "balanced_accuracy", "sensitivity", "specificity", "auroc", "mcc",
                     "brier"}
    assert set(facts.metric) - known == {"accuracy", "accuracy_gain", "ece_binning_unstated", "image_accuracy_locked_threshold",
                                         "sensitivity_threshold_unstated", "specificity_threshold_unstated"}


@pytest.mark.parametrize("where, value, sd, evidence", [
    (dict(method="PFTAS + QDA", mag="40X", metric=PRR), .838, .041, "P"),
    (dict(method="CLBP + SVM", mag="400X", metric=PRR), .728, .049, "P"),
    (dict(method="PFTAS + SVM", mag="100X", metric="balanced_accuracy"), .66, None, "V"),
    (dict(method="MIL-NP (Sudharshan 2019)", mag="200X", metric="image_accuracy"), .808, .028, "S"),
    (dict(method="EfficientNet-b2, MPCS-RP", mag="mean", metric=PRR), .922, None, "S"),
    (dict(method="UNI, frozen + linear head", metric="balanced_accuracy"), .785, None, "S"),
    (dict(method="CSDCNN (Han 2017)", mag="100X", metric="image_accuracy"), .939, None, "S"),
    (dict(method="NetGraft, VGG-16 half-width tail", data="cifar100", k=5), .6816, .002, "P"),
    (dict(method="MMKD"), .4415, None, "S"), (dict(method="MTKD-RL without dynamic, ResNet56"), .7551, None, "P"),
])
def test_single_numbers(where, value, sd, evidence):
    row, = reported(**where).to_dict("records")
    assert row["value"] == pytest.approx(value) and row["evidence"] == evidence
    assert row["sd"] == pytest.approx(sd) if sd else math.isnan(row["sd"])


def test_what_is_recalled_is_shown_on_request_only(facts):
    assert (facts.evidence == "M").sum() == 5 and not (reported().evidence == "M").any()
    assert reported(evidence="M").empty and len(reported(True, evidence="M")) == 5


def test_what_can_be_recomputed_is_right(facts):
    "Means over magnifications, and balanced accuracy from the two rates, agree with what is printed, but for two misprints."
    mags = facts[facts.mag.isin(MAGS)].groupby(["protocol", "method", "metric", "source"]).value.agg(["mean", "size"])
    mean = facts[facts.mag == "mean"].set_index(["protocol", "method", "metric", "source"]).value
    both = mags[mags["size"] == 4].join(mean, how="inner")
    assert len(both) > 20
    off = both[(both["mean"] - both.value).abs() > .0011]
    assert sorted(off.index.get_level_values("method")) == ["DenseNet (Nawaz 2018)", "RPDB"]
    rates = facts[(facts.method == "PFTAS + SVM") & facts.metric.isin(["sensitivity", "specificity"])].groupby("mag").value.mean()
    balanced = facts[(facts.method == "PFTAS + SVM") & (facts.metric == "balanced_accuracy")].set_index("mag").value
    assert (rates - balanced).abs().max() <= .0051


@pytest.mark.parametrize("change, says", [
    ({"source": None}, "line 3: no source"), ({"evidence": "X"}, "line 3: evidence='X'"), ({"value": 83.8}, "value=83.8"),
    ({"sd": -.1}, "sd=-0.1"), ({"sd": .1, "n": 1}, "over n=1"), ({"protocol": None}, "no protocol"),
])
def test_lines_that_are_refused(facts, change, says):
    two = facts[:2].reset_index(drop=True).astype({"n": float})
    for column, value in change.items(): two.loc[1, column] = value
    with pytest.raises(BadInput, match=says): check_reported(two)


def test_files_that_are_refused(facts):
    with pytest.raises(BadInput, match="line 4: .*stands twice"): check_reported(pd.concat([facts[:2], facts[:1]], ignore_index=True))
    with pytest.raises(BadInput, match="columns are"): check_reported(facts.drop(columns="note"))
    with pytest.raises(BadInput, match="Did you mean 'metric'"): reported(metrik="auroc")
    with pytest.raises(BadInput, match="mag='300X'"): reported(mag="300X")


# ---- the rule

def test_z_by_hand():
    assert z_score(.84, .04, 3, .816, .03, 5) == pytest.approx(.024/math.sqrt(.0016/3 + .0009/5))
    assert math.isnan(z_score(.8, .1, 1, .8, .1, 5)) and math.isnan(z_score(.8, .1, 5, .8, .1, math.nan))
    assert z_score(.8, 0, 3, .8, 0, 3) == 0 and z_score(.8, 0, 3, .7, 0, 3) == math.inf


@pytest.mark.parametrize("value, word", [(.816, "consistent"), (.816 + .06, "inconsistent"), (.816 - .06, "inconsistent")])
def test_consistent_or_not(value, word):
    refs = reported(method="PFTAS + SVM", mag="40X", metric=PRR)
    row, = compare(ours((value - .01, value, value + .01)), refs).to_dict("records")
    assert row["word"] == word and row["difference"] == pytest.approx(value - .816) and (row["n"], row["n_theirs"]) == (3, 5)
    assert row["z"] == pytest.approx(z_score(value, .01, 3, .816, .03, 5), abs=1e-6)


def test_unverifiable():
    refs = reported(method="oracle over all 24", mag="40X")
    row, = compare(ours(), refs).to_dict("records")
    assert row["word"] == "unverifiable" and math.isnan(row["z"]) and row["difference"] == pytest.approx(-.16)
    row, = compare(ours((.8,)), reported(method="PFTAS + SVM", mag="40X", metric=PRR)).to_dict("records")
    assert (row["word"], row["why"]) == ("unverifiable", "ours is one fold")
    mixed = ours((.98, .99), "image_accuracy", protocol="image-random").assign(mag="all")
    ranges = compare(mixed, reported(protocol="image-random", task="binary", metric="image_accuracy"))
    assert set(ranges.word) == {"unverifiable"} and set(ranges.why) == {"a range was printed", "theirs has no spread, or no n"}


def test_the_interval_of_a_single_run_stands_beside_the_difference():
    one = ours((.8,)).assign(low=.7, high=.9)
    row, = compare(one, reported(method="oracle over all 24", mag="40X")).to_dict("records")
    assert (row["low"], row["high"]) == (.7, .9) and math.isnan(compare(ours(), reported(method="oracle over all 24", mag="40X")).low[0])


@pytest.mark.parametrize("rows, why", [
    (lambda: ours(metric="patient_vote"), f"no {PRR} at 40X of ours"), (lambda: ours().assign(mag="100X"), "at 40X of ours"),
    (lambda: ours(source="synthetic"), "synthetic images, not breakhis"), (lambda: ours(source="glas"), "glas, not breakhis"),
    (lambda: ours().assign(task="subtype"), "subtype, not binary"),
])
def test_not_comparable(rows, why):
    row, = compare(rows(), reported(method="PFTAS + SVM", mag="40X", metric=PRR)).to_dict("records")
    assert row["word"] == "not comparable" and why in row["why"] and math.isnan(row["z"]) and math.isnan(row["difference"])


@pytest.mark.parametrize("ours_under", [p for p in PROTOCOLS if p != "official5"])
def test_protocols_are_never_crossed(ours_under):
    with pytest.raises(BadInput, match=f"{ours_under}.*official5.*not compared"):
        compare(ours(protocol=ours_under), reported(protocol="official5"))
    with pytest.raises(BadInput, match="mix the protocols"):
        compare(pd.concat([ours(), ours(protocol=ours_under)]), reported(protocol="official5"))
    with pytest.raises(BadInput, match="not compared"): compare(ours(), reported())


def test_recalled_numbers_are_never_used():
    with pytest.raises(BadInput, match="recalled"): compare(ours(), reported(True, protocol="official5"))
    assert not (fitting(ours()).evidence == "M").any()


def test_seeds_are_averaged_within_folds():
    got = over_folds(ours((.8, .9), seeds=3)).to_dict("records")[0]
    assert (got["n"], got["runs"]) == (2, 6) and got["sd"] == pytest.approx(np.std([.8, .9], ddof=1))
    with pytest.raises(BadInput, match="no rows"): over_folds(ours(), split="valid")
    with pytest.raises(BadInput, match="mix preset="): over_folds(pd.concat([ours(), ours().assign(preset="paper", run="x")]))


def test_what_may_stand_beside_ours():
    assert fitting(ours(protocol="accession-cv")).empty and fitting(ours(source="synthetic")).empty
    got = fitting(ours())
    assert set(got.mag) == {"40X"} and set(got.metric) == {PRR} and set(got.protocol) == {"official5"}
    assert set(compare(ours(), got).word) <= {"consistent", "inconsistent", "unverifiable"}
