"""SimPO, Simple Preference Optimization with a Reference-Free Reward, in one file.

For a prompt x, a chosen answer y_w and a rejected answer y_l (Eq. 6 of arXiv:2405.14734):

    loss = -log sigmoid( beta/|y_w| log pi(y_w|x)  -  beta/|y_l| log pi(y_l|x)  -  gamma )

    python simpo.py                                               # demo: no network, a minute
    python simpo.py --model M --dataset D --eval_dataset E        # one CPU or GPU
    torchrun --nproc_per_node=8 simpo.py --model M --dataset D    # eight GPUs
    python simpo.py --help                                        # every flag, with its default

Rooms, in order: objectives, log-likelihood, data, configuration, runtime, training, demo, main.
Shapes: B pairs, R rows, T tokens of a row, N scored tokens of a batch, V vocabulary, D hidden.

Where this file departs from the paper:
 1. It computes in bf16 over fp32 weights (autocast); log-softmax, sums and losses are fp32.
 2. A prompt above --max_prompt_length loses its middle: the template's opening (BOS, system
    turn) and the prompt's end (last words, assistant header) stay.
Where it departs from the authors' code, princeton-nlp/SimPO:
 3. --gamma is the paper's gamma; the official gamma_beta_ratio is gamma / beta.
 4. The prompt is rendered with the assistant header, so the header is not scored; the answer
    ends with exactly one end-of-turn token, scored, and nothing after it.
 5. Each answer is cut by itself to the room its prompt leaves. A cut answer gets no end of turn.
 6. A pair with an empty answer is dropped before training, not divided by its length 0.
 7. Metrics cover all pairs of all processes, not those of rank 0.
"""

import contextlib
import json
import math
import os
import random
import resource
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


# ------------------------------------------------------------------------------ objectives
def simpo_loss(
    chosen_avg_logps: Tensor, rejected_avg_logps: Tensor, beta=2.5, gamma=1.4, label_smoothing=0.0
) -> Tensor:
    """SimPO's loss of each pair, [B] (arXiv:2405.14734, Eq. 6). There is no reference model.

    *_avg_logps [B]: log pi(y|x) / |y|, in nats per token. beta > 0 scales them to rewards, and
    gamma >= 0 is the margin, in reward units, by which the chosen answer must win.
    label_smoothing in [0, 0.5]: how likely it is that a pair's two answers were swapped.
    """
    margin = beta * (chosen_avg_logps - rejected_avg_logps) - gamma
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """DPO's loss of each pair, [B] (arXiv:2305.18290, Eq. 7).

    *_logps [B]: log pi(y|x), in nats, summed over the answer; ref_*: the reference's. beta > 0:
    0.1 is the DPO paper's. label_smoothing in [0, 0.5]: as in simpo_loss.
    """
    margin = beta * ((chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps))
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


# Of one side, the chosen (yw) or rejected (yl) answers, all [B]: s = log pi(y|x), n = |y|, the
# average a = s / n that SimPO is about, and s_ref = log pi_ref(y|x). c is the Config.
OBJECTIVES = {  # name -> losses [B]
    "simpo": lambda yw, yl, c: simpo_loss(yw.a, yl.a, c.beta, c.gamma, c.label_smoothing),
    "dpo": lambda yw, yl, c: dpo_loss(yw.s, yl.s, yw.s_ref, yl.s_ref, c.beta, c.label_smoothing),
    "sft": lambda yw, yl, c: -yw.a,
}
REWARDS = {  # name -> the objective's implicit reward of one side [B], for the metrics
    "simpo": lambda y, c: c.beta * y.a,
    "dpo": lambda y, c: c.beta * (y.s - y.s_ref),
    "sft": lambda y, c: y.a,
}
DEFAULT_BETA = {"simpo": 2.5, "dpo": 0.01}
NEEDS_REFERENCE = {"dpo"}
LENGTH_NORMALISED = {"simpo", "sft"}  # they report logps/* per token, the others per answer


