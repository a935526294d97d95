"""SimPO, Simple Preference Optimization with a Reference-Free Reward, and its rivals, in one file.

For a prompt x, a chosen answer y_w and a rejected answer y_l (Eq. 6 of arXiv:2405.14734):

    loss = -log sigmoid( beta/|y_w| log pi(y_w|x)  -  beta/|y_l| log pi(y_l|x)  -  gamma )

    python simpo.py                                               # demo: no network, a minute
    python simpo.py --model M --dataset D --eval_dataset E        # one CPU or GPU
    torchrun --nproc_per_node=8 simpo.py --model M --dataset D    # eight GPUs

Shapes: B pairs, R rows, T tokens of a row, N scored tokens of a batch, V vocabulary, D hidden.
Departures from the paper (1, 2) and from the authors' code, princeton-nlp/SimPO (3 to 8):
 1. Compute is bf16, from fp32 weights; log-softmax, sums, losses and Adam's steps are fp32.
 2. A prompt above --max_prompt_length loses what follows the template's opening, not its end.
 3. --gamma is the paper's gamma; the official gamma_beta_ratio is gamma / beta.
 4. An answer is scored from after the assistant header to one end-of-turn token, and no further.
 5. Each answer is cut by itself to the room its prompt leaves; a cut one has no end of turn.
 6. A pair with an empty answer is dropped before training, not divided by its length 0.
 7. Metrics cover all pairs of all processes, not those of rank 0.
 8. In messages the text of a control token stays text, and does not become the token.
"""

import argparse
import contextlib
import ctypes
import fcntl
import gc
import glob
import hashlib
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
import warnings
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, get_args

import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.attention.bias import causal_lower_right
from tqdm import tqdm


# ------------------------------------------------------------------------------ objectives
def simpo_loss(
    chosen_avg_logps: Tensor,
    rejected_avg_logps: Tensor,
    beta: float = 2.5,
    gamma: float = 1.4,
    label_smoothing: float = 0.0,
    hinge: bool = False,
) -> Tensor:
    """SimPO's loss of each pair, [B] (arXiv:2405.14734, Eq. 6). There is no reference model.
    *_avg_logps [B]: log pi(y|x) / |y|, in nats per token. beta > 0 makes rewards of them; gamma,
    >= 0: the margin of reward by which the chosen answer must win; label_smoothing in [0, 0.5]:
    how likely it is that a pair's two answers were swapped; hinge: max(0, 1 - m) for -log sigmoid.
    """
    margin = beta * (chosen_avg_logps - rejected_avg_logps) - gamma
    loss = (lambda m: F.relu(1 - m)) if hinge else (lambda m: -F.logsigmoid(m))
    return (1 - label_smoothing) * loss(margin) + label_smoothing * loss(-margin)


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """DPO's loss of each pair, [B] (arXiv:2305.18290, Eq. 7).
    *_logps [B]: log pi(y|x), in nats, summed over the answer; ref_*: the reference's. beta > 0,
    0.1 in the DPO paper. label_smoothing as in simpo_loss.
    """
    margin = beta * ((chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps))
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def log_odds(a: Tensor) -> Tensor:
    """log p / (1 - p) of p = exp(a); expm1 keeps its digits where p is almost 1."""
    return a - torch.log(-torch.expm1(a.clamp(max=-1e-9)))


# Table 3 of the paper: name -> losses [B]. s = log pi(y|x), a = s / |y|, the log-ratio to the
# reference r = s - s_ref, and n = |y| have .w, of the chosen answers, and .l, of the rejected, [B].
# After the * stand the hyperparameters, which are flags, and their defaults. KTO's z is an estimate
# of KL(policy, reference): the mean of beta r over all answers of a step, but 0 at least.
Sides = namedtuple("Sides", "w l")
OBJECTIVES = {
    "simpo": lambda s, a, r, n, *, no_length_norm=False, lam=0.0, **options: (
        simpo_loss(*(s if no_length_norm else a), **options) - lam * a.w
    ),
    "dpo": lambda s, a, r, n, *, beta=0.01, label_smoothing=0.0: dpo_loss(
        *r, 0, 0, beta, label_smoothing
    ),  # the reference is in r
    "ipo": lambda s, a, r, n, *, tau=0.1: (r.w - r.l - 1 / (2 * tau)) ** 2,  # of sums, as printed
    "cpo": lambda s, a, r, n, *, beta=0.1, lam=1.0: -F.logsigmoid(beta * (s.w - s.l)) - lam * s.w,
    "kto": lambda s, a, r, n, z=0.0, *, beta=0.1, lambda_w=1.0, lambda_l=1.0: (
        -lambda_w * torch.sigmoid(beta * r.w - z) - lambda_l * torch.sigmoid(z - beta * r.l)
    ),
    "orpo": lambda s, a, r, n, *, lam=0.1: -a.w - lam * F.logsigmoid(log_odds(a.w) - log_odds(a.l)),
    "rrhf": lambda s, a, r, n, *, lam=1.0: F.relu(a.l - a.w) - lam * s.w,
    "slic": lambda s, a, r, n, *, delta=1.0, lam=1.0: F.relu(delta - s.w + s.l) - lam * s.w,
    "rdpo": lambda s, a, r, n, *, beta=0.1, alpha=0.05: (
        -F.logsigmoid(beta * (r.w - r.l) + alpha * (n.w - n.l))
    ),
    "sft": lambda s, a, r, n: -a.w,
}
HYPERPARAMETERS = {name: dict(loss.__kwdefaults__ or {}) for name, loss in OBJECTIVES.items()}
# SimPO's other four stand in the signature of simpo_loss, after its two tensors.
HYPERPARAMETERS["simpo"] |= zip([*simpo_loss.__annotations__][2:], simpo_loss.__defaults__)
NEEDS_REFERENCE = {"dpo", "ipo", "kto", "rdpo"}
LENGTH_NORMALISED = {"simpo", "orpo", "rrhf", "sft"}  # these compare averages a, the others sums


def implicit_rewards(logps, s_ref, n, beta=1.0, tau=1.0, alpha=0.0, **others) -> Tensor:
    """What each objective holds for the reward of an answer; the metrics rewards/* are these.
    SimPO: beta a; DPO, KTO: beta r; IPO: tau r; CPO: beta s; ORPO, RRHF, SFT: a; SLiC: s.
    R-DPO seeks reward - alpha |y|, so the reward is beta r + alpha |y|.
    """
    return beta * tau * (logps - s_ref) + alpha * n  # no objective has both beta and tau


# ------------------------------------------------------------------------------ log-likelihood
class ResponseLogps(nn.Module):
    """A causal language model that scores answers; the module whose forward FSDP knows."""

    def __init__(self, model: nn.Module, chunk: int = 1024):
        super().__init__()
        self.model, self.chunk = model, chunk  # no more than [chunk, V] logits at one time
        self.share_prompt = False  # may `collate` pack its batches? `can_share_prompt` says so

    def token_logps(self, hidden: Tensor, target_ids: Tensor) -> Tensor:
        logits = self.model.get_output_embeddings()(hidden).float()  # [chunk, V]
        if cap := getattr(self.model.config, "final_logit_softcapping", None):  # Gemma 2
            logits = cap * torch.tanh(logits / cap)
        return -F.cross_entropy(logits, target_ids, reduction="none")

    def forward(
        self, input_ids, position_ids, logit_index, target_ids, response_index, lengths, **plan
    ) -> tuple[Tensor, Tensor]:
        """What `collate` makes of B pairs -> logps [2B], fp32, in nats, and lengths [2B].
        logps[i] = sum_t log pi(y_t | x, y_<t) of answer i, the B chosen ones first. Only hidden
        states that predict an answer's token meet the head, a chunk at a time, and backward
        computes the chunk's logits anew: [R, T, V] logits never exist.
        """
        options = {"position_ids": position_ids, "use_cache": False, **plan}
        hidden = self.model.base_model(input_ids, **options)[0]  # all below the head
        hidden = hidden.flatten(0, 1)[logit_index]  # [R, T, D] -> [N, D]
        options = {"use_reentrant": False, "preserve_rng_state": False}
        chunks = zip(hidden.split(self.chunk), target_ids.split(self.chunk))
        logps = [torch.utils.checkpoint.checkpoint(self.token_logps, *c, **options) for c in chunks]
        sums = torch.zeros(len(lengths), device=hidden.device)  # [2B]
        return sums.index_add(0, response_index, torch.cat(logps)), lengths


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """[1, heads, Q, d] over keys and values [1, fewer heads, K, d]; the last query sees all keys."""
    (heads, q, d), (groups, k) = query.shape[1:], key.shape[1:3]
    if query.is_cuda or query.dtype != torch.bfloat16:
        options = {"attn_mask": causal_lower_right(q, k), "enable_gqa": heads != groups}
        return F.scaled_dot_product_attention(query, key, value, scale=scale, **options)
    # On a CPU products of bf16 matrices are three times as fast as the library's bf16 kernel.
    scores = ((query * (scale or d**-0.5)).reshape(groups, -1, d) @ key[0].mT).view(heads, q, k)
    scores += scores.new_full((q, k), -math.inf).triu(k - q + 1)  # no query sees later keys
    return (scores.softmax(-1).view(groups, -1, k) @ value[0]).view(1, heads, q, -1)


