"The engine against the plain loop, head first, options, budgets, and a method that was killed."
import copy
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kdnb import distillers, grafting, train
from kdnb.core import BadInput
from kdnb.distillers import family, find_method
from kdnb.frozen import Budget
from kdnb.grafting import (
    Graft,
    Ground,
    Lesson,
    checkpoint,
    graft_student,
    merge,
    plan,
    prepare,
    set_batchnorm,
    span_loss,
)
from kdnb.losses import soft_kl, soften
from kdnb.methods import read_methods
from kdnb.nets import build, freeze, normalise
from kdnb.students import load_student, save_student
from kdnb.train import Fit, generator, step_rows


def lesson_of(dtype=torch.float32, steps=33, size=32, lr=2e-3, **options):
    host = freeze(build("resnet10t", 2, seed=0).to(dtype))
    views = torch.randint(0, 256, (24, 3, size, size), dtype=torch.uint8, generator=generator(3))
    x = normalise(views, host.card).to(dtype)
    targets = soften(host(x)*4, 4.)
    return Lesson(views, targets, 4., host, lambda start: build("test_resnet", 2, seed=1).to(dtype), steps=steps, lr=lr,
                  batch=8, options=options)


def plain_loop(lesson):
    "As published, host frozen: every step runs the whole hybrid on images, nothing is kept and nothing folded."
    student, losses = lesson.make("random"), []
    graft = Graft(lesson.host, student, lesson.seed).to(lesson.targets.dtype)
    for name, first, last, steps in plan(len(graft), lesson.steps):
        span, hybrid = graft.span(first, last), graft.hybrid(first, last)
        prefix = graft.prefix(first)
        set_batchnorm(span, "batch", lambda rows, prefix=prefix: prefix(lesson.inputs(rows)), len(lesson.views))

        def loss(i, hybrid=hybrid):
            rows = step_rows(len(lesson.views), lesson.batch, i, lesson.seed)
            return {"loss": soft_kl(hybrid(lesson.inputs(rows)), lesson.targets[rows], lesson.tau)}

        losses.append(Fit(span, loss, steps, lesson.lr, every=1, name=name, seed=lesson.seed).run().loss)
        span.eval()
    net, _ = merge(graft, student, lesson.inputs(slice(0, 8)))
    return net, torch.tensor([v for part in losses for v in part])


@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-6), (torch.float32, 1e-3)])
def test_same_numbers_as_the_plain_loop(monkeypatch, dtype, close):
    monkeypatch.setattr(Fit.__init__, "__defaults__", tuple(1 if d == 20 else d for d in Fit.__init__.__defaults__))
    lesson = lesson_of(dtype, size=64, lr=5e-4)
    before = copy.deepcopy(lesson.host.state_dict())
    net, losses = plain_loop(lesson_of(dtype, size=64, lr=5e-4))
    taught = graft_student(lesson)
    assert len(taught.history) == len(losses) == 33
    assert (torch.tensor(taught.history.loss.to_numpy()) - losses).abs().max() < close
    if dtype == torch.float64:
        for a, b in zip(net.state_dict().values(), taught.net.state_dict().values(), strict=True):
            assert torch.allclose(a.double(), b.double(), atol=close, rtol=close)
    assert all(torch.equal(v, before[k]) for k, v in lesson.host.state_dict().items()), "the host is unchanged"


def test_stage_two_of_length_one_is_stage_one():
    assert [f[1:3] for f in plan(2, 8)] == [(0, 0), (1, 1), (0, 1)]
    assert [f[1:3] for f in plan(4, 40, order="head")] == [(0, 0), (1, 1), (2, 2), (3, 3), (2, 3), (1, 3), (0, 3)]


@pytest.mark.parametrize("options", [dict(order="head"), dict(order="head", adapters="ridge", local_share=.5),
                                     dict(adapters="identity", batchnorm="estimated"), dict(batchnorm="frozen")])
def test_every_way_ends_in_a_plain_student(options):
    lesson = lesson_of(**options)
    taught = graft_student(lesson)
    fresh = build("test_resnet", 2)
    fresh.load_state_dict(taught.net.state_dict())
    assert taught.splices == 0 and len(taught.life) == 2*len(Graft(lesson.host, fresh)) - 1
    x = lesson.inputs(slice(0, 4))
    assert torch.equal(fresh.eval()(x), taught.net(x)) and torch.isfinite(taught.net(x)).all()