# ------------------------------------------------------------------------------ log-likelihood
class ResponseLogps(nn.Module):
    """A causal language model that scores answers; the one module that DDP wraps."""

    def __init__(self, model: nn.Module, chunk: int = 1024):
        super().__init__()
        self.model, self.chunk = model, chunk  # no more than [chunk, V] logits at one time

    def token_logps(self, hidden: Tensor, target_ids: Tensor) -> Tensor:
        logits = self.model.get_output_embeddings()(hidden).float()  # [chunk, V]
        if cap := getattr(self.model.config, "final_logit_softcapping", None):  # Gemma 2
            logits = cap * torch.tanh(logits / cap)
        return -F.cross_entropy(logits, target_ids, reduction="none")

    def forward(
        self, input_ids, position_ids, logit_index, target_ids, response_index, lengths
    ) -> tuple[Tensor, Tensor]:
        """What `collate` makes of B pairs -> logps [2B], fp32, in nats, and lengths [2B].

        logps[i] = sum_t log pi(y_t | x, y_<t) of answer i, the B chosen ones first. Only the
        hidden states that predict an answer's token meet the head, a chunk at a time, and
        backward computes the chunk's logits anew: [R, T, V] logits never exist.
        """
        backbone = self.model.base_model  # all below the language-model head
        hidden = backbone(input_ids=input_ids, position_ids=position_ids, use_cache=False)[0]
        hidden = hidden.flatten(0, 1)[logit_index]  # [R, T, D] -> [N, D]
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        chunks = zip(hidden.split(self.chunk), target_ids.split(self.chunk))
        logps = torch.cat([again(self.token_logps, h, y) for h, y in chunks])  # [N]
        sums = torch.zeros(len(lengths), device=logps.device)  # [2B]
        return sums.index_add(0, response_index, logps), lengths


# ------------------------------------------------------------------------------ data
class UserError(Exception):
    """A mistake of the person at the keyboard: one line that names the file, row or flag."""


def split_row(row: dict) -> tuple[list[dict] | str, list[str]] | None:
    """A row in any format -> its prompt, as messages or a text, and the texts of both answers.

    None where the two do not answer the same prompt.
    """
    for name in ("chosen", "rejected", "prompt"):
        value = row.get(name) if name != "prompt" or row.get(name) is not None else ""
        texts = [m.get("content") for m in value] if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{name!r} is {value!r:.60}, neither a text nor a list of messages")
    prompt, sides = row.get("prompt"), [row["chosen"], row["rejected"]]
    if all(isinstance(side, str) for side in sides) and not isinstance(prompt, list):
        if prompt is not None:
            return prompt, sides
        heads, marks, answers = zip(*(side.rpartition("\n\nAssistant:") for side in sides))
        if not all(marks):  # it is not in the style of hh-rlhf either
            raise UserError("there is no 'prompt', nor a '\\n\\nAssistant:' in both answers")
        return (heads[0] + marks[0], list(answers)) if heads[0] == heads[1] else None
    sides = [[{"role": "assistant", "content": s}] if isinstance(s, str) else s for s in sides]
    if isinstance(prompt, str) and len(sides[0]) == len(sides[1]) == 1:
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list):  # the sides continue it, unless they begin with it
        sides = [s if prompt and s[: len(prompt)] == prompt else prompt + s for s in sides]
    if not all(len(s) > 1 and s[-1].get("role") == "assistant" for s in sides):
        raise UserError("'chosen' and 'rejected' must end in an assistant's answer to a prompt")
    same = sides[0][:-1] == sides[1][:-1]
    return (sides[0][:-1], [side[-1]["content"] for side in sides]) if same else None


@cache
def turn_ending(tokenizer) -> tuple[str, str]:
    """What the template writes after an answer, and its part to score: up to one end of turn."""
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "@@"}]
    tail = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("@@")[2]
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    ends = [tail.find(token) + len(token) for token in special if token in tail]
    return tail, tail[: min(ends)] if ends else tail.rstrip() + tokenizer.eos_token


