"""Scores against closed forms and the flow's own log-density, and what does not depend on how they are computed."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pyrnode
from pyrnode import evaluate, progress, seeds
from pyrnode.config import Config, DataConfig, Divergence, EvaluationConfig, SolverConfig
from pyrnode.data import Splits, TensorSamples, load
from pyrnode.errors import ConfigError, DataError, SolverError
from pyrnode.evaluation import Score
from pyrnode.flow import Flow
from pyrnode.probes import Probes, no_probes
from pyrnode.transforms import Chain, Standardize

LEVELS, ALPHA = 5, 0.03


def vectors(d: int = 2, *, identity: bool = False, sample: Tensor | None = None, **settings: Any) -> Flow:
    config = Config().override({"hidden": [6], "activation": "tanh", "dtype": "float64", **settings})
    transform = None if sample is None else Chain([Standardize.fit(sample.double())])
    return moved(Flow.build(config, (d,), transform=transform), identity)


def images(*, identity: bool = False, **settings: Any) -> Flow:
    config = Config().override({"hidden": [3], "blocks": 1, "alpha": ALPHA, "dtype": "float64", **settings})
    return moved(Flow.build(config, (1, 4, 4), levels=LEVELS), identity)


def moved(flow: Flow, identity: bool) -> Flow:
    """With weights that are not those of the start, at which the flow is the identity."""
    if not identity:
        for parameter in flow.parameters():
            nn.init.normal_(parameter, std=0.3)
    return flow.requires_grad_(False)


def DP5(tolerance: float) -> SolverConfig:
    return SolverConfig(name="DP5", rtol=tolerance, atol=tolerance)


def pixels(n: int) -> Tensor:
    return torch.randint(0, LEVELS, (n, 1, 4, 4), dtype=torch.uint8)


def splits_of(values: Tensor, **known: Any) -> Splits:
    third = len(values) // 3
    train, validation, test = values[third:-third], values[-third:], values[:third]
    parts = [TensorSamples(part) for part in (train, validation, test)]
    return Splits("test data", *parts, event_shape=tuple(values.shape[1:]), **known)


# -- scores ----------------------------------------------------------------------------------------------------------


def test_a_score_is_the_mean_in_both_units_with_standard_errors() -> None:
    draws = [[-3.0, -5.0, -7.0], [-4.0, -6.0, -8.0]]
    score = Score.of(torch.tensor(draws), d=2)
    assert score.nats == pytest.approx(-5.5)
    per_sample = [-3.5, -5.5, -7.5]
    assert score.nats_error == pytest.approx(np.std(per_sample, ddof=1) / math.sqrt(3))
    bits = [5 / 2 / math.log(2), 6 / 2 / math.log(2)]
    assert score.bits == pytest.approx(np.mean(bits))
    assert score.bits_error == pytest.approx(np.std(bits, ddof=1) / math.sqrt(2))


def test_one_draw_has_no_error_over_draws() -> None:
    score = Score.of(torch.tensor([[-3.0, -5.0]]), d=2)
    assert score.bits_error is None
    assert score.nats_error == pytest.approx(1.0)
    assert Score.of(torch.tensor([[-3.0]]), d=2).nats_error is None


def normal_score(y: Tensor) -> Tensor:
    return -0.5 * (y.square() + math.log(2 * math.pi)).flatten(1).sum(1)


def by_hand(x: Tensor) -> Tensor:
    """``log p`` of dequantised pixels ``p + u`` under a standard normal of their logits (docs/design.md §2)."""
    q = ALPHA + (1 - 2 * ALPHA) * x / LEVELS
    y = torch.log(q / (1 - q))
    log_det = (math.log(1 - 2 * ALPHA) - torch.log(q) - torch.log1p(-q)).flatten(1).sum(1)
    return normal_score(y) + log_det - 16 * math.log(LEVELS)


def test_weights_of_test_samples_weigh_their_scores() -> None:
    """Of whole weights: the score of the samples, each as often as it weighs; the baselines' too."""
    x = torch.randn(300, 2).double() * torch.tensor([1.0, 4.0])
    counts = torch.arange(100) % 4 + 1
    once, often = splits_of(x), splits_of(x)
    weighted = replace(once, test=once.test.carrying(weight=counts.double()))
    often = replace(often, test=TensorSamples(x[:100].repeat_interleave(counts, 0)))
    flow = vectors(sample=x, divergence={"kind": "exact"})
    found, expected = (evaluate(flow, splits) for splits in (weighted, often))
    assert found.score.nats == pytest.approx(expected.score.nats, abs=1e-9)
    assert found.score.bits == pytest.approx(expected.score.bits, abs=1e-9)
    assert found.score.nats != pytest.approx(evaluate(flow, once).score.nats, abs=1e-3)
    assert found.baselines["gaussian"].nats == pytest.approx(expected.baselines["gaussian"].nats, abs=1e-9)
    assert any("scored by weight" in note for note in found.notes)
    plain, same = Score.of(x[:, :1].T, 1), Score.of(x[:, :1].T, 1, torch.full((300,), 7.0))
    assert same.nats_error == pytest.approx(plain.nats_error)


