"""What a step must compute, by arithmetic, and how near a measured one came to this machine's rate.

    python benchmarks/cost_model.py --workload body-256-128 [--json FIGURES]

FIGURES is what `compare_trl.py --json` wrote: the program then prints measured ratios beside predicted ones, and

    eff        = the model's operations / (time x rate that torch's matrix products keep up, measured beside it)
    eff (hard) = computed operations / (time x rate of the fastest product, by whichever library)

    forward over T computed tokens with causal area A (sum of squared lengths):  F(T, A) = 2 N T + 2 L d A
    head per scored token:                                                       h = 2 V H

N are the parameters of matrix products without embedding and head, d = heads x head_dim, L layers. A step is k
forwards (3 with all weights trained, 2 with an adapter, 1 more where activations are recomputed) and u head products
(3 where the gradient is made with the value, 4 where logits are recomputed, 1 less with a frozen head). An online
reference adds one forward and one head product. TRL pads to the longest row of a batch, and off CUDA its head scores
every position of every row. prefopt's last MLP and attention see scored positions only (in bf16 on a CPU with AMX
that attention is whole): what is left out counts among the model's operations, as it does where anybody states an MFU,
and not among the computed ones, by which `predicted` goes. A step lasts seconds, so what it could reach at best is a
rate that products keep up over some time; on a machine with neighbours that is up to a fifth below the fastest one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from prefopt_losses.products import matmul, onednn_is_faster

Pair = tuple[int, int, int]
"""Tokens of a prompt and of its two completions."""
RATE_SHAPES = {
    "cpu": ((2048, 512, 1408), (1024, 1024, 1024)),
    "cuda": ((8192, 4096, 14336), (8192, 8192, 8192)),
}
"""(rows, inner, columns): a layer's widest product over a step's tokens, and a square that any cache likes."""


@dataclass(frozen=True)
class Shape:
    """A decoder as its matrix products."""

    parameters: float
    """Of matrix products, without embedding and head."""
    layers: int
    width: int
    """heads x head_dim."""
    vocab: int
    hidden: int
    last_mlp: float = 0.0
    """Of the last layer's MLP, which prefopt computes for scored positions only."""

    def forward(self, tokens: float, area: float) -> float:
        """Operations of one forward pass without the head."""
        return 2 * self.parameters * tokens + 2 * self.layers * self.width * area

    def head(self, scored: float) -> float:
        """Operations of one head product."""
        return 2 * self.vocab * self.hidden * scored

    def step(self, layout: Layout, *, k: float, u: float) -> float:
        """Operations of k forwards and u head products."""
        return k * self.forward(layout.tokens, layout.area) + u * self.head(layout.scored)


@dataclass(frozen=True)
class Layout:
    """What one way of laying pairs out computes."""

    tokens: float
    area: float
    """Sum of squared lengths: the causal area of attention."""
    scored: float
    """Positions that the head sees."""
    prompts: float = 0.0
    """Causal area of the prompts alone, each as often as it is computed."""


def shared(pairs: Sequence[Pair]) -> Layout:
    """Every prompt once, no padding."""
    area = sum((p + c) ** 2 + (p + r) ** 2 - p**2 for p, c, r in pairs)
    prompts = sum(p**2 for p, _, _ in pairs)
    return Layout(sum(p + c + r for p, c, r in pairs), area, sum(c + r for _, c, r in pairs), prompts)


def unshared(pairs: Sequence[Pair]) -> Layout:
    """Every prompt twice, no padding."""
    area = sum((p + c) ** 2 + (p + r) ** 2 for p, c, r in pairs)
    prompts = sum(2 * p**2 for p, _, _ in pairs)
    return Layout(sum(2 * p + c + r for p, c, r in pairs), area, sum(c + r for _, c, r in pairs), prompts)


def padded(pairs: Sequence[Pair], batch: int, *, compact: bool) -> Layout:
    """Every prompt twice, rows padded to the longest of each batch; a compact head sees completions only."""
    tokens = area = scored = 0
    for begin in range(0, len(pairs), batch):
        members = pairs[begin : begin + batch]
        rows, longest = 2 * len(members), max(p + max(c, r) for p, c, r in members)
        tokens, area = tokens + rows * longest, area + rows * longest**2
        scored += sum(c + r for _, c, r in members) if compact else rows * (longest - 1)
    return Layout(tokens, area, scored)


def operations(
    tool: str,
    shape: Shape,
    pairs: Sequence[Pair],
    *,
    batch: int,
    lora: bool,
    checkpointing: bool = False,
    whole_attention: bool = False,
    whole_model: bool = False,
    compact: bool = False,
) -> float:
    """Operations of a tool's mean step over these pairs; what a cache or a first pass computed is not in it.

    With `whole_attention` our last attention computes prompts too, which nobody reads. `whole_model` counts all that
    the last layer could compute, whether it does or not, and nothing that is computed again. TRL's head is `compact`
    on CUDA: it sees completions only.
    """
    k, u = 2 if lora else 3, 2 if lora else 3
    k += checkpointing and not whole_model  # what is computed again is no gain
    steps = len(pairs) / batch
    if tool.startswith("prefopt"):
        layout = unshared(pairs) if tool.endswith("unshared") else shared(pairs)
        unread = 0.0 if whole_model else 2 * shape.last_mlp * (layout.tokens - layout.scored)
        if not (whole_attention or whole_model):
            unread += 2 * shape.width * layout.prompts
        return (shape.step(layout, k=k, u=u) - k * unread) / steps
    online = not tool.startswith("trl-precomputed")
    layout = padded(pairs, batch, compact=compact or tool.endswith("compact"))
    return shape.step(layout, k=k + online, u=u + online + (not whole_model)) / steps  # it makes its logits twice


