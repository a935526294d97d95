"""SimPO, Simple Preference Optimization with a Reference-Free Reward, and its rivals, in one file.

For a prompt x, a chosen answer y_w and a rejected answer y_l (Eq. 6 of arXiv:2405.14734):
    loss = -log sigmoid( beta/|y_w| log pi(y_w|x)  -  beta/|y_l| log pi(y_l|x)  -  gamma )

    python simpo.py                                               # demo: no network, a minute
    python simpo.py --model M --dataset D --eval_dataset E        # one CPU or GPU
    torchrun --nproc_per_node=8 simpo.py --model M --dataset D    # eight GPUs

A pair's way: split_row -> render -> tokenize_pair -> collate -> ResponseLogps -> an objective.
Shapes: B pairs, T tokens of a row, N answer tokens, V vocabulary, D hidden.
Departures from the authors' code, princeton-nlp/SimPO: (1) Weights and Adam are fp32. (2) --gamma
is the paper's; their gamma_beta_ratio is gamma / beta. (3) What is scored begins after the header
of the answer and ends with one end of turn. (4) Answers may be cut, prompts not: a long prompt or
an empty answer drops the pair. (5) Metrics cover all pairs of all processes.
"""

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections import Counter, namedtuple
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import jinja2
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch import nn
from torch.distributed import fsdp
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

RANK = int(os.environ.get("RANK", "0"))  # torchrun sets the three
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", LOCAL_RANK) if ON_GPU else torch.device("cpu")


# ------------------------------------------------------------------------------ objectives
def simpo_loss(chosen_avg_logps, rejected_avg_logps, beta=2.5, gamma=1.4):
    """SimPO's loss of each pair, [B] (arXiv:2405.14734, Eq. 6). *_avg_logps [B]: log pi(y|x) / |y|,
    in nats. beta makes rewards of them; the chosen answer must win by the margin gamma."""
    chosen_rewards = beta * chosen_avg_logps
    rejected_rewards = beta * rejected_avg_logps
    return -nn.functional.logsigmoid(chosen_rewards - rejected_rewards - gamma)


def dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """DPO's loss of each pair, [B] (arXiv:2305.18290, Eq. 7). *_logps [B]: sums, in nats."""
    chosen_logratios = chosen_logps - ref_chosen_logps
    rejected_logratios = rejected_logps - ref_rejected_logps
    return -nn.functional.logsigmoid(beta * (chosen_logratios - rejected_logratios))


# Objectives: functions of the chosen and the rejected answers of B pairs that return losses, chosen
# rewards and rejected rewards, each [B]. What stands behind the * becomes a flag with its default.
Answers = namedtuple("Answers", "logp avg_logp ref_logp length")  # avg_logp is logp / length


def simpo(chosen, rejected, *, beta=2.5, gamma=1.4):
    losses = simpo_loss(chosen.avg_logp, rejected.avg_logp, beta, gamma)
    return losses, beta * chosen.avg_logp, beta * rejected.avg_logp


def dpo(chosen, rejected, *, beta=0.01):  # the SimPO paper found 0.01 best
    losses = dpo_loss(chosen.logp, rejected.logp, chosen.ref_logp, rejected.ref_logp, beta)
    chosen_rewards = beta * (chosen.logp - chosen.ref_logp)
    rejected_rewards = beta * (rejected.logp - rejected.ref_logp)
    return losses, chosen_rewards, rejected_rewards


OBJECTIVES = {"simpo": simpo, "dpo": dpo}  # more are in notebooks/objectives.py
NEEDS_REFERENCE = {"dpo"}  # those that read ref_logp; for the others it is None


