"""An LSTM that hears one frame at a time: the same numbers as over the whole sequence, and the time of a step.

python examples/streaming.py
"""

import statistics
import time

import torch
from torch import Tensor

import handtuned

State = tuple[Tensor, Tensor] | None
FRAMES, WIDTH, HIDDEN = 200, 40, 256


def stream(lstm: torch.nn.LSTM, frames: Tensor) -> tuple[Tensor, float]:
    """Outputs of one call a frame, and the median time of a call in microseconds."""
    state: State = None
    outputs, times = [], []
    for frame in frames.split(1):
        start = time.perf_counter()
        y, state = lstm(frame, state)
        times.append(time.perf_counter() - start)
        outputs.append(y)
    return torch.cat(outputs), statistics.median(times) * 1e6


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    with torch.inference_mode(False):
        theirs = torch.nn.LSTM(WIDTH, HIDDEN)
        ours = handtuned.nn.LSTM(WIDTH, HIDDEN)
        ours.load_state_dict(theirs.state_dict())
    frames = torch.randn(FRAMES, 1, WIDTH)
    whole, _ = ours(frames)
    (expected, torch_time), (found, our_time) = stream(theirs, frames), stream(ours, frames)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)
    print(f"{FRAMES} frames of {WIDTH} into {HIDDEN} units, one a call")
    print(f"torch {torch_time:.0f} µs a frame, handtuned {our_time:.0f} µs; largest difference", end=" ")
    print(f"{(found - expected).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