@torch.compiler.disable
def segment_attention(module, query, key, value, attention_mask, plan, scaling=None, **options):
    """Attention of a row [prompt chosen rejected][prompt chosen rejected]...; see `collate`.
    Chosen tokens see prompt and chosen, rejected ones prompt and rejected: two causal attentions a
    pair, and neither padding nor a mask over the row. [1, heads, T, d] -> [1, T, heads, d].
    """
    outputs, sizes = [], [sum(lengths) for lengths in plan]
    parts = (x.split(sizes, dim=2) for x in (query, key, value))
    for (prompt, chosen, _), q, k, v in zip(plan, *parts):
        middle = prompt + chosen
        outputs.append(causal_attention(*(x[:, :, :middle] for x in (q, k, v)), scaling))
        k, v = (torch.cat([x[:, :, :prompt], x[:, :, middle:]], dim=2) for x in (k, v))
        outputs.append(causal_attention(q[:, :, middle:], k, v, scaling))
    return torch.cat(outputs, 2).transpose(1, 2), None


transformers.AttentionInterface.register("segments", segment_attention)


# ------------------------------------------------------------------------------ data
# Tokenized pairs; lengths [pairs, 3] of prompt, chosen and rejected answer, in tokens; a digest of
# them all; and the reference's logps of the answers, [pairs, 2], 0 where there is no reference.
Data = namedtuple("Data", "pairs lengths digest reference")


GUARD = "\ufdd0\ufdd1"  # which no text has: Unicode keeps the two for use within a program


class UserError(Exception):
    """A mistake of the person at the keyboard: one line that names the file, row or flag."""


def split_row(row: dict) -> tuple[list[dict] | str, str, str] | None:
    """A row in any format -> its prompt, messages or text, and answers; None if it has no such."""
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    for name, value in {"chosen": chosen, "rejected": rejected, "prompt": prompt or ""}.items():
        messages = value if isinstance(value, list) else [{"role": "text", "content": value}]
        pairs = [(m.get("role"), m.get("content")) for m in messages if isinstance(m, dict)]
        right = all(isinstance(part, str) for pair in pairs for part in pair)
        if not right or len(pairs) < len(messages):
            raise UserError(f"{name!r} is {value!r:.70}: no text, nor messages of role and content")
    if type(chosen) is not type(rejected):
        raise UserError("one of 'chosen' and 'rejected' is text, the other one messages")
    if isinstance(chosen, str) and prompt is not None:
        return prompt, chosen, rejected
    if isinstance(chosen, str):  # hh-rlhf: each side is a dialogue that ends in an answer
        head, mark, chosen = chosen.rpartition("\n\nAssistant:")
        other, _, rejected = rejected.rpartition("\n\nAssistant:")
        return (head + mark, chosen, rejected) if head == other else None
    if isinstance(prompt, str) and len(chosen) == 1:
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and chosen[: len(prompt)] != prompt:  # the sides continue it
        chosen, rejected = prompt + chosen, prompt + rejected
    if any(not side or side[-1]["role"] != "assistant" for side in (chosen, rejected)):
        raise UserError("'chosen' and 'rejected' must end in a message of the assistant")
    same = chosen[:-1] == rejected[:-1]
    return (chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]) if same else None


def render_pair(prompt: list[dict], answers: list[str], tokenizer) -> tuple[str, str, list[str]]:
    """Messages -> the prompt's text, that of other words in its place, and the answers' texts.
    Where a message has the text of a control token in it, GUARD keeps it from becoming one.
    """
    control = {*tokenizer.all_special_tokens}
    control |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}

    def guard(text: str) -> str:
        for token in control:
            text = text.replace(token, token[:1] + GUARD + token[1:])
        return text

    prompt = [message | {"content": guard(message["content"])} for message in prompt]
    answers = [guard(text) for text in answers]
    render = partial(tokenizer.apply_chat_template, tokenize=False)
    reply = [[*prompt, {"role": "assistant", "content": text}] for text in (*answers, "@@")]
    *full, stub = (render(messages) for messages in reply)
    tail = stub.rpartition("@@")[2]  # after an answer; the part up to one end of turn is scored
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    ends = [tail.find(token) + len(token) for token in special if token in tail]
    end = tail[: min(ends)] if ends else tail.rstrip() + tokenizer.eos_token
    other = [m if m["role"] == "system" else m | {"content": "@@"} for m in prompt]
    text, other = (render(x, add_generation_prompt=True) for x in (prompt, other))
    if not all(f.startswith(text) and f.endswith(tail) for f in full):
        raise UserError("the chat template writes this prompt differently before an answer")
    return text, other, [f[len(text) : len(f) - len(tail)] + end for f in full]


def tokenize_pair(
    row: dict, tokenizer, max_length: int, max_prompt_length: int, drop=lambda reason: None
) -> dict | None:
    """A preference row -> {"prompt_ids", "chosen_ids", "rejected_ids", "lengths", "truncated"}.
    Or drop(reason), None by default, where an answer is empty or has no room, or the two are
    identical or answer different prompts. Lengths are in tokens: max_prompt_length for the
    prompt, max_length for prompt and answer. Raises UserError on a malformed row.
    """
    prompt, *answers = split_row(row) or (None,)
    if not prompt or not all(answer.strip() for answer in answers):
        return drop("an empty answer" if prompt else "no prompt, or two different ones")

    def encode(text: str) -> list[int]:
        parts = text.split(GUARD)
        return [i for x in parts for i in tokenizer.encode(x, add_special_tokens=False)]

    start = []
    if isinstance(prompt, list):
        text, other, answers = render_pair(prompt, answers, tokenizer)
    else:  # a plain text: BOS if the tokenizer is used to one, and one EOS after the answer
        text, other, eos = prompt, "", tokenizer.eos_token
        if encode(text)[:1] != [tokenizer.bos_token_id]:
            start = [i for i in tokenizer.encode("a")[:1] if i == tokenizer.bos_token_id]
        answers = [answer.removesuffix(eos) + eos for answer in answers]
    # An answer is encoded where it stands. If its first letters merge into the prompt's last
    # token there, it is encoded alone: the prompt must be the same for both answers.
    prompt_ids, sides = start + encode(text), []
    for answer in answers:
        joint = start + encode(text + answer)
        stands = joint[: len(prompt_ids)] == prompt_ids
        sides.append(joint[len(prompt_ids) :] if stands else encode(answer))
    if cut := max(len(prompt_ids) - max_prompt_length, 0):
        ids = [prompt_ids, start + encode(other)]  # what they share is the template's: it stays
        head, tail = (len(os.path.commonprefix(x)) for x in (ids, [i[::-1] for i in ids]))
        if head + tail >= max_prompt_length:
            return drop("no room for the prompt")
        prompt_ids = prompt_ids[:head] + prompt_ids[head + cut :]
    if (room := max_length - len(prompt_ids)) < 1:
        return drop("no room for an answer")
    kept = [ids[:room] for ids in sides]
    pair = {"prompt_ids": prompt_ids, "chosen_ids": kept[0], "rejected_ids": kept[1]}
    pair |= {"lengths": [len(ids) for ids in pair.values()], "truncated": cut > 0 or kept != sides}
    return pair if kept[0] != kept[1] else drop("identical answers")


