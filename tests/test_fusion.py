"""What every fusion rule must keep, what its numbers are by other means, and what `fuse` refuses."""
import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch

from kdnb import fusion
from kdnb.core import BadInput
from kdnb.fusion import RULES, aekd, fuse, integrator, needs, same_classes, shortest, try_rules, without_labels
from kdnb.losses import TAU, hard_ce, kd_loss, logit_direction, soft_kl, soften

Z = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
SCORES, LABELS = [.9, .8, .7], [0, 1, 2, 3, 0, 1]
NAMES = ("mean", "accuracy", "softmax", "rank", "single", "confident", "entropy", "vote", "correct", "best", "camkd",
         "aekd", "logit_mean", "geometric", "classmax")


@pytest.fixture
def rules():
    "A place for one's own rules."
    kept = dict(RULES)
    yield RULES
    RULES.clear()
    RULES.update(kept)


def test_the_rules_are_there():
    assert set(NAMES) <= RULES.keys()
    assert {n for n in NAMES if "labels" in needs(n)} == {"correct", "best", "camkd"}
    assert {n for n in NAMES if "scores" in needs(n)} == {"accuracy", "softmax", "rank", "single", "geometric"}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("temperature", [1., TAU])
def test_every_rule(name, temperature):
    turn = lambda order: fuse(Z[order], name, [SCORES[m] for m in order], LABELS, temperature=temperature)
    q, w = turn([0, 1, 2])
    assert q.shape == (6, 4) and (q >= 0).all() and not q.requires_grad
    torch.testing.assert_close(q.sum(1), torch.ones(6, dtype=q.dtype))
    torch.testing.assert_close(w.sum(0), torch.ones_like(w.sum(0)))
    torch.testing.assert_close(turn([2, 0, 1])[0], q)
    torch.testing.assert_close(turn([1])[0], soften(Z[1], temperature))
    torch.testing.assert_close(fuse([Z[0]] * 3, name, SCORES, LABELS, temperature=temperature)[0],
                               soften(Z[0], temperature))


@pytest.mark.parametrize("name", RULES)
def test_class_names_do_not_matter(name):
    "Classes in another order, labels with them: the same target in that order."
    order = torch.tensor([2, 0, 3, 1])
    q, w = fuse(Z, name, SCORES, LABELS)
    moved = fuse(Z[..., order], name, SCORES, order.argsort()[LABELS])
    torch.testing.assert_close(moved[0], q[:, order])
    torch.testing.assert_close(moved[1], w)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("z", [
    torch.zeros(3, 2, 2), torch.tensor([[[80., -80.]], [[-80., 80.]], [[80., -80.]]]).repeat(1, 2, 1),
    torch.full((4, 2, 3), 1e4), torch.tensor([[[1e4, 0.]] * 2, [[0., 1e4]] * 2]),
], ids=["nothing", "sure", "large", "opposed"])
def test_extremes(name, z):
    "Teachers that say nothing, or are surer than a float can tell, still give targets."
    q, w = fuse(z, name, [.9, .8, .5, .4][:len(z)], [0, 1])
    torch.testing.assert_close(q.sum(1), torch.ones(2))
    torch.testing.assert_close(w.sum(0), torch.ones_like(w.sum(0)))


# ---- numbers by other means

def of_scores(f): return lambda p, a, y, tau: f(np.array(a))
def own(p, tau): return p**tau / (p**tau).sum(-1, keepdims=True)  # the same answers at temperature 1


def first(x): return np.eye(len(x))[x.argmax(0)].T


def entropies(p, a, y, tau):
    h = np.array([[-sum(v * math.log(v) for v in row) for row in m] for m in own(p, tau)])
    return (1 - h / h.sum(0)) / (len(h) - 1)


def votes(p, a, y, tau):
    said = p.argmax(-1)
    out = np.zeros(said.shape)
    for n, column in enumerate(said.T.tolist()):
        winners = [c for c in column if column.count(c) == max(map(column.count, column))]
        out[:, n] = [c in winners for c in column]
    return out / out.sum(0)


def rights(p, a, y, tau):
    hit = p.argmax(-1) == np.array(y)
    return np.where(hit.any(0), hit / np.maximum(hit.sum(0), 1), 1 / len(p))


def camkds(p, a, y, tau):
    inverse = 1 / own(p, tau)[:, range(len(y)), y]
    return (1 - inverse / inverse.sum(0)) / (len(p) - 1)


