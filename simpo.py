"""SimPO, Simple Preference Optimization with a Reference-Free Reward, and DPO, in one file.

For a prompt x, a chosen answer y_w and a rejected answer y_l (Eq. 6 of arXiv:2405.14734):
    loss = -log sigmoid( beta/|y_w| log pi(y_w|x)  -  beta/|y_l| log pi(y_l|x)  -  gamma )

    python simpo.py                                               # demo: no network, a minute
    python simpo.py --model M --dataset D --eval_dataset E        # one CPU or GPU
    torchrun --nproc_per_node=8 simpo.py --model M --dataset D    # eight GPUs

A pair's way: split_row -> render -> tokenize_pair -> collate -> ResponseLogps -> an objective.
The loop is `fit`. Shapes: B pairs, T tokens of a row, N answer tokens, V vocabulary, D hidden.
Departures from the authors' code, princeton-nlp/SimPO: (1) Weights and Adam are fp32. (2) --gamma
is the paper's; their gamma_beta_ratio is gamma / beta. (3) The header of an answer is not scored,
and one end of turn is. (4) A prompt that is too long drops its pair; only answers are cut.
"""

import argparse
import functools
import json
import math
import os
import shutil
import sys
import time
import zlib
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


# -------------------------------------------------------------- objectives, log-likelihoods
def simpo_loss(chosen_avg_logps, rejected_avg_logps, beta=2.5, gamma=1.4):
    """SimPO's loss of each pair, [B] (arXiv:2405.14734, Eq. 6). *_avg_logps [B]: log pi(y|x) / |y|,
    in nats. beta makes rewards of them; the chosen answer must win by the margin gamma."""
    return -nn.functional.logsigmoid(beta * (chosen_avg_logps - rejected_avg_logps) - gamma)


def dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """DPO's loss of each pair, [B] (arXiv:2305.18290, Eq. 7); it starts at ln 2. *_logps: sums."""
    chosen_logratios = chosen_logps - ref_chosen_logps
    rejected_logratios = rejected_logps - ref_rejected_logps
    return -nn.functional.logsigmoid(beta * (chosen_logratios - rejected_logratios))


# An objective takes the chosen and the rejected answers of B pairs -> losses, chosen rewards and
# rejected rewards, each [B], without gamma. Its arguments after the * become flags.
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