def test_head_first_closes_gaps_without_changing_the_student():
    lesson = lesson_of(order="head")
    graft = Graft(lesson.host, lesson.make("random"))
    ground, last = prepare(graft, lesson), len(graft) - 1
    graft.eval()
    for i in range(last, 0, -1):
        x = ground.before(i - 1, slice(0, 8))
        before = graft.span(i - 1, last)(x)
        grafting.close_gap(graft, i, ground)
        after = graft.span(i - 1, last)(x)
        assert (before - after).abs().max() <= 1e-4*before.abs().max()
    assert not [m for into, _, out in graft.parts for m in (into, out) if not isinstance(m, nn.Identity)]


def test_a_small_budget_changes_no_number(tmp_path):
    lesson = lesson_of(torch.float64)
    graft = Graft(lesson.host, lesson.make("random"))
    rows = torch.tensor([5, 2, 17])
    wanted = [prepare(graft, lesson).before(i, rows) for i in range(1, len(graft))]
    for budget, where in ((Budget(0, 2**30), {"file"}), (Budget(0, 0), {"recomputed"})):
        ground = prepare(graft, replace(lesson, folder=tmp_path), budget)
        assert {k.where for k in ground.kept} == where
        for i, x in enumerate(wanted, 1): assert torch.allclose(ground.before(i, rows), x, atol=1e-9)


@pytest.mark.parametrize("options, said", [
    (dict(ordr="head"), "Did you mean 'order'"), (dict(order="middle"), "order='middle'"), (dict(stage1_share=2), "from 0 to 1"),
    (dict(adapters="kaiming"), "adapters='kaiming'"), (dict(batchnorm="off"), "batchnorm='off'"), (dict(local_share="a"), "from 0")])
def test_unknown_options_are_refused(options, said):
    with pytest.raises(BadInput, match=said): lesson_of(**options)


@pytest.mark.parametrize("method", ["graft", "graft_head"])
def test_a_killed_graft_ends_the_same(tmp_path, method, monkeypatch):
    calm = find_method(method)(replace(lesson_of(), folder=tmp_path/"calm")).net.state_dict()
    killed = replace(lesson_of(), folder=tmp_path/"killed")
    run, fits = Fit.run, []

    def dies(self):
        fits.append(self.name)
        if len(fits) == 7: raise KeyboardInterrupt
        return run(self)

    monkeypatch.setattr(Fit, "run", dies)
    with pytest.raises(KeyboardInterrupt): find_method(method)(killed)
    monkeypatch.setattr(Fit, "run", run)
    assert len(list((tmp_path/"killed").rglob("*.pt"))) == 6
    again = find_method(method)(killed).net.state_dict()
    assert all(torch.equal(v, again[k]) for k, v in calm.items())


def test_methods_keep_their_checkpoints_apart(tmp_path):
    lesson = replace(lesson_of(), folder=tmp_path)
    for method in ("graft", "graft_head"): find_method(method)(lesson)
    assert len({p.parent for p in tmp_path.rglob("*.pt")}) == 2 and checkpoint(lesson, "stage 1 block 1").load()


@pytest.mark.parametrize("options", [
    dict(hints=1.), dict(order="head", hints=1., adapters="ridge", polish=.5), dict(order="head", adapters="ridge", gaps="drop"),
    dict(gaps="drop", adapter_rate=0., adapters="ridge"), dict(batchnorm="recounted", chain_batchnorm="estimated"),
    dict(stage1_share=1.), dict(stage1_share=0., polish=1.), dict(schedule="constant", adapter_rate=10., stage2_rate=.4)])
def test_every_option_ends_in_a_plain_student(options):
    lesson = lesson_of(steps=36, **options)
    taught = graft_student(lesson)
    fresh = build("test_resnet", 2)
    fresh.load_state_dict(taught.net.state_dict())
    assert taught.splices == 0 and taught.splice_cost == {"params": 0, "macs": 0}
    assert torch.isfinite(taught.net(lesson.inputs(slice(0, 4)))).all() and taught.history.step.max() > 0


def test_adapters_that_only_translate_are_not_trained():
    lesson = lesson_of(order="head", adapters="ridge", gaps="drop", adapter_rate=0., stage1_share=1.)
    graft = Graft(lesson.host, lesson.fresh())
    ground = prepare(graft, lesson)
    grafting.ridge_adapters(graft, ground)
    before = {k: v.clone() for k, v in graft.state_dict().items()}
    grafting.train_span(graft, 1, 1, ground, 5, "stage 1 block 2")
    moved = {k for k, v in graft.state_dict().items() if not torch.equal(v, before[k]) and "num_batches" not in k}
    assert moved and all(k.startswith("parts.1.1.") for k in moved)


