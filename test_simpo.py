"""Tests of simpo.py: what could go wrong without anybody noticing, and how one would notice.

Every expected number comes from somewhere else than simpo.py: worked out by hand in plain Python
floats, by a slow loop that scores one token at a time, or by another process. All models are tiny
and random, all files are made on the spot, and nothing needs a network or a GPU.
"""

import ast
import json
import math
import multiprocessing
import os
import random
import re
import runpy
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter, namedtuple
from pathlib import Path
from statistics import mean

SCRIPT = Path(__file__).with_name("simpo.py")
CACHE = tempfile.TemporaryDirectory()  # removed when Python exits
# Set before the imports that read them, and handed down to the processes started below.
os.environ |= {"HF_HOME": CACHE.name, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "0"}
os.environ |= {"PYTHONPATH": str(SCRIPT.parent), "QUICK": "1", "MODEL": ""}  # of the notebooks

import datasets
import nbclient
import nbformat
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


def make_tokenizer(template=CHATML, bos="<s>", eos="<|im_end|>", pad=None, adds_bos=0):
    """One token per byte, so that lengths can be counted by eye."""
    vocab = [*SPECIALS, *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    ids = {token: i for i, token in enumerate(vocab)}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=ids, merges=[]))
    options = {"add_prefix_space": False, "use_regex": False}
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(**options)
    core.decoder = tokenizers.decoders.ByteLevel()
    if adds_bos:  # as Llama's does to every text it is given
        template_of = tokenizers.processors.TemplateProcessing
        core.post_processor = template_of(single=f"{bos} $A", special_tokens=[(bos, ids[bos])])
    known = {"bos_token": bos, "eos_token": eos, "pad_token": eos if pad is None else pad or None}
    known["additional_special_tokens"] = [x for x in SPECIALS if x not in known.values()]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **known)
    tokenizer.chat_template = template
    return tokenizer


# By hand: what must stand before an answer to "Hi?", and be scored at its end.
Style = namedtuple("Style", "make before end")
STYLES = {
    "chatml": Style(
        make_tokenizer,
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
}
every_style = pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)


# ------------------------------------------------------------------------- tiny models
SHAPE = {"vocab_size": 264, "bos_token_id": 0, "eos_token_id": 3, "pad_token_id": 3}
SHAPE |= {"initializer_range": 0.3}  # large weights, so that answers differ in likelihood
LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}


def make_llama(**options):
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**SHAPE | LLAMA | options)
    return transformers.LlamaForCausalLM(config).eval()


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
every_model = pytest.mark.parametrize("make_model", MODELS.values(), ids=MODELS)


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


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


HYPER = {  # the defaults, written here a second time
    "simpo": {"beta": 2.5, "gamma": 1.4, "lam": 0.0, "no_length_norm": False},
    "dpo": {"beta": 0.01},
    "ipo": {"tau": 0.1},
    "orpo": {"lam": 0.1},
    "sft": {},
}
OTHERS = {  # and other values, no two of them equal
    "simpo": {"beta": 2.0, "gamma": 0.5, "lam": 0.3, "no_length_norm": True},
    "dpo": {"beta": 0.3},
    "ipo": {"tau": 0.7},
    "orpo": {"lam": 2.0},
    "sft": {},
}
REFERENCED = ("dpo", "ipo")
every_objective = pytest.mark.parametrize("name", HYPER)


Answer = namedtuple("Answer", "s ref n")  # of one answer: log pi, log pi_ref and |y|


def objective_by_hand(name, w, l, beta=0, gamma=0, tau=0, lam=0, no_length_norm=False):
    """A pair's loss and its two rewards in plain floats, from the formulas of the paper."""
    a_w, a_l, r_w, r_l = w.s / w.n, l.s / l.n, w.s - w.ref, l.s - l.ref
    if name == "simpo":
        x_w, x_l = (w.s, l.s) if no_length_norm else (a_w, a_l)
        loss = -log_sigmoid(beta * x_w - beta * x_l - gamma) + lam * -a_w
        return loss, beta * x_w, beta * x_l
    if name == "dpo":
        return -log_sigmoid(beta * r_w - beta * r_l), beta * r_w, beta * r_l
    if name == "ipo":
        return (r_w - r_l - 1 / (2 * tau)) ** 2, tau * r_w, tau * r_l
    if name == "orpo":
        odds = [math.log(math.exp(a) / (1 - math.exp(a))) for a in (a_w, a_l)]
        return -a_w - lam * log_sigmoid(odds[0] - odds[1]), a_w, a_l
    return -a_w, a_w, a_l


def metrics_by_hand(name, pairs, **hyper):
    """The metrics of (chosen, rejected) Answers, means over the pairs."""
    rows = [objective_by_hand(name, w, l, **HYPER[name] | hyper) for w, l in pairs]
    return {
        "loss": mean(loss for loss, _, _ in rows),
        "rewards/chosen": mean(w for _, w, _ in rows),
        "rewards/rejected": mean(l for _, _, l in rows),
        "rewards/margins": mean(w - l for _, w, l in rows),
        "rewards/accuracies": mean(float(w > l) for _, w, l in rows),
        "logps/chosen": mean(w.s / w.n for w, _ in pairs),
        "logps/rejected": mean(l.s / l.n for _, l in pairs),
    }


def slow_answers(model, rows):
    """(chosen, rejected) of each row, scored token by token; the model is its own reference."""
    pairs = []
    for row in rows:
        prompt, *sides = ids_by_hand(row, make_tokenizer())
        scores = [slow_logps(model, prompt, ids) for ids in sides]
        pairs.append([Answer(s, s, len(ids)) for s, ids in zip(scores, sides)])
    return pairs


