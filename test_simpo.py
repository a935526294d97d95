"""Tests of simpo.py: what could go wrong without anybody noticing, and how one would notice.

    python -m pytest test_simpo.py                  # less than two minutes on two CPU cores
    SIMPO_SLOW=1 python -m pytest test_simpo.py     # with the demo, --compile and more kills: seven

Every expected number comes from somewhere else than simpo.py: worked out by hand in plain Python
floats, by a slow loop that scores one token at a time, or by another process. All models are
tiny and random, all files are made on the spot, and nothing needs a network or a GPU.
"""

import json
import math
import multiprocessing
import os
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

SCRIPT = Path(__file__).with_name("simpo.py")
CACHE = tempfile.TemporaryDirectory()  # removed when Python exits
# Set before the imports that read them, and handed down to the processes started below.
os.environ |= {"HF_HOME": CACHE.name, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "0"}

import datasets
import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

import simpo

# ------------------------------------------------------------------------- tiny tokenizers
SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|header|>", "<|/header|>", "<|eot|>"]
SPECIALS += ["<|endoftext|>"]
GENERATE = "{% if add_generation_prompt %}"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}" + GENERATE + "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
    "{% endif %}" + CHATML
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|header|>' + m.role + '<|/header|>\n\n' + "
    "m.content | trim + '<|eot|>' }}{% endfor %}"
    + GENERATE
    + "{{ '<|header|>assistant<|/header|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + "
    "' [/INST]' }}{% else %}{{ m.content + '</s>' }}{% endif %}{% endfor %}"
)
NO_END = (
    "{% for m in messages %}{{ '\n' + m.role + ': ' + m.content }}{% endfor %}"
    + GENERATE
    + "{{ '\nassistant: ' }}{% endif %}"
)


def make_tokenizer(template=CHATML, bos="<s>", eos="<|im_end|>", pad=None, adds_bos=0, merge=""):
    """One token per byte, so that lengths can be counted by eye; `merge` makes two bytes one."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = [*SPECIALS, *letters, merge] if merge else [*SPECIALS, *letters]
    ids = {token: i for i, token in enumerate(vocab)}
    bpe = tokenizers.models.BPE(vocab=ids, merges=[tuple(merge)] if merge else [])
    core = tokenizers.Tokenizer(bpe)
    options = {"add_prefix_space": False, "use_regex": False}
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(**options)
    core.decoder = tokenizers.decoders.ByteLevel()
    if adds_bos:  # as Llama's does to every text it is given
        core.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, ids[bos])]
        )
    known = {"bos_token": bos, "eos_token": eos, "pad_token": eos if pad is None else pad or None}
    others = [token for token in SPECIALS if token not in known.values()]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, additional_special_tokens=others, **known
    )
    tokenizer.chat_template = template
    return tokenizer


class Style(NamedTuple):
    """A way to write a chat. What must stand before an answer to "Hi?", and what must be scored
    at its end, are written here by hand."""

    make: callable
    before: str
    end: str


STYLES = {
    "chatml": Style(
        lambda: make_tokenizer(CHATML),
        "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",  # and not the newline that the template writes after it
    ),
    "qwen": Style(  # no BOS; a system turn that nobody asked for
        lambda: make_tokenizer(QWEN, bos=None, pad="<|endoftext|>"),
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n"
        "<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "llama3": Style(  # the template writes BOS, and the tokenizer would add another
        lambda: make_tokenizer(LLAMA3, eos="<|eot|>", adds_bos=True),
        "<s><|header|>user<|/header|>\n\nHi?<|eot|><|header|>assistant<|/header|>\n\n",
        "<|eot|>",
    ),
    "mistral": Style(  # no header before an answer
        lambda: make_tokenizer(MISTRAL, eos="</s>", adds_bos=True),
        "<s>[INST] Hi? [/INST]",
        "</s>",
    ),
    "no_end": Style(  # the template writes nothing after an answer
        lambda: make_tokenizer(NO_END, eos="</s>"), "\nuser: Hi?\nassistant: ", "</s>"
    ),
}
every_style = pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)


LONG_MODE = os.environ.get("SIMPO_SLOW") == "1"
SLOW = pytest.mark.skipif(not LONG_MODE, reason="a minute; SIMPO_SLOW=1")


# ------------------------------------------------------------------------- tiny models
SHAPE = {"vocab_size": 264, "bos_token_id": 0, "eos_token_id": 3, "pad_token_id": 3}
SHAPE |= {"initializer_range": 0.3}  # large weights, so that answers differ in likelihood
LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}


def make_llama(**options):
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**SHAPE | LLAMA | options)
    return transformers.LlamaForCausalLM(config).eval()


make_tied_llama = partial(make_llama, tie_word_embeddings=True)


def make_gpt2(**options):
    """Positions are learned vectors here, and the head is tied to the embeddings."""
    torch.manual_seed(2)
    config = transformers.GPT2Config(**SHAPE, n_embd=32, n_layer=2, n_head=4, **options)
    return transformers.GPT2LMHeadModel(config).eval()


def make_gemma2():
    """Its logits go through a tanh ("soft cap") after the head."""
    torch.manual_seed(3)
    options = LLAMA | {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0}
    config = transformers.Gemma2Config(**SHAPE | options)
    return transformers.Gemma2ForCausalLM(config).eval()


MODELS = {"llama": make_llama, "gpt2": make_gpt2, "gemma2": make_gemma2}


def scorer_and_layout(name, packed, **options):
    """-> (the bare model, its ResponseLogps, what `collate` is to be told)."""
    model = MODELS[name]()
    scorer = simpo.ResponseLogps(model, **options)
    if packed:
        model.set_attn_implementation("segments")
    return model, scorer, {"share_prompt": packed}


# Gemma 2 squeezes its attention scores, which the attention of packed rows does not know.
LAYOUTS = [(name, packed) for name in MODELS for packed in (False, True)]
LAYOUTS.remove(("gemma2", True))
every_layout = pytest.mark.parametrize("name, packed", LAYOUTS)


def write_model(folder, model=None, tokenizer=None):
    (model or make_llama()).save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------- tiny data
def chat(prompt, chosen, rejected):
    """A row in the form of most preference datasets: a prompt, and two answers as messages."""
    sides = {"chosen": chosen, "rejected": rejected}
    return {"prompt": [{"role": "user", "content": prompt}]} | {
        side: [{"role": "assistant", "content": text}] for side, text in sides.items()
    }


def texts(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


NINE = [
    chat("Hi", "Hello!", "Go"),
    chat("2+2?", "4", "It is five"),
    chat("Name a colour", "blue", "seven"),
    chat("Capital of France?", "Paris", "Rome, I think"),
    chat("x", "yes", "no"),
    chat("Is it café or cafe?", "café", "k"),
    chat("One word for big", "huge", "a very large thing"),
    chat("Sing", "la la la la", "I will not"),
    chat("Bye", "See you", "?"),
]
SEVEN = [chat(f"Question {i}", "word " * (i + 1), "no" * (7 - i)) for i in range(7)]
PLAIN = [texts(f"Q{i}: why?\nA:", f" because {i}", " it is" * (i + 1)) for i in range(5)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ------------------------------------------------------------------------- slow and independent
def ids_by_hand(row, tokenizer):
    """ChatML written out with an f-string, not with a template: -> prompt, chosen, rejected."""
    prompt = f"<|im_start|>user\n{row['prompt'][0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    sides = [f"{row[side][0]['content']}<|im_end|>" for side in ("chosen", "rejected")]
    return [tokenizer.encode(text, add_special_tokens=False) for text in (prompt, *sides)]


def slow_logps(model, prompt_ids, answer_ids):
    """log pi(answer | prompt): one token at a time, one row at a time, plain Python floats."""
    total = 0.0
    for t, token in enumerate(answer_ids):
        with torch.no_grad():
            logits = model(torch.tensor([prompt_ids + answer_ids[:t]])).logits[0, -1].tolist()
        top = max(logits)
        total += logits[token] - top - math.log(sum(math.exp(x - top) for x in logits))
    return total


def slow_averages(model, tokenizer, row):
    """log pi(y|x) / |y| of both answers of a row."""
    prompt, chosen, rejected = ids_by_hand(row, tokenizer)
    sides = (chosen, rejected)
    return [slow_logps(model, prompt, side) / len(side) for side in sides]


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def mean(numbers):
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


HYPER = {  # the defaults, as the README's table has them
    "simpo": {"beta": 2.5, "gamma": 1.4},
    "dpo": {"beta": 0.01},
    "ipo": {"tau": 0.1},
    "cpo": {"beta": 0.1, "lam": 1.0},
    "kto": {"beta": 0.1, "lambda_w": 1.0, "lambda_l": 1.0},
    "orpo": {"lam": 0.1},
    "rrhf": {"lam": 1.0},
    "slic": {"delta": 1.0, "lam": 1.0},
    "rdpo": {"beta": 0.1, "alpha": 0.05},
    "sft": {},
}
AVERAGED, REFERENCED = ("simpo", "orpo", "rrhf", "sft"), ("dpo", "ipo", "kto", "rdpo")


class Answer(NamedTuple):
    """Of one answer: log pi, log pi_ref and |y|."""

    s: float
    ref: float
    n: int


def loss_by_hand(
    name, w, l, beta=0, gamma=0, tau=0, lam=0, lambda_w=0, lambda_l=0, delta=0, alpha=0, z=0
):
    """A pair's loss in plain floats, from the formulas of the paper's Table 3."""
    a_w, a_l, r_w, r_l = w.s / w.n, l.s / l.n, w.s - w.ref, l.s - l.ref

    def log_odds(a):
        return math.log(math.exp(a) / (1 - math.exp(a)))

    def sigma(x):
        return 1 / (1 + math.exp(-x))

    return {
        "simpo": lambda: -log_sigmoid(beta * a_w - beta * a_l - gamma) + lam * -a_w,
        "dpo": lambda: -log_sigmoid(beta * r_w - beta * r_l),
        "ipo": lambda: (r_w - r_l - 1 / (2 * tau)) ** 2,
        "cpo": lambda: -log_sigmoid(beta * w.s - beta * l.s) - lam * w.s,
        "kto": lambda: -lambda_w * sigma(beta * r_w - z) - lambda_l * sigma(z - beta * r_l),
        "orpo": lambda: -a_w - lam * log_sigmoid(log_odds(a_w) - log_odds(a_l)),
        "rrhf": lambda: max(0, -a_w + a_l) - lam * w.s,
        "slic": lambda: max(0, delta - w.s + l.s) - lam * w.s,
        "rdpo": lambda: -log_sigmoid(beta * r_w - beta * r_l + alpha * (w.n - l.n)),
        "sft": lambda: -a_w,
    }[name]()


def rewards_by_hand(name, answer, beta=0, tau=0, alpha=0, **_):
    r = answer.s - answer.ref
    kinds = {"simpo": beta * answer.s / answer.n, "cpo": beta * answer.s, "slic": answer.s}
    kinds |= {"dpo": beta * r, "kto": beta * r, "ipo": tau * r, "rdpo": beta * r + alpha * answer.n}
    return kinds.get(name, answer.s / answer.n)


def metrics_by_hand(name, pairs, **hyper):
    """The metrics of (chosen, rejected) Answers. KTO's z is estimated from all of them."""
    rewards = [[rewards_by_hand(name, x, **hyper) for x in pair] for pair in pairs]
    if name == "kto":
        hyper = hyper | {"z": max(0, mean(x for pair in rewards for x in pair))}
    logps = [[x.s / (x.n if name in AVERAGED else 1) for x in pair] for pair in pairs]
    return {
        "loss": mean(loss_by_hand(name, *pair, **hyper) for pair in pairs),
        "rewards/chosen": mean(w for w, _ in rewards),
        "rewards/rejected": mean(l for _, l in rewards),
        "rewards/margins": mean(w - l for w, l in rewards),
        "rewards/accuracies": mean(float(w > l) for w, l in rewards),
        "logps/chosen": mean(w for w, _ in logps),
        "logps/rejected": mean(l for _, l in logps),
    }


def slow_answers(model, reference, row):
    """The two answers of a row, scored token by token by both models."""
    prompt, *sides = ids_by_hand(row, make_tokenizer())
    scored = [[slow_logps(m, prompt, ids) for m in (model, reference)] for ids in sides]
    return [Answer(*logps, len(ids)) for logps, ids in zip(scored, sides)]


def simpo_by_hand(averages):
    """The metrics of pairs with these (chosen, rejected) average log-probabilities."""
    pairs = [[Answer(x, 0.0, 1) for x in pair] for pair in averages]
    return metrics_by_hand("simpo", pairs, **HYPER["simpo"])


# ------------------------------------------------------------------------- running simpo.py
STILL = ["--lr", "1e-12"]  # a learning rate that changes nothing that could be measured


def run(model, data, out, *flags):
    """Train in this process -> (metrics of the last evaluation, rows of metrics.jsonl)."""
    argv = ["--model", model, "--dataset", data, "--output_dir", out, *flags]
    return simpo.main([str(word) for word in argv]), read_metrics(out)


def read_metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def steps_of(rows):
    return [row for row in rows if "loss" in row]


def evaluations_of(rows):
    """Without the prefix: {"loss": ...}, one for each evaluation."""
    found = [{k[5:]: v for k, v in r.items() if k.startswith("eval/")} for r in rows]
    return [metrics for metrics in found if metrics]


def command_line(monkeypatch, capsys, *argv):
    """`python simpo.py argv`, without starting Python anew -> (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["simpo.py", *map(str, argv)])
    capsys.readouterr()
    code, usual = 0, signal.getsignal(signal.SIGINT)
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as end:
        code = end.code
    signal.signal(signal.SIGINT, usual)
    return code, *capsys.readouterr()


def fresh_process(*argv):
    command = [sys.executable, *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def torchrun(processes, *argv):
    """`torchrun --nproc_per_node=processes simpo.py argv`."""
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    return fresh_process(*launch, f"--master_port={free_port()}", SCRIPT, *argv)


# Python with torch imported, forked when a process is wanted: one that starts in 0.1 s can be
# killed often.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "transformers", "datasets", "simpo"])


def script(argv, environment, shown):
    """`python simpo.py argv`, in a process of its own; what it prints goes to a file."""
    os.environ |= environment
    with open(shown, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [str(SCRIPT), *argv]
    runpy.run_path(str(SCRIPT), run_name="__main__")


def start(processes, shown, *argv, last=(), target=script):
    """The processes of a run, the last of which may be given other flags."""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(processes)}
    started = []
    for rank in map(str, range(processes)):
        environment = group | {"RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
        words = [str(x) for x in (*argv, *(last if rank == str(processes - 1) else ()))]
        started.append(FORKS.Process(target=target, args=(words, environment, shown)))
        started[-1].start()
    return started


def codes(started, seconds=60):
    """Wait for the processes -> their exit codes, None for one that goes on."""
    deadline = time.monotonic() + seconds
    for process in started:
        process.join(max(0, deadline - time.monotonic()))
    return [process.exitcode for process in started]


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


def before_call(patch, name, call, action):
    """action() comes just before that call of simpo.name."""
    holder, calls = simpo, []
    *path, name = name.split(".")
    for part in path:
        holder = getattr(holder, part)
    real = getattr(holder, name)

    def spy(*args, **options):
        calls.append(name)
        if len(calls) == call:
            action()
        return real(*args, **options)

    patch.setattr(holder, name, spy)


@pytest.fixture
def disturb(monkeypatch):
    return partial(before_call, monkeypatch)


def the_error(result, out):
    """The one line that tells a user what to mend; nothing else may have happened."""
    code, _, stderr = result
    lines = stderr.split("\n")
    errors = [line for line in lines if line.startswith("simpo.py: error: ")]
    assert code == 2
    assert "Traceback" not in stderr
    assert len(errors) == 1, stderr
    written = {path.name for path in Path(out).glob("*")}
    assert written <= {"metrics.jsonl", "simpo_run.json"}  # no model
    return errors[0]


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with the model "llama" and the files nine.jsonl and seven.jsonl."""
    folder = tmp_path_factory.mktemp("place")
    write_model(folder / "llama")
    write_jsonl(folder / "nine.jsonl", NINE)
    write_jsonl(folder / "seven.jsonl", SEVEN)
    write_jsonl(folder / "letter.jsonl", [*NINE[:8], chat("Bye", "See you", "!")])
    return folder


