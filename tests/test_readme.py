"""README is run: its Python examples, and its claims about files and options."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_compose_example_trains():
    names: dict = {}
    exec(BLOCKS[0], names)
    assert int(names["state"].epoch) == 20
    lines = [line for line in BLOCKS[0].splitlines() if line and not line.startswith(("import", "from"))]
    assert len(lines) <= 10
    exec(BLOCKS[1], names)
    assert names["infos"].risk.shape == (3,) and names["states"].epoch.tolist() == [21, 21, 21]
    assert len(set(names["infos"].risk.tolist())) == 3


def test_single_path_example_gives_the_numbers_it_prints():
    names: dict = {}
    exec(BLOCKS[2], names)
    assert names["position"].tolist() == pytest.approx([0.4, 0.5, 0.5])
    # premium - payoff + gain - cost: 0.02 - 0.03 + (0.008 - 0.015 + 0.02) - 0.002 (0.4 + 0.102 + 0.515)
    assert float(names["money"]) == pytest.approx(0.02 - 0.03 + 0.013 - 0.002 * 1.017, abs=1e-7)
    assert names["slope"].shape == (3,)
    assert float(names["vega"]) == pytest.approx(0.1143, abs=1e-4)


def test_optimum_example_gives_the_numbers_it_prints():
    names: dict = {}
    exec(BLOCKS[3], names)
    assert (names["best"].value, names["ask"]) == (pytest.approx(0.0258622, abs=2e-7),) * 2
    assert names["bid"] == pytest.approx(0.02001, abs=1e-5) and names["best"].error < 1e-6


def test_own_prices_example_runs_on_the_quickstart(quickstart, monkeypatch, capsys):
    monkeypatch.chdir(quickstart.folder.parents[1])
    assert quickstart.folder == quickstart.folder.parents[1] / "results" / "quickstart"
    exec(BLOCKS[4], {})
    assert capsys.readouterr().out.startswith("hold 0.")


def test_regression_example_of_the_linearization_page_learns():
    page = (ROOT / "docs" / "linearization.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict = {}
    exec(block, names)
    assert float(names["info"].risk) < 1e-4
    start = names["update"].apply(
        names["problem"], {**names["params"], "v": 0.0 * names["params"]["v"]}, names["state"]
    )
    assert float(start[2].risk) > 0.3  # nothing learned yet


def test_two_commands_stand_alone_on_their_lines():
    commands = [line for line in README.splitlines() if line.startswith("pip install -e")]
    assert commands == [
        "pip install -e . && python scripts/run.py configs/quickstart.toml",
        "pip install -e '.[test]' && pytest",
    ]


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists(), link


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([a-z_]+\.toml)`", README)) - {"config.toml"}))
def test_named_configurations_exist_and_are_valid(name):
    from dhlnn_jax.config import load_config

    overrides = ["--market.path", "x"] if "order_book" in name else []
    assert load_config(ROOT / "configs" / name, overrides)