# ------------------------------------------------------------------------- running simpo.py
STILL = ["--lr", "1e-12"]  # a learning rate that changes nothing that could be measured
TIMINGS = {"step_seconds", "pairs_per_second", "tokens_per_second", "peak_memory_gib"}


def run(model, data, out, *flags):
    """Train in this process -> (metrics of the last evaluation, rows of metrics.jsonl)."""
    argv = ["--model", model, "--dataset", data, "--output_dir", out, *flags]
    return simpo.main([str(word) for word in argv]), read_metrics(out)


def read_metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def steps_of(rows):
    return [row for row in rows if "loss" in row]


def evaluations_of(rows):
    found = [{k[5:]: x for k, x in row.items() if k.startswith("eval/")} for row in rows]
    return [metrics for metrics in found if metrics]


def untimed_rows(out):
    return [{k: x for k, x in row.items() if k not in TIMINGS} for row in read_metrics(out)]


def assert_same_training(one, two):
    """The same rows of metrics.jsonl, timings apart, and the same weights, but for rounding."""
    rows_one, rows_two = untimed_rows(one), untimed_rows(two)
    assert len(rows_one) == len(rows_two)
    for row_one, row_two in zip(rows_one, rows_two):
        assert row_one == pytest.approx(row_two, rel=1e-5, abs=1e-6)
    weights_one, weights_two = (load_file(out / "model.safetensors") for out in (one, two))
    assert weights_one.keys() == weights_two.keys()
    for name in weights_one:
        torch.testing.assert_close(weights_one[name], weights_two[name], rtol=0, atol=2e-6)


def assert_same_bits(one, two):
    """The same weights, bit by bit, and the same rows of metrics.jsonl, timings apart."""
    assert untimed_rows(one) == untimed_rows(two)
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def torchrun(processes, *argv):
    """`torchrun --nproc_per_node=processes simpo.py argv`, which has to succeed."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command += [f"--master_port={free_port()}", SCRIPT, *argv]
    command = [str(word) for word in command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


KINDS = {"one process": (1, []), "two": (2, []), "two, sharded": (2, ["--shard"])}
# Python with torch imported, to fork from: a process that starts in 0.1 s can be killed often.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "transformers", "datasets", "simpo"])


def script(file, argv, environment, shown):
    """`python simpo.py argv`, in a process of its own; what it prints goes to a file."""
    os.environ |= environment
    del sys.modules["simpo"]  # it has read other variables
    with open(shown, "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.argv = [str(file), *argv]
    runpy.run_path(str(file), run_name="__main__")


def start(processes, shown, *argv, file=SCRIPT):
    """The processes of a run, with the variables that torchrun sets."""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(processes)}
    started = []
    for rank in map(str, range(processes)):
        environment = group | {"RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
        words = [str(x) for x in argv]
        started.append(FORKS.Process(target=script, args=(file, words, environment, shown)))
        started[-1].start()
    return started


def codes(started, seconds=60):
    """Wait for the processes -> their exit codes, None for one that goes on."""
    deadline = time.monotonic() + seconds
    for process in started:
        process.join(max(0, deadline - time.monotonic()))
    return [process.exitcode for process in started]


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with the model "llama" and the files nine.jsonl and seven.jsonl."""
    folder = tmp_path_factory.mktemp("place")
    write_model(folder / "llama")
    write_model(folder / "tied", make_llama(tie_word_embeddings=True))
    write_jsonl(folder / "nine.jsonl", NINE)
    write_jsonl(folder / "seven.jsonl", SEVEN)
    return folder


def mistake(place, out, *flags):
    """A good command, made bad by flags -> the one line that it ends with."""
    good = ["--model", place / "llama", "--dataset", place / "nine.jsonl", "--output_dir", out]
    with pytest.raises(SystemExit) as end:
        simpo.main([str(word) for word in (*good, *flags)])
    assert isinstance(end.value.code, str) and "\n" not in end.value.code
    return end.value.code


# ========================================================================= objectives
def test_simpo_loss_is_the_equation_with_the_papers_beta_and_gamma_by_default():
    """Catches defaults that are not the method's: another beta, another gamma, an SFT term."""
    chosen, rejected = [-0.3, -1.7, -2.0], [-1.1, -0.2, -2.0]
    losses = simpo.simpo_loss(torch.tensor(chosen), torch.tensor(rejected))
    expected = [-log_sigmoid(2.5 * (w - l) - 1.4) for w, l in zip(chosen, rejected)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)


def test_dpo_loss_is_the_equation_with_the_dpo_papers_beta_by_default():
    """Catches averages where DPO has sums, and a reference that is subtracted the wrong way."""
    loss = simpo.dpo_loss(*torch.tensor([[-12.0], [-15.5], [-13.0], [-14.0]]))
    expected = -log_sigmoid(0.1 * ((-12.0 + 13.0) - (-15.5 + 14.0)))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def as_tensors(pairs):
    """Pairs of Answers -> w and l as objectives take them, and the leaves: their sums, [B]."""
    sides, leaves = [], []
    for side in zip(*pairs):
        s, ref, n = (torch.tensor(x, dtype=torch.float32) for x in zip(*side))
        leaves.append(s.requires_grad_())
        sides.append(simpo.Answers(sum=s, avg=s / n, ref=ref, ratio=s - ref, length=n))
    return sides, leaves


@every_objective
@pytest.mark.parametrize("hyper", [HYPER, OTHERS], ids=["defaults", "others"])
def test_each_objective_and_its_rewards_are_the_formulas_of_the_paper(name, hyper):
    """Catches averages where sums belong, a wrong sign, a lost term, rewards of another method."""
    likely, long, rare = Answer(-0.4, -0.2, 1), Answer(-3.1, -2.9, 9), Answer(-2.5, -4.0, 3)
    pairs = [(likely, long), (long, rare), (rare, likely)]
    given = {} if hyper is HYPER else hyper[name]  # the defaults are simpo.py's own
    results = simpo.OBJECTIVES[name](*as_tensors(pairs)[0], **given)
    expected = zip(*[objective_by_hand(name, w, l, **hyper[name]) for w, l in pairs])
    for result, numbers in zip(results, expected, strict=True):
        assert result.tolist() == pytest.approx(list(numbers), rel=2e-5, abs=1e-6)