def enumerated(gram, bound):
    "Every choice of teachers at 0, at the bound and between, solved; the least of those allowed."
    found = []
    for state in map(np.array, itertools.product((0, 1, 2), repeat=len(gram))):
        w, free = np.where(state == 1, bound, 0.), state == 2
        if k := free.sum():
            kkt = np.block([[gram[np.ix_(free, free)], np.ones((k, 1))], [np.ones((1, k)), np.zeros((1, 1))]])
            w[free] = np.linalg.solve(kkt, np.r_[-gram[np.ix_(free, ~free)] @ w[~free], 1 - w.sum()])[:-1]
        if abs(w.sum() - 1) < 1e-9 and -1e-12 < w.min() and w.max() < bound + 1e-12: found.append((w @ gram @ w, *w))
    return np.array(min(found)[1:])


def ridged(g):
    gram = np.asarray(g) @ np.asarray(g).T
    return gram / gram.trace() * len(gram) + fusion.RIDGE * np.eye(len(gram))


HAND = {
    "mean": of_scores(lambda a: np.ones(3) / 3), "accuracy": of_scores(lambda a: a**4 / (a**4).sum()),
    "softmax": of_scores(lambda a: np.exp(4 * a) / np.exp(4 * a).sum()),
    "rank": of_scores(lambda a: a * 0 + [.5, 1/3, 1/6]),
    "single": of_scores(lambda a: np.array([1, 0, 0])), "entropy": entropies, "vote": votes, "correct": rights,
    "confident": lambda p, a, y, tau: first(own(p, tau).max(-1)), "camkd": camkds,
    "best": lambda p, a, y, tau: first(own(p, tau)[:, range(len(y)), y]),
    "aekd": lambda p, a, y, tau: enumerated(ridged((p - 1 / p.shape[-1]).reshape(len(p), -1)), fusion.BOUND),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tau", [1., TAU])
def test_numbers_by_numpy(name, tau):
    p = np.exp(Z.numpy() / tau)
    p /= p.sum(-1, keepdims=True)
    said = [x.numpy() for x in fuse(Z, name, SCORES, LABELS, temperature=tau)]
    a = np.array(SCORES)**4 / (np.array(SCORES)**4).sum()
    scaled = lambda q: q / q.sum(-1, keepdims=True)
    if name in HAND:
        w = HAND[name](p, SCORES, LABELS, tau)
        q = np.einsum("mn,mnc->nc", np.broadcast_to(w.reshape(3, -1), (3, 6)), p)
    elif name == "classmax":
        q = scaled(p.max(0))
        w = np.array([[sum(q[n, c] for c in range(4) if p[:, n, c].argmax() == m) for n in range(6)] for m in range(3)])
    else:
        w = a if name == "geometric" else np.ones(3) / 3
        q = scaled(np.prod([v**k for v, k in zip(p, w, strict=True)], axis=0))
    np.testing.assert_allclose(said[1], w, atol=1e-9)
    np.testing.assert_allclose(said[0], q, atol=1e-9)


POWERS = np.array([.6561, .4096, .2401]) / 1.3058  # of .9, .8 and .7, to the fourth
EXPONENTIALS = np.array([1, .670320, .449329]) / 2.119649  # 1, e^-.4, e^-.8
DOUBTS = np.array([.500402, .673012, .610864]) / 1.784278  # -.8 ln .8 - .2 ln .2 = .500402, and so on


@pytest.mark.parametrize(("name", "w", "truth"), [
    ("mean", [1/3, 1/3, 1/3], 1.7/3), ("accuracy", POWERS, .84267/1.3058), ("softmax", EXPONENTIALS, 1.336991/2.119649),
    ("rank", [1/2, 1/3, 1/6], .65), ("single", [1, 0, 0], .8), ("confident", [1, 0, 0], .8),
    ("entropy", (1 - DOUBTS) / 2, .573309), ("vote", [.5, .5, 0], .7), ("correct", [.5, .5, 0], .7),
    ("best", [1, 0, 0], .8), ("camkd", [.4, 11/30, 7/30], .61), ("aekd", [4/19, 6/19, 9/19], .5),
    ("logit_mean", [1/3, 1/3, 1/3], .144**(1/3) / (.144**(1/3) + .056**(1/3))),
    ("geometric", POWERS, 1 / (1 + (.25**.6561 * (2/3)**.4096 * (7/3)**.2401)**(1/1.3058))),
    ("classmax", [8/15, 0, 7/15], 8/15),
])
def test_frozen(name, w, truth):
    "Three teachers give the true class .8, .6 and .3: what each rule makes of them, worked on paper."
    z = torch.tensor([[[.8, .2]], [[.6, .4]], [[.3, .7]]], dtype=torch.float64).log()
    q, weights = fuse(z, name, SCORES, [0], temperature=1.)
    np.testing.assert_allclose(weights.reshape(3), w, atol=2e-6)
    assert q[0, 0].item() == pytest.approx(truth, abs=2e-6)


@pytest.mark.parametrize("kind", ["random", "alike", "twins", "loud"])
@pytest.mark.parametrize("bound", [.21, .34, .6, 1.])
def test_shortest_pull(kind, bound):
    g = np.random.default_rng(0)
    for teachers in (2, 3, 5):
        pulls = g.normal(size=(teachers, 30))
        if kind == "alike": pulls = pulls[:1] + 1e-3 * pulls
        if kind == "twins": pulls[1] = pulls[0]
        if kind == "loud": pulls[0] *= 100
        w = shortest(pulls, bound)
        assert w.sum() == pytest.approx(1) and w.min() >= 0 and w.max() <= max(bound, 1 / teachers) + 1e-9
        if bound * teachers > 1: np.testing.assert_allclose(w, enumerated(ridged(pulls), bound), atol=1e-8)


# ---- limits

def test_gamma():
    mean = fuse(Z, "mean")[0]
    for name, limit in (("accuracy", mean), ("softmax", mean), ("geometric", fuse(Z, "logit_mean")[0])):
        torch.testing.assert_close(fuse(Z, name, SCORES, gamma=0)[0], limit)
        torch.testing.assert_close(fuse(Z, name, SCORES, gamma=1e5)[0], soften(Z[0]))
    torch.testing.assert_close(fuse(Z, scores=[.5, 0, .5])[1], torch.tensor([.5, 0, .5], dtype=Z.dtype))


def test_ties_are_shared():
    half = torch.tensor([.5, .5, 0], dtype=Z.dtype)
    assert torch.equal(fuse(Z, "single", [.8, .8, .7])[1], half)
    torch.testing.assert_close(fuse(Z, "rank", [.8, .8, .7])[1], torch.tensor([2.5, 2.5, 1], dtype=Z.dtype) / 6)
    torch.testing.assert_close(fuse(Z[[0, 0, 1]], "best", labels=LABELS)[1].sum(0), torch.ones(6, dtype=Z.dtype))


def test_aekd_bounds_and_students():
    mean = fuse(Z, "mean")[0]
    assert torch.equal(fuse(Z, partial(aekd, bound=1/3))[0], mean)
    assert torch.equal(fuse(Z, partial(aekd, bound=.1))[0], mean)  # no weights sum to one below 1/M
    assert torch.equal(fuse(Z, "aekd", student=Z.mean(0) * 0)[1], fuse(Z, "aekd")[1])
    w = fuse(Z, partial(aekd, bound=1.), student=Z[1])[1]  # who is already followed pulls no more
    torch.testing.assert_close(w, torch.tensor([0, 1, 0], dtype=Z.dtype), atol=1e-5, rtol=0)
    with pytest.raises(BadInput, match="bound=0"): fuse(Z, partial(aekd, bound=0))
    with pytest.raises(BadInput, match="student logits"): fuse(Z, "aekd", student=Z[0, :2])
    with pytest.raises(BadInput, match="NaN"): fuse(Z, "aekd", student=Z[0] * torch.nan)


def test_pull_of_all_is_pull_of_fused():
    q, w = fuse(Z, scores=SCORES)
    z_s = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=Z.dtype).requires_grad_()
    each = sum(a * soft_kl(z_s, soften(z)) for a, z in zip(w, Z, strict=True))
    pulls = [torch.autograd.grad(loss, z_s)[0] for loss in (each, soft_kl(z_s, q))]
    torch.testing.assert_close(*pulls, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "total"), [("mean", 1), ("accuracy", 1), ("entropy", 2/3), ("camkd", 1/3)])
