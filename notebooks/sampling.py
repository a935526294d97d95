"""A model's answers to many questions, in batches: what answers.py and pairs.py share."""

import json
import sys
import zlib
from itertools import groupby
from pathlib import Path

import questions
import torch
import transformers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # simpo.py is in the folder above
import simpo


def load(name, kind=transformers.AutoModelForCausalLM):  # -> model, tokenizer
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        options = {"dtype": torch.bfloat16 if simpo.ON_GPU else torch.float32}
        model, report = kind.from_pretrained(name, **options, output_loading_info=True)
    except (OSError, ValueError) as error:
        sys.exit(f"{name}: {str(error).splitlines()[0]}")
    if missing := sorted(report["missing_keys"]):  # they have been drawn at random
        sys.exit(f"{name} lacks {len(missing)} weights, such as {missing[0]}")
    if tokenizer.chat_template is None:
        sys.exit(f"{name} has no chat template")
    return model.to(simpo.DEVICE).eval(), tokenizer


def tokenize(conversation, tokenizer):
    """Messages -> the ids of a prompt, and of the end of an answer, both as in training."""
    answers = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    pair = simpo.tokenize_pair({"prompt": conversation} | answers, tokenizer, 10**9, 10**9)
    if isinstance(pair, str):
        sys.exit(f"no prompt can be made of {conversation!s:.300}: {pair}")
    return pair["prompt_ids"], pair["chosen_ids"][-1]


def answer(model, tokenizer, conversations, temperature, top_p=1.0, most=4096):
    """A batch of conversations, lists of messages -> the next message of each. In that, "cut" is
    true if it did not end within most tokens. Temperature 0 takes the likeliest token always."""
    prompts, (end, *_) = zip(*[tokenize(messages, tokenizer) for messages in conversations])
    tokenizer.pad_token = tokenizer.eos_token
    # An answer begins where its row ends. So padding is on the left, and a mask hides it.
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    own = model.generation_config.eos_token_id  # one, or several, or none
    ends = {end, *(own if isinstance(own, list) else [own])} - {None}
    options = {"max_new_tokens": most, "eos_token_id": [*ends], "pad_token_id": end}
    if temperature > 0:
        options |= {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    model.generation_config = how = transformers.GenerationConfig(**options)  # nothing of its own
    rows = model.generate(**batch.to(model.device), generation_config=how)
    messages = []
    for row in rows[:, batch["input_ids"].shape[1] :].tolist():
        length = next((place for place, token in enumerate(row) if token in ends), None)
        text = tokenizer.decode(row[:length], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": text, "cut": length is None})
    return messages


def answer_all(asked, args):
    """Questions with "temperature" and "turns", lists of messages that are answered in turn ->
    conversations. A batch is a line of a .part file; a run that was killed goes on after it."""
    args.asked = zlib.crc32(json.dumps(asked).encode())  # they tell runs apart, too
    part = questions.part_of(args)
    part.touch()
    lines = [x for x in part.read_text().splitlines(keepends=True) if x.endswith("\n")]
    part.write_text("".join(lines))
    done = [json.loads(line) for line in lines]
    batches = []
    for _, group in groupby(asked, lambda x: (x["temperature"], len(x["turns"]))):
        group = list(group)
        starts = range(0, len(group), args.batch_size)
        batches += [group[start : start + args.batch_size] for start in starts]
    model, tokenizer = load(args.model)
    bar = tqdm(batches[len(done) :], "batches", initial=len(done), total=len(batches))
    for number, batch in enumerate(bar, len(done)):
        torch.manual_seed(args.seed + number)
        how = batch[0]["temperature"], args.top_p, args.max_new_tokens
        conversations = [[] for _ in batch]
        for turn in range(len(batch[0]["turns"])):
            conversations = [x + y["turns"][turn] for x, y in zip(conversations, batch)]
            messages = answer(model, tokenizer, conversations, *how)
            conversations = [x + [message] for x, message in zip(conversations, messages)]
        done.append(conversations)
        with open(part, "a") as file:
            print(json.dumps(conversations), file=file)
    conversations = [conversation for batch in done for conversation in batch]
    cut = sum(message.get("cut", False) for messages in conversations for message in messages)
    print(f"{len(conversations)} conversations, {cut} answers cut at {args.max_new_tokens} tokens")
    return conversations
