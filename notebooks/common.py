"""What the notebooks share: one style of pictures, and runs of the demo, several at a time."""

import contextlib
import functools
import io
import json
import multiprocessing
import os
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

if "KEEP_GPU" not in os.environ:  # models so small train on the CPU, and alike everywhere
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # simpo.py is in the folder above
warnings.filterwarnings("ignore")

import demo
import matplotlib.pyplot as plt
import objectives  # noqa: F401, since it adds its own to simpo.OBJECTIVES
import pandas
import torch
import transformers

import simpo

QUICK = "QUICK" in os.environ  # set by the tests: sooner done, with worse numbers
SEEDS = [0] if QUICK else [0, 1, 2]
if QUICK:
    print("QUICK is set: numbers differ from those in the text")
KNOWN = list(simpo.OBJECTIVES)  # those that other processes know, too
os.environ.setdefault("SIMPO_DEMOS", tempfile.mkdtemp())  # other processes look there, too

# One colour for one thing, in every notebook. They are Okabe and Ito's, which colour-blind people
# can tell apart.
COLOURS = {"start": "#777777", "sft": "#009E73", "simpo": "#0072B2", "dpo": "#D55E00"}
COLOURS |= {"chosen": "#56B4E9", "rejected": "#E69F00", "gently": "black", "hard": "#CC79A7"}
NAMES = {"start": "start", "sft": "SFT", "simpo": "SimPO", "dpo": "DPO"}
NAMES |= {"gently": "gently", "hard": "hard"}
plt.rcParams |= {"figure.figsize": (12, 4.6), "figure.constrained_layout.use": True}
plt.rcParams |= {"font.size": 15, "axes.titlesize": 16, "lines.linewidth": 2.5}
plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@contextlib.contextmanager
def quiet():
    """No progress bars, and nothing printed, while something is computed."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


# ------------------------------------------------------------------------------ the demo
def make_demo(seed):
    """-> a folder with the demo's start, train.jsonl and held_out.jsonl. See demo.py."""
    folder = Path(os.environ["SIMPO_DEMOS"]) / f"seed_{seed}"
    if not folder.exists():
        with quiet():
            demo.write_files(folder, seed, fit_steps=100 if QUICK else 300)
    return folder


@functools.cache
def read_pairs(seed, name):
    """-> the tokenized pairs of train or held_out."""
    rows = map(json.loads, (make_demo(seed) / f"{name}.jsonl").read_text().splitlines())
    return [simpo.tokenize_pair(row, demo.TOKENIZER, 128, 64) for row in rows]


@functools.cache
def load_start(seed):
    """-> the demo's model before training. Train a copy of it."""
    return transformers.AutoModelForCausalLM.from_pretrained(make_demo(seed) / "start").eval()


@torch.no_grad()
def sample(model, pairs, greedy=False):
    """One answer of at most 48 tokens to each prompt, which all have the same length -> ids,
    [prompts, T], and which of them are the answer's, with its end."""
    prompts = torch.tensor([pair["prompt_ids"] for pair in pairs])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ids = model.generate(prompts, do_sample=not greedy, top_k=0, max_new_tokens=48)
    is_end = ids == demo.TOKENIZER.eos_token_id
    ended_before = is_end.cumsum(1) - is_end.long() > 0  # an earlier token was the end
    is_answer = ~ended_before
    is_answer[:, : prompts.shape[1]] = False
    return ids, is_answer


def read_answers(ids, is_answer):
    """-> the texts of prompts, which have 12 tokens, and of answers without their end."""
    prompts = [demo.TOKENIZER.decode(row[:12]) for row in ids]
    answers = [demo.TOKENIZER.decode(row[mask]) for row, mask in zip(ids, is_answer)]
    return prompts, [answer.removesuffix("</s>") for answer in answers]


def share_up(prompts, answers):  # of four words each
    up = [demo.count_up(x[:-1].split(" "), y) for x, y in zip(prompts, answers)]
    return sum(up) / (4 * len(up))