def collate(pairs: list[dict], pad_token_id: int = 0, share_prompt: bool = False) -> dict:
    """B tokenized pairs -> what ResponseLogps.forward takes, in one of two layouts.
    Plain: R = 2B rows [prompt chosen] ... [prompt rejected] ..., the chosen ones first. Padding is
    on the right, where no token of a causal model sees it: so there is no mask.
    share_prompt: R = 1 row [prompt chosen rejected][prompt chosen rejected]... without padding,
    each prompt once; positions of both answers go on from the prompt's end. The plan [B, 3], of
    lengths, is what `segment_attention` goes by.
    """
    sides = ("prompt_ids", "chosen_ids", "rejected_ids")
    prompts, chosen, rejected = ([pair[side] for pair in pairs] for side in sides)
    answers, plan = chosen + rejected, {}
    if share_prompt:
        plan = {"plan": [[len(pair[side]) for side in sides] for pair in pairs]}
        row, positions, ends = [], [], []
        for p, c, r in zip(prompts, chosen, rejected):
            ends.append(len(row) + len(p))
            row += p + c + r
            positions += [*range(len(p + c)), *range(len(p), len(p + r))]
        input_ids, position_ids = torch.tensor([row]), torch.tensor([positions])  # [1, T]
        starts = ends + [end + len(c) for end, c in zip(ends, chosen)]
        ends = ends * 2
    else:
        rows = [torch.tensor(p + y) for p, y in zip(prompts * 2, answers)]
        input_ids = nn.utils.rnn.pad_sequence(rows, True, pad_token_id)  # [2B, T]
        position_ids = torch.arange(input_ids.shape[1]).repeat(len(rows), 1)
        starts = ends = [i * input_ids.shape[1] + len(p) for i, p in enumerate(prompts * 2)]
    # A token is predicted one place before it; an answer's first one at the end of the prompt.
    spans = zip(ends, starts, answers)
    index = [i for end, start, y in spans for i in (end - 1, *range(start, start + len(y) - 1))]
    lengths = torch.tensor([len(y) for y in answers])  # [2B]
    return plan | {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "logit_index": torch.tensor(index),  # [N]
        "target_ids": torch.tensor([token for y in answers for token in y]),  # [N]
        "response_index": torch.arange(len(answers)).repeat_interleave(lengths),  # [N]
        "lengths": lengths,
    }


@contextlib.contextmanager
def blame(what: str, source: str | None = None):
    """Turn an error inside into one line about `what`: a flag and its source, a line, a row."""
    try:
        yield
    except Exception as e:
        ours = type(e).__name__ in ("UserError", "FileNotFoundError")  # by name: of a worker, too
        why = f"{e if ours else e.__cause__ or e}".strip() or "it is empty"
        local = ours or source is None or os.path.exists(source)
        hint = "" if local else " (without a network, pass a local file or folder)"
        raise UserError(f"{what}: {why.splitlines()[0]}{hint}") from e


def digest(x) -> str:
    return hashlib.sha256(repr(x).encode()).hexdigest()[:12]


def read_rows(source: str, split: str):
    """A hub id, file or folder -> its rows, a datasets.Dataset."""
    import datasets  # here, so that all the rest works without it

    datasets.logging.set_verbosity(100)  # what it would log, it also raises
    path, suffix = Path(source), Path(source).suffix
    for number, line in enumerate(path.open("rb") if suffix == ".jsonl" else (), 1):
        with blame(f"line {number}"):  # the library would not say where it fails
            if not isinstance(value := json.loads(line.strip() or "{}"), dict):
                raise UserError(f"{value!r:.70} is no object with chosen and rejected")
            json.dumps(value, ensure_ascii=False).encode()  # fails at half a character
    if path.is_file():
        cells = dict.fromkeys(("prompt", "chosen", "rejected"), str)  # or 4 were a number
        options = {"keep_default_na": False, "converters": cells} if suffix == ".csv" else {}
        folder, options["data_files"] = str(path.absolute().parent), glob.escape(path.name)
        rows = datasets.load_dataset(folder, split=split, **options)
    elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        rows = datasets.load_from_disk(source)  # of save_to_disk
        rows = rows[split] if isinstance(rows, dict) else rows
    else:
        rows = datasets.load_dataset(source, split=split)
    if suffix == ".csv" and "__index_level_0__" in rows.column_names:
        raise UserError("more cells than column names; texts with commas in them need quotes")
    if missing := {"chosen", "rejected"}.difference(rows.column_names):
        raise UserError(f"no column {sorted(missing)}; its columns are {rows.column_names}")
    return rows


