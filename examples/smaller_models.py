"""A large model made small: distilled into a student, the student pruned, its weights rounded to int8.

python examples/smaller_models.py [--plot curves.png]

A wide MLP learns digits from the labels and a narrow one from the wide one's answers. Then the smallest half of the
narrow one's weights is masked out by torch.nn.utils.prune and the rest trained on, all side by side with torch's
modules; at last handtuned.quantize keeps its weights in 8 bits for inference.
"""

import copy
import statistics
import time

import torch
from digits import digits, mlp
from side_by_side import plot, shuffled, train
from side_by_side import report as tell
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from torch.nn.utils import prune

import handtuned

TEMPERATURE = 2.0


def distillation(logits: Tensor, teacher: Tensor) -> Tensor:
    """How far the student's softened answers are from the teacher's."""
    answers = [log_softmax(t / TEMPERATURE, -1) for t in (logits, teacher)]
    return kl_div(*answers, reduction="batchmean", log_target=True) * TEMPERATURE**2


def pruned(model: torch.nn.Module, amount: float) -> torch.nn.Module:
    """A copy whose smallest weights are held at 0 by masks. Without gradients, so that it can be copied again."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                prune.l1_unstructured(module, "weight", amount)
    return model


def per_call(model: torch.nn.Module, x: Tensor) -> float:
    times = []
    with torch.no_grad():
        for _ in range(200):
            start = time.perf_counter()
            model(x)
            times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def main() -> None:
    torch.manual_seed(0)
    images, labels = digits()
    held_out = (images[:300], labels[:300])
    teachers = train(mlp(512), shuffled(images[300:], labels[300:], size=64, count=80))
    tell("teacher, 512 wide", teachers, held_out)

    with torch.no_grad():
        answers = teachers[1].model.eval()(images)
    students = train(mlp(64), shuffled(images[300:], answers[300:], size=64, count=200), distillation)
    tell("student, 64 wide", students, held_out, tolerance=5e-2)

    thin, batches = pruned(students[0].model, 0.5), shuffled(images[300:], answers[300:], size=64, count=60)
    sparse = train(thin, batches, distillation)
    tell("student, half its weights", sparse, held_out, tolerance=5e-2)
    theirs, ours = (side.model.eval() for side in sparse)
    for model in (theirs, ours):
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                prune.remove(module, "weight")  # the masked weight takes the parameter's place
                assert (module.weight == 0).float().mean() > 0.45

    eighth = copy.deepcopy(ours)
    report = handtuned.quantize(eighth)
    print(f"{report.bytes_before / 1024:.0f} KiB in float32, {report.bytes_after / 1024:.0f} KiB in int8")
    with torch.no_grad():
        found = [model(held_out[0]).argmax(-1) for model in (theirs, ours, eighth)]
    right = [(f == held_out[1]).float().mean().item() for f in found]
    took = [per_call(model, held_out[0][:1]) for model in (theirs, ours, eighth)]
    for name, *row in zip(("torch", "handtuned", "handtuned, int8"), right, took, strict=True):
        print(f"{name:16} {row[0]:.0%} right, one picture {row[1]:.0f} us")
    same = (found[2] == found[0]).float().mean().item()
    print(f"{same:.0%} of int8's predictions are torch's: each weight is off by up to 1/254 of its row's largest")
    assert same > 0.97
    plot("distillation", students)


if __name__ == "__main__":
    main()
