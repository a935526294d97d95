"""Tests of the objectives, the demo, models of odd kinds, and of what a person types and reads. As
in test_simpo.py, whose tools they use, expected numbers come from elsewhere."""

import ast
import gzip
import importlib
import json
import math
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from statistics import mean

HOUSE = Path(__file__).parents[1]
sys.path[:0] = [str(HOUSE), str(HOUSE / "notebooks")]

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import test_simpo as core  # first, since it sets further variables

FOURS, LLAMA, NINE, PLAIN, README = core.FOURS, core.LLAMA, core.NINE, core.PLAIN, core.README
SEVEN, SHAPE, STILL, Answer, datasets = (
    core.SEVEN,
    core.SHAPE,
    core.STILL,
    core.Answer,
    core.datasets,
)
assert_same_training, chat, log_sigmoid = core.assert_same_training, core.chat, core.log_sigmoid
make_llama, make_tokenizer, mistake = core.make_llama, core.make_tokenizer, core.mistake
nine_answers, place, read_metrics, run = core.nine_answers, core.place, core.read_metrics, core.run
simpo, slow_answers, tokenize = core.simpo, core.slow_answers, core.tokenize
write_jsonl, write_model = core.write_jsonl, core.write_model

importlib.import_module("objectives")  # adds its own to simpo.OBJECTIVES

# ========================================================================= objectives
# The defaults, written here a second time.
HYPER = {"simpo": {"beta": 2.5, "gamma": 1.4}, "dpo": {"beta": 0.01}, "sft": {}}
HYPER |= {"simpo_sums": HYPER["simpo"], "simpo_sft": {**HYPER["simpo"], "lambda_": 0.05}}
HYPER |= {"alphapo": {**HYPER["simpo"], "alpha": 0.25}, "rdpo": {"beta": 0.1, "alpha": 0.05}}
HYPER |= {"orpo": {"lambda_": 0.1}, "kto": {"beta": 0.1}, "cpo": {"beta": 0.1, "lambda_": 1.0}}
HYPER |= {"ipo": {"tau": 0.1}, "rrhf": {"lambda_": 1.0}, "slic": {"delta": 1.0, "lambda_": 1.0}}
# And other values, no two of them equal.
OTHERS = {name: {x: 0.3 + 0.4 * i for i, x in enumerate(own)} for name, own in HYPER.items()}
every_objective = pytest.mark.parametrize("name", HYPER)


def objective_by_hand(name, pairs, beta=0, gamma=0, tau=0, lambda_=0, delta=0, alpha=0):
    """Losses and both rewards of pairs in plain floats, from the formulas of the papers."""
    z = beta * mean(x.s - x.ref for pair in pairs for x in pair)  # of KTO, over the micro-batch
    results = []
    for w, l in pairs:
        a_w, a_l, r_w, r_l = w.s / w.n, l.s / l.n, w.s - w.ref, l.s - l.ref
        if name in ("simpo", "simpo_sums", "simpo_sft", "alphapo"):
            x_w, x_l = (w.s, l.s) if name == "simpo_sums" else (a_w, a_l)
            if name == "alphapo":  # (1 - p^-alpha) / alpha in place of log p
                x_w, x_l = ((1 - math.exp(a) ** -alpha) / alpha for a in (a_w, a_l))
            loss = -log_sigmoid(beta * x_w - beta * x_l - gamma) - lambda_ * a_w
            row = loss, beta * x_w, beta * x_l
        elif name == "dpo":
            row = -log_sigmoid(beta * r_w - beta * r_l), beta * r_w, beta * r_l
        elif name == "ipo":
            row = (r_w - r_l - 1 / (2 * tau)) ** 2, tau * r_w, tau * r_l
        elif name == "orpo":
            odds = [math.log(math.exp(a) / (1 - math.exp(a))) for a in (a_w, a_l)]
            row = -a_w - lambda_ * log_sigmoid(odds[0] - odds[1]), a_w, a_l
        elif name == "kto":
            k_w, k_l = (
                math.exp(log_sigmoid(x)) for x in (beta * r_w - max(z, 0), max(z, 0) - beta * r_l)
            )
            row = -k_w - k_l, beta * r_w, beta * r_l
        elif name == "cpo":
            row = -log_sigmoid(beta * w.s - beta * l.s) - lambda_ * w.s, beta * w.s, beta * l.s
        elif name == "rrhf":
            row = max(0, a_l - a_w) - lambda_ * w.s, a_w, a_l
        elif name == "slic":
            row = max(0, delta - w.s + l.s) - lambda_ * w.s, w.s, l.s
        elif name == "rdpo":
            x_w, x_l = beta * r_w + alpha * w.n, beta * r_l + alpha * l.n
            row = -log_sigmoid(x_w - x_l), x_w, x_l
        else:
            row = -a_w, a_w, a_l
        results.append(row)
    return results