@every_objective
def test_losses_and_gradients_are_finite_from_certain_to_hopeless_answers(name):
    """Catches ORPO's log(1 - p) at p = 1, an overflow at a sum of -100,000, and no gradient."""
    extremes = [-1e-8, -1e-6, -1e-3, -0.7, -7.0, -50.0]
    kinds = [Answer(a * n, a * n * f, n) for a in extremes for n in (1, 2000) for f in (1, 0.5, 2)]
    for options in [{}] + [{"no_length_norm": True}, {"lam": 1.0}] * (name == "simpo"):
        sides, leaves = as_tensors([(w, l) for w in kinds for l in kinds])
        losses = simpo.OBJECTIVES[name](*sides, **options)[0]
        assert losses.dtype == torch.float32 and losses.isfinite().all()
        losses.sum().backward()
        assert all(x.grad.isfinite().all() for x in leaves if x.grad is not None)
        assert leaves[0].grad.abs().sum() > 0


# ========================================================================= log-likelihood
def some_pairs(seed=0, count=4):
    """Pairs of random token ids, of many lengths, that include the id that pads (3)."""
    rng = random.Random(seed)
    lengths = {"prompt_ids": 20, "chosen_ids": 12, "rejected_ids": 7}
    return [
        {key: [rng.randrange(264) for _ in range(rng.randint(1, n))] for key, n in lengths.items()}
        for _ in range(count)
    ]


def rows_of(pairs):
    return [(p["prompt_ids"], p[side]) for side in ("chosen_ids", "rejected_ids") for p in pairs]


@every_model
def test_scores_are_those_of_a_token_by_token_loop(make_model):
    """Catches logits not shifted against labels, scored prompt tokens and forgotten soft caps."""
    model, pairs = make_model(), some_pairs()
    batch = simpo.collate(pairs)
    expected = [slow_logps(model, *row) for row in rows_of(pairs)]
    assert simpo.ResponseLogps(model)(**batch).tolist() == pytest.approx(expected, rel=1e-5)
    assert batch["scored"].sum(1).tolist() == [len(answer) for _, answer in rows_of(pairs)]


@every_model
def test_every_gradient_is_that_of_separate_rows_with_full_logits(make_model):
    """Catches a head that, applied to three tokens at a time, loses or doubles gradients."""
    model, pairs = make_model(), some_pairs(seed=2)
    logps = simpo.ResponseLogps(model, chunk=3)(**simpo.collate(pairs))
    weights = torch.arange(1.0, len(logps) + 1)
    (logps * weights).sum().backward()
    chunked = {key: p.grad.clone() for key, p in model.named_parameters()}
    model = make_model()
    for weight, (prompt, answer) in zip(weights, rows_of(pairs)):
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        picked = F.log_softmax(logits, dim=-1)[torch.arange(len(answer)), answer]
        (weight * picked.sum()).backward()
    for key, p in model.named_parameters():
        scale = p.grad.abs().max().item()
        torch.testing.assert_close(chunked[key], p.grad, rtol=0, atol=1e-5 * scale, msg=key)


@pytest.mark.parametrize("how", ["fp32", "bf16 weights", "--dtype bf16"])
def test_log_softmax_and_sums_are_fp32_for_bf16_logits(how):
    """Catches a log-softmax in bf16, which has three digits: log-probs of -6 in steps of 0.03."""
    model, pairs = make_llama(num_hidden_layers=0), some_pairs(seed=3)
    with torch.no_grad():  # hidden states of -1 and 1, and logits in steps of 1/4: exact in bf16
        model.model.embed_tokens.weight.sign_()
        model.lm_head.weight.uniform_(-2, 2).round_().div_(4)
    expected = [slow_logps(model, *row) for row in rows_of(pairs)]
    policy = simpo.ResponseLogps(model.bfloat16() if how == "bf16 weights" else model)
    if how == "--dtype bf16":
        policy = simpo.wrap(policy, simpo.parse_args(["--dtype", "bf16"]))
    logps = policy(**simpo.collate(pairs))
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


@every_style
def test_only_the_last_assistant_turn_is_scored(style):
    """Catches the answers of earlier turns counted in log pi(y|x) and |y|."""
    tokenizer = style.make()
    turns = [("user", "Hi?"), ("assistant", "Hello"), ("user", "More?")]
    turns = [{"role": role, "content": content} for role, content in turns]
    pair = tokenize(chat("", "Yes, more", "No") | {"prompt": turns}, tokenizer)
    assert tokenizer.decode(pair["chosen_ids"]) == "Yes, more" + style.end
    assert tokenizer.decode(pair["rejected_ids"]) == "No" + style.end
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
    examples = [json.loads(example) for example in re.findall("`({.*})`", README)]
    messages, whole, plain = (tokenize(example, tokenizer) for example in examples)
    assert messages == whole and messages["chosen_ids"][0] == plain["chosen_ids"][1]  # a "4"


