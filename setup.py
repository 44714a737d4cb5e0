"""Builds the native part of fastrnn, the extension `fastrnn._C`. All metadata is in pyproject.toml.

`fastrnn._C` is one shared library: the torch operators (on torch's stable ABI, so that one build
loads on the oldest torch that pyproject.toml allows and on every later one) and a few functions
that describe the build. The C++ files under csrc/ are compiled by ninja; a file named *_avx2.cpp or
*_avx512.cpp gets that instruction set's flags. Linux with GCC or Clang. Where nvcc is found, the
CUDA kernels under csrc/cuda/ are built too, whether there is a GPU or not; the library still loads
on a torch for the CPU.

Environment
    FASTRNN_BUILD     auto (default): native where torch and a compiler are found, otherwise pure
                      Python, with the reason; 1: native or fail; 0: pure Python.
                      A compiler that is found and fails is an error, also under auto.
    FASTRNN_CUDA      auto (default): CUDA kernels where nvcc is found; 1: or fail; 0: none
    TORCH_CUDA_ARCH_LIST     architectures of GPUs to build for, for example "8.0;9.0+PTX";
                      default: 8.0;9.0;10.0;12.0+PTX, as far as nvcc knows them
    CUDA_HOME         the CUDA toolkit; default: that of the nvcc on the path, or /usr/local/cuda
    FASTRNN_SANITIZE  sanitizers to build with, for example address,undefined; without CUDA
    CXX, CXXFLAGS, LDFLAGS   compiler and additional flags
    MAX_JOBS          number of parallel compilations
"""