# ------------------------------------------------------------------------------ log-likelihood
class ResponseLogps(nn.Module):
    """Scores answers with a causal language model. DDP and FSDP2 wrap it, not the model inside."""

    def __init__(self, model, chunk=1024):
        super().__init__()
        self.model = model
        self.chunk = chunk  # how many answer tokens have their logits, [chunk, V], at one time

    def hidden_states(self, input_ids, scored):  # -> [2B, T, D]; a faster pass can replace it
        return getattr(self.model, "model", self.model.base_model)(input_ids, use_cache=False)[0]

    def logits(self, hidden):
        head = self.model.get_output_embeddings()
        logits = head(hidden.to(head.weight.dtype)).float()  # Mamba's hidden states are fp32
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits  # Gemma has a cap

    def check(self, ids, tolerance):  # ids [1, T]: our logits against the model's own
        ours = self.logits(self.hidden_states(ids, None))
        own = self.model(ids, use_cache=False).logits.float()
        own_of_five = self.model(ids[:, :5], use_cache=False).logits.float()
        wrong = max((ours - own).abs().max(), (own[:, :5] - own_of_five).abs().max())
        if not wrong <= tolerance * own.abs().max():  # NaN, too
            sys.exit(f"simpo.py: {type(self.model).__name__} has NaN, scales logits or looks ahead")

    def token_logps(self, hidden, targets):
        return -nn.functional.cross_entropy(self.logits(hidden), targets, reduction="none")

    def forward(self, input_ids, scored):
        """What `collate` makes of B pairs -> log pi(y|x) of their answers, [2B], fp32, in nats. The
        head, whose logits are large, sees only states that predict a scored token, in chunks."""
        hidden = self.hidden_states(input_ids, scored)
        row, place = scored[:, 1:].nonzero(as_tuple=True)  # each [N]
        targets = input_ids[row, place + 1]  # [N], each predicted one place before it
        chunks = zip(hidden[row, place].split(self.chunk), targets.split(self.chunk))
        logps = [checkpoint(self.token_logps, *chunk, use_reentrant=False) for chunk in chunks]
        sums = torch.zeros(len(input_ids), device=hidden.device)  # [2B]
        return sums.index_add(0, row, torch.cat(logps))


# ------------------------------------------------------------------------------ data
Dropped = jinja2.TemplateError  # raised by templates that refuse a row, and by us for one to skip


def split_row(row):
    """A row in README's formats -> prompt, chosen, rejected: texts, or a list and two messages."""
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    if all(isinstance(part, str) for part in (prompt, chosen, rejected)):
        if chosen.startswith("[{") and "'role'" in chosen.replace('"', "'"):
            raise TypeError("messages have become texts, as in a .csv: use .jsonl or .parquet")
        return prompt, chosen, rejected
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise TypeError(f"it needs three texts, or messages, and has {row!s:.300}")
    if len(chosen) == len(rejected) == 1:  # answers alone; whole conversations hold the prompt
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
        chosen, rejected = turns + chosen, turns + rejected
    for side in (chosen, rejected):
        texts = [message.get("content") for message in side]
        if not all(isinstance(x, str) for x in texts) or side[-1].get("role") != "assistant":
            raise ValueError(f"messages have texts, and end in one of the assistant: {side!s:.300}")
    parts = (chosen[:-1], rejected[:-1], prompt if isinstance(prompt, list) else [])
    turns = [[(x.get("role"), x["content"]) for x in part] for part in parts]
    if not turns[0] or turns[0] != turns[1] or turns[0][: len(turns[2])] != turns[2]:
        raise Dropped("no prompt, or different ones")  # other keys, such as an id, may differ
    return chosen[:-1], chosen[-1], rejected[-1]


def render(prompt, chosen, rejected, tokenizer):
    """Messages, as the chat template writes them -> four texts: the header, all that the model sees
    before it answers; the chosen and the rejected answer, which are scored; what follows each."""
    template = tokenizer.apply_chat_template
    header = template(prompt, tokenize=False, add_generation_prompt=True)
    mark = {"role": "assistant", "content": "@answer@"}  # shows what is written around an answer
    texts = [template([*prompt, answer], tokenize=False) for answer in (mark, chosen, rejected)]
    before, _, after = texts.pop(0).rpartition("@answer@")
    if before.removeprefix(header).isspace() or not all(x.startswith(before) for x in texts):
        before = header  # then white space, or an empty <think> beside a full one, is scored
    for text in texts:
        if not text.startswith(before) or not text[len(before) :].endswith(after):
            raise Dropped(f"template ends in {text[-40:]!r}, not {before[-20:]!r} ... {after!r}")
    answers = [text[len(before) : len(text) - len(after)] for text in texts]
    # The prompt ends where the answer begins: with a <think> that is written there, or without one.
    # But if the two have different prompts (Mistral v3, system), the model answers the first.
    if before.startswith(header) or header.startswith(before):
        header = before
    if before.rstrip().endswith(after.strip()):
        after = ""  # it is the header of the next answer, and no end of turn
    return header, *answers, after


