"""Write the pages that are made from the table of methods.

    python -m prefopt_losses.readme losses/README.md

writes that README and, beside functional.py, the type stub functional.pyi. A test fails when either is stale.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefopt_losses import functional
from prefopt_losses.hyperparameters import schema
from prefopt_losses.list_terms import ListTerm
from prefopt_losses.lookup import get_loss
from prefopt_losses.method import Method
from prefopt_losses.methods import FAMILIES, METHODS
from prefopt_losses.terms import Term, function_name

STUB = Path(functional.__file__).with_suffix(".pyi")

READS = {
    "reference": "reference",
    "lengths": "lengths",
    "tokens": "token log-probs",
    "scores": "scores",
    "values": "values",
    "preference_probability": "soft labels",
    "gold": "gold completions",
    "mismatched": "mismatched completions",
    "relative": "the policy's distributions",
    "sequential_kl": "both models' distributions",
}
"""Properties of `Needs`, and what the table calls them."""

EXAMPLE = """\
import torch
from prefopt_losses import LogProbs, get_loss

logps = LogProbs(
    chosen_logps=torch.tensor([-40.0, -62.0], requires_grad=True),  # nats, summed over completion tokens
    rejected_logps=torch.tensor([-55.0, -60.0], requires_grad=True),
    ref_chosen_logps=torch.tensor([-45.0, -61.0]),
    ref_rejected_logps=torch.tensor([-52.0, -61.0]),
    chosen_lengths=torch.tensor([20, 31]),  # scored tokens
)
loss = get_loss("dpo", beta=0.1) + 0.5 * get_loss("sft")
loss(logps).mean().backward()  # loss(logps) is one value per example
loss.margin(logps)  # what rewards and accuracies are taken from
"""

HEAD = """\
# prefopt_losses

Offline preference losses as one algebra. Needs torch and nothing else.

This page is written by `python -m prefopt_losses.readme losses/README.md` from the table in
`prefopt_losses/methods.py`; edit that.

```python
{example}```

For somebody else's trainer every method is also one function of tensors, `<name>_loss`:

    dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1)
    simpo_loss(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, beta=2.0)

`help(dpo_loss)` shows shapes, units, formula and source. Log-probs are always sums over completion tokens, in
nats; methods that want means take the lengths.

## The algebra

    loss = sum of terms                                            one value per example
    term = coefficient * weight * ( q f(x) + (1 - q) f(-x) )       function f, label q, weight
    x    = beta * ( a . s - shift )                                contrast (a, shift, beta)
    s(y) = link( A[log pi(y)] - c * A[log pi_ref(y)] )             score (A, c, link)

`get_loss(name).terms` holds these coordinates as data. Losses add up: `a + b`, `0.5 * a`,
`get_loss("simpo+sft")`.

## Methods

Notation: `s` sigmoid; `w` chosen, `l` rejected; `l_w`, `r_w` policy and reference log-probs summed over
completion tokens; `u = l - r`; `rho = u_w - u_l`; a bar divides by the completion's tokens;
`nll` is the token mean of `-l_w`.
"""


def readme() -> str:
    """Return the README of the losses."""
    lines = [HEAD.format(example=EXAMPLE)]
    for family, title in FAMILIES.items():
        rows = {name: method for name, method in METHODS.items() if method.family == family}
        lines += [
            f"### {title}",
            "",
            "| name | loss | defaults | reads | TRL 1.16 | source |",
            "|---|---|---|---|---|---|",
        ]
        lines += [_row(name, method) for name, method in rows.items()]
        lines += ["", *(f"- `{name}`: {method.note}" for name, method in rows.items() if method.note), ""]
    lines += [
        "## Coordinates",
        "",
        "| name | f | score | contrast | beta | shift | q | coefficient | weight |",
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    lines += [_coordinates(name, term) for name, term in _all_terms() if isinstance(term, Term)]
    lines += _list_coordinates()
    return "\n".join(lines) + "\n"


def stub() -> str:
    """Return functional.pyi: the signatures of the named functions."""
    lines = [
        "# Written by `python -m prefopt_losses.readme`; do not edit.",
        "from collections.abc import Callable, Mapping",
        "from typing import Literal",
        "",
        "from torch import Tensor",
        "",
        "__all__: list[str]",
        "",
        "def loss_function(name: str) -> Callable[..., Tensor]: ...",
    ]
    for name, method in METHODS.items():
        function = getattr(functional, f"{name}_loss")
        lines += [
            f"def {name}_loss(",
            *_stub_parameters(function),
            ") -> Tensor:",
            f'    """{method.summary}"""',
            "",
        ]
    return "\n".join(lines).rstrip("\n") + "\n"


def _row(name: str, method: Method) -> str:
    defaults = ", ".join(f"{key} {each.default}" for key, each in schema(method.make).items())
    needs = get_loss(name).needs
    reads = (
        ["lists"]
        if needs.lists
        else ["pairs"]
        if needs.pairs
        else ["single completions" if needs.rejected else "chosen only"]
    )
    reads += [said for need, said in READS.items() if getattr(needs, need)]
    reads += ["the whole step"] * bool(needs.batch)
    source = ", ".join(filter(None, (method.paper, method.equation)))
    link = f"[{source}]({method.link})" if method.link else source
    formula = method.formula.replace("|", "\\|")
    return f"| `{name}` | `{formula}` | {defaults} | {', '.join(reads)} | {method.trl} | {link} |"


def _coordinates(name: str, term: Term) -> str:
    c = term.coordinates()
    score = f"{c['aggregate']}{', reference' * term.score.reference}"
    if function_name(term.score.link) != "identity":
        score += f", {c['link']}"
    contrast = "({:g}, {:g})".format(*term.contrast)
    rest = " | ".join(_number(c[key]) for key in ("beta", "shift", "q", "coefficient", "weight"))
    return f"| `{name}` | {c['f']} | {score} | {contrast} | {rest} |"


def _all_terms() -> Iterator[tuple[str, Term | ListTerm]]:
    return ((name, term) for name in METHODS for term in get_loss(name).terms)


def _list_coordinates() -> list[str]:
    rows = [(name, term.coordinates()) for name, term in _all_terms() if isinstance(term, ListTerm)]
    if not rows:
        return []
    head = ["", "| name | reduction | score | beta | coefficient |", "|---|---|---|---|---|"]
    score = "{aggregate}{with_reference}".format
    return head + [
        f"| `{name}` | {c['reduce']} | {score(with_reference=', reference' * bool(c['reference']), **c)} "
        f"| {_number(c['beta'])} | {_number(c['coefficient'])} |"
        for name, c in rows
    ]


def _number(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _stub_parameters(function: Any) -> list[str]:
    lines: list[str] = []
    keyword_only = False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            lines, keyword_only = [*lines, "    *,"], True
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}".replace("'", '"')
        lines.append(f"    {parameter.name}: {_static_type(parameter)}{default},")
    return lines


def _static_type(parameter: inspect.Parameter) -> str:
    """Return the annotation as the stub writes it."""
    text = inspect.formatannotation(parameter.annotation)
    for module in ("torch.", "typing.", "collections.abc."):
        text = text.replace(module, "")
    return text.replace("'", '"')


def main() -> None:
    """Write README (at the path given) and stub."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m prefopt_losses.readme PATH")
    Path(sys.argv[1]).write_text(readme(), encoding="utf-8")
    STUB.write_text(stub(), encoding="utf-8")


if __name__ == "__main__":
    main()
