"""A model's answers to AlpacaEval 2, Arena-Hard or MT-Bench, as in the paper, for their judges.

    python notebooks/answers.py --model M --format alpaca_eval --instructions Q.json --output M.json

Q.json is alpaca_eval.json of tatsu-lab/alpaca_eval on the hub, or a question.jsonl: that of
lmarena/arena-hard-auto in data/arena-hard-v0.1, or of lm-sys/FastChat in fastchat/llm_judge/data.
Their judges read the folder model_answer beside it. If a run is killed, the same command goes on.
"""

import argparse
import json
import sys
from pathlib import Path

import questions
import sampling

MT_BENCH = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}  # by category; else 0
JUDGES = {"alpaca_eval": "alpaca_eval --model_outputs {path}"}
JUDGES["arena_hard"] = "add {name} to model_list in config/arena-hard-v0.1.yaml; then "
JUDGES["arena_hard"] += "python gen_judgment.py --setting-file config/arena-hard-v0.1.yaml"
JUDGES["mt_bench"] = "python -m fastchat.llm_judge.gen_judgment --model-list {name}"


def make_question(row, args):
    """A row of the judge's questions -> the texts that are asked, and the temperature."""
    if args.format == "alpaca_eval":
        texts, temperature = [row["instruction"]], 0.9
    elif args.format == "arena_hard":
        texts, temperature = [row["prompt"]], 0.0
    else:
        texts, temperature = row["turns"], MT_BENCH.get(row["category"], 0.0)
    if args.temperature is not None:
        temperature = args.temperature
    turns = [[{"role": "user", "content": text}] for text in texts]
    return {"turns": turns, "temperature": temperature}


def make_answer(row, texts, args):
    """A row of the questions and the texts of its answers -> a row of answers."""
    name = Path(args.output).stem  # of the model
    if args.format == "alpaca_eval":
        return {"instruction": row["instruction"], "output": texts[0], "generator": name}
    if args.format == "arena_hard":
        messages = [{"role": "user", "content": row["prompt"]}]
        messages += [{"role": "assistant", "content": {"answer": texts[0]}}]
        return {"uid": row["uid"], "model": name, "messages": messages}
    choices = [{"index": 0, "turns": texts}]
    return {"question_id": row["question_id"], "model_id": name, "choices": choices}


def main(argv=None):
    parser = argparse.ArgumentParser(usage="%(prog)s [flags]", allow_abbrev=False)
    questions.add_flags(parser, top_p=1.0)
    parser.add_argument("--format", required=True, choices=JUDGES, help="whose questions they are")
    text = "unset: 0.9 for alpaca_eval, the paper's for Llama-3; the others have their own"
    parser.add_argument("--temperature", type=float, help=text)
    args = parser.parse_args(argv)
    questions.check(parser, args)
    args.max_new_tokens = args.max_new_tokens or (1024 if args.format == "mt_bench" else 4096)
    ending = ".json" if args.format == "alpaca_eval" else ".jsonl"
    if not args.output.endswith(ending):
        parser.error(f"the judge of {args.format} reads files that end in {ending}")
    rows = questions.read_rows(args)
    try:
        asked = [make_question(row, args) for row in rows]
    except KeyError as error:
        sys.exit(f"{args.instructions} has no column {error}, so it is not of {args.format}")
    lines = []
    for row, conversation in zip(rows, sampling.answer_all(asked, args)):
        texts = [x["content"] for x in conversation if x["role"] == "assistant"]
        lines.append(json.dumps(make_answer(row, texts, args)))
    questions.finish("[" + ",\n".join(lines) + "]" if ending == ".json" else "\n".join(lines), args)
    print("next:", JUDGES[args.format].format(path=args.output, name=Path(args.output).stem))


if __name__ == "__main__":
    main()
