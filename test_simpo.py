"""Tests of simpo.py: what could go wrong without anybody noticing, and how one would notice.

Every expected number comes from somewhere else than simpo.py: worked out by hand in plain Python
floats, by a slow loop that scores one token at a time, or by another process. All models are tiny
and random, all files are made on the spot, and nothing needs a network or a GPU.
"""

import copy
import json
import math
import multiprocessing
import os
import random
import re
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter, namedtuple
from pathlib import Path
from statistics import mean

SCRIPT = Path(__file__).with_name("simpo.py")
README = SCRIPT.with_name("README.md").read_text(encoding="utf-8").replace("\\\n", " ")
CACHE = tempfile.TemporaryDirectory()  # removed when Python exits
# Set before the imports that read them, and handed down to the processes started below.
os.environ |= {"HF_HOME": CACHE.name, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "0"}
os.environ |= {"PYTHONPATH": f"{SCRIPT.parent}:{SCRIPT.parent / 'notebooks'}"}

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


def make_tokenizer(template=CHATML, bos="<s>", eos="<|im_end|>", pad=None, adds_bos=0, **more):
    """One token per byte, so that lengths can be counted by eye; more are `merges`, pairs of bytes
    that become one token, and `plain`, added tokens that are not special."""
    vocab = [*SPECIALS, *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    merges = more.get("merges", [])
    ids = {token: i for i, token in enumerate(vocab + [a + b for a, b in merges])}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=ids, merges=merges))
    options = {"add_prefix_space": False, "use_regex": False}
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(**options)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_tokens([tokenizers.AddedToken(x, special=False) for x in more.get("plain", [])])
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


Answer = namedtuple("Answer", "s ref n")  # of one answer: log pi, log pi_ref and |y|