def test_as_published(name, total):
    "Only the sum of the weights is another; the target is not."
    ours, theirs = (fuse(Z, name, SCORES, LABELS, as_published=p) for p in (False, True))
    assert torch.equal(ours[0], theirs[0]) and fusion.published_scale(name, 3) == pytest.approx(total)
    torch.testing.assert_close(theirs[1], ours[1] * total)
    if total == 1: return
    with pytest.raises(BadInput, match="two and more"): fuse(Z[:1], name, labels=LABELS, as_published=True)


def test_published_entropy_weights():
    "As that code writes them: one minus the share, over the number of teachers."
    h = torch.special.entr(Z.softmax(-1)).sum(-1)
    torch.testing.assert_close(fuse(Z, "entropy", as_published=True)[1], (1 - h / h.sum(0)) / 3)


def test_a_partial_bears_the_marks_of_its_rule():
    "Needs, published scale and name, however often it is wrapped."
    weighted, labelled = partial(fusion.accuracy), partial(partial(fusion.camkd))
    assert needs(weighted) == ("scores",) and needs(labelled) == ("labels",) and without_labels(labelled) == "mean"
    assert fusion.published_scale(labelled, 3) == pytest.approx(1/3) and fusion.rule_name(labelled) == "camkd"
    with pytest.raises(BadInput, match="'accuracy' needs scores"): fuse(Z, weighted)
    with pytest.raises(BadInput, match="'camkd' needs labels"): fuse(Z, labelled)
    with pytest.raises(BadInput, match="'camkd' divides"): fuse(Z[:1], labelled, labels=LABELS, as_published=True)
    ours, theirs = (fuse(Z, r, labels=LABELS, as_published=True) for r in ("camkd", labelled))
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


