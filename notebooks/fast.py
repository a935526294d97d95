"""simpo.py with each prompt computed once for both answers: 1.1 to 1.6 times as fast on a CPU.

    python notebooks/fast.py --model M --dataset D
    torchrun --nproc_per_node=8 notebooks/fast.py --model M --dataset D --shard

It takes every flag of simpo.py and gives the same numbers, but for rounding. B pairs become one row
of L tokens, [prompt chosen rejected] one after another, and no answer sees another (notebook 5).
"""

import functools
import sys
from pathlib import Path

import torch
from transformers import AttentionInterface, AttentionMaskInterface

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # simpo.py is in the folder above
import simpo


def make_mask(row, window, is_needed):
    """Of a row, [1, heads, T, d]: 0 or -inf (unseen), [1, 1, T, T]; None: all before is seen."""
    length = row.shape[2]
    if (window is None or window >= length) and not is_needed:
        return None
    places = torch.arange(length, device=row.device)
    distance = places[:, None] - places
    is_hidden = ((distance < 0) | (distance >= (window or length)))[None, None]
    return row.new_zeros(is_hidden.shape).masked_fill(is_hidden, -torch.inf)


def segment_attention(name, module, query, key, value, attention_mask, plan=None, **options):
    """Give each answer the attention of a row of its own, prompt and answer: [1, heads, L, d] ->
    [1, L, heads, d]. plan: the lengths of prompt, chosen and rejected of each pair. name: sdpa, or
    eager, for models with soft caps; that one stands in the model's file, and needs a mask."""
    attention = AttentionInterface()["sdpa"]
    if name == "eager":
        attention = sys.modules[type(module).__module__].eager_attention_forward
    if plan is None:  # not from `hidden_states`
        return attention(module, query, key, value, attention_mask, **options)
    window = options.get("sliding_window")
    is_untold = "sliding_window" not in options and getattr(module.config, "sliding_window", None)
    if is_untold or attention_mask is None or attention_mask.numel() > 1:
        sys.exit(f"fast.py: {type(module).__name__} has a mask of its own: use simpo.py")
    parts = [x.split([sum(lengths) for lengths in plan], dim=2) for x in (query, key, value)]
    outputs = []
    for (prompt, chosen, _), *pair in zip(plan, *parts):
        middle = prompt + chosen
        chosen_row = [x[:, :, :middle] for x in pair]
        rejected_row = [torch.cat([x[:, :, :prompt], x[:, :, middle:]], dim=2) for x in pair]
        for row, first in ((chosen_row, 0), (rejected_row, prompt)):
            row_mask = make_mask(row[0], window, is_needed=name == "eager")
            outputs.append(attention(module, *row, row_mask, **options)[0][:, first:])
    return torch.cat(outputs, dim=1), None


class PackedLogps(simpo.ResponseLogps):
    def __init__(self, model, **options):
        super().__init__(model, **options)
        kinds = {*(getattr(model.config.get_text_config(), "layer_types", None) or [])}
        is_plain = kinds <= {"full_attention", "sliding_attention"}
        if not (is_plain and model._supports_attention_backend):
            sys.exit(f"fast.py: {type(model).__name__} has attention of its own: use simpo.py")
        model.set_attn_implementation("segments_sdpa" if model._supports_sdpa else "segments_eager")

    def hidden_states(self, input_ids, scored):  # -> [2B, T, D], as simpo.py has them
        if scored is None:  # from `check`
            return super().hidden_states(input_ids, scored)
        ids, scored = [x.view(2, -1, x.shape[1]).transpose(0, 1) for x in (input_ids, scored)]
        places = torch.arange(ids.shape[2], device=ids.device).expand_as(ids)  # [B, 2, T]
        prompts = scored[:, 0].int().argmax(1, keepdim=True)  # their lengths, [B, 1]
        kept = scored.clone()  # of the rejected row its answer, of the chosen row all
        kept[:, 0] |= places[:, 0] < prompts
        plan = torch.cat([prompts, scored.sum(2)], dim=1).tolist()
        options = {"position_ids": places[kept][None], "plan": plan}
        options["attention_mask"] = torch.ones(1, 1, 1, 1)  # so that the library makes none
        packed = super().hidden_states(ids[kept][None], None, **options)[0]  # [L, D]
        at = kept.flatten().cumsum(0).view_as(kept) - 1  # where each token is in the packed row
        at[:, 1] = torch.where(kept[:, 1], at[:, 1], at[:, 0])  # both have the same prompt
        return packed[at].transpose(0, 1).flatten(0, 1)

    def check(self, ids, tolerance):  # also: have two made-up pairs the same states as in rows?
        super().check(ids, tolerance)
        pair = {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 10, 11], "rejected_ids": [12, 13]}
        batch = simpo.collate([pair, pair | {"prompt_ids": [14, 15]}])
        batch = {name: x.to(ids.device) for name, x in batch.items()}
        read = batch["scored"].roll(-1, dims=1)  # the states that predict a scored token
        in_rows = super().hidden_states(**batch)[read]
        difference = (self.hidden_states(**batch)[read] - in_rows).abs().max()
        if not difference <= tolerance * in_rows.abs().max():
            sys.exit(f"fast.py: {type(self.model).__name__} scores otherwise: use simpo.py")


for name in ("sdpa", "eager"):
    AttentionInterface.register(f"segments_{name}", functools.partial(segment_attention, name))
    AttentionMaskInterface.register(f"segments_{name}", AttentionMaskInterface()[name])
simpo.ResponseLogps = PackedLogps

if __name__ == "__main__":
    simpo.main()
