"""Tests of lora.py and fast.py, with the tools of test_simpo.py."""

import copy
import importlib
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER.parent), str(FOLDER)]

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import test_simpo as core  # first, since it sets further variables

simpo, place, make_llama, tokenizer = core.simpo, core.place, core.make_llama, core.make_tokenizer()


def extend(name, processes, out, place, *flags):  # torchrun notebooks/NAME.py -> its folder
    flags = ["--model", place / "llama", "--dataset", place / "nine.jsonl", *core.FOURS, *flags]
    core.torchrun(processes, *flags, "--output_dir", out, file=FOLDER / f"{name}.py")
    return out


def logits_of(model):
    return model.eval()(torch.arange(40, 60)[None]).logits.detach()


def test_lora_trains_and_saves_adapters_alone(place, tmp_path):
    """Catches adapters of each process, and files that peft or AutoModel read otherwise."""
    one, rank = tmp_path / "one", ["--lora_rank", 2, "--lr", 0.01]
    extend("lora", 1, one, place, *rank)
    for flag in ("--gradient_checkpointing", "--shard"):
        core.assert_same_training(one, extend("lora", 2, tmp_path / flag, place, *rank, flag))
    extend("lora", 1, tmp_path / "merged", place, *rank, "--merge")
    _, full = core.run(place / "llama", place / "nine.jsonl", tmp_path / "full", *core.FOURS)
    assert core.read_metrics(one)[0]["loss"] == pytest.approx(full[0]["loss"], rel=1e-6)
    adapters = load_file(one / "adapter_model.safetensors")
    assert len(adapters) == 2 * 7 * 2 and all(".lora_" in name for name in adapters)
    expected = logits_of(peft.PeftModel.from_pretrained(make_llama(), one))
    assert (expected - logits_of(make_llama())).abs().max() > 0.1
    for folder in (one, tmp_path / "merged"):
        logits = logits_of(transformers.AutoModelForCausalLM.from_pretrained(folder))
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_lora_resumes_from_adapters_to_the_same_bits(place, tmp_path):
    """Catches a reference that is scored with adapters, and a checkpoint of frozen weights."""
    flags = ["--lora_rank", 2, "--lora_targets", "q_proj,up_proj"]
    whole, out, shown, file = tmp_path / "a", tmp_path / "b", tmp_path / "shown", FOLDER / "lora.py"
    command = core.long_run(place, whole, *flags)
    assert core.codes(core.start(1, shown, *command, file=file)) == [0], shown.read_text()[-999:]
    core.killed_run(place, out, *flags, file=file)
    assert (
        sum(x.stat().st_size for x in out.glob("checkpoint-*/*.distcp")) < 100_000
    )  # 0.4 MB in full
    command = core.long_run(place, out, *flags, "--resume")
    assert core.codes(core.start(1, shown, *command, file=file)) == [0], shown.read_text()[-999:]
    core.assert_same_bits(whole, out)


FAMILIES = {"Llama": {}, "Mistral": {"sliding_window": 5}, "Qwen3": {"head_dim": 8}, "Bloom": {}}
FAMILIES |= {"Gemma2": {"head_dim": 8, "sliding_window": 5, "attn_logit_softcapping": 2.0}}
FAMILIES |= {"Llama4Text": {"attention_chunk_size": 8}}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_computed_once_scores_as_token_by_token(family, monkeypatch):
    """Catches answers that see each other, positions that go on, a window or a cap that is left
    out, prompts that are computed twice, and a model for which it would be wrong."""
    monkeypatch.setattr(simpo, "ResponseLogps", simpo.ResponseLogps)  # forgets it afterwards
    sys.modules.pop("fast", None)
    importlib.import_module("fast")
    torch.manual_seed(0)
    options = core.SHAPE | core.LLAMA | FAMILIES[family]
    config = getattr(transformers, f"{family}Config")(**options)
    model = transformers.AutoModelForCausalLM.from_config(config)
    own, args, seen = copy.deepcopy(model), simpo.parse_args(["--gradient_checkpointing"]), []
    if family in ("Bloom", "Llama4Text"):
        with pytest.raises(SystemExit, match="use simpo.py"):
            simpo.wrap(model, args)
        return
    policy = simpo.wrap(model, args)
    model.get_input_embeddings().register_forward_hook(lambda m, x, y: seen.append(x[0].numel()))
    pairs = [core.tokenize(row, tokenizer) for row in core.NINE]
    logps = policy(**simpo.collate(pairs)).tolist()
    answers = [answer.s for side in zip(*core.slow_answers(own, core.NINE)) for answer in side]
    assert logps == pytest.approx(answers, rel=1e-5)
    assert seen == [sum(len(ids) for pair in pairs for name, ids in pair.items() if name != "cut")]


def test_a_prompt_computed_once_trains_what_rows_do(place, tmp_path):
    """Catches gradients that are lost on the way back, and processes that pack otherwise."""
    rows = tmp_path / "rows"
    core.run(place / "llama", place / "nine.jsonl", rows, *core.FOURS)
    for flag in ("--gradient_checkpointing", "--shard"):
        core.assert_same_training(rows, extend("fast", 2, tmp_path / flag, place, flag))