def tokenize_pair(row, tokenizer, max_length, max_prompt_length):
    """A row -> {"prompt_ids", "chosen_ids", "rejected_ids", "cut"}; or the reason, a text, why no
    model can learn from it. Lengths are in tokens. Raises an error if the row is malformed."""
    alone = {"add_special_tokens": False}
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    try:
        header, *answers = split_row(row)
        is_text = isinstance(header, str)
        if is_text:
            answers = [text.removesuffix(tokenizer.eos_token) for text in answers]
            after = ""
        else:
            header, *answers, after = render(header, *answers, tokenizer)
    except Dropped as reason:
        return str(reason)
    # The end of turn: up to EOS, or else up to the first added token, such as <|im_end|>.
    end = tokenizer.encode(after, **alone)
    added = [token for token in end if token in tokenizer.added_tokens_decoder]
    last = eos if eos in end or not added else added[0]
    end = end[: end.index(last) + 1] if last in end else [eos]
    prompt_ids = tokenizer.encode(header, **alone)
    ids = []
    for text in answers:  # with the header, as some tokenizers put a space before a text alone
        together = tokenizer.encode(header + text, **alone)
        if together[: len(prompt_ids)] == prompt_ids:
            ids.append(together[len(prompt_ids) :] + end)
        else:  # header and answer share a token: encode the answer alone
            ids.append(tokenizer.encode(text, **alone) + end)
    if is_text and bos in tokenizer.encode("a")[:1] and bos not in prompt_ids[:1]:
        prompt_ids = [bos] + prompt_ids  # as the tokenizer would; chat templates write their own
    room = max_length - len(prompt_ids)
    if not header or not all(text.strip() for text in answers):
        return "an empty prompt or answer"
    if len(prompt_ids) > max_prompt_length or room < 1:
        return "a prompt that is too long"
    if ids[0][:room] == ids[1][:room]:
        return "identical answers"
    pair = {"prompt_ids": prompt_ids, "cut": max(map(len, ids)) > room}
    return pair | {"chosen_ids": ids[0][:room], "rejected_ids": ids[1][:room]}


def collate(pairs, pad_token_id=0):
    """B tokenized pairs -> ids, and which of them are scored, both [2B, T]; the chosen answers come
    first. A row with the prompt p q r and the answer a b with its end of turn e:
        input_ids       p    q    r    a    b    e    0    0
        scored          .    .    .    x    x    x    .    .
        predicted by              ^    ^    ^         the state one place before
    In a causal model no token sees what comes after it, so padding on the right needs no mask."""
    prompts = [pair["prompt_ids"] for pair in pairs] * 2
    answers = [pair[side] for side in ("chosen_ids", "rejected_ids") for pair in pairs]
    rows = [torch.tensor(prompt + answer) for prompt, answer in zip(prompts, answers)]
    scored = [torch.arange(len(row)) >= len(prompt) for row, prompt in zip(rows, prompts)]
    rows = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
    scored = nn.utils.rnn.pad_sequence(scored, batch_first=True)
    return {"input_ids": rows.to(DEVICE), "scored": scored.to(DEVICE)}


def load_rows(source, split, args):  # of a hub id, a folder or a file
    import datasets  # here, so that the rest works without it

    path = Path(source).absolute()
    kinds = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
    kind = kinds.get(Path(path.name.lower().removesuffix(".gz")).suffix)
    if not kind and not path.is_file():
        return datasets.load_dataset(source, args.dataset_config, split=split)
    if not kind or not path.is_file() or path.stat().st_size == 0 or set("*?[]") & set(str(path)):
        sys.exit(f"simpo.py: {path}: no such file, or it is empty, none of {[*kinds]}, or has *?[]")
    return datasets.load_dataset(kind, data_files=str(path), split=split)


