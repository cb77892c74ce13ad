"""A flow as the density estimator of `sbi`, in its neural posterior estimation."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

pytest.importorskip("sbi", reason="sbi is not installed: pip install sbi (pyrnode itself does not need it)")

EXAMPLE = str(Path(__file__).parent.parent / "examples/inside_sbi.py")


@pytest.mark.filterwarnings("ignore:Maximum number of epochs")
def test_sbi_trains_a_flow_and_samples_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # sbi writes its logs there
    monkeypatch.setattr("sys.argv", ["inside_sbi.py", "--quick"])
    values = runpy.run_path(EXAMPLE)["main"]()
    assert values["untrained"] > 0.8  # KL(posterior ‖ prior)
    assert -0.02 < values["trained"] < 0.15
    assert values["mean"] < 0.15  # the posterior's standard deviations are about 0.4
    assert values["std"] < 0.1
