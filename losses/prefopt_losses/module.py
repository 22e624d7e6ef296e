"""A loss as a module, with the signature that other people's trainers call.

    from prefopt_losses.module import PreferenceLoss

    loss_fn = PreferenceLoss("gpo_exponential", beta=0.05)
    losses, chosen_rewards, rejected_rewards = loss_fn(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )

OpenRLHF, earlier torchtune and TRL before 0.29 call a loss so; whoever does can train with any loss of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from prefopt_losses.errors import LossError, suggest
from prefopt_losses.inputs import LogProbs
from prefopt_losses.lookup import LossConfig, get_loss, loss_from_config
from prefopt_losses.loss import Loss
from prefopt_losses.methods import METHODS

FIELDS = tuple(field.name for field in fields(LogProbs))

# How trainers name what LogProbs holds.
ARGUMENTS = {
    "chosen_logps": "policy_chosen_logps",
    "rejected_logps": "policy_rejected_logps",
    "ref_chosen_logps": "reference_chosen_logps",
    "ref_rejected_logps": "reference_rejected_logps",
}


class PreferenceLoss(nn.Module):
    """Any loss of the table, called with four tensors.

    It has no parameters. The running numbers of a loss that has some (such as a mean of rewards) are buffers: they
    are saved with `state_dict`, and move on only in training mode and while gradients are recorded, so that
    evaluation never changes them. One call is one optimizer step to them: do not cut the step.

    Args:
        loss: a name of the table, a sum of names (`"dpo+0.5*sft"`), a recipe's mapping or list, or a `Loss`. A
            function of GPO's table goes by its own name too: `"exponential"` is `gpo_exponential`.
        reduction: "none" gives one loss per example, as torchtune and old TRL expect; "mean" gives their mean,
            as OpenRLHF expects. Rewards are per example in both.
        check: look for NaN and empty completions; False saves one device synchronisation per call.
        hyperparameters: the method's own, by keyword.

    Raises:
        LossError: an unknown name or hyper-parameter, or one out of range; all problems at once.
    """

    def __init__(
        self,
        loss: Loss | LossConfig,
        *,
        reduction: Literal["none", "mean"] = "none",
        check: bool = True,
        **hyperparameters: Any,
    ) -> None:
        super().__init__()
        if reduction not in ("none", "mean"):
            raise LossError(f"reduction: expected 'none' or 'mean', given {reduction!r}.")
        self.loss = build(loss, hyperparameters)
        self.reduction = reduction
        self.check = check
        self.running = self.loss.needs.state
        for name, value in self.loss.initial_state().items():
            self.register_buffer(f"running_{name}", value)
        if self.loss.needs.draws:
            self.register_buffer("draws", torch.tensor(0))

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor | None = None,
        reference_rejected_logps: Tensor | None = None,
        chosen_lengths: Tensor | None = None,
        rejected_lengths: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the losses, and the rewards of the chosen and of the rejected completions.

        Args:
            policy_chosen_logps: (batch,), nats, summed over completion tokens (never averaged).
            policy_rejected_logps: (batch,), likewise.
            reference_chosen_logps: (batch,), the frozen reference's, likewise; not read by losses without one.
                No gradient flows into the reference.
            reference_rejected_logps: (batch,), likewise.
            chosen_lengths: (batch,), scored tokens; read by losses of per-token means.
            rejected_lengths: (batch,), likewise.
            others: further fields of `LogProbs`, such as preference_probability.

        Returns:
            losses (batch,), or their mean; beta * s of each side (batch,), detached.

        Raises:
            LossError: what the loss reads is missing, misshapen or not finite.
        """
        unknown = [name for name in others if name not in FIELDS or name == "state"]
        if unknown:
            raise LossError(_unknown(name) for name in unknown)
        if self.loss.needs.draws:
            others.setdefault("draw", self._next_draw())
        record = LogProbs(
            chosen_logps=policy_chosen_logps,
            rejected_logps=policy_rejected_logps,
            ref_chosen_logps=_constant(reference_chosen_logps),
            ref_rejected_logps=_constant(reference_rejected_logps),
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            **others,
        )
        missing = [name for name in self.loss.needs.tensors if getattr(record, name) is None]
        if missing:
            raise LossError(_missing(name, self.loss) for name in missing)
        record = self.with_state(record)
        losses = self.loss(record, check=self.check)
        with torch.no_grad():
            chosen_rewards, rejected_rewards = self.loss.rewards(record)
        return losses if self.reduction == "none" else losses.mean(), chosen_rewards, rejected_rewards

    def with_state(self, record: LogProbs) -> LogProbs:
        """Return the record with the loss's running numbers, moved on by it in training."""
        if not self.running:
            return record
        state = {name: self.get_buffer(f"running_{name}").clone() for name in self.running}
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                state = {name: value.detach() for name, value in self.loss.advance(record, state).items()}
                for name, value in state.items():
                    self.get_buffer(f"running_{name}").copy_(value)
        return replace(record, state=state)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Move the running numbers with the model, but keep their dtype: in 16 bits a count stands still at 2048."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, value in before.items():
            if self.get_buffer(name).dtype != value.dtype:
                setattr(self, name, value.to(self.get_buffer(name).device))
        return self

    def _next_draw(self) -> int:
        """Number the draws of a loss that samples tokens; every call of training is a new one."""
        draws = self.get_buffer("draws")
        if self.training and torch.is_grad_enabled():
            draws += 1
        return int(draws)

    def extra_repr(self) -> str:
        """Name, hyper-parameters and conventions of the loss, one per line."""
        given = "".join(f", {key}={value!r}" for key, value in self.loss.hyperparameters.items())
        spelled = [f"{key}: {text}" for key, text in self.loss.conventions.items() if key != "reduction"]
        return "\n".join([f"{self.loss.name}{given}, reduction={self.reduction!r}", *spelled])