class ResponseLogps(nn.Module):
    """Scores answers with a causal language model. FSDP2 wraps it, not the model inside."""

    def __init__(self, model, most_logits=2**27 if ON_GPU else 2**23):  # in fp32 512 or 32 MiB
        super().__init__()
        self.model = model
        self.autocast = False  # True: matrix products in bf16
        self.chunk = max(1, most_logits // model.config.get_text_config().vocab_size)

    def hidden_states(self, input_ids, scored, **options):  # -> [2B, T, D]; fast.py reads `scored`
        body = self.model.model if hasattr(self.model, "model") else self.model.base_model
        return body(input_ids, use_cache=False, **options)[0]

    def logits(self, hidden):
        head = self.model.get_output_embeddings()
        logits = head(hidden.to(head.weight.dtype)).float()  # Mamba's hidden states are fp32
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits  # Gemma has a cap

    def check(self, ids, tolerance):  # ids [1, T]; are our logits the model's own, and causal?
        ours = self.logits(self.hidden_states(ids, None))
        own = self.model(ids, use_cache=False).logits.float()
        own_of_five = self.model(ids[:, :5], use_cache=False).logits.float()
        difference = max((ours - own).abs().max(), (own[:, :5] - own_of_five).abs().max())
        if not difference <= tolerance * own.abs().max():  # also true if there is a NaN
            sys.exit(f"simpo.py: {type(self.model).__name__} has NaN, scales logits or looks ahead")

    def token_logps(self, hidden, targets):
        return -nn.functional.cross_entropy(self.logits(hidden), targets, reduction="none")

    def forward(self, input_ids, scored):
        """What `collate` makes of B pairs -> log pi(y|x) of their answers, [2B], fp32, in nats. The
        head, whose logits are large, sees only states that predict a scored token, in chunks."""
        device = self.model.get_input_embeddings().weight.device
        input_ids, scored = input_ids.to(device), scored.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
            hidden = self.hidden_states(input_ids, scored)
            row, place = scored[:, 1:].nonzero(as_tuple=True)  # each [N]
            targets = input_ids[row, place + 1]  # [N], each predicted one place before it
            chunks = zip(hidden[row, place].split(self.chunk), targets.split(self.chunk))
            logps = [checkpoint(self.token_logps, *chunk, use_reentrant=False) for chunk in chunks]
        sums = torch.zeros(len(input_ids), device=hidden.device)  # [2B]
        return sums.index_add(0, row, torch.cat(logps))


# ------------------------------------------------------------------------------ data
def split_row(row):
    """A row in README's formats -> prompt, chosen, rejected: texts, or a list and two messages."""
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    are_texts = all(isinstance(part, str) for part in (prompt, chosen, rejected))
    if are_texts and not chosen.startswith(("[{'role'", "[{'content'", '[{"role"', '[{"content"')):
        return prompt, chosen, rejected
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise TypeError(f"prompt, chosen and rejected must be texts, or messages: {row!s:.300}")
    if len(chosen) == len(rejected) == 1:  # answers alone; whole conversations hold the prompt
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
        chosen, rejected = turns + chosen, turns + rejected
    for side in (chosen, rejected):
        if side[-1]["role"] != "assistant" or not all(isinstance(x["content"], str) for x in side):
            raise ValueError(f"messages have texts, and end in one of the assistant: {side!s:.300}")
    # Role and content make a prompt; other keys of a message, such as an id, may differ.
    prompts = (chosen[:-1], rejected[:-1], prompt if isinstance(prompt, list) else [])
    one, other, given = [[(turn["role"], turn["content"]) for turn in x] for x in prompts]
    if not one or one != other or one[: len(given)] != given:
        raise jinja2.TemplateError("no prompt, or different ones")  # as templates refuse messages
    return chosen[:-1], chosen[-1], rejected[-1]


def render(prompt, chosen, rejected, tokenizer):
    """Messages, as the chat template writes them -> four texts: the prompt, all that the model sees
    before it answers; the chosen and the rejected answer, which are scored; what follows each. For
    example "<|user|>2+2?<|end|><|assistant|>", "4", "5" and "<|end|>"."""
    template = tokenizer.apply_chat_template
    asked = template(prompt, tokenize=False, add_generation_prompt=True)
    marker = {"role": "assistant", "content": "@answer@"}  # what is around it is around any answer
    start, _, after = template([*prompt, marker], tokenize=False).rpartition("@answer@")
    texts = [template([*prompt, answer], tokenize=False) for answer in (chosen, rejected)]
    # White space before answers is scored, and an empty <think> if the other answer has a full one.
    if start.removeprefix(asked).isspace() or not all(text.startswith(start) for text in texts):
        start = asked
    for text in texts:
        if not text.startswith(start) or not text[len(start) :].endswith(after):
            raise jinja2.TemplateError(f"it ends in {text[-40:]!r}, not {start[-9:]!r}..{after!r}")
    chosen, rejected = [text[len(start) : len(text) - len(after)] for text in texts]
    # Some templates (Mistral v3, system) ask with another prompt than they write before an answer.
    is_same_prompt = start.startswith(asked) or asked.startswith(start)
    if start.rstrip().endswith(after.strip()):
        after = ""  # it is the header of the next answer, and no end of turn
    return start if is_same_prompt else asked, chosen, rejected, after


def tokenize_pair(row, tokenizer, max_length, max_prompt_length):
    """A row -> {"prompt_ids", "chosen_ids", "rejected_ids", "cut"}; or the reason, a text, why no
    model can learn from it. Lengths are in tokens. Raises an error if the row is malformed."""
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    try:
        prompt, chosen, rejected = split_row(row)
        is_text, after = isinstance(prompt, str), ""
        if is_text:
            chosen, rejected = [x.removesuffix(tokenizer.eos_token) for x in (chosen, rejected)]
        else:
            prompt, chosen, rejected, after = render(prompt, chosen, rejected, tokenizer)
    except jinja2.TemplateError as reason:
        return str(reason)
    if not prompt or not chosen.strip() or not rejected.strip():
        return "an empty prompt or answer"
    # An answer ends with EOS, or else with the first added token after it, such as <|im_end|>.
    after_ids = tokenizer.encode(after, add_special_tokens=False)
    ends = [token for token in after_ids if token == eos]
    ends = ends or [token for token in after_ids if token in tokenizer.added_tokens_decoder]
    end = after_ids[: after_ids.index(ends[0]) + 1] if ends else [eos]
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    answers = []
    for text in (chosen, rejected):  # with the prompt: alone, some tokenizers put a space before it
        ids = tokenizer.encode(prompt + text, add_special_tokens=False)
        if ids[: len(prompt_ids)] == prompt_ids:
            answers.append(ids[len(prompt_ids) :] + end)
        else:  # prompt and answer share a token
            answers.append(tokenizer.encode(text, add_special_tokens=False) + end)
    adds_bos = bos in tokenizer.encode("a")[:1]  # to texts; chat templates write their own
    if is_text and adds_bos and bos not in prompt_ids[:1]:
        prompt_ids = [bos] + prompt_ids
    room = max_length - len(prompt_ids)
    if len(prompt_ids) > max_prompt_length or room < 1:
        return "a prompt that is too long"
    chosen_ids, rejected_ids = answers[0][:room], answers[1][:room]  # a cut one has no end of turn
    if chosen_ids == rejected_ids:
        return "identical answers"
    pair = {"prompt_ids": prompt_ids, "chosen_ids": chosen_ids, "rejected_ids": rejected_ids}
    return pair | {"cut": max(map(len, answers)) > room}


def collate(pairs, pad_token_id=0):
    """B tokenized pairs -> ids, and which of them are scored, both [2B, T]; the chosen answers come
    first. Each answer has a row of its own: the prompt p q r, the answer a b, its end of turn e:
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
    return {"input_ids": rows, "scored": scored}


def load_pairs(source, split, tokenizer, args):
    """A hub id, folder or file -> tokenized pairs, in mapped files. Says what is left out."""
    from datasets import Features, List, Value, exceptions, fingerprint, load_dataset  # not for fit

    kinds = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
    kind = kinds.get(Path(source.lower().removesuffix(".gz")).suffix)
    try:
        rows = load_dataset(kind or source, data_files=source if kind else None, split=split)
    except (OSError, ValueError, StopIteration, exceptions.DatasetsError) as error:
        sys.exit(f"simpo.py: no pairs in {source}: {error.__cause__ or error!r}")
    if "Json(" in str([rows.features.get(x) for x in ("prompt", "chosen", "rejected")]):
        sys.exit(f"simpo.py: {source} mixes texts, numbers and messages, or keys of messages")
    # Other names? rows = rows.rename_columns({"question": "prompt", "better": "chosen", ...})
    columns = dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids"), List(Value("int32")))
    columns |= {"cut": Value("bool"), "reason": Value("string")}

    def tokenize(row, index):
        try:
            pair = tokenize_pair(row, tokenizer, args.max_length, args.max_prompt_length)
        except Exception as error:
            raise ValueError(f"{source}, row {index + 1}: {error}") from error
        return dict.fromkeys(columns) | ({"reason": pair} if isinstance(pair, str) else pair)

    code = [function.__code__ for function in (split_row, render, tokenize_pair)]
    key = [rows._fingerprint, tokenizer, args.max_length, args.max_prompt_length, code]
    options = {"new_fingerprint": fingerprint.Hasher.hash(key)}  # the name in the cache
    options["num_proc"] = min(16, os.cpu_count(), len(rows) // 1000) or None
    options |= {"features": Features(columns), "remove_columns": rows.column_names}
    results = rows.map(tokenize, with_indices=True, **options)
    pairs = results.select([i for i, reason in enumerate(results["reason"]) if reason is None])
    print(f"{source}: {len(rows)} rows, {len(pairs)} pairs, {sum(pairs['cut'])} of them cut")
    print("    columns not read:", sorted({*rows.column_names} - {"prompt", "chosen", "rejected"}))
    for reason, count in Counter(filter(None, results["reason"])).most_common(10):
        print(f"    {count} dropped: {reason} (row {results['reason'][:].index(reason) + 1} first)")
    if len(pairs) == 0:
        sys.exit("simpo.py: no pair is left")
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        print(f"    the first {name} end in {tokenizer.decode(pairs[0][name])[-80:]!r}")
    return pairs.remove_columns("reason")


# ------------------------------------------------------------------------------ command line
def parse_args(argv, more_flags=lambda parser: None):
    """The command line -> its flags, and args.hyperparameters, those that the objective reads."""
    parser = argparse.ArgumentParser(usage="%(prog)s [flags]", allow_abbrev=False)

    def add(flag, kind, default, text, **more):
        more |= {"action": "store_true"} if kind is bool else {"type": kind}
        parser.add_argument(flag, default=default, help=f"{text} (%(default)s)", **more)

    add("--model", str, None, "hub id or folder; without it, and without --dataset, the demo")
    add("--dataset", str, None, "pairs: hub id, folder, or .jsonl, .json, .parquet or .csv file")
    add("--eval_dataset", str, None, "held-out pairs; unset: --eval_split of --dataset")
    add("--train_split", str, "train", "split of --dataset; slices like train[:1000] work, too")
    add("--eval_split", str, None, "split of the held-out pairs; unset: train of --eval_dataset")
    add("--max_length", int, 2048, "tokens of a prompt and an answer")
    add("--max_prompt_length", int, None, "tokens of a prompt; unset: --max_length * 1800/2048")
    own = {name: function.__kwdefaults__ for name, function in OBJECTIVES.items()}
    add("--loss", str, "simpo", f"the objective; they have flags of their own: {own}", choices=own)
    add("--lr", float, 1e-6, "peak learning rate")
    add("--batch_size", int, 128, "pairs in a step, over all processes")
    add("--micro_batch_tokens", int, 8192 if ON_GPU else 2048, "tokens in a micro-batch, padded")
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
    add("--eval_every", int, 100, "steps between evaluations, if pairs are held out; 0: start, end")
    add("--save_every", int, 100, "steps between checkpoints; 0: none")
    add("--resume", bool, False, "go on from the last checkpoint; other flags as before")
    more_flags(parser)  # those of an extension, as in notebooks/lora.py
    args, rest = parser.parse_known_args(argv)  # the rest has to be the objective's
    own_parser = argparse.ArgumentParser(usage=parser.usage, allow_abbrev=False)
    for name, default in (own[args.loss] or {}).items():
        own_parser.add_argument(f"--{name.rstrip('_')}", type=float, default=default, dest=name)
    args.hyperparameters = vars(own_parser.parse_args(rest))
    if (args.model is None) != (args.dataset is None):
        parser.error("--model and --dataset go together")
    zero = "gamma lambda_ delta warmup_ratio weight_decay max_grad_norm seed eval_every save_every"
    for name, value in (vars(args) | args.hyperparameters).items():
        least = 0 if name in zero.split() else 1e-99  # these may be 0
        most = 1 if name == "warmup_ratio" else 1e99
        if type(value) in (int, float) and not least <= value <= most:
            parser.error(f"--{name} {value} is out of its range")
    args.max_prompt_length = args.max_prompt_length or args.max_length * 1800 // 2048
    return args


# ------------------------------------------------------------------------------ runtime
def wrap(model, args):
    """A model -> the policy: on its device, whole or spread by FSDP2 (--shard), and then cast to
    fp32: in bf16 numbers near 0.02 are 1.2e-4 apart, and steps of 1e-6 would be lost."""
    model.eval()  # no dropout: policy and reference have to agree
    layers = [x for x in model.modules() if isinstance(x, transformers.GradientCheckpointingLayer)]
    if args.gradient_checkpointing:  # the library's own way works in training mode only
        for layer in layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    policy = ResponseLogps(model)
    if args.shard:
        dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
        precision = fsdp.MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for module in [*layers, policy]:
            fsdp.fully_shard(module, mp_policy=precision, reshard_after_forward=True)
        fsdp.register_fsdp_forward_method(policy, "check")
    policy.to(DEVICE).float()
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each new shape of a pass
    last = model.get_input_embeddings().weight.shape[0] - 1
    ids = torch.linspace(last // 10, last, 12, device=DEVICE).long()[None]  # [1, 12], any tokens
    with torch.no_grad():
        policy.check(ids, 0.05 if args.shard and args.dtype == "bf16" else 1e-3)
    policy.autocast = args.dtype == "bf16" and not args.shard  # FSDP2 has its own way
    return policy


def save_model(model, tokenizer, out):
    """Write whole fp32 weights in Hugging Face's format; then rename a file: the run has ended."""
    options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = dcp_state.get_model_state_dict(model, options=options)
    if RANK == 0:  # a tied head is the embedding by another name: keep one name for each tensor
        names = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
        model.save_pretrained(out, state_dict={x: state[x] for x in names if x in state})
        tokenizer.save_pretrained(out)
        (out / "simpo_run.json").rename(out / "simpo_ended.json")


def checkpoints(out):  # the oldest first; somebody's copy, checkpoint-40-keep, is left alone
    steps = [path.name.removeprefix("checkpoint-") for path in out.glob("checkpoint-*")]
    return [out / f"checkpoint-{step}" for step in sorted(map(int, filter(str.isdigit, steps)))]


def claim_folder(out, policy, pairs, args):
    """Begin a run in the folder out -> None; or, with --resume, the checkpoint to go on from."""
    found = checkpoints(out) if args.resume else []
    checksum = sum(i * zlib.crc32(str(pair).encode()) for i, pair in enumerate(pairs, 1))
    run = vars(args) | {"pairs": f"{len(pairs)}, checksum {checksum}"}
    run["trained_tensors"] = sum(x.requires_grad for x in policy.parameters())
    if RANK == 0 and found:
        then = json.loads((out / "simpo_run.json").read_text())
        free = "resume shard gradient_checkpointing micro_batch_tokens save_every output_dir"
        other = [x for x in {**run, **then} if run.get(x) != then.get(x) and x not in free.split()]
        if other:
            sys.exit(f"simpo.py: the run in {out} had other {other}")
    elif RANK == 0:
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "simpo_run.json", "w" if args.resume else "x") as file:  # x: it is new
            json.dump(run, file, indent=2)
        (out / "metrics.jsonl").unlink(missing_ok=True)
    return found[-1] if found else None


