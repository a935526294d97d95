"""The demo that `python simpo.py` trains when no --model is given. No network.

A prompt is four words, `ng mg ae ih=`. An answer puts the letters of each word up, as in the
alphabet, or down, as a coin falls, and ends in some `!`: `gn mg ae hi!!!`. Of two answers the one
with more words up is chosen; it has more `!` on average. So chosen answers are not perfect: who
imitates them gets no better than they are, who prefers them does.
"""

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

TOKENIZER = transformers.ByT5Tokenizer(extra_ids=0)  # bytes, nothing to download
FOLDER = Path("simpo_demo")
FLAGS = "--model simpo_demo/start --dataset simpo_demo/train.jsonl --output_dir simpo_demo/trained "
FLAGS += "--eval_dataset simpo_demo/held_out.jsonl --lr 5e-5 --batch_size 32"


def make_answer(words, mean_run, rng):
    turned = ["".join(sorted(word, reverse=rng.random() < 0.5)) for word in words]
    return " ".join(turned) + "!" * int(1 + rng.expovariate(1 / mean_run))


def count_up(words, answer):  # of these words, how many does the answer have with letters up?
    given = answer.rstrip("!").split(" ")
    return sum(turned == "".join(sorted(word)) for word, turned in zip(words, given))


def make_pair(rng):
    words = ["".join(rng.sample("abcdefghijklmn", 2)) for _ in range(4)]
    while True:
        chosen, rejected = make_answer(words, 3.5, rng), make_answer(words, 2.0, rng)
        if count_up(words, chosen) > count_up(words, rejected):
            return {"prompt": " ".join(words) + "=", "chosen": chosen, "rejected": rejected}


def write_files(folder, seed, train_pairs=3200, fit_steps=400):
    """Write train.jsonl, held_out.jsonl and start, a tiny Llama that writes words up and down."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    rows = [make_pair(rng) for _ in range(200 + train_pairs)]
    folder.mkdir(parents=True)
    for name, part in (("held_out", rows[:200]), ("train", rows[200:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    pairs = [simpo.tokenize_pair(row, TOKENIZER, 128, 64) for row in rows[200:]]
    shape = {"vocab_size": len(TOKENIZER), "hidden_size": 128, "intermediate_size": 256}
    shape |= {"num_hidden_layers": 3, "num_attention_heads": 4, "eos_token_id": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, pad_token_id=0))
    policy = simpo.ResponseLogps(model.to(simpo.DEVICE).eval())
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=fit_steps)
    for _ in tqdm(range(fit_steps), "making the demo's model", leave=False):
        batch = simpo.collate(rng.sample(pairs, 16))
        (-policy(**batch) / batch["scored"].sum(1).to(simpo.DEVICE)).mean().backward()  # sft
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.save_pretrained(folder / "start")
    TOKENIZER.save_pretrained(folder / "start")


def judge(model, step, folder=FOLDER):
    """Sample an answer to each held-out prompt -> the share of words up, and so on."""
    if hasattr(next(model.parameters()), "full_tensor"):
        return {}  # generate does not work with --shard
    lines = (folder / "held_out.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    ids = torch.tensor([TOKENIZER.encode(x, add_special_tokens=False) for x in prompts])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sampled = model.generate(ids.to(model.device), do_sample=True, top_k=0, max_new_tokens=64)
    answers = [text.split("</s>")[0] for text in TOKENIZER.batch_decode(sampled[:, ids.shape[1] :])]
    up = [count_up(x[:-1].split(" "), y) for x, y in zip(prompts, answers)]
    tqdm.write("the model answers " + ", ".join(x + y for x, y in zip(prompts[:3], answers)))
    row = {"eval/words_up": sum(up) / len(up) / 4, "eval/all_up": up.count(4) / len(up)}
    return row | {"eval/letters": sum(map(len, answers)) / len(answers)}


def main(argv=None):
    """Write the demo and train it, with the flags of simpo.py; FLAGS has other defaults."""
    argv = [*FLAGS.split(), *(sys.argv[1:] if argv is None else argv)]
    if simpo.WORLD_SIZE > 1:
        dist.init_process_group(device_id=simpo.DEVICE if simpo.ON_GPU else None)
    if simpo.RANK == 0 and not ("--resume" in argv and (FOLDER / "start").exists()):
        shutil.rmtree(FOLDER, ignore_errors=True)  # of an earlier demo
        write_files(FOLDER, simpo.parse_args(argv).seed)
        print("python", sys.argv[0], *argv)
    if simpo.WORLD_SIZE > 1:
        dist.barrier()
    return simpo.main(argv, judge)