# ---- who shouts

def test_tempered():
    z = fusion.tempered(Z, [1., 2., .5])
    assert torch.equal(z, torch.stack([Z[0], Z[1]/2, Z[2]*2])) and torch.equal(fusion.tempered(list(Z), [1]*3), Z)
    with pytest.raises(BadInput, match="2 temperatures for 3 teachers"): fusion.tempered(Z, [1, 2])
    with pytest.raises(BadInput, match="temperature=0"): fusion.tempered(Z, [1, 0, 1])
    assert [fusion.spoken(r) for r in ("entropy calibrated", "mean")] == [("entropy", True), ("mean", False)]


@pytest.mark.parametrize("name", ["confident", "entropy"])
def test_a_loud_teacher_is_heard_less_once_calibrated(name):
    "The second teacher is the first, six times as loud: at its temperature both say the same."
    z = torch.stack([Z[0], 6*Z[0]])
    shares = [fuse(v, name)[1][1].mean() for v in (z, fusion.tempered(z, [1, 6]))]
    assert shares[0] > .7 and shares[1] == pytest.approx(.5)


# ---- choosing

def test_rules_are_tried_without_labels(rules):
    rules["mine"] = lambda t: t.p.amax(-1)
    y = Z[0].argmax(-1)
    tried = try_rules(Z, y, SCORES)
    assert tried.keys() == {*NAMES, "mine"} - {"correct", "best", "camkd"}
    assert tried["single"] == {"accuracy": 1., "log_loss": pytest.approx(hard_ce(Z[0], y).item())}
    assert "accuracy" not in try_rules(Z, y) and "mean" in try_rules(Z, y)
    assert [without_labels(n) for n in ("camkd", "aekd", "accuracy")] == ["mean", "aekd", "accuracy"]


# ---- what comes in

def test_inputs_come_in_many_forms():
    q, _ = fuse(Z, scores=SCORES)
    for z in (list(Z), Z.numpy(), Z.clone().requires_grad_()):
        assert torch.equal(fuse(z, scores=torch.tensor(SCORES, dtype=Z.dtype))[0], q)
    assert all(fuse(Z.half(), n, SCORES, np.array(LABELS))[0].dtype == torch.float32 for n in RULES)


def test_same_classes():
    class Taught:
        card = {"net": "resnet18", "classes": ["a", "b", "c"]}

    assert same_classes([Taught(), Taught.card, ("a", "b", "c")]) == ("a", "b", "c")
    for other, says in [
        (["c", "a", "b"], r"teacher 1 .* c, a, b; .*z\[:, \[1, 2, 0\]\]"), (["a", "b"], "tells apart a, b; .*a, b, c$"),
        ({"net": "x"}, "classes=None"), ({"classes": 3}, "classes=3"), (["a", "a", "b"], "different class names"),
    ]:
        with pytest.raises(BadInput, match=says): same_classes([Taught(), other])
    with pytest.raises(BadInput, match="no teachers were passed"): same_classes([])