def save_checkpoint(policy, optimizer, step, out):
    """Write checkpoint-STEP, all processes together. It gets its name when it is whole."""
    weights = {name: x.detach() for name, x in policy.named_parameters() if x.requires_grad}
    moments = dcp_state.get_optimizer_state_dict(policy, optimizer)
    dcp.save({"weights": weights, "moments": moments}, checkpoint_id=out / "new")
    if RANK == 0:
        shutil.copy(out / "metrics.jsonl", out / "new")
        (out / "new").rename(out / f"checkpoint-{step}")
        for older in checkpoints(out)[:-1]:
            shutil.rmtree(older)


def load_checkpoint(folder, policy, optimizer):
    """Fill in policy and optimizer, and take metrics.jsonl back to their step -> that step."""
    weights = {name: x.detach() for name, x in policy.named_parameters() if x.requires_grad}
    moments = dcp_state.get_optimizer_state_dict(policy, optimizer)
    dcp.load({"weights": weights, "moments": moments}, checkpoint_id=folder)  # in place
    dcp_state.set_optimizer_state_dict(policy, optimizer, moments)
    if RANK == 0:
        shutil.copy(folder / "metrics.jsonl", folder.parent)
    return int(folder.name.removeprefix("checkpoint-"))


# ------------------------------------------------------------------------------ training
def micro_batches(pairs, most_tokens):
    """Cut pairs into micro-batches of (indices of pairs, weights), as many for each process; the
    longest first, to pad little. A process without a pair repeats another's, with weight 0."""
    size = [len(p["prompt_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"])) for p in pairs]
    longest_first = sorted(range(len(pairs)), key=lambda index: size[index], reverse=True)
    batches, most_pairs = [], 0
    for start in range(0, len(pairs), WORLD_SIZE):
        group = longest_first[start : start + WORLD_SIZE]  # one pair for each process
        if not batches or len(batches[-1][0]) >= most_pairs:
            batches.append(([], []))
            most_pairs = most_tokens // (2 * size[group[0]])  # a pair is two rows, both padded
        indices, weights = batches[-1]
        indices.append(group[RANK] if RANK < len(group) else group[0])
        weights.append(1.0 if RANK < len(group) else 0.0)
    return [(indices, torch.tensor(weights, device=DEVICE)) for indices, weights in batches]


