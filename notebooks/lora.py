"""simpo.py with LoRA (arXiv:2106.09685): the weights W of linear layers are frozen, B A is added to
them, two thin matrices that are trained. 8 billion weights then fit one GPU of 24 GB.

    python notebooks/lora.py --model M --dataset D --gradient_checkpointing
    torchrun --nproc_per_node=8 notebooks/lora.py --lora_rank 64 --lora_alpha 128 --model M ...

It takes every flag of simpo.py. What is saved are the adapters A and B, with the name of their
model, in peft's format, which AutoModelForCausalLM loads, too. B begins at 0, so that the loss of
the first step is that of the model, and the reference of DPO is the model itself.
"""

import functools
import os
import sys
from pathlib import Path

import peft
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # simpo.py is in the folder above
import simpo


def add_flags(parser):
    add = parser.add_argument
    add("--lora_rank", type=int, default=16, help="rank of B A (%(default)s)")
    add("--lora_alpha", type=float, default=32, help="B A is scaled by alpha / rank (%(default)s)")
    targets = "layers to adapt: all-linear, or names like q_proj,v_proj (%(default)s)"
    add("--lora_targets", default="all-linear", help=targets)
    add("--merge", action="store_true", help="save whole weights, W + alpha / rank B A, in fp32")
    # Ten times that of full training, as Schulman et al. found, "LoRA Without Regret", 2025.
    parser.set_defaults(lr=1e-5)


class AdapterLogps(simpo.ResponseLogps):
    def float(self):  # `simpo.wrap` calls it; here frozen weights keep the dtype of their file
        return self

    def check(self, ids, tolerance):  # frozen weights may be bf16, with three digits
        super().check(ids, 0.05 if self.model.dtype != torch.float32 else tolerance)


def inject(model, args):
    """Freeze the weights of a model, and put fp32 adapters into it. It stays the same object."""
    if args.dtype == "fp32":
        model.float()  # products are in fp32 if both factors are
    if os.path.isdir(model.name_or_path):
        model.name_or_path = os.path.abspath(model.name_or_path)  # adapters note it
    targets = args.lora_targets
    if targets != "all-linear":
        targets = [target.strip() for target in targets.split(",")]
        for target in targets:  # peft would leave out a name that no layer has
            if not any(f".{name}".endswith(f".{target}") for name, _ in model.named_modules()):
                sys.exit(f"lora.py: --lora_targets: the model has no layer {target}")
    torch.manual_seed(args.seed)  # the same A in each process
    options = {"r": args.lora_rank, "lora_alpha": args.lora_alpha, "target_modules": targets}
    try:
        model.add_adapter(peft.LoraConfig(**options, task_type="CAUSAL_LM"))
    except ValueError as error:
        sys.exit(f"lora.py: --lora_targets {args.lora_targets}: {error}")
    adapters = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in adapters:
        weight.data = weight.data.float()
    trained, total = sum(x.numel() for x in adapters), model.num_parameters()
    print(f"{trained:,} of {total:,} weights are trained")


def merge(model):
    """Add B A to W in each layer that has adapters, in fp32, and take the adapters out."""
    model.cpu().float()
    for name, layer in reversed(list(model.named_modules())):  # experts have one in another
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.merge()
            model.set_submodule(name, layer.get_base_layer())
    model.delete_adapter("default")  # transformers' name for it; now it saves whole weights


fit_weights = simpo.fit


def fit(model, pairs, held_out, args, on_evaluate=lambda model, step: {}):
    """As simpo.py has it, but with adapters."""
    if args.merge and args.shard:
        sys.exit("lora.py: --merge needs whole weights; with --shard, merge by peft afterwards")
    inject(model, args)
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if args.merge and ends[0].weight is ends[1].weight and any(hasattr(x, "lora_A") for x in ends):
        sys.exit("lora.py: --merge cannot part a head from the embedding that it is tied to")
    rows = fit_weights(model, pairs, held_out, args, on_evaluate)
    if args.merge and simpo.RANK == 0:  # the process that saves
        merge(model)
    return rows


simpo.fit = fit
simpo.ResponseLogps = AdapterLogps
simpo.parse_args = functools.partial(simpo.parse_args, more_flags=add_flags)

if __name__ == "__main__":
    simpo.main()
