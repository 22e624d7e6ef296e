"""`prefopt losses`: the table of methods, or one of them explained."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from prefopt.cli.printing import console, print_hints, print_labelled
from prefopt.errors import Problem, UserError
from prefopt.recipe.loss import loss_problem
from prefopt_losses import METHODS, LossError, Method, get_loss
from prefopt_losses.hyperparameters import schema
from prefopt_losses.terms import Term, function_name

FAMILIES = {
    "pairwise": "A pair against a reference",
    "reference_free": "Without a reference",
    "pointwise": "Single completions against a reference",
}
NOTATION = (
    "s sigmoid; w chosen, l rejected; l_w, r_w log-probs of policy and reference, summed over the "
    "completion; u = l - r; rho = u_w - u_l; a bar divides by the completion's tokens; nll negative "
    "log-likelihood per token"
)


def show_losses() -> None:
    """Print every method with its formula and its source."""
    out = console()
    names, formulas, papers = (
        max(map(len, column))
        for column in zip(*((name, method.formula, method.paper) for name, method in METHODS.items()))
    )
    for family, title in FAMILIES.items():
        out.print(Text(f"\n{title}", style="bold"))
        table = Table.grid(padding=(0, 3, 0, 0), pad_edge=False)
        table.add_column(width=names)
        table.add_column(style="cyan", width=max(24, min(formulas, out.width - names - papers - 6)))
        table.add_column()
        for name, method in METHODS.items():
            if method.family == family:
                table.add_row(name, Text(method.formula), Text(method.paper))
        out.print(table)
    out.print(Text(f"\n{NOTATION}", style="dim"))
    print_hints(
        out,
        {
            "prefopt losses NAME": "explains one",
            "prefopt train quickstart loss=NAME": "tries one in the sandbox; loss=dpo+0.5*sft adds two",
        },
    )


def show_loss(name: str) -> None:
    """Print one method: formula, source, hyper-parameters, coordinates, conventions, and how to ask for it.

    Raises:
        UserError: where there is no such method.
    """
    try:
        loss = get_loss(name)
    except LossError as error:
        raise UserError([loss_problem(text, name) for text in error.problems]) from None
    if name not in METHODS:
        raise UserError(Problem("loss", "one method", name, "explain its parts one by one"))
    method, out = METHODS[name], console()
    out.print()
    out.print(Text(name, style="bold"), Text(method.summary), sep="   ")
    out.print(Padding(Text(method.formula, style="bold cyan"), (1, 4)))
    out.print(Text(NOTATION, style="dim"))
    _heading(out, "Source")
    source = ", ".join(filter(None, (method.paper, method.equation, method.link)))
    _rows(out, [("paper", source), ("in TRL", method.trl), ("note", method.note)])
    _heading(out, "Hyper-parameters")
    _show_hyperparameters(out, method)
    _heading(
        out,
        "In the algebra",
        "coefficient * weight * ( q f(x) + (1 - q) f(-x) ),  x = beta * ( a . s - shift )",
    )
    for index, term in enumerate(loss.terms):
        if index:
            out.print()
        _rows(out, _coordinates(term))
    _heading(out, "Conventions")
    spelled = {key: text for key, text in loss.conventions.items() if key not in ("note", "function")}
    _rows(out, [("reads", ", ".join(loss.needs.tensors)), *spelled.items()])
    _heading(out, "In a recipe")
    arguments = "".join(f", {key}: {_plain(value)}" for key, value in loss.hyperparameters.items())
    out.print(Text(f"    loss: {{name: {name}{arguments}}}\n", style="green"))


def _show_hyperparameters(out: Console, method: Method) -> None:
    meanings = hyperparameter_meanings(method)
    table = Table.grid(padding=(0, 3, 0, 0))
    for style in ("", "cyan", "dim", ""):
        table.add_column(style=style)
    for name, parameter in schema(method.make).items():
        table.add_row(f"    {name}", _plain(parameter.default), parameter.expected, Text(meanings.get(name, "")))
    out.print(table if table.row_count else "    none")


def hyperparameter_meanings(method: Method) -> dict[str, str]:
    """Return what the method's docstring says about each hyper-parameter, one line each."""
    _, _, arguments = (inspect.getdoc(method.make) or "").partition("\nArgs:\n")
    entries = re.findall(r"^ {4}(\w+): (.+?)(?=^ {4}\w|\Z)", arguments, re.DOTALL | re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _coordinates(term: Term) -> list[tuple[str, str]]:
    """Return the five coordinates of a term, and what differs from the plain case."""
    c = term.coordinates()
    link = "" if c["link"] == "identity" else f"{c['link']} of "
    score = f"{link}{c['aggregate']} of log pi{' - log pi_ref' if c['reference'] else ''} over the completion"
    rows = [
        ("f", function_name(term.f)),
        ("score s", score),
        ("contrast a", "({:g}, {:g}) of chosen and rejected".format(*term.contrast)),
        *((key, _plain(c[key])) for key in ("beta", "shift", "q", "coefficient", "weight")),
    ]
    usual = {"shift": "0", "q": "1", "coefficient": "1", "weight": "1"}
    return [(key, text) for key, text in rows if usual.get(key) != text]


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _heading(out: Console, title: str, aside: str = "") -> None:
    out.print()
    out.print(Text(title, style="bold"), Text(aside, style="dim"), sep="   ")


def _rows(out: Console, rows: Iterable[tuple[str, str]]) -> None:
    for label, text in rows:
        print_labelled(out, label, text, width=16)