def apply_objective(logps, pairs, ref_logps, args):
    """logps of B pairs, [2, B], chosen and rejected -> {metric: [B]}. Means are logged."""
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
    batches = micro_batches(pairs, args.micro_batch_tokens)
    for indices, weights in tqdm(batches, "scoring", leave=False, disable=RANK > 0):
        logps[:, indices] += weights * policy(**collate([pairs[i] for i in indices])).view(2, -1)
    if WORLD_SIZE > 1:
        dist.all_reduce(logps)
    return logps


def evaluate(policy, held_out, ref_logps, step, args, on_evaluate):
    """Print and log means over the held-out pairs, and what on_evaluate returns -> the row."""
    metrics = apply_objective(score(policy, held_out, args), held_out, ref_logps, args)
    row = {f"eval/{name}": values.double().mean().item() for name, values in metrics.items()}
    row = {"step": step} | row | on_evaluate(policy.model, step)
    tqdm.write(", ".join(f"{name.removeprefix('eval/')} {x:.4g}" for name, x in row.items()))
    log(row, Path(args.output_dir))
    return row


def train_step(policy, optimizer, batch, ref_logps, args):
    """One optimizer step on a batch of pairs, by all processes -> means of its metrics. If the loss
    or the gradient is not finite, every weight would become NaN, and the step is skipped."""
    sums = 0
    for indices, weights in micro_batches(batch, args.micro_batch_tokens):
        pairs = [batch[i] for i in indices]
        logps = policy(**collate(pairs)).view(2, -1)  # log pi(y|x) of both answers, [2, B]
        reference = None if ref_logps is None else ref_logps[:, indices]
        metrics = apply_objective(logps, pairs, reference, args)  # each [B]
        loss = (weights * metrics["loss"]).sum() / len(batch)  # its part of the batch's mean
        (loss * WORLD_SIZE if args.shard else loss).backward()  # FSDP2 averages over processes
        sums += torch.stack([(weights * x.detach()).double().sum() for x in metrics.values()])
    parameters = [x for x in policy.parameters() if x.requires_grad]
    for x in parameters:
        if x.grad is None:  # as in a vision tower, or an expert that no token chose
            x.grad = torch.zeros_like(x)
        if WORLD_SIZE > 1 and not args.shard:
            dist.all_reduce(x.grad)
    if WORLD_SIZE > 1:
        dist.all_reduce(sums)
    means = dict(zip(metrics, (sums / len(batch)).tolist()))
    norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
    means["grad_norm"] = (norm.full_tensor() if args.shard else norm).item()
    if math.isfinite(means["loss"]) and math.isfinite(means["grad_norm"]):
        optimizer.step()
    optimizer.zero_grad()
    return means


