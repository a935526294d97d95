"""The flags, the questions and the file that answers.py and pairs.py have in common."""

import json
import sys
import zlib
from pathlib import Path

import datasets

LEAST = {"batch_size": 1, "max_new_tokens": 1, "samples": 2, "seed": 0, "temperature": 0}


def add_flags(parser, top_p):
    add = parser.add_argument
    add("--model", required=True, help="hub id or folder; one that lora.py wrote, too")
    add("--instructions", required=True, help="the questions: hub id, or .json or .jsonl file")
    add("--split", default="train", help="split of them, such as test or train[:100] (%(default)s)")
    add("--output", required=True, help="the file to write")
    add("--max_new_tokens", type=int, help="longer answers are cut; unset: 4096, mt_bench 1024")
    text = "draw from the likeliest tokens that together have this probability (%(default)s)"
    add("--top_p", type=float, default=top_p, help=text)
    add("--batch_size", type=int, default=16, help="answers at a time (%(default)s)")
    add("--seed", type=int, default=0, help="fixes what is drawn (%(default)s)")


def check(parser, args):  # before anything is loaded
    for name, least in LEAST.items():
        value = vars(args).get(name)
        if value is not None and not value >= least:
            parser.error(f"--{name} {value}: it is {least} or more")
    if not 0 < args.top_p <= 1:
        parser.error(f"--top_p {args.top_p}: it is a probability")
    if Path(args.output).exists():
        parser.error(f"--output {args.output} is there already")
    if not Path(args.output).absolute().parent.is_dir():
        parser.error(f"--output {args.output}: there is no such folder")


def read_rows(args):
    path = Path(args.instructions)
    is_file = path.suffix in (".json", ".jsonl")
    source, files = ("json", args.instructions) if is_file else (args.instructions, None)
    if is_file and path.exists() and path.stat().st_size == 0:  # datasets ends in a traceback
        sys.exit(f"{path} has no rows")
    try:
        return list(datasets.load_dataset(source, data_files=files, split=args.split))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = error.__cause__ or error  # such as where the JSON is broken
        sys.exit(f"{args.instructions}: {str(reason).splitlines()[0]}")


def part_of(args):  # other flags, another file; a reward model sees the answers afterwards
    flags = {name: value for name, value in vars(args).items() if name != "reward"}
    return Path(f"{args.output}.{zlib.crc32(json.dumps(flags).encode())}.part")


def finish(text, args):  # OUTPUT is never there in part
    new = Path(f"{args.output}.new")
    new.write_text(text + "\n")
    new.rename(args.output)
    part_of(args).unlink()
