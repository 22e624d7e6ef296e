"""The gradient of one optimizer step: micro-batches, normalised by the step's own number of examples.

A loss that decomposes takes one pass: every micro-batch's share of the sum is differentiated as it comes. A loss that
couples the examples of a step takes two over several micro-batches or processes: the log-probs of all of them without
gradient, the loss's gradient in these, and then the model's with that fed back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace

import torch

from prefopt.batching import RaggedBatch, Slice
from prefopt.errors import ModelError, Problem
from prefopt.objective import (
    MetricSums,
    Record,
    StepFacts,
    add_comparison_metrics,
    add_record_metrics,
    loss_record,
    loss_values,
)
from prefopt.planning import Step
from prefopt.run import Run
from prefopt.step_record import fed_back, from_all_processes, joined, step_gradients, without_effect
from prefopt_losses import ListLogProbs, LossError
from prefopt_losses.logps import answers_at_once


def accumulate_gradients(run: Run, plan: Step, sums: MetricSums) -> None:
    """Leave the gradient of the step's mean loss in the parameters, add its metrics, and move the loss's state on."""
    loss = run.prepared.loss
    facts = StepFacts(plan.tokens_per_example, draw=run.state.step)
    alone = run.accelerator.num_processes == 1 and len(plan.micro_batches) == 1
    if loss.needs.batch and not alone:
        _two_passes(run, plan, facts, sums)
    else:
        _one_pass(run, plan, facts, sums)


def _one_pass(run: Run, plan: Step, facts: StepFacts, sums: MetricSums) -> None:
    """Differentiate every micro-batch's share of the loss as it comes."""
    loss, world = run.prepared.loss, run.accelerator.num_processes
    for micro, batch, spare, last in _own_micro_batches(run, plan):
        with nullcontext() if last else run.accelerator.no_sync(run.module):
            scored = run.feed.scored(run.module, micro, batch)
            record = loss_record(loss.needs, scored, facts)
            _move_on(run, record)
            record = _carrying(run, record)
            losses = _losses(run, record, batch.rows)
            share = 0.0 if spare else world / plan.units  # data-parallel wrappers average over processes
            run.accelerator.backward(losses.sum() * share)
        if not spare:
            add_comparison_metrics(sums, loss, scored, record, losses)


def _two_passes(run: Run, plan: Step, facts: StepFacts, sums: MetricSums) -> None:
    """Differentiate the loss in the log-probs of the whole step, then the model in its parameters."""
    loss, world = run.prepared.loss, run.accelerator.num_processes
    own: list[Record] = []
    with torch.no_grad():
        for micro, batch, spare, _ in _own_micro_batches(run, plan):
            scored = run.feed.scored(run.module, micro, batch)
            own += [] if spare else [loss_record(loss.needs, scored, facts)]
    records, begin = from_all_processes(own, run.accelerator.device)
    _move_on(run, joined(records))
    records = [_carrying(run, record) for record in records]
    mine = range(begin, begin + len(own))
    try:
        losses, slopes, whole = step_gradients(loss, records, plan.units, own=mine, check=looks_at_once(run))
    except LossError as error:
        raise not_finite(run, str(error)) from error
    lean = run.feed.policy_only()
    for number, (micro, batch, spare, last) in enumerate(_own_micro_batches(run, plan)):
        with nullcontext() if last else run.accelerator.no_sync(run.module):
            scored = lean.scored(run.module, micro, batch)
            record = loss_record(loss.needs, scored, facts)
            surrogate = without_effect(record) if spare else fed_back(record, slopes[number])
            run.accelerator.backward(surrogate * world)
    if run.accelerator.is_main_process:
        add_record_metrics(sums, loss, whole, losses)


def _own_micro_batches(run: Run, plan: Step) -> Iterator[tuple[Sequence[Slice], RaggedBatch, bool, bool]]:
    """Yield this process's micro-batches; every process runs the same number of them (collectives match).

    Yields:
        the slices, the batch, whether it is a spare one that counts nothing, whether it is the last.
    """
    world = run.accelerator.num_processes
    rounds = math.ceil(len(plan.micro_batches) / world)
    places = [number * world + run.accelerator.process_index for number in range(rounds)]
    spares = [place >= len(plan.micro_batches) for place in places]
    micros = [plan.micro_batches[0 if spare else place] for place, spare in zip(places, spares)]
    with closing(run.feed.batches(micros, run.accelerator.device)) as batches:
        for number, batch in enumerate(batches):
            yield micros[number], batch, spares[number], number == rounds - 1


def _move_on(run: Run, record: Record) -> None:
    """Move the numbers that the loss carries by one step, of which this is the whole record."""
    if run.prepared.loss.needs.state:
        run.loss_state = run.prepared.loss.advance(record, run.loss_state)


def _carrying(run: Run, record: Record) -> Record:
    """Return the record with the numbers that the loss carries, as they are now."""
    if isinstance(record, ListLogProbs) or not run.prepared.loss.needs.state:
        return record
    return replace(record, state=run.loss_state)


def _losses(run: Run, record: Record, rows: tuple[int, ...]) -> torch.Tensor:
    try:
        return loss_values(run.prepared.loss, record, check=looks_at_once(run))
    except LossError as error:
        named = ", ".join(map(str, rows))
        raise not_finite(run, f"{error} (rows of the data in this micro-batch: {named})") from error


def looks_at_once(run: Run) -> bool:
    """Whether to look for NaN at once: elsewhere than on a CPU that would wait for the device."""
    return answers_at_once(run.accelerator.device)


def not_finite(run: Run, given: str) -> ModelError:
    """Return the error of a step that came out as NaN or infinite."""
    return ModelError(
        Problem(
            f"after step {run.state.step}",
            "a finite loss and gradient",
            given,
            "lower train.learning_rate or the loss's beta, or look at the rows of this step; checkpoints in "
            f"{run.folder / 'checkpoints'} are from before",
        )
    )
