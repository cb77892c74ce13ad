"""Settings of what is trained: the network of the dynamics, and the composition of the flow."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from pyrnode.errors import ConfigError
from pyrnode.settings import Section, at_least

WHITENED = 1024
"""Up to how many dimensions ``"auto"`` whitens: a matrix of 8 MB."""

OPENED = 128
"""Up to how many columns it looks for edges of: the time grows with the cube."""

Activation = Literal["softplus", "tanh", "silu", "gelu", "elu", "logcosh"]
Standardization = Literal["auto", "radial", "whiten", "scale", "channels", "none"]


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(Section):
    """The dynamics ``f(z, t; θ)`` of each block.

    Args:
        kind: ``"mlp"`` for vectors, ``"conv"`` for images (the paper's network), ``"auto"`` by the data;
            ``"potential"`` for vectors, ``f = −∇Φ`` (OT-Flow's potential, `Potential`).
        hidden: Widths (channels) of the hidden layers; of a potential all the same.
        activation: Nonlinearity between the layers; of a potential ``"logcosh"``, which only it has, ``"softplus"`` or
            ``"tanh"``.
        time: How ``t`` enters each layer: an extra input (``"concat"``), gate and shift (``"concatsquash"``), or not.
            It is an input of a potential's first layer, or none.
        kernel_size: Side of the convolutions' filters; odd.
        rank: Rank of the quadratic part ``½ sᵀAᵀA s`` of a potential.
        initial: Where a potential begins: ``f = 0`` (``"identity"``), or as ``"ot-flow"`` does.
    """

    kind: Literal["auto", "mlp", "conv", "potential"] = "auto"
    hidden: tuple[int, ...] = (64, 64, 64)
    activation: Activation = "softplus"
    time: Literal["concat", "concatsquash", "none"] = "concat"
    kernel_size: int = 3
    rank: int = 10
    initial: Literal["identity", "ot-flow"] = "identity"

    def _validate(self) -> None:
        at_least(self, 1, "rank")
        if self.activation == "logcosh" and self.kind != "potential":
            raise ConfigError(
                "activation = 'logcosh': of a potential alone (network.kind = 'potential'); try 'softplus'"
            )
        if not self.hidden or min(self.hidden) < 1:
            raise ConfigError(f"hidden = {self.hidden!r}: expected one or more positive widths")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ConfigError(f"kernel_size = {self.kernel_size!r}: expected an odd positive number")


@dataclass(frozen=True, kw_only=True)
class FlowConfig(Section):
    """The composition of the flow.

    Args:
        network: The dynamics of each block.
        blocks: ODE blocks: in all for vectors, per stage of the multi-scale flow for images.
        scales: Scales of the image flow; ``"auto"`` halves while the smaller side stays even and at least 4
            (28×28: 3, 32×32: 4, 8×8: 2).
        end_time: Integration time ``T`` of each block.
        alpha: ``α`` of the logit transform of pixels, in [0, 0.5).
        flatten: Whether images are taken for vectors of their pixels, for the networks of vectors: no neighbourhoods
            and no scales, but principal axes.
        standardize: What continuous features, and the logits of flattened images, are brought to first: mean 0 and
            variance 1 (``"scale"``), on their principal axes (``"whiten"``, vectors alone), there with their tails
            drawn in (``"radial"``), or as they are (``"none"``). ``"auto"`` opens out sharp edges of columns (up to
            128), whitens vectors as far as cross-validation finds it better, and draws in tails that are heavy.
            ``"channels"`` is for images that stay images: all pixels of a channel, or their logits, together.
            Contexts are scaled.
    """

    network: NetworkConfig = field(default_factory=NetworkConfig)
    blocks: int = 1
    scales: int | Literal["auto"] = "auto"
    end_time: float = 1.0
    alpha: float = 1e-5
    flatten: bool = False
    standardize: Standardization = "scale"

    def _validate(self) -> None:
        at_least(self, 1, "blocks", "scales")
        at_least(self, 0, "end_time", strict=True)
        if not 0 <= self.alpha < 0.5:
            raise ConfigError(f"alpha = {self.alpha!r}: expected 0 <= alpha < 0.5")

    @property
    def scales_features(self) -> bool:
        """Whether continuous features and contexts are brought to mean 0 and variance 1."""
        return self.standardize != "none"

    def state_shape(self, event_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the states of samples of that shape."""
        return (math.prod(event_shape),) if self.flatten else event_shape

    def standardizes(self, event_shape: tuple[int, ...], levels: int | None) -> bool:
        """Whether samples are; the logits of images that stay images are left as they are, but by ``"channels"``.

        Raises:
            ConfigError: ``"channels"`` for vectors, or what only vectors can have for images.
        """
        shape = self.state_shape(event_shape)
        vectors = len(shape) == 1
        if vectors if self.standardize == "channels" else not vectors and self.standardize in ("whiten", "radial"):
            kind, remedy = ("images", "'auto'") if vectors else ("vectors", "'scale', 'channels', or flatten=true")
            raise ConfigError(
                f"standardize = {self.standardize!r}: for {kind}, not for samples of shape {shape}; take {remedy}"
            )
        return self.scales_features and (levels is None or vectors or self.standardize == "channels")

    def opens(self, event_shape: tuple[int, ...], levels: int | None) -> bool:
        """Whether edges of columns are looked for, before anything else is done to them."""
        few = levels is None and math.prod(event_shape) <= OPENED
        return few and self.standardize == "auto" and self.whitens(event_shape)

    def whitens(self, event_shape: tuple[int, ...]) -> bool:
        """Whether standardised samples of that shape go on to their principal axes."""
        shape = self.state_shape(event_shape)
        auto = self.standardize == "auto" and len(shape) == 1 and math.prod(shape) <= WHITENED
        return auto or self.standardize in ("whiten", "radial")

    def draws_in(self, event_shape: tuple[int, ...]) -> bool:
        """Whether their tails are drawn in there."""
        return self.whitens(event_shape) and self.standardize != "whiten"
