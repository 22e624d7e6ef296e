"""Write the README of the losses and the type stub of their functions, both made from the table of methods.

    python -m prefopt_losses.readme losses/README.md

writes that README and, beside functional.py, the type stub functional.pyi. A test fails when either is stale. What
the pages of `docs/losses` say in the same words is public here: `kind_of_data`, `also_reads`, `score_in_words`,
`source_link`, and the table OUTSIDE of what is no loss of this table.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt_losses import functional
from prefopt_losses.hyperparameters import schema
from prefopt_losses.list_terms import ListTerm
from prefopt_losses.lookup import get_loss
from prefopt_losses.method import Method
from prefopt_losses.methods import FAMILIES, METHODS
from prefopt_losses.needs import Needs
from prefopt_losses.terms import Term, function_name

STUB = Path(functional.__file__).with_suffix(".pyi")
PAGES = "../docs/losses"
"""Where the page of each method lies, from the README."""

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

This page is written from the table in `prefopt_losses/methods/` by `make docs`; edit the table. Each name leads to
the page of its method: when to use it, what its function does, how to call it. [Which one?]({pages}/index.md)

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

{notation}
"""

NOTATION = """\
Notation: `s` sigmoid; `w` chosen, `l` rejected; `l_w`, `r_w` policy and reference log-probs summed over
completion tokens; `u = l - r`; `rho = u_w - u_l`; a bar divides by the completion's tokens;
`nll` is the token mean of `-l_w`."""


@dataclass(frozen=True)
class Outside:
    """Something that is called a preference loss and is not in the table."""

    name: str
    reason: str
    instead: str
    arxiv: str = ""


OUTSIDE: tuple[Outside, ...] = (
    Outside("TR-DPO", "no loss: a callback that moves the reference towards the policy", "none; the reference is fixed "
            "here, and cached", "2404.09656"),
    Outside("RSO's sampling, RFT, best of n", "steps of data: they choose the completions", "`hinge` or `dpo` on RSO's "
            "pairs, `sft` on the chosen ones", "2309.06657"),
    Outside("Online DPO", "sampling: pairs of the current policy, judged during training", "any pair loss, on "
            "the pairs of each round", "2402.04792"),
    Outside("Nash-MD, IPO-MD", "sampling, from a mixture of policy and reference", "`ipo` or another pair loss, on the "
            "pairs of each round"),
    Outside("XPO", "adds the log-probs of completions that the reference samples during training", "`dpo` is its other "
            "part", "2405.21046"),
    Outside("HyPO (hybrid, offline and online)", "adds a KL estimated on samples of the policy",
            "`dpo` is its other part"),
    Outside("D2PO, discriminator-guided", "online DPO with a labeller that is trained beside it", "`dpo`; `d2po` is "
            "another method, DPO with temporal decay", "2405.01511"),
    Outside("p-DPO in its exact form", "its minimum is over reward models of the whole expected loss, and its KL is "
            "taken on samples of the reference", "`pessimistic_distillation`: the minimum pair by pair, the KL on the "
            "pair's own completions", "2405.19316"),
    Outside("BCO with UDM weights", "density ratios from a classifier of prompt embeddings, trained beforehand",
            "`bco` without them", "2404.04656"),
    Outside("DRO-V's value network", "a second network with its own optimizer", "`dro`: values from the data, or a "
            "linear head learned beside the policy", "2405.19107"),
    Outside("AQL, AQFL, DBAQL of DiscoPOP", "their f itself changes with mean and spread of the batch", "`discopop`, "
            "`cell`, `padll` of the same search", "2406.08414"),
    Outside("PRO, LiPO", "other reductions of a list than the four written here", "`plackett_luce_dpo`, `infonca`, "
            "`nca_list`, `rrhf`; in Python, a `ListTerm` of your own (`terms:` of a recipe holds terms of pairs)"),
    Outside("LPO", "two terms would express it, but its formula was read second-hand only", "`terms:` of a recipe with "
            "an f of your own", "2508.14947"),
    Outside("EXPO (explicit preference optimization)", "its formula was not read", "-", "2506.07492"),
    Outside("DPO-Shift with a schedule", "no hyper-parameter changes during training", "`dpo_shift` at a fixed lambda",
            "2502.07599"),
    Outside("TBPO, BNF", "preferences of single tokens: another score than a log-prob of the completion", "`tdpo1`, "
            "`tdpo2`, `d2po` look inside a completion too"),
    Outside("MaPO", "a loss of diffusion models: its score is a denoising error, no log-prob", "-"),
)  # fmt: skip
"""What does not fit, why, and what comes nearest."""


