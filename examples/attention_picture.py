"""A picture of what the words of a sentence look at, in a pretrained encoder that runs on the fused attention.

python examples/attention_picture.py [--plot picture.png]

The fused attention stores no weights. handtuned.nn.functional.attention_weights computes those that are asked for
from the queries, the keys and the log-sum-exp; torch's way is to give the fused attention up and keep them all.
"""

import argparse
import copy
import time

import torch
from torch import Tensor

from handtuned.compare import models
from handtuned.integrations.transformers import replace
from handtuned.nn import functional as H

torch.set_num_threads(1)
SENTENCE = "The kettle is boiling because she put it on the stove."
LAYER = 0


def looked_at(model: torch.nn.Module, words: dict[str, Tensor], heads: int) -> Tensor:
    """Weights (heads, words, words) of one layer, from a hook that sees what goes into it."""
    attention = model.encoder.layer[LAYER].attention.self
    seen = []
    hook = attention.register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True)
    model(**words)
    hook.remove()
    split = [f(seen[0]).unflatten(-1, (heads, -1)).transpose(1, 2) for f in (attention.query, attention.key)]
    _, lse = H.scaled_dot_product_attention(*split, split[1], return_lse=True)
    return H.attention_weights(*split, lse)[0]


def picture(weights: Tensor, words: list[str], file: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(3, 4, figsize=(13, 10), layout="constrained", sharex=True, sharey=True)
    for head, (axes, square) in enumerate(zip(grid.flat, weights, strict=True)):
        axes.imshow(square, vmin=0, vmax=1, cmap="viridis")
        axes.set_title(f"head {head}", fontsize=9)
        axes.set_xticks(range(len(words)), words, rotation=90, fontsize=7)
        axes.set_yticks(range(len(words)), words, fontsize=7)
    figure.suptitle(f"layer {LAYER}: how much a word (row) looks at each (column)")
    figure.savefig(file)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="attention weights of a sentence")
    parser.add_argument("--plot", metavar="FILE", help="draw them")
    file = parser.parse_args().plot
    folder = models.minilm_folder()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    words = tokenizer(SENTENCE, return_tensors="pt")
    names = tokenizer.convert_ids_to_tokens(words["input_ids"][0])
    theirs = models.minilm().module
    ours = copy.deepcopy(theirs)
    replace(ours)
    heads = theirs.config.num_attention_heads
    theirs.set_attn_implementation("eager")
    for model in (theirs, ours):
        model(**words)  # the first call of each is slower
    start = time.perf_counter()
    expected = theirs(**words, output_attentions=True).attentions[LAYER][0]
    middle = time.perf_counter()
    found = looked_at(ours, words, heads)
    print(f"torch, all weights kept: {1e3 * (middle - start):.1f} ms; ", end="")
    print(f"handtuned, those of one layer: {1e3 * (time.perf_counter() - middle):.1f} ms")
    print(f"weights at most {(found - expected).abs().max():.1e} apart")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    between_words = found.mean(0)[1:-1, 1:-1].fill_diagonal_(0)  # without [CLS], [SEP] and the word itself
    for word, row in zip(names[1:-1], between_words, strict=True):
        print(f"{word:8} looks most at {names[1 + int(row.argmax())]}")
    if file is not None:
        picture(found, names, file)


if __name__ == "__main__":
    main()