def test_own_rules(rules):
    per_image = lambda t: t.p.amax(-1)
    rules["mine"] = per_image
    q, w = fuse(Z, "mine")
    assert w.shape == (3, 6) and torch.equal(fuse(Z, per_image)[0], q)

    @integrator("labelled", "labels", "scores")
    def labelled(t): return (t.z.argmax(-1) == t.labels) + 1e-9

    assert needs("labelled") == ("labels", "scores") and needs("mean") == ()
    with pytest.raises(BadInput, match="'labelled' needs labels"): fuse(Z, "labelled", SCORES)
    with pytest.raises(BadInput, match="labels hold 4"): fuse(Z, "labelled", SCORES, [4] * 6)
    with pytest.raises(BadInput, match="labels are"): fuse(Z, "labelled", SCORES, [0])
    with pytest.raises(BadInput, match="not one class index"): fuse(Z, "labelled", SCORES, [0, None, 1, 2, 3, 0])


@pytest.mark.parametrize("name", ["correct", "best", "camkd"])
def test_unlabelled_shots_are_refused(name):
    with pytest.raises(BadInput, match=f"'{name}' needs labels"): fuse(Z, name, SCORES)
    with pytest.raises(BadInput, match="labels hold -1"): fuse(Z, name, SCORES, [0, -1, 1, 2, 3, 0])


@pytest.mark.parametrize(("own", "says"), [
    (lambda t: torch.ones(5), r"returned weights \(5,\)"),
    (lambda t: -torch.ones(3), "negative"),
    (lambda t: torch.zeros(3, 6), "all 0"),
    (lambda t: (t.z.mean(0), torch.ones(3)), "were logits passed"),
    (lambda t: (t.p[0, :2], torch.ones(3)), "differ in shape"),
    (lambda t: None, "returned NoneType; accepted are weights"),
    (lambda t: (t.p[0], torch.ones(3), 1), "returned Tensor, Tensor, int"),
    (lambda t: "mean", "returned str"), (lambda t: ("mean", torch.ones(3)), "returned str, Tensor"),
    (lambda t: (t.p[0], None), "returned Tensor, NoneType"), (lambda t: ["a", "b", "c"], "weights that are no numbers"),
])
def test_own_rules_that_are_wrong(own, says):
    with pytest.raises(BadInput, match=says): fuse(Z, own)


@pytest.mark.parametrize(("passed", "says"), [
    (dict(rule="acuracy"), "Did you mean 'accuracy'"),
    (dict(), "needs scores"),
    (dict(scores=[.9, .8]), r"scores have shape \(2,\)"),
    (dict(scores=[90, 80, 70]), r"scores=\[90.0, 80.0, 70.0\]"),
    (dict(scores=[.9, float("nan"), .7]), "nan"),
    (dict(scores=[.9, None, .7]), "None"),
    (dict(scores=[0, 0, 0]), "all 0"),
    (dict(scores=SCORES, gamma=-1), "gamma=-1"), (dict(scores=SCORES, gamma=True), "gamma=True"),
    (dict(rule=partial(aekd, bound=True)), "bound=True"),
    (dict(logits="abc", rule="mean"), "logits hold str"), (dict(logits=None, rule="mean"), "logits hold NoneType"),
    (dict(logits=[Z[0], None], rule="mean"), r"logits hold NoneType; accepted are numbers of shape \(teachers"),
    (dict(logits=Z + 0j, rule="mean"), "logits hold torch.complex128"),
    (dict(scores=SCORES, temperature=0), "temperature=0"),
    (dict(logits=Z[0], rule="mean"), r"shape \(6, 4\)"),
    (dict(logits=Z[:0], rule="mean"), r"shape \(0, 6, 4\)"),
    (dict(logits=[Z[0], Z[1, :, :2]], rule="mean"), r"\(6, 4\), \(6, 2\)"),
    (dict(logits=torch.stack([Z[0], Z[1] * torch.nan]), rule="mean"), "teacher 1 .*NaN"),
])
def test_refused(passed, says):
    with pytest.raises(BadInput, match=says): fuse(**{"logits": Z, **passed})


def test_losses_refuse():
    z, q = Z[0], soften(Z[0])
    for call, says in [
        (lambda: soft_kl(z, q[:1]), "differ in shape"), (lambda: soft_kl(z, q, tau=-1), "tau=-1"),
        (lambda: hard_ce(z, torch.zeros(6)), "labels are torch.float32"),
        (lambda: kd_loss(z, q, alpha=.5), "needs labels"),
        (lambda: kd_loss(z, q, alpha=1.5), "alpha=1.5"), (lambda: logit_direction(z, z[:1]), "differ in shape"),
    ]:
        with pytest.raises(BadInput, match=says): call()
    assert soft_kl(z, torch.eye(4, dtype=z.dtype)[LABELS]).isfinite()
    with pytest.warns(UserWarning, match="two classes"): logit_direction(z[:, :2], z[:, :2])