def tokenize_pair(
    row: dict, tokenizer, max_length: int, max_prompt_length: int, drop=lambda reason: None
) -> dict | None:
    """A preference row -> {"prompt_ids", "chosen_ids", "rejected_ids", "truncated"}.

    Or drop(reason), None by default, where an answer is empty or has no room, or the two are
    identical or answer different prompts. Lengths are in tokens: max_prompt_length for the
    prompt, max_length for prompt and answer. Raises UserError on a malformed row.
    """
    prompt, answers = split_row(row) or (None, [])
    if prompt is None or not all(answer.strip() for answer in answers):
        return drop("an empty answer" if answers else "two prompts")
    encode, start = partial(tokenizer.encode, add_special_tokens=False), []
    if isinstance(prompt, str):  # BOS if the tokenizer is used to one; one EOS after the answer
        text, other, end = prompt, "", tokenizer.eos_token
        if encode(text)[:1] != [tokenizer.bos_token_id]:
            start = [i for i in tokenizer.encode("a")[:1] if i == tokenizer.bos_token_id]
        answers = [answer.removesuffix(end) + end for answer in answers]
    elif tokenizer.chat_template:
        render = partial(tokenizer.apply_chat_template, tokenize=False)
        text = render(prompt, add_generation_prompt=True)
        full = [render([*prompt, {"role": "assistant", "content": a}]) for a in answers]
        tail, end = turn_ending(tokenizer)
        if not all(f.startswith(text) and f.endswith(tail) for f in full):
            raise UserError("the chat template writes this prompt differently before an answer")
        answers = [f[len(text) : len(f) - len(tail)] + end for f in full]
        other = [m if m["role"] == "system" else m | {"content": "@@"} for m in prompt]
        other = render(other, add_generation_prompt=True)
    else:
        raise UserError("these are messages, but the model's tokenizer has no chat template")
    # An answer is encoded where it stands. If its first letters merge into the prompt's last
    # token there, it is encoded alone: the prompt must be the same for both answers.
    prompt_ids, sides = start + encode(text), []
    for answer in answers:
        joint = start + encode(text + answer)
        merges = joint[: len(prompt_ids)] != prompt_ids
        sides.append(encode(answer) if merges else joint[len(prompt_ids) :])
    if cut := max(len(prompt_ids) - max_prompt_length, 0):
        # What a prompt of other words has in common with this one is the template's, and stays.
        ids = prompt_ids, start + encode(other)
        head, tail = (len(os.path.commonprefix(x)) for x in (ids, [i[::-1] for i in ids]))
        keeps = head + tail < max_prompt_length
        prompt_ids = prompt_ids[:head] + prompt_ids[head + cut :] if keeps else prompt_ids
    room = max_length - len(prompt_ids)
    if room < 1 or not 0 < len(prompt_ids) <= max_prompt_length:
        return drop("no room for an answer" if prompt_ids else "an empty prompt")
    chosen_ids, rejected_ids = (ids[:room] for ids in sides)
    if chosen_ids == rejected_ids:
        return drop("identical answers")
    pair = {"prompt_ids": prompt_ids, "chosen_ids": chosen_ids, "rejected_ids": rejected_ids}
    return pair | {"truncated": cut > 0 or [chosen_ids, rejected_ids] != sides}


def collate(pairs: list[dict], pad_token_id: int = 0) -> dict[str, Tensor]:
    """B tokenized pairs -> what ResponseLogps.forward takes: R = 2B rows, the chosen ones first.

    Padding is on the right, where no token of a causal model sees it: so there is no mask, and
    any pad_token_id gives the same scores.
    """
    rows = [(p["prompt_ids"], p[side]) for side in ("chosen_ids", "rejected_ids") for p in pairs]
    lengths = torch.tensor([len(answer) for _, answer in rows])  # [2B] by count, never by value
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    padded = [[*x, *y] + [pad_token_id] * (width - len(x) - len(y)) for x, y in rows]
    # The hidden state of the last prompt token predicts the first token of the answer.
    starts = [r * width + len(prompt) - 1 for r, (prompt, _) in enumerate(rows)]
    return {
        "input_ids": torch.tensor(padded),  # [R, T]
        "position_ids": torch.arange(width).expand(len(rows), width),  # [R, T]
        "logit_index": torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths)]),  # [N]
        "target_ids": torch.tensor([token for _, answer in rows for token in answer]),  # [N]
        "response_index": torch.arange(len(rows)).repeat_interleave(lengths),  # [N]
        "lengths": lengths,
    }


@contextlib.contextmanager
def blame(what: str, path: Path | None = None):
    """Turn any error inside into one line about `what`, a flag with its file or a row."""
    try:
        yield
    except Exception as e:
        why = (f"{e.__cause__ or e}".strip() or "it is empty").splitlines()[0]
        if path and not path.exists():
            why += "; it is no file or folder here, and a hub needs a network"
        elif path and path.suffix == ".jsonl" and not isinstance(e, UserError):
            for number, line in enumerate(path.read_bytes().splitlines(), 1):
                try:
                    json.loads(line.strip() or "{}")
                except ValueError as error:
                    why = f"line {number} is not JSON: {error}"
                    break
        raise UserError(f"{what}: {why}") from e


