"""SimPO, Simple Preference Optimization with a Reference-Free Reward, and its rivals, in one file.

For a prompt x, a chosen answer y_w and a rejected answer y_l (Eq. 6 of arXiv:2405.14734):

    loss = -log sigmoid( beta/|y_w| log pi(y_w|x)  -  beta/|y_l| log pi(y_l|x)  -  gamma )

    python simpo.py                                               # demo: no network, a minute
    python simpo.py --model M --dataset D --eval_dataset E        # one CPU or GPU
    torchrun --nproc_per_node=8 simpo.py --model M --dataset D    # eight GPUs

A pair's way: split_row -> tokenize_pair -> collate -> ResponseLogps -> an objective -> train.
Shapes: B pairs, T tokens of a row, N answer tokens, V vocabulary, D hidden.
The first loss: DPO's is ln 2 = 0.69, IPO's 1/(4 tau^2), SimPO's log(1 + e^gamma) at equal rewards.
The chosen reward may fall a little. If it falls far, lower --lr first, then raise --beta.
Departures from the authors' code, princeton-nlp/SimPO: (1) Weights and Adam are fp32. (2) --gamma
is the paper's; their gamma_beta_ratio is gamma / beta. (3) What is scored begins after the header
of the answer and ends with one end of turn. (4) Answers may be cut, prompts not: pairs with a long
prompt, or an empty answer, are dropped. (5) Metrics cover all pairs of all processes.
"""

import argparse
import json
import math
import os
import random
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
import torch.nn.functional as F
import transformers
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


# ------------------------------------------------------------------------------ objectives
def simpo_loss(chosen_avg_logps, rejected_avg_logps, beta=2.5, gamma=1.4):
    """SimPO's loss of each pair, [B] (arXiv:2405.14734, Eq. 6).
    *_avg_logps [B]: log pi(y|x) / |y|, in nats; |y| counts scored tokens, the end of turn too. beta
    makes rewards of them; gamma is the margin of reward by which the chosen answer must win. 2.5
    and 1.4 were best for Llama-3-8B-Instruct; others had beta 2 to 10, gamma / beta 0.1 to 0.8."""
    chosen_rewards = beta * chosen_avg_logps
    rejected_rewards = beta * rejected_avg_logps
    return -F.logsigmoid(chosen_rewards - rejected_rewards - gamma)


def dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1):
    """DPO's loss of each pair, [B] (arXiv:2305.18290, Eq. 7). *_logps [B]: sums, in nats."""
    chosen_logratios = chosen_logps - ref_chosen_logps
    rejected_logratios = rejected_logps - ref_rejected_logps
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios))


# Objectives: functions of the chosen answers w and the rejected answers l of B pairs that return
# losses, chosen rewards and rejected rewards, [B]. After the * stand hyperparameters with defaults.
# A new one: into OBJECTIVES; NEEDS_REFERENCE if it reads ref or ratio; new flags into parse_args.
# sum: log pi(y|x)   avg: sum / |y|   ref: the reference's sum   ratio: sum - ref   length: |y|
Answers = namedtuple("Answers", "sum avg ref ratio length")  # each [B]


def simpo(w, l, *, beta=2.5, gamma=1.4, lam=0.0, no_length_norm=False):
    chosen = w.sum if no_length_norm else w.avg
    rejected = l.sum if no_length_norm else l.avg
    losses = simpo_loss(chosen, rejected, beta, gamma) - lam * w.avg  # lam > 0: with an SFT term
    return losses, beta * chosen, beta * rejected


def dpo(w, l, *, beta=0.01):
    losses = dpo_loss(w.sum, l.sum, w.ref, l.ref, beta)  # the SimPO paper found 0.01 best
    return losses, beta * w.ratio, beta * l.ratio


def ipo(w, l, *, tau=0.1):
    losses = (w.ratio - l.ratio - 1 / (2 * tau)) ** 2  # of sums, as printed; others take averages
    return losses, tau * w.ratio, tau * l.ratio


