"Every loss by other means and against references; every method on one small lesson: learns, repeats, resumes."
import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kdnb import distillers, losses, train
from kdnb.core import BadInput
from kdnb.distillers import FAMILIES, catalogue, make_lesson, study
from kdnb.features import beside, counterparts, put_head_back
from kdnb.grafting import Lesson
from kdnb.methods import METHODS, ROOMS, family, find_method, lacks
from kdnb.nets import build, freeze, normalise
from kdnb.teacher import FUSION_SCORE, HOST_SCORE, Teacher
from kdnb.train import generator, predict

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- losses: a fixed toy, frozen values, and the same numbers from numpy

Z_S = torch.tensor([[1., .5, -1.], [0., 2., 1.], [.3, -.4, 1.2], [2., 1.9, 0.]], dtype=torch.float64)
Z_T = torch.tensor([[2., 0., -1.], [.5, 1.5, 1.], [-.2, .1, 2.], [1., 2.5, .3]], dtype=torch.float64)
Y, Q = torch.tensor([0, 1, 2, 0]), losses.soften(Z_T)
F_S = torch.tensor([[1., 2., 0., -1.], [.5, .5, 1., 3.], [-2., 0., 1., 1.], [0., 1., 2., -1.]]).double().view(2, 2, 2, 2)
F_T = torch.tensor([[0., 1., 1., 2.], [3., -1., 0., .5], [1., 1., -1., 0.], [2., 0., .5, 1.]]).double().view(2, 2, 2, 2)
E_S = torch.tensor([[0., 0.], [3., 4.], [6., 0.], [1., 1.]], dtype=torch.float64)
E_T = torch.tensor([[1., 0.], [0., 2.], [2., 2.], [-1., 1.]], dtype=torch.float64)


def ours():
    "Every loss of the room on the toy."
    return {
        "soften": losses.soften(Z_S)[0], "soft_kl": losses.soft_kl(Z_S, Q), "hard_ce": losses.hard_ce(Z_S, Y),
        "kd_loss": losses.kd_loss(Z_S, Q, Y, alpha=.7), "logit_direction": losses.logit_direction(Z_S, Z_T),
        "block_mse": losses.block_mse(F_S, F_T), "attention": losses.attention(F_S)[0],
        "attention_gap": losses.attention_gap(F_S, F_T), "distances": losses.distances(E_S)[0],
        "distance_gap": losses.distance_gap(E_S, E_T), "angles": losses.angles(E_S)[0, 1],
        "angle_gap": losses.angle_gap(E_S, E_T), "decoupled_kl": losses.decoupled_kl(Z_S, Q),
        "decoupled_kl, labels": losses.decoupled_kl(Z_S, Q, Y, 2., weight=torch.tensor([2., 1., 1., 0.])),
        "gap_weights": losses.gap_weights(E_S[1:], E_T[1:]),
    }


FROZEN = {
    "soften": [0.401763329, 0.354554894, 0.243681777],
    "soft_kl": 0.176173669,
    "hard_ce": 0.537719597,
    "kd_loss": 0.284637447,
    "logit_direction": 0.183547373,
    "block_mse": 3.375,
    "attention": [0.113812863, 0.386963736, 0.091050291, 0.910502907],
    "attention_gap": 0.157126462,
    "distances": [0.0, 1.148598633, 1.37831836, 0.324872753],
    "distance_gap": 0.04914553,
    "angles": [0.0, 1.0, 0.6, 0.989949494],
    "angle_gap": 0.087967998,
    "decoupled_kl": 0.908053714,
    "decoupled_kl, labels": 0.832287485,
    "gap_weights": [0.67473056, 0.816526043, 1.508743398],
}


def huber(a): return np.where(np.abs(a) < 1, a**2/2, np.abs(a) - .5).mean()


def softmax(z): return np.exp(z)/np.exp(z).sum(-1, keepdims=True)


def unit(v): return v/np.maximum(np.sqrt((v**2).sum(-1, keepdims=True)), 1e-12)


