"""The demo that `python simpo.py` trains when no --model is given: a tiny language model, pairs
that prefer one kind of its answers, and a judge that knows which answers are right. No network."""

import random
import shutil
import sys
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1]))  # simpo.py is in the folder above this one
import simpo


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
        pairs[word] = simpo.tokenize_pair(row, tokenizer, max_length=64, max_prompt_length=32)
    pairs = list(pairs.values())
    shape = {"vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 256}
    shape |= {"num_hidden_layers": 3, "num_attention_heads": 4, "eos_token_id": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, pad_token_id=0))
    policy = simpo.ResponseLogps(model.to(simpo.DEVICE).eval())
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=fit_steps)
    for _ in tqdm(
        range(fit_steps), "fitting the demo's model", leave=False, disable=simpo.RANK > 0
    ):
        batch = simpo.collate(rng.sample(pairs[200:], 32))
        (-policy(**batch) / batch["scored"].sum(1)).mean().backward()  # sft, on both answers alike
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return tokenizer, model, pairs[200:], pairs[:200]


def judge(model, tokenizer, pairs):
    """Sample answers -> the share that is right, and their mean length in letters."""
    torch.manual_seed(0)
    prompts = torch.tensor([pair["prompt_ids"] for pair in pairs], device=simpo.DEVICE)
    ids = model.generate(prompts, do_sample=True, max_new_tokens=48)
    texts = [text.split("</s>")[0] for text in tokenizer.batch_decode(ids)]
    wins = [text[5:].rstrip("!") == "".join(sorted(text[:4])) for text in texts]
    win_rate = sum(wins) / len(wins)
    length = sum(map(len, texts)) / len(texts) - len("dbca=")
    print(f"    win rate {win_rate:.3f}, {length:.2f} letters, such as", *texts[:3])
    return {"eval/win_rate": win_rate, "eval/answer_length": length}


def main(argv):
    """Train the demo with the flags of simpo.py, of which these have other defaults."""
    argv = ["--lr", "5e-5", "--batch_size", "32", "--max_steps", "100", *argv]
    if "--output_dir" not in " ".join(argv):
        argv += ["--output_dir", "simpo_demo"]
        if simpo.RANK == 0 and "--resume" not in argv:
            shutil.rmtree("simpo_demo", ignore_errors=True)  # of an earlier demo
    args = simpo.parse_args(argv)
    start = make_demo(args.seed)
    tokenizer, _, _, held_out = start

    def on_evaluate(model, step):
        # generate does not work with --shard
        return {} if args.shard else judge(model, tokenizer, held_out)

    return simpo.main(argv, start, on_evaluate)


if __name__ == "__main__":
    main(sys.argv[1:])