def readme() -> str:
    """Return the README of the losses."""
    lines = [HEAD.format(example=EXAMPLE, pages=PAGES, notation=NOTATION)]
    for family, title in FAMILIES.items():
        rows = {name: method for name, method in METHODS.items() if method.family == family}
        lines += [
            f"### {title}",
            "",
            "| name | loss | defaults | reads | TRL 1.16 | source |",
            "|---|---|---|---|---|---|",
        ]
        lines += [_row(name, method) for name, method in rows.items()]
        lines += ["", *(f"- `{name}`: {escaped(method.note)}" for name, method in rows.items() if method.note), ""]
    lines += ["## What does not fit, and why", "", *outside_table(), ""]
    lines += [
        "## Coordinates",
        "",
        "| name | f | score | contrast | beta | shift | q | coefficient | weight |",
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    lines += [_coordinates(name, term) for name, term in _all_terms() if isinstance(term, Term)]
    lines += _list_coordinates()
    return "\n".join(lines) + "\n"


def outside_table() -> list[str]:
    """Return the lines of the table of what does not fit."""
    rows = ["| method | why it is not here | what comes nearest |", "|---|---|---|"]
    for each in OUTSIDE:
        name = f"[{each.name}](https://arxiv.org/abs/{each.arxiv})" if each.arxiv else each.name
        rows.append(f"| {name} | {each.reason} | {each.instead} |")
    return rows


def escaped(text: str) -> str:
    """Return prose in which Markdown sees neither emphasis nor the edge of a table cell."""
    return re.sub(r"[*|]|<(?=\w)", r"\\\g<0>", text)


def kind_of_data(needs: Needs) -> str:
    """Return what one example of a loss is."""
    if needs.lists:
        return "lists"
    if needs.pairs:
        return "pairs"
    return "single completions" if needs.rejected else "chosen only"


def also_reads(needs: Needs) -> list[str]:
    """Return what a loss reads besides the policy's log-probs."""
    return [said for need, said in READS.items() if getattr(needs, need)]


def score_in_words(term: Term | ListTerm) -> str:
    """Return aggregate, reference and link of a score: `mean, reference, jensen_shannon`."""
    link = function_name(term.score.link)
    reference = ["reference"] * term.score.reference
    return ", ".join([term.score.aggregate_name, *reference, *([link] if link != "identity" else [])])


def source_link(method: Method) -> str:
    """Return paper and equation, linked where there is an address."""
    source = ", ".join(filter(None, (method.paper, method.equation)))
    return f"[{source}]({method.link})" if method.link else source


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
    reads = ", ".join([kind_of_data(needs), *also_reads(needs), *["the whole step"] * bool(needs.batch)])
    page, formula = f"[`{name}`]({PAGES}/{name}.md)", method.formula.replace("|", "\\|")
    return f"| {page} | `{formula}` | {defaults} | {reads} | {method.trl} | {source_link(method)} |"


def _coordinates(name: str, term: Term) -> str:
    c = term.coordinates()
    contrast = "({:g}, {:g})".format(*term.contrast)
    if term.sort:
        contrast += f", {term.sort} sorted"
    rest = " | ".join(escaped(number(c[key])) for key in ("beta", "shift", "q", "coefficient", "weight"))
    return f"| `{name}` | {c['f']} | {score_in_words(term)} | {contrast} | {rest} |"


def _all_terms() -> Iterator[tuple[str, Term | ListTerm]]:
    return ((name, term) for name in METHODS for term in get_loss(name).terms)


def _list_coordinates() -> list[str]:
    rows = [(name, term) for name, term in _all_terms() if isinstance(term, ListTerm)]
    if not rows:
        return []
    head = ["", "| name | reduction | score | beta | coefficient |", "|---|---|---|---|---|"]
    return head + [
        f"| `{name}` | {term.coordinates()['reduce']} | {score_in_words(term)} | {term.beta:g} | {term.coefficient:g} |"
        for name, term in rows
    ]


def number(value: Any) -> str:
    """Return a coordinate: a number, or the name of what each example brings."""
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