def load_pairs(name: str, split: str, tokenizer, config) -> tuple[Data, dict]:
    """What a flag names -> its usable pairs, "row" from 1 up, and counts of what is lost."""
    limits = config.max_length, config.max_prompt_length  # not config: its lr would spoil the cache
    empty = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": [], "truncated": False}
    empty["lengths"] = [0, 0, 0]

    def encode(row: dict, index: int) -> dict:
        with blame(f"row {index + 1}"):
            pair = tokenize_pair(row, tokenizer, *limits, lambda why: empty | {"dropped": why})
        return {"row": index + 1, "dropped": "", "digest": digest(pair), **pair}

    source, split = getattr(config, name) or config.dataset, split or "train"
    with blame(f"--{name} {source} [{split}]", source):
        rows = read_rows(source, split)
        options = {"remove_columns": rows.column_names, "desc": "tokenizing"}
        options["num_proc"] = min(os.cpu_count() or 1, len(rows) // 500) or None
        options["load_from_cache_file"] = __name__ == "__main__"  # it'd miss edits of an import
        pairs = rows.map(encode, with_indices=True, **options)
        dropped = list(pairs["dropped"])  # reasons, "" for the pairs that are kept
        kept = pairs.select([i for i, reason in enumerate(dropped) if not reason])
        why = ", ".join(f"{x}: {dropped.count(x)}" for x in sorted({*dropped} - {""}))
        if not len(kept):
            raise UserError(f"none of {len(rows)} rows with {rows.column_names} is left: {why}")
    lost, cut = len(rows) - len(kept), sum(kept["truncated"])
    lengths = torch.tensor(list(kept["lengths"]))
    means = zip(("prompt", "chosen", "rejected"), lengths.double().mean(0).tolist())
    print(f"{name:13}{source}: {len(rows)} pairs read, {lost} dropped{why and f' ({why})'}")
    print(f"{'':13}{cut} truncated; mean tokens:", ", ".join(f"{k} {x:.0f}" for k, x in means))
    lost = {"dropped_pairs": lost, "truncated_pairs": cut}
    data = Data(kept, lengths, digest(list(kept["digest"])), torch.zeros(len(kept), 2))
    return data, {name: count for name, count in lost.items() if count}


# ------------------------------------------------------------------------------ configuration
@dataclass
class Config:
    model: Annotated[str | None, "hub id or folder of the model to train; unset: the demo"] = None
    dataset: Annotated[str | None, "hub id, .jsonl/.json/.parquet/.csv file, or folder"] = None
    eval_dataset: Annotated[str | None, "held-out pairs; unset: --eval_split of --dataset"] = None
    train_split: Annotated[str, "of --dataset; slices like train[:1000] work, too"] = "train"
    eval_split: Annotated[str | None, "of held-out pairs; unset: train of --eval_dataset"] = None
    loss: Annotated[str, "objective"] = "simpo"
    beta: Annotated[float | None, "scale of the reward, or of the log-ratios"] = None
    gamma: Annotated[float | None, "target margin, in reward units; 0: the ablation"] = None
    label_smoothing: Annotated[float | None, "share of pairs held to be swapped, 0 to 0.5"] = None
    hinge: Annotated[bool | None, "max(0, 1 - m) in place of -log sigmoid(m)"] = None
    no_length_norm: Annotated[bool | None, "the ablation: sums in place of averages"] = None
    lam: Annotated[float | None, "weight of the SFT term, or of the odds ratio", "--lambda"] = None
    tau: Annotated[float | None, "strength of the regularisation"] = None
    lambda_w: Annotated[float | None, "weight of chosen answers"] = None
    lambda_l: Annotated[float | None, "weight of rejected answers"] = None
    delta: Annotated[float | None, "target margin, in nats"] = None
    alpha: Annotated[float | None, "penalty per token of an answer"] = None
    ref_model: Annotated[str | None, "the reference, if any; unset: the starting policy"] = None
    lr: Annotated[float, "peak learning rate; cosine to 0"] = 1e-6
    batch_size: Annotated[int, "pairs per optimizer step, over all processes"] = 128
    micro_batch_tokens: Annotated[int | None, "most tokens in a pass; unset: by device"] = None
    micro_batch_size: Annotated[int | None, "most pairs in a pass; unset: what fits in it"] = None
    epochs: Annotated[int, "passes over the pairs"] = 1
    max_steps: Annotated[int, "optimizer steps; 0: as --epochs says"] = 0
    max_length: Annotated[int, "tokens of a prompt and an answer"] = 2048
    max_prompt_length: Annotated[int | None, "of these, the prompt's; unset: 1800/2048"] = None
    warmup_ratio: Annotated[float, "share of the steps in which the learning rate rises"] = 0.1
    weight_decay: Annotated[float, "AdamW's weight decay"] = 0.0
    max_grad_norm: Annotated[float, "gradients are clipped to this norm; 0: never"] = 1.0
    gradient_checkpointing: Annotated[bool, "keep fewer activations, compute them twice"] = False
    shard: Annotated[bool, "spread the model over the processes, for one too big for each"] = False
    compile: Annotated[bool, "torch.compile each layer; slow to start"] = False
    seed: Annotated[int, "of the order of pairs, and of the demo"] = 0
    dtype: Annotated[str | None, "of compute, bf16 or fp32; unset: bf16 on GPU only"] = None
    output_dir: Annotated[str, "for the model, metrics.jsonl and simpo_run.json"] = "simpo_output"
    overwrite: Annotated[bool, "replace a model, or another run, in --output_dir"] = False
    resume: Annotated[bool, "go on from the newest checkpoint in --output_dir, if any"] = False
    save_every: Annotated[int, "steps between checkpoints; 0: just when stopped"] = 100
    keep_checkpoints: Annotated[int, "newest checkpoints to keep"] = 2
    log_every: Annotated[int, "steps per row of metrics.jsonl"] = 1
    eval_every: Annotated[int, "steps between evaluations; 0: just before and after"] = 0
    inspect: Annotated[int, "show this many pairs as the model sees them, and exit"] = 0
    wandb: Annotated[str | None, "Weights & Biases project to log to"] = None


GROUPS = {"model": "model and data", "loss": "objective", "lr": "training", "output_dir": "output"}
CHOICES = {"loss": OBJECTIVES, "dtype": ("bf16", "fp32")}
ABOVE_0 = "beta tau lr epochs log_every batch_size micro_batch_size micro_batch_tokens max_length"
ABOVE_0 = {*ABOVE_0.split(), "max_prompt_length", "keep_checkpoints"}
DEMO = {"lr": 3e-5, "batch_size": 32, "max_steps": 100, "output_dir": "simpo_demo"}
NOT_IN_DEMO = {"eval_dataset", "train_split", "eval_split", "ref_model", "epochs"}
NOT_IN_DEMO |= {"max_length", "max_prompt_length", "gradient_checkpointing"}
FLAG = {f.name: (*get_args(f.type)[2:], f"--{f.name}")[0] for f in fields(Config)}
# A resumed run may have others of these: what decides how a step is cut and what is written, and
# the names of the data, which have to be the same by their digests.
FREE = "dataset train_split eval_dataset eval_split micro_batch_tokens micro_batch_size shard"
FREE = {*FREE.split(), "gradient_checkpointing", "compile"}
FREE |= {*[*FLAG][[*FLAG].index("output_dir") :]}


def make_parser() -> argparse.ArgumentParser:
    options = {"allow_abbrev": False, "exit_on_error": False, "argument_default": argparse.SUPPRESS}
    epilog = f"Without --model and --dataset it runs a demo, whose own defaults are {DEMO}."
    parser = argparse.ArgumentParser("simpo.py", epilog=epilog, **options)
    for f in fields(Config):
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        kind, text = get_args(f.type)[:2]
        kind = (get_args(kind) or [kind])[0]
        how = {"action": "store_true"} if kind is bool else {"type": kind}
        how |= {"choices": CHOICES[f.name]} if f.name in CHOICES else {}
        own = [f"{x} {read[f.name]}" for x, read in HYPERPARAMETERS.items() if f.name in read]
        text += f" ({', '.join(own) or f.default})" if own or f.default is not None else ""
        group.add_argument(FLAG[f.name], dest=f.name, help=text, **how)
    return parser


def parse_config(argv: list[str] | None) -> Config:
    """The command line, checked, with what depends on other flags filled in."""
    with blame("command line"):
        flags, unknown = make_parser().parse_known_args(argv)
    given = vars(flags)
    read = HYPERPARAMETERS[given.get("loss", Config.loss)]
    demo = {} if given.keys() & {"model", "dataset"} else DEMO
    c = Config(**demo | read | given)
    for name, x in vars(c).items():
        if isinstance(x, (int, float)) and not (0 < x < math.inf or x == 0 and name not in ABOVE_0):
            least = "above 0" if name in ABOVE_0 else "0 or more"
            raise UserError(f"{FLAG[name]} {x}: use a finite number, {least}")
    c.dtype = c.dtype or ("bf16" if DEVICE.type == "cuda" else "fp32")
    c.max_prompt_length = c.max_prompt_length or c.max_length * 1800 // 2048
    c.micro_batch_tokens = c.micro_batch_tokens or (8192 if DEVICE.type == "cuda" else 2048)
    every = set().union(*HYPERPARAMETERS.values())
    strange = " ".join(FLAG[name] for name in given if name in every and name not in read)
    reads = ", ".join(FLAG[name] for name in vars(c) if name in read) or "no such flags"
    idle = " ".join(FLAG[name] for name in given if demo and name in NOT_IN_DEMO)
    itself = c.model and Path(c.model).resolve() == Path(c.output_dir).resolve()
    fresh = c.overwrite or c.inspect or (demo and "output_dir" not in given)
    taken = not fresh and not c.resume and (Path(c.output_dir) / "config.json").exists()
    begun = not fresh and not c.resume and checkpoints(c.output_dir)
    for wrong, message in (
        (unknown, f"{' '.join(unknown)}: there is no such flag"),
        (idle, f"{idle}: not for the demo, which runs without --model and --dataset"),
        (strange, f"{strange}: not for --loss {c.loss}, which reads {reads}"),
        (bool(c.model) != bool(c.dataset), "--model needs --dataset, and the other way round"),
        ((c.label_smoothing or 0) > 0.5, f"--label_smoothing {c.label_smoothing}: use 0 to 0.5"),
        (c.warmup_ratio > 1, f"--warmup_ratio {c.warmup_ratio}: use 0 to 1"),
        (c.ref_model and c.loss not in NEEDS_REFERENCE, f"--ref_model: {c.loss} has no reference"),
        (c.resume and c.overwrite, "--resume and --overwrite: use one of them"),
        (itself, f"--output_dir {c.output_dir} is --model itself"),
        (taken, f"--output_dir {c.output_dir} holds a model; --overwrite would replace it"),
        (begun, f"--output_dir {c.output_dir} holds a run: --resume it, or --overwrite it"),
    ):
        if wrong:
            raise UserError(message)
    if c.loss == "simpo" and c.gamma > c.beta:
        print(f"warning: gamma/beta is {c.gamma / c.beta:.2f}; the paper tuned it from 0 to 1")
    return c


# ------------------------------------------------------------------------------ runtime
RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))  # torchrun sets the three
DEVICE = torch.device("cuda", LOCAL_RANK) if torch.cuda.is_available() else torch.device("cpu")
METRICS = "loss rewards/chosen rewards/rejected rewards/margins rewards/accuracies logps/chosen"
METRICS = [*METRICS.split(), "logps/rejected", "avg_logps/chosen", "avg_logps/rejected"]
BAR = {"loss", *METRICS[3:5], "lr", "tokens_per_second"}  # on the progress bar
END = BAR | {"chosen_drift", "win_rate", "answer_length"}  # in the closing lines, too