def load_pairs(source, split, tokenizer, args):
    """What load_rows takes -> tokenized pairs, in mapped files. Says what is left out."""
    from datasets import Features, List, Value, fingerprint

    if LOCAL_RANK > 0:  # the first process of a machine tokenizes, the others read its cache
        dist.barrier()
    rows = load_rows(source, split, args)
    # Other column names? rows = rows.rename_columns({"better": "chosen", "worse": "rejected"})
    if not {"chosen", "rejected"} <= set(rows.column_names):
        sys.exit(f"simpo.py: {source} needs 'chosen' and 'rejected', but has {rows.column_names}")
    limits = args.max_length, args.max_prompt_length
    kinds = dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids"), List(Value("int32")))
    kinds |= {"cut": Value("bool"), "why": Value("string")}

    def tokenize(row, index):
        try:
            pair = tokenize_pair(row, tokenizer, *limits)
        except Exception as error:
            raise ValueError(f"{source}, row {index + 1}: {error}") from error
        return dict.fromkeys(kinds) | ({"why": pair} if isinstance(pair, str) else pair)

    code = [function.__code__ for function in (split_row, render, tokenize_pair)]
    key = fingerprint.Hasher.hash([rows._fingerprint, tokenizer, limits, code])  # of the cache
    options = {"with_indices": True, "features": Features(kinds), "new_fingerprint": key}
    options["num_proc"] = min(16, os.cpu_count(), len(rows) // 1000) or None
    results = rows.map(tokenize, remove_columns=rows.column_names, **options)
    if LOCAL_RANK == 0 and WORLD_SIZE > 1:
        dist.barrier()
    pairs = results.select([i for i, why in enumerate(results["why"]) if why is None])
    print(f"{source}: {len(rows)} rows, {len(pairs)} pairs, {sum(pairs['cut'])} of them cut")
    for why, count in Counter(filter(None, results["why"])).most_common(10):
        print(f"    {count} dropped: {why}")
    if not len(pairs):
        sys.exit("simpo.py: no pair is left")
    unread = [name for name in rows.column_names if name not in ("prompt", "chosen", "rejected")]
    prompt, chosen, rejected = [tokenizer.decode(pairs[0][name]) for name in [*kinds][:3]]
    print(f"    columns not read: {unread}; the first prompt ends in {prompt[-60:]!r}")
    print(f"    what is scored: {chosen[:80]!r} and {rejected[:80]!r}")
    return pairs.remove_columns("why")


# ------------------------------------------------------------------------------ command line
def parse_args(argv):
    """The command line, and args.hyperparameters, those of the objective."""
    first = argparse.ArgumentParser(usage="%(prog)s [flags]", add_help=False, allow_abbrev=False)
    first.add_argument("--loss", default="simpo", help="the objective (simpo)", choices=OBJECTIVES)
    loss = first.parse_known_args(argv)[0].loss  # it decides which other flags there are
    parser = argparse.ArgumentParser(usage="%(prog)s [flags]", allow_abbrev=False, parents=[first])

    def add(flag, kind, default, text, **more):
        more |= {"action": "store_true"} if kind is bool else {"type": kind}
        parser.add_argument(flag, default=default, help=f"{text} ({default})", **more)

    own = OBJECTIVES[loss].__kwdefaults__ or {}
    for name, default in own.items():
        flag = "--lambda" if name == "lam" else f"--{name}"
        add(flag, float, default, f"of {loss}; each --loss has its own", dest=name)
    add("--model", str, None, "hub id or folder; without it, and without --dataset, the demo")
    add("--dataset", str, None, "pairs: hub id, folder, or .jsonl, .json, .parquet or .csv file")
    add("--eval_dataset", str, None, "held-out pairs; unset: --eval_split of --dataset")
    add("--dataset_config", str, None, "configuration of a hub id or folder that has several")
    add("--train_split", str, "train", "split of --dataset; slices like train[:1000] work, too")
    add("--eval_split", str, None, "split of the held-out pairs; unset: train of --eval_dataset")
    add("--max_length", int, 2048, "tokens of a prompt and an answer")
    add("--max_prompt_length", int, None, "tokens of a prompt; unset: --max_length * 1800/2048")
    add("--lr", float, 1e-6, "peak learning rate")
    add("--batch_size", int, 128, "pairs in a step, over all processes")
    add("--micro_batch_tokens", int, 8192 if ON_GPU else 2048, "tokens in a pass, with padding")
    add("--epochs", int, 1, "times that each pair is seen")
    add("--max_steps", int, None, "optimizer steps; unset: as --epochs says")
    add("--warmup_ratio", float, 0.1, "share of the steps in which the learning rate rises")
    add("--weight_decay", float, 0.0, "weight decay of AdamW")
    add("--max_grad_norm", float, 1.0, "gradients are clipped to this norm; 0: never")
    add("--gradient_checkpointing", bool, False, "keep fewer activations, compute them twice")
    add("--shard", bool, False, "spread a model too big for one GPU over those of torchrun")
    add("--seed", int, 0, "fixes the order of pairs, and the demo")
    add("--dtype", str, "bf16" if ON_GPU else "fp32", "matrix products", choices=["bf16", "fp32"])
    add("--output_dir", str, "simpo_output", "folder for the model, metrics and checkpoints")
    add("--save_every", int, 100, "steps between checkpoints, 0: none")
    add("--resume", bool, False, "go on from the last checkpoint; other flags as before")
    args = parser.parse_args(argv)
    if (args.model is None) != (args.dataset is None):
        parser.error("--model and --dataset go together")
    args.max_prompt_length = args.max_prompt_length or args.max_length * 1800 // 2048
    args.hyperparameters = {name: vars(args).pop(name) for name in own}
    return args


# ------------------------------------------------------------------------------ runtime
def load(args):
    """Flags -> tokenizer, model (on the CPU, in its file's dtype), pairs, held-out pairs."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    usual = transformers.PreTrainedTokenizerBase.apply_chat_template
    if tokenizer.eos_token_id is None or type(tokenizer).apply_chat_template is not usual:
        sys.exit(f"simpo.py: a {type(tokenizer).__name__} without EOS, or of mistral-common")
    pairs = load_pairs(args.dataset, args.train_split, tokenizer, args)
    source = args.eval_dataset or args.dataset
    split = args.eval_split or (args.eval_dataset and "train")
    held_out = load_pairs(source, split, tokenizer, args) if split else []
    options = {"dtype": "auto", "output_loading_info": True}
    model, report = transformers.AutoModelForCausalLM.from_pretrained(args.model, **options)
    if missing := sorted(report["missing_keys"]):  # they have been drawn at random
        sys.exit(f"simpo.py: {args.model} lacks {len(missing)} weights, such as {missing[0]}")
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        sys.exit(f"simpo.py: the tokenizer of {args.model} has more tokens than the model")
    if unused := sorted(report["unexpected_keys"]):
        print(f"{args.model}: {len(unused)} weights are not used, such as {unused[0]}")
    model.eval()  # in training too: policy and reference have to agree
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():  # only layers train, so that they checkpoint; dropout is off
            module.training = isinstance(module, transformers.GradientCheckpointingLayer)
    return tokenizer, model, pairs, held_out


def wrap(policy, args):
    """Move a policy to its device, whole or spread by FSDP2 (--shard), and then cast it to fp32: in
    bf16 numbers near 0.02 are 1.2e-4 apart, and steps of 1e-6 would be lost."""
    if args.shard:
        dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
        precision = fsdp.MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        layer = transformers.GradientCheckpointingLayer
        for module in [*(x for x in policy.modules() if isinstance(x, layer)), policy]:
            fsdp.fully_shard(module, mp_policy=precision)
        fsdp.register_fsdp_forward_method(policy, "check")
    policy.to(DEVICE).float()
    rows = policy.model.get_input_embeddings().weight.shape[0]
    ids = torch.linspace(rows // 10, rows - 1, 12, device=DEVICE).long()[None]  # [1, 12]
    with torch.no_grad():
        policy.check(ids, 0.05 if args.shard and args.dtype == "bf16" else 1e-3)
    policy(ids, ids >= 0).sum().backward()  # shows which weights get a gradient
    frozen = [name for name, weight in policy.named_parameters() if weight.grad is None]
    for weight in policy.parameters():
        weight.requires_grad_(weight.grad is not None)
    policy.zero_grad()
    if frozen:  # such as those of a vision tower
        print(f"{len(frozen)} weights without gradient are not trained: {frozen!s:.200}")
    if args.dtype == "bf16" and not args.shard:
        policy.forward = torch.autocast(DEVICE.type, torch.bfloat16)(policy.forward)
    if WORLD_SIZE > 1 and not args.shard:
        policy = nn.parallel.DistributedDataParallel(policy, gradient_as_bucket_view=True)
    return policy


def save_model(policy, model, tokenizer, out):
    """Write whole fp32 weights in Hugging Face's format; config.json, which ends the run, last."""
    options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = dcp_state.get_model_state_dict(policy, options=options)
    if RANK == 0:  # a tied head is the embedding under another name; here each tensor has one name
        names = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
        state = {name: state[f"model.{name}"] for name in names if f"model.{name}" in state}
        tokenizer.save_pretrained(out)
        shutil.rmtree(out / "new", ignore_errors=True)
        model.save_pretrained(out / "new", state_dict=state)
        for path in sorted((out / "new").iterdir(), key=lambda path: path.name == "config.json"):
            path.replace(out / path.name)
        (out / "new").rmdir()


def find_checkpoint(out, args):
    """-> the checkpoint to --resume from. If there is none, the first process claims the folder."""
    flags = vars(args) | {"output_dir": out.name}
    free = {"resume", "shard", "gradient_checkpointing", "micro_batch_tokens", "save_every"}
    if args.resume and (found := [*out.glob("checkpoint-[0-9]*")]):
        then = json.loads((out / "simpo_run.json").read_text())
        other = [name for name in flags if name not in free and flags[name] != then.get(name)]
        if other:
            sys.exit(f"simpo.py: the run in {out} had other {other}")
        return max(found, key=lambda path: int(path.name[11:]))
    if RANK == 0:
        if not args.resume and any((out / x).exists() for x in ("config.json", "metrics.jsonl")):
            sys.exit(f"simpo.py: {out} holds a run: --resume it, or choose another --output_dir")
        out.mkdir(parents=True, exist_ok=True)
        (out / "metrics.jsonl").unlink(missing_ok=True)
        (out / "simpo_run.json").write_text(json.dumps(flags, indent=2))


def save_checkpoint(policy, optimizer, step, out):
    """Write checkpoint-STEP, all processes together. It gets its name when it is whole."""
    weights, moments = dcp_state.get_state_dict(policy, optimizer)
    dcp.save({"weights": weights, "moments": moments}, checkpoint_id=out / "new")
    if RANK == 0:
        shutil.copy(out / "metrics.jsonl", out / "new")
        newest = (out / "new").rename(out / f"checkpoint-{step}")
        for folder in set(out.glob("checkpoint-[0-9]*")) - {newest}:
            shutil.rmtree(folder)


def load_checkpoint(folder, policy, optimizer):
    """Fill in policy and optimizer, and take metrics.jsonl back to their step -> that step."""
    weights, moments = dcp_state.get_state_dict(policy, optimizer)
    dcp.load({"weights": weights, "moments": moments}, checkpoint_id=folder)  # in place
    dcp_state.set_state_dict(policy, optimizer, model_state_dict=weights, optim_state_dict=moments)
    if RANK == 0:
        shutil.copy(folder / "metrics.jsonl", folder.parent)
    return int(folder.name[11:])


# ------------------------------------------------------------------------------ training
def micro_batches(pairs, most_tokens):
    """Cut pairs into passes of (indices of pairs, weights), equally many for each process; the
    longest first, to pad little. A process without a pair repeats another's, with weight 0."""
    rows = [len(p["prompt_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"])) for p in pairs]
    order = sorted(range(len(rows)), key=lambda index: -rows[index])
    passes, longest = [], 0
    for start in range(0, len(order), WORLD_SIZE):
        group = order[start : start + WORLD_SIZE]  # one pair for each process
        if not passes or 2 * longest * (len(passes[-1][0]) + 1) > most_tokens:
            passes.append(([], []))
            longest = rows[group[0]]
        indices, weights = passes[-1]
        indices.append(group[RANK] if RANK < len(group) else group[0])
        weights.append(float(RANK < len(group)))
    return [(indices, torch.tensor(weights, device=DEVICE)) for indices, weights in passes]


