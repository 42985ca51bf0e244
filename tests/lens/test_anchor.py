"""L2-SP against its formula, its effect on the distance, and the controller that holds a target."""

import math

import pytest
import torch

from megatron_dft.lens.anchor import L2SP
from megatron_dft.lens.controller import TargetController


def quadratic(make, steps=400, lr=1e-2, coefficient=0.0, target=None, noise=0.3):
    """Relative norm after each step of pulling `w` to a goal far from its start."""
    g = torch.Generator().manual_seed(0)
    start = torch.randn(200, generator=g)
    goal = start + torch.randn(200, generator=g)
    w = torch.nn.Parameter(start.clone())
    optimizer = make([w], lr=lr)
    anchor = L2SP(optimizer, coefficient)
    controller = TargetController(target, coefficient) if target else None
    norms = []
    for _ in range(steps):
        w.grad = w.detach() - goal + noise * torch.randn(200, generator=g)
        optimizer.step()
        norms.append(float(anchor.squared_distance()) ** 0.5 / float(start.norm()))
        if controller:
            anchor.coefficient = controller.update(norms[-1])
    return norms


def adam(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)


def test_sgd_step_is_the_gradient_of_the_penalty():
    """One step equals plain SGD on loss + ½λ‖θ − θ₀‖², differentiated by autograd, in float64."""
    start = torch.randn(2, 3, dtype=torch.float64)
    w, reference = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizer = torch.optim.SGD([w], lr=0.1)
    L2SP(optimizer, 0.7)
    plain = torch.optim.SGD([reference], lr=0.1)
    for step in range(5):
        optimizer.zero_grad()
        plain.zero_grad()
        ((w * (step + 1)) ** 2).sum().mul(0.05).backward()
        loss = ((reference * (step + 1)) ** 2).sum() * 0.05
        (loss + 0.5 * 0.7 * (reference - start).square().sum()).backward()
        optimizer.step()
        plain.step()
        assert torch.allclose(w, reference, rtol=1e-12, atol=0)
    assert not torch.equal(w, start)


@pytest.mark.parametrize("make", [adam, torch.optim.SGD])
def test_distance_falls_with_the_coefficient(make):
    norms = [quadratic(make, coefficient=c)[-1] for c in (0.0, 0.3, 3.0, 30.0)]
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] < 0.2 * norms[0]


def test_groups_have_their_own_learning_rate():
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.0}], lr=1.0)
    anchor = L2SP(optimizer, 2.0)
    with torch.no_grad():
        a.fill_(1.0), b.fill_(1.0)
    a.grad, b.grad = torch.zeros(1), torch.zeros(1)
    optimizer.step()
    assert a.item() == pytest.approx(0.8) and b.item() == 1.0
    anchor.coefficient = 1e9  # never beyond the start
    optimizer.step()
    assert a.item() == 0.0
    anchor.remove()
    with torch.no_grad():
        a.fill_(1.0)
    optimizer.step()
    assert a.item() == 1.0


def test_distance_is_squared_and_summed():
    a, b = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    anchor = L2SP(torch.optim.SGD([a, b], lr=1.0), 0.0)
    with torch.no_grad():
        a.fill_(3.0), b.fill_(-1.0)
    assert float(anchor.squared_distance()) == pytest.approx(20.0)


@pytest.mark.parametrize("coefficient", [-1.0, math.nan, math.inf])
def test_unfit_coefficients(coefficient):
    w = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="--l2sp-coeff: expected a number of 0 or more"):
        L2SP(torch.optim.SGD([w], lr=1.0), coefficient)


@pytest.mark.parametrize("make", [adam, torch.optim.SGD])
@pytest.mark.parametrize("coefficient", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("target", [0.15, 0.4])
def test_target_is_held_within_ten_percent(make, coefficient, target):
    norms = quadratic(make, 1200, coefficient=coefficient, target=target)
    assert all(abs(n / target - 1) < 0.1 for n in norms[-600:])


def test_controller_resumes_where_it_stopped():
    measured = [0.2 + 0.1 * math.sin(i) for i in range(40)]
    whole, first = TargetController(0.2, 1.0), TargetController(0.2, 1.0)
    want = [whole.update(m) for m in measured]
    got = [first.update(m) for m in measured[:20]]
    second = TargetController(0.2, 5.0)
    second.load_state_dict(first.state_dict())
    assert got + [second.update(m) for m in measured[20:]] == want


def test_controller_steps_by_its_formula():
    """log c moves by gain·e + damping·(e − previous e), e = log(measured/target) within ±1."""
    controller = TargetController(0.5, 2.0, gain=0.2, damping=0.7)
    log_c, previous = math.log(2.0), None
    for measured in (0.4, 0.6, 0.5, 50.0, 0.0, 1e-6, 0.45):
        e = -1.0 if measured == 0 else min(max(math.log(measured / 0.5), -1.0), 1.0)
        log_c += 0.2 * e + (0.0 if previous is None else 0.7 * (e - previous))
        previous = e
        assert controller.update(measured) == pytest.approx(math.exp(log_c), rel=1e-12)


def test_a_resumed_controller_keeps_its_range():
    first = TargetController(1.0, 2.0, range=10.0)
    first.update(3.0)
    second = TargetController(1.0, 500.0, range=10.0)
    second.load_state_dict(first.state_dict())
    for _ in range(100):
        second.update(1e9)
    assert second.coefficient == pytest.approx(20.0)


def test_controller_stays_in_its_range():
    controller = TargetController(1.0, 2.0, range=10.0)
    for _ in range(500):
        controller.update(0.0)
    assert controller.coefficient == pytest.approx(0.2)
    for _ in range(500):
        controller.update(1e9)
    assert controller.coefficient == pytest.approx(20.0)
    for bad in ((0.0, 1.0), (1.0, 0.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="above 0"):
            TargetController(*bad)