def peak_memory_gib() -> float:  # of the GPU's allocator, or of the process on a CPU
    cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 ** (sys.platform != "darwin")
    return (torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else cpu) / 2**30


def to_device(x, device: torch.device = DEVICE):
    """A tensor, or a batch of them, on its way; a copy of pageable memory would wait for the GPU."""
    if isinstance(x, dict):
        return {name: to_device(part, device) for name, part in x.items()}
    if not isinstance(x, Tensor):
        return x
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def whole(x: Tensor) -> Tensor:  # what FSDP has spread; all processes must ask for it
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def gather(x) -> list:
    """x of each process, on all of them."""
    each = [x] * WORLD_SIZE
    if WORLD_SIZE > 1:
        torch.distributed.all_gather_object(each, x)
    return each


def start_up() -> None:
    """Quiet libraries, the GPU, the group of processes, the allocator; after the flags are right."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "torch.distributed is disabled")
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
        torch.cuda.reset_peak_memory_stats()
    if (WORLD_SIZE > 1 or DEVICE.type == "cuda") and not torch.distributed.is_initialized():
        alone = {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
        patience = timedelta(hours=2)  # of those who wait for one that tokenizes or saves
        torch.distributed.init_process_group(timeout=patience, **alone if WORLD_SIZE == 1 else {})
    if sys.platform == "linux" and DEVICE.type == "cpu":
        # glibc: keep freed memory, which costs 15% of a step if it has to be asked for each time.
        mallopt, most = ctypes.CDLL(None).mallopt, 2**31 - 1
        if mallopt(-3, most):  # M_MMAP_THRESHOLD, which an old glibc does not let be as large
            mallopt(-1, most)  # M_TRIM_THRESHOLD


def load_model(name: str, source: str, config: Config) -> nn.Module:
    """A model with fp32 weights, whatever the checkpoint's: bf16 ones ignore steps of lr 1e-6."""
    options = {"use_safetensors": True, "trust_remote_code": False}  # no pickles, nobody's code
    load = partial(transformers.AutoModelForCausalLM.from_pretrained, **options)
    with blame(f"--{name} {source}", source):
        model = load(source, dtype=torch.float32).eval()  # eval, in training too: no dropout
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            for layer in model.modules():  # it needs .training in these, but not in what they hold
                layer.training = isinstance(layer, transformers.GradientCheckpointingLayer)
        ids = torch.arange(3)
        right = model(ids[None]).logits[0].log_softmax(-1).diagonal()  # and this is how we do it:
        hidden = model.base_model(ids[None])[0][0]
        if not ResponseLogps(model).token_logps(hidden, ids).allclose(right, rtol=1e-3):
            raise UserError(f"{type(model).__name__} scales logits, or has dropout, in its own way")
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        have = (torch.cuda.mem_get_info()[1] if DEVICE.type == "cuda" else machine) / 2**30
        need = 16 * model.num_parameters() / (WORLD_SIZE if config.shard else 1) / 2**30
        if name == "model" and need > have and not config.inspect:
            text = f"training takes {need:.1f} GiB and activations, a device has {have:.1f}"
            raise UserError(f"{text}: use {'more processes' if config.shard else '--shard'}")
    return model


def can_share_prompt(policy: ResponseLogps, sets: list[Data]) -> bool:
    """Switch to attention by segments, if it scores the start of a pair as plain rows do."""
    model, start = policy.model, {k: x[:16] for k, x in sets[0].pairs[0].items() if "ids" in k}
    windows = [getattr(model.config, x, 0) for x in ("sliding_window", "attention_chunk_size")]
    longest = max((data.lengths[:, 0] + data.lengths[:, 1:].amax(1)).max() for data in sets)
    scores, usual = [], model.config._attn_implementation
    soft_cap = getattr(model.config, "attn_logit_softcapping", None)  # Gemma 2, in the attention
    with torch.no_grad(), contextlib.suppress(Exception):  # of models that know no such attention
        for share_prompt in (False, True):
            model.set_attn_implementation("segments" if share_prompt else usual)
            batch = collate([start], share_prompt=share_prompt)
            scores.append(policy(**to_device(batch, model.device))[0])
    same = len(scores) == 2 and scores[1].allclose(scores[0], rtol=1e-4, atol=1e-4)
    if same and not soft_cap and not any(window and window < longest for window in windows):
        return True
    model.set_attn_implementation(usual)
    print("layout       a row for each answer: the attention of this model cannot share prompts")
    return False


def cast_weights(policy: nn.Module) -> list[Tensor]:
    """Turn the weights into bf16 -> the fp32 ones, whose .grad sums the gradients of all passes."""

    def collect(used: Tensor, master: Tensor) -> None:
        master.grad = used.grad.float() if master.grad is None else master.grad.add_(used.grad)
        used.grad = None

    masters = [weight.data for weight in policy.parameters()]
    for weight, master in zip(policy.parameters(), masters):
        weight.data = master.bfloat16()
        weight.register_post_accumulate_grad_hook(partial(collect, master=master))
    return masters


def refresh(policy: ResponseLogps) -> None:
    """Make the bf16 copy of `cast_weights`, where there is one, that of the fp32 weights."""
    for used, weight in zip(policy.parameters(), policy.weights):
        if used is not weight:
            used.data.copy_(weight)