def as_tensors(pairs):
    """Pairs of Answers -> w and l as objectives take them, and the leaves: their sums, [B]."""
    sides, leaves = [], []
    for side in zip(*pairs):
        s, ref, n = (torch.tensor(x, dtype=torch.float32) for x in zip(*side))
        leaves.append(s.requires_grad_())
        sides.append(simpo.Answers(logp=s, avg_logp=s / n, ref_logp=ref, length=n))
    return sides, leaves


@every_objective
@pytest.mark.parametrize("hyper", [HYPER, OTHERS], ids=["defaults", "others"])
def test_each_objective_and_its_rewards_are_the_formulas_of_the_papers(name, hyper):
    """Catches averages where sums belong, a wrong sign, a lost term, rewards of another method."""
    likely, long, rare = Answer(-0.4, -0.2, 1), Answer(-3.1, -2.9, 9), Answer(-2.5, -4.0, 3)
    pairs = [(likely, long), (long, rare), (rare, likely)]
    given = {} if hyper is HYPER else hyper[name]  # the defaults are those of the file
    results = simpo.OBJECTIVES[name](*as_tensors(pairs)[0], **given)
    expected = zip(*objective_by_hand(name, pairs, **hyper[name]))
    for result, numbers in zip(results, expected, strict=True):
        assert result.tolist() == pytest.approx(list(numbers), rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("name", simpo.OBJECTIVES)
def test_losses_and_gradients_are_finite_from_certain_to_hopeless_answers(name):
    """Catches ORPO's log(1 - p) at p = 1, an overflow at a sum of -100,000, and no gradient."""
    extremes = [-1e-8, -1e-6, -1e-3, -0.7, -7.0, -50.0]
    kinds = [Answer(a * n, a * n * f, n) for a in extremes for n in (1, 2000) for f in (1, 0.5, 2)]
    sides, leaves = as_tensors([(w, l) for w in kinds for l in kinds])
    losses = simpo.OBJECTIVES[name](*sides)[0]
    assert losses.dtype == torch.float32 and losses.isfinite().all()
    losses.sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves if x.grad is not None)
    assert leaves[0].grad.abs().sum() > 0


