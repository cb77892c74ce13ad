"""The comparison with OT-Flow's code, run against its equations in our own words, by nested autograd."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import otflow
from benchmarks.otflow import CASES, Case, Theirs

EQUATIONS = '''
import math
import torch
from torch import nn

class Phi(nn.Module):
    """Eq. 9: w^T N(s) + s^T A^T A s / 2 + b^T s."""

    def __init__(self, nTh, m, d, alph, r=10):
        super().__init__()
        self.N = nn.Module()
        self.N.layers = nn.ModuleList([nn.Linear(d + 1, m)] + [nn.Linear(m, m) for _ in range(nTh - 1)])
        self.w, self.c = nn.Linear(m, 1, bias=False), nn.Linear(d + 1, 1)
        self.A = nn.Parameter(torch.randn(min(r, d + 1), d + 1) / 3)

    def forward(self, s):
        first, *rest = self.N.layers
        log_cosh = lambda a: torch.logaddexp(a, -a)
        u = log_cosh(first(s))
        for layer in rest:
            u = u + log_cosh(layer(u)) / len(rest)
        return self.w(u)[:, 0] + 0.5 * (s @ self.A.T).square().sum(1) + self.c(s)[:, 0]

def OTFlowProblem(x, net, tspan, nt, stepper, alph):
    """Eq. 8, with eqs. 2, 5 and 7 along RK4 in nt steps; the velocity is -grad Phi / alpha_1."""
    n, d = x.shape

    def rate(z, t):
        s = torch.cat([z[:, :d], torch.full_like(z[:, :1], t)], 1).requires_grad_()
        (slope,) = torch.autograd.grad(net(s).sum(), s, create_graph=True)
        laplacian = sum(torch.autograd.grad(slope[:, j].sum(), s, create_graph=True)[0][:, j] for j in range(d))
        v = -slope[:, :d] / alph[0]
        kinetic = 0.5 * v.square().sum(1)
        violated = (slope[:, d] - alph[0] * kinetic).abs()
        return torch.cat([v, torch.stack([-laplacian / alph[0], kinetic, violated], 1)], 1)

    z = torch.cat([x, torch.zeros_like(x[:, :1]).expand(n, 3)], 1).requires_grad_()
    h = (tspan[1] - tspan[0]) / nt
    for k in range(nt):
        t = tspan[0] + k * h
        one = rate(z, t)
        two = rate(z + h / 2 * one, t + h / 2)
        three = rate(z + h / 2 * two, t + h / 2)
        four = rate(z + h * three, t + h)
        z = z + h / 6 * (one + 2 * two + 2 * three + four)
    C = 0.5 * z[:, :d].square().sum(1) + 0.5 * d * math.log(2 * math.pi) - z[:, d]
    costs = [z[:, d + 1].mean(), C.mean(), z[:, d + 2].mean()]
    return sum(a * c for a, c in zip(alph, costs)), costs
'''


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with the names of OT-Flow's, whose modules are forgotten afterwards."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "Phi.py").write_text(EQUATIONS, encoding="utf-8")
    (tmp_path / "src" / "OTFlowProblem.py").write_text("from src.Phi import *\n", encoding="utf-8")
    path = list(sys.path)
    importlib.invalidate_caches()
    yield tmp_path
    sys.path[:] = path
    for name in [name for name in sys.modules if name.split(".")[0] == "src"]:
        del sys.modules[name]


@pytest.mark.parametrize("alphas", [(1.0, 30.0, 1.0), (1.0, 100.0, 15.0)])
@pytest.mark.parametrize("layers", [2, 3])
def test_loss_and_gradient_are_those_of_the_equations(
    folder: Path, layers: int, alphas: tuple[float, float, float]
) -> None:
    """Conventions mapped: ours is theirs over ``alpha_2 d``."""
    loss, gradient = otflow.agreement(Theirs(folder), Case(3, 6, layers, alphas, 3, 8))
    assert loss < 1e-12
    assert gradient < 1e-10


def test_a_case_has_a_row_with_times_and_memory(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CASES, "toy", Case(2, 4, 2, (1.0, 30.0, 1.0), 2, 10))
    monkeypatch.setattr(otflow, "_in_fresh_process", lambda folder, case, side: {"theirs": 7.0, "auto": 3.0}[side])
    threads = torch.get_num_threads()
    try:
        otflow.main([str(folder), "--cases", "toy", "--memory", "auto", "--repeats", "1"])
    finally:
        torch.set_num_threads(threads)
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].strip("|").split("|")]
    assert cells[:2] == ["toy", "auto"]
    assert cells[-1] == "3 vs 7"
    assert all(float(number) < 1e-10 for number in cells[2].split(", "))
    assert [cell.split()[-1] for cell in cells[3:5]] == ["ms", "ms"]


def test_a_folder_without_the_code_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"has no src/OTFlowProblem\.py: clone https://github\.com/EmoryMLIP/OT-Flow"):
        Theirs(tmp_path)
