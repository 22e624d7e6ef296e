"""Any loss of ours in TRL's `DPOTrainer`.

    from prefopt.integrations.trl import PreferenceTrainer

    PreferenceTrainer(model, args=DPOConfig(...), train_dataset=pairs, loss={"name": "simpo", "beta": 2.0}).train()

Data, tokenization, collation, reference model, precomputed reference columns, adapters, checkpoints and logs are
TRL's. Replaced are the loss with its rewards (`compute_loss`), and what a loss asks for beyond TRL: tokens of the
optimizer step, columns of the data set, running numbers. A loss that TRL cannot feed, and an option that this
trainer would not read, are refused when it is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

try:
    from safetensors.torch import load_file, save_file
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.utils import add_fused_lm_head  # noqa: F401 - the forward used here; not in older versions
except ImportError as error:
    raise ImportError('prefopt.integrations.trl needs TRL 1.16 or later: pip install "prefopt[train]"') from error

from prefopt.errors import DataError
from prefopt.integrations.trl_options import COLUMNS, check_options, columns_of, look_for_columns, missing_column
from prefopt_losses import LogProbs, Loss, loss_metrics
from prefopt_losses.logps import left_aligned
from prefopt_losses.lookup import LossConfig
from prefopt_losses.module import PreferenceLoss

_SIDES = ("chosen", "rejected")
_REFERENCE = tuple(f"ref_{side}_logps" for side in _SIDES)
_NOT_FOR_THE_MODEL = {"completion_mask", *_REFERENCE, *COLUMNS}
_LOSS_STATE = "prefopt_loss.safetensors"


class PreferenceTrainer(DPOTrainer):
    """TRL's `DPOTrainer` with a loss of ours.

    Metrics keep TRL's names; rewards and margins are the loss's own (beta * s), ties count half in
    `rewards/accuracies`, and `logratios/*`, `logratios_per_token/*`, `displacement` are added. A token-mean NLL is
    the mean over all chosen tokens of the optimizer step, however it is cut into micro-batches and processes
    (in evaluation: over each batch). A loss without a reference needs none: none is scored or kept.

    Args:
        model: as for `DPOTrainer`.
        ref_model: as for `DPOTrainer`; None for a loss without a reference.
        args: as for `DPOConfig`; its options for TRL's own losses stay at their defaults.
        loss: a name, a sum of names, a recipe's mapping or list, or a `Loss`; it brings its own beta.
        columns: {field of the loss: column of the data set} where names differ, such as
            {"preference_probability": "agreement"}.
        others: everything else that `DPOTrainer` takes.

    Raises:
        LossError: there is no such loss.
        UserError: the loss and the options do not fit together; all problems at once.
        DataError: a column that the loss reads is missing.
    """

    _tag_names = ["trl", "prefopt"]  # noqa: RUF012 - TRL's own attribute
    _name = "preference optimization"
    _paper: dict[str, str] = {}  # noqa: RUF012 - TRL would cite DPO, whatever the loss

    def __init__(
        self,
        model: Any,
        ref_model: nn.Module | None = None,
        args: DPOConfig | None = None,
        *,
        loss: Loss | LossConfig,
        columns: Mapping[str, str] | None = None,
        **others: Any,
    ) -> None:
        # Before TRL's own __init__, which already calls methods of this class.
        self.loss_module = PreferenceLoss(loss)
        self.loss = self.loss_module.loss
        args = DPOConfig() if args is None else copy(args)
        check_options(self.loss, args, ref_model)
        self._columns = columns_of(self.loss, columns or {})
        look_for_columns(self._columns, {name: others.get(name) for name in ("train_dataset", "eval_dataset")})
        self._tokens_per_micro_batch: Tensor | None = None
        # TRL keeps no reference model when its log-probs are precomputed; without a reference there are none to
        # precompute, see `_precompute_ref_logps`. (It still hashes the weights once, and under FSDP loads a model
        # for a moment.) WPO's weights are what makes its fused head return sum_v p(v)^2.
        needs = self.loss.needs
        args.precompute_ref_log_probs = args.precompute_ref_log_probs or not needs.reference
        args.use_weighting = needs.relative
        super().__init__(model, ref_model, args, **others)
        self.loss_module.to(self.accelerator.device)
        if not needs.reference:
            self.precompute_ref_logps = self.args.precompute_ref_log_probs = False
        if self._columns:
            self.data_collator: Any = _WithColumns(self.data_collator, self._columns)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Score a batch with the policy, look the reference up, and return the mean loss."""
        for_the_model = {key: value for key, value in inputs.items() if key not in _NOT_FOR_THE_MODEL}
        routed = {"output_router_logits": True} if self.aux_loss_enabled else {}
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        outputs = model(**for_the_model, **routed, use_cache=False, labels=labels, fused_lm_head=True)
        record = self.loss_module.train(self.model.training).with_state(self._record(outputs, inputs))
        losses = self.loss(record)
        loss = losses.mean()
        metrics = self._metrics["train" if self.model.training else "eval"]
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
            metrics["aux_loss"].append(self.accelerator.gather(outputs.aux_loss.detach()).mean().item())
        self._count_tokens(inputs)
        for name, value in {**self._of_examples(record), **self._of_tokens(outputs, inputs)}.items():
            metrics[name].append(value)
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**for_the_model)

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Score a batch with the reference, as TRL does, without the columns that only the loss reads."""
        return super().compute_ref_log_probs(model, {k: v for k, v in inputs.items() if k not in COLUMNS})

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Collect the micro-batches of an optimizer step, and count its chosen tokens where the loss asks."""
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.loss.needs.step_tokens and samples:
            tokens = sum(_scored(batch).chunk(2)[0].sum() for batch in samples)
            total = self.accelerator.gather(torch.as_tensor(tokens, device=device).reshape(1)).sum()
            self._tokens_per_micro_batch = total / (len(samples) * self.accelerator.num_processes)
        return samples, items

    def _record(self, outputs: Any, inputs: dict[str, Any]) -> LogProbs:
        """Lay a batch out for the loss; its first half holds the chosen completions."""
        mask = _scored(inputs)
        needs = self.loss.needs
        held: dict[str, Any] = _by_side("logps", _real(outputs.log_probs, mask).sum(1))
        held |= _by_side("lengths", mask.sum(1))
        if needs.tokens:
            held |= _by_side("token_logps", left_aligned(_real(outputs.log_probs, mask), mask))
        if needs.relative:
            relative = (outputs.log_probs - outputs.log_sum_sq_probs).detach()
            held |= _by_side("relative_logps", (_real(relative, mask) * mask).sum(1))
        held |= self._reference(inputs, tokens=needs.tokens)
        held |= {field: inputs[field] for field in self._columns}
        if self.model.training and self._tokens_per_micro_batch is not None:
            # TRL averages micro-batches and processes; so this makes uneven micro-batches exact too.
            held["tokens_per_example"] = self._tokens_per_micro_batch / (mask.shape[0] // 2)
        return LogProbs(**held, draw=self.state.global_step)

    def _reference(self, inputs: dict[str, Any], *, tokens: bool) -> dict[str, Tensor]:
        if not self.loss.needs.reference:
            return {}
        if self.precompute_ref_logps:
            return {name: inputs[name] for name in _REFERENCE}
        model = self.model if self.ref_model is None else self.ref_model
        with _last_output(model) as last:
            held = dict(zip(_REFERENCE, self.compute_ref_log_probs(model, inputs)))
        if tokens:
            mask = _scored(inputs)
            aligned = left_aligned(_real(last[0].log_probs, mask), mask)
            held |= {f"ref_{name}": value for name, value in _by_side("token_logps", aligned).items()}
        return held

    def _of_examples(self, record: LogProbs) -> dict[str, float]:
        """Means over the examples of all processes, with one synchronisation."""
        values = loss_metrics(self.loss, record)
        table = torch.stack([value.float() for value in values.values()], dim=1)
        return dict(zip(values, self.accelerator.gather_for_metrics(table).mean(0).tolist()))

    def _of_tokens(self, outputs: Any, inputs: dict[str, Any]) -> dict[str, float]:
        """TRL's means over completion tokens, over all processes, with one synchronisation."""
        mask = _scored(inputs)
        chosen, rejected = mask.chunk(2)
        logits = _real(outputs.mean_logits, mask).chunk(2)
        right = _real(outputs.is_top1, mask).chunk(2)[0]
        means = {
            "entropy": (_real(outputs.entropy, mask), mask),
            "logits/chosen": (logits[0], chosen),
            "logits/rejected": (logits[1], rejected),
            "mean_token_accuracy": (right, chosen),
        }
        sums = torch.stack([torch.stack(((value * at).sum(), at.sum())) for value, at in means.values()]).detach()
        totals = self.accelerator.gather(sums.float()[None]).sum(0).tolist()
        return {name: total / max(count, 1) for name, (total, count) in zip(means, totals)}

    def _count_tokens(self, inputs: dict[str, Any]) -> None:
        if self.model.training:
            seen = self.accelerator.gather(inputs["attention_mask"].sum().reshape(1)).sum().item()
            self._total_train_tokens += seen // self._tp_size
        self._metrics["train" if self.model.training else "eval"]["num_tokens"] = [self._total_train_tokens]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [each for each in self._columns.values() if each not in self._signature_columns]

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if not self.loss.needs.reference:
            return dataset
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.loss_module.running and self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
            save_file(self.loss_module.state_dict(), folder / _LOSS_STATE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.loss_module.running:
            self.loss_module.load_state_dict(load_file(Path(resume_from_checkpoint, _LOSS_STATE)))


class _WithColumns:
    """A collator that also brings number columns of the data set, under the loss's names."""

    def __init__(self, collate: Any, columns: Mapping[str, str]) -> None:
        self.collate = collate
        self.columns = columns

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(examples)
        for field, column in self.columns.items():
            if column not in examples[0]:
                raise DataError(missing_column("examples", field, column, list(examples[0])))
            batch[field] = torch.tensor([example[column] for example in examples], dtype=torch.float32)
        return batch


def _scored(inputs: Mapping[str, Any]) -> Tensor:
    """(2 * pairs, tokens - 1), 1 where the next token belongs to a completion."""
    return inputs["completion_mask"][:, 1:]


def _real(values: Tensor, mask: Tensor) -> Tensor:
    """Leave virtual tokens out, which prompt tuning puts in front."""
    return values[:, -mask.shape[1] :]


def _by_side(what: str, values: Tensor) -> dict[str, Tensor]:
    return {f"{side}_{what}": half for side, half in zip(_SIDES, values.chunk(2))}


@contextmanager
def _last_output(model: nn.Module) -> Iterator[list[Any]]:
    """Keep what a model returns within the block: TRL sums the reference's tokens and drops them."""
    last: list[Any] = []
    handle = model.register_forward_hook(lambda _model, _arguments, output: last.__setitem__(slice(None), [output]))
    try:
        yield last
    finally:
        handle.remove()
