"""Every loss has a page that agrees with the code, says in somebody's words when to use it, and runs as printed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from prefopt.cli.loss_page import CLOSING, OPENING, loss_page, paragraph_of
from prefopt.cli.loss_page_profile import page_functions
from prefopt.cli.loss_pages import hand_written, index, main, pictures, write_pages, write_plots
from prefopt.cli.loss_words import matched_loss, subjects
from prefopt.recipe import load_recipe, recipe_from_mapping
from prefopt.recipe.loss import build_loss
from prefopt.recipe.text import parse_yaml
from prefopt_losses import METHODS, LossError, UnpairedLogProbs, get_loss, readme

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "losses"
PAGES = [*(FOLDER / f"{name}.md" for name in METHODS), FOLDER / "index.md"]
README = ROOT / "losses" / "README.md"


def text_of(name: str) -> str:
    return (FOLDER / f"{name}.md").read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


def section(page: str, title: str) -> str:
    return page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def words(line: str) -> list[str]:
    return shlex.split(line, comments=True)


@pytest.mark.parametrize("name", METHODS)
def test_the_page_is_what_the_code_says(name):
    page = text_of(name)
    assert page == loss_page(name, paragraph_of(page)), "run `make docs`"


def test_the_index_is_what_the_code_says():
    assert text_of("index") == index(paragraph_of(text_of("index"))), "run `make docs`"


def test_there_is_a_page_for_every_loss_and_no_other():
    assert set(FOLDER.glob("*.md")) == set(PAGES)


@pytest.mark.parametrize("name", METHODS)
def test_somebody_says_when_to_use_it(name):
    paragraph = paragraph_of(text_of(name))
    assert 40 <= len(paragraph.split()) <= 150
    assert paragraph.count(". ") + paragraph.count(".\n") >= 2
    unknown = set(re.findall(r"`([a-z][a-z_0-9]*)`", paragraph)) - KNOWN_WORDS - set(METHODS)
    assert not unknown - set(get_loss(name).hyperparameters), "neither a loss, a metric nor a column"


KNOWN_WORDS = {
    *("displacement", "kl", "length", "loss", "grad_norm", "value", "preference_probability", "token", "sequence"),
    *("soft_labels", "gamma_beta_ratio"),
}


def test_a_page_without_a_paragraph_is_named(tmp_path, monkeypatch):
    (tmp_path / "dpo.md").write_text(text_of("dpo"), encoding="utf-8")
    bare = write_pages(tmp_path)
    assert set(bare) == {*METHODS, "index"} - {"dpo"}
    assert hand_written(tmp_path / "dpo.md") == paragraph_of(text_of("dpo"))
    monkeypatch.setattr("sys.argv", ["loss_pages", str(tmp_path)])
    monkeypatch.setattr("prefopt.cli.loss_pages.write_plots", lambda folder: None)
    monkeypatch.setattr("prefopt.cli.loss_pages.write_pages", lambda folder: ["ipo"])
    with pytest.raises(SystemExit, match=r"nothing stands between.*ipo"):
        main()


def test_what_is_written_by_hand_survives_a_rewrite():
    for odd in ("One. Two with `code` and a | b.", "a\n\n| t |\n|---|\n| x |"):
        assert paragraph_of(loss_page("ipo", odd)) == odd
    assert paragraph_of("no markers") == ""
    assert paragraph_of(f"{OPENING} never closed") == ""
    assert paragraph_of(f"{OPENING}\n kept \n{CLOSING}") == "kept"


@pytest.mark.parametrize("name", METHODS)
def test_the_python_block_runs_and_agrees_with_the_loss(name):
    (block,) = blocks(text_of(name), "python")
    scope: dict[str, object] = {}
    exec(compile(block, f"{name}.md", "exec"), scope)
    losses = scope["losses"]
    assert isinstance(losses, torch.Tensor)
    assert losses.shape == (2,)
    assert bool(losses.isfinite().all())
    assert losses[0] != losses[1]


@pytest.mark.parametrize("name", METHODS)
def test_the_recipe_block_is_the_loss_with_its_defaults(name):
    (block,) = blocks(text_of(name), "yaml")
    recipe = recipe_from_mapping({"model": "sandbox", "data": {"train": "sandbox"}, **parse_yaml(block, where=name)})
    assert build_loss(recipe.loss) == get_loss(name)


@pytest.mark.parametrize("name", METHODS)
def test_the_commands_are_understood(name):
    (block,) = blocks(text_of(name), "sh")
    for line in block.splitlines():
        program, command, *rest = words(line)
        assert program == "prefopt"
        if command == "losses":
            if "--match" in rest:
                rest, other = rest[: rest.index("--match")], rest[-1]
                matched_loss(other)
            assert [subject.loss for subject in subjects(rest)] == [get_loss(name)]
        else:
            recipe = load_recipe(rest[0], rest[1:], check_files=False)
            assert command == "train"
            assert build_loss(recipe.loss).name == name


@pytest.mark.parametrize("page", [*PAGES, README], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if path.startswith("https://"):
            continue
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles], target


@pytest.mark.parametrize("page", [*PAGES, README], ids=lambda page: page.stem)
def test_tables_have_the_same_cells_in_every_row(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for table in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        cells = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(cells) == 1, table
        assert re.fullmatch(r"[|-]+", table.splitlines()[1])


def test_losses_with_one_function_share_a_plot_and_none_lies_idle():
    plots = {path.stem for path in (FOLDER / "plots").iterdir()}
    assert plots == set(pictures())
    assert [each.picture for each in page_functions(get_loss("dpo"))] == ["logistic"]
    assert [each.picture for each in page_functions(get_loss("simpo"))] == ["logistic"]
    assert [each.picture for each in page_functions(get_loss("cdpo"))] == ["cdpo"]
    assert sum(path.stat().st_size for path in (FOLDER / "plots").iterdir()) < 1_500_000


def test_a_plot_is_the_same_on_every_day(tmp_path, monkeypatch):
    monkeypatch.setattr("prefopt.cli.loss_pages.pictures", lambda: {"hinge": pictures()["hinge"]})
    drawn = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        (folder / "gone.svg").write_text("")
        write_plots(folder)
        assert [path.name for path in folder.iterdir()] == ["hinge.svg"]
        drawn.append((folder / "hinge.svg").read_text(encoding="utf-8"))
    assert drawn[0] == drawn[1]
    assert "date" not in drawn[0]


def test_a_verdict_that_does_not_follow_for_the_loss_is_left_out():
    assert "**regularisation**: kappa = 0.5: holds the policy at the reference as dpo" in text_of("gpo_savage")
    for name in ("f_dpo_js", "odpo", "cal_dpo", "simpo", "ipo"):  # a link, a shift, a sum, no reference, another unit
        assert "**regularisation**" not in section(text_of(name), "What its function does"), name
    assert "never comes to rest" in text_of("dpo")
    assert "never comes to rest" not in text_of("cal_dpo")
    assert "unbounded below" in text_of("bpo")
    assert "unbounded below" not in text_of("simper")  # a line, but of probabilities
    assert "not finite below x = -88.7" in text_of("gpo_exponential")


def test_discopop_is_said_to_start_backwards_and_what_cures_it():
    page = section(text_of("discopop"), "What its function does")
    assert "BACKWARDS, f'(0) = +0.784" in page
    assert "tau = 1 removes it" in page


def test_what_a_page_says_is_asked_for_is_what_the_loss_needs():
    said = {name: section(text_of(name), "What it asks for") for name in METHODS}
    for name, text in said.items():
        needs = get_loss(name).needs
        assert re.findall(r"`(\w+)`", text.partition("#tensors)")[2]) == list(needs.tensors)
        assert ("**Reference**: none" in text) != needs.reference
        assert ("whole optimizer step" in text) == bool(needs.batch)
    assert "at least 2 examples" in said["beta_dpo"]
    assert "`bco_mean_logratio`" in said["bco"]
    assert "no cache can hold" in said["tdpo2"]


@pytest.mark.parametrize("name", METHODS)
def test_unpaired_feedback_is_taken_where_the_page_says_so_and_nowhere_else(name):
    row = torch.tensor([-3.0, -4.0])
    record = UnpairedLogProbs(
        *(row, torch.tensor([True, False]), row - 1, torch.tensor([2, 3])),
        scores=row,
        values=row,
        mismatched_logps=row,
        ref_mismatched_logps=row,
    )
    try:
        taken = get_loss(name).unpaired(record).shape == (2,)
    except LossError:
        taken = False
    said = "unpaired feedback" in section(text_of(name), "What it asks for")
    assert taken == (said or name == "sft")  # which says: chosen only


def test_the_readme_and_the_index_say_what_does_not_fit():
    for page in (README.read_text(encoding="utf-8"), text_of("index")):
        table = section(page, "What does not fit, and why")
        for each in readme.OUTSIDE:
            assert each.name in table
            assert each.reason in table
            assert each.arxiv in table
    mentioned = {word for each in readme.OUTSIDE for word in re.findall(r"`(\w+)`", each.instead)}
    assert mentioned - {"ListTerm"} <= set(METHODS)


def test_every_name_in_the_readme_leads_to_its_page():
    text = README.read_text(encoding="utf-8")
    for name in METHODS:
        assert f"[`{name}`](../docs/losses/{name}.md)" in text
