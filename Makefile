# make demo | test | venv | lint | types | bench | bench-speed | clean      (each completes .venv by itself)
PYTHON ?= python3
BIN := .venv/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable
# What runs once more on each backend; everything together runs on JAX. Whole files stay together (loadfile): tests that
# share processes or a compiled step find it in one place.
KERAS = src/gradwise/keras.py adapters/gradwise_keras $(wildcard tests/test_keras_*.py)

.DEFAULT_GOAL := help
.PHONY: help demo test venv lint types unit bench bench-matching bench-ridge bench-capacity bench-further bench-speed bench-second-order bench-generative bench-scaling bench-population bench-population-quick clean

help:
	@echo "make demo    both plugins on real data: a table and out/demo.png (under 3 minutes)"
	@echo "make test    lint, types and all tests, those of Keras on its three backends"
	@echo "make venv    .venv with every extra"
	@echo "make bench-speed   what a step costs, beside IVON, SAM, jenn and loops by hand: out/speed.md (half an hour)"
	@echo "make bench-matching   surrogates with derivatives, beside jenn, GENN, kriging and GEKPLS (hours; resumable)"
	@echo "make bench-ridge   linear regression with derivatives: out/ridge_study.jsonl (ten minutes; resumable)"
	@echo "make bench-capacity   widths that capacity_study recommends, beside Optuna (a quarter of an hour; resumable)"
	@echo "make bench-second-order   option gamma and forces along modes, second derivatives and directions (10 minutes)"
	@echo "make bench-generative   a GAN with a teacher's gradients, and controls (a quarter of an hour; resumable)"
	@echo "make bench-further   further training with a surrogate's derivatives; rates of check_derivatives (15 minutes)"
	@echo "make bench-scaling   members under DDP and FSDP2 in 1, 2 and 4 processes: out/scaling.json (under ten minutes)"
	@echo "make bench-population   where the population gradient helps: tables and figures in out (4 hours; resumable)"
	@echo "make bench   all published measurements (long)"

demo: .venv/.demo
	$(BIN)/python examples/demo.py

test: lint types unit

lint: .venv/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: .venv/.test
	$(BIN)/pyright --pythonpath $(BIN)/python

unit: .venv/.test
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile
	KERAS_BACKEND=tensorflow $(BIN)/python -m pytest --numprocesses auto --dist loadfile $(KERAS)
	KERAS_BACKEND=torch $(BIN)/python -m pytest --numprocesses auto --dist loadfile $(KERAS)

bench-speed: .venv/.bench
	$(BIN)/python benchmarks/speed.py --compile --threads both

bench-matching: .venv/.bench
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python benchmarks/matching_study.py

bench-ridge: .venv/.bench
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python benchmarks/ridge_study.py
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python benchmarks/ridge_size.py

bench-capacity: .venv/.bench
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python benchmarks/capacity_evidence.py

STUDY = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 PYTHONPATH=benchmarks $(BIN)/python -m
bench-population: .venv/.bench
	$(STUDY) population.study
	$(STUDY) population.exact_gradient
	$(STUDY) population.auto
	$(STUDY) population.report --docs out

bench-population-quick: .venv/.bench
	$(STUDY) population.study --quick

bench-scaling: .venv/.bench
	$(BIN)/python benchmarks/scaling.py

bench-generative: .venv/.bench
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python benchmarks/generative_study.py

bench-further: .venv/.bench
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 PYTHONPATH=examples $(BIN)/python benchmarks/further_training_study.py
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 PYTHONPATH=examples $(BIN)/python benchmarks/check_derivatives_rates.py

bench: bench-speed bench-matching bench-ridge bench-capacity bench-second-order bench-generative bench-further bench-scaling bench-population
	$(BIN)/python benchmarks/vectorize_rule.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/relative_noise.py
	$(BIN)/python benchmarks/keras_speed.py

bench-second-order: .venv/.demo
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 PYTHONPATH=examples $(BIN)/python benchmarks/second_order_study.py

venv: .venv/.test
	$(INSTALL) ".[torch,keras,tensorflow,jax,lightning,transformers,plot,bench,test,docs]"

# pip does nothing, quickly, where an earlier target has installed the same.
.venv/.demo: pyproject.toml constraints.txt
	@test -d .venv || $(PYTHON) -m venv .venv
	$(INSTALL) ".[torch,plot]"
	@touch $@

.venv/.test: pyproject.toml constraints.txt
	@test -d .venv || $(PYTHON) -m venv .venv
	$(INSTALL) ".[test]"
	@touch $@

.venv/.bench: pyproject.toml constraints.txt
	@test -d .venv || $(PYTHON) -m venv .venv
	$(INSTALL) ".[bench]"
	@touch $@

clean:
	rm -rf .venv out dist .pytest_cache .ruff_cache .hypothesis
