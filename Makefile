# `make demo` and `make test` work in a fresh clone with nothing installed but Python 3.11+ and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
# Two threads, so that a laptop and a large server give the same pictures.
THREADS ?= 2
# Processes that the tests run in: two suit a laptop.
WORKERS ?= 2

.PHONY: demo two_subjects test quick lint types slurm faults speed claims base base-report clean

$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

# The whole story: class images, training with its page (report.html) and a named checkpoint, pictures with and
# without the adapter, scores.
demo: $(VENV)/installed
	rm -rf $(RUN) $(RUN)_class
	$(BIN)/accelerate launch --config_file configs/accelerate/cpu.yaml train_dreambooth_lora.py \
	  --config configs/demo.yaml --output_dir $(RUN) --class_data_dir $(RUN)_class --num_threads $(THREADS) \
	  --validation_prompts_file configs/demo_validation.txt --num_validation_images 2 --validation_steps 125 \
	  --judge_reader picturebook/subjects/dog --judge_class_images 4
	$(BIN)/python infer.py --config configs/demo_subject.yaml --adapter $(RUN) \
	  --output_dir $(RUN)/subject --num_threads $(THREADS)
	$(BIN)/python infer.py --config configs/demo_class.yaml --adapter $(RUN) \
	  --output_dir $(RUN)/class --num_threads $(THREADS)
	$(BIN)/python -m picturebook.score --subject picturebook/subjects/dog \
	  --pictures $(RUN)/subject --class_pictures $(RUN)/class --output $(RUN)/scores.json
	@echo "adapter: $(RUN)/pytorch_lora_weights.safetensors   best checkpoint: $(RUN)/best   report: $(RUN)/report.html"
	@echo "contact sheet: $(RUN)/subject/contact_sheet.png   scores: $(RUN)/scores.json"

# A second subject, trained apart, and pictures with either adapter and with both.
two_subjects: $(VENV)/installed
	test -f $(RUN)/pytorch_lora_weights.safetensors || $(MAKE) demo
	rm -rf runs/two_subjects
	$(BIN)/accelerate launch --config_file configs/accelerate/cpu.yaml train_dreambooth_lora.py \
	  --config configs/demo.yaml --instance_data_dir picturebook/subjects/cat \
	  --instance_prompt "a photo of a qwe cat" --class_prompt "a photo of a cat" \
	  --class_data_dir runs/two_subjects/class_images --output_dir runs/two_subjects/cat --num_threads $(THREADS)
	$(BIN)/python infer.py --config configs/two_subjects.yaml --output_dir runs/two_subjects/pictures \
	  --num_threads $(THREADS)
	$(BIN)/python -m picturebook.score_sets --pictures runs/two_subjects/pictures \
	  --subjects picturebook/subjects/dog picturebook/subjects/cat --output runs/two_subjects/scores.json

test: lint types
	$(BIN)/python -m pytest -n $(WORKERS)

# Before each commit: everything but the tests that train or are slow.
quick: lint types
	$(BIN)/python -m pytest -n $(WORKERS) -m "not trains and not slow"

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

# configs/slurm/train.sh on a real Slurm of two nodes on this machine (minutes). It needs root and Slurm's programs
# (slurmctld, slurmd, slurm-client and munge of Debian), and is skipped with a reason without them.
slurm: $(VENV)/installed
	$(BIN)/python -m pytest -rs tests/slurm

# Every fault that the tests know, injected and counted (minutes): benchmarks/results/faults.json and the table of
# docs/exactness.md.
faults: $(VENV)/installed
	$(BIN)/python -m benchmarks.faults

# Speed and memory (hours): benchmarks/results/speed.json and the tables of docs/speed.md.
# `make speed REFERENCE=train_dreambooth_lora.py` measures that copy of diffusers' example in turn; TORCHVISION is
# the folder of the torchvision that it needs.
speed: $(VENV)/installed
	$(BIN)/python -m benchmarks.speed $(if $(REFERENCE),--reference $(REFERENCE)) \
	  $(if $(TORCHVISION),--reference_path $(TORCHVISION))

# Claims about the method on the embedded base (hours; may be stopped and started again): benchmarks/results/claims.jsonl
# and docs/evidence.md.
claims: $(VENV)/installed
	$(BIN)/python -m benchmarks.claims --work runs/claims
	$(BIN)/python -m benchmarks.claims --tables

# Train the embedded base anew (hours), and measure it (minutes).
base: $(VENV)/installed
	$(BIN)/python -m picturebook.train_base

base-report: $(VENV)/installed
	$(BIN)/python -m picturebook.base_report

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .ruff_cache .mypy_cache