@pytest.fixture
def mistake(place, tmp_path, monkeypatch, capsys):
    """mistake(flag, value, ...) makes a good command bad -> the line of the error."""

    def command(*flags):
        out = tmp_path / "out"
        good = ["--model", place / "llama", "--dataset", place / "nine.jsonl", "--output_dir", out]
        return the_error(command_line(monkeypatch, capsys, *good, *flags), out)

    return command


# ========================================================================= objectives
def test_simpo_loss_is_the_equation_with_the_papers_beta_and_gamma_by_default():
    """Catches defaults that are not the method's: another beta, another gamma, an SFT term."""
    chosen, rejected = [-0.3, -1.7, -2.0], [-1.1, -0.2, -2.0]
    losses = simpo.simpo_loss(torch.tensor(chosen), torch.tensor(rejected))
    expected = [-log_sigmoid(2.5 * (w - l) - 1.4) for w, l in zip(chosen, rejected)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)


def test_gamma_is_in_units_of_reward_and_not_the_ratio_of_gamma_to_beta():
    """Catches a gamma that is multiplied by beta (the official code's flag is that ratio)."""
    tie = torch.tensor([-1.0])
    loss = simpo.simpo_loss(tie, tie, beta=2.5, gamma=1.4).item()
    assert loss == pytest.approx(math.log(1 + math.exp(1.4)), rel=1e-6)
    # A pair whose rewards differ by exactly gamma has the loss of a coin toss.
    loss = simpo.simpo_loss(torch.tensor([-1.0]), torch.tensor([-1.56]), beta=2.5, gamma=1.4)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-5)


def test_label_smoothing_mixes_the_losses_of_the_pair_and_of_the_swapped_pair():
    """Catches a smoothing that forgets the (1 - epsilon), or flips the sign of gamma alone."""
    m = 2.0 * (-0.5 + 1.25) - 0.6
    expected = -0.9 * log_sigmoid(m) - 0.1 * log_sigmoid(-m)
    chosen, rejected = torch.tensor([-0.5]), torch.tensor([-1.25])
    loss = simpo.simpo_loss(chosen, rejected, beta=2.0, gamma=0.6, label_smoothing=0.1)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_dpo_loss_is_the_equation():
    """Catches averages where DPO has sums, and a reference that is subtracted the wrong way."""
    numbers = [-12.0, -15.5, -13.0, -14.0]
    loss = simpo.dpo_loss(*(torch.tensor([x]) for x in numbers), beta=0.3)
    expected = -log_sigmoid(0.3 * ((-12.0 + 13.0) - (-15.5 + 14.0)))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_the_losses_have_finite_values_and_gradients_at_huge_margins():
    """Catches log(sigmoid(x)) in two steps, which is -inf from about x = -100 on."""
    chosen = torch.tensor([-1e4, 0.0], requires_grad=True)
    losses = simpo.simpo_loss(chosen, torch.tensor([0.0, -1e4]), gamma=0.0)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([2.5e4, 0.0])
    assert chosen.grad.tolist() == pytest.approx([-2.5, 0.0])


OTHERS = {  # and other values, no two of them equal
    "simpo": {"beta": 2.0, "gamma": 0.5, "lam": 0.3},
    "dpo": {"beta": 0.3},
    "ipo": {"tau": 0.7},
    "cpo": {"beta": 0.4, "lam": 0.6},
    "kto": {"beta": 0.2, "lambda_w": 1.3, "lambda_l": 0.7, "z": 0.45},
    "orpo": {"lam": 2.0},
    "rrhf": {"lam": 0.1},
    "slic": {"delta": 3.0, "lam": 0.2},
    "rdpo": {"beta": 0.25, "alpha": 0.02},
    "sft": {},
}


def answers(seed, count=12, least=-3.0, longest=40):
    """Random (chosen, rejected) answers; a reference of its own for each."""
    rng = random.Random(seed)

    def one():
        n = rng.randint(1, longest)
        return Answer(n * rng.uniform(least, -0.05), n * rng.uniform(least, -0.05), n)

    return [(one(), one()) for _ in range(count)]


def sides(pairs, requires_grad=False):
    """Pairs of Answers -> s, a, r and n as OBJECTIVES takes them, and the leaves [B] of s."""
    columns = [[torch.tensor(x, dtype=torch.float32) for x in zip(*side)] for side in zip(*pairs)]
    leaves = [s.requires_grad_(requires_grad) for s, _, _ in columns]
    kinds = [(s, s / n, s - ref, n) for s, (_, ref, n) in zip(leaves, columns)]
    return [simpo.Sides(*x) for x in zip(*kinds)], leaves


every_objective = pytest.mark.parametrize("name", HYPER)


@every_objective
@pytest.mark.parametrize("hyper", [HYPER, OTHERS], ids=["defaults", "others"])
def test_each_objective_is_the_formula_of_the_paper(name, hyper):
    """Catches averages where sums belong, a wrong sign, a lost term, a default of its own."""
    pairs = answers(seed=5)
    given = {} if hyper is HYPER else hyper[name]  # the defaults are simpo.py's own
    losses = simpo.OBJECTIVES[name](*sides(pairs)[0], **given)
    expected = [loss_by_hand(name, w, l, **hyper[name]) for w, l in pairs]
    assert losses.tolist() == pytest.approx(expected, rel=2e-5, abs=1e-6)


@every_objective
def test_rewards_are_what_each_objective_compares(name):
    """Catches rewards of another method in the metrics, and a forgotten length term of R-DPO."""
    pairs = answers(seed=6)
    s, a, r, y = sides(pairs)[0]
    averaged = name in AVERAGED
    assert (name in simpo.LENGTH_NORMALISED) == averaged
    reference = torch.stack(s) - torch.stack(r) if name in simpo.NEEDS_REFERENCE else 0
    logps = torch.stack(a if averaged else s)
    rewards = simpo.implicit_rewards(logps, reference, torch.stack(y), **OTHERS[name])
    expected = [[rewards_by_hand(name, x, **OTHERS[name]) for x in side] for side in zip(*pairs)]
    assert rewards[0].tolist() == pytest.approx(expected[0], rel=1e-4, abs=1e-5)
    assert rewards[1].tolist() == pytest.approx(expected[1], rel=1e-4, abs=1e-5)


@every_objective
def test_the_gradient_raises_the_chosen_and_lowers_the_rejected_answer(name):
    """Catches a sign: over random pairs, never the wrong way, and for most pairs the right way."""
    options = {"tau": 0.001} if name == "ipo" else {}  # IPO turns round at a margin of 1/(2 tau)
    quantities, (s_w, s_l) = sides(answers(seed=7, count=300), requires_grad=True)
    simpo.OBJECTIVES[name](*quantities, **options).sum().backward()
    assert (s_w.grad <= 0).all() and (s_w.grad < 0).float().mean() > 0.9
    if name == "sft":
        assert s_l.grad is None
    else:
        assert (s_l.grad >= 0).all() and (s_l.grad > 0).float().mean() > 0.3  # hinges rest


@every_objective
def test_a_pairs_loss_does_not_depend_on_the_other_pairs(name):
    """Catches a mean over the batch inside an objective, by which micro-batches would matter."""
    pairs, objective = answers(seed=8), simpo.OBJECTIVES[name]
    together = objective(*sides(pairs)[0])
    alone = [objective(*sides([pair])[0]).item() for pair in pairs]
    assert together.tolist() == pytest.approx(alone, rel=1e-6)


def twice_as_long(pairs):
    return [tuple(Answer(2 * x.s, 2 * x.ref, 2 * x.n) for x in pair) for pair in pairs]


@every_objective
def test_length_matters_exactly_where_the_formula_says_so(name):
    """Catches sums in SimPO, ORPO or SFT, and averages in the others: both answers are doubled."""
    pairs = answers(seed=9, least=-0.5, longest=9)
    once, twice = (
        simpo.OBJECTIVES[name](*sides(x)[0]).tolist() for x in (pairs, twice_as_long(pairs))
    )
    if name in ("simpo", "orpo", "sft"):
        assert twice == pytest.approx(once, rel=1e-5)
    elif name == "rrhf":  # its ranking term is averaged, its SFT term is a sum
        extra = [-HYPER[name]["lam"] * w.s for w, _ in pairs]
        assert [y - x for x, y in zip(once, twice)] == pytest.approx(extra, rel=1e-4, abs=1e-5)
    else:
        expected = [loss_by_hand(name, w, l, **HYPER[name]) for w, l in twice_as_long(pairs)]
        assert twice == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert all(abs(x - y) > 1e-5 for x, y in zip(once, twice))


def test_the_ablation_without_length_normalisation_compares_sums():
    """Catches --no_length_norm that changes nothing, or that drops beta or gamma on the way."""
    pairs = answers(seed=10, least=-0.5, longest=9)
    losses = simpo.OBJECTIVES["simpo"](*sides(pairs)[0], no_length_norm=True)
    expected = [-log_sigmoid(2.5 * w.s - 2.5 * l.s - 1.4) for w, l in pairs]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)


def test_the_hinge_and_label_smoothing_of_simpo():
    """Catches a hinge at the wrong place: 0 from a margin of gamma + 1 on, a line below."""
    rejected = torch.tensor([-3.0, -1.5, -0.5])  # margins of reward 5, 2 and 0, minus gamma 0.5
    chosen, options = torch.tensor([-0.5] * 3), {"beta": 2.0, "gamma": 0.5, "hinge": True}
    losses = simpo.simpo_loss(chosen, rejected, **options)
    assert losses.tolist() == pytest.approx([0.0, 0.0, 1.5])
    losses = simpo.simpo_loss(chosen, rejected, **options, label_smoothing=0.2)
    expected = [0.2 * 5.5, 0.2 * 2.5, 0.8 * 1.5 + 0.2 * 0.5]
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)


def test_a_longer_chosen_answer_gets_a_smaller_gradient_from_rdpo():
    """Catches the length term of R-DPO with its sign turned round."""
    grads = []
    for n in (5, 20, 80):  # the chosen answer's length; all else stays
        pair = Answer(-9.0, -8.0, n), Answer(-7.0, -7.5, 20)
        quantities, (s_w, _) = sides([pair], requires_grad=True)
        simpo.OBJECTIVES["rdpo"](*quantities).sum().backward()
        grads.append(abs(s_w.grad.item()))
    assert grads[0] > grads[1] > grads[2] > 0


EXTREMES = [-1e-8, -1e-6, -1e-3, -0.7, -7.0, -50.0]


@every_objective
def test_losses_and_gradients_are_finite_from_certain_to_hopeless_answers(name):
    """Catches log(1 - p) at p = 1, and an overflow at a sum of -100,000."""
    kinds = [Answer(a * n, a * n * f, n) for a in EXTREMES for n in (1, 2000) for f in (1, 0.5, 2)]
    pairs = [(w, l) for w in kinds for l in kinds]
    variants = [{}] + [{"hinge": True}, {"no_length_norm": True}, {"lam": 1.0}] * (name == "simpo")
    for options in variants:
        quantities, leaves = sides(pairs, requires_grad=True)
        losses = simpo.OBJECTIVES[name](*quantities, **options)
        assert losses.dtype == torch.float32 and losses.isfinite().all()
        losses.sum().backward()
        assert all(x.grad.isfinite().all() for x in leaves if x.grad is not None)


def test_log_odds_keep_their_digits_near_certainty():
    """Catches ORPO's log(1 - p) as 1 - exp(a), which is 0 in fp32 from a = -6e-8 on."""
    a = torch.tensor([*EXTREMES, 0.0], requires_grad=True)
    odds = simpo.log_odds(a)
    expected = [x - math.log(-math.expm1(x)) for x in EXTREMES]  # in 53 bits
    assert odds[:-1].tolist() == pytest.approx(expected, rel=1e-6)
    odds.sum().backward()
    slopes = [1 / -math.expm1(x) for x in EXTREMES]  # d log odds / da = 1 / (1 - p)
    assert a.grad[:-1].tolist() == pytest.approx(slopes, rel=1e-5)
    assert odds[-1].isfinite() and a.grad[-1].isfinite()  # p = 1 itself


def test_the_defaults_of_the_function_to_copy_are_those_of_the_flags():
    """Catches two homes of beta and gamma that drift apart."""
    chosen, rejected = torch.tensor([-0.3, -2.0]), torch.tensor([-1.1, -0.4])
    s, y = simpo.Sides(4 * chosen, 9 * rejected), simpo.Sides(torch.tensor(4), torch.tensor(9))
    a = simpo.Sides(chosen, rejected)
    through_the_table = simpo.OBJECTIVES["simpo"](s, a, s, y)
    assert through_the_table.tolist() == simpo.simpo_loss(chosen, rejected).tolist()


# ========================================================================= log-likelihood
def some_pairs(seed=0, count=4):
    """Pairs of random token ids, of many lengths, that include the id that pads (3)."""
    rng = random.Random(seed)
    lengths = {"prompt_ids": 20, "chosen_ids": 12, "rejected_ids": 7}
    return [
        {key: [rng.randrange(264) for _ in range(rng.randint(1, n))] for key, n in lengths.items()}
        for _ in range(count)
    ]


def slow_scores(model, pairs):
    rows = [(p["prompt_ids"], p[side]) for side in ("chosen_ids", "rejected_ids") for p in pairs]
    return [slow_logps(model, *row) for row in rows]


@every_layout
def test_scores_are_those_of_a_token_by_token_loop(name, packed):
    """Catches logits not shifted against labels, scored prompt tokens and forgotten soft caps."""
    _, scorer, layout = scorer_and_layout(name, packed)
    pairs = some_pairs()
    logps, lengths = scorer(**simpo.collate(pairs, **layout))
    assert logps.tolist() == pytest.approx(slow_scores(MODELS[name](), pairs), rel=1e-5)
    counted = [len(p[side]) for side in ("chosen_ids", "rejected_ids") for p in pairs]
    assert lengths.tolist() == counted


@every_layout
def test_a_score_is_the_same_alone_and_among_other_pairs(name, packed):
    """Catches padding that shifts positions, neighbours that are attended to, |y| of a batch."""
    (_, scorer, layout), pairs = scorer_and_layout(name, packed), some_pairs(seed=1, count=6)
    together, _ = scorer(**simpo.collate(pairs, **layout))
    alone = [scorer(**simpo.collate([pair], **layout))[0] for pair in pairs]
    assert together.tolist() == pytest.approx(torch.stack(alone).T.flatten().tolist(), rel=1e-5)


@every_layout
def test_every_gradient_is_that_of_separate_rows_with_full_logits(name, packed):
    """Catches a head that, applied to three tokens at a time, loses or doubles gradients, and a
    shared prompt that learns from one of its two answers only."""
    model, scorer, layout = scorer_and_layout(name, packed, chunk=3)
    pairs = some_pairs(seed=2)
    logps, lengths = scorer(**simpo.collate(pairs, **layout))
    assert lengths.sum() > 3 * 3  # several chunks
    weights = torch.arange(1.0, len(logps) + 1) / lengths
    (logps * weights).sum().backward()
    chunked = {key: p.grad.clone() for key, p in model.named_parameters()}
    model = MODELS[name]()
    rows = [(p["prompt_ids"], p[side]) for side in ("chosen_ids", "rejected_ids") for p in pairs]
    for weight, (prompt, answer) in zip(weights, rows):
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        picked = F.log_softmax(logits, dim=-1)[torch.arange(len(answer)), answer]
        (weight * picked.sum()).backward()
    for key, p in model.named_parameters():
        scale = p.grad.abs().max().item()
        torch.testing.assert_close(chunked[key], p.grad, rtol=0, atol=1e-5 * scale, msg=key)


@pytest.mark.parametrize("side", ["chosen_ids", "rejected_ids"])
def test_answers_packed_into_one_row_are_blind_to_each_other(side):
    """Catches a rejected answer that reads the chosen one, or a pair that reads the one before."""
    (_, scorer, layout), pairs = scorer_and_layout("llama", packed=True), some_pairs(seed=4)
    before, _ = scorer(**simpo.collate(pairs, **layout))
    pairs[1][side] = [(token + 1) % 264 for token in pairs[1][side]]
    after, _ = scorer(**simpo.collate(pairs, **layout))
    changed = 1 if side == "chosen_ids" else 5  # of the eight answers, the chosen ones first
    assert [i for i in range(8) if before[i] != after[i]] == [changed]


def test_a_packed_row_has_no_padding_and_each_prompt_once():
    """Catches a layout that saves nothing: 3 + 2 + 4 tokens and 1 + 1 + 1, in one row."""
    pairs = [
        {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [10, 11, 12, 13]},
        {"prompt_ids": [14], "chosen_ids": [15], "rejected_ids": [16]},
    ]
    batch = simpo.collate(pairs, share_prompt=True)
    assert batch["input_ids"].tolist() == [[*range(5, 17)]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 6, 0, 1, 1]]
    assert batch["plan"] == [[3, 2, 4], [1, 1, 1]]
    assert batch["lengths"].tolist() == [2, 1, 4, 1]