def test_hints_pull_the_inside_of_a_chain_towards_the_host():
    def error(hints):
        lesson = lesson_of(steps=120, stage1_share=0., polish=1., adapters="ridge", hints=hints, chain_batchnorm="recounted")
        graft = Graft(lesson.host, lesson.fresh())
        ground = prepare(graft, lesson)
        grafting.ridge_adapters(graft, ground)
        grafting.train_span(graft, 0, len(graft) - 1, ground, 1, "stage 2 warm")
        grafting.begin_chain(graft, 0, len(graft) - 1, ground)
        grafting.train_span(graft, 0, len(graft) - 1, ground, 120, "stage 2 all")
        y, wanted = graft.span(0, 1)(lesson.inputs()), ground.before(2, slice(None))
        return ((y - wanted).norm()/wanted.norm()).item()

    assert error(10.) < error(0.)


@pytest.mark.parametrize("positions", ["2,3", "0,2", "3"])
@pytest.mark.parametrize("options", [dict(), dict(order="head", adapters="ridge", hints=1.), dict(order="head", gaps="drop")])
def test_a_partial_graft_keeps_the_hosts_other_blocks(tmp_path, positions, options):
    lesson = lesson_of(positions=positions, steps=24, **options)
    before, at = copy.deepcopy(lesson.host.state_dict()), [int(p) for p in positions.split(",")]
    taught = graft_student(lesson)
    graft, x = Graft(lesson.host, lesson.fresh(), positions=positions), lesson.inputs(slice(0, 4))
    assert graft.positions == at and all(torch.equal(v, before[k]) for k, v in lesson.host.state_dict().items())
    for i in set(range(len(graft))) - set(at):
        y = torch.randn(2, *graft.prefix(i)(x).shape[1:])
        assert torch.allclose(taught.net.blocks[i](y), graft.host[i](y), atol=1e-5)
    again = load_student(save_student(taught.net, tmp_path/"partial.safetensors"))
    assert torch.equal(again(x), taught.net(x)) and again.positions == at
    border = sum((i > 0 and i - 1 not in at) + (i < len(graft) - 1 and i + 1 not in at) for i in at)
    assert taught.splices == len(taught.net.extra()) <= border, "what lies between two student blocks is folded"
    assert taught.splice_cost["params"] == sum(m.weight.numel() for m in taught.net.extra())


def test_a_checkpoint_knows_views_and_host(tmp_path):
    lesson = replace(lesson_of(), folder=tmp_path)
    other = replace(lesson, views=255 - lesson.views)
    moved = replace(lesson, host=freeze(build("resnet10t", 2, seed=9)))
    assert len({checkpoint(one, "fit").identity for one in (lesson, other, moved)}) == 3
    assert checkpoint(replace(lesson), "fit").identity == checkpoint(lesson, "fit").identity


@pytest.mark.parametrize("arguments", [(5, 20, .1), (5, 40, .5, "input", .9), ([], 40), (5, 36, .01)])
def test_a_plan_without_a_step_for_every_fit_is_refused(arguments):
    with pytest.raises(BadInput, match="too few"): plan(*arguments)


@pytest.mark.parametrize("fields", [dict(batch=0), dict(lr=-1.), dict(steps=0), dict(views=torch.zeros(1, 3, 8, 8).byte())])
def test_a_lesson_that_cannot_be_taught_is_refused(fields):
    lesson = lesson_of()
    if "views" in fields: fields["targets"] = lesson.targets[:1]
    with pytest.raises(BadInput): replace(lesson, **fields)


@pytest.mark.parametrize("value", [True, ["2"], None, ","])
def test_positions_that_are_no_names_are_refused(value):
    with pytest.raises(BadInput, match="positions="): lesson_of(positions=value)


def test_a_partial_graft_stands_with_those_that_inherit():
    assert family("graft") == "own weights" and family("graft", options={"positions": "2"}) == "inherits"


def test_an_empty_name_and_a_foreign_name_of_a_block():
    names = Graft(lesson_of().host, lesson_of().fresh()).host.names
    assert grafting.chosen_positions("", names) == list(range(len(names)))
    assert grafting.chosen_positions(f"{names[-1]}, 0", names) == [0, len(names) - 1]
    with pytest.raises(BadInput, match="positions='layer9'"): grafting.chosen_positions("layer9", names)


