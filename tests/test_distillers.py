"Every loss by other means and against references; every method on one small lesson: learns, repeats, resumes."
import copy
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nbformat.v4 import new_code_cell, new_notebook

from kdnb import distillers, losses, neighbours, train
from kdnb.core import BadInput
from kdnb.distillers import FAMILIES, catalogue, make_lesson, study, to_targets, train_student
from kdnb.features import beside, counterparts, put_head_back
from kdnb.grafting import Lesson
from kdnb.methods import METHODS, ROOMS, SOURCES, family, find_method, lacks
from kdnb.neighbours import UNSEEN
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
        "gap_weights": losses.gap_weights(E_S[1:], E_T[1:]), "fed_back": losses.fed_back([Z_S, Z_T, 2*Z_S]),
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
    "fed_back": 0.315077643,
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
    said = [softmax(z/4) for z in (z_s, z_t, 2*z_s)]
    together = sum(said)/3
    weighed = [w*parts(z, t, c, 2.) for z, t, c, w in zip(z_s, q, y, [2, 1, 1, 0], strict=True)]
    return {
        "soften": softmax(z_s/4)[0], "soft_kl": soft, "hard_ce": hard, "kd_loss": .7*soft + .3*hard,
        "logit_direction": ((unit(z_s) - unit(z_t))**2).sum(1).mean(), "block_mse": ((f_s - f_t)**2).mean(),
        "attention": look(f_s)[0], "attention_gap": ((look(f_s) - look(f_t))**2).mean(), "distances": far(e_s)[0],
        "distance_gap": huber(far(e_s) - far(e_t)), "angles": bent(e_s)[0, 1], "angle_gap": huber(bent(e_s) - bent(e_t)),
        "decoupled_kl": np.mean([parts(z, t, t.argmax(), 4.) for z, t in zip(z_s, q, strict=True)]),
        "decoupled_kl, labels": np.mean(weighed), "gap_weights": apart/apart.mean(),
        "fed_back": 16*sum(np.mean([kl(a, b) for a, b in zip(together, p, strict=True)]) for p in said),
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
    for mark in f.source.split("; "):
        assert mark in ("A", "H", "R textbook") or mark.endswith(f"({UNSEEN})") or mark.removeprefix("R ") in SOURCES
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


def same_bits(one, other):
    return all(torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items())


@pytest.mark.parametrize("name", ["copied_finetune", "copied_kd"])
def test_copies_of_the_same_architecture_begin_as_the_host(lesson, name):
    idle = replace(of(lesson, name), make=lambda start: build("resnet10t", 2, seed=3))
    idle.steps = 0
    taught, x = find_method(name)(idle), lesson.inputs()
    assert torch.equal(taught.net(x), lesson.host(x)) and not torch.equal(idle.fresh()(x), lesson.host(x))


def test_a_tutor_that_stands_still_is_a_fixed_target(lesson, monkeypatch):
    "Bit by bit where no gradient is cut: the length that is cut to counts the tutor's gradient too."
    monkeypatch.setattr(neighbours, "TUTOR_RATE", 0.)
    monkeypatch.setattr(train, "CLIP", float("inf"))
    brief, host = replace(lesson, steps=4), copy.deepcopy(lesson.host).train()

    def both(z, rows):
        with torch.no_grad(): said = losses.soften(host(brief.inputs(rows)))
        return to_targets(brief)(z, rows) + losses.soft_kl(z, said)

    assert same_bits(find_method("dynamic")(brief).net, train_student(brief, "fixed", None, both).net)


@pytest.mark.parametrize("name, count", [("interactive", "ASSISTANTS"), ("exits", "EXITS")])
def test_nobody_beside_the_student_is_plain_distillation(lesson, name, count, monkeypatch):
    monkeypatch.setattr(neighbours, count, 0)
    alone, plain = (find_method(n)(replace(lesson, steps=4)).net for n in (name, "kd"))
    assert (alone(lesson.inputs()) - plain(lesson.inputs())).abs().max() < 1e-5


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


MINE = """
import kdnb.methods, kdnb.run
from kdnb.core import listed
p = kdnb.run.check_parameters(globals(), baselines=listed("baselines", kdnb.methods.METHODS))
import torch
from kdnb.grafting import Lesson
from kdnb.nets import build
from kdnb.results import new_record, save_record
x, q = torch.randint(256, (8, 3, 32, 32)).byte(), torch.full((8, 2), .5)
lesson = Lesson(x, q, 4., build("test_resnet", 2, seed=0).eval(), lambda s: build("test_resnet", 2), steps=2, lr=1e-3)
lost = {b: kdnb.methods.find_method(b)(lesson).history.loss.iloc[-1] for b in p.baselines}
rows = [dict(method=b, split="test", level="image", metric="nll", value=float(v), n=8) for b, v in lost.items()]
save_record(new_record("run_mine.ipynb", parameters={n: globals()[n] for n in vars(p)}, resolved=vars(p), data="d",
                       protocol="patients", source="synthetic", split="s", device="cpu", seconds=1., rows=rows))
"""


def test_a_method_of_ones_own_in_a_grid(root, tmp_path):
    "The notebook's last section, followed: its cell is exported, and its name stands in a grid."
    cells = nbformat.read(root/"nbs"/"70_distillers.ipynb", 4).cells
    own = next(c.source for c in cells if c.cell_type == "code" and "def logit_mse" in c.source)
    shutil.copytree(root/"kdnb", tmp_path/"kdnb", ignore=shutil.ignore_patterns("__pycache__"))
    with open(tmp_path/"kdnb"/"distillers.py", "a") as f: f.write("\n\n" + own)
    first = new_code_cell('baselines: str = "kd"  # methods', metadata={"tags": ["parameters"]})
    check, work = MINE.split("import torch", 1)
    spec = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    cells = [first, new_code_cell(check), new_code_cell("import torch" + work)]
    nbformat.write(new_notebook(cells=cells, metadata=spec), tmp_path/"run_mine.ipynb")
    (tmp_path/"grid.toml").write_text('notebook = "run_mine.ipynb"\n[axes]\nbaselines = ["kd,logit_mse"]\n')
    env = os.environ | {"PYTHONPATH": str(tmp_path), "KDNB_HOME": str(tmp_path/"home"), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", "import kdnb.grids as g; g.main()", "grid.toml"], cwd=tmp_path, env=env,
                         capture_output=True, text=True)
    records = [json.loads(f.read_text()) for f in (tmp_path/"home"/"results"/"runs").glob("*.json")]
    assert run.returncode == 0 and [r["method"] for r in records[0]["rows"]] == ["kd", "logit_mse"], run.stdout + run.stderr


def test_the_room_of_all_methods():
    assert distillers.METHODS is METHODS and {f.__module__ for f in METHODS.values()} >= {r.__name__ for r in ROOMS}