def by_numpy():
    "The same by loops and formulas, without torch."
    z_s, z_t, y, q, f_s, f_t, e_s, e_t = (v.numpy() for v in (Z_S, Z_T, Y, Q, F_S, F_T, E_S, E_T))
    kl = lambda q, p: sum(a*np.log(a/b) for a, b in zip(q, p, strict=True))
    soft = 16*np.mean([kl(a, b) for a, b in zip(q, softmax(z_s/4), strict=True)])
    hard = -np.log(softmax(z_s)[range(4), y]).mean()
    look = lambda f: unit((f**2).mean(1).reshape(len(f), -1))

    def far(e):
        d = np.array([[np.linalg.norm(a - b) for b in e] for a in e])
        return d/d[~np.eye(len(e), dtype=bool)].mean()

    def bent(e):
        n = range(len(e))
        return np.array([[[unit(e[i] - e[j]) @ unit(e[k] - e[j]) for k in n] for i in n] for j in n])

    def parts(z, q, c, tau):
        p, rest = softmax(z/tau), [k for k in range(3) if k != c]
        inside = kl(q[rest]/q[rest].sum(), p[rest]/p[rest].sum())
        return tau**2*(kl([q[c], 1 - q[c]], [p[c], 1 - p[c]]) + 8*inside)

    apart = np.linalg.norm(unit(e_s[1:]) - unit(e_t[1:]), axis=1)
    weighed = [w*parts(z, t, c, 2.) for z, t, c, w in zip(z_s, q, y, [2, 1, 1, 0], strict=True)]
    return {
        "soften": softmax(z_s/4)[0], "soft_kl": soft, "hard_ce": hard, "kd_loss": .7*soft + .3*hard,
        "logit_direction": ((unit(z_s) - unit(z_t))**2).sum(1).mean(), "block_mse": ((f_s - f_t)**2).mean(),
        "attention": look(f_s)[0], "attention_gap": ((look(f_s) - look(f_t))**2).mean(), "distances": far(e_s)[0],
        "distance_gap": huber(far(e_s) - far(e_t)), "angles": bent(e_s)[0, 1], "angle_gap": huber(bent(e_s) - bent(e_t)),
        "decoupled_kl": np.mean([parts(z, t, t.argmax(), 4.) for z, t in zip(z_s, q, strict=True)]),
        "decoupled_kl, labels": np.mean(weighed), "gap_weights": apart/apart.mean(),
    }


def test_no_loss_drifted():
    now = ours()
    assert now.keys() == FROZEN.keys()
    for name, value in FROZEN.items(): np.testing.assert_allclose(now[name], value, rtol=0, atol=1e-6, err_msg=name)


def test_losses_by_other_means():
    now, expected = ours(), by_numpy()
    assert now.keys() == expected.keys()
    for name, value in expected.items(): np.testing.assert_allclose(now[name], value, atol=1e-9, err_msg=name)


def test_every_loss_is_frozen():
    public = {n for n in losses.__all__ if n[0].islower()} - {"positive", "same_shape", "check_targets"}
    assert public == {n.split(",")[0] for n in FROZEN}


def test_losses_agree_with_timm():
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
    entropy = -(Q*Q.log()).sum(1).mean()
    assert torch.isclose(losses.soft_kl(Z_S, Q), 16*(SoftTargetCrossEntropy()(Z_S/4, Q) - entropy))
    assert torch.isclose(losses.hard_ce(Z_S, Y), LabelSmoothingCrossEntropy(0.)(Z_S, Y))


def test_losses_agree_with_torchdistill():
    theirs = pytest.importorskip("torchdistill.losses.mid_level", reason="torchdistill is not installed")
    said = lambda value: {"x": {"output": value}}
    at = theirs.ATLoss({"x": {s: {"path": "x", "io": "output"} for s in ("student", "teacher")}})
    assert torch.isclose(losses.attention_gap(F_S, F_T), at(said(F_S), said(F_T)))
    rkd = [theirs.RKDLoss("x", "x", *w, "mean")(said(E_S), said(E_T)) for w in ((1., 0.), (0., 1.))]
    assert torch.isclose(losses.distance_gap(E_S, E_T), rkd[0]) and torch.isclose(losses.angle_gap(E_S, E_T), rkd[1])
    kd = theirs.KDLoss("x", "output", "x", "output", temperature=4., alpha=0.)(said(Z_S), said(Z_T))
    assert torch.isclose(losses.soft_kl(Z_S, Q), 16*kd)


@pytest.mark.parametrize("loss, values", [
    (losses.attention_gap, (F_S, torch.zeros_like(F_T))), (losses.distance_gap, (torch.ones_like(E_S), E_T)),
    (losses.angle_gap, (torch.ones_like(E_S), E_T)), (losses.decoupled_kl, (Z_S, F.one_hot(Y, 3).double()))])
def test_no_gradient_is_lost(loss, values):
    "A block that is dead, embeddings that coincide, targets that are sure: gradients stay finite."
    given = values[0].clone().requires_grad_()
    loss(given, values[1]).backward()
    assert torch.isfinite(given.grad).all()