def load_pairs(name: str, source: str, split: str, tokenizer, config) -> tuple:
    """A hub id, file or save_to_disk folder -> its usable pairs, each with its "row" from 1 up,
    and how many of the others were dropped or truncated."""
    import datasets  # here, so that all the rest works without it

    def encode(row: dict, index: int) -> dict:
        empty = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": [], "truncated": False}
        limits = config.max_length, config.max_prompt_length
        with blame(f"row {index + 1}"):
            pair = tokenize_pair(row, tokenizer, *limits, lambda why: empty | {"dropped": why})
        return {"row": index + 1, "dropped": "", **pair}

    datasets.logging.set_verbosity(100)  # what it would log, it also raises
    path, kinds = (
        Path(source),
        {"jsonl": "json", "json": "json", "parquet": "parquet", "csv": "csv"},
    )
    with blame(f"--{name} {source}", path):
        if any(path.glob("dataset_*.json")):
            rows = datasets.load_from_disk(source)
            rows = rows[split] if isinstance(rows, dict) else rows
        elif kind := kinds.get(path.suffix[1:]):
            rows = datasets.load_dataset(kind, data_files=source, split=split)
        else:
            rows = datasets.load_dataset(source, split=split)
        if missing := {"chosen", "rejected"}.difference(rows.column_names):
            raise UserError(f"no column {sorted(missing)}; its columns are {rows.column_names}")
        workers = min(os.cpu_count() or 1, len(rows) // 500) or None
        options = {"remove_columns": rows.column_names, "num_proc": workers, "desc": "tokenizing"}
        pairs = rows.map(encode, with_indices=True, **options)
        dropped = Counter(why for why in pairs["dropped"] if why)
        why = "".join(f", {n} for {reason}" for reason, n in dropped.items())
        kept = pairs.select([i for i, reason in enumerate(pairs["dropped"]) if not reason])
        if not len(kept):
            raise UserError(f"no pair is left of {len(rows)}{why}")
    counts = {"dropped_pairs": dropped.total(), "truncated_pairs": sum(kept["truncated"])}
    tokens = [sum(map(len, kept[key])) / len(kept) for key in list(kept.features) if "_ids" in key]
    print0(f"{name} {source}: {len(rows)} pairs read, {counts}{why}; mean tokens {tokens}")
    return kept, counts


# ------------------------------------------------------------------------------ configuration
def flag(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    model: str | None = flag(None, "hub id or folder of the model to train; unset: the demo")
    dataset: str | None = flag(None, "hub id, .jsonl/.json/.parquet/.csv, or save_to_disk folder")
    eval_dataset: str | None = flag(None, "held-out pairs; unset: --eval_split of --dataset")
    train_split: str = flag("train", "of --dataset; slices like train[:1000] work, too")
    eval_split: str | None = flag(None, "of held-out pairs; unset: train of --eval_dataset")
    loss: str = flag("simpo", "objective: " + ", ".join(OBJECTIVES))
    beta: float | None = flag(None, f"scale of the reward; unset: {DEFAULT_BETA}")
    gamma: float = flag(1.4, "SimPO's target margin, in reward units")
    label_smoothing: float = flag(0.0, "share of pairs held to be swapped, 0 to 0.5")
    ref_model: str | None = flag(None, "DPO's reference; unset: the starting policy")
    lr: float = flag(1e-6, "peak learning rate; cosine to 0")
    batch_size: int = flag(128, "pairs per optimizer step, over all processes")
    micro_batch_size: int | None = flag(None, "pairs per forward pass of a process; unset: up to 4")
    epochs: int = flag(1, "passes over the pairs")
    max_steps: int | None = flag(None, "optimizer steps; unset: as --epochs says")
    max_length: int = flag(2048, "tokens of a prompt and an answer")
    max_prompt_length: int | None = flag(None, "tokens of a prompt; unset: 1800/2048 of max_length")
    warmup_ratio: float = flag(0.1, "share of the steps in which the learning rate rises")
    weight_decay: float = flag(0.0, "AdamW's")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm; 0: never")
    gradient_checkpointing: bool = flag(False, "keep fewer activations, compute them twice")
    seed: int = flag(0, "of the order of pairs")
    dtype: Literal["bf16", "fp32"] | None = flag(
        None, "of compute; unset: bf16 on GPU, fp32 on CPU"
    )
    output_dir: str = flag("simpo_output", "for the model, metrics.jsonl and simpo_run.json")
    overwrite: bool = flag(False, "replace a model in --output_dir")
    log_every: int = flag(1, "steps per row of metrics.jsonl")
    eval_every: int = flag(0, "steps between evaluations; 0: just before and after")
    inspect: int = flag(0, "show this many pairs as the model sees them, and exit")
    wandb: str | None = flag(None, "Weights & Biases project to log to")


def parse_config(argv: list[str] | None) -> Config:
    """The command line, checked, with what depends on other flags filled in."""

    def error(message: str):
        raise UserError(message)

    parser = transformers.HfArgumentParser(Config, prog="simpo.py", allow_abbrev=False)
    parser.error = error  # one line, not forty of usage
    argv = sys.argv[1:] if argv is None else argv
    if not any(word.startswith(("--model", "--dataset")) for word in argv):
        parser.set_defaults(**DEMO)
    (c,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    c.beta = DEFAULT_BETA.get(c.loss, 1.0) if c.beta is None else c.beta
    c.dtype = c.dtype or ("bf16" if DEVICE.type == "cuda" else "fp32")
    c.max_prompt_length = c.max_prompt_length or c.max_length * 1800 // 2048
    share, micro = c.batch_size // WORLD_SIZE, c.micro_batch_size
    c.micro_batch_size = micro = (
        math.gcd(share, 4 if c.model else share) if micro is None else micro
    )
    whole = micro > 0 and c.batch_size > 0 and c.batch_size % (WORLD_SIZE * micro) == 0
    taken = (Path(c.output_dir) / "config.json").exists() and not c.overwrite and not c.inspect
    checks = [
        (
            bool(c.model) == bool(c.dataset),
            "--model and --dataset: give both, or none for the demo",
        ),
        (c.loss in OBJECTIVES, f"--loss {c.loss} is not one of {', '.join(OBJECTIVES)}"),
        (c.beta > 0, f"--beta {c.beta} is not above 0"),
        (
            0 <= c.label_smoothing <= 0.5,
            f"--label_smoothing {c.label_smoothing} is not in 0 to 0.5",
        ),
        (whole, f"--batch_size {c.batch_size} is no multiple of {WORLD_SIZE} processes x {micro}"),
        (not c.ref_model or c.loss in NEEDS_REFERENCE, f"--ref_model: {c.loss} has no reference"),
        (not taken, f"--output_dir {c.output_dir} holds a model; --overwrite would replace it"),
    ]
    for name in ("lr", "epochs", "max_length", "log_every"):
        checks.append(
            (0 < getattr(c, name) < math.inf, f"--{name} {getattr(c, name)} is not above 0")
        )
    for holds, message in checks:
        if not holds:
            error(message)
    if c.loss == "simpo" and c.gamma > c.beta:
        print0(f"warning: gamma/beta is {c.gamma / c.beta:.2f}; the paper tuned it from 0 to 1")
    return c


# ------------------------------------------------------------------------------ runtime
RANK, LOCAL_RANK, WORLD_SIZE = (  # as torchrun says, or the only process
    int(os.environ.get(name, default))
    for name, default in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))
)
DEVICE = torch.device("cuda", LOCAL_RANK) if torch.cuda.is_available() else torch.device("cpu")


def print0(text: str) -> None:
    if RANK == 0:
        tqdm.write(text)


def peak_memory_gib() -> float:
    """Of the GPU's allocator, or of the process on a CPU."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    return (torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else peak) / 2**30


def load_policy(name: str, source: str, config: Config) -> ResponseLogps:
    """A model with fp32 weights, whatever the checkpoint's: bf16 ones ignore steps of lr 1e-6."""
    load = partial(transformers.AutoModelForCausalLM.from_pretrained, use_safetensors=True)
    with blame(f"--{name} {source}", Path(source)):
        model = load(source, dtype=torch.float32).to(DEVICE)
        policy = ResponseLogps(model.eval())  # eval, in training too: no dropout
        pair = {"prompt_ids": [0, 1], "chosen_ids": [2, 3], "rejected_ids": [4]}
        batch = {key: x.to(DEVICE) for key, x in collate([pair]).items()}
        with torch.no_grad():  # some models scale their logits outside the head
            logits, targets = model(batch["input_ids"][:1]).logits[0, 1:3], batch["target_ids"][:2]
            right = -F.cross_entropy(logits, targets, reduction="sum")
            if not torch.isclose(policy(**batch)[0][0], right, rtol=1e-3):
                raise UserError(f"{type(model).__name__} changes its logits after the head")
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in model.modules():  # layers check this, dropout its own: it stays off
            layer.training = isinstance(
                layer, transformers.modeling_layers.GradientCheckpointingLayer
            )
    return policy


# ------------------------------------------------------------------------------ training
METRICS = "loss rewards/chosen rewards/rejected rewards/margins rewards/accuracies logps/chosen"
METRICS = [*METRICS.split(), "logps/rejected", "avg_logps/chosen", "avg_logps/rejected", "tokens"]


def score(policy, pairs, indices, reference, config, backward=False) -> Tensor:
    """METRICS of the pairs at `indices`, [B, K], computed by all processes together.

    reference [all pairs, 2]: logps under the reference. backward=True leaves the gradient of the
    mean loss in .grad: the same for any number of processes and any micro-batch size.
    """
    table = torch.zeros(len(indices), len(METRICS), dtype=torch.float64, device=DEVICE)
    width = WORLD_SIZE * config.micro_batch_size
    for start in range(0, len(indices), width):
        # All processes make the same number of passes; one that is out of pairs makes idle ones.
        mine = list(range(start, min(start + width, len(indices))))[RANK::WORLD_SIZE]
        weight, mine = (1, mine) if mine else (0, [0])
        rows = [pairs[indices[i]] for i in mine]
        policy.require_backward_grad_sync = start + width >= len(indices)  # DDP: at the last pass
        with torch.set_grad_enabled(backward):
            batch = {key: x.to(DEVICE) for key, x in collate(rows).items()}
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=config.dtype == "bf16"):
                logps, n = policy(**batch)
            s, n = logps.view(2, -1), n.view(2, -1)  # [2B] -> [2, B]
            s_ref = reference[[indices[i] for i in mine]].T.to(DEVICE)
            yw, yl = (
                SimpleNamespace(s=s[i], n=n[i], a=s[i] / n[i], s_ref=s_ref[i]) for i in (0, 1)
            )
            losses = OBJECTIVES[config.loss](yw, yl, config)
            if backward:  # DDP averages over processes; times their number, that is a sum
                (losses.sum() * (weight * WORLD_SIZE / len(indices))).backward()
        rw, rl = (REWARDS[config.loss](y, config) for y in (yw, yl))
        logps = [y.a if config.loss in LENGTH_NORMALISED else y.s for y in (yw, yl)]
        tokens = n.sum(0) + 2 * torch.tensor(
            [len(row["prompt_ids"]) for row in rows], device=DEVICE
        )
        columns = [losses, rw, rl, rw - rl, rw > rl, *logps, yw.a, yl.a, tokens]
        table[mine] = weight * torch.stack([x.detach().double() for x in columns], dim=1)
    if dist.is_initialized():
        dist.all_reduce(table)
    return table.cpu()