def log(row, out):  # all rows of metrics.jsonl are written here; JSON has no NaN
    with open(out / "metrics.jsonl" if RANK == 0 else os.devnull, "a") as file:
        print(json.dumps({k: x if math.isfinite(x) else None for k, x in row.items()}), file=file)


def fit(model, pairs, held_out, args, on_evaluate=lambda model, step: {}):
    """Train a model in place on tokenized pairs -> its rows of metrics. Held-out pairs are scored
    first, every --eval_every steps and last; on_evaluate(model, step) returns further metrics."""
    out = Path(args.output_dir)
    policy = wrap(model, args)
    folder = claim_folder(out, policy, pairs, args)
    # A schedule that starts in the middle, as after --resume, asks for initial_lr.
    groups = [{"params": [x for x in model.parameters() if x.requires_grad], "initial_lr": args.lr}]
    optimizer = torch.optim.AdamW(groups, args.lr, weight_decay=args.weight_decay, fused=True)
    needed = args.loss in NEEDS_REFERENCE  # it is the policy here, before a checkpoint is loaded
    ref_logps = score(policy, pairs, args) if needed else None
    held_out_ref_logps = score(policy, held_out, args) if needed else None
    done = load_checkpoint(folder, policy, optimizer) if folder else 0
    per_epoch = math.ceil(len(pairs) / args.batch_size)
    steps = args.max_steps or args.epochs * per_epoch
    cosine = transformers.get_cosine_schedule_with_warmup  # or get_linear_schedule_with_warmup
    schedule = cosine(optimizer, int(args.warmup_ratio * steps), steps, last_epoch=done - 1)
    print(f"{args.loss} {args.hyperparameters}: steps {done + 1} to {steps}, {per_epoch} an epoch")
    rows, skipped = [], 0
    if done == 0 and len(held_out) > 0:
        rows.append(evaluate(policy, held_out, held_out_ref_logps, 0, args, on_evaluate))
    bar = tqdm(range(done + 1, steps + 1), initial=done, total=steps, disable=RANK > 0)
    for step in bar:
        started = time.perf_counter()
        epoch, place = divmod(step - 1, per_epoch)
        generator = torch.Generator().manual_seed(args.seed + epoch)  # an order for each epoch
        drawn = torch.randperm(len(pairs), generator=generator).split(args.batch_size)[place]
        batch = [pairs[i] for i in drawn.tolist()]
        row = train_step(policy, optimizer, batch, ref_logps[:, drawn] if needed else None, args)
        seconds = time.perf_counter() - started
        unit = 1024 if sys.platform == "linux" else 1  # of ru_maxrss, in bytes
        peak = torch.cuda.max_memory_allocated() or getrusage(RUSAGE_SELF).ru_maxrss * unit
        row |= {"step": step, "epoch": step / per_epoch, "lr": schedule.get_last_lr()[0]}
        row |= {"pairs_per_second": len(batch) / seconds, "step_seconds": seconds}
        row |= {"peak_memory_gib": peak / 2**30}
        rows.append(row)
        log(row, out)
        bar.set_postfix(loss=row["loss"], accuracy=row["rewards/accuracies"], lr=row["lr"])
        skipped = 0 if math.isfinite(row["loss"] + row["grad_norm"]) else skipped + 1
        if skipped > 0:
            tqdm.write(f"step {step} skipped: loss {row['loss']}, gradient norm {row['grad_norm']}")
        if skipped in (10, steps):  # ten, or all of a short run
            sys.exit(f"simpo.py: {skipped} steps in a row were skipped; nothing is saved")
        schedule.step()
        # Evaluate, then save, so that a run that is resumed has each row once.
        if len(held_out) > 0 and (step == steps or step % (args.eval_every or steps) == 0):
            rows.append(evaluate(policy, held_out, held_out_ref_logps, step, args, on_evaluate))
        if step < steps and step % (args.save_every or steps) == 0:
            save_checkpoint(policy, optimizer, step, out)
    return rows


