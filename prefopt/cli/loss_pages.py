"""Write the page of every loss, their index and their plots.

    python -m prefopt.cli.loss_pages docs/losses

Pages are made from the table of methods; what stands between `<!-- by hand -->` and `<!-- /by hand -->` is kept. A
method whose page has nothing there is named, and the exit code is 1. A test fails when a page is stale.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from prefopt.cli.loss_page import CLOSING, OPENING, loss_page, paragraph_of
from prefopt.cli.loss_page_profile import PageFunction, page_functions
from prefopt_losses import METHODS, get_loss
from prefopt_losses.methods import FAMILIES
from prefopt_losses.readme import NOTATION, also_reads, escaped, kind_of_data, outside_table
from prefopt_losses.tensors import LIST_TENSORS, PAIR_TENSORS, shape_of

DIGITS = re.compile(r"(\d+\.\d\d)\d+")
METADATA = re.compile(r" *<metadata>.*?</metadata>\n", re.DOTALL)

HEAD = """\
# The losses

{count} published losses, each with a page. The table of all of them with formulas and defaults is
[losses/README.md](../../losses/README.md); `prefopt losses` prints it, and `prefopt losses NAME` explains one.
"""

ALGEBRA = """\
## Notation

{notation} `nll_gold` is that of a third, gold completion; `sg` stops the gradient; `sort` sorts over the
batch; scores are what the data say a completion is worth. Everything is minimised, log-probs are in nats.

## The algebra

    loss = sum of terms                                            one value per example
    term = coefficient * weight * ( q f(x) + (1 - q) f(-x) )       function f, label q, weight
    x    = beta * ( a . s - shift )                                contrast (a, shift, beta)
    s(y) = link( A[log pi(y)] - c * A[log pi_ref(y)] )             score (A, c, link)

* **f** says what a margin is worth; x > 0 means that the chosen completion wins.
* **label** q is 1 for a hard label, less for a doubtful one. **weight** is a factor without gradient.
* **contrast** a is (1, -1) for a pair, (1, 0) and (0, -1) for a single completion; **shift** is a margin asked for.
* **score** is the sum or the mean (A) over completion tokens, against a reference (c = 1) or not.
* A coordinate is a number, or a name: what each example brings, or what the whole step settles.
* On the pages, columns in which every term has the usual value (shift 0, q 1, coefficient 1, weight 1) are left out.
* A loss of **lists** replaces f by a reduction of all x of one prompt to one number.
* `beta` in the algebra always multiplies the contrast; where a method's own beta is another number, its page says so.
* The profile of f (`kappa = f''(0) / |f'(0)|`, tails, the win probability `p_f(x) = f'(-x) / (f'(x) + f'(-x))`) is
  computed from f itself: `prefopt losses my_module:my_f` does the same for yours.
"""


def write_pages(folder: Path) -> list[str]:
    """Write pages and index into a folder, and return the names of pages without a paragraph by hand."""
    folder.mkdir(parents=True, exist_ok=True)
    bare = []
    for name in METHODS:
        paragraph = hand_written(folder / f"{name}.md")
        if not paragraph:
            bare.append(name)
        (folder / f"{name}.md").write_text(loss_page(name, paragraph), encoding="utf-8")
    guide = hand_written(folder / "index.md")
    (folder / "index.md").write_text(index(guide), encoding="utf-8")
    return bare if guide else [*bare, "index"]


def hand_written(page: Path) -> str:
    """Return the paragraph that a page has now; empty where there is no page."""
    return paragraph_of(page.read_text(encoding="utf-8")) if page.exists() else ""


def index(guide: str) -> str:
    """Return the index: the guide written by hand, the families, the algebra, and what does not fit."""
    lines = [HEAD.format(count=len(METHODS)), "## Which one", "", OPENING, guide, CLOSING, ""]
    for family, title in FAMILIES.items():
        lines += [f"## {title}", "", "| loss | what it is | reads |", "|---|---|---|"]
        lines += [_row(name) for name, method in METHODS.items() if method.family == family]
        lines += [""]
    lines += [ALGEBRA.format(notation=NOTATION.removeprefix("Notation: "))]
    lines += ["## What does not fit, and why", "", *outside_table(), ""]
    lines += ["## Tensors", "", "What losses read; the page of each names those it needs.", ""]
    lines += ["| tensor | shape | what it holds |", "|---|---|---|"]
    lines += [f"| `{name}` | {shape_of(name)} | {escaped(meaning)} |" for name, meaning in PAIR_TENSORS.items()]
    lines += ["", "Of lists, beside `lists`, the number of each completion's list:", ""]
    lines += ["| tensor | shape | what it holds |", "|---|---|---|"]
    lines += [f"| `{name}` | {shape_of(name)} | {escaped(meaning)} |" for name, meaning in LIST_TENSORS.items()]
    return "\n".join(lines) + "\n"


def _row(name: str) -> str:
    needs = get_loss(name).needs
    reads = ", ".join([kind_of_data(needs), *also_reads(needs), *["the whole step"] * bool(needs.batch)])
    return f"| [{name}]({name}.md) | {escaped(METHODS[name].summary)} | {reads} |"


def pictures() -> dict[str, PageFunction]:
    """Return what to draw, by file name without ending; losses with the same function share one."""
    found: dict[str, PageFunction] = {}
    for name in METHODS:
        for each in page_functions(get_loss(name)):
            found.setdefault(each.picture, each)
    return found


def write_plots(folder: Path) -> None:
    """Draw every function once, as SVG that is the same on every day; remove plots that no page shows."""
    from matplotlib import rc_context

    from prefopt.cli.loss_plot import draw
    from prefopt.cli.loss_words import Subject

    folder.mkdir(parents=True, exist_ok=True)
    wanted = pictures()
    for stale in set(folder.glob("*.svg")) - {folder / f"{name}.svg" for name in wanted}:
        stale.unlink()
    for name, each in wanted.items():
        path = folder / f"{name}.svg"
        with rc_context({"svg.hashsalt": "prefopt", "path.simplify_threshold": 0.2}):
            draw([Subject(each.name, f=each.f)], path)
        # No date; hundredths of a point are enough.
        text = METADATA.sub("", path.read_text(encoding="utf-8"))
        path.write_text(DIGITS.sub(r"\1", text), encoding="utf-8")


def main() -> None:
    """Write everything into the folder given."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m prefopt.cli.loss_pages FOLDER")
    folder = Path(sys.argv[1])
    bare = write_pages(folder)
    write_plots(folder / "plots")
    if bare:
        sys.exit(f"written, but nothing stands between {OPENING} and {CLOSING} in: {', '.join(bare)}")


if __name__ == "__main__":
    main()
