"The fit loop: rates, schedules, kills, stops, and what it tells."
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdnb.core import BadInput
from kdnb.train import SCHEDULES, Checkpoint, Fit, advance, cosine, generator, step_rows

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.linspace(-1, 1, 32)[:, None]


def line(steps=20, **more):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 8), nn.Dropout(.2), nn.Linear(8, 1))
    loss = lambda i: {"loss": F.mse_loss(net(X[rows := step_rows(32, 8, i)]), 3*X[rows] + 1)}
    return Fit(net, loss, steps, .05, **more)


def weights(fit): return torch.cat([p.detach().flatten() for p in fit.net.parameters()])


def test_the_rate_rises_and_falls():
    for warmup in (0, .1, .5):
        rates = [cosine(i, 40, warmup) for i in range(40)]
        assert max(rates) == 1 == rates[max(0, round(40*warmup) - 1)] and 0 < rates[-1] < .02
    assert {SCHEDULES["constant"](i, 40) for i in range(40)} == {1.}
    with pytest.raises(BadInput, match="Did you mean 'cosine'"): line(schedule="cosin")


def test_a_schedule_may_be_a_function():
    fit = line(schedule=lambda step, steps: 0. if step < steps//2 else 1.)
    before = weights(fit)
    for _ in range(10): advance(fit)
    assert torch.equal(weights(fit), before)
    advance(fit)
    assert not torch.equal(weights(fit), before)


def test_factors_on_the_rate_stay_with_their_parameters_over_a_kill(tmp_path):
    rates = lambda name: {"0.": .5, "2.": 0.}[name[:2]]
    make = lambda path: line(rates=rates, checkpoint=Checkpoint(path, "x"))
    killed, resumed, calm = make(tmp_path/"a.pt"), make(tmp_path/"a.pt"), make(None)
    start = weights(calm)
    for _ in range(7): advance(killed)
    killed.keep()
    resumed.run()
    calm.run()
    assert torch.equal(weights(resumed), weights(calm)) and torch.equal(weights(calm)[-9:], start[-9:])
    assert [g["lr"] for g in calm.optimiser.param_groups] == [g["lr"] for g in resumed.optimiser.param_groups]


def test_another_fits_checkpoint_is_left_alone_and_a_damaged_one_refused(tmp_path):
    fit = line(checkpoint=Checkpoint(tmp_path/"a.pt", "x"))
    fit.run()
    assert Checkpoint(tmp_path/"a.pt", "y").load() is None
    (tmp_path/"a.pt").write_bytes((tmp_path/"a.pt").read_bytes()[:200])
    with pytest.raises(BadInput, match="is damaged"): line(checkpoint=Checkpoint(tmp_path/"a.pt", "x")).run()


def test_the_best_weights_are_kept_and_patience_ends_a_fit():
    scores, seen = iter([.1, .9, .3, .2, .8]), []
    fit = line(100, check=lambda: seen.append(weights(fit)) or next(scores), every=5, patience=3)
    history = fit.run()
    assert torch.equal(weights(fit), seen[1]) and history.step.tolist() == [5, 10, 15, 20, 25]


def test_a_score_that_is_no_number_never_wins():
    scores = iter([math.nan, .2, math.nan, math.nan])
    fit = line(20, check=lambda: next(scores), every=5)
    fit.run()
    assert fit.best_score == .2


def test_who_asks_is_told_each_row_and_no_bar_is_shown(capfd):
    told = []
    history = line(every=5, log=told.append, name=None).run()
    assert told == history.to_dict("records") and "it/s" not in capfd.readouterr().err


def test_draws_depend_on_the_key_alone():
    first = torch.rand(3, generator=generator(1, 2, 3))
    torch.rand(5)
    assert torch.equal(first, torch.rand(3, generator=generator(1, 2, 3)))
    assert len({torch.rand(1, generator=generator(*k)).item() for k in ((0,), (0, 0), (1, 0), (0, 1), (1,))}) == 5
    assert len(step_rows(3, 8, 5)) == 3 and sorted(torch.cat([step_rows(9, 3, i) for i in range(3, 6)])) == list(range(9))