def test_bits_per_dimension_of_the_identity_flow_are_those_of_the_formula() -> None:
    x = pixels(6)
    report = evaluate(images(identity=True), x, config=EvaluationConfig(draws=3))
    values = []
    for draw in range(3):
        u = torch.rand(x.shape, generator=seeds.generator(0, "evaluate", draw, 0), dtype=torch.float64)
        values.append(by_hand(x + u))
    bits = -torch.stack(values).mean(1) / 16 / math.log(2)
    assert report.score.bits == pytest.approx(float(bits.mean()), rel=1e-10)
    assert report.score.bits_error == pytest.approx(float(bits.std()) / math.sqrt(3), rel=1e-8)
    assert report.score.nats == pytest.approx(float(torch.stack(values).mean()), rel=1e-10)
    assert report.bin_centre is not None
    centre = -float(by_hand(x.double() + 0.5).mean()) / 16 / math.log(2)
    assert report.bin_centre.bits == pytest.approx(centre, rel=1e-10)
    assert (report.E, report.n, report.inversion_error) == (0, 0, pytest.approx(0, abs=1e-12))
    assert (report.discrete, report.dim, report.samples, report.draws) == (True, 16, 6, 3)


def test_bits_per_dimension_are_those_of_the_flows_density() -> None:
    flow, x = images(), pixels(6)
    report = evaluate(flow, x, config=EvaluationConfig(draws=2))
    values = []
    for draw in range(2):
        u = torch.rand(x.shape, generator=seeds.generator(0, "evaluate", draw, 0), dtype=torch.float64)
        values.append(flow.log_prob(x + u, divergence="exact"))
    assert report.score.bits == pytest.approx(-float(torch.stack(values).mean()) / 16 / math.log(2), rel=1e-9)
    assert report.bin_centre is not None
    centre = -float(flow.log_prob(x + 0.5, divergence="exact").mean()) / 16 / math.log(2)
    assert report.bin_centre.bits == pytest.approx(centre, rel=1e-9)
    assert abs(report.bin_centre.bits - report.score.bits) > 1e-3  # two numbers, never mixed
    text = str(report)
    assert f"{report.score.bits:.4f} ± {report.score.bits_error:.4f}" in text
    assert f"pyrnode at bin centres{report.bin_centre.bits:16.4f}" in text
    assert text.startswith("bits/dim")


def test_uniform_pixels_are_scored_by_their_own_density_at_log2_of_the_levels() -> None:
    # With no transform in the way a uniform density of p + u on [0, L)^d has log p = −d log L: log2 L bits/dim.
    for levels in (17, 256):
        draws = torch.full((4, 100), -12 * math.log(levels), dtype=torch.float64)
        assert Score.of(draws, 12).bits == pytest.approx(math.log2(levels), rel=1e-12)


def test_continuous_scores_are_the_flows_density_in_the_datas_units() -> None:
    sample = torch.randn(50, 2) * torch.tensor([3.0, 0.1])
    flow = vectors(sample=sample)
    report = evaluate(flow, sample)
    log_prob = flow.log_prob(sample, divergence="exact")
    assert report.score.nats == pytest.approx(float(log_prob.mean()), rel=1e-10)
    assert report.score.nats_error == pytest.approx(float(log_prob.std()) / math.sqrt(50), rel=1e-8)
    assert report.bin_centre is None
    assert (report.draws, report.divergence) == (1, "exact")  # nothing random: more draws would be the same
    assert "nats per sample" in str(report)