@pytest.mark.parametrize(
    "queries, keys, heads, groups", [(7, 7, 4, 4), (5, 12, 6, 2), (1, 9, 2, 1)]
)
def test_attention_in_bf16_is_that_in_fp32_but_for_rounding(queries, keys, heads, groups):
    """Catches the wrong key for a group of heads, and a diagonal that is off where keys abound."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(1, n, t, 8) for n, t in ((heads, queries), (groups, keys), (groups, keys))]
    query, key, value = (torch.randn(shape, generator=draw) for shape in shapes)
    by_hand = torch.empty(1, heads, queries, 8)
    for head in range(heads):
        for i in range(queries):
            seen = keys - queries + i + 1
            k, v = (x[0, head * groups // heads, :seen] for x in (key, value))
            by_hand[0, head, i] = (k @ query[0, head, i] * 8**-0.5).softmax(0) @ v
    exact = simpo.causal_attention(query, key, value, None)
    torch.testing.assert_close(exact, by_hand, rtol=0, atol=1e-5)
    rough = simpo.causal_attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), 8**-0.5)
    torch.testing.assert_close(rough.float(), by_hand, rtol=0, atol=0.03)


@pytest.mark.parametrize("share_prompt", [False, True])
def test_a_batch_has_nothing_that_pinned_memory_would_refuse(share_prompt):
    """Catches an expanded tensor, of which a GPU's copy would write one place many times."""
    batch = simpo.collate(some_pairs(), share_prompt=share_prompt)
    assert {k for k, x in batch.items() if k != "plan" and not x.is_contiguous()} == set()


def make_mistral(window):
    torch.manual_seed(5)
    config = transformers.MistralConfig(**SHAPE | LLAMA, sliding_window=window)
    return transformers.MistralForCausalLM(config).eval()


def make_bloom():
    """ALiBi: its positions are distances in the row, whatever position_ids say."""
    torch.manual_seed(6)
    config = transformers.BloomConfig(**SHAPE, hidden_size=32, n_layer=2, n_head=4)
    return transformers.BloomForCausalLM(config).eval()


def make_mamba():
    """A state-space model: what it has read, it cannot leave out."""
    torch.manual_seed(7)
    config = transformers.MambaConfig(**SHAPE, hidden_size=32, num_hidden_layers=2, state_size=4)
    return transformers.MambaForCausalLM(config).eval()


CANNOT_SHARE = {
    "sliding window": partial(make_mistral, 20),
    "ALiBi": make_bloom,
    "state space": make_mamba,
    "soft cap in the attention": make_gemma2,
}


@pytest.mark.parametrize("name", CANNOT_SHARE)
def test_a_model_that_cannot_share_prompts_gets_a_row_for_each_answer(
    name, place, tmp_path, capsys
):
    """Catches scores that are silently wrong for attention that reads more than its segment."""
    make_model = CANNOT_SHARE[name]
    write_model(tmp_path / "model", make_model())
    _, rows = run(tmp_path / "model", place / "nine.jsonl", tmp_path / "out", *STILL)
    averages = [slow_averages(make_model(), make_tokenizer(), row) for row in NINE]
    assert steps_of(rows)[0]["loss"] == pytest.approx(simpo_by_hand(averages)["loss"], rel=1e-5)
    assert "cannot share prompts" in capsys.readouterr().out


def test_a_model_that_can_share_prompts_does(place, tmp_path, monkeypatch):
    """Catches a fast layout that is always given up: a long window and GPT-2 are no reason."""
    layouts, collate = set(), simpo.collate
    for name, model in {
        "long": make_mistral(100),
        "gpt2": make_gpt2(),
        "tied": make_tied_llama(),
    }.items():
        write_model(tmp_path / name, model)

        def spy(pairs, pad_token_id=0, share_prompt=False):
            layouts.add((len(pairs) > 1, share_prompt))
            return collate(pairs, pad_token_id, share_prompt)

        monkeypatch.setattr(simpo, "collate", spy)
        layouts.clear()
        run(tmp_path / name, place / "nine.jsonl", tmp_path / f"{name}_out", *STILL)
        assert (True, True) in layouts and (True, False) not in layouts


def test_tokens_that_the_model_is_certain_of_count_in_the_length():
    """Catches |y| counted by log-probabilities that are not 0, where certain tokens vanish."""
    model = make_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    prompt, answer = [10, 20, 30], []
    for _ in range(5):  # greedy, so each of these tokens has a probability of exactly 1
        answer.append(model(torch.tensor([prompt + answer])).logits[0, -1].argmax().item())
    pair = {"prompt_ids": prompt, "chosen_ids": answer, "rejected_ids": answer[:2]}
    logps, lengths = simpo.ResponseLogps(model)(**simpo.collate([pair]))
    assert logps.tolist() == [0.0, 0.0]
    assert lengths.tolist() == [5, 2]


@pytest.mark.parametrize("how", ["fp32", "bf16 weights", "autocast"])
def test_log_softmax_and_sums_are_fp32_for_bf16_logits(how):
    """Catches a log-softmax in bf16, which has three digits: log-probs of -6 in steps of 0.03."""
    model, pairs = make_llama(num_hidden_layers=0), some_pairs(seed=3)
    with torch.no_grad():  # hidden states of -1 and 1, and logits in steps of 1/4: exact in bf16
        model.model.embed_tokens.weight.sign_()
        model.lm_head.weight.uniform_(-2, 2).round_().div_(4)
    expected = slow_scores(model, pairs)
    model = model.bfloat16() if how == "bf16 weights" else model
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        logps, _ = simpo.ResponseLogps(model)(**simpo.collate(pairs))
    assert logps.dtype == torch.float32
    assert logps.tolist() == pytest.approx(expected, rel=1e-5)


# ========================================================================= data
def tokenize(row, tokenizer, max_length=400, max_prompt_length=300):
    return simpo.tokenize_pair(row, tokenizer, max_length, max_prompt_length)