def test_losses_refuse_what_cannot_be_compared():
    with pytest.raises(BadInput, match="differ in shape"): losses.attention_gap(F_S, F_T[..., :1])
    with pytest.raises(BadInput, match="differ in shape"): losses.gap_weights(E_S, E_T[:, :1])


# ---- methods

STEPS, TRAINED = 26, sorted(set(METHODS) - {"scratch", "finetune"})


@pytest.fixture(scope="module")
def lesson(one_thread):
    "Noise that is dark or bright, a host that has looked at it, its soft targets, and no labels."
    views = torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8, generator=generator(0))
    views = (views.float()*torch.linspace(.1, 1, 32)[:, None, None, None]).byte()
    bright = views.float().mean((1, 2, 3))
    z = torch.stack([bright.mean() - bright, bright - bright.mean()], 1)/8
    host = build("resnet10t", 2, seed=0)
    optimiser, x = torch.optim.AdamW(host.train().parameters(), 2e-3), normalise(views, host.card)
    for _ in range(25):
        optimiser.zero_grad()
        losses.soft_kl(host(x), losses.soften(z)).backward()
        optimiser.step()
    host = freeze(host).eval()
    return Lesson(views, losses.soften(z), 4., host, lambda start: build("test_resnet", 2, seed=1), steps=STEPS, lr=3e-3)


def of(lesson, name):
    "The lesson as a method wants it: with labels only for those that need them."
    labels = lesson.targets.argmax(1) if "labels" in find_method(name).needs else None
    return replace(lesson, labels=labels)


def agreement(lesson, net):
    z = predict(net, lesson.views, lambda v: normalise(v, net.card))
    assert torch.isfinite(z).all()
    return (z.argmax(1) == lesson.targets.argmax(1)).float().mean().item()


@pytest.mark.parametrize("name", TRAINED)
def test_a_method_learns_repeats_and_resumes(lesson, name, tmp_path, monkeypatch):
    "Killed in the middle and asked again, it ends with the bits of an undisturbed run, which beats chance."
    before = copy.deepcopy(lesson.host.state_dict())
    calm = find_method(name)(of(lesson, name))
    floor = 0 if name in ("stage1", "netgraft") else .6  # blocks that never met owe nothing after so few steps
    assert agreement(lesson, calm.net) > floor and not calm.net.training and calm.splices == 0
    assert calm.net.card["mean"] == lesson.host.card["mean"]
    build("test_resnet", 2).load_state_dict(calm.net.state_dict(), strict=True)
    fits = calm.history.groupby("fit").step.max()
    assert np.isfinite(calm.history.loss).all() and (name == "fskd" or fits.sum() == STEPS)
    assert not any(m.training for m in lesson.host.modules())
    assert all(torch.equal(v, before[k]) for k, v in lesson.host.state_dict().items()), "the host is unchanged"

    advance, done = train.advance, []

    def dies(fit):
        if len(done) == 2*STEPS//3:
            fit.keep()
            raise KeyboardInterrupt
        done.append(fit.name)
        return advance(fit)

    kept = replace(of(lesson, name), folder=tmp_path)
    monkeypatch.setattr(train, "advance", dies)
    if name != "fskd":
        with pytest.raises(KeyboardInterrupt): find_method(name)(kept)
    monkeypatch.setattr(train, "advance", lambda fit: done.append(fit.name) or advance(fit))
    again = find_method(name)(kept).net.state_dict()
    assert all(torch.equal(v, again[k]) for k, v in calm.net.state_dict().items())
    assert len(done) == (0 if name == "fskd" else STEPS), "no step was taken twice"


@pytest.mark.parametrize("name", sorted(METHODS))
def test_methods_are_marked(lesson, name):
    f = find_method(name)
    assert f.__doc__ and f.source and family(name) in FAMILIES
    if "labels" in f.needs:
        assert "labelled shots" in lacks(name, "pretrained")
        with pytest.raises(BadInput, match="needs labelled shots"): f(lesson)
    else: assert lacks(name, "pretrained") is None


def test_families_follow_the_start():
    inherit = {n for n in METHODS if family(n) == "inherits"}
    assert {"copied_kd", "copied_finetune", "fskd", "mir"} <= inherit and not inherit & {"kd", "graft", "fitnet", "hard"}
    assert family("kd", "inherited") == family("graft", "inherited") == "inherits"
    assert family("hard", "inherited") == family("finetune", "inherited") == "own weights"
    assert set(catalogue().index.get_level_values(1)) == set(METHODS) and METHODS["scratch"] is METHODS["hard"]