GOOD = chat("Hi?", "Hello", "Go")
CHAT_SIDES = {side: GOOD["prompt"] + GOOD[side] for side in ("chosen", "rejected")}
OTHER_PROMPT = [{"role": "user", "content": "Bye?"}, GOOD["rejected"][0]]
RAISING = "{{ raise_exception('roles must alternate') }}"
REWRITING = "{{ messages | length }}" + CHATML  # the prompt changes when an answer follows
DROPS = {  # what is dropped -> (row, template, a word of the reason)
    "different prompts": (CHAT_SIDES | {"rejected": OTHER_PROMPT}, CHATML, "prompt"),
    "no prompt": (GOOD | {"prompt": []}, CHATML, "prompt"),
    "an empty text as prompt": (texts("", "a", "b"), CHATML, "prompt"),
    "an empty answer": (chat("Hi?", "", "Go"), CHATML, "empty"),
    "an empty text as answer": (texts("Hi?", "a", ""), CHATML, "empty"),
    "identical answers": (chat("Hi?", "Go", "Go"), CHATML, "identical"),
    "a long prompt": (chat("Hi?" * 99, "Hello", "Go"), CHATML, "long"),
    "a template that raises": (GOOD, RAISING, "roles must alternate"),
    "a template that rewrites": (GOOD, REWRITING, "differently"),
}


@pytest.mark.parametrize("name", DROPS)
def test_a_pair_that_teaches_nothing_is_dropped_with_its_reason(name):
    """Catches 0/0 for an empty answer, and a comparison of answers to two questions."""
    row, template, word = DROPS[name]
    reason = tokenize(row, make_tokenizer(template))
    assert isinstance(reason, str) and word in reason


def test_no_row_is_longer_than_allowed_and_nothing_is_cut_that_fits():
    """Catches answers cut because the other one is long, or prompts that are cut at all."""
    tokenizer, rng, ends = make_tokenizer(template=None, eos="</s>"), random.Random(0), Counter()
    for _ in range(400):
        p, c, r = rng.randint(1, 40), rng.randint(1, 40), rng.randint(1, 40)
        max_length = rng.randint(8, 70)
        max_prompt = rng.randint(1, max_length)
        pair = tokenize(texts("p" * p, "c" * c, "r" * r), tokenizer, max_length, max_prompt)
        room = max_length - p
        if p > max_prompt or room == 0:
            assert isinstance(pair, str)
            ends["dropped"] += 1
            continue
        lengths = [len(pair[key]) for key in ("prompt_ids", "chosen_ids", "rejected_ids")]
        assert lengths == [p, min(c + 1, room), min(r + 1, room)]  # one token a letter, one EOS
        assert pair["cut"] == (max(c, r) + 1 > room)
        assert (pair["chosen_ids"][-1] == tokenizer.eos_token_id) == (c + 1 <= room)  # never forged
        ends["cut" if pair["cut"] else "whole"] += 1
    assert min(ends[how] for how in ("dropped", "cut", "whole")) >= 20


class Rows(list):
    """A list that load_pairs takes for a dataset: Arrow would refuse rows of mixed types."""

    column_names = ("prompt", "chosen", "rejected")


ODD = ["", " ", "\n", "\0", "\ufeff", "\u202e", "\r\n", "{{ 1 / 0 }}", "x" * 3000, *SPECIALS]
ODD_VALUES = [None, 5, math.nan, True, [], {}, [None], [[]], {"role": "user"}, "", b"bytes"]
ROLES = ["user", "assistant", "assistant", "system", ""]


def odd_row(rng):
    """A row of odd texts, or of odd messages, and sometimes with something else in its place."""

    def text():
        letters = [chr(rng.choice([rng.randint(0, 0x7F), rng.randint(0xE000, 0x2FFFF)]))]
        return "".join(rng.sample([*letters, *rng.choices(ODD, k=2), "word", "word"], k=2))

    def messages():
        return [{"role": rng.choice(ROLES), "content": text()} for _ in range(rng.randint(0, 3))]

    head, end = messages(), {"role": "assistant"}
    row = rng.choice([texts(text(), text(), text()), chat(text(), text(), text()), {
        side: [*head, end | {"content": text()}] for side in ("chosen", "rejected")
    }])  # fmt: skip
    if rng.random() < 0.2:
        row[rng.choice(["prompt", "chosen", "rejected"])] = rng.choice([*ODD_VALUES, messages()])
    if rng.random() < 0.1 and isinstance(row["chosen"], list) and row["chosen"]:
        row["chosen"][0] = rng.choice([*ODD_VALUES, {"role": "assistant", "content": 5}])
    return row


@every_style
def test_a_malformed_row_is_trained_on_or_dropped_or_refused_by_name(style, monkeypatch, capsys):
    """Catches rows that are lost without a count, named wrongly or end in NaN: 5 times 200."""
    tokenizer, ends, policy = style.make(), Counter(), simpo.ResponseLogps(make_llama())
    args = simpo.parse_args(["--max_length", "300", "--max_prompt_length", "200"])
    for i in range(200):
        rows = Rows([GOOD, odd_row(random.Random(f"{style.end} {i}"))])
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, rows=rows, **__: rows)
        try:
            pairs = simpo.load_pairs("rows", "train", tokenizer, args)
        except ValueError as error:
            assert str(error).startswith("rows, row 2: ") and error.__cause__.__traceback__
            ends["refused"] += 1
            continue
        shown = capsys.readouterr().out
        end = "kept" if "dropped: none" in shown else "dropped"
        assert f"2 rows, {2 if end == 'kept' else 1} pairs" in shown
        ends[end] += 1
        with torch.no_grad():
            assert torch.isfinite(policy(**simpo.collate([*pairs]))).all()
    assert sum(ends.values()) == 200 and len(ends) == 3 and min(ends.values()) >= 10, ends