@torch.no_grad()
def judge(model, start, pairs):
    """-> what a judge who knows the words sees in a model's own answers, and these answers: the
    share of words up, and of answers that end, |y| in tokens, the divergence from the start."""
    ids, is_answer = sample(model, pairs)
    prompts, answers = read_answers(ids, is_answer)
    ended = (ids == demo.TOKENIZER.eos_token_id).any(1).float()
    row = {"words_up": share_up(prompts, answers), "ended": ended.mean().item()}
    row["tokens"] = is_answer.sum(1).float().mean().item()
    scored = is_answer[:, 1:]  # [prompts, T - 1], predicted one place before
    logp = model(ids[:, :-1]).logits.log_softmax(-1)  # [prompts, T - 1, V]
    start_logp = start(ids[:, :-1]).logits.log_softmax(-1)
    divergences = (logp.exp() * (logp - start_logp)).sum(-1)  # of each next token, exact
    row["kl"] = (divergences * scored).sum(1).mean().item()  # KL(model || start), nats per answer
    return row, answers


@torch.no_grad()
def judge_the_end(model, pairs):
    """-> words up if the model always takes the likeliest token; and the share of held-out pairs
    whose chosen answer is likelier per token, whatever the objective calls its reward."""
    greedy = share_up(*read_answers(*sample(model, pairs, greedy=True)))
    logps = simpo.ResponseLogps(model)(**simpo.collate(pairs)).view(2, -1)
    lengths = [[len(x["chosen_ids"]) for x in pairs], [len(x["rejected_ids"]) for x in pairs]]
    chosen, rejected = logps / torch.tensor(lengths)
    return {"greedy": greedy, "likelier": (chosen > rejected).float().mean().item()}


# ------------------------------------------------------------------------------ training
def train(loss, seed=0, steps=60, every=0, lr=1e-4, pairs=None, held_out=200, **hyper):
    """Train a copy of the demo's start, 8 pairs a step, each pair once -> the model, and a table of
    evaluations on `held_out` pairs, every `every` steps (0: at the end alone). The other names are
    flags of simpo.py; hyper are those of the objective."""
    start = load_start(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(make_demo(seed) / "start")
    steps = 3 if QUICK else steps
    pairs = (pairs or read_pairs(seed, "train"))[: 8 * steps]
    held_out_pairs = read_pairs(seed, "held_out")[: 30 if QUICK else held_out]
    flags = {"loss": loss, "seed": seed, "lr": lr, "batch_size": 8, **hyper}
    flags |= {"eval_every": every, "save_every": 0}
    argv = []
    for name, value in flags.items():
        argv += [f"--{name.rstrip('_')}", str(value)]
    args = simpo.parse_args(argv)
    answers = []

    def on_evaluate(model, step):
        if step == 0 and every == 0:  # the start is not asked for
            return {}
        row, own = judge(model, start, held_out_pairs)
        answers.append(own)
        if every > 0 and step == steps:
            row |= judge_the_end(model, held_out_pairs)
        return row

    with quiet(), tempfile.TemporaryDirectory() as args.output_dir:
        rows = simpo.fit(model, pairs, held_out_pairs, args, on_evaluate)
    rows = [row for row in rows if "words_up" in row]  # the evaluations
    rows = [{name.removeprefix("eval/"): value for name, value in row.items()} for row in rows]
    table = pandas.DataFrame(rows).rename(columns={"loss": "loss_of_pairs"})
    return model, table.assign(answers=answers, loss=loss, seed=seed, lr=lr, **hyper)


def train_job(job):
    return train(**job)[1]


def one_thread():  # each process has a core of its own
    torch.set_num_threads(1)


def train_all(jobs):
    """Run `train` for each job, a dict of its arguments, as many at a time as there are cores ->
    one table of all. An objective of your own, which other processes do not know, trains here."""
    jobs = list(jobs)
    seeds = sorted({job.get("seed", 0) for job in jobs})
    if all(job["loss"] in KNOWN for job in jobs):
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(os.cpu_count(), context, initializer=one_thread) as processes:
            list(processes.map(make_demo, seeds))
            tables = list(processes.map(train_job, jobs))
    else:
        tables = [train_job(job) for job in jobs]
    return pandas.concat(tables, ignore_index=True)


# ------------------------------------------------------------------------------ pictures
def draw(axis, table, x, y, name, **style):
    """The mean over seeds as a line, in the colour of its name, and all seeds as a band."""
    groups = table.groupby(x)[y]
    axis.plot(groups.mean(), color=COLOURS[name], label=NAMES[name], **style)
    low, high = groups.min(), groups.max()
    axis.fill_between(low.index, low, high, color=COLOURS[name], alpha=0.2, linewidth=0)


def spread(values):
    """The mean over seeds, and in brackets the lowest and the highest."""
    return f"{values.mean():.3f} ({values.min():.3f}, {values.max():.3f})"
