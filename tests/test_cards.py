"""Model cards: beside each model that a run saves, with its own numbers, and safe whatever the data's names are."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import pyrnode
from pyrnode import cards
from pyrnode.config import Config
from pyrnode.data import Splits, TensorSamples
from pyrnode.evaluation import Report, Score
from pyrnode.flow import Flow

TINY = {"hidden": [4], "max_steps": 2, "batch_size": 16, "progress": False}


def frame(rows: int = 80) -> pd.DataFrame:
    names = ["age", "height `in` m", "c"]
    return pd.DataFrame(np.random.default_rng(0).normal(size=(rows, 3)), columns=names)


def test_a_run_leaves_a_card_with_its_own_numbers(tmp_path: Path) -> None:
    result = pyrnode.train(frame(), out=tmp_path / "run", seed=3, **TINY)
    text = (tmp_path / "run" / cards.NAME).read_text(encoding="utf-8")
    assert re.findall("^#+ (.*)$", text, re.MULTILINE)[1:] == ["Data", "Training", "Scores", "Limits"]
    assert str(result.report) in text
    count = sum(p.numel() for p in result.flow.parameters())
    assert "vectors of 3 columns, continuous: `log_prob` in nats" in text
    assert f"{count:,} parameters, float32" in text
    assert "64 train, 8 validation, 8 test samples" in text
    assert "Columns: `age`, `` height `in` m ``, `c`." in text
    assert "2 optimiser steps, seed 3" in text
    best = min(record["validation"] for record in result.history if "validation" in record)
    assert f"Best validation {best:.4f} nats per dimension" in text
    assert f"`pyrnode.load('{next((tmp_path / 'run').glob('model.*')).name}')` reads it" in text
    assert "It was fitted to 64 samples" in text


def test_a_run_that_is_not_scored_says_so(tmp_path: Path) -> None:
    context = torch.randn(80, 2)
    pyrnode.train(torch.randn(80, 1), context=context, out=tmp_path, evaluate=False, **TINY)
    text = (tmp_path / cards.NAME).read_text(encoding="utf-8")
    assert "None: the run was not scored" in text
    assert "on vectors of 1 column, continuous, given a context of 2 features" in text


def test_a_run_that_saves_no_model_has_no_card(tmp_path: Path) -> None:
    from tests.test_animations import _Growth

    pyrnode.train(torch.randn(80, 2), out=tmp_path, evaluate=False, dynamics=lambda shape: _Growth(), **TINY)
    assert not (tmp_path / "model.safetensors").exists()
    assert not (tmp_path / cards.NAME).exists()


def test_a_card_that_fails_costs_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "model_card", lambda *_: 1 / 0)
    result = pyrnode.train(torch.randn(80, 1), out=tmp_path, evaluate=False, **TINY)
    assert result.notes == ["the model card: left out (division by zero)"]


def report(own: float, other: float, error: float = 0.1) -> Report:
    score, baseline = (Score(value, error, 0.0, None) for value in (own, other))
    rest = {"bin_centre": None, "true_entropy": None, "gap": None, "gap_error": None, "disagreement": None}
    rest |= {"solver": "DP5", "divergence": "exact", "training_solver": "RK4", "E": 0.0, "n": 0.0, "nfe": 8.0}
    rest |= {"inversion_error": None, "samples": 8, "draws": 1, "seconds": 0.1, "discrete": False, "dim": 1}
    return Report(score=score, baselines={"kde": baseline}, **rest)  # type: ignore[arg-type]


@pytest.mark.parametrize(("own", "told"), [(-1.0, False), (-2.05, False), (-2.2, True)])
def test_a_baseline_that_is_better_by_more_than_the_error_is_the_first_limit(own: float, told: bool) -> None:
    part = TensorSamples(torch.randn(4, 1))
    splits = Splits("data", part, part, part, (1,))
    text = cards.model_card(Flow.build(Config(), (1,)), splits, report(own, -2.0), [])
    assert ("scores below a simple baseline: kde." in text) is told


def test_names_are_code_on_one_line_whatever_they_are() -> None:
    part = TensorSamples(torch.randn(4, 2))
    names = ("a\n# not a heading", "```<script>")
    splits = Splits("data\r\n## neither", part, part, part, (2,), features=names)
    text = cards.model_card(Flow.build(Config(), (2,)), splits, None, [])
    assert len(re.findall("^#", text, re.MULTILINE)) == 5
    assert "```` ```<script> ````" in text
    assert "<script>" not in re.sub("(`+).*?\\1", "", text)
