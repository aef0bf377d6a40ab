"""The peers that scripts/benchmark.py compares with, run by a Python that has torch and pfhedge (and no JAX).

One JSON request a line on stdin, one JSON answer a line on stdout. Clocks run here, around training alone.

  {"do": "versions"}                                                    {"torch", "pfhedge", ..., "device"}
  {"do": "start", "peer": "pfhedge" | "torch_loop", "problem": {...}}   {"threads"}
  {"do": "train", "peer": ..., "epochs": n}                             {"seconds"} of the n epochs
  {"do": "save", "peer": ..., "file": F}                                weights as npz: kernel_0, bias_0, ...
  {"do": "pnl", "peer": ..., "spot": F, "file": G}                      F, npy [n_paths, n_steps + 1], to G
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Pfhedge:
    """pfhedge's own `Hedger.fit` of a no-transaction-band network, with the inputs that pfhedge gives it."""

    def __init__(self, problem: dict[str, Any]):
        from pfhedge.instruments import BrownianStock, EuropeanOption
        from pfhedge.nn import BlackScholes, Clamp, EntropicRiskMeasure, Hedger, MultiLayerPerceptron

        class Band(nn.Module):
            def __init__(self, claim: Any):
                super().__init__()
                self.delta, self.clamp = BlackScholes(claim), Clamp()
                sizes = problem["hidden_sizes"]
                self.network = MultiLayerPerceptron(out_features=2, n_layers=len(sizes), n_units=sizes)

            def inputs(self) -> list[str]:
                return [*self.delta.inputs(), "prev_hedge"]

            def forward(self, x: Tensor) -> Tensor:
                seen, previous = x[..., :-1], x[..., -1:]
                centre = self.delta(seen)
                below, above = nn.functional.leaky_relu(self.network(seen), 0.01).split(1, dim=-1)
                return self.clamp(previous, min=centre - below, max=centre + above)

        self.n_paths = problem["n_paths"]
        stock = BrownianStock(sigma=problem["volatility"], cost=problem["cost_rate"], dt=problem["dt"])
        # pfhedge draws ceil(maturity / dt + 1) prices: half a step less keeps rounding out of it.
        maturity = (problem["n_steps"] - 0.5) * problem["dt"]
        self.claim = EuropeanOption(stock.to(DEVICE), strike=problem["strike"], maturity=maturity)
        model = Band(self.claim).to(DEVICE)
        self.hedger = Hedger(model, model.inputs(), criterion=EntropicRiskMeasure(problem["risk_aversion"]))
        self.hedger.to(DEVICE)
        self.claim.simulate(1)
        self.hedger.compute_pl(self.claim)  # gives the network its input width
        self.network = model.network
        self.optimizer = torch.optim.Adam(model.parameters(), lr=problem["learning_rate"])

    def train(self, epochs: int) -> None:
        self.hedger.fit(
            self.claim,
            n_epochs=epochs,
            n_paths=self.n_paths,
            optimizer=self.optimizer,
            validation=False,
            verbose=False,
        )

    def pnl(self, spot: Tensor) -> Tensor:
        self.claim.ul().register_buffer("spot", spot)
        return self.hedger.compute_pl(self.claim)