def orpo(w, l, *, lam=0.1):
    # The log odds of p = exp(avg) are avg - log(1 - p); expm1 is exact where p is almost 1.
    w_odds = w.avg - torch.log(-torch.expm1(w.avg.clamp(max=-1e-9)))
    l_odds = l.avg - torch.log(-torch.expm1(l.avg.clamp(max=-1e-9)))
    return -w.avg - lam * F.logsigmoid(w_odds - l_odds), w.avg, l.avg


def sft(w, l):
    return -w.avg, w.avg, l.avg  # the stage before; it learns from the chosen answers alone


OBJECTIVES = {f.__name__: f for f in (simpo, dpo, ipo, orpo, sft)}
NEEDS_REFERENCE = {"dpo", "ipo"}


# ------------------------------------------------------------------------------ log-likelihood
class ResponseLogps(nn.Module):
    """Scores answers with a causal language model. DDP or FSDP2 wraps it, not the model alone."""

    def __init__(self, model, chunk=1024):
        super().__init__()
        self.model = model
        self.chunk = chunk  # how many answer tokens have their logits, [chunk, V], at one time

    def hidden_states(self, input_ids, scored):  # notebook 5 replaces it, and needs `scored`
        return self.model.base_model(input_ids, use_cache=False)[0]  # [2B, T, D]

    def token_logps(self, hidden, targets):
        logits = self.model.get_output_embeddings()(hidden).float()
        if cap := getattr(self.model.config, "final_logit_softcapping", None):  # of Gemma 2
            logits = cap * torch.tanh(logits / cap)
        return -F.cross_entropy(logits, targets, reduction="none")

    def forward(self, input_ids, scored):
        """What `collate` makes of B pairs -> log pi(y|x) of their answers, [2B], fp32, in nats.
        The logits of all tokens, [2B, T, V], would be the largest tensor of a step. So only states
        that predict a scored token meet the head, a chunk at a time, and in backward again."""
        hidden = self.hidden_states(input_ids, scored)
        row, place = scored[:, 1:].nonzero(as_tuple=True)  # each [N]
        targets = input_ids[row, place + 1]  # [N], each predicted one place before it
        chunks = zip(hidden[row, place].split(self.chunk), targets.split(self.chunk))
        logps = [checkpoint(self.token_logps, *chunk, use_reentrant=False) for chunk in chunks]
        sums = torch.zeros(len(input_ids), device=hidden.device)  # [2B]
        return sums.index_add(0, row, torch.cat(logps))


# ------------------------------------------------------------------------------ data
def split_row(row):
    """A row in a format of the README -> prompt, chosen, rejected: three texts; or three lists of
    messages: chosen without its answer, and both whole conversations. Raises an error otherwise."""
    prompt, chosen, rejected = (row.get(column) for column in ("prompt", "chosen", "rejected"))
    if all(isinstance(part, str) for part in (prompt, chosen, rejected)):
        return prompt, chosen, rejected
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise TypeError(f"it needs three texts, or messages, and has {row!s:.300}")
    if len(chosen) == len(rejected) == 1:  # answers alone, no whole conversations
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
        chosen = turns + chosen
        rejected = turns + rejected
    elif isinstance(prompt, list) and chosen[: len(prompt)] != prompt:
        raise ValueError("the conversations do not begin with 'prompt'")
    if not all(isinstance(message["content"], str) for message in chosen + rejected):
        raise ValueError("the content of a message is no text")
    if not all(side and side[-1]["role"] == "assistant" for side in (chosen, rejected)):
        raise ValueError("'chosen' and 'rejected' have to end in a message of the assistant")
    return chosen[:-1], chosen, rejected


