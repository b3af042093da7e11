# Two commands on a fresh machine with Python 3.11 or later and make: make demo, make test. PYTHON=python3.12 names another one.
PYTHON ?= python3
VENV = .venv
RUN = $(VENV)/bin/python
JOBS = 2

.PHONY: demo tiny-nt paper-mini test test-oldest test-newest bench soak lint clean

# The environment: made once, and again when the lock file changes.
$(VENV)/.installed: requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.lock
	touch $@

# Simulate a corpus, prepare it, train a small network from random weights, evaluate its checkpoint.
demo: $(VENV)/.installed
	$(RUN) prepare.py --demo --out data/demo --overwrite
	$(RUN) train.py --model tiny-nt --strategy random --data data/demo --epochs 3 --out runs/demo --overwrite
	$(RUN) evaluate.py runs/demo/ckpt.pt

# The checkpoint that ships in taxa/assets/tiny_nt, made again (its README.md tells what it is): about half an hour of one core.
PRETRAINED = runs/pretrain-tiny-nt
tiny-nt: $(VENV)/.installed
	$(RUN) experiments/genomes.py --genera 4000 --sequences 120000 --seed 1 --out data/pretraining-fasta
	$(RUN) prepare.py --fasta data/pretraining-fasta/*_db.fa --taxdump data/pretraining-fasta/taxdmp_simulated.zip --out data/pretraining \
		--validation 0.02 --test 0.01 --overwrite
	OMP_NUM_THREADS=1 $(RUN) pretrain.py --model tiny-nt --data data/pretraining --tied --batch-size 16 --lr 2e-3 --warmup-steps 200 \
		--max-steps 3000 --float16 --out $(PRETRAINED) --overwrite
	cp $(PRETRAINED)/config.json $(PRETRAINED)/model.safetensors taxa/assets/tiny_nt/

# The paper's comparison on simulated genomes: at most 45 minutes on 2 cores, or with QUICK=1 at most 8; what is finished is not run again.
# Two steps come before the study: simulated genomes, prepared, and tiny-dnabert, for which nothing is published, pretrained on others of
# them (a genus needs three sequences to have one in each split). In experiments/: paper_mini.csv, paper_mini_quick.csv, and heads.csv, which
# needs the data many and real as well (docs/STUDY.md).
MINI = paper-mini$(if $(QUICK),-quick)
MINI_DATA = data/paper-mini/few$(if $(QUICK),-quick)
PRETRAINED_MINI = runs/$(MINI)/pretrain-tiny-dnabert
paper-mini: | $(MINI_DATA)/manifest.json $(PRETRAINED_MINI)/metrics.json
	OMP_NUM_THREADS=1 $(RUN) study.py --grid experiments/$(subst -,_,$(MINI)).csv --set '--epochs 1 --batch-size 16' --out runs/$(MINI) \
		--jobs $(JOBS)
	$(if $(QUICK),,test -e runs/$(MINI)/probe.json || $(RUN) probe_batch.py --model tiny-nt --strategies all --memory-limit 200MiB \
		--steps 1 --device cpu --out runs/$(MINI)/probe.json)
	$(RUN) report.py runs/$(MINI) $(if $(QUICK),,--probe runs/$(MINI)/probe.json) --out report/$(MINI)

# $(call genomes,FOLDER,GENERA,SEQUENCES,SEED,FLAGS OF prepare.py): simulated genomes, prepared in FOLDER.
define genomes
$(1)/manifest.json: | $(VENV)/.installed
	$(RUN) experiments/genomes.py --genera $(2) --sequences $(3) --seed $(4) --out $(1)-fasta
	$(RUN) prepare.py --fasta $(1)-fasta/*_db.fa --taxdump $(1)-fasta/taxdmp_simulated.zip --out $(1) $(5) --tokenizers nt tiny-dnabert
endef
SPLIT = --test 0.2 --validation 0.05
$(eval $(call genomes,data/paper-mini/few,40,4000,11,$(SPLIT)))
$(eval $(call genomes,data/paper-mini/many,320,4800,12,$(SPLIT)))
$(eval $(call genomes,data/paper-mini/few-quick,20,640,11,$(SPLIT)))
$(eval $(call genomes,data/paper-mini/pretraining,400,6000,1,--test 0.01 --validation 0.01))
$(eval $(call genomes,data/paper-mini/pretraining-quick,40,1500,1,--test 0.01 --validation 0.01))

PRETRAINING_DATA = data/paper-mini/pretraining$(if $(QUICK),-quick)
$(PRETRAINED_MINI)/metrics.json: | $(PRETRAINING_DATA)/manifest.json
	$(RUN) pretrain.py --model tiny-dnabert --data $(PRETRAINING_DATA) --epochs 1 --batch-size 16 --lr 2e-3 --warmup-steps 40 \
		--resume --out $(@D)

# Kill a run by two processes 20 times at random moments, resume it, and compare the end with a run that nobody touched; the same with a
# queue of 12 runs, killed 5 times: some minutes each.
soak: $(VENV)/.installed
	$(RUN) tests/soak.py --kills 20
	$(RUN) tests/soak_study.py --kills 5

# Test files go to JOBS processes of one thread each.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n $(JOBS) --dist loadfile

# The suite in an environment of its own for the Python of PYTHON=: the lower bounds of setup.py, or no pins at all. TORCH=2.14.1+cpu, say,
# spares the gigabytes that a bare torch brings. docs/VERSIONS.md says what passed last.
test-oldest test-newest: test-%:
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet --disable-pip-version-check --upgrade setuptools
	.venv-$*/bin/python tests/bounds.py $* > .venv-$*/requirements.txt
	.venv-$*/bin/pip install --quiet --disable-pip-version-check -r .venv-$*/requirements.txt $(if $(TORCH),torch==$(TORCH))
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -q -n $(JOBS) --dist loadfile

# A training step of every strategy beside public parts: 9 to 17 minutes on 2 cores that do nothing else.
bench: $(VENV)/.installed
	$(RUN) benchmarks/step.py

lint: $(VENV)/.installed
	$(RUN) -m compileall -q taxa tests benchmarks experiments *.py
	$(VENV)/bin/ruff check .

# What the commands of README.md leave behind, but for data and runs of your own: data/bertax, data/mine, and runs/ are yours to remove.
clean:
	rm -rf $(VENV) .venv-oldest .venv-newest build *.egg-info .pytest_cache .hypothesis data/demo data/sim runs/demo adapters exported report
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
