"""The page opens from disk in a browser: it asks the network for nothing, complains of nothing, and works."""

from __future__ import annotations

import pytest
from browser import CHROMIUM, browser
from finished import finished_sweep

from prefopt.report.commands import write_report

SCRIPT = "<script>window.taken = true</script><img src=x onerror='window.taken = true'>"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian package chromium)"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    runs = {
        f"{loss}-{beta}-{seed}": {
            "loss": {"name": loss, "beta": beta}, "seed": seed, "skill": skill, "answer": SCRIPT, "gold": True,
        }
        for loss, skill in (("dpo", 0.6), ("ipo", 0.9), ("gpo_exponential", 0.7)) for beta in (0.05, 0.1)
        for seed in (0, 1)
    }  # fmt: skip
    runs["kto-0"] = {"loss": "kto", "failed": f"out of memory {SCRIPT}", "gold": True}
    file = write_report([finished_sweep(folder / "sweep", runs)], folder / "report", figures=False).html
    with browser(folder / "profile") as opened:
        opened.resize(1280, 1000)
        opened.open(file)
        yield opened, file


def test_it_asks_the_network_for_nothing_and_complains_of_nothing(page):
    opened, file = page
    assert [address for address in opened.asked if not address.startswith("data:")] == [file.as_uri()]
    assert opened.complaints == []


def test_every_chart_is_drawn(page):
    opened, _ = page
    charts = opened.evaluate("document.querySelectorAll('.chart').length")
    assert charts >= 8
    assert opened.evaluate("[...document.querySelectorAll('.chart')].every(c => c.querySelector('.main-svg'))")
    assert opened.evaluate("document.querySelectorAll('#frontier .scatterlayer .trace').length") == 12


def test_a_script_in_an_answer_of_a_model_stays_text(page):
    opened, _ = page
    assert opened.evaluate("window.taken === undefined")
    assert SCRIPT in opened.evaluate("document.querySelector('#samples dd:last-of-type').textContent")


def test_a_click_sorts_the_table_and_another_turns_it_round(page):
    opened, _ = page
    column = "[...document.querySelectorAll('#settings thead th')].findIndex(h => h.textContent === 'gold reward')"
    values = f"[...document.querySelectorAll('#settings tbody tr')].map(r => r.cells[{column}].dataset.value)"
    click = f"document.querySelectorAll('#settings thead th')[{column}].querySelector('button').click()"
    opened.evaluate(click)
    down = opened.evaluate(values)
    opened.evaluate(click)
    up = opened.evaluate(values)
    known = [float(value) for value in down if value]
    assert known == sorted(known, reverse=True)
    assert [float(value) for value in up if value] == sorted(known)
    assert down[-1] == up[-1] == ""  # a setting without a result stays at the end


def test_buttons_choose_the_panel(page):
    opened, _ = page
    title = "document.querySelector('#beta .xtitle').textContent"
    before = opened.evaluate(title)
    opened.evaluate("[...document.querySelectorAll('#beta .panels button')].at(-1).click()")
    assert before.startswith("regularisation strength")
    assert opened.evaluate(title).startswith("beta, in each loss's own unit")


def test_dark_and_light_follow_the_reader(page):
    opened, _ = page
    background = "getComputedStyle(document.body).backgroundColor"
    light = opened.evaluate(background)
    opened.evaluate("document.getElementById('theme').click()")
    assert opened.evaluate(background) != light
    opened.evaluate("document.getElementById('theme').click()")
    assert opened.evaluate(background) == light


def test_a_phone_scrolls_in_one_direction(page):
    opened, _ = page
    opened.resize(390, 844)
    assert opened.evaluate("document.documentElement.scrollWidth <= window.innerWidth + 1")
    opened.resize(1280, 1000)
