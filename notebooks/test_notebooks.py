"""Tests of the objectives, the demo, models of odd kinds, and of what a person types and reads. As
in test_simpo.py, whose tools they use, expected numbers come from elsewhere."""

import gzip
import importlib
import json
import math
import re
import runpy
import shlex
import sys
from pathlib import Path
from statistics import mean

HOUSE = Path(__file__).parents[1]
sys.path[:0] = [str(HOUSE), str(HOUSE / "notebooks")]

import nbclient
import nbformat
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import test_simpo as core  # first, since it sets further variables

LLAMA, NINE, PLAIN, README, SHAPE = core.LLAMA, core.NINE, core.PLAIN, core.README, core.SHAPE
FOURS, STILL, Answer, run, simpo = core.FOURS, core.STILL, core.Answer, core.run, core.simpo
assert_same_training, read_metrics = core.assert_same_training, core.read_metrics
make_llama, make_tokenizer, write_jsonl = core.make_llama, core.make_tokenizer, core.write_jsonl
log_sigmoid, mistake, slow_answers = core.log_sigmoid, core.mistake, core.slow_answers
place, write_model = core.place, core.write_model

importlib.import_module("objectives")  # adds its own to simpo.OBJECTIVES
torch.set_num_threads(1)  # several threads on busy cores wait for each other

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


# The formulas of the papers: loss, chosen reward, rejected reward. Of the chosen answer s_w is the
# sum, a_w the average, r_w the log-ratio to the reference, n_w the length; of the rejected one s_l.
FORMULAS = {
    "sft": "-a_w, a_w, a_l",
    "simpo": "-log_sigmoid(beta * a_w - beta * a_l - gamma), beta * a_w, beta * a_l",
    "simpo_sums": "-log_sigmoid(beta * s_w - beta * s_l - gamma), beta * s_w, beta * s_l",
    "simpo_sft": "-log_sigmoid(beta * (a_w - a_l) - gamma) - lambda_ * a_w, beta * a_w, beta * a_l",
    "alphapo": "-log_sigmoid(x(a_w) - x(a_l) - gamma), x(a_w), x(a_l)",
    "dpo": "-log_sigmoid(beta * r_w - beta * r_l), beta * r_w, beta * r_l",
    "ipo": "(r_w - r_l - 1 / (2 * tau)) ** 2, tau * r_w, tau * r_l",
    "orpo": "-a_w - lambda_ * log_sigmoid(log_odds(a_w) - log_odds(a_l)), a_w, a_l",
    "kto": "-sigmoid(beta * r_w - z) - sigmoid(z - beta * r_l), beta * r_w, beta * r_l",
    "cpo": "-log_sigmoid(beta * s_w - beta * s_l) - lambda_ * s_w, beta * s_w, beta * s_l",
    "rrhf": "max(0, a_l - a_w) - lambda_ * s_w, a_w, a_l",
    "slic": "max(0, delta - s_w + s_l) - lambda_ * s_w, s_w, s_l",
    "rdpo": "-log_sigmoid(y(r_w, n_w) - y(r_l, n_l)), y(r_w, n_w), y(r_l, n_l)",
}


def objective_by_hand(name, pairs, beta=0, alpha=0, **hyper):
    """Losses and both rewards of pairs, in plain floats."""
    tools = {"log_sigmoid": log_sigmoid, "sigmoid": lambda x: 1 / (1 + math.exp(-x))} | hyper
    tools |= {"beta": beta, "log_odds": lambda a: math.log(math.exp(a) / (1 - math.exp(a)))}
    tools |= {"x": lambda a: beta * (1 - math.exp(a) ** -alpha) / alpha}  # of AlphaPO
    tools |= {"y": lambda r, n: beta * r + alpha * n}  # of R-DPO; z of KTO, over the micro-batch
    tools |= {"z": max(0, beta * mean(x.s - x.ref for pair in pairs for x in pair))}
    results = []
    for w, l in pairs:
        values = {"s_w": w.s, "a_w": w.s / w.n, "r_w": w.s - w.ref, "n_w": w.n}
        values |= {"s_l": l.s, "a_l": l.s / l.n, "r_l": l.s - l.ref, "n_l": l.n}
        results.append(eval(FORMULAS[name], tools | values))
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
    if name in simpo.NEEDS_REFERENCE:  # and no other reads it
        with pytest.raises(TypeError):
            simpo.OBJECTIVES[name](*[side._replace(ref_logp=None) for side in sides])
    else:
        sides = [side._replace(ref_logp=None) for side in sides]
    losses = simpo.OBJECTIVES[name](*sides)[0]
    assert losses.dtype == torch.float32 and losses.isfinite().all()
    losses.sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves if x.grad is not None)
    assert leaves[0].grad.abs().sum() > 0


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
    """Catches a table that is copied on import, and an example that nobody has run."""
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