@every_style
def test_each_template_gets_one_bos_and_one_scored_end_of_turn(style):
    """Catches BOS or end of turn twice or never, a scored header, a scored newline after it."""
    tokenizer = style.make()
    pair = tokenize(chat("Hi?", "Hello", "Go away"), tokenizer)
    # Special tokens must be single ids, not spelled out: encode what is expected by hand.
    expected = [style.before, *(a + style.end for a in ("Hello", "Go away"))]
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in expected]
    assert [pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"]] == ids
    (end,) = tokenizer.encode(style.end, add_special_tokens=False)
    assert pair["chosen_ids"].count(end) == 1 and pair["chosen_ids"][-1] == end
    if tokenizer.bos_token:
        assert (pair["prompt_ids"] + pair["chosen_ids"]).count(tokenizer.bos_token_id) <= 1


@pytest.mark.parametrize("adds_bos", [True, False])
def test_plain_texts_get_a_bos_only_from_a_tokenizer_that_adds_one(adds_bos):
    """Catches BOS twice, BOS for tokenizers that do without, and a missing or doubled EOS."""
    tokenizer = make_tokenizer(template=None, eos="</s>", adds_bos=adds_bos)
    pair = tokenize(texts("Q: why?\nA:", " so</s>", " no"), tokenizer)
    assert tokenizer.decode(pair["prompt_ids"]) == "<s>" * adds_bos + "Q: why?\nA:"
    assert tokenizer.decode(pair["chosen_ids"]) == " so</s>"
    assert tokenizer.decode(pair["rejected_ids"]) == " no</s>"
    with_bos_in_the_text = tokenize(texts("<s>Q: why?\nA:", " so", " no"), tokenizer)
    assert tokenizer.decode(with_bos_in_the_text["prompt_ids"]) == "<s>Q: why?\nA:"


def test_a_tokenizer_without_bos_gets_none():
    """Catches None, or another token, in the place of a BOS that does not exist."""
    tokenizer = make_tokenizer(template=None, bos=None, eos="<|endoftext|>")
    pair = tokenize(texts("Q:", " yes", " no"), tokenizer)
    assert pair["prompt_ids"] == tokenizer.encode("Q:")
    assert None not in pair["prompt_ids"] + pair["chosen_ids"] + pair["rejected_ids"]


def test_an_answer_survives_a_tokenizer_that_merges_across_the_seam():
    """Catches a first token of the answer that is lost in, or stolen from, the prompt's last."""
    tokenizer = make_tokenizer(template=None, eos="</s>", merge=":Ġ")
    seam = tokenizer.encode("A: yes")
    assert len(seam) == 5  # ":" and " " do merge into one token
    pair = tokenize(texts("Q: why?\nA:", " yes", "no"), tokenizer)
    assert tokenizer.decode(pair["prompt_ids"]) == "Q: why?\nA:"
    assert pair["prompt_ids"] == tokenizer.encode("Q: why?\nA:")  # as when the model is asked
    assert tokenizer.decode(pair["chosen_ids"]) == " yes</s>"
    assert tokenizer.decode(pair["rejected_ids"]) == "no</s>"


@every_style
def test_only_the_last_assistant_turn_is_scored(style):
    """Catches the answers of earlier turns counted in log pi(y|x) and |y|."""
    tokenizer = style.make()
    turns = [("user", "Hi?"), ("assistant", "Hello"), ("user", "More?")]
    turns = [{"role": role, "content": content} for role, content in turns]
    row = chat("", "Yes, more", "No")
    pair = tokenize(row | {"prompt": turns}, tokenizer)
    end = style.end
    assert tokenizer.decode(pair["chosen_ids"]) == "Yes, more" + end
    assert tokenizer.decode(pair["rejected_ids"]) == "No" + end
    before = tokenizer.decode(pair["prompt_ids"])
    assert before.index("Hi?") < before.index("Hello") < before.index("More?")


def test_whole_conversations_are_read_as_the_prompt_and_two_answers():
    """Catches the paper's datasets misread: there, `prompt` is a string beside the whole chats."""
    tokenizer, row = make_tokenizer(), chat("Hi?", "Hello", "Go")
    whole = {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}
    expected = tokenize(row, tokenizer)
    assert tokenize(whole, tokenizer) == expected
    assert tokenize(whole | {"prompt": "an id, or the first words"}, tokenizer) == expected
    assert tokenize(whole | {"prompt": row["prompt"]}, tokenizer) == expected
    assert tokenize(row | {"prompt": "Hi?"}, tokenizer) == expected  # a question as a string


def test_answers_to_different_prompts_are_no_pair():
    """Catches a comparison of answers to two different questions."""
    tokenizer, row = make_tokenizer(), chat("Hi?", "Hello", "Go")
    whole = {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}
    whole["rejected"] = [{"role": "user", "content": "Bye?"}, whole["rejected"][-1]]
    assert tokenize(whole, tokenizer) is None
    heads = ["\n\nHuman: Hi\n\nAssistant:", "\n\nHuman: Bye\n\nAssistant:"]
    assert tokenize({"chosen": heads[0] + " a", "rejected": heads[1] + " b"}, tokenizer) is None


KEPT = [(" yes", " no"), (" yes", " yes, of course"), (" yes, of course", " yes"), ("A", "B")]
DROPPED = [(" yes", " yes"), ("", " no"), (" yes", ""), (" yes", "  ")]


@pytest.mark.parametrize("chosen, rejected", [*KEPT, (" The cat sat", " The cat ran"), *DROPPED])
def test_a_prompt_inside_both_strings_is_found_exactly(chosen, rejected):
    """Catches a common prefix that swallows the start of the answers or is off by one."""
    head = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Are you sure?\n\nAssistant:"
    tokenizer = make_tokenizer(template=None, eos="</s>")
    pair = tokenize({"chosen": head + chosen, "rejected": head + rejected}, tokenizer)
    assert (pair is None) == ((chosen, rejected) in DROPPED)
    if pair:
        prompt, *answers = (
            tokenizer.decode(pair[key]) for key in ("prompt_ids", "chosen_ids", "rejected_ids")
        )
        assert prompt == head
        assert answers == [chosen + "</s>", rejected + "</s>"]


def test_the_end_of_turn_is_scored_when_it_also_pads():
    """Catches labels masked wherever the id is the padding's: the model never learns to stop."""
    tokenizer, model = make_tokenizer(), make_llama()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    pairs = [tokenize(row, tokenizer) for row in NINE]
    logps, lengths = simpo.ResponseLogps(model)(**simpo.collate(pairs))
    by_hand = [ids_by_hand(row, tokenizer) for row in NINE]
    answers = [(ids[0], ids[side]) for side in (1, 2) for ids in by_hand]
    assert all(answer[-1] == tokenizer.eos_token_id for _, answer in answers)
    assert logps.tolist() == pytest.approx([slow_logps(model, *a) for a in answers], rel=1e-5)
    assert lengths.tolist() == [len(answer) for _, answer in answers]


@every_style
def test_a_cut_answer_gets_no_end_of_turn(style):
    """Catches a model taught to stop mid-sentence: an end of turn forged onto a cut answer."""
    tokenizer = style.make()
    (end,) = tokenizer.encode(style.end, add_special_tokens=False)
    whole = tokenize(chat("Hi?", "abcdefghij", "no"), tokenizer)
    for kept in (1, 5, 10):  # at 10, only the end of turn itself has no room
        cut = tokenize(chat("Hi?", "abcdefghij", "no"), tokenizer, len(whole["prompt_ids"]) + kept)
        assert cut["chosen_ids"] == whole["chosen_ids"][:kept]
        assert end not in cut["chosen_ids"]


@every_style
def test_a_long_prompt_keeps_its_opening_and_the_assistant_header(style):
    """Catches a cut through the template: BOS, or the header before the answer, is gone."""
    tokenizer = style.make()
    question = " ".join(f"word{i}" for i in range(40)) + " the end?"
    pair = tokenize(chat(question, "Hello", "Go"), tokenizer, 120, 100)
    before, after = style.before.split("Hi?")
    text = tokenizer.decode(pair["prompt_ids"])
    assert len(pair["prompt_ids"]) == 100
    assert text.startswith(before)
    assert text.endswith("the end?" + after)
    assert tokenizer.decode(pair["chosen_ids"]) == "Hello" + style.end


def test_no_row_is_longer_than_allowed_and_nothing_is_cut_that_fits():
    """Catches answers cut because the other one is long, or to a fixed share of the room."""
    tokenizer, rng = make_tokenizer(template=None, eos="</s>"), random.Random(0)
    dropped = cut = whole = 0
    for _ in range(400):
        p, c, r = rng.randint(1, 40), rng.randint(1, 40), rng.randint(1, 40)
        max_length = rng.randint(8, 70)
        max_prompt = rng.randint(1, max_length)
        row = texts("p" * p, "c" * c, "r" * r)
        pair = tokenize(row, tokenizer, max_length, max_prompt)
        room = max_length - min(p, max_prompt)
        if room == 0:
            assert pair is None
            dropped += 1
            continue
        lengths = [len(pair[key]) for key in ("prompt_ids", "chosen_ids", "rejected_ids")]
        # One token a letter, and one for the end of turn.
        assert lengths == [min(p, max_prompt), min(c + 1, room), min(r + 1, room)]
        fits = p <= max_prompt and p + max(c, r) + 1 <= max_length
        assert fits == (lengths == [p, c + 1, r + 1])
        cut, whole = cut + (not fits), whole + fits
        other = tokenize(row | {"rejected": "x"}, tokenizer, max_length, max_prompt)
        assert other["chosen_ids"] == pair["chosen_ids"]
    assert min(dropped, cut, whole) >= 5  # all three happened


@every_style
def test_limits_hold_for_chats_of_random_lengths(style):
    """Catches limits that only hold for plain texts: a template's own tokens need room, too."""
    tokenizer, rng = style.make(), random.Random(1)
    before, after = (
        tokenizer.encode(x, add_special_tokens=False) for x in style.before.split("Hi?")
    )
    dropped = cut = whole = 0
    for _ in range(150):
        row = chat("p" * rng.randint(1, 60), "c" * rng.randint(1, 60), "r" * rng.randint(1, 60))
        full = tokenize(row, tokenizer)
        max_length = rng.randint(60, 190)
        max_prompt = rng.choice([max_length, rng.randint(50, max_length)])
        pair = tokenize(row, tokenizer, max_length, max_prompt)
        kept = min(len(full["prompt_ids"]), max_prompt)
        if kept == max_length:
            assert pair is None
            dropped += 1
            continue
        assert len(pair["prompt_ids"]) == kept
        assert pair["prompt_ids"][: len(before)] == before
        assert pair["prompt_ids"][kept - len(after) :] == after
        for side in ("chosen_ids", "rejected_ids"):
            assert pair[side] == full[side][: max_length - kept]
        fits = all(pair[key] == full[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids"))
        cut, whole = cut + (not fits), whole + fits
    assert min(cut, whole) >= 5 and dropped >= 1


# ========================================================================= training: the numbers
def test_default_flags_train_with_the_papers_objective(place, tmp_path):
    """Catches flags whose defaults are not beta 2.5 and gamma 1.4, and swapped metrics."""
    flags = ["--eval_dataset", place / "seven.jsonl"]
    last, rows = run(place / "llama", place / "nine.jsonl", tmp_path / "out", *flags)
    model, tokenizer = make_llama(), make_tokenizer()
    before, after = evaluations_of(rows)
    averages = [slow_averages(model, tokenizer, row) for row in SEVEN]
    expected = simpo_by_hand(averages)
    assert {name: before[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert {f"eval/{name}": x for name, x in after.items()} == last
    averages = [slow_averages(model, tokenizer, row) for row in NINE]
    (step,) = steps_of(rows)  # 9 pairs are fewer than the 128 of a batch: one step
    expected = simpo_by_hand(averages)
    assert {name: step[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_chosen_and_rejected_are_not_swapped_in_the_metrics(place, tmp_path):
    """Catches accuracies and margins with the wrong sign, which look like a broken model."""
    model, tokenizer = make_llama(), make_tokenizer()
    order = [slow_averages(model, tokenizer, row) for row in NINE]
    assert all(abs(w - l) > 1e-3 for w, l in order)
    likely = [
        row if w > l else row | {"chosen": row["rejected"], "rejected": row["chosen"]}
        for row, (w, l) in zip(NINE, order)
    ]
    data = write_jsonl(tmp_path / "likely.jsonl", likely)
    _, rows = run(place / "llama", data, tmp_path / "out", *STILL)
    (step,) = steps_of(rows)
    assert step["rewards/accuracies"] == 1.0
    assert step["rewards/margins"] == pytest.approx(2.5 * mean(abs(w - l) for w, l in order))
    assert step["logps/chosen"] == pytest.approx(mean(max(o) for o in order))
    assert step["logps/rejected"] == pytest.approx(mean(min(o) for o in order))


def test_longer_answers_of_the_same_likelihood_per_token_have_the_same_reward(tmp_path):
    """Catches sums where SimPO and SFT have averages: every token is 1 of 264 here."""
    model = make_llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    folder = write_model(tmp_path / "uniform", model)
    data = write_jsonl(
        tmp_path / "data.jsonl", [chat("Hi", "a" * 30, "b"), chat("x", "a", "b" * 9)]
    )
    _, rows = run(folder, data, tmp_path / "simpo", *STILL)
    (step,) = steps_of(rows)
    assert step["loss"] == pytest.approx(math.log(1 + math.exp(1.4)), rel=1e-6)
    assert step["rewards/chosen"] == pytest.approx(-2.5 * math.log(264), rel=1e-6)
    assert step["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    _, rows = run(folder, data, tmp_path / "sft", "--loss", "sft", *STILL)
    assert steps_of(rows)[0]["loss"] == pytest.approx(math.log(264), rel=1e-6)


@pytest.fixture(scope="session")
def nine_answers(place):
    """(chosen, rejected) of NINE, scored token by token by "llama" and by another, "reference"."""
    model, reference = make_llama(), make_gpt2()
    write_model(place / "reference", reference)
    return [slow_answers(model, reference, row) for row in NINE]


RUNS = {name: ([], {}) for name in HYPER} | {
    "simpo with an SFT term": (["--lambda", 0.05], {"lam": 0.05}),
    "simpo, gamma 0": (["--gamma", 0], {"gamma": 0}),
    "dpo, beta 0.1": (["--beta", 0.1], {"beta": 0.1}),
    "kto, weights": (["--lambda_w", 1.3, "--lambda_l", 0.6], {"lambda_w": 1.3, "lambda_l": 0.6}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_trains_and_reports_its_own_objective(name, nine_answers, place, tmp_path):
    """Catches flags that do not arrive, a wrong reference, rewards of another method."""
    loss, (flags, values) = re.split(r"\W", name)[0], RUNS[name]
    if loss in REFERENCED:
        flags = [*flags, "--ref_model", place / "reference"]
        pairs = nine_answers
    else:
        pairs = [[x._replace(ref=0.0) for x in pair] for pair in nine_answers]
    data, flags = place / "nine.jsonl", ["--loss", loss, *flags, "--micro_batch_size", 2]
    _, (step,) = run(place / "llama", data, tmp_path / "out", *flags, *STILL)
    expected = metrics_by_hand(loss, pairs, **HYPER[loss] | values)
    if loss == "kto":  # the estimate of the KL divergence is over all 18 answers of the batch
        assert (expected["rewards/chosen"] + expected["rewards/rejected"]) / 2 > 0.01
    assert {key: step[key] for key in expected} == pytest.approx(expected, rel=1e-4)


def test_ktos_estimate_of_the_divergence_is_never_negative(nine_answers, place, tmp_path):
    """Catches z below 0, which no KL divergence is: here the policy finds all less likely."""
    pairs = [[x._replace(s=x.ref, ref=x.s) for x in pair] for pair in nine_answers]
    assert mean(x.s - x.ref for pair in pairs for x in pair) < -0.1
    flags = ["--loss", "kto", "--ref_model", place / "llama", *STILL]
    _, (step,) = run(place / "reference", place / "nine.jsonl", tmp_path / "out", *flags)
    by_hand = mean(loss_by_hand("kto", *pair, **HYPER["kto"], z=0) for pair in pairs)
    assert step["loss"] == pytest.approx(by_hand, rel=1e-4)


def test_the_ablation_of_length_normalisation_reports_sums(nine_answers, place, tmp_path):
    """Catches --no_length_norm whose loss and rewards are not of the same quantity."""
    data, flags = place / "nine.jsonl", ["--no_length_norm", "--hinge", *STILL]
    _, (step,) = run(place / "llama", data, tmp_path / "out", *flags)
    margins = [2.5 * w.s - 2.5 * l.s for w, l in nine_answers]
    assert step["loss"] == pytest.approx(mean(max(0, 1 - (m - 1.4)) for m in margins), rel=1e-5)
    assert step["rewards/margins"] == pytest.approx(mean(margins), rel=1e-5)
    assert step["logps/chosen"] == pytest.approx(mean(w.s for w, _ in nine_answers), rel=1e-5)


AT_THE_START = {
    "dpo": (["--beta", 0.1], lambda n_w, n_l: math.log(2)),
    "ipo": (["--tau", 0.4], lambda n_w, n_l: 1 / (4 * 0.4**2)),
    "kto": (["--lambda_w", 1.5], lambda n_w, n_l: -(1.5 + 1.0) / 2),
    "rdpo": (["--alpha", 0.2], lambda n_w, n_l: -log_sigmoid(0.2 * (n_w - n_l))),
}


@pytest.mark.parametrize("name", AT_THE_START)
def test_the_reference_is_the_starting_policy(name, nine_answers, place, tmp_path):
    """Catches a reference that moves with the policy, or is not it: the first loss is known."""
    flags, expected = AT_THE_START[name]
    _, rows = run(
        place / "llama", place / "nine.jsonl", tmp_path / "out", "--loss", name, *flags, *STILL
    )
    losses = [expected(w.n, l.n) for w, l in nine_answers]
    assert steps_of(rows)[0]["loss"] == pytest.approx(mean(losses), rel=1e-6)


@every_objective
def test_only_objectives_with_a_reference_compute_one(name, place, tmp_path, monkeypatch):
    """Catches a reference that is scored, or even loaded, for a loss that never reads it."""
    calls, real = [], simpo.score
    monkeypatch.setattr(simpo, "train", lambda *_: calls.append("train"))
    monkeypatch.setattr(simpo, "score", lambda *a, **k: calls.append(a[0]) or real(*a, **k))
    run(place / "llama", place / "nine.jsonl", tmp_path / "out", "--loss", name)
    assert (calls[0] != "train") == (name in REFERENCED)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dpo_starts_at_ln_2_with_dropout_in_the_config_and_shuffled_pairs(name, place, tmp_path):
    """Catches dropout in training, and reference scores that belong to another row."""
    model = (
        make_llama(attention_dropout=0.5)
        if name == "llama"
        else make_gpt2(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    )
    write_model(tmp_path / name, model)
    flags = ["--loss", "dpo", "--beta", 0.1, "--batch_size", 2, "--epochs", 2, *STILL]
    flags += ["--eval_dataset", place / "seven.jsonl"]
    _, rows = run(tmp_path / name, place / "nine.jsonl", tmp_path / "out", *flags)
    losses = [row["loss"] for row in steps_of(rows) + evaluations_of(rows)]
    assert len(losses) == 2 * 5 + 2
    assert losses == pytest.approx([math.log(2)] * len(losses), abs=1e-6)


@pytest.mark.parametrize("loss", simpo.OBJECTIVES)
def test_every_objective_lowers_its_own_loss(loss, place, tmp_path):
    """Catches an objective with the wrong sign, or one that no gradient reaches."""
    flags = ["--loss", loss, "--lr", 1e-3, "--batch_size", 9, "--epochs", 8]
    _, rows = run(place / "llama", place / "nine.jsonl", tmp_path / "out", *flags)
    losses = [row["loss"] for row in steps_of(rows)]
    assert len(losses) == 8 and all(map(math.isfinite, losses))
    assert losses[-1] < losses[0] - 1e-3


# ========================================================================= training: the machinery
TIMINGS = {"step_seconds", "pairs_per_second", "tokens_per_second", "peak_memory_gib"}
# 9 pairs, 4 to a batch: the third step has a single pair, and with two processes one has none.
FOURS = ["--batch_size", 4, "--lr", 1e-3, "--max_grad_norm", 0.5, "--warmup_ratio", 0.4]
CUTS = {
    "one pair at a time": ["--micro_batch_size", 1],
    "two pairs at a time": ["--micro_batch_size", 2],
    "by tokens": ["--micro_batch_tokens", 90],
    "with gradient checkpointing": ["--micro_batch_size", 2, "--gradient_checkpointing"],
}


@pytest.fixture(scope="session", params=["simpo", "sft", "kto"])
def in_fours(request, place):
    """One objective, trained with four pairs in one pass, and by two processes: its name, its
    flags and the two folders."""
    loss, flags = request.param, [*FOURS, "--loss", request.param]
    flags += ["--eval_dataset", place / "seven.jsonl"]
    if loss == "kto":
        flags += ["--ref_model", write_model(place / "other", make_gpt2())]
    one, two = place / f"one_{loss}", place / f"two_{loss}"
    run(place / "llama", place / "nine.jsonl", one, *flags, "--micro_batch_size", 4)
    source = ["--model", place / "llama", "--dataset", place / "nine.jsonl"]
    micro = {"simpo": 1, "sft": 2, "kto": 1}[loss]  # with and without accumulation
    shown = place / f"shown_{loss}"
    source += ["--output_dir", two, "--micro_batch_size", micro]
    started = start(2, shown, *source, *flags)
    assert codes(started) == [0, 0], shown.read_text()[-3000:]
    return loss, flags, one, two


def untimed_rows(out):
    return [{k: x for k, x in row.items() if k not in TIMINGS} for row in read_metrics(out)]


def assert_same_training(one, two):
    """The same rows of metrics.jsonl, timings apart, and the same weights."""
    rows_one, rows_two = untimed_rows(one), untimed_rows(two)
    assert len(rows_one) == len(rows_two)
    for row_one, row_two in zip(rows_one, rows_two):
        assert row_one == pytest.approx(row_two, rel=1e-5, abs=1e-6)
    weights_one, weights_two = (load_file(out / "model.safetensors") for out in (one, two))
    assert weights_one.keys() == weights_two.keys()
    for name in weights_one:
        torch.testing.assert_close(weights_one[name], weights_two[name], rtol=0, atol=2e-6)


@pytest.mark.parametrize("cut", CUTS)
def test_how_a_batch_is_cut_changes_nothing(cut, in_fours, place, tmp_path):
    """Catches a loss that is not divided by the number of accumulated passes, or divided twice."""
    _, flags, one, _ = in_fours
    run(place / "llama", place / "nine.jsonl", tmp_path / "out", *flags, *CUTS[cut])
    assert_same_training(one, tmp_path / "out")


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("share_prompt", [False, True])
def test_passes_hold_every_pair_once_and_no_more_tokens_than_allowed(
    processes, share_prompt, monkeypatch
):
    """Catches processes that wait for each other's pass, lost pairs, and memory without bound."""
    monkeypatch.setattr(simpo, "WORLD_SIZE", processes)
    rng, config = random.Random(5), simpo.Config(micro_batch_tokens=300)
    for count in (1, 2, 7, 40):
        sizes = [[rng.randint(1, n) for n in (90, 60, 60)] for _ in range(count)]
        sizes[0] = [200, 80, 90]  # more than the budget: a pass of its own
        cut = simpo.passes(torch.tensor(sizes), share_prompt, config)
        assert sorted(i for hands in cut for hand in hands for i in hand) == [*range(count)]
        assert all(len(hand) == processes for hands in cut for hand in hands[:-1])
        for hands, rank in ((hands, rank) for hands in cut for rank in range(processes)):
            mine = [sizes[hand[rank]] for hand in hands if rank < len(hand)]
            packed = sum(sum(size) for size in mine)
            rows = 2 * len(mine) * max((p + max(c, r) for p, c, r in mine), default=0)
            assert (packed if share_prompt else rows) <= 300 or len(mine) == 1


def test_two_processes_train_exactly_what_one_does(in_fours):
    """Catches gradients and metrics of rank 0 alone, and a batch that grows with the processes."""
    *_, one, two = in_fours
    assert len(steps_of(read_metrics(two))) == 3
    assert_same_training(one, two)


@pytest.mark.parametrize("make_model", [make_llama, make_tied_llama])
def test_a_model_spread_over_processes_trains_as_one_that_is_whole(make_model, place, tmp_path):
    """Catches gradients of a shard that are scaled or lost, and a half or doubly saved model.
    Once with torchrun itself."""
    write_model(tmp_path / "model", make_model())
    run(tmp_path / "model", place / "nine.jsonl", tmp_path / "one", *FOURS)
    source = ["--model", tmp_path / "model", "--dataset", place / "nine.jsonl", *FOURS]
    source += ["--micro_batch_size", 1, "--gradient_checkpointing", "--shard"]
    source += ["--output_dir", tmp_path / "two"]
    if make_model is make_llama:
        done = torchrun(2, *source)
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        assert codes(start(2, tmp_path / "shown", *source)) == [0, 0]
    assert_same_training(tmp_path / "one", tmp_path / "two")


def start_group_of_one():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


@pytest.fixture
def process_group():
    """What a process alone with a GPU has: a group of one, and so FSDP."""
    start_group_of_one()
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_a_process_alone_with_a_gpu_trains_as_one_without(place, tmp_path, process_group):
    """Catches weights, saved or trained, that differ where FSDP holds them."""
    flags = [*FOURS, "--micro_batch_size", 2]
    run(place / "llama", place / "nine.jsonl", tmp_path / "fsdp", *flags)
    assert not torch.distributed.is_initialized()
    run(place / "llama", place / "nine.jsonl", tmp_path / "plain", *flags)
    assert_same_training(tmp_path / "plain", tmp_path / "fsdp")


def test_a_process_alone_with_a_gpu_goes_on_from_what_one_without_has_saved(
    place, tmp_path, process_group, disturb
):
    """Catches a checkpoint that takes a group of one for no group."""
    source, out = [place / "llama", place / "nine.jsonl"], tmp_path / "out"
    disturb("nn.utils.clip_grad_norm_", 1, stop)
    run(*source, out, *FOURS)  # the group of one ends with it
    disturb("nn.utils.clip_grad_norm_", 1, stop)
    run(*source, out, *FOURS, "--resume")
    assert [path.name for path in simpo.checkpoints(out)] == ["checkpoint-2", "checkpoint-1"]
    start_group_of_one()
    run(*source, out, *FOURS, "--resume")
    run(*source, tmp_path / "plain", *FOURS)
    assert_same_training(tmp_path / "plain", out)


def test_gradients_of_bf16_weights_are_summed_in_fp32():
    """Catches a sum of 300 small gradients in bf16, which stops growing at 256 of them."""
    policy = torch.nn.Linear(1, 1, bias=False)
    exact = policy.weight.detach().clone()
    (master,) = simpo.cast_weights(policy)
    for _ in range(300):
        policy(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
    assert policy.weight.dtype == torch.bfloat16 and policy.weight.grad is None
    assert master.grad.item() == 300.0 and master.dtype == torch.float32
    assert torch.equal(master, exact) and torch.equal(policy.weight, exact.bfloat16())


def test_bf16_steps_are_those_of_adamw_on_fp32_weights(place, tmp_path, monkeypatch):
    """Catches a copy in bf16 that is not renewed, or that the optimizer takes for the weights."""
    seen, gradients, cast_weights = {}, [], simpo.cast_weights

    def spy(policy):
        seen["policy"], seen["start"] = policy, [x.detach().clone() for x in policy.parameters()]
        return cast_weights(policy)

    def clip(weights, *_):  # instead of clipping: take down the gradients of this step
        gradients.append([weight.grad.clone() for weight in weights])
        for used, weight in zip(seen["policy"].parameters(), weights):
            assert torch.equal(used, weight.bfloat16())  # of the step before
        return torch.tensor(1.0)

    monkeypatch.setattr(simpo, "cast_weights", spy)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    flags = ["--dtype", "bf16", "--batch_size", 4, "--lr", 1e-3, "--micro_batch_size", 2]
    _, rows = run(place / "llama", place / "nine.jsonl", tmp_path / "out", *flags)
    optimizer = torch.optim.AdamW(seen["start"], 1e-3, weight_decay=0.0, fused=True)
    for row, grads in zip(steps_of(rows), gradients, strict=True):
        optimizer.param_groups[0]["lr"] = row["lr"]
        for weight, grad in zip(seen["start"], grads):
            weight.grad = grad
        optimizer.step()
    saved = load_file(tmp_path / "out" / "model.safetensors")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.float32  # config.json says so
    names = [name for name, _ in make_llama().named_parameters()]
    for name, weight in zip(names, seen["start"], strict=True):
        assert torch.equal(saved[name], weight), name  # bit by bit


@pytest.mark.parametrize("flags", [[], ["--shard"]], ids=str)
def test_a_model_too_big_for_the_device_is_refused_with_what_to_do(flags, mistake, monkeypatch):
    """Catches an out-of-memory traceback after minutes of loading."""
    monkeypatch.setattr("os.sysconf", lambda name: 1 << 9)  # a machine of 512 pages of 512 bytes
    line = mistake(*flags)
    assert "--model" in line and "GiB" in line
    assert ("more processes" if flags else "--shard") in line


@SLOW
def test_compiled_layers_train_as_they_are_written(place, tmp_path):
    """Catches a compiled layer that ignores the plan of a packed row."""
    for name, flags in {"plain": [], "compiled": ["--compile"]}.items():
        run(place / "llama", place / "nine.jsonl", tmp_path / name, *FOURS, *flags)
    assert_same_training(tmp_path / "plain", tmp_path / "compiled")


def test_an_evaluation_on_two_processes_is_the_mean_over_all_pairs(in_fours):
    """Catches a mean of means and pairs that are counted twice: 7 pairs do not halve evenly."""
    loss, _, _, two = in_fours
    trained = transformers.AutoModelForCausalLM.from_pretrained(two)
    for metrics, model in zip(evaluations_of(read_metrics(two)), (make_llama(), trained)):
        pairs = [slow_answers(model, make_gpt2(), row) for row in SEVEN]
        by_hand = metrics_by_hand(loss, pairs, **HYPER[loss])["loss"]
        assert metrics["loss"] == pytest.approx(by_hand, rel=1e-5)
    losses = [step["loss"] for step in steps_of(read_metrics(two))]
    assert len({f"{loss:.3f}" for loss in losses}) == 3  # the weights did change


def test_a_smaller_last_batch_is_divided_by_its_own_number_of_pairs(place, tmp_path):
    """Catches a last batch of 2 divided by 4: ten equal pairs must give three equal gradients."""
    data = write_jsonl(tmp_path / "equal.jsonl", [NINE[3]] * 10)
    flags = ["--batch_size", 4, "--micro_batch_size", 2, *STILL]
    _, rows = run(place / "llama", data, tmp_path / "out", *flags)
    first, second, third = steps_of(rows)
    model = make_llama()
    prompt, *answers = ids_by_hand(NINE[3], make_tokenizer())
    averages = []
    for answer in answers:
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        averages.append(-F.cross_entropy(logits, torch.tensor(answer)))
    F.softplus(-(2.5 * averages[0] - 2.5 * averages[1] - 1.4)).backward()
    norm = math.sqrt(sum((p.grad**2).sum().item() for p in model.parameters()))
    assert [row["grad_norm"] for row in (first, second, third)] == pytest.approx([norm] * 3)
    assert third["loss"] == pytest.approx(first["loss"])


def test_each_epoch_sees_every_pair_once_in_an_order_of_its_own(place, tmp_path):
    """Catches pairs that are left out, seen twice, or never shuffled."""
    flags = ["--batch_size", 1, "--epochs", 2, *STILL]
    _, rows = run(place / "llama", place / "nine.jsonl", tmp_path / "out", *flags)
    losses = [row["loss"] for row in steps_of(rows)]
    averages = [slow_averages(make_llama(), make_tokenizer(), row) for row in NINE]
    in_file_order = [simpo_by_hand([pair])["loss"] for pair in averages]
    first, second = losses[:9], losses[9:]
    assert len(losses) == 18
    assert sorted(first) == pytest.approx(sorted(in_file_order), rel=1e-5)
    assert sorted(second) == pytest.approx(sorted(in_file_order), rel=1e-5)
    assert first != pytest.approx(in_file_order, rel=1e-5)
    assert second != pytest.approx(first, rel=1e-5)


def test_the_learning_rate_warms_up_and_falls_as_a_cosine(place, tmp_path):
    """Catches a schedule that is a step off, or whose length is not that of the run."""
    flags = ["--batch_size", 1, "--max_steps", 8, "--warmup_ratio", 0.25, "--lr", 1e-3]
    _, rows = run(place / "llama", place / "nine.jsonl", tmp_path / "out", *flags)
    rates = [0.0, 0.5, *(0.5 + 0.5 * math.cos(math.pi * k / 6) for k in range(6))]
    assert [row["lr"] for row in steps_of(rows)] == pytest.approx([1e-3 * x for x in rates])


def test_a_bf16_checkpoint_moves_at_the_papers_learning_rate(place, tmp_path):
    """Catches weights kept in bf16: they are too coarse for steps of 1e-6, and stay as they are."""
    model = make_llama(initializer_range=0.02).bfloat16()
    write_model(tmp_path / "bf16", model)
    flags = ["--lr", 1e-6, "--warmup_ratio", 0, "--max_steps", 1]
    _, rows = run(tmp_path / "bf16", place / "nine.jsonl", tmp_path / "out", *flags)
    assert steps_of(rows)[0]["lr"] == 1e-6
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("bf16", "out"))
    assert {w.dtype for w in before.values()} == {torch.bfloat16}
    changed = torch.cat([(after[k].float() != before[k].float()).flatten() for k in before])
    rows_without_gradient = sum(  # the embeddings of letters that no pair contains
        (after[k].float() == before[k].float()).all(1).sum() * before[k].shape[1]
        for k in before
        if "embed" in k
    )
    assert changed.sum() > 0.95 * (len(changed) - rows_without_gradient)


# ========================================================================= bad numbers
def poisoned_model(folder):
    """A model whose vector of "~" is not a number: rows with that letter have no finite loss."""
    model, tokenizer = make_llama(), make_tokenizer()
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.encode("~")] = math.nan
    return write_model(folder, model, tokenizer)


def test_a_step_that_is_not_finite_is_skipped_and_names_its_rows(tmp_path, capsys):
    """Catches one bad pair that turns every weight into NaN while the log goes on."""
    data = write_jsonl(tmp_path / "data.jsonl", [*NINE[:4], chat("~", "a", "b"), *NINE[4:]])
    model = poisoned_model(tmp_path / "poisoned")
    flags = ["--batch_size", 1, "--lr", 1e-3]
    _, rows = run(model, data, tmp_path / "out", *flags)
    assert [row["skipped_rows"] for row in rows if "skipped_rows" in row] == [[5]]
    assert len(steps_of(rows)) == 9
    assert all(math.isfinite(row["loss"]) for row in steps_of(rows))
    assert re.search(r"skipped.*\b5\b", capsys.readouterr().out)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    bad = {name: (~w.isfinite()).sum().item() for name, w in weights.items()}
    assert {name: n for name, n in bad.items() if n} == {"model.embed_tokens.weight": 32}


def test_the_good_rows_of_a_skipped_batch_are_not_blamed(tmp_path):
    """Catches a report that sends the reader to rows with which nothing is wrong."""
    data = write_jsonl(tmp_path / "data.jsonl", [*NINE[:2], chat("~", "a", "b"), NINE[3]])
    out = tmp_path / "out"
    _, rows = run(poisoned_model(tmp_path / "poisoned"), data, out, "--batch_size", 4)
    assert [row.get("skipped_rows") for row in rows] == [[3]]


def test_ten_bad_steps_in_a_row_end_the_run(tmp_path, mistake):
    """Catches a run that goes on for days with nothing left to learn."""
    data = write_jsonl(tmp_path / "data.jsonl", [chat(f"~{i}", "a", "b") for i in range(12)])
    model = poisoned_model(tmp_path / "poisoned")
    assert "row" in mistake("--model", model, "--dataset", data, "--batch_size", 1)
    assert [list(row) for row in read_metrics(tmp_path / "out")] == [["step", "skipped_rows"]] * 10


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_empty_and_roomless_pairs_are_dropped_and_counted(side, place, tmp_path):
    """Catches 0/0: the average over an answer of length 0 makes the loss and all weights NaN."""
    empty = chat("Hi", "a", "b") | {side: [{"role": "assistant", "content": ""}]}
    endless = chat("p" * 200, "a", "b")
    data = write_jsonl(tmp_path / "data.jsonl", [empty, *NINE, endless, chat("Hi", "a", "a")])
    flags = ["--max_length", 64, "--max_prompt_length", 64, "--batch_size", 3, "--lr", 1e-3]
    _, rows = run(place / "llama", data, tmp_path / "out", *flags)
    assert [row["dropped_pairs"] for row in steps_of(rows)] == [3] * 3  # 9 pairs are left
    assert all(math.isfinite(x) for row in rows for x in row.values())
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert all(w.isfinite().all() for w in weights.values())


# ========================================================================= what it writes
def test_metrics_have_a_row_for_each_logged_step_and_evaluation(place, tmp_path):
    """Catches missing keys, and a last, partial logging window that is never written."""
    flags = ["--batch_size", 2, *STILL, "--eval_dataset", place / "seven.jsonl"]
    source = place / "llama", place / "nine.jsonl"
    _, each = run(*source, tmp_path / "each", *flags)
    _, rows = run(*source, tmp_path / "twos", *flags, "--log_every", 2, "--eval_every", 2)
    assert [row["step"] for row in steps_of(each)] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in steps_of(rows)] == [2, 4, 5]
    assert [row["step"] for row in rows if "eval/loss" in row] == [0, 2, 4, 5]
    rewards = {f"rewards/{x}" for x in ("chosen", "rejected", "margins", "accuracies")}
    scores = {"loss", "logps/chosen", "logps/rejected", *rewards}
    for row in steps_of(rows):
        assert row.keys() >= scores | TIMINGS | {"epoch", "grad_norm", "lr"}
        assert all(row[name] > 0 for name in TIMINGS)
    for metrics in evaluations_of(rows):
        assert metrics.keys() >= scores
    losses = [row["loss"] for row in steps_of(each)]
    expected = [losses[1], losses[3], losses[4]]  # a row speaks of its step
    assert [row["loss"] for row in steps_of(rows)] == pytest.approx(expected)
    assert steps_of(rows)[-1]["epoch"] == pytest.approx(1.0)


def test_the_saved_model_is_the_trained_one_in_a_fresh_process(place, tmp_path):
    """Catches saved weights, template or generation settings that are not those of training."""
    model = make_llama()
    model.generation_config.eos_token_id = [3, 6]
    model.generation_config.max_new_tokens = 77
    write_model(tmp_path / "start", model)
    flags = ["--lr", 1e-3, "--batch_size", 3, "--eval_dataset", place / "seven.jsonl"]
    out = tmp_path / "trained"
    last, rows = run(tmp_path / "start", place / "nine.jsonl", out, *flags)
    assert abs(evaluations_of(rows)[0]["loss"] - last["eval/loss"]) > 0.01  # the model changed
    again = ["--model", out, "--dataset", place / "nine.jsonl", "--output_dir", tmp_path / "again"]
    assert codes(start(1, tmp_path / "shown", *again, *flags)) == [0]
    reloaded = evaluations_of(read_metrics(tmp_path / "again"))[0]
    last = {name[5:]: x for name, x in last.items()}
    assert reloaded.pop("chosen_drift") == 0 != last.pop("chosen_drift")  # counted from the start
    assert reloaded == pytest.approx(last, rel=1e-5, abs=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template == CHATML
    settings = transformers.GenerationConfig.from_pretrained(out)
    assert settings.eos_token_id == [3, 6] and settings.max_new_tokens == 77


def test_the_record_of_the_run_has_every_setting(place, tmp_path):
    """Catches a run that nobody can repeat, because a default went unrecorded."""
    out = tmp_path / "out"
    run(place / "llama", place / "nine.jsonl", out, "--lr", 2e-6, "--seed", 5)
    text = (out / "simpo_run.json").read_text()

    def leaves(tree):
        for key, value in tree.items():
            yield from leaves(value) if isinstance(value, dict) else [(key, value)]

    record = dict(leaves(json.loads(text)))
    expected = {"loss": "simpo", "beta": 2.5, "gamma": 1.4, "lr": 2e-6, "seed": 5}
    assert {name: record[name] for name in expected} == expected
    assert torch.__version__ in text and transformers.__version__ in text
    assert transformers.AutoConfig.from_pretrained(out).model_type == "llama"  # not overwritten


def test_the_name_of_a_folder_does_not_choose_the_template(place, tmp_path):
    """Catches decisions by name: a path with "mistral" in it would be rendered another way."""
    losses = {"chatml": set(), "llama3": set()}
    for style, seen in losses.items():
        for name in ("mistral-7b", "Meta-Llama-3-8B-Instruct", "qwen2.5-gemma"):
            folder = write_model(tmp_path / style / name, tokenizer=STYLES[style].make())
            _, rows = run(
                folder, place / "nine.jsonl", tmp_path / style / "out", "--overwrite", *STILL
            )
            seen.add(steps_of(rows)[0]["loss"])
    assert [len(seen) for seen in losses.values()] == [1, 1]
    assert losses["chatml"] != losses["llama3"]


def inspected(monkeypatch, capsys, model, data, *flags):
    """What --inspect prints from the first pair on."""
    argv = ["--model", model, "--dataset", data, "--inspect", 99, *flags]
    code, out, err = command_line(monkeypatch, capsys, *argv)
    assert code == 0, err
    return "".join(line for line in out.splitlines(True) if str(data) not in line)


def test_a_bad_row_among_many_is_named_by_the_workers_that_tokenize_in_parallel(place, tmp_path):
    """Catches an error that loses its text on the way from a worker process."""
    rows = [texts(f"{i}", "a", "b") for i in range(1200)]
    data = write_jsonl(tmp_path / "many.jsonl", [*rows[:1100], rows[0] | {"chosen": None}, *rows])
    shown = tmp_path / "shown"
    assert codes(start(1, shown, "--model", place / "llama", "--dataset", data)) == [2]
    assert "row 1101: 'chosen' is None" in shown.read_text()


def test_a_run_of_one_step_has_the_full_learning_rate(place, tmp_path):
    """Catches a warm-up that starts at 0 and, with few pairs, trains nothing without a word."""
    _, rows = run(place / "llama", place / "nine.jsonl", tmp_path / "out", "--lr", 1e-3)
    assert [row["lr"] for row in steps_of(rows)] == [1e-3]


def test_inspect_marks_the_scored_tokens_and_writes_nothing(place, tmp_path, monkeypatch, capsys):
    """Catches a reader who cannot see what is scored, colour codes in a file, stray output."""
    monkeypatch.chdir(tmp_path)
    shown = inspected(monkeypatch, capsys, place / "llama", place / "nine.jsonl")
    assert "\033" not in shown
    for row in NINE:
        prompt = row["prompt"][0]["content"]
        assert f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n" in shown
        for side in ("chosen", "rejected"):
            answer = re.escape(row[side][0]["content"])
            assert re.search(rf"[\[{{<]+{answer}<\|im_end\|>[\]}}>]+\n", shown)
    assert list(tmp_path.iterdir()) == []


def test_all_file_formats_give_the_same_pairs(place, tmp_path, monkeypatch, capsys):
    """Catches a format whose rows are read in another way, or lose their line breaks."""
    formats = ["jsonl", "json", "parquet", "folder"]
    for rows, kinds in ((PLAIN, [*formats, "csv"]), (NINE, formats)):
        table, seen = datasets.Dataset.from_list(rows), []
        for kind in kinds:
            path = tmp_path / f"{len(rows)}.{kind}"
            if kind == "jsonl":
                write_jsonl(path, rows)
            elif kind == "json":
                path.write_text(json.dumps(rows, indent=1))
            else:
                save = {"parquet": table.to_parquet, "csv": table.to_csv}
                save.get(kind, table.save_to_disk)(path)
            seen.append(inspected(monkeypatch, capsys, place / "llama", path))
        assert set(seen) == {seen[0]}
        for row in rows:
            answer = row["chosen"] if rows is PLAIN else row["chosen"][0]["content"]
            assert answer + "<|im_end|>" in seen[0]


def test_a_file_is_read_under_its_own_name_alone(place, tmp_path, monkeypatch, capsys):
    """Catches a name with brackets that is taken for a pattern, and so for another file's name."""
    write_jsonl(tmp_path / "a[1].jsonl", PLAIN[:1])
    write_jsonl(tmp_path / "a1.jsonl", PLAIN[1:3])
    shown = inspected(monkeypatch, capsys, place / "llama", tmp_path / "a[1].jsonl")
    assert PLAIN[0]["prompt"] in shown and PLAIN[1]["prompt"] not in shown


def test_cells_of_a_csv_stay_texts(place, tmp_path, monkeypatch, capsys):
    """Catches a column of answers like 4 and None that becomes numbers and nulls."""
    path = tmp_path / "cells.csv"
    path.write_text("prompt,chosen,rejected\n2+2=,4,5\n1-1=,0,None\n")
    shown = inspected(monkeypatch, capsys, place / "llama", path)
    assert all(f"[[{answer}<|im_end|>]]" in shown for answer in ("4", "5", "0", "None"))


def test_splits_of_a_saved_dataset_are_told_apart(place, tmp_path, monkeypatch, capsys):
    """Catches held-out pairs that are trained on."""
    splits = {"train": datasets.Dataset.from_list(PLAIN[:3])}
    splits["test"] = datasets.Dataset.from_list(PLAIN[3:])
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")
    for flags, expected in (([], PLAIN[:3]), (["--train_split", "test"], PLAIN[3:])):
        shown = inspected(monkeypatch, capsys, place / "llama", tmp_path / "both", *flags)
        for row in PLAIN:
            assert (row["prompt"] in shown) == (row in expected)


# ========================================================================= faults
KILLS = 34 if LONG_MODE else 7  # of each kind of run


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "nothing has happened for a minute"
        time.sleep(0.002)


def assert_same_bits(one, two):
    """The same weights, bit by bit, and the same rows of metrics.jsonl, timings apart."""
    assert untimed_rows(one) == untimed_rows(two)
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


# 9 pairs in fours: a smaller last batch, on two processes a pass that one of them has no pair for;
# checkpoints on both sides of an epoch's end; a reference that is not the policy of any step.
LONG = ["--batch_size", 4, "--epochs", 8, "--lr", 1e-3, "--save_every", 2, "--eval_every", 5]
LONG += ["--loss", "dpo", "--beta", 0.5]
KINDS = {"one process": (1, []), "two": (2, []), "two, sharded": (2, ["--shard"])}


def long_run(place, out, *flags):
    sets = ["--dataset", place / "nine.jsonl", "--eval_dataset", place / "seven.jsonl"]
    return ["--model", place / "llama", *sets, *LONG, "--output_dir", out, *flags]


def go(place, out, *flags):
    return simpo.main([str(x) for x in long_run(place, out, *flags)])


@pytest.fixture(scope="session", params=KINDS)
def never_killed(request, place, tmp_path_factory):
    """A kind of run, and the folder of one that nothing has happened to."""
    processes, flags = KINDS[request.param]
    out = tmp_path_factory.mktemp("never_killed") / "out"
    started = start(processes, out.parent / "shown", *long_run(place, out, *flags))
    assert codes(started) == [0] * processes, (out.parent / "shown").read_text()
    assert len(steps_of(read_metrics(out))) == 24
    return processes, flags, out


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(
    never_killed, place, tmp_path, capsys
):
    """Catches state that is not saved, or is saved in two places of which one is older. At random
    moments, most of them in training, kill -9 ends all processes or one, and then torchrun's
    SIGTERM comes to the others, which must end."""
    processes, flags, expected = never_killed
    rng, shown, kills, whole_runs = random.Random(1), tmp_path / "shown", 0, 0
    while kills < KILLS or not whole_runs:
        out = tmp_path / f"out{whole_runs}"
        record = out / "simpo_run.json"  # written when training starts
        record.unlink(missing_ok=True)
        started, killed = start(processes, shown, *long_run(place, out, *flags, "--resume")), []
        if kills < KILLS:
            if in_training := rng.random() < 0.8:
                wait_for(lambda record=record, runs=started: record.exists() or any(codes(runs, 0)))
            time.sleep(rng.uniform(0, 0.25 * processes if in_training else 1.5))
            killed = [p for p in rng.choice([started, started[-1:]]) if p.is_alive()]
            for process in killed:
                process.kill()
            codes(killed)
            codes(started, 1)
            for process in started:
                process.terminate()
        ended = codes(started)
        assert None not in ended, "a process waits for one that is dead"
        assert set(ended) == {0} or killed, shown.read_text()[-3000:]
        kills += set(ended) != {0}
        if (out / "config.json").exists():  # it was ready, even if killed after that
            assert_same_bits(expected, out)
            whole_runs += 1
    text = shown.read_text()
    assert "Traceback" not in text and "damaged" not in text
    resumed = len(re.findall("^resumed ", text, re.MULTILINE))
    with capsys.disabled():
        print(f"\n{kills} kills, {resumed} resumed, {whole_runs} whole runs; {processes} {flags}")


@pytest.fixture(scope="session")
def undisturbed(place, tmp_path_factory):
    """The folder of a long run to which nothing happens."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    go(place, out)
    return out


STOPS = {  # where the signal comes -> (before which call of what, the step after which it ends)
    "in the first evaluation": ("score", 3, 0),  # after the reference's two sets
    "in the first step": ("nn.utils.clip_grad_norm_", 1, 1),
    "in an epoch's last step": ("nn.utils.clip_grad_norm_", 3, 3),
    "in a step before an evaluation": ("nn.utils.clip_grad_norm_", 5, 5),
    "in an evaluation": ("score", 9, 5),
    "while a checkpoint is written": ("dcp.save", 3, 6),
    "in the last step": ("nn.utils.clip_grad_norm_", 24, 24),
    "in the last evaluation": ("score", 32, 24),
    "while the model is written": ("save", 1, None),  # it ends as usual
}


@pytest.mark.parametrize("where", STOPS)
def test_a_signal_ends_a_run_after_the_step_and_it_resumes_to_the_same_bits(
    where, place, tmp_path, undisturbed, disturb, capsys
):
    """Catches a step done half or twice, a row of metrics lost or repeated, a reference that is no
    longer the starting model, and a signal that is lost or kills while something is written."""
    name, call, step = STOPS[where]
    number = (signal.SIGINT, signal.SIGTERM)[[*STOPS].index(where) % 2]
    usual = [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)]
    disturb(name, call, lambda: os.kill(os.getpid(), number))
    last, shown = go(place, tmp_path / "out"), capsys.readouterr().out
    assert (last == {}) == (step is not None) == ("--resume" in shown)
    if step is not None:
        assert f"stopped      after step {step} of 24" in shown
        assert not (tmp_path / "out" / "config.json").exists()  # no model yet
        assert len(steps_of(read_metrics(tmp_path / "out"))) == step
        assert go(place, tmp_path / "out", "--resume")
    assert_same_bits(undisturbed, tmp_path / "out")
    assert [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)] == usual


def test_a_signal_between_an_evaluation_and_ktos_estimate_repeats_no_row(place, tmp_path, disturb):
    """Catches a stop in the midst of a step, at which an evaluation is logged and not yet saved."""
    flags, out = ["--loss", "kto", "--beta", 0.1, "--eval_every", 2], tmp_path / "out"
    flags += ["--save_every", 0]  # or the step before were saved already, without the evaluation
    # Two of the reference; then two for each evaluation and step, the second for the estimate.
    disturb("score", 2 + 2 * (1 + 2 + 1) + 2, stop)  # that of step 3, after evaluation 2
    go(place, out, *flags)
    go(place, out, *flags, "--resume")
    steps = [row["step"] for row in read_metrics(out) if "eval/loss" in row]
    assert steps == [*range(0, 25, 2)]


def test_two_processes_go_on_from_what_one_has_saved_and_the_other_way_round(
    place, tmp_path, disturb
):
    """Catches checkpoints that only fit the number of processes that made them."""
    out, shown, slow = tmp_path / "out", tmp_path / "shown", ["--beta", 0.05]  # less to round
    go(place, tmp_path / "undisturbed", *slow)
    disturb("nn.utils.clip_grad_norm_", 5, stop)
    go(place, out, *slow)
    for flags in (["--shard"], []):  # each stops after three steps, or a few more
        before = len(steps_of(read_metrics(out)))
        started = start(2, shown, *long_run(place, out, "--resume", *slow, *flags))
        wait_for(lambda least=before + 3: len(steps_of(read_metrics(out))) >= least)
        for process in started:
            os.kill(process.pid, signal.SIGTERM)
        assert codes(started) == [0, 0], shown.read_text()[-3000:]
    assert not (out / "config.json").exists(), "it was not stopped, but has ended"
    go(place, out, "--resume", *slow)
    assert_same_training(tmp_path / "undisturbed", out)


def test_a_step_that_is_saved_is_not_saved_again(place, tmp_path, disturb):
    """Catches the only checkpoint, removed for its own copy when the machine goes down."""

    def never():
        raise AssertionError

    disturb("nn.utils.clip_grad_norm_", 2, stop)
    disturb("dcp.save", 2, never)
    assert go(place, tmp_path / "out", "--save_every", 2, "--keep_checkpoints", 1) == {}


def test_the_newest_checkpoints_are_kept(place, tmp_path, disturb):
    """Catches a disk that fills up, and a number that is compared as a text: 8 after 22."""
    out = tmp_path / "out"
    go(place, out, "--keep_checkpoints", 3)
    names = {path.name for path in out.iterdir() if path.is_dir()}
    assert names == {"checkpoint-18", "checkpoint-20", "checkpoint-22"}
    disturb("nn.utils.clip_grad_norm_", 3, stop)
    go(place, tmp_path / "rare", "--save_every", 0)
    assert [path.name for path in (tmp_path / "rare").glob("checkpoint-*")] == ["checkpoint-3"]


def flip_a_bit(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


DAMAGES = {
    "cut": lambda path, _: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path, _: path.write_bytes(b""),
    "missing": lambda path, _: path.unlink(),
    "a bit flipped": flip_a_bit,
    "noise": lambda path, rng: path.write_bytes(rng.randbytes(path.stat().st_size)),
}
WOUNDS = 200 if LONG_MODE else 30


def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_used(
    place, tmp_path, undisturbed, disturb, capsys
):
    """Catches weights that are silently wrong, and a run that is lost because one file is."""
    rng, stopped, out = random.Random(2), tmp_path / "stopped", tmp_path / "out"
    disturb("nn.utils.clip_grad_norm_", 23, stop)
    go(place, stopped)
    assert [path.name for path in simpo.checkpoints(stopped)] == ["checkpoint-23", "checkpoint-22"]
    for _ in range(WOUNDS):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(stopped, out)
        damage = rng.choice([*DAMAGES])
        DAMAGES[damage](rng.choice(sorted((out / "checkpoint-23").iterdir())), rng)
        capsys.readouterr()
        go(place, out, "--resume")
        shown = capsys.readouterr().out
        assert "checkpoint-23 is damaged" in shown and "resumed      after step 22" in shown, damage
        assert_same_bits(undisturbed, out)
        assert simpo.checkpoints(out)  # and what is whole is not thrown away for what is not


def test_a_file_that_somebody_else_has_put_into_a_checkpoint_is_no_damage(place, begun, tmp_path):
    """Catches .DS_Store and .nfs files."""
    out = shutil.copytree(begun, tmp_path / "out")
    (out / "checkpoint-1" / ".DS_Store").write_text("x")
    assert go(place, out, "--resume", "--save_every", 0)


def test_a_damaged_checkpoint_does_not_push_out_a_whole_one(place, tmp_path, undisturbed, disturb):
    """Catches "keep the newest" that keeps the damaged one alone."""
    out, flags = tmp_path / "out", ["--save_every", 20, "--keep_checkpoints", 1]
    disturb("nn.utils.clip_grad_norm_", 23, stop)
    go(place, out, "--save_every", 20)
    (out / "checkpoint-23" / "run.json").unlink()
    disturb("nn.utils.clip_grad_norm_", 1, stop)  # the first step after the 20th
    go(place, out, "--resume", *flags)
    assert [path.name for path in simpo.checkpoints(out)] == ["checkpoint-23", "checkpoint-21"]
    go(place, out, "--resume", *flags)
    assert_same_bits(undisturbed, out)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(place, tmp_path, disturb):
    """Catches hours of training that are silently repeated, over the traces of what was lost."""
    out = tmp_path / "out"
    disturb("nn.utils.clip_grad_norm_", 5, stop)
    go(place, out)
    for folder in simpo.checkpoints(out):
        (folder / "run.json").write_text("{}")
    before = (out / "metrics.jsonl").read_text()
    with pytest.raises(simpo.UserError, match="--resume.*no checkpoint in .*out is whole"):
        go(place, out, "--resume")
    assert (out / "metrics.jsonl").read_text() == before


def test_resuming_without_a_checkpoint_starts_the_run(place, tmp_path, undisturbed):
    """Catches a queue's script, the same for every try, that fails at the first."""
    go(place, tmp_path / "out", "--resume")
    assert_same_bits(undisturbed, tmp_path / "out")


@pytest.fixture(scope="session")
def begun(place, tmp_path_factory):
    """The folder of a long run that was stopped."""
    out = tmp_path_factory.mktemp("begun") / "out"
    with pytest.MonkeyPatch.context() as patch:
        before_call(patch, "nn.utils.clip_grad_norm_", 1, stop)
        go(place, out)
    return out


OTHER_RUNS = {  # flags -> what the line must say
    "--batch_size 3": ["--batch_size 4, not 3"],
    "--loss simpo --beta 2": ["--loss dpo, not simpo", "--beta 0.5, not 2.0"],
    "--lr 1e-4 --seed 1": ["--lr 0.001, not 0.0001", "--seed 0, not 1"],
    "--epochs 9": ["--epochs 8, not 9"],
    "--dtype bf16": ["--dtype fp32, not bf16"],
    "--dataset {place}/seven.jsonl": ["pairs of --dataset"],
    "--dataset {place}/letter.jsonl": ["pairs of --dataset"],  # of the same lengths
    "--eval_dataset {place}/nine.jsonl": ["pairs of --eval_dataset"],
    "--max_length 60": ["--max_length 2048, not 60"],
}


@pytest.mark.parametrize("flags", OTHER_RUNS)
def test_a_run_of_other_flags_or_data_does_not_resume(flags, place, begun):
    """Catches a run that is neither the old nor the new one."""
    before = {path: path.stat().st_mtime_ns for path in begun.rglob("*")}
    with pytest.raises(simpo.UserError, match="--resume") as error:
        go(place, begun, "--resume", *flags.format(place=place).split())
    assert [x for x in OTHER_RUNS[flags] if x not in str(error.value)] == []
    assert "\n" not in str(error.value)
    changed = {path for path in begun.rglob("*") if before.get(path) != path.stat().st_mtime_ns}
    assert changed <= {begun / "simpo_run.json"}


def test_a_started_run_is_neither_overwritten_nor_resumed_by_mistake(place, begun, tmp_path):
    """Catches yesterday's training lost to a command that was repeated without --resume."""
    out = shutil.copytree(begun, tmp_path / "out")
    with pytest.raises(simpo.UserError, match="--output_dir .*out .*--resume.*--overwrite"):
        go(place, out)
    go(place, out, "--overwrite", "--save_every", 0, "--max_steps", 2)
    assert not simpo.checkpoints(out) and len(steps_of(read_metrics(out))) == 2
    with pytest.raises(simpo.UserError, match="--resume and --overwrite"):
        go(place, out, "--resume", "--overwrite")


def test_a_run_that_has_ended_is_resumed_by_doing_nothing(place, tmp_path, undisturbed):
    """Catches a queue that starts a finished job again and again, for it seems to fail."""
    out = shutil.copytree(undisturbed, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert go(place, out, "--resume") == {}
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_model_is_not_trained_into_its_own_folder(tmp_path):
    """Catches the starting model, gone when the run is killed."""
    folder = write_model(tmp_path / "model")
    flags = ["--model", folder, "--output_dir", f"{folder}/../model", "--overwrite"]
    with pytest.raises(simpo.UserError, match="--output_dir .* is --model"):
        simpo.main([str(x) for x in (*flags, "--dataset", "x")])
    assert (folder / "config.json").exists()


def test_nothing_is_deleted_before_the_new_run_can_start(place, tmp_path, undisturbed):
    """Catches a model lost to --overwrite for a run that then fails for a typo."""
    out = shutil.copytree(undisturbed, tmp_path / "out")
    before = {path: path.stat().st_size for path in out.rglob("*")}
    for flags in (["--ref_model", tmp_path / "absent"], ["--wandb", "x"]):
        with pytest.raises(simpo.UserError, match=flags[0]):
            go(place, out, "--overwrite", *flags)
        now = {path: path.stat().st_size for path in out.rglob("*")}
        assert {path for path in before if now.get(path) != before[path]} <= {
            out / "simpo_run.json"
        }


def test_an_overwritten_run_resumes_beside_the_old_model(place, tmp_path, undisturbed, disturb):
    """Catches an old config.json by which the new run, stopped, passes for one that has ended."""
    out = shutil.copytree(undisturbed, tmp_path / "out")
    disturb("nn.utils.clip_grad_norm_", 3, stop)
    go(place, out, "--overwrite")
    go(place, out, "--resume")
    assert_same_bits(undisturbed, out)


def test_two_runs_do_not_write_into_one_folder(place, tmp_path):
    """Catches metrics and checkpoints of two runs, mixed, when a job was submitted twice."""
    out, shown = tmp_path / "out", tmp_path / "shown"
    first = start(1, shown, *long_run(place, out, "--epochs", 999))
    wait_for(lambda: simpo.checkpoints(out))
    for flags in (["--resume"], ["--overwrite"]):
        with pytest.raises(simpo.UserError, match="--output_dir .*another run"):
            go(place, out, "--epochs", 999, "--save_every", 0, *flags)
    assert first[0].is_alive()
    first[0].kill()  # a dead run keeps nobody out
    first[0].join()
    with pytest.raises(simpo.UserError, match="--epochs 999, not 8"):
        go(place, out, "--resume")


def script_on_a_small_disk(*args):
    """A "disk" that takes no file of more than 60 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
    script(*args)


def test_a_full_disk_costs_checkpoints_but_not_the_run(place, tmp_path, begun, undisturbed):
    """Catches a traceback, half a checkpoint that passes for a whole one, half a model, and a run
    that is given up though only a checkpoint cannot be written."""
    out = shutil.copytree(begun, tmp_path / "out")
    flags = long_run(place, out, "--resume")
    assert codes(start(1, tmp_path / "shown", *flags, target=script_on_a_small_disk)) == [2]
    shown = (tmp_path / "shown").read_text()
    assert "Traceback" not in shown
    assert len(re.findall("warning: there is no checkpoint of step .*large", shown)) == 11
    assert re.search("simpo.py: error: --output_dir .*out.*large", shown), shown
    assert [path.name for path in simpo.checkpoints(out)] == ["checkpoint-1"]
    assert not (out / "config.json").exists()  # the model, 140 kB, was not written
    assert go(place, out, "--resume")  # there is room again
    assert_same_bits(undisturbed, out)


def test_a_stopped_run_that_cannot_be_saved_says_so_and_leaves_no_half(place, tmp_path, disturb):
    """Catches a disk that stays full of what cannot be used, and an exit code of 0 all the same."""

    def full():
        raise OSError(28, "No space left on device")

    disturb("nn.utils.clip_grad_norm_", 3, stop)
    disturb("file_digests", 2, full)  # the checkpoint of step 2 is written, that of step 3 is not
    with pytest.raises(simpo.UserError, match="--output_dir .*nothing saved.*No space left"):
        go(place, tmp_path / "out")
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"metrics.jsonl", "simpo_run.json", "checkpoint-2"}


def test_half_a_model_is_not_taken_for_one(place, tmp_path, disturb):
    """Catches a run that counts as ended though it died while its files were put in place."""

    def full():
        raise OSError(28, "No space left on device")

    disturb("Path.rename", 5, full)
    with pytest.raises(simpo.UserError, match="--output_dir .*no model saved.*No space left"):
        go(place, tmp_path / "out", "--save_every", 0)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    placed = names - {"metrics.jsonl", "simpo_run.json", "unfinished"}
    assert len(placed) == 4 and "config.json" not in placed


@pytest.mark.parametrize("where", ["below a file", "in /proc"])
def test_an_output_folder_that_cannot_be_written_is_told_before_training(where, tmp_path, mistake):
    """Catches a run of hours that ends with a model and no place for it."""
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "x" if where == "below a file" else Path("/proc/simpo")
    line = mistake("--output_dir", out)
    assert f"--output_dir {out}" in line


def test_an_output_folder_that_vanishes_ends_the_run_with_one_line(place, tmp_path, disturb):
    """Catches hours of training towards nothing."""
    out = tmp_path / "out"
    disturb("nn.utils.clip_grad_norm_", 5, lambda: shutil.rmtree(out))
    with pytest.raises(simpo.UserError, match="--output_dir .*out.*No such file"):
        go(place, out)


def test_ctrl_c_before_training_ends_at_once_with_one_line(place, tmp_path):
    """Catches a library that swallows the exception, after which the whole run is trained."""
    rows = [texts(f"question {i}" * 50, "a", f"b {i}") for i in range(20_000)]
    data, shown = write_jsonl(tmp_path / "many.jsonl", rows), tmp_path / "shown"
    started = start(1, shown, "--model", place / "llama", "--dataset", data)
    wait_for(lambda: shown.exists() and "tokenizing" in shown.read_text())
    os.kill(started[0].pid, signal.SIGINT)
    assert codes(started, 5) == [130]
    assert shown.read_text().count("simpo.py: interrupted") == 1
    assert "Traceback" not in shown.read_text()


@pytest.mark.parametrize("flags", [[], ["--shard"]], ids=str)
def test_when_a_process_dies_the_others_end_within_a_minute_and_say_so(flags, place, tmp_path):
    """Catches seven GPUs that wait all night for the eighth. Nobody helps the others here."""
    out, shown = tmp_path / "out", tmp_path / "shown"
    started = start(2, shown, *long_run(place, out, "--epochs", 999, *flags))
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(read_metrics(out)) > 3)
    started[1].kill()
    assert codes(started, 60) == [1, -signal.SIGKILL]
    assert "error: process 0 has lost another" in shown.read_text()
    assert "Traceback" not in shown.read_text()


def test_processes_that_have_read_different_pairs_do_not_start(place, tmp_path):
    """Catches machines with files of different age, on which gradients of other pairs would be
    added up under the names of these."""
    shown, other = tmp_path / "shown", ["--dataset", place / "seven.jsonl"]
    started = start(2, shown, *long_run(place, tmp_path / "out"), last=other)
    assert codes(started[:1]) == [2]
    started[1].terminate()  # as torchrun does
    assert "simpo.py: error: --dataset: " in shown.read_text()
    assert "Traceback" not in shown.read_text()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"metrics.jsonl"}


# ========================================================================= mistakes of the user
def lines_of(*rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def answer_of(content, role="assistant"):
    return chat("Hi", "a", "b") | {"chosen": [{"role": role, "content": content}]}


BETTER = {"question": "Hi", "better": "a", "worse": "b"}
BAD_FILES = {  # name -> (content, what the line must say besides the name)
    "absent.jsonl": (None, []),
    "absent_folder": (None, []),
    "empty.jsonl": ("", ["empty"]),
    "empty_list.json": ("[]", []),
    "blank_lines.jsonl": ("\n\n", []),
    "unknown_ending.txt": (lines_of(*PLAIN), []),
    "broken.jsonl": (lines_of(*NINE[:2], '{"prompt": "Hi'), ["line 3"]),
    "columns.jsonl": (lines_of(BETTER), ["chosen", "rejected", "question", "better", "worse"]),
    "half.jsonl": (lines_of({"prompt": "Hi", "chosen": "a"}), ["rejected", "prompt", "chosen"]),
    "one_side.jsonl": (
        lines_of(*PLAIN, {"prompt": "Hi", "chosen": "a"}),
        ["row 6", "'rejected' is"],
    ),
    "null_content.jsonl": (lines_of(NINE[0], answer_of(None)), ["row 2"]),
    "null_answer.jsonl": (lines_of(PLAIN[0], PLAIN[1] | {"rejected": None}), ["row 2"]),
    "number_contents.jsonl": (lines_of(answer_of(5)), ["row 1"]),
    "number_answers.jsonl": (lines_of(texts("Hi", 1, 2)), ["row 1"]),
    "one_number.jsonl": (lines_of(NINE[0], answer_of(5), NINE[2]), ["row 2"]),
    "user_answers.jsonl": (lines_of(NINE[0], answer_of("a", role="user")), ["row 2"]),
    "promptless.jsonl": (lines_of({"chosen": "a", "rejected": "b"}), ["1", "prompt"]),
    "nothing_left.jsonl": (lines_of(chat("x", "a", "a"), chat("x", "", "b")), ["2", "empty"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_gets_one_line_that_says_where(name, tmp_path, mistake):
    """Catches tracebacks, and messages that leave the user to search for the row."""
    content, words = BAD_FILES[name]
    if content is not None:
        (tmp_path / name).write_text(content)
    line = mistake("--dataset", tmp_path / name)
    assert [word for word in ("--dataset", name, *words) if word not in line] == []


def test_a_bad_file_of_held_out_pairs_is_named_by_its_own_flag(tmp_path, mistake):
    """Catches a message about --dataset that is really about --eval_dataset."""
    line = mistake("--eval_dataset", write_jsonl(tmp_path / "held.jsonl", [answer_of(None)]))
    assert "--eval_dataset" in line and "held.jsonl" in line and "row 1" in line


BAD_FLAGS = {  # flags -> what the line must say besides the first flag
    "--beta 0": ["0"],
    "--beta -1": ["-1"],
    "--label_smoothing 0.7": ["0.7"],
    "--micro_batch_tokens 0": ["0"],
    "--batch_size 0": ["0"],
    "--lr nan": ["nan"],
    "--lr fast": ["fast"],
    "--loss sipmo": ["sipmo", "simpo", "dpo"],
    "--lerning_rate 1e-6": [],
    "--batch 8": [],  # no abbreviations: tomorrow's flag may begin with the same letters
    "--ref_model x": ["simpo"],
    "--warmup_ratio 3": ["3"],
    "--micro_batch_size 0": ["0"],
    "--max_prompt_length 0": ["0"],
    "--tau 0.1": ["simpo", "gamma"],
    "--gamma 1 --loss orpo": ["orpo", "--lambda"],
    "--lambda_w 1 --loss dpo": ["dpo", "beta"],
    "--no_length_norm --loss rrhf": ["rrhf"],
    "--gamma -1": ["-1"],
    "--lr inf": ["inf"],
    "--tau 0 --loss ipo": ["0"],
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_a_bad_flag_gets_one_line_that_names_it(flags, mistake):
    """Catches forty lines of usage, and values that are taken and then mean nothing."""
    line, words = mistake(*flags.split()), [flags.split()[0], *BAD_FLAGS[flags]]
    assert [word for word in words if word not in line] == []


def test_help_names_every_flag_with_its_default_and_its_readers(monkeypatch, capsys):
    """Catches flags without help, and a --beta of which nobody knows whose default it has."""
    code, shown, _ = command_line(monkeypatch, capsys, "--help")
    shown = " ".join(shown.split())
    assert code == 0
    for name, hyper in HYPER.items():
        for flag, default in hyper.items():
            flag = {"lam": "lambda"}.get(flag, flag)  # a word of Python's own
            entry = shown.split(f" --{flag} ")[-1].split(" --")[0]
            assert re.search(rf"\b{name} {default}\b", entry), (name, flag, entry)
    for words in ("--lambda", "--no_length_norm", "(1e-06)", "(128)", "objective:", "training:"):
        assert words in shown


@pytest.mark.parametrize("flags", ["--epochs 2", "--eval_dataset x", "--ref_model x --loss dpo"])
def test_flags_that_the_demo_cannot_read_are_refused(flags, tmp_path, monkeypatch, capsys):
    """Catches a forgotten --model, by which a demo would start with half of the flags ignored."""
    out = tmp_path / "out"
    result = command_line(monkeypatch, capsys, *flags.split(), "--output_dir", out)
    assert flags.split()[0] in the_error(result, out) and "--model" in the_error(result, out)


README = (SCRIPT.parent / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
COMMANDS = re.findall(r"^ {4}.*simpo\.py(.*)$", README, re.MULTILINE)
COMMANDS += re.findall(r"`python simpo\.py (.*?)`", README)


@pytest.mark.parametrize("command", [x for x in COMMANDS if "--help" not in x])
def test_every_command_of_the_readme_is_understood(command, tmp_path, monkeypatch):
    """Catches a README that names flags of yesterday."""
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)
    config = simpo.parse_config(words)
    for flag, value in zip(words, [*words[1:], "--"]):
        if flag.startswith("--") and not value.startswith("--"):
            parsed = getattr(config, flag[2:])
            assert parsed == type(parsed)(value)


def test_the_readmes_ratios_are_gamma_over_beta_of_its_commands():
    """Catches a conversion for users of the official code that is off by a factor."""
    recipes = [re.findall(r"--(?:beta|gamma|lr) (\S+)", x) for x in COMMANDS if "--gamma" in x]
    table = re.findall(
        r"^\| (\S.*) \| (\d\S*) \| (\d\S*) \| (0\.\d+) \| \de-7", README, re.MULTILINE
    )
    assert len(table) == 6
    for _, beta, gamma, ratio in table:
        assert float(ratio) == pytest.approx(float(gamma) / float(beta))
        assert [beta, gamma] in [recipe[:2] for recipe in recipes]


@pytest.mark.parametrize("flag", ["--model", "--dataset"])
def test_model_and_dataset_go_together(flag, tmp_path, monkeypatch, capsys):
    """Catches a forgotten flag that would start the demo instead of the training."""
    out = tmp_path / "out"
    line = the_error(command_line(monkeypatch, capsys, flag, "x", "--output_dir", out), out)
    assert "--model" in line and "--dataset" in line


@pytest.mark.parametrize("name", ["absent", "hollow", "weightless"])
def test_a_bad_model_folder_gets_one_line_that_names_it(name, tmp_path, mistake):
    """Catches tracebacks from deep inside the libraries that load models."""
    folder = tmp_path / name
    if name == "hollow":
        folder.mkdir()
    if name == "weightless":
        write_model(folder)
        (folder / "model.safetensors").unlink()
    line = mistake("--model", folder)
    assert "--model" in line and name in line


def test_messages_without_a_chat_template_are_an_error(tmp_path, mistake):
    """Catches a template that is made up, silently, for a model that never saw it."""
    model = write_model(tmp_path / "base", tokenizer=make_tokenizer(template=None))
    line = mistake("--model", model)
    assert "nine.jsonl" in line and "chat template" in line
    run(model, write_jsonl(tmp_path / "plain.jsonl", PLAIN), tmp_path / "out")  # texts need none


def test_a_model_in_the_output_folder_is_not_overwritten(place, tmp_path, monkeypatch, capsys):
    """Catches yesterday's model lost to a command that was repeated by mistake."""
    out = write_model(tmp_path / "precious")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    argv = ["--model", place / "llama", "--dataset", place / "nine.jsonl", "--output_dir", out]
    code, _, stderr = command_line(monkeypatch, capsys, *argv)
    assert code == 2 and "--overwrite" in stderr and "precious" in stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    run(place / "llama", place / "nine.jsonl", out, "--overwrite", "--lr", 1e-3)
    assert len(steps_of(read_metrics(out))) == 1


def test_a_model_that_scales_its_logits_is_never_scored_wrongly(place, tmp_path):
    """Catches logits that the model divides after its head: either right, or refused."""
    torch.manual_seed(4)
    config = transformers.GraniteConfig(**SHAPE | LLAMA, logits_scaling=8.0)
    model = transformers.GraniteForCausalLM(config).eval()
    write_model(tmp_path / "granite", model)
    try:
        _, rows = run(tmp_path / "granite", place / "nine.jsonl", tmp_path / "out", *STILL)
    except simpo.UserError as error:
        assert "--model" in str(error) and "granite" in str(error)
    else:
        averages = [slow_averages(model, make_tokenizer(), row) for row in NINE]
        expected = simpo_by_hand(averages)["loss"]
        assert steps_of(rows)[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_mistake_ends_a_real_process_with_code_2_and_one_line(place, tmp_path):
    """Catches an exit code of 0 or 1, by which a shell script would take the run for good."""
    data, out = write_jsonl(tmp_path / "bad.jsonl", [NINE[0], answer_of(None)]), tmp_path / "out"
    argv = ["--model", place / "llama", "--dataset", data, "--output_dir", out]
    (code,) = codes(start(1, tmp_path / "shown", *argv))
    line = the_error((code, "", (tmp_path / "shown").read_text()), out)
    assert "bad.jsonl" in line and "row 2" in line


@pytest.mark.parametrize("flags", [["--beta", 0], ["--dataset", "absent.jsonl"]], ids=str)
def test_a_mistake_ends_all_processes_and_is_told_once(flags, place, tmp_path):
    """Catches a process that waits for one that has ended, and eight copies of a message."""
    good = ["--model", place / "llama", "--dataset", place / "nine.jsonl"]
    good += ["--output_dir", tmp_path / "out"]
    if flags[0] == "--dataset":
        done = torchrun(2, *good, *flags)
        shown = done.stderr
        assert done.returncode != 0  # torchrun's own code, and its own words around the line
    else:
        started = start(2, tmp_path / "shown", *good, *flags)
        assert codes(started[:1]) == [2]
        started[1].terminate()  # as torchrun does
        codes(started)
        shown = (tmp_path / "shown").read_text()
    errors = [line for line in shown.split("\n") if "simpo.py: error: " in line]
    assert len(errors) == 1 and all(str(word) in errors[0] for word in flags)


def test_a_mistake_of_the_second_process_alone_is_told_too(place, tmp_path):
    """Catches a process that ends without a word because only the first one may speak."""
    good, shown = (
        ["--model", place / "llama", "--dataset", place / "nine.jsonl"],
        tmp_path / "shown",
    )
    hollow = write_model(tmp_path / "hollow")  # the tokenizer is there, the weights are not
    (hollow / "model.safetensors").unlink()
    good += ["--output_dir", tmp_path / "out"]
    assert codes(start(2, shown, *good, last=["--model", hollow])) == [1, 2]
    errors = re.findall(r"simpo\.py: error: .*", shown.read_text())
    assert re.search("--model .*hollow: ", errors[0])
    assert len(errors) == 2 and "process 0 has lost another" in errors[1]


# ========================================================================= hostile data, any model
@every_style
def test_the_text_of_control_tokens_in_a_message_stays_text(style):
    """Catches a user who ends their own turn and goes on as the assistant. Not so in plain texts,
    which may have been written with a template beforehand."""
    tokenizer = style.make()
    attack = "".join(f"a{token}b" for token in SPECIALS)
    plain = attack.replace("<", "(")
    sides = ("prompt_ids", "chosen_ids", "rejected_ids")
    bad, good = (tokenize(chat(x, x + "1", x + "2"), tokenizer) for x in (attack, plain))
    less, bracket = (tokenizer.encode(x, add_special_tokens=False)[0] for x in "<(")
    for side in sides:
        as_if = [less if i == bracket else i for i in good[side]]
        assert bad[side] == as_if  # character by character, but for the one that differs
        assert attack in tokenizer.decode(bad[side])
    rendered = tokenize(texts("<|im_start|>user\nHi<|im_end|>\n", "a", "b"), tokenizer)
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") in rendered["prompt_ids"]


ROWS = 20_000 if LONG_MODE else 2_000
ODD = ["", " ", "\n", "\0", "\ufeff", "\ufffe", "\u202e", "\u200d", "\u0301", "\r\n", "{{ 1 / 0 }}"]
ODD += ["{% endfor %}", "@@", "\n\nAssistant:", "\n\nHuman:", *SPECIALS, "\U0010ffff", "x" * 3000]
ODD_VALUES = [None, 5, 1.5, math.nan, True, [], {}, [None], [[]], {"role": "user"}, "", b"bytes"]


def odd_text(rng):
    """Some of all planes of Unicode, of control characters, of words that mean something here."""
    planes = [(0, 0x7F), (0x80, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x2FFFF), (0x30000, 0x10FFFF)]
    parts = [chr(rng.randint(*rng.choice(planes))) for _ in range(rng.randint(0, 6))]
    parts += rng.choices([*ODD, "a plain word"], k=rng.randint(0, 3))
    rng.shuffle(parts)
    return "".join(parts)


def odd_messages(rng, last=None):
    roles = ["user", "assistant", "system", "tool", "wizard", ""]
    turns = rng.choice([0, 1, 1, 1, 2, 3, 9])
    messages = [{"role": rng.choice(roles), "content": odd_text(rng)} for _ in range(turns)]
    if messages and last:
        messages[-1]["role"] = last
    if messages and rng.random() < 0.1:
        rng.choice(messages)[rng.choice(["role", "content", "name"])] = rng.choice(ODD_VALUES)
    return messages


def odd_row(rng):
    kind = rng.choice(["texts", "messages", "messages", "whole", "dialogue", "any"])
    if kind == "texts":
        row = texts(*(odd_text(rng) for _ in range(3)))
    elif kind == "messages":
        row = chat("", odd_text(rng), odd_text(rng)) | {"prompt": odd_messages(rng)}
    elif kind == "whole":
        head = odd_messages(rng)
        row = {side: head + odd_messages(rng, "assistant") for side in ("chosen", "rejected")}
    elif kind == "dialogue":
        head = odd_text(rng) + "\n\nAssistant:"
        row = {side: head + odd_text(rng) for side in ("chosen", "rejected")}
    else:
        values = [*ODD_VALUES, odd_text(rng), odd_messages(rng)]
        row = {name: rng.choice(values) for name in ("prompt", "chosen", "rejected")}
    if rng.random() < 0.1:
        row[rng.choice(["prompt", "chosen", "rejected"])] = rng.choice(ODD_VALUES)
    return row


@every_style
def test_a_hostile_row_is_trained_on_or_dropped_or_refused_in_one_line(style):
    """Catches exceptions from the depths, rows longer than allowed, turns that were forged, and
    losses that are not finite."""
    tokenizer, rng, kept, ends = style.make(), random.Random(style.end), [], Counter()
    control = set(tokenizer.all_special_ids)
    for _ in range(ROWS // len(STYLES)):
        row = odd_row(rng)
        try:
            pair = tokenize(row, tokenizer, 300, 200)
        except simpo.UserError as error:
            ends["refused"] += 1
            assert str(error) and "\n" not in str(error), row
            continue
        ends["kept" if pair else "dropped"] += 1
        if pair is None:
            continue
        sides = [pair[side] for side in ("prompt_ids", "chosen_ids", "rejected_ids")]
        assert pair["lengths"] == [len(ids) for ids in sides] and min(pair["lengths"]) >= 1
        assert len(sides[0]) <= 200 and len(sides[0]) + max(map(len, sides[1:])) <= 300
        if isinstance(row["chosen"], list):
            for ids in sides[1:]:
                assert not control.intersection(ids[:-1]), row  # one end of turn, at the end
        kept.append(pair)
    assert min(ends[how] for how in ("kept", "dropped", "refused")) >= 20, ends
    policy = simpo.ResponseLogps(make_llama())
    with torch.no_grad():
        for i in range(0, len(kept), 8):
            logps, lengths = policy(**simpo.collate(kept[i : i + 8]))
            assert torch.isfinite(logps).all() and (lengths > 0).all()


def big(text):
    return (text * 1_000_000)[:1_000_000]


TURNS = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(9_999)]
SURROGATE = json.dumps(chat("a", "half", "c")).replace("half", "\\ud83d")
JSONL = lines_of(*NINE).encode()
HOSTILE_FILES = {  # name -> (content, what must be printed, or the error)
    "1_mb.jsonl": (lines_of(*NINE, chat(big("z z "), "a", "b")), "10 pairs read, 0 dropped"),
    "1_mb_text.jsonl": (lines_of(texts("a", big("\u20ac"), "b")), "1 pairs read, 0 dropped"),
    "turns.jsonl": (lines_of(chat("", "a", "b") | {"prompt": TURNS}), "1 pairs read, 0 dropped"),
    "system_only.jsonl": (
        lines_of(chat("", "a", "b") | {"prompt": [{"role": "system", "content": "Be kind."}]}),
        "1 pairs read, 0 dropped",
    ),
    "empty_lists.jsonl": (lines_of(*NINE, {"prompt": [], "chosen": [], "rejected": []}), "row 10"),
    "empty_prompt.jsonl": (lines_of(*NINE, chat("", "a", "b") | {"prompt": []}), "1 dropped (no"),
    "wrong_role.jsonl": (lines_of(*NINE, answer_of("a", role="wizard")), "row 10"),
    "surrogate.jsonl": (lines_of(*NINE, SURROGATE), "line 10: .*surrogate"),
    "nul.jsonl": (lines_of(*NINE, chat("a\0b", "\0", "b")), "10 pairs read, 0 dropped"),
    "nan.jsonl": (lines_of(texts("a", math.nan, "b"), *PLAIN), "row 1.*'chosen' is (nan|None)"),
    "integer.jsonl": (lines_of(*PLAIN, texts(5, "a", "b")), "row 6.*'prompt' is 5"),
    "twice.jsonl": (lines_of('{"prompt": "a", "chosen": "b", "rejected": "c", "chosen": "d"}'), ""),
    "twice.csv": ("prompt,chosen,rejected,chosen\na,b,c,d\n", "1 pairs read, 0 dropped"),
    "bom.jsonl": (b"\xef\xbb\xbf" + JSONL, "9 pairs read, 0 dropped"),
    "bom.csv": (b"\xef\xbb\xbfprompt,chosen,rejected\na,b,c\n", "1 pairs read, 0 dropped"),
    "crlf.jsonl": (JSONL.replace(b"\n", b"\r\n"), "9 pairs read, 0 dropped"),
    "crlf.csv": ("prompt,chosen,rejected\r\na,b,c\r\n", "1 pairs read, 0 dropped"),
    "half_a_line.jsonl": (JSONL[:-40], "line 9"),
    "half_a_file.json": (json.dumps(NINE)[:-40], "half_a_file.json"),
    "latin_1.jsonl": (lines_of(*PLAIN).encode() + b'{"prompt": "\xe9"', "line 6.*utf-8"),
    "a_list.jsonl": (lines_of(*NINE[:2], [1, 2]), r"line 3: \[1, 2\] is no object"),
    "deep.jsonl": (lines_of(*NINE[:2], "[" * 100_000 + "]" * 100_000), "line 3"),
    "commas.csv": ("prompt,chosen,rejected\nHi, you,b,c\nHi, all,b,c\n", "commas.*need quotes"),
    "open_quote.csv": ('prompt,chosen,rejected\na,"b,c\n', "open_quote.csv"),
    "noise.parquet": (random.Random(3).randbytes(999), "noise.parquet"),
    "noise.jsonl": (random.Random(4).randbytes(999), "line 1"),
}


@pytest.mark.parametrize("name", HOSTILE_FILES)
def test_a_hostile_file_ends_in_training_or_a_counted_drop_or_one_line(
    name, place, tmp_path, monkeypatch, capsys
):
    """Catches tracebacks, hangs, a shift of columns, and rows that vanish without being counted."""
    content, said = HOSTILE_FILES[name]
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(content)
    argv = ["--model", place / "llama", "--dataset", tmp_path / name, "--max_length", 400]
    result = command_line(monkeypatch, capsys, *argv, "--output_dir", tmp_path / "out")
    if result[0] == 0:
        assert all(math.isfinite(row["loss"]) for row in steps_of(read_metrics(tmp_path / "out")))
        assert said in result[1]
    else:
        assert re.search(said, the_error(result, tmp_path / "out"))


def make_qwen2():
    torch.manual_seed(6)
    config = transformers.Qwen2Config(**SHAPE | LLAMA | {"bos_token_id": None})
    return transformers.Qwen2ForCausalLM(config).eval()


ANY_MODEL = {  # name -> its model and tokenizer
    "tied": (make_tied_llama, make_tokenizer),
    "learned positions": (make_gpt2, make_tokenizer),
    "no BOS": (make_qwen2, STYLES["qwen"].make),
    "sliding window": (partial(make_mistral, 20), STYLES["mistral"].make),
    "no newline after a turn": (make_llama, STYLES["llama3"].make),
    "no pad token": (partial(make_llama, pad_token_id=None), partial(make_tokenizer, pad=False)),
    "soft caps": (make_gemma2, make_tokenizer),
    "bf16 compute": (make_llama, make_tokenizer),
}


@pytest.mark.parametrize("name", ANY_MODEL)
def test_any_kind_of_model_stops_resumes_and_reloads_as_the_same(name, place, tmp_path, disturb):
    """Catches a weight that is shared and saved once too rarely, and a pad token taken for given."""
    make_model, make = ANY_MODEL[name]
    write_model(tmp_path / "model", make_model(), make())
    one, two = tmp_path / "one", tmp_path / "two"
    source = [tmp_path / "model", place / "nine.jsonl"]
    flags = ["--batch_size", 4, "--lr", 1e-3, "--dtype", "bf16" if "bf16" in name else "fp32"]
    run(*source, one, *flags)
    disturb("nn.utils.clip_grad_norm_", 2, stop)
    assert len(steps_of(run(*source, two, *flags)[1])) == 2
    run(*source, two, *flags, "--resume")
    assert_same_bits(one, two)
    model = transformers.AutoModelForCausalLM.from_pretrained(two)
    tokenizer = transformers.AutoTokenizer.from_pretrained(two)
    row = {side: [NINE[0][side][0]] for side in ("prompt", "chosen", "rejected")}
    assert tokenize(row, tokenizer) == tokenize(row, make())
    moved = [not torch.equal(*pair) for pair in zip(model.parameters(), make_model().parameters())]
    assert all(moved)


def test_a_models_own_code_and_pickles_are_not_run(place, tmp_path, mistake):
    """Catches a model folder from the web that does with this machine what it likes."""
    folder, trace = write_model(tmp_path / "model"), tmp_path / "it_ran"
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    line = mistake("--model", folder)
    assert "--model" in line and "safetensors" in line
    code = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass\n")
    for model_type in ("evil", "llama"):
        config |= {"model_type": model_type, "auto_map": code}
        (folder / "config.json").write_text(json.dumps(config))
        assert "--model" in mistake("--model", folder)
    assert not trace.exists()


# ========================================================================= the demo
def demo(out, *flags):
    """`python simpo.py` with these flags -> the first and the last evaluation."""
    done = fresh_process(SCRIPT, "--output_dir", out, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [row for row in read_metrics(out) if "eval/win_rate" in row]
    assert rows[0]["step"] == 0 and rows[-1]["step"] == 100
    return rows[0], rows[-1]


@SLOW
def test_the_demo_learns_what_it_should(tmp_path):
    """Catches a demo that runs without learning: sampled answers must turn right."""
    first, last = demo(tmp_path / "demo")
    assert 0.40 <= first["eval/win_rate"] <= 0.60
    assert last["eval/win_rate"] >= 0.85
    assert last["eval/rewards/accuracies"] >= 0.95
    assert last["eval/answer_length"] < first["eval/answer_length"] + 2


@SLOW
def test_without_length_normalisation_the_demos_answers_grow(tmp_path):
    """Catches an ablation that does nothing: sums are raised by length alone."""
    first, last = demo(tmp_path / "demo", "--no_length_norm")
    assert last["eval/rewards/accuracies"] >= 0.95
    assert last["eval/answer_length"] > first["eval/answer_length"] + 3