@every_objective
def test_each_objective_trains_and_reports_itself(name, nine_answers, place, tmp_path):
    """Catches flags that do not arrive, and a reference that is not the starting policy."""
    flags = {f"--{key.rstrip('_')}": x for key, x in OTHERS[name].items()}
    flags = [word for pair in flags.items() for word in pair]
    flags = ["--loss", name, *flags, *STILL]
    _, (step,) = run(place / "llama", place / "nine.jsonl", tmp_path / "out", *flags)
    losses, chosen, rejected = zip(*objective_by_hand(name, nine_answers, **OTHERS[name]))
    expected = {"loss": mean(losses), "rewards/chosen": mean(chosen)}
    expected["rewards/rejected"] = mean(rejected)
    assert {key: step[key] for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_objectives_train_by_torchrun_what_one_process_does(place, tmp_path):
    """Catches a file that works alone, or names that other processes do not know."""
    flags = [*FOURS, "--loss", "kto", "--beta", "0.3", "--micro_batch_tokens", "1"]
    flags += ["--model", place / "llama", "--dataset", place / "nine.jsonl"]
    file = HOUSE / "notebooks" / "objectives.py"
    for processes, out in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        core.torchrun(processes, *flags, "--output_dir", out, file=file)
    # KTO's z is of a micro-batch: with one pair in each, two processes have the same.
    assert_same_training(tmp_path / "one", tmp_path / "two")


def test_the_demo_learns_and_its_judge_sees_it(tmp_path, monkeypatch, capsys):
    """Catches a demo that simpo.py does not find, whose flags do not arrive, or that lacks what it
    needs to be trained again by the command that it prints."""
    monkeypatch.chdir(tmp_path)
    last = simpo.main(["--max_steps", "20", "--lr", "2e-4"])
    before, *steps, after = read_metrics("simpo_demo/trained")
    assert len(steps) == 20 and steps[2]["lr"] == 2e-4
    assert after["eval/words_up"] == last["eval/words_up"] > before["eval/words_up"] + 0.1
    (command,) = re.findall(r"^python \S+ (.*)", capsys.readouterr().out, re.MULTILINE)
    again = simpo.main([*command.split(), "--output_dir", "again"])
    assert again.items() >= {"eval/loss": last["eval/loss"], "step": 20}.items()


def test_an_objective_of_ones_own_trains_as_the_readme_says(place, tmp_path, monkeypatch):
    """Catches a table that is copied on import, an example that nobody has run, and one that reads
    a reference which nobody has scored, and trains on."""
    (example,) = re.findall("```python\n(.*?)```", README, re.DOTALL)
    main = simpo.main
    flags = ["--model", str(place / "llama"), "--dataset", str(place / "nine.jsonl"), *STILL]
    monkeypatch.setattr(simpo, "OBJECTIVES", dict(simpo.OBJECTIVES))  # forgets it afterwards
    monkeypatch.setattr(simpo, "main", lambda argv: main(argv + flags))
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(example)
    runpy.run_path("own.py")
    (step,) = read_metrics(tmp_path / "simpo_output")
    by_hand = [max(0, 1 - 3 * (w.s / w.n - l.s / l.n)) for w, l in slow_answers(make_llama(), NINE)]
    assert step["loss"] == pytest.approx(mean(by_hand), rel=1e-5)
    shutil.rmtree("simpo_output")
    Path("own.py").write_text(example.replace(".avg_logp", ".ref_logp"))
    with pytest.raises(TypeError, match="NoneType"):
        runpy.run_path("own.py")


# ========================================================================= models
def make_granite(scale):  # it divides its logits; its embedding of id 0, that of padding, is zero
    options = SHAPE | LLAMA | {"pad_token_id": 0, "logits_scaling": scale}
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**options)).eval()


def weights_of(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def test_a_model_that_would_be_scored_wrongly_is_refused(place, tmp_path):
    """Catches logits that are scaled behind the head, which an id with a zero row does not show,
    weights that the file lacks, which are drawn at random, NaN, and ids beyond the embedding."""
    names = ("scaled", "headless", "renamed", "nan", "small")
    for name in names:
        model = make_granite(8.0) if name == "scaled" else make_llama()
        write_model(tmp_path / name, model if name != "small" else make_llama(vocab_size=200))
    weights_of(tmp_path / "headless", lambda x: {k: w for k, w in x.items() if "head" not in k})
    weights_of(tmp_path / "renamed", lambda x: {f"module.{k}": w for k, w in x.items()})
    weights_of(tmp_path / "nan", lambda x: {k: w * math.nan for k, w in x.items()})
    ends = [mistake(place, tmp_path / "out", "--model", tmp_path / name) for name in names]
    assert "GraniteForCausalLM has NaN, scales logits" in ends[0]
    assert "lacks 1 weights, such as lm_head.weight" in ends[1]
    assert "lacks 21 weights" in ends[2] and "has NaN" in ends[3] and "more tokens" in ends[4]
    write_model(tmp_path / "fine", make_granite(1.0))
    run(tmp_path / "fine", place / "nine.jsonl", tmp_path / "out", *STILL)


def test_a_model_with_weights_that_no_token_uses_trains_and_resumes(tmp_path, place):
    """Catches processes that wait for a gradient that another one does not have, and a checkpoint
    that lacks what is asked for: in a mixture of experts, the bias of a router."""
    torch.manual_seed(5)
    options = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32}
    options |= SHAPE | LLAMA | {"moe_layer_start_index": 0}
    config = transformers.Ernie4_5_MoeConfig(**options)
    write_model(tmp_path / "moe", transformers.Ernie4_5_MoeForCausalLM(config))
    model, flags = ["--model", tmp_path / "moe"], [*FOURS, "--save_every", 1]
    run(tmp_path / "moe", place / "nine.jsonl", tmp_path / "one", *flags)
    core.torchrun(
        2, *model, "--dataset", place / "nine.jsonl", *flags, "--output_dir", tmp_path / "two"
    )
    assert_same_training(tmp_path / "one", tmp_path / "two")
    ended = tmp_path / "two" / "simpo_ended.json"  # now as if it was killed after its checkpoint
    ended.rename(tmp_path / "two" / "simpo_run.json")
    run(tmp_path / "moe", place / "nine.jsonl", tmp_path / "two", *flags, "--resume")
    assert_same_training(tmp_path / "one", tmp_path / "two")