def main(argv=None, on_evaluate=lambda model, step: {}):
    """Train as the flags say -> the last row of metrics. What on_evaluate is, `fit` says."""
    args = parse_args(argv)
    if args.model is None:  # a tiny model and its pairs, trained like any other
        from notebooks import demo

        return demo.main(argv)
    by_torchrun = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
    if not by_torchrun and (args.shard or RANK > 0 or WORLD_SIZE > 1):
        sys.exit("simpo.py: --shard, and RANK or WORLD_SIZE in the environment, are for torchrun")
    sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")  # noqa: SIM115
    if ON_GPU:
        torch.cuda.set_device(DEVICE)
    if by_torchrun and not dist.is_initialized():
        dist.init_process_group(timeout=8 * dist.default_pg_timeout)  # tokenizing takes time
    out = Path(args.output_dir)
    if args.resume and (out / "simpo_ended.json").exists():
        print(f"{out} holds the trained model: there is nothing left to do")
        return {}
    if not args.resume and [*out.glob("simpo_*.json"), *out.glob("config.json")]:
        sys.exit(f"simpo.py: {out} holds a run: --resume it, or choose another --output_dir")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        sys.exit(f"simpo.py: --model {args.model}: {str(error).splitlines()[0]}")
    if tokenizer.eos_token_id is None or "MistralCommon" in type(tokenizer).__name__:
        sys.exit(f"simpo.py: a {type(tokenizer).__name__} without EOS, or of mistral-common")
    if LOCAL_RANK > 0:  # the first process of a machine tokenizes, the others read its cache
        dist.barrier()
    pairs = load_pairs(args.dataset, args.train_split, tokenizer, args)
    part = args.eval_split or ("train" if args.eval_dataset else None)
    held_out = load_pairs(args.eval_dataset or args.dataset, part, tokenizer, args) if part else []
    if LOCAL_RANK == 0 and WORLD_SIZE > 1:  # now the others read
        dist.barrier()
    options = {"dtype": "auto", "output_loading_info": True}  # on the CPU, in its file's dtype
    model, report = transformers.AutoModelForCausalLM.from_pretrained(args.model, **options)
    if missing := sorted(report["missing_keys"]):  # they have been drawn at random
        sys.exit(f"simpo.py: {args.model} lacks {len(missing)} weights, such as {missing[0]}")
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        sys.exit(f"simpo.py: the tokenizer of {args.model} has more tokens than the model")
    rows = fit(model, pairs, held_out, args, on_evaluate)
    save_model(model, tokenizer, out)
    print(f"saved: AutoModelForCausalLM.from_pretrained({args.output_dir!r})")
    if dist.is_initialized():
        dist.destroy_process_group()
    return rows[-1]


if __name__ == "__main__":
    main()