def test_rescaled_data_score_the_logarithm_of_the_scale_more() -> None:
    sample = torch.randn(60, 3, dtype=torch.float64)
    reports = []
    for factor in (1.0, 10.0):
        values = sample * factor
        reports.append(evaluate(vectors(3, identity=True, sample=values), splits_of(values)))
    for name in ("gaussian", "mixture", "kde"):
        difference = reports[0].baselines[name].nats - reports[1].baselines[name].nats
        assert difference == pytest.approx(3 * math.log(10), rel=1e-6)
    assert reports[0].score.nats - reports[1].score.nats == pytest.approx(3 * math.log(10), rel=1e-9)


def test_regularity_and_evaluations_are_means_per_dimension_over_all_samples() -> None:
    flow, x = vectors(2, blocks=2), torch.randn(11, 2)
    report = evaluate(flow, x, config=EvaluationConfig(chunk=4, solver=DP5(1e-8)))
    solver = replace(flow.solver, rtol=1e-8, atol=1e-8)
    each = [flow.solve(flow.admit(one)[0], Probes.exact, solver) for one in x.split(1)]
    expected = [sum(float(solution.total(name)) for solution in each) / 11 / 2 for name in ("E", "n")]
    assert [report.E, report.n] == pytest.approx(expected, rel=1e-7)
    assert report.nfe == pytest.approx(sum(s.nfe for s in each) / 11)


@pytest.mark.parametrize("chunk", [1, 3, 4, 500])
def test_scores_do_not_depend_on_how_samples_are_batched(chunk: int) -> None:
    flow, x = vectors(), torch.randn(10, 2)
    whole = evaluate(flow, x, config=EvaluationConfig(chunk=10))
    report = evaluate(flow, x, config=EvaluationConfig(chunk=chunk))
    assert report.score.nats == pytest.approx(whole.score.nats, rel=1e-12)
    assert report.score.nats_error == pytest.approx(whole.score.nats_error, rel=1e-10)
    assert (report.E, report.n) == pytest.approx((whole.E, whole.n), rel=1e-10)
    assert report.nfe == pytest.approx(whole.nfe)


def test_more_probes_come_nearer_to_the_exact_score() -> None:
    flow, x = vectors(4), torch.randn(40, 4)
    exact = evaluate(flow, x).score.nats
    errors = []
    for probes in (1, 64):
        settings = EvaluationConfig(divergence=Divergence("hutchinson", probes), draws=4)
        report = evaluate(flow, x, config=settings)
        assert report.divergence == f"{probes} probe(s)"
        assert report.draws == 4
        errors.append(abs(report.score.nats - exact))
    assert errors[1] < errors[0]
    assert errors[1] < 0.02


# -- solvers ---------------------------------------------------------------------------------------------------------


def test_a_solver_agrees_with_itself() -> None:
    flow, x = images(), pixels(5)
    report = evaluate(flow, x, config=EvaluationConfig(chunk=3), training_solver=flow.solver)
    assert report.disagreement == 0.0
    assert report.training_solver == report.solver == "DP5 rtol 1e-05 atol 1e-05"


def test_the_disagreement_is_the_mean_difference_of_the_two_solvers() -> None:
    flow, x = vectors(), torch.randn(9, 2) * 2
    coarse = SolverConfig(name="Euler", step_size=0.5)
    report = evaluate(flow, x, training_solver=coarse)
    difference = flow.log_prob(x, solver=coarse, divergence="exact") - flow.log_prob(x, divergence="exact")
    assert report.disagreement == pytest.approx(float(difference.abs().mean()) / 2, rel=1e-9)
    assert report.disagreement > 1e-3
    assert report.training_solver == "Euler step 0.5"
    default = evaluate(flow, x)
    assert default.training_solver == "RK4 step 1.0"  # where training would begin
    assert default.disagreement is not None
    assert default.disagreement < report.disagreement


def test_an_accurate_solver_is_used_whatever_training_used() -> None:
    flow, x = vectors(), torch.randn(9, 2)
    reports = [
        evaluate(flow, x, config=EvaluationConfig(solver=SolverConfig(name=name, rtol=1e-9, atol=1e-9)))
        for name in ("Tsit5", "DP8")
    ]
    assert reports[0].score.nats == pytest.approx(reports[1].score.nats, rel=1e-7)
    assert reports[0].solver == "Tsit5 rtol 1e-09 atol 1e-09"


