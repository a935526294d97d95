"""explore.html in a JavaScript engine (pip install mini-racer), and in Chromium, if it is there."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlencode

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import simpo

FILE = Path(__file__).with_name("explore.html")
PAGE = FILE.read_text()
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
VALUES = {"beta": (0.1, 2.5, 12), "gamma": (0, 1.4, 6), "chosen": (-5, -0.3)}
VALUES |= {"rejected": (-4.2, -0.05), "chosenLength": (1, 200), "rejectedLength": (3, 400)}
GRID = [dict(zip(VALUES, values)) for values in itertools.product(*VALUES.values())]
GRID = [x | {"dpoBeta": 0.03, "reference": -1.1, "noise": 0.2} for x in GRID]


def expect(name, s):  # what simpo.py and autograd say with the page's settings s
    hyper = {"beta": s["dpoBeta"]} if name == "dpo" else {"beta": s["beta"], "gamma": s["gamma"]}
    tokens, answers = [], []
    for side in ("chosen", "rejected"):
        n = s[f"{side}Length"]
        logps = torch.full((n,), s[side], dtype=torch.float64, requires_grad=True)
        answers.append(simpo.Answers(logps.sum(), logps.mean(), n * s["reference"], n))
        tokens.append(logps)
    loss, chosen, rejected = simpo.OBJECTIVES[name](*answers, **hyper)
    loss.backward()
    numbers = {"loss": loss, "weight": 1 - (-loss).exp()}  # 1 - sigmoid(x) for -log sigmoid(x)
    numbers |= {"chosenReward": chosen, "rejectedReward": rejected, "margin": chosen - rejected}
    numbers |= {"chosenPull": tokens[0].grad.abs()[0], "rejectedPull": tokens[1].grad.abs()[0]}
    return {key: value.item() for key, value in numbers.items()}


@pytest.fixture(scope="module")
def engine():
    racer = pytest.importorskip("py_mini_racer", reason="pip install mini-racer").MiniRacer()
    racer.eval(re.search('<script id="formulas">(.*?)</script>', PAGE, re.DOTALL)[1])
    return lambda code: json.loads(racer.eval(f"JSON.stringify({code})"))


@pytest.mark.parametrize("name", ["simpo", "dpo"])
def test_losses_rewards_weights_and_pulls_are_those_of_simpo(name, engine):
    for s in GRID:
        assert engine(f"{name}({json.dumps(s)})") == pytest.approx(expect(name, s), abs=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 1.4, 6.0])
def test_with_swapped_labels_the_mean_loss_is_lowest_where_the_page_says(engine, gamma):
    for place in (-3.0, 0.4, 7.0, engine(f"balance({gamma}, 0.1)")):
        margin = torch.tensor(place, dtype=torch.float64, requires_grad=True)
        losses = simpo.simpo_loss(torch.stack([margin, -margin]), 0, 1, gamma)
        loss = 0.9 * losses[0] + 0.1 * losses[1]
        loss.backward()
        assert engine(f"noisyLoss({place}, {gamma}, 0.1)") == pytest.approx(loss.item())
        weight = engine(f"noisyWeight({place}, {gamma}, 0.1)")
        assert weight == pytest.approx(-margin.grad.item(), abs=1e-9)
    assert margin.grad.item() == pytest.approx(0, abs=1e-9)  # at the lowest place


def test_the_dots_are_steps_of_gradient_descent(engine):
    s, rate = GRID[30], 0.3 / expect("simpo", GRID[30])["rejectedPull"]  # it is the shorter answer
    for dot in engine(f"walk(simpo, {json.dumps(s)}, 5, 0.3)"):
        assert dot == pytest.approx([s["chosen"], s["rejected"]], abs=1e-6)
        numbers = expect("simpo", s)
        s = s | {"chosen": min(0, s["chosen"] + rate * numbers["chosenPull"])}
        s["rejected"] -= rate * numbers["rejectedPull"]


def test_the_page_has_the_recipes_both_runs_and_all_that_it_needs():
    readme = Path(simpo.__file__).with_name("README.md").read_text()
    recipes = re.findall(r"--beta (\S+) --gamma (\S+) --lr", readme)
    presets = re.findall(r'": \[([\d.]+), ([\d.]+)\]', PAGE)
    asked = [[float(x) for x in recipe] for recipe in [*recipes, (0.1, 0.5)]]  # TRL's defaults
    assert sorted([float(x) for x in preset] for preset in presets) == sorted(asked)
    runs = json.loads(re.search('id="runs">(.*?)</script>', PAGE, re.DOTALL)[1])
    assert [row["step"] for row in runs["gentle"] + runs["hard"]] == [*range(0, 61, 3)] * 2
    assert not re.search(r'(src|href)="(?!https://arxiv)', PAGE) and PAGE.count("\n") <= 600


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
@pytest.mark.parametrize("s", GRID[::29])
def test_a_browser_shows_these_numbers_and_no_error(s):
    flags = ["--headless", "--no-sandbox", "--enable-logging=stderr", "--dump-dom"]
    flags += [f"{FILE.as_uri()}#{urlencode(s)}"]
    done = subprocess.run([CHROMIUM, *flags], check=True, capture_output=True, text=True)
    assert ":CONSOLE" not in done.stderr  # no error
    for name in ("simpo", "dpo"):  # in full, as values of the cells
        shown = re.findall(f'id="{name}-(\\w+)" value="(.*?)"', done.stdout)
        numbers = {key: float(value) for key, value in shown}
        assert numbers == pytest.approx(expect(name, s), abs=1e-6)