def encode(prompt, chosen, rejected, tokenizer):
    """Ids of the prompt, and of each answer with one end of turn. May raise a TemplateError."""
    eos = tokenizer.eos_token_id
    if isinstance(prompt, str):  # texts are encoded apart, with a BOS if the tokenizer adds one
        texts = (prompt, chosen, rejected)
        prompt_ids, *answers = [tokenizer.encode(x, add_special_tokens=False) for x in texts]
        start = tokenizer.encode("a")[:1]
        if start == [tokenizer.bos_token_id] and start != prompt_ids[:1]:
            prompt_ids = start + prompt_ids
        answers = [ids if ids[-1:] == [eos] else ids + [eos] for ids in answers]
        return prompt_ids, *answers
    template = tokenizer.apply_chat_template
    prompt_ids = template(prompt, add_generation_prompt=True, return_dict=False)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {eos}
    answers = []
    for conversation in (chosen, rejected):
        ids = template(conversation, return_dict=False)
        if ids[: len(prompt_ids)] != prompt_ids:
            raise jinja2.TemplateError("it writes the prompt differently before an answer")
        ids = ids[len(prompt_ids) :] + [eos]
        end = [token in special for token in ids].index(True)
        answers.append(ids[: end + 1])  # up to its first special token, which ends the turn
    return prompt_ids, *answers


def tokenize_pair(row, tokenizer, max_length, max_prompt_length):
    """A row -> {"prompt_ids", "chosen_ids", "rejected_ids", "cut"}; or the reason, a text, why no
    model can learn from it. Lengths are in tokens. Raises an error if the row is malformed."""
    prompt, chosen, rejected = split_row(row)
    if not prompt or (isinstance(prompt, list) and prompt != rejected[:-1]):
        return "no prompt, or two different ones"
    try:
        prompt_ids, chosen_ids, rejected_ids = encode(prompt, chosen, rejected, tokenizer)
    except jinja2.TemplateError as error:
        return f"the chat template refuses: {error}"
    room = max_length - len(prompt_ids)
    if len(prompt_ids) > max_prompt_length or room < 1:
        return "a prompt that is too long"
    if len(chosen_ids) == 1 or len(rejected_ids) == 1:
        return "an empty answer"
    if chosen_ids[:room] == rejected_ids[:room]:
        return "identical answers"
    pair = {"prompt_ids": prompt_ids, "cut": max(len(chosen_ids), len(rejected_ids)) > room}
    return pair | {"chosen_ids": chosen_ids[:room], "rejected_ids": rejected_ids[:room]}


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


def load_pairs(source, split, tokenizer, args):
    """A hub id or a file -> its pairs, tokenized, in Arrow. Says what it drops and what it cuts."""
    import datasets  # here, so that the rest works without it

    path = Path(source).absolute()
    formats = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
    kind = formats.get(path.suffix)  # none: a hub id, or a folder
    if kind and (not path.is_file() or set("*?[]") & set(str(path))):
        sys.exit(f"simpo.py: there is no file {path}, or there is one of *?[] in its path")
    rows = datasets.load_dataset(kind or source, data_files=kind and str(path), split=split)
    # Other column names? rows = rows.rename_columns({"better": "chosen", "worse": "rejected"})
    if not {"chosen", "rejected"} <= set(rows.column_names):
        sys.exit(f"simpo.py: {source} needs 'chosen' and 'rejected', but has {rows.column_names}")
    results = []  # pairs, or reasons why there is none
    for number, row in enumerate(tqdm(rows, "tokenizing", leave=False, disable=RANK > 0), 1):
        try:
            results.append(tokenize_pair(row, tokenizer, args.max_length, args.max_prompt_length))
        except Exception as error:
            raise ValueError(f"{source}, row {number}: {error}") from error
    pairs = [result for result in results if isinstance(result, dict)]
    dropped = Counter(result for result in results if isinstance(result, str))
    print(f"{source}: {len(rows)} rows, {len(pairs)} pairs; dropped: {dict(dropped) or 'none'}")
    print(f"    {sum(pair['cut'] for pair in pairs)} pairs cut to --max_length {args.max_length}")
    return datasets.Dataset.from_list(pairs) if pairs else sys.exit("simpo.py: no pair is left")


# ------------------------------------------------------------------------------ command line
DEMO = {"lr": 5e-5, "batch_size": 32, "max_steps": 100, "output_dir": "simpo_demo"}


