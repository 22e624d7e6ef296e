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
from collections.abc import Callable
from inspect import Parameter
from itertools import product
from typing import get_type_hints

from torch import Tensor

from prefopt_losses.hyperparameters import schema
from prefopt_losses.inputs import TENSORS, LogProbs
from prefopt_losses.lookup import get_loss
from prefopt_losses.loss import Needs
from prefopt_losses.methods import METHODS

# Keyword-only, for they refine a loss rather than feed it.
KEYWORD_TENSORS = ("preference_probability", "tokens_per_example")


def loss_function(name: str) -> Callable[..., Tensor]:
    """Return the method as a function of tensors, with signature and docstring of its own."""
    parameters = _parameters(name)
    tensor_names = {parameter.name for parameter in parameters} - set(schema(METHODS[name].make))
    tensor_signature = inspect.Signature([p for p in parameters if p.name in tensor_names])

    def function(*args: Tensor | None, **kwargs: object) -> Tensor:
        tensors = {key: value for key, value in kwargs.items() if key in tensor_names}
        hyperparameters = {key: value for key, value in kwargs.items() if key not in tensor_names}
        record = LogProbs(**tensor_signature.bind(*args, **tensors).arguments)
        return get_loss(name, **hyperparameters)(record)

    function.__name__ = function.__qualname__ = f"{name}_loss"
    function.__doc__ = _docstring(name, parameters)
    function.__signature__ = inspect.Signature(parameters, return_annotation=Tensor)  # type: ignore[attr-defined]
    return function


def _parameters(name: str) -> list[Parameter]:
    """Tensors that every option reads; lengths that some do (None by default); keyword-only, all the rest."""
    options = _needs_of_all_options(name)
    always = [tensor for tensor in TENSORS if all(tensor in needs.tensors for needs in options)]
    sometimes = [tensor for tensor in TENSORS if tensor not in always and any(tensor in n.tensors for n in options)]
    if any(needs.step_tokens for needs in options):
        sometimes.append("tokens_per_example")
    positional = Parameter.POSITIONAL_OR_KEYWORD
    return [
        *(Parameter(each, positional, annotation=Tensor) for each in always),
        *(_optional(each, positional) for each in sometimes if each not in KEYWORD_TENSORS),
        *_hyperparameters(name),
        *(_optional(each, Parameter.KEYWORD_ONLY) for each in sometimes if each in KEYWORD_TENSORS),
    ]


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
    annotation = float | Tensor | None if name == "tokens_per_example" else Tensor | None
    return Parameter(name, kind, default=None, annotation=annotation)


def _docstring(name: str, parameters: list[Parameter]) -> str:
    method = METHODS[name]
    prose, _, hyperparameters = (inspect.getdoc(method.make) or "").partition("\nArgs:\n")
    tensors = [f"    {p.name}: {_meaning(p)}" for p in parameters if p.name in (*TENSORS, "tokens_per_example")]
    source = ", ".join(filter(None, (method.paper, method.equation, method.link)))
    return "\n".join(
        [
            f"{prose.rstrip()}\n",
            f"loss = {method.formula}\n",
            "Args:",
            *tensors,
            f"{hyperparameters.rstrip()}\n",
            "Returns:",
            "    (batch,), one value per example, unreduced; fp32 or wider.\n",
            "Raises:",
            "    LossError: a hyper-parameter out of range; a tensor missing, misshapen or not finite.\n",
            f"Source: {source}.",
            *([f"Note: {method.note}"] if method.note else []),
        ]
    )


def _meaning(parameter: Parameter) -> str:
    if parameter.name == "tokens_per_example":
        return "number; mean chosen tokens per example over the optimizer step (this batch's if None)."
    condition = " Read only by some options." if parameter.default is None else ""
    return f"(batch,), {TENSORS[parameter.name]}.{condition}"


apo_down_loss = loss_function("apo_down")
apo_zero_loss = loss_function("apo_zero")
bco_pair_loss = loss_function("bco_pair")
cdpo_loss = loss_function("cdpo")
cpo_loss = loss_function("cpo")
dpo_loss = loss_function("dpo")
gpo_exponential_loss = loss_function("gpo_exponential")
gpo_loss = loss_function("gpo")
gpo_savage_loss = loss_function("gpo_savage")
gpo_squared_loss = loss_function("gpo_squared")
gpo_truncated_quadratic_loss = loss_function("gpo_truncated_quadratic")
hinge_loss = loss_function("hinge")
ipo_loss = loss_function("ipo")
nca_pair_loss = loss_function("nca_pair")
orpo_loss = loss_function("orpo")
robust_dpo_loss = loss_function("robust_dpo")
sft_loss = loss_function("sft")
simpo_loss = loss_function("simpo")
slic_hf_loss = loss_function("slic_hf")
sppo_hard_loss = loss_function("sppo_hard")

__all__ = [f"{name}_loss" for name in METHODS]
