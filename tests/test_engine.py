"The engine of grafting against a loop written out by hand, killed at every kind of step, on tokens and on refused pairs."
import copy
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from kdnb import grafting, train
from kdnb.core import BadInput
from kdnb.distillers import TRANSLATED, choose_host, distil, possible_hosts, starts
from kdnb.grafting import Graft, Lesson, graft_student, plan, prepare, train_span
from kdnb.losses import soften
from kdnb.nets import build, freeze, normalise, save_net, timm
from kdnb.students import Spliced, load_student, save_student
from kdnb.teacher import FUSION_SCORE, HOST_SCORE, Teacher
from kdnb.train import generator, step_rows

pytestmark = pytest.mark.usefixtures("one_thread")  # bits are compared


def spread(net):
    "Statistics, gains and shifts of BatchNorm that no fold can overlook."
    g = generator(1)
    for m in net.modules():
        if not isinstance(m, nn.BatchNorm2d): continue
        for t, low, high in ((m.running_mean, -.3, .3), (m.running_var, .5, 2), (m.weight, .5, 1.5), (m.bias, -.3, .3)):
            with torch.no_grad(): t.copy_(low + (high - low)*torch.rand(t.shape, generator=g))
    return net


def lesson_of(dtype=torch.float32, classes=2, steps=24, lr=1e-3, size=32, host=None, student="test_resnet", **options):
    host = host or freeze(spread(build("resnet10t", classes, seed=0)).to(dtype))
    views = torch.randint(0, 256, (20, 3, size, size), dtype=torch.uint8, generator=generator(3))
    x = normalise(views, host.card).to(dtype)
    return Lesson(views, soften(host(x)*2, 4.), 4., host, lambda start: build(student, classes, seed=1).to(dtype),
                  steps=steps, lr=lr, batch=8, options=options)


def wrapped(monkeypatch, see):
    "Let every step of every span be seen: `see(name of the fit, loss)` gives its loss."
    make, fits = grafting.span_loss, []
    span = grafting.train_span

    def named(graft, first, last, ground, steps, name, *args, **kwargs):
        fits.append(name)
        return span(graft, first, last, ground, steps, name, *args, **kwargs)

    def seen(*args, **kwargs):
        loss = make(*args, **kwargs)
        return lambda i: see(fits[-1], lambda: loss(i))

    monkeypatch.setattr(grafting, "span_loss", seen)
    monkeypatch.setattr(grafting, "train_span", named)
    return fits


def same_weights(a, b): return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


# ---- the loop written out

def readers(student):
    "What reads the map before each block of `test_resnet`, as one knows from its source."
    stage = lambda s: [s[0].conv1, *(m for m in s[0].downsample.modules() if isinstance(m, nn.Conv2d))]
    return {1: stage(student.layer2), 2: stage(student.layer3), 3: stage(student.layer4), 4: [student.fc]}


@torch.no_grad()
def meet(graft, i, layers):
    "Block i reads the block before it: both adapters are multiplied into the layers that read."
    (_, _, out), (into, _, _) = graft.parts[i - 1], graft.parts[i]
    maps = [m.weight.flatten(1) for m in (into, out) if not isinstance(m, nn.Identity)]
    if not maps: return
    c = maps[0] if len(maps) == 1 else maps[0] @ maps[1]
    for m in layers: m.weight.copy_(torch.einsum("oc...,ci->oi...", m.weight, c))
    graft.parts[i][0], graft.parts[i - 1][2] = nn.Identity(), nn.Identity()