def apply_objective(logps, pairs, ref_logps, args):
    """logps of B pairs, [2, B], chosen and rejected -> {metric: [B]}. Any mean over pairs fits."""
    lengths = [[len(p["chosen_ids"]) for p in pairs], [len(p["rejected_ids"]) for p in pairs]]
    lengths = torch.tensor(lengths, device=DEVICE)  # |y|, [2, B]
    averages = logps / lengths  # the length normalization
    reference = [None, None] if ref_logps is None else ref_logps
    chosen = Answers(logps[0], averages[0], reference[0], lengths[0])
    rejected = Answers(logps[1], averages[1], reference[1], lengths[1])
    objective = OBJECTIVES[args.loss]
    losses, chosen_rewards, rejected_rewards = objective(chosen, rejected, **args.hyperparameters)
    metrics = {"loss": losses, "logps/chosen": averages[0], "logps/rejected": averages[1]}
    metrics |= {"rewards/chosen": chosen_rewards, "rewards/rejected": rejected_rewards}
    metrics["rewards/margins"] = chosen_rewards - rejected_rewards
    return metrics | {"rewards/accuracies": (chosen_rewards > rejected_rewards).float()}


@torch.no_grad()
def score(policy, pairs, args):
    """-> log pi(y|x) of both answers of all pairs, [2, pairs], by all processes together."""
    logps = torch.zeros(2, len(pairs), device=DEVICE)
    passes = micro_batches(pairs, args.micro_batch_tokens)
    for places, weights in tqdm(passes, "scoring", leave=False, disable=RANK > 0):
        logps[:, places] += weights * policy(**collate([pairs[i] for i in places])).view(2, -1)
    if WORLD_SIZE > 1:
        dist.all_reduce(logps)
    return logps


