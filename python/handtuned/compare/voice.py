"""Spoken utterances made by arithmetic, and their mel spectrograms: what a speaker encoder hears.

A voice is a pitch and a length of the vocal tract. Its vowels are sums of harmonics of the pitch under the envelope of
three formants, its consonants noise under a wide hump; pitch and formants glide from sound to sound.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RATE, WINDOW, STEP, CHANNELS = 16000, 400, 160, 40  # samples a second, in a window, between windows; of the spectrum
FRAMES = 160  # that the encoder hears at once
LOUDNESS = 10 ** (-30 / 20)  # root mean square

# seconds; the first three formants in Hz; loudness of the voice and of the noise
SOUNDS = (
    (0.06, (300, 1400, 2600), 0.0, 0.5),
    (0.14, (730, 1090, 2440), 1.0, 0.0),
    (0.10, (270, 2290, 3010), 0.9, 0.0),
    (0.08, (400, 1700, 2500), 0.1, 0.6),
    (0.16, (530, 1840, 2480), 1.0, 0.0),
    (0.07, (250, 1200, 2300), 0.5, 0.05),
    (0.15, (570, 840, 2410), 1.0, 0.0),
    (0.05, (350, 1500, 2500), 0.0, 0.05),
    (0.12, (300, 870, 2240), 0.9, 0.0),
    (0.09, (660, 1720, 2410), 1.0, 0.02),
    (0.07, (320, 1900, 2700), 0.05, 0.7),
    (0.13, (490, 1350, 1690), 0.8, 0.0),
)


@dataclass(frozen=True)
class Voice:
    """pitch in Hz; tract: the formants are this much higher."""

    pitch: float
    tract: float


def speak(voice: Voice, seconds: float, seed: int = 0) -> Tensor:
    """Samples of an utterance, which repeats SOUNDS from one that depends on the seed."""
    generator = torch.Generator().manual_seed(seed)
    order = [SOUNDS[(seed * 5 + i) % len(SOUNDS)] for i in range(int(seconds / 0.05))]
    ends = torch.tensor([sound[0] for sound in order]).cumsum(0)
    times = torch.arange(int(seconds * RATE)) / RATE
    place = torch.bucketize(times, ends).clamp(max=len(order) - 1)
    tracks = torch.tensor([[*(f * voice.tract for f in sound[1]), *sound[2:]] for sound in order])[place]
    glide = torch.hann_window(int(0.04 * RATE))  # from one sound to the next
    tracks = torch.nn.functional.conv1d(
        torch.nn.functional.pad(tracks.T[:, None], (len(glide) // 2, len(glide) - len(glide) // 2 - 1), "replicate"),
        (glide / glide.sum())[None, None],
    )[:, 0]
    *formants, voiced, noisy = tracks

    pitch = voice.pitch * (1 + 0.1 * torch.sin(2.3 * times) + 0.03 * torch.sin(11 * times))
    phase = 2 * torch.pi * (pitch.double() / RATE).cumsum(0)

    def envelope(f: Tensor, width: float) -> Tensor:
        humps = [g / (1 + ((f - formant) / width) ** 2) for g, formant in zip((1.0, 0.6, 0.3), formants, strict=True)]
        total: Tensor = torch.stack(humps).sum(0)
        return total / (1 + f / 800)

    samples = torch.zeros_like(times)
    for harmonic in range(1, int(5000 / voice.pitch)):
        samples += voiced * envelope(harmonic * pitch, 90) * torch.sin(harmonic * phase).float()
    hiss = torch.randn(len(times), generator=generator)
    samples += 0.3 * noisy * (hiss - torch.roll(hiss, 1)) + 1e-3 * hiss
    return samples * LOUDNESS / samples.square().mean().sqrt()


def _mel_filters() -> Tensor:
    """(CHANNELS, bins): triangles of equal area, even in mels (Slaney's: linear up to 1000 Hz, then logarithmic)."""

    def hertz(mel: Tensor) -> Tensor:
        return torch.where(mel < 15, mel * 200 / 3, 1000 * torch.exp((mel - 15) * 0.06875177742094912))

    highest = 15 + torch.tensor(RATE / 2 / 1000).log().item() / 0.06875177742094912
    edges = hertz(torch.linspace(0, highest, CHANNELS + 2))
    bins = torch.linspace(0, RATE / 2, WINDOW // 2 + 1)
    low, middle, high = (edges[i : CHANNELS + i, None] for i in range(3))
    return torch.minimum((bins - low) / (middle - low), (high - bins) / (high - middle)).clamp(min=0) * 2 / (high - low)


def mel_spectrogram(samples: Tensor) -> Tensor:
    """(frames, CHANNELS): the power that falls into each filter, of windows STEP samples apart."""
    window = torch.hann_window(WINDOW)
    spectrum = torch.stft(samples, WINDOW, STEP, window=window, pad_mode="constant", return_complex=True)
    return (_mel_filters() @ spectrum.abs().square()).T.contiguous()