def test_counted_again_is_the_plain_average_over_all_classes():
    torch.manual_seed(0)
    span, x = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())), torch.randn(70, 3, 8, 8)
    x[35:] += 3  # sorted by class, as shots are
    grafting.recount(span, lambda rows: x[rows], len(x))
    norm, y = span[0][1], span[0][0](x)
    assert torch.allclose(norm.running_mean, y.mean((0, 2, 3)), atol=1e-5) and norm.momentum == .1
    assert torch.allclose(norm.running_var, y.var((0, 2, 3)), rtol=.05)


def test_frozen_batchnorms_are_never_counted():
    host = freeze(nn.Sequential(nn.BatchNorm2d(3)))
    span = nn.Sequential(host, nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    set_batchnorm(span, "estimated", lambda rows: torch.randn(70, 3, 4, 4)[rows], 70)
    assert torch.equal(host[0].running_mean, torch.zeros(3)) and not host[0].training and not span[1][1].training


def test_the_direction_of_logits_is_warned_of_at_two_classes():
    with pytest.warns(UserWarning, match="two classes"): graft_student(lesson_of(loss="direction"))


def test_a_finer_graft_has_more_blocks_and_ends_in_the_same_network():
    host, make = freeze(build("regnetx_002", 2, seed=0)), lambda start: build("regnetx_002", 2, seed=1)
    lesson = replace(lesson_of(per_stage=2), host=host, make=make)
    taught = graft_student(lesson)
    assert len(taught.life) == 2*8 - 1 and taught.splices == 0, "stem, four stages of 1, 1, 4 and 7 steps, head"
    assert len(graft_student(replace(lesson, options={})).life) == 2*6 - 1
    build("regnetx_002", 2).load_state_dict(taught.net.state_dict())
    for bad in (0, 1.5):
        with pytest.raises(BadInput, match=f"per_stage={bad}.*whole number from 1"): replace(lesson, options={"per_stage": bad})


def test_netgraft_trains_as_the_release_did(monkeypatch):
    seen = {}

    class Seen(Fit):
        def __init__(self, net, loss, steps, lr, **more):
            block, adapter = (lr*more["rates"](f"span.0.{part}.weight") for part in (1, 2))
            seen[more["name"][:7]] = block, adapter, more["decay"], more["schedule"]
            super().__init__(net, loss, steps, lr, **more)

    monkeypatch.setattr(grafting, "Fit", Seen)
    with pytest.warns(UserWarning, match="two classes"): find_method("netgraft")(lesson_of())
    rate = 2.5e-4*8/64
    assert seen["stage 1"] == (pytest.approx(rate), pytest.approx(10*rate), 0, "constant")
    assert seen["stage 2"] == (pytest.approx(1e-4), pytest.approx(1e-4), 0, "constant")


@pytest.mark.parametrize("positions", ["", "2,3"])
def test_where_merging_turns_out_inexact_the_maps_stay(monkeypatch, positions):
    "A merge that was right block by block but is not on the whole is taken back."
    from kdnb import students
    real, folded = grafting.merge_maps, students.fold_inside

    def merged(blocks, maps, x):
        splices = real(blocks, maps, x)
        for p in blocks[2].parameters(): p.mul_(1.01)
        return splices

    def inside(graft, x):
        folded(graft, x)
        for p in graft.parts[2][1].parameters(): p.mul_(1.01)

    monkeypatch.setattr(grafting, "merge_maps", merged)
    monkeypatch.setattr(students, "fold_inside", inside)
    lesson = lesson_of(positions=positions)
    student = lesson.make("random")
    graft = Graft(lesson.host, student, positions=positions)
    x = lesson.inputs()
    with torch.no_grad(): wanted = graft.eval().hybrid(0, len(graft) - 1)(x)
    net, splices = merge(graft, student, x)
    assert splices == 4 and (net(x) - wanted).abs().max() < 1e-5*wanted.abs().max()


def test_an_inherited_student_starts_from_its_host():
    lesson = replace(lesson_of(), make=lambda start: build("resnet10t", 2, seed=5), start="inherited")
    assert torch.equal(lesson.fresh().eval()(lesson.inputs()), lesson.host(lesson.inputs()))
    assert not torch.equal(lesson.fresh("random").eval()(lesson.inputs()), lesson.host(lesson.inputs()))
    with pytest.raises(BadInput, match="start='borrowed'"): lesson.fresh("borrowed")


def test_methods_with_options_are_read_and_refused():
    read = read_methods("kd; graft_translated: polish=0.3 order=input")
    assert read["kd"] == ("kd", {})
    name, options = read["graft_translated: polish=0.3 order=input"]
    assert (name, options["polish"], options["order"], options["gaps"]) == ("graft", .3, "input", "drop")
    for text, said in (("kd: polish=1", "can be changed of"), ("graft: polsh=1", "Did you mean 'polish'"),
                       ("graft: polish=x", "no number"), ("grafd", "Did you mean 'graft'")):
        with pytest.raises(BadInput, match=said): read_methods(text)


def test_a_nan_names_block_step_and_rate():
    lesson = lesson_of(lr=1e30)
    with pytest.raises(FloatingPointError, match=r"stage 1 block \d.* at step \d+, learning rate"): graft_student(lesson)


class Crossings(TorchDispatchMode):
    "Notes every operation that meets tensors of two devices."
    def __init__(self):
        super().__init__()
        self.met = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in (*args, out) if isinstance(t, torch.Tensor) and t.numel()}
        if len(devices) > 1: self.met.append(str(func))
        return out