def log(row, out):  # JSON has no NaN
    with open(out / "metrics.jsonl" if RANK == 0 else os.devnull, "a") as file:
        print(json.dumps({k: x if math.isfinite(x) else None for k, x in row.items()}), file=file)


def train(policy, optimizer, pairs, ref_logps, args, done, steps, out):
    """Train in place from step done + 1 on. The first warm-up step has lr 0 and changes nothing."""
    make_schedule = transformers.get_cosine_schedule_with_warmup  # or get_linear_...
    schedule = make_schedule(optimizer, int(args.warmup_ratio * steps), steps, last_epoch=done - 1)
    per_epoch = math.ceil(len(pairs) / args.batch_size)
    skipped = 0  # in a row
    bar = tqdm(range(done + 1, steps + 1), initial=done, total=steps, disable=RANK > 0)
    for step in bar:
        started = time.perf_counter()
        epoch, place = divmod(step - 1, per_epoch)
        shuffle = torch.Generator().manual_seed(args.seed + epoch)  # an order for each epoch
        drawn = torch.randperm(len(pairs), generator=shuffle).split(args.batch_size)[place]
        batch = [pairs[i] for i in drawn.tolist()]
        passes = micro_batches(batch, args.micro_batch_tokens)
        totals = 0
        for number, (places, weights) in enumerate(passes, 1):
            policy.require_backward_grad_sync = number == len(passes)  # DDP: once a step
            micro_batch = [batch[i] for i in places]
            logps = policy(**collate(micro_batch)).view(2, -1)  # log pi(y|x) of both, [2, B]
            reference = None if ref_logps is None else ref_logps[:, drawn[places]]
            metrics = apply_objective(logps, micro_batch, reference, args)  # each [B]
            # Backward, of the mean over the step; DDP and FSDP2 average over processes.
            loss = (weights * metrics["loss"]).sum() / len(batch)
            (loss * WORLD_SIZE).backward()
            totals += torch.stack([(weights * x.detach()).double().sum() for x in metrics.values()])
        # Sum up over processes, clip and step. What is not finite would make every weight NaN.
        if WORLD_SIZE > 1:
            dist.all_reduce(totals)
        means = dict(zip(metrics, (totals / len(batch)).tolist()))
        norm = nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm or math.inf)
        norm = (norm.full_tensor() if args.shard else norm).item()
        if math.isfinite(norm) and math.isfinite(means["loss"]):
            optimizer.step()
            skipped = 0
        else:
            print(f"step {step} skipped: loss {means['loss']}, gradient norm {norm}")
            skipped += 1
        optimizer.zero_grad()
        seconds = time.perf_counter() - started
        tokens = sum(len(p["prompt_ids"] * 2 + p["chosen_ids"] + p["rejected_ids"]) for p in batch)
        unit = 1024 if sys.platform == "linux" else 1  # of ru_maxrss, in bytes
        peak = torch.cuda.max_memory_allocated() or getrusage(RUSAGE_SELF).ru_maxrss * unit
        row = {"step": step, "epoch": step / per_epoch, **means, "peak_memory_gib": peak / 2**30}
        row |= {"grad_norm": norm, "lr": schedule.get_last_lr()[0], "step_seconds": seconds}
        row |= {"pairs_per_second": len(batch) / seconds, "tokens_per_second": tokens / seconds}
        log(row, out)
        if skipped == 10:
            sys.exit("simpo.py: ten steps in a row were skipped; nothing is saved")
        bar.set_postfix(loss=row["loss"], accuracy=row["rewards/accuracies"], lr=row["lr"])
        schedule.step()
        if args.save_every and step % args.save_every == 0 and step < steps:
            save_checkpoint(policy, optimizer, step, out)