def build(loss: Loss | LossConfig, hyperparameters: Mapping[str, Any]) -> Loss:
    """Return the loss of pairs that a name, a recipe's mapping or list, or a `Loss` stands for."""
    built = _built(loss, hyperparameters)
    if built.needs.lists:
        raise LossError(
            f"{built.name}: reads all completions of a prompt at once, and this signature holds two. "
            "Call the loss itself with a ListLogProbs, or take a loss of pairs."
        )
    return built


def _built(loss: Loss | LossConfig, hyperparameters: Mapping[str, Any]) -> Loss:
    if isinstance(loss, str):
        return get_loss(loss, **hyperparameters)
    if hyperparameters:
        kind = "a loss" if isinstance(loss, Loss) else "a mapping or list"
        names = ", ".join(hyperparameters)
        raise LossError(f"{names}: {kind} brings its own hyper-parameters; set them there, or pass a name.")
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, (Mapping, Sequence)):
        return loss_from_config(loss)
    raise LossError(f"loss: expected a name, a mapping or list of a recipe, or a Loss, given {type(loss).__name__}.")


def _constant(reference: Tensor | None) -> Tensor | None:
    """Cut the gradient: a reference scored with it (one model, adapter off) would bend the policy's."""
    return reference.detach() if isinstance(reference, Tensor) else reference


def _unknown(name: str) -> str:
    if name == "state":
        return "state: this module keeps the loss's running numbers itself; do not pass them."
    if name in METHODS or name in ("beta", "label_smoothing"):
        return f"{name}: hyper-parameters belong to the constructor: PreferenceLoss(name, {name}=...)."
    known = [ARGUMENTS.get(field, field) for field in FIELDS if field != "state"]
    return f"{name}: no such tensor.{suggest(name, known)} Accepted: {', '.join(known)}."


def _missing(name: str, loss: Loss) -> str:
    argument = ARGUMENTS.get(name, name)
    if name in ("ref_chosen_logps", "ref_rejected_logps"):
        return (
            f"{argument}: {loss.name} compares with a reference. Score the same completions with the frozen starting "
            "model, without gradient, and pass the sums; or take a loss without a reference (simpo, orpo, cpo)."
        )
    if name.endswith("_lengths"):
        side = name.removesuffix("_lengths")
        return (
            f"{argument}: {loss.name} divides by completion lengths, and trainers of four tensors do not pass them. "
            f"Pass {argument}={side}_mask.sum(-1), the very tokens whose log-probs were summed{_without_lengths(loss)}."
        )
    return (
        f"{argument}: {loss.name} reads it. Pass it by keyword, {argument}=...; "
        "help(prefopt_losses.LogProbs) says what it holds."
    )


def _without_lengths(loss: Loss) -> str:
    """Offer the form of the same method that sums, where there is one."""
    if loss.parts or "normalize" not in loss.hyperparameters:
        return ""
    try:
        summed = get_loss(loss.name, **{**loss.hyperparameters, "normalize": "sum"})
    except LossError:
        return ""
    if summed.needs.lengths:
        return ""
    return f', or use PreferenceLoss("{loss.name}", normalize="sum"), which needs none (its beta counts per nat)'
