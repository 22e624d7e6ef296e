"""A loss can be written in the algebra itself, and refuses what it cannot mean."""

import sys

import pytest
import torch
from published.records import make_record

from prefopt_losses import LossError, get_loss, loss_from_config


def test_published_methods_written_out_are_themselves():
    record = make_record()
    pairs = {
        "dpo": [{"beta": 0.1}],
        "gpo_squared": [{"f": "squared", "beta": 0.1}],
        "ipo": [{"f": "squared", "beta": 0.2, "aggregate": "mean", "coefficient": 25.0}],
        "cdpo": [{"beta": 0.1, "q": 0.9}],
        "simpo": [{"beta": 2.0, "aggregate": "mean", "reference": False, "shift": 0.25}],
        "bco_pair": [{"beta": 0.1, "contrast": "chosen"}, {"beta": 0.1, "contrast": "rejected"}],
        "cpo": [
            {"beta": 0.1, "reference": False},
            {"f": "linear", "reference": False, "contrast": "chosen", "aggregate": "mean", "weight": "token_share"},
        ],
    }
    for name, terms in pairs.items():
        torch.testing.assert_close(loss_from_config({"terms": terms})(record), get_loss(name)(record))


def test_it_goes_through_its_own_config_and_into_sums():
    loss = loss_from_config({"name": "mine", "terms": [{"f": "squared", "beta": 0.2, "aggregate": "mean"}]})
    assert loss.name == "mine"
    assert loss_from_config(loss.config) == loss
    mixed = loss_from_config([{"terms": [{"f": "hinge"}], "weight": 2.0}, "sft"])
    record = make_record()
    expected = 2 * loss_from_config({"terms": [{"f": "hinge"}]})(record) + get_loss("sft")(record)
    torch.testing.assert_close(mixed(record), expected)
    assert loss_from_config(mixed.config) == mixed


def test_soft_labels_are_a_q_from_the_data():
    record = make_record()
    written = loss_from_config({"terms": [{"beta": 0.1, "soft_labels": True}]})
    assert torch.equal(written(record), get_loss("dpo", soft_labels=True)(record))


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_functions.py").write_text(
        "import torch\n\nnumber = 3\n\n"
        "def steep(x):\n    return torch.exp(-2 * x)\n\n"
        "def total(x):\n    return x.sum()\n"
    )
    (tmp_path / "my_broken.py").write_text("1 / 0\n")
    (tmp_path / "my_asking.py").write_text("import nowhere_at_all\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in ("my_functions", "my_broken", "my_asking"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("module")
def test_a_function_of_ones_own_is_named_by_module_and_function():
    record = make_record()
    expected = get_loss("gpo_exponential", beta=0.2)(record)
    named = {"f": "my_functions:steep", "beta": 0.1}
    torch.testing.assert_close(get_loss("gpo", **named)(record), expected)
    written = loss_from_config({"terms": [named]})
    torch.testing.assert_close(written(record), expected)
    assert loss_from_config(written.config) == written


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("f", "message"),
    [
        ("my_functions:steap", "has no function 'steap'. Did you mean \"steep\""),
        ("my_functions:number", "expected a function, given int"),
        ("my_functions:total", "expected an elementwise function"),
        ("my_broken:f", "failed while it was imported: ZeroDivisionError"),
        ("nowhere_at_all:f", "cannot import nowhere_at_all. It must lie where Python looks"),
        ("my_asking:f", "cannot import nowhere_at_all. my_asking asks for it"),
        ("logistc", 'Did you mean "logistic".* or your own as module:function'),
    ],
)
def test_a_function_that_cannot_be_had_is_told(f, message):
    with pytest.raises(LossError, match=message):
        loss_from_config({"terms": [{"f": f}]})


@pytest.mark.parametrize(
    ("config", "places"),
    [
        ({"terms": []}, ["loss.terms"]),
        ({"terms": "squared"}, ["loss.terms"]),
        ({"terms": [3]}, ["loss.terms[0]"]),
        ({"name": "dpo", "terms": [{}]}, ["loss.name"]),
        ({"terms": [{}], "beta": 0.1}, ["loss.beta"]),
        ({"terms": [{"beta": -1, "agregate": "mean", "f": "sqared"}, {"link": "log_od"}]},
         ["loss.terms[0].beta", "loss.terms[0].agregate", "loss.terms[0].f", "loss.terms[1].link"]),
        ({"terms": [{"q": 0.9, "soft_labels": True}]}, ["loss.terms[0].q"]),
        ({"terms": [{"weight": "token_share"}]}, ["loss.terms[0].weight"]),
        ({"terms": [{"shift": float("inf")}], "weight": -1}, ["loss.weight", "loss.terms[0].shift"]),
    ],
)  # fmt: skip
def test_what_it_cannot_mean_is_refused_with_its_place(config, places):
    with pytest.raises(LossError) as caught:
        loss_from_config(config)
    assert [problem.split(": ")[0] for problem in caught.value.problems] == places