def test_a_training_solver_that_fails_does_not_lose_the_score(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, x = vectors(), torch.randn(9, 2)
    expected = evaluate(flow, x)
    original = Flow.solve

    def failing(self: Flow, y: Tensor, draw: Any = no_probes, solver: SolverConfig | None = None, **more: Any) -> Any:
        if solver is not None and solver.name == "RK4":
            raise SolverError("block 0: the state is not finite", status="Unstable", block=0)
        return original(self, x, draw, solver, **more)

    monkeypatch.setattr(Flow, "solve", failing)
    report = evaluate(flow, x)
    assert report.score == expected.score
    assert report.disagreement is None
    note = "the training solver (RK4 step 1.0) fails on test data: block 0: the state is not finite"
    assert report.notes == [note]
    assert note in str(report)


def test_the_inversion_error_is_that_of_encoding_and_decoding() -> None:
    flow, x = vectors(), torch.randn(9, 2)
    loose = EvaluationConfig(solver=DP5(1e-2))
    report = evaluate(flow, x, config=loose)
    solver = replace(flow.solver, rtol=1e-2, atol=1e-2)
    passage = flow.solve(flow.admit(x)[0], solver=solver)
    error = float((flow.unsolve(passage.z, solver) - passage.y).abs().max())
    assert report.inversion_error == pytest.approx(error)
    assert error > 1e-6
    assert evaluate(flow, x, config=EvaluationConfig(solver=DP5(1e-9))).inversion_error < 1e-7


# -- reproducibility and input ---------------------------------------------------------------------------------------


def test_the_seed_decides_the_noise() -> None:
    flow, x = images(), pixels(8)
    settings = EvaluationConfig(divergence=Divergence("hutchinson"), draws=2, chunk=3)
    torch.manual_seed(1)
    first = evaluate(flow, x, config=settings, seed=5)
    torch.manual_seed(2)
    second = evaluate(flow, x, config=settings, seed=5)
    assert replace(first, seconds=0.0) == replace(second, seconds=0.0)
    assert evaluate(flow, x, config=settings, seed=6).score != first.score


def test_the_test_limit_bounds_the_samples() -> None:
    flow, x = vectors(), torch.randn(30, 2)
    report = evaluate(flow, x, config=EvaluationConfig(test_limit=7, chunk=4))
    assert report.samples == 7
    assert report.score == evaluate(flow, x[:7], config=EvaluationConfig(chunk=4)).score


def test_arrays_and_splits_and_names_are_data() -> None:
    flow = vectors(sample=torch.randn(50, 2), samples=300)
    x = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
    assert evaluate(flow, x).score == evaluate(flow, torch.from_numpy(x)).score
    splits = load("8gaussians", config=DataConfig(samples=300))
    by_name, by_splits = evaluate(flow, "8gaussians"), evaluate(flow, splits)
    assert replace(by_name, seconds=0.0) == replace(by_splits, seconds=0.0)
    assert by_name.score == evaluate(flow, splits.test.tensor()).score
    assert evaluate(flow, splits, baselines=False).baselines == {}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (torch.zeros(0, 2), "no test samples"),
        (torch.zeros(5), "samples: expected a tensor"),
        (torch.zeros(5, 3), r"shape \(5, 3\): expected \(batch, 2\)"),
        (torch.tensor([[0.0, math.nan]]), "NaN"),
        ("8gausians", "did you mean '8gaussians'"),
        (None, "no data"),
        ({"a": 1}, "cannot load a dict"),
    ],
)
def test_bad_data_is_a_data_error(data: Any, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        evaluate(vectors(), data)


def test_discrete_data_must_be_integers_in_range() -> None:
    with pytest.raises(DataError, match="expected integers 0 to 4, not floats"):
        evaluate(images(), pixels(3).float())
    with pytest.raises(DataError, match="expected 0 to 4"):
        evaluate(images(), pixels(3) + 5)


def test_unknown_solvers_of_the_evaluation_are_errors() -> None:
    with pytest.raises(pyrnode.EngineUnavailableError, match="did you mean 'DP5'"):
        evaluate(vectors(), torch.randn(3, 2), config=EvaluationConfig(solver=SolverConfig(name="DP55")))
    with pytest.raises(ConfigError, match="draws = 0"):
        EvaluationConfig(draws=0)


# -- baselines and truth ---------------------------------------------------------------------------------------------


def test_the_gaussian_baseline_scores_gaussian_data_at_their_entropy() -> None:
    root = torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.5, 0.0], [-3.0, 0.2, 4.0]], dtype=torch.float64)
    x = torch.randn(9000, 3, dtype=torch.float64) @ root.T + torch.tensor([5.0, -1.0, 0.0])
    report = evaluate(vectors(3, identity=True, sample=x), splits_of(x), config=EvaluationConfig(test_limit=3000))
    entropy = 1.5 * math.log(2 * math.pi * math.e) + float(root.diagonal().log().sum())
    score = report.baselines["gaussian"]
    assert score.nats_error == pytest.approx(math.sqrt(1.5 / 3000), rel=0.05)  # −log p varies by d/2
    assert score.nats == pytest.approx(-entropy, abs=4 * score.nats_error)
    # The identity after standardising is the Gaussian without correlations, which is worse by their information.
    variances = root.square().sum(1)
    diagonal = 1.5 * math.log(2 * math.pi * math.e) + 0.5 * float(variances.log().sum())
    assert report.score.nats == pytest.approx(-diagonal, abs=0.1)
    assert report.score.nats < score.nats - 1