class TorchLoop:
    """A plain PyTorch loop: the network once for all times, the clamp a step at a time.

    `inputs`: "plain" (log-moneyness, time, volatility) or "standardised", as dhlnn_jax's default features.
    `prior`: add the network to the Whalley-Wilmott half-width, output weights starting at zero.
    """

    def __init__(self, problem: dict[str, Any]):
        self.problem = problem
        n_steps, self.dt = problem["n_steps"], problem["dt"]
        self.left = self.dt * torch.arange(n_steps, 0, -1, device=DEVICE, dtype=torch.float32)
        sizes = [3, *problem["hidden_sizes"]]
        layers: list[nn.Module] = []
        for n_in, n_out in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        self.network = nn.Sequential(*layers, nn.Linear(sizes[-1], 2)).to(DEVICE)
        self._init_as_flax()
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=problem["learning_rate"])
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)

    def _init_as_flax(self) -> None:
        linear = list(_linear_layers(self.network))
        for layer in linear:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            linear[-1].weight *= 0.0 if self.problem["prior"] else 0.1

    def _rate(self, epoch: int) -> float:
        warmup, epochs = self.problem["warmup"], self.problem["cosine_epochs"]
        if epoch < warmup:
            return (epoch + 1) / warmup
        if epochs is None:
            return 1.0
        done = min((epoch - warmup) / max(epochs - warmup, 1), 1.0)
        return 0.5 * (1.0 + math.cos(math.pi * done))

    def train(self, epochs: int) -> None:
        p = self.problem
        drift, deviation = -0.5 * p["volatility"] ** 2 * self.dt, p["volatility"] * math.sqrt(self.dt)
        for _ in range(epochs):
            noise = torch.randn(p["n_paths"], p["n_steps"], device=DEVICE)
            log_spot = nn.functional.pad(torch.cumsum(drift + deviation * noise, dim=1), (1, 0))
            loss = -p["risk_aversion"] * self.pnl(log_spot.exp())
            risk = (torch.logsumexp(loss, 0) - math.log(p["n_paths"])) / p["risk_aversion"]
            self.optimizer.zero_grad()
            risk.backward()
            self.optimizer.step()
            self.schedule.step()

    def pnl(self, spot: Tensor) -> Tensor:
        p, held = self.problem, spot[:, :-1]
        moneyness = torch.log(held / p["strike"])
        deviation = p["volatility"] * self.left.sqrt()
        d1 = moneyness / deviation + 0.5 * deviation
        centre = torch.special.ndtr(d1)
        widths = self.network(self._inputs(moneyness, deviation))
        if p["prior"]:
            gamma = torch.exp(-0.5 * d1 * d1) / (math.sqrt(2.0 * math.pi) * held * deviation)
            cubed = 1.5 * p["cost_rate"] / p["risk_aversion"] * held * gamma * gamma
            widths = widths + (cubed ** (1.0 / 3.0))[..., None]
        below, above = nn.functional.leaky_relu(widths, 0.01).unbind(-1)
        lower, upper = (centre - below).unbind(1), (centre + above).unbind(1)
        positions = [torch.zeros_like(spot[:, 0])]
        for low, high in zip(lower, upper, strict=True):
            positions.append(torch.minimum(torch.maximum(positions[-1], low), high))
        position = torch.stack(positions, 1)
        gain = (position[:, 1:] * spot.diff(dim=1)).sum(1)
        cost = p["cost_rate"] * (held * position.diff(dim=1).abs()).sum(1)
        return gain - cost - torch.clamp(spot[:, -1] - p["strike"], min=0.0)

    def _inputs(self, moneyness: Tensor, deviation: Tensor) -> Tensor:
        p, maturity = self.problem, self.dt * self.problem["n_steps"]
        if p["inputs"] == "plain":
            columns = moneyness, self.left, torch.full_like(self.left, p["volatility"])
        else:
            whole = p["volatility"] * math.sqrt(maturity)
            standing = torch.clamp(moneyness / deviation, -10.0, 10.0)
            columns = moneyness / whole, 2.0 * self.left / maturity - 1.0, standing
        return torch.stack([c.expand_as(moneyness) for c in columns], -1)


def _linear_layers(network: nn.Module) -> Iterator[nn.Linear]:
    return (layer for layer in network.modules() if isinstance(layer, nn.Linear))


PEERS: dict[str, Callable[[dict[str, Any]], Any]] = {"pfhedge": Pfhedge, "torch_loop": TorchLoop}


def answer(request: dict[str, Any], peers: dict[str, Any]) -> dict[str, Any]:
    if request["do"] == "versions":
        import pfhedge

        versions = {"torch": torch.__version__, "pfhedge": pfhedge.__version__, "numpy": np.__version__}
        return {**versions, "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"}
    name = request["peer"]
    if request["do"] == "start":
        problem = request["problem"]
        torch.manual_seed(problem["seed"])
        torch.set_num_threads(problem["threads"])
        peers[name] = PEERS[name](problem)
        return {"threads": torch.get_num_threads()}
    peer = peers[name]
    if request["do"] == "train":
        _wait()
        began = time.perf_counter()
        peer.train(request["epochs"])
        _wait()
        return {"seconds": time.perf_counter() - began}
    if request["do"] == "save":
        arrays = {}
        for i, layer in enumerate(_linear_layers(peer.network)):
            arrays[f"kernel_{i}"] = layer.weight.detach().cpu().numpy().T
            arrays[f"bias_{i}"] = layer.bias.detach().cpu().numpy()
        np.savez(request["file"], **arrays)
        return {}
    if request["do"] == "pnl":
        with torch.no_grad():
            np.save(request["file"], peer.pnl(torch.from_numpy(np.load(request["spot"])).to(DEVICE)).cpu())
        return {}
    raise ValueError(f"unknown request {request['do']!r}")


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    # Answers keep the real stdout to themselves: whatever a library prints goes to stderr.
    replies, sys.stdout = sys.stdout, sys.stderr
    peers: dict[str, Any] = {}
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), peers)), file=replies, flush=True)