def train(policy, pairs, reference: Tensor, config: Config, steps: int, log, evaluate) -> None:
    """Train in place; log(row) every --log_every steps, evaluate(step) every --eval_every."""
    params = list(policy.parameters())
    optimizer = torch.optim.AdamW(params, config.lr, weight_decay=config.weight_decay, fused=True)
    warmup = math.ceil(config.warmup_ratio * steps)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    if WORLD_SIZE > 1:
        ddp = partial(nn.parallel.DistributedDataParallel, broadcast_buffers=False)
        policy = ddp(policy, gradient_as_bucket_view=True)
    bar, per_epoch = tqdm(total=steps, disable=RANK > 0), math.ceil(len(pairs) / config.batch_size)
    window, since, skipped = [], time.perf_counter(), 0
    for step in range(1, steps + 1):
        epoch, k = divmod(step - 1, per_epoch)
        if k == 0:  # every epoch has its own order, the same on every process
            shuffle = torch.Generator().manual_seed(config.seed + epoch)
            order = torch.randperm(len(pairs), generator=shuffle).tolist()
        batch = order[k * config.batch_size :][: config.batch_size]
        table = score(policy, pairs, batch, reference, config, backward=True)
        norm = nn.utils.clip_grad_norm_(params, config.max_grad_norm or math.inf).item()
        bad = [pairs[i]["row"] for i, loss in zip(batch, table[:, 0]) if not loss.isfinite()]
        if math.isfinite(norm) and not bad:
            optimizer.step()
            skipped = 0
            window.append(table)
        else:  # such a step would turn every weight into NaN
            skipped += 1
            bad = bad or [pairs[i]["row"] for i in batch]
            log({"step": step, "skipped_rows": bad})
            print0(f"step {step} is skipped: not finite, from rows {bad}")
            if skipped == 10:
                raise UserError(
                    f"ten steps in a row were not finite; look at rows {bad}, or lower --lr"
                )
        optimizer.zero_grad()
        (lr,) = schedule.get_last_lr()
        schedule.step()
        bar.update()
        if window and (step % config.log_every == 0 or step == steps):
            seconds, done = time.perf_counter() - since, torch.cat(window)
            row = {
                "step": step,
                "epoch": step / per_epoch,
                **dict(zip(METRICS[:7], done.mean(0).tolist())),
            }
            row |= {"grad_norm": norm, "lr": lr, "step_seconds": seconds / len(window)}
            row |= {
                "pairs_per_second": len(done) / seconds,
                "tokens_per_second": done[:, -1].sum().item() / seconds,
            }
            row["peak_memory_gib"] = peak_memory_gib()
            log(row)
            bar.set_postfix_str(
                "loss {loss:.4f}, accuracy {rewards/accuracies:.3f}, margin {rewards/margins:.3f}, "
                "lr {lr:.1e}, {tokens_per_second:.0f} tokens/s".format(**row)
            )
            window, since = [], time.perf_counter()
        if config.eval_every and step % config.eval_every == 0 and step < steps:
            evaluate(step)
            since = time.perf_counter()
    bar.close()


