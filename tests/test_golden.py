"""Has a number drifted? Every loss, metric and fusion rule on one fixed toy, to 1e-6.

`python tests/test_golden.py` writes `golden.json` anew. A change of it is a change of the science: say why in the
changelog.
"""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from kdnb import fusion, losses, metrics

GOLDEN = Path(__file__).with_name("golden.json")
Z_S = torch.tensor([[1., .5, -1.], [0., 2., 1.], [.3, -.4, 1.2], [2., 1.9, 0.]], dtype=torch.float64)
Z_T = torch.tensor([[[2., 0., -1.], [.5, 1.5, 1.], [-.2, .1, 2.], [1., 2.5, .3]],
                    [[1., 1.2, .4], [-1., 3., 0.], [.6, .5, .4], [0., 1., .2]],
                    [[.1, 0., .3], [2., 1., -.5], [0., -1., 1.], [.7, .6, 1.]]], dtype=torch.float64)
Y, SCORES = torch.tensor([0, 1, 2, 0]), [.9, .8, .7]
P = np.array([[.6, .3, .1], [.3, .5, .2], [.2, .3, .5], [.1, .8, .1], [.3, .4, .3], [.2, .2, .6]])
Y_P, PATIENTS = np.array([0, 0, 0, 1, 1, 2]), list("aabccd")  # metrics need a few images more to tell themselves apart


def values() -> dict:
    "Every number that must not drift."
    q, f = losses.soften(Z_T[0]), Z_S.reshape(2, 2, 3, 1)
    two = P[:5, :2] / P[:5, :2].sum(1, keepdims=True)
    out = {
        "losses.soften": losses.soften(Z_S), "losses.soft_kl": losses.soft_kl(Z_S, q),
        "losses.soft_kl tau 1": losses.soft_kl(Z_S, losses.soften(Z_T[0], 1.), 1.),
        "losses.hard_ce": losses.hard_ce(Z_S, Y), "losses.kd_loss": losses.kd_loss(Z_S, q, Y, alpha=.7),
        "losses.logit_direction": losses.logit_direction(Z_S, Z_T[0]), "losses.block_mse": losses.block_mse(f, 2 * f),
        "losses.attention_gap": losses.attention_gap(f, f.flip(0)), "losses.gap_weights": losses.gap_weights(Z_S, Z_T[0]),
        "losses.distance_gap": losses.distance_gap(Z_S, Z_T[0]), "losses.angle_gap": losses.angle_gap(Z_S, Z_T[0]),
        "losses.decoupled_kl": losses.decoupled_kl(Z_S, q), "losses.fed_back": losses.fed_back([Z_S, *Z_T]),
        "metrics.agreement": metrics.agreement(P, P[::-1]), "metrics.auroc, two classes": metrics.auroc(Y_P[:5], two),
        "metrics.interval": metrics.interval("image_accuracy", Y_P, P, PATIENTS, draws=50),
    }
    out |= {f"metrics.{name}": value for name, value in metrics.score(Y_P, P, PATIENTS).items()}
    for name in fusion.RULES:
        fused = fusion.fuse(Z_T, name, scores=SCORES, labels=Y)
        out |= {f"fusion.{name} {what}": value for what, value in zip("qw", fused, strict=True)}
    return {name: np.asarray(value).round(12).tolist() for name, value in out.items()}


@pytest.fixture(scope="module")
def now(): return values()


def test_nothing_drifted(now):
    golden = json.loads(GOLDEN.read_text())
    assert now.keys() == golden.keys(), "a new term needs a line in golden.json: python tests/test_golden.py"
    for name, value in golden.items():
        np.testing.assert_allclose(now[name], value, rtol=0, atol=1e-6, err_msg=name)


def test_losses_by_other_means(now):
    "The same numbers from plain Python."
    soft = lambda z, tau: [math.exp(a / tau) / sum(math.exp(b / tau) for b in z) for a in z]
    kl = lambda q, p: sum(a * math.log(a / b) for a, b in zip(q, p, strict=True))
    pairs = list(zip(Z_S.tolist(), Z_T[0].tolist(), Y.tolist(), strict=True))
    by_kl = 16 * sum(kl(soft(t, 4), soft(s, 4)) for s, t, _ in pairs) / 4
    by_ce = -sum(math.log(soft(s, 1)[y]) for s, _, y in pairs) / 4
    cos = [sum(a * b for a, b in zip(s, t, strict=True)) / math.hypot(*s) / math.hypot(*t) for s, t, _ in pairs]
    expected = {"soft_kl": by_kl, "hard_ce": by_ce, "kd_loss": .7 * by_kl + .3 * by_ce,
                "logit_direction": sum(2 * (1 - c) for c in cos) / 4, "block_mse": Z_S.square().mean().item()}
    for name, value in expected.items(): assert now[f"losses.{name}"] == pytest.approx(value, abs=1e-9), name


def test_metrics_by_hand(now):
    "Predictions are 01 2 11 2 for labels 00 0 11 2, patients aa b cc d."
    by_hand = {"image_accuracy": 4/6, "balanced_accuracy": (1/3 + 1 + 1) / 3, "auroc": (7/9 + 7/8 + 1) / 3,
               "patient_recognition_rate": (1/2 + 0 + 1 + 1) / 4, "patient_vote": 3/4, "auroc, two classes": 4/6,
               "agreement": 2/6}
    for name, value in by_hand.items(): assert now[f"metrics.{name}"] == pytest.approx(value), name


def test_rules_by_hand(now):
    w = np.array([.9, .8, .7])**4
    np.testing.assert_allclose(now["fusion.accuracy w"], w / w.sum(), atol=1e-12)
    p = np.exp(Z_T.numpy() / 4) / np.exp(Z_T.numpy() / 4).sum(-1, keepdims=True)
    np.testing.assert_allclose(now["fusion.accuracy q"], np.einsum("m,mnc->nc", w / w.sum(), p), atol=1e-12)
    np.testing.assert_allclose(now["fusion.mean q"], p.mean(0), atol=1e-12)


if __name__ == "__main__":
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in values().items()]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