# ========================================================================= notebooks
@pytest.mark.parametrize("name", sorted(x.stem for x in HOUSE.glob("notebooks/*.ipynb")))
def test_a_notebook_runs_from_top_to_bottom(name, place, tmp_path, tmp_path_factory, monkeypatch):
    """Catches code that no longer runs, outputs of older code, and names of a machine's folders."""
    notebook = nbformat.read(HOUSE / "notebooks" / f"{name}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(len(cell.source.splitlines()) <= 30 for cell in code)
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    shown = json.dumps([cell.outputs for cell in code])
    assert "image/png" in shown and not re.search('"output_type": "error"|/tmp/|/home/', shown)
    settings = {"QUICK": 1, "SIMPO_DEMOS": tmp_path_factory.getbasetemp() / "demos"}  # shared
    if name == "3_real_words":  # it trains a chat model; without these it shows what is stored
        pairs = write_jsonl(tmp_path / "plain.jsonl", PLAIN)
        settings |= {"MODEL": place / "llama", "DATASET": pairs, "FOLDER": tmp_path / "words"}
    for key, value in settings.items():
        monkeypatch.setenv(key, str(value))
    where = {"metadata": {"path": str(HOUSE / "notebooks")}}
    nbclient.NotebookClient(notebook, timeout=300, resources=where).execute()


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


def test_layers_checkpoint_without_dropout(place, tmp_path, monkeypatch):
    """Catches layers whose own forward drops out if they are in training mode, such as OPT's."""
    options = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    options |= {"vocab_size": len(make_tokenizer()), "num_attention_heads": 2, "dropout": 0.5}
    torch.manual_seed(0)
    write_model(tmp_path / "opt", transformers.OPTForCausalLM(transformers.OPTConfig(**options)))
    checkpointed, checkpoint = [], simpo.checkpoint

    def spy(function, *args, **more):
        checkpointed.append(type(getattr(function, "__self__", None)).__name__)
        return checkpoint(function, *args, **more)

    monkeypatch.setattr(simpo, "checkpoint", spy)
    for out, flags in (("one", FOURS), ("two", [*FOURS, "--gradient_checkpointing"])):
        assert "OPTDecoderLayer" not in checkpointed
        run(tmp_path / "opt", place / "nine.jsonl", tmp_path / out, *flags)
    assert checkpointed.count("OPTDecoderLayer") == 2 * (3 + 3)  # two layers, six passes
    assert_same_training(tmp_path / "one", tmp_path / "two")


def test_a_run_is_resumed_only_by_what_began_it(place, tmp_path, monkeypatch):
    """Catches weights that were trained and are frozen now, and flags of an extension."""
    out, fit = tmp_path / "out", simpo.fit
    core.killed_run(place, out)
    command = core.long_run(place, out, "--resume")

    def frozen(model, *rest):
        model.model.layers[0].requires_grad_(False)
        return fit(model, *rest)

    monkeypatch.setattr(simpo, "fit", frozen)
    assert "other ['trained_tensors']" in mistake(place, out, *command)
    monkeypatch.setattr(simpo, "fit", fit)
    flags = json.loads((out / "simpo_run.json").read_text()) | {"lora_rank": 16}
    (out / "simpo_run.json").write_text(json.dumps(flags))
    assert "other ['lora_rank']" in mistake(place, out, *command)


# ========================================================================= the house
FILES = r"(?:simpo|notebooks/(?:objectives|lora|fast))\.py"
COMMANDS = re.findall(rf"^ {{4}}.*{FILES}(.*)$", README, re.MULTILINE)
COMMANDS += re.findall(rf"`(?:python|torchrun) [^`]*{FILES} (.*?)`", README)
COMMANDS += re.findall(r"`(--model .*? --lr .*?)`", README)  # the recipes


@pytest.mark.parametrize("command", [x for x in COMMANDS if not {"FLAGS", "--help"} & {*x.split()}])
def test_every_command_of_the_readme_is_understood(command):
    """Catches a README that names flags of yesterday."""
    args = vars(simpo.parse_args(shlex.split(command.split("&&")[0])))
    args |= args["hyperparameters"]
    words = shlex.split(command)
    for flag, value in zip(words, [*words[1:], "--"]):
        if flag.startswith("--") and not value.startswith("--"):
            parsed = args[flag[2:]]
            assert parsed == type(parsed)(value)


def test_the_house_keeps_its_caps():
    """Catches growth: a cap is kept by leaving out, never by packing or by loosening the cap."""
    caps = {path: 100 for path in HOUSE.glob("notebooks/*.py") if path.name != "common.py"}
    caps |= {HOUSE / "simpo.py": 600, HOUSE / "test_simpo.py": 1000, HOUSE / "README.md": 230}
    for path, cap in (caps | {Path(__file__): 350}).items():
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= cap, path.name
        assert path.suffix != ".py" or max(map(len, lines)) <= 100, path.name


def test_mistakes_of_the_keyboard_are_one_line(place, tmp_path):
    """Catches tracebacks for a typo in a path, and a model that is overwritten."""
    out, empty = tmp_path / "out", write_jsonl(tmp_path / "empty.jsonl", [])
    for path in (tmp_path / "absent.jsonl", empty, write_jsonl(tmp_path / "odd.jsonl", ["a", 1])):
        assert f"no pairs in {path}: " in mistake(place, out, "--dataset", path)
    mixed = write_jsonl(tmp_path / "mixed.jsonl", [PLAIN[0] | {"chosen": "24"}, NINE[0]])
    assert "mixes texts, numbers and messages" in mistake(place, out, "--dataset", mixed)
    nothing = write_jsonl(tmp_path / "nothing.jsonl", [core.chat("x", "a", "a")])
    assert "no pair is left" in mistake(place, out, "--dataset", nothing)
    assert "holds a run" in mistake(place, place / "llama")
    assert "--model" in mistake(place, out, "--model", tmp_path / "absent")
    assert "for torchrun" in mistake(place, out, "--shard")
    write_model(tmp_path / "no_eos", tokenizer=make_tokenizer(eos=None))
    assert "without EOS" in mistake(place, out, "--model", tmp_path / "no_eos")


# Flags -> what argparse must say. Abbreviations are not taken.
BAD_FLAGS = {"--lr fast": ["--lr", "fast"], "--loss sipmo": ["sipmo", "simpo", "dpo"]}
BAD_FLAGS |= {"--dtype fp16": ["fp16", "bf16"], "--batch 8": ["--batch"], "--tau 0.1": ["--tau"]}
BAD_FLAGS |= {"--gamma 1 --loss dpo": ["--gamma"], "--model x": ["--dataset"]}
NUMBERS = "max_grad_norm -1, beta -2, beta 0, beta nan, gamma -1, max_steps 0, max_steps -1, "
NUMBERS += "batch_size -4, batch_size 0, epochs 0, lr inf, warmup_ratio 1.5, save_every -1, "
NUMBERS += "eval_every -1, micro_batch_tokens 0, max_length 0, max_prompt_length 0, seed -1"
BAD_FLAGS |= {f"--{flag}": [f"--{flag.split()[0]} "] for flag in NUMBERS.split(", ")}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_a_bad_flag_is_named(flags, capsys):
    """Catches values that are taken and then mean nothing, or turn gradients round."""
    with pytest.raises(SystemExit) as end:
        simpo.main(flags.split())
    shown = capsys.readouterr().err
    assert end.value.code == 2 and shown.count("\n") == 2  # how it is used, and what is wrong
    assert [word for word in BAD_FLAGS[flags] if word not in shown.splitlines()[1]] == []


def test_all_file_formats_give_the_same_pairs(place, tmp_path):
    """Catches a format whose rows are read in another way, or lose their line breaks."""
    args, tokenizer = simpo.parse_args([]), make_tokenizer()
    (tmp_path / f"{tmp_path.name}.py").touch()  # as simpo.py itself, in a folder simpo
    for rows, kinds in ((PLAIN, "jsonl json parquet csv"), (NINE, "jsonl json parquet JSONL gz")):
        table = core.datasets.Dataset.from_list(rows)
        for kind in kinds.split():
            path = tmp_path / f"{len(rows)}.{'jsonl.gz' if kind == 'gz' else kind}"
            if kind in ("csv", "parquet"):
                getattr(table, f"to_{kind}")(path)
            else:
                lines = "".join(json.dumps(row) + "\n" for row in rows)
                text = json.dumps(rows, indent=1) if kind == "json" else lines
                path.write_bytes(gzip.compress(text.encode()) if kind == "gz" else text.encode())
            expected = [core.tokenize(row, tokenizer) for row in rows]
            assert list(simpo.load_pairs(str(path), "train", tokenizer, args)) == expected