def matmul_rates(dtype: torch.dtype, *, seconds: float = 0.3, device: str = "cpu") -> tuple[float, float]:
    """Operations per second that one of torch's products keeps up, and those of the fastest single product.

    The fastest may be another library's, where prefopt gives fp32 products to one. Each product runs for as long as
    `seconds`; torch's writes into memory that is there.
    """
    kept = fastest = 0.0
    for rows, inner, columns in RATE_SHAPES[device]:
        left = torch.randn(rows, inner, device=device, dtype=dtype)
        right = torch.randn(columns, inner, device=device, dtype=dtype).t()
        operations = 2 * rows * inner * columns
        times = _times(partial(torch.mm, left, right, out=left.new_empty(rows, columns)), seconds, device)
        kept = max(kept, operations * len(times) / sum(times))
        if device == "cpu" and dtype == torch.float32 and onednn_is_faster():
            times += _times(partial(matmul, left, right), seconds, device)
        fastest = max(fastest, operations / min(times))
    return kept, fastest


def _times(multiply: Callable[[], object], seconds: float, device: str) -> list[float]:
    """Return what a product takes, again and again for as long as `seconds`, but for the first time."""
    spent: list[float] = []
    while sum(spent) < seconds:
        began = time.perf_counter()
        multiply()
        settle(device)
        spent.append(time.perf_counter() - began)
    return spent[1:] or spent


def settle(device: str) -> None:
    """Wait until a device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_a_step(run: dict[str, Any]) -> float:
    """Mean of a run's timed steps, which differ in length."""
    return statistics.mean(run["steps_s"])


def efficiency(run: dict[str, Any], *, hard: bool = False) -> float:
    """Share of what products could do in the time of a run's steps, by rates measured before and after them."""
    done, rates = ("operations", "fastest_matmul") if hard else ("model_operations", "matmul_rate")
    return float(run[done] / seconds_a_step(run) / statistics.mean(run[rates]))


def paired_ratios(
    runs: Sequence[dict[str, Any]], tool: str, ours: str = "prefopt", *, at_equal_rate: bool = False
) -> list[float]:
    """Return seconds per step of a tool over ours, for each pair of runs that alternated.

    `at_equal_rate` counts time in matrix products that the machine could have done meanwhile: a neighbour that slows
    one run of a pair moves it less.
    """

    def cost(run: dict[str, Any]) -> float:
        return seconds_a_step(run) * (statistics.mean(run["matmul_rate"]) if at_equal_rate else 1.0)

    costs = {name: {run["run"]: cost(run) for run in runs if run["tool"] == name} for name in (tool, ours)}
    return [costs[tool][number] / own for number, own in sorted(costs[ours].items()) if number in costs[tool]]


def main() -> None:
    from speed_workloads import BATCH, WORKLOADS, random_lengths

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workload", choices=[name for name in WORKLOADS if name != "alpaca"], default="reference")
    parser.add_argument("--json", type=Path, help="what compare_trl.py --json wrote")
    parser.add_argument("--pairs", type=int, default=400, help="pairs to predict from without figures")
    arguments = parser.parse_args()
    if arguments.json is not None and not arguments.json.is_file():
        parser.error(f"--json: expected what compare_trl.py --json wrote, and {arguments.json} is no file")
    if arguments.pairs < BATCH:
        parser.error(f"--pairs: expected at least {BATCH}, those of a step")
    workload = WORKLOADS[arguments.workload]
    runs: list[dict[str, Any]] = json.loads(arguments.json.read_text())["runs"] if arguments.json else []
    runs = [run for run in runs if run["workload"] == arguments.workload]
    tools = list(dict.fromkeys(run["tool"] for run in runs)) or TOOLS
    pairs = random_lengths(workload, arguments.pairs)
    columns = ["precision", "tool", "GFLOP per step", "predicted x prefopt"]
    columns += ["measured x prefopt", "eff", "eff (hard)"] if runs else []
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for precision in sorted({run["precision"] for run in runs}) or ["fp32"]:
        own = [run for run in runs if run["precision"] == precision]
        predicted = {run["tool"]: run["operations"] for run in own} or {
            tool: operations(tool, workload.shape, pairs, batch=BATCH, lora=workload.lora) for tool in tools
        }
        for tool in tools:
            cells = [precision, tool, f"{predicted[tool] / 1e9:,.0f}", f"{predicted[tool] / predicted[tools[0]]:.2f}"]
            if mine := [run for run in own if run["tool"] == tool]:
                measured = [
                    paired_ratios(own, tool),
                    *([efficiency(run, hard=each) for run in mine] for each in (False, True)),
                ]
                cells += [f"{statistics.median(each):.2f}" for each in measured]
            print(f"| {' | '.join(cells)} |")


TOOLS = ["prefopt", "prefopt-unshared", "trl", "trl-precomputed", "trl-precomputed-compact"]
"""What is compared; with an adapter `trl` is `trl-adapter-off`."""

if __name__ == "__main__":
    main()