def metrics_by_hand(pairs):
    """SimPO's metrics of (chosen, rejected) Answers, means over the pairs, with its defaults."""
    rewards = [(2.5 * w.s / w.n, 2.5 * l.s / l.n) for w, l in pairs]
    return {
        "loss": mean(-log_sigmoid(w - l - 1.4) for w, l in rewards),
        "rewards/chosen": mean(w for w, _ in rewards),
        "rewards/rejected": mean(l for _, l in rewards),
        "rewards/margins": mean(w - l for w, l in rewards),
        "rewards/accuracies": mean(float(w > l) for w, l in rewards),
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
TIMINGS = {"step_seconds", "pairs_per_second", "peak_memory_gib"}


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
    for row_one, row_two in zip(rows_one, rows_two, strict=True):
        assert row_one == pytest.approx(row_two, rel=1e-5, abs=1e-6)
    weights_one, weights_two = (load_file(*out.glob("*model.safetensors")) for out in (one, two))
    assert weights_one.keys() == weights_two.keys()
    for name in weights_one:
        torch.testing.assert_close(weights_one[name], weights_two[name], rtol=0, atol=2e-6)


def assert_same_bits(one, two):
    """The same weights, bit by bit, and the same rows of metrics.jsonl, timings apart."""
    assert untimed_rows(one) == untimed_rows(two)
    (file_one,), (file_two,) = (out.glob("*model.safetensors") for out in (one, two))
    assert file_one.read_bytes() == file_two.read_bytes()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def torchrun(processes, *argv, file=SCRIPT):
    """`torchrun --nproc_per_node=processes simpo.py argv`, which has to succeed."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command += [f"--master_port={free_port()}", file, *argv]
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
    logps = simpo.ResponseLogps(model, most_logits=3 * 264)(**simpo.collate(pairs))
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
        policy = simpo.wrap(model, simpo.parse_args(["--dtype", "bf16"]))
    logps = policy(**simpo.collate(pairs))
    assert logps.dtype == torch.float32
    assert logps.tolist() == pytest.approx(expected, rel=1e-5)


# ========================================================================= data
def tokenize(row, tokenizer, max_length=400, max_prompt_length=300):
    return simpo.tokenize_pair(row, tokenizer, max_length, max_prompt_length)


@every_style
def test_each_template_gets_one_bos_and_one_scored_end_of_turn(style):
    """Catches BOS or end of turn twice or never, a scored header, a scored newline after it, and
    the answers of earlier turns counted in log pi(y|x) and |y|."""
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
    turns = [*GOOD["prompt"], *GOOD["chosen"], {"role": "user", "content": "More?"}]
    last = tokenize(chat("", "Yes, more", "No") | {"prompt": turns}, tokenizer)
    assert tokenizer.decode(last["chosen_ids"]) == "Yes, more" + style.end  # no earlier turn
    assert re.search("Hi.*Hello.*More", tokenizer.decode(last["prompt_ids"]), re.DOTALL)


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


def test_whole_conversations_are_read_as_the_prompt_and_two_answers():
    """Catches the paper's datasets misread: there, `prompt` is a string beside the whole chats."""
    tokenizer, row = make_tokenizer(), chat("Hi?", "Hello", "Go")
    whole = {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}
    expected = tokenize(row, tokenizer)
    assert tokenize(whole, tokenizer) == expected
    assert tokenize(whole | {"prompt": "an id, or the first words"}, tokenizer) == expected
    assert tokenize(whole | {"prompt": row["prompt"]}, tokenizer) == expected
    assert tokenize(row | {"prompt": "Hi?"}, tokenizer) == expected  # a question as a string
    with_ids = {side: [x | {"id": side} for x in turns] for side, turns in whole.items()}
    assert tokenize(with_ids, tokenizer) == expected  # role and content make a prompt
    examples = [json.loads(example) for example in re.findall("`({.*})`", README)]
    messages, whole, plain = (tokenize(example, tokenizer) for example in examples)
    assert messages == whole and messages["chosen_ids"][0] == plain["chosen_ids"][1]  # a "4"


USER = "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
OPENS = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")  # only to ask for an answer
CLOSED = CHATML.replace("'\n' + m.content", "('\n<think>\n\n</think>\n\n' if m.role == 'assistant' "
                        "and '<think>' not in m.content else '\n') + m.content")  # fmt: skip
CHANNEL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.role == 'assistant' %}<|header|>final"
    "{% endif %}<|/header|>{{ m.content }}<|eot|>{% endfor %}" + GENERATE + "<|im_start|>assistant"
    "{% endif %}"
)
LATE = (  # the system prompt stands in the last turn of the user, if that is the last turn
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{% if loop.last %}"
    "{{ messages[0].content }} {% endif %}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
ENDLESS = (  # each text ends with the header of an answer
    "{% for m in messages %}{{ '<|header|>' + m.role + '<|/header|>' + m.content }}{% endfor %}"
    "<|header|>assistant<|/header|>"
)
SPACED = MISTRAL.replace("{{ bos_token }}", "").replace("{{ m.content", "{{ ' ' + m.content")
CHANNELED = "<|im_start|>user<|/header|>Hi?<|eot|><|im_start|>assistant<|header|>final<|/header|>"
NEWLINES = {"merges": [("Ċ", "Ċ")]}
MISTRAL_3 = {"template": LATE, "eos": "</s>"}
WORDS = {"template": SPACED, "eos": "</s>", "merges": [("Ġ", "S")]}
Kind = namedtuple("Kind", "tokenizer before end answer other", defaults=["So.", "No!"])
KINDS_OF_TEMPLATES = {  # arguments of make_tokenizer, the prompt's text, the end, both answers
    "a token spelled in the answer": Kind({}, USER, "<|im_end|>", "Write <s> or <|eot|>."),
    "a newline that merges with the header's": Kind(NEWLINES, USER, "<|im_end|>", "\nSo."),
    "a bracket that merges with the header's": Kind(
        MISTRAL_3 | {"merges": [("]", "(")]}, "[INST]Be kind. Hi?[/INST]", "</s>", "(So)"
    ),
    "asked for by <think>": Kind({"template": OPENS, **NEWLINES}, USER, "<|im_end|>"),
    "answered after an empty <think>": Kind(
        {"template": CLOSED}, USER + "<think>\n\n</think>\n\n", "<|im_end|>"
    ),
    "thinking, where others have an empty <think>": Kind(
        {"template": CLOSED},
        USER,
        "<|im_end|>",
        "<think>Hm</think>So.",
        "<think>\n\n</think>\n\nNo!",
    ),
    "a channel before the answer": Kind({"template": CHANNEL}, CHANNELED, "<|eot|>"),
    "white space before the answer": Kind(WORDS, "[INST] Hi? [/INST]", "</s>", " So.", " No!"),
    "no end of turn but the next header": Kind(
        {"template": ENDLESS, "eos": "</s>"},
        "<|header|>system<|/header|>Be kind.<|header|>user<|/header|>Hi?"
        "<|header|>assistant<|/header|>",
        "</s>",
    ),
    "no generation prompt": Kind({"template": CHATML.split(GENERATE)[0]}, USER, "<|im_end|>"),
    "an end that is not special": Kind(
        {"template": CHATML.replace("im_end", "stop"), "plain": ["<|stop|>"], "eos": "</s>"},
        USER.replace("im_end", "stop"),
        "<|stop|>",
    ),
}


@pytest.mark.parametrize("name", KINDS_OF_TEMPLATES)
def test_what_is_scored_is_the_answer_and_its_end_whatever_the_template_does(name):
    """Catches an answer that ends where it spells a token, a scored <think></think>, a header of
    more tokens when an answer follows, and a prompt that has lost its system message."""
    kind = KINDS_OF_TEMPLATES[name]
    tokenizer = make_tokenizer(**kind.tokenizer)
    row = chat("Hi?", kind.answer.strip(" "), "No!")
    if "Be kind" in kind.before:
        row["prompt"] = [{"role": "system", "content": "Be kind."}, *row["prompt"]]
    pair = tokenize(row, tokenizer)
    assert tokenizer.decode(pair["prompt_ids"]) == kind.before
    assert tokenizer.decode(pair["chosen_ids"]) == kind.answer + kind.end
    assert tokenizer.decode(pair["rejected_ids"]) == kind.other + kind.end


def test_an_answer_has_the_tokens_that_stand_behind_its_prompt():
    """Catches the space that SentencePiece puts before a text that is encoded alone."""
    vocab = ["<unk>", "<s>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxyzQA:\n", "▁b"]
    vocab += [f"<0x{i:02X}>" for i in range(256)]
    vocab = {x: i for i, x in enumerate(vocab)}
    tokenizer = transformers.LlamaTokenizer(vocab=vocab, merges=[("▁", "b")])
    pair = tokenize(texts("Q:\nA:\n", "because", "no"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(pair["chosen_ids"]) == [*"because", "</s>"]
    assert tokenizer.decode(pair["chosen_ids"][:-1]) == "because"


GOOD = chat("Hi?", "Hello", "Go")
CHAT_SIDES = {side: GOOD["prompt"] + GOOD[side] for side in ("chosen", "rejected")}
OTHER_PROMPT = [{"role": "user", "content": "Bye?"}, GOOD["rejected"][0]]
RAISING = "{{ raise_exception('roles must alternate') }}"
REWRITING = CHATML + "{{ '(the end)' if 'Hello' in messages[-1].content }}"
DROPS = {  # what is dropped -> (row, template, a word of the reason)
    "different prompts": (CHAT_SIDES | {"rejected": OTHER_PROMPT}, CHATML, "different ones"),
    "another prompt beside": (CHAT_SIDES | {"prompt": OTHER_PROMPT[:1]}, CHATML, "different ones"),
    "no prompt": (GOOD | {"prompt": []}, CHATML, "no prompt"),
    "an empty text as prompt": (texts("", "a", "b"), CHATML, "empty prompt"),
    "an empty answer": (chat("Hi?", "", "Go"), CHATML, "empty"),
    "white space as answer": (chat("Hi?", " \n", "Go"), CHATML, "empty"),
    "an empty text as answer": (texts("Hi?", "a", ""), CHATML, "empty"),
    "identical answers": (chat("Hi?", "Go", "Go"), CHATML, "identical"),
    "a long prompt": (chat("Hi?" * 99, "Hello", "Go"), CHATML, "long"),
    "a template that raises": (GOOD, RAISING, "roles must alternate"),
    "a template that rewrites": (GOOD, REWRITING, "(the end)"),
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

    column_names, _fingerprint, features = ("prompt", "chosen", "rejected"), "made up", {}

    def map(self, function, features, **_):
        return datasets.Dataset.from_list([function(*x) for x in zip(self, range(9))], features)


ODD = ["", " ", "\n", "\0", "\ufeff", "\u202e", "\r\n", "{{ 1 / 0 }}", "x" * 3000, *SPECIALS]
ODD += [None, 5, math.nan, True, [], {}, [None], [[]], {"role": "user"}, b"bytes"]


def odd_row(rng):
    """A row of each format in which something odd stands in one or two places."""
    row = copy.deepcopy(rng.choice([PLAIN[0], GOOD, CHAT_SIDES]))
    for _ in range(rng.randint(1, 2)):
        key, odd = rng.choice([*row]), rng.choice(ODD)
        if isinstance(row[key], list) and row[key] and rng.random() < 0.8:
            odd = {"role": rng.choice(["assistant", "user", ""]), "content": odd}
            row[key][rng.randrange(len(row[key]))] = odd if rng.random() < 0.8 else rng.choice(ODD)
        else:
            row[key] = odd
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
        end = "dropped" if " dropped: " in shown else "kept"
        assert f"2 rows, {2 if end == 'kept' else 1} pairs" in shown
        ends[end] += 1
        with torch.no_grad():
            assert torch.isfinite(policy(**simpo.collate([*pairs]))).all()
    assert sum(ends.values()) == 200 and len(ends) == 3 and min(ends.values()) >= 10, ends


def test_pairs_are_tokenized_once_and_again_when_code_has_changed(tmp_path, monkeypatch, capfd):
    """Catches a cache that is never asked, that outlives its code, tokenizer or lengths, and a
    second process of the machine that tokenizes, too."""
    calls = tmp_path / "calls"
    split_row = simpo.split_row

    def counted(row):
        with open(calls, "a") as file:
            print(file=file)
        return split_row(row)

    monkeypatch.setattr(simpo, "split_row", counted)
    tokenizer, args = make_tokenizer(), simpo.parse_args([])
    data = write_jsonl(tmp_path / "data.jsonl", [*NINE, chat("Hi", "a", "a")])

    def load(source=data):
        before = calls.read_text().count("\n") if calls.exists() else 0
        pairs = simpo.load_pairs(str(source), "train", tokenizer, args)
        assert "1 dropped: identical answers" in capfd.readouterr().out  # said each time
        return len(pairs), calls.read_text().count("\n") - before

    assert load() == (9, 10)
    assert load() == (9, 0)
    args.max_length = 50
    assert load()[1] == 10
    monkeypatch.setattr(simpo, "split_row", lambda row: counted(row))  # other code
    assert load()[1] == 10
    assert load()[1] == 0
    many = write_jsonl(tmp_path / "many.jsonl", [*NINE * 250, chat("Hi", "a", "a")])
    assert load(many) == (2250, 2251)  # by two processes, if there are so many
    assert load(many) == (2250, 0)


def test_what_is_dropped_and_cut_is_said(place, tmp_path, capsys):
    """Catches input that is changed without a word."""
    rows = [*NINE, chat("Hi", "a", "a"), chat("Hi", "", "b"), chat("Hi", "a", "a"), SEVEN[6]]
    data = write_jsonl(tmp_path / "data.jsonl", [row | {"system": "Be brief."} for row in rows])
    args = simpo.parse_args(["--max_length", "60"])
    assert len(simpo.load_pairs(str(data), "train", make_tokenizer(), args)) == 10
    shown = capsys.readouterr().out
    assert "13 rows, 10 pairs, 1 of them cut" in shown and "not read: ['system']" in shown
    assert "2 dropped: identical answers (row 10 first)" in shown and "1 dropped: an empty" in shown
    assert "prompt_ids end in '<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n'" in shown
    assert "chosen_ids end in 'Hello!<|im_end|>'" in shown


# ========================================================================= training: the numbers
@pytest.fixture(scope="session")
def nine_answers():
    return slow_answers(make_llama(), NINE)


def test_default_flags_train_with_the_papers_objective(place, tmp_path, nine_answers):
    """Catches flags whose defaults are not beta 2.5 and gamma 1.4, swapped metrics, and a batch of
    nine that is divided by 128."""
    flags = ["--eval_dataset", place / "seven.jsonl"]
    last, rows = run(place / "llama", place / "nine.jsonl", tmp_path / "out", *flags)
    before, after = evaluations_of(rows)
    expected = metrics_by_hand(slow_answers(make_llama(), SEVEN))
    assert before == pytest.approx(expected, rel=1e-5)
    assert {f"eval/{name}": x for name, x in after.items()} | {"step": 1} == last
    (step,) = steps_of(rows)  # 9 pairs are fewer than the 128 of a batch: one step
    expected = metrics_by_hand(nine_answers)
    assert {name: step[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert step.keys() == {*expected, *TIMINGS, "step", "epoch", "grad_norm", "lr"}
    assert step["lr"] == 1e-6 and step["epoch"] == 1
    assert all(step[name] > 0 for name in TIMINGS)


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


def test_each_epoch_sees_every_pair_once_in_an_order_of_its_own(place, tmp_path, nine_answers):
    """Catches pairs that are left out, seen twice, or never shuffled."""
    flags = ["--batch_size", 1, "--epochs", 2, *STILL]
    _, rows = run(place / "llama", place / "nine.jsonl", tmp_path / "out", *flags)
    losses = [row["loss"] for row in steps_of(rows)]
    in_file_order = [metrics_by_hand([pair])["loss"] for pair in nine_answers]
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


def write_poisoned(folder):  # a model that has NaN where it reads "~"
    model, tokenizer = make_llama(), make_tokenizer()
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.encode("~")] = math.nan
    return write_model(folder, model, tokenizer)


def test_a_step_that_is_not_finite_is_skipped_and_told(tmp_path, capfd):
    """Catches one bad pair that turns every weight into NaN while the log goes on."""
    model = write_poisoned(tmp_path / "poisoned")
    data = write_jsonl(tmp_path / "data.jsonl", [*NINE[:4], chat("~", "a", "b"), *NINE[4:]])
    _, rows = run(model, data, tmp_path / "out", "--batch_size", 1, "--lr", 1e-3)
    assert len(rows) == 10 and sum(row["loss"] is None for row in rows) == 1
    shown = capfd.readouterr().out
    assert len(re.findall(r"step \d+ skipped: loss nan, gradient norm nan", shown)) == 1
    weights = load_file(tmp_path / "out" / "model.safetensors")
    bad = {name: (~w.isfinite()).sum().item() for name, w in weights.items()}
    assert {name: n for name, n in bad.items() if n} == {"model.embed_tokens.weight": 32}


def test_ten_skipped_steps_end_the_run_and_nothing_is_saved(place, tmp_path):
    """Catches a run of which no step counts, and which ends as if it had trained."""
    model, out = write_poisoned(tmp_path / "poisoned"), tmp_path / "out"
    data = write_jsonl(tmp_path / "data.jsonl", [chat(f"~{i}", "a", "b") for i in range(30)])
    end = mistake(place, out, "--model", model, "--dataset", data, "--batch_size", 1)
    assert "10 steps in a row" in end and not (out / "config.json").exists()
    assert [row["loss"] for row in read_metrics(out)] == [None] * 10
    short = ["--model", model, "--dataset", data, "--batch_size", 10]  # three steps, all skipped
    assert "3 steps in a row" in mistake(place, tmp_path / "short", *short)


# ========================================================================= models
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
    assert reloaded == pytest.approx(evaluations_of([last])[0], rel=1e-5, abs=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template == CHATML
    assert transformers.GenerationConfig.from_pretrained(out).eos_token_id == [3, 6]


# ========================================================================= kills and resuming
# 9 pairs in fours: a smaller last batch, on two processes a pass that one of them has no pair for;
# checkpoints on both sides of an epoch's end; a reference that is not the policy of any step.
LONG = ["--batch_size", 4, "--epochs", 8, "--lr", 1e-3, "--save_every", 2, "--eval_every", 4]
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
    rows = read_metrics(expected)
    assert [row["step"] for row in steps_of(rows)] == [*range(1, 25)]
    assert [row["step"] for row in rows if "eval/loss" in row] == [0, 4, 8, 12, 16, 20, 24]
    rng, metrics = random.Random(kind), out / "metrics.jsonl"
    for steps in (6, 12, 18):
        started = start(processes, shown, *command)
        wait_for(lambda steps=steps: metrics.exists() and metrics.read_text().count("lr") >= steps)
        time.sleep(rng.uniform(0, 0.02))
        for process in rng.choice([started, started[::-1]]):
            process.kill()
        codes(started)
        assert not (out / "simpo_ended.json").exists(), "it had ended before it was killed"
    assert codes(start(processes, shown, *command)) == [0] * processes
    assert_same_bits(expected, out)
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["checkpoint-22"]
    assert "lm_head.weight" not in load_file(out / "model.safetensors")


def killed_run(place, out, *flags, file=SCRIPT):
    """A run of one process that is killed as soon as it has a checkpoint."""
    (process,) = start(1, out.parent / "shown", *long_run(place, out, *flags), file=file)
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
    of other flags or pairs for its own; and a run that is overwritten without it."""
    out, data = tmp_path / "run", write_jsonl(tmp_path / "data.jsonl", NINE)
    command = long_run(place, out, "--dataset", data)
    killed_run(place, out, "--dataset", data, "--resume")
    assert "holds a run" in mistake(place, out, *command)
    other = [*command, "--resume", "--lr", 1e-4, "--beta", 0.1]
    assert "other ['lr', 'hyperparameters']" in mistake(place, out, *other)
    write_jsonl(data, [*NINE[:8], chat("Bye", "See you", "!")])
    assert "other ['pairs']" in mistake(place, out, *command, "--resume")
    write_jsonl(data, NINE)
    last = simpo.main([str(x) for x in (*command, "--resume")])
    assert last == {"step": 24} | last and last.keys() > {"eval/loss"}
    written = (out / "model.safetensors").stat().st_mtime_ns
    assert simpo.main([str(x) for x in (*command, "--resume")]) == {}
    assert "nothing left to do" in capsys.readouterr().out
    assert (out / "model.safetensors").stat().st_mtime_ns == written
    assert "holds a run" in mistake(place, out)


def test_a_copy_of_a_checkpoint_is_a_persons_own(place, tmp_path):
    """Catches a copy that the next save deletes, or that --resume takes for a checkpoint."""
    out, copies = tmp_path / "run", ("checkpoint-2-keep", "checkpoint-old", "checkpoint-")
    killed_run(place, out)
    for name in copies:
        shutil.copytree(*out.glob("checkpoint-*[0-9]"), out / name)
    simpo.main([str(x) for x in long_run(place, out, "--resume")])
    assert sorted(x.name for x in out.glob("checkpoint-*")) == sorted([*copies, "checkpoint-22"])


def test_of_two_runs_that_begin_in_one_folder_one_trains(place, tmp_path):
    """Catches rows of two runs in one file."""
    out, shown = tmp_path / "run", tmp_path / "shown"
    started = [start(1, shown, *long_run(place, out))[0] for _ in range(2)]
    assert sorted(codes(started)) == [0, 1] and "FileExistsError" in shown.read_text()
    assert len(steps_of(read_metrics(out))) == 24


# ========================================================================= looking on
def test_fit_evaluates_and_asks_before_between_and_after(place, tmp_path, monkeypatch):
    """Catches an evaluation that is late, lost or not written, and a model that is not the one in
    training; rows that a tracker does not see."""
    model, seen, logged = make_llama(), [], []
    pairs = [tokenize(row, make_tokenizer()) for row in NINE]
    flags = ["--batch_size", "1", "--eval_every", "4", "--lr", "1e-3"]
    args = simpo.parse_args([*flags, "--output_dir", str(tmp_path / "out")])
    write = simpo.log
    monkeypatch.setattr(simpo, "log", lambda row, out: (logged.append(row), write(row, out)))

    def on_evaluate(trained, step):
        assert trained is model
        seen.append(step)
        return {"eval/norm": model.lm_head.weight.norm().item()}

    rows = simpo.fit(model, pairs, pairs[:7], args, on_evaluate)
    assert rows == logged == read_metrics(tmp_path / "out")
    assert seen == [0, 4, 8, 9] == [row["step"] for row in rows if "eval/loss" in row]
    norms = [row["eval/norm"] for row in rows if "eval/norm" in row]
    assert len(set(norms)) == 4 and norms[-1] == model.lm_head.weight.norm().item()
    own = metrics_by_hand(slow_answers(model, NINE[:7]))
    assert rows[-1]["eval/loss"] == pytest.approx(own["loss"], rel=1e-5)