import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
# The oldest torch that pyproject.toml allows is the one whose stable ABI the library is built for.
_FLOOR = re.search(r'"torch>=(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text())
TORCH_FLOOR = (int(_FLOOR.group(1)), int(_FLOOR.group(2)))
TORCH_TARGET_VERSION = f"0x{TORCH_FLOOR[0]:02x}{TORCH_FLOOR[1]:02x}{0:012x}"

# -ffp-contract=off: a product and a sum are fused only where the source says so, so that the
# result does not depend on the compiler. -Wno-psabi: vectors are never passed between files.
COMMON_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
WARNING_FLAGS = ["-Wall", "-Wextra", "-Wno-psabi"]
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
ISA_FLAGS = {
    "avx2": AVX2_FLAGS,
    "avx512": [
        *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq")),
        *AVX2_FLAGS,
        "-mprefer-vector-width=512",
        "-Wno-uninitialized",  # GCC 12 warns about its own AVX-512 headers;
        "-Wno-maybe-uninitialized",  # the other instruction sets check the same source
    ],
}


class Torch:
    """The installed torch: where it is and its version. It is not imported."""

    def __init__(self, origin: str):
        self.folder = Path(origin).parent
        text = (self.folder / "version.py").read_text()
        self.version = re.search(r"__version__ = '([^']+)'", text).group(1)

    @property
    def release(self) -> tuple[int, ...]:
        return tuple(int(number) for number in self.version.split(".")[:2])


def find_torch() -> Torch | None:
    """The torch of the environment that fastrnn is being installed into.

    pip builds in an isolated environment that hides the installed packages. Torch is no build
    requirement (it would be downloaded, gigabytes of it, and might differ from the one in use):
    the same interpreter, started without pip's variables, says where its own torch is.
    """
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin:
        return Torch(spec.origin)
    probe = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s else '')"
    command = [sys.executable, "-E", "-c", probe]
    answer = subprocess.run(
        command, cwd=ROOT / "csrc", check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()
    return Torch(answer) if answer else None


def find_compiler() -> list[str] | None:
    """The C++ compiler as a command, or None."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for candidate in candidates:
        command = shlex.split(candidate)
        if shutil.which(command[0]):
            return command
    return None


class Cuda:
    """A CUDA toolkit: where it is, and what to build for."""

    DEFAULT_ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"
    # -fmad=false: a product and a sum are fused only where the source says so, as on the CPU.
    HOST_FLAGS = "-fPIC,-fvisibility=hidden"
    FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-Xcompiler", HOST_FLAGS, "-Icsrc")

    def __init__(self, home: Path):
        self.home = home
        self.nvcc = str(home / "bin" / "nvcc")

    def _ask(self, option: str) -> str:
        command = [self.nvcc, option]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    @property
    def version(self) -> str:
        return re.search(r"release (\d+\.\d+)", self._ask("--version")).group(1)

    @property
    def architectures(self) -> list[str]:
        """As in TORCH_CUDA_ARCH_LIST; of the default list those that nvcc knows."""
        asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
        words = re.split(r"[;, ]+", (asked or self.DEFAULT_ARCHITECTURES).strip())
        for word in words:
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", word):
                raise SystemExit(
                    f"fastrnn: TORCH_CUDA_ARCH_LIST: expected numbers as in "
                    f"{self.DEFAULT_ARCHITECTURES}, got {word!r}."
                )
        if asked:
            return words
        known = self._ask("--list-gpu-arch").split()
        return [word for word in words if f"compute_{_number(word)}" in known]

    def compile_flags(self) -> list[str]:
        flags = list(self.FLAGS)
        for word in self.architectures:
            number, ptx = _number(word), word.endswith("+PTX")
            codes = [f"sm_{number}", *([f"compute_{number}"] if ptx else [])]
            flags.append(f"-gencode=arch=compute_{number},code=[{','.join(codes)}]")
        return flags

    def link_flags(self) -> list[str]:
        folders = [self.home / "lib64", *self.home.glob("targets/*-linux/lib")]
        libraries = ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        return [*(f"-L{folder}" for folder in folders if folder.is_dir()), *libraries]


def _number(architecture: str) -> str:
    return architecture.removesuffix("+PTX").replace(".", "")


def find_cuda() -> Cuda | None:
    """The toolkit to build CUDA kernels with; None where there are none to build."""
    mode = os.environ.get("FASTRNN_CUDA") or "auto"
    if mode not in ("auto", "1", "0"):
        raise SystemExit(f"fastrnn: FASTRNN_CUDA must be auto, 1 or 0, and is {mode!r}.")
    if mode == "0" or os.environ.get("FASTRNN_SANITIZE"):
        return None
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc:
        homes.insert(2, str(Path(nvcc).resolve().parent.parent))
    for home in map(Path, filter(None, homes)):
        if (home / "bin/nvcc").is_file() and (home / "include/cuda_runtime.h").is_file():
            return Cuda(home)
    if mode == "1":
        raise SystemExit(
            "fastrnn: FASTRNN_CUDA=1, but no CUDA toolkit was found; CUDA_HOME names it."
        )
    return None


def find_ninja() -> list[str] | None:
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    return ["ninja"] if shutil.which("ninja") else None


def why_not_native(torch: Torch | None) -> str | None:
    """The reason why the native part cannot be built here; None if it can."""
    if sys.platform != "linux":
        return f"it is built on Linux only, and this is {sys.platform}"
    if torch is None:
        return "torch is not installed in this environment; install torch first"
    if torch.release < TORCH_FLOOR:
        oldest = ".".join(map(str, TORCH_FLOOR))
        return f"torch {torch.version} is too old; it needs {oldest} or newer"
    if not (torch.folder / "include/torch/csrc/stable/library.h").is_file():
        return "this torch was installed without its C++ headers"
    if find_compiler() is None:
        wanted = os.environ.get("CXX")
        if wanted:
            return f"the C++ compiler {wanted} was not found; CXX names it"
        return "no C++ compiler was found; install g++ or clang++, or name another in CXX"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python.h is missing; install the Python development package (python3-dev)"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    if find_ninja() is None:
        return "ninja is not installed"
    return None


def sources() -> list[str]:
    """The C++ and CUDA files to compile, relative to the root of the source tree."""
    found = sorted(ROOT.glob("csrc/*.cpp")) + sorted(ROOT.glob("csrc/cpu/*.cpp"))
    if CUDA:
        found += sorted(ROOT.glob("csrc/cuda/*.cu")) + sorted(ROOT.glob("csrc/cuda/*.cpp"))
    x86 = platform.machine() == "x86_64"
    return [str(path.relative_to(ROOT)) for path in found if x86 or isa_of(path) is None]


def isa_of(path: Path) -> str | None:
    suffix = path.stem.rpartition("_")[2]
    return suffix if suffix in ISA_FLAGS else None


def code_flags() -> list[str]:
    """The flags that decide what code is generated for every file."""
    sanitize = os.environ.get("FASTRNN_SANITIZE")
    if sanitize:
        level = [
            "-O1",
            "-g",
            "-fno-omit-frame-pointer",
            f"-fsanitize={sanitize}",
            "-fno-sanitize-recover=all",
        ]
    else:
        level = ["-O3", "-DNDEBUG"]
    return [*level, *COMMON_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]


def compile_flags(torch: Torch, version: str) -> list[str]:
    import pybind11  # only where the native part is built

    includes = {  # pybind11 before torch's own copy
        "pybind11": pybind11.get_include(),
        "python": sysconfig.get_path("include"),
        "torch": str(torch.folder / "include"),
        **({"cuda": str(CUDA.home / "include")} if CUDA else {}),
    }
    flags = code_flags()
    return [
        *flags,
        *WARNING_FLAGS,
        "-Icsrc",
        *(part for folder in includes.values() for part in ("-isystem", folder)),
        # Error messages of headers name their file: without the folders of this machine.
        *(f"-ffile-prefix-map={folder}={name}" for name, folder in includes.items()),
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
        f"-DFASTRNN_VERSION={version}",
        f'-DFASTRNN_BUILD_TORCH="{torch.version}"',
        f"-DFASTRNN_BUILD_FLAGS={json.dumps(' '.join(flags))}",
        *(["-DFASTRNN_X86=1"] if platform.machine() == "x86_64" else []),
        *([f'-DFASTRNN_CUDA="{CUDA.version} for {" ".join(CUDA.architectures)}"'] if CUDA else []),
    ]


def link_flags(torch: Torch) -> list[str]:
    """libtorch_cpu is needed by name only (no run path): `import torch` has loaded it before."""
    sanitize = os.environ.get("FASTRNN_SANITIZE")
    return [
        "-shared",
        *([f"-fsanitize={sanitize}"] if sanitize else []),
        *shlex.split(os.environ.get("LDFLAGS", "")),
        f"-L{torch.folder / 'lib'}",
        "-ltorch_cpu",
        *(CUDA.link_flags() if CUDA else []),
    ]


def ninja_file(files: list[str], folder: Path, compile: list[str], link: list[str]) -> str:
    """The text of build.ninja. Paths are relative to the root, header dependencies are tracked."""

    def quoted(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    def escaped(path: str) -> str:
        return re.sub(r"([$ :])", r"$\1", path)

    compiler = quoted(find_compiler() or [])
    lines = [
        f"builddir = {escaped(str(folder))}",
        "rule compile",
        f"  command = {compiler} -MMD -MF $out.d {quoted(compile)} $isa_flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $in",
        *_nvcc_rule(escaped, quoted),
        "rule link",
        f"  command = {compiler} $in {quoted(link)} -o $out",
        "  description = link $out",
    ]
    objects = []
    for file in files:
        objects.append(escaped(str(folder / (file + ".o"))))
        rule = "nvcc" if file.endswith(".cu") else "compile"
        lines.append(f"build {objects[-1]}: {rule} {escaped(file)}")
        isa = isa_of(Path(file))
        if isa:
            lines.append(f"  isa_flags = {quoted(ISA_FLAGS[isa])}")
    lines.append(f"build {escaped(str(folder / '_C.so'))}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def _nvcc_rule(escaped: Callable[[str], str], quoted: Callable[[list[str]], str]) -> list[str]:
    if not CUDA:
        return []
    words = [word for word in find_compiler() if not word.startswith("-")]
    host = ["-ccbin", words[-1]]  # not a launcher before it, as ccache
    command = quoted([CUDA.nvcc, *host, *CUDA.compile_flags()])
    return [
        "rule nvcc",
        f"  command = {command} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = nvcc $in",
    ]


class BuildNative(build_ext):
    """Compiles and links `fastrnn._C` with ninja, only what has changed since the last time."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.force = True  # copies the library of these flags also over a newer one of others

    def run(self) -> None:
        if not self.extensions:
            if self.inplace:
                remove_native_parts()
            print(pure_python_notice())
            return
        reason = why_not_native(TORCH)
        if reason:
            raise SystemExit(
                f"fastrnn: FASTRNN_BUILD=1, but the native part cannot be built: {reason}."
            )
        super().run()

    def build_extension(self, ext: Extension) -> None:
        version = self.distribution.get_version()
        flags = compile_flags(TORCH, version), link_flags(TORCH)
        folder = Path("build") / build_name(*flags)
        text = ninja_file(ext.sources, folder, *flags)
        (ROOT / folder).mkdir(parents=True, exist_ok=True)
        (ROOT / folder / "build.ninja").write_text(text)
        jobs = os.environ.get("MAX_JOBS")
        command = [*find_ninja(), "-f", str(folder / "build.ninja")]
        if subprocess.run([*command, "-j", jobs] if jobs else command, cwd=ROOT).returncode:
            raise CompileError("fastrnn: compiling the native part failed; the messages are above")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(ROOT / folder / "_C.so"), str(target))