def test_all_file_formats_give_the_same_pairs(place, tmp_path):
    """Catches a format whose rows are read in another way, or lose their line breaks."""
    args, tokenizer = simpo.parse_args([]), make_tokenizer()
    (tmp_path / f"{tmp_path.name}.py").touch()  # as simpo.py itself, in a folder simpo
    for rows, kinds in ((PLAIN, "jsonl json parquet csv"), (NINE, "jsonl json parquet")):
        table = datasets.Dataset.from_list(rows)
        write = {"jsonl": table.to_json, "parquet": table.to_parquet, "csv": table.to_csv}
        expected = [tokenize(row, tokenizer) for row in rows]
        for kind in kinds.split():
            path = tmp_path / f"{len(rows)}.{kind}"
            if kind == "json":
                path.write_text(json.dumps(rows, indent=1))
            else:
                write[kind](path)
            assert list(simpo.load_pairs(str(path), "train", tokenizer, args)) == expected


def test_what_is_dropped_and_cut_is_said(place, tmp_path, capsys):
    """Catches input that is changed without a word."""
    rows = [*NINE, chat("Hi", "a", "a"), chat("Hi", "", "b"), chat("Hi", "a", "a"), SEVEN[6]]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    args = simpo.parse_args(["--max_length", "60"])
    assert len(simpo.load_pairs(str(data), "train", make_tokenizer(), args)) == 10
    shown = capsys.readouterr().out
    assert "13 rows, 10 pairs" in shown and "'identical answers': 2" in shown
    assert "'an empty answer': 1" in shown and "1 pairs cut to --max_length 60" in shown


# ========================================================================= training: the numbers
@pytest.fixture(scope="session")
def nine_answers():
    return slow_answers(make_llama(), NINE)


