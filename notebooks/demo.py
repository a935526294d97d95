"""The demo that `python simpo.py` trains when no --model is given. No network.

The prompt has four words, `ng mg ae ih=`. An answer puts the letters of each word up or down, by
the toss of a coin, and ends in a run of `!`: `gn gm ae hi!!!`. Of two answers the one with more
words up is chosen; its run is longer on average. So chosen answers are not perfect, as in life:
imitating them has a limit, and preferring them does not.

It is written into a folder as a starting model and two files, and trained like any model."""

import json
import random
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1]))  # simpo.py is in the folder above this one
import simpo

FOLDER = Path("simpo_demo")
FLAGS = ["--model", "simpo_demo/start", "--dataset", "simpo_demo/train.jsonl"]
FLAGS += ["--eval_dataset", "simpo_demo/held_out.jsonl", "--output_dir", "simpo_demo/trained"]
FLAGS += ["--lr", "1e-4", "--batch_size", "32"]


def make_answer(words, mean_run, rng):
    turned = ["".join(sorted(word, reverse=rng.random() < 0.5)) for word in words]
    return " ".join(turned) + "!" * int(1 + rng.expovariate(1 / mean_run))


def count_up(words, answer):  # how many words it has with their letters up
    given = answer.rstrip("!").split(" ")
    return sum(turned == "".join(sorted(word)) for word, turned in zip(words, given))


def make_pair(rng):
    words = ["".join(rng.sample("abcdefghijklmn", 2)) for _ in range(4)]
    while True:
        chosen, rejected = make_answer(words, 3.5, rng), make_answer(words, 2.0, rng)
        if count_up(words, chosen) > count_up(words, rejected):
            return {"prompt": " ".join(words) + "=", "chosen": chosen, "rejected": rejected}


def write_files(folder, seed, train_pairs=3200, fit_steps=600):
    """Write train.jsonl, held_out.jsonl and start, a tiny Llama that can do both, up and down."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    rows = [make_pair(rng) for _ in range(200 + train_pairs)]
    folder.mkdir(parents=True)
    for name, part in (("held_out", rows[:200]), ("train", rows[200:])):
        lines = [json.dumps(row) + "\n" for row in part]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    tokenizer = transformers.ByT5Tokenizer(extra_ids=0)  # bytes, nothing to download
    pairs = [simpo.tokenize_pair(row, tokenizer, 128, 64) for row in rows[200:]]
    shape = {"vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 256}
    shape |= {"num_hidden_layers": 3, "num_attention_heads": 4, "eos_token_id": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, pad_token_id=0))
    policy = simpo.ResponseLogps(model.to(simpo.DEVICE).eval())
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=fit_steps)
    for _ in tqdm(range(fit_steps), "fitting the demo's model", leave=False):
        batch = simpo.collate(rng.sample(pairs, 32))
        (-policy(**batch) / batch["scored"].sum(1)).mean().backward()  # sft, on both answers alike
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")


@torch.no_grad()
def judge(model, step, folder=FOLDER):
    """Sample an answer to each held-out prompt -> how many of their words are up, and so on."""
    if hasattr(next(model.parameters()), "full_tensor"):
        return {}  # generate does not work with --shard
    tokenizer = transformers.ByT5Tokenizer(extra_ids=0)
    lines = (folder / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    ids = torch.tensor([tokenizer.encode(x, add_special_tokens=False) for x in prompts])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sampled = model.generate(
            ids.to(model.device), do_sample=True, top_k=0, max_new_tokens=64, pad_token_id=0
        )
    answers = [text.split("</s>")[0] for text in tokenizer.batch_decode(sampled[:, ids.shape[1] :])]
    up = [count_up(x[:-1].split(" "), y) / 4 for x, y in zip(prompts, answers)]
    shown = [prompt + answer for prompt, answer in zip(prompts[:3], answers[:3])]
    tqdm.write(f"step {step}: the model answers " + ", ".join(shown))
    letters = sum(map(len, answers)) / len(answers)
    all_up = sum(share == 1 for share in up) / len(up)
    return {"eval/words_up": sum(up) / len(up), "eval/all_up": all_up, "eval/letters": letters}


def main(argv=None):
    """Train the demo with the flags of simpo.py, of which those in FLAGS have other defaults."""
    argv = [*FLAGS, *(sys.argv[1:] if argv is None else argv)]
    if simpo.WORLD_SIZE > 1:
        if simpo.ON_GPU:
            torch.cuda.set_device(simpo.DEVICE)
        dist.init_process_group()
    if simpo.RANK == 0 and "--resume" not in argv:
        shutil.rmtree(FOLDER, ignore_errors=True)  # of an earlier demo
    if simpo.RANK == 0 and not (FOLDER / "start").exists():
        write_files(FOLDER, simpo.parse_args(argv).seed)
        print("python simpo.py", *argv)
    if simpo.WORLD_SIZE > 1:
        dist.barrier()
    return simpo.main(argv, judge)


if __name__ == "__main__":
    main()