class BuildPython(build_py):
    """Copies the Python files, leaving nothing behind from an earlier build."""

    def run(self) -> None:
        pure = not self.distribution.ext_modules
        target = Path(self.build_lib) / "fastrnn"
        if not self.editable_mode:
            shutil.rmtree(target, ignore_errors=True)
        elif pure:
            remove_native_parts()
        if pure:
            print(pure_python_notice())
        super().run()
        if pure and not self.editable_mode:  # for fastrnn.info
            (target / "_build.py").write_text(f"PURE_PYTHON = {pure_python_reason()!r}\n")


def build_name(compile: list[str], link: list[str]) -> str:
    """The build's folder: another one for other flags, so that builds do not overwrite each other.

    pip's build environment has another name each time, which makes no difference here.
    """
    words = "\0".join([*(find_compiler() or []), *compile, *link, *(CUDA.FLAGS if CUDA else [])])
    words = re.sub(r"pip-build-env-[^/]+", "pip-build-env", words)
    kind = "sanitize" if os.environ.get("FASTRNN_SANITIZE") else "native"
    digest = hashlib.sha256(words.encode()).hexdigest()[:8]
    return f"{kind}-{sys.implementation.cache_tag}-{digest}"


def remove_native_parts() -> None:
    """Remove what an earlier build left in the source tree: it would be loaded."""
    for library in ROOT.glob("fastrnn/_C*.so"):
        library.unlink()


def build_mode() -> str:
    mode = os.environ.get("FASTRNN_BUILD") or "auto"
    if mode not in ("auto", "1", "0"):
        raise SystemExit(f"fastrnn: FASTRNN_BUILD must be auto, 1 or 0, and is {mode!r}.")
    return mode


def pure_python_reason() -> str | None:
    return "FASTRNN_BUILD=0" if build_mode() == "0" else why_not_native(TORCH)


def pure_python_notice() -> str:
    reason = pure_python_reason()
    return f"fastrnn: building the pure-Python package without the native part: {reason}."


def extensions() -> list[Extension]:
    """The extension, where it is to be built."""
    mode = build_mode()
    if mode == "0" or (mode == "auto" and why_not_native(TORCH)):
        return []
    return [Extension("fastrnn._C", sources=sources())]


def check_setuptools() -> None:
    """Older ones stop at pyproject.toml with a message that does not say so."""
    if int(setuptools.__version__.split(".")[0]) < 77:
        raise SystemExit(
            f"fastrnn: setuptools {setuptools.__version__} is too old to build with; "
            "run `pip install --upgrade setuptools` (77 or newer)."
        )


check_setuptools()
TORCH = find_torch()
CUDA = find_cuda()
setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
)