def test_default_flags_train_with_the_papers_objective(place, tmp_path, nine_answers):
    """Catches flags whose defaults are not beta 2.5 and gamma 1.4, and swapped metrics."""
    flags = ["--eval_dataset", place / "seven.jsonl"]
    last, rows = run(place / "llama", place / "nine.jsonl", tmp_path / "out", *flags)
    before, after = evaluations_of(rows)
    expected = metrics_by_hand("simpo", slow_answers(make_llama(), SEVEN))
    assert before == pytest.approx(expected, rel=1e-5)
    assert {f"eval/{name}": x for name, x in after.items()} == last
    (step,) = steps_of(rows)  # 9 pairs are fewer than the 128 of a batch: one step
    expected = metrics_by_hand("simpo", nine_answers)
    assert {name: step[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert step.keys() == {*expected, *TIMINGS, "step", "epoch", "grad_norm", "lr"}
    assert step["lr"] == 1e-6 and step["epoch"] == 1 and all(step[name] > 0 for name in TIMINGS)


RUNS = {
    "simpo with an SFT term": (["--lambda", 0.05], {"lam": 0.05}),
    "simpo, gamma 0": (["--gamma", 0], {"gamma": 0}),
    "simpo, sums": (["--no_length_norm"], {"no_length_norm": True}),
    "dpo, beta 0.1": (["--beta", 0.1], {"beta": 0.1}),
    "ipo, tau 0.4": (["--tau", 0.4], {"tau": 0.4}),
    "orpo": ([], {}),
    "sft": ([], {}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_trains_and_reports_its_own_objective(name, nine_answers, place, tmp_path):
    """Catches flags that do not arrive, and a reference that is not the starting policy."""
    loss, (flags, values) = re.split(r"\W", name)[0], RUNS[name]
    flags = ["--loss", loss, *flags, "--micro_batch_tokens", 200, *STILL]
    _, (step,) = run(place / "llama", place / "nine.jsonl", tmp_path / "out", *flags)
    expected = metrics_by_hand(loss, nine_answers, **values)
    if loss in REFERENCED:  # all rewards are 0, and which one is larger is a matter of rounding
        del expected["rewards/accuracies"]
    assert {key: step[key] for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("flags", [[], ["--gradient_checkpointing"]], ids=str)
def test_dpo_starts_at_ln_2_with_dropout_in_the_config_and_shuffled_pairs(
    name, flags, place, tmp_path
):
    """Catches dropout in training, and reference scores that belong to another row."""
    dropout = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    model = make_llama(attention_dropout=0.5) if name == "llama" else make_gpt2(**dropout)
    write_model(tmp_path / name, model)
    flags = [*flags, "--loss", "dpo", "--beta", 0.1, "--batch_size", 2, "--epochs", 2, *STILL]
    flags += ["--eval_dataset", place / "seven.jsonl"]
    _, rows = run(tmp_path / name, place / "nine.jsonl", tmp_path / "out", *flags)
    losses = [row["loss"] for row in steps_of(rows) + evaluations_of(rows)]
    assert losses == pytest.approx([math.log(2)] * (2 * 5 + 2), abs=1e-6)


def test_an_objective_of_ones_own_trains_as_the_readme_says(place, tmp_path, monkeypatch, capsys):
    """Catches a table that is copied on import, an example that nobody has run, and a NaN of which
    relu hides the gradient: that of a reference which the objective has not asked for."""
    (example,) = re.findall("```python\n(.*?)```", README, re.DOTALL)
    main = simpo.main
    flags = ["--model", str(place / "llama"), "--dataset", str(place / "nine.jsonl"), *STILL]
    monkeypatch.setattr(simpo, "OBJECTIVES", dict(simpo.OBJECTIVES))  # forgets it afterwards
    monkeypatch.setattr(simpo, "main", lambda argv: main(argv + flags))
    for name in ("avg", "ratio"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        Path("own.py").write_text(example.replace(".avg", f".{name}"))
        runpy.run_path("own.py")
    assert capsys.readouterr().out.count("step 1 skipped: loss nan") == 1
    (step,) = read_metrics(tmp_path / "avg" / "simpo_output")
    by_hand = [max(0, 1 - 3 * (w.s / w.n - l.s / l.n)) for w, l in slow_answers(make_llama(), NINE)]
    assert step["loss"] == pytest.approx(mean(by_hand), rel=1e-5)


# ========================================================================= training: the machinery
# 9 pairs, 4 to a batch: the third step has a single pair, and with two processes one has none.
FOURS = ["--batch_size", 4, "--lr", 1e-3, "--max_grad_norm", 0.5, "--warmup_ratio", 0.4]


@pytest.fixture(scope="session")
def in_fours(place):
    """The folder of a run with four pairs in one pass, by one process; evaluated on seven."""
    flags = [*FOURS, "--eval_dataset", place / "seven.jsonl"]
    run(place / "llama", place / "nine.jsonl", place / "one", *flags)
    return place / "one"


@pytest.mark.parametrize("cut", [["--micro_batch_tokens", 1], ["--micro_batch_tokens", 200]])
@pytest.mark.parametrize("flags", [[], ["--gradient_checkpointing"]], ids=str)
def test_how_a_batch_is_cut_changes_nothing(cut, flags, in_fours, place, tmp_path):
    """Catches a loss that is not divided by the number of accumulated passes, or divided twice."""
    flags = [*flags, *cut, *FOURS, "--eval_dataset", place / "seven.jsonl"]
    run(place / "llama", place / "nine.jsonl", tmp_path / "out", *flags)
    assert_same_training(in_fours, tmp_path / "out")


@pytest.mark.parametrize("flags", [[], ["--shard", "--gradient_checkpointing"]], ids=str)
def test_two_processes_train_exactly_what_one_does(flags, in_fours, place, tmp_path):
    """Catches gradients and metrics of rank 0 alone, a batch that grows with the processes, a
    shard that is scaled or lost, and an evaluation of 7 pairs that counts one of them twice."""
    flags = [*flags, "--micro_batch_tokens", 200, *FOURS, "--eval_dataset", place / "seven.jsonl"]
    source = ["--model", place / "llama", "--dataset", place / "nine.jsonl"]
    torchrun(2, *source, *flags, "--output_dir", tmp_path / "two")
    assert len(steps_of(read_metrics(tmp_path / "two"))) == 3
    assert_same_training(in_fours, tmp_path / "two")


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_computed_once_as_notebook_5_does_train_the_same(kind, in_fours, place, tmp_path):
    """Catches answers that see each other, and a prompt that learns from one of them alone."""
    cells = nbformat.read(HOUSE / "notebooks" / "5_faster.ipynb", as_version=4).cells
    (source,) = [cell.source for cell in cells if cell.source.startswith("%%writefile")]
    assert source.count("\n") <= 60
    file, shown = tmp_path / "fast_simpo.py", tmp_path / "shown"
    file.write_text(source.partition("\n")[2])
    processes, flags = KINDS[kind][0], [*KINDS[kind][1], *FOURS]
    flags += ["--model", place / "llama", "--output_dir", tmp_path / "out"]
    flags += ["--dataset", place / "nine.jsonl", "--eval_dataset", place / "seven.jsonl"]
    started = start(processes, shown, *flags, file=file)
    assert codes(started) == [0] * processes, shown.read_text()[-3000:]
    assert_same_training(in_fours, tmp_path / "out")


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_passes_hold_every_pair_once_and_no_more_tokens_than_allowed(processes, monkeypatch):
    """Catches processes that wait for each other's pass, lost pairs, and memory without bound."""
    monkeypatch.setattr(simpo, "WORLD_SIZE", processes)
    rng = random.Random(5)
    for count in (1, 2, 7, 40):
        sizes = [[rng.randint(1, n) for n in (90, 60, 60)] for _ in range(count)]
        sizes[0] = [200, 80, 90]  # more than the budget: a pass of its own
        keys = ("prompt_ids", "chosen_ids", "rejected_ids")
        pairs = [{key: [0] * n for key, n in zip(keys, size)} for size in sizes]
        seen, number_of_passes = Counter(), set()
        for rank in range(processes):
            monkeypatch.setattr(simpo, "RANK", rank)
            passes = simpo.micro_batches(pairs, 300)
            number_of_passes.add(len(passes))
            for places, weights in passes:
                longest = max(sizes[i][0] + max(sizes[i][1:]) for i in places)
                assert 2 * len(places) * longest <= 300 or len(places) == 1
                for i, weight in zip(places, weights.tolist(), strict=True):
                    seen[i] += weight
        assert seen == dict.fromkeys(range(count), 1.0)
        assert len(number_of_passes) == 1


def test_a_smaller_last_batch_is_divided_by_its_own_number_of_pairs(place, tmp_path):
    """Catches leftovers that count for less, or leak into the next epoch."""
    data = write_jsonl(tmp_path / "same.jsonl", NINE[:1] * 3)
    flags = ["--batch_size", 2, "--epochs", 2, *STILL]
    _, rows = run(place / "llama", data, tmp_path / "out", *flags)
    assert [row["epoch"] for row in rows] == [0.5, 1.0, 1.5, 2.0]
    assert [row["grad_norm"] for row in rows] == pytest.approx([rows[0]["grad_norm"]] * 4)
    assert [row["loss"] for row in rows] == pytest.approx([rows[0]["loss"]] * 4)


def test_each_epoch_sees_every_pair_once_in_an_order_of_its_own(place, tmp_path, nine_answers):
    """Catches pairs that are left out, seen twice, or never shuffled."""
    flags = ["--batch_size", 1, "--epochs", 2, *STILL]
    _, rows = run(place / "llama", place / "nine.jsonl", tmp_path / "out", *flags)
    losses = [row["loss"] for row in steps_of(rows)]
    in_file_order = [metrics_by_hand("simpo", [pair])["loss"] for pair in nine_answers]
    first, second = losses[:9], losses[9:]
    assert len(losses) == 18
    assert sorted(first) == pytest.approx(sorted(in_file_order), rel=1e-5)
    assert sorted(second) == pytest.approx(sorted(in_file_order), rel=1e-5)
    assert first != pytest.approx(in_file_order, rel=1e-5)
    assert second != pytest.approx(first, rel=1e-5)


def test_the_learning_rate_warms_up_from_0_and_falls_as_a_cosine(place, tmp_path):
    """Catches a schedule that is a step off, or whose length is not that of the run."""
    flags = ["--batch_size", 1, "--max_steps", 8, "--warmup_ratio", 0.25, "--lr", 1e-3]
    _, rows = run(place / "llama", place / "nine.jsonl", tmp_path / "out", *flags)
    rates = [0.0, 0.5, *(0.5 + 0.5 * math.cos(math.pi * k / 6) for k in range(6))]
    assert [row["lr"] for row in steps_of(rows)] == pytest.approx([1e-3 * x for x in rates])


def test_a_bf16_checkpoint_moves_at_the_papers_learning_rate(place, tmp_path):
    """Catches weights kept in bf16: they are too coarse for steps of 1e-6, and stay as they are."""
    write_model(tmp_path / "bf16", make_llama(initializer_range=0.02).bfloat16())
    flags = ["--lr", 1e-6, "--warmup_ratio", 0, "--max_steps", 1]
    run(tmp_path / "bf16", place / "nine.jsonl", tmp_path / "out", *flags)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("bf16", "out"))
    assert {w.dtype for w in before.values()} == {torch.bfloat16}
    # Leave out the embeddings of letters that no pair contains: they have no gradient.
    names = [name for name in before if "embed" not in name]
    changed = torch.cat([(after[k].float() != before[k].float()).flatten() for k in names])
    assert changed.float().mean() > 0.95
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_a_step_that_is_not_finite_is_skipped_and_told(tmp_path, capfd):
    """Catches one bad pair that turns every weight into NaN while the log goes on."""
    model, tokenizer = make_llama(), make_tokenizer()
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.encode("~")] = math.nan
    write_model(tmp_path / "poisoned", model, tokenizer)
    data = write_jsonl(tmp_path / "data.jsonl", [*NINE[:4], chat("~", "a", "b"), *NINE[4:]])
    _, rows = run(tmp_path / "poisoned", data, tmp_path / "out", "--batch_size", 1, "--lr", 1e-3)
    assert len(rows) == 10 and sum(not math.isfinite(row["loss"]) for row in rows) == 1
    shown = capfd.readouterr().out
    assert len(re.findall(r"step \d+ skipped: loss nan, gradient norm nan", shown)) == 1
    weights = load_file(tmp_path / "out" / "model.safetensors")
    bad = {name: (~w.isfinite()).sum().item() for name, w in weights.items()}
    assert {name: n for name, n in bad.items() if n} == {"model.embed_tokens.weight": 32}


def test_the_saved_model_is_the_trained_one_in_a_fresh_process(place, tmp_path):
    """Catches saved weights, template or generation settings that are not those of training."""
    model = make_llama()
    model.generation_config.eos_token_id = [3, 6]
    write_model(tmp_path / "start", model)
    flags = ["--lr", 1e-3, "--batch_size", 3, "--eval_dataset", place / "seven.jsonl"]
    out = tmp_path / "trained"
    last, rows = run(tmp_path / "start", place / "nine.jsonl", out, *flags)
    assert abs(evaluations_of(rows)[0]["loss"] - last["eval/loss"]) > 0.01  # the model changed
    again = ["--model", out, "--dataset", place / "nine.jsonl", "--output_dir", tmp_path / "again"]
    assert codes(start(1, tmp_path / "shown", *again, *flags)) == [0]
    reloaded = evaluations_of(read_metrics(tmp_path / "again"))[0]
    assert reloaded == pytest.approx({k[5:]: x for k, x in last.items()}, rel=1e-5, abs=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template == CHATML
    assert transformers.GenerationConfig.from_pretrained(out).eos_token_id == [3, 6]


# ========================================================================= kills and resuming
# 9 pairs in fours: a smaller last batch, on two processes a pass that one of them has no pair for;
# checkpoints on both sides of an epoch's end; a reference that is not the policy of any step.
LONG = ["--batch_size", 4, "--epochs", 8, "--lr", 1e-3, "--save_every", 2]
LONG += ["--loss", "dpo", "--beta", 0.5]


def long_run(place, out, *flags):
    sets = ["--dataset", place / "nine.jsonl", "--eval_dataset", place / "seven.jsonl"]
    return ["--model", place / "llama", *sets, *LONG, "--output_dir", out, *flags]


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "nothing has happened for a minute"
        time.sleep(0.002)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(kind, place, tmp_path):
    """Catches state that is not saved, or is saved in two places of which one is older. kill -9
    ends all processes. And a head, tied to the embeddings, that is saved a second time."""
    processes, flags = KINDS[kind][0], [*KINDS[kind][1], "--model", place / "tied"]
    expected, out, shown = tmp_path / "never_killed", tmp_path / "out", tmp_path / "shown"
    command = long_run(place, out, *flags, "--resume")
    started = start(processes, shown, *long_run(place, expected, *flags))
    assert codes(started) == [0] * processes, shown.read_text()[-3000:]
    assert len(steps_of(read_metrics(expected))) == 24
    rng, metrics = random.Random(kind), out / "metrics.jsonl"
    for steps in (6, 12, 18):
        started = start(processes, shown, *command)
        wait_for(lambda steps=steps: metrics.exists() and metrics.read_text().count("lr") >= steps)
        time.sleep(rng.uniform(0, 0.02))
        for process in rng.choice([started, started[::-1]]):
            process.kill()
        codes(started)
        assert not (out / "config.json").exists(), "it had ended before it was killed"
    assert codes(start(processes, shown, *command)) == [0] * processes
    assert_same_bits(expected, out)
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["checkpoint-22"]
    assert "lm_head.weight" not in load_file(out / "model.safetensors")


def killed_run(place, out, *flags):
    """A run of one process that is killed as soon as it has a checkpoint."""
    (process,) = start(1, out.parent / "shown", *long_run(place, out, *flags))
    wait_for(lambda: list(out.glob("checkpoint-*")))
    process.kill()
    process.join()


def test_another_number_of_processes_goes_on(place, tmp_path):
    """Catches checkpoints that only fit the number of processes that made them."""
    out, flags, shown = tmp_path / "out", ["--beta", 0.05], tmp_path / "shown"  # less to round
    simpo.main([str(x) for x in long_run(place, tmp_path / "whole", *flags)])
    killed_run(place, out, *flags)
    assert codes(start(2, shown, *long_run(place, out, *flags, "--resume"))) == [0, 0]
    assert_same_training(tmp_path / "whole", out)


def test_resuming_starts_goes_on_and_ends(place, tmp_path, capsys):
    """Catches --resume that fails where nothing has begun, trains what has ended, or takes a run
    of other flags for its own; and a run that is overwritten without it."""
    out = tmp_path / "run"
    killed_run(place, out, "--resume")
    assert "holds a run" in mistake(place, out, *long_run(place, out))
    other = long_run(place, out, "--resume", "--lr", 1e-4, "--beta", 0.1)
    assert "other ['lr', 'hyperparameters']" in mistake(place, out, *other)
    command = [str(x) for x in long_run(place, out, "--resume")]
    assert simpo.main(command).keys() > {"eval/loss"}
    written = (out / "model.safetensors").stat().st_mtime_ns
    assert simpo.main(command) == {} and "nothing left to do" in capsys.readouterr().out
    assert (out / "model.safetensors").stat().st_mtime_ns == written
    assert "holds a run" in mistake(place, out)


# ========================================================================= mistakes
def test_mistakes_of_the_keyboard_are_one_line(place, tmp_path):
    """Catches tracebacks for a typo in a path or a column, and a model that is overwritten."""
    out = tmp_path / "out"
    assert "no file" in mistake(place, out, "--dataset", tmp_path / "absent.jsonl")
    better = write_jsonl(tmp_path / "columns.jsonl", [{"question": "Hi", "better": "a"}])
    assert "and 'rejected', but has ['question'," in mistake(place, out, "--dataset", better)
    nothing = write_jsonl(tmp_path / "nothing.jsonl", [chat("x", "a", "a")])
    assert "no pair" in mistake(place, out, "--dataset", nothing)
    assert "holds a run" in mistake(place, place / "llama")


BAD_FLAGS = {  # flags -> what argparse must say
    "--lr fast": ["--lr", "fast"],
    "--loss sipmo": ["sipmo", "simpo", "dpo"],
    "--dtype fp16": ["fp16", "bf16"],
    "--batch 8": ["--batch"],  # no abbreviations
    "--tau 0.1": ["tau", "simpo", "gamma"],
    "--gamma 1 --loss orpo": ["gamma", "orpo", "lam"],
    "--no_length_norm --loss dpo": ["no_length_norm", "dpo"],
    "--model x": ["--dataset"],
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_a_bad_flag_is_named(flags, capsys):
    """Catches values that are taken and then mean nothing."""
    with pytest.raises(SystemExit) as end:
        simpo.main(flags.split())
    shown = capsys.readouterr().err
    assert end.value.code == 2 and shown.count("\n") == 2  # how it is used, and what is wrong
    assert [word for word in BAD_FLAGS[flags] if word not in shown] == []


# ========================================================================= the house
HOUSE = SCRIPT.parent
README = (HOUSE / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
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
            parsed = args[{"--lambda": "lam"}.get(flag, flag[2:])]
            assert parsed == type(parsed)(value)


def test_the_readmes_ratios_are_gamma_over_beta_of_its_recipes():
    """Catches numbers for users of the official code that are not those of the recipes."""
    assert len(RECIPES) == 6
    for flags, beta, gamma, ratio in RECIPES:
        assert float(ratio) == pytest.approx(float(gamma) / float(beta), abs=1e-9), flags


NOTEBOOKS = sorted((HOUSE / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@every_notebook
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path):
    """Catches what simpo.py has left behind, and claims that its asserts no longer bear out."""
    nbclient.execute(nbformat.read(path, as_version=4), cwd=str(tmp_path), timeout=600)


@every_notebook
def test_the_stored_outputs_are_of_one_clean_run(path):
    """Catches cells without output or run out of order, warnings, and a path of somebody's own."""
    text = path.read_text(encoding="utf-8")
    cells = nbformat.reads(text, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    assert 10 <= len(cells) <= 25 and len(text.encode()) < 1_500_000
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    assert all(x.output_type != "error" and x.get("name") != "stderr" for x in outputs)
    assert sum("image/png" in x.get("data", {}) for x in outputs) >= 4
    assert not re.search(r"/(root|home|Users|tmp|work|usr)/|[A-Z]:\\\\", text)


def test_the_house_keeps_its_caps():
    """Catches growth: a cap is kept by leaving out, never by packing or by loosening the cap."""
    for name, cap in {"simpo.py": 600, "test_simpo.py": 1100, "README.md": 230}.items():
        assert len((HOUSE / name).read_text(encoding="utf-8").splitlines()) <= cap, name
    source = SCRIPT.read_text(encoding="utf-8")
    lines = source.splitlines()
    documented = sum(bool(re.search(r"(^|\s)# ", line)) for line in lines)
    assert max(map(len, lines)) <= 100
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            cap = 60 if node.name in ("train", "main", "parse_args") else 40
            assert node.end_lineno - node.lineno < cap, node.name
        documentable = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documentable and ast.get_docstring(node):
            documented += node.body[0].end_lineno - node.body[0].lineno + 1
    assert 0.17 <= documented / len(lines) <= 0.28