def by_hand(lesson, order):
    "Both stages: every step runs the whole hybrid on images; nothing is kept, nothing folded, no code of the engine's."
    student = lesson.make("random")
    graft, losses, head = Graft(lesson.host, student, lesson.seed).to(lesson.targets.dtype), [], lesson.host
    stem = nn.Sequential(head.conv1, head.bn1, head.act1, head.maxpool, head.layer1)
    host = [stem, head.layer2, head.layer3, head.layer4, nn.Sequential(head.global_pool, head.fc)]
    assert len(host) == len(graft), "one part a stage, the stem with the first"
    for _, first, last, steps in plan(5, lesson.steps, order=order):
        if order == "head" and last > first: meet(graft, first + 1, readers(student)[first + 1])
        span = nn.Sequential(*list(graft.parts)[first:last + 1]).train()
        net = nn.Sequential(*host[:first], span, *host[last + 1:])
        optimiser = torch.optim.AdamW(span.parameters(), lesson.lr, weight_decay=1e-4)
        for i in range(steps):
            rows = step_rows(len(lesson.views), lesson.batch, i, lesson.seed)
            q, p = lesson.targets[rows], (net(normalise(lesson.views[rows], lesson.host.card).double())/4).log_softmax(1)
            loss = 16*(q*(q.log() - p)).sum(1).mean()
            for group in optimiser.param_groups: group["lr"] = lesson.lr*train.cosine(i, steps)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(span.parameters(), 5.)
            optimiser.step()
            losses.append(loss.item())
        span.eval()
    for i, layers in readers(student).items(): meet(graft, i, layers)
    return student, losses


@pytest.mark.parametrize("order, classes", [("input", 2), ("head", 2), ("input", 3), ("head", 3)])
def test_the_engine_takes_the_steps_of_a_loop_by_hand(monkeypatch, order, classes):
    "In float64, on a host whose folding changes every weight; losses, weights and statistics."
    lesson, losses = lesson_of(torch.float64, classes, order=order), []
    student, wanted = by_hand(lesson_of(torch.float64, classes), order)

    def note(name, loss):
        parts = loss()
        losses.append(parts["loss"].item())
        return parts

    wrapped(monkeypatch, note)
    before = copy.deepcopy(lesson.host.state_dict())
    taught = graft_student(lesson)
    assert taught.splices == 0 and len(losses) == len(wanted) == lesson.steps
    assert np.abs(np.array(losses) - wanted).max() < 1e-6 and max(wanted) > 1e-3
    for k, v in student.state_dict().items():
        assert torch.allclose(v.double(), taught.net.state_dict()[k].double(), atol=1e-6, rtol=1e-6), k
    assert all(torch.equal(v, before[k]) for k, v in lesson.host.state_dict().items()), "the host is unchanged"


def test_the_host_of_these_tests_is_folded():
    lesson = lesson_of()
    graft = Graft(lesson.host, lesson.fresh())
    folded = [block.folded for block in prepare(graft, lesson).blocks]
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in lesson.host.modules())
    assert sum(folded) == norms and [b.refused for b in prepare(graft, lesson).blocks] == [""]*len(graft)


# ---- killed

class Killed(Exception): "As if the plug were pulled."


WAYS = [dict(), dict(local_share=.5), dict(hints=1.), dict(positions="2,3"), TRANSLATED | dict(stage1_share=.5)]


@pytest.mark.parametrize("options", WAYS, ids=lambda o: ",".join(o) or "as published")
def test_killed_in_a_step_it_ends_with_the_same_bits(tmp_path, monkeypatch, options):
    "At the first step and the second, inside the second stage and at the last: each time from the checkpoint on."
    monkeypatch.setattr(train, "SAVE_SECONDS", -1)  # kept after every step
    calm, taken, at = graft_student(lesson_of(**options)), [], [24]
    killed = replace(lesson_of(**options), folder=tmp_path)

    def dies(name, loss):
        if len(taken) == at[0]: raise Killed(name)
        taken.append(name)
        return loss()

    wrapped(monkeypatch, dies)
    for at[0] in (0, 1, 17, 23):
        with pytest.raises(Killed, match="stage 2" if at[0] > 11 else "stage 1|local"): graft_student(killed)
    assert len(list(tmp_path.rglob("*.pt"))) > 1
    at[0] = 24
    again = graft_student(killed)
    assert len(taken) == 24, "no step was taken twice, none was lost"
    assert same_weights(calm.net, again.net) and calm.life.equals(again.life) and calm.history.equals(again.history)