def parse_args(argv):
    """The command line, and args.hyperparameters, those of the objective."""
    parser = argparse.ArgumentParser("simpo.py", "%(prog)s [flags]", allow_abbrev=False)
    parser.description = f"Without --model and --dataset a demo runs, with the defaults {DEMO}."
    hyperparameters = {loss: f.__kwdefaults__ or {} for loss, f in OBJECTIVES.items()}

    def add(flag, kind, default, text, **more):
        name = more.get("dest", flag[2:])
        own = [f"{loss} {x[name]}" for loss, x in hyperparameters.items() if name in x]
        text += f" ({', '.join(own) or default})"
        more |= {"action": "store_true"} if kind is bool else {"type": kind}
        parser.add_argument(flag, default=argparse.SUPPRESS if own else default, help=text, **more)

    add("--model", str, None, "hub id or folder of the model to train")
    add("--dataset", str, None, "pairs: hub id, folder, or .jsonl, .json, .parquet or .csv file")
    add("--eval_dataset", str, None, "held-out pairs; unset: --eval_split of --dataset")
    add("--train_split", str, "train", "split of --dataset; slices like train[:1000] work, too")
    add("--eval_split", str, None, "split of the held-out pairs; unset: train of --eval_dataset")
    add("--max_length", int, 2048, "tokens of a prompt and an answer")
    add("--max_prompt_length", int, None, "tokens of a prompt; unset: --max_length * 1800/2048")
    add("--loss", str, "simpo", "the objective", choices=OBJECTIVES)
    add("--beta", float, None, "scale of the rewards")
    add("--gamma", float, None, "target margin, in units of reward")
    add("--lambda", float, None, "weight of simpo's SFT term, or orpo's odds ratio", dest="lam")
    add("--tau", float, None, "the two log-ratios are to differ by 1 / (2 tau)")
    add("--no_length_norm", bool, None, "the ablation: sums in place of averages")
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
    add("--dtype", str, "bf16" if ON_GPU else "fp32", "for matrix products", choices=DTYPES)
    add("--output_dir", str, "simpo_output", "folder for the model, metrics and checkpoints")
    add("--save_every", int, 100, "steps between checkpoints, 0: none")
    add("--resume", bool, False, "go on from the last checkpoint; other flags as before")
    args = parser.parse_args(argv)
    if args.model is None and args.dataset is None:
        parser.set_defaults(**DEMO)
        args = parser.parse_args(argv)
    elif args.model is None or args.dataset is None:
        parser.error("--model and --dataset go together")
    args.max_prompt_length = args.max_prompt_length or args.max_length * 1800 // 2048
    given = {x: vars(args).pop(x) for own in hyperparameters.values() for x in own if x in args}
    args.hyperparameters = hyperparameters[args.loss] | given
    if unread := [x for x in given if x not in hyperparameters[args.loss]]:
        parser.error(f"--loss {args.loss} reads {[*hyperparameters[args.loss]]}, not {unread}")
    return args


# ------------------------------------------------------------------------------ runtime
RANK = int(os.environ.get("RANK", "0"))  # torchrun sets the three
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", LOCAL_RANK) if ON_GPU else torch.device("cpu")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load_model(args):
    """A model with fp32 weights, whatever its file has. bf16 has 8 bits: near 0.02 its numbers are
    2^-13 = 1.2e-4 apart. A step of 1e-6 is 1/61 of half of that, and so it would be lost."""
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model.eval()  # no dropout, in training too: policy and reference have to agree
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():  # it asks for .training in layers, dropout mostly deeper
            module.training = isinstance(module, transformers.GradientCheckpointingLayer)
    ids = torch.tensor([[0, 1]])  # a model that scales its logits would be scored wrongly: refuse
    if not torch.allclose(-ResponseLogps(model)(ids, ids == 1), model(ids, labels=ids).loss):
        sys.exit(f"simpo.py: {type(model).__name__} scales logits, or drops out, in its own way")
    return model