def inspect_pairs(policy, tokenizer, pairs, reference, config) -> None:
    """Print the first pairs as the model sees them: prompts, and what is scored in colour."""
    tty = sys.stdout.isatty()
    table = score(policy, pairs, range(min(config.inspect, len(pairs))), reference, config)
    for metrics, pair in zip(table.tolist(), pairs):
        values = dict(zip(METRICS, metrics))
        print0(f"row {pair['row']}, prompt ({len(pair['prompt_ids'])} tokens):")
        print0(tokenizer.decode(pair["prompt_ids"]))
        for side, colour in (("chosen", "\033[32m"), ("rejected", "\033[31m")):
            ids = pair[f"{side}_ids"]
            average, reward = values[f"avg_logps/{side}"], values[f"rewards/{side}"]
            print0(
                f"{side} ({len(ids)} tokens, average log-prob {average:.4f}, reward {reward:.4f}):"
            )
            print0((colour if tty else "[[") + tokenizer.decode(ids) + ("\033[0m" if tty else "]]"))


# ------------------------------------------------------------------------------ demo
DEMO = {
    "lr": 2e-5,
    "batch_size": 32,
    "max_steps": 100,
    "output_dir": "simpo_demo",
    "overwrite": True,
}


def build_demo(config: Config) -> tuple:
    """A tiny Llama that answers a word half of the time with its letters sorted, the chosen answer,
    and half of the time with the word reversed; its tokenizer, and pairs to train and to test."""
    tokenizer = transformers.ByT5Tokenizer(extra_ids=0)  # bytes: nothing to download
    dice, _ = random.Random(config.seed), torch.manual_seed(config.seed)
    words = dict.fromkeys(
        "".join(dice.sample("abcdefghijklmnopqrstuvwxyz", 5)) for _ in range(4000)
    )
    rows = [{"prompt": w + "=", "chosen": "".join(sorted(w)), "rejected": w[::-1]} for w in words]
    pairs = [tokenize_pair(row, tokenizer, 64, 32) for row in rows]
    pairs = [pair | {"row": i} for i, pair in enumerate(pairs, 1) if pair]
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
    shape |= {"num_attention_heads": 4, "vocab_size": len(tokenizer), "eos_token_id": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, pad_token_id=0))
    policy = ResponseLogps(model.to(DEVICE).eval())
    optimizer = torch.optim.AdamW(policy.parameters(), 2e-3)
    for _ in tqdm(range(700), "fitting the demo's model", leave=False, disable=RANK > 0):
        batch = collate(dice.sample(pairs[200:], 32))
        logps, lengths = policy(**{key: x.to(DEVICE) for key, x in batch.items()})
        (-logps / lengths).mean().backward()  # the sft objective, of good and bad answers alike
        optimizer.step()
        optimizer.zero_grad()
    return tokenizer, policy, pairs[200:], pairs[:200]