# ========================================================================= the house
COMMANDS = re.findall(r"^ {4}.*simpo\.py(.*)$", README, re.MULTILINE)
COMMANDS += re.findall(r"`python simpo\.py (.*?)`", README)
RECIPE = r"`(--model .*? --beta ([\d.]+) --gamma ([\d.]+) --lr .*?)` \| ([\d.]+) \|"
RECIPES = re.findall(RECIPE, README)  # [(flags, beta, gamma, gamma / beta)]
COMMANDS += [flags for flags, _, _, _ in RECIPES]


@pytest.mark.parametrize("command", [x for x in COMMANDS if "--help" not in x])
def test_every_command_of_the_readme_is_understood(command):
    """Catches a README that names flags of yesterday."""
    args = vars(simpo.parse_args(shlex.split(command.split("&&")[0])))
    args |= args["hyperparameters"]
    words = shlex.split(command)
    for flag, value in zip(words, [*words[1:], "--"]):
        if flag.startswith("--") and not value.startswith("--"):
            parsed = args[flag[2:]]
            assert parsed == type(parsed)(value)


def test_the_readmes_ratios_are_gamma_over_beta_of_its_recipes():
    """Catches numbers for users of the official code that are not those of the recipes."""
    assert len(RECIPES) == 6
    for flags, beta, gamma, ratio in RECIPES:
        assert float(ratio) == pytest.approx(float(gamma) / float(beta), abs=1e-9), flags


def test_the_house_keeps_its_caps():
    """Catches growth: a cap is kept by leaving out, never by packing or by loosening the cap."""
    caps = {"simpo.py": 600, "test_simpo.py": 1000, "README.md": 230, "notebooks/demo.py": 100}
    caps |= {"notebooks/objectives.py": 100, "notebooks/test_notebooks.py": 350}
    for name, cap in caps.items():
        assert len((HOUSE / name).read_text(encoding="utf-8").splitlines()) <= cap, name
    source = (HOUSE / "simpo.py").read_text(encoding="utf-8")
    lines = source.splitlines()
    documented = sum(bool(re.search(r"(^|\s)# ", line)) for line in lines)
    assert max(map(len, lines)) <= 100
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            cap = 60 if node.name in ("fit", "main", "parse_args") else 40
            assert node.end_lineno - node.lineno < cap, node.name
        documentable = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documentable and ast.get_docstring(node):
            documented += node.body[0].end_lineno - node.body[0].lineno + 1
    assert 0.17 <= documented / len(lines) <= 0.28