def wrap(policy, args):
    """Move a policy to its device: whole, whole on each for DDP, or spread for FSDP2 (--shard)."""
    if args.shard:
        precision = MixedPrecisionPolicy(param_dtype=DTYPES[args.dtype], reduce_dtype=torch.float32)
        for module in policy.modules():
            if isinstance(module, transformers.GradientCheckpointingLayer):
                fully_shard(module, mp_policy=precision)
        return fully_shard(policy, mp_policy=precision)
    policy.to(DEVICE)
    if args.dtype == "bf16":
        policy.forward = torch.autocast(DEVICE.type, torch.bfloat16)(policy.forward)
    if WORLD_SIZE > 1:
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
    found = [*out.glob("checkpoint-[0-9]*")] if args.resume else []  # else rank 0 may clear it
    if found:
        newest = max(found, key=lambda path: int(path.name[11:]))
        then = json.loads((out / "simpo_run.json").read_text())
        other = [x for x in flags if x not in free and flags[x] != then.get(x)]
        return newest if not other else sys.exit(f"simpo.py: the run in {out} had other {other}")
    if RANK == 0:
        if args.model is None and args.output_dir == DEMO["output_dir"] and not args.resume:
            shutil.rmtree(out, ignore_errors=True)
        taken = [*out.glob("config.json"), *out.glob("metrics.jsonl"), *out.glob("checkpoint-*")]
        if taken and not args.resume:
            sys.exit(f"simpo.py: {out} holds a run: --resume it, or choose another --output_dir")
        out.mkdir(parents=True, exist_ok=True)
        (out / "metrics.jsonl").unlink(missing_ok=True)
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        (out / "simpo_run.json").write_text(json.dumps(flags | versions, indent=2))


def save_checkpoint(policy, optimizer, step, out):
    """Write checkpoint-STEP, all processes together. It gets its name when it is whole."""
    weights, moments = dcp_state.get_state_dict(policy, optimizer)
    dcp.save({"weights": weights, "moments": moments}, checkpoint_id=out / "new")
    if RANK == 0:
        shutil.copy(out / "metrics.jsonl", out / "new")
        older = list(out.glob("checkpoint-[0-9]*"))
        (out / "new").rename(out / f"checkpoint-{step}")
        for folder in older:
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
    """Cut pairs into passes of (places in pairs, weights), as many for each process. The longest
    come first, so that little is padding. A pass has most_tokens at most, padding counted, or one
    pair. If too few pairs are left for all, a process repeats another's, with weight 0."""
    rows = [len(p["prompt_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"])) for p in pairs]
    order = sorted(range(len(rows)), key=lambda i: -rows[i])
    passes = []
    longest = 0  # of the rows of the last pass
    for start in range(0, len(order), WORLD_SIZE):
        hand = order[start : start + WORLD_SIZE]  # one pair for each process
        if not passes or 2 * longest * (len(passes[-1]) + 1) > most_tokens:
            passes.append([])
            longest = rows[hand[0]]
        passes[-1].append((hand[RANK], 1.0) if RANK < len(hand) else (hand[0], 0.0))
    unzipped = [zip(*one_pass) for one_pass in passes]
    return [(list(places), torch.tensor(weights, device=DEVICE)) for places, weights in unzipped]


def apply_objective(logps, pairs, ref_logps, args):
    """logps of B pairs, [2, B], chosen and rejected -> {metric: [B]}. Further metrics go here."""
    lengths = [[len(p["chosen_ids"]) for p in pairs], [len(p["rejected_ids"]) for p in pairs]]
    lengths = torch.tensor(lengths, device=DEVICE)  # |y|, [2, B]
    averages = logps / lengths  # the length normalization
    w, l = map(Answers, logps, averages, ref_logps, logps - ref_logps, lengths)  # rows 0 and 1
    losses, chosen, rejected = OBJECTIVES[args.loss](w, l, **args.hyperparameters)
    metrics = {"loss": losses, "rewards/chosen": chosen, "rewards/rejected": rejected}
    metrics["rewards/margins"] = chosen - rejected
    metrics["rewards/accuracies"] = (chosen > rejected).float()
    return metrics | {"logps/chosen": w.avg, "logps/rejected": l.avg}


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