def test_one_block_trained_as_a_chain_is_trained_as_alone():
    "Stage 2 of length one is stage 1, bit for bit."
    def trained(name, chain):
        lesson = lesson_of()
        graft = Graft(lesson.host, lesson.fresh())
        history = train_span(graft, 0, 0, prepare(graft, lesson), 6, name, chain=chain)
        return graft, history.drop(columns="fit")

    (one, first), (two, second) = trained("stage 1 block 1", False), trained("stage 2 blocks 1-1", True)
    fresh = Graft(lesson_of().host, lesson_of().fresh())
    assert same_weights(one, two) and first.equals(second) and not same_weights(one, fresh)


def test_a_loss_that_is_no_number_in_a_chain_is_named():
    with pytest.raises(FloatingPointError, match=r"^stage 2 blocks 1-2: loss .* at step [12], learning rate 1e\+27"):
        graft_student(lesson_of(stage2_rate=1e30, schedule="constant"))


# ---- tokens

def wide_vit():
    net = timm.create_model("test_vit", num_classes=2, embed_dim=96, num_heads=2, dynamic_img_size=True)
    net.card = build("test_vit", 2).card
    return freeze(net)


@pytest.mark.parametrize("options", [dict(), TRANSLATED], ids=["input", "translated"])
def test_a_vit_is_grafted_into_a_wider_one(tmp_path, options):
    lesson = lesson_of(host=wide_vit(), student="test_vit", steps=40, **options)
    before = copy.deepcopy(lesson.host.state_dict())
    taught, x = graft_student(lesson), lesson.inputs(slice(0, 4))
    assert taught.history.loss.notna().all() and torch.isfinite(taught.net(x)).all()
    assert all(torch.equal(v, before[k]) for k, v in lesson.host.state_dict().items())
    if options: build("test_vit", 2).load_state_dict(taught.net.state_dict())
    else: assert isinstance(taught.net, Spliced) and taught.splices == 3 and taught.splice_cost["params"] == 3*64*64
    assert torch.equal(load_student(save_student(taught.net, tmp_path/"vit.safetensors"))(x), taught.net(x))


# ---- starts, classes

def test_a_pretrained_start_comes_from_a_file(tmp_path):
    had = spread(build("test_resnet", 5, seed=9))
    save_net(had, tmp_path/"test_resnet.safetensors")
    make = starts("test_resnet", 2, weights=tmp_path, seed=4)
    lesson = replace(lesson_of(), make=make, start="pretrained")
    fresh, other = lesson.fresh(), lesson.fresh("random")
    body = {k: v for k, v in had.state_dict().items() if not k.startswith("fc.")}
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in body.items()) and fresh.fc.out_features == 2
    assert not torch.equal(other.conv1[0].weight, fresh.conv1[0].weight)
    taught = graft_student(replace(lesson, lr=1e-9))  # it hardly moves, and no adapter is merged into its first layers
    for k in ("conv1.0.weight", "conv1.3.weight", "layer1.0.conv1.weight", "bn1.weight"):
        assert torch.allclose(taught.net.state_dict()[k], body[k], atol=1e-6), k
    assert taught.net.card["head"] == "fresh" and taught.net.card["start"] == fresh.card["start"]


@pytest.mark.parametrize("classes", [3, 8])
@pytest.mark.parametrize("loss", ["kl", "direction"])
def test_more_than_two_classes(classes, loss):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        taught = graft_student(lesson_of(classes=classes, loss=loss))
    fresh = build("test_resnet", classes)
    fresh.load_state_dict(taught.net.state_dict())
    assert taught.splices == 0 and fresh.fc.out_features == classes and np.isfinite(taught.life.divergence).all()


# ---- what is run, and what is left of the host

@pytest.mark.parametrize("order", ["head", "input"])
def test_head_first_no_block_of_the_host_is_run_in_a_chain(monkeypatch, order):
    ran, fits = [], []
    make, chain = grafting.prepare, grafting.begin_chain

    def prepared(graft, lesson, *args):
        ground = make(graft, lesson, *args)
        see = lambda i: lambda *_: ran.append((fits[-1] if fits else "alone", i))
        for i, block in enumerate(ground.blocks): block.register_forward_hook(see(i))
        return ground

    def begun(graft, first, last, ground):
        fits.append((first, last))
        chain(graft, first, last, ground)

    monkeypatch.setattr(grafting, "prepare", prepared)
    monkeypatch.setattr(grafting, "begin_chain", begun)
    graft_student(lesson_of(order=order))
    behind = {(span, i) for span, i in ran if span != "alone"}
    assert len(fits) == 4 and ("alone", 4) in ran, "stage 1 needs the suffix"
    assert behind == (set() if order == "head" else {(span, i) for span in fits for i in range(span[1] + 1, 5)})


