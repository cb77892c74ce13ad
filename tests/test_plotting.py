"""Pictures: what is drawn is what was computed, and the numbers behind the paths agree with closed forms."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from scipy.signal import savgol_filter
from torch import Tensor

from pyrnode import particles, plotting
from pyrnode.config import Config
from pyrnode.data import synthetic
from pyrnode.dynamics import ModuleDynamics
from pyrnode.errors import CheckpointError, ConfigError, DataError
from pyrnode.flow import Flow


def _history(steps: int = 200) -> list[dict[str, object]]:
    records: list[dict[str, object]] = []
    for step in range(1, steps + 1):
        noise = 0.05 * math.sin(37.0 * step)
        nll = 1 + 3 * math.exp(-step / 20) + noise
        records.append({"step": step, "loss": nll, "nll": nll, "E": 0.1 * step, "n": 20.0 + step, "nfe": 16.0})
        if step % 20 == 0:
            value = 1.1 + abs(step - 140) / 1000
            records.append({"step": step, "validation": value, "validation_bits": value / math.log(2)})
    return records


def _flow(d: int, *, blocks: int = 1, dtype: str = "float64", noise: float = 0.3) -> Flow:
    config = Config().override(
        {"dtype": dtype, "flow.blocks": blocks, "flow.standardize": "none", "network.hidden": [8]}
    )
    flow = Flow.build(config, (d,))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in flow.parameters():
            p += noise * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return flow


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


class _QuarterTurn(torch.nn.Module):
    """``f(t, z) = A z``: over unit time, a quarter turn."""

    def __init__(self) -> None:
        super().__init__()
        self.A = torch.nn.Parameter(torch.tensor([[0.0, -math.pi / 2], [math.pi / 2, 0.0]]))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return z @ self.A.T


def _rotation(blocks: int) -> Flow:
    config = Config().override({"dtype": "float64", "flow.blocks": blocks, "flow.standardize": "none"})
    return Flow.build(config, (2,), dynamics=lambda shape: ModuleDynamics(_QuarterTurn(), shape))


# --- learning curves ---


@pytest.mark.parametrize("window", [3, 5, 7])
def test_smooth_fits_lines(window: int) -> None:
    values = np.array([1.0, 4.0, 7.0, 2.0, 9.0, 3.0, 5.0, 8.0])
    expected = savgol_filter(values, window, 1, mode="interp")
    np.testing.assert_allclose(plotting.smooth(values, window), expected, atol=1e-12)
    np.testing.assert_allclose(plotting.smooth(values, window)[3], values[3 - window // 2 : 4 + window // 2].mean())


def test_smooth_of_what_is_short_or_no_window() -> None:
    np.testing.assert_allclose(plotting.smooth(np.arange(50.0), 11), np.arange(50.0), atol=1e-12)  # no lag
    values = np.array([1.0, 4.0, 7.0, 2.0])
    np.testing.assert_array_equal(plotting.smooth(values, 1), values)
    np.testing.assert_allclose(plotting.smooth(values, 99), plotting.smooth(values, 3))
    for few in (values[:2], values[:1], values[:0]):
        np.testing.assert_array_equal(plotting.smooth(few, 5), few)
    with pytest.raises(ConfigError, match="window = 4"):
        plotting.smooth(values, 4)


def test_a_smoothed_curve_is_as_smooth_at_its_ends() -> None:
    """It was as rough there as what it was made of: the window narrowed to one value."""
    noise = np.random.default_rng(0).normal(size=(2000, 101))
    ends = np.array([plotting.smooth(row, 21)[[0, -1]] for row in noise])
    assert ends.std() == pytest.approx(np.sqrt(1 / 21 + 100 / 770), rel=0.05)  # of a line's end: 0.42, where it was 1


@pytest.mark.parametrize(("unit", "scale"), [("nats/dim", 1.0), ("bits/dim", 1 / math.log(2))])
def test_learning_curves_draw_the_records_in_the_unit(unit: str, scale: float) -> None:
    history = _history()
    figure = plotting.learning_curves(history, unit=unit)
    likelihood, penalty, nfe = figure.axes[:3]
    lines = {line.get_label(): line.get_xydata() for line in likelihood.lines}
    validation = np.array([[r["step"], r["validation"] * scale] for r in history if "validation" in r])  # type: ignore[operator]
    np.testing.assert_allclose(lines["validation"], validation)
    (best,) = (data for label, data in lines.items() if label.startswith("best"))
    np.testing.assert_allclose(best, [[140, 1.1 * scale]])
    raw = [r["nll"] * scale for r in history if "nll" in r]  # type: ignore[operator]
    np.testing.assert_allclose(likelihood.lines[0].get_ydata(), raw)
    np.testing.assert_allclose(lines["training (mean of 5)"][:, 1], plotting.smooth(np.array(raw), 5))
    assert unit in likelihood.get_ylabel()
    assert nfe.lines[0].get_ydata().tolist() == [16.0] * 200
    inner = plotting.smooth(np.array([0.1 * s for s in range(1, 201)]), 5)
    np.testing.assert_allclose(penalty.lines[0].get_ydata(), inner)  # penalties have no unit


def test_learning_curves_show_the_solvers_disagreement_where_it_is_known() -> None:
    history = _history()
    assert len(plotting.learning_curves(history, unit="nats/dim").axes) == 4  # of which one for n
    for record in history:
        if "validation" in record:
            record["disagreement"] = 1e-4
    panel = plotting.learning_curves(history, unit="bits/dim").axes[3]
    np.testing.assert_allclose(panel.lines[0].get_ydata(), 1e-4 / math.log(2))
    assert panel.get_yscale() == "log"


def test_learning_curves_pass_over_events_and_values_that_are_not_finite() -> None:
    history = [
        *_history(20),
        {"step": 20, "event": "restart"},
        {"step": 21, "nll": math.nan, "E": math.inf, "nfe": None},
    ]
    panels = plotting.learning_curves(history, unit="nats/dim").axes
    assert panels[0].lines[0].get_xdata().tolist() == list(range(1, 21))
    assert all(np.isfinite(line.get_ydata()).all() for panel in panels for line in panel.lines)


def test_learning_curves_of_little(tmp_path: Path) -> None:
    one = [{"step": 1, "nll": 2.0, "E": 0.0, "n": 0.0, "nfe": 16.0}]
    for history in (one, [{"step": 1, "validation": 2.0}]):
        plotting.save(plotting.learning_curves(history, unit="nats/dim"), tmp_path / "curves.png")
        assert _pixels(tmp_path / "curves.png").shape == (690, 1500, 3)


def test_learning_curves_refuse() -> None:
    with pytest.raises(DataError, match="none of the history's 1 records"):
        plotting.learning_curves([{"step": 1, "nll": math.nan}], unit="nats/dim")
    with pytest.raises(ConfigError, match=r"unknown unit 'nats' \(did you mean 'nats/dim'"):
        plotting.learning_curves(_history(), unit="nats")


# --- images ---


def test_image_grid_is_sharp_and_exact(tmp_path: Path) -> None:
    images = torch.randint(0, 17, (5, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    plotting.save_image_grid(images, tmp_path / "direct.png", levels=17)
    plotting.save(plotting.image_grid(images, levels=17), tmp_path / "figure.png")
    pixels = _pixels(tmp_path / "direct.png")
    assert (pixels == _pixels(tmp_path / "figure.png")).all()
    assert pixels.shape == (2 * 82 + 2, 3 * 82 + 2, 3)  # 2 rows of 3, each pixel 10×10, gaps of 2
    for index in range(5):
        top, left = 2 + 82 * (index // 3), 2 + 82 * (index % 3)
        cell = pixels[top : top + 80, left : left + 80]
        expected = np.round(images[index, 0].double().numpy() * 255 / 16).repeat(10, 0).repeat(10, 1)
        assert (cell == expected[..., None]).all()
    assert (pixels[84:, 166:] == 255).all()  # the empty place


def test_image_grid_keeps_colours_and_takes_floats(tmp_path: Path) -> None:
    images = torch.zeros(2, 3, 90, 90, dtype=torch.float32)
    images[0, 0], images[1, 2] = 255.0, 127.4
    plotting.save_image_grid(images, tmp_path / "rgb.png", levels=256, rows=2)
    pixels = _pixels(tmp_path / "rgb.png")
    assert pixels.shape == (186, 94, 3)  # not enlarged
    assert pixels[50, 50].tolist() == [255, 0, 0]
    assert pixels[140, 50].tolist() == [0, 0, 127]


@pytest.mark.parametrize(
    ("images", "levels", "rows", "error", "message"),
    [
        (torch.zeros(3, 8, 8), 17, None, DataError, r"images of shape \(3, 8, 8\)"),
        (torch.zeros(3, 2, 8, 8), 17, None, DataError, "1 or 3 channels"),
        (torch.zeros(0, 1, 8, 8), 17, None, DataError, r"\(0, 1, 8, 8\)"),
        (torch.full((1, 1, 8, 8), 17.0), 17, None, DataError, "17 to 17: expected 0 to 16"),
        (torch.full((1, 1, 8, 8), -1.0), 17, None, DataError, "-1 to -1"),
        (torch.full((1, 1, 8, 8), math.nan), 17, None, DataError, "nan to nan"),
        (torch.zeros(3, 1, 8, 8), 1, None, ConfigError, "levels = 1"),
        (torch.zeros(3, 1, 8, 8), 17, 4, ConfigError, "rows = 4: expected 1 to 3"),
        (torch.zeros(3, 1, 8, 8), 17, 0, ConfigError, "rows = 0"),
    ],
)
def test_image_grid_refuses(
    images: Tensor, levels: int, rows: int | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        plotting.image_grid(images, levels=levels, rows=rows)


# --- densities ---


def test_density_2d_draws_each_density_the_right_way_up_on_one_scale() -> None:
    def truth(x: Tensor) -> Tensor:  # not symmetric: x1 and x2 must not be swapped or mirrored
        return -0.5 * ((x[:, 0] - 1).square() + (x[:, 1] + 0.5).square() / 0.25) - math.log(2 * math.pi * 0.5)

    def learned(x: Tensor) -> Tensor:
        return truth(x) + math.log(2)

    samples = torch.tensor([[1.0, -0.5], [9.0, 0.0]])
    figure = plotting.density_2d(learned, (-3, 4, -2, 2), truth=truth, samples=samples, title="test", resolution=40)
    left, right, points = figure.axes[:3]
    xs, ys = -3 + (np.arange(40) + 0.5) * 7 / 40, -2 + (np.arange(40) + 0.5) * 4 / 40
    expected = np.exp(-0.5 * ((xs[None] - 1) ** 2 + (ys[:, None] + 0.5) ** 2 / 0.25)) / math.pi
    np.testing.assert_allclose(left.images[0].get_array(), expected, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(right.images[0].get_array(), 2 * expected, rtol=1e-4, atol=1e-9)
    assert left.images[0].origin == "lower"
    assert left.images[0].get_extent() == [-3, 4, -2, 2]
    assert left.images[0].get_clim() == right.images[0].get_clim() == (0, pytest.approx(expected.max(), rel=1e-4))
    assert points.get_title() == "2 samples, 1 outside"
    np.testing.assert_allclose(points.collections[0].get_offsets(), samples)
    assert [panel.get_title() for panel in (left, right)] == ["true density", "learned density"]


def test_density_2d_takes_a_truth_with_zeros_and_a_flow() -> None:
    density = synthetic.density("checkerboard")  # log-density −∞ off the board
    flow = _flow(2, dtype="float32")
    figure = plotting.density_2d(flow.log_prob, density.bounds, truth=density.log_prob, resolution=16)
    board = np.asarray(figure.axes[0].images[0].get_array())
    np.testing.assert_allclose(np.unique(board), [0, 1 / 32], rtol=1e-5)  # eight squares of area 4
    x = torch.tensor([[-3.75, -3.25]])  # the centre of cell (1, 0)
    learned = figure.axes[1].images[0].get_array()
    np.testing.assert_allclose(learned[1, 0], flow.log_prob(x).exp().item(), rtol=1e-4)


def test_density_1d_draws_both_curves_and_a_histogram_of_area_one() -> None:
    density = synthetic.density("two-bumps")
    samples = density.sample(4000, seed=0)
    normal = torch.distributions.Normal(0.0, 1.0)
    figure = plotting.density_1d(lambda x: normal.log_prob(x[:, 0]), (-6, 6), truth=density.log_prob, samples=samples)
    (axes,) = figure.axes
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    x = lines["learned"][:, 0]
    np.testing.assert_allclose(lines["learned"][:, 1], np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi), rtol=1e-5)
    assert lines["true"][:, 1].sum() * (x[1] - x[0]) == pytest.approx(1, abs=1e-4)
    (stairs,) = axes.patches
    values, edges, _ = stairs.get_data()  # type: ignore[attr-defined]
    assert (values * np.diff(edges)).sum() == pytest.approx(1, abs=1e-9)
    assert axes.get_ylim()[1] > max(values.max(), lines["true"][:, 1].max()) * 1.2  # room for the legend


@pytest.mark.parametrize(
    ("bounds", "error", "message"),
    [
        ((1.0, 1.0, 0.0, 1.0), ConfigError, "each minimum below its maximum"),
        ((0.0, math.inf, 0.0, 1.0), ConfigError, "finite"),
        ((0.0, 1.0), ConfigError, r"bounds = \(0.0, 1.0\)"),
    ],
)
def test_density_2d_refuses_a_window(bounds: tuple[float, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plotting.density_2d(lambda x: x.sum(1), bounds)


def test_densities_refuse_bad_values() -> None:
    square = (0.0, 1.0, 0.0, 1.0)
    with pytest.raises(DataError, match=r"learned log-density is nan at x = \[0.25, 0.25\]"):
        plotting.density_2d(lambda x: x[:, 0] * math.nan, square, resolution=2)
    with pytest.raises(DataError, match="true log-density is inf"):
        plotting.density_2d(lambda x: x[:, 0], square, truth=lambda x: x[:, 0] + math.inf)
    with pytest.raises(DataError, match=r"shape \(4, 1\): expected \(4,\)"):
        plotting.density_2d(lambda x: x[:, :1], square, resolution=2)
    with pytest.raises(DataError, match=r"samples of shape \(3, 1\): expected \(n, 2\)"):
        plotting.density_2d(lambda x: x[:, 0], square, samples=torch.zeros(3, 1))
    with pytest.raises(DataError, match=r"samples of shape \(0, 1\)"):
        plotting.density_1d(lambda x: x[:, 0], (0, 1), samples=torch.zeros(0, 1))
    with pytest.raises(ConfigError, match="resolution = 1"):
        plotting.density_1d(lambda x: x[:, 0], (0, 1), resolution=1)


# --- paths ---


def test_paths_of_a_rotation_follow_the_closed_form() -> None:
    flow = _rotation(2)  # a quarter turn in each block
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    for points in (33, 8, 2):  # with 8, the blocks' border is between two times
        times, states = particles.particle_paths(flow, x, points)
        np.testing.assert_allclose(times, np.linspace(0, 2, points), atol=1e-12)
        angle = math.pi / 2 * times
        circle = torch.stack([angle.cos(), angle.sin()], 1)
        torch.testing.assert_close(states[:, 0], circle, atol=2e-4, rtol=0)
        torch.testing.assert_close(states[:, 1], 2 * circle.flip(1) * torch.tensor([-1.0, 1.0]), atol=4e-4, rtol=0)
    _, states = particles.particle_paths(flow, x, 201)
    assert particles.straightness(states) == pytest.approx(math.pi / 2, rel=1e-3)  # half a circle over its diameter
    assert particles.speed_variation(states) == pytest.approx(0, abs=1e-3)


def test_paths_start_at_the_transformed_data_and_end_at_the_latent() -> None:
    for d, blocks in ((1, 3), (2, 1), (3, 2)):
        flow = _flow(d, blocks=blocks)
        x = torch.randn(7, d, dtype=torch.float64)
        times, states = particles.particle_paths(flow, x, 5)
        assert times[-1].item() == pytest.approx(blocks)
        torch.testing.assert_close(states[0], flow.transform(x)[0])
        torch.testing.assert_close(states[-1], flow.encode(x).detach(), atol=1e-4, rtol=0)
        assert (states[-1] - states[0]).abs().max() > 0.05


def test_path_numbers_in_closed_form() -> None:
    t = torch.linspace(0, 1, 401, dtype=torch.float64)
    line = torch.stack([3 * t, 4 * t], 1)
    corner = torch.stack([(2 * t).clamp(max=1), (2 * t - 1).clamp(min=0)], 1)  # right, then up: 2 over √2
    still = torch.ones_like(line)
    assert particles.straightness(line[:, None]) == pytest.approx(1, abs=1e-12)
    assert particles.straightness(corner[:, None]) == pytest.approx(math.sqrt(2), abs=1e-12)
    mean = (1 + math.sqrt(2) + 1) / 3
    assert particles.straightness(torch.stack([line, corner, still], 1)) == pytest.approx(mean, abs=1e-12)
    faster = (t**2)[:, None, None]  # speed 2t: mean 1, standard deviation 1/√3
    assert particles.speed_variation(faster) == pytest.approx(1 / math.sqrt(3), abs=1e-4)
    assert particles.straightness(faster) == pytest.approx(1, abs=1e-12)
    assert particles.speed_variation(line[:, None]) == pytest.approx(0, abs=1e-12)
    assert particles.speed_variation(torch.stack([faster[:, 0], still[:, :1]], 1)) == pytest.approx(
        0.5 / math.sqrt(3), abs=1e-4
    )


def test_an_untrained_flow_does_not_move_its_particles() -> None:
    flow = Flow.build(Config(), (2,))
    _, states = particles.particle_paths(flow, torch.randn(5, 2))
    assert torch.equal(states, states[:1].expand_as(states))
    assert (particles.straightness(states), particles.speed_variation(states)) == (1.0, 0.0)


def test_trajectories_draw_the_paths() -> None:
    x = torch.randn(6, 2, dtype=torch.float64)
    flow = _flow(2)
    _, states = particles.particle_paths(flow, x, 9)
    (axes,) = particles.trajectories(flow, x, points=9).axes
    for particle, line in enumerate(axes.lines):
        np.testing.assert_allclose(line.get_xydata(), states[:, particle])
    start, end = (c.get_offsets() for c in axes.collections)
    np.testing.assert_allclose(start, states[0])
    np.testing.assert_allclose(end, states[-1])
    ratios = [particles.straightness(states[:, i : i + 1]) for i in range(6)]
    expected = f"path length / distance {np.median(ratios):.3f} (median)"
    assert axes.get_title() == f"{expected}, speed varies by {100 * particles.speed_variation(states):.0f} %"

    flow = _flow(1, blocks=2)
    times, states = particles.particle_paths(flow, x[:, :1], 9)
    (axes,) = particles.trajectories(flow, x[:, :1], points=9).axes
    *paths, border = axes.lines
    for particle, line in enumerate(paths):
        np.testing.assert_allclose(line.get_xydata(), torch.stack([times, states[:, particle, 0]], 1))
    assert list(border.get_xdata()) == [1.0, 1.0]


def test_paths_refuse() -> None:
    flow = _flow(3)
    with pytest.raises(DataError, match=r"event shape \(3,\): trajectories are drawn for \(1,\) or \(2,\)"):
        particles.trajectories(flow, torch.zeros(2, 3))
    with pytest.raises(ConfigError, match="points = 1"):
        particles.particle_paths(flow, torch.zeros(2, 3), 1)
    with pytest.raises(DataError, match=r"shape \(2, 2\)"):
        particles.particle_paths(flow, torch.zeros(2, 2))
    with pytest.raises(DataError, match="at least one particle"):
        particles.particle_paths(flow, torch.zeros(0, 3))
    with pytest.raises(DataError, match="flow on images"):
        particles.particle_paths(Flow.build(Config(), (1, 8, 8), levels=17), torch.zeros(1, 1, 8, 8))
    for function in (particles.straightness, particles.speed_variation):
        with pytest.raises(DataError, match=r"states of shape \(1, 2, 3\)"):
            function(torch.zeros(1, 2, 3))


# --- files ---


def test_save_writes_a_whole_png_or_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = Figure(figsize=(2, 1))
    path = tmp_path / "picture.png"
    plotting.save(figure, path)
    with Image.open(path) as image:
        assert (image.format, image.size) == ("PNG", (300, 150))  # 150 dots per inch
        assert image.info["dpi"] == pytest.approx((150, 150), abs=0.02)
    before = path.read_bytes()

    def no_space(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", no_space)
    with pytest.raises(CheckpointError, match="No space left"):
        plotting.save(figure, path)
    with pytest.raises(CheckpointError, match="No space left"):
        plotting.save_image_grid(torch.zeros(1, 1, 8, 8), path, levels=2)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_pdf_of_the_same_figure_has_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one.pdf", "two.pdf"):
        plotting.save(Figure(), tmp_path / name)
    assert (tmp_path / "one.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "one.pdf").read_bytes() == (tmp_path / "two.pdf").read_bytes()


def test_save_refuses_other_formats(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"picture.jpg': end the picture's name in .png or .pdf"):
        plotting.save(Figure(), tmp_path / "picture.jpg")
    with pytest.raises(ConfigError, match=r"end the picture's name in \.png"):
        plotting.save_image_grid(torch.zeros(1, 1, 8, 8), tmp_path / "picture.pdf", levels=2)
    assert list(tmp_path.iterdir()) == []


def test_importing_loads_no_matplotlib_and_drawing_no_pyplot(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from pyrnode import plotting\n"
        "print(any(m in sys.modules for m in ('matplotlib', 'torchvision', 'PIL')))\n"
        "f = plotting.density_1d(lambda x: -x[:, 0] ** 2, (-1, 1), truth=lambda x: -x[:, 0] ** 2)\n"
        f"plotting.save(f, {str(tmp_path / 'x.png')!r})\n"
        "print('matplotlib' in sys.modules, 'matplotlib.pyplot' in sys.modules)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "True", "False"]
