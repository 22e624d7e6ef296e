"""The last decoder layer, over the positions that are read.

After the last attention no position sees another, and log-probs read only the positions that predict a completion's
token: what the MLP there makes of a prompt is thrown away, forward and backward, and so is what the attention finds
for it. So the attention is told that it may leave the rest of a prompt out, and the positions that are read are
gathered before the MLP and put back among zeros after it; the norms and sums around it still find a whole row.
Log-probs and gradients are those of the whole row.

Saved is, of one layer, what every prompt takes of the MLP and, in `prefopt.attention.products`, of the attention: with
prompts of 256 tokens and completions of 128, by arithmetic 3 % and 0.2 % of the operations of a model of 8 layers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from prefopt.activations import decoder_layers
from prefopt.attention import ARGUMENT, ONLY_READ, AttentionPlan


class LastLayer:
    """Hooks on the last layer's attention, which is given the plan of a row, and on the MLP after it.

    Rows without a plan are computed whole; so are models of which it is not plain what comes last: whose longest stack
    is not all their layers, or whose last layer has other parts than one attention and one MLP.
    """

    def __init__(self, model: nn.Module) -> None:
        self._plan: AttentionPlan | None = None
        self._hooks: list[Any] = []
        layers = decoder_layers(model)
        if not layers or len(layers) != getattr(model.config.get_text_config(), "num_hidden_layers", None):
            return
        attention, others = parts_that_multiply(layers[-1])
        if len(attention) == len(others) == 1:
            self._hooks = [
                attention[0].register_forward_pre_hook(self._note_plan, with_kwargs=True),
                others[0].register_forward_pre_hook(self._gather, with_kwargs=True),
                others[0].register_forward_hook(self._put_back),
            ]

    def compute_whole(self) -> None:
        """Compute whole rows from now on."""
        for hook in self._hooks:
            hook.remove()

    def _note_plan(
        self, attention: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        plan = named.get(ARGUMENT)
        self._plan = plan if plan is not None and len(plan.read_rows) < plan.tokens else None
        return None if self._plan is None else (given, {**named, ONLY_READ: True})

    def _gather(
        self, mlp: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        plan = self._plan
        if plan is None or len(given) != 1 or named or given[0].shape[:-1] != (1, plan.tokens):
            self._plan = None
            return None
        return (given[0].index_select(1, plan.read_rows),), named

    def _put_back(self, mlp: nn.Module, given: tuple[Any, ...], output: Any) -> Any:
        plan = self._plan
        # Forgotten before anything is computed: recomputing a layer ends with the last tensor that is needed.
        self._plan = None
        if plan is None:
            return None
        if isinstance(output, tuple):  # experts may give their router's scores beside
            return (_among_zeros(output[0], plan), *output[1:])
        return _among_zeros(output, plan)


def parts_that_multiply(layer: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return the parts of a layer that hold matrices: those that are attention by their name, and the others."""
    attention: list[nn.Module] = []
    others: list[nn.Module] = []
    for name, part in layer.named_children():
        if any(weight.ndim > 1 for weight in part.parameters()):
            (attention if "attn" in name or "attention" in name else others).append(part)
    return attention, others


def _among_zeros(read: Tensor, plan: AttentionPlan) -> Tensor:
    """Put (1, read, hidden), or (read, hidden) of experts that count no rows, among zeros for all other rows."""
    where = read.ndim - 2
    whole = read.new_zeros(*read.shape[:where], plan.tokens, read.shape[-1])
    return whole.index_copy_(where, plan.read_rows, read)