def prepare(model: nn.Module, config: Config, sets: list[Data]) -> ResponseLogps:
    """A model with fp32 weights -> a policy that computes in --dtype, on its device.
    policy.weights are the fp32 weights, which the optimizer steps. With several processes, or a
    GPU, FSDP keeps them whole on each, or spreads them (--shard), casts a layer when its turn
    comes, and sums gradients in fp32. A CPU alone has a bf16 copy of all of them, which is faster.
    """
    logits = 2 ** (27 if DEVICE.type == "cuda" else 23)  # that exist at one time
    policy = ResponseLogps(model, max(1, logits // model.config.vocab_size))
    policy.share_prompt = can_share_prompt(policy, sets)
    layers = [m for m in model.modules() if isinstance(m, transformers.GradientCheckpointingLayer)]
    for layer in layers if config.compile else ():
        layer.compile()
    dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
    if torch.distributed.is_initialized():
        shape = (WORLD_SIZE,) if config.shard or WORLD_SIZE == 1 else (WORLD_SIZE, 1)
        names = ("replicate", "shard")[-len(shape) :]
        mesh = torch.distributed.init_device_mesh(DEVICE.type, shape, mesh_dim_names=names)
        for module in (*reversed(layers), policy):  # from the inside out
            fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(dtype, torch.float32))
    cast = dtype == torch.bfloat16 and not isinstance(policy, FSDPModule)
    policy.weights = cast_weights(policy) if cast else list(policy.parameters())
    return policy


def save(policy: ResponseLogps, tokenizer, folder: Path) -> None:
    """Write the fp32 weights, whole and each once, by all processes together; config.json last."""
    kept, buffers = policy.model.state_dict().keys(), dict(policy.model.named_buffers())
    state = {name: buffers[name] for name in buffers if name in kept}
    for (name, _), weight in zip(policy.model.named_parameters(), policy.weights):
        full = whole(weight)
        state |= {name: full.cpu()} if RANK == 0 else {}
    if RANK > 0:
        return
    with blame(f"--output_dir {folder}: no model saved"):
        new = folder / "unfinished"
        shutil.rmtree(new, ignore_errors=True)
        policy.model.save_pretrained(new, state_dict=state)
        policy.model.config.dtype = torch.float32  # and not that of a copy in bf16
        policy.model.config.save_pretrained(new)
        tokenizer.save_pretrained(new)
        os.sync()
        for old in folder.glob("model*.safetensors*"):  # it may have been in more files
            old.unlink()
        for path in sorted(new.iterdir(), key=lambda path: path.name == "config.json"):
            shutil.rmtree(folder / path.name, ignore_errors=True)
            path.rename(folder / path.name)
        new.rmdir()


# ------------------------------------------------------------------------------ checkpoints
class Stopped(Exception):
    """Ctrl-C or SIGTERM came: training ends between two steps, and its state is saved."""


STOP = []  # what came of these signals


@contextlib.contextmanager
def signals_noted():
    """Let SIGINT and SIGTERM wait in STOP for the end of a step."""

    def note(number: int, frame) -> None:
        STOP.append(number)
        if RANK == 0:  # one print must not interrupt another
            os.write(2, b"\nstopping, as soon as the state can be saved\n")

    usual = [(number, signal.signal(number, note)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield
    finally:
        STOP.clear()
        for number, handler in usual:
            signal.signal(number, handler)


@contextlib.contextmanager
def alone_in(out: Path):
    """Make a folder, and keep other runs out of it until this one ends, in whatever way."""
    with contextlib.ExitStack() as stack:
        with blame(f"--output_dir {out}"):
            out.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(out / "metrics.jsonl", "a"))
            try:
                if RANK == 0:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError("another run is writing there") from None
            except OSError:  # a file system that has no locks
                pass
        if len({*gather(os.fstat(file.fileno()).st_ino)}) > 1:
            raise UserError(f"--output_dir {out}: the machines do not share this folder")
        yield


def checkpoints(out: Path | str) -> list[Path]:
    """The newest first. None is unfinished, but a disk may have damaged one."""
    found = {path.name[11:]: path for path in Path(out).glob("checkpoint-*")}
    return [found[step] for step in sorted(filter(str.isdigit, found), key=int, reverse=True)]


def file_digests(folder: Path, names: list[str]) -> dict[str, str]:
    """{name: SHA-256} of a checkpoint's files; digests.json keeps them, to know damage by."""

    def of(name: str) -> str:
        with open(folder / name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(of, names)))


def state_tensors(policy: ResponseLogps, optimizer, sets: list[Data]) -> dict[str, Tensor]:
    """What a checkpoint holds, beside run.json and metrics.jsonl. Pairs have an order that follows
    from seed and step, the learning rate follows from the step, and nothing else is random."""
    state = {f"reference.{i}": data.reference for i, data in enumerate(sets)}
    for (name, _), weight in zip(policy.named_parameters(), policy.weights):
        parts = {"weight": weight.detach()} | optimizer.state[weight]
        state |= {f"{part}.{name}": x for part, x in parts.items()}
    return state


def save_checkpoint(policy, optimizer, sets: list[Data], config: Config, run: dict) -> None:
    """Write checkpoint-STEP, all processes together. It gets its name when all of it is on the
    disk. If that fails on one, OSError on all of them; the checkpoints before stay."""
    out, state, error = Path(config.output_dir), state_tensors(policy, optimizer, sets), None
    new, folder = out / "unfinished", out / f"checkpoint-{run['step']}"
    files = {name: 1 + i // 64 for i, name in enumerate(state)}  # each is whole in memory once
    writer = dcp.HuggingFaceStorageWriter(str(new), files, save_distributed=True)
    try:
        if RANK == 0:
            shutil.rmtree(new, ignore_errors=True)
        dcp.save(state, storage_writer=writer, no_dist=WORLD_SIZE == 1)
        if RANK == 0:
            (new / "run.json").write_text(json.dumps(run))
            shutil.copy(out / "metrics.jsonl", new)
            found = file_digests(new, os.listdir(new))
            (new / "digests.json").write_text(json.dumps(found))
            os.sync()
            shutil.rmtree(folder, ignore_errors=True)  # a damaged one
            new.rename(folder)
            for old in checkpoints(out)[config.keep_checkpoints :]:
                if old != folder:  # nor is it, if damaged ones are newer
                    shutil.rmtree(old, ignore_errors=True)
    except (OSError, dcp.api.CheckpointException) as e:
        first = next(iter(getattr(e, "failures", {}).values()), [e])[0]
        error = f"{type(first).__name__}: {first}"
        shutil.rmtree(new, ignore_errors=True)  # what it took may be what the metrics need
    if error := max(filter(None, gather(error)), default=None):
        raise OSError(error)
    run["saved"] = run["step"]


def load_checkpoint(policy, optimizer, sets: list[Data], config: Config, run: dict) -> bool:
    """Fill in all of these from the newest whole checkpoint; False if there is none."""
    found = gather(checkpoints(config.output_dir))[0]
    for folder in found:
        right = False
        if RANK == 0:
            with contextlib.suppress(Exception):  # whatever damage can do
                digests = json.loads((folder / "digests.json").read_text())
                right = digests == file_digests(folder, [*digests])
        if not gather(right)[0]:
            print(f"warning: {folder} is damaged, so the one before it is used")
            continue
        saved = json.loads((folder / "run.json").read_text())
        then, now = saved["same"], run["same"]
        if other := [f"{x} {then.get(x)}, not {now[x]}" for x in now if then.get(x) != now[x]]:
            raise UserError(f"--resume: {folder} was made with {'; '.join(other)}")
        state = state_tensors(policy, optimizer, sets)
        reader = dcp.HuggingFaceStorageReader(str(folder))
        dcp.load(state, storage_reader=reader, no_dist=WORLD_SIZE == 1)
        refresh(policy)
        run |= saved | {"saved": saved["step"]}
        if RANK == 0:
            shutil.copy(folder / "metrics.jsonl", config.output_dir)
        print(f"resumed      after step {run['step']}, from {folder}")
        return True
    if found:
        raise UserError(f"--resume: no checkpoint in {config.output_dir} is whole")
    return False


# ------------------------------------------------------------------------------ training
def passes(lengths: Tensor, share_prompt: bool, config: Config) -> list[list[list[int]]]:
    """Cut pairs with these lengths [B, 3] into passes of at most --micro_batch_tokens a process.
    A pass is a list of hands, a hand one pair for each process, the longest first: so there is
    little padding, and every process has the same number of passes. A pair above that passes alone.
    """
    prompt, longer = lengths[:, 0], lengths[:, 1:].amax(1)
    tokens = lengths.sum(1) if share_prompt else 2 * (prompt + longer)
    cut, most_pairs = [], config.micro_batch_size or math.inf
    for hand in tokens.argsort(descending=True, stable=True).split(WORLD_SIZE):
        grown = tokens[cut[-1][0][0]] * (len(cut[-1]) + 1) if cut else math.inf
        if grown > config.micro_batch_tokens or len(cut[-1]) == most_pairs:
            cut.append([])
        cut[-1].append(hand.tolist())
    return cut


def score(policy, data: Data, indices, config, backward=False, z=None) -> Tensor:
    """METRICS of the pairs at `indices`, a row each, by all processes together. backward=True
    leaves the gradient of the mean loss, however it is cut."""
    options = {name: getattr(config, name) for name in HYPERPARAMETERS[config.loss]}
    may_stop = not backward and z is None  # not in the midst of a step
    if config.loss == "kto":
        if z is None:  # of all these pairs, however they are cut: a pass before
            z = score(policy, data, indices, config, z=0)[:, 1:3].mean().clamp(min=0)
        options["z"] = z
    indices, places, columns = torch.tensor(indices), [], []
    cut = passes(data.lengths[indices], policy.share_prompt, config)
    bar = {"desc": "scoring", "leave": False, "delay": 3, "disable": backward or RANK > 0}
    for hands in tqdm(cut, **bar):
        if may_stop and any(gather(bool(STOP))):
            raise Stopped
        mine = [hand[RANK] for hand in hands if RANK < len(hand)]
        # FSDP's processes must keep step: one without pairs scores another's, with weight 0.
        weight, mine = (1, mine) if mine else (0, hands[0][:1])
        if isinstance(policy, FSDPModule):
            policy.set_requires_all_reduce(hands is cut[-1])
        batch = collate([data.pairs[int(indices[i])] for i in mine], 0, policy.share_prompt)
        with torch.set_grad_enabled(backward):
            s, n = policy(**to_device(batch))  # [2B]
            s, n = s.view(2, -1), n.view(2, -1)  # [2B] -> [2, B]
            a = s / n  # the length normalisation
            s_ref = to_device(data.reference[indices[mine]].T)
            losses = OBJECTIVES[config.loss](*(Sides(*x) for x in (s, a, s - s_ref, n)), **options)
            if backward:  # FSDP averages over processes; times their number, that is a sum
                (losses.sum() * (weight * WORLD_SIZE / len(indices))).backward()
        logps = a if config.loss in LENGTH_NORMALISED and not config.no_length_norm else s
        rw, rl = implicit_rewards(logps, s_ref, n, **options)
        rows = torch.stack([losses, rw, rl, rw - rl, rw > rl, *logps, *a]).detach().double()
        places += mine
        columns.append(weight * rows)
    table = torch.zeros(len(indices), len(METRICS), dtype=torch.float64, device=DEVICE)
    table[places] = torch.cat(columns, 1).T
    if WORLD_SIZE > 1:
        torch.distributed.all_reduce(table)
    return table.cpu()


def make_optimizer(policy: ResponseLogps, config: Config) -> torch.optim.Optimizer:
    """AdamW, its state there from the start, for a checkpoint to be loaded into."""
    groups = [{"params": policy.weights, "initial_lr": config.lr}]
    optimizer = torch.optim.AdamW(groups, config.lr, weight_decay=config.weight_decay, fused=True)
    for weight in policy.weights:
        moments = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[weight] = {"step": torch.zeros((), device=weight.device)} | moments
    return optimizer


def train(policy, optimizer, data: Data, config, steps: int, run: dict, log, evaluate, keep):
    """Train in place from run["step"] on; log(row) every --log_every steps, evaluate(step) before
    the first and every --eval_every, keep() every --save_every. Raises Stopped if told to end."""
    warmup = int(config.warmup_ratio * steps)  # rounded down: one step alone has the full lr
    cosine = transformers.get_cosine_schedule_with_warmup
    schedule = cosine(optimizer, warmup, steps, last_epoch=run["step"] - 1)
    per_epoch, order = math.ceil(len(data.pairs) / config.batch_size), None
    bar = tqdm(range(run["step"], steps), initial=run["step"], total=steps, disable=RANK > 0)
    for done in bar:
        if done == 0 or config.eval_every and done % config.eval_every == 0:
            evaluate(done)  # here, so that a run resumed after this step does it, too
            bar.unpause()  # an evaluation takes no part in the seconds of a step
        started, step = time.perf_counter(), done + 1
        epoch, k = divmod(done, per_epoch)
        if k == 0 or order is None:  # every epoch has its own order, the same on every process
            shuffle = torch.Generator().manual_seed(config.seed + epoch)
            order = torch.randperm(len(data.pairs), generator=shuffle).split(config.batch_size)
        batch, (lr, *_) = order[k].tolist(), schedule.get_last_lr()
        table = score(policy, data, batch, config, backward=True)
        norm = nn.utils.clip_grad_norm_(policy.weights, config.max_grad_norm or math.inf)
        norm = whole(norm).item()
        bad = [i for i, loss in zip(batch, table[:, 0].tolist()) if not math.isfinite(loss)]
        run["skipped"] = run["skipped"] + 1 if bad or not math.isfinite(norm) else 0
        if run["skipped"]:  # such a step would turn every weight into NaN
            rows = [data.pairs[i]["row"] for i in bad or batch]
            log({"step": step, "skipped_rows": rows})
            print(f"step {step} skipped: its loss or gradient is not finite, rows {rows}")
            if run["skipped"] == 10:
                bar.close()
                raise UserError(f"ten steps in a row are not finite, the last with rows {rows}")
        else:
            optimizer.step()
            refresh(policy)
        optimizer.zero_grad()
        schedule.step()
        run["step"] = step
        if not run["skipped"] and (step % config.log_every == 0 or step == steps):
            seconds = time.perf_counter() - started
            row = {"step": step, "epoch": step / per_epoch, "grad_norm": norm, "lr": lr}
            row |= zip(METRICS[:7], table.mean(0).tolist())  # all but averages
            row |= {"step_seconds": seconds, "pairs_per_second": len(batch) / seconds}
            tokens = data.lengths[batch].sum() + data.lengths[batch, 0].sum()
            row |= {"tokens_per_second": tokens.item() / seconds}
            log(row | {"peak_memory_gib": peak_memory_gib()})
            bar.set_postfix({x.split("/")[-1]: f"{row[x]:.3g}" for x in row if x in BAR})
        if config.save_every and step % config.save_every == 0 and step < steps:
            try:
                keep()
            except OSError as e:
                print(f"warning: there is no checkpoint of step {step}: {e}")
        if any(gather(bool(STOP))):
            raise Stopped


def inspect_pairs(policy, tokenizer, data: Data, config) -> None:
    """Print the first pairs as the model sees them: the prompt, and what is scored in colour."""
    table = score(policy, data, range(min(config.inspect, len(data.pairs))), config)
    for metrics, pair in zip(table.tolist(), data.pairs):
        print(f"\nrow {pair['row']}, prompt of {len(pair['prompt_ids'])} tokens:")
        print(tokenizer.decode(pair["prompt_ids"]))
        for i, (side, colour) in enumerate((("chosen", "\033[32m"), ("rejected", "\033[31m"))):
            ids, average, reward = pair[f"{side}_ids"], metrics[7 + i], metrics[1 + i]
            start, end = (colour, "\033[0m") if sys.stdout and sys.stdout.isatty() else ("[[", "]]")
            print(f"{side}: {len(ids)} tokens, average log-prob {average:.4f}, reward {reward:.4f}")
            print(start + tokenizer.decode(ids) + end)


def build_demo(config: Config) -> tuple:
    """A tiny Llama that answers with a word's letters sorted up (chosen) or down (rejected).
    Some "!" follow, more after the chosen ones: in real data, too, these tend to be longer.
    """
    print("This is a demo; --model and --dataset, hub ids or local paths, train a real model")
    torch.manual_seed(config.seed)
    tokenizer = transformers.ByT5Tokenizer(extra_ids=0)  # bytes: nothing to download
    letters = 97 + torch.rand(6000, 14).argsort(1)[:, :4]  # four different ones, from a to n
    words = dict.fromkeys(bytes(word).decode() for word in letters.tolist())
    tails = [torch.empty(6000).geometric_(1 / mean).int().tolist() for mean in (4, 2.5)]
    pairs = []
    for word, x, y in zip(words, *tails):
        up = "".join(sorted(word))
        row = {"prompt": word + "=", "chosen": up + "!" * x, "rejected": up[::-1] + "!" * y}
        pairs.append(tokenize_pair(row, tokenizer, 64, 32) | {"row": len(pairs) + 1})
    shape = {"vocab_size": len(tokenizer), "hidden_size": 128, "num_hidden_layers": 3}
    shape |= {"intermediate_size": 256, "num_attention_heads": 4, "pad_token_id": 0}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, eos_token_id=1))
    policy, steps = ResponseLogps(llama.to(DEVICE).eval()), 800
    optimizer = torch.optim.AdamW(policy.parameters(), 2e-3)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 50, steps)
    for _ in tqdm(range(steps), "fitting the demo's model", leave=False, disable=RANK > 0):
        batch = collate([pairs[i] for i in torch.randint(200, len(pairs), (32,))])
        logps, lengths = policy(**to_device(batch))
        (-logps / lengths).mean().backward()  # the sft objective, on good and bad answers alike
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    for weight in policy.parameters() if WORLD_SIZE > 1 else ():  # fits on GPUs differ a little
        torch.distributed.broadcast(weight.data, 0)
    sets = []
    for part in (pairs[200:], pairs[:200]):
        lengths = torch.tensor([pair["lengths"] for pair in part])
        sets.append(Data(part, lengths, digest(part), torch.zeros(len(part), 2)))
    return tokenizer, llama, sets


