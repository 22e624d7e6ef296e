"""What a run says while it goes: few lines, each with its number and what the number means."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from prefopt.run_folder import SAMPLES, RunFolder, read_json_lines

if TYPE_CHECKING:
    from prefopt.policy import Policy
    from prefopt.prepare import Prepared
    from prefopt.recipe import Recipe
    from prefopt.reference.running import RunReference
    from prefopt.sampling import Sample


class Screen:
    """The console of one run."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._headed = False

    def line(self, text: str, *, style: str = "") -> None:
        """Print one line."""
        self.console.print(Text(text, style=style))

    def named(self, name: str, text: str) -> None:
        """Print a line under a short name, wrapped beside it."""
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(style="dim", width=10, no_wrap=True)
        grid.add_column(overflow="fold")
        grid.add_row(name, Text(text))
        self.console.print(grid)

    def opening(self, recipe: Recipe, folder: RunFolder) -> None:
        """Say what runs, where, and what its loss's numbers mean."""
        loss = recipe.build_loss()
        parts = [part for _, part in loss.parts] or [loss]
        hyper = "; ".join(_settings(part.name if loss.parts else "", part.hyperparameters) for part in parts)
        self.console.print()
        self.console.print(Text(f"{recipe.name}: {loss.name}" + (f" ({hyper})" if hyper else ""), style="bold"))
        self.named("run", str(folder.path))
        if folder.note:
            self.named("", folder.note)
        for number, part in enumerate(parts):
            spelled = part.conventions
            beta = f"; beta {spelled['beta']}" if "beta" in part.hyperparameters else ""
            self.named("" if number else "units", f"{part.name}: {spelled['aggregate']}{beta}")

    def already_finished(self, folder: RunFolder) -> None:
        """Show a run that has finished before, and how to run it anew."""
        result = folder.result or {}
        self.line(f"this run has finished; remove {folder.path} to run it anew", style="yellow")
        rows = read_json_lines(folder.path / SAMPLES)
        self._side_by_side([(row["prompt"], row["reference"], row["policy"]) for row in rows[:3]])
        self._outcome(folder.path, result)

    def data(self, prepared: Prepared) -> None:
        """Say what came of the data's rows."""
        for number, line in enumerate(prepared.data.report.lines()):
            self.named("" if number else "data", line)

    def reference(self, reference: RunReference) -> None:
        """Say what the reference cost."""
        report = reference.report
        quantization = reference.prepared.recipe.reference.quantization
        held = "" if quantization == "none" else f", {quantization}"
        if not reference.prepared.cached:
            off = reference.prepared.recipe.reference.cache == "off"
            why = "reference.cache=off" if off else "the loss reads its whole distribution, which no cache holds"
            self.named("reference", f"computed in every step ({why}){held}")
            return
        said = (
            f"{report.hits + report.misses:,} completions needed, {report.hits:,} cached, {report.misses:,} scored now"
        )
        if report.misses:
            said += f" ({report.tokens:,} tokens in {report.seconds:.1f} s)"
        self.named("reference", said + held)

    def plan(self, policy: Policy, resolved: Mapping[str, Any], total: int, start: int, precision: str) -> None:
        """Say what is trained and how."""
        share = "" if policy.trainable == policy.total else f" of {policy.total / 1e6:,.1f} M"
        chosen = policy.layout
        backend = f" by {chosen.backend}" if chosen.layout == "shared" else ""
        self.named(
            "policy",
            f"{policy.trainable / 1e6:,.2f} M{share} parameters train; layout {policy.layout.layout}{backend} "
            f"({policy.layout.reason}, {policy.layout.max_difference:.1g} nats apart)",
        )
        checkpointing = ", activations recomputed" if resolved.get("gradient_checkpointing") else ""
        steps = f"resuming after step {start} of {total}" if start else f"{total} steps"
        self.named(
            "plan",
            f"{steps}, {resolved['token_budget']:,} computed tokens per micro-batch on {resolved['device']}"
            f"{checkpointing}",
        )
        self.named("memory", resolved["memory"])
        if not resolved["fits"]:
            self.line(
                "by this arithmetic the run needs more memory than is free: lower data.max_length, train an adapter, "
                "or quantize (model.quantization); it goes on, for the figures are estimates",
                style="yellow",
            )
        if precision == "bf16-pure":
            self.line(
                "bf16-pure: weights are held in 16 bit, and an update below 1/256 of a weight is lost; at learning "
                "rates around 1e-6 that is nearly every update (train.precision=bf16 keeps 32-bit masters)",
                style="yellow",
            )

    def reference_samples(self, samples: Sequence[Sample], show: int) -> None:
        """Show what the reference writes, before training."""
        if not samples or not show:
            return
        table = Table(box=box.SIMPLE, title="before training", title_justify="left", title_style="bold", expand=False)
        table.add_column("prompt", max_width=30, style="dim")
        table.add_column("the reference writes", max_width=90)
        for one in samples[:show]:
            table.add_row(Text(_clipped(one.prompt, 200)), Text(_clipped(one.completion, 400)))
        self.console.print(table)

    @contextmanager
    def progress(self, total: int, start: int) -> Iterator[Callable[[float], None]]:
        """Show a bar with the time left; gives the function that moves it on by one step."""
        columns = (
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        bar = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        with bar:
            task = bar.add_task("training", total=total, completed=start, loss="…")
            yield lambda loss: bar.update(task, advance=1, loss=f"{loss:.4f}")

    def evaluation(self, step: int, measures: Mapping[str, Any], *, reference: bool) -> None:
        """Print one line per look at the held-out data, under a heading that is printed once.

        Args:
            step: optimizer steps done.
            measures: what was measured.
            reference: whether the loss ranks against a reference; without one even the start is no coin toss.
        """
        cells = {"step": f"{step}", "loss": f"{measures['loss']:.4f}"}
        if "accuracy" in measures:
            low, high = measures["accuracy_interval"]
            cells["accuracy"] = f"{measures['accuracy']:.3f} ({low:.2f}-{high:.2f})"
        for side in ("chosen", "rejected"):
            if f"{side}_drift_per_token" in measures:
                cells[side] = f"{measures[f'{side}_drift_per_token']:+.3f}"
        if "kl" in measures:
            cells["KL"] = f"{measures['kl']:.2f}"
        if "gold_reward" in measures:
            cells["gold"] = f"{measures['gold_reward']['policy']:.3f}"
        widths = {"step": 6, "loss": 9, "accuracy": 19, "chosen": 9, "rejected": 10, "KL": 9, "gold": 8}
        if not self._headed:
            self._headed = True
            ranked = "against the reference" if reference else "of the policy alone: the loss reads no reference"
            self.line(f"\nheld out: accuracy (95 % interval) {ranked};", style="dim")
            self.line("chosen, rejected in nats per token from the reference; KL per completion", style="dim")
            self.line("".join(f"{name:>{widths[name]}}" for name in cells), style="dim")
        self.line("".join(f"{cell:>{widths[name]}}" for name, cell in cells.items()))

    def finished(
        self,
        folder: Path,
        result: Mapping[str, Any],
        after: Sequence[Sample],
        before: Sequence[Sample],
        show: int,
    ) -> None:
        """Show the same prompts before and after, and the outcome."""
        self.side_by_side(before, after, show)
        self._outcome(folder, result)

    def side_by_side(self, before: Sequence[Sample], after: Sequence[Sample], show: int) -> None:
        """Show what reference and policy wrote for the same prompts."""
        self._side_by_side(
            [(new.prompt, old.completion, new.completion) for old, new in zip(before[:show], after[:show])]
        )

    def _side_by_side(self, rows: Sequence[tuple[str, str, str]]) -> None:
        if not rows:
            return
        table = Table(box=box.SIMPLE, expand=False, show_lines=True)
        table.add_column("prompt", max_width=28, style="dim")
        table.add_column("before (reference)", max_width=60)
        table.add_column("after (policy)", max_width=60)
        for prompt, old, new in rows:
            table.add_row(Text(_clipped(prompt, 160)), Text(_clipped(old, 400)), Text(_clipped(new, 400)))
        self.console.print(table)

    def _outcome(self, folder: Path, result: Mapping[str, Any]) -> None:
        measures = result.get("eval") or {}
        if "gold_reward" in measures:
            gold = measures["gold_reward"]
            self.named("gold", f"reward {gold['reference']:.3f} before, {gold['policy']:.3f} after")
        if "accuracy" in measures:
            low, high = measures["accuracy_interval"]
            self.named(
                "held out",
                f"accuracy {measures['accuracy']:.3f} on {measures['comparisons']} comparisons "
                f"(95 % interval {low:.3f} to {high:.3f})",
            )
        if measures.get("kl") is not None:
            error = measures.get("kl_standard_error")
            spread = f" ± {error:.2f}" if error is not None else ""
            self.named("KL", f"{measures['kl']:.2f}{spread} nats per completion from the reference")
        if not measures:
            loss = (result.get("train") or {}).get("loss")
            self.named("loss", f"{loss:.4f} in training; nothing was held out to measure on")
        for note in _warnings(measures):
            self.line(f"note: {note}", style="yellow")
        self.named("result", str(folder / "result.json"))
        self.named("model", str(folder / "model"))


FAR_KL = 50.0
"""Nats per completion beyond which a policy has usually stopped writing text."""
FALLEN = -0.1
"""Nats per token by which chosen completions must have fallen before displacement is worth a word."""


def _warnings(measures: Mapping[str, Any]) -> Iterator[str]:
    """What a person should look at before trusting the accuracy."""
    if (measures.get("kl") or 0.0) > FAR_KL:
        yield (
            f"the policy is {measures['kl']:.0f} nats per completion from the reference: read its samples, they are "
            "probably broken; lower train.learning_rate or raise beta"
        )
    chosen = measures.get("chosen_drift_per_token")
    if chosen is not None and chosen < FALLEN and measures.get("displacement", 0.0) > 0.5:
        yield (
            "likelihood displacement: chosen completions became less likely too "
            f"({chosen:+.2f} nats per token); probability went to text that nobody compared"
        )


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _settings(name: str, hyperparameters: Mapping[str, Any]) -> str:
    spelled = ", ".join(
        f"{len(value)} terms" if key == "terms" else f"{key} {_short(value)}" for key, value in hyperparameters.items()
    )
    return f"{name} {spelled}".strip()


def _clipped(text: str, length: int) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= length else flat[: length - 1] + "…"
