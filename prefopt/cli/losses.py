"""`prefopt losses`: the table of methods, one of them explained and profiled, or several compared."""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from prefopt.cli.loss_profile import show_comparison, show_matches, show_profiles
from prefopt.cli.loss_words import Subject, matched_loss, subjects
from prefopt.cli.printing import console, print_hints, print_labelled
from prefopt.errors import Problem, UserError
from prefopt_losses import METHODS, LossError, Method, get_loss
from prefopt_losses.hyperparameters import schema
from prefopt_losses.list_terms import ListTerm
from prefopt_losses.profiles.matched_beta import match_beta
from prefopt_losses.readme import FAMILIES
from prefopt_losses.terms import Term

DRAWN = ("dpo", "ipo", "hinge", "gpo_exponential", "gpo_truncated_quadratic", "gpo_savage")
"""What `--plot` draws when nothing is named: the table of GPO."""
NOTATION = (
    "s sigmoid; w chosen, l rejected; l_w, r_w log-probs of policy and reference, summed over the "
    "completion; u = l - r; rho = u_w - u_l; a bar divides by the completion's tokens; nll negative "
    "log-likelihood per token"
)


def losses(
    words: Sequence[str], *, plot: str | None, match: str | None, at: float, radius: float, as_json: bool
) -> None:
    """Do what the words and options of `prefopt losses` ask for.

    Args:
        words: names of losses, sums or functions, each followed by its hyper-parameters as key=value.
        plot: file to draw into, or None.
        match: `NAME:BETA` of the loss whose regularisation is to be matched, or None.
        at: the strength of preference to match at.
        radius: how far the function is sampled.
        as_json: print plain data instead of prose.

    Raises:
        UserError: a wrong name, hyper-parameter, function, file or number.
    """
    asked = subjects(words)
    with _reader_may_leave():
        if plot is not None:
            _draw(asked or subjects(DRAWN), plot, radius)
        if match is not None:
            _match(asked or [Subject(name, get_loss(name)) for name in METHODS], match, at, as_json)
        elif as_json:
            chosen = asked or [Subject(name, get_loss(name)) for name in METHODS]
            data = [as_data(subject, radius) for subject in chosen]
            print(json.dumps(data[0] if len(asked) == 1 else data, indent=2, ensure_ascii=False))
        elif len(asked) > 1:
            show_comparison(console(), {subject.name: subject.profile(radius=radius) for subject in asked})
        elif asked:
            show_loss(asked[0], radius)
        elif plot is None:
            show_losses()


def as_data(subject: Subject, radius: float) -> dict[str, Any]:
    """Return what `--json` prints of a loss: how to build it again, and a profile per term that has one."""
    named: dict[str, Any] = {"name": subject.name}
    if subject.loss is not None:
        named["loss"] = json.loads(json.dumps(subject.loss.config, default=_plain))
    return {**named, "profiles": [seen.as_dict() for seen in subject.term_profiles(radius=radius)]}


def _draw(asked: Sequence[Subject], plot: str, radius: float) -> None:
    from prefopt.cli.loss_plot import draw

    path = Path(plot)
    draw(asked, path, radius=radius)
    print(path, file=sys.stderr)


def _match(asked: Sequence[Subject], match: str, at: float, as_json: bool) -> None:
    other = matched_loss(match)
    losses = [subject.loss for subject in asked if subject.loss is not None]
    if bare := [subject.name for subject in asked if subject.loss is None]:
        fix = f"give it to a loss: gpo f={bare[0]}"
        raise UserError(Problem("--match", "losses, which have a beta", ", ".join(bare), fix))
    try:
        found = [match_beta(loss, other, p=at) for loss in losses]
    except LossError as error:
        raise UserError([Problem("--match", *_expected_given(text)) for text in error.problems]) from None
    if as_json:
        print(json.dumps([vars(each) for each in found], indent=2, ensure_ascii=False))
    else:
        show_matches(console(), found, other)


def _expected_given(text: str) -> tuple[str, str]:
    expected, given, said = text.partition(", given ")
    return (expected.removeprefix("p: expected "), f"--at {said.rstrip('.')}") if given else ("a loss to match", text)