def tensors(net): return {t.data_ptr() for t in (*net.parameters(), *net.buffers()) if t.numel()}


@pytest.mark.parametrize("start", ["random", "inherited"])
@pytest.mark.parametrize("options", [dict(), dict(order="head", hints=1.)], ids=["input", "head"])
def test_nothing_of_the_host_is_left_in_a_full_graft(monkeypatch, start, options):
    made = []

    class Noted(Graft):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(grafting, "Graft", Noted)
    lesson = replace(lesson_of(**options), start=start)
    taught, graft = graft_student(lesson), made[0]
    full = graft.hybrid(0, len(graft) - 1)
    host = tensors(lesson.host)
    assert len(host) > 50 and not tensors(full) & host and not tensors(taught.net) & host and not tensors(graft) & host
    assert not set(full.modules()) & set(lesson.host.modules()) and tensors(taught.net) <= tensors(full)


# ---- pairs whose maps differ

def teachers(**scores):
    card = lambda n, s: {"net": n, "classes": ["a", "b"], "valid": {HOST_SCORE: s, FUSION_SCORE: s}}
    return [Teacher(freeze(build(n, 2, seed=0)), card(n, s), None) for n, s in scores.items()]


def test_a_host_of_other_maps_is_passed_over():
    both, net = teachers(kdnb_squeezenet1_0=.9, resnet10t=.6), build("kdnb_mobilenetv1_025", 2, seed=0)
    assert choose_host(both, net).name == "resnet10t", "though the other is the better teacher"
    assert possible_hosts({t.name: t.net for t in both}, build("kdnb_squeezenet1_0", 2)) == ["kdnb_squeezenet1_0"]


@pytest.mark.parametrize("host, student, sides", [
    ("resnet10t", "kdnb_squeezenet1_0", r"\[32, 16, 8, 4, 2\] and \[29, 14, 7, 3\]"),
    ("kdnb_squeezenet1_0", "kdnb_mobilenetv1_025", r"\[29, 14, 7, 3\] and \[32, 16, 8, 4, 2\]")])
def test_a_named_host_of_other_maps_is_refused_before_anything_is_trained(host, student, sides, monkeypatch):
    both = teachers(**{host: .9})
    message = rf"{host}: .*strides are \[2, 4.* and \[2, 4.*{sides}"
    for name in (host, "auto"):
        with pytest.raises(BadInput, match=message): possible_hosts({host: both[0].net}, build(student, 2), name)
        with pytest.raises(BadInput, match=message): choose_host(both, build(student, 2), name)
    monkeypatch.setattr(train.Fit, "run", lambda self: pytest.fail("trained"))
    with pytest.raises(BadInput, match=message):
        distil(both, torch.zeros(4, 3, 64, 64, dtype=torch.uint8), student, start="random", steps=40, host=host)


def test_the_size_of_the_images_decides():
    "DenseNet rounds an odd side down: at 112 px its last boundary is none, and the pair still fits."
    nets = {"kdnb_densenet_small": build("kdnb_densenet_small", 2, seed=0)}
    for size in (64, 112, 224): assert possible_hosts(nets, build("test_resnet", 2, seed=0), size=size) == list(nets)



@pytest.mark.parametrize("options", [dict(local_share=.5), dict(hints=1.), TRANSLATED])
def test_a_boundary_where_maps_differ_is_given_up(options):
    "At 48 px a DenseNet ends in maps of 1 x 1, a ResNet in 2 x 2."
    host = freeze(build("kdnb_densenet_small", 2, seed=0))
    taught = graft_student(replace(lesson_of(size=48, steps=40, **options), host=host))
    assert len(taught.life) == 9 and taught.splices == 0
    with pytest.raises(BadInput, match="no boundary in common.*places"):
        Graft(host, build("kdnb_squeezenet1_0", 2), size=64)