@pytest.mark.parametrize("first", [0, 1])
def test_a_step_on_another_device_asks_nothing_of_it_and_sends_it_row_numbers_at_most(monkeypatch, first):
    "Torch's meta device stands in for a GPU: whatever would have to be waited for is an error there."
    lesson = lesson_of()
    graft = Graft(lesson.host, lesson.make("random"))
    here = prepare(graft, lesson)
    host = copy.deepcopy(lesson.host).to("meta")
    host.card = lesson.host.card
    ground = Ground(here.blocks.to("meta"), [replace(k, rows=k.rows.to("meta"), device="meta") for k in here.kept],
                    replace(lesson, device="meta", host=host))
    span = graft.to("meta").span(first, 1, ground.blocks).train()
    train.shuffled.cache_clear()
    monkeypatch.setattr(train, "mixed_precision", lambda device: nullcontext())
    fit = Fit(span, span_loss(span, first, {}, ground), 9, 1e-3, device="meta")
    fit.optimiser = torch.optim.SGD([{"params": fit.trained, "factor": 1.}], lr=.1)  # fused ones are for real devices
    sent = []
    for _ in range(9):
        with Crossings() as seen: train.advance(fit)
        sent.append(len(seen.met))
    assert [n for i, n in enumerate(sent) if i % 3] == [0]*6, "24 views in batches of 8: an epoch begins every 3 steps"
    assert sent[3] == sent[6] == 1 <= sent[0] and len(fit.unjudged) == 9


def test_what_was_not_judged_in_its_step_is_before_anything_is_kept(tmp_path):
    net = nn.Linear(1, 1)
    fit = Fit(net, None, 3, .1, checkpoint=train.Checkpoint(tmp_path/"x.pt", "x"), name="fit")
    fit.unjudged = [(i, .1*i, torch.tensor(1.), torch.tensor(v)) for i, v in enumerate((1., float("nan"), 2.))]
    with pytest.raises(FloatingPointError, match="fit: loss 1 and gradient nan at step 1, learning rate 0.1"): fit.keep()
    assert not (tmp_path/"x.pt").exists()


def test_blocks_in_processes_of_their_own_end_with_the_same_weights(one_thread):
    one, two = graft_student(lesson_of()), graft_student(replace(lesson_of(), processes=2))
    for a, b in zip(one.net.state_dict().values(), two.net.state_dict().values(), strict=True): assert torch.equal(a, b)
    assert one.life.equals(two.life) and list(one.history.fit) == list(two.history.fit)
    with pytest.raises(BadInput, match="processes=2: one to a GPU"): replace(lesson_of(), device="cuda", processes=2)
    with pytest.raises(FloatingPointError, match="stage 1 block .*learning rate"):
        graft_student(replace(lesson_of(lr=1e30), processes=2))


def test_distil_starts_and_teaches_by_what_did_best(monkeypatch):
    monkeypatch.setattr(distillers, "make_lesson", lambda *given, start, **more: (start, None))
    monkeypatch.setattr(distillers, "find_method", lambda name: lambda start: (name, start))
    told = lambda **more: distillers.distil([SimpleNamespace(card={"classes": ["a", "b"]})], None, **more)
    assert told() == ("graft", "inherited") and told(start="random") == ("graft_translated", "random")
    assert told(weights="folder") == told(pretrained=True) == ("graft_translated", "pretrained")
    assert told(method="kd", weights="folder", start="inherited") == ("kd", "inherited")
    with pytest.raises(BadInput, match="start='copied'"): told(start="copied")
