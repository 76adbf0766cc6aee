"The engine against the plain loop, head first, options, budgets, and a method that was killed."
import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from kdnb import grafting
from kdnb.core import BadInput
from kdnb.distillers import find_method
from kdnb.frozen import Budget
from kdnb.grafting import Graft, Lesson, checkpoint, graft_student, merge, plan, prepare, set_batchnorm
from kdnb.losses import soft_kl, soften
from kdnb.nets import build, freeze, normalise
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