@torch.no_grad()
def judge(model, pairs) -> float:
    """The share of pairs whose prompt the model, sampling, answers exactly as it should."""
    torch.manual_seed(0)
    prompts = torch.tensor([pair["prompt_ids"] for pair in pairs], device=DEVICE)
    answers = model.generate(prompts, do_sample=True, max_new_tokens=len(pairs[0]["chosen_ids"]))
    right = [a[-len(p["chosen_ids"]) :].tolist() == p["chosen_ids"] for a, p in zip(answers, pairs)]
    return sum(right) / len(right)


# ------------------------------------------------------------------------------ main
def main(argv: list[str] | None = None) -> dict:
    """Train as the command line says; -> the metrics of the last evaluation."""
    transformers.logging.set_verbosity_error()
    config = parse_config(argv)
    if WORLD_SIZE > 1 and not dist.is_initialized():
        backend = "nccl" if DEVICE.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=1))
    if config.model is None:
        print0(
            "This is the demo; --model and --dataset train a real model, on a hub id or a local folder"
        )
        tokenizer, policy, pairs, held_out = build_demo(config)
        counts = {}
    else:
        with blame(f"--model {config.model}", Path(config.model)):
            tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
        if RANK > 0:  # rank 0 tokenizes, the others read what it has cached
            dist.barrier()
        pairs, counts = load_pairs("dataset", config.dataset, config.train_split, tokenizer, config)
        source, held_out = config.eval_dataset or config.dataset, []
        if config.eval_dataset or config.eval_split:
            held_out, _ = load_pairs(
                "eval_dataset", source, config.eval_split or "train", tokenizer, config
            )
        if RANK == 0 and WORLD_SIZE > 1:
            dist.barrier()
        policy = load_policy("model", config.model, config)
    references = [torch.zeros(len(data), 2) for data in (pairs, held_out)]
    if config.loss in NEEDS_REFERENCE:  # once, and kept: no second model stays in memory
        scorer = load_policy("ref_model", config.ref_model, config) if config.ref_model else policy
        for i, data in enumerate((pairs, held_out)):
            references[i] = score(scorer, data, range(len(data)), references[i], config)[
                :, 5:7
            ].float()
        del scorer
    if config.inspect:
        inspect_pairs(policy, tokenizer, pairs, references[0], config)
        return {}
    per_epoch = math.ceil(len(pairs) / config.batch_size)
    steps = config.max_steps or per_epoch * config.epochs
    size = sum(p.numel() for p in policy.parameters())
    print0(
        f"model     {config.model or 'demo'}: {size:,} parameters in fp32, {config.dtype} compute on {DEVICE}"
    )
    passes = config.batch_size // WORLD_SIZE // config.micro_batch_size
    print0(
        f"batch     {config.batch_size} pairs = {WORLD_SIZE} processes x {config.micro_batch_size} pairs x {passes} passes"
    )
    print0(
        f"steps     {steps}, {per_epoch} to an epoch of {len(pairs)} pairs; {config.loss}, lr {config.lr}"
    )
    out = Path(config.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    record = {
        **asdict(config),
        "world_size": WORLD_SIZE,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    status, commit = subprocess.getstatusoutput(f"git -C '{Path(__file__).parent}' rev-parse HEAD")
    record["git_commit"] = None if status else commit
    if RANK == 0:
        (out / "simpo_run.json").write_text(json.dumps(record, indent=2))
        (out / "metrics.jsonl").write_text("")
    wandb = None
    if config.wandb and RANK == 0:
        try:
            import wandb
        except ImportError:
            raise UserError("--wandb needs `pip install wandb`") from None
        wandb.init(project=config.wandb, config=record)

    def log(row: dict) -> None:
        if RANK == 0:
            with open(out / "metrics.jsonl", "a") as f:
                f.write(json.dumps(row | {k: n for k, n in counts.items() if n}) + "\n")
            if wandb:
                wandb.log(row)

    history = []

    def evaluate(step: int) -> dict:
        if not len(held_out):
            return {}
        means = (
            score(policy, held_out, range(len(held_out)), references[1], config).mean(0).tolist()
        )
        row = {f"eval/{name}": value for name, value in zip(METRICS[:8], means)}
        history.append(row)
        row["eval/chosen_drift"] = row.pop("eval/avg_logps/chosen")
        row["eval/chosen_drift"] -= history[0]["eval/chosen_drift"] if len(history) > 1 else 0
        if config.model is None:
            row["eval/judge_win_rate"] = judge(policy.model, held_out)
        log({"step": step} | row)
        print0(f"step {step}: " + ", ".join(f"{k[5:]} {v:.4f}" for k, v in row.items()))
        return row

    before = evaluate(0)
    start = time.perf_counter()
    train(policy, pairs, references[0], config, steps, log, evaluate)
    seconds = time.perf_counter() - start
    after = evaluate(steps)
    if RANK == 0:
        policy.model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    if after:
        print0(
            f"held out  accuracy {before['eval/rewards/accuracies']:.3f} -> {after['eval/rewards/accuracies']:.3f}"
        )
    print0(f"cost      {seconds:.0f} s, peak memory {peak_memory_gib():.1f} GiB")
    print0(f"model     in {out}: AutoModelForCausalLM.from_pretrained({str(out)!r})")
    return after


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        if LOCAL_RANK == 0:
            print(f"simpo.py: error: {e}", file=sys.stderr)
        sys.exit(2)