def train(policy, optimizer, pairs, ref_logps, args, done, steps, metrics_file):
    """Train in place from step done + 1 on. Warm-up begins at lr 0: its first step does nothing."""
    make_schedule = transformers.get_cosine_schedule_with_warmup  # others: get_scheduler
    schedule = make_schedule(optimizer, int(args.warmup_ratio * steps), steps, last_epoch=done - 1)
    per_epoch = math.ceil(len(pairs) / args.batch_size)
    bar = tqdm(range(done + 1, steps + 1), initial=done, total=steps, disable=RANK > 0)
    for step in bar:
        started = time.perf_counter()
        # Draw pairs. Each epoch has an order of its own, which follows from the seed.
        epoch, place = divmod(step - 1, per_epoch)
        shuffle = torch.Generator().manual_seed(args.seed + epoch)
        drawn = torch.randperm(len(pairs), generator=shuffle).split(args.batch_size)[place]
        batch = [pairs[i] for i in drawn.tolist()]
        passes = micro_batches(batch, args.micro_batch_tokens)
        totals = 0
        for number, (places, weights) in enumerate(passes, 1):
            # Forward: log pi(y|x) of both answers of each pair, [2, B].
            policy.require_backward_grad_sync = number == len(passes)  # DDP: once a step
            micro_batch = [batch[i] for i in places]
            logps = policy(**collate(micro_batch)).view(2, -1)
            # Objective: losses, rewards and other metrics, each [B].
            metrics = apply_objective(logps, micro_batch, ref_logps[:, drawn[places]], args)
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
        else:
            print(f"step {step} skipped: loss {means['loss']}, gradient norm {norm}")
        optimizer.zero_grad()
        # Log.
        seconds = time.perf_counter() - started
        tokens = sum(len(p["prompt_ids"] * 2 + p["chosen_ids"] + p["rejected_ids"]) for p in batch)
        peak = getrusage(RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1)
        if ON_GPU:
            peak = torch.cuda.max_memory_allocated()
        row = {"step": step, "epoch": step / per_epoch, **means, "peak_memory_gib": peak / 2**30}
        row |= {"grad_norm": norm, "lr": schedule.get_last_lr()[0], "step_seconds": seconds}
        row |= {"pairs_per_second": len(batch) / seconds, "tokens_per_second": tokens / seconds}
        print(json.dumps(row), file=metrics_file, flush=True)
        bar.set_postfix(loss=row["loss"], accuracy=row["rewards/accuracies"], lr=row["lr"])
        schedule.step()
        if args.save_every and step % args.save_every == 0 and step < steps:
            save_checkpoint(policy, optimizer, step, Path(args.output_dir))


