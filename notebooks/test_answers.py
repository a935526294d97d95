"""Tests of answers.py and pairs.py, with the tools of test_simpo.py."""

import importlib
import json
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER.parent), str(FOLDER)]

import pytest
import torch
import transformers

import test_simpo as core  # first, since it sets further variables

make_llama, place, write_model = core.make_llama, core.place, core.write_model


def ask(place, tmp_path, output, rows, *flags):
    """The flags of answers.py or pairs.py."""
    questions = core.write_jsonl(tmp_path / "questions.jsonl", rows)
    flags = ["--instructions", questions, "--output", tmp_path / output, *flags]
    return [str(x) for x in ("--model", place / "llama", *flags, "--max_new_tokens", 30)]


def test_answers_are_those_of_a_slow_loop_and_a_killed_run_goes_on(tmp_path):
    """Catches padding that is seen, another category's temperature, decoding that the model's own
    generation_config changes, and a run that draws anew."""
    own = {"do_sample": True, "repetition_penalty": 1.8, "eos_token_id": 3}
    write_model(tmp_path / "llama").joinpath("generation_config.json").write_text(json.dumps(own))
    rows = [("math", "Hi"), ("math", "What is that?"), ("writing", "Go"), ("writing", "On")] * 2
    rows = [{"category": x, "turns": [y, "?"], "question_id": i} for i, (x, y) in enumerate(rows)]
    command = ask(tmp_path, tmp_path, "M.jsonl", rows, "--format", "mt_bench", "--batch_size", "2")
    file, shown = FOLDER / "answers.py", tmp_path / "shown"
    for _ in range(2):
        (process,) = core.start(1, shown, *command, file=file)
        core.wait_for(lambda: [x for x in tmp_path.glob("*.part") if x.stat().st_size])
        process.kill()
        process.join()
        with open(*tmp_path.glob("*.part"), "a") as part:
            part.write('[[{"role": ')  # half a line
    assert core.codes(core.start(1, shown, *command, file=file)) == [0], shown.read_text()[-999:]
    killed = (tmp_path / "M.jsonl").read_text()
    (tmp_path / "M.jsonl").unlink()
    importlib.import_module("answers").main(command)
    assert killed == (tmp_path / "M.jsonl").read_text()
    for row, line in zip(rows, map(json.loads, killed.splitlines())):
        prompt, end, _ = core.ids_by_hand(core.chat(row["turns"][0], "", ""), core.make_tokenizer())
        ids = list(prompt)
        while len(ids) < len(prompt) + 30 and ids[-1] != end[0]:
            ids.append(make_llama()(torch.tensor([ids])).logits[0, -1].argmax().item())
        text = core.make_tokenizer().decode(ids[len(prompt) :], skip_special_tokens=True)
        assert (text == line["choices"][0]["turns"][0]) == (row["category"] == "math")


def test_pairs_are_the_best_and_the_worst_whole_answers_and_train(place, tmp_path):
    """Catches a reward that does not see all, pairs of which neither answer is better, and answers
    that were cut, which training would take for whole ones."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**core.SHAPE | core.LLAMA, num_labels=1)
    reward = transformers.LlamaForSequenceClassification(config).eval()
    rows, main = [{"prompt": f"Say {x}"} for x in "abcdefgh"], importlib.import_module("pairs").main
    ends = {"eos_token_id": [*range(0, 300, 20)]}  # so that about half of the answers end
    write_model(tmp_path / "llama").joinpath("generation_config.json").write_text(json.dumps(ends))
    flags = ["--samples", 2, "--reward", write_model(tmp_path / "reward", reward)]
    main(ask(tmp_path, tmp_path, "pairs.jsonl", rows, *flags))
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").open()]
    assert 0 < len(pairs) < len(rows)
    for pair in pairs:
        prompt, *sides = core.ids_by_hand(pair, core.make_tokenizer())
        ids = [torch.tensor([prompt + x + core.make_tokenizer().encode("\n")]) for x in sides]
        chosen, rejected = [reward(x).logits.item() for x in ids]
        assert chosen > rejected
    core.run(place / "llama", tmp_path / "pairs.jsonl", tmp_path / "out", *core.FOURS)
    with pytest.raises(SystemExit, match="no pair is left"):  # this model's answers do not end
        main(ask(place, tmp_path, "none.jsonl", rows, *flags))
    reward.score.weight.data.zero_()
    flags = ["--samples", 2, "--reward", write_model(tmp_path / "indifferent", reward)]
    with pytest.raises(SystemExit, match="no pair is left"):
        main(ask(tmp_path, tmp_path, "none.jsonl", rows, *flags))


MISTAKES = {"--batch_size -1": "batch_size", "--samples 1": "2 or more", "--top_p 0": "top_p"}
MISTAKES |= {"--temperature -1": "temperature", "--max_new_tokens 0": "max_new_tokens"}
MISTAKES |= {"--output absent/x": "no such folder", "--instructions {broken}": "parse"}
MISTAKES |= {"--instructions {empty}": "no rows", "--reward {llama}": "lacks 1 weights"}


@pytest.mark.parametrize("flags", MISTAKES)
def test_mistakes_of_the_keyboard_are_one_line(flags, place, tmp_path, capsys):
    """Catches an empty file that looks like success, tracebacks, and a head drawn at random."""
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.jsonl").write_text('{"prompt": ')
    paths = {x: tmp_path / f"{x}.jsonl" for x in ("empty", "broken")} | {"llama": place / "llama"}
    command = ask(place, tmp_path, "x.jsonl", [{"prompt": "Hi"}], "--reward", place / "llama")
    with pytest.raises(SystemExit) as end:
        importlib.import_module("pairs").main([*command, *flags.format(**paths).split()])
    assert MISTAKES[flags] in f"{end.value.code} {capsys.readouterr().err.splitlines()[-1:]}"
    assert not list(tmp_path.glob("x.jsonl*"))
