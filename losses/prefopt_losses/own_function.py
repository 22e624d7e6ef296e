"""A function of somebody's own: found by name or `module:function`, and tried before a run depends on it."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from prefopt_losses.convex import FUNCTIONS, Function
from prefopt_losses.errors import LossError, suggest


def named_function(f: str | Function) -> Function:
    """Return the function of a name, of `module:function`, or the function itself, tried on a few points.

    Raises:
        LossError: no such name or module, or `checked` refuses it.
    """
    if f in FUNCTIONS.values():
        return f  # type: ignore[return-value]
    if not isinstance(f, str):
        return _tried(f, getattr(f, "__name__", type(f).__name__))
    if ":" in f:
        return _tried(_imported(f), f)
    if f not in FUNCTIONS:
        known = ", ".join(FUNCTIONS)
        raise LossError(f"f: no function {f!r}.{suggest(f, FUNCTIONS)} Known: {known}, or your own as module:function.")
    return FUNCTIONS[f]


def _tried(f: Function, name: str) -> Function:
    try:
        with torch.inference_mode(False), torch.enable_grad():  # a loss may be made while evaluating
            checked(f, name)
    except LossError as error:
        raise LossError(f"f: {problem}" for problem in error.problems) from error
    return f


def _imported(path: str) -> Function:
    module, _, name = path.partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        lost = error.name or module
        where = "It must lie where Python looks." if module.startswith(lost) else f"{module} asks for it."
        raise LossError(f"f: {path}: cannot import {lost}. {where}") from error
    except Exception as error:
        raise LossError(f"f: {path}: {module} failed while it was imported: {error!r}.") from error
    function = getattr(found, name, None)
    if function is not None and not callable(function):
        raise LossError(f"f: {path}: expected a function, given {type(function).__name__}.")
    if function is None:
        own = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
        raise LossError(f"f: {path}: {module} has no function {name!r}.{suggest(name, own)}")
    return function


def checked(f: Function, name: str) -> float:
    """Try f on a few points and return the rounding of its result.

    Raises:
        LossError: f fails, is random, is not elementwise, changes its argument, loses the dtype, lets no gradient
            through, or is not finite with a finite slope at 0, where training starts.
    """
    x = torch.tensor([-2.0, -0.7, 0.0, 0.4, 3.0], dtype=torch.float64)
    given = x.clone()
    whole = _called(f, name, given)
    if not torch.equal(given, x):
        raise LossError(f"{name}: expected a function that leaves its argument alone, given one that writes into it.")
    alone = torch.cat([_called(f, name, x[i : i + 1].clone()) for i in range(len(x))])
    again = _called(f, name, x.clone())
    rounding = torch.finfo(whole.dtype).eps
    if not torch.allclose(whole, again, rtol=64 * rounding, atol=0, equal_nan=True):
        raise LossError(f"{name}: expected the same value for the same x, given two; take randomness out of it.")
    if not torch.allclose(whole, alone, rtol=64 * rounding, atol=rounding, equal_nan=True):
        raise LossError(
            f"{name}: expected an elementwise function, given one whose value at a point depends on the other "
            "points of the batch. A loss that is taken over a batch cannot be written as an f."
        )
    _check_gradient(f, name, x)
    _check_start(f, name)
    return max(rounding, torch.finfo(torch.float64).eps)


def _called(f: Function, name: str, x: Tensor) -> Tensor:
    try:
        value = f(x)
    except Exception as error:
        hint = " Use torch.where instead of if." if "ambiguous" in str(error) else ""
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise LossError(f"{name}: failed on a float64 tensor of shape {tuple(x.shape)}: {said[0]}.{hint}") from error
    if not isinstance(value, Tensor):
        raise LossError(f"{name}: expected a tensor for a tensor, given {type(value).__name__}.")
    if value.shape != x.shape:
        shapes = f"expected shape {tuple(x.shape)} for {tuple(x.shape)}, given {tuple(value.shape)}"
        raise LossError(f"{name}: expected an elementwise function: {shapes}.")
    if not value.is_floating_point():
        raise LossError(f"{name}: expected floating-point values, given {value.dtype}.")
    return value


def _check_gradient(f: Function, name: str, x: Tensor) -> None:
    point = x.clone().requires_grad_()
    try:
        value = f(point.clone())
        if value.requires_grad:
            torch.autograd.grad(value.sum(), point, allow_unused=True)
            return
    except Exception as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise LossError(f"{name}: cannot be differentiated: {said[0]}.") from error
    raise LossError(
        f"{name}: expected a differentiable function, given one that no gradient flows through "
        "(detach, .item(), numpy, a comparison or a constant)."
    )


def _check_start(f: Function, name: str) -> None:
    """Refuse an f that is not finite where training starts, or narrower than fp32."""
    zero = torch.zeros(1, requires_grad=True)
    value = f(zero.clone())
    if torch.finfo(value.dtype).bits < 32:
        raise LossError(f"{name}: expected fp32 for fp32 or wider, given {value.dtype}.")
    (slope,) = torch.autograd.grad(value.sum(), zero, allow_unused=True)
    if not (value.isfinite().all() and (slope is None or slope.isfinite().all())):
        found = f"f(0) = {value.item():g}, f'(0) = {0.0 if slope is None else slope.item():g}"
        raise LossError(f"{name}: expected a finite value and slope at x = 0, where training starts, given {found}.")
