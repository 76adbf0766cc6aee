"What a GPU does in bfloat16, done on the CPU: nothing breaks, what is kept is float32, and as much is learnt."
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from test_grafting import lesson_of
from test_teacher import SMALL

from kdnb import grafting, train
from kdnb.finetune import Course, Recipe, fine_tune
from kdnb.losses import soft_kl, soften
from kdnb.methods import find_method
from kdnb.nets import build
from kdnb.train import generator

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def mixed(monkeypatch):
    "The context of a GPU's steps, with the CPU's own bfloat16; counts how often it was entered."
    entered = []

    @contextmanager
    def bfloat16(device):
        entered.append(device)
        with torch.autocast("cpu", torch.bfloat16): yield

    for m in (train, grafting): monkeypatch.setattr(m, "mixed_precision", bfloat16)
    return entered


def kinds(net): return {v.dtype for v in net.state_dict().values()}


def test_a_teacher(mixed):
    x = torch.rand(48, 3, 32, 32, generator=generator(1))*120
    y = torch.arange(48) % 2
    x[y == 1, :, ::4] += 100
    x = x.to(torch.uint8)
    course = Course(x[:32], y[:32], x[32:], y[32:].numpy(), 2, SMALL, Recipe(every=3, hed=.1, smoothing=.1))
    net = build("kdnb_mobilenetv1_025", 2)
    history = fine_tune(net, course)
    assert len(mixed) >= SMALL.teacher_steps and kinds(net) == {torch.float32, torch.int64}
    assert torch.isfinite(torch.tensor(history.loss.to_numpy())).all()


@pytest.mark.parametrize("name", ["graft", "kd", "relation"])
def test_a_method(mixed, monkeypatch, name):
    lesson = lesson_of(steps=33)
    lesson = replace(lesson, targets=soften(lesson.host(lesson.inputs())*60, lesson.tau))  # an opinionated teacher
    half = find_method(name)(lesson).net
    assert len(mixed) >= 33 and kinds(half) == {torch.float32, torch.int64}
    monkeypatch.undo()
    full = find_method(name)(lesson).net
    with torch.no_grad():
        blank, half, full = (soft_kl(n.eval()(lesson.inputs()), lesson.targets, lesson.tau).item()
                             for n in (lesson.make("random"), half, full))
    assert full < blank and abs(half - full) < .1*(blank - full), "what is lost is a tenth of what is learnt"