def judge(policy, tokenizer, pairs) -> dict:
    """Of the demo's answers, sampled: the share that is right, and their length in letters."""
    torch.manual_seed(0)
    prompts = torch.tensor([pair["prompt_ids"] for pair in pairs], device=DEVICE)
    if isinstance(policy, FSDPModule):  # generate does not go through the policy's own forward
        policy.unshard()
    usual, options = policy.model.config._attn_implementation, {"synced_gpus": WORLD_SIZE > 1}
    policy.model.set_attn_implementation("sdpa")
    ids = policy.model.generate(prompts, do_sample=True, max_new_tokens=48, **options)
    policy.model.set_attn_implementation(usual)
    texts = tokenizer.batch_decode(ids)
    words, answers = zip(*(text.split("</s>")[0].split("=", 1) for text in texts))
    hits = ["".join(sorted(w)) == answer.rstrip("!") for w, answer in zip(words, answers)]
    length = sum(map(len, answers)) / len(answers)
    return {"eval/win_rate": sum(hits) / len(hits), "eval/answer_length": length}


def load(config: Config) -> tuple:
    """-> tokenizer, model, [pairs to train on, held-out pairs if any], counts of what was lost."""
    if config.model is None:
        return *build_demo(config), {}
    with blame(f"--model {config.model}", config.model):
        make = transformers.AutoTokenizer.from_pretrained
        tokenizer = make(config.model, trust_remote_code=False)
    if LOCAL_RANK > 0:  # one process tokenizes, the others read what it has cached
        with contextlib.suppress(RuntimeError):  # it has ended: they will find the same mistake
            torch.distributed.barrier()
    data, counts = load_pairs("dataset", config.train_split, tokenizer, config)
    sets = [data]
    if config.eval_dataset or config.eval_split:
        sets += load_pairs("eval_dataset", config.eval_split, tokenizer, config)[:1]
    if LOCAL_RANK == 0 and WORLD_SIZE > 1:
        torch.distributed.barrier()
    for flag, read in zip(("--dataset", "--eval_dataset"), zip(*gather([d.digest for d in sets]))):
        if len({*read}) > 1:
            raise UserError(f"{flag}: the processes have read different pairs; digests {read}")
    return tokenizer, load_model("model", config.model, config), sets, counts


