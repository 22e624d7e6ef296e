"""Every method as one function of tensors, for other people's trainers.

    from prefopt_losses import dpo_loss, simpo_loss

    dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1).mean()
    simpo_loss(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, beta=2.0).mean()

Each is built from its row of the table of methods: tensors positional, exactly those the method reads, in
the order of `LogProbs`; hyper-parameters keyword-only; one value per example, unreduced. `help(dpo_loss)`
says all; functional.pyi holds the same signatures for editors and type checkers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from inspect import Parameter
from itertools import product
from typing import get_type_hints

from torch import Tensor

from prefopt_losses.hyperparameters import schema
from prefopt_losses.inputs import ListLogProbs, LogProbs
from prefopt_losses.lookup import get_loss
from prefopt_losses.loss import Needs
from prefopt_losses.methods import METHODS
from prefopt_losses.tensors import LIST_TENSORS, PAIR_TENSORS, shape_of

# Keyword-only, for they refine a loss rather than feed it.
KEYWORD_TENSORS = ("preference_probability",)
EXTRAS = {
    "tokens_per_example": "number; mean chosen tokens per example over the optimizer step (this batch's if None).",
    "state": "numbers carried from step to step, `Loss.advance` (those of this batch alone if None).",
    "draw": "number of this draw of tokens; give the step's, so that every step draws anew.",
    "lists": "(completions,), int64, which prompt's list each completion belongs to, from 0 without gaps.",
}
"""Fields of the records that are no tensors of the table."""


def loss_function(name: str) -> Callable[..., Tensor]:
    """Return the method as a function of tensors, with signature and docstring of its own."""
    parameters = _parameters(name)
    field_names = {parameter.name for parameter in parameters} - set(schema(METHODS[name].make))
    field_signature = inspect.Signature([p for p in parameters if p.name in field_names])
    record = ListLogProbs if get_loss(name).needs.lists else LogProbs

    def function(*args: Tensor | None, **kwargs: object) -> Tensor:
        given = {key: value for key, value in kwargs.items() if key in field_names}
        hyperparameters = {key: value for key, value in kwargs.items() if key not in field_names}
        try:
            bound = field_signature.bind(*args, **given)
        except TypeError as error:
            tensors = ", ".join(field_signature.parameters)
            raise TypeError(f"{name}_loss: {error}. Tensors come first ({tensors}), the rest by keyword.") from None
        return get_loss(name, **hyperparameters)(record(**bound.arguments))

    function.__name__ = function.__qualname__ = f"{name}_loss"
    function.__doc__ = _docstring(name, parameters)
    function.__signature__ = inspect.Signature(parameters, return_annotation=Tensor)  # type: ignore[attr-defined]
    return function


def _parameters(name: str) -> list[Parameter]:
    """Tensors that every option reads; those that some do (None by default); keyword-only, all the rest."""
    options = _needs_of_all_options(name)
    table = {**LIST_TENSORS} if options[0].lists else PAIR_TENSORS
    always = [tensor for tensor in table if all(tensor in needs.tensors for needs in options)]
    sometimes = [tensor for tensor in table if tensor not in always and any(tensor in n.tensors for n in options)]
    positional, keyword = Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY
    return [
        *(Parameter(each, positional, annotation=Tensor) for each in always),
        *([Parameter("lists", positional, annotation=Tensor)] if options[0].lists else []),
        *(_optional(each, positional) for each in sometimes if each not in KEYWORD_TENSORS),
        *_hyperparameters(name),
        *(_optional(each, keyword) for each in sometimes if each in KEYWORD_TENSORS),
        *_extras(name, options),
    ]


def _extras(name: str, options: list[Needs]) -> list[Parameter]:
    """Fields of the record that are no tensors: how a batch lies in its step."""
    keyword = Parameter.KEYWORD_ONLY
    extras = []
    if any(needs.step_tokens for needs in options):
        extras.append(Parameter("tokens_per_example", keyword, default=None, annotation=float | Tensor | None))
    if any(needs.state for needs in options):
        extras.append(Parameter("state", keyword, default=None, annotation=Mapping[str, Tensor] | None))
    if any(needs.draws for needs in options):
        extras.append(Parameter("draw", keyword, default=0, annotation=int))
    return extras


def _needs_of_all_options(name: str) -> list[Needs]:
    """Return the needs under every combination of the hyper-parameters whose values can be listed."""
    listed = {key: each.choices for key, each in schema(METHODS[name].make).items() if each.choices}
    return [get_loss(name, **dict(zip(listed, values))).needs for values in product(*listed.values())]


def _hyperparameters(name: str) -> list[Parameter]:
    """Return the maker's own parameters, annotated with plain types instead of ranges."""
    make = METHODS[name].make
    types = get_type_hints(make)
    return [each.replace(annotation=types[key]) for key, each in inspect.signature(make).parameters.items()]


def _optional(name: str, kind: inspect._ParameterKind) -> Parameter:
    return Parameter(name, kind, default=None, annotation=Tensor | None)


def _docstring(name: str, parameters: list[Parameter]) -> str:
    method = METHODS[name]
    prose, _, hyperparameters = (inspect.getdoc(method.make) or "").partition("\nArgs:\n")
    known = (*PAIR_TENSORS, *LIST_TENSORS, *EXTRAS)
    tensors = [f"    {p.name}: {_meaning(p)}" for p in parameters if p.name in known]
    source = ", ".join(filter(None, (method.paper, method.equation, method.link)))
    return "\n".join(
        [
            f"{prose.rstrip()}\n",
            f"loss = {method.formula}\n",
            "Args:",
            *tensors,
            f"{hyperparameters.rstrip()}\n",
            "Returns:",
            f"    {_values(name)}, unreduced; fp32 or wider.\n",
            "Raises:",
            "    LossError: a hyper-parameter out of range; a tensor missing, misshapen or not finite.\n",
            f"Source: {source}.",
            *([f"Note: {method.note}"] if method.note else []),
        ]
    )


def _values(name: str) -> str:
    return "(lists,), one value per list" if get_loss(name).needs.lists else "(batch,), one value per example"


def _meaning(parameter: Parameter) -> str:
    if parameter.name in EXTRAS:
        return EXTRAS[parameter.name]
    condition = " Read only by some options." if parameter.default is None else ""
    meaning = {**PAIR_TENSORS, **LIST_TENSORS}[parameter.name]
    return f"{shape_of(parameter.name)}, {meaning}.{condition}"


__all__ = [f"{name}_loss" for name in METHODS]
globals().update({name: loss_function(name.removesuffix("_loss")) for name in __all__})