def test_the_minimum_set_is_there():
    asked = {"graft", "graft_head", "stage1", "stage2", "hard", "scratch", "finetune", "copied_finetune", "copied_kd", "kd",
             "fitnet", "attention", "fskd", "mir", "dynamic", "interactive", "exits", "decoupled", "relation",
             "self_distil"}
    assert asked <= set(METHODS)


def test_finetune_starts_from_pretrained_weights(lesson):
    starts = []
    make = lambda start: starts.append(start) or lesson.make(start)
    find_method("finetune")(replace(of(lesson, "finetune"), make=make, steps=2))
    assert starts == ["pretrained"]


def test_all_methods_see_the_same_rows(lesson):
    seen = []
    for name in ("one", "other"):
        net = torch.nn.Linear(1, 1)
        look = lambda rows, net=net: seen.append(rows) or net.weight.square().sum()
        study(lesson, name, net, look, 5)
    assert all(torch.equal(a, b) for a, b in zip(seen[:5], seen[5:], strict=True)) and len(seen) == 10


@pytest.mark.parametrize("name", ["fitnet", "attention", "decoupled", "relation", "exits", "self_distil"])
def test_tokens_are_features_too(lesson, name):
    vit = lambda seed: build("test_vit", 2, seed=seed)
    taught = find_method(name)(replace(lesson, host=freeze(vit(0)).eval(), make=lambda start: vit(1), steps=2))
    assert np.isfinite(taught.history.loss).all()


@pytest.mark.parametrize("name", ["fitnet", "attention", "decoupled", "mir"])
def test_maps_of_other_sizes_are_met(lesson, name):
    "A network that does not pad gives maps a few places smaller."
    odd = replace(lesson, host=freeze(build("kdnb_squeezenet1_0", 2, seed=0)).eval(), steps=2,
                  views=F.interpolate(lesson.views, 64))
    if name == "mir":
        with pytest.raises(BadInput, match="SqueezeNet's and ResNet's"): find_method(name)(odd)
    else: assert np.isfinite(find_method(name)(odd).history.loss).all()


def test_the_head_put_back_is_the_hosts(lesson):
    pair = beside(lesson)
    wide = pair.widen(pair.boundaries[-1])
    with torch.no_grad(): pair.net.fc.weight.zero_()
    put_head_back(pair, wide)
    x = lesson.inputs(slice(20, 32))
    with torch.no_grad(): wanted = lesson.host.fc(wide(pair.net.eval().forward_features(x)).mean((2, 3)))
    assert torch.allclose(pair.net(x), wanted, atol=1e-5)


def test_counterparts_find_chosen_channels():
    y = torch.randn(70, 9, 3, 3, generator=generator(2))
    chosen = torch.tensor([7, 0, 4])
    assert counterparts(3*y[:, chosen] + 1 + .1*torch.randn(70, 3, 3, 3, generator=generator(3)), y).equal(chosen)
    tokens = y.flatten(2).mT
    assert counterparts(tokens[..., chosen], tokens).equal(chosen)


def test_fskd_of_a_copy_changes_no_feature(lesson):
    "A student that inherits everything is repaired by nothing: every block still says what the host says."
    same = replace(lesson, make=lambda start: build("resnet10t", 2, seed=3))
    taught = find_method("fskd")(same)
    x = lesson.inputs()
    with torch.no_grad(): f, g = taught.net.forward_features(x), lesson.host.forward_features(x)
    assert (f - g).square().mean() < .05*g.square().mean()
    assert agreement(lesson, taught.net) > .9


def test_teachers_of_another_order_of_classes_are_refused():
    card = {"net": "test_resnet", "classes": ["a", "b"], "valid": {HOST_SCORE: .6, FUSION_SCORE: .6}}
    net, shots = freeze(build("test_resnet", 2, seed=0)).eval(), torch.randint(256, (2, 3, 32, 32)).byte()
    teach = lambda *orders: make_lesson([Teacher(net, card | {"classes": o}, None) for o in orders], shots,
                                        lambda start: build("test_resnet", 2, seed=1), steps=1, lr=1e-3)
    assert len(teach(["a", "b"], ["a", "b"])[0].views) == 16
    with pytest.raises(BadInput, match=r"teacher 1 .* tells apart b, a; .* its logits fit as z\[:, \[1, 0\]\]"):
        teach(["a", "b"], ["b", "a"])


def test_the_room_of_all_methods():
    assert distillers.METHODS is METHODS and {f.__module__ for f in METHODS.values()} >= {r.__name__ for r in ROOMS}