def main(argv=None, start=None, on_evaluate=lambda model, step: {}):
    """Train as argv says; start replaces what `load` returns. -> metrics of the last evaluation."""
    args = parse_args(argv)
    if args.model is None and start is None:
        sys.path.insert(0, str(Path(__file__).parent / "notebooks"))
        import demo

        return demo.main(sys.argv[1:] if argv is None else argv)
    out = Path(args.output_dir)
    sys.stdout = sys.stdout if RANK == 0 else None  # the first process speaks for all
    if args.resume and (out / "config.json").exists():
        print(f"{out} holds the trained model: there is nothing left to do")
        return {}
    transformers.logging.set_verbosity_error()
    if ON_GPU:
        torch.cuda.set_device(DEVICE)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each new shape of a pass
    if "RANK" in os.environ:
        dist.init_process_group(timeout=8 * dist.default_pg_timeout)  # tokenizing takes time
    folder = find_checkpoint(out, args)
    tokenizer, model, pairs, held_out = start or load(args)
    most_logits = 2**27 if ON_GPU else 2**23  # at one time: 512 or 32 MiB
    chunk = 1 + most_logits // model.config.get_text_config().vocab_size
    policy = wrap(ResponseLogps(model, chunk), args)
    groups = [{"params": [x for x in model.parameters() if x.requires_grad], "initial_lr": args.lr}]
    optimizer = torch.optim.AdamW(groups, args.lr, weight_decay=args.weight_decay, fused=True)
    steps = args.max_steps or args.epochs * math.ceil(len(pairs) / args.batch_size)
    needed = args.loss in NEEDS_REFERENCE  # the starting policy, scored once
    references = [score(policy, x, args) if needed else None for x in (pairs, held_out)]
    step = load_checkpoint(folder, policy, optimizer) if folder else 0
    print(f"{args.loss} {args.hyperparameters}: {steps - step} steps of {args.batch_size} pairs")

    def evaluate(step):
        metrics = apply_objective(score(policy, held_out, args), held_out, references[1], args)
        row = {f"eval/{name}": x.double().mean().item() for name, x in metrics.items()}
        print(f"step {step}: held-out accuracy {row['eval/rewards/accuracies']:.3f}")
        row |= on_evaluate(model, step)
        log({"step": step} | row, out)
        return row

    if step == 0 and len(held_out) > 0:
        evaluate(0)
    train(policy, optimizer, pairs, references[0], args, step, steps, out)
    metrics = evaluate(steps) if len(held_out) > 0 else {}
    save_model(policy, model, tokenizer, out)
    print(f"saved: AutoModelForCausalLM.from_pretrained({args.output_dir!r})")
    if dist.is_initialized():
        dist.destroy_process_group()
    return metrics


if __name__ == "__main__":
    main()