def score_reference(policy: ResponseLogps, sets: list[Data], config: Config) -> None:
    """Fill in the reference's logps, if any, once: so no second model stays in memory."""
    if config.loss not in NEEDS_REFERENCE:
        return
    scorer, started = policy, time.perf_counter()
    if config.ref_model:
        scorer = prepare(load_model("ref_model", config.ref_model, config), config, sets)
    for data in sets:
        which = range(len(data.pairs))[: config.inspect or None]
        logps = score(scorer, data, which, config, z=0)[:, 5:7]
        data.reference[: len(which)] = logps
    print(f"reference    scored once, in {time.perf_counter() - started:.1f} s")
    del scorer
    gc.collect()  # FSDP's modules are cycles of references


def describe(policy: ResponseLogps, config: Config, steps: int) -> None:
    """Print what is going to be trained, and write it into simpo_run.json."""
    hyper = [f"{k} {x}" for k, x in vars(config).items() if x and k in HYPERPARAMETERS[config.loss]]
    print(f"model        {policy.model.num_parameters():,} fp32 weights, {config.dtype} compute")
    layout = "each prompt once" if policy.share_prompt else "a row for each answer"
    most = f"passes of at most {config.micro_batch_tokens} tokens, {layout}"
    print(f"batch        {config.batch_size} pairs on {WORLD_SIZE} processes, {most}")
    print(f"steps        {steps}; {', '.join([config.loss, *hyper])}")
    if RANK == 0:
        commit = os.popen(f'git -C "{Path(__file__).parent}" rev-parse HEAD 2>&-').read().strip()
        record = asdict(config) | {"world_size": WORLD_SIZE, "git_commit": commit or None}
        record |= {"torch": torch.__version__, "transformers": transformers.__version__}
        Path(config.output_dir, "simpo_run.json").write_text(json.dumps(record, indent=2))
        if config.wandb:
            with blame("--wandb needs `pip install wandb`"):
                import wandb
            wandb.init(project=config.wandb, config=record)


def train_and_save(config: Config) -> dict:
    """-> the metrics of the last evaluation, or {} if stopped. --output_dir is there."""
    tokenizer, model, sets, counts = load(config)
    policy, out = prepare(model, config, sets), Path(config.output_dir)
    data, held_out = (*sets, None)[:2]
    if config.inspect:
        score_reference(policy, sets, config)
        return inspect_pairs(policy, tokenizer, data, config) or {}
    steps = config.max_steps or math.ceil(len(data.pairs) / config.batch_size) * config.epochs
    same = {FLAG[name]: x for name, x in vars(config).items() if name not in FREE}
    same |= {f"pairs of {x}": d.digest for x, d in zip(("--dataset", "--eval_dataset"), sets)}
    same["weights of --model"] = policy.model.num_parameters()
    # What of a run is no tensor: also the step last "saved", and the evaluation "before" training.
    run = {"step": 0, "skipped": 0, "same": same}

    def log(row: dict) -> None:
        if RANK == 0:
            with blame(f"--output_dir {out}"), open(out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row | counts) + "\n")
            if config.wandb:
                import wandb

                wandb.log(row)

    def evaluate(step: int) -> dict:
        if held_out is None:
            return {}
        table = score(policy, held_out, range(len(held_out.pairs)), config)
        *means, average, _ = table.mean(0).tolist()
        row = {f"eval/{name}": mean for name, mean in zip(METRICS, means)}
        row["eval/chosen_drift"] = average - run.setdefault("average", average)
        row |= {} if config.model else judge(policy, tokenizer, held_out.pairs)
        run.setdefault("before", row)
        log({"step": step} | row)
        return row

    optimizer = make_optimizer(policy, config)
    resumed = config.resume and load_checkpoint(policy, optimizer, sets, config, run)
    if not resumed:
        score_reference(policy, sets, config)
    describe(policy, config, steps)
    if RANK == 0 and not resumed:  # what an older run has left, and --overwrite has given up
        (out / "metrics.jsonl").write_text("")
        (out / "config.json").unlink(missing_ok=True)
        for old in checkpoints(out):
            shutil.rmtree(old, ignore_errors=True)
    keep = partial(save_checkpoint, policy, optimizer, sets, config, run)
    started = time.perf_counter()
    with signals_noted():
        try:
            train(policy, optimizer, data, config, steps, run, log, evaluate, keep)
            after = evaluate(steps)
            seconds = time.perf_counter() - started
            save(policy, tokenizer, out)
        except Stopped:
            after = None
            if run["step"] != run.get("saved"):
                with blame(f"--output_dir {out}: nothing saved"):
                    keep()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # nobody leaves before the model is on the disk
        torch.distributed.destroy_process_group()
    if after is None:
        print(f"stopped      after step {run['step']} of {steps}; the same with --resume goes on")
        return {}
    shown = [x for x in after if x[5:] in END]
    changes = [f"{x.split('/')[-1]} {run['before'][x]:.3f} -> {after[x]:.3f}" for x in shown]
    count = len(held_out.pairs) if held_out else 0
    print(f"held out     {', '.join(changes) or 'none given'} ({count} pairs)")
    print(f"cost         {seconds:.0f} s with evaluations, {peak_memory_gib():.1f} GiB at the peak")
    print(f"saved        AutoModelForCausalLM.from_pretrained({config.output_dir!r})")
    return after


def main(argv: list[str] | None = None) -> dict:
    """Train as the command line says; -> the metrics of the last evaluation, or {} if stopped."""
    sys.stdout = sys.stdout if RANK == 0 else None  # print is for rank 0, and silent elsewhere
    config = parse_config(argv)
    if config.resume and (Path(config.output_dir) / "config.json").exists():
        print(f"--output_dir {config.output_dir} holds the model already: nothing is left to do")
        return {}
    start_up()
    if config.inspect:
        return train_and_save(config)
    with alone_in(Path(config.output_dir)):
        return train_and_save(config)


def end_now(number: int, frame) -> None:
    """What Ctrl-C does before training, at once: some libraries would swallow an exception."""
    if os.getpid() == PROCESS and RANK == 0:
        os.write(2, b"\nsimpo.py: interrupted, with nothing to save\n")
    os._exit(130)


if __name__ == "__main__":
    PROCESS = os.getpid()  # and not one of the workers that tokenize
    signal.signal(signal.SIGINT, end_now)
    try:
        main()
    except UserError as e:
        if LOCAL_RANK > 0:  # if the first process has told it already, torchrun ends this one
            time.sleep(5)
        print(f"simpo.py: error: {e}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as e:
        if not isinstance(e, torch.distributed.DistError) and "gloo" not in str(e):
            raise
        what = f"\nsimpo.py: error: process {RANK} has lost another: --resume goes on where it can"
        print(f"{what} ({str(e).splitlines()[0]})", file=sys.stderr, flush=True)
        os._exit(1)  # an orderly exit would wait for the one that is gone