@contextmanager
def _reader_may_leave() -> Iterator[None]:
    """Let `| head` close the pipe: that the reader has seen enough is no failure."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except SystemExit as end:  # rich's answer to a closed pipe is to end with 1
        if not isinstance(end.__context__, BrokenPipeError):
            raise


def show_losses() -> None:
    """Print every method with its formula and, where there is room, its source."""
    out = console()
    names = max(map(len, METHODS))
    papers = out.width >= 110
    for family, title in FAMILIES.items():
        out.print(Text(f"\n{title}", style="bold"))
        table = Table.grid(padding=(0, 3, 0, 0), pad_edge=False)
        table.add_column(width=names)
        table.add_column(style="cyan")
        table.add_column(no_wrap=True)
        for name, method in METHODS.items():
            if method.family == family:
                table.add_row(name, Text(method.formula), Text(method.paper if papers else ""))
        out.print(table)
    out.print(Text(f"\n{NOTATION}", style="dim"))
    print_hints(
        out,
        {
            "prefopt losses NAME [key=value]": "explains one, and what it does; my.module:function profiles your own f",
            "prefopt losses NAME NAME --plot": "compares several, and draws them",
            "prefopt losses --match dpo:0.1": "the beta of every other loss that regularises as much",
            "prefopt train quickstart loss=NAME": "tries one in the sandbox; loss=dpo+0.5*sft adds two",
        },
    )


def show_loss(subject: Subject, radius: float) -> None:
    """Print a loss: formula, source, hyper-parameters, coordinates, profile, conventions, and how to ask for it.

    Raises:
        UserError: where its function cannot be profiled.
    """
    out, loss = console(), subject.loss
    profiles = subject.term_profiles(radius=radius)
    out.print()
    if loss is None:
        out.print(Text(subject.name, style="bold"), Text("a scalar function"), sep="   ")
        show_profiles(out, profiles, loss)
        print_hints(out, {f"prefopt train quickstart loss=gpo loss.f={subject.name}": "trains with it"})
        return
    if loss.name in METHODS:
        _show_method(out, loss.name, METHODS[loss.name])
    else:
        out.print(Text(loss.name, style="bold"), Text("a weighted sum of losses"), sep="   ")
    show_profiles(out, profiles, loss)
    of_lists = "coefficient * reduction(x),  x = beta * s of every completion of a prompt"
    of_pairs = "coefficient * weight * ( q f(x) + (1 - q) f(-x) ),  x = beta * ( a . s - shift )"
    _heading(out, "In the algebra", of_lists if loss.needs.lists else of_pairs)
    for index, term in enumerate(loss.terms):
        if index:
            out.print()
        _rows(out, _coordinates(term))
    _heading(out, "Conventions")
    spelled = {key: text for key, text in loss.conventions.items() if key not in ("note", "function")}
    _rows(out, [("reads", ", ".join(loss.needs.tensors)), *spelled.items()])
    _heading(out, "In a recipe")
    out.print(Text(f"    loss: {_recipe_form(loss.config)}\n", style="green"))


def _show_method(out: Console, name: str, method: Method) -> None:
    out.print(Text(name, style="bold"), Text(method.summary), sep="   ")
    out.print(Padding(Text(method.formula, style="bold cyan"), (1, 4)))
    out.print(Text(NOTATION, style="dim"))
    _heading(out, "Source")
    source = ", ".join(filter(None, (method.paper, method.equation, method.link)))
    _rows(out, [("paper", source), ("in TRL", method.trl), ("note", method.note)])
    _heading(out, "Hyper-parameters")
    _show_hyperparameters(out, method)


def _recipe_form(config: Any) -> str:
    if isinstance(config, dict):
        return "{" + ", ".join(f"{key}: {_recipe_form(value)}" for key, value in config.items()) + "}"
    return f"[{', '.join(map(_recipe_form, config))}]" if isinstance(config, list) else _plain(config)


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


def _coordinates(term: Term | ListTerm) -> list[tuple[str, str]]:
    """Return the five coordinates of a term, and what differs from the plain case."""
    c = term.coordinates()
    link = "" if c["link"] == "identity" else f"{c['link']} of "
    score = f"{link}{c['aggregate']} of log pi{' - log pi_ref' if c['reference'] else ''} over the completion"
    rows = [
        ("f", _plain(c.get("f", ""))),
        ("reduction", _plain(c.get("reduce", ""))),
        ("score s", score),
        ("contrast a", "({:g}, {:g}) of chosen and rejected".format(*term.contrast)),
        *((key, _plain(c.get(key, ""))) for key in ("sort", "beta", "shift", "q", "coefficient", "weight")),
    ]
    usual = {"shift": "0", "q": "1", "coefficient": "1", "weight": "1"}
    return [(key, text) for key, text in rows if text and usual.get(key) != text]


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if callable(value):
        return f"{value.__module__}:{value.__qualname__}" if hasattr(value, "__qualname__") else str(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _heading(out: Console, title: str, aside: str = "") -> None:
    out.print()
    out.print(Text(title, style="bold"), Text(aside, style="dim"), sep="   ")


def _rows(out: Console, rows: Iterable[tuple[str, str]]) -> None:
    for label, text in rows:
        print_labelled(out, label, text, width=16)
