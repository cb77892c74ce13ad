"""A flow inside a larger PyTorch model: a variational autoencoder whose prior is a regularised neural ODE.

    python examples/vae_prior.py [--quick]

Trains two autoencoders on 8x8 digits, alike but for the prior of the latents: a standard normal, and an RNODE that is
trained jointly with encoder and decoder (its parameters are in the same optimiser, gradients flow through the solver
to the encoder). Prints the evidence lower bound (ELBO) of both on test digits: a prior that can follow the encoder's
latents costs fewer nats.
"""

from __future__ import annotations

import argparse
import math

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import Binomial, Independent, Normal

from pyrnode import Config, Flow, Probes
from pyrnode.composition import base_log_prob

LATENT, LEVELS = 8, 17


class NormalPrior(nn.Module):
    """N(0, I), with no penalty."""

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return base_log_prob(z), z.new_zeros(())


class FlowPrior(nn.Module):
    """An RNODE: the log-density of latents, and the penalties of eq. 17 as a mean over the batch."""

    def __init__(self) -> None:
        super().__init__()
        settings = {"flow.network.hidden": [64, 64], "flow.network.activation": "tanh", "flow.standardize": False}
        settings["step_size"] = 0.25
        self.flow = Flow.build(Config().override(settings), (LATENT,))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        config = self.flow.config
        solver = config.solver if self.training else None  # RK4, or the accurate solver
        passage = self.flow.solve(z, Probes.exact, solver)
        penalty = config.penalties.kinetic * passage.total("E") + config.penalties.jacobian * passage.total("n")
        return passage.log_prob, penalty.mean()


class Autoencoder(nn.Module):
    """Encoder q(z | x), decoder p(x | z), and a prior p(z)."""

    def __init__(self, prior: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 2 * LATENT))
        self.decoder = nn.Sequential(nn.Linear(LATENT, 128), nn.ReLU(), nn.Linear(128, 64))
        self.prior = prior

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The ELBO of digits ``(batch, 64)`` with grey levels 0 to 16, nats, ``(batch,)``, and the prior's penalty."""
        mean, log_std = self.encoder(x / (LEVELS - 1)).chunk(2, 1)
        posterior = Independent(Normal(mean, log_std.exp()), 1)
        z = posterior.rsample()
        likelihood = Independent(Binomial(LEVELS - 1, logits=self.decoder(z)), 1)
        log_prior, penalty = self.prior(z)
        return likelihood.log_prob(x) + log_prior - posterior.log_prob(z), penalty


def fit(prior: nn.Module, train: Tensor, steps: int) -> Autoencoder:
    """An autoencoder trained on the ELBO less the prior's penalty."""
    torch.manual_seed(0)
    model = Autoencoder(prior)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(steps):
        batch = train[torch.randint(len(train), (128,))]
        elbo, penalty = model(batch)
        loss = penalty - elbo.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def evaluate(model: Autoencoder, test: Tensor) -> Tensor:
    """The ELBO of each digit ``(n,)``, averaged over ten draws of the encoder's noise, the same for every model."""
    torch.manual_seed(1)
    return torch.stack([model(test)[0] for _ in range(10)]).mean(0)


def main() -> dict[str, float]:
    """Returns the mean ELBO on test digits for each prior and before training, nats per digit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps only")
    args = parser.parse_args()

    images = torch.tensor(load_digits().data, dtype=torch.float32)
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    train, test = images[:1400], images[1400:]
    steps = 100 if args.quick else 4000
    elbo = {
        "untrained": evaluate(fit(NormalPrior(), train, 0), test),
        "standard normal": evaluate(fit(NormalPrior(), train, steps), test),
        "RNODE": evaluate(fit(FlowPrior(), train, steps), test),
    }
    print(f"ELBO on {len(test)} test digits, nats per digit:")
    for name, values in {**elbo, "gain by the RNODE": elbo["RNODE"] - elbo["standard normal"]}.items():
        print(f"  {name:<17} {float(values.mean()):8.2f} ± {float(values.std()) / math.sqrt(len(values)):.2f}")
    return {name: float(values.mean()) for name, values in elbo.items()}


if __name__ == "__main__":
    main()
