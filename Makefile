# Everything runs in .venv; needed are Linux, python3 (3.10 or newer) with its headers, make, a C++
# compiler, and a package index for pip. README.md tells sizes, times and the CPU build of torch.
#
#   make demo      train a classifier on handwritten digits, into digits.png  (ARGS="--cell gru")
#   make test      linters, type checker, formatter, all tests (ARGS="-k lstm")
#   make build     the environment and the native library; compiles only what has changed
#   make sanitize  kernel tests under the address and undefined-behaviour sanitizers (needs GCC)
#   make fuzz      10,000 random configurations against torch.nn
#   make bench     the CPU benchmarks                          (ARGS="--help")
#   make gpu       on a machine with an NVIDIA GPU: builds into its own Python, probes, checks, times
#   make gpu-sanitize  its tests there under compute-sanitizer
#   make format    rewrites csrc/ as clang-format wants it
#   make clean     removes what was built; `rm -rf .venv` removes the environment
#
# FASTRNN_BUILD, FASTRNN_CUDA, CXX, CXXFLAGS and MAX_JOBS are explained in setup.py.

# Of the CUDA kernels, where there is nvcc: one architecture, so that a build does not take long.
export TORCH_CUDA_ARCH_LIST ?= 9.0
PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
CPP_FILES = $(shell find csrc tests bench -name '*.h' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cu')

.NOTPARALLEL:  # pip twice at a time in one environment
.PHONY: demo test env build sanitize fuzz bench gpu gpu-sanitize format clean

demo: build
	$(BIN)/python examples/digits.py $(ARGS)

test: export FASTRNN_BUILD := 1
test: env build
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)
ifneq ($(strip $(ARGS)),)
	$(BIN)/python -m pytest -q $(ARGS)
else
	@mkdir -p build
	$(BIN)/python -m pytest -q $(KERNEL_TESTS) >$(KERNEL_REPORT) 2>&1 & kernels=$$!; trap 'kill $$kernels' INT TERM; \
	$(BIN)/python -m pytest -q $(KERNEL_TESTS:%=--ignore=%); others=$$?; \
	wait $$kernels; kernels=$$?; cat $(KERNEL_REPORT); exit $$((kernels | others))
endif

# All tests are two runs side by side, of about the same time: of the GPU kernels on the host and of
# long sequences, and of everything else. Threads that wait leave the processor to the other run.
KERNEL_TESTS := tests/gpu tests/triton_backend tests/test_bench_gpu.py tests/test_cuda_resets.py \
	tests/test_sequences.py tests/test_long.py
KERNEL_REPORT := build/kernel-tests.txt
test: export OMP_WAIT_POLICY := passive

env: $(VENV)/dev.stamp

$(VENV)/demo.stamp: requirements-demo.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("fastrnn needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements-demo.txt
	@touch $@

$(VENV)/dev.stamp: $(VENV)/demo.stamp requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	@touch $@

# The metadata only: `build` compiles in place, where the compiler's output is seen.
$(VENV)/package.stamp: $(VENV)/demo.stamp pyproject.toml setup.py
	FASTRNN_BUILD=0 $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

build: $(VENV)/package.stamp
	$(BIN)/python setup.py --quiet build_ext --inplace

# A second copy of the package, built with sanitizers and tested next to a copy of the tests.
# The sanitizer's runtime has to be in the process before Python is.
SANITIZED := build/sanitized
SANITIZE_RUN = cd $(SANITIZED) && \
	LD_PRELOAD="$(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	PYTHONPATH=$(abspath $(SANITIZED)) $(abspath $(BIN))/python

sanitize: env $(VENV)/package.stamp
	FASTRNN_BUILD=1 FASTRNN_SANITIZE=address,undefined \
		$(BIN)/python setup.py --quiet build --build-lib $(SANITIZED)
	rm -rf $(SANITIZED)/tests && cp -r tests $(SANITIZED)/tests && ln -sfn $(abspath csrc) $(SANITIZED)/csrc
	$(SANITIZE_RUN) -m pytest -q -p no:cacheprovider \
		tests/test_ops.py tests/test_ops_groups.py tests/test_rows.py tests/test_sequences.py \
		tests/test_stream.py tests/test_quantize.py \
		tests/test_errors.py tests/test_errors_low_level.py tests/test_errors_step.py \
		tests/gpu
	$(SANITIZE_RUN) tests/fuzz.py --n 300

fuzz: build
	$(BIN)/python tests/fuzz.py --n 10000 $(ARGS)

bench: build
	$(BIN)/python -m bench.run $(ARGS)

# In the Python that has a torch for CUDA, setuptools, pybind11, ninja and pytest; nothing is downloaded.
ARCHITECTURE = $$($(PYTHON) -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())")
gpu:
	TORCH_CUDA_ARCH_LIST=$(ARCHITECTURE) FASTRNN_BUILD=1 FASTRNN_CUDA=1 $(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(PYTHON) -m bench.gpu $(ARGS)  # --deadline: 420 seconds, so that with the build it takes ten minutes

# What compute-sanitizer finds in the kernels: of the device's memory, one tensor a block of its own, and of races.
# Graphs of tensors are not to be had that way.
gpu-sanitize:
	for tool in memcheck racecheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 --target-processes all \
			$(PYTHON) -m pytest -q tests/gpu -k "not graph and not float64" $(ARGS) || exit 1; \
	done

format: env
	$(BIN)/clang-format -i $(CPP_FILES)

clean:
	rm -rf build dist *.egg-info fastrnn/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find csrc fastrnn tests bench examples -name __pycache__ -prune -exec rm -rf {} +
