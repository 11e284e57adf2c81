"""What a user installs: one wheel is built from a copy of the checkout, and the tests look at it and use it.

Slow: the module builds the kernels once (the `wheel` fixture), the CUDA library once where nvcc is found, and
reconfigures a few times. The editable install is what every other test runs from.
"""

import email
import json
import os
import re
import resource
import runpy
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import cuda_build
import pytest
import setuptools  # type: ignore[import-untyped]
import torch

import handtuned
from handtuned import _C, _binary
from handtuned._version import __version__

ROOT = Path(__file__).resolve().parents[1]
SITE = Path(sysconfig.get_path("purelib"))
SOURCES = ("CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "python", "triton_kernels")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="wheels are built for Linux only")


def run(*command: object, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """stdout and stderr together; the environment is this one without what would steer the build or the import."""
    steering = ("HANDTUNED_", "PYTHON", "CMAKE_ARGS", "TRITON_INTERPRET")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(steering)}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment | variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=900,
    )


def succeed(*command: object, cwd: Path | None = None, **variables: str) -> str:
    done = run(*command, cwd=cwd, **variables)
    assert done.returncode == 0, done.stdout
    return done.stdout


def one_line(text: str) -> str:
    """Without the line breaks (and pip's indents) that a message was wrapped with."""
    return " ".join(text.split())


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git holds of the build, with nothing built in it."""
    copy = tmp_path_factory.mktemp("checkout")
    built = shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=built)
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


# ---- the wheel ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by pip in its own environment, which does not see torch: setup.py finds it all the same."""
    out = tmp_path_factory.mktemp("wheel")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    log = succeed(sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "-v", "-w", out, cwd=checkout)
    seconds = re.search(r"handtuned: kernels built in (\d+) s", log)
    assert seconds, log
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    of_cpus = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"CPU-only build: {seconds[1]} s, with pip {of_cpus:.0f} s of CPU time")
    (out / "cpu_seconds").write_text(str(of_cpus))
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def contents(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("contents")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture(scope="module")
def extension(contents: Path) -> Path:
    (found,) = contents.glob("handtuned/_C.*.so")
    return found


def test_slow_build_takes_two_minutes_on_two_cores(wheel: Path) -> None:
    # CPU time, which a busy machine does not stretch as it does the time on the clock.
    assert float((wheel.parent / "cpu_seconds").read_text()) < 2 * 120


def test_wheel_has_one_top_level_name(contents: Path) -> None:
    assert sorted(path.name for path in contents.iterdir()) == ["handtuned", f"handtuned-{__version__}.dist-info"]


def test_wheel_holds_every_module_and_the_data(contents: Path) -> None:
    kinds = {".py", ".pyi", ".typed", ".json"}
    inside = {str(path.relative_to(contents / "handtuned")) for path in contents.rglob("handtuned/**/*.*")}
    expected = set()
    for folder, prefix in ((ROOT / "python/handtuned", ""), (ROOT / "triton_kernels", "triton_kernels/")):
        expected |= {prefix + str(path.relative_to(folder)) for path in folder.rglob("*.*") if path.suffix in kinds}
    assert {"py.typed", "_C.pyi", "nn/functional/norm.py", "triton_kernels/tuned/norm.json"} <= expected
    assert expected - inside == set()


def test_wheel_carries_no_cuda_library_and_no_torch(contents: Path) -> None:
    shared = sorted(path.name for path in contents.rglob("*.so*"))
    assert shared == [f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"], "this build was not asked for CUDA"


def test_metadata_bounds_torch_from_below_only(contents: Path) -> None:
    metadata = email.message_from_string((contents / f"handtuned-{__version__}.dist-info/METADATA").read_text())
    (torch_requirement,) = [r for r in metadata.get_all("Requires-Dist", []) if re.match(r"torch\b", r)]
    assert torch_requirement == "torch>=2.10"
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert (contents / f"handtuned-{__version__}.dist-info/licenses/LICENSE").exists()
    assert "handtuned" in metadata.get_payload(), "README.md is the description"


def test_extension_asks_torch_for_its_stable_abi_only(extension: Path) -> None:
    undefined = [line.split() for line in succeed("nm", "-D", "--undefined-only", extension).splitlines()]
    names = [symbol for kind, symbol in (fields[-2:] for fields in undefined) if kind == "U"]
    cxx_of_torch = re.compile(r"_Z\w*?(2at|3c10|5torch|8pybind11)\d")
    assert [name for name in names if cxx_of_torch.match(name)] == []
    # What carries a version comes from the C and C++ run times, as do names in namespace std.
    others = [name for name in names if "@" not in name and not re.match(r"_?Py|_ZN?K?S[t0-9]", name)]
    assert [name for name in others if not name.startswith(("aoti_torch_", "torch_"))] == []
    assert "torch_call_dispatcher" in others, "the list must see the symbols it judges"


def test_extension_links_torch_by_name_without_a_path(extension: Path) -> None:
    dynamic = succeed("readelf", "-d", extension)
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
    assert "libtorch_cpu.so" in needed
    assert {name for name in needed if "torch" in name or "c10" in name} == {"libtorch_cpu.so"}
    assert re.findall(r"\((?:RPATH|RUNPATH)\).*", dynamic) == []


# ---- installing it --------------------------------------------------------------------------------------------------


def environment(folder: Path, visible: str) -> Path:
    """The python of a fresh virtual environment that sees those packages of this one whose names match `visible`.

    They are linked into a folder which a .pth file adds, so that nothing is downloaded or installed twice and the
    editable handtuned of this environment stays out of sight.
    """
    venv.create(folder, with_pip=False)
    shared = folder / "shared"
    shared.mkdir()
    for path in SITE.iterdir():
        if re.match(visible, path.name) and not re.search("handtuned", path.name):
            (shared / path.name).symlink_to(path)
    python = folder / "bin" / "python"
    site_packages = succeed(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(site_packages) / "shared.pth").write_text(f"{shared}\n")
    return python


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of an environment with torch into which pip installed the wheel."""
    python = environment(tmp_path_factory.mktemp("user") / "venv", r".")
    # With its dependencies, but with no index to get them from: what is there has to be enough.
    log = succeed(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", wheel)
    assert re.search(r"^Successfully installed handtuned-\S+$", log, re.MULTILINE), log
    return python


def test_install_leaves_torch_alone_and_an_op_runs(installed: Path, tmp_path: Path) -> None:
    code = """
import torch, handtuned, sys
x = torch.randn(4, 8, requires_grad=True)
y = handtuned.nn.functional.layer_norm(x, (8,))
y.sum().backward()
assert torch.allclose(y, torch.nn.functional.layer_norm(x, (8,)), atol=1e-6)
import handtuned.triton_kernels
print(torch.__version__, handtuned.__file__)
"""
    version, file = succeed(installed, "-c", code, cwd=tmp_path).split()
    assert version == torch.__version__
    assert Path(file).is_relative_to(installed.parents[1])


def test_installed_command_lists_every_kernel(installed: Path, tmp_path: Path) -> None:
    table = succeed(installed.parent / "handtuned", "info", cwd=tmp_path, COLUMNS="200")
    for word in ("avx2", torch.__version__, "layer_norm_backward", "add_rms_norm_backward", "triton", "reference"):
        assert word in table


def test_import_brings_in_no_heavy_package(installed: Path, tmp_path: Path) -> None:
    code = """
import sys, torch
before = set(sys.modules)
import handtuned
new = set(sys.modules) - before
print(*sorted({name.partition('.')[0] for name in new} | new & {"torch.distributed.tensor"}))
"""
    new = set(succeed(installed, "-c", code, cwd=tmp_path).split())
    assert "handtuned" in new
    heavy = {"triton", "transformers", "matplotlib", "onnxruntime", "rich", "typer", "torch.distributed.tensor"}
    assert new & heavy == set()


def test_a_broken_extension_says_what_to_do(contents: Path, tmp_path: Path) -> None:
    shutil.copytree(contents / "handtuned", tmp_path / "handtuned")
    (extension,) = (tmp_path / "handtuned").glob("_C.*.so")
    extension.write_bytes(b"not a library")
    failed = run(sys.executable, "-c", "import handtuned", cwd=tmp_path)
    assert failed.returncode != 0
    assert "handtuned's extension could not be loaded under torch" in failed.stdout
    assert "run `pip install --no-build-isolation .`" in failed.stdout


def test_slow_build_without_isolation(wheel: Path, checkout: Path, tmp_path: Path) -> None:
    # After `wheel`: with a cmake of the same release the kernels are reused and the skin is compiled again.
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    pip = (sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", tmp_path)
    succeed(*pip, cwd=checkout, PATH=path)
    assert [path.name for path in tmp_path.iterdir()] == [wheel.name]


# ---- what the build says when it cannot go on -----------------------------------------------------------------------


def configure(checkout: Path, tmp_path: Path, python: object = sys.executable, **variables: str) -> str:
    """The output of a build that must fail before it compiles."""
    command = (python, "setup.py", "build_ext", "--build-temp", tmp_path / "temp", "--build-lib", tmp_path / "lib")
    done = run(*command, cwd=checkout, **variables)
    assert done.returncode != 0, done.stdout
    assert not list(tmp_path.rglob("*.o"))
    return one_line(done.stdout)


def test_without_torch_one_sentence_and_the_command(checkout: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv", r"(setuptools|_distutils_hack|pybind11|wheel|cmake|ninja|packaging)\b")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", ".", "--no-deps", "--no-build-isolation")
    done = run(*pip, cwd=checkout)
    assert done.returncode != 0
    assert "handtuned is built against your own torch and found none: run `pip install torch`" in one_line(done.stdout)
    assert "Traceback" not in done.stdout
    assert not list((checkout / "build").rglob("CMakeCache.txt")) or "Building CXX" not in done.stdout


@pytest.fixture
def setup_functions(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize(("version", "accepted"), [("2.9.1+cu128", False), ("1.13.1", False), ("2.10.0", True),
                                                   ("2.13.0a0+git12ab", True), ("3.0.0", True)])  # fmt: skip
def test_torch_too_old_one_sentence_and_the_command(
    setup_functions: dict[str, object], tmp_path: Path, version: str, accepted: bool
) -> None:
    (tmp_path / "version.py").write_text(f"__version__ = {version!r}\ncuda = None\n")
    torch_version = setup_functions["torch_version"]
    assert callable(torch_version)
    if accepted:
        assert torch_version(tmp_path) == version
        return
    with pytest.raises(SystemExit, match=re.escape(f"needs torch >= 2.10 and found {version}: run `pip install")):
        torch_version(tmp_path)


def test_cuda_asked_for_without_nvcc_fails(checkout: Path, tmp_path: Path) -> None:
    # OFF stands for "not found": a toolkit in CMake's default places would be found otherwise.
    said = configure(checkout, tmp_path, HANDTUNED_CUDA="on", CMAKE_ARGS="-DHANDTUNED_NVCC=OFF")
    assert "HANDTUNED_CUDA=on but nvcc was not found; install the CUDA toolkit, put nvcc on PATH or set" in said


def test_unknown_cuda_choice_fails(checkout: Path, tmp_path: Path) -> None:
    assert "HANDTUNED_CUDA is 'maybe', allowed are auto, on and off" in configure(
        checkout, tmp_path, HANDTUNED_CUDA="maybe"
    )


@pytest.mark.skipif(cuda_build.NVCC is None, reason="needs nvcc")
def test_slow_cuda_library_is_built_and_loads_without_a_driver(checkout: Path, tmp_path: Path) -> None:
    """For one architecture; with HANDTUNED_EVERY_MUTANT (make test-gpu-full) for all, which is what users get."""
    if os.environ.get("HANDTUNED_EVERY_MUTANT"):
        configured = cuda_build.configure(checkout, tmp_path)
        succeed(cuda_build.tool("ninja"), "-C", tmp_path, "handtuned_cuda")
        library = tmp_path / "lib" / "libhandtuned_cuda.so"
    else:
        configured, library = cuda_build.configured(), cuda_build.library()
    assert "CUDA library built: nvcc" in configured
    assert "libcudart" not in succeed("readelf", "-d", library), "cudart is linked statically"
    assert library.stat().st_size < 40 << 20
    code = f"import ctypes; print(ctypes.CDLL({str(library)!r}).handtuned_cuda_device_count())"
    assert int(succeed(sys.executable, "-c", code)) == torch.cuda.device_count()
    # The extension opens it, registers its kernels for CUDA tensors, and goes on serving the CPU.
    code = f"""
import torch, handtuned
handtuned._C.load_cuda({str(library)!r})
for op in ("layer_norm", "add_rms_norm_backward", "attention", "rnn_backward"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"handtuned::{{op}}", "CUDA")
assert not torch._C._dispatch_has_kernel_for_dispatch_key("handtuned::rotary", "CUDA")
x = torch.randn(4, 8)
assert torch.allclose(handtuned.nn.functional.layer_norm(x, (8,)), torch.nn.functional.layer_norm(x, (8,)), atol=1e-6)
"""
    succeed(sys.executable, "-c", code, PYTHONPATH=str(Path(handtuned.__file__).parents[1]))


def test_a_cuda_library_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    missing, foreign = tmp_path / "missing.so", tmp_path / "foreign.so"
    succeed("g++", "-shared", "-x", "c++", "-o", foreign, "/dev/null")
    with pytest.raises(RuntimeError, match=r"the CUDA library could not be opened: .*missing\.so"):
        _C.load_cuda(str(missing))
    with pytest.raises(RuntimeError, match=r"foreign\.so is of another release; build again"):
        _C.load_cuda(str(foreign))


# ---- version stamps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["2.9.1", "2.9.1+cu128", "1.13.0", "nightly"])
def test_import_refuses_an_older_torch(version: str) -> None:
    with pytest.raises(ImportError, match=re.escape(f"needs torch >= 2.10, found {version}: run `pip install 'torch")):
        _binary.check_torch(version)


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "2.14.1a0+gitabc", "3.0.0"])
def test_import_accepts_torch_from_the_lower_bound_on(version: str) -> None:
    _binary.check_torch(version)


def test_import_refuses_an_extension_of_another_release() -> None:
    _binary.check_stamp(__version__)
    with pytest.raises(ImportError, match=r"found an extension built for 0\.0\.0: run `pip install .* again"):
        _binary.check_stamp("0.0.0")


def test_stamps_name_the_build(installed: Path, tmp_path: Path) -> None:
    code = "import json, handtuned; print(json.dumps(handtuned._binary.build_facts))"
    facts = json.loads(succeed(installed, "-c", code, cwd=tmp_path))
    assert facts["version"] == __version__
    assert facts["torch_built"] == torch.__version__
    assert facts["torch_minimum"] == "2.10"
    assert facts["cuda"].startswith(("built: nvcc", "not built: "))