def test_baselines_are_scored_on_the_same_samples_in_the_same_units() -> None:
    x = torch.cat((pixels(60) // 2, pixels(60)))
    splits = splits_of(x, levels=LEVELS)
    report = evaluate(images(identity=True), splits, config=EvaluationConfig(draws=2, test_limit=20))
    assert set(report.baselines) == {"gaussian", "mixture", "kde"}
    # A fitted Gaussian must beat the standard one, which is what the identity flow is.
    assert report.baselines["gaussian"].bits < report.score.bits
    for score in report.baselines.values():
        assert score.bits == pytest.approx(-score.nats / 16 / math.log(2), rel=1e-9)
        assert score.bits_error is not None
        assert score.bits > 0
    for name, score in report.baselines.items():
        assert f"{name:<28}{score.bits:10.4f}" in str(report)


def test_no_baselines_above_128_dimensions_and_it_says_so() -> None:
    x = torch.randn(30, 129)
    report = evaluate(
        vectors(129, identity=True),
        splits_of(x),
        config=EvaluationConfig(divergence=Divergence("hutchinson"), draws=1),
    )
    assert report.baselines == {}
    assert report.notes == ["baselines are fitted up to 128 dimensions; this data has 129"]


def test_the_gap_is_the_divergence_from_the_truth() -> None:
    """The identity flow is the standardisation's normal density, which torch knows too."""
    splits = load("8gaussians", config=DataConfig(samples=600))
    x = splits.train.tensor()
    report = evaluate(vectors(identity=True, sample=x), splits)
    assert splits.density is not None
    assert report.true_entropy == splits.density.entropy()
    test = splits.test.tensor().double()
    normal = torch.distributions.Normal(x.double().mean(0), x.double().std(0, correction=0))
    differences = splits.density.log_prob(test) - normal.log_prob(test).sum(1)
    assert report.gap == pytest.approx(float(differences.mean()), abs=1e-5)
    assert report.gap_error == pytest.approx(float(differences.std(correction=0)) / math.sqrt(len(test)), abs=1e-5)
    assert f"gap {report.gap:.4f} ± {report.gap_error:.4f} nats" in str(report)
    unknown = evaluate(vectors(identity=True, sample=x), splits.test.tensor())
    assert (unknown.true_entropy, unknown.gap, unknown.gap_error) == (None, None, None)


# -- progress --------------------------------------------------------------------------------------------------------


def test_the_bar_counts_every_block_of_every_pass(capsys: pytest.CaptureFixture[str]) -> None:
    """One chunk holds all samples: the bar moves within it, names each pass, and ends full."""
    flow = Flow.build(Config().override({"hidden": [3], "blocks": 5}), (2,))
    seen = list[int]()

    class Bar:
        def update(self, n: int) -> None:
            seen.append(n)

    scorer = pyrnode.evaluation._Scorer(flow, EvaluationConfig(), 0)
    with torch.no_grad():
        scorer.score(TensorSamples(torch.randn(12, 2)), 12, flow.solver, 2, Bar())
    assert seen == [2, 2, 3, 2, 3] * 2
    evaluate(flow, torch.randn(12, 2), progress=True)
    said = capsys.readouterr().err
    assert "evaluate: training solver" in said
    assert "evaluate: way back: 100%" in said
    assert "24/24" in said


def test_a_bar_moves_while_one_piece_is_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.05)
    with progress.progress_bar(3, "one long piece", unit="piece", show=True):
        time.sleep(0.6)
    assert capsys.readouterr().err.count("one long piece:   0%| ") >= 5
    assert [thread.name for thread in threading.enumerate() if thread.name == "pyrnode progress"] == []