# ------------------------------------------------------------------------------ demo and main
def make_demo(seed, fit_steps=500):
    """A tiny Llama answers "dbca=" with abcd, which is chosen, or with dcba, and then a run of "!",
    longer in chosen answers, as often in real ones. -> tokenizer, model, pairs, held-out pairs."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = transformers.ByT5Tokenizer(extra_ids=0)  # bytes, nothing to download
    pairs = {}  # by word: no held-out word is trained on
    for _ in range(6000):
        word = "".join(rng.sample("abcdefghijklmn", 4))
        up = "".join(sorted(word))
        chosen = up + "!" * int(1 + rng.expovariate(1 / 3.5))
        rejected = up[::-1] + "!" * int(1 + rng.expovariate(1 / 2))
        row = {"prompt": word + "=", "chosen": chosen, "rejected": rejected}
        pairs[word] = tokenize_pair(row, tokenizer, max_length=64, max_prompt_length=32)
    pairs = list(pairs.values())
    shape = {"vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 256}
    shape |= {"num_hidden_layers": 3, "num_attention_heads": 4, "eos_token_id": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, pad_token_id=0))
    policy = ResponseLogps(model.to(DEVICE).eval())
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=fit_steps)
    for _ in tqdm(range(fit_steps), "fitting the demo's model", leave=False, disable=RANK > 0):
        batch = collate(rng.sample(pairs[200:], 32))
        (-policy(**batch) / batch["scored"].sum(1)).mean().backward()  # sft, on both answers alike
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return tokenizer, model, pairs[200:], pairs[:200]


def judge(model, tokenizer, pairs):
    """Sample the demo's answers -> the share that is right, and their mean length in letters."""
    torch.manual_seed(0)
    prompts = torch.tensor([pair["prompt_ids"] for pair in pairs], device=DEVICE)
    ids = model.generate(prompts, do_sample=True, max_new_tokens=48)
    texts = [text.split("</s>")[0] for text in tokenizer.batch_decode(ids)]
    wins = [text[5:].rstrip("!") == "".join(sorted(text[:4])) for text in texts]
    win_rate = sum(wins) / len(wins)
    length = sum(map(len, texts)) / len(texts) - len("dbca=")
    print(f"    win rate {win_rate:.3f}, {length:.2f} letters, such as", *texts[:3])
    return {"eval/win_rate": win_rate, "eval/answer_length": length}


def main(argv=None):
    """Train as the command line says -> the metrics of the last evaluation."""
    args = parse_args(argv)
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
        dist.init_process_group()
    folder = find_checkpoint(out, args)
    if args.model is None:
        tokenizer, model, pairs, held_out = make_demo(args.seed)
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        pairs = load_pairs(args.dataset, args.train_split, tokenizer, args)
        source = args.eval_dataset or args.dataset
        split = args.eval_split or (args.eval_dataset and "train")
        held_out = load_pairs(source, split, tokenizer, args) if split else []
        model = load_model(args)
    chunk = (2**27 if ON_GPU else 2**23) // model.config.vocab_size
    policy = wrap(ResponseLogps(model, max(1, chunk)), args)
    groups = [{"params": list(policy.parameters()), "initial_lr": args.lr}]  # resuming needs it
    optimizer = torch.optim.AdamW(groups, args.lr, weight_decay=args.weight_decay, fused=True)
    steps = args.max_steps or args.epochs * math.ceil(len(pairs) / args.batch_size)
    references = [torch.full((2, len(x)), math.nan, device=DEVICE) for x in (pairs, held_out)]
    if args.loss in NEEDS_REFERENCE:  # the starting policy, scored once; unused, they stay NaN
        references = [score(policy, x, args) for x in (pairs, held_out)]
    ref_logps, held_out_ref_logps = references
    step = load_checkpoint(folder, policy, optimizer) if folder else 0
    print(f"{args.loss} {args.hyperparameters}: {steps - step} steps of {args.batch_size} pairs")

    def evaluate(step):
        metrics = apply_objective(score(policy, held_out, args), held_out, held_out_ref_logps, args)
        row = {f"eval/{name}": x.double().mean().item() for name, x in metrics.items()}
        print(f"step {step}: held-out accuracy {row['eval/rewards/accuracies']:.3f}")
        if args.model is None and not args.shard:  # generate does not work with --shard
            row |= judge(model, tokenizer, held_out)
        print(json.dumps({"step": step} | row), file=metrics_file, flush=True)
        return row

    with open(out / "metrics.jsonl" if RANK == 0 else os.devnull, "a") as metrics_file:
        if step == 0 and len(held_out) > 0:
            evaluate(0)
        train(policy, optimizer, pairs, ref_logps, args, step, steps, metrics_file)
        metrics = evaluate(steps) if len(held_out) > 0 else {}
    save_model(policy, model, tokenizer, out)
    print(f"saved: AutoModelForCausalLM.from_pretrained({args.output_dir!r})")
    if dist.is_initialized():
        dist.destroy_process_group()
    return metrics


if __name__ == "__main__":
    main()
