"""What every fusion rule must keep, and what `fuse` refuses."""
import pytest
import torch

from kdnb.core import BadInput
from kdnb.fusion import RULES, fuse, integrator, needs
from kdnb.losses import TAU, hard_ce, kd_loss, logit_direction, soft_kl, soften

Z = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
SCORES, LABELS = [.9, .8, .7], [0, 1, 2, 3, 0, 1]


@pytest.fixture
def rules():
    "A place for one's own rules."
    kept = dict(RULES)
    yield RULES
    RULES.clear()
    RULES.update(kept)


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


def test_gamma():
    mean = fuse(Z, "mean")[0]
    torch.testing.assert_close(fuse(Z, scores=SCORES, gamma=0)[0], mean)
    torch.testing.assert_close(fuse(Z, scores=SCORES, gamma=1e5)[0], soften(Z[0]))
    torch.testing.assert_close(fuse(Z, scores=[.5, 0, .5])[1], torch.tensor([.5, 0, .5], dtype=Z.dtype))


def test_pull_of_all_is_pull_of_fused():
    q, w = fuse(Z, scores=SCORES)
    z_s = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=Z.dtype).requires_grad_()
    each = sum(a * soft_kl(z_s, soften(z)) for a, z in zip(w, Z, strict=True))
    pulls = [torch.autograd.grad(loss, z_s)[0] for loss in (each, soft_kl(z_s, q))]
    torch.testing.assert_close(*pulls, rtol=0, atol=1e-12)


def test_inputs_come_in_many_forms():
    q, _ = fuse(Z, scores=SCORES)
    for z in (list(Z), Z.numpy(), Z.clone().requires_grad_()):
        assert torch.equal(fuse(z, scores=torch.tensor(SCORES, dtype=Z.dtype))[0], q)
    assert fuse(Z.half(), "mean")[0].dtype == torch.float32


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


@pytest.mark.parametrize(("own", "says"), [
    (lambda t: torch.ones(5), r"returned weights \(5,\)"),
    (lambda t: -torch.ones(3), "negative"),
    (lambda t: torch.zeros(3, 6), "all 0"),
    (lambda t: (t.z.mean(0), torch.ones(3)), "were logits passed"),
    (lambda t: (t.p[0, :2], torch.ones(3)), "differ in shape"),
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
    (dict(scores=SCORES, gamma=-1), "gamma=-1"),
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