def test_mistakes_of_the_keyboard_are_one_line(place, tmp_path):
    """Catches tracebacks for a typo in a path, and a model that is overwritten."""
    out, empty = tmp_path / "out", write_jsonl(tmp_path / "empty.jsonl", [])
    for path in (tmp_path / "absent.jsonl", empty):
        assert "no such file, or it is empty" in mistake(place, out, "--dataset", path)
    mixed = write_jsonl(tmp_path / "mixed.jsonl", [PLAIN[0] | {"chosen": "24"}, NINE[0]])
    assert "mixes texts and messages" in mistake(place, out, "--dataset", mixed)
    nothing = write_jsonl(tmp_path / "nothing.jsonl", [chat("x", "a", "a")])
    assert "no pair" in mistake(place, out, "--dataset", nothing)
    assert "holds a run" in mistake(place, place / "llama")
    assert "--model" in mistake(place, out, "--model", tmp_path / "absent")
    assert "for torchrun" in mistake(place, out, "--shard")
    write_model(tmp_path / "no_eos", tokenizer=make_tokenizer(eos=None))
    assert "without EOS" in mistake(place, out, "--model", tmp_path / "no_eos")


BAD_NUMBERS = "max_grad_norm -1, beta -2, beta 0, beta nan, gamma -1, max_steps 0, max_steps -1, "
BAD_NUMBERS += "batch_size -4, batch_size 0, epochs 0, lr inf, warmup_ratio 1.5, save_every -1, "
BAD_NUMBERS += "eval_every -1, micro_batch_tokens 0, max_length 0, max_prompt_length 0, seed -1"


@pytest.mark.parametrize("flag", BAD_NUMBERS.split(", "))
def test_a_number_out_of_its_range_is_refused_by_name(flag, capsys):
    """Catches a norm that turns gradients round, and no steps that are said to be training."""
    with pytest.raises(SystemExit) as end:
        simpo.parse_args(f"--{flag}".split())
    name = flag.split()[0]
    assert end.value.code == 2 and f"--{name} " in capsys.readouterr().err.splitlines()[-1]
    assert simpo.parse_args(f"--{name} 1".split())


# Flags -> what argparse must say. Abbreviations are not taken.
BAD_FLAGS = {"--lr fast": ["--lr", "fast"], "--loss sipmo": ["sipmo", "simpo", "dpo"]}
BAD_FLAGS |= {"--dtype fp16": ["fp16", "bf16"], "--batch 8": ["--batch"], "--tau 0.1": ["--tau"]}
BAD_FLAGS |= {"--gamma 1 --loss dpo": ["--gamma"], "--model x": ["--dataset"]}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_a_bad_flag_is_named(flags, capsys):
    """Catches values that are taken and then mean nothing."""
    with pytest.raises(SystemExit) as end:
        simpo.main(flags.split())
    shown = capsys.readouterr().err
    assert end.value.code == 2 and shown.count("\n") == 2  # how it is used, and what is wrong
    assert [word for word in BAD_FLAGS[flags] if word not in shown] == []


def test_all_file_formats_give_the_same_pairs(place, tmp_path):
    """Catches a format whose rows are read in another way, or lose their line breaks."""
    args, tokenizer = simpo.parse_args([]), make_tokenizer()
    (tmp_path / f"{tmp_path.name}.py").touch()  # as simpo.py itself, in a folder simpo
    for rows, kinds in ((PLAIN, "jsonl json parquet csv"), (NINE, "jsonl json parquet JSONL gz")):
        table = datasets.Dataset.from_list(rows)
        write = {"jsonl": table.to_json, "parquet": table.to_parquet, "csv": table.to_csv}
        expected = [tokenize(row, tokenizer) for row in rows]
        for kind in kinds.split():
            path = tmp_path / f"{len(rows)}.{kind}"
            if kind == "json":
                path.write_text(json.dumps(rows, indent=1))
            elif kind == "gz":
                path = tmp_path / "nine.jsonl.gz"
                path.write_bytes(gzip.compress((tmp_path / "9.jsonl").read_bytes()))
            else:
                write[kind.lower()](path)
            assert list(simpo.load_pairs(str(path), "train", tokenizer, args)) == expected
    datasets.Dataset.from_list(NINE).to_csv(tmp_path / "messages.csv")
    with pytest.raises(ValueError, match="row 1: prompt, chosen and rejected must be texts"):
        simpo.load_pairs(str(tmp_path / "messages.csv"), "train", tokenizer, args)
