"""Pairs of a model's own answers, to train it on, as the paper's Instruct models were: of five
samples to a prompt the best and the worst, by a reward model. Samples that were cut at
--max_new_tokens take no part: trained on, they would get an end that they do not have. Where fewer
than two samples are left, or all scores are equal, there is no pair.

    python notebooks/pairs.py --model M --instructions D --reward R --output pairs.jsonl

D has prompts as README's formats have, a hub id or file. R is a sequence classifier with one score
and a chat template. If a run is killed, the same command goes on; scores are made again.
"""

import argparse
import json
import sys

import questions
import sampling
import torch
import transformers
from tqdm import tqdm


def make_question(row, args):
    prompt, chosen = row.get("prompt"), row.get("chosen")
    if isinstance(chosen, list) and len(chosen) > 1:  # a whole conversation has the prompt in it
        prompt = chosen[:-1]
    if not prompt:
        sys.exit(f"{args.instructions} has a row without a prompt: {row!s:.300}")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    prompt = [{"role": turn["role"], "content": turn["content"]} for turn in prompt]
    return {"turns": [prompt], "temperature": args.temperature}


@torch.no_grad()
def score(reward, tokenizer, conversation):
    """How good the last message of a conversation is, by the reward model."""
    template = tokenizer.apply_chat_template
    ids = template(conversation, return_tensors="pt", return_dict=False)
    return reward(ids.to(reward.device)).logits.item()


def main(argv=None):
    parser = argparse.ArgumentParser(usage="%(prog)s [flags]", allow_abbrev=False)
    questions.add_flags(parser, top_p=0.95)
    parser.set_defaults(max_new_tokens=4096)
    add = parser.add_argument
    add("--samples", type=int, default=5, help="answers to each prompt (%(default)s)")
    add("--temperature", type=float, default=0.8, help="of the samples (%(default)s)")
    add("--reward", required=True, help="hub id or folder of the reward model")
    args = parser.parse_args(argv)
    questions.check(parser, args)
    rows = questions.read_rows(args)
    asked = [make_question(row, args) for row in rows for _ in range(args.samples)]
    reward, tokenizer = sampling.load(args.reward, transformers.AutoModelForSequenceClassification)
    if reward.config.num_labels != 1:
        sys.exit(f"{args.reward} has {reward.config.num_labels} scores, not one")
    device = reward.device
    reward.cpu()  # it waits there, while the model answers
    conversations = sampling.answer_all(asked, args)
    reward.to(device)
    pairs, equal = [], 0
    for start in tqdm(range(0, len(conversations), args.samples), "scoring"):
        samples = conversations[start : start + args.samples]
        samples = [sample for sample in samples if not sample[-1]["cut"]]
        if len(samples) < 2:
            continue
        scores = [score(reward, tokenizer, sample) for sample in samples]
        if max(scores) == min(scores):
            equal += 1
            continue
        *prompt, chosen = samples[scores.index(max(scores))]
        rejected = samples[scores.index(min(scores))][-1]
        pair = {"prompt": prompt}
        for side, message in (("chosen", chosen), ("rejected", rejected)):
            pair[side] = [{"role": "assistant", "content": message["content"]}]
        pairs.append(pair)
    few = len(rows) - len(pairs) - equal
    print(f"{len(rows)} prompts, {len(pairs)} pairs; dropped: {equal} with equal scores")
    print(f"    and {few} with fewer than two samples that end in {args.max_new_tokens} tokens")
    if not pairs:
        sys.exit("pairs.py: no pair is left")
    questions.finish("\n".join(json.dumps(pair) for pair in pairs), args)
    print(f"next: python simpo.py --model {args.model} --dataset {args.output}")


if __name__ == "__main__":
    main()
