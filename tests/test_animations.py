"""Animations: each frame holds the particles and the density of its time, and the file is whole or is not there."""

from __future__ import annotations

import itertools
import math
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pyrnode import animations, particles
from pyrnode.cli import main
from pyrnode.config import Config
from pyrnode.dynamics import ModuleDynamics
from pyrnode.errors import CheckpointError, ConfigError, DataError
from pyrnode.flow import Flow

RATE = 0.7


class _Growth(torch.nn.Module):
    """``f(t, z) = a z``: from the time t to the end T all distances grow by exp(a (T − t))."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(RATE))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.a * z


def growing(d: int, blocks: int = 1) -> Flow:
    config = Config().override({"dtype": "float64", "flow.blocks": blocks, "flow.standardize": "none"})
    config = config.override({"evaluation.solver.rtol": 1e-9, "evaluation.solver.atol": 1e-9})
    return Flow.build(config, (d,), dynamics=lambda shape: ModuleDynamics(_Growth(), shape))


def log_normal(z: np.ndarray, deviation: float) -> np.ndarray:
    d = z.shape[-1]
    return -0.5 * (z**2).sum(-1) / deviation**2 - d * math.log(deviation * math.sqrt(2 * math.pi))


@pytest.mark.parametrize(("d", "blocks"), [(1, 1), (2, 1), (2, 3)])
def test_the_density_at_every_time_has_the_closed_form(d: int, blocks: int) -> None:
    z = torch.randn(20, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for time in (0.0, 0.3, 1.0, blocks - 0.5, float(blocks)):
        found = animations.log_density_at(growing(d, blocks), z, time).numpy()
        np.testing.assert_allclose(found, log_normal(z.numpy(), math.exp(-RATE * (blocks - time))), atol=1e-4)


def test_at_time_0_it_is_the_flows_own_density() -> None:
    flow, z = growing(2, 2), torch.tensor([[0.1, -0.4]], dtype=torch.float64)
    torch.testing.assert_close(animations.log_density_at(flow, z, 0.0), flow.log_prob(z).detach())


def test_frames_show_the_particles_and_the_density_of_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow, x = growing(2), torch.tensor([[0.5, 0.0], [-0.2, 0.3], [0.0, -0.4]], dtype=torch.float64)
    times, states = particles.particle_paths(flow, x, 5)
    seen: list[tuple[np.ndarray, np.ndarray, list[np.ndarray], str]] = []

    @contextmanager
    def looking(figure: Any, path: Path) -> Iterator[Any]:
        left, right = figure.axes[:2]

        def grab() -> None:
            paths, _, dots = right.collections
            array = np.asarray(left.images[0].get_array())
            seen.append((array, dots.get_offsets(), paths.get_segments(), figure.get_suptitle()))

        yield grab
        path.write_bytes(b"made")
        extent = left.images[0].get_extent()
        assert extent[1] - extent[0] == pytest.approx(extent[3] - extent[2])
        assert (*right.get_xlim(), *right.get_ylim()) == pytest.approx(extent)
        side = [a + (b - a) * (np.arange(8) + 0.5) / 8 for a, b in (extent[:2], extent[2:])]
        grid = np.stack(np.meshgrid(*side), -1)  # rows are y
        for index, (shown, offsets, segments, _) in zip(reversed(range(5)), seen, strict=False):
            expected = np.exp(log_normal(grid, math.exp(-RATE * (1 - float(times[index])))))
            np.testing.assert_allclose(shown, expected / expected.max(), rtol=1e-3, atol=1e-9)
            np.testing.assert_allclose(offsets, states[index])
            np.testing.assert_allclose(segments, states[index:].transpose(0, 1))

    monkeypatch.setattr(animations, "_grabbing", looking)
    animations.animate(flow, x, tmp_path / "x.gif", frames=5, resolution=8)
    assert [text for *_, text in seen[:5]] == [
        "$t$ = 1.00 (the base)", "$t$ = 0.75", "$t$ = 0.50", "$t$ = 0.25", "$t$ = 0.00 (the data)",
    ]  # fmt: skip
    assert {text for *_, text in seen[5:]} == {"$t$ = 0.00 (the data)"}
    assert (tmp_path / "x.gif").read_bytes() == b"made"


@pytest.mark.parametrize("d", [1, 2])
def test_a_gif_has_a_frame_for_each_time_and_stands_still_at_the_end(d: int, tmp_path: Path) -> None:
    x = torch.randn(6, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    animations.animate(growing(d), x, tmp_path / "x.GIF", frames=4, resolution=6)
    with Image.open(tmp_path / "x.GIF") as image:
        assert (image.format, image.size, image.n_frames) == ("GIF", (900, 450), 4)  # type: ignore[attr-defined]
        durations, frames = [], []
        for number in range(4):
            image.seek(number)
            durations.append(image.info["duration"])
            frames.append(np.asarray(image.convert("RGB")).astype(int))
    assert durations == [80, 80, 80, 1070]  # of 83 ms each, in whole hundredths of a second
    for a, b in itertools.pairwise(frames):
        assert (np.abs(a - b).max(2) > 40).sum() > 50
    assert list(tmp_path.iterdir()) == [tmp_path / "x.GIF"]


def test_one_line_of_particles_moves_with_its_density(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flow, x, seen = growing(1), torch.tensor([[0.5], [-1.0]], dtype=torch.float64), []

    @contextmanager
    def looking(figure: Any, path: Path) -> Iterator[Any]:
        yield lambda: seen.append((figure.axes[0].lines[0].get_data(), figure.axes[1].collections[0].get_offsets()))
        path.write_bytes(b"made")

    monkeypatch.setattr(animations, "_grabbing", looking)
    animations.animate(flow, x, tmp_path / "x.gif", frames=3, resolution=40)
    for time, ((density, z), dots) in zip((1.0, 0.5, 0.0), seen, strict=False):
        expected = np.exp(log_normal(z[:, None], math.exp(-RATE * (1 - time))))
        np.testing.assert_allclose(density, expected / expected.max(), rtol=1e-3)
        np.testing.assert_allclose(
            dots, [[time, 0.5 * math.exp(RATE * time)], [time, -math.exp(RATE * time)]], rtol=1e-4
        )


# -- ffmpeg ----------------------------------------------------------------------------------------------------------


def program(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_an_mp4_is_what_ffmpeg_makes_of_all_frames(tmp_path: Path) -> None:
    fake = program(tmp_path / "ffmpeg", 'for last; do :; done; wc -c > "$last"')  # it counts what it is piped
    with matplotlib.rc_context({"animation.ffmpeg_path": fake}):
        animations.animate(growing(1), torch.ones(2, 1), tmp_path / "x.mp4", frames=3, resolution=5)
    assert int((tmp_path / "x.mp4").read_text()) == (3 + 12) * 900 * 450 * 4


def test_an_mp4_that_ffmpeg_cannot_write_is_an_error_and_no_file(tmp_path: Path) -> None:
    fake = program(tmp_path / "ffmpeg", "cat > /dev/null; exit 3")
    with matplotlib.rc_context({"animation.ffmpeg_path": fake}), pytest.raises(CheckpointError, match="encoder h264"):
        animations.animate(growing(1), torch.ones(2, 1), tmp_path / "x.mp4", frames=3, resolution=5)
    assert list(tmp_path.iterdir()) == [tmp_path / "ffmpeg"]


@pytest.mark.skipif(animations.ffmpeg() is None, reason="no ffmpeg, nor imageio-ffmpeg: no MP4 can be written")
def test_a_real_mp4_can_be_read_again(tmp_path: Path) -> None:
    animations.animate(growing(2), torch.ones(2, 2), tmp_path / "x.mp4", frames=5, resolution=5)
    read = ["-v", "error", "-i", str(tmp_path / "x.mp4"), "-f", "rawvideo", "-pix_fmt", "gray", "-"]
    raw = subprocess.run([str(animations.ffmpeg()), *read], capture_output=True, check=True).stdout
    frames = np.frombuffer(raw, np.uint8).reshape(5 + 12, 450, 900)
    assert frames.std((1, 2)).min() > 10  # none is empty
    assert [bool((abs(a.astype(int) - b) > 60).any()) for a, b in itertools.pairwise(frames)] == [True] * 4 + [
        False
    ] * 12


class Package:
    """imageio-ffmpeg, which brings a program, or cannot find its own."""

    def __init__(self, found: str | None) -> None:
        self._found = found

    def get_ffmpeg_exe(self) -> str:
        if self._found is None:
            raise RuntimeError("No ffmpeg exe could be found.")
        return self._found


def test_the_ffmpeg_of_a_package_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = program(tmp_path / "of the package", 'for last; do :; done; wc -c > "$last"')
    monkeypatch.setattr(animations.util, "find_spec", lambda name: name == "imageio_ffmpeg" or None)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", Package(fake))
    with matplotlib.rc_context({"animation.ffmpeg_path": str(tmp_path / "nowhere")}):
        assert animations.ffmpeg() == fake
        animations.animate(growing(1), torch.ones(2, 1), tmp_path / "x.mp4", frames=3, resolution=5)
        assert int((tmp_path / "x.mp4").read_text()) == (3 + 12) * 900 * 450 * 4
        monkeypatch.setitem(sys.modules, "imageio_ffmpeg", Package(None))
        assert animations.ffmpeg() is None
    own = program(tmp_path / "ffmpeg", "exit")
    with matplotlib.rc_context({"animation.ffmpeg_path": own}):  # the path's goes first
        assert animations.ffmpeg() == own


def test_without_ffmpeg_the_error_names_it_and_nothing_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(animations, "particle_paths", None)
    monkeypatch.setattr(animations.util, "find_spec", lambda name: None)
    missing = matplotlib.rc_context({"animation.ffmpeg_path": str(tmp_path / "nowhere")})
    with (
        missing,
        pytest.raises(
            ConfigError,
            match=r"program ffmpeg.*pip install imageio-ffmpeg; .*apt install ffmpeg.*end the name in \.gif",
        ),
    ):
        animations.animate(growing(1), torch.ones(2, 1), tmp_path / "x.mp4")


# -- what cannot be drawn --------------------------------------------------------------------------------------------


def test_what_cannot_be_drawn_is_named(tmp_path: Path) -> None:
    flow, x, gif = growing(2), torch.ones(2, 2), tmp_path / "x.gif"
    with pytest.raises(ConfigError, match=r"x\.png': end the animation's name in \.gif or \.mp4"):
        animations.animate(flow, x, tmp_path / "x.png")
    with pytest.raises(ConfigError, match="points = 1"):
        animations.animate(flow, x, gif, frames=1)
    with pytest.raises(ConfigError, match="resolution = 1"):
        animations.animate(flow, x, gif, resolution=1)
    with pytest.raises(DataError, match=r"event shape \(3,\)"):
        animations.animate(growing(3), torch.ones(2, 3), gif)
    with pytest.raises(DataError, match="conditional"):
        animations.animate(Flow.build(Config(), (2,), context_dim=1), x, gif)
    with pytest.raises(ConfigError, match=r"time = 1\.5: expected 0, the data, to 1, the base"):
        animations.log_density_at(flow, x.double(), 1.5)
    assert list(tmp_path.iterdir()) == []


def test_the_command_sample_writes_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flow = Flow.build(Config().override({"hidden": [4]}), (2,))
    flow.save(tmp_path / "flow.safetensors")
    arguments = ["sample", str(tmp_path / "flow.safetensors"), "--out", str(tmp_path / "x.gif"), "-n", "20", "--quiet"]
    assert main([*arguments, "--temperature", "0.5"]) == 1
    assert "leave --temperature out" in capsys.readouterr().err
    assert not (tmp_path / "x.gif").exists()
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"20 samples written to {tmp_path / 'x.gif'}\n"
    with Image.open(tmp_path / "x.gif") as image:
        assert image.format == "GIF"
